//! The vocabulary of a GGUF file: what its metadata `tokenizer.ggml.*` says, checked.

use std::borrow::Cow;
use std::collections::HashMap;

use super::value::{GgufArray, GgufValue, GgufValueType};
use super::{DAMAGED, Gguf};

/// Tokens, and what is special about some of them.
pub(super) struct Vocabulary<'g> {
    pub(super) model: Model,
    /// By id.
    pub(super) tokens: Vec<Token<'g>>,
    /// Ids by text; no two tokens have the same.
    pub(super) ids: HashMap<&'g str, u32>,
    gguf: &'g Gguf,
}

/// How text becomes tokens (`tokenizer.ggml.model`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Model {
    /// Pairs of bytes are merged (`gpt2`).
    ByteLevel,
    /// SentencePiece: pairs of characters are merged by the score of what they become (`llama`).
    Pieces,
}

/// A token.
pub(super) struct Token<'g> {
    pub(super) text: Cow<'g, str>,
    pub(super) kind: TokenKind,
}

/// What a token is (`llama_token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// Text, or of no kind.
    Normal,
    /// Stands for what is no token.
    Unknown,
    /// Stands for no text.
    Control,
    /// Text that is a token wherever it occurs.
    UserDefined,
    /// Nothing.
    Unused,
    /// A byte that is part of no token.
    Byte,
}

impl TokenKind {
    fn of(value: GgufValue<'_>) -> Self {
        match value.as_u64() {
            Some(2) => Self::Unknown,
            Some(3) => Self::Control,
            Some(4) => Self::UserDefined,
            Some(5) => Self::Unused,
            Some(6) => Self::Byte,
            _ => Self::Normal,
        }
    }

    /// Whether the token is found in a text before all else.
    pub(super) fn is_added(self) -> bool {
        matches!(self, Self::Unknown | Self::Control | Self::UserDefined)
    }
}

