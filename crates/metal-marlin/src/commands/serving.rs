//! What commands that answer requests have in common: the model, and how it is served.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};
use marlin_checkpoint::{Checkpoint, ExportLayout};
use marlin_engine::{BlockStore, ChatTemplate, Engine, EngineError, EngineOptions, Pooling};
use marlin_model::{LoadOptions, MemoryPlan};
use marlin_server::{ChatFormat, Dialect, LoadedModel, ServedModel};
use metal_marlin::device::{Device, KvFormat};
use metal_marlin::kv_store::open_kv_store;
use metal_marlin::memory::{self, MemoryBudget, MemoryOptions};
use metal_marlin::{DeviceOptions, LoadError};

use super::model::{self, HubOptions, QuantizeOptions};
use super::models::{GivesBack, NoRoom, Room, SharedMemory};
use super::speculation::SpeculationOptions;
use super::template;
use crate::progress;

/// Tokens that the KV cache holds, in contexts, where neither the options nor the memory say otherwise.
const CONTEXTS: usize = 4;

/// How models are served.
#[derive(Debug, clap::Args)]
pub(crate) struct ServingOptions {
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

    /// Most answers that a model computes at a time
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

impl ServingOptions {
    /// Most answers that a model computes at a time.
    pub(crate) fn max_running(&self) -> usize {
        self.max_running.get()
    }

    /// What requests call the first model, if the options say.
    pub(crate) fn names(&self) -> &[String] {
        &self.served_name
    }

    /// Refuses options that are about one model where none was named, and those that cannot be had for several.
    pub(crate) fn check(&self, is_named: bool, is_for_several: bool) -> anyhow::Result<()> {
        let of_one = [
            ("--served-name", !self.served_name.is_empty()),
            ("--chat-template", self.chat_template.is_some()),
            ("--dialect", self.dialect.is_some()),
            ("--revision", self.hub.revision.is_some()),
            ("--draft-model", self.speculation.has_draft_model()),
        ];
        if let Some((option, _)) = of_one.iter().find(|(_, is_given)| *is_given && !is_named) {
            bail!("{option} is about one model, and none is named: give it as MODEL, beside --models-dir");
        }
        ensure!(
            !(is_for_several
                && self.quantize.no_cache
                && self.quantize.recipe.recipe(ExportLayout::MetalMarlin)?.is_some()),
            "--no-cache quantises one model into a temporary folder, and there are several; leave it out, or serve one"
        );
        Ok(())
    }

    /// Opens the device, and tells how much memory there is.
    pub(crate) fn open_device(&self) -> Result<(Device, Option<MemoryBudget>), LoadError> {
        let device = self.device.open().map_err(LoadError::Device)?;
        let budget = self.memory.budget(&device);
        Ok((device, budget))
    }

    /// Loads a model beside those that are loaded. What the options say of one model is meant for the first.
    pub(crate) fn open(
        &self,
        model: Option<&Path>,
        is_first: bool,
        memory: &SharedMemory,
    ) -> anyhow::Result<LoadedModel> {
        let hub = if is_first { self.hub.clone() } else { HubOptions::default() };
        let (checkpoint, temporary) = model::open_quantized(model, &hub, &self.quantize, self.device.threads)?;
        let tokenizer = checkpoint.tokenizer()?;
        let served = self.served_model(&checkpoint, is_first)?;
        let machine = memory.machine(self)?;
        let (device, room) = (&*machine.device, memory.room(&machine));
        let (options, plan) = self.load_options(&checkpoint, device, room.as_ref(), memory.is_for_several())?;
        let plan = plan.map(|plan| memory.take(plan));
        let loaded = progress::spinner(&format!("Loading {}", checkpoint.name()), || {
            self.quantize.load()(&checkpoint, device, &options)
        })?;
        let engine_options = EngineOptions { max_running: Some(self.max_running()), ..EngineOptions::default() };
        let eos_tokens = served.generation.eos_token_id.clone();
        let engine = Engine::with_options(loaded, tokenizer.into(), eos_tokens, &engine_options);
        let engine = match self.block_store(&checkpoint, device)? {
            Some(store) => engine.with_block_store(store)?,
            None => engine,
        };
        let speculation = if is_first { self.speculation.clone() } else { self.speculation.without_draft_model() };
        let engine = speculation.apply(engine, device, CONTEXTS)?;
        Ok(LoadedModel { engine, model: served, kept: Box::new((machine, temporary, GivesBack, plan)) })
    }

