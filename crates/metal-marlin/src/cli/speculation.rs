//! Options for guessing tokens ahead.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::ValueEnum;
use marlin_checkpoint::Tokenizer;
use marlin_engine::{DraftModel, Engine, MOST_DRAFT, MtpDrafter, PromptLookup};
use marlin_kernels::KvType;
use marlin_model::LoadOptions;

use super::model::{self, HubOptions};
use crate::LoadError;
use crate::cli::progress;
use crate::device::Device;
use crate::tile_cache::load_model_kept;

/// How tokens are guessed ahead.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Speculation")]
pub(crate) struct SpeculationOptions {
    /// Guess what comes next from the text itself (lookup) or by the model's own layer for that (mtp), and look at several guessed tokens at a
    /// time where that pays; answers stay what they are [default: lookup on a CPU, off on a GPU]
    #[arg(long, value_name = "HOW")]
    speculate: Option<Speculate>,

    /// Guess by this smaller model, which must have the same tokens: a folder, or an id on the Hub
    #[arg(long, value_name = "MODEL", conflicts_with = "speculate")]
    draft_model: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Speculate {
    /// What followed on the same words before follows again.
    Lookup,
    /// By the layer for multi-token prediction that checkpoints of GLM-4.5 to 4.7 and DeepSeek-V3 have.
    Mtp,
    /// Not at all.
    Off,
}

impl SpeculationOptions {
    /// Whether a smaller model guesses.
    pub(crate) fn has_draft_model(&self) -> bool {
        self.draft_model.is_some()
    }

    /// The same for a model that has no smaller one.
    pub(crate) fn without_draft_model(&self) -> Self {
        Self { draft_model: None, ..self.clone() }
    }

    /// Rows of logits that guesses may take, beside one for each answer.
    pub(crate) fn logit_rows(&self, device: &Device) -> usize {
        if self.draft_model.is_some() || self.predicts() || self.looks_up(device) { MOST_DRAFT } else { 0 }
    }

    /// Whether the model is to be loaded with its layer that predicts further tokens ([`LoadOptions::prediction`]).
    pub(crate) fn predicts(&self) -> bool {
        self.speculate == Some(Speculate::Mtp)
    }

    fn looks_up(&self, device: &Device) -> bool {
        match self.speculate {
            Some(how) => how == Speculate::Lookup,
            None => device.cpu().is_some(),
        }
    }

    /// Lets the engine guess as the options say. A draft model is loaded beside its model, with room for `sequences` answers.
    pub(crate) fn apply(&self, mut engine: Engine, device: &Device, sequences: usize) -> anyhow::Result<Engine> {
        if self.predicts() {
            let layer = engine.take_prediction_layer().context("the model was loaded without its prediction layer")?;
            return Ok(engine.with_drafter(Box::new(MtpDrafter::new(layer))));
        }
        let Some(path) = &self.draft_model else {
            let looks_up = self.looks_up(device);
            return Ok(if looks_up { engine.with_drafter(Box::new(PromptLookup::default())) } else { engine });
        };
        let checkpoint = model::open(Some(path), &HubOptions { revision: None })?;
        let name = path.display();
        if let Some(difference) = difference(engine.tokenizer(), &checkpoint.tokenizer()?) {
            bail!("{name} cannot guess for this model, because {difference}; a draft model must have the same tokens");
        }
        let planner = device.planner(&checkpoint).map_err(LoadError::Model)?;
        let context = engine.info().context.min(planner.shape().context);
        let options = LoadOptions {
            context: Some(context),
            kv_type: KvType::F16,
            kv_blocks: Some(planner.kv_blocks(context, sequences)),
            logit_rows: 1,
            ..LoadOptions::default()
        };
        let loaded = progress::spinner(&format!("Loading {}", checkpoint.name()), || {
            load_model_kept(&checkpoint, device, &options)
        })?;
        let drafter = DraftModel::new(loaded, engine.info());
        Ok(engine.with_drafter(Box::new(drafter)))
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
