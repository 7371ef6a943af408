//! Qwen3-MoE: Qwen3 with experts in most layers, and one window for all of them if any.

use serde::Deserialize;
use serde_json::Value;

use super::base::BaseConfig;
use super::experts;
use crate::ConfigError;
use crate::config::{self, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, DecoderSpec, ExpertStorage, ExpertsSpec, GroupedSpec};

/// Window where config.json has `use_sliding_window` and names none.
const DEFAULT_WINDOW: i64 = 4096;

/// What `Qwen3MoeConfig` of `transformers` has of its own.
#[derive(Debug, Deserialize)]
struct Qwen3MoeConfig {
    #[serde(alias = "num_local_experts")]
    num_experts: Size,
    num_experts_per_tok: Size,
    moe_intermediate_size: Size,
    #[serde(default)]
    norm_topk_prob: bool,
    /// One layer in this many has experts, but for those of `mlp_only_layers`.
    decoder_sparse_step: Option<Size>,
    mlp_only_layers: Option<Vec<usize>>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default = "default_window")]
    sliding_window: Option<Size>,
}

fn default_window() -> Option<Size> {
    Size::try_from(DEFAULT_WINDOW).ok()
}

pub(super) fn spec(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let own: Qwen3MoeConfig = config::parse(config)?;
    base.require_kv_heads()?;
    let head_dim = base.head_dim_or_share()?;
    let rope = Rope::new(RopeFields::parse(config)?, head_dim, base.context())?;
    let bias = own.attention_bias;
    let attention = GroupedSpec { qkv_bias: bias, o_bias: bias, qk_norm: true, ..base.attention(head_dim)? };
    let window = if own.use_sliding_window { own.sliding_window.map(Size::get) } else { None };
    let layers = base.layers_with(window, |layer| own.has_experts(layer));
    let names = ["num_experts", "num_experts_per_tok"];
    Ok(DecoderSpec {
        experts: Some(ExpertsSpec {
            routing: experts::softmax(own.num_experts, own.num_experts_per_tok, own.norm_topk_prob, names)?,
            width: own.moe_intermediate_size.get(),
            activation: base.activation(),
            beside: None,
            correction: false,
            storage: ExpertStorage::Usual,
        }),
        ..base.decoder(AttentionSpec::Grouped(attention), vec![rope], layers)
    })
}

impl Qwen3MoeConfig {
    fn has_experts(&self, layer: usize) -> bool {
        let is_dense = self.mlp_only_layers.as_ref().is_some_and(|layers| layers.contains(&layer));
        !is_dense && (layer + 1).is_multiple_of(self.decoder_sparse_step.map_or(1, Size::get))
    }
}
