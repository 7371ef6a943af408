//! How many bytes each buffer of a packed matrix has.
//!
//! Shapes come from files, so all arithmetic is checked.

use crate::{ColumnOrder, FormatError, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind};

/// Bytes of every buffer of a packed matrix, and the numbers they follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Rows of the grid of groups: N, 1, or row tiles.
    pub(crate) group_rows: usize,
    /// Groups of a row: columns of that grid.
    pub(crate) groups: usize,
    pub(crate) codes: usize,
    pub(crate) scales: usize,
    pub(crate) zeros: usize,
    pub(crate) globals: usize,
    pub(crate) group_index: usize,
    pub(crate) sparse_index: usize,
}

impl Sizes {
    pub(crate) fn total(&self) -> Option<usize> {
        [self.scales, self.zeros, self.globals, self.group_index, self.sparse_index]
            .iter()
            .try_fold(self.codes, |sum, &bytes| sum.checked_add(bytes))
    }
}

impl Scheme {
    /// Columns whose codes are stored: all, or half of them under 2:4.
    pub const fn stored_cols(&self, cols: usize) -> usize {
        match self.sparsity {
            Sparsity::Dense => cols,
            Sparsity::TwoOfFour => cols / 2,
        }
    }

    /// Columns of a group: the last group of a row may have fewer.
    pub const fn group_cols(&self, cols: usize) -> usize {
        match self.grouping {
            Grouping::Tensor | Grouping::Row => cols,
            Grouping::Columns(group) => group as usize,
            Grouping::Block { cols: group, .. } => group as usize,
        }
    }

    /// Groups of a row, G.
    pub const fn groups_per_row(&self, cols: usize) -> usize {
        match self.group_cols(cols) {
            0 => 0,
            group => cols.div_ceil(group),
        }
    }

    /// Rows that share their scales: 1, the rows of a tile, or all of them.
    pub const fn group_rows(&self, rows: usize) -> usize {
        match self.grouping {
            Grouping::Tensor => rows,
            Grouping::Row | Grouping::Columns(_) => 1,
            Grouping::Block { rows: group, .. } => group as usize,
        }
    }

    /// Bytes of the codes of one row.
    ///
    /// # Errors
    /// The size cannot be addressed.
    pub fn code_row_bytes(&self, cols: usize) -> Result<usize, FormatError> {
        packed_bytes(self.stored_cols(cols), self.element.bits()).ok_or(FormatError::TooLarge { rows: 1, cols })
    }

    /// Number of groups of a matrix.
    ///
    /// # Errors
    /// The scheme is invalid, or has no such shape.
    pub fn scale_count(&self, rows: usize, cols: usize) -> Result<usize, FormatError> {
        let sizes = self.sizes(rows, cols)?;
        Ok(if self.scale == ScaleKind::None { 0 } else { sizes.group_rows * sizes.groups })
    }

    /// Bytes of [`PackedMatrix::codes`]; errors as for [`Scheme::scale_count`].
    pub fn codes_bytes(&self, rows: usize, cols: usize) -> Result<usize, FormatError> {
        Ok(self.sizes(rows, cols)?.codes)
    }

    /// Bytes of [`PackedMatrix::scales`]; errors as for [`Scheme::scale_count`].
    pub fn scales_bytes(&self, rows: usize, cols: usize) -> Result<usize, FormatError> {
        Ok(self.sizes(rows, cols)?.scales)
    }

    /// Bytes of [`PackedMatrix::zeros`]; errors as for [`Scheme::scale_count`].
    pub fn zeros_bytes(&self, rows: usize, cols: usize) -> Result<usize, FormatError> {
        Ok(self.sizes(rows, cols)?.zeros)
    }

    /// Bytes of [`PackedMatrix::globals`]; errors as for [`Scheme::scale_count`].
    pub fn globals_bytes(&self, rows: usize, cols: usize) -> Result<usize, FormatError> {
        Ok(self.sizes(rows, cols)?.globals)
    }

    /// Bytes of [`PackedMatrix::group_index`]; errors as for [`Scheme::scale_count`].
    pub fn group_index_bytes(&self, rows: usize, cols: usize) -> Result<usize, FormatError> {
        Ok(self.sizes(rows, cols)?.group_index)
    }

