//! Requests to tokens: sequences, scheduling, sampling, streaming.
//!
//! A request's life: [`Engine::add`] checks it and queues a sequence. Each [`Engine::step`] *admits* waiting
//! sequences for which there are KV blocks, *schedules* a ragged step (decoding sequences bring one token, prompts
//! come in chunks), runs the model, *samples* a token for each sequence that is complete, and *delivers* it as an
//! [`Event`], until a stop condition holds or [`Engine::cancel`] is called; then the blocks are free again.
//!
//! [`ChatTemplate`] turns a conversation into the text of a prompt.

mod chat_template;
mod constraint;
mod engine;
mod error;
mod logprobs;
mod persistence;
mod pooling;
mod prefix;
mod request;
mod sampling;
mod scheduler;
mod sequence;
mod speculation;
mod stop;
mod store;
#[cfg(test)]
mod tests;
mod text;

pub use chat_template::{ChatOptions, ChatTemplate, Message};
pub use constraint::{Constraint, Grammar, GrammarCompiler};
pub use engine::{Engine, EngineOptions, EngineStats};
pub use error::EngineError;
pub use pooling::Pooling;
pub use request::{Event, Finish, Request, RequestId, TokenLogprobs};
pub use sampling::SamplingParams;
pub use speculation::{AnswerId, DraftModel, Drafter, MOST_DRAFT, MtpDrafter, PromptLookup};
pub use stop::{FinishReason, StopConditions};
pub use store::{BlockStore, BlockStoreOptions, StoreError, StoreStats};
pub use text::TextStream;