    /// Where blocks of the KV cache outlive this process, if that is wanted.
    fn block_store(&self, checkpoint: &Checkpoint, device: &Device) -> anyhow::Result<Option<BlockStore>> {
        let Some(folder) = &self.kv_cache_dir else { return Ok(None) };
        Ok(Some(open_kv_store(folder.clone(), self.kv_cache_size, checkpoint, device)?))
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

    /// How to load the model: with the largest context and KV cache that the options, the model and the memory allow, and what it then takes.
    /// Where there are several models, it leaves half of the memory that it could have to others, unless that is too little for a context
    /// of a usual length.
    fn load_options(
        &self,
        checkpoint: &Checkpoint,
        device: &Device,
        room: Option<&Room>,
        is_for_several: bool,
    ) -> anyhow::Result<(LoadOptions, Option<MemoryPlan>)> {
        let planner = device.planner(checkpoint).map_err(LoadError::Model)?;
        let allowed = planner.shape().context;
        // One of several need not know as long contexts as others do.
        let most = if is_for_several { allowed } else { usize::MAX };
        let context = self.context.map_or(allowed, |context| context.get().min(most));
        let defaults = LoadOptions::default();
        let rows = self.max_running.get() + self.speculation.logit_rows(device);
        let options = LoadOptions {
            context: Some(context),
            kv_type: self.kv.into(),
            logit_rows: rows,
            step_tokens: defaults.step_tokens.max(rows),
            prediction: self.speculation.predicts(),
            ..defaults
        };
        let plan = planner.plan(&options).map_err(LoadError::Model)?;
        let blocks_of = |tokens: usize| tokens.div_ceil(plan.block_tokens) + 1;
        let wanted = blocks_of(self.kv_tokens.map_or(context.saturating_mul(CONTEXTS), NonZeroUsize::get));
        let Some(room) = room else { return Ok((LoadOptions { kv_blocks: Some(wanted), ..options }, None)) };
        let left = room.left.device.saturating_sub(plan.total() - plan.kv_cache);
        let fit = usize::try_from((left / plan.block_bytes.max(1)).min(plan.most_blocks)).unwrap_or(usize::MAX);
        let mut most = fit;
        if is_for_several {
            let usual = if self.context.is_some() { context } else { memory::usual_context(&planner) };
            let least = if self.kv_tokens.is_some() { wanted } else { wanted.min(blocks_of(usual)) };
            if room.is_shared {
                let options = LoadOptions { context: Some(usual), kv_blocks: Some(least), ..options };
                let plan = Box::new(planner.plan(&options).map_err(LoadError::Model)?);
                if !room.left.fits(&plan) {
                    let alone = Room { left: room.all, is_shared: false, ..*room };
                    self.load_options(checkpoint, device, Some(&alone), is_for_several)?;
                    let (model, Room { all, left, .. }) = (checkpoint.name().to_owned(), *room);
                    bail!(NoRoom { model, plan, left, all });
                }
            }
            most = (fit / 2).max(least).min(fit);
        }
        let blocks = if self.kv_tokens.is_some() { wanted } else { wanted.min(most) };
        // One that nobody asked for is as long as the cache has room for.
        let longest = (blocks.max(2) - 1) * plan.block_tokens;
        let context = if self.context.is_some() { context } else { context.min(longest) };
        let options = LoadOptions { context: Some(context), kv_blocks: Some(blocks.max(2)), ..options };
        let plan = memory::require_fit(device, checkpoint, &options, &room.left)?;
        Ok((options, Some(plan)))
    }
}
