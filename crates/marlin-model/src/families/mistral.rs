//! Mistral: Llama, with one sliding window for all layers in its first release.

use serde::Deserialize;
use serde_json::Value;

use super::base::BaseConfig;
use crate::ConfigError;
use crate::config::{self, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, DecoderSpec};

/// Window where config.json names none; later releases say `null`, which is no window.
const DEFAULT_WINDOW: i64 = 4096;

/// What `MistralConfig` of `transformers` has of its own.
#[derive(Debug, Deserialize)]
struct MistralConfig {
    #[serde(default = "default_window")]
    sliding_window: Option<Size>,
}

fn default_window() -> Option<Size> {
    Size::try_from(DEFAULT_WINDOW).ok()
}

pub(super) fn spec(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let MistralConfig { sliding_window } = config::parse(config)?;
    base.require_kv_heads()?;
    let head_dim = base.head_dim_or_share()?;
    let rope = Rope::new(RopeFields::parse(config)?, head_dim, base.context())?;
    let attention = AttentionSpec::Grouped(base.attention(head_dim)?);
    Ok(base.decoder(attention, vec![rope], base.uniform_layers(sliding_window.map(Size::get))))
}
