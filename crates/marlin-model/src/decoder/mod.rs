//! A decoder-only transformer on a backend.

mod attention;
mod experts;
mod host_experts;
mod latent;
mod layers;
mod load;
mod mlp;
mod prediction;
mod stacks;
#[cfg(test)]
mod tests;
mod workspace;

pub(crate) use experts::{expert_bytes, is_routed, loaded_scheme};
pub(crate) use host_experts::host_work_bytes;
pub(crate) use latent::kv_b_bytes;
pub use layers::{LayerRunner, LoadedHead, LoadedLayer, SharedInput};
pub(crate) use load::{Sizes, kv_blocks};
pub use load::{load_model, load_model_offloaded};
pub(crate) use prediction::{PredictionMemory, eh_proj_bytes, is_shared, require_prediction};
pub(crate) use workspace::{angle_shapes, expert_work_bytes, workspace_shapes};

use std::sync::Arc;

use marlin_kernels::reference::rms_norm;
use marlin_kernels::{Backend, Encoder, Hadamard, HostRoutes, Input, SampleRow, SamplingId, StepLimits};

use self::attention::GroupedAttention;
use self::experts::Experts;
use self::host_experts::{HostExperts, HostWork};
use self::latent::LatentAttention;
use self::mlp::Mlp;
use self::workspace::{ExpertWork, Workspace};
use crate::{KvPool, LanguageModel, LayerRouting, ModelError, ModelInfo, PredictionLayer, StepBatch};

/// A loaded model. Fields are named after the checkpoint's tensors.
struct Decoder<B: Backend> {
    info: ModelInfo,
    limits: StepLimits,
    rms_norm_eps: f32,
    embedding_scale: f32,
    /// Of the residual stream, from the embedding to the final norm.
    rotation: Option<Hadamard>,
    logit_cap: Option<f32>,
    ropes: Vec<Rope<B>>,
    embed_tokens: Arc<B::Linear>,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    /// The same in host memory, for those who ask for hidden states.
    host_norm: Vec<f32>,
    /// `None` if the head is the embedding.
    lm_head: Option<Arc<B::Linear>>,
    /// Until someone takes it.
    prediction: Option<Box<dyn PredictionLayer>>,
    pool: KvPool,
    kv_cache: B::KvCache,
    encoder: B::Encoder,
    workspace: Workspace<B>,
    /// If the host computes experts.
    host: Option<HostWork>,
    /// Tokens of the last step.
    step_tokens: usize,
    /// Rows of logits it left on the device.
    logit_rows: usize,
    /// Rows of the last sampling.
    sampled_rows: usize,
    /// Loads of layers with experts, in their order, if they are measured.
    routing: Vec<LayerRouting>,
    /// Where those are read.
    routes: HostRoutes,
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
    feed_forward: FeedForward<B>,
}

/// The attention of a layer.
enum Attention<B: Backend> {
    Grouped(GroupedAttention<B>),
    Latent(LatentAttention<B>),
}

/// The feed-forward block of a layer.
enum FeedForward<B: Backend> {
    Mlp(Mlp<B>),
    Experts(Experts<B>),
    HostExperts(Box<HostExperts<B>>),
}

/// The end of a block: `x += norm(linear(y))`, in most families without the norm.
struct OutputProjection<B: Backend> {
    linear: B::Linear,
    norm: Option<B::Vector>,
}

impl<B: Backend> LanguageModel for Decoder<B> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn kv(&mut self) -> &mut KvPool {
        &mut self.pool
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<(), ModelError> {
        (self.step_tokens, self.logit_rows) = (0, 0);
        self.check(batch)?;
        if batch.tokens() == 0 {
            return Ok(());
        }
        self.encode(batch)?;
        self.encoder.start()?;
        self.pool.finish_copies();
        (self.step_tokens, self.logit_rows) = (batch.tokens(), batch.logit_rows());
        Ok(())
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.resize(self.logit_rows * self.info.vocabulary, 0.0);
        if self.logit_rows > 0 {
            self.encoder.read(&self.workspace.logits, out)?;
        }
        Ok(())
    }

