//! The matrices of experts, one by one, in whatever layout a checkpoint has them.

use std::path::Path;

use marlin_checkpoint::Checkpoint;
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
    let stack = source.stack(name)?;
    let [_, rows, _] = stack.shape();
    let found = match (matrix, transposed) {
        (ExpertMatrix::Down, false) => Ok(stack.matrix(expert)),
        (ExpertMatrix::Down, true) => stack.matrix(expert).transposed_columns(0, 1),
        // In halves, or in turns.
        (ExpertMatrix::Gate, false) => Ok(stack.rows(expert, 0..rows / 2)),
        (ExpertMatrix::Up, false) => Ok(stack.rows(expert, rows / 2..rows)),
        (ExpertMatrix::Gate, true) => stack.matrix(expert).transposed_columns(0, 2),
        (ExpertMatrix::Up, true) => stack.matrix(expert).transposed_columns(1, 2),
    };
    found.map_err(|error| encode_error(source, name, error))
}
