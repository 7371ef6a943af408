//! The layout of AWQ: that of the Python package `autoawq`, version `gemm`.
//!
//! The linear `X` `[N, K]` is stored transposed, as `X.qweight`, `X.scales` and `X.qzeros`, 4 bits in an order of its
//! own. Which modules are quantised is seen from what is stored.

use marlin_format::{Element, Scheme, ZeroKind};
use serde::Deserialize;
use serde_json::Value;

use super::gptq::{grouping, parts, read_group, simplify_zeros};
use super::reorder::{ZeroCodes, ZeroPoints};
use super::{Gathered, PackedEntry, Stored};
use crate::CheckpointError;
use crate::shard::{Location, Shard};

/// The `quant_method`.
pub(crate) const METHOD: &str = "awq";
const BITS: u8 = 4;

/// How a folder says its linears are stored.
pub(crate) struct Config {
    /// Columns of a group; `None` for a group a row.
    group: Option<u32>,
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
    /// Another version than `gemm`, or a field that is missing or makes no sense.
    pub(crate) fn read(found: &Value, file: &str) -> Result<Self, CheckpointError> {
        let malformed = |problem: String| CheckpointError::malformed(file, format!("{METHOD}: {problem}"));
        let raw = RawConfig::deserialize(found).map_err(|e| malformed(e.to_string()))?;
        if let Some(version) = raw.version.or(raw.format)
            && !version.eq_ignore_ascii_case("gemm")
        {
            let layout = format!("{METHOD}, version {version}");
            return Err(CheckpointError::ForeignLayout { file: file.to_owned(), layout });
        }
        if raw.bits != i64::from(BITS) {
            return Err(malformed(format!("bits is {}; wanted {BITS}", raw.bits)));
        }
        Ok(Self { group: read_group(raw.group_size).map_err(malformed)? })
    }
}

/// Gathers the stored tensors of each quantised linear into one matrix `X.weight`; the others stay as they are.
pub(crate) fn gather(
    config: &Config,
    tensors: Vec<(String, Location)>,
    shards: &[Shard],
    file: &str,
) -> Result<Gathered, CheckpointError> {
    let tensors = Stored::gather(tensors, shards, file, &["qweight", "qzeros", "scales"], |module, stored| {
        linear(config.group, module, stored)
    })?;
    Ok(Gathered { tensors, notes: Vec::new() })
}

/// One quantised linear.
fn linear(group: Option<u32>, module: &str, stored: &mut Stored<'_>) -> Result<PackedEntry, CheckpointError> {
    let name = format!("{module}.weight");
    let (codes, location) = stored.require(module, "qweight")?;
    let shape = match *location.shape.as_slice() {
        [cols, words] => words.checked_mul(8).map(|rows| [rows, cols]),
        _ => None,
    };
    let [rows, cols] = shape.ok_or_else(|| stored.wrong_part(&codes, location, "a matrix of I32"))?;
    let grouping = grouping(group, cols);
    let scale = stored.float_scale(module, "scales")?;
    let scheme = Scheme { zero: ZeroKind::Integer, ..Scheme::scaled(Element::Uint(BITS), grouping, scale) };
    // Proves the shape valid and every size below addressable.
    scheme.packed_bytes(rows, cols).map_err(|source| stored.format_error(&name, source))?;
    let zeros = ZeroPoints { rows, groups: scheme.groups_per_row(cols), bits: BITS.into(), kind: ZeroCodes::Awq };
    let mut entry = stored.take(&name, scheme, [rows, cols], parts(module, &scheme, [rows, cols], zeros))?;
    simplify_zeros(&mut entry, zeros, stored);
    Ok(entry)
}
