//! Llama 1 to 3 and everything that took over their architecture.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::ConfigError;
use crate::config::{self, HiddenAct, Positive, Size};
use crate::rope::{Rope, RopeFields};
use crate::spec::{AttentionSpec, DecoderSpec, MlpSpec};

/// `LlamaConfig` of `transformers`.
#[derive(Debug, Deserialize)]
struct LlamaConfig {
    vocab_size: Size,
    hidden_size: Size,
    intermediate_size: Size,
    num_hidden_layers: Size<4096>,
    num_attention_heads: Size,
    num_key_value_heads: Option<Size>,
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
    mlp_bias: bool,
}

pub(super) fn spec(config: &Value) -> Result<DecoderSpec, ConfigError> {
    let config: LlamaConfig = config::parse(config)?;
    let attention = AttentionSpec::new(
        config.num_attention_heads,
        config.num_key_value_heads.unwrap_or(config.num_attention_heads),
        config.head_dim()?,
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
        attention: AttentionSpec { bias: config.attention_bias, ..attention },
        mlp: MlpSpec {
            intermediate_size: config.intermediate_size.get(),
            activation: config.hidden_act.into(),
            bias: config.mlp_bias,
        },
        windows: vec![None; config.num_hidden_layers.get()],
    })
}

impl LlamaConfig {
    /// `head_dim`, or an even share of the hidden size.
    fn head_dim(&self) -> Result<usize, ConfigError> {
        let (hidden, heads) = (self.hidden_size.get(), self.num_attention_heads.get());
        match self.head_dim {
            Some(head_dim) => Ok(head_dim.get()),
            None if hidden.is_multiple_of(heads) => Ok(hidden / heads),
            None => {
                let problem =
                    format!("without head_dim must be a multiple of num_attention_heads = {heads}, found {hidden}");
                Err(ConfigError::new("hidden_size", problem))
            }
        }
    }
}
