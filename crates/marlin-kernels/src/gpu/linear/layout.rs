//! The order of packed weights on a device.
//!
//! Rows are padded to whole units of 32 columns. A unit holds pairs of codes: pair p is columns c and c + 4, c = 8 (p / 4) + p % 4, so that
//! 4-bit codes keep their canonical order and a mask takes a pair, in two halves of a word, at once. Codes of other widths are split into planes of
//! 8, 4, 2 and 1 bits in the same order. The bits of E2M1 codes are spread so that they become halves in few instructions. Scales lie in quads, those of four rows side by side, and so do zero points or biases.

use marlin_format::{Element, PackedMatrix, Sparsity};

use super::format::{DeviceFormat, Offset, Scale};
use crate::gpu::GpuArithmetic;

/// Columns that are unpacked together.
pub(super) const UNIT: usize = 32;
/// Rows whose scales lie side by side.
pub(super) const QUAD: usize = 4;

/// A row's largest weight on a device of half precision is less than this, and at least half of it: dot products of 32 columns
/// with activations below 16 then stay far from the largest number, 65504.
const LARGEST: f32 = 16.0;

/// Columns, or stored codes of 2:4 sparse rows, that share pair `p`.
const fn columns(is_sparse: bool, pair: usize) -> [usize; 2] {
    if is_sparse {
        // Four columns have two codes; two neighbouring fours share a pair.
        let first = 4 * (pair / 2) + pair % 2;
        [first, first + 2]
    } else {
        let first = 8 * (pair / 4) + pair % 4;
        [first, first + 4]
    }
}

/// Widths of the planes that codes of so many bits are split into, lowest bits first.
pub(super) fn planes(bits: u32) -> impl Iterator<Item = u32> {
    [8, 4, 2, 1].into_iter().filter(move |width| bits & width != 0)
}

/// Rows of one matrix on their way to the device.
pub(super) struct Rows<'a> {
    format: &'a DeviceFormat,
    matrix: &'a PackedMatrix<'a>,
}

impl<'a> Rows<'a> {
    pub(super) fn new(format: &'a DeviceFormat, matrix: &'a PackedMatrix<'a>) -> Self {
        Self { format, matrix }
    }

