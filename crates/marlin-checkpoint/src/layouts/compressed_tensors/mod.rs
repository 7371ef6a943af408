//! The layout of the Python package `compressed-tensors`, which vLLM and `transformers` read.
//!
//! The linear `X` is stored as `X.weight_packed` or `X.weight`, `X.weight_scale` and whatever else its format calls for.
//! Integers are stored with the offset that makes them unsigned, so packed codes are the canonical ones.
//!
//! Its readers compute `(code − zero) · scale` in the type of the scale. Integers and FP8 are therefore written with f32
//! scales, and decode there to the values that they have here. NVFP4 stores the *inverse* of the f32 that multiplies its
//! scales; a power of two has an exact one.

mod config;
mod old;

use std::collections::BTreeSet;

use marlin_format::{Element, Grouping, ScaleKind, Scheme, ZeroKind};
use safetensors::Dtype;
use serde_json::{Value, json};

pub(crate) use self::config::Config;
use self::config::{Format, Weights};
use super::{Buffer, Content, Form, Gathered, Part, Stored};
use crate::CheckpointError;
use crate::shard::{Location, Shard};

/// The `quant_method`.
pub(crate) const METHOD: &str = "compressed-tensors";
/// What is written.
const KNOWN: &str =
    "int4, int4-sym and int8 in groups of columns or rows, fp8 a tensor, a row or a tile, mxfp4 and nvfp4";

/// What is stored of a scheme, if the layout has a place for it.
pub(super) fn written_scheme(scheme: Scheme) -> Result<Scheme, CheckpointError> {
    let written = match scheme.scale {
        ScaleKind::F32 | ScaleKind::F16 | ScaleKind::Bf16 => Scheme { scale: ScaleKind::F32, ..scheme },
        _ => scheme,
    };
    match format_of(&written) {
        Some(_) => Ok(written),
        None => Err(CheckpointError::NoPlace { layout: METHOD, known: KNOWN, scheme: Box::new(scheme) }),
    }
}

/// The format that other engines know a scheme by.
fn format_of(scheme: &Scheme) -> Option<Format> {
    let plain = |element, grouping, scale| Scheme::scaled(element, grouping, scale) == *scheme;
    let Scheme { element, grouping, .. } = *scheme;
    match (element, grouping) {
        (Element::Int(4 | 8), Grouping::Row | Grouping::Columns(_)) if plain(element, grouping, ScaleKind::F32) => {
            Some(Format::Packed)
        }
        (Element::Uint(4 | 8), Grouping::Row | Grouping::Columns(_))
            if *scheme == (Scheme { zero: ZeroKind::Integer, ..Scheme::scaled(element, grouping, ScaleKind::F32) }) =>
        {
            Some(Format::Packed)
        }
        (Element::E4M3, Grouping::Tensor | Grouping::Row | Grouping::Block { .. })
            if plain(element, grouping, ScaleKind::F32) =>
        {
            Some(Format::Bytes)
        }
        _ if *scheme == Scheme::MXFP4 => Some(Format::Mxfp4),
        _ if *scheme == Scheme::NVFP4 => Some(Format::Nvfp4),
        _ => None,
    }
}

/// The tensors that hold the packed matrix `name`, codes first.
pub(super) fn written_parts(name: &str, scheme: &Scheme, rows: usize, cols: usize) -> Result<Vec<Part>, String> {
    let module = name
        .strip_suffix(".weight")
        .ok_or_else(|| format!("tensor `{name}` is no `….weight`, which {METHOD} could pack"))?;
    let format = format_of(scheme).ok_or_else(|| format!("tensor `{name}`: {METHOD} has no place for {scheme}"))?;
    parts(module, format, scheme, rows, cols).map_err(|problem| format!("tensor `{name}`: {problem}"))
}

