//! The layer that predicts further tokens.
//!
//! `x = eh_proj([enorm(embed(token)) | hnorm(hidden state before)])`, then a decoder layer, then `shared_head.norm` and the head. Nothing has to
//! be put side by side: `eh_proj` is two linears, of the columns for the embedding and of those for the hidden state.

use std::sync::Arc;

use marlin_checkpoint::{Checkpoint, TensorInfo};
use marlin_format::{PackedMatrix, Scheme};
use marlin_kernels::reference::rms_norm;
use marlin_kernels::{
    Backend, Encoder, Input, KernelError, KvLayout, KvType, LinearPart, MemoryUse, SampleRow, StepLimits,
};

use super::load::{Loader, Sizes, load_ropes, weight};
use super::workspace::{Workspace, angle_shapes, expert_work_bytes, workspace_shapes};
use super::{FeedForward, Layer, Rope};
use crate::spec::DecoderSpec;
use crate::{KvPool, LoadOptions, ModelError, PredictionInfo, PredictionLayer, StepBatch};

/// Most slots of a step: enough to read weights for many, few enough to take little memory.
const STEP_TOKENS: usize = 128;

/// A loaded prediction layer. Fields are named after the checkpoint's tensors.
struct Prediction<B: Backend> {
    info: PredictionInfo,
    limits: StepLimits,
    rms_norm_eps: f32,
    embedding_scale: f32,
    logit_cap: Option<f32>,
    ropes: Vec<Rope<B>>,
    /// The model's.
    embed_tokens: Arc<B::Linear>,
    enorm: B::Vector,
    hnorm: B::Vector,
    /// The halves of `eh_proj`, by columns.
    e_proj: B::Linear,
    h_proj: B::Linear,
    layer: Layer<B>,
    /// `shared_head.norm`, and the same in host memory.
    norm: B::Vector,
    host_norm: Vec<f32>,
    /// The model's.
    head: Arc<B::Linear>,
    pool: KvPool,
    kv_cache: B::KvCache,
    encoder: B::Encoder,
    workspace: Workspace<B>,
    /// `[T, hidden]` each: embeddings, hidden states, and those normalised.
    embedded: B::Buffer,
    before: B::Buffer,
    normed: B::Buffer,
    /// Whether the last step has left a state, and logits.
    has_state: bool,
    has_logits: bool,
}

impl<B: Backend> PredictionLayer for Prediction<B> {
    fn info(&self) -> &PredictionInfo {
        &self.info
    }

    fn kv(&mut self) -> &mut KvPool {
        &mut self.pool
    }

    fn forward(&mut self, batch: &StepBatch, before: &[f32]) -> Result<(), ModelError> {
        (self.has_state, self.has_logits) = (false, false);
        batch.as_step().validate(&self.limits, self.pool.layout(), self.pool.blocks(), 0)?;
        let (tokens, found) = (batch.tokens(), batch.logit_rows());
        if found > 1 {
            return Err(ModelError::TooManyLogitRows { found, limit: 1 });
        }
        let wanted = tokens * self.info.hidden_size;
        if before.len() != wanted {
            return Err(ModelError::HiddenStates { tokens, found: before.len(), wanted });
        }
        if tokens == 0 {
            return Ok(());
        }
        self.encode(batch, before)?;
        self.encoder.start()?;
        self.pool.finish_copies();
        (self.has_state, self.has_logits) = (found > 0, found > 0);
        Ok(())
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.resize(if self.has_logits { self.info.vocabulary } else { 0 }, 0.0);
        if self.has_logits {
            self.encoder.read(&self.workspace.logits, out)?;
        }
        Ok(())
    }

    fn read_hidden(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.resize(if self.has_state { self.info.hidden_size } else { 0 }, 0.0);
        if self.has_state {
            self.encoder.read(&self.workspace.last_hidden, out)?;
            rms_norm(out, &self.host_norm, self.rms_norm_eps);
        }
        Ok(())
    }

    fn most_likely(&mut self) -> Result<Option<u32>, ModelError> {
        if !std::mem::take(&mut self.has_logits) {
            return Err(ModelError::SampleRows { rows: 1, logits: 0 });
        }
        let sampling = self.encoder.sample(&mut self.workspace.logits, &[SampleRow::GREEDY]);
        let mut token = [SampleRow::NOT_FINITE];
        self.encoder.sampled(sampling, &mut token)?;
        Ok(Some(token[0]).filter(|&token| token != SampleRow::NOT_FINITE))
    }
}

