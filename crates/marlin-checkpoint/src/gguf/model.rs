//! The tensors of a GGUF file under the names of Hugging Face.

use std::collections::HashSet;
use std::fmt;

use serde_json::Value;

use super::config::ROPE_FACTORS;
use super::entry::{self, Arrangement};
use super::{DAMAGED, Gguf, GgufTensor};
use crate::layouts::Entry;

/// The embedding, whose rows are the vocabulary.
pub(super) const EMBEDDING: &str = "token_embd.weight";
/// The head; a model without is tied to its embedding.
pub(super) const HEAD: &str = "output.weight";

/// Tensors outside the layers: names in files, and those of Hugging Face.
const OUTER: [(&str, &str); 3] =
    [(EMBEDDING, "model.embed_tokens.weight"), ("output_norm.weight", "model.norm.weight"), (HEAD, "lm_head.weight")];

/// What a model computes, by `general.architecture`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    /// `llama` with experts.
    Mixtral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
    Phi3,
    Glm4,
    Glm4Moe,
    /// DeepSeek-V3, and GLM-4.7-Flash.
    Deepseek2,
    GptOss,
}

impl Architecture {
    const ALL: [Self; 11] = [
        Self::Llama,
        Self::Mixtral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Qwen3Moe,
        Self::Gemma3,
        Self::Phi3,
        Self::Glm4,
        Self::Glm4Moe,
        Self::Deepseek2,
        Self::GptOss,
    ];

    /// That of a whole model.
    pub(super) fn of(gguf: &Gguf) -> Result<Self, String> {
        let found = gguf.value("general.architecture");
        let Some(name) = found.and_then(|value| value.as_str()) else {
            return Err(format!(
                "metadata `general.architecture` is {found:?}, wanted a string; the file is incomplete"
            ));
        };
        let has_experts = gguf.value("llama.expert_count").and_then(|count| count.as_u64()).unwrap_or(0) != 0;
        let known = Self::ALL.into_iter().find(|known| known.name() == name);
        match known {
            Some(Self::Llama) if has_experts => Ok(Self::Mixtral),
            Some(known) => Ok(known),
            None => {
                let mut names: Vec<&str> = Self::ALL.map(Self::name).into();
                names.dedup();
                Err(format!(
                    "it is a model of the architecture `{name}`; of GGUF files those of {} are read, take the \
                     safetensors of this one",
                    names.join(", ")
                ))
            }
        }
    }

    /// The name in files.
    pub(super) fn name(self) -> &'static str {
        self.names().0
    }

    /// `model_type` of `transformers`.
    pub(super) fn model_type(self) -> &'static str {
        self.names().1
    }

    /// The class of `transformers`.
    pub(super) fn class(self) -> &'static str {
        self.names().2
    }

    const fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Llama => ("llama", "llama", "LlamaForCausalLM"),
            Self::Mixtral => ("llama", "mixtral", "MixtralForCausalLM"),
            Self::Qwen2 => ("qwen2", "qwen2", "Qwen2ForCausalLM"),
            Self::Qwen3 => ("qwen3", "qwen3", "Qwen3ForCausalLM"),
            Self::Qwen3Moe => ("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM"),
            Self::Gemma3 => ("gemma3", "gemma3_text", "Gemma3ForCausalLM"),
            Self::Phi3 => ("phi3", "phi3", "Phi3ForCausalLM"),
            Self::Glm4 => ("glm4", "glm4", "Glm4ForCausalLM"),
            Self::Glm4Moe => ("glm4moe", "glm4_moe", "Glm4MoeForCausalLM"),
            Self::Deepseek2 => ("deepseek2", "deepseek_v3", "DeepseekV3ForCausalLM"),
            Self::GptOss => ("gpt-oss", "gpt_oss", "GptOssForCausalLM"),
        }
    }

    /// What Hugging Face calls a tensor of a layer; `None` if it has no place there.
    fn of_layer(self, module: &str, kind: &str) -> Option<String> {
        let module = match (self, module) {
            (_, "attn_sinks") if kind == "weight" => return Some("self_attn.sinks".to_owned()),
            (_, "exp_probs_b") if kind == "bias" => return Some("mlp.gate.e_score_correction_bias".to_owned()),
            (Self::Gemma3, "ffn_norm") => "pre_feedforward_layernorm",
            (Self::Gemma3, "post_ffw_norm") => "post_feedforward_layernorm",
            (Self::Glm4, "post_ffw_norm") => "post_mlp_layernorm",
            (Self::Glm4, "post_attention_norm") => "post_self_attn_layernorm",
            (Self::Phi3 | Self::Glm4, "ffn_up") => "mlp.gate_up_proj",
            (Self::GptOss, "ffn_gate_inp") => "mlp.router",
            (_, "attn_norm") => "input_layernorm",
            (_, "ffn_norm" | "post_attention_norm") => "post_attention_layernorm",
            (_, "attn_q") => "self_attn.q_proj",
            (_, "attn_k") => "self_attn.k_proj",
            (_, "attn_v") => "self_attn.v_proj",
            (_, "attn_qkv") => "self_attn.qkv_proj",
            (_, "attn_output") => "self_attn.o_proj",
            (_, "attn_q_norm") => "self_attn.q_norm",
            (_, "attn_k_norm") => "self_attn.k_norm",
            (_, "attn_q_a") => "self_attn.q_a_proj",
            (_, "attn_q_a_norm") => "self_attn.q_a_layernorm",
            (_, "attn_q_b") => "self_attn.q_b_proj",
            (_, "attn_kv_a_mqa") => "self_attn.kv_a_proj_with_mqa",
            (_, "attn_kv_a_norm") => "self_attn.kv_a_layernorm",
            (_, "attn_kv_b") => "self_attn.kv_b_proj",
            (_, "ffn_gate") => "mlp.gate_proj",
            (_, "ffn_up") => "mlp.up_proj",
            (_, "ffn_down") => "mlp.down_proj",
            (_, "ffn_gate_inp") => "mlp.gate",
            (_, "ffn_gate_shexp") => "mlp.shared_experts.gate_proj",
            (_, "ffn_up_shexp") => "mlp.shared_experts.up_proj",
            (_, "ffn_down_shexp") => "mlp.shared_experts.down_proj",
            _ => return None,
        };
        Some(format!("{module}.{kind}"))
    }
}

