//! The extension module of the Python package: matrices, layers, checkpoints and the engine as Python objects. What users import is
//! written in Python on top of it; `metal_marlin/_native.pyi` documents what is here.

use pyo3::prelude::*;

mod checkpoint;
mod commands;
mod engine;
mod error;
mod experts;
mod floats;
mod linear;
mod matrix;
mod runtime;
mod scheme;

#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::checkpoint::Checkpoint;
    #[pymodule_export]
    use crate::commands::{main, report};
    #[pymodule_export]
    use crate::engine::{Engine, Event, Finish};
    #[pymodule_export]
    use crate::experts::Experts;
    #[pymodule_export]
    use crate::linear::Linear;
    #[pymodule_export]
    use crate::matrix::Matrix;
    #[pymodule_export]
    use crate::runtime::Runtime;
    #[pymodule_export]
    use crate::scheme::Scheme;
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