impl<B: Backend> Prediction<B> {
    /// The step, from tokens and hidden states to logits.
    fn encode(&mut self, batch: &StepBatch, states: &[f32]) -> Result<(), ModelError> {
        let Self { encoder, kv_cache, workspace: work, embedded, before, normed, rms_norm_eps: eps, .. } = self;
        encoder.begin(&batch.as_step());
        encoder.copy_kv_blocks(kv_cache, self.pool.pending_copies());
        // What is uploaded comes first: it would have to start what is recorded before.
        for (rope, angles) in self.ropes.iter().zip(&mut work.angles) {
            encoder.rope_angles(&rope.inv_freq, rope.scaling, angles);
        }
        encoder.write(before, batch.tokens(), states)?;
        encoder.embed(&self.embed_tokens, self.embedding_scale, embedded);
        let embedding = Input::Normed { x: embedded, weight: &self.enorm, eps: *eps };
        encoder.linear(embedding, &self.e_proj, &mut work.hidden);
        encoder.rms_norm(before, &self.hnorm, *eps, normed);
        encoder.linear_add(normed, &self.h_proj, &mut work.hidden);
        self.layer.encode_attention(encoder, work, kv_cache, 0, *eps);
        match &self.layer.feed_forward {
            FeedForward::Mlp(mlp) => mlp.encode(encoder, work, &self.layer.mlp_norm, *eps),
            FeedForward::Experts(experts) => experts.encode(encoder, work, &self.layer.mlp_norm, *eps),
            FeedForward::HostExperts(_) => unreachable!("the layer is loaded without a host"),
        }
        if batch.logit_rows() > 0 {
            encoder.select_logit_rows(&work.hidden, &mut work.last_hidden);
            let normed = Input::Normed { x: &work.last_hidden, weight: &self.norm, eps: *eps };
            encoder.linear(normed, &self.head, &mut work.logits);
            if let Some(cap) = self.logit_cap {
                encoder.soft_cap(&mut work.logits, cap);
            }
        }
        Ok(())
    }
}

/// The spec of a checkpoint's prediction layer, and its index there.
///
/// # Errors
/// config.json speaks of none, or the checkpoint lacks it.
pub(crate) fn require_prediction(
    spec: &DecoderSpec,
    checkpoint: &Checkpoint,
) -> Result<(usize, DecoderSpec), ModelError> {
    let none = |problem| ModelError::NoPrediction { model: checkpoint.name().to_owned(), problem };
    let index = spec.layers.len();
    let of_layer =
        spec.prediction().ok_or_else(|| none("config.json has no num_nextn_predict_layers above 0".into()))?;
    let tensor = weight(&eh_proj(index));
    if checkpoint.contains(&tensor) {
        Ok((index, of_layer))
    } else {
        Err(none(format!("it lacks the tensor {tensor}")))
    }
}

fn eh_proj(index: usize) -> String {
    format!("model.layers.{index}.eh_proj")
}

/// Whether a tensor of a prediction layer is a copy of the model's, which serves both.
pub(crate) fn is_shared(tensor: &str) -> bool {
    [".embed_tokens.weight", ".shared_head.head.weight"].iter().any(|name| tensor.ends_with(name))
}

/// Loads the prediction layer of a model that `loader` has loaded, whose embedding and head it shares.
///
/// # Errors
/// The model has none, one of its tensors is missing or has another shape, or the device lacks the memory.
pub(super) fn load_prediction<B: Backend>(
    loader: &Loader<'_, B>,
    options: &LoadOptions,
    sizes: &Sizes,
    [embed_tokens, head]: [Arc<B::Linear>; 2],
) -> Result<Box<dyn PredictionLayer>, ModelError> {
    let model = loader.spec;
    let (index, spec) = require_prediction(model, loader.checkpoint)?;
    let memory = PredictionMemory::new(&spec, options, sizes);
    let (backend, hidden, tokens) = (loader.backend, spec.hidden_size, memory.step_tokens);
    backend.check_kv_blocks(&memory.kv_layout, options.kv_type, sizes.kv_blocks)?;
    let loader = Loader { spec: &spec, ..*loader };
    let name = |tensor: &str| format!("model.layers.{index}.{tensor}");
    let [e_proj, h_proj] = loader.column_halves(&eh_proj(index))?;
    let of_slot = 2 * hidden * hidden + spec.weights_of(&spec.layers[0]);
    let of_head = spec.vocab_size * hidden;
    let of_token = of_head + model.layers.iter().map(|layer| model.weights_of(layer)).sum::<usize>();
    Ok(Box::new(Prediction {
        info: PredictionInfo {
            vocabulary: spec.vocab_size,
            hidden_size: hidden,
            context: sizes.context,
            step_tokens: tokens,
            slot_cost: of_slot as f64 / of_token as f64,
            guess_cost: (of_slot + of_head) as f64 / of_token as f64,
        },
        rms_norm_eps: spec.rms_norm_eps,
        embedding_scale: spec.embedding_scale,
        logit_cap: spec.logit_cap,
        ropes: load_ropes(backend, &spec)?,
        embed_tokens,
        enorm: loader.norm(&name("enorm"), hidden)?,
        hnorm: loader.norm(&name("hnorm"), hidden)?,
        e_proj,
        h_proj,
        layer: loader.layer(index, &spec.layers[0], None)?,
        norm: loader.norm(&name("shared_head.norm"), hidden)?,
        host_norm: loader.norm_weights(&name("shared_head.norm"), hidden)?,
        head,
        kv_cache: backend.kv_cache(&memory.kv_layout, options.kv_type, sizes.kv_blocks)?,
        pool: KvPool::new(memory.kv_layout, sizes.kv_blocks),
        encoder: backend.encoder(&memory.limits)?,
        limits: memory.limits,
        workspace: Workspace::new(backend, &spec, tokens, 1)?,
        embedded: backend.buffer(tokens, hidden)?,
        before: backend.buffer(tokens, hidden)?,
        normed: backend.buffer(tokens, hidden)?,
        has_state: false,
        has_logits: false,
    }))
}

