//! Rotations of activations that leave what a model computes as it is: QuaRot (Ashkboos et al., arXiv:2404.00456).
//!
//! Activations have outliers in few dimensions, and rows of weights have them. A Hadamard matrix spreads them over all. With H·H = 1
//! between any two linears, `W · x = (W·H) · (H·x)`: the second factor is made by the linear before, or while the model runs.
//!
//! - The residual stream. A norm without its weights, which move into the matrices behind it, gives rotated values for rotated ones. So all
//!   that reads it takes `W · diag(norm) · H`, and all that is added to it comes from `H · W`. The decoder rotates it after the embedding and
//!   back before the final norm, so that embedding and head stay what they are. What is normalised before it is added would not be
//!   rotated: families with such norms keep their stream.
//! - Values. Attention sums them as they are: rows of `v_proj` and columns of `o_proj` are rotated, head by head.
//! - MLPs. `down_proj` is rotated along its columns, and the decoder rotates what it is given.

use marlin_checkpoint::{Checkpoint, Rotations};
use marlin_kernels::{Activation, Hadamard, KernelError};

use crate::families;
use crate::spec::{AttentionSpec, DecoderSpec};
use crate::{ConfigError, ModelError};

/// The smallest block that is worth it.
const SMALLEST_BLOCK: usize = 16;

/// What of a model may be rotated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RotationParts {
    /// The residual stream; the decoder rotates it twice a step.
    pub hidden: bool,
    /// Values of attention; costs nothing when the model runs.
    pub values: bool,
    /// What is between the linears of MLPs; the decoder rotates it in each layer.
    pub mlp: bool,
}

impl RotationParts {
    /// All of it.
    pub const ALL: Self = Self { hidden: true, values: true, mlp: true };

    /// What serves rounding most where it is measured (`docs/calibration.md`).
    pub const USUAL: Self = Self { mlp: false, ..Self::ALL };
}

/// The blocks that parts of a model are rotated in; `None` for one that is not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RotationBlocks {
    /// Of the residual stream.
    pub hidden: Option<usize>,
    /// Of values of attention.
    pub values: Option<usize>,
    /// Of what is between the linears of MLPs.
    pub mlp: Option<usize>,
}

/// How the weights of a model become those of its rotated one.
#[derive(Debug, Clone)]
pub struct Rotation {
    spec: DecoderSpec,
    hidden: Option<Hadamard>,
    values: Option<Hadamard>,
    mlp: Option<Hadamard>,
}

/// What becomes of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum TensorRotation {
    /// All weights of a norm become this: matrices have taken them over.
    Norm(f32),
    /// A matrix, or a bias.
    Weights(WeightRotation),
}

/// What becomes of a matrix `[rows, cols]`, or of a bias of so many rows, in this order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WeightRotation {
    /// Columns are multiplied by the weights of this norm.
    pub norm: Option<NormWeights>,
    /// Each row is rotated.
    pub columns: Option<Hadamard>,
    /// Each column is rotated within some rows.
    pub rows: Option<RowRotation>,
}

/// A rotation down the columns: rows come in runs of so many that stay and so many that are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRotation {
    /// Of blocks of rows.
    pub rotation: Hadamard,
    /// Rows at the beginning of a run that stay.
    pub kept: usize,
    /// Rows after them that are rotated, whole blocks.
    pub rotated: usize,
}

/// The weights of a norm: what is stored, and what is added to it.
#[derive(Debug, Clone, PartialEq)]
pub struct NormWeights {
    /// The vector's name.
    pub tensor: String,
    /// Added to each.
    pub offset: f32,
}

impl Rotation {
    /// Rotates those parts of a model that have large enough blocks, in the largest that there are.
    ///
    /// # Errors
    /// The architecture is not supported, or config.json cannot be used.
    pub fn new(checkpoint: &Checkpoint, parts: RotationParts) -> Result<Self, ModelError> {
        let (_, spec) = families::spec(checkpoint)?;
        let largest = |width| Some(Hadamard::largest(width)).filter(|found| found.block() >= SMALLEST_BLOCK);
        // MLX has a matrix for each head instead of `kv_b_proj`.
        let has_value_rows = !checkpoint.contains("model.layers.0.self_attn.embed_q.0.weight");
        let value_dim = match spec.attention {
            AttentionSpec::Grouped(attention) => attention.head_dim,
            AttentionSpec::Latent(attention) => attention.value_dim,
        };
        Ok(Self {
            hidden: largest(spec.hidden_size).filter(|_| parts.hidden && spec.norms.outputs.is_none()),
            values: largest(value_dim).filter(|_| parts.values && has_value_rows),
            mlp: largest(spec.mlp.intermediate_size).filter(|_| parts.mlp && spec.has_mlps()),
            spec,
        })
    }

