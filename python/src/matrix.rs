//! A packed matrix in canonical order.

use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::cast_slice;
use marlin_checkpoint::packed_tensors;
use marlin_format::{EncodeOptions, PackedMatrix, ScaleSearch, Scheme as Storage};
use marlin_quantize::encode_matrix;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArrayDyn};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::value_error;
use crate::floats::{Floats, Slice};
use crate::scheme::Scheme;

/// A packed matrix `[rows, cols]` = `[out_features, in_features]` in canonical order. Immutable.
#[pyclass(frozen, module = "metal_marlin._native")]
#[derive(Debug, Clone)]
pub(crate) struct Matrix(pub(crate) Arc<PackedMatrix<'static>>);

impl Matrix {
    pub(crate) fn new(matrix: PackedMatrix<'static>) -> Self {
        Self(Arc::new(matrix))
    }
}

#[pymethods]
impl Matrix {
    /// Rounds a matrix, `[rows, cols]`, C-contiguous. `search`: "mse" or "absmax". Raises ValueError where a weight is not finite.
    #[staticmethod]
    #[pyo3(signature = (weights, scheme, search="mse"))]
    fn encode(weights: &Bound<'_, PyAny>, scheme: &Scheme, search: &str) -> PyResult<Self> {
        let search = match search {
            "mse" => ScaleSearch::Mse,
            "absmax" => ScaleSearch::AbsMax,
            _ => return Err(PyValueError::new_err(format!("search must be \"mse\" or \"absmax\", found {search:?}"))),
        };
        let py = weights.py();
        let weights = Floats::of(weights, "weights")?;
        let &[rows, cols] = weights.shape() else {
            return Err(PyValueError::new_err(format!(
                "weights must be a matrix, found the shape {:?}",
                weights.shape()
            )));
        };
        let (dtype, bytes) = match weights.slice("weights")? {
            Slice::F32(values) => (Storage::F32, cast_slice(values)),
            Slice::F16(values) => (Storage::F16, cast_slice(values)),
            Slice::Bf16(values) => (Storage::BF16, cast_slice::<_, u8>(values)),
        };
        let source = PackedMatrix::from_dense_bytes(dtype, rows, cols, bytes).map_err(value_error)?;
        let options = EncodeOptions { search, ..EncodeOptions::default() };
        let (matrix, _) = py.detach(|| encode_matrix(&source, scheme.0, &options)).map_err(value_error)?;
        Ok(Self::new(matrix))
    }

    /// The matrix whose tensors, by suffix (`Scheme.parts`), have these bytes. Raises ValueError if one is missing, too many, or of another size.
    #[staticmethod]
    fn from_tensors(
        scheme: &Scheme,
        rows: usize,
        cols: usize,
        mut tensors: HashMap<String, PyReadonlyArrayDyn<'_, u8>>,
    ) -> PyResult<Self> {
        let mut matrix = PackedMatrix::empty(scheme.0, rows, cols);
        for tensor in packed_tensors(&scheme.0, rows, cols).map_err(value_error)? {
            let suffix = tensor.suffix();
            let problem = |problem: String| {
                PyValueError::new_err(format!(
                    "tensor {suffix:?} of a matrix [{rows}, {cols}] in {}: {problem}",
                    scheme.0
                ))
            };
            let bytes = tensors.remove(suffix).ok_or_else(|| problem("it is missing".into()))?;
            let bytes = bytes.as_slice().map_err(|_| problem("its bytes are not contiguous".into()))?;
            let wanted = tensor.bytes();
            if bytes.len() != wanted {
                return Err(problem(format!("it has {} bytes, not {wanted}", bytes.len())));
            }
            tensor.set(&mut matrix, bytes.to_vec());
        }
        if let Some(suffix) = tensors.keys().next() {
            return Err(PyValueError::new_err(format!("{} has no tensor {suffix:?}", scheme.0)));
        }
        matrix.validate().map_err(value_error)?;
        Ok(Self::new(matrix))
    }

    /// Its tensors' bytes by suffix, each flat.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<HashMap<&'static str, Bound<'py, PyArray1<u8>>>> {
        let tensors = packed_tensors(&self.0.scheme, self.0.rows, self.0.cols).map_err(value_error)?;
        let bytes = |tensor: &marlin_checkpoint::PackedTensor| PyArray1::from_slice(py, tensor.get(&self.0));
        Ok(tensors.iter().map(|tensor| (tensor.suffix(), bytes(tensor))).collect())
    }

    /// Its weights in f32, `[rows, cols]`.
    fn dequantize<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let matrix = &self.0;
        let weights = py.detach(|| matrix.decode());
        PyArray1::from_vec(py, weights).reshape([matrix.rows, matrix.cols])
    }

    #[getter]
    fn rows(&self) -> usize {
        self.0.rows
    }

    #[getter]
    fn cols(&self) -> usize {
        self.0.cols
    }

    #[getter]
    fn scheme(&self) -> Scheme {
        Scheme(self.0.scheme)
    }

    /// Bytes of all its tensors.
    #[getter]
    fn nbytes(&self) -> usize {
        let PackedMatrix { codes, scales, zeros, globals, group_index, sparse_index, .. } = &*self.0;
        [codes, scales, zeros, globals, group_index, sparse_index].iter().map(|bytes| bytes.len()).sum()
    }

    fn __repr__(&self) -> String {
        format!("Matrix([{}, {}], {})", self.0.rows, self.0.cols, self.0.scheme)
    }
}
