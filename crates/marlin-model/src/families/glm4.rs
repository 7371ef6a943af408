//! GLM-4: dense with norms on both sides of a block (GLM-4-0414), and with experts (GLM-4.5 to 4.7). Both rotate half of a head.

use marlin_kernels::RopeLayout;
use serde::Deserialize;
use serde_json::Value;

use super::base::BaseConfig;
use super::experts::{SigmoidConfig, SigmoidDefaults};
use crate::ConfigError;
use crate::config;
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, BlockNorms, DecoderSpec, GroupedSpec};

/// Width of a head where the dense model's config.json names none.
const HEAD_DIM: usize = 128;
/// Part of a head that is rotated where config.json names none.
const PARTIAL_ROTARY_FACTOR: f64 = 0.5;

/// Norms of the dense model.
const NORMS: BlockNorms =
    BlockNorms { mlp: "post_attention_layernorm", outputs: Some(["post_self_attn_layernorm", "post_mlp_layernorm"]) };

/// Defaults of `Glm4MoeConfig`.
const DEFAULTS: SigmoidDefaults =
    SigmoidDefaults { groups: 1, top_groups: 1, scale: 1.0, dense_layers: 1, prediction_layers: 1 };

/// What `Glm4Config` and `Glm4MoeConfig` of `transformers` have of their own.
#[derive(Debug, Deserialize)]
struct Glm4Config {
    /// True by default in the dense model.
    attention_bias: Option<bool>,
    /// With experts only.
    #[serde(default)]
    use_qk_norm: bool,
}

pub(super) fn dense(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let own: Glm4Config = config::parse(config)?;
    base.require_kv_heads()?;
    let head_dim = base.head_dim_or(HEAD_DIM);
    let attention = GroupedSpec {
        rope: RopeLayout::Interleaved,
        qkv_bias: own.attention_bias.unwrap_or(true),
        ..base.attention(head_dim)?
    };
    let rope = rope(config, head_dim, &base)?;
    let mut spec = base.decoder(AttentionSpec::Grouped(attention), vec![rope], base.uniform_layers(None));
    spec.mlp.is_fused = true;
    Ok(DecoderSpec { norms: NORMS, ..spec })
}

pub(super) fn experts(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let own: Glm4Config = config::parse(config)?;
    let routed = SigmoidConfig::parse(config)?;
    base.require_kv_heads()?;
    let head_dim = base.head_dim_or_share()?;
    let attention = GroupedSpec {
        qkv_bias: own.attention_bias.unwrap_or(false),
        qk_norm: own.use_qk_norm,
        ..base.attention(head_dim)?
    };
    let layers = routed.layers(&base, &DEFAULTS)?;
    Ok(DecoderSpec {
        experts: Some(routed.experts(&base, &DEFAULTS)?),
        prediction_layers: routed.prediction_layers(&DEFAULTS),
        ..base.decoder(AttentionSpec::Grouped(attention), vec![rope(config, head_dim, &base)?], layers)
    })
}

fn rope(config: &Value, head_dim: usize, base: &BaseConfig) -> Result<Rope, ConfigError> {
    let mut fields = RopeFields::parse(config)?;
    fields.partial_rotary_factor.get_or_insert(PARTIAL_ROTARY_FACTOR);
    Rope::partial(fields, head_dim, base.context())
}
