//! How the weights of a chunk meet activations: what is multiplied, and summed up within the chunk.

use std::marker::PhantomData;

use super::activations::{Block, Forms, Inputs};
use super::codes::{CHUNK, Codes, Floats};
use super::kernel::add_scaled;
use super::pattern::{FIRST_HALF, Pattern, SECOND_HALF, add_dot_of};
use super::tiles::{Offset, half};
use crate::cpu::simd::{MOST_LANES, Simd};

/// How a chunk of weights in some format meets a chunk of activations.
pub(super) trait Dot: Send + Sync + Sized + 'static {
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
    /// Whether it meets scales of two levels ([`super::super_groups`]).
    const TWO_LEVELS: bool = false;
    /// Bytes of a row of a chunk in tile order.
    const ROW_BYTES: usize = Self::WEIGHT_ROW_BYTES + Self::Pattern::INDEX_ROW_BYTES;

    fn inputs(inputs: Inputs<'_>) -> &[Self::Input];
    /// Puts code `t` of row `r`, at `(r · stride + t) · CODE_BYTES` of `rows`, into tile order; there are `lanes` rows.
    fn pack(rows: &[u8], stride: usize, lanes: usize, tile: &mut [u8]);
    /// Takes codes back out of tile order: the inverse of [`Dot::pack`].
    fn restore(tile: &[u8], lanes: usize, stride: usize, rows: &mut [u8]);
    fn decode<S: Simd>(simd: S, tile: &[u8]) -> Self::Weights<'_, S>;
    /// Code `t` of each row, unscaled.
    fn column<S: Simd>(simd: S, weights: &Self::Weights<'_, S>, offset: &Offset<S>, t: usize) -> S::F32;
    /// Adds `Σ x · weight` over a part of the chunk, unscaled, to the sum of each input row.
    fn add_dots<S: Simd, const PART: usize, const ROWS: usize>(
        simd: S,
        weights: &Self::Weights<'_, S>,
        index: Index<Self, S>,
        offset: &Offset<S>,
        x: [&Self::Input; ROWS],
        sums: &mut [S::F32; ROWS],
    );
    /// `Σ x` over a part of the chunk, for biases.
    fn input_sum<const PART: usize>(x: &Self::Input) -> f32;

    /// Adds `scale · Σ x · weight` over both halves of the chunk to the sum of each input row. The scales of a row's halves are two i16;
    /// weights with minima have no offset.
    #[inline(always)]
    fn add_scaled_halves<S: Simd, const MINIMA: bool, const ROWS: usize>(
        simd: S,
        weights: &Self::Weights<'_, S>,
        index: Index<Self, S>,
        offset: &Offset<S>,
        scales: S::I32,
        x: [&Self::Input; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        add_halves_as_floats::<S, Self, ROWS>(simd, weights, index, offset, scales, x, sums);
    }
    /// Subtracts `minimum · Σ x` over both halves of the chunk from the sum of each input row. The minima of a row's halves are two i16.
    #[inline(always)]
    fn subtract_minima<S: Simd, const ROWS: usize>(
        simd: S,
        minima: S::I32,
        x: [&Self::Input; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        let (first, second) = (simd.to_f32(half(simd, minima, 0)), simd.to_f32(half(simd, minima, 1)));
        for (x, sum) in x.into_iter().zip(sums) {
            *sum = simd.mul_add(simd.splat(-Self::input_sum::<FIRST_HALF>(x)), first, *sum);
            *sum = simd.mul_add(simd.splat(-Self::input_sum::<SECOND_HALF>(x)), second, *sum);
        }
    }
}

/// Where the codes of a chunk stand.
pub(super) type Index<D, S> = <<D as Dot>::Pattern as Pattern>::Index<S>;

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
    const TWO_LEVELS: bool = P::STORED == CHUNK;

    fn inputs(inputs: Inputs<'_>) -> &[Block] {
        inputs.blocks
    }

    fn pack(rows: &[u8], stride: usize, lanes: usize, tile: &mut [u8]) {
        C::pack(quads::<P>(rows, stride, lanes, &mut [0; CHUNK * MOST_LANES]), 4 * lanes, tile);
    }

    fn restore(tile: &[u8], lanes: usize, stride: usize, rows: &mut [u8]) {
        restore_integers::<C, P>(tile, lanes, stride, rows);
    }

    #[inline(always)]
    fn decode<S: Simd>(simd: S, tile: &[u8]) -> P::Quads<S> {
        P::unpack::<S, C>(simd, tile)
    }

    #[inline(always)]
    fn column<S: Simd>(simd: S, weights: &P::Quads<S>, offset: &Offset<S>, t: usize) -> S::F32 {
        integer_column::<S, C>(simd, weights.as_ref(), offset, t)
    }

    #[inline(always)]
    fn add_dots<S: Simd, const PART: usize, const ROWS: usize>(
        simd: S,
        weights: &P::Quads<S>,
        index: P::Index<S>,
        offset: &Offset<S>,
        x: [&Block; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        P::add_dots::<S, C, PART, ROWS>(simd, *weights, index, offset, x, sums);
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

    #[inline(always)]
    fn add_scaled_halves<S: Simd, const MINIMA: bool, const ROWS: usize>(
        simd: S,
        weights: &P::Quads<S>,
        index: P::Index<S>,
        offset: &Offset<S>,
        scales: S::I32,
        x: [&Block; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        if !C::SMALL || P::STORED != CHUNK {
            return add_halves_as_floats::<S, Self, ROWS>(simd, weights, index, offset, scales, x, sums);
        }
        // Both halves stay integers until they are scaled, and are added as such.
        let (w, scaled_offset) = (weights.as_ref(), simd.mul_pairs(scales, offset.pairs));
        for (x, sum) in x.into_iter().zip(sums) {
            let ([x_first, x_second], zero) = (x.halves(), simd.splat_i32(0));
            let first = simd.add_dot_shared(true, zero, [w[0], w[1], w[2], w[3]], x_first);
            let second = simd.add_dot_shared(true, zero, [w[4], w[5], w[6], w[7]], x_second);
            let mut dot = simd.dot_pairs(simd.pair(first, second), scales);
            if !MINIMA {
                dot = simd.add_i32(dot, simd.dot_pairs(scaled_offset, simd.splat_pair(&x.minus_sums)));
            }
            add_dot_of(simd, dot, x, sum);
        }
    }

    #[inline(always)]
    fn subtract_minima<S: Simd, const ROWS: usize>(
        simd: S,
        minima: S::I32,
        x: [&Block; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        for (x, sum) in x.into_iter().zip(sums) {
            let dot = simd.dot_pairs(minima, simd.splat_pair(&x.minus_sums));
            add_dot_of(simd, dot, x, sum);
        }
    }
}

/// Bytes of a row's codes in a chunk.
const fn integer_bytes<C: Codes, P: Pattern>() -> usize {
    if P::STORED == CHUNK { C::ROW_BYTES } else { C::HALF_ROW_BYTES }
}

#[inline(always)]
fn integer_column<S: Simd, C: Codes>(simd: S, weights: &[S::Bytes], offset: &Offset<S>, t: usize) -> S::F32 {
    let (quad, j) = (weights[t / 4], t % 4);
    let value = if C::SIGNED { simd.signed_byte_to_f32(quad, j) } else { simd.byte_to_f32(quad, j) };
    simd.sub(value, offset.floats)
}

/// Puts the codes of a chunk, rows of one byte a code, into quads.
pub(super) fn quads<'a, P: Pattern>(
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

/// Takes the codes of a chunk back out of quads: the inverse of [`quads`].
pub(super) fn restore_rows(quads: &[u8], lanes: usize, stride: usize, rows: &mut [u8]) {
    for (q, quad) in quads.chunks_exact(4 * lanes).enumerate() {
        for (row, bytes) in quad.chunks_exact(4).enumerate() {
            rows[row * stride + 4 * q..][..4].copy_from_slice(bytes);
        }
    }
}

/// [`Dot::restore`] of integers.
fn restore_integers<C: Codes, P: Pattern>(tile: &[u8], lanes: usize, stride: usize, rows: &mut [u8]) {
    let quads = &mut [0; CHUNK * MOST_LANES][..P::STORED * lanes];
    C::restore(tile, 4 * lanes, quads);
    restore_rows(quads, lanes, stride, rows);
}

impl<C: Codes, P: Pattern> Dot for ExactDot<C, P> {
    type Pattern = P;
    type Input = [f32; CHUNK];
    type Weights<'t, S: Simd> = P::Quads<S>;
    const WEIGHT_ROW_BYTES: usize = integer_bytes::<C, P>();
    const CODE_BYTES: usize = 1;
    const FORMS: Forms = Forms { blocks: false, floats: true };
    const TWO_LEVELS: bool = P::STORED == CHUNK;

    fn inputs(inputs: Inputs<'_>) -> &[[f32; CHUNK]] {
        inputs.floats
    }

    fn pack(rows: &[u8], stride: usize, lanes: usize, tile: &mut [u8]) {
        C::pack(quads::<P>(rows, stride, lanes, &mut [0; CHUNK * MOST_LANES]), 4 * lanes, tile);
    }

    fn restore(tile: &[u8], lanes: usize, stride: usize, rows: &mut [u8]) {
        restore_integers::<C, P>(tile, lanes, stride, rows);
    }

    #[inline(always)]
    fn decode<S: Simd>(simd: S, tile: &[u8]) -> P::Quads<S> {
        P::unpack::<S, C>(simd, tile)
    }

    #[inline(always)]
    fn column<S: Simd>(simd: S, weights: &P::Quads<S>, offset: &Offset<S>, t: usize) -> S::F32 {
        integer_column::<S, C>(simd, weights.as_ref(), offset, t)
    }

    #[inline(always)]
    fn add_dots<S: Simd, const PART: usize, const ROWS: usize>(
        simd: S,
        weights: &P::Quads<S>,
        index: P::Index<S>,
        offset: &Offset<S>,
        x: [&[f32; CHUNK]; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        add_float_dots::<S, Self, PART, ROWS>(simd, weights, index, offset, x, sums);
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

    fn restore(tile: &[u8], lanes: usize, stride: usize, rows: &mut [u8]) {
        for (t, codes) in tile.chunks_exact(lanes * F::BYTES).enumerate() {
            for (row, code) in codes.chunks_exact(F::BYTES).enumerate() {
                rows[(row * stride + t) * F::BYTES..][..F::BYTES].copy_from_slice(code);
            }
        }
    }

    #[inline(always)]
    fn decode<S: Simd>(_: S, tile: &[u8]) -> &[u8] {
        tile
    }

    #[inline(always)]
    fn column<S: Simd>(simd: S, weights: &&[u8], _: &Offset<S>, t: usize) -> S::F32 {
        F::column(simd, weights, t)
    }

    #[inline(always)]
    fn add_dots<S: Simd, const PART: usize, const ROWS: usize>(
        simd: S,
        weights: &&[u8],
        index: P::Index<S>,
        offset: &Offset<S>,
        x: [&[f32; CHUNK]; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        add_float_dots::<S, Self, PART, ROWS>(simd, weights, index, offset, x, sums);
    }

    #[inline(always)]
    fn input_sum<const PART: usize>(x: &[f32; CHUNK]) -> f32 {
        float_sum::<PART>(x)
    }
}

/// [`Dot::add_scaled_halves`] where scales become floats.
#[inline(always)]
fn add_halves_as_floats<S: Simd, D: Dot, const ROWS: usize>(
    simd: S,
    weights: &D::Weights<'_, S>,
    index: Index<D, S>,
    offset: &Offset<S>,
    scales: S::I32,
    x: [&D::Input; ROWS],
    sums: &mut [S::F32; ROWS],
) {
    let (mut first, mut second) = ([simd.splat(0.0); ROWS], [simd.splat(0.0); ROWS]);
    D::add_dots::<S, FIRST_HALF, ROWS>(simd, weights, index, offset, x, &mut first);
    add_scaled(simd, sums, first, simd.to_f32(half(simd, scales, 0)));
    D::add_dots::<S, SECOND_HALF, ROWS>(simd, weights, index, offset, x, &mut second);
    add_scaled(simd, sums, second, simd.to_f32(half(simd, scales, 1)));
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
    offset: &Offset<S>,
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
            let column = D::column(simd, weights, offset, t);
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
