//! What commands that answer requests have in common: the model, and how it is served.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use marlin_checkpoint::Checkpoint;
use marlin_engine::{BlockStore, ChatTemplate, Engine, EngineError, EngineOptions, Pooling};
use marlin_model::LoadOptions;
use marlin_server::{ChatFormat, Dialect, ServedModel};
use metal_marlin::device::{Device, KvFormat};
use metal_marlin::kv_store::open_kv_store;
use metal_marlin::memory::{self, MemoryOptions};
use metal_marlin::{DeviceOptions, LoadError, load};

use super::model::{self, HubOptions, QuantizeOptions, TemporaryFolder};
use super::speculation::SpeculationOptions;
use super::template;
use crate::progress;

/// Tokens that the KV cache holds, in contexts, where neither the options nor the memory say otherwise.
const CONTEXTS: usize = 4;

/// How a model is served.
#[derive(Debug, clap::Args)]
pub(crate) struct ServingOptions {
    /// Name that requests give for the model; may be given several times [default: the model's own]
    #[arg(long, value_name = "NAME")]
    served_name: Vec<String>,

    /// Jinja template of conversations [default: the model's chat_template.jinja or tokenizer_config.json]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,

    /// How the model writes reasoning and calls of tools: plain, hermes, qwen-xml, glm4, llama3, mistral or harmony [default: what
    /// its chat template spells out]
    #[arg(long, value_name = "DIALECT")]
    dialect: Option<Dialect>,

    /// Which hidden states become the vector of a text in /v1/embeddings: those of its last token, or the mean of all
    #[arg(long, value_enum, default_value_t = PoolingChoice::Last)]
    pooling: PoolingChoice,

    /// Most answers that are computed at a time
    #[arg(long, value_name = "N", default_value = "32", help_heading = "Device")]
    max_running: NonZeroUsize,

    /// Most tokens of prompt and answer together [default: what the model and the memory allow]
    #[arg(long, value_name = "N", help_heading = "Device")]
    context: Option<NonZeroUsize>,

    /// Tokens that the KV cache holds, for all answers together and what is kept for later [default: four contexts, or what fits]
    #[arg(long, value_name = "N", help_heading = "Device")]
    kv_tokens: Option<NonZeroUsize>,

    /// Number format of cached keys and values
    #[arg(long, value_enum, default_value_t = KvFormat::F16, help_heading = "Device")]
    kv: KvFormat,

    /// Keep what the KV cache holds in this folder, too, so that prompts that begin alike are not computed again after a restart;
    /// who may read the folder can read the prompts
    #[arg(long, value_name = "DIR", help_heading = "Device")]
    kv_cache_dir: Option<PathBuf>,

    /// Most that the folder may take; what was not used for the longest goes first
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = memory::parse_size,
        default_value = "16GiB",
        requires = "kv_cache_dir",
        help_heading = "Device"
    )]
    kv_cache_size: u64,

    #[command(flatten)]
    speculation: SpeculationOptions,

    #[command(flatten)]
    hub: HubOptions,

    #[command(flatten)]
    quantize: QuantizeOptions,

    #[command(flatten)]
    device: DeviceOptions,

    #[command(flatten)]
    memory: MemoryOptions,
}

/// What `--pooling` says.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum PoolingChoice {
    Last,
    Mean,
}

/// A model that is ready to answer.
pub(crate) struct Serving {
    pub(crate) engine: Engine,
    pub(crate) model: ServedModel,
    pub(crate) device: Device,
    /// Holds a model that was quantised for this process alone.
    pub(crate) _temporary: Option<TemporaryFolder>,
}

impl ServingOptions {
    /// Most answers that are computed at a time.
    pub(crate) fn max_running(&self) -> usize {
        self.max_running.get()
    }

    /// Loads the model.
    pub(crate) fn open(&self, model: Option<&Path>) -> anyhow::Result<Serving> {
        let (checkpoint, temporary) = model::open_quantized(model, &self.hub, &self.quantize, self.device.threads)?;
        let tokenizer = checkpoint.tokenizer()?;
        let served = self.served_model(model, &checkpoint)?;
        let device = self.device.open().map_err(LoadError::Device)?;
        let options = self.load_options(&checkpoint, &device)?;
        let loaded = progress::spinner(&format!("Loading {}", checkpoint.name()), || {
            self.quantize.load()(&checkpoint, &device, &options)
        })?;
        let engine_options = EngineOptions { max_running: Some(self.max_running()), ..EngineOptions::default() };
        let eos_tokens = served.generation.eos_token_id.clone();
        let engine = Engine::with_options(loaded, tokenizer.into(), eos_tokens, &engine_options);
        let engine = match self.block_store(&checkpoint, &device)? {
            Some(store) => engine.with_block_store(store)?,
            None => engine,
        };
        let engine = self.speculation.apply(engine, &device, CONTEXTS)?;
        Ok(Serving { engine, model: served, device, _temporary: temporary })
    }

