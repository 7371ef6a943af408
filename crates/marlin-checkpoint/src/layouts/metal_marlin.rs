//! Our own layout.

use std::borrow::Cow;
use std::collections::HashMap;

use marlin_format::{ColumnOrder, FormatError, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind};
use safetensors::Dtype;

use super::{Buffer, Content, Entry, Form, Gathered, Part, Stored, dense_dtype};
use crate::shard::{Location, Shard};
use crate::{CheckpointError, QuantizationConfig};

/// Appended to the name of the matrix.
fn suffix(buffer: Buffer) -> &'static str {
    match buffer {
        Buffer::Codes => "",
        Buffer::Scales => "_scale",
        Buffer::Zeros => "_zero",
        Buffer::Globals => "_global",
        Buffer::GroupIndex => "_group_index",
        Buffer::SparseIndex => "_sparse_index",
    }
}

/// One of the tensors that hold a packed matrix in our own layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedTensor {
    /// Type of an element.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    buffer: Buffer,
}

impl PackedTensor {
    /// What is appended to the name of the matrix; nothing for its codes.
    pub fn suffix(&self) -> &'static str {
        suffix(self.buffer)
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }

    /// Its bytes in a matrix.
    pub fn get<'m>(&self, matrix: &'m PackedMatrix<'_>) -> &'m [u8] {
        self.buffer.of(matrix)
    }

    /// Gives a matrix its bytes.
    pub fn set<'a>(&self, matrix: &mut PackedMatrix<'a>, bytes: impl Into<Cow<'a, [u8]>>) {
        self.buffer.set(matrix, bytes.into());
    }
}

/// The tensors that hold a matrix `[rows, cols]` in our own layout, codes first. Of plain floats there is one.
///
/// # Errors
/// The scheme is invalid, or has no such shape.
pub fn packed_tensors(scheme: &Scheme, rows: usize, cols: usize) -> Result<Vec<PackedTensor>, FormatError> {
    if let Some(dtype) = dense_dtype(scheme) {
        scheme.packed_bytes(rows, cols)?;
        return Ok(vec![PackedTensor { dtype, shape: vec![rows, cols], buffer: Buffer::Codes }]);
    }
    let tensor = |part: Part| match part.content {
        Content::Buffer(buffer, Form::Same) => Some(PackedTensor { dtype: part.dtype, shape: part.shape, buffer }),
        _ => None,
    };
    Ok(parts("", scheme, rows, cols)?.into_iter().filter_map(tensor).collect())
}

/// Gathers the stored tensors of each packed matrix into one entry; the others stay as they are.
pub(crate) fn gather(
    quantization: &QuantizationConfig,
    tensors: Vec<(String, Location)>,
    shards: &[Shard],
    file: &str,
) -> Result<Gathered, CheckpointError> {
    let order: Vec<String> = tensors.iter().map(|(name, _)| name.clone()).collect();
    let mut stored = Stored { tensors: tensors.into_iter().collect(), shards, file };
    let mut packed = HashMap::new();
    for (name, tensor) in &quantization.tensors {
        let [rows, cols] = tensor.shape;
        let scheme = quantization.schemes[&tensor.scheme];
        let parts = parts(name, &scheme, rows, cols).map_err(|source| stored.format_error(name, source))?;
        packed.insert(name.as_str(), stored.take(name, scheme, tensor.shape, parts)?);
    }
    let entry = |name: String| {
        let entry = match packed.remove(name.as_str()) {
            Some(packed) => Entry::Packed(packed),
            None => Entry::Plain(stored.tensors.remove(&name)?),
        };
        Some((name, entry))
    };
    Ok(Gathered { tensors: order.into_iter().filter_map(entry).collect(), notes: Vec::new() })
}

/// The tensors that hold the packed matrix `name` of shape `[rows, cols]`, codes first.
pub(crate) fn parts(name: &str, scheme: &Scheme, rows: usize, cols: usize) -> Result<Vec<Part>, FormatError> {
    // Proves the scheme valid and every size below addressable.
    scheme.packed_bytes(rows, cols)?;

    let mut parts = Vec::with_capacity(6);
    let mut part = |buffer, dtype, shape| {
        let name = format!("{name}{}", suffix(buffer));
        parts.push(Part { name, dtype, shape, content: Content::Buffer(buffer, Form::Same) });
    };
    part(Buffer::Codes, Dtype::U8, vec![rows, scheme.code_row_bytes(cols)?]);

    let group_rows = rows.div_ceil(scheme.group_rows(rows));
    let groups = scheme.groups_per_row(cols);
    let packed_groups = |bits: u32| vec![group_rows, (groups * bits as usize).div_ceil(8)];
    let per_group = || match scheme.grouping {
        Grouping::Tensor | Grouping::Row => vec![group_rows],
        Grouping::Columns(_) | Grouping::Block { .. } => vec![group_rows, groups],
    };

    match scheme.scale {
        ScaleKind::None => {}
        ScaleKind::F32 => part(Buffer::Scales, Dtype::F32, per_group()),
        ScaleKind::F16 => part(Buffer::Scales, Dtype::F16, per_group()),
        ScaleKind::Bf16 => part(Buffer::Scales, Dtype::BF16, per_group()),
        ScaleKind::E8M0 => part(Buffer::Scales, Dtype::U8, per_group()),
        ScaleKind::E4M3Global => {
            part(Buffer::Scales, Dtype::F8_E4M3, per_group());
            part(Buffer::Globals, Dtype::F32, vec![1]);
        }
        ScaleKind::TwoLevel { bits, super_group, .. } => {
            part(Buffer::Scales, Dtype::U8, packed_groups(bits.into()));
            let levels = if matches!(scheme.zero, ZeroKind::TwoLevelMin { .. }) { 2 } else { 1 };
            part(Buffer::Globals, Dtype::F16, vec![levels, rows, cols.div_ceil(super_group as usize)]);
        }
    }
    match scheme.zero {
        ZeroKind::None => {}
        ZeroKind::Integer => part(Buffer::Zeros, Dtype::U8, packed_groups(scheme.element.bits())),
        ZeroKind::F32Bias => part(Buffer::Zeros, Dtype::F32, per_group()),
        ZeroKind::F16Bias => part(Buffer::Zeros, Dtype::F16, per_group()),
        ZeroKind::Bf16Bias => part(Buffer::Zeros, Dtype::BF16, per_group()),
        ZeroKind::TwoLevelMin { bits } => part(Buffer::Zeros, Dtype::U8, packed_groups(bits.into())),
    }
    if scheme.order == ColumnOrder::GroupIndex {
        part(Buffer::GroupIndex, Dtype::U32, vec![cols]);
    }
    if scheme.sparsity == Sparsity::TwoOfFour {
        part(Buffer::SparseIndex, Dtype::U8, vec![rows, (cols / 4).div_ceil(2)]);
    }
    Ok(parts)
}
