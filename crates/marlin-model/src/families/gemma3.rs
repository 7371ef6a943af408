//! Gemma 3 (text): norms on what goes into a block and on what comes out of it, a scaled embedding, and mostly layers with a
//! sliding window, which have a rotary base of their own.

use half::{bf16, f16};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::base::BaseConfig;
use super::layer_type::{self, LayerType};
use crate::ConfigError;
use crate::config::{self, HiddenAct, Positive, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, BlockNorms, DecoderSpec, GroupedSpec, LayerSpec};

/// Defaults of `Gemma3TextConfig`, for what config.json leaves out.
const HEAD_DIM: usize = 256;
const QUERY_PRE_ATTN_SCALAR: f64 = 256.0;
const WINDOW: i64 = 4096;
const WINDOW_PATTERN: i64 = 6;
const FULL_THETA: f64 = 1_000_000.0;
const SLIDING_THETA: f64 = 10_000.0;

/// What `Gemma3TextConfig` of `transformers` has of its own.
#[derive(Debug, Deserialize)]
struct Gemma3Config {
    hidden_activation: Option<HiddenAct>,
    query_pre_attn_scalar: Option<Positive>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default = "default_window")]
    sliding_window: Option<Size>,
    /// One layer in this many has no window; `layer_types` wins.
    sliding_window_pattern: Option<Size>,
    layer_types: Option<Vec<LayerType>>,
    final_logit_softcapping: Option<Positive>,
    attn_logit_softcapping: Option<Positive>,
    use_bidirectional_attention: Option<bool>,
    rope_parameters: Option<LayerRopes>,
    rope_scaling: Option<Map<String, Value>>,
    rope_theta: Option<Positive>,
    rope_local_base_freq: Option<Positive>,
    dtype: Option<Dtype>,
    /// The older name of `dtype`.
    torch_dtype: Option<Dtype>,
}

/// Rope of each kind of layer, in the spelling of `transformers` 5.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerRopes {
    full_attention: Option<Map<String, Value>>,
    sliding_attention: Option<Map<String, Value>>,
}

/// The type that a checkpoint's weights were stored in.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    Bfloat16,
    Float16,
    Float32,
}

fn default_window() -> Option<Size> {
    Size::try_from(WINDOW).ok()
}

pub(super) fn spec(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let own: Gemma3Config = config::parse(config)?;
    base.require_kv_heads()?;
    own.check_supported()?;
    let head_dim = base.head_dim_or(HEAD_DIM);
    let ropes = own.ropes(head_dim, base.context())?;
    let scalar = own.query_pre_attn_scalar.map_or(QUERY_PRE_ATTN_SCALAR, Positive::get);
    let attention = GroupedSpec {
        scale: scalar.powf(-0.5) as f32,
        qkv_bias: own.attention_bias,
        o_bias: own.attention_bias,
        qk_norm: true,
        ..base.attention(head_dim)?
    };
    let mut spec = base.decoder(AttentionSpec::Grouped(attention), ropes, own.layers(base.layers())?);
    spec.mlp.activation = own.hidden_activation.unwrap_or(HiddenAct::GeluTanh).into();
    Ok(DecoderSpec {
        norm_offset: 1.0,
        norms: NORMS,
        embedding_scale: own.embedding_scale(base.hidden_size()),
        logit_cap: own.final_logit_softcapping.map(|cap| cap.get() as f32),
        tie_word_embeddings: base.tie_word_embeddings().unwrap_or(true),
        ..spec
    })
}

/// Both blocks have a norm on either side.
const NORMS: BlockNorms = BlockNorms {
    mlp: "pre_feedforward_layernorm",
    outputs: Some(["post_attention_layernorm", "post_feedforward_layernorm"]),
};

/// Layers with a window take the first rope, those without the second one.
const SLIDING_ROPE: usize = 0;
const FULL_ROPE: usize = 1;

impl Gemma3Config {
    fn check_supported(&self) -> Result<(), ConfigError> {
        if self.attn_logit_softcapping.is_some() {
            let problem = "capped attention scores are not supported; no Gemma 3 model has them, so it must be null";
            return Err(ConfigError::new("attn_logit_softcapping", problem));
        }
        if self.use_bidirectional_attention == Some(true) {
            let problem = "attention to later tokens (an embedding model's) is not supported; must be false";
            return Err(ConfigError::new("use_bidirectional_attention", problem));
        }
        Ok(())
    }

    fn layers(&self, layers: usize) -> Result<Vec<LayerSpec>, ConfigError> {
        let pattern = self.sliding_window_pattern.map_or(WINDOW_PATTERN as usize, Size::get);
        let by_pattern = |layer: usize| match (layer + 1).is_multiple_of(pattern) {
            true => LayerType::FullAttention,
            false => LayerType::SlidingAttention,
        };
        let layer_types = self.layer_types.clone().unwrap_or_else(|| (0..layers).map(by_pattern).collect());
        let windows = layer_type::windows(&layer_types, layers, self.sliding_window.map(Size::get), "sliding_window")?;
        let rope = |window: Option<usize>| if window.is_some() { SLIDING_ROPE } else { FULL_ROPE };
        Ok(windows.into_iter().map(|window| LayerSpec { window, rope: rope(window), has_experts: false }).collect())
    }

    /// `rope_scaling` of the older spelling, and `rope_theta`, are those of layers without a window.
    fn ropes(&self, head_dim: usize, context: usize) -> Result<Vec<Rope>, ConfigError> {
        let parameters = self.rope_parameters.as_ref();
        let rope = |name: &str, parameters: Option<&Map<String, Value>>, scaling, theta: Option<Positive>, default| {
            let fields = RopeFields {
                rope_parameters: parameters.cloned(),
                rope_scaling: scaling,
                rope_theta: theta.or(Positive::try_from(default).ok()),
                ..RopeFields::default()
            };
            Rope::new(fields, head_dim, context)
                .map_err(|error| ConfigError::new(error.field, format!("{} ({name} layers)", error.problem)))
        };
        let sliding = parameters.and_then(|ropes| ropes.sliding_attention.as_ref());
        let full = parameters.and_then(|ropes| ropes.full_attention.as_ref());
        Ok(vec![
            rope("sliding_attention", sliding, None, self.rope_local_base_freq, SLIDING_THETA)?,
            rope("full_attention", full, self.rope_scaling.clone(), self.rope_theta, FULL_THETA)?,
        ])
    }

    /// The root of the hidden size in the precision of the weights, in which the model was trained.
    fn embedding_scale(&self, hidden_size: usize) -> f32 {
        let root = (hidden_size as f64).sqrt() as f32;
        match self.dtype.or(self.torch_dtype) {
            Some(Dtype::Bfloat16) => bf16::from_f32(root).to_f32(),
            Some(Dtype::Float16) => f16::from_f32(root).to_f32(),
            Some(Dtype::Float32) | None => root,
        }
    }
}
