//! Linears whose packed weights are multiplied as they lie in memory.
//!
//! At load, [`Tiles`] puts weights into an order in which a kernel streams them: vector lanes are output rows, so there are no
//! sums across lanes, and K is walked from start to end for each output. Work is split over panels of rows only. Every
//! output is therefore bitwise the same whatever the batch and the number of threads.

mod activations;
mod bytes;
mod codes;
mod keep;
mod kernel;
mod pattern;
#[cfg(test)]
mod tests;
mod tiles;

use std::ops::Range;
use std::sync::Arc;

use marlin_format::{Element, FormatError, Scheme, Sparsity};

use self::activations::{Forms, Inputs};
use self::codes::{Bf16, Codes, E2M1, E4M3, F16, F32, Floats, Int2, Int3, Int4, Int8, Iq4Nl};
use self::kernel::{ExactDot, FloatDot, IntegerDot, Kernel, PanelKernel};
use self::pattern::{Dense, Pattern, TwoOfFour};
use self::tiles::Tiles;
use super::disjoint::Disjoint;
use super::simd::{MOST_LANES, Simd, SimdLevel, WithSimd};
use super::threads::Threads;
use super::tile_file::TileFile;
use super::vector::{gelu_tanh, silu};
use crate::backend::check_parts;
use crate::{Activation, KernelError, LinearPart};

pub(crate) use self::activations::Activations;
pub(crate) use self::bytes::TileBytes;
pub(crate) use self::keep::layout;

/// What activations are multiplied as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Arithmetic {
    /// As they are, in f32.
    Exact,
    /// Quantised to int8 with one scale per 32 values, where weights are integers in groups; weights that are floats of 8 or more
    /// bits are multiplied in f32.
    #[default]
    Int8,
}

/// What becomes of the sums of a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// `out = x · Wᵀ + bias`.
    Store,
    /// `out += x · Wᵀ + bias`.
    Add,
    /// The linear has two parts of equal N, gate and up: `out = activation(gate) ⊙ up`, width N.
    Gated(Activation),
}

/// One or several matrices with a common input, in tile order.
#[derive(Debug)]
pub(crate) struct TiledLinear {
    parts: Vec<Part>,
    part_rows: Vec<usize>,
    cols: usize,
    forms: Forms,
    simd: SimdLevel,
    /// Where tiles are kept. It is written before the last of its linears is gone.
    _file: Option<Arc<TileFile>>,
}

#[derive(Debug)]
struct Part {
    tiles: Tiles,
    kernel: Box<dyn PanelKernel>,
    /// Padded to whole panels with zeros.
    bias: Vec<f32>,
    /// No kernel reads the matrix as it was; tiles are of its weights in f32.
    converted: bool,
    /// Its first column in the output.
    first: usize,
}

/// Input rows that pass over all panels of a task before the next ones do: few enough to stay in the second-level cache.
const ROW_BLOCK: usize = 64;
/// More tasks than threads, so that a thread that is held up does not hold up all.
const TASKS_PER_THREAD: usize = 8;
/// The same for one row of input, which waits for memory: long stretches of it are read faster than short ones.
const STRETCHES_PER_THREAD: usize = 2;

