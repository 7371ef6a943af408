//! `--text`: what the quantised model kept of the original's quality.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use marlin_checkpoint::Checkpoint;
use marlin_quantize::{Divergence, Kept, ModelLogits, Quality, Windows, evaluate};
use serde_json::{Value, json};

use crate::cli::calibration::HELD_OUT_NAME;
use crate::cli::measure::{Subject, name, usual_context, usual_kv, windows};
use crate::cli::progress::Bar;
use crate::device::Device;
use crate::memory::MemoryOptions;
use crate::{DeviceOptions, LoadError, load};

const HEADING: &str = "Quality";

/// On which text quality is measured.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct MeasureOptions {
    /// Measure on this text, a UTF-8 file, what OUT kept of MODEL's quality, as `eval OUT --baseline MODEL` does; report and
    /// model card then say it
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    text: Option<PathBuf>,

    /// Measure on the first windows only
    #[arg(long, value_name = "N", requires = "text", help_heading = HEADING)]
    windows: Option<NonZeroUsize>,
}

/// All that measuring takes beside the quantised model.
pub(super) struct Measurement<'a> {
    source: &'a Checkpoint,
    text: &'a Path,
    windows: Windows,
    context: usize,
    /// As the original is computed: in f32.
    exact: Device,
    /// As the quantised model is computed by default.
    usual: Device,
}

/// What was measured.
pub(super) struct Measured {
    /// The text's file, or what else it is called.
    text: String,
    /// The same in Markdown.
    text_in_card: String,
    /// Tokens of a window.
    context: usize,
    original: Quality,
    quantized: Quality,
    divergence: Divergence,
    /// How the quantised model was computed.
    arithmetic: &'static str,
}

impl MeasureOptions {
    /// Whether the model is run to measure it.
    pub(super) fn are_given(&self) -> bool {
        self.text.is_some()
    }

    /// Reads the text and opens the device, so that whatever stands against measuring is said before hours of quantising;
    /// `None` if nothing is to be measured.
    pub(super) fn prepare<'a>(
        &'a self,
        source: &'a Checkpoint,
        threads: Option<NonZeroUsize>,
    ) -> anyhow::Result<Option<Measurement<'a>>> {
        let Some(text) = &self.text else { return Ok(None) };
        let context = usual_context(&[source]);
        let windows = windows(&[source], text, context, self.windows)?;
        let open = |exact| {
            let options = DeviceOptions { threads, exact, ..DeviceOptions::default() };
            options.open().map_err(LoadError::Device)
        };
        let measurement = Measurement { source, text, windows, context, exact: open(true)?, usual: open(false)? };
        if let Some(budget) = MemoryOptions::default().budget(&measurement.exact) {
            measurement.original().require_fit_unquantised(&budget)?;
        }
        Ok(Some(measurement))
    }
}

impl Measurement<'_> {
    /// Measures the original, then what was made of it; one of the two is in memory at a time.
    pub(super) fn measure(&self, quantized: &Checkpoint) -> anyhow::Result<Measured> {
        let mut recorded = self.original().record(&self.windows)?;
        let original = evaluate(&mut recorded, None, &self.windows, |_| {})?;
        let subject =
            Subject { checkpoint: quantized, device: &self.usual, kv_type: usual_kv(false), ..self.original() };
        let mut model = subject.load()?;
        let mut bar = Bar::counting("Measuring the result", "tokens");
        let total = self.windows.predicted() as u64;
        let mut logits = ModelLogits::new(model.as_mut());
        let quantized = evaluate(&mut logits, Some(&mut recorded), &self.windows, |done| bar.set(done as u64, total))?;
        let divergence = quantized.divergence.expect("there is a baseline");
        let arithmetic = "the quantised model with the arithmetic it runs in";
        let text = name(self.text);
        let text_in_card = format!("`{text}`");
        Ok(Measured { text, text_in_card, context: self.context, original, quantized, divergence, arithmetic })
    }

    fn original(&self) -> Subject<'_> {
        // Each of the two is loaded once.
        let load = load::load_model;
        Subject { checkpoint: self.source, device: &self.exact, kv_type: usual_kv(true), context: self.context, load }
    }
}

impl Measured {
    /// What calibration kept on the text that it held out, in windows of so many tokens.
    pub(super) fn held_out(kept: &Kept, context: usize) -> Option<Self> {
        let Kept { original, quantized } = kept.clone();
        Some(Self {
            text: HELD_OUT_NAME.into(),
            text_in_card: HELD_OUT_NAME.into(),
            context,
            divergence: quantized.divergence?,
            original,
            quantized,
            arithmetic: "and so was the quantised model, but for its embedding",
        })
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "text": self.text,
            "context": self.context,
            "windows": self.quantized.window_nll.len(),
            "tokens": self.quantized.tokens,
            "perplexity_before": self.original.perplexity(),
            "perplexity": self.quantized.perplexity(),
            "mean_kl": self.divergence.mean_kl,
            "p99_kl": self.divergence.p99_kl,
            "top1_agreement": self.divergence.top1_agreement,
        })
    }

    /// A line of the report.
    pub(super) fn to_text(&self) -> String {
        let Divergence { mean_kl, p99_kl, top1_agreement } = self.divergence;
        format!(
            "quality: perplexity {:.4}, from {:.4}; KL {mean_kl:.5} nats, p99 {p99_kl:.4}; top-1 agreement {:.2} % \
             ({} tokens of {})\n",
            self.quantized.perplexity(),
            self.original.perplexity(),
            top1_agreement * 100.0,
            self.quantized.tokens,
            self.text,
        )
    }

    /// A section of the model card.
    pub(super) fn to_markdown(&self) -> String {
        let Divergence { mean_kl, p99_kl, top1_agreement } = self.divergence;
        format!(
            "## Quality\n\n\
             Measured on {}: {} predicted tokens in {} windows of {}. KL is the divergence of the next token's\n\
             distribution from the source's, in nats a token; top-1 is how often both find the same token most likely.\n\
             The source was computed in f32, {}.\n\n\
             | | perplexity | mean KL | p99 KL | top-1 |\n\
             | --- | ---: | ---: | ---: | ---: |\n\
             | source | {:.4} | 0 | 0 | 100 % |\n\
             | quantised | {:.4} | {mean_kl:.5} | {p99_kl:.4} | {:.2} % |\n\n",
            self.text_in_card,
            self.quantized.tokens,
            self.quantized.window_nll.len(),
            self.context,
            self.arithmetic,
            self.original.perplexity(),
            self.quantized.perplexity(),
            top1_agreement * 100.0,
        )
    }
}
