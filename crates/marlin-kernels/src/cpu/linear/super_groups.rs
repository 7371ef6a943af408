//! Sums over K where scales, and minima if there are any, have two levels: small integers of groups, and f16 of super-groups.
//!
//! What is summed over a super-group is scaled by integers only. The f16 follow once, at its end.

use half::f16;

use super::dot::Dot;
use super::groups::GroupSpan;
use super::kernel::{INNER_AHEAD, add_scaled, decode_chunk, inputs, prefetch};
use super::pattern::WHOLE;
use super::tiles::Tiles;
use crate::cpu::simd::Simd;

/// Adds the outputs of one panel for some rows of the input to `totals`. Weights with minima have no offset.
#[inline(always)]
pub(super) fn super_group_sums<S: Simd, D: Dot, const MINIMA: bool, const ROWS: usize>(
    simd: S,
    tiles: &Tiles,
    panel: usize,
    rows: &[&[D::Input]; ROWS],
    totals: &mut [S::F32; ROWS],
) {
    let (codes, scales, minima) = (tiles.panel(panel), tiles.inner_scales(panel), tiles.inner_minima(panel));
    let (chunks, super_group, offset) = (tiles.chunks, tiles.format.super_group, tiles.offset(simd));
    let shared_bytes = tiles.format.levels() * size_of::<f16>() * S::LANES;
    for (s, shared) in tiles.supers(panel).chunks_exact(shared_bytes).enumerate() {
        prefetch::<S, ROWS>(simd, shared, INNER_AHEAD);
        let (mut sums, mut minimum_sums) = ([simd.splat(0.0); ROWS], [simd.splat(0.0); ROWS]);
        match tiles.format.span {
            GroupSpan::Chunks(span) => {
                for g in s * super_group..((s + 1) * super_group).min(tiles.groups) {
                    let scale = simd.to_f32(simd.widen_i8(inner::<S, ROWS>(simd, scales, S::LANES, g)));
                    let mut group_sums = [simd.splat(0.0); ROWS];
                    for chunk in g * span..((g + 1) * span).min(chunks) {
                        let (weights, index) = decode_chunk::<S, D, ROWS>(simd, codes, chunk);
                        let x = inputs(rows, chunk);
                        D::add_dots::<S, WHOLE, ROWS>(simd, &weights, index, &offset, x, &mut group_sums);
                        if MINIMA {
                            let minimum = simd.widen_i8(inner::<S, ROWS>(simd, minima, S::LANES, g));
                            D::subtract_minima(simd, simd.pair(minimum, minimum), x, &mut minimum_sums);
                        }
                    }
                    add_scaled(simd, &mut sums, group_sums, scale);
                }
            }
            GroupSpan::HalfChunk => {
                for chunk in s * super_group / 2..((s + 1) * super_group / 2).min(chunks) {
                    let (weights, index) = decode_chunk::<S, D, ROWS>(simd, codes, chunk);
                    let x = inputs(rows, chunk);
                    let scales = simd.widen_pairs(inner::<S, ROWS>(simd, scales, 2 * S::LANES, chunk));
                    D::add_scaled_halves::<S, MINIMA, ROWS>(simd, &weights, index, &offset, scales, x, &mut sums);
                    if MINIMA {
                        let minima = simd.widen_pairs(inner::<S, ROWS>(simd, minima, 2 * S::LANES, chunk));
                        D::subtract_minima(simd, minima, x, &mut minimum_sums);
                    }
                }
            }
        }
        add_scaled(simd, totals, sums, simd.load_le_f16(shared));
        if MINIMA {
            add_scaled(simd, totals, minimum_sums, simd.load_le_f16(&shared[shared_bytes / 2..]));
        }
    }
}

/// The `i`-th so many inner scales or minima of a panel.
#[inline(always)]
fn inner<S: Simd, const ROWS: usize>(simd: S, panel: &[i8], count: usize, i: usize) -> &[i8] {
    let inner = &panel[i * count..][..count];
    prefetch::<S, ROWS>(simd, bytemuck::cast_slice(inner), INNER_AHEAD);
    inner
}
