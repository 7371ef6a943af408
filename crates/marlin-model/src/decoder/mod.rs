//! A decoder-only transformer on a backend.

mod load;
#[cfg(test)]
mod tests;

pub use load::load_model;
pub(crate) use load::{Sizes, angle_shapes, kv_blocks, workspace_shapes};

use marlin_kernels::{Activation, AttentionShape, Backend, Encoder, Input, QkNorm, SampleRow, SamplingId, StepLimits};

use crate::{KvPool, LanguageModel, ModelError, ModelInfo, StepBatch};

/// A loaded model. Fields are named after the checkpoint's tensors.
struct Decoder<B: Backend> {
    info: ModelInfo,
    limits: StepLimits,
    rms_norm_eps: f32,
    embedding_scale: f32,
    logit_cap: Option<f32>,
    ropes: Vec<Rope<B>>,
    embed_tokens: B::Linear,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    /// `None` if the head is the embedding.
    lm_head: Option<B::Linear>,
    pool: KvPool,
    kv_cache: B::KvCache,
    encoder: B::Encoder,
    workspace: Workspace<B>,
    /// Rows of logits the last step left on the device.
    logit_rows: usize,
    /// Rows of the last sampling.
    sampled_rows: usize,
}

/// A kind of rotary embedding.
struct Rope<B: Backend> {
    inv_freq: B::Vector,
    scaling: f32,
}

/// `x += self_attn(attn_norm(x)); x += mlp(mlp_norm(x))`. The norms are named by what they are for, because families differ in
/// their tensors' names.
struct Layer<B: Backend> {
    attn_norm: B::Vector,
    self_attn: Attention<B>,
    mlp_norm: B::Vector,
    mlp: Mlp<B>,
}

/// Attention with grouped queries; Q, K and V are one matrix.
struct Attention<B: Backend> {
    shape: AttentionShape,
    /// Index into the decoder's ropes.
    rope: usize,
    qkv_proj: B::Linear,
    qk_norm: Option<HeadNorms<B>>,
    o_proj: OutputProjection<B>,
}

/// Norms over each head of Q and K.
struct HeadNorms<B: Backend> {
    q_norm: B::Vector,
    k_norm: B::Vector,
}

/// A gated MLP; gate and up are one matrix.
struct Mlp<B: Backend> {
    gate_up_proj: B::Linear,
    activation: Activation,
    down_proj: OutputProjection<B>,
}

/// The end of a block: `x += norm(linear(y))`, in most families without the norm.
struct OutputProjection<B: Backend> {
    linear: B::Linear,
    norm: Option<B::Vector>,
}

/// Activations of a step.
struct Workspace<B: Backend> {
    /// The residual stream, `[T, hidden]`.
    hidden: B::Buffer,
    /// The output of a block before its norm, `[T, hidden]`; empty if blocks have none.
    block_output: B::Buffer,
    /// Cosines and sines of each rope, `[T, rotated dimensions]`.
    angles: Vec<B::Buffer>,
    /// `[T, q heads | k heads | v heads]`.
    qkv: B::Buffer,
    /// `[T, q heads]`.
    attention: B::Buffer,
    /// `[T, intermediate]`.
    gated: B::Buffer,
    /// Rows of the residual stream whose logits are wanted, `[L, hidden]`.
    last_hidden: B::Buffer,
    /// `[L, vocabulary]`.
    logits: B::Buffer,
}

