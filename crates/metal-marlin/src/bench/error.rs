//! Why nothing could be measured.

use marlin_checkpoint::CheckpointError;
use marlin_format::FormatError;
use marlin_model::{MemoryPlan, ModelError};

use crate::LoadError;
use crate::memory::{FittingOffload, MemoryBudget, or_else};

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// No shape has this name.
    #[error("there is no shape `{found}`; shapes are {known}")]
    UnknownShape {
        /// The name.
        found: String,
        /// All names.
        known: String,
    },
    /// A test does not fit the model.
    #[error(
        "{test} needs a context of {needed} tokens, {model} has {context}; choose shorter --prefill, --decode or --depths"
    )]
    Context {
        /// The test.
        test: String,
        /// Tokens it needs.
        needed: usize,
        /// The model.
        model: String,
        /// Tokens it can have.
        context: usize,
    },
    /// There is no memory for a test.
    #[error(
        "{model} needs {plan} for {test}; {} (--memory says otherwise); {}choose fewer --streams, shorter \
         --prefill, --decode or --depths, or a smaller model or format",
        budget.in_words(plan),
        or_else(offload)
    )]
    Memory {
        /// The model.
        model: String,
        /// The test that takes the most.
        test: String,
        /// What it takes.
        plan: Box<MemoryPlan>,
        /// Memory there is.
        budget: MemoryBudget,
        /// Experts to leave to the processor, if that helps.
        offload: Option<Box<FittingOffload>>,
    },
    /// There is nothing to measure.
    #[error("nothing to measure: --prefill and --decode are 0")]
    Nothing,
    /// Kernels cannot be timed.
    #[error(
        "--profile times the kernels of a GPU that has a clock (timestamp queries), and {device} is none; choose --device gpu, or leave \
         --profile out"
    )]
    NoProfile {
        /// The device.
        device: String,
    },
    /// The peak is not known.
    #[error(
        "--roofline needs the rate at which the device multiplies, which is measured of a CPU only, and the device is {device}; choose \
         --device cpu, or leave --roofline out"
    )]
    NoRoofline {
        /// The device.
        device: String,
    },
    /// The format does not suit the model.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The random model is not right.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model does not load.
    #[error(transparent)]
    Load(Box<LoadError>),
    /// The model does not run.
    #[error("cannot run the model")]
    Model(#[source] Box<ModelError>),
    /// Memory bandwidth cannot be measured.
    #[error("cannot start threads to measure memory bandwidth")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

impl From<LoadError> for BenchError {
    fn from(error: LoadError) -> Self {
        Self::Load(Box::new(error))
    }
}

impl From<ModelError> for BenchError {
    fn from(error: ModelError) -> Self {
        Self::Model(Box::new(error))
    }
}
