//! The engine: requests in, events out, one step at a time.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use marlin_checkpoint::Tokenizer;
use marlin_kernels::{SampleRow, SamplingId};
use marlin_model::{LanguageModel, ModelInfo, StepBatch};

use crate::scheduler::{Part, Scheduler};
use crate::sequence::{Room, Sequence};
use crate::{EngineError, FinishReason, SamplingParams, StopConditions};

/// A text to continue.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Tokens of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopConditions,
}

impl Request {
    /// Checks the request against a model of so many tokens of vocabulary and of context, which need not be loaded yet.
    ///
    /// # Errors
    /// A parameter is out of range, the prompt is empty or too long, or a token id is unknown to the model.
    pub fn check(&self, vocabulary: usize, context: usize) -> Result<(), EngineError> {
        self.sampling.validate()?;
        self.stop.validate()?;
        let prompt = self.prompt.len();
        if prompt == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        let biased = self.sampling.logit_bias.iter().map(|&(token, _)| ("logit_bias", token));
        let mut tokens = self.prompt.iter().map(|&token| ("prompt", token)).chain(biased);
        if let Some((place, token)) = tokens.find(|&(_, token)| token as usize >= vocabulary) {
            return Err(EngineError::Token { place, token, vocabulary });
        }
        if prompt >= context {
            return Err(EngineError::PromptTooLong { prompt, context });
        }
        Ok(())
    }
}

/// Names a request of one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A request got a token, or failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The request.
    pub request: RequestId,
    /// Its token; `None` if it failed, see [`FinishReason::error`].
    pub token: Option<u32>,
    /// The text that is certain by now; empty while a character or a stop string may be incomplete.
    pub text: String,
    /// Set on the last event of a request.
    pub finish: Option<Finish>,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, a stop token included.
    pub generated_tokens: usize,
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
    kv_blocks: usize,
    next_id: u64,
    /// Steps under way, the oldest first.
    started: VecDeque<Started>,
    // Kept from step to step for their memory.
    batch: StepBatch,
    rows: Vec<SampleRow<'static>>,
    sampled: Vec<u32>,
    spare_parts: Vec<Part>,
}

/// A step that was started and whose tokens were not read yet.
struct Started {
    /// `None` if no sequence gets a token.
    sampling: Option<SamplingId>,
    parts: Vec<Part>,
}

impl Engine {
    /// An engine that owns `model` and all its KV blocks; requests end at any of `eos_tokens` unless they ask not to.
    pub fn new(mut model: Box<dyn LanguageModel>, tokenizer: Arc<Tokenizer>, eos_tokens: Vec<u32>) -> Self {
        let kv_blocks = model.kv().free_blocks();
        let scheduler = Scheduler::new(model.info().step_tokens, model.info().logit_rows, kv_blocks);
        Self {
            model,
            tokenizer,
            eos_tokens,
            scheduler,
            kv_blocks,
            next_id: 0,
            started: VecDeque::new(),
            batch: StepBatch::default(),
            rows: Vec::new(),
            sampled: Vec::new(),
            spare_parts: Vec::new(),
        }
    }

    /// The model's sizes and names.
    pub fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// KV blocks in use.
    pub fn used_kv_blocks(&mut self) -> usize {
        self.kv_blocks - self.model.kv().free_blocks()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Queues a request. One that could never run is refused.
    pub fn add(&mut self, request: Request) -> Result<RequestId, EngineError> {
        let room = self.check(&request)?;
        let id = RequestId(self.next_id);
        let kv = self.model.kv().sequence();
        let sequence = Sequence::new(id, request, kv, room, &self.tokenizer)?;
        self.scheduler.add(sequence);
        self.next_id += 1;
        Ok(id)
    }

    /// Ends a request at once and frees its memory; there are no further events of it. Tells whether there was such a
    /// request.
    pub fn cancel(&mut self, request: RequestId) -> bool {
        self.scheduler.remove(request, self.model.kv())
    }

    /// Starts the next step, and appends an event for each token of the last one that has come to an end.
    ///
    /// On a device that works by itself, that is the step before: while its tokens are read, the device is at the next. A request that
    /// turns out to have ended takes part in that step in vain.
    ///
    /// If the model fails, the steps under way are forgotten, and no request has advanced. If it gives one request logits that are
    /// not finite, that request ends with an event that says so, and the others go on.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        self.scheduler.admit();
        let result = self.advance(events);
        if self.scheduler.is_idle() {
            self.started.clear();
        }
        result
    }

