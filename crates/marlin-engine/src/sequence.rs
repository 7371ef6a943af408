//! One request on its way: its tokens, their place in the KV cache, and what is still to come.

use marlin_checkpoint::Tokenizer;
use marlin_kernels::SampleRow;
use marlin_model::KvSequence;

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
    /// Tokens that steps have put into the KV cache; `kv` is longer only during a step.
    computed: usize,
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
            text: TextStream::new(tokenizer, &prompt, std::mem::take(&mut stop.strings))?,
            stop,
            tokens: prompt,
        })
    }

    /// Tokens whose keys and values are still to be computed: what is left of the prompt, or the last token generated.
    pub(crate) fn pending(&self) -> &[u32] {
        &self.tokens[self.computed..]
    }

    /// Whether the step under way brings the whole sequence, so that its next token can be chosen.
    pub(crate) fn is_complete(&self) -> bool {
        self.kv.len() == self.tokens.len()
    }

    /// Tokens that steps have put into the KV cache.
    pub(crate) fn computed(&self) -> usize {
        self.computed
    }

    /// The step under way has succeeded.
    pub(crate) fn commit(&mut self) {
        self.computed = self.kv.len();
    }

    /// Tokens generated so far.
    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Takes what was sampled for it: its next token, or that there is none.
    pub(crate) fn accept(
        &mut self,
        sampled: u32,
        eos_tokens: &[u32],
        tokenizer: &Tokenizer,
    ) -> Result<Event, EngineError> {
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
