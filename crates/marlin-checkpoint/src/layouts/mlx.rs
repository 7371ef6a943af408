//! The layout of Apple's MLX, which `mlx-lm` writes.
//!
//! The linear `X` is stored as `X.weight`, codes in 32-bit words, and `X.scales`; integers also have `X.biases`, which
//! are added after scaling. Embedding and head may be packed like any linear. Experts, and the heads of latent attention,
//! are stacks `[count, N, K]` of matrices; here each of them is a matrix of its own, a view of the stack.

use std::collections::{HashMap, HashSet};

use marlin_format::{Element, Grouping, ScaleKind, Scheme, ZeroKind};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Buffer, Entry, Form, Gathered, PackedEntry, Stored};
use crate::CheckpointError;
use crate::shard::{Location, Shard};

/// What multiplies all scales of NVFP4 here, where MLX has none.
const ONE: [u8; 4] = 1f32.to_le_bytes();
/// Bits of a word of codes.
const WORD_BITS: usize = 32;

/// How a folder says its modules are stored.
pub(crate) struct Config {
    default: Packing,
    /// By the path of a module; `None` for one that is not quantised.
    modules: HashMap<String, Option<Packing>>,
}

/// Codes and groups of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packing {
    mode: Mode,
    group_size: u32,
    bits: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    /// Unsigned integers, a scale and a bias a group.
    #[default]
    Affine,
    Mxfp4,
    Mxfp8,
    Nvfp4,
}

/// The fields as they stand in config.json.
#[derive(Deserialize)]
struct RawPacking {
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    group_size: Option<u32>,
    #[serde(default)]
    bits: Option<u8>,
}

impl Config {
    /// The description in config.json, if it is one of MLX: it names no method. (`mlx-lm` writes it as
    /// `quantization_config` too.)
    pub(crate) fn find(config: &Value) -> Option<&Map<String, Value>> {
        let fields =
            ["quantization", "quantization_config"].into_iter().filter_map(|field| config.get(field)?.as_object());
        fields.into_iter().find(|found| found.contains_key("group_size") && !found.contains_key("quant_method"))
    }

    /// Reads it; `file` names config.json in messages. Fields that are neither the whole's packing nor a module's say
    /// nothing about weights.
    ///
    /// # Errors
    /// A mode, group size or number of bits that MLX does not have.
    pub(crate) fn read(found: &Map<String, Value>, file: &str) -> Result<Self, CheckpointError> {
        let malformed =
            |of: &str, problem: String| CheckpointError::malformed(file, format!("quantization{of}: {problem}"));
        let default = Packing::read(&Value::Object(found.clone())).map_err(|problem| malformed("", problem))?;
        let mut modules = HashMap::new();
        for (module, value) in found {
            let packing = match value {
                Value::Bool(quantised) => quantised.then_some(default),
                Value::Object(_) => {
                    Some(Packing::read(value).map_err(|problem| malformed(&format!(" of `{module}`"), problem))?)
                }
                _ => continue,
            };
            modules.insert(module.clone(), packing);
        }
        Ok(Self { default, modules })
    }

    fn packing(&self, module: &str) -> Result<Packing, String> {
        self.modules.get(module).copied().unwrap_or(Some(self.default)).ok_or_else(|| {
            format!("quantization says that `{module}` is not quantised, but the weights have `{module}.scales`")
        })
    }
}

impl Packing {
    fn read(found: &Value) -> Result<Self, String> {
        let RawPacking { mode, group_size, bits } = RawPacking::deserialize(found).map_err(|e| e.to_string())?;
        let (usual_group, usual_bits) = match mode {
            Mode::Affine => (64, 4),
            Mode::Mxfp4 => (32, 4),
            Mode::Mxfp8 => (32, 8),
            Mode::Nvfp4 => (16, 4),
        };
        let packing = Self { mode, group_size: group_size.unwrap_or(usual_group), bits: bits.unwrap_or(usual_bits) };
        let Self { group_size, bits, .. } = packing;
        let (is_known, known) = match mode {
            Mode::Affine => (
                matches!(group_size, 32 | 64 | 128) && matches!(bits, 2..=6 | 8),
                "2 to 6 or 8 bits in groups of 32, 64 or 128".to_owned(),
            ),
            _ => (
                (group_size, bits) == (usual_group, usual_bits),
                format!("{usual_bits} bits in groups of {usual_group}"),
            ),
        };
        if is_known {
            Ok(packing)
        } else {
            Err(format!("{bits} bits in groups of {group_size} are not read in mode {mode:?}; wanted {known}"))
        }
    }