impl<B: Backend> LanguageModel for Decoder<B> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn kv(&mut self) -> &mut KvPool {
        &mut self.pool
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<(), ModelError> {
        self.logit_rows = 0;
        self.check(batch)?;
        if batch.tokens() == 0 {
            return Ok(());
        }
        self.encode(batch);
        self.encoder.start()?;
        self.pool.finish_copies();
        self.logit_rows = batch.logit_rows();
        Ok(())
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.resize(self.logit_rows * self.info.vocabulary, 0.0);
        if self.logit_rows > 0 {
            self.encoder.read(&self.workspace.logits, out)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), ModelError> {
        Ok(self.encoder.submit()?)
    }

    fn sample(&mut self, rows: &[SampleRow<'_>]) -> Result<SamplingId, ModelError> {
        if rows.is_empty() || rows.len() != self.logit_rows {
            return Err(ModelError::SampleRows { rows: rows.len(), logits: self.logit_rows });
        }
        (self.sampled_rows, self.logit_rows) = (self.logit_rows, 0);
        Ok(self.encoder.sample(&mut self.workspace.logits, rows))
    }

    fn sampled(&mut self, sampling: SamplingId, tokens: &mut [u32]) -> Result<(), ModelError> {
        Ok(self.encoder.sampled(sampling, tokens)?)
    }
}

impl<B: Backend> Decoder<B> {
    fn check(&self, batch: &StepBatch) -> Result<(), ModelError> {
        batch.as_step().validate(&self.limits, self.pool.layout(), self.pool.blocks(), self.sampled_rows)?;
        let (found, limit) = (batch.logit_rows(), self.info.logit_rows);
        if found > limit {
            return Err(ModelError::TooManyLogitRows { found, limit });
        }
        Ok(())
    }

    /// The step, from tokens to logits.
    fn encode(&mut self, batch: &StepBatch) {
        let Self { encoder, kv_cache, workspace: work, rms_norm_eps: eps, .. } = self;
        encoder.begin(&batch.as_step());
        encoder.copy_kv_blocks(kv_cache, self.pool.pending_copies());
        // Angles come first: a device that uploads them would have to start what is recorded before.
        for (rope, angles) in self.ropes.iter().zip(&mut work.angles) {
            encoder.rope_angles(&rope.inv_freq, rope.scaling, angles);
        }
        encoder.embed(&self.embed_tokens, self.embedding_scale, &mut work.hidden);
        for (index, layer) in self.layers.iter().enumerate() {
            layer.self_attn.encode(encoder, work, &layer.attn_norm, kv_cache, index, *eps);
            layer.mlp.encode(encoder, work, &layer.mlp_norm, *eps);
        }
        if batch.logit_rows() > 0 {
            encoder.select_logit_rows(&work.hidden, &mut work.last_hidden);
            let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
            let normed = Input::Normed { x: &work.last_hidden, weight: &self.norm, eps: *eps };
            encoder.linear(normed, head, &mut work.logits);
            if let Some(cap) = self.logit_cap {
                encoder.soft_cap(&mut work.logits, cap);
            }
        }
    }
}

impl<B: Backend> Attention<B> {
    /// Adds the attention of the normalised `hidden` to it.
    fn encode(
        &self,
        encoder: &mut B::Encoder,
        work: &mut Workspace<B>,
        input_norm: &B::Vector,
        kv_cache: &mut B::KvCache,
        layer: usize,
        eps: f32,
    ) {
        let norm = self.qk_norm.as_ref().map(|norms| QkNorm { q: &norms.q_norm, k: &norms.k_norm, eps });
        let normed = Input::Normed { x: &work.hidden, weight: input_norm, eps };
        encoder.linear(normed, &self.qkv_proj, &mut work.qkv);
        encoder.rope_store_kv(&mut work.qkv, &self.shape, norm, &work.angles[self.rope], kv_cache, layer);
        encoder.attention(&work.qkv, &self.shape, None, kv_cache, layer, &mut work.attention);
        self.o_proj.encode(encoder, &work.attention, &mut work.block_output, &mut work.hidden, eps);
    }
}

impl<B: Backend> Mlp<B> {
    /// Adds the MLP of the normalised `hidden` to it.
    fn encode(&self, encoder: &mut B::Encoder, work: &mut Workspace<B>, input_norm: &B::Vector, eps: f32) {
        let normed = Input::Normed { x: &work.hidden, weight: input_norm, eps };
        encoder.linear_gated(normed, &self.gate_up_proj, self.activation, &mut work.gated);
        self.down_proj.encode(encoder, &work.gated, &mut work.block_output, &mut work.hidden, eps);
    }
}

impl<B: Backend> OutputProjection<B> {
    /// Adds the projection of `x` to `hidden`; `unnormed` takes it before it is normalised.
    fn encode(
        &self,
        encoder: &mut B::Encoder,
        x: &B::Buffer,
        unnormed: &mut B::Buffer,
        hidden: &mut B::Buffer,
        eps: f32,
    ) {
        match &self.norm {
            None => encoder.linear_add(x, &self.linear, hidden),
            Some(norm) => {
                encoder.linear(Input::Rows(x), &self.linear, unnormed);
                encoder.rms_norm_add(unnormed, norm, eps, hidden);
            }
        }
    }
}
