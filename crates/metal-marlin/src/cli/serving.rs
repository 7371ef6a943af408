//! What commands that answer requests have in common: the model, and how it is served.

use std::path::{Path, PathBuf};

use anyhow::bail;
use marlin_checkpoint::Checkpoint;
use marlin_engine::{ChatTemplate, EngineError, Pooling};
use marlin_server::{ChatFormat, Dialect, LoadedModel, ServedModel};

use super::loading::{Loaded, LoadingOptions};
use super::models::SharedMemory;
use super::template;

/// How models are served.
#[derive(Debug, clap::Args)]
pub(super) struct ServingOptions {
    /// Name that requests give for the first model; may be given several times [default: the model's own]
    #[arg(long, value_name = "NAME")]
    served_name: Vec<String>,

    /// Jinja template of conversations with the first model [default: the model's chat_template.jinja or tokenizer_config.json]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,

    /// How the first model writes reasoning and calls of tools: plain, hermes, qwen-xml, glm4, llama3, mistral or harmony [default: what
    /// its chat template spells out]
    #[arg(long, value_name = "DIALECT")]
    dialect: Option<Dialect>,

    /// Which hidden states become the vector of a text in /v1/embeddings: those of its last token, or the mean of all
    #[arg(long, value_enum, default_value_t = PoolingChoice::Last)]
    pooling: PoolingChoice,

    #[command(flatten)]
    pub(super) loading: LoadingOptions,
}

/// What `--pooling` says.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum PoolingChoice {
    Last,
    Mean,
}

impl ServingOptions {
    /// What requests call the first model, if the options say.
    pub(super) fn names(&self) -> &[String] {
        &self.served_name
    }

    /// Refuses options that are about one model where none was named, and those that cannot be had for several.
    pub(super) fn check(&self, is_named: bool, is_for_several: bool) -> anyhow::Result<()> {
        let of_one = [
            ("--served-name", !self.served_name.is_empty()),
            ("--chat-template", self.chat_template.is_some()),
            ("--dialect", self.dialect.is_some()),
        ];
        let mut of_one = of_one.into_iter().chain(self.loading.of_one_model());
        if let Some((option, _)) = of_one.find(|(_, is_given)| *is_given && !is_named) {
            bail!("{option} is about one model, and none is named: give it as MODEL, beside --models-dir");
        }
        if is_for_several { self.loading.check_for_several() } else { Ok(()) }
    }

    /// Loads a model beside those that are loaded. What the options say of one model is meant for the first.
    pub(super) fn open(
        &self,
        model: Option<&Path>,
        is_first: bool,
        memory: &SharedMemory,
    ) -> anyhow::Result<LoadedModel> {
        let read = |checkpoint: &Checkpoint| self.served_model(checkpoint, is_first);
        let Loaded { engine, about, kept } = self.loading.open(model, is_first, memory, read)?;
        Ok(LoadedModel { engine, model: about, kept })
    }

    fn served_model(&self, checkpoint: &Checkpoint, is_first: bool) -> anyhow::Result<ServedModel> {
        let special_tokens = checkpoint.special_tokens()?;
        let tokenizer = checkpoint.tokenizer()?;
        let source = template::source(self.chat_template.as_deref().filter(|_| is_first), checkpoint)?;
        let end_of_turn = special_tokens.get("eos_token").and_then(|token| tokenizer.token_id(token));
        let chat = source.map(|source| {
            let template = ChatTemplate::new(&source, special_tokens)?;
            let dialect = self.dialect.filter(|_| is_first).unwrap_or_else(|| Dialect::detect(&source));
            Ok::<_, EngineError>(ChatFormat { template, source, dialect })
        });
        let chat = chat.transpose()?;
        if chat.is_none() {
            eprintln!("note: {} has no chat template; it continues texts only", checkpoint.name());
        }
        Ok(ServedModel {
            generation: checkpoint.generation_config()?,
            chat,
            pooling: match self.pooling {
                PoolingChoice::Last => Pooling::Last,
                PoolingChoice::Mean => Pooling::Mean,
            },
            end_of_turn: end_of_turn.into_iter().collect(),
        })
    }
}