/// The name in files.
impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// All tensors but those that config.json stands for, and those of layers that predict further tokens, which are for
/// speculation.
pub(super) fn tensors(gguf: &Gguf, config: &Value) -> Result<Vec<(String, Entry)>, String> {
    let architecture = Architecture::of(gguf)?;
    let number = |key: &str| config[key].as_u64().unwrap_or(0);
    let (layers, ahead) = (number("num_hidden_layers"), number("num_nextn_predict_layers"));
    let mut tensors = Vec::new();
    for tensor in gguf.tensors().iter().filter(|tensor| tensor.name != ROPE_FACTORS) {
        let no_place = || {
            format!(
                "tensor `{}` has no place in a model of the architecture {architecture} as it is read here; take its \
                 safetensors instead",
                tensor.name
            )
        };
        if let Some((_, outer)) = OUTER.iter().find(|(known, _)| *known == tensor.name) {
            let less_one = architecture == Architecture::Gemma3 && tensor.name.contains("norm");
            tensors.push(((*outer).to_owned(), plain(tensor, less_one)?));
            continue;
        }
        let (layer, rest) = in_layer(&tensor.name).ok_or_else(no_place)?;
        if (layers..layers.saturating_add(ahead)).contains(&layer) {
            continue;
        }
        let (module, kind @ ("weight" | "bias")) = rest.split_once('.').ok_or_else(no_place)? else {
            return Err(no_place());
        };
        let block = if layer < layers { Ok(format!("model.layers.{layer}")) } else { Err(no_place()) }?;
        let other = |other: &str| {
            let name = tensor.name.replace(module, other);
            gguf.tensor(&name).ok_or_else(|| format!("tensor `{}` has no counterpart `{name}`; {DAMAGED}", tensor.name))
        };
        match (module, kind) {
            ("attn_k_b", "weight") => {
                let values = other("attn_v_b")?;
                tensors.push((format!("{block}.self_attn.kv_b_proj.weight"), keys_and_values(tensor, values)?));
            }
            ("ffn_gate_exps", "bias") => {
                let up = other("ffn_up_exps")?;
                tensors.push((format!("{block}.mlp.experts.gate_up_proj_bias"), in_turn(tensor, up)?));
            }
            // With the counterpart.
            ("attn_v_b", "weight") => drop(other("attn_k_b")?),
            ("ffn_up_exps", "bias") => drop(other("ffn_gate_exps")?),
            ("ffn_down_exps", "bias") => {
                tensors.push((format!("{block}.mlp.experts.down_proj_bias"), plain(tensor, false)?));
            }
            ("ffn_gate_exps" | "ffn_up_exps" | "ffn_down_exps", "weight") => {
                let part = module.trim_start_matches("ffn_").trim_end_matches("_exps");
                for (expert, entry) in experts(tensor)?.enumerate() {
                    tensors.push((format!("{block}.mlp.experts.{expert}.{part}_proj.weight"), entry));
                }
            }
            _ => {
                let name = architecture.of_layer(module, kind).ok_or_else(no_place)?;
                let heads = match (architecture, module) {
                    (Architecture::Llama | Architecture::Mixtral, "attn_q") => Some(number("num_attention_heads")),
                    (Architecture::Llama | Architecture::Mixtral, "attn_k") => Some(number("num_key_value_heads")),
                    _ => None,
                };
                let entry = match heads {
                    Some(heads) => {
                        let heads = check_paired(tensor, heads, number("head_dim"))?;
                        entry::entry(tensor, Arrangement::InHalves { heads })
                    }
                    None => plain(tensor, architecture == Architecture::Gemma3 && module.ends_with("_norm"))?,
                };
                tensors.push((format!("{block}.{name}"), entry));
            }
        }
    }
    let mut names = HashSet::with_capacity(tensors.len());
    match tensors.iter().find(|(name, _)| !names.insert(name.as_str())) {
        Some((name, _)) => Err(format!("it has `{name}` in two tensors; {DAMAGED}")),
        None => Ok(tensors),
    }
}

