//! A decoder in the terms of its shared blocks: what a family makes of its config.

use marlin_kernels::{Activation, AttentionShape, KvLayer, KvLayout};

use crate::ConfigError;
use crate::config::Size;
use crate::rope::Rope;

/// Tokens of a KV block: small enough that a short sequence wastes little, large enough for long runs of memory.
const BLOCK_TOKENS: usize = 32;

/// A decoder-only transformer with pre-normalised residual blocks.
#[derive(Debug, Clone)]
pub(crate) struct DecoderSpec {
    /// Rows of the embedding.
    pub(crate) vocab_size: usize,
    /// Width of the residual stream.
    pub(crate) hidden_size: usize,
    /// The longest context.
    pub(crate) max_position_embeddings: usize,
    /// Epsilon of every norm.
    pub(crate) rms_norm_eps: f32,
    /// What is added to the weights of every norm as they are stored.
    pub(crate) norm_offset: f32,
    /// What attention and MLP give is normalised before it is added to the residual stream.
    pub(crate) block_output_norms: bool,
    /// Factor on embeddings.
    pub(crate) embedding_scale: f32,
    /// Logits are squeezed into ± this.
    pub(crate) logit_cap: Option<f32>,
    /// The head is the embedding, transposed.
    pub(crate) tie_word_embeddings: bool,
    /// Q, K and V are stored as one tensor, and so are gate and up.
    pub(crate) is_fused: bool,
    /// Kinds of rotary embedding.
    pub(crate) ropes: Vec<Rope>,
    /// Attention, but for what differs from layer to layer.
    pub(crate) attention: AttentionSpec,
    /// The feed-forward block of every layer.
    pub(crate) mlp: MlpSpec,
    /// What differs from layer to layer.
    pub(crate) layers: Vec<LayerSpec>,
}

/// What one layer has of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerSpec {
    /// Attention window.
    pub(crate) window: Option<usize>,
    /// Index into [`DecoderSpec::ropes`].
    pub(crate) rope: usize,
}

/// Attention with grouped queries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionSpec {
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads.
    pub(crate) kv_heads: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
    /// Factor on the scores.
    pub(crate) scale: f32,
    /// `q_proj`, `k_proj` and `v_proj` have biases.
    pub(crate) qkv_bias: bool,
    /// `o_proj` has a bias.
    pub(crate) o_bias: bool,
    /// Q and K heads are normalised before rotary embedding.
    pub(crate) qk_norm: bool,
}

/// A gated MLP: `down(act(gate(x)) ⊙ up(x))`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MlpSpec {
    /// Width between.
    pub(crate) intermediate_size: usize,
    /// The gate's non-linearity.
    pub(crate) activation: Activation,
    /// `gate_proj`, `up_proj` and `down_proj` have biases.
    pub(crate) bias: bool,
}

impl AttentionSpec {
    /// Checks that heads can be grouped and rotated.
    pub(crate) fn new(heads: Size, kv_heads: Size, head_dim: usize) -> Result<Self, ConfigError> {
        let (heads, kv_heads) = (heads.get(), kv_heads.get());
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("must divide num_attention_heads = {heads}, found {kv_heads}");
            return Err(ConfigError::new("num_key_value_heads", problem));
        }
        if !head_dim.is_multiple_of(2) {
            let problem = format!("must be even for rotary embedding, found {head_dim}");
            return Err(ConfigError::new("head_dim", problem));
        }
        let scale = (head_dim as f64).powf(-0.5) as f32;
        Ok(Self { heads, kv_heads, head_dim, scale, qkv_bias: false, o_bias: false, qk_norm: false })
    }

    /// The kernels' view of it.
    pub(crate) fn shape(&self, window: Option<usize>) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.scale,
            window,
        }
    }

    /// Width of all query heads.
    pub(crate) fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads, and of all value heads.
    pub(crate) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

impl DecoderSpec {
    /// How the KV cache is laid out.
    pub(crate) fn kv_layout(&self) -> KvLayout {
        let AttentionSpec { kv_heads, head_dim, .. } = self.attention;
        let layer = |layer: &LayerSpec| KvLayer {
            heads: kv_heads,
            key_dim: head_dim,
            value_dim: head_dim,
            window: layer.window,
        };
        KvLayout { block_tokens: BLOCK_TOKENS, layers: self.layers.iter().map(layer).collect() }
    }

    /// The widest input of any linear.
    pub(crate) fn widest_input(&self) -> usize {
        self.hidden_size.max(self.attention.q_width()).max(self.mlp.intermediate_size)
    }
}
