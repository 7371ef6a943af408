//! gpt-oss: experts in MXFP4 behind a clamped gate, heads with a sink, a window in every other layer, YaRN, and biases everywhere.

use marlin_kernels::Activation;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::base::BaseConfig;
use super::experts;
use super::layer_type::{self, LayerType};
use crate::ConfigError;
use crate::config::{self, Positive, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, DecoderSpec, ExpertStorage, ExpertsSpec, GroupedSpec, LayerSpec};

/// Defaults of `GptOssConfig`, for what config.json leaves out.
const HEAD_DIM: usize = 64;
const WINDOW: i64 = 128;
const THETA: f64 = 150_000.0;

/// What `GptOssConfig` of `transformers` has of its own.
#[derive(Debug, Deserialize)]
struct GptOssConfig {
    num_local_experts: Size,
    num_experts_per_tok: Size,
    #[serde(default = "default_window")]
    sliding_window: Option<Size>,
    /// Without it, every other layer has a window, the first one among them.
    layer_types: Option<Vec<LayerType>>,
    attention_bias: Option<bool>,
    swiglu_alpha: Option<f64>,
    swiglu_limit: Option<f64>,
}

fn default_window() -> Option<Size> {
    Size::try_from(WINDOW).ok()
}

pub(super) fn spec(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let own: GptOssConfig = config::parse(config)?;
    base.require_kv_heads()?;
    own.check_supported()?;
    let head_dim = base.head_dim_or(HEAD_DIM);
    let bias = own.attention_bias.unwrap_or(true);
    let attention = GroupedSpec { qkv_bias: bias, o_bias: bias, sinks: true, ..base.attention(head_dim)? };
    let rope = Rope::new(rope_fields(config)?, head_dim, base.context())?;
    let names = ["num_local_experts", "num_experts_per_tok"];
    Ok(DecoderSpec {
        experts: Some(ExpertsSpec {
            // The softmax of the logits of chosen experts is that of all, normalised.
            routing: experts::softmax(own.num_local_experts, own.num_experts_per_tok, true, names)?,
            width: base.intermediate_size(),
            activation: Activation::ClampedSwiglu,
            beside: None,
            correction: false,
            storage: ExpertStorage::GptOss,
        }),
        ..base.decoder(AttentionSpec::Grouped(attention), vec![rope], own.layers(base.layers())?)
    })
}

fn rope_fields(config: &Value) -> Result<RopeFields, ConfigError> {
    let mut fields = RopeFields::parse(config)?;
    let given = |map: &Option<Map<String, Value>>| map.as_ref().is_some_and(|map| !map.is_empty());
    if !given(&fields.rope_scaling) && !given(&fields.rope_parameters) {
        let yarn = json!({
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": false,
            "original_max_position_embeddings": 4096,
        });
        fields.rope_parameters = yarn.as_object().cloned();
    }
    fields.rope_theta = fields.rope_theta.or(Positive::try_from(THETA).ok());
    Ok(fields)
}

impl GptOssConfig {
    fn check_supported(&self) -> Result<(), ConfigError> {
        for (field, found, wanted) in [
            ("swiglu_alpha", self.swiglu_alpha, Activation::SWIGLU_ALPHA),
            ("swiglu_limit", self.swiglu_limit, Activation::SWIGLU_LIMIT),
        ] {
            if let Some(found) = found.filter(|&found| found as f32 != wanted) {
                return Err(ConfigError::new(field, format!("must be {wanted} as in all such models, found {found}")));
            }
        }
        Ok(())
    }

    fn layers(&self, layers: usize) -> Result<Vec<LayerSpec>, ConfigError> {
        let in_turn = |layer: usize| match layer.is_multiple_of(2) {
            true => LayerType::SlidingAttention,
            false => LayerType::FullAttention,
        };
        let types = self.layer_types.clone().unwrap_or_else(|| (0..layers).map(in_turn).collect());
        let windows = layer_type::windows(&types, layers, self.sliding_window.map(Size::get), "sliding_window")?;
        Ok(windows.into_iter().map(|window| LayerSpec { window, rope: 0, has_experts: true }).collect())
    }
}
