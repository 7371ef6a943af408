//! The model that is served, and what requests of it have in common.

use std::time::{Duration, Instant};

use marlin_checkpoint::{GenerationConfig, Tokenizer};
use marlin_engine::{ChatTemplate, GrammarCompiler, Pooling, SamplingParams};

use crate::api::responses::ResponseStore;
use crate::dialect::Dialect;
use crate::worker::Worker;

/// What the server needs to know of a model besides the engine that runs it.
#[derive(Debug)]
pub struct ServedModel {
    /// What requests call it; the first name is the one it gives itself.
    pub names: Vec<String>,
    /// Its settings: what requests leave open is as they say.
    pub generation: GenerationConfig,
    /// How one talks with it; without that it continues texts only.
    pub chat: Option<ChatFormat>,
    /// How it makes vectors of texts.
    pub pooling: Pooling,
    /// Tokens that end an answer in a chat, besides those that end every text.
    pub end_of_turn: Vec<u32>,
}

/// How one talks with a model.
#[derive(Debug)]
pub struct ChatFormat {
    /// How it is asked for an answer.
    pub template: ChatTemplate,
    /// The source of that.
    pub source: String,
    /// How it writes reasoning and calls of tools.
    pub dialect: Dialect,
}

impl ChatFormat {
    /// Whether the template tells developers from systems.
    pub(crate) fn knows_developer(&self) -> bool {
        self.source.contains("developer")
    }

    /// Whether answers hold special tokens that the parser wants to see.
    pub(crate) fn has_markers(&self, tokenizer: &Tokenizer) -> bool {
        self.dialect != Dialect::Plain || tokenizer.token_id("<think>").is_some()
    }
}

/// What handlers share.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) model: ServedModel,
    pub(crate) tokenizer: std::sync::Arc<Tokenizer>,
    pub(crate) context: usize,
    /// Values of the vectors that it makes of texts.
    pub(crate) hidden_size: usize,
    /// What gives answers a form, or why nothing does.
    pub(crate) grammars: Result<GrammarCompiler, String>,
    pub(crate) worker: Worker,
    /// Longest time for an answer.
    pub(crate) timeout: Option<Duration>,
    /// Most answers of one request.
    pub(crate) most_choices: u32,
    /// Seconds since 1970 when the server was started.
    pub(crate) created: u64,
    pub(crate) log_prompts: bool,
    /// Responses that are kept.
    pub(crate) responses: ResponseStore,
}

impl ServedModel {
    /// Its name.
    pub(crate) fn name(&self) -> &str {
        self.names.first().map_or("model", |name| name)
    }

    /// How tokens are chosen where a request does not say: as generation_config.json does, and where that is silent by the model's own
    /// probabilities.
    pub(crate) fn sampling(&self) -> SamplingParams {
        let config = &self.generation;
        let neutral = SamplingParams::greedy();
        let temperature = if config.do_sample == Some(false) { 0.0 } else { config.temperature.unwrap_or(1.0) };
        SamplingParams {
            temperature,
            top_k: config.top_k.unwrap_or(neutral.top_k),
            top_p: config.top_p.unwrap_or(neutral.top_p),
            min_p: config.min_p.unwrap_or(neutral.min_p),
            repetition_penalty: config.repetition_penalty.unwrap_or(neutral.repetition_penalty),
            ..neutral
        }
    }
}

impl ServedModel {
    /// Tokens that end an answer of a chat.
    pub(crate) fn end_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let of_dialect = self.chat.iter().flat_map(|format| format.dialect.end_tokens());
        let of_dialect = of_dialect.filter_map(|token| tokenizer.token_id(token));
        self.end_of_turn.iter().copied().chain(of_dialect).collect()
    }
}

impl Served {
    /// When a request that comes now must be answered.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.timeout.and_then(|timeout| Instant::now().checked_add(timeout))
    }

    /// Text of one token, special or not.
    pub(crate) fn token_text(&self, token: u32) -> String {
        self.tokenizer.decode(&[token], false).unwrap_or_default()
    }

    /// The bytes of that text; where a token is a part of a character alone, what its text cannot show.
    pub(crate) fn token_bytes(&self, token: u32) -> Vec<u8> {
        let bytes = self.grammars.as_ref().map_or(&[][..], |grammars| grammars.token_bytes(token));
        if bytes.is_empty() { self.token_text(token).into_bytes() } else { bytes.to_vec() }
    }
}
