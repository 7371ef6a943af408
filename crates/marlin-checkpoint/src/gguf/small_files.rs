//! The small files that a model of Hugging Face has beside its weights, made of the metadata of a GGUF file.

use serde_json::{Map, Value, json};

use super::vocabulary::Vocabulary;
use super::{DAMAGED, Gguf, tokenizer};
use crate::chat_template::TEMPLATE_FILE;
use crate::generation_config::GENERATION_CONFIG;
use crate::tokenizer::{TOKENIZER_CONFIG, TOKENIZER_FILE};

const TEMPLATE: &str = "tokenizer.chat_template";

/// Special tokens: names in GGUF files, and those of tokenizer_config.json.
const SPECIAL: [(&str, &str); 6] = [
    ("bos", "bos_token"),
    ("eos", "eos_token"),
    ("unknown", "unk_token"),
    ("padding", "pad_token"),
    ("seperator", "sep_token"),
    ("mask", "mask_token"),
];

/// Tokens that end generation by what they are for.
const ENDS: [&str; 6] = ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"];

/// Special tokens that end generation by their text, as in llama.cpp: files rarely name those that end a turn.
const END_TEXTS: [&str; 25] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<|file_sep|>",
    "[e~[",
];

/// A small file; `None` if the model would have none of this name. Errors are sentences about the GGUF file.
pub(super) fn read(gguf: &Gguf, name: &str) -> Result<Option<Vec<u8>>, String> {
    let json = |value: Value| Some(value.to_string().into_bytes());
    if name == TEMPLATE_FILE {
        return Ok(template(gguf, TEMPLATE)?.map(|template| template.as_bytes().to_vec()));
    }
    let (TOKENIZER_FILE | TOKENIZER_CONFIG | GENERATION_CONFIG) = name else { return Ok(None) };
    let Some(vocabulary) = Vocabulary::read(gguf)? else { return Ok(None) };
    Ok(match name {
        TOKENIZER_FILE => json(tokenizer::json(&vocabulary)?),
        TOKENIZER_CONFIG => json(tokenizer_config(gguf, &vocabulary)?),
        _ => json(generation_config(&vocabulary)?),
    })
}

fn tokenizer_config(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Value, String> {
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer::adds_bos(vocabulary)?,
        "clean_up_tokenization_spaces": false,
    });
    for (name, token) in SPECIAL {
        if let Some(text) = vocabulary.special_text(name)? {
            config[token] = text.into();
        }
    }
    if let Some(templates) = named_templates(gguf)? {
        config["chat_template"] = templates;
    }
    Ok(config)
}

/// All templates with their names; `None` if there is no other than the default.
fn named_templates(gguf: &Gguf) -> Result<Option<Value>, String> {
    const NAMES: &str = "tokenizer.chat_templates";
    let Some(names) = gguf.value(NAMES) else { return Ok(None) };
    let names = names.as_array().ok_or_else(|| format!("metadata `{NAMES}` is {names:?}, wanted names; {DAMAGED}"))?;
    let default = template(gguf, TEMPLATE)?.map(|template| json!({"name": "default", "template": template}));
    let mut templates: Vec<Value> = default.into_iter().collect();
    for name in names.iter() {
        let name =
            name.as_str().ok_or_else(|| format!("metadata `{NAMES}` holds {name:?}, wanted names; {DAMAGED}"))?;
        if let Some(template) = template(gguf, &format!("{TEMPLATE}.{name}"))? {
            templates.push(json!({"name": name, "template": template}));
        }
    }
    Ok(Some(templates.into()))
}

fn template<'g>(gguf: &'g Gguf, key: &str) -> Result<Option<&'g str>, String> {
    let Some(value) = gguf.value(key) else { return Ok(None) };
    value.as_str().map(Some).ok_or_else(|| format!("metadata `{key}` is {value:?}, wanted a template; {DAMAGED}"))
}

fn generation_config(vocabulary: &Vocabulary<'_>) -> Result<Value, String> {
    let mut config = Map::new();
    for (name, key) in [("bos", "bos_token_id"), ("padding", "pad_token_id")] {
        if let Some(id) = vocabulary.special(name)? {
            config.insert(key.to_owned(), id.into());
        }
    }
    let ends = ends(vocabulary)?;
    if !ends.is_empty() {
        config.insert("eos_token_id".to_owned(), ends.into());
    }
    Ok(config.into())
}

/// Tokens that end generation, that of the file first.
fn ends(vocabulary: &Vocabulary<'_>) -> Result<Vec<u32>, String> {
    let mut ends: Vec<u32> = Vec::new();
    for name in ENDS {
        ends.extend(vocabulary.special(name)?.filter(|id| !ends.contains(id)));
    }
    let find = |text: &str| {
        let is_special = |id: &u32| vocabulary.tokens[*id as usize].kind.is_added();
        vocabulary.ids.get(text).copied().filter(is_special)
    };
    let by_text: Vec<u32> = END_TEXTS.iter().filter_map(|text| find(text)).collect();
    for id in by_text {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    // In gpt-oss a message ends with it, not the turn.
    if let (Some(_), Some(_), Some(end)) = (find("<|return|>"), find("<|call|>"), find("<|end|>")) {
        ends.retain(|id| *id != end);
    }
    Ok(ends)
}
