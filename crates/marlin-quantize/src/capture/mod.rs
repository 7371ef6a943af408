//! What the linears of a model are given while it runs.
//!
//! [`Observed`] is a backend around another one: it computes what that one computes, and notes the inputs of linears on the
//! way. So decoders need not know that they are watched, and any device can be.

mod backend;
mod encoder;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

pub(crate) use self::backend::Observed;

/// The linears that are watched, by their names, and what they were given in a step.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watch(Arc<Mutex<HashMap<String, Inputs>>>);

/// What a linear was given in a step.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inputs {
    /// As wide as its weights have columns.
    pub(crate) rows: Vec<f32>,
    /// Of an expert, the token of each row, ascending, and the weight that the token gives to the expert. Other linears are given all tokens.
    pub(crate) routes: Vec<(usize, f32)>,
}

impl Watch {
    /// Watches these linears from now on, and no others. Steps end with the last of them: nothing behind it is computed.
    pub(crate) fn only<'a>(&self, linears: impl IntoIterator<Item = &'a str>) {
        *self.lock() = linears.into_iter().map(|name| (name.to_owned(), Inputs::default())).collect();
    }

    /// Tells each watched linear's inputs, which are forgotten then.
    pub(crate) fn take(&self, mut each: impl FnMut(&str, Inputs)) {
        self.lock().iter_mut().for_each(|(name, inputs)| each(name, std::mem::take(inputs)));
    }

    /// Watched linears.
    fn len(&self) -> usize {
        self.lock().len()
    }

    fn watches(&self, name: &str) -> bool {
        self.lock().contains_key(name)
    }

    fn add(&self, name: &str, rows: &[f32], routes: &[(usize, f32)]) {
        if let Some(inputs) = self.lock().get_mut(name) {
            inputs.rows.extend_from_slice(rows);
            inputs.routes.extend_from_slice(routes);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Inputs>> {
        self.0.lock().expect("nothing that holds the lock panics")
    }
}
