//! Tensors `[E, rows, cols]` that hold a matrix for each expert.

use std::borrow::Cow;

use marlin_checkpoint::{CheckpointError, MatrixStack};
use marlin_kernels::Backend;

use super::load::Loader;
use crate::ModelError;

impl<'a, B: Backend> Loader<'a, B> {
    /// A tensor `[E, rows, cols]` of plain floats.
    pub(super) fn stack(&self, name: &str, shape: [usize; 3]) -> Result<MatrixStack<'a>, ModelError> {
        self.mark_read(name);
        let stack = self.checkpoint.stack(name)?;
        self.require_shape(name, &stack.shape(), &shape)?;
        Ok(stack)
    }

    /// The bytes of a tensor of this shape.
    pub(super) fn bytes(&self, name: &str, shape: &[usize]) -> Result<Cow<'a, [u8]>, ModelError> {
        self.mark_read(name);
        let tensor = self.checkpoint.tensor(name)?;
        self.require_shape(name, tensor.shape, shape)?;
        Ok(tensor.bytes)
    }

    fn require_shape(&self, name: &str, found: &[usize], wanted: &[usize]) -> Result<(), ModelError> {
        if found == wanted {
            return Ok(());
        }
        let (file, tensor) = (self.checkpoint.name().to_owned(), name.to_owned());
        Err(CheckpointError::Shape { file, tensor, found: found.to_vec(), wanted: format!("{wanted:?}") }.into())
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
