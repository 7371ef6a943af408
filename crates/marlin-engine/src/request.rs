//! What is asked of the engine, and what it answers.

use std::fmt;

use crate::{Constraint, EngineError, FinishReason, Pooling, SamplingParams, StopConditions};

/// A text to continue.
#[derive(Debug, Clone)]
pub struct Request {
    /// Tokens of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopConditions,
    /// How many answers to give; they share the prompt.
    pub choices: u32,
    /// Tell how likely each generated token was, and so many of the most likely alternatives.
    pub logprobs: Option<usize>,
    /// The same of each token of the prompt but the first. Such a prompt is computed whole, whatever is cached.
    pub prompt_logprobs: Option<usize>,
    /// Make one vector of the prompt, which is all that is made of it: `max_tokens` is 0 then.
    pub pooling: Option<Pooling>,
    /// What each answer must look like.
    pub constraint: Option<Constraint>,
    /// Texts hold special tokens as they are spelled, instead of leaving them out. (A token that ends the request is never part of them.)
    pub special_tokens: bool,
    /// The lower, the sooner it is served; requests of one priority are served in the order in which they come.
    pub priority: i32,
    /// Cached prefixes are shared only among requests with the same salt: how long an answer takes tells what others have asked.
    pub cache_salt: String,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            sampling: SamplingParams::default(),
            stop: StopConditions::default(),
            choices: 1,
            logprobs: None,
            prompt_logprobs: None,
            pooling: None,
            constraint: None,
            special_tokens: false,
            priority: 0,
            cache_salt: String::new(),
        }
    }
}

impl Request {
    /// Checks the request against a model of so many tokens of vocabulary and of context, which need not be loaded yet.
    ///
    /// # Errors
    /// A parameter is out of range, the prompt is empty or too long, or a token id is unknown to the model.
    pub fn check(&self, vocabulary: usize, context: usize) -> Result<(), EngineError> {
        self.sampling.validate()?;
        self.stop.validate()?;
        if self.pooling.is_some() && self.stop.max_tokens > 0 {
            let wanted = "0 where a vector is made of the prompt";
            return Err(EngineError::parameter("max_tokens", wanted, self.stop.max_tokens));
        }
        if self.stop.max_tokens == 0 && self.prompt_logprobs.is_none() && self.pooling.is_none() {
            return Err(EngineError::parameter("max_tokens", "at least 1", 0));
        }
        if self.choices == 0 {
            return Err(EngineError::parameter("n", "at least 1", 0));
        }
        if self.stop.ignore_eos && self.constraint.is_some() {
            return Err(EngineError::parameter("ignore_eos", "false where the answer has a form, and so an end", true));
        }
        let prompt = self.prompt.len();
        if prompt == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        let biased = self.sampling.logit_bias.iter().map(|&(token, _)| ("logit_bias", token));
        let stopping = self.stop.tokens.iter().map(|&token| ("stop_token_ids", token));
        let mut tokens = self.prompt.iter().map(|&token| ("prompt", token)).chain(biased).chain(stopping);
        if let Some((place, token)) = tokens.find(|&(_, token)| token as usize >= vocabulary) {
            return Err(EngineError::Token { place, token, vocabulary });
        }
        // A prompt that is only scored may fill the context.
        if prompt > context || (prompt == context && self.stop.max_tokens > 0) {
            return Err(EngineError::PromptTooLong { prompt, context });
        }
        Ok(())
    }
}

/// Names a request of one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(crate) u64);

impl RequestId {
    /// The number that no other request of the engine has.
    pub fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One of a request's answers got a token, or ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The request.
    pub request: RequestId,
    /// Which of its answers, counted from 0.
    pub choice: u32,
    /// Its token; `None` if it failed, see [`FinishReason::error`], or if none was asked for.
    pub token: Option<u32>,
    /// The text that is certain by now; empty while a character or a stop string may be incomplete.
    pub text: String,
    /// How likely the token was, if the request asks.
    pub logprobs: Option<TokenLogprobs>,
    /// How likely each token of the prompt but the first was, if the request asks: with the first event of the first answer.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// The vector of the prompt, of length 1, if the request asks; of as many values as the model's hidden states.
    pub embedding: Vec<f32>,
    /// Set on the last event of an answer.
    pub finish: Option<Finish>,
}

/// How likely a token was by the model itself: before temperature, penalties, bias and all that.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens in its place and the logarithms of their probabilities, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that need not be computed, because the KV cache held them already.
    pub cached_tokens: usize,
    /// Tokens generated, a stop token included.
    pub generated_tokens: usize,
}
