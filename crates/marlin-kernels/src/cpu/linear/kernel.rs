//! The micro-kernels: sums over K of one panel for a few rows of the input.
//!
//! Each output is summed in one fixed order, whatever the number of input rows, so it does not depend on the batch.

use std::fmt;
use std::marker::PhantomData;

use super::activations::{Forms, Inputs};
use super::codes::CHUNK;
use super::dot::{Dot, Index, quads, restore_rows};
use super::groups::{GroupSpan, ScaleType, ZeroType};
use super::pattern::{FIRST_HALF, Pattern, SECOND_HALF, WHOLE};
use super::super_groups::super_group_sums;
use super::tiles::{PanelCodes, Tiles};
use crate::cpu::simd::{CACHE_LINE, MOST_LANES, Simd, WithSimd};

/// Bytes of a chunk of a panel: its codes, and where they stand.
#[inline(always)]
fn chunk_of<S: Simd, D: Dot>(panel: &[u8], chunk: usize) -> (&[u8], &[u8]) {
    let bytes = D::ROW_BYTES * S::LANES;
    panel[chunk * bytes..][..bytes].split_at(D::WEIGHT_ROW_BYTES * S::LANES)
}

/// A chunk of a panel, for so many rows of input.
#[inline(always)]
pub(super) fn decode_chunk<S: Simd, D: Dot, const ROWS: usize>(
    simd: S,
    panel: &[u8],
    chunk: usize,
) -> (D::Weights<'_, S>, Index<D, S>) {
    let (codes, index) = chunk_of::<S, D>(panel, chunk);
    prefetch::<S, ROWS>(simd, codes, AHEAD);
    prefetch::<S, ROWS>(simd, index, AHEAD);
    (D::decode(simd, codes), D::Pattern::load_index(simd, index))
}

/// How far ahead of what it multiplies a kernel of one or two rows asks for weights: what memory brings while a few chunks are multiplied.
const AHEAD: usize = 2048;
/// The same for scales and minima of two levels, of which a chunk has fewer bytes.
pub(super) const INNER_AHEAD: usize = AHEAD / 4;

/// Asks for what comes so far behind these bytes, in this panel or the next, for so many rows of input.
#[inline(always)]
pub(super) fn prefetch<S: Simd, const ROWS: usize>(simd: S, bytes: &[u8], ahead: usize) {
    // One or two rows wait for memory, more are multiplied for longer than the next weights take to come.
    if ROWS <= 2 {
        for line in bytes.chunks(CACHE_LINE) {
            simd.prefetch(line, ahead);
        }
    }
}

/// A kernel for one format, arithmetic and instruction set.
pub(super) trait PanelKernel: fmt::Debug + Send + Sync {
    /// Rows of a panel.
    fn lanes(&self) -> usize;
    /// Bytes of a chunk in tile order.
    fn chunk_bytes(&self) -> usize;
    /// Bytes of one code in what [`PanelKernel::pack`] reads.
    fn code_bytes(&self) -> usize;
    /// Puts a panel into tile order.
    fn pack(&self, panel: &PanelCodes, tiles: &mut [u8]);
    /// Takes the codes of a panel back out of tile order, into [`PanelCodes::codes`].
    fn restore_codes(&self, tiles: &[u8], codes: &mut [u8]);
    /// The same of where they stand under 2:4, into [`PanelCodes::positions`].
    fn restore_positions(&self, tiles: &[u8], positions: &mut [u8]);
    /// The forms of input that it reads.
    fn forms(&self) -> Forms;
    /// `sums[i] = x[first_row + i] · W(panel)ᵀ`, rows counted in the order that they are multiplied in; `sums` is `[rows, lanes]`.
    fn run(&self, tiles: &Tiles, panel: usize, x: Inputs<'_>, first_row: usize, sums: &mut [f32]);
    /// The weights of one row of a panel.
    fn decode_row(&self, tiles: &Tiles, panel: usize, lane: usize, weights: &mut [f32]);
}

/// [`Dot`] `D` with instruction set `S`.
pub(super) struct Kernel<S, D> {
    simd: S,
    dot: PhantomData<D>,
}

impl<S, D> Kernel<S, D> {
    pub(super) fn new(simd: S) -> Self {
        Self { simd, dot: PhantomData }
    }
}

impl<S, D> fmt::Debug for Kernel<S, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::any::type_name::<Self>())
    }
}

impl<S: Simd, D: Dot> PanelKernel for Kernel<S, D> {
    fn lanes(&self) -> usize {
        S::LANES
    }

    fn chunk_bytes(&self) -> usize {
        D::ROW_BYTES * S::LANES
    }

    fn code_bytes(&self) -> usize {
        D::CODE_BYTES
    }

