//! What config.json would say of a model in a GGUF file.

use std::f64::consts::PI;

use serde_json::{Map, Value, json};

use super::model::{Architecture, EMBEDDING, HEAD};
use super::{DAMAGED, Gguf, GgufValue};

/// Llama 3's factors on wavelengths of rotary embedding, one for each pair of dimensions of a head.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Keys behind the name of the architecture that are read. Others would change what the model computes.
const KEYS: [&str; 39] = [
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "leading_dense_block_count",
    "nextn_predict_layers",
    "final_logit_softcapping",
    "expert_count",
    "expert_used_count",
    "expert_shared_count",
    "expert_feed_forward_length",
    "expert_group_count",
    "expert_group_used_count",
    "expert_gating_func",
    "expert_weights_scale",
    "expert_weights_norm",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
    "attention.sliding_window",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
    // Whether the model was trained with the scaling: told, not computed with.
    "rope.scaling.finetuned",
];

/// Base of rotary frequencies where a file names none, as in llama.cpp.
const DEFAULT_THETA: f64 = 10_000.0;

/// Settings of YaRN: keys, and names in config.json.
const YARN: [(&str, &str); 4] = [
    ("rope.scaling.attn_factor", "attention_factor"),
    ("rope.scaling.yarn_attn_factor", "attention_factor"),
    ("rope.scaling.yarn_beta_fast", "beta_fast"),
    ("rope.scaling.yarn_beta_slow", "beta_slow"),
];

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
    let mut config = keys.common()?;
    match architecture {
        Architecture::Llama | Architecture::Qwen3 => {}
        Architecture::Qwen2 => drop(config.as_object_mut().and_then(|config| config.remove("attention_bias"))),
        Architecture::Mixtral => {
            config["num_local_experts"] = keys.required("expert_count")?.into();
            config["num_experts_per_tok"] = keys.required("expert_used_count")?.into();
        }
        Architecture::Qwen3Moe => {
            config["num_experts"] = keys.required("expert_count")?.into();
            config["num_experts_per_tok"] = keys.required("expert_used_count")?.into();
            config["moe_intermediate_size"] = keys.required("expert_feed_forward_length")?.into();
            config["norm_topk_prob"] = true.into();
        }
        Architecture::Gemma3 => keys.gemma3(&mut config)?,
        Architecture::Phi3 => {
            // 0 is none.
            let window = keys.integer("attention.sliding_window")?.filter(|window| *window != 0);
            config["sliding_window"] = window.into();
        }
        Architecture::Glm4 => {}
        Architecture::Glm4Moe => {
            config["use_qk_norm"] = gguf.tensor("blk.0.attn_q_norm.weight").is_some().into();
            keys.sigmoid_experts(&mut config)?;
        }
        Architecture::Deepseek2 => {
            keys.sigmoid_experts(&mut config)?;
            keys.latent_attention(&mut config)?;
        }
        Architecture::GptOss => {
            config["num_local_experts"] = keys.required("expert_count")?.into();
            config["num_experts_per_tok"] = keys.required("expert_used_count")?.into();
            config["intermediate_size"] = keys.required("expert_feed_forward_length")?.into();
            config["sliding_window"] = keys.required("attention.sliding_window")?.into();
        }
    }
    Ok(config)
}

