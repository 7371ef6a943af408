//! tokenizer.json of a GGUF file.

use serde_json::{Map, Value, json};

use super::DAMAGED;
use super::pre_tokenizer::PreTokenizer;
use super::vocabulary::{Model, TokenKind, Vocabulary};

/// What SentencePiece writes for a space.
const SPACE: &str = "▁";

/// As many bytes of merges as a vocabulary of pieces may have for each byte of its tokens. Real ones have two or three;
/// tokens made to be parts of each other would have any number.
const MOST_MERGE_BYTES: usize = 64;

/// tokenizer.json of this vocabulary, in the format of the crate `tokenizers`. Errors are sentences about the file.
pub(super) fn json(vocabulary: &Vocabulary<'_>) -> Result<Value, String> {
    let mut tokenizer = match vocabulary.model {
        Model::ByteLevel => byte_level(vocabulary)?,
        Model::Pieces => pieces(vocabulary)?,
    };
    tokenizer["version"] = "1.0".into();
    tokenizer["added_tokens"] = added_tokens(vocabulary)?;
    tokenizer["post_processor"] = around_text(vocabulary)?;
    Ok(tokenizer)
}

/// Whether a text begins with `bos`.
pub(super) fn adds_bos(vocabulary: &Vocabulary<'_>) -> Result<bool, String> {
    let usual = match vocabulary.model {
        Model::ByteLevel => PreTokenizer::of(vocabulary.pre_tokenizer()?)?.add_bos,
        Model::Pieces => true,
    };
    Ok(vocabulary.switch("add_bos_token")?.unwrap_or(usual))
}

/// Byte pair encoding of bytes, each of them a printable character.
fn byte_level(vocabulary: &Vocabulary<'_>) -> Result<Value, String> {
    let kind = PreTokenizer::of(vocabulary.pre_tokenizer()?)?;
    let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let steps: Vec<Value> = kind.patterns.iter().map(split).chain([bytes]).collect();
    let mut merges = Vec::new();
    for merge in vocabulary.merges()? {
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| format!("merge {merge:?} of `tokenizer.ggml.merges` is no pair of tokens; {DAMAGED}"))?;
        merges.push(json!([left, right]));
    }
    Ok(json!({
        "normalizer": kind.composes.then(|| json!({"type": "NFC"})),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "unk_token": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": kind.ignore_merges,
            "vocab": vocab(vocabulary),
            "merges": merges,
        },
    }))
}

/// SentencePiece as llama.cpp has it: the pair that makes the token with the highest score is merged first; what is in no
/// token becomes bytes.
fn pieces(vocabulary: &Vocabulary<'_>) -> Result<Value, String> {
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if vocabulary.switch("add_space_prefix")?.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": vocabulary.special_text("unknown")?,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab(vocabulary),
            "merges": merges_by_score(vocabulary)?,
        },
    }))
}

/// All pairs of tokens that make a token, those first whose token has the higher score, of one token those with the
/// longer first part.
fn merges_by_score(vocabulary: &Vocabulary<'_>) -> Result<Vec<Value>, String> {
    let scores = vocabulary.scores()?;
    let is_piece = |id: u32| {
        matches!(vocabulary.tokens[id as usize].kind, TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused)
    };
    let find = |text: &str| vocabulary.ids.get(text).copied().filter(|id| is_piece(*id));
    let mut left =
        vocabulary.tokens.iter().map(|token| token.text.len()).sum::<usize>().saturating_mul(MOST_MERGE_BYTES);
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for (token, &score) in vocabulary.tokens.iter().zip(&scores).filter(|(token, _)| find(&token.text).is_some()) {
        if score.is_nan() {
            return Err(format!("the score of token {:?} is not a number; {DAMAGED}", token.text));
        }
        for (at, _) in token.text.char_indices().skip(1) {
            let (first, second) = token.text.split_at(at);
            if find(first).is_some() && find(second).is_some() {
                left = left.checked_sub(token.text.len()).ok_or_else(|| {
                    format!("the tokens of `tokenizer.ggml.tokens` are parts of each other in too many ways; {DAMAGED}")
                })?;
                merges.push((score, first, second));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.len().cmp(&a.1.len())));
    Ok(merges.into_iter().map(|(_, first, second)| json!([first, second])).collect())
}

fn vocab(vocabulary: &Vocabulary<'_>) -> Map<String, Value> {
    vocabulary.tokens.iter().enumerate().map(|(id, token)| (token.text.clone().into_owned(), id.into())).collect()
}

/// Tokens that are found in a text before all else.
fn added_tokens(vocabulary: &Vocabulary<'_>) -> Result<Value, String> {
    // A file does not tell that Phi-3's special tokens take the space behind them; llama.cpp goes by the name, too.
    let name = vocabulary.model_name();
    let takes_space = ["phi-3", "phi3"].iter().any(|phi3| name.contains(phi3));
    let tokens = vocabulary.tokens.iter().enumerate().filter(|(_, token)| token.kind.is_added());
    let added = tokens.map(|(id, token)| {
        let rstrip = takes_space && !["<unk>", "<s>", "<|endoftext|>"].contains(&&*token.text);
        json!({
            "id": id,
            "content": token.text,
            "single_word": false,
            "lstrip": false,
            "rstrip": rstrip,
            "normalized": false,
            "special": token.kind != TokenKind::UserDefined,
        })
    });
    Ok(added.collect())
}

/// What is put around a text: `bos` before it, `eos` behind it, or nothing.
fn around_text(vocabulary: &Vocabulary<'_>) -> Result<Value, String> {
    let mut special = Map::new();
    let mut part = |wanted: bool, name: &str| -> Result<Option<Value>, String> {
        let Some(id) = vocabulary.special(name)?.filter(|_| wanted) else { return Ok(None) };
        let text = &*vocabulary.tokens[id as usize].text;
        special.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
        Ok(Some(json!({"SpecialToken": {"id": text, "type_id": 0}})))
    };
    let before = part(adds_bos(vocabulary)?, "bos")?;
    let behind = part(vocabulary.switch("add_eos_token")?.unwrap_or(false), "eos")?;
    if special.is_empty() {
        return Ok(Value::Null);
    }
    let around = |sequences: &[&str]| {
        let sequence = |name: &&str| json!({"Sequence": {"id": name, "type_id": 0}});
        let one =
            |name: &&str| before.iter().cloned().chain([sequence(name)]).chain(behind.clone()).collect::<Vec<_>>();
        sequences.iter().flat_map(one).collect::<Value>()
    };
    Ok(json!({
        "type": "TemplateProcessing",
        "single": around(&["A"]),
        "pair": around(&["A", "B"]),
        "special_tokens": special,
    }))
}