impl<B: Backend> Loader<'_, B> {
    /// The linears of both halves of a module's columns, `hidden` each.
    fn column_halves(&self, module: &str) -> Result<[B::Linear; 2], ModelError> {
        let (tensor, hidden) = (weight(module), self.spec.hidden_size);
        let matrix = self.matrix(&tensor, hidden, 2 * hidden)?;
        let half = |first: usize| {
            let weight = columns(&matrix, first, hidden)?;
            self.backend.load_linear(&[LinearPart { weight, bias: None }])
        };
        let halves = half(0).and_then(|first| Ok([first, half(hidden)?]));
        self.checkpoint.release(&tensor);
        halves.map_err(|source| self.weight_error(&tensor, source))
    }
}

/// How half the columns of a matrix are kept: plain floats as they are, packed ones in single precision, since a group may lie in both.
fn half_scheme(stored: &Scheme) -> Scheme {
    if stored.is_dense() { *stored } else { Scheme::F32 }
}

/// Some columns of a matrix.
fn columns(matrix: &PackedMatrix<'_>, first: usize, count: usize) -> Result<PackedMatrix<'static>, KernelError> {
    let scheme = half_scheme(&matrix.scheme);
    let mut bytes = Vec::new();
    if scheme == matrix.scheme {
        let size = matrix.codes.len() / (matrix.rows * matrix.cols);
        let rows = matrix.codes.chunks_exact(matrix.cols * size);
        rows.for_each(|row| bytes.extend_from_slice(&row[first * size..(first + count) * size]));
    } else {
        let mut values = vec![0.0; matrix.cols];
        for row in 0..matrix.rows {
            matrix.decode_row(row, &mut values);
            bytes.extend(values[first..first + count].iter().flat_map(|value| value.to_le_bytes()));
        }
    }
    Ok(PackedMatrix::from_dense_bytes(scheme, matrix.rows, count, bytes)?)
}

/// What a prediction layer takes of a device's memory beside its weights.
pub(crate) struct PredictionMemory {
    pub(crate) kv_layout: KvLayout,
    step_tokens: usize,
    limits: StepLimits,
}

impl PredictionMemory {
    /// Of the layer `spec`, beside a model that is loaded with these options.
    pub(crate) fn new(spec: &DecoderSpec, options: &LoadOptions, sizes: &Sizes) -> Self {
        let step_tokens = options.step_tokens.min(STEP_TOKENS);
        let limits = StepLimits { logit_rows: 1, ..sizes.step_limits(spec, step_tokens) };
        Self { kv_layout: spec.kv_layout(), step_tokens, limits }
    }

    /// Bytes of its KV cache.
    pub(crate) fn kv_bytes(&self, kv_type: KvType, blocks: usize) -> u64 {
        self.kv_layout.pool_bytes(kv_type, blocks) as u64
    }

    /// Bytes of buffers and scratch memory, and of logits.
    pub(crate) fn work_bytes(&self, device: &dyn MemoryUse, spec: &DecoderSpec) -> [u64; 2] {
        let tokens = self.step_tokens;
        let bytes = |(rows, width): (usize, usize)| (rows as u64).saturating_mul(width as u64).saturating_mul(4);
        let [buffers @ .., logits] = workspace_shapes(spec, tokens, 1);
        // Embeddings, hidden states, and those normalised.
        let own = [(tokens, spec.hidden_size); 3];
        let buffers = buffers.into_iter().chain(angle_shapes(spec, tokens)).chain(own).map(bytes);
        let experts = spec.device_experts();
        let experts = experts.map_or(0, |experts| expert_work_bytes(device, spec.hidden_size, &experts, tokens));
        let scratch = device.encoder_bytes(&self.limits) as u64;
        [buffers.fold(scratch.saturating_add(experts), u64::saturating_add), bytes(logits)]
    }
}

/// Bytes that a device keeps of `eh_proj` in this storage.
///
/// # Errors
/// The matrix has an odd number of columns, or the scheme has no such shape.
pub(crate) fn eh_proj_bytes(device: &dyn MemoryUse, info: &TensorInfo, stored: &Scheme) -> Result<usize, KernelError> {
    let &[rows, cols] = info.shape.as_slice() else { return Ok(0) };
    Ok(device.linear_bytes(&half_scheme(stored), rows, cols / 2)?.saturating_mul(2))
}
