//! What config.json says in the same words in every family.

use std::collections::BTreeSet;

use marlin_kernels::Activation;
use serde::Deserialize;
use serde_json::Value;

use crate::ConfigError;
use crate::config::{self, HiddenAct, Positive, Size};
use crate::rope::Rope;
use crate::spec::{AttentionSpec, BlockNorms, DecoderSpec, GroupedSpec, LayerSpec, MlpSpec};

/// Width of a head. Rotary frequencies are computed before any weight shows that a size is real, so it is kept small.
pub(super) type HeadDim = Size<{ 1 << 16 }>;

/// The fields that all families share.
#[derive(Debug, Deserialize)]
pub(super) struct BaseConfig {
    vocab_size: Size,
    hidden_size: Size,
    intermediate_size: Size,
    num_hidden_layers: Size<4096>,
    num_attention_heads: Size,
    num_key_value_heads: Option<Size>,
    head_dim: Option<HeadDim>,
    #[serde(default)]
    hidden_act: HiddenAct,
    max_position_embeddings: Size,
    rms_norm_eps: Positive,
    tie_word_embeddings: Option<bool>,
}

impl BaseConfig {
    pub(super) fn parse(config: &Value) -> Result<Self, ConfigError> {
        config::parse(config)
    }

    /// Decoder layers.
    pub(super) fn layers(&self) -> usize {
        self.num_hidden_layers.get()
    }

    /// The longest context.
    pub(super) fn context(&self) -> usize {
        self.max_position_embeddings.get()
    }

    /// The same in every layer, but for experts.
    pub(super) fn layers_with(&self, window: Option<usize>, has_experts: impl Fn(usize) -> bool) -> Vec<LayerSpec> {
        (0..self.layers()).map(|layer| LayerSpec { window, rope: 0, has_experts: has_experts(layer) }).collect()
    }

    /// The same in every layer, and no experts.
    pub(super) fn uniform_layers(&self, window: Option<usize>) -> Vec<LayerSpec> {
        self.layers_with(window, |_| false)
    }

    /// `head_dim`, or an even share of the hidden size.
    pub(super) fn head_dim_or_share(&self) -> Result<usize, ConfigError> {
        let (hidden, heads) = (self.hidden_size.get(), self.num_attention_heads.get());
        match self.head_dim {
            Some(head_dim) => return Ok(head_dim.get()),
            None if !hidden.is_multiple_of(heads) => {
                let problem =
                    format!("without head_dim must be a multiple of num_attention_heads = {heads}, found {hidden}");
                return Err(ConfigError::new("hidden_size", problem));
            }
            None => {}
        }
        let share = HeadDim::try_from((hidden / heads) as i64);
        share.map(HeadDim::get).map_err(|problem| {
            ConfigError::new("hidden_size", format!("divided by num_attention_heads = {heads} {problem}"))
        })
    }

    /// `head_dim`, or what the family says where config.json names none.
    pub(super) fn head_dim_or(&self, default: usize) -> usize {
        self.head_dim.map_or(default, HeadDim::get)
    }

    /// Refuses a config without `num_key_value_heads`: some families have defaults for it that suit one size of model only.
    pub(super) fn require_kv_heads(&self) -> Result<(), ConfigError> {
        match self.num_key_value_heads {
            Some(_) => Ok(()),
            None => Err(ConfigError::new("", "missing field `num_key_value_heads`")),
        }
    }

    /// Llama's attention in these sizes: no biases, no QK norm.
    pub(super) fn attention(&self, head_dim: usize) -> Result<GroupedSpec, ConfigError> {
        let kv_heads = self.num_key_value_heads.unwrap_or(self.num_attention_heads);
        GroupedSpec::new(self.num_attention_heads, kv_heads, head_dim)
    }

    /// Llama's other blocks around it, from which a family goes on: an embedding of its own unless it is said to be tied.
    pub(super) fn decoder(&self, attention: AttentionSpec, ropes: Vec<Rope>, layers: Vec<LayerSpec>) -> DecoderSpec {
        DecoderSpec {
            vocab_size: self.vocab_size.get(),
            hidden_size: self.hidden_size.get(),
            max_position_embeddings: self.context(),
            rms_norm_eps: self.rms_norm_eps.get() as f32,
            norm_offset: 0.0,
            norms: BlockNorms::BEFORE,
            rotation: None,
            embedding_scale: 1.0,
            logit_cap: None,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            ropes,
            attention,
            mlp: MlpSpec {
                intermediate_size: self.intermediate_size(),
                activation: self.hidden_act.into(),
                is_fused: false,
                bias: false,
                rotation: None,
            },
            experts: None,
            layers,
            prediction_layers: 0,
            host_layers: BTreeSet::new(),
        }
    }

    /// Query heads.
    pub(super) fn heads(&self) -> usize {
        self.num_attention_heads.get()
    }

    /// Key and value heads, if config.json names them.
    pub(super) fn kv_heads(&self) -> Option<usize> {
        self.num_key_value_heads.map(Size::get)
    }

    /// Width inside an MLP.
    pub(super) fn intermediate_size(&self) -> usize {
        self.intermediate_size.get()
    }

    /// The non-linearity of gates.
    pub(super) fn activation(&self) -> Activation {
        self.hidden_act.into()
    }

    /// Whether the head is the embedding, if config.json says so or not.
    pub(super) fn tie_word_embeddings(&self) -> Option<bool> {
        self.tie_word_embeddings
    }

    /// Width of the residual stream.
    pub(super) fn hidden_size(&self) -> usize {
        self.hidden_size.get()
    }
}
