//! What is known of a linear's inputs.

use crate::capture::{Inputs, weigh};
use crate::gptq::{Drift, Hessian};

/// The inputs of a linear in the quantised model, and how far they are from those in the original.
pub(super) struct Seen {
    pub(super) hessian: Hessian,
    pub(super) drift: Drift,
}

impl Seen {
    pub(super) fn new(cols: usize) -> Self {
        Self { hessian: Hessian::new(cols), drift: Drift::new(cols) }
    }

    /// Adds what the linear was given in a step, and in the same step of the original. An expert's inputs count as much as its output does in
    /// the sum of a token's experts; a token that only one of the two models sends to the expert tells nothing of the drift.
    pub(super) fn add(&mut self, mut originals: Inputs, mut inputs: Inputs) {
        if !inputs.routes.is_empty() || !originals.routes.is_empty() {
            let cols = self.hessian.cols();
            let mut aligned = inputs.rows.clone();
            for (row, (token, _)) in inputs.routes.iter().enumerate() {
                if let Ok(original) = originals.routes.binary_search_by_key(token, |(token, _)| *token) {
                    aligned[row * cols..][..cols].copy_from_slice(&originals.rows[original * cols..][..cols]);
                }
            }
            for rows in [&mut aligned, &mut inputs.rows] {
                weigh(rows, cols, &inputs.routes);
            }
            originals.rows = aligned;
        }
        self.hessian.add(&inputs.rows);
        self.drift.add(&originals.rows, &inputs.rows);
    }
}
