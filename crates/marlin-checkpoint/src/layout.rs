//! How a packed matrix is spread over safetensors tensors.

use std::borrow::Cow;

use marlin_format::{ColumnOrder, FormatError, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind};
use safetensors::Dtype;

/// A buffer of a [`PackedMatrix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Buffer {
    Codes,
    Scales,
    Zeros,
    Globals,
    GroupIndex,
    SparseIndex,
}

/// One stored tensor of a packed matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) buffer: Buffer,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl Buffer {
    /// Appended to the name of the matrix.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Codes => "",
            Self::Scales => "_scale",
            Self::Zeros => "_zero",
            Self::Globals => "_global",
            Self::GroupIndex => "_group_index",
            Self::SparseIndex => "_sparse_index",
        }
    }

    pub(crate) fn of<'m>(self, matrix: &'m PackedMatrix<'_>) -> &'m [u8] {
        match self {
            Self::Codes => &matrix.codes,
            Self::Scales => &matrix.scales,
            Self::Zeros => &matrix.zeros,
            Self::Globals => &matrix.globals,
            Self::GroupIndex => &matrix.group_index,
            Self::SparseIndex => &matrix.sparse_index,
        }
    }

    pub(crate) fn set<'a>(self, matrix: &mut PackedMatrix<'a>, bytes: &'a [u8]) {
        let field = match self {
            Self::Codes => &mut matrix.codes,
            Self::Scales => &mut matrix.scales,
            Self::Zeros => &mut matrix.zeros,
            Self::Globals => &mut matrix.globals,
            Self::GroupIndex => &mut matrix.group_index,
            Self::SparseIndex => &mut matrix.sparse_index,
        };
        *field = Cow::Borrowed(bytes);
    }
}

/// A matrix whose buffers are all empty.
pub(crate) fn empty_matrix<'a>(scheme: Scheme, rows: usize, cols: usize) -> PackedMatrix<'a> {
    const NONE: Cow<'static, [u8]> = Cow::Borrowed(&[]);
    PackedMatrix {
        rows,
        cols,
        scheme,
        codes: NONE,
        scales: NONE,
        zeros: NONE,
        globals: NONE,
        group_index: NONE,
        sparse_index: NONE,
    }
}

/// The scheme of an ordinary (not packed) matrix of this type.
pub(crate) fn dense_scheme(dtype: Dtype) -> Option<Scheme> {
    match dtype {
        Dtype::F32 => Some(Scheme::F32),
        Dtype::F16 => Some(Scheme::F16),
        Dtype::BF16 => Some(Scheme::BF16),
        _ => None,
    }
}

/// The type of an ordinary tensor that holds matrices of this scheme, if it is an unquantised one.
pub(crate) fn dense_dtype(scheme: &Scheme) -> Option<Dtype> {
    [Dtype::F32, Dtype::F16, Dtype::BF16].into_iter().find(|dtype| dense_scheme(*dtype).as_ref() == Some(scheme))
}

/// The tensors that hold a packed matrix `[rows, cols]`, codes first.
pub(crate) fn parts(scheme: &Scheme, rows: usize, cols: usize) -> Result<Vec<Part>, FormatError> {
    // Proves the scheme valid and every size below addressable.
    scheme.packed_bytes(rows, cols)?;

    let mut parts = Vec::with_capacity(6);
    let mut part = |buffer, dtype, shape| parts.push(Part { buffer, dtype, shape });
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