impl TiledLinear {
    /// Puts matrices of equal K into tile order. What has no kernel is converted to f32, exactly.
    pub(crate) fn load(
        parts: &[LinearPart<'_>],
        arithmetic: Arithmetic,
        simd: SimdLevel,
        threads: &Threads,
    ) -> Result<Self, KernelError> {
        let cols = check_parts(parts)?;
        let mut linear = Self::empty(cols, simd);
        for part in parts {
            linear.push(Part::load(part, arithmetic, simd, threads)?);
        }
        Ok(linear)
    }

    /// No part yet.
    fn empty(cols: usize, simd: SimdLevel) -> Self {
        Self { parts: Vec::new(), part_rows: Vec::new(), cols, forms: Forms::default(), simd, _file: None }
    }

    /// Adds a part after the others.
    fn push(&mut self, part: Part) {
        let forms = part.kernel.forms();
        self.forms.blocks |= forms.blocks;
        self.forms.floats |= forms.floats;
        self.parts.push(Part { first: self.rows(), ..part });
        self.part_rows.push(self.parts[self.parts.len() - 1].tiles.rows);
    }

    /// Output features of all parts.
    pub(crate) fn rows(&self) -> usize {
        self.part_rows.iter().sum()
    }

    /// Input features, K.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Output features of each part.
    pub(crate) fn part_rows(&self) -> &[usize] {
        &self.part_rows
    }

    /// Memory held.
    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.tiles.bytes() + size_of_val(part.bias.as_slice())).sum()
    }

    /// The weights of one row (of all parts, counted one after the other), `[K]`; no bias.
    pub(crate) fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows() && out.len() == self.cols, "row {row} of {}, {} values", self.rows(), out.len());
        let part = self.parts.iter().rfind(|part| part.first <= row).expect("the first part begins at 0");
        let row = row - part.first;
        let lanes = part.kernel.lanes();
        part.kernel.decode_row(&part.tiles, row / lanes, row % lanes, out);
    }

    /// Multiplies `x`, `[m, K]`. `out` is `[m, N]`, or `[m, N / 2]` under [`Epilogue::Gated`].
    pub(crate) fn apply(
        &self,
        x: &[f32],
        m: usize,
        out: &mut [f32],
        epilogue: Epilogue,
        scratch: &mut Activations,
        threads: &Threads,
    ) {
        let (width, panels) = match epilogue {
            Epilogue::Store | Epilogue::Add => (self.rows(), self.parts.iter().map(|part| part.tiles.panels()).sum()),
            Epilogue::Gated(_) => {
                assert!(self.part_rows.len() == 2 && self.part_rows[0] == self.part_rows[1], "two parts of equal N");
                (self.part_rows[0], self.parts[0].tiles.panels())
            }
        };
        assert!(x.len() == m * self.cols && out.len() == m * width, "[{m}, {}] to [{m}, {width}]", self.cols);
        if m == 0 {
            return;
        }
        let output =
            Output { x: scratch.prepare(x, self.cols, self.forms, self.simd, threads), out: Disjoint::new(out), width };
        let tasks = panels.min(threads.count() * if m == 1 { STRETCHES_PER_THREAD } else { TASKS_PER_THREAD });
        threads.run(tasks, &|task| {
            let panels = panels * task / tasks..panels * (task + 1) / tasks;
            // One row's kernel takes less time than to clear memory for the sums of many.
            if m == 1 {
                self.apply_panels(panels, m, &output, epilogue, &mut [[0.0; MOST_LANES]; 2]);
            } else {
                self.apply_panels(panels, m, &output, epilogue, &mut [[0.0; ROW_BLOCK * MOST_LANES]; 2]);
            }
        });
    }

    /// Multiplies all rows of the input with some panels. `sums` has room for those of a panel, and of another that it is gated with.
    fn apply_panels<const SUMS: usize>(
        &self,
        panels: Range<usize>,
        m: usize,
        output: &Output<'_>,
        epilogue: Epilogue,
        sums: &mut [[f32; SUMS]; 2],
    ) {
        for first_row in (0..m).step_by(ROW_BLOCK) {
            for panel in panels.clone() {
                self.apply_panel(panel, first_row..m.min(first_row + ROW_BLOCK), output, epilogue, sums);
            }
        }
    }

    fn apply_panel<const SUMS: usize>(
        &self,
        panel: usize,
        rows: Range<usize>,
        output: &Output<'_>,
        epilogue: Epilogue,
        [sums, up]: &mut [[f32; SUMS]; 2],
    ) {
        let (part, panel) = self.locate(panel);
        let sums = &mut sums[..rows.len() * part.kernel.lanes()];
        part.sums(panel, rows.start, output.x, sums);
        match epilogue {
            Epilogue::Store => output.write(part, panel, rows, sums, |out, sum| *out = sum),
            Epilogue::Add => output.write(part, panel, rows, sums, |out, sum| *out += sum),
            Epilogue::Gated(activation) => {
                let up = &mut up[..sums.len()];
                self.parts[1].sums(panel, rows.start, output.x, up);
                let gate = Gate { activation, gate: sums, up };
                self.simd.dispatch(gate).expect("the level was checked when the linear was loaded");
                output.write(part, panel, rows, sums, |out, value| *out = value);
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

impl Part {
    fn load(
        part: &LinearPart<'_>,
        arithmetic: Arithmetic,
        simd: SimdLevel,
        threads: &Threads,
    ) -> Result<Self, KernelError> {
        let weight = &part.weight;
        let dense = if tiles::is_native(weight) { None } else { Some(tiles::to_dense(weight, threads)?) };
        let (weight, converted) = (dense.as_ref().unwrap_or(weight), dense.is_some());
        let kernel = simd.dispatch(ChooseKernel { scheme: &weight.scheme, arithmetic })?;
        let tiles = Tiles::pack(weight, kernel.as_ref(), threads)?;
        Ok(Self::new(tiles, kernel, part.bias.as_deref(), converted))
    }

    /// A part that will be the first.
    fn new(tiles: Tiles, kernel: Box<dyn PanelKernel>, bias: Option<&[f32]>, converted: bool) -> Self {
        let mut bias = bias.map_or_else(Vec::new, <[f32]>::to_vec);
        bias.resize(bias.len().next_multiple_of(kernel.lanes()), 0.0);
        Self { tiles, kernel, bias, converted, first: 0 }
    }

    /// `x · Wᵀ + bias` of one panel.
    fn sums(&self, panel: usize, first_row: usize, x: Inputs<'_>, sums: &mut [f32]) {
        self.kernel.run(&self.tiles, panel, x, first_row, sums);
        let lanes = self.kernel.lanes();
        if let Some(bias) = self.bias.chunks_exact(lanes).nth(panel) {
            for sums in sums.chunks_exact_mut(lanes) {
                sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
            }
        }
    }
}

/// What [`TiledLinear::bytes`] will be for a matrix without a bias. Presumes that FP8 codes are numbers: a matrix with a NaN would be
/// converted to f32.
pub(crate) fn bytes(
    scheme: &Scheme,
    rows: usize,
    cols: usize,
    arithmetic: Arithmetic,
    simd: SimdLevel,
) -> Result<usize, KernelError> {
    scheme.packed_bytes(rows, cols)?;
    let scheme = if tiles::is_native_scheme(scheme, cols) { scheme } else { &Scheme::F32 };
    let kernel = simd.dispatch(ChooseKernel { scheme, arithmetic })?;
    Ok(tiles::tile_bytes(scheme, rows, cols, kernel.as_ref()).ok_or(FormatError::TooLarge { rows, cols })?)
}

/// What the tasks of one multiplication share.
struct Output<'a> {
    x: Inputs<'a>,
    out: Disjoint<'a, f32>,
    width: usize,
}

impl Output<'_> {
    /// Writes the outputs of one panel: a column a lane, or fewer at the end of a part.
    fn write(&self, part: &Part, panel: usize, rows: Range<usize>, values: &[f32], write: impl Fn(&mut f32, f32)) {
        let lanes = part.kernel.lanes();
        let columns = lanes.min(part.tiles.rows - panel * lanes);
        let column = part.first + panel * lanes;
        for (row, values) in rows.zip(values.chunks_exact(lanes)) {
            // SAFETY: a panel belongs to one task, and its columns to no other panel.
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
        }
    }
}

/// Finds the kernel for a scheme.
struct ChooseKernel<'a> {
    scheme: &'a Scheme,
    arithmetic: Arithmetic,
}

