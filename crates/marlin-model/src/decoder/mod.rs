//! A decoder-only transformer on a backend.

mod load;

pub use load::load_model;
pub(crate) use load::{Sizes, kv_blocks, workspace_shapes};

use marlin_kernels::{Activation, AttentionShape, Backend, Encoder, QkNorm, SampleRow, StepLimits};

use crate::{KvPool, LanguageModel, ModelError, ModelInfo, StepBatch};

/// A loaded model. Fields are named after the checkpoint's tensors.
struct Decoder<B: Backend> {
    info: ModelInfo,
    limits: StepLimits,
    rms_norm_eps: f32,
    inv_freq: B::Vector,
    rope_scaling: f32,
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
}

/// `x += self_attn(input_layernorm(x)); x += mlp(post_attention_layernorm(x))`.
struct Layer<B: Backend> {
    input_layernorm: B::Vector,
    self_attn: Attention<B>,
    post_attention_layernorm: B::Vector,
    mlp: Mlp<B>,
}

/// Attention with grouped queries; Q, K and V are one matrix.
struct Attention<B: Backend> {
    shape: AttentionShape,
    qkv_proj: B::Linear,
    qk_norm: Option<HeadNorms<B>>,
    o_proj: B::Linear,
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
    down_proj: B::Linear,
}

/// Activations of a step.
struct Workspace<B: Backend> {
    /// The residual stream, `[T, hidden]`.
    hidden: B::Buffer,
    /// The input of a block, `[T, hidden]`.
    normed: B::Buffer,
    /// Cosines and sines, `[T, head_dim]`.
    angles: B::Buffer,
    /// `[T, q heads | k heads | v heads]`.
    qkv: B::Buffer,
    /// `[T, q heads]`.
    attention: B::Buffer,
    /// `[T, intermediate]`.
    gated: B::Buffer,
    /// Rows of the residual stream whose logits are wanted, `[L, hidden]`.
    last_hidden: B::Buffer,
    /// Their norm, `[L, hidden]`.
    last_normed: B::Buffer,
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
        self.encoder.submit()?;
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

    fn sample(&mut self, rows: &[SampleRow<'_>], tokens: &mut [u32]) -> Result<(), ModelError> {
        let logits = self.logit_rows;
        if rows.len() != logits || tokens.len() != logits {
            return Err(ModelError::SampleRows { rows: rows.len(), tokens: tokens.len(), logits });
        }
        if logits > 0 {
            self.logit_rows = 0;
            self.encoder.sample(&mut self.workspace.logits, rows, tokens);
        }
        Ok(())
    }
}

impl<B: Backend> Decoder<B> {
    fn check(&self, batch: &StepBatch) -> Result<(), ModelError> {
        batch.as_step().validate(&self.limits, self.pool.layout(), self.pool.blocks())?;
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
        encoder.embed(&self.embed_tokens, &mut work.hidden);
        encoder.rope_angles(&self.inv_freq, self.rope_scaling, &mut work.angles);
        for (index, layer) in self.layers.iter().enumerate() {
            encoder.rms_norm(&work.hidden, &layer.input_layernorm, *eps, &mut work.normed);
            layer.self_attn.encode(encoder, work, kv_cache, index, *eps);
            encoder.rms_norm(&work.hidden, &layer.post_attention_layernorm, *eps, &mut work.normed);
            layer.mlp.encode(encoder, work);
        }
        if batch.logit_rows() > 0 {
            encoder.select_logit_rows(&work.hidden, &mut work.last_hidden);
            encoder.rms_norm(&work.last_hidden, &self.norm, *eps, &mut work.last_normed);
            let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
            encoder.linear(&work.last_normed, head, &mut work.logits);
        }
    }
}

impl<B: Backend> Attention<B> {
    /// Adds the attention of `normed` to `hidden`.
    fn encode(
        &self,
        encoder: &mut B::Encoder,
        work: &mut Workspace<B>,
        kv_cache: &mut B::KvCache,
        layer: usize,
        eps: f32,
    ) {
        let norm = self.qk_norm.as_ref().map(|norms| QkNorm { q: &norms.q_norm, k: &norms.k_norm, eps });
        encoder.linear(&work.normed, &self.qkv_proj, &mut work.qkv);
        encoder.rope_store_kv(&mut work.qkv, &self.shape, norm, &work.angles, kv_cache, layer);
        encoder.attention(&work.qkv, &self.shape, kv_cache, layer, &mut work.attention);
        encoder.linear_add(&work.attention, &self.o_proj, &mut work.hidden);
    }
}

impl<B: Backend> Mlp<B> {
    /// Adds the MLP of `normed` to `hidden`.
    fn encode(&self, encoder: &mut B::Encoder, work: &mut Workspace<B>) {
        encoder.linear_gated(&work.normed, &self.gate_up_proj, self.activation, &mut work.gated);
        encoder.linear_add(&work.gated, &self.down_proj, &mut work.hidden);
    }
}
