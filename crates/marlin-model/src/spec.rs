//! A decoder in the terms of its shared blocks: what a family makes of its config.

use std::collections::BTreeSet;

use marlin_kernels::{
    Activation, AttentionShape, Hadamard, KvLayer, KvLayout, LatentShape, RopeLayout, Routing, Values,
};

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
    /// Epsilon of every norm, but for those inside latent attention.
    pub(crate) rms_norm_eps: f32,
    /// What is added to the weights of every norm as they are stored.
    pub(crate) norm_offset: f32,
    /// The norms of a layer.
    pub(crate) norms: BlockNorms,
    /// The residual stream is rotated by this between embedding and final norm. Checkpoints say so, no family does.
    pub(crate) rotation: Option<Hadamard>,
    /// Factor on embeddings.
    pub(crate) embedding_scale: f32,
    /// Logits are squeezed into ± this.
    pub(crate) logit_cap: Option<f32>,
    /// The head is the embedding, transposed.
    pub(crate) tie_word_embeddings: bool,
    /// Kinds of rotary embedding.
    pub(crate) ropes: Vec<Rope>,
    /// Attention, but for what differs from layer to layer.
    pub(crate) attention: AttentionSpec,
    /// The feed-forward block of layers without experts.
    pub(crate) mlp: MlpSpec,
    /// The feed-forward block of layers with experts.
    pub(crate) experts: Option<ExpertsSpec>,
    /// What differs from layer to layer.
    pub(crate) layers: Vec<LayerSpec>,
    /// Layers that a checkpoint may hold behind the decoder's, numbered on, which predict further tokens (multi-token prediction, DeepSeek-V3,
    /// section 2.2). They are for speculation: the decoder itself does not run them.
    pub(crate) prediction_layers: usize,
    /// Layers whose routed experts the host computes. Loading chooses them, no family does.
    pub(crate) host_layers: BTreeSet<usize>,
}

/// What one layer has of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerSpec {
    /// Attention window.
    pub(crate) window: Option<usize>,
    /// Index into [`DecoderSpec::ropes`].
    pub(crate) rope: usize,
    /// Its feed-forward block is [`DecoderSpec::experts`], not [`DecoderSpec::mlp`].
    pub(crate) has_experts: bool,
}

/// Names of a layer's norms. The one before attention is `input_layernorm` everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockNorms {
    /// Before the feed-forward block.
    pub(crate) mlp: &'static str,
    /// Of what attention and the MLP give, before it is added to the residual stream; most families have none. Families with experts have none.
    pub(crate) outputs: Option<[&'static str; 2]>,
}

impl BlockNorms {
    /// Before blocks only.
    pub(crate) const BEFORE: Self = Self { mlp: "post_attention_layernorm", outputs: None };
}

/// The attention of a model.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AttentionSpec {
    Grouped(GroupedSpec),
    Latent(LatentSpec),
}

/// Attention with grouped queries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupedSpec {
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads.
    pub(crate) kv_heads: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
    /// Factor on the scores.
    pub(crate) scale: f32,
    /// Which dimensions are rotated together.
    pub(crate) rope: RopeLayout,
    /// `q_proj`, `k_proj` and `v_proj` are stored as one tensor, `qkv_proj`.
    pub(crate) is_fused: bool,
    /// `q_proj`, `k_proj` and `v_proj` have biases.
    pub(crate) qkv_bias: bool,
    /// `o_proj` has a bias.
    pub(crate) o_bias: bool,
    /// Q and K heads are normalised before rotary embedding.
    pub(crate) qk_norm: bool,
    /// Heads have a score, `sinks`, that joins the softmax's denominator.
    pub(crate) sinks: bool,
}

/// Multi-head latent attention (DeepSeek-V2, section 2.1).
#[derive(Debug, Clone, Copy)]
pub(crate) struct LatentSpec {
    /// Query heads.
    pub(crate) heads: usize,
    /// Width of a head's part of queries and keys that is not rotated.
    pub(crate) nope_dim: usize,
    /// Width of the rotated part.
    pub(crate) rope_dim: usize,
    /// Width of a value head.
    pub(crate) value_dim: usize,
    /// Width of the latent vector that keys and values are made of.
    pub(crate) rank: usize,
    /// Width of the latent vector that queries are made of, if they are made of one.
    pub(crate) q_rank: Option<usize>,
    /// Factor on the scores.
    pub(crate) scale: f32,
    /// Which dimensions are rotated together.
    pub(crate) rope: RopeLayout,
    /// `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have biases.
    pub(crate) bias: bool,
}

