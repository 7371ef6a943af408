//! Quantisers of checkpoints, and the measures they are judged by.
//!
//! [`quantize`] writes a checkpoint in the formats of a [`Recipe`] and reports the error of every matrix; [`evaluate`] measures
//! what that does to the model: perplexity, and divergence from a baseline.

mod encode_matrix;
mod error;
mod error_stats;
mod evaluate;
mod footprint;
mod quantize;
mod recipe;
mod role;

pub use error::QuantizeError;
pub use error_stats::ErrorStats;
pub use evaluate::{Divergence, LogitSource, ModelLogits, Quality, RecordedLogits, Windows, evaluate};
pub use footprint::Footprint;
pub use quantize::{MatrixReport, Progress, QuantizeOptions, Report, quantize, source_fingerprint};
pub use recipe::Recipe;
pub use role::TensorRole;
