//! Why a request is refused, or a step fails.

use marlin_checkpoint::CheckpointError;
use marlin_model::ModelError;

use crate::StoreError;

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A parameter of a request is out of range.
    #[error("{name} must be {wanted}, found {found}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// Its range.
        wanted: &'static str,
        /// The value given.
        found: String,
    },
    /// A request without a prompt: there is nothing to continue.
    #[error("the prompt has no tokens; give at least one")]
    EmptyPrompt,
    /// A token id that the model does not have.
    #[error("token {token} of the {place} is outside the vocabulary of {vocabulary} tokens")]
    Token {
        /// `prompt`, `logit_bias` or `stop_token_ids`.
        place: &'static str,
        /// The id.
        token: u32,
        /// Ids below this are valid.
        vocabulary: usize,
    },
    /// The prompt leaves no room in the context for an answer.
    #[error(
        "the prompt has {prompt} tokens, but the context of {context} tokens must hold it and at least one more; \
         shorten the prompt or load the model with a larger context"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// The KV cache is too small for the request, even alone.
    #[error(
        "a prompt of {prompt} tokens with up to {max_tokens} to generate needs {needed} KV blocks of {block_tokens} \
         tokens, and the cache has {blocks}; shorten the prompt, lower max_tokens or make a larger cache"
    )]
    CacheTooSmall {
        /// Tokens of the prompt.
        prompt: usize,
        /// Most tokens to generate.
        max_tokens: usize,
        /// Blocks the request needs.
        needed: usize,
        /// Tokens of a block.
        block_tokens: usize,
        /// Blocks of the cache.
        blocks: usize,
    },
    /// The chat template cannot be compiled, refuses the conversation, or does not end.
    #[error("the chat template fails: {problem}")]
    ChatTemplate {
        /// What is wrong, and in which line.
        problem: String,
    },
    /// The system has no random numbers for a request without a seed.
    #[error("no random seed from the system; give a seed")]
    Entropy(#[from] getrandom::Error),
    /// The tokenizer failed.
    #[error("cannot decode tokens")]
    Tokenizer(#[from] CheckpointError),
    /// The model gave a request logits that allow no choice of a token.
    #[error(
        "the model's logits are not finite: its weights are damaged, or its keys and values exceed f16 (try --kv f32)"
    )]
    NotFinite,
    /// A grammar that cannot be compiled, or cannot be honoured.
    #[error("the grammar of the answer cannot be used: {problem}")]
    Grammar {
        /// What is wrong with it.
        problem: String,
    },
    /// An answer cannot go on.
    #[error("the answer cannot go on: {problem}")]
    Answer {
        /// Why.
        problem: String,
    },
    /// Blocks of the KV cache cannot be kept on disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The model failed.
    #[error("the model failed")]
    Model(#[from] ModelError),
}

impl EngineError {
    pub(crate) fn parameter(name: &'static str, wanted: &'static str, found: impl ToString) -> Self {
        Self::Parameter { name, wanted, found: found.to_string() }
    }
}
