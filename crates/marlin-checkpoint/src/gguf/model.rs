//! The tensors of a GGUF file under the names of Hugging Face.

use std::fmt;

use serde_json::Value;

use super::config::ROPE_FACTORS;
use super::entry::{self, Arrangement};
use super::{Gguf, GgufTensor};
use crate::layouts::Entry;

/// The embedding, whose rows are the vocabulary.
pub(super) const EMBEDDING: &str = "token_embd.weight";
/// The head; a model without is tied to its embedding.
pub(super) const HEAD: &str = "output.weight";

/// Tensors outside the layers: names in files, and those of Hugging Face.
const OUTER: [(&str, &str); 3] =
    [(EMBEDDING, "model.embed_tokens.weight"), ("output_norm.weight", "model.norm.weight"), (HEAD, "lm_head.weight")];

const QUERIES: &str = "attn_q";
const KEYS: &str = "attn_k";

/// Modules of a layer, likewise.
const MODULES: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    (QUERIES, "self_attn.q_proj"),
    (KEYS, "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Modules of a layer that Qwen3 has besides.
const HEAD_NORMS: [(&str, &str); 2] = [("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];

/// What a model computes, as `general.architecture` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen3,
}

impl Architecture {
    /// That of a whole model.
    pub(super) fn of(gguf: &Gguf) -> Result<Self, String> {
        check_whole(gguf)?;
        let found = gguf.value("general.architecture");
        match found.and_then(|value| value.as_str()) {
            Some("llama") => Ok(Self::Llama),
            Some("qwen3") => Ok(Self::Qwen3),
            Some(other) => Err(format!(
                "it is a model of the architecture `{other}`; of GGUF files `llama` and `qwen3` are read, \
                 take the safetensors of this one"
            )),
            None => {
                Err(format!("metadata `general.architecture` is {found:?}, wanted a string; the file is incomplete"))
            }
        }
    }

    /// The name in files, and the `model_type` of `transformers`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The class of `transformers`.
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The module of a layer as Hugging Face calls it.
    fn module(self, name: &str) -> Option<&'static str> {
        let more: &[_] = if self == Self::Qwen3 { &HEAD_NORMS } else { &[] };
        MODULES.iter().chain(more).find(|(known, _)| *known == name).map(|(_, module)| *module)
    }

    /// The name of Hugging Face, and the module if the tensor is part of a layer.
    fn translate(self, name: &str, layers: u64) -> Option<(String, Option<&str>)> {
        if let Some((_, outer)) = OUTER.iter().find(|(known, _)| *known == name) {
            return Some(((*outer).to_owned(), None));
        }
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (module, kind @ ("weight" | "bias")) = rest.split_once('.')? else { return None };
        // A number is spelled in one way only, so that no two tensors get one name.
        let number = layer.parse::<u64>().ok().filter(|number| number.to_string() == layer && *number < layers)?;
        Some((format!("model.layers.{number}.{}.{kind}", self.module(module)?), Some(module)))
    }
}

/// The name in files.
impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Refuses one file of several that a model was split into.
fn check_whole(gguf: &Gguf) -> Result<(), String> {
    let Some(parts) = gguf.value("split.count") else { return Ok(()) };
    match parts.as_u64() {
        Some(0 | 1) => Ok(()),
        _ => Err(format!(
            "it is one part of a model in several files (metadata `split.count` is {parts:?}), which are not read yet; \
             join them with `llama-gguf-split --merge`"
        )),
    }
}

/// All tensors but those that config.json stands for.
pub(super) fn tensors(gguf: &Gguf, config: &Value) -> Result<Vec<(String, Entry)>, String> {
    let architecture = Architecture::of(gguf)?;
    let number = |key: &str| config[key].as_u64().unwrap_or(0);
    let mut tensors = Vec::new();
    for tensor in gguf.tensors().iter().filter(|tensor| tensor.name != ROPE_FACTORS) {
        let (name, module) = architecture.translate(&tensor.name, number("num_hidden_layers")).ok_or_else(|| {
            format!(
                "tensor `{}` has no place in a model of the architecture {architecture} as it is read here; \
                 take its safetensors instead",
                tensor.name
            )
        })?;
        let heads = match (architecture, module) {
            (Architecture::Llama, Some(QUERIES)) => Some(number("num_attention_heads")),
            (Architecture::Llama, Some(KEYS)) => Some(number("num_key_value_heads")),
            _ => None,
        };
        let arrangement = match heads {
            Some(heads) => Arrangement::InHalves { heads: check_paired(tensor, heads, number("head_dim"))? },
            None => Arrangement::Same,
        };
        tensors.push((name, entry::entry(tensor, arrangement)));
    }
    Ok(tensors)
}

/// Checks that a tensor has the rows of so many heads, and that rows are whole blocks.
fn check_paired(tensor: &GgufTensor, heads: u64, head_dim: u64) -> Result<usize, String> {
    let GgufTensor { name, shape, tensor_type, .. } = tensor;
    let rows = shape.first().copied().unwrap_or(0);
    let wanted = heads.checked_mul(head_dim).filter(|rows| *rows != 0 && head_dim.is_multiple_of(2));
    if wanted != Some(rows as u64) {
        return Err(format!(
            "tensor `{name}` has shape {shape:?}, wanted the rows of {heads} heads of {head_dim}, an even number; \
             the metadata is that of another model"
        ));
    }
    if shape.len() == 1 && tensor_type.block_weights() != 1 {
        return Err(format!("tensor `{name}` is a bias stored as {tensor_type}, wanted F32, F16 or BF16"));
    }
    Ok(heads as usize)
}
