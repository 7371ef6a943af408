//! Phi-3 and Phi-4: Llama whose Q, K and V are stored as one matrix, as are gate and up, and whose heads are rotated in part.

use serde::Deserialize;
use serde_json::Value;

use super::base::BaseConfig;
use crate::ConfigError;
use crate::config::{self, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, DecoderSpec, GroupedSpec};

/// What `Phi3Config` of `transformers` has of its own.
#[derive(Debug, Deserialize)]
struct Phi3Config {
    sliding_window: Option<Size>,
}

pub(super) fn spec(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let Phi3Config { sliding_window } = config::parse(config)?;
    let head_dim = base.head_dim_or_share()?;
    let rope = Rope::unscaled(RopeFields::parse(config)?, head_dim, base.context())?;
    let attention = AttentionSpec::Grouped(GroupedSpec { is_fused: true, ..base.attention(head_dim)? });
    let mut spec = base.decoder(attention, vec![rope], base.uniform_layers(sliding_window.map(Size::get)));
    spec.mlp.is_fused = true;
    Ok(spec)
}
