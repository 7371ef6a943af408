//! The smaller model that guesses for another, and what both take of the memory.

use std::path::Path;

use anyhow::bail;
use marlin_checkpoint::{Checkpoint, Tokenizer};
use marlin_engine::{DraftModel, Engine};
use marlin_kernels::KvType;
use marlin_model::{LoadOptions, MemoryPlan, Planner, format_size};

use super::model::{self, HubOptions, Load};
use crate::LoadError;
use crate::cli::progress;
use crate::device::Device;
use crate::memory::{self, MemoryBudget, or_else};

/// A smaller model that is to guess for another one: opened, but not loaded.
pub(crate) struct Draft {
    checkpoint: Checkpoint,
    /// Where it runs whole, whatever is left to the processor of the other model.
    device: Device,
    /// Most answers that are computed at a time.
    answers: usize,
}

impl Draft {
    /// Opens the model at `path` for one with this tokenizer on the device.
    ///
    /// # Errors
    /// It cannot be opened, or has other tokens.
    pub(super) fn open(path: &Path, tokenizer: &Tokenizer, device: &Device, answers: usize) -> anyhow::Result<Self> {
        let checkpoint = model::open(Some(path), &HubOptions { revision: None })?;
        if let Some(difference) = difference(tokenizer, &checkpoint.tokenizer()?) {
            let name = path.display();
            bail!("{name} cannot guess for this model, because {difference}; a draft model must have the same tokens");
        }
        Ok(Self { checkpoint, device: device.without_offload(), answers })
    }

    /// What it is called.
    pub(super) fn name(&self) -> &str {
        self.checkpoint.name()
    }

    fn planner(&self) -> Result<Planner<'_>, LoadError> {
        self.device.planner(&self.checkpoint).map_err(LoadError::Model)
    }

    /// How it is loaded with so many KV blocks beside a model of this context.
    fn load_options(planner: &Planner<'_>, context: usize, kv_blocks: usize) -> LoadOptions {
        LoadOptions {
            context: Some(context.min(planner.shape().context)),
            kv_type: KvType::F16,
            kv_blocks: Some(kv_blocks),
            logit_rows: 1,
            ..LoadOptions::default()
        }
    }

    /// KV blocks that its answers can fill beside a model of this context, as far as the device can have them.
    fn most_blocks(&self, planner: &Planner<'_>, context: usize) -> Result<usize, LoadError> {
        let all = planner.kv_blocks(context.min(planner.shape().context), self.answers);
        let plan = planner.plan(&Self::load_options(planner, context, all)).map_err(LoadError::Model)?;
        Ok(usize::try_from(plan.most_blocks).map_or(all, |most| most.min(all)))
    }

    /// What it takes beside a model of this plan.
    fn plan(&self, model: &MemoryPlan) -> Result<DraftPlan, LoadError> {
        let planner = self.planner()?;
        let most_blocks = self.most_blocks(&planner, model.context)?;
        let kv_blocks = usize::try_from(model.kv_cache / model.block_bytes.max(1)).unwrap_or(usize::MAX);
        let options = Self::load_options(&planner, model.context, kv_blocks.min(most_blocks));
        let plan = planner.plan(&options).map_err(LoadError::Model)?;
        // Code and tokenizer are the model's.
        Ok(DraftPlan { plan: MemoryPlan { program: 0, ..plan }, most_blocks: most_blocks as u64 })
    }

    /// Loads it beside the engine's model.
    pub(super) fn load(&self, engine: &mut Engine, load: Load) -> anyhow::Result<DraftModel> {
        let (context, kv_blocks, planner) = (engine.info().context, engine.stats().kv_blocks, self.planner()?);
        let options = Self::load_options(&planner, context, kv_blocks.min(self.most_blocks(&planner, context)?));
        let loaded =
            progress::spinner(&format!("Loading {}", self.name()), || load(&self.checkpoint, &self.device, &options))?;
        Ok(DraftModel::new(loaded, engine.info()))
    }
}

/// The first token that two tokenizers do not spell alike.
fn difference(tokenizer: &Tokenizer, other: &Tokenizer) -> Option<String> {
    let shared = tokenizer.vocabulary_size().min(other.vocabulary_size());
    (0..shared as u32).find_map(|id| {
        let (one, two) = (tokenizer.id_to_token(id), other.id_to_token(id));
        (one != two).then(|| {
            let [two, one] = [two, one].map(|token| token.unwrap_or_else(|| "nothing".to_owned()));
            format!("its token {id} is {two:?} and not {one:?}")
        })
    })
}

/// A model and its draft model take more memory together than there is.
#[derive(Debug, thiserror::Error)]
#[error(
    "{model} needs {plan}; its draft model {draft} needs {draft_plan}; that is {} together, and {} (--memory says otherwise); {advice}",
    format_size(plan.total().saturating_add(draft_plan.total())), budget.in_words(plan)
)]
pub(crate) struct DraftDoesNotFit {
    model: String,
    plan: Box<MemoryPlan>,
    draft: String,
    draft_plan: Box<MemoryPlan>,
    budget: MemoryBudget,
    /// What to do about it.
    advice: String,
}

