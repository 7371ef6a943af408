//! The micro-kernels: sums over K of one panel for a few rows of the input.
//!
//! Each output is summed in one fixed order, whatever the number of input rows, so it does not depend on the batch.

use std::fmt;
use std::marker::PhantomData;

use super::activations::{Block, Forms, Inputs};
use super::codes::{CHUNK, Codes, Floats};
use super::groups::GroupSpan;
use super::pattern::{FIRST_HALF, Pattern, SECOND_HALF, WHOLE};
use super::tiles::{PanelCodes, Tiles};
use crate::cpu::simd::{CACHE_LINE, MOST_LANES, Simd, WithSimd};

/// Scale, offset and bias of a group, one a lane.
pub(super) struct Group<S: Simd> {
    pub(super) scale: S::F32,
    pub(super) offset: S::I32,
    /// The same, as an i16 in each half of a lane.
    pub(super) offset_pairs: S::I32,
    /// The same, as floats.
    pub(super) offset_f32: S::F32,
    /// What is added to weights after scaling.
    pub(super) bias: S::F32,
}

/// How a chunk of weights in some format meets a chunk of activations.
pub(super) trait Dot: Send + Sync + 'static {
    /// Which of a chunk's columns have codes.
    type Pattern: Pattern;
    /// A chunk of one row of activations.
    type Input;
    /// The codes of a chunk, as far as they are decoded at once.
    type Weights<'t, S: Simd>: Copy;
    /// Bytes of a row's codes in a chunk in tile order; those of the pattern follow.
    const WEIGHT_ROW_BYTES: usize;
    /// Bytes of one code while a chunk is packed.
    const CODE_BYTES: usize;
    const FORMS: Forms;
    /// Bytes of a row of a chunk in tile order.
    const ROW_BYTES: usize = Self::WEIGHT_ROW_BYTES + Self::Pattern::INDEX_ROW_BYTES;

    fn inputs(inputs: Inputs<'_>) -> &[Self::Input];
    /// Puts code `t` of row `r`, at `(r · stride + t) · CODE_BYTES` of `rows`, into tile order; there are `lanes` rows.
    fn pack(rows: &[u8], stride: usize, lanes: usize, tile: &mut [u8]);
    fn decode<S: Simd>(simd: S, tile: &[u8]) -> Self::Weights<'_, S>;
    /// Code `t` of each row, unscaled.
    fn column<S: Simd>(simd: S, weights: &Self::Weights<'_, S>, group: &Group<S>, t: usize) -> S::F32;
    /// Adds `Σ x · weight` over a part of the chunk, unscaled, to the sum of each input row.
    fn add_dots<S: Simd, const PART: usize, const ROWS: usize>(
        simd: S,
        weights: &Self::Weights<'_, S>,
        index: Index<Self, S>,
        group: &Group<S>,
        x: [&Self::Input; ROWS],
        sums: &mut [S::F32; ROWS],
    );
    /// `Σ x` over a part of the chunk, for biases.
    fn input_sum<const PART: usize>(x: &Self::Input) -> f32;
}

/// Where the codes of a chunk stand.
type Index<D, S> = <<D as Dot>::Pattern as Pattern>::Index<S>;

/// Integer weights, activations in int8: exact integer sums within 32 (or 16) columns.
pub(super) struct IntegerDot<C, P>(PhantomData<(C, P)>);
/// Integer weights, activations in f32.
pub(super) struct ExactDot<C, P>(PhantomData<(C, P)>);
/// Float weights, activations in f32.
pub(super) struct FloatDot<F, P>(PhantomData<(F, P)>);

impl<C: Codes, P: Pattern> Dot for IntegerDot<C, P> {
    type Pattern = P;
    type Input = Block;
    type Weights<'t, S: Simd> = P::Quads<S>;
    const WEIGHT_ROW_BYTES: usize = integer_bytes::<C, P>();
    const CODE_BYTES: usize = 1;
    const FORMS: Forms = Forms { blocks: true, floats: false };

    fn inputs(inputs: Inputs<'_>) -> &[Block] {
        inputs.blocks
    }

    fn pack(rows: &[u8], stride: usize, lanes: usize, tile: &mut [u8]) {
        C::pack(quads::<P>(rows, stride, lanes, &mut [0; CHUNK * MOST_LANES]), 4 * lanes, tile);
    }

    #[inline(always)]
    fn decode<S: Simd>(simd: S, tile: &[u8]) -> P::Quads<S> {
        P::unpack::<S, C>(simd, tile)
    }

    #[inline(always)]
    fn column<S: Simd>(simd: S, weights: &P::Quads<S>, group: &Group<S>, t: usize) -> S::F32 {
        integer_column::<S, C>(simd, weights.as_ref(), group, t)
    }

    #[inline(always)]
    fn add_dots<S: Simd, const PART: usize, const ROWS: usize>(
        simd: S,
        weights: &P::Quads<S>,
        index: P::Index<S>,
        group: &Group<S>,
        x: [&Block; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        P::add_dots::<S, C, PART, ROWS>(simd, *weights, index, group, x, sums);
    }

    #[inline(always)]
    fn input_sum<const PART: usize>(x: &Block) -> f32 {
        let [first, second] = x.minus_sums.map(i32::from);
        let minus_sum = match PART {
            FIRST_HALF => first,
            SECOND_HALF => second,
            _ => first + second,
        };
        x.scale * -minus_sum as f32
    }
}

/// Bytes of a row's codes in a chunk.
const fn integer_bytes<C: Codes, P: Pattern>() -> usize {
    if P::STORED == CHUNK { C::ROW_BYTES } else { C::HALF_ROW_BYTES }
}

#[inline(always)]
fn integer_column<S: Simd, C: Codes>(simd: S, weights: &[S::Bytes], group: &Group<S>, t: usize) -> S::F32 {
    let (quad, j) = (weights[t / 4], t % 4);
    let value = if C::SIGNED { simd.signed_byte_to_f32(quad, j) } else { simd.byte_to_f32(quad, j) };
    simd.sub(value, group.offset_f32)
}

/// Puts the codes of a chunk, rows of one byte a code, into quads.
fn quads<'a, P: Pattern>(
    rows: &[u8],
    stride: usize,
    lanes: usize,
    quads: &'a mut [u8; CHUNK * MOST_LANES],
) -> &'a [u8] {
    let quads = &mut quads[..P::STORED * lanes];
    for (q, quad) in quads.chunks_exact_mut(4 * lanes).enumerate() {
        for (row, bytes) in quad.chunks_exact_mut(4).enumerate() {
            bytes.copy_from_slice(&rows[row * stride + 4 * q..][..4]);
        }
    }
    quads
}

