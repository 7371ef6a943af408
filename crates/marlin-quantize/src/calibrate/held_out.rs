//! What a quantised model keeps, measured on a text that its weights were not fitted to.

use marlin_checkpoint::Checkpoint;
use marlin_kernels::cpu::CpuBackend;
use marlin_model::LayerRunner;

use crate::capture::Observed;
use crate::evaluate::Scores;
use crate::{Quality, QuantizeError, Windows};

/// Rows of logits that are computed at once.
const LOGIT_ROWS: usize = 128;

/// Hidden states after the last layer: of the quantised layers, and of the original ones.
pub(crate) struct HeldOut<'a> {
    pub(super) runner: LayerRunner<'a, Observed<CpuBackend>>,
    pub(super) windows: &'a Windows,
    pub(super) states: [Vec<Vec<f32>>; 2],
}

/// What a quantised model kept on the held-out text. Both models are computed in f32, and with the original's embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// The original.
    pub original: Quality,
    /// The quantised model, with its divergence from the original.
    pub quantized: Quality,
}

impl HeldOut<'_> {
    /// Compares what the two models make of the text, each with its own head.
    ///
    /// # Errors
    /// Logits are not finite, or the device failed.
    pub(crate) fn measure(mut self, source: &Checkpoint, output: &Checkpoint) -> Result<Kept, QuantizeError> {
        let runner = &mut self.runner;
        let (width, vocabulary) = (runner.hidden_size(), runner.vocabulary());
        let mut heads = [runner.load_head(output, LOGIT_ROWS)?, runner.load_head(source, LOGIT_ROWS)?];
        let (mut quantized, mut original) = (Scores::default(), Scores::default());
        let (mut logits, mut baseline) = (Vec::new(), Vec::new());
        let [states, originals] = &self.states;
        for (index, ((window, states), originals)) in self.windows.iter().zip(states).zip(originals).enumerate() {
            let failed = || QuantizeError::Logits { window: index };
            quantized.start();
            original.start();
            // Nothing follows the last token.
            let chunks = states.chunks(LOGIT_ROWS * width).zip(originals.chunks(LOGIT_ROWS * width));
            for ((states, originals), targets) in chunks.zip(window[1..].chunks(LOGIT_ROWS)) {
                let rows = targets.len() * width;
                runner.logits(&mut heads[0], &states[..rows], &mut logits)?;
                runner.logits(&mut heads[1], &originals[..rows], &mut baseline)?;
                quantized.add(&logits, targets, Some(&baseline), vocabulary).ok_or_else(failed)?;
                original.add(&baseline, targets, None, vocabulary).ok_or_else(failed)?;
            }
        }
        Ok(Kept { original: original.quality(), quantized: quantized.quality() })
    }
}