/// What a model takes, together with its draft model, if it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JointPlan {
    model: MemoryPlan,
    draft: Option<DraftPlan>,
}

/// What a draft model takes, which has as many KV blocks as its model, unless it has no use for them. (Blocks of all models hold as many tokens.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DraftPlan {
    plan: MemoryPlan,
    /// The KV blocks that it has use for.
    most_blocks: u64,
}

impl JointPlan {
    /// The model of these options, and its draft model beside it.
    pub(super) fn new(planner: &Planner<'_>, options: &LoadOptions, draft: Option<&Draft>) -> Result<Self, LoadError> {
        let model = planner.plan(options).map_err(LoadError::Model)?;
        Ok(Self { model, draft: draft.map(|draft| draft.plan(&model)).transpose()? })
    }

    /// Both as one.
    pub(super) fn sum(&self) -> MemoryPlan {
        let Self { model, draft: Some(DraftPlan { plan: draft, .. }) } = self else { return self.model };
        MemoryPlan {
            weights: model.weights.saturating_add(draft.weights),
            kv_cache: model.kv_cache.saturating_add(draft.kv_cache),
            activations: model.activations.saturating_add(draft.activations),
            logits: model.logits.saturating_add(draft.logits),
            program: model.program.saturating_add(draft.program),
            ..*model
        }
    }

    /// KV blocks of the model for which `memory` bytes have room, beside those of the draft model.
    pub(super) fn most_blocks(&self, memory: u64) -> u64 {
        let (sum, of_model) = (self.sum(), self.model.block_bytes.max(1));
        let room = memory.saturating_sub(sum.total() - sum.kv_cache);
        let blocks = match self.draft {
            None => room / of_model,
            Some(DraftPlan { plan, most_blocks }) => {
                let as_many = room / of_model.saturating_add(plan.block_bytes);
                let beside_all = room.saturating_sub(plan.block_bytes.saturating_mul(most_blocks)) / of_model;
                as_many.max(beside_all)
            }
        };
        blocks.min(self.model.most_blocks)
    }

    /// The longest context for which `memory` bytes have room; at most the model's own. `None` if there is none.
    fn longest_context(&self, memory: u64) -> Option<usize> {
        let MemoryPlan { block_tokens, model_context, .. } = self.model;
        // One block is to spare.
        let tokens = self.most_blocks(memory).saturating_sub(1).saturating_mul(block_tokens as u64);
        Some(tokens.min(model_context as u64) as usize).filter(|&tokens| tokens > 0)
    }
}

/// What a load with these options takes, the draft model's included; refused with the numbers and advice as by [`memory::require_fit`].
///
/// # Errors
/// [`DraftDoesNotFit`], or what [`memory::require_fit`] fails with.
pub(super) fn require_fit(
    device: &Device,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    draft: Option<&Draft>,
    budget: &MemoryBudget,
) -> anyhow::Result<MemoryPlan> {
    let Some(draft) = draft else { return Ok(memory::require_fit(device, checkpoint, options, budget)?) };
    let planner = device.planner(checkpoint).map_err(LoadError::Model)?;
    let plan = planner.plan(options).map_err(LoadError::Model)?;
    let of_draft = draft.plan(&plan)?;
    let both = JointPlan { model: plan, draft: Some(of_draft) };
    let alone = memory::require_fit(device, checkpoint, options, budget);
    if budget.fits(&both.sum()) {
        alone?;
        return Ok(both.sum());
    }
    let shorter = match both.longest_context(budget.device).filter(|&context| context < plan.context) {
        Some(context) => format!("--context {context} fits; "),
        None => String::new(),
    };
    let without = match alone {
        Ok(_) => "it fits".to_owned(),
        Err(LoadError::DoesNotFit(refused)) => format!("{}{}", or_else(&refused.offload), refused.advice),
        Err(error) => return Err(error.into()),
    };
    bail!(DraftDoesNotFit {
        model: checkpoint.name().to_owned(),
        plan: Box::new(plan),
        draft: draft.name().to_owned(),
        draft_plan: Box::new(of_draft.plan),
        budget: *budget,
        advice: format!("{shorter}without --draft-model, {without}"),
    })
}

