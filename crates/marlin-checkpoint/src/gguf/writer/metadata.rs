//! What config.json says, as llama.cpp is told.

use std::f64::consts::PI;

use serde_json::Value as Json;

use super::file::Value;

/// What a model computes, as `general.architecture` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    Qwen3Moe,
}

/// The sizes and settings that llama.cpp needs.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) architecture: Architecture,
    pub(super) vocabulary: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    /// Experts of a layer; 0 without.
    pub(super) experts: usize,
    /// Llama 3's factors on wavelengths of rotary embedding, one for each pair of dimensions of a head.
    pub(super) rope_factors: Option<Vec<f32>>,
    hidden: usize,
    intermediate: usize,
    context: usize,
    head_dim: usize,
    epsilon: f32,
    theta: f64,
    /// Factor of linear scaling.
    linear: Option<f32>,
    /// Experts of a token, and their width.
    chosen: Option<(usize, usize)>,
}

impl Architecture {
    const ALL: [(&'static str, Self); 5] = [
        ("LlamaForCausalLM", Self::Llama),
        ("MistralForCausalLM", Self::Llama),
        ("Qwen2ForCausalLM", Self::Qwen2),
        ("Qwen3ForCausalLM", Self::Qwen3),
        ("Qwen3MoeForCausalLM", Self::Qwen3Moe),
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
        }
    }
}

impl Model {
    /// Reads config.json. Errors are sentences about it.
    pub(super) fn read(config: &Json) -> Result<Self, String> {
        let class = config["architectures"][0].as_str().unwrap_or("nothing");
        let known = Architecture::ALL.iter().find(|(known, _)| *known == class);
        let architecture = known.map(|(_, architecture)| *architecture).ok_or_else(|| {
            let known = Architecture::ALL.map(|(name, _)| name).join(", ");
            format!("GGUF files are written of {known}; config.json names {class}; choose another --layout")
        })?;
        refuse(config, architecture)?;
        let (hidden, heads) = (size(config, "hidden_size")?, size(config, "num_attention_heads")?);
        let head_dim = match config["head_dim"].is_null() {
            true => hidden / heads,
            false => size(config, "head_dim")?,
        };
        let optional = |key: &str, default| if config[key].is_null() { Ok(default) } else { size(config, key) };
        let rope = Rope::read(config)?;
        let has_experts = architecture == Architecture::Qwen3Moe;
        let experts = if config["num_experts"].is_null() { "num_local_experts" } else { "num_experts" };
        Ok(Self {
            architecture,
            vocabulary: size(config, "vocab_size")?,
            layers: size(config, "num_hidden_layers")?,
            heads,
            kv_heads: optional("num_key_value_heads", heads)?,
            experts: if has_experts { size(config, experts)? } else { 0 },
            rope_factors: rope.llama3(head_dim)?,
            hidden,
            intermediate: size(config, "intermediate_size")?,
            context: size(config, "max_position_embeddings")?,
            head_dim,
            epsilon: float(config, "rms_norm_eps")? as f32,
            theta: rope.theta,
            linear: rope.linear()?,
            chosen: match has_experts {
                true => Some((size(config, "num_experts_per_tok")?, size(config, "moe_intermediate_size")?)),
                false => None,
            },
        })
    }

    /// Everything but the vocabulary.
    pub(super) fn metadata(&self, name: &str, file_type: u32) -> Vec<(String, Value)> {
        let architecture = self.architecture.name();
        let name = name.rsplit('/').find(|part| !part.is_empty()).unwrap_or(name);
        let mut metadata = vec![
            ("general.architecture".to_owned(), Value::String(architecture.to_owned())),
            ("general.type".to_owned(), Value::String("model".to_owned())),
            ("general.name".to_owned(), Value::String(name.to_owned())),
            ("general.file_type".to_owned(), Value::U32(file_type)),
            ("general.quantization_version".to_owned(), Value::U32(2)),
        ];
        let mut push = |key: &str, value| metadata.push((format!("{architecture}.{key}"), value));
        for (key, size) in [
            ("vocab_size", self.vocabulary),
            ("context_length", self.context),
            ("embedding_length", self.hidden),
            ("block_count", self.layers),
            ("feed_forward_length", self.intermediate),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
        ] {
            push(key, Value::U32(size as u32));
        }
        push("attention.layer_norm_rms_epsilon", Value::F32(self.epsilon));
        push("rope.freq_base", Value::F32(self.theta as f32));
        if let Some(factor) = self.linear {
            push("rope.scaling.type", Value::String("linear".to_owned()));
            push("rope.scaling.factor", Value::F32(factor));
        }
        if let Some((chosen, width)) = self.chosen {
            push("expert_count", Value::U32(self.experts as u32));
            push("expert_used_count", Value::U32(chosen as u32));
            push("expert_feed_forward_length", Value::U32(width as u32));
        }
        metadata
    }
}

