//! The layout of AWQ: that of the Python package `autoawq`, versions `gemm` and `gemv`.
//!
//! The linear `X` `[N, K]` is stored as `X.qweight`, `X.scales` and `X.qzeros`: in `gemm` transposed, 4 bits in an order
//! of its own; in `gemv` in rows of codes in order. Which modules are quantised is seen from what is stored.

use marlin_format::{Element, Scheme, ZeroKind};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

use super::gptq::{grouping, parts, read_group, simplify_zeros};
use super::reorder::{Reorder, ZeroCodes, ZeroPoints};
use super::{Buffer, Form, Gathered, PackedEntry, Part, Stored};
use crate::CheckpointError;
use crate::shard::{Location, Shard};

/// The `quant_method`.
pub(crate) const METHOD: &str = "awq";
const BITS: u8 = 4;
const CODES_OF_WORD: usize = 8;

/// How a folder says its linears are stored.
pub(crate) struct Config {
    version: Version,
    /// Columns of a group; `None` for a group a row.
    group: Option<u32>,
}

#[derive(Clone, Copy)]
enum Version {
    Gemm,
    Gemv,
}

/// The fields of config.json, or of the older quant_config.json.
#[derive(Deserialize)]
struct RawConfig {
    #[serde(alias = "w_bit")]
    bits: i64,
    #[serde(alias = "q_group_size")]
    group_size: i64,
    #[serde(default)]
    version: Option<String>,
    #[serde(default)]
    format: Option<String>,
}

impl Config {
    /// Reads it; `file` names the file in messages.
    ///
    /// # Errors
    /// Another version than these two, or a field that is missing or makes no sense.
    pub(crate) fn read(found: &Value, file: &str) -> Result<Self, CheckpointError> {
        let malformed = |problem: String| CheckpointError::malformed(file, format!("{METHOD}: {problem}"));
        let raw = RawConfig::deserialize(found).map_err(|e| malformed(e.to_string()))?;
        let said = raw.version.or(raw.format).unwrap_or_else(|| "gemm".to_owned());
        let version = match said.to_ascii_lowercase().as_str() {
            "gemm" => Version::Gemm,
            "gemv" => Version::Gemv,
            _ => {
                let layout = format!("{METHOD}, version {said}");
                return Err(CheckpointError::ForeignLayout { file: file.to_owned(), layout });
            }
        };
        if raw.bits != i64::from(BITS) {
            return Err(malformed(format!("bits is {}; wanted {BITS}", raw.bits)));
        }
        Ok(Self { version, group: read_group(raw.group_size).map_err(malformed)? })
    }
}

/// Gathers the stored tensors of each quantised linear into one matrix `X.weight`; the others stay as they are.
pub(crate) fn gather(
    config: &Config,
    tensors: Vec<(String, Location)>,
    shards: &[Shard],
    file: &str,
) -> Result<Gathered, CheckpointError> {
    let tensors =
        Stored::gather(tensors, shards, file, &["qweight", "qzeros", "scales"], |module, stored| {
            match config.version {
                Version::Gemm => gemm(config.group, module, stored),
                Version::Gemv => gemv(config.group, module, stored),
            }
        })?;
    Ok(Gathered { tensors, notes: Vec::new() })
}

/// A linear in the version `gemm`.
fn gemm(group: Option<u32>, module: &str, stored: &mut Stored<'_>) -> Result<PackedEntry, CheckpointError> {
    let [cols, rows] = unpacked_shape(module, stored)?;
    let scheme = scheme(group, module, [rows, cols], stored)?;
    let zeros = ZeroPoints { rows, groups: scheme.groups_per_row(cols), bits: BITS.into(), kind: ZeroCodes::Awq };
    let parts = parts(module, &scheme, [rows, cols], zeros);
    let mut entry = stored.take(&format!("{module}.weight"), scheme, [rows, cols], parts)?;
    simplify_zeros(&mut entry, zeros, stored);
    Ok(entry)
}

/// A linear in the version `gemv`: rows of zero points are filled up to words, in smaller groups to several, and rows of
/// scales to as many (`calculate_zeros_width` of the package).
fn gemv(group: Option<u32>, module: &str, stored: &mut Stored<'_>) -> Result<PackedEntry, CheckpointError> {
    let [rows, cols] = unpacked_shape(module, stored)?;
    let scheme = scheme(group, module, [rows, cols], stored)?;
    let groups = scheme.groups_per_row(cols);
    let words = groups.div_ceil(CODES_OF_WORD).next_multiple_of(match scheme.group_cols(cols) {
        32 => 4,
        64 => 2,
        _ => 1,
    });
    let (scale_type, scale_bytes) = super::scale_type(scheme.scale);
    let filled = |stored, row_bytes| Form::Reordered(Reorder::FilledRows { stored, row_bytes });
    let scales = filled(words * CODES_OF_WORD * scale_bytes, groups * scale_bytes);
    let zeros = filled(words * 4, groups.div_ceil(2));
    let part =
        |suffix, dtype, cols, buffer, form| Part::of_buffer(module, suffix, dtype, vec![rows, cols], buffer, form);
    let parts = vec![
        part("qweight", Dtype::I32, cols / CODES_OF_WORD, Buffer::Codes, Form::Same),
        part("scales", scale_type, words * CODES_OF_WORD, Buffer::Scales, scales),
        part("qzeros", Dtype::I32, words, Buffer::Zeros, zeros),
    ];
    stored.take(&format!("{module}.weight"), scheme, [rows, cols], parts)
}

/// The shape of the codes, which are packed along their second dimension.
fn unpacked_shape(module: &str, stored: &Stored<'_>) -> Result<[usize; 2], CheckpointError> {
    let (codes, location) = stored.require(module, "qweight")?;
    let shape = match *location.shape.as_slice() {
        [first, words] => words.checked_mul(CODES_OF_WORD).map(|second| [first, second]),
        _ => None,
    };
    shape.ok_or_else(|| stored.wrong_part(&codes, location, "a matrix of I32"))
}

/// The scheme of a linear `[rows, cols]`, which is proven valid and every size of it addressable.
fn scheme(
    group: Option<u32>,
    module: &str,
    [rows, cols]: [usize; 2],
    stored: &Stored<'_>,
) -> Result<Scheme, CheckpointError> {
    let scale = stored.float_scale(module, "scales")?;
    let scheme =
        Scheme { zero: ZeroKind::Integer, ..Scheme::scaled(Element::Uint(BITS), grouping(group, cols), scale) };
    let checked = scheme.packed_bytes(rows, cols);
    checked.map_err(|source| stored.format_error(&format!("{module}.weight"), source))?;
    Ok(scheme)
}
