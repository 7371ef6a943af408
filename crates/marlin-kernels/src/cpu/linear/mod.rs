//! Linears whose packed weights are multiplied as they lie in memory.
//!
//! At load, [`Tiles`] puts weights into an order in which a kernel streams them: vector lanes are output rows, so there are no
//! sums across lanes, and K is walked from start to end for each output. Work is split over panels of rows only. Every
//! output is therefore bitwise the same whatever the batch and the number of threads.

mod activations;
mod apply;
mod bytes;
mod codes;
mod dot;
mod group;
mod groups;
mod keep;
mod kernel;
mod pattern;
mod super_groups;
#[cfg(test)]
mod tests;
mod tiles;

use std::sync::Arc;

use marlin_format::{Element, FormatError, PackedMatrix, Scheme, Sparsity};

use self::activations::{Columns, Forms, Inputs};
use self::codes::{Bf16, Codes, E2M1, E4M3, F16, F32, Floats, Int2, Int3, Int4, Int5, Int6, Int8, Iq4Nl};
use self::dot::{ExactDot, FloatDot, IntegerDot};
use self::kernel::{Kernel, PanelKernel};
use self::pattern::{Dense, Pattern, TwoOfFour};
use self::tiles::Tiles;
use super::simd::{Simd, SimdLevel, WithSimd};
use super::threads::Threads;
use super::tile_file::TileFile;
use crate::backend::check_parts;
use crate::{KernelError, LinearPart};

pub(crate) use self::activations::Activations;
pub(crate) use self::apply::Epilogue;
pub(crate) use self::bytes::TileBytes;
pub(crate) use self::group::LinearGroup;
pub(crate) use self::keep::layout;
pub(crate) use self::tiles::SECTIONS;

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

/// One or several matrices with a common input, in tile order. Columns of all of them are in one order, which need not be theirs.
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

impl TiledLinear {
    /// Puts matrices of equal K into tile order. What has no kernel is converted to f32, exactly.
    pub(crate) fn load(
        parts: &[LinearPart<'_>],
        arithmetic: Arithmetic,
        simd: SimdLevel,
        threads: &Threads,
    ) -> Result<Self, KernelError> {
        let cols = check_parts(parts)?;
        let native =
            parts.iter().map(|part| &part.weight).filter(|weight| tiles::is_native_scheme(&weight.scheme, cols));
        let columns = native.filter_map(PackedMatrix::group_order).next().unwrap_or_default();
        let mut linear = Self::empty(cols, simd);
        for part in parts {
            linear.push(Part::load(part, &columns, arithmetic, simd, threads)?);
        }
        Ok(linear)
    }

    /// No part yet.
    fn empty(cols: usize, simd: SimdLevel) -> Self {
        Self { parts: Vec::new(), part_rows: Vec::new(), cols, forms: Forms::default(), simd, _file: None }
    }

    /// Adds a part after the others.
    fn push(&mut self, part: Part) {
        self.forms = self.forms.or(part.kernel.forms());
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

    /// The columns of its input.
    fn columns(&self) -> Columns<'_> {
        Columns { count: self.cols, order: self.parts.first().map_or(&[], |part| part.tiles.columns()) }
    }

    /// Memory held.
    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.tiles.bytes() + size_of_val(part.bias.as_slice())).sum()
    }

    /// Its parts in canonical order, as they were loaded; in f32 what was converted.
    pub(crate) fn restore(&self, threads: &Threads) -> Result<Vec<LinearPart<'static>>, KernelError> {
        self.parts.iter().map(|part| part.restore(threads)).collect()
    }

    /// The weights of one row (of all parts, counted one after the other), `[K]`; no bias.
    pub(crate) fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows() && out.len() == self.cols, "row {row} of {}, {} values", self.rows(), out.len());
        let part = self.parts.iter().rfind(|part| part.first <= row).expect("the first part begins at 0");
        let row = row - part.first;
        let lanes = part.kernel.lanes();
        part.kernel.decode_row(&part.tiles, row / lanes, row % lanes, out);
        let columns = part.tiles.columns();
        if !columns.is_empty() {
            // No embedding is known to come in another order, so that this need not be fast.
            let in_order = out.to_vec();
            columns.iter().zip(in_order).for_each(|(&column, value)| out[column as usize] = value);
        }
    }
}

impl Part {
    fn load(
        part: &LinearPart<'_>,
        columns: &[u32],
        arithmetic: Arithmetic,
        simd: SimdLevel,
        threads: &Threads,
    ) -> Result<Self, KernelError> {
        let weight = &part.weight;
        let dense = if tiles::is_native(weight, columns) { None } else { Some(tiles::to_dense(weight, threads)?) };
        let (weight, converted) = (dense.as_ref().unwrap_or(weight), dense.is_some());
        let kernel = simd.dispatch(ChooseKernel { scheme: &weight.scheme, arithmetic })?;
        let tiles = Tiles::pack(weight, columns, kernel.as_ref(), threads)?;
        Ok(Self::new(tiles, kernel, part.bias.as_deref(), converted))
    }

    /// A part that will be the first.
    fn new(tiles: Tiles, kernel: Box<dyn PanelKernel>, bias: Option<&[f32]>, converted: bool) -> Self {
        let mut bias = bias.map_or_else(Vec::new, <[f32]>::to_vec);
        bias.resize(bias.len().next_multiple_of(kernel.lanes()), 0.0);
        Self { tiles, kernel, bias, converted, first: 0 }
    }

    fn restore(&self, threads: &Threads) -> Result<LinearPart<'static>, KernelError> {
        let bias = (!self.bias.is_empty()).then(|| self.bias[..self.tiles.rows].to_vec());
        Ok(LinearPart { weight: self.tiles.restore(self.kernel.as_ref(), threads)?, bias })
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

/// What [`TiledLinear::bytes`] will be for a matrix without a bias. Presumes that FP8 codes are numbers and that groups of an
/// index have their usual size: other matrices would be converted to f32.
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

/// What a packed matrix becomes if no kernel reads its scheme.
pub(crate) fn conversion(scheme: &Scheme, cols: usize) -> Option<Scheme> {
    (!tiles::is_native_scheme(scheme, cols)).then_some(Scheme::F32)
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
            Element::Uint(5) | Element::Int(5) => self.integer::<S, Int5, P>(simd),
            Element::Uint(6) | Element::Int(6) => self.integer::<S, Int6, P>(simd),
            Element::Uint(_) | Element::Int(_) => self.integer::<S, Int8, P>(simd),
            Element::E4M3 => float::<S, E4M3, P>(simd),
            Element::F16 => float::<S, F16, P>(simd),
            Element::Bf16 => float::<S, Bf16, P>(simd),
            Element::F32 => float::<S, F32, P>(simd),
        }
    }

    fn integer<S: Simd, C: Codes, P: Pattern>(self, simd: S) -> Box<dyn PanelKernel> {
        match self.arithmetic {
            Arithmetic::Exact => Box::new(Kernel::<S::Base, ExactDot<C, P>>::new(simd.base())),
            Arithmetic::Int8 => Box::new(Kernel::<S, IntegerDot<C, P>>::new(simd)),
        }
    }
}

fn float<S: Simd, F: Floats, P: Pattern>(simd: S) -> Box<dyn PanelKernel> {
    Box::new(Kernel::<S::Base, FloatDot<F, P>>::new(simd.base()))
}
