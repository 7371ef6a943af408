//! Hadamard rotations: `H_2ᵏ` by butterflies (the fast Walsh-Hadamard transform), then `H_m` by its signs.

use super::rows::CHECKED;
use super::simd::{MOST_LANES, Simd, SimdLevel, WithSimd};
use super::threads::Threads;
use super::vector;
use crate::Hadamard;
use crate::hadamard::MOST_ORDER;

/// Values of a task, if its blocks are no larger.
const TASK: usize = 4096;

/// Rows of `H_m` that are summed together; every m but 1 is a multiple of it.
const ROWS: usize = 4;

/// Rotates each block of `x`.
pub(super) fn rotate(x: &mut [f32], rotation: &Hadamard, simd: SimdLevel, threads: &Threads) {
    let block = rotation.block();
    threads.for_each_chunk(x, block * (TASK / block).max(1), |_, blocks| {
        simd.dispatch(Blocks { blocks, rotation }).expect(CHECKED);
    });
}

struct Blocks<'a> {
    blocks: &'a mut [f32],
    rotation: &'a Hadamard,
}

impl WithSimd for Blocks<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { blocks, rotation } = self;
        let (block, run) = (rotation.block(), rotation.run());
        let scale = (1.0 / (block as f64).sqrt()) as f32;
        if run < S::LANES {
            for run in blocks.chunks_exact_mut(run) {
                butterflies(run, scale);
            }
        } else {
            multiply_vectors(simd, blocks, scale);
            for run in blocks.chunks_exact_mut(run) {
                vector_butterflies(simd, run);
            }
        }
        if run < block {
            for block in blocks.chunks_exact_mut(block) {
                combine(simd, block, run, rotation.signs());
            }
        }
    }
}

/// `scale · H_2ᵏ` of fewer values than a vector has lanes.
#[inline(always)]
fn butterflies(values: &mut [f32], scale: f32) {
    let mut half = 1;
    while half < values.len() {
        for pair in values.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    for x in values {
        *x *= scale;
    }
}

/// The signs of Sylvester's matrix, of as many rows as a vector has lanes: those of fewer are its corner.
static SYLVESTER: [[f32; MOST_LANES]; MOST_LANES] = {
    let mut signs = [[1.0; MOST_LANES]; MOST_LANES];
    let mut at = 0;
    while at < MOST_LANES * MOST_LANES {
        let (i, j) = (at / MOST_LANES, at % MOST_LANES);
        if (i & j).count_ones() % 2 == 1 {
            signs[i][j] = -1.0;
        }
        at += 1;
    }
    signs
};

/// Each vector of values times `scale · H` of as many rows: as products, since the values of a vector cannot be added to each other.
#[inline(always)]
fn multiply_vectors<S: Simd>(simd: S, values: &mut [f32], scale: f32) {
    let mut rows = [simd.splat(0.0); MOST_LANES];
    for (row, signs) in rows[..S::LANES].iter_mut().zip(&SYLVESTER) {
        *row = simd.mul(simd.load(signs), simd.splat(scale));
    }
    for values in values.chunks_exact_mut(S::LANES) {
        let mut sum = simd.splat(0.0);
        for (&row, &x) in rows.iter().zip(&*values) {
            sum = simd.mul_add(simd.splat(x), row, sum);
        }
        simd.store(sum, values);
    }
}

/// The butterflies of values that are at least a vector apart, two levels at a time.
#[inline(always)]
fn vector_butterflies<S: Simd>(simd: S, values: &mut [f32]) {
    let mut half = S::LANES;
    while 4 * half <= values.len() {
        for four in values.chunks_exact_mut(4 * half) {
            let (low, high) = four.split_at_mut(2 * half);
            let ((a, b), (c, d)) = (low.split_at_mut(half), high.split_at_mut(half));
            let (ab, cd) = (pairs::<S>(a, b), pairs::<S>(c, d));
            for ((a, b), (c, d)) in ab.zip(cd) {
                let (va, vb, vc, vd) = (simd.load(a), simd.load(b), simd.load(c), simd.load(d));
                let (low_sum, low_difference) = (simd.add(va, vb), simd.sub(va, vb));
                let (high_sum, high_difference) = (simd.add(vc, vd), simd.sub(vc, vd));
                simd.store(simd.add(low_sum, high_sum), a);
                simd.store(simd.add(low_difference, high_difference), b);
                simd.store(simd.sub(low_sum, high_sum), c);
                simd.store(simd.sub(low_difference, high_difference), d);
            }
        }
        half *= 4;
    }
    if 2 * half <= values.len() {
        let (low, high) = values.split_at_mut(half);
        for (a, b) in pairs::<S>(low, high) {
            let (va, vb) = (simd.load(a), simd.load(b));
            simd.store(simd.add(va, vb), a);
            simd.store(simd.sub(va, vb), b);
        }
    }
}

/// The vectors of two slices, side by side.
#[inline(always)]
fn pairs<'a, S: Simd>(a: &'a mut [f32], b: &'a mut [f32]) -> impl Iterator<Item = (&'a mut [f32], &'a mut [f32])> {
    a.chunks_exact_mut(S::LANES).zip(b.chunks_exact_mut(S::LANES))
}

/// `H_m` over the runs of a block, a vector of each at a time.
#[inline(always)]
fn combine<S: Simd>(simd: S, block: &mut [f32], run: usize, signs: &[[f32; MOST_ORDER]]) {
    let (order, lanes) = (signs.len(), run.min(S::LANES));
    let mut start = 0;
    while start < run {
        let mut columns = [simd.splat(0.0); MOST_ORDER];
        for (j, column) in columns[..order].iter_mut().enumerate() {
            *column = vector::load(simd, &block[..(j + 1) * run], j * run + start);
        }
        for (group, signs) in signs.as_chunks::<ROWS>().0.iter().enumerate() {
            let mut sums = [simd.splat(0.0); ROWS];
            for (j, &column) in columns[..order].iter().enumerate() {
                for r in 0..ROWS {
                    sums[r] = simd.mul_add(simd.splat(signs[r][j]), column, sums[r]);
                }
            }
            for (r, &sum) in sums.iter().enumerate() {
                let to = &mut block[(ROWS * group + r) * run + start..];
                if lanes == S::LANES {
                    simd.store(sum, to);
                } else {
                    to[..lanes].copy_from_slice(&simd.lanes(sum)[..lanes]);
                }
            }
        }
        start += lanes;
    }
}
