//! The engine: requests in, events out, one step at a time.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use marlin_checkpoint::Tokenizer;
use marlin_kernels::{SampleRow, SamplingId};
use marlin_model::{LanguageModel, ModelInfo, PredictionLayer, StepBatch};

use crate::persistence::Persistence;
use crate::prefix::BlockNames;
use crate::scheduler::{Limits, Scheduled, Scheduler};
use crate::sequence::{Computed, Part, Room, Sequence};
use crate::speculation::{DraftedStep, Drafter, Pace};
use crate::{BlockStore, EngineError, Event, Request, RequestId, StoreStats};

/// Tokens of prompts beside answers that are being generated, on a device that works by itself and on the host's processor: a small part of
/// what the device computes in a second.
const PREFILL_TOKENS: [usize; 2] = [256, 32];

/// How an engine serves requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOptions {
    /// Keep what the KV cache holds for prompts that begin alike.
    pub prefix_cache: bool,
    /// Most answers that are computed at a time; `None` for as many as a step of the model has room for.
    pub max_running: Option<usize>,
    /// Most tokens of prompts in a step beside answers that are being generated; `None` suits the device.
    pub prefill_tokens: Option<usize>,
    /// Guess even where it does not pay, to measure what that costs.
    pub always_draft: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { prefix_cache: true, max_running: None, prefill_tokens: None, always_draft: false }
    }
}

/// What an engine does at the moment, and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Answers that wait for their turn.
    pub waiting: usize,
    /// Answers that are computed.
    pub running: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// Those that belong to an answer.
    pub used_kv_blocks: usize,
    /// Those that belong to none, and hold what another may begin with.
    pub cached_kv_blocks: usize,
    /// Tokens that were looked for in the prefix cache since the engine was made.
    pub prefix_queries: u64,
    /// Those that were found.
    pub prefix_hits: u64,
    /// Tokens that were read from disk.
    pub stored_hits: u64,
    /// The blocks on disk, if there are any.
    pub store: StoreStats,
    /// Tokens of prompts that were computed.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Tokens guessed.
    pub drafted_tokens: u64,
    /// Those that were right.
    pub accepted_tokens: u64,
    /// How often an answer gave its blocks back to others.
    pub preemptions: u64,
    /// Steps.
    pub steps: u64,
}

/// Runs many requests on one model.
///
/// Each [`Engine::step`] starts one call of the model in which all running requests take part. What a request generates
/// does not depend on what else runs.
pub struct Engine {
    model: Box<dyn LanguageModel>,
    tokenizer: Arc<Tokenizer>,
    eos_tokens: Vec<u32>,
    scheduler: Scheduler,
    /// Tells models apart in the names of KV blocks.
    fingerprint: String,
    /// Keeps blocks on disk.
    persistence: Option<Persistence>,
    drafter: Option<Box<dyn Drafter>>,
    pace: Pace,
    /// When the last step was finished, or work began.
    last_finished: Instant,
    stats: EngineStats,
    next_id: u64,
    /// Steps under way, the oldest first.
    started: VecDeque<Started>,
    // Kept from step to step for their memory.
    batch: StepBatch,
    rows: Vec<SampleRow<'static>>,
    sampled: Vec<u32>,
    spare: Vec<Started>,
}

/// A step that was started and whose tokens were not read yet.
#[derive(Debug, Default)]
struct Started {
    /// Its tokens.
    tokens: usize,
    /// `None` if no answer gets a token.
    sampling: Option<SamplingId>,
    /// Rows of logits.
    rows: usize,
    /// It was started when everything before it was finished, so that the device had nothing to do in the meantime.
    has_waited: bool,
    parts: Vec<Part>,
    /// If one of the parts wants them.
    logits: Vec<f32>,
    /// If one of the parts or the drafter wants them.
    hidden: Vec<f32>,
}

impl Engine {
    /// An engine that owns `model` and all its KV blocks; requests end at any of `eos_tokens` unless they ask not to.
    pub fn new(model: Box<dyn LanguageModel>, tokenizer: Arc<Tokenizer>, eos_tokens: Vec<u32>) -> Self {
        Self::with_options(model, tokenizer, eos_tokens, &EngineOptions::default())
    }