    fn read_hidden(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError> {
        let width = self.host_norm.len();
        out.resize(self.step_tokens * width, 0.0);
        if self.step_tokens > 0 {
            self.encoder.read(&self.workspace.hidden, out)?;
        }
        for state in out.chunks_exact_mut(width) {
            if let Some(rotation) = &self.rotation {
                rotation.apply(state);
            }
            rms_norm(state, &self.host_norm, self.rms_norm_eps);
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

    fn read_kv_blocks(&mut self, blocks: &[u32], out: &mut [u8]) -> Result<(), ModelError> {
        Ok(self.encoder.read_kv_blocks(&self.kv_cache, blocks, out)?)
    }

    fn write_kv_blocks(&mut self, blocks: &[u32], bytes: &[u8]) -> Result<(), ModelError> {
        Ok(self.encoder.write_kv_blocks(&mut self.kv_cache, blocks, bytes)?)
    }

    fn routing(&self) -> &[LayerRouting] {
        &self.routing
    }

    fn take_prediction_layer(&mut self) -> Option<Box<dyn PredictionLayer>> {
        self.prediction.take()
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
    fn encode(&mut self, batch: &StepBatch) -> Result<(), ModelError> {
        let Self { encoder, kv_cache, workspace: work, host, rms_norm_eps: eps, .. } = self;
        let mut routing = self.routing.iter_mut();
        encoder.begin(&batch.as_step());
        encoder.copy_kv_blocks(kv_cache, self.pool.pending_copies());
        // Angles come first: a device that uploads them would have to start what is recorded before.
        for (rope, angles) in self.ropes.iter().zip(&mut work.angles) {
            encoder.rope_angles(&rope.inv_freq, rope.scaling, angles);
        }
        encoder.embed(&self.embed_tokens, self.embedding_scale, &mut work.hidden);
        if let Some(rotation) = &self.rotation {
            encoder.hadamard(&mut work.hidden, rotation);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            layer.encode_attention(encoder, work, kv_cache, index, *eps);
            match &layer.feed_forward {
                FeedForward::Mlp(mlp) => mlp.encode(encoder, work, &layer.mlp_norm, *eps),
                FeedForward::Experts(experts) => {
                    experts.encode(encoder, work, &layer.mlp_norm, *eps);
                    if let (Some(measured), Some(ExpertWork { routes, .. })) = (routing.next(), &mut work.experts) {
                        encoder.read_routes(routes, &mut self.routes)?;
                        measured.load.add(&self.routes);
                    }
                }
                FeedForward::HostExperts(experts) => {
                    let host = host.as_mut().expect("a model with experts on the host has room for their rows");
                    experts.encode(encoder, work, host, &layer.mlp_norm, *eps, batch.tokens())?;
                    if let Some(measured) = routing.next() {
                        host.read_routes(&mut self.routes)?;
                        measured.load.add(&self.routes);
                    }
                }
            }
        }
        if batch.logit_rows() > 0 {
            encoder.select_logit_rows(&work.hidden, &mut work.last_hidden);
            if let Some(rotation) = &self.rotation {
                encoder.hadamard(&mut work.last_hidden, rotation);
            }
            let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
            let normed = Input::Normed { x: &work.last_hidden, weight: &self.norm, eps: *eps };
            encoder.linear(normed, head, &mut work.logits);
            if let Some(cap) = self.logit_cap {
                encoder.soft_cap(&mut work.logits, cap);
            }
        }
        Ok(())
    }
}

impl<B: Backend> Layer<B> {
    /// Adds the attention of the normalised hidden states to them; keys and values are cached as those of layer `index`.
    fn encode_attention(
        &self,
        encoder: &mut B::Encoder,
        work: &mut Workspace<B>,
        kv_cache: &mut B::KvCache,
        index: usize,
        eps: f32,
    ) {
        match &self.self_attn {
            Attention::Grouped(attention) => attention.encode(encoder, work, &self.attn_norm, kv_cache, index, eps),
            Attention::Latent(attention) => attention.encode(encoder, work, &self.attn_norm, kv_cache, index, eps),
        }
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
