//! What measuring a model on a text takes: windows, and a model that brings all its logits.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::{Context, bail};
use marlin_checkpoint::Checkpoint;
use marlin_kernels::KvType;
use marlin_model::{LanguageModel, LoadOptions, MemoryPlan};
use marlin_quantize::{ModelLogits, RecordedLogits, Windows};

use super::model::Load;
use crate::cli::progress::{self, Bar};
use crate::device::Device;
use crate::memory::{self, DoesNotFit, MemoryBudget};
use crate::{LoadError, load};

/// Windows are not made longer than this unless --context says so: the length that published figures of small models use.
const USUAL_CONTEXT: usize = 1024;

/// Tokens of a step, all of whose logits are computed.
const CHUNK: usize = 128;

/// What all the models allow, but not more than is usual.
pub(super) fn usual_context(checkpoints: &[&Checkpoint]) -> usize {
    checkpoints.iter().filter_map(|checkpoint| load::allowed_context(checkpoint)).fold(USUAL_CONTEXT, usize::min)
}

/// The windows of a text, which must consist of the same tokens for all the models.
pub(super) fn windows(
    checkpoints: &[&Checkpoint],
    text: &Path,
    context: usize,
    limit: Option<NonZeroUsize>,
) -> anyhow::Result<Windows> {
    let content = fs::read_to_string(text).with_context(|| format!("cannot read the text {}", text.display()))?;
    let mut encoded: Option<(&Checkpoint, Vec<u32>)> = None;
    for checkpoint in checkpoints {
        let tokens = checkpoint.tokenizer()?.encode(&content, false)?;
        match &encoded {
            Some((first, expected)) if *expected != tokens => bail!(
                "the tokenizers of {} and {} disagree about the text ({} and {} tokens); only models of one tokenizer \
                 can be compared",
                first.name(),
                checkpoint.name(),
                expected.len(),
                tokens.len()
            ),
            _ => encoded = Some((checkpoint, tokens)),
        }
    }
    let tokens = encoded.map(|(_, tokens)| tokens).unwrap_or_default();
    let windows = Windows::new(tokens, context, limit.map(NonZeroUsize::get));
    windows.with_context(|| format!("cannot measure on {}", text.display()))
}

/// The last part of a path: what is written about a text or a model does not depend on where it lies.
pub(super) fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The KV cache that is as exact as the arithmetic.
pub(super) fn usual_kv(exact: bool) -> KvType {
    if exact { KvType::F32 } else { KvType::F16 }
}

/// A model that is measured, and what it runs on.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) device: &'a Device,
    pub(super) kv_type: KvType,
    /// Tokens of a window.
    pub(super) context: usize,
    pub(super) load: Load,
}

impl Subject<'_> {
    /// What [`Subject::load`] will take, if there is as much.
    pub(super) fn require_fit(&self, budget: &MemoryBudget) -> Result<MemoryPlan, LoadError> {
        memory::require_fit(self.device, self.checkpoint, &self.options(), budget)
    }

    /// Loads the model, whose steps bring all their logits.
    pub(super) fn load(&self) -> Result<Box<dyn LanguageModel>, LoadError> {
        let message = format!("Loading {}", self.checkpoint.name());
        progress::spinner(&message, || (self.load)(self.checkpoint, self.device, &self.options()))
    }

    /// Refuses an unquantised model for which there is not enough memory; to quantise it, which other commands advise, is no help.
    pub(super) fn require_fit_unquantised(&self, budget: &MemoryBudget) -> Result<(), LoadError> {
        let advise = |error| {
            match error {
            LoadError::DoesNotFit(refused) => LoadError::DoesNotFit(DoesNotFit {
                advice: "the model is measured as it is before it is quantised: choose a shorter --context, another --device or a \
                         smaller model"
                    .into(),
                ..refused
            }),
            other => other,
        }
        };
        self.require_fit(budget).map(|_| ()).map_err(advise)
    }

    /// Runs the model over a text and keeps its logits in a temporary file: whatever is compared with it need not be in memory
    /// at the same time.
    pub(super) fn record<'w>(&self, windows: &'w Windows) -> anyhow::Result<RecordedLogits<'w>> {
        let mut model = self.load()?;
        let mut logits = ModelLogits::new(model.as_mut());
        let mut bar = Bar::counting("Measuring the original", "tokens");
        let total = windows.predicted() as u64;
        Ok(RecordedLogits::record(&mut logits, windows, |done| bar.set(done as u64, total))?)
    }

    fn options(&self) -> LoadOptions {
        LoadOptions {
            context: Some(self.context),
            step_tokens: CHUNK,
            logit_rows: CHUNK,
            kv_type: self.kv_type,
            ..LoadOptions::default()
        }
    }
}
