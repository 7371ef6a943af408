//! `--calibration`: the text that shows which errors matter.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Context;
use marlin_checkpoint::Checkpoint;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions};
use marlin_model::Planner;
use marlin_quantize::{Calibration, Windows};

use super::measure;
use super::recipe::Method;
use crate::{DeviceOptions, LoadError};

/// Stories and book excerpts; its SOURCES.md says whose.
const BUNDLED: &str = include_str!("../../../../data/text/calibration.txt");

/// More of the same, none of which is in the other text.
const HELD_OUT: &str = include_str!("../../../../data/text/validation.txt");

/// Windows of the held-out text that are looked at.
const HELD_OUT_WINDOWS: usize = 2;

/// What the held-out text is called in messages.
pub(crate) const HELD_OUT_NAME: &str = "bundled text that weights are not fitted to";

/// What a model is run on before it is quantised.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Calibration")]
pub(crate) struct CalibrationOptions {
    /// Text like what the model will read and write, a UTF-8 file, for --method gptq, --scale-channels, --target-bpw and --cold-expert-format [default: English prose that
    /// comes with the program]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,

    /// Windows of the text that are read [default: all]
    #[arg(long, value_name = "N")]
    calibration_windows: Option<NonZeroUsize>,
}

impl CalibrationOptions {
    /// The windows of the text in the model's tokens.
    pub(crate) fn windows(&self, checkpoint: &Checkpoint) -> anyhow::Result<Windows> {
        let context = measure::usual_context(&[checkpoint]);
        let limit = self.calibration_windows;
        match &self.calibration {
            Some(text) => measure::windows(&[checkpoint], text, context, limit),
            None => {
                let tokens = checkpoint.tokenizer()?.encode(BUNDLED, false)?;
                Ok(Windows::new(tokens, context, limit.map(NonZeroUsize::get))?)
            }
        }
    }

    /// What the text is called in messages.
    pub(crate) fn text_name(&self) -> String {
        self.calibration.as_deref().map_or_else(|| "the bundled text".into(), measure::name)
    }

    /// The options as they are given again, each with a space before it; of paths only the last part.
    pub(crate) fn to_arguments(&self) -> String {
        let text = self.calibration.as_deref().map(|text| format!(" --calibration {}", measure::name(text)));
        let windows = self.calibration_windows.map(|windows| format!(" --calibration-windows {windows}"));
        [text, windows].into_iter().flatten().collect()
    }

    /// Whether there are any options.
    pub(crate) fn is_given(&self) -> bool {
        self.calibration.is_some() || self.calibration_windows.is_some()
    }

    /// How a method rounds, with all that it needs.
    pub(crate) fn prepare(
        &self,
        method: Method,
        checkpoint: &Checkpoint,
        threads: &DeviceOptions,
    ) -> anyhow::Result<Rounding> {
        let run = match method {
            Method::Gptq => Some(self.run(checkpoint, threads, "--method gptq", "--method mse does not")?),
            Method::Rtn | Method::Mse => None,
        };
        let held_out = match &run {
            Some(_) => Some(held_out(checkpoint)?),
            None => None,
        };
        Ok(Rounding { method, run, held_out })
    }

    /// All that it takes to run a model over the text. Errors say which option asks for it, and what helps.
    pub(crate) fn run(
        &self,
        checkpoint: &Checkpoint,
        threads: &DeviceOptions,
        option: &str,
        otherwise: &str,
    ) -> anyhow::Result<Run> {
        let options = CpuOptions { arithmetic: Arithmetic::Exact, ..threads.cpu() };
        let backend = CpuBackend::new(options).map_err(LoadError::Device)?;
        Planner::new(&backend, checkpoint).with_context(|| format!("{option} runs the model ({otherwise})"))?;
        let windows = self.windows(checkpoint);
        let windows = windows.with_context(|| format!("{option} needs a text in the model's tokens ({otherwise})"))?;
        Ok(Run { windows, backend, text: self.text_name() })
    }
}

/// How weights are rounded.
pub(crate) struct Rounding {
    method: Method,
    /// What the model is run on, if it is run.
    run: Option<Run>,
    /// A text on which is measured what was kept, if the model is run.
    held_out: Option<Windows>,
}

/// The windows of the held-out text in the model's tokens.
fn held_out(checkpoint: &Checkpoint) -> anyhow::Result<Windows> {
    let tokens = checkpoint.tokenizer()?.encode(HELD_OUT, false)?;
    Ok(Windows::new(tokens, measure::usual_context(&[checkpoint]), Some(HELD_OUT_WINDOWS))?)
}

/// A text and what runs a model over it.
pub(crate) struct Run {
    windows: Windows,
    backend: CpuBackend,
    text: String,
}

impl Run {
    pub(crate) fn calibration(&self) -> Calibration<'_> {
        Calibration::new(&self.windows, self.backend.clone())
    }
}

impl Rounding {
    pub(crate) fn calibration(&self) -> Option<Calibration<'_>> {
        self.run.as_ref().map(|run| Calibration { held_out: self.held_out.as_ref(), ..run.calibration() })
    }

    /// Tokens of a window.
    pub(crate) fn context(&self) -> Option<usize> {
        self.held_out.as_ref()?.iter().map(<[u32]>::len).next()
    }

    /// Its name among the methods.
    pub(crate) fn method(&self) -> &'static str {
        self.method.name()
    }

    /// Tokens of the text.
    pub(crate) fn tokens(&self) -> Option<usize> {
        self.run.as_ref().map(|run| run.windows.tokens())
    }

    /// How much of which text, in words; of a method that runs nothing, no text.
    pub(crate) fn calibrated_on(&self) -> String {
        self.run.as_ref().map_or_else(
            || "no text".into(),
            |Run { windows, text, .. }| format!("{} tokens of {text}", windows.tokens()),
        )
    }

    /// A sentence.
    pub(crate) fn to_text(&self) -> String {
        match &self.run {
            None => format!("Weights are rounded by {}, each by itself.", self.method()),
            Some(Run { windows, text, .. }) => {
                format!(
                    "Weights are rounded by {}, calibrated on {} tokens of {text}.",
                    self.method(),
                    windows.tokens()
                )
            }
        }
    }
}
