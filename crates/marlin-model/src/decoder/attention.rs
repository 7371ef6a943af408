//! Attention with grouped queries.

use marlin_kernels::{AttentionShape, Backend, Encoder, Input, QkNorm};

use super::OutputProjection;
use super::load::Loader;
use super::workspace::Workspace;
use crate::ModelError;
use crate::spec::{GroupedSpec, LayerSpec};

/// Attention with grouped queries; Q, K and V are one matrix.
pub(super) struct GroupedAttention<B: Backend> {
    shape: AttentionShape,
    /// Index into the decoder's ropes.
    rope: usize,
    qkv_proj: B::Linear,
    qk_norm: Option<HeadNorms<B>>,
    sinks: Option<B::Vector>,
    o_proj: OutputProjection<B>,
}

/// Norms over each head of Q and K.
struct HeadNorms<B: Backend> {
    q_norm: B::Vector,
    k_norm: B::Vector,
}

impl<B: Backend> GroupedAttention<B> {
    /// Adds the attention of the normalised `hidden` to it.
    pub(super) fn encode(
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
        encoder.linear(normed, &self.qkv_proj, &mut work.queries);
        encoder.rope_attention(
            &mut work.queries,
            &self.shape,
            norm,
            &work.angles[self.rope],
            self.sinks.as_ref(),
            kv_cache,
            layer,
            &mut work.attention,
        );
        self.o_proj.encode(encoder, &work.attention, &mut work.block_output, &mut work.hidden, eps);
    }
}

impl<B: Backend> Loader<'_, B> {
    pub(super) fn grouped_attention(
        &self,
        block: &str,
        spec: &GroupedSpec,
        layer: &LayerSpec,
        out_norm: Option<B::Vector>,
    ) -> Result<GroupedAttention<B>, ModelError> {
        let hidden = self.spec.hidden_size;
        let norm = |name: &str| self.norm(&format!("{block}.{name}"), spec.head_dim);
        let head_norms = || Ok::<_, ModelError>(HeadNorms { q_norm: norm("q_norm")?, k_norm: norm("k_norm")? });
        let sinks =
            || Ok::<_, ModelError>(self.backend.load_vector(&self.vector(&format!("{block}.sinks"), spec.heads)?)?);
        let (q, kv) = (spec.q_width(), spec.kv_width());
        Ok(GroupedAttention {
            shape: spec.shape(layer.window),
            rope: layer.rope,
            qkv_proj: if spec.is_fused {
                self.linear(block, &[("qkv_proj", q + 2 * kv)], hidden, spec.qkv_bias)?
            } else {
                self.linear(block, &[("q_proj", q), ("k_proj", kv), ("v_proj", kv)], hidden, spec.qkv_bias)?
            },
            qk_norm: spec.qk_norm.then(head_norms).transpose()?,
            sinks: spec.sinks.then(sinks).transpose()?,
            o_proj: OutputProjection {
                linear: self.linear(block, &[("o_proj", hidden)], q, spec.o_bias)?,
                norm: out_norm,
            },
        })
    }
}
