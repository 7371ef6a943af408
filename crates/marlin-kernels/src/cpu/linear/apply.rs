//! Multiplying: panels of rows are divided among threads, and what becomes of their sums.

use std::ops::Range;

use super::activations::Inputs;
use super::{Activations, Part, TiledLinear};
use crate::Activation;
use crate::cpu::disjoint::Disjoint;
use crate::cpu::simd::{MOST_LANES, Simd, WithSimd};
use crate::cpu::threads::Threads;
use crate::cpu::vector::{clamped_swiglu, gelu_tanh, silu};

/// What becomes of the sums of a linear.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Epilogue<'a> {
    /// `out = x · Wᵀ + bias`.
    Store,
    /// `out += x · Wᵀ + bias`.
    Add,
    /// The linear has two parts of equal N, gate and up: `out = activation(gate) ⊙ up`, width N.
    Gated(Activation),
    /// `out[token of the row] += weight of the row · (x · Wᵀ + bias)`.
    Combine {
        /// A token for each input row.
        tokens: &'a [u32],
        /// A weight for each input row.
        weights: &'a [f32],
    },
}

/// Input rows that pass over all panels of a task before the next ones do: few enough to stay in the second-level cache.
const ROW_BLOCK: usize = 64;
/// More tasks than threads, so that a thread that is held up does not hold up all.
const TASKS_PER_THREAD: usize = 8;
/// The same for one row of input, which waits for memory: long stretches of it are read faster than short ones.
const STRETCHES_PER_THREAD: usize = 2;

/// Room for the sums of a panel, and of another that it is gated with.
type Sums<'a> = [&'a mut [f32]; 2];

