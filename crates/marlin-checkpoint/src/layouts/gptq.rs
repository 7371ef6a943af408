//! The layout of GPTQ: that of the Python packages `auto-gptq` and `gptqmodel`.
//!
//! The linear `X` `[N, K]` is stored transposed, as `X.qweight`, `X.scales`, `X.qzeros` and `X.g_idx`. Which modules
//! are quantised is seen from what is stored; config.json says with how many bits, in which groups, and whether zero
//! points are stored minus one (version 1). Some kernels take a stored zero point of 2^b − 1 for 2^b. `gptqmodel` wraps
//! around, which undoes how such a value came about: as 0 minus 1.

use marlin_format::{ColumnOrder, Element, Grouping, Scheme, ZeroKind};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::pattern::Pattern;
use super::reorder::{Reorder, ZeroCodes, ZeroPoints};
use super::{Buffer, Form, Gathered, PackedEntry, Part, Stored};
use crate::CheckpointError;
use crate::shard::{Location, Shard};

/// The `quant_method`.
pub(crate) const METHOD: &str = "gptq";

/// How a folder says its linears are stored.
pub(crate) struct Config {
    arguments: Arguments,
    zeros: ZeroCodes,
    /// The first that matches decides; `None` for modules that are not quantised.
    overrides: Vec<(Pattern, Option<Arguments>)>,
}

/// How the codes of a module are stored.
#[derive(Debug, Clone, Copy)]
struct Arguments {
    bits: u8,
    /// `None` for a group a row.
    group: Option<u32>,
}

#[derive(Deserialize)]
struct RawConfig {
    bits: i64,
    group_size: i64,
    #[serde(default)]
    checkpoint_format: Option<String>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    is_marlin_format: bool,
    #[serde(default)]
    dynamic: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
struct RawOverride {
    #[serde(default)]
    bits: Option<i64>,
    #[serde(default)]
    group_size: Option<i64>,
}

impl Config {
    /// Reads it; `file` names the file in messages.
    ///
    /// # Errors
    /// A layout within the layout that is not read, or a field that is missing or makes no sense.
    pub(crate) fn read(found: &Value, file: &str) -> Result<Self, CheckpointError> {
        let malformed = |problem: String| CheckpointError::malformed(file, format!("{METHOD}: {problem}"));
        let raw = RawConfig::deserialize(found).map_err(|e| malformed(e.to_string()))?;
        let zeros = match raw.checkpoint_format.or(raw.format).as_deref() {
            _ if raw.is_marlin_format => Err("is_marlin_format".to_owned()),
            None | Some("gptq") => Ok(ZeroCodes::MinusOne),
            Some("gptq_v2") => Ok(ZeroCodes::Plain),
            Some(other) => Err(format!("checkpoint_format {other}")),
        };
        let zeros = zeros.map_err(|what| CheckpointError::ForeignLayout {
            file: file.to_owned(),
            layout: format!("{METHOD}, {what}"),
        })?;
        let mut overrides = Vec::new();
        for (rule, value) in raw.dynamic.unwrap_or_default() {
            let malformed = |problem: String| malformed(format!("dynamic `{rule}`: {problem}"));
            let arguments = if rule.starts_with("-:") {
                None
            } else {
                let given = RawOverride::deserialize(&value).map_err(|e| malformed(e.to_string()))?;
                let (bits, group) = (given.bits.unwrap_or(raw.bits), given.group_size.unwrap_or(raw.group_size));
                Some(Arguments::read(bits, group).map_err(malformed)?)
            };
            let pattern = rule.strip_prefix("-:").or_else(|| rule.strip_prefix("+:")).unwrap_or(&rule);
            overrides.push((Pattern::new(pattern).map_err(malformed)?, arguments));
        }
        Ok(Self { arguments: Arguments::read(raw.bits, raw.group_size).map_err(malformed)?, zeros, overrides })
    }

