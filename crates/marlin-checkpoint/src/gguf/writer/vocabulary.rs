//! The tokenizer, as llama.cpp is told.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value as Json;

use super::file::Value;
use crate::{Checkpoint, CheckpointError, TOKENIZER_FILE};

/// Where words are cut, by the name that llama.cpp has for it (llama-vocab.cpp), with whether tokens of the vocabulary
/// are taken whole there, before merges.
const PATTERNS: [(&str, bool, &str); 2] = [
    (
        "qwen2",
        false,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    (
        "llama-bpe",
        true,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
];

/// Kinds of tokens (`llama_token_type`).
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// tokenizer.json, as far as it bears on this.
#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    normalizer: Json,
    #[serde(default)]
    pre_tokenizer: Json,
    model: Bpe,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct Bpe {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: BTreeMap<String, usize>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a pair of tokens, or a text with a space between the two")]
enum Merge {
    Text(String),
    Pair([String; 2]),
}

#[derive(Deserialize)]
struct AddedToken {
    id: usize,
    content: String,
    special: bool,
}

/// The metadata of the tokenizer of a model with embeddings of so many tokens.
pub(super) fn metadata(source: &Checkpoint, size: usize) -> Result<Vec<(String, Value)>, CheckpointError> {
    let bytes = source.file(TOKENIZER_FILE)?.ok_or_else(|| CheckpointError::MissingFile {
        file: format!("{}/{TOKENIZER_FILE}", source.name()),
        hint: "a GGUF file holds the tokenizer as well; download it with the model".to_owned(),
    })?;
    let wrong = |problem: String| CheckpointError::Tokenizer { file: TOKENIZER_FILE.to_owned(), problem };
    let file: Json = serde_json::from_slice(&bytes).map_err(|e| wrong(format!("invalid: {e}")))?;
    if file["model"]["type"].as_str().is_some_and(|kind| kind != "BPE") {
        return Err(wrong(format!("is of type {}; GGUF files are written with BPE of bytes", file["model"]["type"])));
    }
    let file = TokenizerFile::deserialize(&file).map_err(|e| wrong(format!("invalid: {e}")))?;
    let pre = file.pre().map_err(wrong)?;
    let (tokens, types) = file.tokens(size).map_err(wrong)?;

    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let merges = file.model.merges.iter().map(|merge| match merge {
        Merge::Text(text) => text.clone(),
        Merge::Pair([first, second]) => format!("{first} {second}"),
    });
    let mut metadata = vec![
        (key("model"), Value::String("gpt2".to_owned())),
        (key("pre"), Value::String(pre.to_owned())),
        (key("tokens"), Value::Strings(tokens)),
        (key("token_type"), Value::I32s(types)),
        (key("merges"), Value::Strings(merges.collect())),
    ];
    let tokenizer = source.tokenizer()?;
    let special = source.special_tokens()?;
    let config = source.config();
    let id = |token: &str| {
        let of_tokenizer = special.get(&format!("{token}_token")).and_then(|text| tokenizer.token_id(text));
        let field = &config[format!("{token}_token_id")];
        let of_config = field.as_u64().or_else(|| field[0].as_u64()).and_then(|id| u32::try_from(id).ok());
        of_tokenizer.or(of_config).filter(|id| (*id as usize) < size)
    };
    let (bos, eos, pad) = (id("bos"), id("eos"), id("pad"));
    for (name, id) in [("bos_token_id", bos), ("eos_token_id", eos), ("padding_token_id", pad)] {
        metadata.extend(id.map(|id| (key(name), Value::U32(id))));
    }
    // What `encode` puts before a text, which is what tokenizer.json and tokenizer_config.json say together.
    let before = tokenizer.encode("", true)?;
    if !(before.is_empty() || before.len() == 1 && before.first() == bos.as_ref()) {
        return Err(wrong(format!("puts the tokens {before:?} around a text; llama.cpp knows bos_token alone")));
    }
    metadata.push((key("add_bos_token"), Value::Bool(!before.is_empty())));
    metadata.push((key("add_eos_token"), Value::Bool(false)));
    if let Some(template) = source.chat_template()? {
        metadata.push(("tokenizer.chat_template".to_owned(), Value::String(template)));
    }
    Ok(metadata)
}

impl TokenizerFile {
    /// `tokenizer.ggml.pre`.
    fn pre(&self) -> Result<&'static str, String> {
        if self.model.byte_fallback || self.model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
            return Err("is no BPE of bytes, the only kind that GGUF files are written with".to_owned());
        }
        if !(self.normalizer.is_null() || self.normalizer["type"] == "NFC") {
            return Err(format!("normalises text by {}, which llama.cpp does not do", self.normalizer));
        }
        let steps = match self.pre_tokenizer["pretokenizers"].as_array() {
            Some(steps) if self.pre_tokenizer["type"] == "Sequence" => steps.as_slice(),
            _ => std::slice::from_ref(&self.pre_tokenizer),
        };
        let (pre, takes_whole) = match steps {
            [bytes] if is_bytes(bytes) && bytes["use_regex"] != false => ("gpt-2", false),
            [split, bytes] if is_bytes(bytes) && bytes["use_regex"] == false && split["type"] == "Split" => {
                let is_usual = split["behavior"] == "Isolated" && split["invert"] != true;
                let pattern = split["pattern"]["Regex"].as_str().filter(|_| is_usual);
                let known = PATTERNS.iter().find(|(_, _, known)| pattern == Some(known));
                let (name, takes_whole, _) = known.ok_or_else(|| unknown(&split["pattern"]))?;
                (*name, *takes_whole)
            }
            _ => return Err(unknown(&self.pre_tokenizer)),
        };
        if takes_whole != self.model.ignore_merges {
            return Err(format!(
                "has ignore_merges = {}, but llama.cpp takes it as {takes_whole} for `{pre}`, the way words are cut \
                 here",
                self.model.ignore_merges
            ));
        }
        Ok(pre)
    }

    /// Texts and kinds of all tokens by their number.
    fn tokens(&self, size: usize) -> Result<(Vec<String>, Vec<i32>), String> {
        let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED; size];
        let added = |token: &AddedToken| (token.id, token.content.clone(), token.special);
        let vocabulary = self.model.vocab.iter().map(|(text, id)| (*id, text.clone(), NORMAL));
        let added = self.added_tokens.iter().map(added);
        let added = added.map(|(id, text, special)| (id, text, if special { CONTROL } else { USER_DEFINED }));
        for (id, text, kind) in vocabulary.chain(added) {
            if id >= size {
                return Err(format!("has the token `{text}` with number {id}; the embedding has {size} rows"));
            }
            (tokens[id], types[id]) = (text, kind);
        }
        Ok((tokens, types))
    }
}

/// Whether a step turns text into bytes, as all of these tokenizers do last.
fn is_bytes(step: &Json) -> bool {
    step["type"] == "ByteLevel" && step["add_prefix_space"] != true
}

fn unknown(found: &Json) -> String {
    let known: Vec<&str> = PATTERNS.iter().map(|(name, ..)| *name).chain(["gpt-2"]).collect();
    format!(
        "cuts words in a way that is not known here, so that llama.cpp could not be told ({}): {found}; choose another \
         --layout",
        known.join(", ")
    )
}