impl<C: Codes, P: Pattern> Dot for ExactDot<C, P> {
    type Pattern = P;
    type Input = [f32; CHUNK];
    type Weights<'t, S: Simd> = P::Quads<S>;
    const WEIGHT_ROW_BYTES: usize = integer_bytes::<C, P>();
    const CODE_BYTES: usize = 1;
    const FORMS: Forms = Forms { blocks: false, floats: true };

    fn inputs(inputs: Inputs<'_>) -> &[[f32; CHUNK]] {
        inputs.floats
    }

    fn pack(rows: &[u8], stride: usize, lanes: usize, tile: &mut [u8]) {
        C::pack(quads::<P>(rows, stride, lanes, &mut [0; CHUNK * MOST_LANES]), 4 * lanes, tile);
    }

    #[inline(always)]
    fn decode<S: Simd>(simd: S, tile: &[u8]) -> P::Quads<S> {
        P::unpack::<S, C>(simd, tile)
    }

    #[inline(always)]
    fn column<S: Simd>(simd: S, weights: &P::Quads<S>, group: &Group<S>, t: usize) -> S::F32 {
        integer_column::<S, C>(simd, weights.as_ref(), group, t)
    }

    #[inline(always)]
    fn add_dots<S: Simd, const PART: usize, const ROWS: usize>(
        simd: S,
        weights: &P::Quads<S>,
        index: P::Index<S>,
        group: &Group<S>,
        x: [&[f32; CHUNK]; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        add_float_dots::<S, Self, PART, ROWS>(simd, weights, index, group, x, sums);
    }

    #[inline(always)]
    fn input_sum<const PART: usize>(x: &[f32; CHUNK]) -> f32 {
        float_sum::<PART>(x)
    }
}

impl<F: Floats, P: Pattern> Dot for FloatDot<F, P> {
    type Pattern = P;
    type Input = [f32; CHUNK];
    type Weights<'t, S: Simd> = &'t [u8];
    const WEIGHT_ROW_BYTES: usize = P::STORED * F::BYTES;
    const CODE_BYTES: usize = F::BYTES;
    const FORMS: Forms = Forms { blocks: false, floats: true };

    fn inputs(inputs: Inputs<'_>) -> &[[f32; CHUNK]] {
        inputs.floats
    }

    fn pack(rows: &[u8], stride: usize, lanes: usize, tile: &mut [u8]) {
        for (i, code) in tile.chunks_exact_mut(F::BYTES).enumerate() {
            let (t, row) = (i / lanes, i % lanes);
            code.copy_from_slice(&rows[(row * stride + t) * F::BYTES..][..F::BYTES]);
        }
    }

    #[inline(always)]
    fn decode<S: Simd>(_: S, tile: &[u8]) -> &[u8] {
        tile
    }

    #[inline(always)]
    fn column<S: Simd>(simd: S, weights: &&[u8], _: &Group<S>, t: usize) -> S::F32 {
        F::column(simd, weights, t)
    }