    /// The scheme of a module whose scales are of this type, and the type that scales must have if that is another.
    fn scheme(self, scales: Dtype) -> Result<Scheme, &'static str> {
        let (scale, zero) = match (self.mode, scales) {
            (Mode::Affine, Dtype::F32) => (ScaleKind::F32, ZeroKind::F32Bias),
            (Mode::Affine, Dtype::F16) => (ScaleKind::F16, ZeroKind::F16Bias),
            (Mode::Affine, Dtype::BF16) => (ScaleKind::Bf16, ZeroKind::Bf16Bias),
            (Mode::Affine, _) => return Err("BF16, F16 or F32"),
            (Mode::Mxfp4 | Mode::Mxfp8, Dtype::U8) => (ScaleKind::E8M0, ZeroKind::None),
            (Mode::Nvfp4, Dtype::U8) => (ScaleKind::E4M3Global, ZeroKind::None),
            _ => return Err("U8"),
        };
        let element = match self.mode {
            Mode::Affine => Element::Uint(self.bits),
            Mode::Mxfp4 | Mode::Nvfp4 => Element::E2M1,
            Mode::Mxfp8 => Element::E4M3,
        };
        Ok(Scheme { zero, ..Scheme::scaled(element, Grouping::Columns(self.group_size), scale) })
    }
}

/// Gathers the stored tensors of each quantised module, and takes stacks apart; other tensors stay as they are. Without
/// `config`, nothing is quantised.
pub(crate) fn gather(
    config: Option<&Config>,
    tensors: Vec<(String, Location)>,
    shards: &[Shard],
    file: &str,
) -> Result<Gathered, CheckpointError> {
    let order: Vec<String> = tensors.iter().map(|(name, _)| name.clone()).collect();
    let mut stored = Stored { tensors: tensors.into_iter().collect(), shards, file };
    let of_whole = |name: &&String| name.ends_with(".global_scale");
    if let Some(name) = order.iter().find(of_whole).filter(|_| config.is_some()) {
        let layout = format!("mlx, a scale of the whole tensor (`{name}`)");
        return Err(CheckpointError::ForeignLayout { file: file.to_owned(), layout });
    }
    let mut entries = Vec::with_capacity(order.len());
    for name in order {
        let module = name.rsplit_once('.').filter(|(_, part)| ["weight", "scales", "biases"].contains(part));
        let module = module.map(|(module, _)| module);
        let quantised = module.filter(|module| stored.tensors.contains_key(&format!("{module}.scales"))).zip(config);
        if let Some((module, config)) = quantised {
            entries.extend(packed(config, module, &mut stored)?);
        } else if let Some(location) = stored.tensors.remove(&name) {
            // What is no longer there belongs to a module that is already gathered.
            entries.extend(plain(name, location));
        }
    }
    let mut seen = HashSet::with_capacity(entries.len());
    if let Some((twice, _)) = entries.iter().find(|(name, _)| !seen.insert(name.as_str())) {
        return Err(stored.malformed(format!("the weights hold `{twice}` twice: by itself and in a stack")));
    }
    Ok(Gathered { tensors: entries, notes: Vec::new() })
}

/// The matrix of a quantised module, or those of a stack.
fn packed(config: &Config, module: &str, stored: &mut Stored<'_>) -> Result<Vec<(String, Entry)>, CheckpointError> {
    let packing = config.packing(module).map_err(|problem| stored.malformed(problem))?;
    let scales = stored.require(module, "scales")?.1.clone();
    let scheme = packing.scheme(scales.dtype).map_err(|wanted| {
        let problem = format!("tensor `{module}.scales` is {}; wanted {wanted} for {packing:?}", scales.dtype);
        CheckpointError::malformed(&stored.shards[scales.shard].label, problem)
    })?;

    let codes = stored.require(module, "weight")?.1;
    let names = stack_names(module);
    let (count, rows, words) = match (names.is_some(), codes.shape.as_slice()) {
        (false, &[rows, words]) => (1, rows, words),
        (true, &[count, rows, words]) => (count, rows, words),
        (is_stack, _) => {
            let wanted = if is_stack { "matrices [count, rows, words]" } else { "a matrix [rows, words]" };
            return Err(stored.wrong_part(&format!("{module}.weight"), codes, wanted));
        }
    };
    let sizes = (words.checked_mul(WORD_BITS)).map(|bits| bits / usize::from(packing.bits));
    let cols =
        sizes.filter(|cols| count > 0 && rows > 0 && *cols > 0 && cols.is_multiple_of(packing.group_size as usize));
    let cols = cols.filter(|cols| cols * usize::from(packing.bits) == words * WORD_BITS);
    let cols = cols.ok_or_else(|| {
        let wanted = format!("rows of whole groups of {} codes of {} bits", packing.group_size, packing.bits);
        stored.wrong_part(&format!("{module}.weight"), codes, &wanted)
    })?;

    let groups = cols / packing.group_size as usize;
    let stacked = |shape: [usize; 2]| if names.is_some() { [&[count], &shape[..]].concat() } else { shape.to_vec() };
    let mut parts = vec![
        (Buffer::Codes, "weight", Dtype::U32, stacked([rows, words])),
        (Buffer::Scales, "scales", scales.dtype, stacked([rows, groups])),
    ];
    if scheme.zero != ZeroKind::None {
        parts.push((Buffer::Zeros, "biases", scales.dtype, stacked([rows, groups])));
    }
    let mut buffers = Vec::with_capacity(parts.len());
    for (buffer, part, dtype, shape) in parts {
        let (name, location) = stored.require(module, part)?;
        if location.dtype != dtype || location.shape != shape {
            let wanted = format!("{dtype} {shape:?} for [{rows}, {cols}] as {scheme}, as config.json says");
            return Err(stored.wrong_part(&name, location, &wanted));
        }
        buffers.extend(stored.tensors.remove(&name).map(|location| (buffer, location)));
    }

    let constants = if scheme.scale == ScaleKind::E4M3Global { vec![(Buffer::Globals, &ONE[..])] } else { Vec::new() };
    let entry = |index: usize| {
        let of_matrix =
            |(buffer, location): &(Buffer, Location)| (*buffer, Form::Same, part_of(location, index, count));
        let buffers = buffers.iter().map(of_matrix).collect();
        Entry::Packed(PackedEntry { scheme, rows, cols, buffers, constants: constants.clone() })
    };
    Ok(match names {
        Some(names) => (0..count).map(|index| (names.of(index), entry(index))).collect(),
        None => vec![(format!("{module}.weight"), entry(0))],
    })
}