    fn pack(&self, panel: &PanelCodes, tiles: &mut [u8]) {
        let stored = D::Pattern::STORED;
        let mut memory = [0; CHUNK * MOST_LANES];
        let stride = panel.codes.len() / S::LANES / D::CODE_BYTES;
        for (chunk, tile) in tiles.chunks_exact_mut(self.chunk_bytes()).enumerate() {
            let (codes, index) = tile.split_at_mut(D::WEIGHT_ROW_BYTES * S::LANES);
            D::pack(&panel.codes[chunk * stored * D::CODE_BYTES..], stride, S::LANES, codes);
            if !index.is_empty() {
                let positions = &panel.positions[chunk * stored..];
                let positions = quads::<D::Pattern>(positions, stride, S::LANES, &mut memory);
                D::Pattern::pack_index(positions, 4 * S::LANES, index);
            }
        }
    }

    fn restore_codes(&self, tiles: &[u8], codes: &mut [u8]) {
        let stride = codes.len() / S::LANES / D::CODE_BYTES;
        for chunk in 0..tiles.len() / self.chunk_bytes() {
            let (tile, _) = chunk_of::<S, D>(tiles, chunk);
            D::restore(tile, S::LANES, stride, &mut codes[chunk * D::Pattern::STORED * D::CODE_BYTES..]);
        }
    }

    fn restore_positions(&self, tiles: &[u8], positions: &mut [u8]) {
        let (stored, stride) = (D::Pattern::STORED, positions.len() / S::LANES);
        let quads = &mut [0; CHUNK * MOST_LANES][..stored * S::LANES];
        for chunk in 0..tiles.len() / self.chunk_bytes() {
            let (_, index) = chunk_of::<S, D>(tiles, chunk);
            D::Pattern::restore_index(index, 4 * S::LANES, quads);
            restore_rows(quads, S::LANES, stride, &mut positions[chunk * stored..]);
        }
    }

    fn forms(&self) -> Forms {
        D::FORMS
    }

    fn run(&self, tiles: &Tiles, panel: usize, x: Inputs<'_>, first_row: usize, sums: &mut [f32]) {
        let x = Rows { x: D::inputs(x), chunks: tiles.chunks, order: x.order, next: first_row };
        self.simd.vectorize(Run::<D> { tiles, panel, x, sums });
    }

    fn decode_row(&self, tiles: &Tiles, panel: usize, lane: usize, weights: &mut [f32]) {
        self.simd.vectorize(DecodeRow::<D> { tiles, panel, lane, weights, dot: PhantomData });
    }
}

struct Run<'a, D: Dot> {
    tiles: &'a Tiles,
    panel: usize,
    x: Rows<'a, D::Input>,
    sums: &'a mut [f32],
}

/// Rows of input in the order that they are multiplied in.
struct Rows<'a, T> {
    x: &'a [T],
    chunks: usize,
    order: Option<&'a [u32]>,
    next: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    fn next(&mut self) -> &'a [T] {
        let row = match self.order {
            Some(order) => order[self.next] as usize,
            None => self.next,
        };
        self.next += 1;
        &self.x[row * self.chunks..][..self.chunks]
    }
}

impl<D: Dot> WithSimd for Run<'_, D> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tiles, panel, mut x, sums } = self;
        let mut rest = sums;
        while const { most_rows::<S, D>() >= 8 } && rest.len() >= 8 * S::LANES {
            rest = panel_sums::<S, D, 8>(simd, tiles, panel, &mut x, rest);
        }
        while rest.len() >= 4 * S::LANES {
            rest = panel_sums::<S, D, 4>(simd, tiles, panel, &mut x, rest);
        }
        if rest.len() >= 2 * S::LANES {
            rest = panel_sums::<S, D, 2>(simd, tiles, panel, &mut x, rest);
        }
        if !rest.is_empty() {
            panel_sums::<S, D, 1>(simd, tiles, panel, &mut x, rest);
        }
    }
}

/// The most rows of the input that a decoded chunk serves: as many as there are registers for. Sums of integers are touched once a chunk,
/// so they may wait in memory where rows take so few instructions, two at a time, that to decode costs more.
const fn most_rows<S: Simd, D: Dot>() -> usize {
    if S::REGISTERS >= 32 || S::TWO_ROWS && D::FORMS.blocks { 8 } else { 4 }
}

