//! How work is ended before its time: by Ctrl-C in the program, by [`Interrupt`] in a program of another kind.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;

type Action = Box<dyn FnMut() + Send>;

/// The process runs the program and nothing else, so that its signals are ours.
static IS_PROGRAM: AtomicBool = AtomicBool::new(false);
static ACTION: Mutex<Option<Action>> = Mutex::new(None);

/// From now on Ctrl-C is the program's.
pub(super) fn begin_program() {
    IS_PROGRAM.store(true, Ordering::Relaxed);
}

/// Does `action` at Ctrl-C from now on, instead of what was done before. In a program of another kind, which does what it wants at Ctrl-C, nothing
/// changes.
pub(super) fn on_ctrl_c(action: impl FnMut() + Send + 'static) -> anyhow::Result<()> {
    if !IS_PROGRAM.load(Ordering::Relaxed) {
        return Ok(());
    }
    let before = ACTION.lock().unwrap_or_else(PoisonError::into_inner).replace(Box::new(action));
    if before.is_some() {
        return Ok(());
    }
    let act = || {
        if let Some(action) = &mut *ACTION.lock().unwrap_or_else(PoisonError::into_inner) {
            action();
        }
    };
    ctrlc::set_handler(act).context("cannot handle Ctrl-C")
}

thread_local! {
    static CURRENT: RefCell<Interrupt> = RefCell::default();
}

/// Ends work that was given it, from another thread, the next time that progress is told.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

/// Work was ended by an [`Interrupt`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

impl Interrupt {
    /// Ends the work.
    pub fn interrupt(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// What ends the work that this thread is at.
    pub(super) fn current() -> Self {
        CURRENT.with_borrow(Clone::clone)
    }

    /// Does a part of `work` on this thread.
    pub(super) fn during<T>(self, work: impl FnOnce() -> T) -> T {
        /// Back to what was there before, by a panic as well.
        struct Restore(Interrupt);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(std::mem::take(&mut self.0));
            }
        }
        let _restore = Restore(CURRENT.replace(self));
        work()
    }

    /// Ends the work here if that is wanted: by unwinding, so that temporary files go and what can be resumed stays.
    pub(super) fn check(&self) {
        if self.0.load(Ordering::Relaxed) {
            resume_unwind(Box::new(Interrupted));
        }
    }
}

/// Does `work` until it is finished, or until `interrupt` ends it.
pub(super) fn until<T>(interrupt: &Interrupt, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(|| interrupt.clone().during(work))).unwrap_or_else(|panic| {
        match panic.downcast::<Interrupted>() {
            Ok(interrupted) => Err((*interrupted).into()),
            Err(panic) => resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::in_pool;
    use crate::cli::progress::Bar;

    #[test]
    fn work_ends_where_it_tells_its_progress() {
        let interrupt = Interrupt::default();
        let mut done = 0;
        let ended = until(&interrupt, || {
            in_pool(None, || {
                let mut bar = Bar::counting("Working", "steps");
                for step in 1..=10 {
                    bar.set(step, 10);
                    done = step;
                    if step == 3 {
                        interrupt.interrupt();
                    }
                }
            })
        });
        assert!(ended.unwrap_err().is::<Interrupted>());
        assert_eq!(done, 3);
        // Other work goes on.
        until(&Interrupt::default(), || {
            Bar::counting("Working", "steps").set(1, 1);
            Ok(())
        })
        .unwrap();
    }
}
