//! Tensors that are made in memory instead of being read from files.

use std::borrow::Cow;
use std::sync::Arc;

use marlin_format::{PackedMatrix, Scheme};

use crate::layouts;
use crate::{Storage, TensorInfo};

/// A tensor of a checkpoint that is made in memory, see [`crate::Checkpoint::from_parts`].
#[derive(Debug, Clone)]
pub struct MemoryTensor {
    pub(crate) shape: Vec<usize>,
    /// A vector is one row of plain floats.
    pub(crate) values: Arc<PackedMatrix<'static>>,
}

impl MemoryTensor {
    /// A matrix. Several tensors may share one, which then lies in memory once.
    pub fn matrix(matrix: Arc<PackedMatrix<'static>>) -> Self {
        Self { shape: vec![matrix.rows, matrix.cols], values: matrix }
    }

    /// A vector (norm weights, a bias), kept in f32.
    pub fn vector(values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let row = PackedMatrix { codes: Cow::Owned(bytes), ..PackedMatrix::empty(Scheme::F32, 1, values.len()) };
        Self { shape: vec![values.len()], values: Arc::new(row) }
    }

    pub(crate) fn info(&self) -> TensorInfo {
        let scheme = self.values.scheme;
        TensorInfo {
            shape: self.shape.clone(),
            storage: layouts::dense_dtype(&scheme).map_or(Storage::Packed(scheme), Storage::Plain),
            bytes: self.values.bytes() as u64,
        }
    }
}
