//! What Ctrl-C does, where it does not just end the program.

use std::sync::{Mutex, PoisonError};

use anyhow::Context;

type Action = Box<dyn FnMut() + Send>;

static ACTION: Mutex<Option<Action>> = Mutex::new(None);

/// Does `action` at Ctrl-C from now on, instead of what was done before.
pub(crate) fn on_ctrl_c(action: impl FnMut() + Send + 'static) -> anyhow::Result<()> {
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