    /// The codes of all rows, if the device keeps them in the same order, but for the bits of E2M1 within a word.
    fn in_order(&self) -> Option<&'a [u8]> {
        let is_canonical = self.format.element.bits() == 4 && !self.format.is_sparse && !self.format.is_converted;
        (is_canonical && self.matrix.cols.is_multiple_of(UNIT)).then_some(&*self.matrix.codes)
    }

    /// The codes of all rows, if the device keeps them as they are.
    pub(super) fn as_they_are(&self) -> Option<&'a [u8]> {
        self.in_order().filter(|_| self.format.element != Element::E2M1)
    }

    /// The words of a row.
    pub(super) fn codes(&self, row: usize, words: &mut [u32]) {
        if let Some(bytes) = self.in_order() {
            let of_row = &bytes.as_chunks::<4>().0[row * words.len()..];
            words.iter_mut().zip(of_row).for_each(|(word, bytes)| *word = self.word(u32::from_le_bytes(*bytes)));
            return;
        }
        let mut codes = vec![0u32; self.matrix.cols.next_multiple_of(UNIT)];
        if self.format.is_converted {
            let mut weights = vec![0.0; self.matrix.cols];
            self.matrix.decode_row(row, &mut weights);
            let factor = self.format.dense_factor(&weights);
            codes.iter_mut().zip(&weights).for_each(|(code, weight)| *code = self.format.dense_code(weight / factor));
        } else {
            let stored = self.matrix.scheme.stored_cols(self.matrix.cols);
            if self.format.element.is_dense() {
                codes[..stored].iter_mut().enumerate().for_each(|(col, code)| *code = self.matrix.code(row, col));
            } else {
                let mut bytes = vec![0; stored];
                self.matrix.unpack_codes_row(row, &mut bytes);
                codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code = u32::from(byte));
            }
        }
        let stored = if self.format.is_sparse { UNIT / 2 } else { UNIT };
        for (codes, words) in codes.chunks_exact(stored).zip(words.chunks_exact_mut(self.format.unit_words())) {
            self.unit(codes, words);
        }
    }

    /// The words of a unit's codes.
    fn unit(&self, codes: &[u32], words: &mut [u32]) {
        let (bits, is_sparse) = (self.format.element.bits(), self.format.is_sparse);
        let pair = |pair: usize| columns(is_sparse, pair).map(|column| codes[column]);
        let pairs = codes.len() / 2;
        match bits {
            32 => words.as_chunks_mut().0.iter_mut().zip(0..).for_each(|(words, p)| *words = pair(p)),
            16 => words.iter_mut().zip(0..).for_each(|(word, p)| {
                let [first, second] = pair(p);
                *word = first | second << 16;
            }),
            _ => {
                let (mut words, mut shift) = (words.iter_mut(), 0);
                for width in planes(bits) {
                    let mask = (1 << width) - 1;
                    let pairs_of_word = 16 / width as usize;
                    for first in (0..pairs).step_by(pairs_of_word) {
                        let word = (0..pairs_of_word).fold(0, |word, i| {
                            let [low, high] = pair(first + i).map(|code| code >> shift & mask);
                            word | (low | high << 16) << (width as usize * i)
                        });
                        // A unit has whole words of every plane.
                        if let Some(next) = words.next() {
                            *next = self.word(word);
                        }
                    }
                    shift += width;
                }
            }
        }
    }

    /// A word of codes as the device has it.
    fn word(&self, codes: u32) -> u32 {
        if self.format.element == Element::E2M1 { spread_e2m1(codes) } else { codes }
    }

    /// The factor of a row's sums: what all its weights share.
    pub(super) fn factor(&self, row: usize) -> f32 {
        let (format, matrix) = (self.format, self.matrix);
        if format.is_converted {
            let mut weights = vec![0.0; matrix.cols];
            matrix.decode_row(row, &mut weights);
            return format.dense_factor(&weights);
        }
        match format.scale {
            Scale::None => matrix.scale_at(row, 0) * format.element_factor(),
            Scale::Quads if format.arithmetic == GpuArithmetic::Exact => 1.0,
            Scale::Quads | Scale::E8M0 => self.power(row),
            Scale::E4M3 => {
                let global = matrix.globals.first_chunk().map_or(1.0, |bytes| f32::from_le_bytes(*bytes));
                global * format.e4m3_factor()
            }
        }
    }

    /// The power of two that brings a row's largest weight below [`LARGEST`].
    fn power(&self, row: usize) -> f32 {
        let matrix = self.matrix;
        let groups = matrix.scheme.groups_per_row(matrix.cols);
        let value = self.format.largest_value();
        let largest =
            (0..groups).map(|group| (matrix.scale_at(row, group).abs() * value).max(matrix.bias_at(row, group).abs()));
        power_of_two(largest.fold(0.0, f32::max))
    }

    /// Scales of a quad of rows from `row` on, as the device has them; rows beyond the last repeat it.
    pub(super) fn scales(&self, row: usize, bytes: &mut Vec<u8>) {
        let (format, matrix) = (self.format, self.matrix);
        let rows: [usize; QUAD] = std::array::from_fn(|i| (row + i).min(matrix.rows - 1));
        let factors = rows.map(|row| self.factor(row));
        for group in 0..matrix.scheme.groups_per_row(matrix.cols) {
            for (row, factor) in rows.into_iter().zip(factors) {
                // With what its element's decoding leaves out.
                let scale = || matrix.scale_at(row, group) / factor * format.element_factor();
                match format.scale {
                    Scale::None => {}
                    Scale::Quads => format.push(bytes, scale()),
                    Scale::E8M0 => bytes.push((scale().to_bits() >> 23) as u8),
                    Scale::E4M3 => {
                        let groups = matrix.scheme.groups_per_row(matrix.cols);
                        bytes.push(matrix.scales[row / matrix.scheme.group_rows(matrix.rows) * groups + group]);
                    }
                }
            }
        }
    }

    /// Zero points or biases of a quad of rows.
    pub(super) fn offsets(&self, row: usize, bytes: &mut Vec<u8>) {
        let (format, matrix) = (self.format, self.matrix);
        let rows: [usize; QUAD] = std::array::from_fn(|i| (row + i).min(matrix.rows - 1));
        let factors = rows.map(|row| self.factor(row));
        for group in 0..matrix.scheme.groups_per_row(matrix.cols) {
            for (row, factor) in rows.into_iter().zip(factors) {
                match format.offset {
                    Offset::None => {}
                    Offset::Zero => format.push(bytes, matrix.zero_at(row, group) as f32),
                    Offset::Bias => format.push(bytes, matrix.bias_at(row, group) / factor),
                }
            }
        }
    }

    /// The 2:4 index of a row: for every four columns 2 bits for each of the two that are stored.
    pub(super) fn sparse_index(&self, row: usize, words: &mut [u32]) {
        debug_assert!(self.matrix.scheme.sparsity == Sparsity::TwoOfFour);
        let bytes = self.matrix.sparse_index.len() / self.matrix.rows;
        let index = &self.matrix.sparse_index[row * bytes..][..bytes];
        for (word, bytes) in words.iter_mut().zip(index.chunks(4)) {
            let mut whole = [0; 4];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u32::from_le_bytes(whole);
        }
    }
}