/// The layer of a tensor, and its name there.
fn in_layer(name: &str) -> Option<(u64, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    // A number is spelled in one way only, so that no two tensors get one name.
    let number = layer.parse::<u64>().ok().filter(|number| number.to_string() == layer)?;
    Some((number, rest))
}

/// A tensor as it is stored, or norm weights less one: files of Gemma have what is multiplied with, Hugging Face what it
/// is above one.
fn plain(tensor: &GgufTensor, less_one: bool) -> Result<Entry, String> {
    if !less_one {
        return Ok(entry::entry(tensor, Arrangement::Same));
    }
    require_floats(tensor)?;
    Ok(entry::entry(tensor, Arrangement::LessOne))
}

/// The matrices of all experts, `[experts, rows, cols]` in one tensor.
fn experts(tensor: &GgufTensor) -> Result<impl Iterator<Item = Entry>, String> {
    let [experts, rows, cols] = dimensions(tensor)?;
    let bytes = tensor.range.len() / experts;
    Ok((0..experts).map(move |expert| {
        let start = tensor.range.start + expert * bytes;
        let (name, range) = (String::new(), start..start + bytes);
        let matrix =
            GgufTensor { name, shape: vec![rows, cols], tensor_type: tensor.tensor_type, file: tensor.file, range };
        entry::entry(&matrix, Arrangement::Same)
    }))
}

/// Key rows `[heads, rank, width]`, which are transposed, and value rows `[heads, width, rank]` of latent attention, as
/// one matrix `[heads · (width + width), rank]` that has those of a head together.
fn keys_and_values(keys: &GgufTensor, values: &GgufTensor) -> Result<Entry, String> {
    let ([heads, rank, key_width], [value_heads, value_width, value_rank]) = (dimensions(keys)?, dimensions(values)?);
    let rows = key_width.checked_add(value_width).and_then(|rows| rows.checked_mul(heads));
    match rows {
        Some(rows) if (heads, rank) == (value_heads, value_rank) => {
            Ok(entry::joined(vec![rows, rank], keys, values, Arrangement::KeysAndValues { heads, rank }))
        }
        _ => Err(mismatch(keys, values)),
    }
}

/// Biases `[experts, width]` of gates and of what they are multiplied with, as `[experts, 2 · width]` in turn.
fn in_turn(gate: &GgufTensor, up: &GgufTensor) -> Result<Entry, String> {
    require_floats(gate)?;
    require_floats(up)?;
    match *gate.shape.as_slice() {
        [experts, width] if gate.shape == up.shape && width <= usize::MAX / 2 => {
            Ok(entry::joined(vec![experts, 2 * width], gate, up, Arrangement::InTurn))
        }
        _ => Err(mismatch(gate, up)),
    }
}

fn mismatch(a: &GgufTensor, b: &GgufTensor) -> String {
    format!(
        "tensors `{}` {:?} and `{}` {:?} do not belong together; the file is damaged or of another kind",
        a.name, a.shape, b.name, b.shape
    )
}

fn require_floats(tensor: &GgufTensor) -> Result<(), String> {
    match tensor.tensor_type.block_weights() {
        1 => Ok(()),
        _ => Err(format!("tensor `{}` is stored as {}, wanted F32, F16 or BF16", tensor.name, tensor.tensor_type)),
    }
}

/// The three dimensions of a tensor that is not empty.
fn dimensions(tensor: &GgufTensor) -> Result<[usize; 3], String> {
    match *tensor.shape.as_slice() {
        [first, second, third] if !tensor.range.is_empty() => Ok([first, second, third]),
        _ => Err(format!("tensor `{}` has shape {:?}, wanted three dimensions above 0", tensor.name, tensor.shape)),
    }
}

/// Checks that a tensor has the rows of so many heads, and that rows are whole blocks.
fn check_paired(tensor: &GgufTensor, heads: u64, head_dim: u64) -> Result<usize, String> {
    let GgufTensor { name, shape, .. } = tensor;
    let rows = shape.first().copied().unwrap_or(0);
    let wanted = heads.checked_mul(head_dim).filter(|rows| *rows != 0 && head_dim.is_multiple_of(2));
    if wanted != Some(rows as u64) {
        return Err(format!(
            "tensor `{name}` has shape {shape:?}, wanted the rows of {heads} heads of {head_dim}, an even number; \
             the metadata is that of another model"
        ));
    }
    if shape.len() == 1 {
        require_floats(tensor)?;
    }
    Ok(heads as usize)
}
