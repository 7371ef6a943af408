//! Which answers take part in a step, and with how many tokens.

use std::collections::VecDeque;

use marlin_model::{KvPool, ModelError, StepBatch};

use crate::EngineError;
use crate::sequence::{Lookup, Part, Rank, Sequence};
use crate::speculation::{AnswerId, Drafter, MOST_DRAFT, Pace};

/// What bounds a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Most tokens.
    pub(crate) step_tokens: usize,
    /// Most tokens of prompts beside answers that are being generated, so that these do not wait for a long prompt.
    pub(crate) prefill_tokens: usize,
    /// Most rows of logits.
    pub(crate) logit_rows: usize,
    /// Most answers that run at a time; a step has room for each.
    pub(crate) max_running: usize,
    /// Answers begin with what the KV cache holds already.
    pub(crate) prefix_cache: bool,
    /// Answers guess as much as there is room for.
    pub(crate) always_draft: bool,
}

/// What came of scheduling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheduled {
    /// A step; nothing, if there is nothing to do.
    Step,
    /// KV blocks are short: an answer must give way, and none may while steps are under way.
    BlocksShort,
}

/// Answers in line, by rank.
///
/// An answer waits until there are KV blocks for its prompt, and takes others as it grows. When none are left, the last in line gives its
/// blocks back and waits again; what it has generated is then computed again as if it belonged to the prompt.
#[derive(Debug)]
pub(crate) struct Scheduler {
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    limits: Limits,
    preemptions: u64,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { waiting: VecDeque::new(), running: Vec::new(), limits, preemptions: 0 }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Answers that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Answers that run.
    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether one of those that run must have a certain form.
    pub(crate) fn has_constrained(&self) -> bool {
        self.running.iter().any(Sequence::is_constrained)
    }

    /// How often an answer had to give way.
    pub(crate) fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Most answers that run at a time.
    pub(crate) fn max_running(&self) -> usize {
        self.limits.max_running
    }

    /// Queues an answer behind all of its priority.
    pub(crate) fn add(&mut self, sequence: Sequence) {
        let place = self.waiting.partition_point(|other| other.rank < sequence.rank);
        self.waiting.insert(place, sequence);
    }

    fn run(&mut self, sequence: Sequence) {
        let place = self.running.partition_point(|other| other.rank < sequence.rank);
        self.running.insert(place, sequence);
    }

    /// Lets waiting answers run, the first in line first, while there is room for what they begin with. Gives how many tokens of their
    /// prompts were looked for in the cache, and how many were found. `look_up` tells whether more of an answer's prompt is on its way from elsewhere;
    /// others overtake it meanwhile.
    pub(crate) fn admit(
        &mut self,
        kv: &mut KvPool,
        mut look_up: impl FnMut(&mut Sequence, &KvPool) -> bool,
    ) -> (usize, usize) {
        let (mut looked_for, mut found) = (0, 0);
        let waits = |s: &Sequence| s.lookup() == Lookup::Waiting;
        let coming = self.waiting.iter().filter(|s| waits(s));
        let mut promised: usize = self.running.iter().chain(coming).map(|s| kv.needed_blocks(&s.kv, s.pending())).sum();
        let mut place = 0;
        while self.running.len() < self.max_running()
            && let Some(ready) = (place..self.waiting.len()).find(|&index| !waits(&self.waiting[index]))
            && let Some(mut next) = self.waiting.remove(ready)
        {
            place = ready;
            if self.limits.prefix_cache {
                next.take_cached_prefix(kv);
            }
            let cached = next.kv.len();
            let needed = kv.needed_blocks(&next.kv, next.pending());
            // Each of those that run has a block to grow into. One that runs alone finds all it may come to need.
            let spare = kv.free_blocks().saturating_sub(promised + self.running.len());
            if needed > spare && !self.running.is_empty() {
                next.leave(kv);
                self.waiting.insert(place, next);
                break;
            }
            promised += needed;
            if self.limits.prefix_cache && next.lookup() == Lookup::NotYet && look_up(&mut next, kv) {
                next.leave(kv);
                next.set_lookup(Lookup::Waiting);
                self.waiting.insert(place, next);
                continue;
            }
            next.set_lookup(Lookup::Done);
            next.note_cached();
            looked_for += cached + next.pending();
            found += cached;
            self.run(next);
        }
        (looked_for, found)
    }