/// A gated MLP: `down(act(gate(x)) ⊙ up(x))`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MlpSpec {
    /// Width between.
    pub(crate) intermediate_size: usize,
    /// The gate's non-linearity.
    pub(crate) activation: Activation,
    /// `gate_proj` and `up_proj` are stored as one tensor, `gate_up_proj`.
    pub(crate) is_fused: bool,
    /// `gate_proj`, `up_proj` and `down_proj` have biases.
    pub(crate) bias: bool,
    /// What `down_proj` is given is rotated by this. Checkpoints say so, no family does.
    pub(crate) rotation: Option<Hadamard>,
}

/// A mixture of gated MLPs, the experts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExpertsSpec {
    /// How a token's experts are chosen, and the shared experts that are among them.
    pub(crate) routing: Routing,
    /// Width inside an expert.
    pub(crate) width: usize,
    /// Their gates' non-linearity.
    pub(crate) activation: Activation,
    /// Shared experts that are wider than the others: an MLP beside them.
    pub(crate) beside: Option<MlpSpec>,
    /// Corrections are added to scores where experts are chosen.
    pub(crate) correction: bool,
    /// How they are stored.
    pub(crate) storage: ExpertStorage,
}

/// How checkpoints of a family store experts and their router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpertStorage {
    /// `mlp.experts.N.gate_proj` and so on, or `mlp.experts.gate_up_proj` `[E, 2 · width, hidden]` and `mlp.experts.down_proj`.
    Usual,
    /// `block_sparse_moe.experts.N.w1` (gate), `w3` (up) and `w2` (down), or fused as usual.
    Mixtral,
    /// All experts in one tensor, gate and up in turn, with biases: in MXFP4, or transposed in plain floats. The router has a bias.
    GptOss,
}

impl GroupedSpec {
    /// Llama's attention, from which a family goes on. Checks that heads can be grouped and rotated.
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
        Ok(Self {
            heads,
            kv_heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5) as f32,
            rope: RopeLayout::HalfSplit,
            is_fused: false,
            qkv_bias: false,
            o_bias: false,
            qk_norm: false,
            sinks: false,
        })
    }

    /// The kernels' view of it.
    pub(crate) fn shape(&self, window: Option<usize>) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            values: Values::Cached,
            scale: self.scale,
            window,
            rope: self.rope,
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

impl LatentSpec {
    /// The kernels' view of what comes before attention.
    pub(crate) fn latent_shape(&self) -> LatentShape {
        let Self { heads, nope_dim, rope_dim, rank, rope, .. } = *self;
        LatentShape { heads, nope_dim, rope_dim, rank, rope }
    }

    /// The kernels' view of attention: of all heads over one, whose values are the latent vectors.
    pub(crate) fn shape(&self, window: Option<usize>) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv_heads: 1,
            head_dim: self.latent_shape().key_dim(),
            values: Values::OfKeys(self.rank),
            scale: self.scale,
            window,
            rope: self.rope,
        }
    }

    /// Width of all query heads.
    pub(crate) fn q_width(&self) -> usize {
        self.heads * (self.nope_dim + self.rope_dim)
    }

    /// Width of all query heads when they have been brought into the space of latent vectors.
    pub(crate) fn latent_q_width(&self) -> usize {
        self.heads * self.latent_shape().key_dim()
    }

    /// Width of all value heads.
    pub(crate) fn v_width(&self) -> usize {
        self.heads * self.value_dim
    }
}

impl ExpertsSpec {
    /// The same with shared experts as an MLP beside the routed ones.
    pub(crate) fn with_shared_beside(self) -> Self {
        let Self { routing, width, activation, .. } = self;
        let intermediate_size = routing.shared * width;
        let mlp = MlpSpec { intermediate_size, activation, is_fused: false, bias: false, rotation: None };
        let beside = self.beside.or((routing.shared > 0).then_some(mlp));
        Self { routing: Routing { shared: 0, ..routing }, beside, ..self }
    }
}

impl DecoderSpec {
    /// Whether any layer has a dense MLP.
    pub(crate) fn has_mlps(&self) -> bool {
        self.layers.iter().any(|layer| !layer.has_experts)
    }