    /// What is rotated.
    pub fn blocks(&self) -> RotationBlocks {
        let [hidden, values, mlp] =
            [self.hidden, self.values, self.mlp].map(|rotation| rotation.map(|rotation| rotation.block()));
        RotationBlocks { hidden, values, mlp }
    }

    /// What the decoder has to rotate.
    pub fn of_decoder(&self) -> Rotations {
        let RotationBlocks { hidden, mlp, .. } = self.blocks();
        Rotations { hidden, mlp }
    }

    /// What becomes of a tensor; `None` if it stays as it is. Matrices of experts go by the names that single ones have.
    pub fn of(&self, tensor: &str) -> Option<TensorRotation> {
        let (layer, path) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
        // Layers for multi-token prediction have a stream of their own.
        let layer = layer.parse().ok().filter(|&layer: &usize| layer < self.spec.layers.len())?;
        let (block, path) = path.split_once('.')?;
        let rotation = match block {
            "self_attn" => self.of_attention(layer, path),
            "input_layernorm" => return self.of_norm(),
            norm if norm == self.spec.norms.mlp => return self.of_norm(),
            block => self.of_feed_forward(layer, block, path),
        };
        let is_changed = rotation.norm.is_some() || rotation.columns.is_some() || rotation.rows.is_some();
        is_changed.then_some(TensorRotation::Weights(rotation))
    }

    fn of_norm(&self) -> Option<TensorRotation> {
        self.hidden.map(|_| TensorRotation::Norm(1.0 - self.spec.norm_offset))
    }

    fn of_attention(&self, layer: usize, path: &str) -> WeightRotation {
        match path {
            "v_proj.weight" | "qkv_proj.weight" | "v_proj.bias" | "qkv_proj.bias" | "kv_b_proj.weight" => {
                WeightRotation { rows: self.value_rows(path), ..self.reads(layer, "self_attn", path) }
            }
            "o_proj.weight" => self.writes(self.values),
            "o_proj.bias" => self.writes(None),
            _ => self.reads(layer, "self_attn", path),
        }
    }

    fn of_feed_forward(&self, layer: usize, block: &str, path: &str) -> WeightRotation {
        let is_feed_forward = FEED_FORWARD.contains(&block);
        match path {
            "down_proj.weight" if is_feed_forward && !self.spec.is_mixture(layer) => self.writes(self.mlp),
            "down_proj.bias" if is_feed_forward && !self.spec.is_mixture(layer) => self.writes(None),
            // A row for each expert.
            "experts.down_proj_bias" | "experts.down_proj.bias" if is_feed_forward => {
                WeightRotation { columns: self.hidden, ..WeightRotation::default() }
            }
            _ => match expert_module(path).filter(|_| is_feed_forward && self.spec.is_mixture(layer)) {
                Some("down_proj" | "w2") => self.writes(None),
                _ => self.reads(layer, block, path),
            },
        }
    }

    /// Of a matrix that is multiplied with the normalised stream; nothing, if it is not.
    fn reads(&self, layer: usize, block: &str, path: &str) -> WeightRotation {
        match self.spec.input_norm(layer, block, path).filter(|_| self.hidden.is_some()) {
            Some(norm) => WeightRotation { norm: Some(norm), columns: self.hidden, rows: None },
            None => WeightRotation::default(),
        }
    }

    /// Of a matrix, or its bias, whose product is added to the stream.
    fn writes(&self, columns: Option<Hadamard>) -> WeightRotation {
        let rows = self.hidden.map(|rotation| RowRotation { rotation, kept: 0, rotated: self.spec.hidden_size });
        WeightRotation { norm: None, columns, rows }
    }

    /// The rows of values in a matrix or bias that makes them.
    fn value_rows(&self, path: &str) -> Option<RowRotation> {
        let (kept, rotated) = match self.spec.attention {
            AttentionSpec::Grouped(spec) if path.starts_with("qkv_proj") => {
                (spec.q_width() + spec.kv_width(), spec.kv_width())
            }
            AttentionSpec::Grouped(spec) => (0, spec.kv_width()),
            // Head by head.
            AttentionSpec::Latent(spec) => (spec.nope_dim, spec.value_dim),
        };
        Some(RowRotation { rotation: self.values?, kept, rotated })
    }
}

