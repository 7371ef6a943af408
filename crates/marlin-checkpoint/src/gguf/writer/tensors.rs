//! Which tensors a file has, and where each of Hugging Face goes.

use std::collections::{BTreeMap, HashMap};

use marlin_format::Scheme;

use super::GgufType;
use super::blocks::type_of;
use super::file::Stored;
use super::metadata::{Architecture, Model};
use crate::gguf::config::ROPE_FACTORS;
use crate::{PlannedTensor, layouts};

/// Where a tensor's bytes go.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Index of the tensor of the file.
    pub(super) stored: usize,
    /// From where that tensor begins; from the start of the file once that is known.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) rows: usize,
    pub(super) tensor_type: GgufType,
    /// Heads whose rows are brought into the order of llama.cpp ([`in_pairs`]).
    pub(super) paired_heads: Option<usize>,
}

/// All tensors of a file.
pub(super) struct Tensors {
    pub(super) stored: Vec<Stored>,
    pub(super) places: HashMap<String, Place>,
    /// Tensors that come from config.json.
    pub(super) constants: Vec<(usize, Vec<u8>)>,
}

/// Where a name leads.
struct Target {
    name: String,
    /// Expert and their number, of tensors that hold a matrix of each.
    expert: Option<(usize, usize)>,
    /// Kept in f32: small and sensitive, and llama.cpp computes with nothing else there.
    is_float: bool,
    paired_heads: Option<usize>,
}

/// Modules of a layer, at Hugging Face and in files.
const MODULES: [(&str, &str); 12] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
];

/// Decides about every tensor.
pub(super) fn plan(model: &Model, tensors: &[PlannedTensor]) -> Result<Tensors, String> {
    let mut all = Tensors { stored: Vec::new(), places: HashMap::new(), constants: Vec::new() };
    let mut index: HashMap<String, usize> = HashMap::new();
    let mut experts: BTreeMap<usize, usize> = BTreeMap::new();
    for tensor in tensors {
        let name = &tensor.name;
        // What old checkpoints hold of rotary embedding follows from config.json.
        if name.ends_with(".rotary_emb.inv_freq") {
            return Err(format!("tensor `{name}` follows from config.json; remove it from the source"));
        }
        let target = target(model, name).ok_or_else(|| {
            format!("tensor `{name}` has no place in a GGUF file of this architecture; choose another --layout")
        })?;
        let (scheme, shape) = describe(tensor)?;
        let tensor_type = if target.is_float || shape.len() == 1 { GgufType::F32 } else { of_scheme(name, &scheme)? };
        let bytes = tensor_type.bytes(&shape).map_err(|_| {
            let weights = tensor_type.block_weights();
            format!("tensor `{name}` {shape:?}: rows are no whole blocks of {weights}, which {tensor_type} needs")
        })? as u64;
        if let Some(heads) = target.paired_heads
            && !shape[0].is_multiple_of(2 * heads)
        {
            return Err(format!("tensor `{name}` {shape:?} has not the rows of {heads} heads of pairs"));
        }
        let stacked = match target.expert {
            Some((_, count)) => [&[count], shape.as_slice()].concat(),
            None => shape.clone(),
        };
        let stored = *index.entry(target.name.clone()).or_insert(all.stored.len());
        let count = target.expert.map_or(1, |(_, count)| count as u64);
        let whole = bytes.checked_mul(count).ok_or("the model is too large")?;
        let found = Stored { name: target.name, shape: stacked, tensor_type, bytes: whole };
        match all.stored.get(stored) {
            None => all.stored.push(found),
            // Another expert of the same.
            Some(known) if *known == found && target.expert.is_some() => {}
            Some(known) => {
                return Err(format!(
                    "tensor `{name}` and others go to `{}`, but differ in shape or format ({}, {tensor_type})",
                    known.name, known.tensor_type
                ));
            }
        }
        let offset = target.expert.map_or(0, |(expert, _)| expert as u64 * bytes);
        if target.expert.is_some() {
            *experts.entry(stored).or_default() += 1;
        }
        let place = Place { stored, offset, bytes, rows: shape[0], tensor_type, paired_heads: target.paired_heads };
        if all.places.insert(name.clone(), place).is_some() {
            return Err(format!("tensor `{name}` is there twice"));
        }
    }
    if let Some((stored, found)) = experts.iter().find(|(_, found)| **found != model.experts) {
        let name = &all.stored[*stored].name;
        return Err(format!("`{name}` needs matrices of {} experts, there are {found}", model.experts));
    }
    if let Some(factors) = &model.rope_factors {
        let bytes: Vec<u8> = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
        all.constants.push((all.stored.len(), bytes.clone()));
        all.stored.push(Stored {
            name: ROPE_FACTORS.to_owned(),
            shape: vec![factors.len()],
            tensor_type: GgufType::F32,
            bytes: bytes.len() as u64,
        });
    }
    Ok(all)
}

