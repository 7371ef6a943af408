//! Generation settings that a model recommends.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::CheckpointError;
use crate::source::Source;

/// Where they are found.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";

/// generation_config.json; what it leaves out is `None`, and token ids then come from config.json.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Token that begins every sequence.
    #[serde(deserialize_with = "token")]
    pub bos_token_id: Option<u32>,
    /// Tokens that end generation.
    #[serde(deserialize_with = "tokens")]
    pub eos_token_id: Vec<u32>,
    /// Token that fills up batches.
    #[serde(deserialize_with = "token")]
    pub pad_token_id: Option<u32>,
    /// Sample rather than take the most likely token.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f64>,
    /// Keep this many of the most likely tokens.
    pub top_k: Option<u32>,
    /// Keep the smallest set of most likely tokens that reaches this probability.
    pub top_p: Option<f64>,
    /// Drop tokens less likely than this share of the most likely one.
    pub min_p: Option<f64>,
    /// Divides positive and multiplies negative logits of tokens seen.
    pub repetition_penalty: Option<f64>,
    /// Most tokens to generate.
    pub max_new_tokens: Option<usize>,
}

/// The token ids of config.json, used where generation_config.json has none.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ModelTokens {
    #[serde(deserialize_with = "token")]
    bos_token_id: Option<u32>,
    #[serde(deserialize_with = "tokens")]
    eos_token_id: Vec<u32>,
    #[serde(deserialize_with = "token")]
    pad_token_id: Option<u32>,
}

impl GenerationConfig {
    pub(crate) fn read(source: &Source, config: &Value) -> Result<Self, CheckpointError> {
        let mut read: Self = source.json(GENERATION_CONFIG)?.unwrap_or_default();
        let model = ModelTokens::deserialize(config)
            .map_err(|e| CheckpointError::malformed(&source.label("config.json"), e.to_string()))?;
        read.bos_token_id = read.bos_token_id.or(model.bos_token_id);
        read.pad_token_id = read.pad_token_id.or(model.pad_token_id);
        if read.eos_token_id.is_empty() {
            read.eos_token_id = model.eos_token_id;
        }
        Ok(read)
    }
}

/// `null` and negative numbers mean "none".
fn token<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    Option::<i64>::deserialize(deserializer)?.map_or(Ok(None), id)
}

/// One id or a list of them.
fn tokens<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a token id or a list of token ids")]
    enum OneOrMany {
        One(i64),
        Many(Vec<i64>),
    }
    let ids = match Option::<OneOrMany>::deserialize(deserializer)? {
        None => vec![],
        Some(OneOrMany::One(one)) => vec![one],
        Some(OneOrMany::Many(many)) => many,
    };
    ids.into_iter().filter_map(|one| id(one).transpose()).collect()
}

fn id<E: serde::de::Error>(id: i64) -> Result<Option<u32>, E> {
    if id < 0 {
        return Ok(None);
    }
    u32::try_from(id).map(Some).map_err(|_| E::custom(format!("token id {id} is too large")))
}
