//! What the linears of a model are given while it runs.
//!
//! [`Observed`] is a backend around another one: it computes what that one computes, and adds the inputs of linears to [`Hessian`]s on the
//! way. So decoders need not know that they are watched, and any device can be.

mod backend;
mod encoder;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

pub(crate) use self::backend::Observed;
use crate::Hessian;

/// The linears that are watched, by their names, and what they were given.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watch(Arc<Mutex<HashMap<String, Hessian>>>);

impl Watch {
    /// Watches these linears, each named with the width of its inputs, from now on, and no others. Steps end with the last of
    /// them: nothing behind it is computed.
    pub(crate) fn only(&self, linears: impl IntoIterator<Item = (String, usize)>) {
        *self.lock() = linears.into_iter().map(|(name, cols)| (name, Hessian::new(cols))).collect();
    }

    /// What the watched linears were given; watches none any more.
    pub(crate) fn take(&self) -> HashMap<String, Hessian> {
        std::mem::take(&mut self.lock())
    }

    /// Watched linears.
    fn len(&self) -> usize {
        self.lock().len()
    }

    fn watches(&self, name: &str) -> bool {
        self.lock().contains_key(name)
    }

    /// Adds inputs, `[rows, cols]`.
    fn add(&self, name: &str, inputs: &[f32]) {
        if let Some(hessian) = self.lock().get_mut(name) {
            hessian.add(inputs);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Hessian>> {
        self.0.lock().expect("nothing that holds the lock panics")
    }
}
