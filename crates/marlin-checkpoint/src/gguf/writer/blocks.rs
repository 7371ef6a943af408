//! Packed matrices as blocks of ggml.

use marlin_format::{Element, Grouping, PackedMatrix, ScaleKind, Scheme, bits};

use super::GgufType;
use crate::CheckpointError;

/// Types that are written.
const WRITTEN: [GgufType; 6] =
    [GgufType::F32, GgufType::F16, GgufType::Bf16, GgufType::Q4_0, GgufType::Q8_0, GgufType::Mxfp4];
/// What that means for users.
const KNOWN: &str = "int4-sym and int8 in groups of 32 columns (--group-size 32), mxfp4, bf16, f16 and f32";

/// What is stored of a scheme, if GGUF has a place for it.
pub(crate) fn written_scheme(scheme: Scheme) -> Result<Scheme, CheckpointError> {
    let float = matches!(scheme.scale, ScaleKind::F32 | ScaleKind::F16 | ScaleKind::Bf16);
    let written = match (scheme.element, scheme.grouping) {
        (Element::Int(_), Grouping::Columns(_)) if float => Scheme { scale: ScaleKind::F16, ..scheme },
        _ => scheme,
    };
    match type_of(&written) {
        Some(_) => Ok(written),
        None => Err(CheckpointError::NoPlace { layout: "gguf", known: KNOWN, scheme: Box::new(scheme) }),
    }
}

/// The type that stores a scheme.
pub(super) fn type_of(scheme: &Scheme) -> Option<GgufType> {
    WRITTEN.into_iter().find(|known| known.scheme() == *scheme)
}

/// The blocks of a matrix; `None` if the type does not store its scheme.
pub(super) fn encode(matrix: &PackedMatrix<'_>, tensor_type: GgufType) -> Option<Vec<u8>> {
    if tensor_type.scheme() != matrix.scheme {
        return None;
    }
    let weights = tensor_type.block_weights();
    if weights == 1 {
        return Some(matrix.codes.to_vec());
    }
    let code_bytes = weights * matrix.scheme.element.bits() as usize / 8;
    let scale_bytes = tensor_type.block_bytes() - code_bytes;
    let mut blocks = Vec::with_capacity(matrix.scales.len() / scale_bytes * tensor_type.block_bytes());
    // Rows are whole blocks, so blocks follow each other over all rows.
    for (codes, scale) in matrix.codes.chunks_exact(code_bytes).zip(matrix.scales.chunks_exact(scale_bytes)) {
        blocks.extend_from_slice(scale);
        if tensor_type == GgufType::Q8_0 {
            // Two's complement.
            blocks.extend(codes.iter().map(|code| code ^ 0x80));
        } else {
            // Low halves are the first 16 codes, high halves the others.
            let mut unpacked = [0; 32];
            bits::unpack(codes, 4, &mut unpacked);
            blocks.extend((0..16).map(|i| unpacked[i] | unpacked[i + 16] << 4));
        }
    }
    Some(blocks)
}
