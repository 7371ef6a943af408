//! Tensors `[count, rows, cols]` that hold as many matrices.

use std::ops::Range;

use marlin_format::{PackedMatrix, Scheme};

/// Matrices of plain floats that are stored as one tensor, such as those of all experts of a layer; see [`crate::Checkpoint::stack`].
#[derive(Debug, Clone, Copy)]
pub struct MatrixStack<'a> {
    pub(crate) scheme: Scheme,
    /// Matrices, rows and columns of each.
    pub(crate) shape: [usize; 3],
    pub(crate) bytes: &'a [u8],
}

impl<'a> MatrixStack<'a> {
    /// How matrices are stored.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Matrices, rows and columns of each.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// One of them.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn matrix(&self, index: usize) -> PackedMatrix<'a> {
        self.rows(index, 0..self.shape[1])
    }

    /// Some rows of one of them.
    ///
    /// # Panics
    /// If there are not as many matrices, or rows.
    pub fn rows(&self, index: usize, range: Range<usize>) -> PackedMatrix<'a> {
        let [count, rows, cols] = self.shape;
        assert!(range.start <= range.end && range.end <= rows, "rows {range:?} of {rows}");
        let of_matrix = &self.bytes[index * (self.bytes.len() / count)..][..self.bytes.len() / count];
        let row = of_matrix.len() / rows;
        let codes = &of_matrix[range.start * row..range.end * row];
        PackedMatrix { codes: codes.into(), ..PackedMatrix::empty(self.scheme, range.len(), cols) }
    }
}