    /// Lets answers guess what comes next, as much as pays, if the next step has no prompts: their share would blur what guesses cost.
    pub(crate) fn draft(&mut self, drafter: &mut dyn Drafter, pace: &mut Pace) -> Result<(), EngineError> {
        self.running.iter_mut().for_each(Sequence::forget_draft);
        let tokens = decoding(&self.running).count();
        if tokens == 0 || self.running.iter().any(|s| s.pending() != 1 || s.is_scored()) {
            return Ok(());
        }
        let always = self.limits.always_draft;
        let mut spare = self.limits.step_tokens.min(self.limits.logit_rows).saturating_sub(tokens);
        for sequence in self.running.iter_mut().filter(|sequence| sequence.may_draft()) {
            sequence.draft(drafter, pace, tokens, spare.min(MOST_DRAFT), always)?;
            spare -= sequence.drafted();
        }
        Ok(())
    }

    /// Whether an answer that runs can afford to wait in order to guess what comes next, for which its last token must be known.
    pub(crate) fn wants_to_draft(&self, pace: &Pace) -> bool {
        if !self.limits.always_draft && !pace.knows_overlap() {
            return false;
        }
        let tokens = self.running.len();
        let is_due = |s: &Sequence| self.limits.always_draft || s.account().plan(pace, tokens, MOST_DRAFT) > 0;
        self.running.iter().any(|sequence| sequence.may_draft() && is_due(sequence))
    }

    /// Fills a step: every answer that is being generated brings its one token and what it guesses, and prompts bring theirs, in chunks if need be.
    pub(crate) fn schedule(
        &mut self,
        kv: &mut KvPool,
        batch: &mut StepBatch,
        parts: &mut Vec<Part>,
        may_preempt: bool,
    ) -> Result<Scheduled, ModelError> {
        self.fork(kv);
        loop {
            batch.clear();
            parts.clear();
            let decode_blocks: usize = decoding(&self.running).map(|s| kv.needed_blocks(&s.kv, 1)).sum();
            if decode_blocks <= kv.free_blocks() || self.running.len() == 1 {
                self.fill(decode_blocks, kv, batch, parts)?;
                if !parts.is_empty() || self.running.iter().all(|s| s.pending() == 0) {
                    return Ok(Scheduled::Step);
                }
            }
            if !may_preempt {
                return Ok(Scheduled::BlocksShort);
            }
            self.preempt_last(kv);
        }
    }

    /// Answers whose prompt another one has computed branch off.
    fn fork(&mut self, kv: &mut KvPool) {
        let mut index = 0;
        while index < self.running.len() {
            let mut choice = 1;
            while self.running[index].is_fork_due() {
                let can_run = self.running.len() < self.max_running();
                let sequence = self.running[index].fork(choice, kv, can_run);
                choice += 1;
                if can_run { self.run(sequence) } else { self.add(sequence) }
            }
            index += 1;
        }
    }

    /// Gives each answer its part. `decode_blocks` are kept for those that are being generated.
    fn fill(
        &mut self,
        mut decode_blocks: usize,
        kv: &mut KvPool,
        batch: &mut StepBatch,
        parts: &mut Vec<Part>,
    ) -> Result<(), ModelError> {
        let decodes = decoding(&self.running).count();
        let mut prefill_tokens = self.limits.step_tokens - decodes;
        if decodes > 0 {
            prefill_tokens = prefill_tokens.min(self.limits.prefill_tokens);
        }
        // Each answer may need a row, and a scored prompt takes what they leave.
        let mut scored_rows = (self.limits.logit_rows + 1).saturating_sub(self.running.len()).max(1);
        for sequence in &mut self.running {
            let count = match sequence.pending() {
                0 => continue,
                1 if !sequence.is_scored() => {
                    decode_blocks = decode_blocks.saturating_sub(kv.needed_blocks(&sequence.kv, 1));
                    // A guess takes no block that another answer needs.
                    let free = kv.free_blocks().saturating_sub(decode_blocks);
                    (1 + sequence.drafted()).min(kv.room(&sequence.kv, free)).max(1)
                }
                pending => {
                    let free = kv.free_blocks().saturating_sub(decode_blocks);
                    let mut count = pending.min(prefill_tokens).min(kv.room(&sequence.kv, free));
                    if sequence.is_scored() {
                        count = count.min(scored_rows);
                        scored_rows -= count;
                    }
                    prefill_tokens -= count;
                    count
                }
            };
            if count > 0 {
                parts.push(sequence.take_part(count, kv, batch)?);
            }
        }
        Ok(())
    }

