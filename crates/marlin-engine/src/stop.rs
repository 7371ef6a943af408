//! When a request ends.

use crate::EngineError;

/// What ends a request, whichever comes first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopConditions {
    /// Generate at most this many tokens; `usize::MAX` is as many as the context has room for. 0 generates nothing, for a prompt that is
    /// only scored.
    pub max_tokens: usize,
    /// Until so many tokens are generated, end-of-sequence and stop tokens are not chosen, and stop strings not heeded.
    pub min_tokens: usize,
    /// End before the first of these texts that is completed; they may span tokens.
    pub strings: Vec<String>,
    /// End at any of these tokens, besides the model's own end-of-sequence tokens.
    pub tokens: Vec<u32>,
    /// Go on past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
}

impl Default for StopConditions {
    fn default() -> Self {
        Self { max_tokens: 256, min_tokens: 0, strings: Vec::new(), tokens: Vec::new(), ignore_eos: false }
    }
}

impl StopConditions {
    /// Checks what can be wrong with them.
    pub fn validate(&self) -> Result<(), EngineError> {
        if self.min_tokens > self.max_tokens {
            return Err(EngineError::parameter("min_tokens", "at most max_tokens", self.min_tokens));
        }
        if self.strings.iter().any(String::is_empty) {
            return Err(EngineError::parameter("stop", "a text", "an empty one"));
        }
        Ok(())
    }
}

/// Why a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FinishReason {
    /// The model said this stop token; it is not part of the text.
    StopToken(u32),
    /// The text reached this stop string; it is not part of the text.
    StopString(String),
    /// Nothing can follow within the grammar of the answer.
    Complete,
    /// `max_tokens` were generated.
    Length,
    /// The context is full.
    Context,
    /// The request failed: the model's logits were not finite, so there is no next token.
    NotFinite,
    /// The request failed: its grammar allows nothing that goes on, or takes too much work, for this reason.
    Grammar(String),
    /// The request failed, for this reason.
    Failed(String),
}

impl FinishReason {
    /// Its name in reports: `stop_token`, `stop_string`, `complete`, `length`, `context`, `not_finite`, `grammar` or `failed`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::StopToken(_) => "stop_token",
            Self::StopString(_) => "stop_string",
            Self::Complete => "complete",
            Self::Length => "length",
            Self::Context => "context",
            Self::NotFinite => "not_finite",
            Self::Grammar(_) => "grammar",
            Self::Failed(_) => "failed",
        }
    }

    /// The stop token that was said.
    pub fn stop_token(&self) -> Option<u32> {
        if let Self::StopToken(token) = self { Some(*token) } else { None }
    }

    /// The stop string that was reached.
    pub fn stop_string(&self) -> Option<&str> {
        if let Self::StopString(text) = self { Some(text) } else { None }
    }

    /// The error, if the request ended by one.
    pub fn error(&self) -> Option<EngineError> {
        match self {
            Self::NotFinite => Some(EngineError::NotFinite),
            Self::Grammar(problem) => Some(EngineError::Grammar { problem: problem.clone() }),
            Self::Failed(problem) => Some(EngineError::Answer { problem: problem.clone() }),
            Self::StopToken(_) | Self::StopString(_) | Self::Complete | Self::Length | Self::Context => None,
        }
    }
}