    /// Bytes of [`PackedMatrix::sparse_index`]; errors as for [`Scheme::scale_count`].
    pub fn sparse_index_bytes(&self, rows: usize, cols: usize) -> Result<usize, FormatError> {
        Ok(self.sizes(rows, cols)?.sparse_index)
    }

    /// Bytes of all buffers of a matrix; errors as for [`Scheme::scale_count`].
    pub fn packed_bytes(&self, rows: usize, cols: usize) -> Result<usize, FormatError> {
        self.sizes(rows, cols)?.total().ok_or(FormatError::TooLarge { rows, cols })
    }

    /// Bits of storage per weight, everything counted: codes, scales, zero points, second-level values, indices.
    /// Not a number for a shape that the scheme does not have.
    pub fn bits_per_weight(&self, rows: usize, cols: usize) -> f64 {
        self.packed_bytes(rows, cols).map_or(f64::NAN, |bytes| bytes as f64 * 8.0 / (rows as f64 * cols as f64))
    }

    pub(crate) fn sizes(&self, rows: usize, cols: usize) -> Result<Sizes, FormatError> {
        self.validate()?;
        if rows == 0 || cols == 0 {
            return Err(FormatError::Empty { rows, cols });
        }
        if self.sparsity == Sparsity::TwoOfFour && !cols.is_multiple_of(4) {
            return Err(FormatError::SparseColumns { cols });
        }
        self.checked_sizes(rows, cols).ok_or(FormatError::TooLarge { rows, cols })
    }

    fn checked_sizes(&self, rows: usize, cols: usize) -> Option<Sizes> {
        // The decoded matrix must be addressable too.
        rows.checked_mul(cols)?.checked_mul(size_of::<f32>())?;
        let groups = self.groups_per_row(cols);
        let group_rows = rows.div_ceil(self.group_rows(rows));
        let count = group_rows.checked_mul(groups)?;
        let packed_rows = |bits: u8| group_rows.checked_mul(packed_bytes(groups, u32::from(bits))?);
        Some(Sizes {
            group_rows,
            groups,
            codes: rows.checked_mul(packed_bytes(self.stored_cols(cols), self.element.bits())?)?,
            scales: match self.scale {
                ScaleKind::None => 0,
                ScaleKind::F32 => count.checked_mul(4)?,
                ScaleKind::F16 | ScaleKind::Bf16 => count.checked_mul(2)?,
                ScaleKind::E8M0 | ScaleKind::E4M3Global => count,
                ScaleKind::TwoLevel { bits, .. } => packed_rows(bits)?,
            },
            zeros: match self.zero {
                ZeroKind::None => 0,
                ZeroKind::Integer => packed_rows(self.element.bits() as u8)?,
                ZeroKind::F32Bias => count.checked_mul(4)?,
                ZeroKind::F16Bias | ZeroKind::Bf16Bias => count.checked_mul(2)?,
                ZeroKind::TwoLevelMin { bits } => packed_rows(bits)?,
            },
            globals: match self.scale {
                ScaleKind::E4M3Global => 4,
                ScaleKind::TwoLevel { super_group, .. } => {
                    let levels = if matches!(self.zero, ZeroKind::TwoLevelMin { .. }) { 2 } else { 1 };
                    rows.checked_mul(cols.div_ceil(super_group as usize))?.checked_mul(2 * levels)?
                }
                _ => 0,
            },
            group_index: match self.order {
                ColumnOrder::Natural => 0,
                ColumnOrder::GroupIndex => cols.checked_mul(4)?,
            },
            sparse_index: match self.sparsity {
                Sparsity::Dense => 0,
                Sparsity::TwoOfFour => rows.checked_mul(sparse_row_bytes(cols))?,
            },
        })
    }
}

/// Bytes of the 2:4 metadata of one row: four bits for every four columns.
pub(crate) fn sparse_row_bytes(cols: usize) -> usize {
    (cols / 4).div_ceil(2)
}

/// Bytes of `count` packed codes.
fn packed_bytes(count: usize, bits: u32) -> Option<usize> {
    Some(count.checked_mul(bits as usize)?.div_ceil(8))
}

impl PackedMatrix<'_> {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        let buffers = [&self.codes, &self.scales, &self.zeros, &self.globals, &self.group_index, &self.sparse_index];
        buffers.iter().map(|buffer| buffer.len()).sum()
    }

    /// Bits of storage per weight, everything counted.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes() as f64 * 8.0 / (self.rows as f64 * self.cols as f64)
    }
}
