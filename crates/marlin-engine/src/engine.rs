//! The engine: requests in, events out, one step at a time.

use std::fmt;
use std::sync::Arc;

use marlin_checkpoint::Tokenizer;
use marlin_kernels::SampleRow;
use marlin_model::{LanguageModel, ModelInfo, StepBatch};

use crate::scheduler::Scheduler;
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
/// Each [`Engine::step`] is one call of the model in which all running requests take part. What a request generates
/// does not depend on what else runs.
pub struct Engine {
    model: Box<dyn LanguageModel>,
    tokenizer: Arc<Tokenizer>,
    eos_tokens: Vec<u32>,
    scheduler: Scheduler,
    kv_blocks: usize,
    next_id: u64,
    // Kept from step to step for their memory.
    batch: StepBatch,
    rows: Vec<SampleRow<'static>>,
    sampled: Vec<u32>,
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
            batch: StepBatch::default(),
            rows: Vec::new(),
            sampled: Vec::new(),
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

    /// Runs one step and appends an event for each token that came of it.
    ///
    /// If the model fails, no request has advanced. If it gives one request logits that are not finite, that request ends
    /// with an event that says so, and the others go on.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        self.scheduler.admit();
        if self.is_idle() {
            return Ok(());
        }
        if let Err(error) = self.run_model() {
            self.scheduler.roll_back(self.model.kv());
            return Err(error);
        }
        self.deliver(events)
    }

    /// Schedules a step, runs the model and samples a token for each sequence that is complete.
    fn run_model(&mut self) -> Result<(), EngineError> {
        self.scheduler.schedule(self.model.kv(), &mut self.batch)?;
        self.model.forward(&self.batch)?;

        let mut rows = recycle(std::mem::take(&mut self.rows));
        rows.extend(self.scheduler.sampling().map(|sequence| {
            let index = sequence.generated();
            sequence.sampler.row(index)
        }));
        self.sampled.clear();
        self.sampled.resize(rows.len(), 0);
        let result = if rows.is_empty() { Ok(()) } else { self.model.sample(&rows, &mut self.sampled) };
        self.rows = recycle(rows);
        Ok(result?)
    }

    /// Hands every sampled token to its sequence; finished sequences leave.
    fn deliver(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        let mut sampled = self.sampled.iter();
        let mut failure = None;
        self.scheduler.retire(self.model.kv(), |sequence| {
            let token = if sequence.is_complete() { sampled.next() } else { None };
            sequence.commit();
            let Some(&token) = token else { return false };
            match sequence.accept(token, &self.eos_tokens, &self.tokenizer) {
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
