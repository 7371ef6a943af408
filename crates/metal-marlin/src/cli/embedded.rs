//! The engine for programs of another kind, opened by the options that the program's commands have.

use std::any::Any;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use marlin_checkpoint::{Checkpoint, GenerationConfig, Tokenizer};
use marlin_engine::{ChatTemplate, Engine};
use marlin_server::Dialect;

use super::interrupt::{self, Interrupt};
use super::loading::{Loaded, LoadingOptions};
use super::models::SharedMemory;
use super::{run, template};

/// What an engine is opened with.
#[derive(Debug, Parser)]
struct Args {
    /// Folder with a Hugging Face checkpoint, or one made by `quantize`, a GGUF file, or an id on the Hub [default: the bundled model]
    model: Option<PathBuf>,

    /// Jinja template of conversations [default: the model's chat_template.jinja or tokenizer_config.json]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,

    #[command(flatten)]
    loading: LoadingOptions,
}

/// An engine, and what one has to know of its model to ask it.
#[derive(Debug)]
pub struct OpenedEngine {
    /// The engine.
    pub engine: Engine,
    /// Its model.
    pub model: OpenedModel,
    /// What must not be dropped before the engine is.
    pub kept: Box<dyn Any + Send>,
}

/// What one has to know of a model to ask it.
#[derive(Debug)]
pub struct OpenedModel {
    /// What it is called: the path, the id on the Hub, or the bundled model's name.
    pub name: String,
    /// The settings that it recommends.
    pub generation: GenerationConfig,
    /// How a conversation becomes a prompt, if one can talk with it.
    pub chat: Option<ChatTemplate>,
    /// Tokens that end an answer in a chat, besides those that end every text.
    pub end_of_turn: Vec<u32>,
}

/// Opens an engine. `arguments` are those of `serve` that say which model is loaded, where and how: MODEL and `--device`, `--format`, `--context`,
/// `--max-running` and so on. Where progress is told, `interrupt` ends the work.
///
/// # Errors
/// [`UsageError`](super::UsageError) if the arguments are wrong, [`Interrupted`](super::Interrupted), or whatever stands against loading the
/// model.
pub fn open_engine(
    arguments: impl IntoIterator<Item = OsString>,
    interrupt: &Interrupt,
) -> anyhow::Result<OpenedEngine> {
    let args = super::parse::<Args>(arguments)?;
    interrupt::until(interrupt, || {
        let read = |checkpoint: &Checkpoint| args.read(checkpoint);
        let Loaded { engine, about, kept } =
            args.loading.open(args.model.as_deref(), true, &SharedMemory::default(), read)?;
        Ok(OpenedEngine { engine, model: about, kept })
    })
}

impl Args {
    fn read(&self, checkpoint: &Checkpoint) -> anyhow::Result<OpenedModel> {
        let tokenizer = checkpoint.tokenizer()?;
        let special_tokens = checkpoint.special_tokens()?;
        let source = template::source(self.chat_template.as_deref(), checkpoint)?;
        let dialect = source.as_deref().map_or(Dialect::Plain, Dialect::detect);
        let eos = special_tokens.get("eos_token").map(String::as_str);
        let ends = eos.into_iter().chain(dialect.end_tokens().iter().copied());
        Ok(OpenedModel {
            name: checkpoint.name().to_owned(),
            generation: checkpoint.generation_config()?,
            end_of_turn: ends.filter_map(|token| tokenizer.token_id(token)).collect(),
            chat: source.map(|source| ChatTemplate::new(&source, special_tokens)).transpose()?,
        })
    }
}

impl OpenedModel {
    /// Tokens that are generated at most where nobody says how many, as `run` has it.
    pub fn max_tokens(&self) -> usize {
        run::max_tokens(&self.generation)
    }

    /// The tokens of a text to continue; an empty one begins where every text of the model begins.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn prompt(&self, text: &str, tokenizer: &Tokenizer) -> anyhow::Result<Vec<u32>> {
        run::tokens_of(text, tokenizer, &self.generation)
    }
}
