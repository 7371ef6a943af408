//! Tensors `[E, rows, cols]` that hold a matrix for each expert.

use marlin_checkpoint::CheckpointError;
use marlin_format::{PackedMatrix, Scheme};
use marlin_kernels::Backend;

use super::load::Loader;
use crate::ModelError;

/// Matrices of plain floats, one for each expert.
pub(super) struct Stack<'a> {
    scheme: Scheme,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

impl<'a> Stack<'a> {
    /// How matrices of an expert are stored.
    pub(super) fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Rows of an expert's matrix from `first` on.
    pub(super) fn slice(&self, expert: usize, first: usize, rows: usize) -> PackedMatrix<'a> {
        let row = self.cols * self.element_bytes();
        let codes = &self.bytes[(expert * self.rows + first) * row..][..rows * row];
        PackedMatrix { codes: codes.into(), ..PackedMatrix::empty(self.scheme, rows, self.cols) }
    }

    /// The transposed matrix of some columns of an expert: `first`, `first + step` and so on.
    pub(super) fn transposed(&self, expert: usize, first: usize, step: usize) -> PackedMatrix<'static> {
        let (rows, cols, size) = (self.cols / step, self.rows, self.element_bytes());
        let bytes = &self.bytes[expert * self.rows * self.cols * size..][..self.rows * self.cols * size];
        let codes = gather(bytes, size, rows, cols, |row, col| col * self.cols + first + row * step);
        PackedMatrix { codes: codes.into(), ..PackedMatrix::empty(self.scheme, rows, cols) }
    }

    fn element_bytes(&self) -> usize {
        self.scheme.element.bits() as usize / 8
    }
}

impl<'a, B: Backend> Loader<'a, B> {
    /// A tensor `[E, rows, cols]` of plain floats.
    pub(super) fn stack(&self, name: &str, shape: [usize; 3]) -> Result<Stack<'a>, ModelError> {
        let bytes = self.bytes(name, &shape)?;
        let scheme = self.checkpoint.info(name).and_then(|info| info.scheme());
        let scheme = scheme.ok_or_else(|| self.wrong_type(name, "BF16, F16 or F32"))?;
        let [_, rows, cols] = shape;
        Ok(Stack { scheme, rows, cols, bytes })
    }

    /// The bytes of a tensor of this shape.
    pub(super) fn bytes(&self, name: &str, shape: &[usize]) -> Result<&'a [u8], ModelError> {
        self.mark_read(name);
        let tensor = self.checkpoint.tensor(name)?;
        if tensor.shape != shape {
            let (file, tensor_name) = (self.checkpoint.name().to_owned(), name.to_owned());
            let (found, wanted) = (tensor.shape.to_vec(), format!("{shape:?}"));
            return Err(CheckpointError::Shape { file, tensor: tensor_name, found, wanted }.into());
        }
        Ok(tensor.bytes)
    }

    /// The rows of a tensor `[rows, len]` of finite values.
    pub(super) fn vectors(&self, name: &str, rows: usize, len: usize) -> Result<Vec<Vec<f32>>, ModelError> {
        let values = self.matrix(name, rows, len)?.decode();
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let (file, tensor, value) = (self.checkpoint.name().to_owned(), name.to_owned(), values[index]);
            return Err(CheckpointError::NotFinite { file, tensor, index, value }.into());
        }
        Ok(values.chunks_exact(len).map(<[f32]>::to_vec).collect())
    }

    pub(super) fn wrong_type(&self, name: &str, wanted: &'static str) -> ModelError {
        let storage = self.checkpoint.info(name).map(|info| format!("{:?}", info.storage));
        let (file, tensor) = (self.checkpoint.name().to_owned(), name.to_owned());
        CheckpointError::Type { file, tensor, found: storage.unwrap_or_default(), wanted }.into()
    }
}

/// A matrix `[rows, cols]` of elements of `size` bytes, each taken from the index that `at` gives.
pub(super) fn gather(
    bytes: &[u8],
    size: usize,
    rows: usize,
    cols: usize,
    at: impl Fn(usize, usize) -> usize,
) -> Vec<u8> {
    let mut gathered = Vec::with_capacity(rows * cols * size);
    for row in 0..rows {
        for col in 0..cols {
            gathered.extend_from_slice(&bytes[at(row, col) * size..][..size]);
        }
    }
    gathered
}
