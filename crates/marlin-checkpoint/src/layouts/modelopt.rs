//! The layout of NVIDIA's Python package `nvidia-modelopt`: NVFP4 and FP8.
//!
//! The linear `X` is stored as `X.weight` and `X.weight_scale`, in NVFP4 also `X.weight_scale_2`, which multiplies the
//! others. Which modules are quantised, and in which of the two, is seen from what is stored.

use marlin_format::Scheme;
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

use super::{Buffer, Form, Gathered, PackedEntry, Part, Stored, activations, fp8};
use crate::CheckpointError;
use crate::shard::{Location, Shard};

/// What a `quant_method` of the package begins with.
pub(crate) const METHOD: &str = "modelopt";

/// What a folder says about its linears.
pub(crate) struct Config {
    rounds_activations: bool,
    rounds_cache: bool,
}

#[derive(Deserialize)]
struct RawConfig {
    quant_algo: String,
    #[serde(default)]
    group_size: Option<i64>,
    #[serde(default)]
    kv_cache_quant_algo: Option<String>,
    #[serde(default)]
    kv_cache_scheme: Value,
}

impl Config {
    /// Reads it; `file` names the file in messages. Of hf_quant_config.json, `found` is `quantization`.
    ///
    /// # Errors
    /// An algorithm that is not read, or a field that is missing or makes no sense.
    pub(crate) fn read(found: &Value, file: &str) -> Result<Self, CheckpointError> {
        let malformed = |problem: String| CheckpointError::malformed(file, format!("{METHOD}: {problem}"));
        let raw = RawConfig::deserialize(found).map_err(|e| malformed(e.to_string()))?;
        let rounds_activations = match raw.quant_algo.as_str() {
            "NVFP4" | "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" | "MIXED_PRECISION" => true,
            "W4A16_NVFP4" => false,
            other => {
                let layout = format!("{METHOD}, quant_algo {other}");
                return Err(CheckpointError::ForeignLayout { file: file.to_owned(), layout });
            }
        };
        if let (true, Some(size)) = (raw.quant_algo.contains("NVFP4"), raw.group_size.filter(|size| *size != 16)) {
            return Err(malformed(format!("group_size is {size}; groups of NVFP4 have 16 columns")));
        }
        let rounds_cache = raw.kv_cache_quant_algo.is_some() || !raw.kv_cache_scheme.is_null();
        Ok(Self { rounds_activations, rounds_cache })
    }
}

/// Gathers the stored tensors of each quantised linear into one matrix `X.weight`; the others stay as they are.
pub(crate) fn gather(
    config: &Config,
    tensors: Vec<(String, Location)>,
    shards: &[Shard],
    file: &str,
) -> Result<Gathered, CheckpointError> {
    let mut tensors = Stored::gather(tensors, shards, file, &["weight_scale", "weight_scale_2"], linear)?;
    activations::refuse_unscaled(&tensors, shards)?;
    let notes = activations::leave_out(&mut tensors, config.rounds_activations, config.rounds_cache);
    Ok(Gathered { tensors, notes })
}

/// One quantised linear.
fn linear(module: &str, stored: &mut Stored<'_>) -> Result<PackedEntry, CheckpointError> {
    if stored.tensors.contains_key(&format!("{module}.pre_quant_scale")) {
        return Err(CheckpointError::ForeignLayout {
            file: stored.file.to_owned(),
            layout: format!("{METHOD}, scaled inputs (`{module}.pre_quant_scale`)"),
        });
    }
    let (weight, location) = stored.require(module, "weight")?;
    match (location.dtype, location.shape.as_slice()) {
        (Dtype::F8_E4M3, _) => fp8::linear(None, module, stored),
        (Dtype::U8, &[rows, bytes]) => nvfp4(module, [rows, bytes], stored),
        _ => Err(stored.wrong_part(&weight, location, "a matrix of U8 (NVFP4) or F8_E4M3")),
    }
}

/// A linear in NVFP4, two codes a byte.
fn nvfp4(module: &str, [rows, bytes]: [usize; 2], stored: &mut Stored<'_>) -> Result<PackedEntry, CheckpointError> {
    let (name, scheme) = (format!("{module}.weight"), Scheme::NVFP4);
    let cols = bytes.saturating_mul(2);
    // Proves the shape valid and every size below addressable.
    scheme.packed_bytes(rows, cols).map_err(|source| stored.format_error(&name, source))?;
    let part = |suffix, dtype, shape, buffer| Part::of_buffer(module, suffix, dtype, shape, buffer, Form::Same);
    let parts = vec![
        part("weight", Dtype::U8, vec![rows, bytes], Buffer::Codes),
        part("weight_scale", Dtype::F8_E4M3, vec![rows, scheme.groups_per_row(cols)], Buffer::Scales),
        part("weight_scale_2", Dtype::F32, vec![1], Buffer::Globals),
    ];
    stored.take(&name, scheme, [rows, cols], parts)
}