    fn advance(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        let tokens = self.start_step().and_then(|has_started| {
            let under_way = usize::from(has_started && self.model.info().overlaps);
            if self.started.len() > under_way { self.finish_step().map(Some) } else { Ok(None) }
        });
        match tokens {
            Ok(Some(parts)) => self.deliver(parts, events),
            Ok(None) => Ok(()),
            Err(error) => {
                self.started.clear();
                self.scheduler.roll_back(self.model.kv());
                Err(error)
            }
        }
    }

    /// Schedules a step and starts it: the model, and the choice of a token for each sequence that is complete. Tells whether there was
    /// anything to do.
    fn start_step(&mut self) -> Result<bool, EngineError> {
        let mut parts = std::mem::take(&mut self.spare_parts);
        self.scheduler.schedule(self.model.kv(), &mut self.batch, &mut parts)?;
        if parts.is_empty() {
            self.spare_parts = parts;
            return Ok(false);
        }
        self.model.forward(&self.batch)?;

        let mut rows = recycle(std::mem::take(&mut self.rows));
        let members = self.scheduler.members(&parts);
        rows.extend(members.filter_map(|(sequence, part)| Some(sequence.choose(part.row?))));
        let sampling = if rows.is_empty() { None } else { Some(self.model.sample(&rows)) };
        self.rows = recycle(rows);
        self.started.push_back(Started { sampling: sampling.transpose()?, parts });
        Ok(true)
    }

    /// Waits for the oldest step under way and reads its tokens.
    fn finish_step(&mut self) -> Result<Vec<Part>, EngineError> {
        let Some(Started { sampling, parts }) = self.started.pop_front() else { return Ok(Vec::new()) };
        self.sampled.clear();
        self.sampled.resize(parts.iter().filter(|part| part.row.is_some()).count(), SampleRow::NOT_FINITE);
        if let Some(sampling) = sampling {
            self.model.sampled(sampling, &mut self.sampled)?;
        }
        Ok(parts)
    }

    /// Hands every token that was read to its sequence; finished sequences leave.
    fn deliver(&mut self, parts: Vec<Part>, events: &mut Vec<Event>) -> Result<(), EngineError> {
        let mut failure = None;
        self.scheduler.end_step(self.model.kv(), &parts, |sequence, part| {
            sequence.commit(part.computed);
            let Some(row) = part.row else { return false };
            match sequence.accept(self.sampled[row as usize], &self.eos_tokens, &self.tokenizer) {
                Ok(event) => {
                    let is_finished = event.finish.is_some();
                    events.push(event);
                    is_finished
                }
                // Its text is lost, but the others go on.
                Err(error) => {
                    failure = Some(error);
                    true
                }
            }
        });
        self.spare_parts = parts;
        failure.map_or(Ok(()), Err)
    }

    /// Checks a request and says how much room it may need.
    fn check(&self, request: &Request) -> Result<Room, EngineError> {
        let info = self.model.info();
        request.check(info.vocabulary, info.context)?;
        let (prompt, max_tokens) = (request.prompt.len(), request.stop.max_tokens);
        let block_tokens = info.kv_layout.block_tokens;
        let room = Room::new(prompt, max_tokens, info.context, block_tokens);
        if room.kv_blocks > self.kv_blocks {
            let (needed, blocks) = (room.kv_blocks, self.kv_blocks);
            return Err(EngineError::CacheTooSmall { prompt, max_tokens, needed, block_tokens, blocks });
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