impl Tensors {
    /// `general.file_type`: the number in llama.cpp of what most matrices are stored as.
    pub(super) fn file_type(&self) -> u32 {
        let mut bytes: HashMap<GgufType, u64> = HashMap::new();
        for tensor in self.stored.iter().filter(|tensor| tensor.name.starts_with("blk.")) {
            *bytes.entry(tensor.tensor_type).or_default() += tensor.bytes;
        }
        let most = bytes.into_iter().max_by_key(|(kind, bytes)| (*bytes, kind.id())).map(|(kind, _)| kind);
        match most {
            Some(GgufType::F16) => 1,
            Some(GgufType::Q4_0) => 2,
            Some(GgufType::Q8_0) => 7,
            Some(GgufType::Bf16) => 32,
            Some(GgufType::Mxfp4) => 38,
            _ => 0,
        }
    }
}

fn describe(tensor: &PlannedTensor) -> Result<(Scheme, Vec<usize>), String> {
    if let Some((scheme, shape)) = tensor.packed() {
        return Ok((scheme, shape.to_vec()));
    }
    let name = &tensor.name;
    let Some((dtype, shape)) = tensor.raw_content() else { return Err(format!("tensor `{name}` is no tensor")) };
    let scheme = layouts::dense_scheme(dtype).filter(|_| matches!(shape.len(), 1 | 2));
    let scheme =
        scheme.ok_or_else(|| format!("tensor `{name}` is {dtype} {shape:?}, wanted a matrix or vector of floats"))?;
    Ok((scheme, shape.to_vec()))
}

fn of_scheme(name: &str, scheme: &Scheme) -> Result<GgufType, String> {
    type_of(scheme).ok_or_else(|| format!("tensor `{name}`: GGUF has no place for {scheme}"))
}

/// What a tensor of Hugging Face becomes.
fn target(model: &Model, name: &str) -> Option<Target> {
    let plain =
        |name: &str, is_float| Some(Target { name: name.to_owned(), expert: None, is_float, paired_heads: None });
    match name {
        "model.embed_tokens.weight" => return plain("token_embd.weight", false),
        "model.norm.weight" => return plain("output_norm.weight", true),
        "lm_head.weight" => return plain("output.weight", false),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let layer = layer.parse::<usize>().ok().filter(|number| *number < model.layers && number.to_string() == layer)?;
    let (module, kind) = rest.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    if let Some(rest) = module.strip_prefix("mlp.experts.") {
        let (expert, module) = rest.split_once('.')?;
        let number = expert.parse::<usize>().ok().filter(|n| *n < model.experts && n.to_string() == expert)?;
        let which = match (module, kind) {
            ("gate_proj", "weight") => "gate",
            ("up_proj", "weight") => "up",
            ("down_proj", "weight") => "down",
            _ => return None,
        };
        let name = format!("blk.{layer}.ffn_{which}_exps.weight");
        return Some(Target { name, expert: Some((number, model.experts)), is_float: false, paired_heads: None });
    }
    let (_, stored) = MODULES.iter().find(|(known, _)| *known == module)?;
    let architecture = model.architecture;
    let has_place = match *stored {
        "attn_q_norm" | "attn_k_norm" => matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe),
        "ffn_gate_inp" => architecture == Architecture::Qwen3Moe && kind == "weight",
        "ffn_gate" | "ffn_up" | "ffn_down" => {
            architecture != Architecture::Qwen3Moe && (kind == "weight" || architecture == Architecture::Llama)
        }
        "attn_q" | "attn_k" | "attn_v" => {
            kind == "weight" || matches!(architecture, Architecture::Llama | Architecture::Qwen2)
        }
        "attn_output" => kind == "weight" || architecture == Architecture::Llama,
        _ => kind == "weight",
    };
    let paired_heads = match (architecture, *stored) {
        (Architecture::Llama, "attn_q") => Some(model.heads),
        (Architecture::Llama, "attn_k") => Some(model.kv_heads),
        _ => None,
    };
    let is_float = stored.ends_with("norm") || *stored == "ffn_gate_inp" || kind == "bias";
    has_place.then(|| Target { name: format!("blk.{layer}.{stored}.{kind}"), expert: None, is_float, paired_heads })
}

/// Rows of Llama's queries or keys in the order of llama.cpp: those that rotary embedding turns together side by side,
/// where `transformers` has all first ones in the first half of the head and all second ones in the other.
pub(super) fn in_pairs(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row_bytes, head_dim) = (bytes.len() / rows, rows / heads);
    let pairs = head_dim / 2;
    let mut ordered = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, within) = (row / head_dim, row % head_dim);
        let from = head * head_dim + within % 2 * pairs + within / 2;
        ordered.extend_from_slice(&bytes[from * row_bytes..][..row_bytes]);
    }
    ordered
}
