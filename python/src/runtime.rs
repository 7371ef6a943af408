//! A processor that layers run on.

use std::sync::{Arc, Mutex, MutexGuard};

use marlin_kernels::Backend;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuLayers, CpuOptions};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::runtime_error;
use crate::floats::Scratch;

/// A processor: its threads and how linears multiply. Layers of one runtime share its threads and scratch memory, and take turns.
#[pyclass(frozen, module = "metal_marlin._native")]
#[derive(Debug, Clone)]
pub(crate) struct Runtime(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    backend: CpuBackend,
    work: Mutex<Work>,
}

/// What a layer works with.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) layers: CpuLayers,
    pub(crate) scratch: Scratch,
}

impl Runtime {
    pub(crate) fn backend(&self) -> &CpuBackend {
        &self.0.backend
    }

    /// Waits for whoever works.
    pub(crate) fn work(&self) -> MutexGuard<'_, Work> {
        // What a panic left is overwritten by the next layer.
        self.0.work.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

const INT8: &str = "int8";
const F32: &str = "f32";

#[pymethods]
impl Runtime {
    /// `activations`: "int8" (rounded to 8 bits in groups of 32, fast) or "f32" (as they are).
    #[new]
    #[pyo3(signature = (threads=None, activations="int8"))]
    fn new(threads: Option<usize>, activations: &str) -> PyResult<Self> {
        let arithmetic = match activations {
            INT8 => Arithmetic::Int8,
            F32 => Arithmetic::Exact,
            _ => {
                let problem = format!("activations must be {INT8:?} or {F32:?}, found {activations:?}");
                return Err(PyValueError::new_err(problem));
            }
        };
        if threads == Some(0) {
            return Err(PyValueError::new_err(
                "threads must be positive, found 0; leave it out for one per performance core",
            ));
        }
        let backend = CpuBackend::new(CpuOptions { threads, arithmetic, simd: None }).map_err(runtime_error)?;
        let layers = CpuLayers::new(&backend).map_err(runtime_error)?;
        let work = Mutex::new(Work { layers, scratch: Scratch::default() });
        Ok(Self(Arc::new(Shared { backend, work })))
    }

    #[getter]
    fn threads(&self) -> usize {
        self.0.backend.threads().count()
    }

    #[getter]
    fn activations(&self) -> &'static str {
        match self.0.backend.arithmetic() {
            Arithmetic::Int8 => INT8,
            Arithmetic::Exact => F32,
        }
    }

    /// Instruction set, threads, arithmetic.
    #[getter]
    pub(crate) fn detail(&self) -> String {
        self.0.backend.info().detail
    }

    fn __repr__(&self) -> String {
        format!("Runtime({})", self.detail())
    }
}
