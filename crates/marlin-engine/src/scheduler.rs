//! Which sequences take part in a step, and with how many tokens.

use std::collections::VecDeque;

use marlin_model::{KvPool, ModelError, StepBatch};

use crate::engine::RequestId;
use crate::sequence::Sequence;

/// A sequence's part in a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) request: RequestId,
    /// Tokens that it has computed when the step is done.
    pub(crate) computed: usize,
    /// The row of the step's logits that its next token comes from, if one does.
    pub(crate) row: Option<u32>,
}

/// The part of a request among those that are left; parts and those who ask come in the order of arrival.
fn part_of<'a>(parts: &mut std::slice::Iter<'a, Part>, request: RequestId) -> Option<&'a Part> {
    while let Some(part) = parts.as_slice().first().filter(|part| part.request <= request) {
        parts.next();
        if part.request == request {
            return Some(part);
        }
    }
    None
}

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
    pub(crate) fn schedule(
        &mut self,
        kv: &mut KvPool,
        batch: &mut StepBatch,
        parts: &mut Vec<Part>,
    ) -> Result<(), ModelError> {
        batch.clear();
        parts.clear();
        let mut prefill_tokens = self.step_tokens - self.running.iter().filter(|s| s.pending() == 1).count();
        for sequence in &mut self.running {
            let tokens = match sequence.pending() {
                tokens @ (0 | 1) => tokens,
                tokens => {
                    let tokens = tokens.min(prefill_tokens);
                    prefill_tokens -= tokens;
                    tokens
                }
            };
            if tokens > 0 {
                let row = sequence.take_part(tokens, kv, batch)?;
                parts.push(Part { request: sequence.id, computed: sequence.kv.len(), row });
            }
        }
        Ok(())
    }

    /// The running sequences that have a part in a step, with their parts.
    pub(crate) fn members<'a>(&'a mut self, parts: &'a [Part]) -> impl Iterator<Item = (&'a mut Sequence, &'a Part)> {
        let mut parts = parts.iter();
        self.running.iter_mut().filter_map(move |sequence| {
            let part = part_of(&mut parts, sequence.id)?;
            Some((sequence, part))
        })
    }

    /// Forgets the steps under way, one of which failed: as if they had not been scheduled.
    pub(crate) fn roll_back(&mut self, kv: &mut KvPool) {
        self.running.iter_mut().for_each(|sequence| sequence.roll_back(kv));
    }

    /// Ends a step: `is_finished` is asked once for every running sequence that has a part in it, and those that are leave.
    pub(crate) fn end_step(
        &mut self,
        kv: &mut KvPool,
        parts: &[Part],
        mut is_finished: impl FnMut(&mut Sequence, &Part) -> bool,
    ) {
        let mut parts = parts.iter();
        self.retire(kv, |sequence| part_of(&mut parts, sequence.id).is_some_and(|part| is_finished(sequence, part)));
    }

    /// Running sequences for which `is_finished` leave.
    fn retire(&mut self, kv: &mut KvPool, is_finished: impl FnMut(&mut Sequence) -> bool) {
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
