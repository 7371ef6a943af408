//! Runs tests on a loaded model.

use std::time::{Duration, Instant};

use marlin_model::{KvSequence, LanguageModel, LogitRows, ModelError, ModelInfo, StepBatch};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::{BytesPerToken, Measurement, Test};
use crate::stats::Spread;

/// Tokens of the untimed step that comes before everything.
const WARM_UP: usize = 16;
/// For how long a GPU runs each test untimed: its clock falls to a quarter while it has nothing to do.
const GPU_WARM_UP: Duration = Duration::from_millis(500);

/// Runs every test `repetitions` times. Decode tests must come in ascending order of depth.
///
/// The KV cache below a depth is filled by running that many random tokens through the model, once for all repetitions
/// (which then roll back to it) and as the beginning of the next depth. Tokens are random too: nothing is sampled.
pub(super) fn run(
    model: &mut dyn LanguageModel,
    tests: &[Test],
    repetitions: usize,
    weights_per_token: f64,
    recorded: &dyn Fn() -> Option<u64>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Measurement>, ModelError> {
    let mut runner = Runner::new(model);
    let total = tests.len() * repetitions;
    let mut done = 0;

    let mut sequence = runner.model.kv().sequence();
    let warm_up = tests.iter().map(|test| test.tokens()).max().unwrap_or(0).min(WARM_UP);
    runner.prefill(&mut sequence, warm_up, LogitRows::Last)?;
    runner.model.kv().truncate(&mut sequence, 0);

    let mut measurements = Vec::with_capacity(tests.len());
    for &test in tests {
        runner.prepare(&mut sequence, test)?;
        let mut samples = Vec::with_capacity(repetitions);
        let recorded_before = recorded();
        for _ in 0..repetitions {
            let seconds = runner.test(&mut sequence, test)?;
            samples.push(test.tokens() as f64 / seconds);
            done += 1;
            progress(done, total);
        }
        let bytes = match test {
            Test::Prefill(_) => None,
            Test::Decode { tokens, depth } => {
                Some(BytesPerToken { weights: weights_per_token, kv: kv_per_token(runner.model.info(), depth, tokens) })
            }
        };
        let kernels = recorded().zip(recorded_before).map(|(after, before)| {
            let steps = repetitions * if bytes.is_some() { test.tokens() } else { 1 };
            (after - before) as f64 / steps as f64
        });
        // There is at least one repetition.
        let measurement = |rate| Measurement { test, rate, samples: samples.clone(), bytes, kernels };
        measurements.extend(Spread::of(&samples).map(measurement));
    }
    runner.model.kv().release(sequence);
    Ok(measurements)
}

/// Runs tests, one after the other on one sequence.
pub(super) struct Runner<'a> {
    pub(super) model: &'a mut dyn LanguageModel,
    batch: StepBatch,
    rng: ChaCha8Rng,
}

impl<'a> Runner<'a> {
    pub(super) fn new(model: &'a mut dyn LanguageModel) -> Self {
        Self { batch: StepBatch::new(), rng: ChaCha8Rng::seed_from_u64(0), model }
    }

    /// Brings a sequence to the depth of a test, and a GPU to its speed.
    pub(super) fn prepare(&mut self, sequence: &mut KvSequence, test: Test) -> Result<(), ModelError> {
        self.model.kv().truncate(sequence, test.depth());
        let missing = test.depth() - sequence.len();
        self.prefill(sequence, missing, LogitRows::None)?;
        if self.model.info().overlaps {
            let begin = Instant::now();
            while begin.elapsed() < GPU_WARM_UP {
                self.test(sequence, test)?;
            }
        }
        Ok(())
    }

    /// Runs a test once, after which the sequence is as it was, and gives the seconds that it took.
    fn test(&mut self, sequence: &mut KvSequence, test: Test) -> Result<f64, ModelError> {
        self.model.wait()?;
        let started = Instant::now();
        match test {
            Test::Prefill(tokens) => self.prefill(sequence, tokens, LogitRows::Last)?,
            Test::Decode { tokens, .. } => {
                for _ in 0..tokens {
                    self.prefill(sequence, 1, LogitRows::Last)?;
                }
            }
        }
        self.model.wait()?;
        let seconds = started.elapsed().as_secs_f64();
        self.model.kv().truncate(sequence, test.depth());
        Ok(seconds)
    }

    /// Adds random tokens to a sequence and runs them, in as few steps as they fit; the last one computes logits if asked.
    pub(super) fn prefill(
        &mut self,
        sequence: &mut KvSequence,
        tokens: usize,
        logits: LogitRows,
    ) -> Result<(), ModelError> {
        let (vocabulary, most) = (self.model.info().vocabulary as u32, self.model.info().step_tokens);
        let mut left = tokens;
        while left > 0 {
            let ids: Vec<u32> = (0..left.min(most)).map(|_| self.rng.next_u32() % vocabulary).collect();
            left -= ids.len();
            self.model.kv().append(sequence, ids.len())?;
            self.batch.clear();
            self.batch.push(sequence, &ids, if left == 0 { logits } else { LogitRows::None });
            self.model.forward(&self.batch)?;
        }
        Ok(())
    }
}

/// Bytes of the KV cache that a token sees, the mean over `tokens` tokens after `depth` others. A token sees itself.
fn kv_per_token(info: &ModelInfo, depth: usize, tokens: usize) -> f64 {
    let layer = |layer: &marlin_kernels::KvLayer| {
        let bytes = layer.bytes_per_token(info.kv_type);
        let visible = (depth + 1..=depth + tokens).map(|seen| seen.min(layer.window.unwrap_or(usize::MAX)) as f64);
        bytes as f64 * visible.sum::<f64>() / tokens as f64
    };
    info.kv_layout.layers.iter().map(layer).sum()
}

#[cfg(test)]
mod tests {
    use marlin_kernels::{DeviceInfo, KvLayer, KvLayout, KvType};

    use super::*;

    #[test]
    fn a_token_sees_its_past_and_itself_within_the_window() {
        let layer = KvLayer { heads: 2, key_dim: 4, value_dim: 4, window: None };
        let layers = vec![layer, KvLayer { window: Some(3), ..layer }];
        let info = ModelInfo {
            architecture: String::new(),
            vocabulary: 1,
            context: 16,
            step_tokens: 1,
            logit_rows: 1,
            layers: 2,
            kv_layout: KvLayout { block_tokens: 4, layers },
            kv_type: KvType::F16,
            weight_bytes: 0,
            device: DeviceInfo { name: String::new(), detail: String::new() },
            overlaps: false,
        };
        // 32 bytes a token and layer; 11 and 12 tokens are seen in the first layer, 3 in the second.
        assert_eq!(kv_per_token(&info, 10, 2), 32.0 * (11.5 + 3.0));
        assert_eq!(kv_per_token(&info, 0, 1), 64.0);
    }
}
