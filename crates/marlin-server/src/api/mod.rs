//! One file per endpoint.

pub(crate) mod answer;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod conversation;
pub(crate) mod embeddings;
pub(crate) mod format;
pub(crate) mod generation;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod perplexity;
pub(crate) mod responses;
pub(crate) mod status;
pub(crate) mod tokens;
pub(crate) mod web;

use crate::error::ApiError;

/// Does work that takes more than a moment away from the threads that serve connections.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::server("a bug in the server (its log says more)"))
}