/// The outputs of one panel for the next `ROWS` rows of the input; gives what is left of `out`. A group is summed unscaled, then scaled.
#[inline(always)]
fn panel_sums<'o, S: Simd, D: Dot, const ROWS: usize>(
    simd: S,
    tiles: &Tiles,
    panel: usize,
    x: &mut Rows<'_, D::Input>,
    out: &'o mut [f32],
) -> &'o mut [f32] {
    let chunks = tiles.chunks;
    let mut rows: [&[D::Input]; ROWS] = [&[]; ROWS];
    for row in &mut rows {
        *row = x.next();
    }
    let codes = tiles.panel(panel);
    let zero = simd.splat(0.0);
    let mut totals = [zero; ROWS];
    let is_biased = tiles.format.zero.is_bias();
    match tiles.format.span {
        _ if D::TWO_LEVELS && tiles.format.scale == ScaleType::TwoLevel => match tiles.format.zero {
            ZeroType::Minimum => super_group_sums::<S, D, true, ROWS>(simd, tiles, panel, &rows, &mut totals),
            _ => super_group_sums::<S, D, false, ROWS>(simd, tiles, panel, &rows, &mut totals),
        },
        GroupSpan::Chunks(span) => {
            for g in 0..tiles.groups {
                let group = tiles.group(simd, panel, g);
                let mut sums = [zero; ROWS];
                let end = ((g + 1) * span).min(chunks);
                for chunk in g * span..end {
                    let (weights, index) = decode_chunk::<S, D, ROWS>(simd, codes, chunk);
                    let x = inputs(&rows, chunk);
                    D::add_dots::<S, WHOLE, ROWS>(simd, &weights, index, &group.offset, x, &mut sums);
                }
                add_scaled(simd, &mut totals, sums, group.scale);
                if is_biased {
                    add_biases::<S, D, WHOLE, ROWS>(simd, &mut totals, &rows, g * span, end, group.bias);
                }
            }
        }
        GroupSpan::HalfChunk => {
            for chunk in 0..chunks {
                let (weights, index) = decode_chunk::<S, D, ROWS>(simd, codes, chunk);
                let x = inputs(&rows, chunk);
                let group = tiles.group(simd, panel, 2 * chunk);
                let mut sums = [zero; ROWS];
                D::add_dots::<S, FIRST_HALF, ROWS>(simd, &weights, index, &group.offset, x, &mut sums);
                add_scaled(simd, &mut totals, sums, group.scale);
                if is_biased {
                    add_biases::<S, D, FIRST_HALF, ROWS>(simd, &mut totals, &rows, chunk, chunk + 1, group.bias);
                }
                let group = tiles.group(simd, panel, 2 * chunk + 1);
                let mut sums = [zero; ROWS];
                D::add_dots::<S, SECOND_HALF, ROWS>(simd, &weights, index, &group.offset, x, &mut sums);
                add_scaled(simd, &mut totals, sums, group.scale);
                if is_biased {
                    add_biases::<S, D, SECOND_HALF, ROWS>(simd, &mut totals, &rows, chunk, chunk + 1, group.bias);
                }
            }
        }
    }
    let factor = simd.splat(tiles.factor);
    let (out, rest) = out.split_at_mut(ROWS * S::LANES);
    for i in 0..ROWS {
        simd.store(simd.mul(totals[i], factor), &mut out[i * S::LANES..]);
    }
    rest
}

/// A chunk of each input row.
#[inline(always)]
pub(super) fn inputs<'a, T, const ROWS: usize>(rows: &[&'a [T]; ROWS], chunk: usize) -> [&'a T; ROWS] {
    let mut inputs = [&rows[0][chunk]; ROWS];
    for i in 1..ROWS {
        inputs[i] = &rows[i][chunk];
    }
    inputs
}

#[inline(always)]
pub(super) fn add_scaled<S: Simd, const ROWS: usize>(
    simd: S,
    totals: &mut [S::F32; ROWS],
    sums: [S::F32; ROWS],
    scale: S::F32,
) {
    for i in 0..ROWS {
        totals[i] = simd.mul_add(sums[i], scale, totals[i]);
    }
}

/// Adds `bias · Σ x` over a part of so many chunks.
#[inline(always)]
fn add_biases<S: Simd, D: Dot, const PART: usize, const ROWS: usize>(
    simd: S,
    totals: &mut [S::F32; ROWS],
    rows: &[&[D::Input]; ROWS],
    start: usize,
    end: usize,
    bias: S::F32,
) {
    for i in 0..ROWS {
        let mut sum = 0.0;
        for x in &rows[i][start..end] {
            sum += D::input_sum::<PART>(x);
        }
        totals[i] = simd.mul_add(simd.splat(sum), bias, totals[i]);
    }
}

struct DecodeRow<'a, D> {
    tiles: &'a Tiles,
    panel: usize,
    lane: usize,
    weights: &'a mut [f32],
    dot: PhantomData<D>,
}

impl<D: Dot> WithSimd for DecodeRow<'_, D> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tiles, panel, lane, weights: out, .. } = self;
        let (codes, factor) = (tiles.panel(panel), simd.splat(tiles.factor));
        for (half, out) in out.chunks_mut(CHUNK / 2).enumerate() {
            let group = match tiles.format.span {
                GroupSpan::Chunks(span) => half / 2 / span,
                GroupSpan::HalfChunk => half,
            };
            let group = tiles.group(simd, panel, group);
            let scale = simd.mul(group.scale, factor);
            let (weights, index) = chunk_of::<S, D>(codes, half / 2);
            let weights = D::decode(simd, weights);
            out.fill(0.0);
            let stored = D::Pattern::STORED / 2;
            for t in half % 2 * stored..(half % 2 + 1) * stored {
                // Columns beyond K are padding.
                if let Some(out) = out.get_mut(D::Pattern::column(index, lane, t) % (CHUNK / 2)) {
                    let column = D::column(simd, &weights, &group.offset, t);
                    *out = simd.lanes(simd.add(simd.mul(column, scale), group.bias))[lane];
                }
            }
        }
    }
}