    /// Where blocks of the KV cache outlive this process, if that is wanted.
    fn block_store(&self, checkpoint: &Checkpoint, device: &Device) -> anyhow::Result<Option<BlockStore>> {
        let Some(folder) = &self.kv_cache_dir else { return Ok(None) };
        Ok(Some(open_kv_store(folder.clone(), self.kv_cache_size, checkpoint, device)?))
    }

    fn served_model(&self, model: Option<&Path>, checkpoint: &Checkpoint) -> anyhow::Result<ServedModel> {
        let special_tokens = checkpoint.special_tokens()?;
        let tokenizer = checkpoint.tokenizer()?;
        let source = template::source(self.chat_template.as_deref(), checkpoint)?;
        let end_of_turn = special_tokens.get("eos_token").and_then(|token| tokenizer.token_id(token));
        let chat = source.map(|source| {
            let template = ChatTemplate::new(&source, special_tokens)?;
            let dialect = self.dialect.unwrap_or_else(|| Dialect::detect(&source));
            Ok::<_, EngineError>(ChatFormat { template, source, dialect })
        });
        let chat = chat.transpose()?;
        if chat.is_none() {
            eprintln!("note: {} has no chat template; it continues texts only", checkpoint.name());
        }
        Ok(ServedModel {
            names: if self.served_name.is_empty() { vec![default_name(model)] } else { self.served_name.clone() },
            generation: checkpoint.generation_config()?,
            chat,
            pooling: match self.pooling {
                PoolingChoice::Last => Pooling::Last,
                PoolingChoice::Mean => Pooling::Mean,
            },
            end_of_turn: end_of_turn.into_iter().collect(),
        })
    }

    /// How to load the model: with the largest context and KV cache that the options, the model and the memory allow.
    fn load_options(&self, checkpoint: &Checkpoint, device: &Device) -> anyhow::Result<LoadOptions> {
        let planner = device.planner(checkpoint).map_err(LoadError::Model)?;
        let allowed = planner.shape().context;
        let context = self.context.map_or(allowed, NonZeroUsize::get);
        let defaults = LoadOptions::default();
        let rows = self.max_running.get() + self.speculation.logit_rows(device);
        let options = LoadOptions {
            context: Some(context),
            kv_type: self.kv.into(),
            logit_rows: rows,
            step_tokens: defaults.step_tokens.max(rows),
            ..defaults
        };
        let plan = planner.plan(&options).map_err(LoadError::Model)?;
        let blocks_of = |tokens: usize| tokens.div_ceil(plan.block_tokens) + 1;
        let wanted = blocks_of(self.kv_tokens.map_or(context.saturating_mul(CONTEXTS), NonZeroUsize::get));
        let Some(budget) = self.memory.budget(device) else {
            return Ok(LoadOptions { kv_blocks: Some(wanted), ..options });
        };
        let left = budget.device.saturating_sub(plan.total() - plan.kv_cache);
        let fit = usize::try_from((left / plan.block_bytes.max(1)).min(plan.most_blocks)).unwrap_or(usize::MAX);
        let blocks = if self.kv_tokens.is_some() { wanted } else { wanted.min(fit) };
        // One that nobody asked for is as long as the cache has room for.
        let room = (blocks.max(2) - 1) * plan.block_tokens;
        let context = if self.context.is_some() { context } else { context.min(room) };
        let options = LoadOptions { context: Some(context), kv_blocks: Some(blocks.max(2)), ..options };
        memory::require_fit(device, checkpoint, &options, &budget)?;
        Ok(options)
    }
}

/// What the model is called where nobody says: by its id on the Hub, or as its folder or file is.
fn default_name(model: Option<&Path>) -> String {
    let Some(model) = model else { return "bundled".to_owned() };
    if load::hub_id(model).is_some() {
        return model.display().to_string();
    }
    let name = if model.is_file() { model.file_stem() } else { model.file_name() };
    name.map_or_else(|| model.display().to_string(), |name| name.to_string_lossy().into_owned())
}
