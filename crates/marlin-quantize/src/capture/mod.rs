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
pub(crate) struct Watch(Arc<Mutex<Watched>>);

#[derive(Debug, Default)]
struct Watched {
    linears: HashMap<String, Inputs>,
    /// Steps go on behind the last of them.
    is_beside: bool,
}

/// What a linear was given in a step.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inputs {
    /// As wide as its weights have columns.
    pub(crate) rows: Vec<f32>,
    /// Of an expert, the token of each row, ascending, and the weight that the token gives to the expert. Other linears are given all tokens.
    pub(crate) routes: Vec<(usize, f32)>,
}

impl Inputs {
    /// The rows, `cols` wide; those of an expert times the weights that its outputs have in the sum of a token's experts.
    pub(crate) fn weighted(mut self, cols: usize) -> Vec<f32> {
        weigh(&mut self.rows, cols, &self.routes);
        self.rows
    }
}

/// Multiplies rows, `cols` wide, by the weights of their routes; those of no expert stay as they are.
pub(crate) fn weigh(rows: &mut [f32], cols: usize, routes: &[(usize, f32)]) {
    for (row, (_, weight)) in rows.chunks_exact_mut(cols).zip(routes) {
        row.iter_mut().for_each(|value| *value *= weight);
    }
}

impl Watch {
    /// Watches these linears from now on, and no others. Steps end with the last of them: nothing behind it is computed.
    pub(crate) fn only<'a>(&self, linears: impl IntoIterator<Item = &'a str>) {
        self.set(linears, false);
    }

    /// Watches these linears from now on, and no others, in steps that are run whole.
    pub(crate) fn beside<'a>(&self, linears: impl IntoIterator<Item = &'a str>) {
        self.set(linears, true);
    }

    fn set<'a>(&self, linears: impl IntoIterator<Item = &'a str>, is_beside: bool) {
        let linears = linears.into_iter().map(|name| (name.to_owned(), Inputs::default())).collect();
        *self.lock() = Watched { linears, is_beside };
    }

    /// Tells each watched linear's inputs, which are forgotten then.
    pub(crate) fn take(&self, mut each: impl FnMut(&str, Inputs)) {
        self.lock().linears.iter_mut().for_each(|(name, inputs)| each(name, std::mem::take(inputs)));
    }

    /// The linears with whose inputs a step is over; none if it never is.
    fn awaited(&self) -> usize {
        let watched = self.lock();
        if watched.is_beside { 0 } else { watched.linears.len() }
    }

    fn watches(&self, name: &str) -> bool {
        self.lock().linears.contains_key(name)
    }

    fn add(&self, name: &str, rows: &[f32], routes: &[(usize, f32)]) {
        if let Some(inputs) = self.lock().linears.get_mut(name) {
            inputs.rows.extend_from_slice(rows);
            inputs.routes.extend_from_slice(routes);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().expect("nothing that holds the lock panics")
    }
}
