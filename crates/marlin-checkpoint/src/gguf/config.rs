//! What config.json would say of a model in a GGUF file.

use std::f64::consts::PI;

use serde_json::{Map, Value, json};

use super::model::{Architecture, EMBEDDING, HEAD};
use super::{DAMAGED, Gguf, GgufValue};

/// Llama 3's factors on wavelengths of rotary embedding, one for each pair of dimensions of a head.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Keys behind the name of the architecture that are read. Others would change what the model computes.
const KEYS: [&str; 18] = [
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    // Whether the model was trained with the scaling: told, not computed with.
    "rope.scaling.finetuned",
];

/// Base of rotary frequencies where a file names none, as in llama.cpp.
const DEFAULT_THETA: f64 = 10_000.0;

/// The metadata of an architecture.
struct Keys<'g> {
    gguf: &'g Gguf,
    architecture: Architecture,
}

/// The config.json of `transformers` for this model. Errors are sentences about the file.
pub(super) fn config(gguf: &Gguf) -> Result<Value, String> {
    let architecture = Architecture::of(gguf)?;
    let keys = Keys { gguf, architecture };
    keys.check_known()?;
    if keys.integer("expert_count")?.unwrap_or(0) != 0 {
        return Err(format!("it is a mixture of experts of the architecture {architecture}, which is not read yet"));
    }
    let vocabulary = gguf.tensor(EMBEDDING).and_then(|tensor| tensor.shape.first().copied());
    let vocabulary = vocabulary.ok_or_else(|| format!("it has no tensor `{EMBEDDING}`; it is one part of several"))?;
    let heads = keys.required("attention.head_count")?;
    let head_dim = keys.head_dim(heads)?;
    let theta = keys.float("rope.freq_base")?.unwrap_or(DEFAULT_THETA);
    let has_bias = |module: &str| gguf.tensor(&format!("blk.0.{module}.bias")).is_some();
    let mut config = json!({
        "architectures": [architecture.class()],
        "model_type": architecture.name(),
        "vocab_size": vocabulary,
        "hidden_size": keys.required("embedding_length")?,
        "intermediate_size": keys.required("feed_forward_length")?,
        "num_hidden_layers": keys.required("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.required("context_length")?,
        "rms_norm_eps": keys.required_float("attention.layer_norm_rms_epsilon")?,
        "rope_theta": theta,
        "attention_bias": has_bias("attn_q"),
        "mlp_bias": has_bias("ffn_gate"),
        "tie_word_embeddings": gguf.tensor(HEAD).is_none(),
    });
    if let Some(scaling) = keys.rope_scaling(theta, head_dim)? {
        config["rope_scaling"] = scaling;
    }
    for token in ["bos_token_id", "eos_token_id"] {
        let key = format!("tokenizer.ggml.{token}");
        if let Some(value) = gguf.value(&key) {
            let id =
                value.as_u64().ok_or_else(|| format!("metadata `{key}` is {value:?}, wanted a token; {DAMAGED}"))?;
            config[token] = id.into();
        }
    }
    Ok(config)
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn check_known(&self) -> Result<(), String> {
        let prefix = self.key("");
        let unknown = self.gguf.keys().find(|key| key.strip_prefix(&prefix).is_some_and(|name| !KEYS.contains(&name)));
        match unknown {
            Some(key) => Err(format!(
                "metadata `{key}` = {:?} is not understood yet, so the model would be computed wrongly; \
                 take its safetensors instead",
                self.gguf.value(key)
            )),
            None => Ok(()),
        }
    }

    fn missing(&self, name: &str) -> String {
        format!("metadata `{}` is missing; the file is incomplete, convert the model again", self.key(name))
    }

    fn read<T>(
        &self,
        name: &str,
        wanted: &str,
        read: impl FnOnce(GgufValue<'_>) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let key = self.key(name);
        let Some(value) = self.gguf.value(&key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => {
                Err(format!("metadata `{key}` is {value:?}, wanted {wanted}; models of other kinds are not read yet"))
            }
        }
    }

    fn integer(&self, name: &str) -> Result<Option<u64>, String> {
        self.read(name, "one integer for all layers", |value| value.as_u64())
    }

    fn required(&self, name: &str) -> Result<u64, String> {
        self.integer(name)?.ok_or_else(|| self.missing(name))
    }

    /// A float: of single precision the shortest decimal number, which is the one that config.json had.
    fn float(&self, name: &str) -> Result<Option<f64>, String> {
        self.read(name, "a finite float", |value| {
            let read = match value {
                GgufValue::F32(value) => value.to_string().parse().ok(),
                other => other.as_f64(),
            };
            read.filter(|read: &f64| read.is_finite())
        })
    }

    fn required_float(&self, name: &str) -> Result<f64, String> {
        self.float(name)?.ok_or_else(|| self.missing(name))
    }

    /// The width of a head: of queries, keys and values alike, all of it rotated.
    fn head_dim(&self, heads: u64) -> Result<u64, String> {
        let hidden = self.required("embedding_length")?;
        let head_dim = match self.integer("attention.key_length")? {
            Some(width) => width,
            None if heads != 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(format!("{heads} heads do not share the {hidden} columns of `embedding_length` evenly"));
            }
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            match self.integer(name)? {
                Some(other) if other != head_dim => {
                    return Err(format!(
                        "metadata `{}` is {other}, wanted {head_dim}, the width of keys; other widths are not read yet",
                        self.key(name)
                    ));
                }
                _ => {}
            }
        }
        Ok(head_dim)
    }

    /// `rope_scaling` of config.json; `None` without.
    fn rope_scaling(&self, theta: f64, head_dim: u64) -> Result<Option<Value>, String> {
        let kind = self.read("rope.scaling.type", "a string", |value| value.as_str().map(str::to_owned))?;
        let factors = self.gguf.tensor(ROPE_FACTORS).map(|_| self.gguf.values(ROPE_FACTORS));
        match (kind.as_deref(), factors) {
            (None | Some("none"), None) => Ok(None),
            (None | Some("none"), Some(factors)) => {
                let factors = factors.map_err(|error| error.to_string())?;
                llama3_scaling(&factors, theta, head_dim).map(Some)
            }
            (Some(kind @ ("linear" | "yarn")), None) => {
                let mut scaling = Map::new();
                scaling.insert("rope_type".into(), kind.into());
                let factor = self.required_float("rope.scaling.factor")?;
                scaling.insert("factor".into(), factor.into());
                if kind == "yarn" {
                    let context = self.required("rope.scaling.original_context_length")?;
                    scaling.insert("original_max_position_embeddings".into(), context.into());
                }
                Ok(Some(scaling.into()))
            }
            (Some(kind), factors) => Err(format!(
                "its rotary embedding is scaled by `{kind}`{}, which is not read yet; take its safetensors instead",
                if factors.is_some() { " and by factors" } else { "" }
            )),
        }
    }
}

/// Llama 3's scaling that gives these factors. Files hold what follows from its four numbers, not the numbers; three of
/// them are the same in all models of Meta, and the fourth is the largest factor. Whether they give the factors is
/// checked.
fn llama3_scaling(factors: &[f32], theta: f64, head_dim: u64) -> Result<Value, String> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const CONTEXT: f64 = 8192.0;
    let largest = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let factor = |pair: usize| {
        let wavelength = 2.0 * PI * theta.powf(2.0 * pair as f64 / head_dim as f64);
        let smooth = ((CONTEXT / wavelength - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / largest + smooth)
    };
    let close = |(pair, found): (usize, &f32)| (f64::from(*found) / factor(pair) - 1.0).abs() < 1e-4;
    if factors.len() as u64 != head_dim / 2 || !factors.iter().enumerate().all(close) {
        return Err(format!(
            "tensor `{ROPE_FACTORS}` holds {} factors that are not those of Llama 3 for heads of {head_dim}; \
             take its safetensors instead",
            factors.len()
        ));
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": CONTEXT as u64,
    }))
}