    /// Layers with experts.
    pub(crate) fn expert_layers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.layers.len()).filter(|&layer| self.experts.is_some() && self.layers[layer].has_experts)
    }

    /// The experts of layers that the device computes itself, if there are any.
    pub(crate) fn device_experts(&self) -> Option<ExpertsSpec> {
        self.experts.filter(|_| self.expert_layers().any(|layer| !self.host_layers.contains(&layer)))
    }

    /// The experts of layers that the host computes, if there are any.
    pub(crate) fn host_experts(&self) -> Option<ExpertsSpec> {
        self.experts.filter(|_| !self.host_layers.is_empty()).map(ExpertsSpec::with_shared_beside)
    }

    /// The MLP of shared experts beside routed ones, if any layer has one.
    pub(crate) fn shared_mlp(&self) -> Option<MlpSpec> {
        self.host_experts().or(self.device_experts())?.beside
    }

    /// How the KV cache is laid out.
    pub(crate) fn kv_layout(&self) -> KvLayout {
        let (heads, key_dim, value_dim) = match self.attention {
            AttentionSpec::Grouped(spec) => (spec.kv_heads, spec.head_dim, spec.head_dim),
            AttentionSpec::Latent(spec) => (1, spec.latent_shape().key_dim(), 0),
        };
        let layer = |layer: &LayerSpec| KvLayer { heads, key_dim, value_dim, window: layer.window };
        KvLayout { block_tokens: BLOCK_TOKENS, layers: self.layers.iter().map(layer).collect() }
    }

    /// The widest rows that any linear on the device multiplies.
    pub(crate) fn widest_input(&self) -> usize {
        let attention = match self.attention {
            AttentionSpec::Grouped(spec) => spec.q_width(),
            AttentionSpec::Latent(spec) => spec.q_width().max(spec.heads * spec.rank).max(spec.v_width()),
        };
        let experts = self.device_experts().map_or(0, |experts| experts.width);
        let shared = self.shared_mlp().map_or(0, |mlp| mlp.intermediate_size);
        self.hidden_size.max(attention).max(self.mlp.intermediate_size).max(experts).max(shared)
    }

    /// The first of the layers that predict further tokens, by itself: a decoder of one layer, which is of the kind of the last one, with a
    /// residual stream of its own that nothing rotates. `None` if there is none.
    pub(crate) fn prediction(&self) -> Option<Self> {
        let last = *self.layers.last().filter(|_| self.prediction_layers > 0)?;
        Some(Self {
            rotation: None,
            mlp: MlpSpec { rotation: None, ..self.mlp },
            layers: vec![last],
            prediction_layers: 0,
            host_layers: BTreeSet::new(),
            ..self.clone()
        })
    }

    /// How many weights a token is multiplied with in a layer.
    pub(crate) fn weights_of(&self, layer: &LayerSpec) -> usize {
        let hidden = self.hidden_size;
        let attention = match self.attention {
            AttentionSpec::Grouped(spec) => 2 * hidden * (spec.q_width() + spec.kv_width()),
            AttentionSpec::Latent(spec) => {
                let queries = spec.q_rank.map_or(hidden * spec.q_width(), |rank| rank * (hidden + spec.q_width()));
                let heads = spec.heads * spec.rank * (spec.nope_dim + spec.value_dim);
                queries + hidden * spec.latent_shape().key_dim() + heads + spec.v_width() * hidden
            }
        };
        let width = match self.experts.filter(|_| layer.has_experts) {
            Some(experts) => {
                experts.routing.slots() * experts.width + experts.beside.map_or(0, |mlp| mlp.intermediate_size)
            }
            None => self.mlp.intermediate_size,
        };
        attention + 3 * hidden * width
    }

    /// Whether a tensor belongs to a layer that predicts further tokens.
    pub(crate) fn is_of_prediction(&self, tensor: &str) -> bool {
        let layers = self.layers.len();
        layer_of(tensor).is_some_and(|layer| (layers..layers + self.prediction_layers).contains(&layer))
    }
}

/// The layer that a tensor belongs to by its name, if it belongs to one.
pub(crate) fn layer_of(tensor: &str) -> Option<usize> {
    tensor.strip_prefix("model.layers.")?.split_once('.')?.0.parse().ok()
}