impl<'g> Vocabulary<'g> {
    /// The vocabulary; `None` if the file has none. Errors are sentences about the file.
    pub(super) fn read(gguf: &'g Gguf) -> Result<Option<Self>, String> {
        let Some(model) = string(gguf, "model")? else { return Ok(None) };
        let model = match model {
            "gpt2" => Model::ByteLevel,
            "llama" => Model::Pieces,
            "none" | "no_vocab" => return Ok(None),
            other => {
                return Err(format!(
                    "its tokenizer is of the kind `{other}` (metadata `tokenizer.ggml.model`); read are `gpt2` and \
                     `llama`, take a folder with tokenizer.json instead"
                ));
            }
        };
        let texts = array(gguf, "tokens", &[GgufValueType::String])?.ok_or_else(|| missing("tokens"))?;
        let kinds = of_tokens(gguf, "token_type", &[GgufValueType::I32, GgufValueType::U32], texts.len())?;
        let kinds = kinds.iter().flat_map(GgufArray::iter).map(TokenKind::of);
        let kinds = kinds.chain(std::iter::repeat(TokenKind::Normal));
        let named = |(id, text): (usize, GgufValue<'g>)| match text.as_str() {
            // As llama.cpp calls tokens without a text.
            None | Some("") => Cow::Owned(format!("[EMPTY_{id}]")),
            Some(text) => Cow::Borrowed(text),
        };
        let texts = texts.iter().enumerate().map(named);
        let tokens: Vec<Token<'g>> = texts.zip(kinds).map(|(text, kind)| Token { text, kind }).collect();
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            let Cow::Borrowed(text) = token.text else { continue };
            if let Some(first) = ids.insert(text, id as u32) {
                return Err(format!("tokens {first} and {id} of `tokenizer.ggml.tokens` are both {text:?}; {DAMAGED}"));
            }
        }
        Ok(Some(Self { model, tokens, ids, gguf }))
    }

    /// Scores of all tokens; of SentencePiece only.
    pub(super) fn scores(&self) -> Result<Vec<f32>, String> {
        let types = [GgufValueType::F32, GgufValueType::I32];
        let scores = of_tokens(self.gguf, "scores", &types, self.tokens.len())?.ok_or_else(|| missing("scores"))?;
        let score = |value: GgufValue<'_>| match value {
            GgufValue::F32(score) => score,
            GgufValue::I32(score) => score as f32,
            _ => 0.0,
        };
        Ok(scores.iter().map(score).collect())
    }

    /// Pairs of tokens that are merged, the first ones first; of byte-level vocabularies only.
    pub(super) fn merges(&self) -> Result<impl Iterator<Item = &'g str> + use<'g>, String> {
        let merges = array(self.gguf, "merges", &[GgufValueType::String])?.ok_or_else(|| missing("merges"))?;
        Ok(merges.iter().filter_map(|merge| merge.as_str()))
    }

    /// A special token by what it is for: `bos`, `eos`, `unknown` and so on. As in llama.cpp an id beyond the vocabulary
    /// is none.
    pub(super) fn special(&self, name: &str) -> Result<Option<u32>, String> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let found = match self.gguf.value(&key) {
            Some(value) => {
                value.as_u64().ok_or_else(|| format!("metadata `{key}` is {value:?}, wanted a token; {DAMAGED}"))?
            }
            None => match (self.model, name) {
                (Model::Pieces, "unknown") => 0,
                (Model::Pieces, "bos") => 1,
                (Model::Pieces, "eos") => 2,
                _ => return Ok(None),
            },
        };
        Ok(u32::try_from(found).ok().filter(|id| (*id as usize) < self.tokens.len()))
    }

    /// The text of a special token.
    pub(super) fn special_text(&self, name: &str) -> Result<Option<&str>, String> {
        Ok(self.special(name)?.map(|id| &*self.tokens[id as usize].text))
    }

    /// A switch; `None` if the file does not say.
    pub(super) fn switch(&self, name: &str) -> Result<Option<bool>, String> {
        let key = format!("tokenizer.ggml.{name}");
        let read = |value: GgufValue<'_>| {
            value.as_bool().ok_or_else(|| format!("metadata `{key}` is {value:?}, wanted a bool; {DAMAGED}"))
        };
        self.gguf.value(&key).map(read).transpose()
    }

    /// The kind of pre-tokenizer.
    pub(super) fn pre_tokenizer(&self) -> Result<Option<&'g str>, String> {
        string(self.gguf, "pre")
    }

    /// The name of the model, in lower case.
    pub(super) fn model_name(&self) -> String {
        self.gguf.value("general.name").and_then(|name| name.as_str()).unwrap_or_default().to_lowercase()
    }
}

fn missing(name: &str) -> String {
    format!("metadata `tokenizer.ggml.{name}` is missing, which its tokenizer needs; the file is incomplete")
}

fn string<'g>(gguf: &'g Gguf, name: &str) -> Result<Option<&'g str>, String> {
    let key = format!("tokenizer.ggml.{name}");
    let read = |value: GgufValue<'g>| {
        value.as_str().ok_or_else(|| format!("metadata `{key}` is {value:?}, wanted a string; {DAMAGED}"))
    };
    gguf.value(&key).map(read).transpose()
}

fn array<'g>(gguf: &'g Gguf, name: &str, types: &[GgufValueType]) -> Result<Option<GgufArray<'g>>, String> {
    let key = format!("tokenizer.ggml.{name}");
    let read = |value: GgufValue<'g>| match value.as_array().filter(|array| types.contains(&array.element())) {
        Some(array) => Ok(array),
        None => Err(format!("metadata `{key}` is {value:?}, wanted an array of {:?}; {DAMAGED}", types[0])),
    };
    gguf.value(&key).map(read).transpose()
}

/// An array with a value for each token.
fn of_tokens<'g>(
    gguf: &'g Gguf,
    name: &str,
    types: &[GgufValueType],
    tokens: usize,
) -> Result<Option<GgufArray<'g>>, String> {
    let found = array(gguf, name, types)?;
    match found {
        Some(array) if array.len() != tokens => {
            Err(format!("metadata `tokenizer.ggml.{name}` has {} values for {tokens} tokens; {DAMAGED}", array.len()))
        }
        _ => Ok(found),
    }
}
