//! OpenAI's and Anthropic's APIs over HTTP.
//!
//! Handlers get the model that a request names from the [`registry`], which has it loaded if it is not. One thread owns the engine of a
//! model ([`worker`]); handlers send it requests and get events. A handler that is dropped, because its client is gone, takes its request
//! with it.

mod api;
mod body;
mod dialect;
mod error;
mod metrics;
mod model;
mod openapi;
mod registry;
mod server;
mod service;
mod worker;

pub use dialect::Dialect;
pub use model::{ChatFormat, ServedModel};
pub use registry::{LoadFailure, LoadedModel, ModelLoader, Models};
pub use server::{Server, ServerError, ServerOptions};
pub use service::{Service, ServiceOptions};