impl Keys<'_> {
    /// What all families have.
    fn common(&self) -> Result<Value, String> {
        let (gguf, architecture) = (self.gguf, self.architecture);
        let vocabulary = gguf.tensor(EMBEDDING).and_then(|tensor| tensor.shape.first().copied());
        let vocabulary =
            vocabulary.ok_or_else(|| format!("it has no tensor `{EMBEDDING}`; it is one part of several"))?;
        let heads = self.required("attention.head_count")?;
        let layers = self.required("block_count")?;
        let ahead = self.integer("nextn_predict_layers")?.unwrap_or(0);
        let layers = layers.checked_sub(ahead).ok_or_else(|| {
            format!("metadata `{}` is {ahead}, more than {layers} layers; {DAMAGED}", self.key("nextn_predict_layers"))
        })?;
        let theta = self.float("rope.freq_base")?.unwrap_or(DEFAULT_THETA);
        let has_bias = |module: &str| gguf.tensor(&format!("blk.0.{module}.bias")).is_some();
        let mut config = json!({
            "architectures": [architecture.class()],
            "model_type": architecture.model_type(),
            "vocab_size": vocabulary,
            "hidden_size": self.required("embedding_length")?,
            "intermediate_size": self.required("feed_forward_length")?,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer("attention.head_count_kv")?.unwrap_or(heads),
            "hidden_act": "silu",
            "max_position_embeddings": self.required("context_length")?,
            "rms_norm_eps": self.required_float("attention.layer_norm_rms_epsilon")?,
            "rope_theta": theta,
            "attention_bias": has_bias("attn_q"),
            "mlp_bias": has_bias("ffn_gate"),
            "tie_word_embeddings": gguf.tensor(HEAD).is_none(),
        });
        // Latent attention has widths of its own.
        if architecture != Architecture::Deepseek2 {
            let head_dim = self.head_dim(heads)?;
            config["head_dim"] = head_dim.into();
            let rotated = self.integer("rope.dimension_count")?.unwrap_or(head_dim);
            if rotated != head_dim {
                config["partial_rotary_factor"] = (rotated as f64 / head_dim as f64).into();
            }
        }
        let rotated = config["head_dim"].as_u64().unwrap_or(0);
        if let Some(scaling) = self.rope_scaling(theta, rotated)? {
            config["rope_scaling"] = scaling;
        }
        // A config that does not say so has, for Transformers, the padding of the family's first model, which this vocabulary may lack.
        config["pad_token_id"] = Value::Null;
        for (token, name) in
            [("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id"), ("pad_token_id", "padding_token_id")]
        {
            let key = format!("tokenizer.ggml.{name}");
            if let Some(value) = gguf.value(&key) {
                let id = value
                    .as_u64()
                    .ok_or_else(|| format!("metadata `{key}` is {value:?}, wanted a token; {DAMAGED}"))?;
                if token == "pad_token_id" && id >= vocabulary as u64 {
                    continue;
                }
                config[token] = id.into();
            }
        }
        Ok(config)
    }

    /// What llama.cpp knows of Gemma 3 without being told.
    fn gemma3(&self, config: &mut Value) -> Result<(), String> {
        const LAYERS_OF_27B: u64 = 62;
        let number = |key: &str| config[key].as_u64().unwrap_or(0);
        // The largest model divides scores otherwise than by the root of a head's width.
        let scalar = match number("num_hidden_layers") {
            LAYERS_OF_27B => number("hidden_size") / number("num_attention_heads").max(1),
            _ => number("head_dim"),
        };
        config["query_pre_attn_scalar"] = scalar.into();
        config["hidden_activation"] = "gelu_pytorch_tanh".into();
        // Embeddings are scaled in the precision that all of these models were trained in.
        config["dtype"] = "bfloat16".into();
        config["sliding_window"] = self.required("attention.sliding_window")?.into();
        config["final_logit_softcapping"] = self.float("final_logit_softcapping")?.into();
        if let Some(theta) = self.float("rope.freq_base_swa")? {
            config["rope_local_base_freq"] = theta.into();
        }
        Ok(())
    }

    /// Experts chosen by sigmoid scores, shared ones beside them.
    fn sigmoid_experts(&self, config: &mut Value) -> Result<(), String> {
        const SIGMOID: u64 = 2;
        // Where a file does not say, corrections of scores do: DeepSeek-V2 has none.
        let gating = self.integer("expert_gating_func")?;
        let has_corrections = || self.gguf.tensors().iter().any(|tensor| tensor.name.ends_with(".exp_probs_b.bias"));
        if gating.map_or_else(|| !has_corrections(), |gating| gating != SIGMOID) {
            return Err(format!(
                "metadata `{}` is {gating:?}, wanted {SIGMOID}, the sigmoid; models with other routers of this \
                 architecture (DeepSeek-V2) are not read",
                self.key("expert_gating_func")
            ));
        }
        config["n_routed_experts"] = self.required("expert_count")?.into();
        config["num_experts_per_tok"] = self.required("expert_used_count")?.into();
        config["moe_intermediate_size"] = self.required("expert_feed_forward_length")?.into();
        config["n_shared_experts"] = self.integer("expert_shared_count")?.unwrap_or(0).into();
        config["n_group"] = self.integer("expert_group_count")?.unwrap_or(1).into();
        config["topk_group"] = self.integer("expert_group_used_count")?.unwrap_or(1).into();
        let norm = self.read("expert_weights_norm", "a bool", |value| value.as_bool())?;
        config["norm_topk_prob"] = norm.unwrap_or(false).into();
        config["routed_scaling_factor"] = self.float("expert_weights_scale")?.unwrap_or(1.0).into();
        config["first_k_dense_replace"] = self.integer("leading_dense_block_count")?.unwrap_or(0).into();
        config["num_nextn_predict_layers"] = self.integer("nextn_predict_layers")?.unwrap_or(0).into();
        Ok(())
    }

    /// Widths of latent attention. Files tell those of keys as they are cached beside those of a head.
    fn latent_attention(&self, config: &mut Value) -> Result<(), String> {
        let rotated = self.required("rope.dimension_count")?;
        let key = match self.integer("attention.key_length_mla")? {
            Some(key) => key,
            None => self.required("attention.key_length")?,
        };
        let value = match self.integer("attention.value_length_mla")? {
            Some(value) => value,
            None => self.required("attention.value_length")?,
        };
        let nope = key.checked_sub(rotated).filter(|nope| *nope != 0).ok_or_else(|| {
            format!("keys of {key} have no part beside the {rotated} of `rope.dimension_count`; {DAMAGED}")
        })?;
        config["q_lora_rank"] = self.integer("attention.q_lora_rank")?.into();
        config["kv_lora_rank"] = self.required("attention.kv_lora_rank")?.into();
        config["qk_nope_head_dim"] = nope.into();
        config["qk_rope_head_dim"] = rotated.into();
        config["v_head_dim"] = value.into();
        config["num_key_value_heads"] = config["num_attention_heads"].clone();
        config["rope_interleave"] = true.into();
        Ok(())
    }

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

    /// The width of a head: of queries, keys and values alike, and all of it rotated but in some families.
    fn head_dim(&self, heads: u64) -> Result<u64, String> {
        let hidden = self.required("embedding_length")?;
        let head_dim = match self.integer("attention.key_length")? {
            Some(width) => width,
            None if heads != 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(format!("{heads} heads do not share the {hidden} columns of `embedding_length` evenly"));
            }
        };
        let in_part = matches!(self.architecture, Architecture::Phi3 | Architecture::Glm4 | Architecture::Glm4Moe);
        for name in ["attention.value_length", "rope.dimension_count"] {
            match self.integer(name)? {
                Some(other) if other != head_dim && !(in_part && name.starts_with("rope") && other < head_dim) => {
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
                    for (key, name) in YARN {
                        if let Some(value) = self.float(key)? {
                            scaling.insert(name.into(), value.into());
                        }
                    }
                    if let Some(multiplier) = self.float("rope.scaling.yarn_log_multiplier")? {
                        // The same on both sides of attention in all models that have it.
                        let mscale = ((multiplier * 10.0) as f32).to_string().parse::<f64>().unwrap_or(1.0);
                        scaling.insert("mscale".into(), mscale.into());
                        scaling.insert("mscale_all_dim".into(), mscale.into());
                    }
                    if self.architecture == Architecture::GptOss {
                        scaling.insert("truncate".into(), false.into());
                    }
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