    /// How a module is stored that is stored quantised.
    fn of(&self, module: &str) -> Result<Arguments, String> {
        let rule = self.overrides.iter().find(|(pattern, _)| pattern.matches(module));
        rule.map_or(Some(self.arguments), |(_, arguments)| *arguments)
            .ok_or_else(|| format!("`{module}` is stored quantised, but a rule `-:` of `dynamic` says that it is not"))
    }
}

impl Arguments {
    fn read(bits: i64, group_size: i64) -> Result<Self, String> {
        if ![2, 3, 4, 8].contains(&bits) {
            return Err(format!("bits is {bits}; wanted 2, 3, 4 or 8"));
        }
        Ok(Self { bits: bits as u8, group: read_group(group_size)? })
    }
}

/// The columns of a group; `None` for a group a row.
pub(super) fn read_group(group_size: i64) -> Result<Option<u32>, String> {
    if group_size == -1 {
        return Ok(None);
    }
    let columns = u32::try_from(group_size).ok().filter(|columns| *columns > 0);
    let wanted = "a positive number of columns, or -1 for a group a row";
    columns.map(Some).ok_or_else(|| format!("group_size is {group_size}; wanted {wanted}"))
}

/// The groups of a row of so many columns. A larger group is the row.
pub(super) fn grouping(group: Option<u32>, cols: usize) -> Grouping {
    group.filter(|group| (*group as usize) < cols).map_or(Grouping::Row, Grouping::Columns)
}

/// Gathers the stored tensors of each quantised linear into one matrix `X.weight`; the others stay as they are.
pub(crate) fn gather(
    config: &Config,
    tensors: Vec<(String, Location)>,
    shards: &[Shard],
    file: &str,
) -> Result<Gathered, CheckpointError> {
    let tensors = Stored::gather(tensors, shards, file, &["qweight", "qzeros", "scales"], |module, stored| {
        linear(config, module, stored)
    })?;
    Ok(Gathered { tensors, notes: Vec::new() })
}

/// One quantised linear.
fn linear(config: &Config, module: &str, stored: &mut Stored<'_>) -> Result<PackedEntry, CheckpointError> {
    let name = format!("{module}.weight");
    let arguments = config.of(module).map_err(|problem| stored.malformed(problem))?;
    let (codes, location) = stored.require(module, "qweight")?;
    let &[words, rows] = location.shape.as_slice() else {
        return Err(stored.wrong_part(&codes, location, "a matrix of I32"));
    };
    let bits = usize::from(arguments.bits);
    let cols = match stored.tensors.get(&format!("{module}.g_idx")).map(|index| index.shape.as_slice()) {
        Some(&[cols]) => Some(cols),
        Some(_) => None,
        None => words.checked_mul(32).filter(|all| all.is_multiple_of(bits)).map(|all| all / bits),
    };
    let cols = cols.ok_or_else(|| {
        stored.malformed(format!(
            "`{module}`: neither `g_idx` [K] nor {words} words of {bits}-bit codes say how many columns it has"
        ))
    })?;

    let grouping = grouping(arguments.group, cols);
    let scale = stored.float_scale(module, "scales")?;
    let mut scheme =
        Scheme { zero: ZeroKind::Integer, ..Scheme::scaled(Element::Uint(arguments.bits), grouping, scale) };
    // Proves the shape valid and every size below addressable.
    scheme.packed_bytes(rows, cols).map_err(|source| stored.format_error(&name, source))?;
    scheme.order = stored.column_order(&format!("{module}.g_idx"), cols, &scheme)?;
    let zeros = ZeroPoints { rows, groups: scheme.groups_per_row(cols), bits: bits as u32, kind: config.zeros };
    let mut entry = stored.take(&name, scheme, [rows, cols], parts(module, &scheme, [rows, cols], zeros))?;
    simplify_zeros(&mut entry, zeros, stored);
    Ok(entry)
}

/// The tensors of a linear of GPTQ, or of AWQ, codes first.
pub(super) fn parts(module: &str, scheme: &Scheme, [rows, cols]: [usize; 2], zeros: ZeroPoints) -> Vec<Part> {
    let bits = scheme.element.bits() as usize;
    let words = |count: usize| (count * bits).div_ceil(32);
    let part = |suffix, dtype, shape, buffer, form| Part::of_buffer(module, suffix, dtype, shape, buffer, form);
    let transposed = |size, row_bytes| Form::Reordered(Reorder::Transposed { columns: rows, size, row_bytes });
    let (scale_type, scale_bytes) = super::scale_type(scheme.scale);
    let (codes_shape, codes) = match zeros.kind {
        ZeroCodes::Awq => (vec![cols, words(rows)], Form::Reordered(Reorder::AwqCodes { rows, cols })),
        ZeroCodes::Plain | ZeroCodes::MinusOne => (vec![words(cols), rows], transposed(4, (cols * bits).div_ceil(8))),
    };
    let scales = if zeros.groups == 1 { Form::Same } else { transposed(scale_bytes, zeros.groups * scale_bytes) };
    let mut parts = vec![
        part("qweight", Dtype::I32, codes_shape, Buffer::Codes, codes),
        part("scales", scale_type, vec![zeros.groups, rows], Buffer::Scales, scales),
        part(
            "qzeros",
            Dtype::I32,
            vec![zeros.groups, words(rows)],
            Buffer::Zeros,
            Form::Reordered(Reorder::Zeros(zeros)),
        ),
    ];
    if scheme.order == ColumnOrder::GroupIndex {
        parts.push(part("g_idx", Dtype::I32, vec![cols], Buffer::GroupIndex, Form::Same));
    }
    parts
}

/// Leaves zero points out that are all those of signed codes, which kernels have less work with.
pub(super) fn simplify_zeros(entry: &mut PackedEntry, zeros: ZeroPoints, stored: &Stored<'_>) {
    let (bits, half) = (zeros.bits as u8, 1 << (zeros.bits - 1));
    let is_zeros = |buffer: &Buffer| *buffer == Buffer::Zeros;
    let stored_zeros = entry.buffers.iter().find(|(buffer, ..)| is_zeros(buffer)).map(|(.., location)| location);
    if stored_zeros.is_some_and(|location| zeros.are_all(half, stored.bytes(location))) {
        entry.buffers.retain(|(buffer, ..)| !is_zeros(buffer));
        entry.scheme = Scheme { element: Element::Int(bits), zero: ZeroKind::None, ..entry.scheme };
    }
}