    #[inline(always)]
    fn add_dots<S: Simd, const PART: usize, const ROWS: usize>(
        simd: S,
        weights: &&[u8],
        index: P::Index<S>,
        group: &Group<S>,
        x: [&[f32; CHUNK]; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        add_float_dots::<S, Self, PART, ROWS>(simd, weights, index, group, x, sums);
    }

    #[inline(always)]
    fn input_sum<const PART: usize>(x: &[f32; CHUNK]) -> f32 {
        float_sum::<PART>(x)
    }
}

/// Sums every eighth input, eight times, and adds these sums in a fixed order.
#[inline(always)]
fn float_sum<const PART: usize>(x: &[f32; CHUNK]) -> f32 {
    let part = match PART {
        FIRST_HALF => &x[..CHUNK / 2],
        SECOND_HALF => &x[CHUNK / 2..],
        _ => &x[..],
    };
    let mut sums = [0.0; 8];
    for eight in part.as_chunks::<8>().0 {
        for i in 0..8 {
            sums[i] += eight[i];
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

/// Sums every fourth code, four times: short chains of additions that need not wait for each other.
#[inline(always)]
fn add_float_dots<S: Simd, D: Dot, const PART: usize, const ROWS: usize>(
    simd: S,
    weights: &D::Weights<'_, S>,
    index: Index<D, S>,
    group: &Group<S>,
    x: [&[f32; CHUNK]; ROWS],
    sums: &mut [S::F32; ROWS],
) {
    let stored = D::Pattern::STORED;
    let (first, end) = match PART {
        FIRST_HALF => (0, stored / 2),
        SECOND_HALF => (stored / 2, stored),
        _ => (0, stored),
    };
    for j in 0..4 {
        let mut chains = [simd.splat(0.0); ROWS];
        let mut t = first + j;
        while t < end {
            let column = D::column(simd, weights, group, t);
            for i in 0..ROWS {
                chains[i] = simd.mul_add(column, D::Pattern::input(simd, index, x[i], t), chains[i]);
            }
            t += 4;
        }
        for i in 0..ROWS {
            sums[i] = simd.add(sums[i], chains[i]);
        }
    }
}

/// Bytes of a chunk of a panel: its codes, and where they stand.
#[inline(always)]
fn chunk_of<S: Simd, D: Dot>(panel: &[u8], chunk: usize) -> (&[u8], &[u8]) {
    let bytes = D::ROW_BYTES * S::LANES;
    panel[chunk * bytes..][..bytes].split_at(D::WEIGHT_ROW_BYTES * S::LANES)
}

/// A chunk of a panel, for so many rows of input.
#[inline(always)]
fn decode_chunk<S: Simd, D: Dot, const ROWS: usize>(
    simd: S,
    panel: &[u8],
    chunk: usize,
) -> (D::Weights<'_, S>, Index<D, S>) {
    let (codes, index) = chunk_of::<S, D>(panel, chunk);
    // One or two rows wait for memory, more are multiplied for longer than the next weights take to come.
    if ROWS <= 2 {
        prefetch(simd, codes);
        prefetch(simd, index);
    }
    (D::decode(simd, codes), D::Pattern::load_index(simd, index))
}

/// How far ahead of what it multiplies a kernel of one or two rows asks for weights: what memory brings while a few chunks are multiplied.
const AHEAD: usize = 2048;

/// Asks for what comes so far behind these bytes, in this panel or the next.
#[inline(always)]
fn prefetch<S: Simd>(simd: S, bytes: &[u8]) {
    for line in bytes.chunks(CACHE_LINE) {
        simd.prefetch(line, AHEAD);
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
        while most_rows::<S, D>() >= 8 && rest.len() >= 8 * S::LANES {
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
        GroupSpan::Chunks(span) => {
            for g in 0..tiles.groups {
                let group = tiles.group(simd, panel, g);
                let mut sums = [zero; ROWS];
                let end = ((g + 1) * span).min(chunks);
                for chunk in g * span..end {
                    let (weights, index) = decode_chunk::<S, D, ROWS>(simd, codes, chunk);
                    D::add_dots::<S, WHOLE, ROWS>(simd, &weights, index, &group, inputs(&rows, chunk), &mut sums);
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
                D::add_dots::<S, FIRST_HALF, ROWS>(simd, &weights, index, &group, x, &mut sums);
                add_scaled(simd, &mut totals, sums, group.scale);
                if is_biased {
                    add_biases::<S, D, FIRST_HALF, ROWS>(simd, &mut totals, &rows, chunk, chunk + 1, group.bias);
                }
                let group = tiles.group(simd, panel, 2 * chunk + 1);
                let mut sums = [zero; ROWS];
                D::add_dots::<S, SECOND_HALF, ROWS>(simd, &weights, index, &group, x, &mut sums);
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
fn inputs<'a, T, const ROWS: usize>(rows: &[&'a [T]; ROWS], chunk: usize) -> [&'a T; ROWS] {
    let mut inputs = [&rows[0][chunk]; ROWS];
    for i in 1..ROWS {
        inputs[i] = &rows[i][chunk];
    }
    inputs
}

#[inline(always)]
fn add_scaled<S: Simd, const ROWS: usize>(simd: S, totals: &mut [S::F32; ROWS], sums: [S::F32; ROWS], scale: S::F32) {
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
                    let column = D::column(simd, &weights, &group, t);
                    *out = simd.lanes(simd.add(simd.mul(column, scale), group.bias))[lane];
                }
            }
        }
    }
}