/// The modules that a layer's feed-forward block goes by.
const FEED_FORWARD: [&str; 2] = ["mlp", "block_sparse_moe"];

/// The last module of a matrix of an expert, shared ones among them.
fn expert_module(path: &str) -> Option<&str> {
    let module = path.strip_suffix(".weight").filter(|module| module.contains("expert"))?;
    Some(module.rsplit_once('.')?.1)
}

/// Which norm's output each matrix of a model is multiplied with.
#[derive(Debug, Clone)]
pub struct InputNorms(DecoderSpec);

impl InputNorms {
    /// # Errors
    /// The architecture is not supported, or config.json cannot be used.
    pub fn new(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        Ok(Self(families::spec(checkpoint)?.1))
    }

    /// That of a matrix; `None` if its input is something else. Matrices of experts go by the names that single ones have.
    pub fn of(&self, tensor: &str) -> Option<NormWeights> {
        let (layer, path) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
        let layer = layer.parse().ok().filter(|&layer: &usize| layer < self.0.layers.len())?;
        let (block, path) = path.split_once('.')?;
        self.0.input_norm(layer, block, path)
    }

    /// Whether what the down projections of a layer's MLPs, or of its experts, are given is proportional to what the up projections give.
    pub fn is_proportional_to_up(&self, layer: usize) -> bool {
        let experts = self.0.experts.filter(|_| self.0.is_mixture(layer));
        let activation = experts.map_or(self.0.mlp.activation, |experts| experts.activation);
        match activation {
            Activation::Silu | Activation::GeluTanh => true,
            Activation::ClampedSwiglu => false,
        }
    }
}

impl DecoderSpec {
    /// The norm whose output a matrix of a layer is multiplied with.
    fn input_norm(&self, layer: usize, block: &str, path: &str) -> Option<NormWeights> {
        let reads_stream = match block {
            "self_attn" => matches!(
                path,
                "q_proj.weight"
                    | "k_proj.weight"
                    | "v_proj.weight"
                    | "qkv_proj.weight"
                    | "q_a_proj.weight"
                    | "kv_a_proj_with_mqa.weight"
            ),
            block if FEED_FORWARD.contains(&block) && self.is_mixture(layer) => {
                let of_expert = expert_module(path);
                matches!(path, "gate.weight" | "router.weight")
                    || matches!(of_expert, Some("gate_proj" | "up_proj" | "w1" | "w3"))
            }
            block if FEED_FORWARD.contains(&block) => {
                matches!(path, "gate_proj.weight" | "up_proj.weight" | "gate_up_proj.weight")
            }
            _ => false,
        };
        let norm = if block == "self_attn" { "input_layernorm" } else { self.norms.mlp };
        reads_stream
            .then(|| NormWeights { tensor: format!("model.layers.{layer}.{norm}.weight"), offset: self.norm_offset })
    }

    /// Whether a layer is a mixture of experts.
    fn is_mixture(&self, layer: usize) -> bool {
        self.layers[layer].has_experts && self.experts.is_some()
    }

    /// The decoder of weights that expect these rotations.
    pub(crate) fn rotated(mut self, rotations: Rotations) -> Result<Self, ConfigError> {
        if let Some(block) = rotations.hidden {
            let error = |problem| ConfigError::new("quantization_config.rotations.hidden", problem);
            if self.norms.outputs.is_some() {
                return Err(error(
                    "must not be there: this family normalises what is added to the residual stream".into(),
                ));
            }
            self.rotation = Some(rotation(block, self.hidden_size, "hidden_size").map_err(error)?);
        }
        if let Some(block) = rotations.mlp {
            let error = |problem| ConfigError::new("quantization_config.rotations.mlp", problem);
            if !self.has_mlps() {
                return Err(error("must not be there: all layers have experts, whose inputs are not rotated".into()));
            }
            self.mlp.rotation = Some(rotation(block, self.mlp.intermediate_size, "intermediate_size").map_err(error)?);
        }
        Ok(self)
    }
}

/// The rotation of rows of so many values by blocks, or why there is none.
fn rotation(block: usize, width: usize, name: &str) -> Result<Hadamard, String> {
    let found = Hadamard::new(block).map_err(|error: KernelError| error.to_string())?;
    if width.is_multiple_of(block) { Ok(found) } else { Err(format!("must divide {name} = {width}, found {block}")) }
}
