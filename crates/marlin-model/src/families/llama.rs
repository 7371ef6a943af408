//! Llama 1 to 3 and everything that took over their architecture.

use serde::Deserialize;
use serde_json::Value;

use super::base::BaseConfig;
use crate::ConfigError;
use crate::config;
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, DecoderSpec, GroupedSpec};

/// What `LlamaConfig` of `transformers` has of its own.
#[derive(Debug, Deserialize)]
struct LlamaConfig {
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
}

pub(super) fn spec(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let LlamaConfig { attention_bias, mlp_bias } = config::parse(config)?;
    let head_dim = base.head_dim_or_share()?;
    let rope = Rope::new(RopeFields::parse(config)?, head_dim, base.context())?;
    let attention = GroupedSpec { qkv_bias: attention_bias, o_bias: attention_bias, ..base.attention(head_dim)? };
    let mut spec = base.decoder(AttentionSpec::Grouped(attention), vec![rope], base.uniform_layers(None));
    spec.mlp.bias = mlp_bias;
    Ok(spec)
}
