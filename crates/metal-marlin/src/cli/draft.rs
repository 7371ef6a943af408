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

    /// How it is loaded beside a model of this context and so many KV blocks: with as many, unless its answers cannot fill them. (Blocks of
    /// all models hold as many tokens.)
    fn load_options(&self, planner: &Planner<'_>, context: usize, kv_blocks: usize) -> LoadOptions {
        let context = context.min(planner.shape().context);
        LoadOptions {
            context: Some(context),
            kv_type: KvType::F16,
            kv_blocks: Some(kv_blocks.min(planner.kv_blocks(context, self.answers))),
            logit_rows: 1,
            ..LoadOptions::default()
        }
    }

    /// What it takes beside a model of this plan.
    fn plan(&self, model: &MemoryPlan) -> Result<MemoryPlan, LoadError> {
        let planner = self.planner()?;
        let kv_blocks = usize::try_from(model.kv_cache / model.block_bytes.max(1)).unwrap_or(usize::MAX);
        let plan = planner.plan(&self.load_options(&planner, model.context, kv_blocks)).map_err(LoadError::Model)?;
        // Code and tokenizer are the model's.
        Ok(MemoryPlan { program: 0, ..plan })
    }

    /// Loads it beside the engine's model.
    pub(super) fn load(&self, engine: &mut Engine, load: Load) -> anyhow::Result<DraftModel> {
        let (context, kv_blocks) = (engine.info().context, engine.stats().kv_blocks);
        let options = self.load_options(&self.planner()?, context, kv_blocks);
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

/// What a model takes that is loaded with these options, together with its draft model, if it has one.
pub(super) fn plan(
    planner: &Planner<'_>,
    options: &LoadOptions,
    draft: Option<&Draft>,
) -> Result<MemoryPlan, LoadError> {
    let plan = planner.plan(options).map_err(LoadError::Model)?;
    let Some(draft) = draft else { return Ok(plan) };
    Ok(together(&plan, &draft.plan(&plan)?))
}

/// The plan of a model whose blocks hold the keys and values of its draft model as well.
fn together(model: &MemoryPlan, draft: &MemoryPlan) -> MemoryPlan {
    MemoryPlan {
        weights: model.weights.saturating_add(draft.weights),
        kv_cache: model.kv_cache.saturating_add(draft.kv_cache),
        activations: model.activations.saturating_add(draft.activations),
        logits: model.logits.saturating_add(draft.logits),
        program: model.program.saturating_add(draft.program),
        block_bytes: model.block_bytes.saturating_add(draft.block_bytes),
        most_blocks: model.most_blocks.min(draft.most_blocks),
        ..*model
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
    let draft_plan = draft.plan(&plan)?;
    let both = together(&plan, &draft_plan);
    let alone = memory::require_fit(device, checkpoint, options, budget);
    if budget.fits(&both) {
        alone?;
        return Ok(both);
    }
    let shorter = match both.longest_context(budget.device, 1).filter(|&context| context < plan.context) {
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
        draft_plan: Box::new(draft_plan),
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
    let plan = plan(&planner, &options, draft)?;
    let fits = plan.longest_context(budget.device, 1);
    let context = match fits.zip(least) {
        Some((fits, least)) if fits > least => fits.min(plan.context),
        _ => plan.context,
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
        let both = plan(&planner, &options, Some(&draft)).unwrap();
        assert_eq!((both.weights, both.program), (2 * alone.weights, alone.program));
        // Two answers cannot fill more than four blocks, and one is to spare.
        assert_eq!((both.kv_cache, both.block_bytes), (25 * alone.block_bytes, 2 * alone.block_bytes));
        assert_eq!(plan(&planner, &options, None).unwrap(), alone);

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
        let (alone, both) = (planner.plan(&options).unwrap(), plan(&planner, &options, Some(&draft)).unwrap());
        assert!(both.weights > alone.weights);
        assert!(alone.host_total() > 0);
        assert_eq!(both.host_total(), alone.host_total());
    }
}