/// Refuses settings that llama.cpp does not compute with for these architectures.
fn refuse(config: &Json, architecture: Architecture) -> Result<(), String> {
    let is = |key: &str, wanted: &[Json]| config[key].is_null() || wanted.contains(&config[key]);
    let no_window = config["sliding_window"].is_null() || config["use_sliding_window"] == false;
    let settings = [
        ("hidden_act", is("hidden_act", &["silu".into()])),
        ("sliding_window", no_window),
        ("attention_bias", architecture == Architecture::Llama || is("attention_bias", &[false.into()])),
        ("partial_rotary_factor", is("partial_rotary_factor", &[1.0.into(), 1.into()])),
    ];
    let of_experts = [
        ("norm_topk_prob", config["norm_topk_prob"] == true),
        ("decoder_sparse_step", is("decoder_sparse_step", &[1.into()])),
        ("mlp_only_layers", is("mlp_only_layers", &[Json::Array(Vec::new())])),
    ];
    let of_experts = of_experts.iter().filter(|_| architecture == Architecture::Qwen3Moe);
    match settings.iter().chain(of_experts).find(|(_, is_known)| !is_known) {
        None => Ok(()),
        Some((key, _)) => Err(format!(
            "config.json says {key} = {}, which llama.cpp does not compute for this architecture; choose another \
             --layout",
            config[*key]
        )),
    }
}

/// Rotary embedding, in the spelling of `transformers` 5 or an older one.
struct Rope<'c> {
    theta: f64,
    /// `default`, `linear`, `llama3` and so on.
    kind: &'c str,
    parameters: &'c Json,
}

impl<'c> Rope<'c> {
    /// Base of the frequencies where config.json names none.
    const THETA: f64 = 10_000.0;

    fn read(config: &'c Json) -> Result<Self, String> {
        let fields = ["rope_scaling", "rope_parameters"].map(|field| &config[field]);
        let parameters = fields.into_iter().find(|found| found.is_object()).unwrap_or(&Json::Null);
        let theta = [&config["rope_theta"], &config["rope_parameters"]["rope_theta"]];
        let theta = theta.into_iter().find(|theta| !theta.is_null()).map_or(Some(Self::THETA), Json::as_f64);
        let theta = theta.filter(|theta| theta.is_finite() && *theta > 0.0);
        let kind = [&parameters["rope_type"], &parameters["type"]].into_iter().find_map(Json::as_str);
        let kind = kind.unwrap_or("default");
        if !["default", "linear", "llama3"].contains(&kind) {
            return Err(format!(
                "config.json scales rotary embedding as {kind}; default, linear and llama3 are written"
            ));
        }
        Ok(Self { theta: theta.ok_or("config.json: rope_theta must be a positive number")?, kind, parameters })
    }

    fn linear(&self) -> Result<Option<f32>, String> {
        (self.kind == "linear").then(|| float(self.parameters, "factor").map(|factor| factor as f32)).transpose()
    }

    /// Wavelengths that are short stay, long ones are stretched, and between the two it goes over smoothly (Llama 3.1).
    fn llama3(&self, head_dim: usize) -> Result<Option<Vec<f32>>, String> {
        if self.kind != "llama3" {
            return Ok(None);
        }
        let number = |key: &str| float(self.parameters, key);
        let (factor, low, high) = (number("factor")?, number("low_freq_factor")?, number("high_freq_factor")?);
        let context = number("original_max_position_embeddings")?;
        let of_pair = |pair: usize| {
            let wavelength = 2.0 * PI * self.theta.powf((2 * pair) as f64 / head_dim as f64);
            let smooth = (context / wavelength - low) / (high - low);
            (if wavelength < context / high {
                1.0
            } else if wavelength > context / low {
                factor
            } else {
                1.0 / ((1.0 - smooth) / factor + smooth)
            }) as f32
        };
        Ok(Some((0..head_dim / 2).map(of_pair).collect()))
    }
}

/// A size, which llama.cpp has in 32 bits.
fn size(config: &Json, key: &str) -> Result<usize, String> {
    let found = config[key].as_u64().filter(|&size| size > 0 && size <= i32::MAX as u64);
    found.map(|size| size as usize).ok_or_else(|| format!("config.json: {key} is {}, wanted a size", config[key]))
}

fn float(config: &Json, key: &str) -> Result<f64, String> {
    let found = config[key].as_f64().filter(|number| number.is_finite() && *number > 0.0);
    found.ok_or_else(|| format!("config.json: {key} is {}, wanted a positive number", config[key]))
}
