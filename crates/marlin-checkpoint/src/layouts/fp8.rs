//! FP8 as `transformers` and vLLM have it, and published folders of DeepSeek, Qwen and others: `X.weight` in E4M3
//! beside its scales, which multiply: `X.weight_scale_inv`, in spite of its name, of tiles of 128 × 128 weights, or
//! `X.weight_scale` of the whole or of rows.
//!
//! Which modules are quantised is seen from what is stored.

use marlin_format::{Element, Grouping, Scheme};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

use super::{Buffer, Form, Gathered, PackedEntry, Part, Stored, activations};
use crate::CheckpointError;
use crate::shard::{Location, Shard};

/// The `quant_method`.
pub(crate) const METHOD: &str = "fp8";
/// The `quant_method` of folders that FBGEMM made: a scale a row.
pub(crate) const FBGEMM_METHOD: &str = "fbgemm_fp8";

/// How a folder says its linears are stored.
pub(crate) struct Config {
    /// Rows and columns that share a scale; `None` for those whose scales tell.
    tile: Option<[u32; 2]>,
    rounds_activations: bool,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    weight_block_size: Option<[u32; 2]>,
    #[serde(default)]
    activation_scheme: Option<String>,
    #[serde(default)]
    activation_scale_ub: Option<f64>,
    #[serde(default)]
    fmt: Option<String>,
}

impl Config {
    /// Reads it; `file` names config.json in messages.
    ///
    /// # Errors
    /// Another type than E4M3, or a field that makes no sense.
    pub(crate) fn read(found: &Value, file: &str) -> Result<Self, CheckpointError> {
        let malformed = |problem: String| CheckpointError::malformed(file, format!("{METHOD}: {problem}"));
        let raw = RawConfig::deserialize(found).map_err(|e| malformed(e.to_string()))?;
        if let Some(fmt) = raw.fmt.filter(|fmt| fmt != "e4m3") {
            let layout = format!("{METHOD}, fmt {fmt}");
            return Err(CheckpointError::ForeignLayout { file: file.to_owned(), layout });
        }
        if let Some(tile) = raw.weight_block_size.filter(|tile| tile.contains(&0)) {
            return Err(malformed(format!("weight_block_size is {tile:?}; wanted rows and columns of a tile")));
        }
        let rounds_activations = raw.activation_scheme.is_some() || raw.activation_scale_ub.is_some();
        Ok(Self { tile: raw.weight_block_size, rounds_activations })
    }
}

/// Gathers the stored tensors of each quantised linear into one matrix `X.weight`; the others stay as they are.
pub(crate) fn gather(
    config: &Config,
    tensors: Vec<(String, Location)>,
    shards: &[Shard],
    file: &str,
) -> Result<Gathered, CheckpointError> {
    let marks = ["weight_scale_inv", "weight_scale"];
    let mut tensors =
        Stored::gather(tensors, shards, file, &marks, |module, stored| linear(config.tile, module, stored))?;
    activations::refuse_unscaled(&tensors, shards)?;
    let notes = activations::leave_out(&mut tensors, config.rounds_activations, false);
    Ok(Gathered { tensors, notes })
}

/// One linear in E4M3. Without a `tile`, its scales tell what they are of.
pub(super) fn linear(
    tile: Option<[u32; 2]>,
    module: &str,
    stored: &mut Stored<'_>,
) -> Result<PackedEntry, CheckpointError> {
    let name = format!("{module}.weight");
    let (weight, location) = stored.require(module, "weight")?;
    let &[rows, cols] = location.shape.as_slice() else {
        return Err(stored.wrong_part(&weight, location, "a matrix of F8_E4M3"));
    };
    let inverse = stored.tensors.contains_key(&format!("{module}.weight_scale_inv"));
    let suffix = if inverse { "weight_scale_inv" } else { "weight_scale" };
    let scale = stored.float_scale(module, suffix)?;
    let (scales, location) = stored.require(module, suffix)?;
    let count = location.shape.iter().try_fold(1usize, |count, size| count.checked_mul(*size));
    let grouping = match (tile, count) {
        (Some([rows, cols]), _) => Grouping::Block { rows, cols },
        (None, Some(1)) => Grouping::Tensor,
        (None, Some(count)) if count == rows => Grouping::Row,
        (None, _) => {
            let wanted =
                format!("one scale, or one for each of {rows} rows, where config.json has no weight_block_size");
            return Err(stored.wrong_part(&scales, location, &wanted));
        }
    };
    let scheme = Scheme::scaled(Element::E4M3, grouping, scale);
    // Proves the shape valid and every size below addressable.
    scheme.packed_bytes(rows, cols).map_err(|source| stored.format_error(&name, source))?;
    let scales_shape = match grouping {
        Grouping::Tensor => vec![1],
        _ => vec![rows.div_ceil(scheme.group_rows(rows)), scheme.groups_per_row(cols)],
    };
    let part = |suffix, dtype, shape, buffer| Part::of_buffer(module, suffix, dtype, shape, buffer, Form::Same);
    let parts = vec![
        part("weight", Dtype::F8_E4M3, vec![rows, cols], Buffer::Codes),
        part(suffix, super::scale_type(scale).0, scales_shape, Buffer::Scales),
    ];
    stored.take(&name, scheme, [rows, cols], parts)
}