/// The tensors that hold the linear `module`, codes first.
fn parts(module: &str, format: Format, scheme: &Scheme, rows: usize, cols: usize) -> Result<Vec<Part>, String> {
    // Proves the scheme valid and every size below addressable.
    scheme.packed_bytes(rows, cols).map_err(|e| e.to_string())?;
    if let Grouping::Columns(group) = scheme.grouping
        && !cols.is_multiple_of(group as usize)
    {
        return Err(format!("{cols} columns are no multiple of the group of {group}, which {METHOD} demands"));
    }
    let mut parts = Vec::with_capacity(5);
    let mut part = |suffix: &str, dtype, shape, content| {
        parts.push(Part { name: format!("{module}.{suffix}"), dtype, shape, content });
    };
    let bits = scheme.element.bits();
    let row_bytes = scheme.code_row_bytes(cols).map_err(|e| e.to_string())?;
    let codes = |form| Content::Buffer(Buffer::Codes, form);
    match format {
        Format::Packed => {
            part("weight_packed", Dtype::I32, vec![rows, row_bytes.div_ceil(4)], codes(Form::Words { row_bytes }));
            let shape = [rows as i64, cols as i64].map(i64::to_le_bytes).concat();
            part("weight_shape", Dtype::I64, vec![2], Content::Fixed(shape));
        }
        Format::Nvfp4 | Format::Mxfp4 => {
            part("weight_packed", Dtype::U8, vec![rows, row_bytes], codes(Form::Same));
        }
        Format::Bytes | Format::Mxfp8 if scheme.element == Element::E4M3 => {
            part("weight", Dtype::F8_E4M3, vec![rows, cols], codes(Form::Same));
        }
        Format::Marlin24 => return Err("marlin-24 is read only".to_owned()),
        Format::Bytes | Format::Mxfp8 => {
            part("weight", Dtype::I8, vec![rows, cols], codes(Form::TwosComplement));
        }
    }

    let groups = scheme.groups_per_row(cols);
    let per_group = match scheme.grouping {
        Grouping::Tensor => vec![1],
        Grouping::Row | Grouping::Columns(_) | Grouping::Block { .. } => {
            vec![rows.div_ceil(scheme.group_rows(rows)), groups]
        }
    };
    let (scale_type, _) = super::scale_type(scheme.scale);
    part("weight_scale", scale_type, per_group, Content::Buffer(Buffer::Scales, Form::Same));
    if scheme.scale == ScaleKind::E4M3Global {
        part("weight_global_scale", Dtype::F32, vec![1], Content::Buffer(Buffer::Globals, Form::Inverse));
    }
    if scheme.zero == ZeroKind::Integer {
        let (dtype, shape, form) = match format {
            Format::Packed => {
                let words = (rows * bits as usize).div_ceil(32);
                (Dtype::I32, vec![words, groups], Form::DownRows { rows, groups, bits })
            }
            _ => (Dtype::I8, vec![rows, groups], Form::TwosComplement),
        };
        part("weight_zero_point", dtype, shape, Content::Buffer(Buffer::Zeros, form));
    }
    Ok(parts)
}

/// The `quantization_config` of a folder with these packed and these plain matrices.
pub(super) fn written_config(packed: &[(&str, Scheme, [usize; 2])], plain: &[&str]) -> Value {
    let module = |name: &str| name.strip_suffix(".weight").unwrap_or(name).to_owned();
    let mut schemes: Vec<Scheme> = Vec::new();
    for (_, scheme, _) in packed {
        if !schemes.contains(scheme) {
            schemes.push(*scheme);
        }
    }
    let mut formats = BTreeSet::new();
    let mut groups = serde_json::Map::new();
    for (index, scheme) in schemes.iter().enumerate() {
        let targets = if schemes.len() == 1 {
            vec!["Linear".to_owned()]
        } else {
            packed.iter().filter(|(_, other, _)| other == scheme).map(|(name, ..)| module(name)).collect()
        };
        let format = written_format(scheme);
        formats.insert(format);
        let group = json!({
            "targets": targets,
            "weights": written_weights(scheme),
            "input_activations": null,
            "output_activations": null,
            "format": format,
        });
        groups.insert(format!("group_{index}"), group);
    }
    // A head that is tied to the embedding has no tensor, but is a linear all the same.
    let mut ignore: Vec<String> = plain.iter().copied().map(module).collect();
    if !ignore.iter().any(|name| name == "lm_head") {
        ignore.push("lm_head".to_owned());
    }
    json!({
        "quant_method": METHOD,
        "format": if formats.len() == 1 { formats.first().copied() } else { Some("mixed-precision") },
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": null,
    })
}

/// The name of a scheme's format.
fn written_format(scheme: &Scheme) -> &'static str {
    match scheme.element {
        Element::E4M3 => "float-quantized",
        Element::E2M1 if *scheme == Scheme::NVFP4 => "nvfp4-pack-quantized",
        Element::E2M1 => "mxfp4-pack-quantized",
        _ => "pack-quantized",
    }
}

/// The arguments of a scheme's weights.
fn written_weights(scheme: &Scheme) -> Value {
    let (strategy, group_size, block) = match scheme.grouping {
        Grouping::Tensor => ("tensor", None, None),
        Grouping::Row => ("channel", None, None),
        Grouping::Columns(size) if *scheme == Scheme::NVFP4 => ("tensor_group", Some(size), None),
        Grouping::Columns(size) => ("group", Some(size), None),
        Grouping::Block { rows, cols } => ("block", None, Some([rows, cols])),
    };
    let is_integer = matches!(scheme.element, Element::Int(_) | Element::Uint(_));
    json!({
        "num_bits": scheme.element.bits(),
        "type": if is_integer { "int" } else { "float" },
        "symmetric": scheme.zero == ZeroKind::None,
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": block,
        "dynamic": false,
    })
}

