//! Decoders: attention, MLP, rope, norms, one small file per model family.
//!
//! [`load_model`] reads a checkpoint's config.json, finds the family, and builds a decoder on any
//! [`Backend`](marlin_kernels::Backend). A caller grows its [`KvSequence`]s in the model's [`KvPool`], describes what to run
//! in a [`StepBatch`], and calls [`LanguageModel::forward`]. [`load_model_offloaded`] leaves experts to the host's processor. What all that takes of a device's memory, a [`Planner`] tells before.

mod batch;
mod config;
mod decoder;
mod error;
mod expert_layers;
mod families;
mod kv;
mod language_model;
mod plan;
mod prediction_layer;
mod rope;
mod rotation;
mod spec;

pub use batch::{LogitRows, StepBatch};
pub use decoder::{LayerRunner, LoadedHead, LoadedLayer, SharedInput, load_model, load_model_offloaded};
pub use error::{ConfigError, ModelError};
pub use expert_layers::{ExpertLayers, ExpertOffload, LayerRange};
pub use families::supported_architectures;
pub use kv::{BlockHash, KvPool, KvSequence};
pub use language_model::{HostExpertsInfo, LanguageModel, LayerRouting, LoadOptions, ModelInfo};
pub use plan::{Conversion, ExpertShape, HostPlan, MemoryPlan, ModelShape, Planner, format_size};
pub use prediction_layer::{PredictionInfo, PredictionLayer};
pub use rotation::{
    InputNorms, NormWeights, Rotation, RotationBlocks, RotationParts, RowRotation, TensorRotation, WeightRotation,
};
