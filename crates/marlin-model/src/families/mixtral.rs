//! Mixtral: Mistral whose MLPs are eight experts, of which a token goes to two.

use serde::Deserialize;
use serde_json::Value;

use super::base::BaseConfig;
use super::experts;
use crate::ConfigError;
use crate::config::{self, Positive, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, DecoderSpec, ExpertStorage, ExpertsSpec};

/// Base of the frequencies where config.json names none.
const THETA: f64 = 1_000_000.0;

/// What `MixtralConfig` of `transformers` has of its own.
#[derive(Debug, Deserialize)]
struct MixtralConfig {
    num_local_experts: Size,
    num_experts_per_tok: Size,
    sliding_window: Option<Size>,
}

pub(super) fn spec(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let MixtralConfig { num_local_experts, num_experts_per_tok, sliding_window } = config::parse(config)?;
    base.require_kv_heads()?;
    let head_dim = base.head_dim_or_share()?;
    let mut fields = RopeFields::parse(config)?;
    fields.rope_theta = fields.rope_theta.or(Positive::try_from(THETA).ok());
    let rope = Rope::new(fields, head_dim, base.context())?;
    let attention = AttentionSpec::Grouped(base.attention(head_dim)?);
    let names = ["num_local_experts", "num_experts_per_tok"];
    Ok(DecoderSpec {
        experts: Some(ExpertsSpec {
            routing: experts::softmax(num_local_experts, num_experts_per_tok, true, names)?,
            width: base.intermediate_size(),
            activation: base.activation(),
            beside: None,
            correction: false,
            storage: ExpertStorage::Mixtral,
        }),
        ..base.decoder(attention, vec![rope], base.layers_with(sliding_window.map(Size::get), |_| true))
    })
}
