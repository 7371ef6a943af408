//! Text to token ids and back.

use std::cell::Cell;
use std::collections::HashSet;
use std::panic::{self, AssertUnwindSafe};

use serde::Deserialize;

use crate::source::Source;
use crate::token_bytes::TokenBytes;
use crate::{CheckpointError, Gguf};

/// The tokenizer of a model folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Settings that belong to it.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// A Hugging Face tokenizer (tokenizer.json with the settings of tokenizer_config.json that change its output).
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// tokenizer.json, in messages.
    file: String,
    special: HashSet<u32>,
    vocabulary_size: usize,
    bos: BosRule,
}

/// What `encode` does about the first token, on top of what tokenizer.json does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BosRule {
    AsTokenizer,
    Prepend(u32),
    Strip(u32),
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    add_bos_token: Option<bool>,
    bos_token: Option<SpecialToken>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a token or an object with its `content`")]
pub(crate) enum SpecialToken {
    Text(String),
    Added { content: String },
}

impl SpecialToken {
    pub(crate) fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Added { content: text } => text,
        }
    }
}

impl Tokenizer {
    /// `vocab_size` is that of config.json, if it has one.
    pub(crate) fn read(source: &Source, vocab_size: Option<u64>) -> Result<Self, CheckpointError> {
        if let Source::Gguf { gguf, .. } = source {
            return Self::of_gguf(gguf, vocab_size);
        }
        let bytes = source.read(TOKENIZER_FILE)?.ok_or_else(|| CheckpointError::MissingFile {
            file: source.label(TOKENIZER_FILE),
            hint: "download it with the model; older tokenizer files (tokenizer.model, vocab.json) are not read, but \
                   `AutoTokenizer.from_pretrained(…).save_pretrained(…)` of transformers makes one from them"
                .to_owned(),
        })?;
        let config: TokenizerConfig = source.json(TOKENIZER_CONFIG)?.unwrap_or_default();
        Self::new(&bytes, &config, source.label(TOKENIZER_FILE), vocab_size)
    }

    pub(crate) fn of_gguf(gguf: &Gguf, vocab_size: Option<u64>) -> Result<Self, CheckpointError> {
        let label = gguf.label();
        let bytes = gguf.small_file(TOKENIZER_FILE)?.ok_or_else(|| {
            CheckpointError::malformed(label, "it holds no tokenizer; take a file that was converted with one")
        })?;
        let config = gguf.small_file(TOKENIZER_CONFIG)?.unwrap_or_default();
        let config = serde_json::from_slice(&config)
            .map_err(|source| CheckpointError::Json { file: label.to_owned(), source })?;
        Self::new(&bytes, &config, label.to_owned(), vocab_size)
    }

    fn new(
        json: &[u8],
        config: &TokenizerConfig,
        file: String,
        vocab_size: Option<u64>,
    ) -> Result<Self, CheckpointError> {
        let failed =
            |e: tokenizers::Error| CheckpointError::Tokenizer { file: file.clone(), problem: format!("invalid: {e}") };
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(json)).map_err(failed)?;
        // Settings of whoever saved the file, meant for training batches; `transformers` drops them as well.
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);

        let vocabulary = inner.get_vocab(true);
        let size = |counts: &dyn Fn(&u32) -> bool| {
            vocabulary.values().filter(|id| counts(id)).max().map_or(0, |id| *id as usize + 1)
        };
        let added = inner.get_added_tokens_decoder();
        // Tokens added to a vocabulary may lie beyond the model's: Gemma 3 has one for images, which its text models lack.
        let found = size(&|id| !added.contains_key(id));
        if let Some(wanted) = vocab_size.filter(|wanted| found as u64 > *wanted) {
            return Err(CheckpointError::OtherVocabulary { file: file.clone(), found, wanted });
        }
        let vocabulary_size = size(&|_| true);
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();

        let bos_text = config.bos_token.as_ref().map(|token| match token {
            SpecialToken::Text(text) | SpecialToken::Added { content: text } => text,
        });
        let bos = match (config.add_bos_token, bos_text.and_then(|text| inner.token_to_id(text))) {
            (Some(wanted), Some(id)) => {
                let added = guarded(|| inner.encode_fast("", true)).map_err(failed)?.get_ids().first() == Some(&id);
                match (wanted, added) {
                    (true, false) => BosRule::Prepend(id),
                    (false, true) => BosRule::Strip(id),
                    _ => BosRule::AsTokenizer,
                }
            }
            _ => BosRule::AsTokenizer,
        };
        Ok(Self { inner, file, special, vocabulary_size, bos })
    }

    /// Token ids of a text. `add_special` adds what the model expects around a text, for instance a
    /// beginning-of-sequence token; special tokens that are spelled out in the text become their ids either way.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, CheckpointError> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special))
            .map_err(|e| self.error("cannot encode the text", &e))?;
        let ids = encoding.get_ids();
        Ok(match self.bos {
            BosRule::Prepend(bos) if add_special => [&[bos], ids].concat(),
            BosRule::Strip(bos) if add_special => ids.strip_prefix(&[bos]).unwrap_or(ids).to_vec(),
            _ => ids.to_vec(),
        })
    }

    /// Text of token ids, without special tokens if `skip_special`. Ids outside the vocabulary stand for nothing; bytes
    /// that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, CheckpointError> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|e| self.error("cannot decode the tokens", &e))
    }

    /// The id of a token as it is spelled in tokenizer.json.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as it is spelled in tokenizer.json.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The bytes that each token adds to a text that it does not begin, by id: the text of tokens is their bytes put together,
    /// but for what decoders do to a first token (SentencePiece drops its space). Special tokens and ids that stand for none
    /// have no bytes.
    ///
    /// Fails if what a token stands for depends on the tokens around it: WordPiece and BPE with ends of words are so.
    pub fn token_bytes(&self) -> Result<Vec<Vec<u8>>, CheckpointError> {
        let what = "tokens have no bytes of their own";
        let bytes = TokenBytes::of(&self.inner).map_err(|reason| self.error(what, &reason.into()))?;
        let of = |id: u32| match self.id_to_token(id).filter(|_| !self.is_special(id)) {
            Some(token) => bytes.bytes(&token),
            None => Ok(Vec::new()),
        };
        guarded(|| (0..self.vocabulary_size as u32).map(of).collect()).map_err(|e| self.error(what, &e))
    }

    /// Whether a token stands for no text (`<|im_end|>` and its like).
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// One more than the highest id. A model's own vocabulary may be padded beyond it.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    fn error(&self, what: &str, reason: &tokenizers::Error) -> CheckpointError {
        CheckpointError::Tokenizer { file: self.file.clone(), problem: format!("{what}: {reason}") }
    }
}

/// The crate `tokenizers` panics at some files that contradict themselves; that is an error like others. A tokenizer is not
/// changed by what it does here, so one that has panicked can be used on.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    let outer = GUARDED.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    result.unwrap_or_else(|_| Err("the tokenizer contradicts itself".into()))
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic on this thread is about to become an error: for the panic hook of a program, which need not report it.
pub fn is_panic_caught() -> bool {
    GUARDED.get()
}
