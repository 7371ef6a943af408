//! 2:4 sparsity as `compressed-tensors` stores it, which only older releases write (0.10 among them).

use marlin_format::bits;

use super::reorder::packed_rows;

/// The 2:4 metadata that a bit mask stands for, `[_, ceil(cols / 8)]` bytes of which bit `c` of a row is set where
/// column `c` is kept. Four columns of which not two are kept become metadata that no matrix may have.
pub(super) fn index_of_mask(mask: &[u8], cols: usize) -> Vec<u8> {
    let of_byte = |byte: u8| quad(byte & 15) | quad(byte >> 4) << 4;
    let mut index: Vec<u8> = mask.iter().map(|byte| of_byte(*byte)).collect();
    if !cols.is_multiple_of(8) {
        // The last byte of a row is half full, and so is the last byte of its metadata.
        index.iter_mut().skip(cols / 8).step_by(cols.div_ceil(8)).for_each(|byte| *byte &= 15);
    }
    index
}

/// The lower of two columns kept in bits 0–1, the higher in bits 2–3.
fn quad(mask: u8) -> u8 {
    match mask.count_ones() {
        2 => mask.trailing_zeros() as u8 | (3 - (mask << 4).leading_zeros() as u8) << 2,
        _ => 0,
    }
}

/// A matrix that is laid out for the kernel `marlin-24`. `rows` is a multiple of 64, `cols` one of 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Marlin24 {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) bits: u32,
}

/// Rows and stored columns of a tile.
const TILE: usize = 16;
/// Codes that are permuted among themselves: four tiles side by side.
const RUN: usize = 4 * TILE * TILE;

impl Marlin24 {
    /// Codes packed along the stored columns of a row, from words `[cols / 32, rows · 16 · bits / 32]`.
    pub(super) fn codes(&self, stored: &[u8]) -> Vec<u8> {
        let Self { rows, cols, bits } = *self;
        let order = self.order();
        let kept = cols / 2;
        let mut unpacked = vec![0; rows * kept];
        let mut run = [0; RUN];
        let runs = stored.chunks_exact(RUN * bits as usize / 8);
        for (index, packed) in runs.enumerate() {
            bits::unpack(packed, bits, &mut run);
            let (tile_row, first) = (index / (rows / 64), index % (rows / 64) * 64);
            for (place, code) in order.iter().zip(run) {
                let (tile, within) = (place / (TILE * TILE), place % (TILE * TILE));
                let (row, col) = (first + tile * TILE + within % TILE, tile_row * TILE + within / TILE);
                unpacked[row * kept + col] = code;
            }
        }
        packed_rows(&unpacked, kept, bits)
    }

    /// Where in a run, before it was permuted, each of its codes stood: the order in which the lanes of a warp hold the
    /// fragments of a matrix product, and within a word that in which nibbles (or bytes) become pairs of halves.
    fn order(&self) -> Vec<usize> {
        let interleaved: &[usize] = if self.bits == 4 { &[0, 2, 4, 6, 1, 3, 5, 7] } else { &[0, 2, 1, 3] };
        let mut order = Vec::with_capacity(RUN);
        for lane in 0..32 {
            let (column, pair) = (lane / 4, 2 * (lane % 4));
            for offset in 0..4 {
                for block in [0, 4] {
                    for row in [pair, pair + 1, pair + 8, pair + 9] {
                        order.push(TILE * row + column / 2 * 256 + 8 * (column % 2) + block + offset);
                    }
                }
            }
        }
        order.chunks_exact(interleaved.len()).flat_map(|word| interleaved.iter().map(|place| word[*place])).collect()
    }

    /// The 2:4 metadata in order, from 16-bit elements `[rows, cols / 16]` that CUTLASS reorders.
    pub(super) fn index(&self, stored: &[u8]) -> Vec<u8> {
        let elements = stored.as_chunks::<2>().0;
        let columns = self.cols / 16;
        let mut index = Vec::with_capacity(stored.len());
        for row in 0..self.rows {
            let moved = row / 64 * 64 + row % 2 * 2 + row % 8 / 4 + row % 4 / 2 * 32 + row % 64 / 8 * 4;
            for column in 0..columns {
                // The corners of squares of 2 × 2 that are off the diagonal change places.
                let (row, column) = match (moved % 2, column % 2) {
                    (0, 1) => (moved + 1, column - 1),
                    (1, 0) => (moved - 1, column + 1),
                    _ => (moved, column),
                };
                index.extend(elements[column / 2 * self.rows * 2 + row * 2 + column % 2]);
            }
        }
        index
    }
}

/// Scales of columns of `size` bytes, 64 of which are permuted among themselves, in order.
pub(super) fn scales_in_order(stored: &[u8], size: usize) -> Vec<u8> {
    const ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
    let mut scales = vec![0; stored.len()];
    for (to, from) in scales.chunks_exact_mut(8 * size).zip(stored.chunks_exact(8 * size)) {
        for (place, scale) in ORDER.iter().zip(from.chunks_exact(size)) {
            to[place * size..][..size].copy_from_slice(scale);
        }
    }
    scales
}
