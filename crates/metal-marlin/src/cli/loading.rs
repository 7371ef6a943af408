//! What commands that run many requests on a model have in common: how it is loaded, and with how much room.

use std::any::Any;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};
use marlin_checkpoint::{Checkpoint, ExportLayout};
use marlin_engine::{BlockStore, Engine, EngineOptions};
use marlin_model::{LoadOptions, MemoryPlan};

use super::draft::{self, Draft, JointPlan};
use super::model::{self, HubOptions, QuantizeOptions};
use super::models::{GivesBack, NoRoom, Room, SharedMemory};
use super::progress;
use super::speculation::SpeculationOptions;
use crate::device::{Device, KvFormat};
use crate::kv_store::open_kv_store;
use crate::memory::{self, MemoryBudget, MemoryOptions};
use crate::{DeviceOptions, LoadError};

/// Tokens that the KV cache holds, in contexts, where neither the options nor the memory say otherwise.
const CONTEXTS: usize = 4;

/// How a model is loaded for many requests.
#[derive(Debug, clap::Args)]
pub(super) struct LoadingOptions {
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

/// A model that is loaded.
pub(super) struct Loaded<T> {
    pub(super) engine: Engine,
    /// What was read of it before.
    pub(super) about: T,
    /// What must not be dropped before the engine is.
    pub(super) kept: Box<dyn Any + Send>,
}

impl LoadingOptions {
    /// Most answers that a model computes at a time.
    pub(super) fn max_running(&self) -> usize {
        self.max_running.get()
    }

    /// Those of these options that are about one model, and whether they are given.
    pub(super) fn of_one_model(&self) -> [(&'static str, bool); 2] {
        [("--revision", self.hub.revision.is_some()), ("--draft-model", self.speculation.has_draft_model())]
    }

    /// Refuses what cannot be had for several models.
    pub(super) fn check_for_several(&self) -> anyhow::Result<()> {
        let quantizes = self.quantize.recipe.recipe(ExportLayout::MetalMarlin)?.is_some();
        ensure!(
            !(self.quantize.no_cache && quantizes),
            "--no-cache quantises one model into a temporary folder, and there are several; leave it out, or serve one"
        );
        Ok(())
    }

    /// Opens the device, and tells how much memory there is.
    pub(super) fn open_device(&self) -> Result<(Device, Option<MemoryBudget>), LoadError> {
        let device = self.device.open().map_err(LoadError::Device)?;
        let budget = self.memory.budget(&device);
        Ok((device, budget))
    }

    /// Loads a model beside those that are loaded, after `read` has told of it whatever the caller wants to know. What the options say of one
    /// model is meant for the first.
    pub(super) fn open<T>(
        &self,
        model: Option<&Path>,
        is_first: bool,
        memory: &SharedMemory,
        read: impl FnOnce(&Checkpoint) -> anyhow::Result<T>,
    ) -> anyhow::Result<Loaded<T>> {
        let hub = if is_first { self.hub.clone() } else { HubOptions::default() };
        let (checkpoint, temporary) = model::open_quantized(model, &hub, &self.quantize, self.device.threads)?;
        let tokenizer = checkpoint.tokenizer()?;
        let about = read(&checkpoint)?;
        let machine = memory.machine(self)?;
        let (device, room) = (&*machine.device, memory.room(&machine));
        let speculation = if is_first { self.speculation.clone() } else { self.speculation.without_draft_model() };
        let draft = speculation.open_draft(&tokenizer, device, self.max_running())?;
        let (options, plan) =
            self.load_options(&checkpoint, device, draft.as_ref(), room.as_ref(), memory.is_for_several())?;
        let plan = plan.map(|plan| memory.take(plan));
        let loaded = progress::spinner(&format!("Loading {}", checkpoint.name()), || {
            self.quantize.load()(&checkpoint, device, &options)
        })?;
        let engine_options = EngineOptions { max_running: Some(self.max_running()), ..EngineOptions::default() };
        let eos_tokens = checkpoint.generation_config()?.eos_token_id;
        let engine = Engine::with_options(loaded, tokenizer.into(), eos_tokens, &engine_options);
        let engine = match self.block_store(&checkpoint, device)? {
            Some(store) => engine.with_block_store(store)?,
            None => engine,
        };
        let engine = speculation.apply(engine, draft, device, self.quantize.load())?;
        Ok(Loaded { engine, about, kept: Box::new((machine, temporary, GivesBack, plan)) })
    }

    /// Where blocks of the KV cache outlive this process, if that is wanted.
    fn block_store(&self, checkpoint: &Checkpoint, device: &Device) -> anyhow::Result<Option<BlockStore>> {
        let Some(folder) = &self.kv_cache_dir else { return Ok(None) };
        Ok(Some(open_kv_store(folder.clone(), self.kv_cache_size, checkpoint, device)?))
    }

    /// How to load the model: with the largest context and KV cache that the options, the model and the memory allow, and what it then takes,
    /// its draft model included, if it has one. Where there are several models, it leaves half of the memory that it could have to others,
    /// unless that is too little for a context of a usual length.
    fn load_options(
        &self,
        checkpoint: &Checkpoint,
        device: &Device,
        draft: Option<&Draft>,
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
        let joint = JointPlan::new(&planner, &options, draft)?;
        let block_tokens = joint.sum().block_tokens;
        let blocks_of = |tokens: usize| tokens.div_ceil(block_tokens) + 1;
        let wanted = blocks_of(self.kv_tokens.map_or(context.saturating_mul(CONTEXTS), NonZeroUsize::get));
        let Some(room) = room else { return Ok((LoadOptions { kv_blocks: Some(wanted), ..options }, None)) };
        let fit = usize::try_from(joint.most_blocks(room.left.device)).unwrap_or(usize::MAX);
        let mut most = fit;
        if is_for_several {
            let usual = if self.context.is_some() { context } else { memory::usual_context(&planner) };
            let least = if self.kv_tokens.is_some() { wanted } else { wanted.min(blocks_of(usual)) };
            if room.is_shared {
                let options = LoadOptions { context: Some(usual), kv_blocks: Some(least), ..options };
                let plan = Box::new(JointPlan::new(&planner, &options, draft)?.sum());
                if !room.left.fits(&plan) {
                    let alone = Room { left: room.all, is_shared: false, ..*room };
                    self.load_options(checkpoint, device, draft, Some(&alone), is_for_several)?;
                    let with_draft = draft.map(|draft| format!(" with its draft model {}", draft.name()));
                    let model = format!("{}{}", checkpoint.name(), with_draft.unwrap_or_default());
                    let Room { all, left, .. } = *room;
                    bail!(NoRoom { model, plan, left, all });
                }
            }
            most = (fit / 2).max(least).min(fit);
        }
        let blocks = if self.kv_tokens.is_some() { wanted } else { wanted.min(most) };
        // One that nobody asked for is as long as the cache has room for.
        let longest = (blocks.max(2) - 1) * block_tokens;
        let context = if self.context.is_some() { context } else { context.min(longest) };
        let options = LoadOptions { context: Some(context), kv_blocks: Some(blocks.max(2)), ..options };
        let plan = draft::require_fit(device, checkpoint, &options, draft, &room.left)?;
        Ok((options, Some(plan)))
    }
}
