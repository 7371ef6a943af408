//! `--calibration`: the text that shows which errors matter.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Context;
use marlin_checkpoint::Checkpoint;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions};
use marlin_quantize::{Calibration, Windows};
use metal_marlin::{DeviceOptions, LoadError};

use crate::commands::measure;
use crate::commands::recipe::Method;

/// Stories and book excerpts; its SOURCES.md says whose.
const BUNDLED: &str = include_str!("../../../../../data/text/calibration.txt");

/// What a model is run on before it is quantised.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Calibration")]
pub(super) struct CalibrationOptions {
    /// Text like what the model will read and write, a UTF-8 file, for --method gptq and --cold-expert-format [default: English prose that
    /// comes with the program]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,

    /// Windows of the text that are read [default: all]
    #[arg(long, value_name = "N")]
    calibration_windows: Option<NonZeroUsize>,
}

impl CalibrationOptions {
    /// The windows of the text in the model's tokens.
    pub(super) fn windows(&self, checkpoint: &Checkpoint) -> anyhow::Result<Windows> {
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
    pub(super) fn text_name(&self) -> String {
        self.calibration.as_ref().map_or_else(|| "the calibration text".into(), |text| text.display().to_string())
    }

    /// Whether there are any options.
    pub(super) fn is_given(&self) -> bool {
        self.calibration.is_some() || self.calibration_windows.is_some()
    }

    /// What a method runs the model on; `None` if it does not.
    pub(super) fn prepare(
        &self,
        method: Method,
        checkpoint: &Checkpoint,
        threads: &DeviceOptions,
    ) -> anyhow::Result<Option<(Windows, CpuBackend)>> {
        if method != Method::Gptq {
            return Ok(None);
        }
        let windows = self
            .windows(checkpoint)
            .context("--method gptq needs a text in the model's tokens (--method mse does not)")?;
        let options = CpuOptions { arithmetic: Arithmetic::Exact, ..threads.cpu() };
        Ok(Some((windows, CpuBackend::new(options).map_err(LoadError::Device)?)))
    }
}

/// The calibration of windows and what runs them.
pub(super) fn calibration((windows, backend): &(Windows, CpuBackend)) -> Calibration<'_> {
    Calibration::new(windows, backend.clone())
}