    /// The same, with options.
    pub fn with_options(
        mut model: Box<dyn LanguageModel>,
        tokenizer: Arc<Tokenizer>,
        mut eos_tokens: Vec<u32>,
        options: &EngineOptions,
    ) -> Self {
        let kv_blocks = model.kv().free_blocks();
        let info = model.info();
        // Tokens that the model does not have are never chosen.
        eos_tokens.retain(|&token| (token as usize) < info.vocabulary);
        let scheduler = Scheduler::new(Limits {
            step_tokens: info.step_tokens,
            prefill_tokens: options.prefill_tokens.unwrap_or(PREFILL_TOKENS[usize::from(!info.overlaps)]).max(1),
            logit_rows: info.logit_rows,
            max_running: options.max_running.unwrap_or(usize::MAX).clamp(1, info.step_tokens.min(info.logit_rows)),
            prefix_cache: options.prefix_cache,
            always_draft: options.always_draft,
        });
        let fingerprint = format!("{} {} {:?}", info.architecture, info.weight_bytes, info.kv_type);
        Self {
            model,
            tokenizer,
            eos_tokens,
            scheduler,
            fingerprint,
            persistence: None,
            drafter: None,
            pace: Pace::default(),
            last_finished: Instant::now(),
            stats: EngineStats { kv_blocks, ..EngineStats::default() },
            next_id: 0,
            started: VecDeque::new(),
            batch: StepBatch::default(),
            rows: Vec::new(),
            sampled: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// The same, with a drafter that guesses tokens, which the model then looks at several of at a time where that pays. What answers say
    /// does not depend on it, on devices and with options by which they do not depend on each other.
    #[must_use]
    pub fn with_drafter(mut self, drafter: Box<dyn Drafter>) -> Self {
        self.pace = Pace::of(drafter.as_ref());
        self.drafter = Some(drafter);
        self
    }

    /// The same, with blocks of the KV cache kept on disk, where another engine of the same model finds them later. What answers say does not
    /// depend on it any more than on the prefix cache.
    ///
    /// # Errors
    /// Not one block fits there, or the device does not let its blocks be read.
    pub fn with_block_store(mut self, store: BlockStore) -> Result<Self, EngineError> {
        let info = self.model.info();
        self.fingerprint = format!("{} {:?} {}", self.fingerprint, info.kv_layout, store.fingerprint());
        self.persistence = Some(Persistence::new(store, self.model.as_mut())?);
        Ok(self)
    }

    /// The model's layer that predicts further tokens, if it was loaded with it: what a [`crate::MtpDrafter`] guesses by.
    pub fn take_prediction_layer(&mut self) -> Option<Box<dyn PredictionLayer>> {
        self.model.take_prediction_layer()
    }

    /// The model's sizes and names.
    pub fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Most answers that are computed at a time.
    pub fn max_running(&self) -> usize {
        self.scheduler.max_running()
    }

    /// KV blocks that belong to an answer.
    pub fn used_kv_blocks(&mut self) -> usize {
        self.stats.kv_blocks - self.model.kv().free_blocks()
    }

    /// What it does at the moment, and has done.
    pub fn stats(&mut self) -> EngineStats {
        EngineStats {
            waiting: self.scheduler.waiting(),
            running: self.scheduler.running(),
            used_kv_blocks: self.used_kv_blocks(),
            cached_kv_blocks: self.model.kv().cached_blocks(),
            preemptions: self.scheduler.preemptions(),
            stored_hits: self.persistence.as_ref().map_or(0, Persistence::hits),
            store: self.persistence.as_ref().map(Persistence::stats).unwrap_or_default(),
            ..self.stats
        }
    }

    /// Whether there is nothing to do: no request, and nothing to save on disk.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.persistence.as_ref().is_none_or(Persistence::is_idle)
    }

    /// Queues a request. One that could never run is refused.
    pub fn add(&mut self, request: Request) -> Result<RequestId, EngineError> {
        let room = self.check(&request)?;
        if self.scheduler.is_idle() {
            self.last_finished = Instant::now();
        }
        let id = RequestId(self.next_id);
        let kv = self.model.kv().sequence();
        let names = BlockNames::new(&self.fingerprint, &request.cache_salt, self.model.kv().block_tokens());
        let sequence = Sequence::new(id, request, kv, room, names, &self.eos_tokens, &self.tokenizer)?;
        self.scheduler.add(sequence);
        self.next_id += 1;
        Ok(id)
    }

    /// Ends a request at once and frees its memory; there are no further events of it. Tells whether there was such a
    /// request.
    pub fn cancel(&mut self, request: RequestId) -> bool {
        let drafter = &mut self.drafter;
        self.persistence.iter_mut().for_each(|kept| kept.cancel(|rank| rank.request == request));
        self.scheduler.remove(self.model.kv(), |answer| {
            let is_it = answer.request == request;
            if let Some(drafter) = drafter.as_mut().filter(|_| is_it) {
                drafter.forget(answer);
            }
            is_it
        }) > 0
    }

    /// Ends all requests.
    pub fn cancel_all(&mut self) {
        let drafter = &mut self.drafter;
        self.persistence.iter_mut().for_each(|kept| kept.cancel(|_| true));
        self.scheduler.remove(self.model.kv(), |answer| {
            if let Some(drafter) = drafter {
                drafter.forget(answer);
            }
            true
        });
        self.started.clear();
    }

    /// Starts the next step, and appends an event for each token of the last one that has come to an end.
    ///
    /// On a device that works by itself, that is the step before: while its tokens are read, the device is at the next. A request that
    /// turns out to have ended takes part in that step in vain.
    ///
    /// If the model fails, the steps under way are forgotten, and no request has advanced. If it gives one request logits that are
    /// not finite, or its tokens cannot be decoded, that request ends with an event that says so, and the others go on.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        let result = self.exchange_blocks().and_then(|()| {
            self.admit();
            self.advance(events)
        });
        if result.is_err() {
            self.started.clear();
            self.scheduler.roll_back(self.model.kv());
        }
        if self.scheduler.is_idle() {
            self.started.clear();
        }
        result
    }

    /// Takes blocks that came from disk, and hands over those that go there.
    fn exchange_blocks(&mut self) -> Result<(), EngineError> {
        let Some(kept) = &mut self.persistence else { return Ok(()) };
        let is_busy = self.scheduler.running() > 0 || !self.started.is_empty();
        kept.restore(self.model.as_mut(), is_busy, &mut self.scheduler)?;
        kept.save(self.model.as_mut(), is_busy)?;
        if !is_busy {
            // To wait for the disk is no part of the next step.
            self.last_finished = Instant::now();
        }
        Ok(())
    }

    fn admit(&mut self) {
        let kept = &mut self.persistence;
        let (looked_for, found) = self
            .scheduler
            .admit(self.model.kv(), |sequence, kv| kept.as_mut().is_some_and(|kept| kept.look_up(sequence, kv)));
        self.stats.prefix_queries += looked_for as u64;
        self.stats.prefix_hits += found as u64;
    }

    fn advance(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        let has_started = self.start_step()?;
        // An answer with a form waits for its last token; nobody else overtakes it.
        let may_overlap = self.model.info().overlaps
            && !self.scheduler.has_constrained()
            && !(self.drafter.is_some() && self.scheduler.wants_to_draft(&self.pace));
        let under_way = usize::from(has_started && may_overlap);
        while self.started.len() > under_way {
            self.finish_step(events)?;
        }
        Ok(())
    }

    /// Schedules a step and starts it: the model, and the choice of a token for each answer that is complete. Tells whether it has: it has not
    /// if there is nothing to do, or if a step under way must be finished first.
    fn start_step(&mut self) -> Result<bool, EngineError> {
        let mut step = self.spare.pop().unwrap_or_default();
        if let Some(drafter) = &mut self.drafter
            && self.started.is_empty()
        {
            self.scheduler.draft(drafter.as_mut(), &mut self.pace)?;
        }
        let may_preempt = self.started.is_empty();
        let scheduled = self.scheduler.schedule(self.model.kv(), &mut self.batch, &mut step.parts, may_preempt)?;
        if scheduled == Scheduled::BlocksShort || step.parts.is_empty() {
            self.spare.push(step);
            return Ok(false);
        }
        self.model.forward(&self.batch)?;
        self.stats.steps += 1;

        step.rows = self.batch.logit_rows();
        step.tokens = self.batch.tokens();
        step.has_waited = self.started.is_empty();
        step.sampling = None;
        step.logits.clear();
        if self.scheduler.members(&step.parts).any(|(sequence, part)| sequence.wants_logits(part)) {
            self.model.read_logits(&mut step.logits)?;
        }
        step.hidden.clear();
        if self.scheduler.members(&step.parts).any(|(sequence, part)| sequence.wants_hidden(part)) {
            self.model.read_hidden(&mut step.hidden)?;
        }
        if step.parts.iter().any(|part| part.is_sampled) {
            for (sequence, _) in self.scheduler.members(&step.parts).filter(|(_, part)| part.is_sampled) {
                sequence.compute_constraint();
            }
            let mut rows = recycle(std::mem::take(&mut self.rows));
            for (sequence, part) in self.scheduler.members(&step.parts) {
                // Rows of a prompt that is scored are not looked at.
                let chosen = if part.is_sampled { 1 + part.drafted } else { 0 };
                rows.extend(std::iter::repeat_n(SampleRow::GREEDY, part.rows.len() - chosen));
                if part.is_sampled {
                    rows.extend(sequence.choose(part));
                }
            }
            let sampling = self.model.sample(&rows);
            self.rows = recycle(rows);
            step.sampling = Some(sampling?);
        }
        self.started.push_back(step);
        Ok(true)
    }

    /// Waits for the oldest step under way, and hands out its tokens.
    fn finish_step(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        let Some(mut step) = self.started.pop_front() else { return Ok(()) };
        self.sampled.clear();
        self.sampled.resize(step.rows, SampleRow::NOT_FINITE);
        if let Some(sampling) = step.sampling {
            self.model.sampled(sampling, &mut self.sampled)?;
        }
        // Where the next step has started, they are its own.
        if step.hidden.is_empty()
            && self.started.is_empty()
            && self.drafter.as_ref().is_some_and(|drafter| drafter.wants_hidden())
        {
            self.model.read_hidden(&mut step.hidden)?;
        }
        self.deliver(step, events);
        Ok(())
    }

    /// Hands every answer what the step computed for it; finished answers leave.
    fn deliver(&mut self, step: Started, events: &mut Vec<Event>) {
        let ModelInfo { vocabulary, hidden_size, .. } = *self.model.info();
        let Started { logits, hidden, .. } = &step;
        let computed = Computed { logits, vocabulary, hidden, hidden_size, sampled: &self.sampled };
        let (tokenizer, stats, drafter) = (&self.tokenizer, &mut self.stats, &mut self.drafter);
        let kept = &mut self.persistence;
        let before = events.len();
        self.scheduler.end_step(self.model.kv(), &step.parts, |sequence, part, kv| {
            stats.prompt_tokens += sequence.prompt_tokens_of(part) as u64;
            // If one fails, the others go on.
            let is_finished = sequence.finish_part(part, &computed, kv, tokenizer, events).unwrap_or_else(|error| {
                events.push(sequence.fail(&error));
                true
            });
            stats.drafted_tokens += part.drafted as u64;
            stats.accepted_tokens += sequence.accepted() as u64;
            // What came of a failure is not to come back at every start.
            let finish = events.last().and_then(|event| event.finish.as_ref()).filter(|_| is_finished);
            let has_failed = finish.is_some_and(|finish| finish.reason.error().is_some());
            if let Some(kept) = kept.as_mut().filter(|_| !has_failed) {
                kept.offer(sequence.blocks_to_offer(is_finished));
            }
            match drafter {
                Some(drafter) if is_finished => drafter.forget(sequence.rank.answer()),
                Some(drafter) if drafter.wants_hidden() && !hidden.is_empty() => {
                    sequence.show(drafter.as_mut(), part, hidden, hidden_size);
                }
                _ => {}
            }
            is_finished
        });
        self.stats.generated_tokens += events[before..].iter().filter(|event| event.token.is_some()).count() as u64;
        self.settle(&step);
        self.spare.push(step);
    }

    /// Learns how long a step took in which every answer brought one token, and what guesses have gained.
    fn settle(&mut self, step: &Started) {
        // What the host does between steps counts: a device that is ahead computes in the meantime.
        let seconds = self.last_finished.elapsed().as_secs_f64();
        self.last_finished = Instant::now();
        let drafted: usize = step.parts.iter().map(|part| part.drafted).sum();
        let tokens = step.tokens - drafted;
        if let Some(kept) = self.persistence.as_mut().filter(|_| tokens != step.parts.len()) {
            kept.note_computed(tokens, seconds);
        }
        if self.drafter.is_none() {
            return;
        }
        if tokens != step.parts.len() || step.rows != step.tokens {
            // Beside a chunk of a prompt, what answers add is little.
            return self.pace.record_prompt(step.tokens, seconds);
        }
        self.pace.record(step.tokens, seconds, step.has_waited);
        let drafted = DraftedStep { tokens, drafted, has_waited: step.has_waited };
        for (sequence, part) in self.scheduler.members(&step.parts) {
            sequence.settle(&mut self.pace, drafted, part);
        }
    }

    /// Checks a request and says how much room each of its answers may need.
    fn check(&self, request: &Request) -> Result<Room, EngineError> {
        let info = self.model.info();
        let (block_tokens, blocks) = (info.kv_layout.block_tokens, self.stats.kv_blocks);
        request.check(info.vocabulary, info.context)?;
        let (prompt, max_tokens) = (request.prompt.len(), request.stop.max_tokens);
        // Who names no number is content with what there is room for.
        let context = if max_tokens == usize::MAX { info.context.min(blocks * block_tokens + 1) } else { info.context };
        if prompt >= context && max_tokens > 0 {
            return Err(EngineError::PromptTooLong { prompt, context });
        }
        let room = Room::new(prompt, max_tokens, context, block_tokens);
        if room.kv_blocks > blocks {
            return Err(EngineError::CacheTooSmall {
                prompt,
                max_tokens,
                needed: room.kv_blocks,
                block_tokens,
                blocks,
            });
        }
        Ok(room)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("model", self.info()).field("scheduler", &self.scheduler).finish_non_exhaustive()
    }
}

/// The empty vector's memory for rows of another lifetime: collecting a mapped vector in place keeps its allocation.
fn recycle<'b>(mut rows: Vec<SampleRow<'_>>) -> Vec<SampleRow<'b>> {
    rows.clear();
    rows.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}
