//! What can go wrong in quantising and evaluating.

use std::io;
use std::path::PathBuf;

use marlin_checkpoint::{Checkpoint, CheckpointError, ExportLayout};
use marlin_format::{FormatError, Scheme};
use marlin_model::{MemoryPlan, ModelError, format_size};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// Reading the source or writing the output failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The source is quantised already.
    #[error(
        "{model} is quantised already (tensor `{tensor}` is stored as {scheme}); quantise the original checkpoint instead, \
         a second rounding would only add error"
    )]
    AlreadyQuantized {
        /// The source.
        model: String,
        /// A packed tensor of it.
        tensor: String,
        /// Its storage.
        scheme: String,
    },
    /// The source's weights are rotated already.
    #[error("the weights of {model} are rotated already; quantise the original checkpoint instead")]
    AlreadyRotated {
        /// The source.
        model: String,
    },
    /// No part of the model can be rotated.
    #[error(
        "{model} has no part that can be rotated: no width of it has Hadamard blocks of 16 or more; leave rotation out"
    )]
    NothingToRotate {
        /// The source.
        model: String,
    },
    /// The layout cannot say that a decoder has to rotate.
    #[error("the layout {layout} cannot say what a decoder has to rotate; only metal-marlin can")]
    NotRotatedIn {
        /// The layout.
        layout: ExportLayout,
    },
    /// The output would replace the source.
    #[error("the output {} is the source itself; choose another folder", path.display())]
    OutputIsSource {
        /// The folder.
        path: PathBuf,
    },
    /// The layout leaves embedding and head as they are.
    #[error(
        "the layout {layout} keeps embedding and head as they are, and {scheme} is asked for them; \
         ask for bf16, f16, f32 or nothing"
    )]
    EmbeddingNotPacked {
        /// The layout.
        layout: ExportLayout,
        /// What was asked for.
        scheme: String,
    },
    /// There is nothing to quantise.
    #[error(
        "{model} has no matrix that is known to be a decoder linear; its {tensors} tensors have names of another family"
    )]
    NothingToQuantize {
        /// The source.
        model: String,
        /// Number of its tensors.
        tensors: usize,
    },
    /// There is less memory than any mix of formats takes.
    #[error(
        "{model} does not fit into {}: all in {scheme}, the smallest format, and loaded for {sequences} x {} tokens, it takes \
         {plan}; {}",
        format_size(*memory),
        plan.context,
        what_fits(plan, *memory, *sequences)
    )]
    DoesNotFit {
        /// The source.
        model: String,
        /// Memory there is, in bytes.
        memory: u64,
        /// Sequences at once.
        sequences: usize,
        /// The smallest format.
        scheme: Scheme,
        /// What the model takes in it.
        plan: Box<MemoryPlan>,
    },
    /// A plan of formats that is none, or of another model.
    #[error("the plan of formats: {0}")]
    Plan(String),
    /// No mix of formats is so small.
    #[error("no mix of formats has {target:.3} bits per weight; the smallest has {least:.3}")]
    TargetBits {
        /// What was asked for.
        target: f64,
        /// What there is.
        least: f64,
    },
    /// A matrix that cannot be encoded.
    #[error("{model}: tensor `{tensor}`: {source}")]
    Encode {
        /// The source.
        model: String,
        /// The matrix.
        tensor: String,
        /// Why.
        source: FormatError,
    },
    /// A dense model where experts are asked for.
    #[error("a {architecture} has no experts; cold experts can be told of mixtures of experts only")]
    NoExperts {
        /// What it is.
        architecture: String,
    },
    /// A mixture of experts lacks a matrix.
    #[error(
        "{model} lacks the tensor `{tensor}` of an expert; the download may be incomplete, fetch the missing files"
    )]
    MissingExpert {
        /// The source.
        model: String,
        /// The tensor.
        tensor: String,
    },
    /// Windows too short to predict anything.
    #[error("evaluation windows of {context} tokens predict nothing; at least 2 are needed")]
    Context {
        /// Tokens of a window.
        context: usize,
    },
    /// A text too short to predict anything.
    #[error("the text has {tokens} tokens; at least 2 are needed to predict one")]
    TextTooShort {
        /// Its tokens.
        tokens: usize,
    },
    /// A model and its baseline have different vocabularies.
    #[error("the model has {model} logits and the baseline {baseline}; only models of one vocabulary can be compared")]
    Vocabularies {
        /// Logits of the model.
        model: usize,
        /// Logits of the baseline.
        baseline: usize,
    },
    /// Logits that cannot be scored.
    #[error(
        "window {window}: the logits are not finite, or a token is outside the vocabulary; the model's weights are damaged"
    )]
    Logits {
        /// The window, from 0.
        window: usize,
    },
    /// Recorded logits were asked for other windows than they were made of.
    #[error("the recorded baseline was made of other windows of text")]
    NotRecorded,
    /// The temporary file of recorded logits failed.
    #[error("the temporary file of the baseline's logits (4 bytes a logit; TMPDIR says where) failed")]
    Recording(#[source] io::Error),
    /// A weight file cannot be written apart from the others, because it takes running the model.
    #[error(
        "a weight file cannot be written apart from the others where {what}, because that runs the model layer by layer; \
         round each weight by itself (--method mse or rtn, without --scale-channels)"
    )]
    ShardNeedsModel {
        /// What runs the model.
        what: &'static str,
    },
    /// A layout of a single file.
    #[error(
        "the layout {layout} is one file, which cannot be written in parts; choose another layout, or quantise at once"
    )]
    NotSharded {
        /// The layout.
        layout: ExportLayout,
    },
    /// There is no such weight file.
    #[error("the output has {count} weight files, and number {shard} is asked for")]
    NoShard {
        /// What was asked for, from 1.
        shard: usize,
        /// How many there are.
        count: usize,
    },
    /// What a process said of the weight file that it wrote cannot be read.
    #[error(
        "what is noted in OUT.partial/shards of a weight file cannot be read; remove that folder and quantise again"
    )]
    Note(#[source] serde_json::Error),
    /// The hidden states that an interrupted run kept cannot be read.
    #[error("the hidden states that an interrupted run kept in the unfinished output cannot be read")]
    State(#[source] io::Error),
}

impl QuantizeError {
    pub(crate) fn already_quantized(source: &Checkpoint, tensor: &str, scheme: Scheme) -> Self {
        let (model, tensor) = (source.name().to_owned(), tensor.to_owned());
        Self::AlreadyQuantized { model, tensor, scheme: scheme.to_string() }
    }

    pub(crate) fn nothing_to_quantize(source: &Checkpoint) -> Self {
        Self::NothingToQuantize { model: source.name().to_owned(), tensors: source.tensor_names().count() }
    }

    /// Whether the weights themselves are at fault, so that trying again cannot help.
    pub(crate) fn is_in_the_weights(&self) -> bool {
        matches!(self, Self::Encode { .. } | Self::Checkpoint(CheckpointError::NotFinite { .. }))
    }
}

/// What to do about a model that does not fit.
fn what_fits(plan: &MemoryPlan, memory: u64, sequences: usize) -> String {
    let context = plan.longest_context(memory, sequences).map(|context| format!("{sequences} x {context} tokens fit"));
    let fewer = plan.most_sequences(memory).map(|fewer| format!("{fewer} x {} tokens fit", plan.context));
    let fits: Vec<String> = [context, fewer].into_iter().flatten().collect();
    match fits.is_empty() {
        true => "without a KV cache it is too large already; give it more memory or choose a smaller model".to_owned(),
        false => fits.join(", "),
    }
}