/// How to load a model for one answer at a time, if there is memory for it and its draft model: with the context of `options`, or if more than
/// `least` tokens fit, with no more than those. There is no `least` for a context that was asked for.
///
/// # Errors
/// As for [`require_fit`].
pub(super) fn fit_one_answer(
    device: &Device,
    checkpoint: &Checkpoint,
    options: LoadOptions,
    draft: Option<&Draft>,
    budget: &MemoryBudget,
    least: Option<usize>,
) -> anyhow::Result<LoadOptions> {
    let planner = device.planner(checkpoint).map_err(LoadError::Model)?;
    let plan = JointPlan::new(&planner, &options, draft)?;
    let (fits, wanted) = (plan.longest_context(budget.device), plan.model.context);
    let context = match fits.zip(least) {
        Some((fits, least)) if fits > least => fits.min(wanted),
        _ => wanted,
    };
    let options = LoadOptions { context: Some(context), ..options };
    require_fit(device, checkpoint, &options, draft, budget)?;
    Ok(options)
}

#[cfg(test)]
mod tests {
    use marlin_kernels::cpu::{CpuBackend, CpuOptions};
    use marlin_kernels::gpu::{GpuBackend, GpuCaps, GpuOptions};
    use marlin_model::{ExpertLayers, ExpertOffload};

    use crate::device::{DeviceChoice, DeviceOptions};

    use super::*;

    /// A tiny checkpoint whose context are 64 tokens, two blocks.
    fn tiny() -> Checkpoint {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../marlin-model/tests/goldens/qwen3-gqa2-tied");
        Checkpoint::open(golden.as_ref()).unwrap()
    }

    #[test]
    fn a_budget_is_for_both_models() {
        let device = DeviceOptions { device: DeviceChoice::Cpu, ..DeviceOptions::default() }.open().unwrap();
        let checkpoint = tiny();
        let draft = Draft { checkpoint: tiny(), device: device.without_offload(), answers: 2 };
        let planner = device.planner(&checkpoint).unwrap();
        let options = LoadOptions { kv_blocks: Some(20), ..LoadOptions::default() };
        let alone = planner.plan(&options).unwrap();
        let both = JointPlan::new(&planner, &options, Some(&draft)).unwrap();
        assert_eq!(JointPlan::new(&planner, &options, None).unwrap().sum(), alone);
        let (joint, both) = (both, both.sum());
        assert_eq!((both.weights, both.program), (2 * alone.weights, alone.program));
        // Two answers cannot fill more than four blocks, and one is to spare.
        assert_eq!(both.kv_cache, 25 * alone.block_bytes);
        let without_kv = both.total() - both.kv_cache;
        for (room, blocks) in [(0, 0), (1, 0), (2, 1), (9, 4), (10, 5), (11, 6), (25, 20), (1025, 1020)] {
            assert_eq!(joint.most_blocks(without_kv + room * alone.block_bytes), blocks, "{room}");
        }
        assert_eq!(joint.most_blocks(without_kv - 1), 0);
        // The model's own context are two blocks.
        let context = |room: u64| joint.longest_context(without_kv + room * alone.block_bytes);
        assert_eq!([3, 4, 6, 100].map(context), [None, Some(32), Some(64), Some(64)]);

        let fit = |bytes: u64| {
            let budget = MemoryBudget { device: bytes, host: None };
            require_fit(&device, &checkpoint, &options, Some(&draft), &budget)
        };
        assert_eq!(fit(both.total()).unwrap(), both);
        for (bytes, advice) in [(both.total() - 1, "without --draft-model, it fits"), (alone.total() - 1, "in int8")] {
            let error = fit(bytes).unwrap_err();
            assert!(error.is::<DraftDoesNotFit>());
            let draft_bytes = both.total() - alone.total();
            for wanted in [alone.total(), draft_bytes, both.total(), bytes].map(format_size).iter().map(String::as_str)
            {
                assert!(error.to_string().contains(wanted), "{wanted}: {error}");
            }
            assert!(error.to_string().contains(advice), "{advice}: {error}");
        }
    }

    #[test]
    fn a_draft_model_runs_whole_where_experts_are_left_to_the_processor() {
        let caps = GpuCaps { shares_memory: false, ..GpuCaps::apple() };
        let backend = GpuBackend::imaginary(caps, GpuOptions::default()).unwrap();
        let host = CpuOptions { threads: Some(1), ..CpuOptions::default() };
        let offload = ExpertOffload { host: CpuBackend::new(host).unwrap(), layers: ExpertLayers::All };
        let device = Device::Gpu { backend, host, offload: Some(offload) };
        let mixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../marlin-model/tests/goldens/mixtral-top2");
        let mixture = Checkpoint::open(mixture.as_ref()).unwrap();
        // It has no experts.
        let draft = Draft { checkpoint: tiny(), device: device.without_offload(), answers: 1 };
        let (planner, options) = (device.planner(&mixture).unwrap(), LoadOptions::default());
        let (alone, both) =
            (planner.plan(&options).unwrap(), JointPlan::new(&planner, &options, Some(&draft)).unwrap().sum());
        assert!(both.weights > alone.weights);
        assert!(alone.host_total() > 0);
        assert_eq!(both.host_total(), alone.host_total());
    }
}