/// Gathers the stored tensors of each quantised linear into one matrix `X.weight`; the others stay as they are.
///
/// A linear is quantised if it has a `weight_scale`; what config.json targets and ignores decides only which group's
/// arguments it has.
pub(crate) fn gather(
    config: &Config,
    tensors: Vec<(String, Location)>,
    shards: &[Shard],
    file: &str,
) -> Result<Gathered, CheckpointError> {
    let marks = ["weight_packed", "weight_scale", "compressed", "scale_packed"];
    let mut entries = Stored::gather(tensors, shards, file, &marks, |module, stored| linear(config, module, stored))?;
    // What config.notes says is not followed need not be loaded either.
    entries.retain(|(name, _)| !config.ignores(name));
    Ok(Gathered { tensors: entries, notes: config.notes() })
}

/// One quantised linear.
fn linear(config: &Config, module: &str, stored: &mut Stored<'_>) -> Result<super::PackedEntry, CheckpointError> {
    let name = format!("{module}.weight");
    if stored.tensors.contains_key(&format!("{module}.compressed")) {
        return old::bitmask(config, module, stored);
    }
    let group = config.group(module).map_err(|problem| stored.malformed(problem))?;
    let (format, weights) = (group.format, group.weights);
    if format == Format::Marlin24 {
        return old::marlin24(&weights, module, stored);
    }
    let [rows, cols] = shape(module, format, stored)?;
    let mut scheme = scheme(module, format, &weights, stored)?;
    let malformed = |stored: &Stored<'_>, problem| stored.malformed(format!("tensor `{name}`: {problem}"));
    let mut parts = parts(module, format, &scheme, rows, cols).map_err(|problem| malformed(stored, problem))?;
    if format == Format::Packed {
        old::pad(&mut parts, &scheme, [rows, cols], stored);
        parts.extend(old::group_index(module, &mut scheme, cols, stored)?);
    }
    let entry = stored.take(&name, scheme, [rows, cols], parts)?;
    // Some writers leave the zero points of symmetric weights in.
    if let Some(zeros) = stored.tensors.remove(&format!("{module}.weight_zero_point"))
        && stored.bytes(&zeros).iter().any(|byte| *byte != 0)
    {
        return Err(
            stored.malformed(format!("`{name}` is symmetric, but has a `{module}.weight_zero_point` that is not 0"))
        );
    }
    Ok(entry)
}

/// The unpacked shape of a linear.
fn shape(module: &str, format: Format, stored: &Stored<'_>) -> Result<[usize; 2], CheckpointError> {
    let part = match format {
        Format::Packed => return sizes(module, "weight_shape", stored),
        Format::Bytes | Format::Mxfp8 => "weight",
        Format::Nvfp4 | Format::Mxfp4 | Format::Marlin24 => "weight_packed",
    };
    let (name, location) = stored.require(module, part)?;
    let found = match (format, location.shape.as_slice()) {
        (Format::Bytes | Format::Mxfp8, &[rows, cols]) => Some([rows, cols]),
        (Format::Nvfp4 | Format::Mxfp4, &[rows, pairs]) => pairs.checked_mul(2).map(|cols| [rows, cols]),
        _ => None,
    };
    found.ok_or_else(|| stored.wrong_part(&name, location, "a matrix"))
}

/// The unpacked shape of a linear as a tensor of two numbers gives it.
fn sizes(module: &str, part: &str, stored: &Stored<'_>) -> Result<[usize; 2], CheckpointError> {
    let (name, location) = stored.require(module, part)?;
    let sizes = match (location.dtype, location.shape.as_slice()) {
        (Dtype::I64, [2] | [2, 1]) => {
            let sizes = stored.bytes(location).as_chunks::<8>().0.iter();
            let sizes: Option<Vec<usize>> = sizes.map(|bytes| i64::from_le_bytes(*bytes).try_into().ok()).collect();
            sizes.and_then(|sizes| <[usize; 2]>::try_from(sizes).ok())
        }
        _ => None,
    };
    sizes.ok_or_else(|| stored.wrong_part(&name, location, "I64 [2] with two sizes"))
}

/// The scheme of a linear; integers and FP8 may have scales of any float type.
fn scheme(module: &str, format: Format, weights: &Weights, stored: &Stored<'_>) -> Result<Scheme, CheckpointError> {
    let scale = match format {
        Format::Nvfp4 => ScaleKind::E4M3Global,
        Format::Mxfp4 | Format::Mxfp8 => ScaleKind::E8M0,
        Format::Packed | Format::Bytes | Format::Marlin24 => stored.float_scale(module, "weight_scale")?,
    };
    let zero = if weights.asymmetric { ZeroKind::Integer } else { ZeroKind::None };
    Ok(Scheme { zero, ..Scheme::scaled(weights.element, weights.grouping, scale) })
}
