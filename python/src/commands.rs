//! The program's commands as functions.

use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use metal_marlin::cli::{self, Interrupt};
use pyo3::prelude::*;

use crate::error::any_error;

/// How often a thread that waits for work looks whether Ctrl-C was pressed.
const PATIENCE: Duration = Duration::from_millis(100);

/// Runs the program with these arguments, the first of which is its name, and gives its exit status.
#[pyfunction]
pub(crate) fn main(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| cli::main(arguments))
}

/// What a command found out, as JSON.
#[pyfunction]
pub(crate) fn report(py: Python<'_>, arguments: Vec<OsString>) -> PyResult<String> {
    interruptible(py, move |interrupt| cli::report(arguments, interrupt)).map(|report| report.to_string())
}

/// Does `work` on a thread of its own, while this one listens for Ctrl-C: that ends the work where it tells of its progress.
pub(crate) fn interruptible<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&Interrupt) -> anyhow::Result<T> + Send,
) -> PyResult<T> {
    let (interrupt, is_done) = (Interrupt::default(), AtomicBool::new(false));
    let mut interruption = None;
    let result = thread::scope(|scope| {
        let (waiting, interrupt, is_done) = (thread::current(), &interrupt, &is_done);
        let worker = scope.spawn(move || {
            let _wakes = Wakes { waiting, is_done };
            work(interrupt)
        });
        while !is_done.load(Ordering::Acquire) {
            py.detach(|| thread::park_timeout(PATIENCE));
            if let (None, Err(signal)) = (&interruption, py.check_signals()) {
                interrupt.interrupt();
                interruption = Some(signal);
            }
        }
        worker.join()
    });
    match (result, interruption) {
        (_, Some(interruption)) => Err(interruption),
        (Ok(result), None) => result.map_err(|error| any_error(&error)),
        (Err(panic), None) => std::panic::resume_unwind(panic),
    }
}

/// Tells a waiting thread that work is done, however it ends.
struct Wakes<'a> {
    waiting: thread::Thread,
    is_done: &'a AtomicBool,
}

impl Drop for Wakes<'_> {
    fn drop(&mut self) {
        self.is_done.store(true, Ordering::Release);
        self.waiting.unpark();
    }
}