/// Divides panels that so many rows pass over into tasks, and runs them: each gets its number, how many there are, and memory.
pub(super) fn run_tasks(threads: &Threads, rows: usize, panels: usize, task: impl Fn(usize, usize, Sums<'_>) + Sync) {
    let tasks = panels.min(threads.count() * if rows == 1 { STRETCHES_PER_THREAD } else { TASKS_PER_THREAD });
    threads.run(tasks, &|i| {
        // One row's kernel takes less time than to clear memory for the sums of many.
        if rows == 1 {
            let [sums, up] = &mut [[0.0; MOST_LANES]; 2];
            task(i, tasks, [sums, up]);
        } else {
            let [sums, up] = &mut [[0.0; ROW_BLOCK * MOST_LANES]; 2];
            task(i, tasks, [sums, up]);
        }
    });
}

impl TiledLinear {
    /// Multiplies `x`, `[m, K]`. `out` is `[m, N]`, or `[m, N / 2]` under [`Epilogue::Gated`].
    pub(crate) fn apply(
        &self,
        x: &[f32],
        m: usize,
        out: &mut [f32],
        epilogue: Epilogue<'_>,
        scratch: &mut Activations,
        threads: &Threads,
    ) {
        let (width, panels) = (self.output_width(epilogue), self.output_panels(epilogue));
        assert!(x.len() == m * self.cols && out.len() == m * width, "[{m}, {}] to [{m}, {width}]", self.cols);
        if m == 0 {
            return;
        }
        let x = scratch.prepare(x, self.columns(), self.forms, self.simd, threads);
        let output = Output { x, epilogue, out: &Disjoint::new(out), start: 0, width };
        run_tasks(threads, m, panels, |task, tasks, mut sums| {
            self.apply_panels(panels * task / tasks..panels * (task + 1) / tasks, 0..m, &output, &mut sums);
        });
    }

    /// Values of an output row.
    pub(super) fn output_width(&self, epilogue: Epilogue<'_>) -> usize {
        match epilogue {
            Epilogue::Gated(_) => {
                assert!(self.part_rows.len() == 2 && self.part_rows[0] == self.part_rows[1], "two parts of equal N");
                self.part_rows[0]
            }
            _ => self.rows(),
        }
    }

    /// Panels that an output row is made of.
    pub(super) fn output_panels(&self, epilogue: Epilogue<'_>) -> usize {
        match epilogue {
            Epilogue::Gated(_) => self.parts[0].tiles.panels(),
            _ => self.parts.iter().map(|part| part.tiles.panels()).sum(),
        }
    }

    /// Multiplies rows of the input with some panels.
    pub(super) fn apply_panels(
        &self,
        panels: Range<usize>,
        rows: Range<usize>,
        output: &Output<'_>,
        sums: &mut Sums<'_>,
    ) {
        for first_row in rows.clone().step_by(ROW_BLOCK) {
            for panel in panels.clone() {
                self.apply_panel(panel, first_row..rows.end.min(first_row + ROW_BLOCK), output, sums);
            }
        }
    }

    fn apply_panel(&self, panel: usize, rows: Range<usize>, output: &Output<'_>, [sums, up]: &mut Sums<'_>) {
        let (part, panel) = self.locate(panel);
        let lanes = part.kernel.lanes();
        let sums = &mut sums[..rows.len() * lanes];
        part.sums(panel, rows.start, output.x, sums);
        match output.epilogue {
            Epilogue::Store => output.write(part, panel, rows, sums, |out, sum| *out = sum),
            Epilogue::Add => output.write(part, panel, rows, sums, |out, sum| *out += sum),
            Epilogue::Gated(activation) => {
                let up = &mut up[..sums.len()];
                self.parts[1].sums(panel, rows.start, output.x, up);
                let gate = Gate { activation, gate: sums, up };
                self.simd.dispatch(gate).expect("the level was checked when the linear was loaded");
                output.write(part, panel, rows, sums, |out, value| *out = value);
            }
            Epilogue::Combine { tokens, weights } => {
                for (sums, weight) in sums.chunks_exact_mut(lanes).zip(&weights[rows.clone()]) {
                    sums.iter_mut().for_each(|sum| *sum *= weight);
                }
                let tokens = tokens[rows].iter().map(|&token| token as usize);
                output.write(part, panel, tokens, sums, |out, sum| *out += sum);
            }
        }
    }

    /// The part that a panel (counted over all parts) belongs to, and its number there.
    fn locate(&self, mut panel: usize) -> (&Part, usize) {
        for part in &self.parts {
            if panel < part.tiles.panels() {
                return (part, panel);
            }
            panel -= part.tiles.panels();
        }
        unreachable!("panels are counted over all parts")
    }
}

/// What the tasks of one multiplication share.
pub(super) struct Output<'a> {
    pub(super) x: Inputs<'a>,
    pub(super) epilogue: Epilogue<'a>,
    pub(super) out: &'a Disjoint<'a, f32>,
    /// Where the first row begins.
    pub(super) start: usize,
    /// From where a row begins to where the next one does.
    pub(super) width: usize,
}

impl Output<'_> {
    /// Writes the outputs of one panel into rows: a column a lane, or fewer at the end of a part.
    #[inline(always)]
    fn write(
        &self,
        part: &Part,
        panel: usize,
        rows: impl Iterator<Item = usize>,
        values: &[f32],
        write: impl Fn(&mut f32, f32),
    ) {
        let lanes = part.kernel.lanes();
        let columns = part.tiles.panel_rows(panel);
        let column = self.start + part.first + panel * lanes;
        for (row, values) in rows.zip(values.chunks_exact(lanes)) {
            // SAFETY: of rows that several linears write, a panel belongs to one task; its columns belong to no other panel.
            let out = unsafe { self.out.slice(row * self.width + column, columns) };
            out.iter_mut().zip(values).for_each(|(out, &value)| write(out, value));
        }
    }
}

/// `gate = activation(gate) ⊙ up`
struct Gate<'a> {
    activation: Activation,
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl WithSimd for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let pairs = self.gate.iter_mut().zip(self.up);
        match self.activation {
            Activation::Silu => {
                for (gate, up) in pairs {
                    *gate = silu(*gate) * up;
                }
            }
            Activation::GeluTanh => {
                for (gate, up) in pairs {
                    *gate = gelu_tanh(*gate) * up;
                }
            }
            Activation::ClampedSwiglu => {
                for (gate, up) in pairs {
                    *gate = clamped_swiglu(*gate, *up);
                }
            }
        }
    }
}
