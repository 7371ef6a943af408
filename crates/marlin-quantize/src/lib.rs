//! Quantisers of checkpoints, and the measures they are judged by.
//!
//! [`quantize`] writes a checkpoint in the formats of a [`Recipe`] and reports the error of every matrix; [`fit`] finds the recipe
//! that makes the most of a budget of memory; [`evaluate`] measures what quantising does to the model: perplexity, and divergence from a baseline.

mod calibrate;
mod capture;
mod encode_matrix;
mod error;
mod error_stats;
mod evaluate;
mod fit;
mod footprint;
mod gptq;
mod mixed_precision;
mod moe;
mod output;
mod quantize;
mod recipe;
mod role;
mod scaling;
mod shard;
mod source;

pub use calibrate::{Calibration, Kept};
pub use encode_matrix::encode_matrix;
pub use error::QuantizeError;
pub use error_stats::ErrorStats;
pub use evaluate::{Divergence, LogitSource, ModelLogits, Quality, RecordedLogits, Windows, evaluate};
pub use fit::{Budget, Fit, fit};
pub use footprint::Footprint;
pub use gptq::USUAL_DAMPING;
pub use mixed_precision::{BitPlan, PlannedMatrix, measure_sensitivity};
pub use moe::{
    ColdExperts, ExpertMatrix, ExpertTensors, MoeLayer, cold_experts, expert_matrix, expert_of, find_moe_layers,
    measure_routing, quantize_moe_experts, replace_moe_layers,
};
pub use quantize::{MatrixReport, Progress, QuantizeOptions, Report, quantize, source_fingerprint};
pub use recipe::{Recipe, embedding_scheme, quantized_format, quantized_formats, scheme_by_name};
pub use role::{TensorRole, kind_of, layer_and_kind};
pub use shard::{PlannedShard, plan_shards, quantize_shard};