/// The order of bits in which `e2m1_halves` of `elements.wgsl` finds the four pairs of a word: of pair `i`, in nibbles `i` of both halves of `codes`,
/// where its sign goes, and where the last of its other bits.
fn spread_e2m1(codes: u32) -> u32 {
    const PLACES: [[u32; 2]; 4] = [[15, 9], [12, 6], [14, 3], [13, 0]];
    PLACES.iter().zip(0..).fold(0, |word, ([sign, rest], pair)| {
        let code = codes >> (4 * pair);
        word | (code >> 3 & 0x0001_0001) << sign | (code & 0x0007_0007) << rest
    })
}

/// The power of two by which `largest` is divided to lie below [`LARGEST`], and not below half of it.
pub(super) fn power_of_two(largest: f32) -> f32 {
    if !largest.is_normal() {
        return 1.0;
    }
    let exponent = (largest.to_bits() >> 23) as i32 - 127;
    // Kept where the power and its inverse are normal numbers.
    2f32.powi((exponent + 1).clamp(-120, 120)) / LARGEST
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn largest_weights_come_below_sixteen() {
        for largest in [1e-30, 0.3, 8.0, 15.99, 16.0, 6e4, 1e30] {
            let scaled = largest / power_of_two(largest);
            assert!((8.0..16.0).contains(&scaled), "{largest} became {scaled}");
        }
        assert_eq!(power_of_two(0.0), 1.0);
        assert_eq!(power_of_two(f32::INFINITY), 1.0);
    }

    /// What the kernels make of a word is the value of each code, by OCP's table.
    #[test]
    fn spread_bits_of_e2m1_become_halves() {
        const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let masks: [&dyn Fn(u32) -> u32; 4] = [
            &|word| word & 0x8e00_8e00,
            &|word| word << 3 & 0x8e00_8e00,
            &|word| word << 1 & 0x8000_8000 | word << 6 & 0x0e00_0e00,
            &|word| word << 2 & 0x8000_8000 | word << 9 & 0x0e00_0e00,
        ];
        for word in (0..=u32::from(u16::MAX)).map(|low| low | low.reverse_bits()) {
            for (pair, halves) in masks.iter().enumerate() {
                let halves = halves(spread_e2m1(word));
                for half in 0..2 {
                    let code = word >> (16 * half + 4 * pair) & 15;
                    let value = f16::from_bits((halves >> (16 * half)) as u16).to_f32() * 16384.0;
                    let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
                    assert_eq!(value, sign * VALUES[(code & 7) as usize], "code {half} of pair {pair} of {word:#x}");
                }
            }
        }
    }

    #[test]
    fn pairs_cover_all_codes_once() {
        for (is_sparse, pairs) in [(false, 16), (true, 8)] {
            let mut all: Vec<usize> = (0..pairs).flat_map(|pair| columns(is_sparse, pair)).collect();
            all.sort_unstable();
            assert_eq!(all, (0..2 * pairs).collect::<Vec<_>>());
        }
    }
}
