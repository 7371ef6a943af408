//! Errors of the crates as Python's exceptions, with what caused them.

use std::error::Error;
use std::io;

use marlin_checkpoint::CheckpointError;
use marlin_engine::EngineError;
use marlin_format::FormatError;
use metal_marlin::LoadError;
use metal_marlin::cli::{Interrupted, UsageError};
use pyo3::PyErr;
use pyo3::exceptions::{
    PyFileNotFoundError, PyKeyboardInterrupt, PyOSError, PyPermissionError, PyRuntimeError, PyValueError,
};

/// What the caller gave is wrong.
pub(crate) fn value_error(error: impl Error) -> PyErr {
    PyValueError::new_err(chain(&error))
}

/// The machine fails, or a file does.
pub(crate) fn runtime_error(error: impl Error + 'static) -> PyErr {
    exception(&error)
}

/// Whatever stands against what was asked for.
pub(crate) fn any_error(error: &anyhow::Error) -> PyErr {
    exception(error.as_ref())
}

/// The exception that says whose fault an error is, by whatever of its causes tells first.
fn exception(error: &(dyn Error + 'static)) -> PyErr {
    let text = chain(error);
    let mut cause = Some(error);
    while let Some(error) = cause {
        if is_of_arguments(error) {
            return PyValueError::new_err(text);
        }
        if is_missing(error) {
            return PyFileNotFoundError::new_err(text);
        }
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return match error.kind() {
                io::ErrorKind::NotFound => PyFileNotFoundError::new_err(text),
                io::ErrorKind::PermissionDenied => PyPermissionError::new_err(text),
                _ => PyOSError::new_err(text),
            };
        }
        if error.is::<Interrupted>() {
            return PyKeyboardInterrupt::new_err(text);
        }
        cause = error.source();
    }
    PyRuntimeError::new_err(text)
}

/// What the caller gave is wrong.
fn is_of_arguments(error: &(dyn Error + 'static)) -> bool {
    let is_of_request = |error: &EngineError| {
        matches!(
            error,
            EngineError::Parameter { .. }
                | EngineError::EmptyPrompt
                | EngineError::Token { .. }
                | EngineError::PromptTooLong { .. }
                | EngineError::CacheTooSmall { .. }
                | EngineError::ChatTemplate { .. }
                | EngineError::Grammar { .. }
        )
    };
    error.is::<UsageError>() || error.is::<FormatError>() || error.downcast_ref().is_some_and(is_of_request)
}

/// What is not there where the caller looked for it.
fn is_missing(error: &(dyn Error + 'static)) -> bool {
    let of_checkpoint = |error: &CheckpointError| {
        matches!(error, CheckpointError::NotFound { .. } | CheckpointError::MissingFile { .. })
    };
    let boxed = error.downcast_ref::<Box<CheckpointError>>().map(Box::as_ref);
    matches!(error.downcast_ref(), Some(LoadError::NotFound { .. }))
        || error.downcast_ref().or(boxed).is_some_and(of_checkpoint)
}

/// An error and what caused it, in one text.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Some errors end with what caused them.
        if !text.ends_with(&said) {
            text += ": ";
            text += &said;
        }
        cause = error.source();
    }
    text
}
