//! Qwen3: norms on the heads of Q and K, head width of its own, sliding windows in some layers.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::ConfigError;
use crate::config::{self, HiddenAct, Positive, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, DecoderSpec, MlpSpec};

/// Width of a head where config.json names none: not hidden size / heads.
const DEFAULT_HEAD_DIM: usize = 128;

/// `Qwen3Config` of `transformers`.
#[derive(Debug, Deserialize)]
struct Qwen3Config {
    vocab_size: Size,
    hidden_size: Size,
    intermediate_size: Size,
    num_hidden_layers: Size<4096>,
    num_attention_heads: Size,
    num_key_value_heads: Size,
    head_dim: Option<Size>,
    #[serde(default)]
    hidden_act: HiddenAct,
    max_position_embeddings: Size,
    rms_norm_eps: Positive,
    #[serde(default)]
    tie_word_embeddings: bool,
    rope_parameters: Option<Map<String, Value>>,
    rope_scaling: Option<Map<String, Value>>,
    rope_theta: Option<Positive>,
    partial_rotary_factor: Option<f64>,
    original_max_position_embeddings: Option<Size>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<Size>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<LayerType>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LayerType {
    FullAttention,
    SlidingAttention,
}

pub(super) fn spec(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let config: Qwen3Config = config::parse(config)?;
    let windows = config.windows()?;
    let attention = AttentionSpec::new(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim.map_or(DEFAULT_HEAD_DIM, Size::get),
    )?;
    let rope = RopeFields {
        rope_parameters: config.rope_parameters,
        rope_scaling: config.rope_scaling,
        rope_theta: config.rope_theta,
        partial_rotary_factor: config.partial_rotary_factor,
        original_max_position_embeddings: config.original_max_position_embeddings,
    };
    let context = config.max_position_embeddings.get();
    Ok(DecoderSpec {
        vocab_size: config.vocab_size.get(),
        hidden_size: config.hidden_size.get(),
        max_position_embeddings: context,
        rms_norm_eps: config.rms_norm_eps.get() as f32,
        tie_word_embeddings: config.tie_word_embeddings,
        rope: Rope::new(rope, attention.head_dim, context)?,
        attention: AttentionSpec { bias: config.attention_bias, qk_norm: true, ..attention },
        mlp: MlpSpec {
            intermediate_size: config.intermediate_size.get(),
            activation: config.hidden_act.into(),
            bias: false,
        },
        windows,
    })
}

impl Qwen3Config {
    /// The window of each layer: as `layer_types` says, or in the layers from `max_window_layers` on.
    fn windows(&self) -> Result<Vec<Option<usize>>, ConfigError> {
        let layers = self.num_hidden_layers.get();
        let window = if self.use_sliding_window { self.sliding_window.map(Size::get) } else { None };
        let Some(layer_types) = &self.layer_types else {
            let Some(window) = window else { return Ok(vec![None; layers]) };
            let first = self.max_window_layers.ok_or_else(|| {
                ConfigError::new("max_window_layers", "use_sliding_window needs it, or layer_types; found neither")
            })?;
            return Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect());
        };
        if layer_types.len() != layers {
            let problem = format!("must have num_hidden_layers = {layers} entries, found {}", layer_types.len());
            return Err(ConfigError::new("layer_types", problem));
        }
        if window.is_none() && layer_types.contains(&LayerType::SlidingAttention) {
            let problem = "sliding_attention needs use_sliding_window and sliding_window";
            return Err(ConfigError::new("layer_types", problem));
        }
        let layer_window = |layer_type: &LayerType| match layer_type {
            LayerType::FullAttention => None,
            LayerType::SlidingAttention => window,
        };
        Ok(layer_types.iter().map(layer_window).collect())
    }
}
