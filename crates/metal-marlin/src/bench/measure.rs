//! Runs tests on a loaded model.

use std::time::{Duration, Instant};

use marlin_model::{KvSequence, LanguageModel, LogitRows, ModelError, ModelShape, StepBatch};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::weights::StepWeights;
use super::{Measurement, Test, Work};
use crate::stats::Spread;

/// Tokens of the untimed step that comes before everything.
const WARM_UP: usize = 16;
/// For how long a GPU runs each test untimed: its clock falls to a quarter while it has nothing to do.
const GPU_WARM_UP: Duration = Duration::from_millis(500);

/// Runs every test `repetitions` times. Decode tests must come in ascending order of depth, and the pool must have KV blocks for
/// each of them.
///
/// The KV cache below a depth is filled by running that many random tokens through the model, for each stream its own, once for
/// all repetitions (which then roll back to it) and as the beginning of the next depth. Tokens are random too: nothing is
/// sampled. `weights` and `shape` tell how much work a test is.
pub(super) fn run(
    model: &mut dyn LanguageModel,
    tests: &[Test],
    repetitions: usize,
    weights: StepWeights,
    shape: &ModelShape,
    recorded: &dyn Fn() -> Option<u64>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Measurement>, ModelError> {
    let mut runner = Runner::new(model);
    let total = tests.len() * repetitions;
    let mut done = 0;

    let warm_up = tests.iter().map(|test| test.tokens()).max().unwrap_or(0).min(WARM_UP);
    runner.run(Test::Prefill(warm_up))?;

    let mut measurements = Vec::with_capacity(tests.len());
    for &test in tests {
        runner.prepare(test)?;
        let mut samples = Vec::with_capacity(repetitions);
        let recorded_before = recorded();
        for _ in 0..repetitions {
            let seconds = runner.run(test)?;
            samples.push(test.tokens() as f64 * test.streams() as f64 / seconds);
            done += 1;
            progress(done, total);
        }
        let work = Work::of(test, weights, shape, runner.model.info());
        let kernels = recorded().zip(recorded_before).map(|(after, before)| {
            let steps = match test {
                Test::Prefill(_) => repetitions,
                Test::Decode { tokens, .. } => repetitions * tokens,
            };
            (after - before) as f64 / steps as f64
        });
        // There is at least one repetition.
        let measurement = |rate| Measurement { test, rate, samples: samples.clone(), work, kernels };
        measurements.extend(Spread::of(&samples).map(measurement));
    }
    runner.release();
    Ok(measurements)
}

/// Runs tests, one after the other.
pub(super) struct Runner<'a> {
    model: &'a mut dyn LanguageModel,
    /// Of every stream; a prompt is the first one's.
    sequences: Vec<KvSequence>,
    batch: StepBatch,
    rng: ChaCha8Rng,
}

impl<'a> Runner<'a> {
    pub(super) fn new(model: &'a mut dyn LanguageModel) -> Self {
        let sequences = vec![model.kv().sequence()];
        Self { model, sequences, batch: StepBatch::new(), rng: ChaCha8Rng::seed_from_u64(0) }
    }

    /// Makes everything ready for a test: what comes before it in the KV cache, and the clock of a GPU.
    pub(super) fn prepare(&mut self, test: Test) -> Result<(), ModelError> {
        self.fill(test)?;
        if self.model.info().overlaps {
            let begin = Instant::now();
            while begin.elapsed() < GPU_WARM_UP {
                self.run(test)?;
            }
        }
        Ok(())
    }

    /// Brings each of a test's sequences to as many tokens as come before those that are timed. Streams share no blocks: they would
    /// find each other's keys and values in the device's caches.
    fn fill(&mut self, test: Test) -> Result<(), ModelError> {
        while self.sequences.len() < test.streams() {
            self.sequences.push(self.model.kv().sequence());
        }
        for stream in 0..test.streams() {
            self.model.kv().truncate(&mut self.sequences[stream], test.depth());
            let missing = test.depth() - self.sequences[stream].len();
            self.prefill(stream, missing, LogitRows::None)?;
        }
        Ok(())
    }

    /// Runs a test once, after which its sequences are as they were, and gives the seconds that it took.
    fn run(&mut self, test: Test) -> Result<f64, ModelError> {
        self.model.wait()?;
        let started = Instant::now();
        self.start(test, || ())?;
        self.model.wait()?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Starts the steps of a test without waiting for them, after which its sequences are as they were; `each` is told after each: a
    /// whole prompt, or a token of every stream.
    pub(super) fn start(&mut self, test: Test, mut each: impl FnMut()) -> Result<(), ModelError> {
        match test {
            Test::Prefill(tokens) => {
                self.prefill(0, tokens, LogitRows::Last)?;
                each();
            }
            Test::Decode { tokens, streams, .. } => {
                for _ in 0..tokens {
                    self.decode(streams)?;
                    each();
                }
            }
        }
        for sequence in &mut self.sequences[..test.streams()] {
            self.model.kv().truncate(sequence, test.depth());
        }
        Ok(())
    }

    /// Adds random tokens to a stream and runs them, in as few steps as they fit; the last one computes logits if asked.
    fn prefill(&mut self, stream: usize, tokens: usize, logits: LogitRows) -> Result<(), ModelError> {
        let (vocabulary, most) = (self.model.info().vocabulary as u32, self.model.info().step_tokens);
        let sequence = &mut self.sequences[stream];
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

    /// Adds a random token to each of the first `streams` streams and runs them as one step, with the logits of each.
    fn decode(&mut self, streams: usize) -> Result<(), ModelError> {
        let vocabulary = self.model.info().vocabulary as u32;
        self.batch.clear();
        for sequence in &mut self.sequences[..streams] {
            self.model.kv().append(sequence, 1)?;
            self.batch.push(sequence, &[self.rng.next_u32() % vocabulary], LogitRows::Last);
        }
        self.model.forward(&self.batch)
    }

    pub(super) fn release(self) {
        for sequence in self.sequences {
            self.model.kv().release(sequence);
        }
    }
}
