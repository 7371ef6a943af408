//! A GGUF file as a model: under the names of Hugging Face, and as `transformers` has it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use marlin_format::PackedMatrix;
use serde_json::Value;

use super::config::{self, ROPE_FACTORS};
use super::{Gguf, GgufTensor};
use crate::CheckpointError;

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

/// A GGUF file whose tensors go by the names of Hugging Face, with the config.json they belong to.
///
/// Read are the architectures `llama` (Llama 1 to 3 and what took over their architecture) and `qwen3`, without
/// experts.
pub struct GgufModel {
    gguf: Gguf,
    config: Value,
    /// In the order of the file.
    tensors: Vec<(String, Origin)>,
    index: HashMap<String, usize>,
}

/// Where a tensor comes from.
#[derive(Debug)]
struct Origin {
    /// The name in the file.
    name: String,
    /// Heads whose rows are in the order of llama.cpp ([`in_halves`]).
    paired_heads: Option<usize>,
}

impl GgufModel {
    /// Opens a file as [`Gguf::open`] does.
    ///
    /// # Errors
    /// As there; or the model is of an architecture that is not read, lacks metadata, or has metadata or tensors
    /// without a place in it.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let gguf = Gguf::open(path)?;
        let malformed = |problem| CheckpointError::malformed(&gguf.label, problem);
        check_whole(&gguf).map_err(malformed)?;
        let architecture = Architecture::of(&gguf).map_err(malformed)?;
        let config = config::config(&gguf, architecture).map_err(malformed)?;
        let tensors = tensors(&gguf, architecture, &config).map_err(malformed)?;
        let index = tensors.iter().enumerate().map(|(index, (name, _))| (name.clone(), index)).collect();
        Ok(Self { gguf, config, tensors, index })
    }

    /// The file.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// config.json as `transformers` would have it.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Names of Hugging Face of all tensors, in the order of the file.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }

    /// The shape of a tensor, outermost dimension first; `None` if there is none of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let origin = &self.tensors[*self.index.get(name)?].1;
        self.gguf.tensor(&origin.name).map(|tensor| tensor.shape.as_slice())
    }

    /// A matrix `[rows, cols]`, packed as by [`Gguf::matrix`], with rows in the order of Hugging Face.
    ///
    /// # Errors
    /// As there.
    pub fn matrix(&self, name: &str) -> Result<PackedMatrix<'_>, CheckpointError> {
        let (tensor, bytes) = self.stored(name)?;
        match bytes {
            Cow::Borrowed(bytes) => self.gguf.pack(tensor, bytes),
            Cow::Owned(bytes) => self.gguf.pack(tensor, &bytes).map(PackedMatrix::into_owned),
        }
    }

    /// All values of a tensor, as [`Gguf::values`] gives them, with rows in the order of Hugging Face.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn values(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let (tensor, bytes) = self.stored(name)?;
        Ok(tensor.decode(&bytes))
    }

    /// The blocks of a tensor, rows in the order of Hugging Face.
    fn stored(&self, name: &str) -> Result<(&GgufTensor, Cow<'_, [u8]>), CheckpointError> {
        let Some(index) = self.index.get(name) else { return Err(self.gguf.no_tensor(name)) };
        let origin = &self.tensors[*index].1;
        let tensor = self.gguf.require(&origin.name)?;
        let bytes = self.gguf.stored(tensor);
        Ok((
            tensor,
            origin.paired_heads.map_or(Cow::Borrowed(bytes), |heads| in_halves(bytes, tensor.shape[0], heads).into()),
        ))
    }
}

impl fmt::Debug for GgufModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GgufModel").field("gguf", &self.gguf).field("config", &self.config).finish()
    }
}

impl Architecture {
    fn of(gguf: &Gguf) -> Result<Self, String> {
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
fn tensors(gguf: &Gguf, architecture: Architecture, config: &Value) -> Result<Vec<(String, Origin)>, String> {
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
        let paired_heads = heads.map(|heads| check_paired(tensor, heads, number("head_dim"))).transpose()?;
        tensors.push((name, Origin { name: tensor.name.clone(), paired_heads }));
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

/// Rows of queries or keys in the order of Hugging Face.
///
/// Rotary embedding turns pairs of rows of a head. llama.cpp's kind for Llama has those of a pair side by side,
/// `transformers` has all first ones in the first half of the head and all second ones in the other (`permute` of
/// llama.cpp's converter, undone).
fn in_halves(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row_bytes, head_dim) = (bytes.len() / rows, rows / heads);
    let pairs = head_dim / 2;
    let mut ordered = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, within) = (row / head_dim, row % head_dim);
        let from = head * head_dim + within % pairs * 2 + within / pairs;
        ordered.extend_from_slice(&bytes[from * row_bytes..][..row_bytes]);
    }
    ordered
}
