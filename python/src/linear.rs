//! A linear layer.

use marlin_kernels::cpu::CpuLinear;
use marlin_kernels::{Backend, LinearPart};
use numpy::PyReadonlyArray1;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::error::{runtime_error, value_error};
use crate::floats::{Floats, FloatsMut, map_rows};
use crate::matrix::Matrix;
use crate::runtime::{Runtime, Work};

/// A matrix in the processor's own order, with its bias: the only copy of its weights.
#[pyclass(frozen, module = "metal_marlin._native")]
pub(crate) struct Linear {
    runtime: Runtime,
    linear: CpuLinear,
    rows: usize,
    cols: usize,
}

#[pymethods]
impl Linear {
    #[new]
    #[pyo3(signature = (runtime, weight, bias=None))]
    fn new(
        py: Python<'_>,
        runtime: &Runtime,
        weight: &Matrix,
        bias: Option<PyReadonlyArray1<'_, f32>>,
    ) -> PyResult<Self> {
        let bias = bias.map(|bias| bias.as_slice().map(<[f32]>::to_vec)).transpose();
        let bias = bias.map_err(|_| PyValueError::new_err("bias must be C-contiguous"))?;
        let part = LinearPart { weight: weight.0.borrowed(), bias };
        let linear = py.detach(|| runtime.backend().load_linear(&[part])).map_err(value_error)?;
        Ok(Self { runtime: runtime.clone(), linear, rows: weight.0.rows, cols: weight.0.cols })
    }

    /// `out = x · Wᵀ + bias` for x `[rows, in_features]` and out `[rows, out_features]`, both C-contiguous and of any of the dtypes. Releases the GIL.
    fn forward(&self, py: Python<'_>, x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let (x, mut out) = (Floats::of(x, "x")?, FloatsMut::of(out, "out")?);
        let rows = check_shapes(x.shape(), self.cols, out.shape(), self.rows)?;
        let (x, out) = (x.slice("x")?, out.slice("out")?);
        let done = py.detach(|| {
            let Work { layers, scratch } = &mut *self.runtime.work();
            map_rows(scratch, (x, self.cols), (out, self.rows), rows, |_, x, out| layers.linear(x, &self.linear, out))
        });
        done.map_err(runtime_error)
    }

    /// The matrix as it was loaded, to the bit.
    fn unpack(&self, py: Python<'_>) -> PyResult<Matrix> {
        let parts = py.detach(|| self.runtime.backend().unpack_linear(&self.linear)).map_err(runtime_error)?;
        let part = parts.into_iter().next().ok_or_else(|| PyRuntimeError::new_err("a linear without a matrix"))?;
        Ok(Matrix::new(part.weight))
    }

    /// Bytes it takes in memory.
    #[getter]
    fn nbytes(&self) -> usize {
        self.linear.bytes()
    }

    fn __repr__(&self) -> String {
        format!("Linear(in_features={}, out_features={}, {})", self.cols, self.rows, self.runtime.detail())
    }
}

/// Checks that `x` has rows of `cols` values, and `out` as many rows of `width`; gives their number.
pub(crate) fn check_shapes(x: &[usize], cols: usize, out: &[usize], width: usize) -> PyResult<usize> {
    if let (&[rows, found], &[out_rows, out_width]) = (x, out)
        && found == cols
        && rows == out_rows
        && out_width == width
    {
        return Ok(rows);
    }
    let problem = format!("x must be [rows, {cols}] and out [rows, {width}], found {x:?} and {out:?}");
    Err(PyValueError::new_err(problem))
}