    /// The last in line of those that run gives its blocks back.
    fn preempt_last(&mut self, kv: &mut KvPool) {
        if let Some(mut sequence) = self.running.pop() {
            sequence.leave(kv);
            sequence.set_lookup(Lookup::NotYet);
            self.add(sequence);
            self.preemptions += 1;
        }
    }

    /// The running answers that have a part in a step, with their parts: both are in the order of their ranks.
    pub(crate) fn members<'a>(&'a mut self, parts: &'a [Part]) -> impl Iterator<Item = (&'a mut Sequence, &'a Part)> {
        let mut parts = parts.iter();
        self.running.iter_mut().filter_map(move |sequence| {
            let part = part_of(&mut parts, sequence.rank)?;
            Some((sequence, part))
        })
    }

    /// Forgets the steps under way, one of which failed: as if they had not been scheduled.
    pub(crate) fn roll_back(&mut self, kv: &mut KvPool) {
        self.running.iter_mut().for_each(|sequence| sequence.roll_back(kv));
    }

    /// Ends a step: `is_finished` is asked once for every running answer that has a part in it, and those that are leave.
    pub(crate) fn end_step(
        &mut self,
        kv: &mut KvPool,
        parts: &[Part],
        mut is_finished: impl FnMut(&mut Sequence, &Part, &mut KvPool) -> bool,
    ) {
        let mut parts = parts.iter();
        self.running.retain_mut(|sequence| {
            let is_finished = part_of(&mut parts, sequence.rank).is_some_and(|part| is_finished(sequence, part, kv));
            if is_finished {
                sequence.leave(kv);
            }
            !is_finished
        });
    }

    /// What was looked up for these answers has come, or will not.
    pub(crate) fn end_lookups(&mut self, is_over: impl Fn(Rank) -> bool) {
        let waiting = self.waiting.iter_mut().filter(|s| s.lookup() == Lookup::Waiting && is_over(s.rank));
        waiting.for_each(|s| s.set_lookup(Lookup::Done));
    }

    /// Drops the answers of which `is_dropped` is true, waiting or running, and frees their blocks; tells how many there were.
    pub(crate) fn remove(&mut self, kv: &mut KvPool, mut is_dropped: impl FnMut(AnswerId) -> bool) -> usize {
        let before = self.running.len() + self.waiting.len();
        let mut keep = |sequence: &mut Sequence| {
            let is_dropped = is_dropped(sequence.rank.answer());
            if is_dropped {
                sequence.leave(kv);
            }
            !is_dropped
        };
        self.running.retain_mut(&mut keep);
        self.waiting.retain_mut(&mut keep);
        before - self.running.len() - self.waiting.len()
    }
}

/// Answers that bring one token.
fn decoding(running: &[Sequence]) -> impl Iterator<Item = &Sequence> {
    running.iter().filter(|sequence| sequence.pending() == 1 && !sequence.is_scored())
}

/// The part of an answer among those that are left; parts and those who ask come in the order of their ranks.
fn part_of<'a>(parts: &mut std::slice::Iter<'a, Part>, rank: Rank) -> Option<&'a Part> {
    while let Some(part) = parts.as_slice().first().filter(|part| part.rank <= rank) {
        parts.next();
        if part.rank == rank {
            return Some(part);
        }
    }
    None
}
