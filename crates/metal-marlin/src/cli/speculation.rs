//! Options for guessing tokens ahead.

use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;
use marlin_checkpoint::Tokenizer;
use marlin_engine::{Drafter, Engine, MOST_DRAFT, MtpDrafter, PromptLookup};

use super::draft::Draft;
use super::model::Load;
use crate::device::Device;

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

    /// Opens the draft model, if there is one, for a model with this tokenizer that computes so many answers at a time on the device.
    pub(crate) fn open_draft(
        &self,
        tokenizer: &Tokenizer,
        device: &Device,
        answers: usize,
    ) -> anyhow::Result<Option<Draft>> {
        self.draft_model.as_deref().map(|path| Draft::open(path, tokenizer, device, answers)).transpose()
    }

    /// Lets the engine guess as the options say; the draft model that was opened for that is loaded.
    pub(super) fn apply(
        &self,
        mut engine: Engine,
        draft: Option<Draft>,
        device: &Device,
        load: Load,
    ) -> anyhow::Result<Engine> {
        let drafter: Box<dyn Drafter> = if let Some(draft) = draft {
            Box::new(draft.load(&mut engine, load)?)
        } else if self.predicts() {
            let layer = engine.take_prediction_layer().context("the model was loaded without its prediction layer")?;
            Box::new(MtpDrafter::new(layer))
        } else if self.looks_up(device) {
            Box::new(PromptLookup::default())
        } else {
            return Ok(engine);
        };
        Ok(engine.with_drafter(drafter))
    }
}
