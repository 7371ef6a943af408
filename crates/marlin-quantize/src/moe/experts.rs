//! The matrices of experts, one by one, in whatever layout a checkpoint has them.

use std::borrow::Cow;
use std::path::Path;

use marlin_checkpoint::{Checkpoint, Dtype};
use marlin_format::{EncodeOptions, PackedMatrix, Scheme};

use super::{ExpertMatrix, ExpertTensors, MoeLayer, find_moe_layers};
use crate::encode_matrix::encode_matrix;
use crate::quantize::{Assignment, encode_error, quantize_as};
use crate::{QuantizeError, QuantizeOptions, Report};

/// Encodes the experts of a layer, each in the schemes that `scheme` gives for its matrices; `[gate, up, down]` of each expert.
///
/// # Errors
/// The layer is not of this checkpoint, is quantised already, or holds NaN or infinity; or a scheme has no matrix of that shape.
pub fn quantize_moe_experts(
    source: &Checkpoint,
    layer: &MoeLayer,
    scheme: impl Fn(usize, ExpertMatrix) -> Scheme,
    options: &EncodeOptions,
) -> Result<Vec<[PackedMatrix<'static>; 3]>, QuantizeError> {
    let encode = |expert: usize, matrix: ExpertMatrix| {
        let weights = expert_matrix(source, layer, expert, matrix)?;
        let (tensor, scheme) = (layer.expert_name(expert, matrix), scheme(expert, matrix));
        if !weights.scheme.is_dense() {
            return Err(QuantizeError::already_quantized(source, &tensor, weights.scheme));
        }
        let (encoded, _) = encode_matrix(&weights, scheme, options).map_err(|e| encode_error(source, &tensor, e))?;
        Ok(encoded)
    };
    let of_expert = |expert: usize| {
        let [gate, up, down] = ExpertMatrix::ALL.map(|matrix| encode(expert, matrix));
        Ok([gate?, up?, down?])
    };
    (0..layer.experts()).map(of_expert).collect()
}

/// Writes `source` to the folder `out` with experts in the schemes that `scheme` gives for each of them, and all else as it was. Experts that are stored as one
/// tensor get tensors of their own, so that their schemes may differ.
///
/// # Errors
/// There are no experts, or as for [`quantize`](crate::quantize()).
pub fn replace_moe_layers(
    source: &Checkpoint,
    out: &Path,
    scheme: impl Fn(&MoeLayer, usize) -> Scheme,
    encode: EncodeOptions,
    options: QuantizeOptions<'_>,
) -> Result<Report, QuantizeError> {
    let mut assignment = Assignment::new(encode);
    for layer in find_moe_layers(source)? {
        for expert in 0..layer.experts() {
            let scheme = scheme(&layer, expert);
            let names = ExpertMatrix::ALL.map(|matrix| layer.expert_name(expert, matrix));
            assignment.schemes.extend(names.map(|name| (name, scheme)));
        }
    }
    quantize_as(source, out, &assignment, options)
}

impl MoeLayer {
    /// The tensor of an expert's matrix, or the name it gets when it becomes one of its own.
    pub fn expert_name(&self, expert: usize, matrix: ExpertMatrix) -> String {
        match &self.experts {
            ExpertTensors::Each(experts) => experts[expert][matrix as usize].clone(),
            ExpertTensors::Fused { .. } => format!("{}.experts.{expert}.{}.weight", self.block, matrix.name()),
        }
    }
}

/// A matrix of an expert as it is stored, or taken out of a tensor of all experts.
///
/// # Errors
/// The checkpoint has no such tensor, or one of another shape or type.
pub fn expert_matrix<'a>(
    source: &'a Checkpoint,
    layer: &MoeLayer,
    expert: usize,
    matrix: ExpertMatrix,
) -> Result<PackedMatrix<'a>, QuantizeError> {
    let (gate_up, down, transposed) = match &layer.experts {
        ExpertTensors::Each(experts) => return Ok(source.matrix_any(&experts[expert][matrix as usize])?),
        ExpertTensors::Fused { gate_up, down, transposed, .. } => (gate_up, down, *transposed),
    };
    let name = if matrix == ExpertMatrix::Down { down } else { gate_up };
    let tensor = source.tensor(name)?;
    let (scheme, size) = match tensor.dtype {
        Dtype::BF16 => (Scheme::BF16, 2),
        Dtype::F16 => (Scheme::F16, 2),
        Dtype::F32 => (Scheme::F32, 4),
        other => {
            return Err(QuantizeError::ExpertType {
                model: source.name().to_owned(),
                tensor: name.clone(),
                found: other.to_string(),
            });
        }
    };
    let &[experts, rows, cols] = tensor.shape else { unreachable!("three dimensions, as they were found") };
    let bytes = &tensor.bytes[expert * (tensor.bytes.len() / experts)..][..tensor.bytes.len() / experts];
    let (of_expert, [rows, cols]) = if transposed {
        (Cow::Owned(transpose(bytes, rows, cols, size)), [cols, rows])
    } else {
        (Cow::Borrowed(bytes), [rows, cols])
    };
    let row = cols * size;
    let codes = match (matrix, transposed) {
        (ExpertMatrix::Down, _) => of_expert,
        // In halves, or in turns.
        (_, false) => {
            let half = rows / 2 * row;
            let first = if matrix == ExpertMatrix::Gate { 0 } else { half };
            Cow::Owned(of_expert[first..first + half].to_vec())
        }
        (_, true) => {
            let first = usize::from(matrix == ExpertMatrix::Up);
            Cow::Owned(of_expert.chunks_exact(row).skip(first).step_by(2).flatten().copied().collect())
        }
    };
    let rows = if matrix == ExpertMatrix::Down { rows } else { rows / 2 };
    let mut found = PackedMatrix::empty(scheme, rows, cols);
    found.codes = codes;
    Ok(found)
}

/// The bytes of a matrix of elements of `size` bytes with rows and columns exchanged.
fn transpose(bytes: &[u8], rows: usize, cols: usize, size: usize) -> Vec<u8> {
    let mut transposed = Vec::with_capacity(bytes.len());
    for col in 0..cols {
        for row in 0..rows {
            transposed.extend_from_slice(&bytes[(row * cols + col) * size..][..size]);
        }
    }
    transposed
}
