//! How a matrix is stored.

use marlin_checkpoint::packed_tensors;
use marlin_format::{Format, Grouping, Scheme as Storage};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::value_error;

/// How a matrix is stored: what a code means, what shares a scale, what a scale is.
#[pyclass(frozen, eq, hash, str = "{0}", module = "metal_marlin._native")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Scheme(pub(crate) Storage);

/// Columns that share a scale, or the name of what does.
#[derive(FromPyObject)]
enum GroupSize {
    Columns(u32),
    Name(String),
}

#[pymethods]
impl Scheme {
    /// The scheme of a format: fp4, int4, int4-sym, int8, fp8, int3, int2, mxfp4, nvfp4, bf16, f16, f32.
    ///
    /// `group_size` is columns that share a scale, "row", "tensor" or "ROWSxCOLUMNS"; the format's own if None. `sparse` keeps
    /// two of every four weights. Raises ValueError if there is no such format or it has no such groups.
    #[staticmethod]
    #[pyo3(signature = (format, group_size=None, *, sparse=false))]
    fn of(format: &str, group_size: Option<GroupSize>, sparse: bool) -> PyResult<Self> {
        let format: Format = format.parse().map_err(value_error)?;
        let grouping = match group_size {
            None => None,
            Some(GroupSize::Columns(0)) => {
                return Err(PyValueError::new_err(
                    "group_size must be positive, found 0; leave it out for the format's own",
                ));
            }
            Some(GroupSize::Columns(columns)) => Some(Grouping::Columns(columns)),
            Some(GroupSize::Name(name)) => Some(name.parse().map_err(value_error)?),
        };
        let scheme = if sparse { format.sparse_24(grouping) } else { format.scheme(grouping) };
        scheme.map(Self).map_err(value_error)
    }

    /// The scheme that `to_json` wrote.
    #[staticmethod]
    fn from_json(text: &str) -> PyResult<Self> {
        let scheme: Storage = serde_json::from_str(text).map_err(value_error)?;
        scheme.validate().map_err(value_error)?;
        Ok(Self(scheme))
    }

    /// As `quantization_config.schemes` of config.json has it.
    #[expect(clippy::wrong_self_convention, reason = "methods of Python's objects take them by reference")]
    fn to_json(&self) -> PyResult<String> {
        serde_json::to_string(&self.0).map_err(value_error)
    }

    /// Tensors that hold a matrix `[rows, cols]`: suffix of the name, dtype as in safetensors, shape. The first is that of the codes,
    /// whose suffix is "". Raises ValueError if the scheme has no such shape.
    fn parts(&self, rows: usize, cols: usize) -> PyResult<Vec<(&'static str, String, Vec<usize>)>> {
        let tensors = packed_tensors(&self.0, rows, cols).map_err(value_error)?;
        Ok(tensors.into_iter().map(|tensor| (tensor.suffix(), tensor.dtype.to_string(), tensor.shape)).collect())
    }

    /// Whether weights are plain floats.
    #[getter]
    fn is_dense(&self) -> bool {
        self.0.is_dense()
    }

    /// Stored bits of a weight of a matrix `[rows, cols]`, scales included.
    fn bits_per_weight(&self, rows: usize, cols: usize) -> PyResult<f64> {
        let bytes = self.0.packed_bytes(rows, cols).map_err(value_error)?;
        Ok(bytes as f64 * 8.0 / (rows as f64 * cols as f64))
    }

    fn __repr__(&self) -> String {
        format!("Scheme({})", self.0)
    }

    fn __reduce__(slf: &Bound<'_, Self>) -> PyResult<(Py<PyAny>, (String,))> {
        Ok((slf.get_type().getattr("from_json")?.unbind(), (slf.get().to_json()?,)))
    }
}
