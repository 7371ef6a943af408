//! Groups of linears of equal shape, among which rows are divided: the experts of a layer, the heads of a projection.

use super::activations::{Forms, Inputs};
use super::apply::{Epilogue, Output, run_tasks};
use super::codes::CHUNK;
use super::{Activations, TiledLinear};
use crate::cpu::disjoint::Disjoint;
use crate::cpu::experts::Sorted;
use crate::cpu::threads::Threads;
use crate::{Activation, KernelError};

/// Linears of equal shape; their schemes may differ.
#[derive(Debug)]
pub(crate) struct LinearGroup {
    linears: Vec<TiledLinear>,
    /// What any of them reads.
    forms: Forms,
}

impl LinearGroup {
    pub(crate) fn new(linears: Vec<TiledLinear>) -> Result<Self, KernelError> {
        let Some(first) = linears.first() else {
            return Err(KernelError::Device("a group needs at least one linear, found none".into()));
        };
        let shape = |linear: &TiledLinear| format!("parts of {:?} rows, {} columns", linear.part_rows, linear.cols);
        for (index, linear) in linears.iter().enumerate() {
            if (&linear.part_rows, linear.cols) != (&first.part_rows, first.cols) {
                let (wanted, found) = (shape(first), shape(linear));
                let problem =
                    format!("a group needs linears of one shape: linear 0 has {wanted}; linear {index}: {found}");
                return Err(KernelError::Device(problem));
            }
        }
        if linears.iter().any(|linear| !linear.columns().order.is_empty()) {
            return Err(KernelError::OrderedGroup);
        }
        let forms = linears.iter().fold(Forms::default(), |forms, linear| forms.or(linear.forms));
        Ok(Self { linears, forms })
    }

    /// All of them.
    pub(crate) fn linears(&self) -> &[TiledLinear] {
        &self.linears
    }

    /// Number of linears.
    pub(crate) fn len(&self) -> usize {
        self.linears.len()
    }

    /// Input features of each, K.
    pub(crate) fn cols(&self) -> usize {
        self.linears[0].cols
    }

    /// Output features of each part of one.
    pub(crate) fn part_rows(&self) -> &[usize] {
        &self.linears[0].part_rows
    }

    /// Multiplies each row of `x`, `[T, K]`, by its experts. `out` is `[pairs, N / 2]`, sorted.
    pub(crate) fn gated(
        &self,
        x: &[f32],
        sorted: &Sorted,
        activation: Activation,
        out: &mut [f32],
        scratch: &mut Activations,
        threads: &Threads,
    ) {
        let (first, epilogue) = (&self.linears[0], Epilogue::Gated(activation));
        let (width, panels) = (first.output_width(epilogue), first.output_panels(epilogue));
        let x = scratch.prepare(x, first.columns(), self.forms, first.simd, threads);
        let x = Inputs { order: Some(sorted.tokens()), ..x };
        let output = Output { x, epilogue, out: &Disjoint::new(out), start: 0, width };
        // Work is cut across experts: one token with a few of them keeps all threads busy, and so do many with all.
        run_tasks(threads, sorted.token_count(), panels * sorted.busy().len(), |task, tasks, mut sums| {
            for (expert, panels) in sorted.share(panels, task, tasks) {
                self.linears[expert].apply_panels(panels, sorted.of(expert), &output, &mut sums);
            }
        });
    }

    /// Adds the weighted products of sorted rows `x`, `[pairs, K]`, to `out`, `[T, N]`.
    pub(crate) fn combine(
        &self,
        x: &[f32],
        sorted: &Sorted,
        out: &mut [f32],
        scratch: &mut Activations,
        threads: &Threads,
    ) {
        let first = &self.linears[0];
        let epilogue = Epilogue::Combine { tokens: sorted.tokens(), weights: sorted.weights() };
        let (width, panels) = (first.output_width(epilogue), first.output_panels(epilogue));
        let x = scratch.prepare(x, first.columns(), self.forms, first.simd, threads);
        let output = Output { x, epilogue, out: &Disjoint::new(out), start: 0, width };
        // A task owns columns of all tokens, and adds experts in their order: sums depend on neither batch nor threads.
        run_tasks(threads, sorted.token_count(), panels, |task, tasks, mut sums| {
            let panels = panels * task / tasks..panels * (task + 1) / tasks;
            for expert in sorted.busy() {
                self.linears[expert].apply_panels(panels.clone(), sorted.of(expert), &output, &mut sums);
            }
        });
    }

    /// Multiplies each stretch of the `m` rows of `x` by its linear, into the stretches of `out`.
    pub(crate) fn stretches(&self, x: &[f32], m: usize, out: &mut [f32], scratch: &mut Activations, threads: &Threads) {
        if m == 0 {
            return;
        }
        let (heads, first) = (self.linears.len(), &self.linears[0]);
        let (x_width, out_width) = (x.len() / m, out.len() / m);
        let (from, to) = (x_width / heads, out_width / heads);
        let (cols, width, panels) = (first.cols, first.rows(), first.output_panels(Epilogue::Store));
        assert!(cols <= from && width <= to, "stretches of {from} and {to} for a linear [{width}, {cols}]");
        let out = Disjoint::new(out);
        let at_once = (scratch.room(cols) / m).clamp(1, heads);
        for some in (0..heads).step_by(at_once) {
            let count = at_once.min(heads - some);
            let stretch = |row| &x[row % m * x_width + (some + row / m) * from..][..cols];
            let x = scratch.gather(count * m, first.columns(), stretch, self.forms, first.simd, threads);
            run_tasks(threads, m, count * panels, |task, tasks, mut sums| {
                let (mut start, end) = (count * panels * task / tasks, count * panels * (task + 1) / tasks);
                while start < end {
                    let (head, panel) = (start / panels, start % panels);
                    let share = panel..panels.min(panel + end - start);
                    start += share.len();
                    let x = x.after(head * m, cols.div_ceil(CHUNK));
                    let start = (some + head) * to;
                    let output = Output { x, epilogue: Epilogue::Store, out: &out, start, width: out_width };
                    self.linears[some + head].apply_panels(share, 0..m, &output, &mut sums);
                }
            });
        }
    }
}
