//! `--target-bpw` and `--plan`: bits where they keep most quality.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use marlin_checkpoint::{Checkpoint, ExportLayout};
use marlin_quantize::{BitPlan, measure_sensitivity};
use serde_json::{Value, json};

use crate::DeviceOptions;
use crate::cli::calibration::CalibrationOptions;
use crate::cli::in_pool;
use crate::cli::progress::Bar;

const HEADING: &str = "Mixed precision";

/// Which bits go where.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct BitOptions {
    /// Mix formats for so many bits per weight in the decoder's matrices, scales included: measures on the calibration text what each
    /// matrix costs in each, and chooses the mix whose KL divergence is least
    #[arg(long, value_name = "BITS", value_parser = bits, conflicts_with_all = super::CHOSEN, help_heading = HEADING)]
    target_bpw: Option<f64>,

    /// Give each matrix the format that this plan has for it; with --target-bpw, choose formats anew by what the plan says they cost,
    /// without measuring again
    #[arg(long, value_name = "FILE", conflicts_with_all = super::CHOSEN, help_heading = HEADING)]
    plan: Option<PathBuf>,

    /// Write the plan here too, before anything is quantised; a folder OUT has it as plan.json in the end
    #[arg(long, value_name = "FILE", requires = "target_bpw", help_heading = HEADING)]
    save_plan: Option<PathBuf>,
}

fn bits(text: &str) -> Result<f64, String> {
    let bits = text.parse().ok().filter(|bits| (1.0..=16.0).contains(bits));
    bits.ok_or_else(|| format!("must be a number from 1 to 16, found {text}"))
}

/// A plan, and what was asked of it.
pub(super) struct Bits {
    target: Option<f64>,
    pub(super) plan: BitPlan,
}

impl BitOptions {
    /// The plan; `None` if nothing asks for one.
    pub(super) fn plan(
        &self,
        checkpoint: &Checkpoint,
        calibration: &CalibrationOptions,
        layout: ExportLayout,
        threads: Option<NonZeroUsize>,
    ) -> anyhow::Result<Option<Bits>> {
        let (mut plan, target) = match (&self.plan, self.target_bpw) {
            (None, None) => return Ok(None),
            (Some(file), target) => (read(file)?, target),
            (None, Some(target)) => {
                ensure!(
                    layout == ExportLayout::MetalMarlin,
                    "--target-bpw mixes formats that the layout {layout} does not have; choose a --format, and other formats by --matrix"
                );
                (measure(checkpoint, calibration, threads)?, Some(target))
            }
        };
        if let Some(target) = target {
            plan.allocate(target).context("--target-bpw")?;
        }
        if let Some(file) = &self.save_plan {
            fs::write(file, plan.to_json()).with_context(|| format!("cannot write the plan {}", file.display()))?;
        }
        Ok(Some(Bits { target, plan }))
    }

    /// Whether the model is run to measure.
    pub(super) fn measures(&self) -> bool {
        self.target_bpw.is_some() && self.plan.is_none()
    }
}

fn read(file: &Path) -> anyhow::Result<BitPlan> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read the plan {}", file.display()))?;
    BitPlan::from_json(&text).with_context(|| file.display().to_string())
}

fn measure(
    checkpoint: &Checkpoint,
    calibration: &CalibrationOptions,
    threads: Option<NonZeroUsize>,
) -> anyhow::Result<BitPlan> {
    let device = DeviceOptions { threads, ..DeviceOptions::default() };
    let run = calibration.run(checkpoint, &device, "--target-bpw", "choose a --format otherwise")?;
    in_pool(threads, || {
        let mut bar = Bar::counting("Measuring", "layers");
        Ok(measure_sensitivity(checkpoint, &run.calibration(), &mut |done, total| bar.set(done, total))?)
    })?
}

impl Bits {
    /// What the mix is called where a format would stand.
    pub(super) fn name(&self) -> String {
        format!("a mix of {:.2} bits", self.plan.bits_per_weight)
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "target_bits_per_weight": self.target,
            "bits_per_weight": self.plan.bits_per_weight,
            "predicted_kl": self.plan.predicted_kl,
        })
    }

    /// A sentence.
    pub(super) fn to_text(&self) -> String {
        let target = self.target.map_or(String::new(), |target| format!(", for a target of {target}"));
        format!(
            "The formats are those of a plan of {:.3} bits per weight{target}. By GPTQ they are expected to cost {:.4} nats of mean KL divergence.",
            self.plan.bits_per_weight, self.plan.predicted_kl
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_numbers_of_bits() {
        assert_eq!(bits("3.5"), Ok(3.5));
        for wrong in ["", "four", "0.5", "17", "nan", "inf", "-3"] {
            assert!(bits(wrong).unwrap_err().contains("from 1 to 16"), "{wrong}");
        }
    }
}
