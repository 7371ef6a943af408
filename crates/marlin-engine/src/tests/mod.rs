//! Tests of the crate's parts together, on a model that says what a function of the history tells it to say.

mod chi_squared;
mod engine;
mod fake_layer;
mod fake_model;
mod pooling;
mod speculative_sampling;
mod store;
mod text;
pub(crate) mod tokenizers;
