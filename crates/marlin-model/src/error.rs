//! What can go wrong with a model.

use marlin_checkpoint::CheckpointError;
use marlin_kernels::{KernelError, StepError};

/// An error of loading or running a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// config.json cannot be used.
    #[error("config.json of {model} cannot be used")]
    Config {
        /// The checkpoint.
        model: String,
        /// What is wrong.
        source: ConfigError,
    },
    /// The checkpoint lacks a tensor, or one has another shape than config.json says.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The checkpoint holds weights of the decoder that config.json has no place for.
    #[error(
        "{model} holds {count} tensors that the model config.json describes does not use, the first of them {first}; \
         config.json does not belong to these weights, or has a wrong number of layers or a bias switched off"
    )]
    UnusedTensors {
        /// The checkpoint.
        model: String,
        /// How many.
        count: usize,
        /// One of them.
        first: String,
    },
    /// The device refuses a weight.
    #[error("{model}: {tensor} cannot be loaded")]
    Weight {
        /// The checkpoint.
        model: String,
        /// The tensor, or the first of those fused into one.
        tensor: String,
        /// Why.
        source: KernelError,
    },
    /// A load option that this model cannot be given.
    #[error("{model}: {option} = {found}: must be {wanted}")]
    Option {
        /// The checkpoint.
        model: String,
        /// Field of [`crate::LoadOptions`].
        option: &'static str,
        /// Its value.
        found: usize,
        /// What it may be.
        wanted: String,
    },
    /// What is no list of layers.
    #[error("`{found}` is neither a layer nor a range of layers; wanted a list such as 0-11,20,40-")]
    LayerRange {
        /// What was found.
        found: String,
    },
    /// The host cannot be left the experts of these layers.
    #[error("{model}: experts cannot be left to the host (--expert-device): {problem}")]
    ExpertLayers {
        /// The checkpoint.
        model: String,
        /// What is wrong, and what there is.
        problem: String,
    },
    /// The model has no layer that predicts further tokens.
    #[error(
        "{model} has no layer that predicts further tokens (--speculate mtp): {problem}; take a checkpoint that keeps it, or guess \
         otherwise (--speculate lookup)"
    )]
    NoPrediction {
        /// The checkpoint.
        model: String,
        /// What was looked for, and not found.
        problem: String,
    },
    /// Hidden states for another number of tokens than a step of the prediction layer has.
    #[error("{found} values of hidden states for a step of {tokens} tokens; {wanted} are wanted")]
    HiddenStates {
        /// Tokens of the step.
        tokens: usize,
        /// Values given.
        found: usize,
        /// Values that belong to so many tokens.
        wanted: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A step that cannot be run; nothing was.
    #[error(transparent)]
    Step(#[from] StepError),
    /// A step asks for more logits than there is room for.
    #[error("a step of {found} logit rows; the model was loaded for at most {limit} (the logit_rows load option)")]
    TooManyLogitRows {
        /// Logit rows of the step.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Sampling parameters for another number of rows than the last step had logits.
    #[error("{rows} sampling rows for {logits} rows of logits; they must be as many, and at least one")]
    SampleRows {
        /// Sampling rows given.
        rows: usize,
        /// Rows of logits there are.
        logits: usize,
    },
    /// The KV pool has too few free blocks.
    #[error(
        "a sequence of {len} tokens needs {needed} more KV blocks for {tokens} tokens, {free} of {blocks} are free \
         ({block_tokens} tokens each); release sequences or load the model with more KV blocks"
    )]
    OutOfBlocks {
        /// Tokens of the sequence.
        len: usize,
        /// Tokens to be added.
        tokens: usize,
        /// Blocks that takes.
        needed: usize,
        /// Blocks that are free.
        free: usize,
        /// Blocks of the pool.
        blocks: usize,
        /// Tokens of a block.
        block_tokens: usize,
    },
}

/// What is wrong with a config.json.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{problem}", if field.is_empty() { String::new() } else { format!("{field}: ") })]
pub struct ConfigError {
    /// Path of the field, for example `rope_parameters.factor`; empty where the problem names it.
    pub field: String,
    /// What was found and what is wanted.
    pub problem: String,
}

impl ConfigError {
    pub(crate) fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}
