//! Qwen2, Qwen2.5 and Qwen3: sliding windows in some layers. Qwen2 has biases on Q, K and V; Qwen3 has norms on the heads of
//! Q and K instead, and a head width of its own.

use serde::Deserialize;
use serde_json::Value;

use super::base::BaseConfig;
use super::layer_type::{self, LayerType};
use crate::ConfigError;
use crate::config::{self, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, DecoderSpec, GroupedSpec, LayerSpec};

/// Width of a head where Qwen3's config.json names none: not hidden size / heads.
const QWEN3_HEAD_DIM: usize = 128;

/// What `Qwen2Config` and `Qwen3Config` of `transformers` have of their own.
#[derive(Debug, Deserialize)]
struct QwenConfig {
    /// Qwen3 only.
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<Size>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<LayerType>>,
}

pub(super) fn qwen2(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let (base, own) = parse(config)?;
    let head_dim = base.head_dim_or_share()?;
    let rope = Rope::new(RopeFields::parse(config)?, head_dim, base.context())?;
    let attention = AttentionSpec::Grouped(GroupedSpec { qkv_bias: true, ..base.attention(head_dim)? });
    Ok(base.decoder(attention, vec![rope], own.layers(base.layers())?))
}

pub(super) fn qwen3(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let (base, own) = parse(config)?;
    let head_dim = base.head_dim_or(QWEN3_HEAD_DIM);
    let rope = Rope::new(RopeFields::parse(config)?, head_dim, base.context())?;
    let bias = own.attention_bias;
    let attention = GroupedSpec { qkv_bias: bias, o_bias: bias, qk_norm: true, ..base.attention(head_dim)? };
    Ok(base.decoder(AttentionSpec::Grouped(attention), vec![rope], own.layers(base.layers())?))
}

fn parse(config: &Value) -> Result<(BaseConfig, QwenConfig), ConfigError> {
    let base = BaseConfig::parse(config)?;
    base.require_kv_heads()?;
    Ok((base, config::parse(config)?))
}

impl QwenConfig {
    /// The window of each layer: as `layer_types` says, or in the layers from `max_window_layers` on.
    fn layers(&self, layers: usize) -> Result<Vec<LayerSpec>, ConfigError> {
        let window = if self.use_sliding_window { self.sliding_window.map(Size::get) } else { None };
        let windows: Vec<Option<usize>> = match (&self.layer_types, window) {
            (Some(layer_types), _) => {
                layer_type::windows(layer_types, layers, window, "use_sliding_window and sliding_window")?
            }
            (None, None) => vec![None; layers],
            (None, Some(window)) => {
                let first = self.max_window_layers.ok_or_else(|| {
                    ConfigError::new("max_window_layers", "use_sliding_window needs it, or layer_types; found neither")
                })?;
                (0..layers).map(|layer| (layer >= first).then_some(window)).collect()
            }
        };
        Ok(windows.into_iter().map(|window| LayerSpec { window, rope: 0, has_experts: false }).collect())
    }
}
