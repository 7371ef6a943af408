//! Fields of multi-head latent attention.

use marlin_kernels::RopeLayout;
use serde::Deserialize;
use serde_json::Value;

use super::base::{BaseConfig, HeadDim};
use crate::ConfigError;
use crate::config::{self, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::LatentSpec;

/// What DeepSeek-V3 and GLM-4.7-Flash have in common.
#[derive(Debug, Deserialize)]
struct LatentConfig {
    q_lora_rank: Option<Size>,
    kv_lora_rank: Size,
    qk_nope_head_dim: HeadDim,
    qk_rope_head_dim: HeadDim,
    v_head_dim: HeadDim,
    #[serde(default)]
    attention_bias: bool,
    rope_interleave: Option<bool>,
}

/// Attention and the rope of its rotated parts.
pub(super) fn attention(config: &Value, base: &BaseConfig) -> Result<(LatentSpec, Rope), ConfigError> {
    let own: LatentConfig = config::parse(config)?;
    // Left out, it means a default that suits one size of model only; `null` is none.
    if config.get("q_lora_rank").is_none() {
        return Err(ConfigError::new("", "missing field `q_lora_rank`"));
    }
    let heads = base.heads();
    if let Some(found) = base.kv_heads().filter(|&found| found != heads) {
        let problem = format!("must be num_attention_heads = {heads} in latent attention, found {found}");
        return Err(ConfigError::new("num_key_value_heads", problem));
    }
    let (nope_dim, rope_dim) = (own.qk_nope_head_dim.get(), own.qk_rope_head_dim.get());
    if !rope_dim.is_multiple_of(2) {
        let problem = format!("must be even for rotary embedding, found {rope_dim}");
        return Err(ConfigError::new("qk_rope_head_dim", problem));
    }
    let rope = Rope::new(RopeFields::parse(config)?, rope_dim, base.context())?;
    let spec = LatentSpec {
        heads,
        nope_dim,
        rope_dim,
        value_dim: own.v_head_dim.get(),
        rank: own.kv_lora_rank.get(),
        q_rank: own.q_lora_rank.map(Size::get),
        scale: (((nope_dim + rope_dim) as f64).powf(-0.5) * rope.score_scale) as f32,
        rope: if own.rope_interleave.unwrap_or(true) { RopeLayout::Interleaved } else { RopeLayout::HalfSplit },
        bias: own.attention_bias,
    };
    Ok((spec, rope))
}
