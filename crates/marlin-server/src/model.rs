//! The model that is served, and what requests of it have in common.

use std::io;
use std::sync::Arc;

use marlin_checkpoint::{GenerationConfig, Tokenizer};
use marlin_engine::{ChatTemplate, GrammarCompiler, Pooling, SamplingParams};

use crate::dialect::Dialect;
use crate::metrics::ModelMetrics;
use crate::registry::{Lease, LoadedModel, Running, Started};
use crate::worker::{Worker, with_causes};

/// What the server needs to know of a model besides the engine that runs it.
#[derive(Debug)]
pub struct ServedModel {
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

/// A model that is loaded, as handlers use it.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) model: ServedModel,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) context: usize,
    /// Values of the vectors that it makes of texts.
    pub(crate) hidden_size: usize,
    /// What gives answers a form, or why nothing does.
    pub(crate) grammars: Result<GrammarCompiler, String>,
    pub(crate) worker: Worker,
    /// Most answers of one request.
    pub(crate) most_choices: u32,
    pub(crate) log_prompts: bool,
}

/// The model that a request is for. It stays loaded for as long.
pub(crate) type Served = Lease<Loaded>;

impl Loaded {
    /// Starts the thread of a model's engine.
    pub(crate) fn start(
        LoadedModel { engine, model, kept }: LoadedModel,
        max_waiting: usize,
        log_prompts: bool,
        metrics: Arc<ModelMetrics>,
    ) -> io::Result<Started<Self>> {
        let tokenizer = engine.tokenizer().clone();
        let (context, hidden_size) = (engine.info().context, engine.info().hidden_size);
        let end_tokens = [&model.generation.eos_token_id[..], &model.end_tokens(&tokenizer)].concat();
        let grammars = GrammarCompiler::new(&tokenizer, engine.info().vocabulary, &end_tokens);
        let grammars = grammars.map_err(|error| with_causes(&error));
        let most_choices = engine.max_running() as u32;
        let (worker, thread) = Worker::start(engine, max_waiting, metrics)?;
        let model = Self { model, tokenizer, context, hidden_size, grammars, worker, most_choices, log_prompts };
        Ok(Started { model, thread, kept })
    }
}

impl Running for Loaded {
    fn context(&self) -> usize {
        self.context
    }

    fn stop(&self) {
        self.worker.stop();
    }
}

impl ServedModel {
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

impl Loaded {
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