impl WithSimd for ChooseKernel<'_> {
    type Output = Box<dyn PanelKernel>;

    fn with_simd<S: Simd>(self, simd: S) -> Box<dyn PanelKernel> {
        match self.scheme.sparsity {
            Sparsity::Dense => self.with_pattern::<S, Dense>(simd),
            Sparsity::TwoOfFour => self.with_pattern::<S, TwoOfFour>(simd),
        }
    }
}

impl ChooseKernel<'_> {
    fn with_pattern<S: Simd, P: Pattern>(self, simd: S) -> Box<dyn PanelKernel> {
        match self.scheme.element {
            Element::E2M1 => self.integer::<S, E2M1, P>(simd),
            Element::Iq4Nl => self.integer::<S, Iq4Nl, P>(simd),
            Element::Uint(2) | Element::Int(2) => self.integer::<S, Int2, P>(simd),
            Element::Uint(3) | Element::Int(3) => self.integer::<S, Int3, P>(simd),
            Element::Uint(4) | Element::Int(4) => self.integer::<S, Int4, P>(simd),
            Element::Uint(_) | Element::Int(_) => self.integer::<S, Int8, P>(simd),
            Element::E4M3 => float::<S, E4M3, P>(simd),
            Element::F16 => float::<S, F16, P>(simd),
            Element::Bf16 => float::<S, Bf16, P>(simd),
            Element::F32 => float::<S, F32, P>(simd),
        }
    }

    fn integer<S: Simd, C: Codes, P: Pattern>(self, simd: S) -> Box<dyn PanelKernel> {
        match self.arithmetic {
            Arithmetic::Exact => Box::new(Kernel::<S, ExactDot<C, P>>::new(simd)),
            Arithmetic::Int8 => Box::new(Kernel::<S, IntegerDot<C, P>>::new(simd)),
        }
    }
}

fn float<S: Simd, F: Floats, P: Pattern>(simd: S) -> Box<dyn PanelKernel> {
    Box::new(Kernel::<S, FloatDot<F, P>>::new(simd))
}
