//! One request on its way: its tokens, their place in the KV cache, and what is still to come.

use marlin_checkpoint::Tokenizer;
use marlin_kernels::{SampleRow, Step};
use marlin_model::{KvPool, KvSequence, LogitRows, ModelError, StepBatch};

use crate::engine::{Event, Finish, Request, RequestId};
use crate::sampling::Sampler;
use crate::{EngineError, FinishReason, StopConditions, TextStream};

/// A request's state from admission to its last token.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) kv: KvSequence,
    /// KV blocks it may come to need, set aside when it is admitted.
    pub(crate) kv_blocks: usize,
    pub(crate) sampler: Sampler,
    /// The prompt, then what was generated.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// `tokens` never grows beyond this: prompt and max_tokens, or the context.
    most_tokens: usize,
    /// Tokens that finished steps have put into the KV cache; `kv` is longer while steps are under way.
    computed: usize,
    /// Tokens that were chosen after `tokens`, but not read yet: one more than those that steps under way have taken up.
    unread: usize,
    /// Row of the last of them in the last sampling.
    unread_row: u32,
    stop: StopConditions,
    text: TextStream,
}

impl Sequence {
    pub(crate) fn new(
        id: RequestId,
        request: Request,
        kv: KvSequence,
        room: Room,
        tokenizer: &Tokenizer,
    ) -> Result<Self, EngineError> {
        let Request { prompt, sampling, mut stop } = request;
        Ok(Self {
            id,
            kv,
            kv_blocks: room.kv_blocks,
            sampler: Sampler::new(sampling, &prompt)?,
            prompt_tokens: prompt.len(),
            most_tokens: room.tokens,
            computed: 0,
            unread: 0,
            unread_row: 0,
            text: TextStream::new(tokenizer, &prompt, std::mem::take(&mut stop.strings))?,
            stop,
            tokens: prompt,
        })
    }

    /// How many tokens no step has taken up yet: what is left of the prompt, or the last token, which need not be read for that.
    pub(crate) fn pending(&self) -> usize {
        let is_last = self.chosen() == self.stop.max_tokens || self.tokens.len() + self.unread == self.most_tokens;
        if self.unread > 0 && is_last {
            return 0;
        }
        self.tokens.len() + self.unread - self.kv.len()
    }

    /// Adds the next `count` of its pending tokens to a step. Gives the row of the step's logits that its next token comes from, if the
    /// step completes it.
    pub(crate) fn take_part(
        &mut self,
        count: usize,
        kv: &mut KvPool,
        batch: &mut StepBatch,
    ) -> Result<Option<u32>, ModelError> {
        let start = self.kv.len();
        kv.append(&mut self.kv, count)?;
        let is_complete = self.kv.len() == self.tokens.len() + self.unread;
        let logits = if is_complete { LogitRows::Last } else { LogitRows::None };
        let unread = [Step::SAMPLED + self.unread_row];
        let tokens = self.tokens.get(start..start + count).unwrap_or(&unread);
        let rows = batch.push(&self.kv, tokens, logits);
        Ok(is_complete.then_some(rows.start as u32))
    }

    /// How its next token is chosen. It is row `row` of the sampling that is about to start.
    pub(crate) fn choose(&mut self, row: u32) -> SampleRow<'_> {
        let last_sampled = (self.unread > 0).then_some(self.unread_row);
        let index = self.chosen();
        (self.unread, self.unread_row) = (self.unread + 1, row);
        self.sampler.row(index, last_sampled)
    }

    /// The oldest step under way, which had brought it to `computed` tokens, has succeeded.
    pub(crate) fn commit(&mut self, computed: usize) {
        self.computed = computed;
    }

    /// Forgets the steps under way.
    pub(crate) fn roll_back(&mut self, kv: &mut KvPool) {
        kv.truncate(&mut self.kv, self.computed);
        self.unread = 0;
    }

    /// Tokens generated and read so far.
    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Tokens generated so far, read or not.
    fn chosen(&self) -> usize {
        self.generated() + self.unread
    }

    /// Takes what was sampled for it in the oldest step under way: its next token, or that there is none.
    pub(crate) fn accept(
        &mut self,
        sampled: u32,
        eos_tokens: &[u32],
        tokenizer: &Tokenizer,
    ) -> Result<Event, EngineError> {
        self.unread -= 1;
        let token = Some(sampled).filter(|&token| token != SampleRow::NOT_FINITE);
        let mut text = String::new();
        let reason = if let Some(token) = token {
            self.tokens.push(token);
            self.sampler.accept(token);
            self.finish_reason(token, eos_tokens, tokenizer, &mut text)?
        } else {
            self.text.finish(tokenizer, &mut text)?;
            Some(FinishReason::NotFinite)
        };
        let finish = reason.map(|reason| Finish {
            reason,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated(),
        });
        Ok(Event { request: self.id, token, text, finish })
    }

    /// Appends the token's text and tells whether it was the last one.
    fn finish_reason(
        &mut self,
        token: u32,
        eos_tokens: &[u32],
        tokenizer: &Tokenizer,
        text: &mut String,
    ) -> Result<Option<FinishReason>, EngineError> {
        let is_eos = !self.stop.ignore_eos && eos_tokens.contains(&token);
        let reason = if is_eos || self.stop.tokens.contains(&token) {
            FinishReason::StopToken(token)
        } else if let Some(stop) = self.text.push(tokenizer, token, text)? {
            return Ok(Some(FinishReason::StopString(stop.to_owned())));
        } else if self.generated() == self.stop.max_tokens {
            FinishReason::Length
        } else if self.tokens.len() == self.most_tokens {
            FinishReason::Context
        } else {
            return Ok(None);
        };
        let stopped = self.text.finish(tokenizer, text)?.map(|stop| FinishReason::StopString(stop.to_owned()));
        Ok(Some(stopped.unwrap_or(reason)))
    }
}

/// The room a request takes at worst.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Tokens, prompt included.
    pub(crate) tokens: usize,
    /// KV blocks for them.
    pub(crate) kv_blocks: usize,
}

impl Room {
    pub(crate) fn new(prompt: usize, max_tokens: usize, context: usize, block_tokens: usize) -> Self {
        let tokens = prompt.saturating_add(max_tokens).min(context);
        // The last token is never fed back.
        Self { tokens, kv_blocks: (tokens - 1).div_ceil(block_tokens) }
    }
}
