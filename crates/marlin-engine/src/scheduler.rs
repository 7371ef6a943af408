//! Which sequences take part in a step, and with how many tokens.

use std::collections::VecDeque;

use marlin_model::{KvPool, LogitRows, ModelError, StepBatch};

use crate::engine::RequestId;
use crate::sequence::Sequence;

/// Sequences in order of arrival.
///
/// A sequence waits until the blocks it may come to need are free; from then on it never lacks any.
#[derive(Debug)]
pub(crate) struct Scheduler {
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// Most tokens of a step.
    step_tokens: usize,
    /// Most sequences that run at a time, so that each can bring a token to a step and get its logits.
    most_running: usize,
    /// Blocks of the pool that no running sequence may come to need.
    unreserved_blocks: usize,
}

impl Scheduler {
    pub(crate) fn new(step_tokens: usize, logit_rows: usize, blocks: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            step_tokens,
            most_running: step_tokens.min(logit_rows),
            unreserved_blocks: blocks,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Queues a sequence behind all others.
    pub(crate) fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Lets waiting sequences run, first come first served, while there is room for them.
    pub(crate) fn admit(&mut self) {
        while let Some(next) = self.waiting.front()
            && next.kv_blocks <= self.unreserved_blocks
            && self.running.len() < self.most_running
        {
            self.unreserved_blocks -= next.kv_blocks;
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Fills a step: every decoding sequence brings its one token, and what is left goes to prompts, in chunks if
    /// need be.
    pub(crate) fn schedule(&mut self, kv: &mut KvPool, batch: &mut StepBatch) -> Result<(), ModelError> {
        batch.clear();
        let is_decoding = |sequence: &Sequence| sequence.pending().len() == 1;
        let mut prefill_tokens = self.step_tokens - self.running.iter().filter(|s| is_decoding(s)).count();
        for sequence in &mut self.running {
            let tokens = if is_decoding(sequence) { 1 } else { sequence.pending().len().min(prefill_tokens) };
            if tokens == 0 {
                continue;
            }
            if !is_decoding(sequence) {
                prefill_tokens -= tokens;
            }
            kv.append(&mut sequence.kv, tokens)?;
            let logits = if sequence.is_complete() { LogitRows::Last } else { LogitRows::None };
            batch.push(&sequence.kv, &sequence.pending()[..tokens], logits);
        }
        Ok(())
    }

    /// The sequences that get a token from the step under way, in the order of its logit rows.
    pub(crate) fn sampling(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.running.iter_mut().filter(|sequence| sequence.is_complete())
    }

    /// Forgets the step under way, which failed: as if it had not been scheduled.
    pub(crate) fn roll_back(&mut self, kv: &mut KvPool) {
        for sequence in &mut self.running {
            let computed = sequence.computed();
            kv.truncate(&mut sequence.kv, computed);
        }
    }

    /// Ends the step under way: `is_finished` is asked once for every running sequence, and those that are leave.
    pub(crate) fn retire(&mut self, kv: &mut KvPool, is_finished: impl FnMut(&mut Sequence) -> bool) {
        for sequence in self.running.extract_if(.., is_finished) {
            self.unreserved_blocks += sequence.kv_blocks;
            kv.release(sequence.kv);
        }
    }

    /// Drops a request, waiting or running, and frees its blocks; tells whether there was one.
    pub(crate) fn remove(&mut self, id: RequestId, kv: &mut KvPool) -> bool {
        let running = self.running.len();
        self.retire(kv, |sequence| sequence.id == id);
        if self.running.len() < running {
            return true;
        }
        let place = self.waiting.iter().position(|sequence| sequence.id == id);
        let Some(sequence) = place.and_then(|place| self.waiting.remove(place)) else { return false };
        kv.release(sequence.kv);
        true
    }
}
