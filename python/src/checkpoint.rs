//! A model's files.

use std::path::PathBuf;

use marlin_checkpoint::{Checkpoint as Files, Storage};
use marlin_format::PackedMatrix;
use metal_marlin::load::{self, OpenOptions};
use numpy::{PyArray1, PyArrayDyn, PyArrayMethods};
use pyo3::exceptions::{PyIndexError, PyKeyError};
use pyo3::prelude::*;

use crate::error::runtime_error;
use crate::matrix::Matrix;
use crate::scheme::Scheme;

/// A model folder or GGUF file, mapped into memory; every layout that the program reads.
#[pyclass(frozen, module = "metal_marlin._native")]
pub(crate) struct Checkpoint(Files);

/// What a tensor is stored in.
#[derive(IntoPyObject)]
enum Stored {
    Plain(String),
    Packed(Scheme),
}

#[pymethods]
impl Checkpoint {
    /// What a person calls a model: a folder, a GGUF file, an id on the Hub, or the bundled one (None).
    #[staticmethod]
    #[pyo3(signature = (model, revision=None))]
    fn open(py: Python<'_>, model: Option<PathBuf>, revision: Option<&str>) -> PyResult<Self> {
        let options = OpenOptions { revision, ..OpenOptions::default() };
        let opened = py.detach(|| load::open(model.as_deref(), &options, &mut |_, _, _| {}));
        opened.map(Self).map_err(runtime_error)
    }

    #[getter]
    fn name(&self) -> &str {
        self.0.name()
    }

    /// Where its files are; None of the bundled model.
    #[getter]
    fn folder(&self) -> Option<PathBuf> {
        self.0.path().map(PathBuf::from)
    }

    /// config.json.
    fn config(&self) -> String {
        self.0.config().to_string()
    }

    /// Names of tensors, quantised matrices as one each.
    fn names(&self) -> Vec<String> {
        self.0.tensor_names().map(str::to_owned).collect()
    }

    /// Shape, and dtype of a plain tensor or scheme of a packed matrix.
    fn info(&self, name: &str) -> Option<(Vec<usize>, Stored)> {
        let info = self.0.info(name)?;
        let stored = match info.storage {
            Storage::Plain(dtype) => Stored::Plain(dtype.to_string()),
            Storage::Packed(scheme) => Stored::Packed(Scheme(scheme)),
        };
        Some((info.shape, stored))
    }

    /// A matrix, packed or plain; of a tensor of three dimensions, such as those of all experts, the one at `index`.
    #[pyo3(signature = (name, index=None))]
    fn matrix(&self, py: Python<'_>, name: &str, index: Option<usize>) -> PyResult<Matrix> {
        self.require(name)?;
        let Some(index) = index else {
            let matrix = py.detach(|| self.0.matrix_any(name).map(PackedMatrix::into_owned));
            return matrix.map(Matrix::new).map_err(runtime_error);
        };
        let stack = self.0.stack(name).map_err(runtime_error)?;
        let [count, ..] = stack.shape();
        if index >= count {
            return Err(PyIndexError::new_err(format!("{name} holds {count} matrices; there is none at {index}")));
        }
        Ok(Matrix::new(py.detach(|| stack.matrix(index).into_owned())))
    }

    /// A plain tensor: dtype, shape, bytes.
    fn tensor<'py>(&self, py: Python<'py>, name: &str) -> PyResult<(String, Vec<usize>, Bound<'py, PyArray1<u8>>)> {
        self.require(name)?;
        let tensor = self.0.tensor(name).map_err(runtime_error)?;
        Ok((tensor.dtype.to_string(), tensor.shape.to_vec(), PyArray1::from_slice(py, &tensor.bytes)))
    }

    /// A tensor in f32, whatever it is stored in.
    fn dequantized<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        self.require(name)?;
        let shape = self.0.shape(name).unwrap_or_default();
        let values = py.detach(|| match shape[..] {
            [_, _] => self.0.matrix_any(name).map(|matrix| matrix.decode()),
            [len] => self.0.vector(name, len),
            _ => self.0.stack(name).map(|stack| {
                let [count, ..] = stack.shape();
                (0..count).flat_map(|index| stack.matrix(index).decode()).collect()
            }),
        });
        PyArray1::from_vec(py, values.map_err(runtime_error)?).reshape(shape)
    }

    /// Forgets what was read of a tensor, so that a model larger than memory does not stay mapped.
    fn release(&self, name: &str) {
        self.0.release(name);
    }

    /// Whether activations have to be rotated for its weights, which Transformers' models do not do.
    fn is_rotated(&self) -> bool {
        !self.0.rotations().is_none()
    }

    fn __repr__(&self) -> String {
        format!("Checkpoint({:?})", self.0.name())
    }
}

impl Checkpoint {
    fn require(&self, name: &str) -> PyResult<()> {
        if self.0.contains(name) {
            return Ok(());
        }
        Err(PyKeyError::new_err(format!("{} has no tensor {name}; names() lists them", self.0.name())))
    }
}