/// An ordinary tensor, or the matrices of a stack of plain floats.
fn plain(name: String, location: Location) -> Vec<(String, Entry)> {
    let names = name.strip_suffix(".weight").and_then(stack_names);
    match (names, location.shape.as_slice()) {
        // Empty ones could be more than the file has bytes.
        (Some(names), &[count, rows, cols]) if !location.range.is_empty() => {
            let matrix = |index| Location { shape: vec![rows, cols], ..part_of(&location, index, count) };
            (0..count).map(|index| (names.of(index), Entry::Plain(matrix(index)))).collect()
        }
        _ => vec![(name, Entry::Plain(location))],
    }
}

/// One of `count` equal parts of a stored tensor.
fn part_of(location: &Location, index: usize, count: usize) -> Location {
    let bytes = location.range.len() / count;
    let start = location.range.start + index * bytes;
    Location { range: start..start + bytes, ..location.clone() }
}

/// What the matrices of a stack are called by themselves: `before`, their number, `after`.
struct StackNames {
    before: String,
    after: String,
}

impl StackNames {
    fn of(&self, index: usize) -> String {
        format!("{}{index}{}.weight", self.before, self.after)
    }
}

/// The names of the matrices of a stack; `None` if the module is one matrix. Experts are called as `transformers` calls
/// them. What `kv_b_proj` holds of a head there are two matrices here, which have the names of the stacks and a number.
fn stack_names(module: &str) -> Option<StackNames> {
    let (block, last) = module.rsplit_once('.')?;
    let experts =
        |block: &str, last: &str| Some(StackNames { before: format!("{block}.experts."), after: format!(".{last}") });
    let (outer, inner) = block.rsplit_once('.')?;
    match (inner, last) {
        ("switch_mlp", "gate_proj" | "up_proj" | "down_proj") if outer.ends_with(".block_sparse_moe") => experts(
            outer,
            if last == "gate_proj" {
                "w1"
            } else if last == "up_proj" {
                "w3"
            } else {
                "w2"
            },
        ),
        ("switch_mlp" | "experts", "gate_proj" | "up_proj" | "down_proj") => experts(outer, last),
        ("self_attn", "embed_q" | "unembed_out") => {
            Some(StackNames { before: format!("{module}."), after: String::new() })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_of_stacks_have_the_names_of_transformers() {
        let name = |module: &str| stack_names(module).map(|names| names.of(7));
        for (module, wanted) in [
            ("model.layers.0.mlp.switch_mlp.up_proj", "model.layers.0.mlp.experts.7.up_proj.weight"),
            (
                "model.layers.0.block_sparse_moe.switch_mlp.gate_proj",
                "model.layers.0.block_sparse_moe.experts.7.w1.weight",
            ),
            (
                "model.layers.0.block_sparse_moe.switch_mlp.down_proj",
                "model.layers.0.block_sparse_moe.experts.7.w2.weight",
            ),
            (
                "model.layers.0.block_sparse_moe.switch_mlp.up_proj",
                "model.layers.0.block_sparse_moe.experts.7.w3.weight",
            ),
            ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.7.down_proj.weight"),
            ("model.layers.0.self_attn.embed_q", "model.layers.0.self_attn.embed_q.7.weight"),
        ] {
            assert_eq!(name(module).as_deref(), Some(wanted));
        }
        for module in
            ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts.3.up_proj", "a.self_attn.o_proj"]
        {
            assert_eq!(name(module), None, "{module}");
        }
    }
}
