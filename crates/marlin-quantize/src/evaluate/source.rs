//! Where logits come from: a model as it runs, or a recording of one.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use marlin_model::{KvSequence, LanguageModel, LogitRows, StepBatch};

use super::Windows;
use crate::QuantizeError;

/// Logits of consecutive tokens, window after window.
pub trait LogitSource {
    /// Logits of a row.
    fn vocabulary(&self) -> usize;

    /// Most tokens of one [`LogitSource::extend`].
    fn max_tokens(&self) -> usize;

    /// Begins a window with an empty context.
    fn start(&mut self, window: usize) -> Result<(), QuantizeError>;

    /// Appends `tokens` to the window; `logits` becomes `[tokens, vocabulary]`: what follows each of them.
    fn extend(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<(), QuantizeError>;
}

/// A model that runs, in one sequence of its KV pool.
pub struct ModelLogits<'a> {
    model: &'a mut dyn LanguageModel,
    sequence: KvSequence,
    batch: StepBatch,
}

impl<'a> ModelLogits<'a> {
    /// Runs `model`, which should have been loaded for as many logit rows as tokens of a step: chunks are as long as the
    /// smaller of the two.
    pub fn new(model: &'a mut dyn LanguageModel) -> Self {
        let sequence = model.kv().sequence();
        Self { model, sequence, batch: StepBatch::new() }
    }
}

impl Drop for ModelLogits<'_> {
    fn drop(&mut self) {
        self.model.kv().truncate(&mut self.sequence, 0);
    }
}

impl LogitSource for ModelLogits<'_> {
    fn vocabulary(&self) -> usize {
        self.model.info().vocabulary
    }

    fn max_tokens(&self) -> usize {
        let info = self.model.info();
        info.step_tokens.min(info.logit_rows)
    }

    fn start(&mut self, _window: usize) -> Result<(), QuantizeError> {
        self.model.kv().truncate(&mut self.sequence, 0);
        Ok(())
    }

    fn extend(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<(), QuantizeError> {
        self.model.kv().append(&mut self.sequence, tokens.len())?;
        self.batch.clear();
        self.batch.push(&self.sequence, tokens, LogitRows::All);
        self.model.forward(&self.batch)?;
        self.model.read_logits(logits)?;
        Ok(())
    }
}

/// The logits of a model over given windows, kept in a temporary file so that several models can be compared with it.
pub struct RecordedLogits<'a> {
    file: File,
    windows: &'a Windows,
    vocabulary: usize,
    /// The tokens that come next; any others were not recorded.
    expected: &'a [u32],
}

impl<'a> RecordedLogits<'a> {
    /// Runs `source` over `windows`; the file takes 4 bytes · predicted tokens · vocabulary. `progress` is told the predicted
    /// tokens done so far.
    pub fn record(
        source: &mut dyn LogitSource,
        windows: &'a Windows,
        mut progress: impl FnMut(usize),
    ) -> Result<Self, QuantizeError> {
        let mut file = tempfile::tempfile().map_err(QuantizeError::Recording)?;
        let mut logits = Vec::new();
        let mut done = 0;
        for (index, window) in windows.iter().enumerate() {
            source.start(index)?;
            for tokens in window[..window.len() - 1].chunks(source.max_tokens()) {
                source.extend(tokens, &mut logits)?;
                file.write_all(bytemuck::cast_slice(&logits)).map_err(QuantizeError::Recording)?;
                done += tokens.len();
                progress(done);
            }
        }
        Ok(Self { file, windows, vocabulary: source.vocabulary(), expected: &[] })
    }
}

impl LogitSource for RecordedLogits<'_> {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn max_tokens(&self) -> usize {
        usize::MAX
    }

    fn start(&mut self, window: usize) -> Result<(), QuantizeError> {
        self.expected = self.windows.iter().nth(window).ok_or(QuantizeError::NotRecorded)?;
        let first_row = self.windows.predicted_before(window) as u64;
        let offset = first_row * 4 * self.vocabulary as u64;
        self.file.seek(SeekFrom::Start(offset)).map_err(QuantizeError::Recording)?;
        Ok(())
    }

    fn extend(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<(), QuantizeError> {
        self.expected = self.expected.strip_prefix(tokens).ok_or(QuantizeError::NotRecorded)?;
        logits.resize(tokens.len() * self.vocabulary, 0.0);
        self.file.read_exact(bytemuck::cast_slice_mut(logits)).map_err(QuantizeError::Recording)
    }
}
