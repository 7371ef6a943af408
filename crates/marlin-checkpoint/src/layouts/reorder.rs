//! Orders in which other packages keep codes, scales and zero points. They are only read.

use marlin_format::bits;

use super::sparse::{self, Marlin24};

/// How stored bytes become those of the canonical order. Expects buffers of the right length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reorder {
    /// A matrix `[_, columns]` of elements of 2 or 4 bytes, whose transposed matrix has rows of `row_bytes` bytes, cut
    /// off where its last elements are not needed.
    Transposed {
        /// Columns of what is stored.
        columns: usize,
        /// Bytes of an element.
        size: usize,
        /// Bytes of a row of the canonical order.
        row_bytes: usize,
    },
    /// Rows that are filled up to `stored` bytes.
    FilledRows {
        /// Bytes of a row with the filling.
        stored: usize,
        /// Bytes of a row of the canonical order.
        row_bytes: usize,
    },
    /// 4-bit codes `[cols, rows / 8]` in 32-bit words, whose nibbles stand for the rows [`AWQ_ORDER`].
    AwqCodes {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// Zero points of a group in 32-bit words, `[groups, ceil(rows · bits / 32)]`.
    Zeros(ZeroPoints),
    /// Rows of codes, each as many whole codes to a 32-bit word as it has room for: `[_, ceil(cols / (32 / bits))]`.
    PaddedWords {
        /// Codes of a row.
        cols: usize,
        /// Bits of a code.
        bits: u32,
    },
    /// Zero points down the rows, likewise: `[ceil(rows / (32 / bits)), groups]`.
    PaddedDownRows {
        /// Rows of the matrix.
        rows: usize,
        /// Groups of a row.
        groups: usize,
        /// Bits of a zero point.
        bits: u32,
    },
    /// 2:4 metadata as a bit mask, `[_, ceil(cols / 8)]` bytes.
    Bitmask {
        /// Columns of the matrix.
        cols: usize,
    },
    /// Codes of the kernel `marlin-24`.
    Marlin24Codes(Marlin24),
    /// Its 2:4 metadata.
    Marlin24Index(Marlin24),
    /// Its scales of columns, 2 bytes each: transposed, and permuted.
    Marlin24Scales {
        /// Columns of what is stored.
        columns: usize,
        /// Bytes of a row of the canonical order.
        row_bytes: usize,
    },
}

/// How the zero points of a matrix are packed along its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ZeroPoints {
    /// Rows of the matrix.
    pub(crate) rows: usize,
    /// Groups of a row.
    pub(crate) groups: usize,
    /// Bits of a zero point.
    pub(crate) bits: u32,
    /// What the stored codes mean.
    pub(crate) kind: ZeroCodes,
}

/// What the stored codes of zero points mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ZeroCodes {
    /// Zero points in order.
    Plain,
    /// Zero points minus one in order. One is added to each field of a word of 2, 4 or 8 bits at once, so that a field
    /// that overflows carries into the next, and to each 3-bit value by itself: the inverse of how they were
    /// subtracted.
    MinusOne,
    /// Zero points in the order [`AWQ_ORDER`].
    Awq,
}

/// The row, of eight consecutive ones, that each nibble of a word stands for, lowest nibble first.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

const WORD: usize = 4;

impl Reorder {
    /// Canonical bytes from stored ones.
    pub(crate) fn decode(&self, stored: &[u8]) -> Vec<u8> {
        match *self {
            Self::Transposed { columns, size: 2, row_bytes } => transposed::<2>(stored, columns, row_bytes),
            Self::Transposed { columns, row_bytes, .. } => transposed::<4>(stored, columns, row_bytes),
            Self::FilledRows { stored: filled, row_bytes } => {
                stored.chunks_exact(filled).flat_map(|row| &row[..row_bytes]).copied().collect()
            }
            Self::AwqCodes { rows, cols } => awq_codes(stored, rows, cols),
            Self::Zeros(zeros) => zeros.decode(stored),
            Self::PaddedWords { cols, bits } => padded_words(stored, cols, bits),
            Self::PaddedDownRows { rows, groups, bits } => {
                // Rows of what is stored become rows of words.
                let words = rows.div_ceil(32 / bits as usize);
                let columns = padded_words(&transposed::<WORD>(stored, groups, words * WORD), rows, bits);
                let mut of_group = vec![0; rows];
                let mut codes = vec![0; rows * groups];
                for (group, column) in columns.chunks_exact((rows * bits as usize).div_ceil(8)).enumerate() {
                    bits::unpack(column, bits, &mut of_group);
                    codes.iter_mut().skip(group).step_by(groups).zip(&of_group).for_each(|(to, code)| *to = *code);
                }
                packed_rows(&codes, groups, bits)
            }
            Self::Bitmask { cols } => sparse::index_of_mask(stored, cols),
            Self::Marlin24Codes(layout) => layout.codes(stored),
            Self::Marlin24Index(layout) => layout.index(stored),
            Self::Marlin24Scales { columns, row_bytes } => {
                transposed::<2>(&sparse::scales_in_order(stored, 2), columns, row_bytes)
            }
        }
    }
}

/// The transposed matrix, a tile of cache lines at a time.
fn transposed<const SIZE: usize>(stored: &[u8], columns: usize, row_bytes: usize) -> Vec<u8> {
    const TILE: usize = 16;
    let elements = stored.as_chunks::<SIZE>().0;
    let mut canonical = vec![0; columns * row_bytes];
    let rows = row_bytes.div_ceil(SIZE);
    let whole = row_bytes / SIZE;
    for first in (0..columns).step_by(TILE) {
        let tile = first..(first + TILE).min(columns);
        for top in (0..rows).step_by(TILE) {
            for column in tile.clone() {
                let to = &mut canonical[column * row_bytes..][..row_bytes];
                for row in top..(top + TILE).min(whole) {
                    to[row * SIZE..][..SIZE].copy_from_slice(&elements[row * columns + column]);
                }
            }
        }
        if whole < rows {
            for column in tile {
                let rest = &mut canonical[column * row_bytes..][whole * SIZE..row_bytes];
                rest.copy_from_slice(&elements[whole * columns + column][..rest.len()]);
            }
        }
    }
    canonical
}

/// Words of AWQ side by side that are transposed at once, in vector registers.
const LANES: usize = 16;

/// Packs codes along columns that are stored along rows: squares of 8 × 8 nibbles, a tile of cache lines at a time.
fn awq_codes(stored: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    /// Squares below each other in a tile: a cache line of a row.
    const SQUARES: usize = 16;
    let (words, row_bytes) = (rows / 8, cols.div_ceil(2));
    let source = stored.as_chunks::<WORD>().0;
    let mut canonical = vec![0; rows * row_bytes];
    let mut tile = [[[0; WORD]; SQUARES]; LANES * 8];
    for first in (0..words).step_by(LANES) {
        let lanes = (words - first).min(LANES);
        for left in (0..cols).step_by(SQUARES * 8) {
            let width = (cols - left).min(SQUARES * 8);
            for (square, top) in (left..left + width).step_by(8).enumerate() {
                let mut lines = [[0; LANES]; 8];
                for (line, col) in lines.iter_mut().zip(top..cols) {
                    let from = &source[col * words + first..][..lanes];
                    line.iter_mut().zip(from).for_each(|(to, word)| *to = u32::from_le_bytes(*word));
                }
                transpose_nibbles(&mut lines);
                for (row, line) in AWQ_ORDER.into_iter().zip(&lines) {
                    for (lane, codes) in line.iter().enumerate() {
                        tile[lane * 8 + row][square] = codes.to_le_bytes();
                    }
                }
            }
            for (row, codes) in tile[..lanes * 8].iter().enumerate() {
                let bytes = width.div_ceil(2);
                let to = &mut canonical[(first * 8 + row) * row_bytes + left / 2..][..bytes];
                to.copy_from_slice(&codes.as_flattened()[..bytes]);
            }
        }
    }
    canonical
}

/// In each lane, nibble `j` of word `i` becomes nibble `i` of word `j`.
fn transpose_nibbles(words: &mut [[u32; LANES]; 8]) {
    for (distance, mask) in [(4, 0x0000_ffff), (2, 0x00ff_00ff), (1, 0x0f0f_0f0f)] {
        let shift = distance as u32 * 4;
        for first in (0..8).filter(|i| i & distance == 0) {
            let [low, high] = words.get_disjoint_mut([first, first + distance]).expect("two of eight words");
            for (low, high) in low.iter_mut().zip(high) {
                let swapped = (*low >> shift ^ *high) & mask;
                *low ^= swapped << shift;
                *high ^= swapped;
            }
        }
    }
}

/// Rows of codes in words that leave bits over, packed without.
fn padded_words(stored: &[u8], cols: usize, bits: u32) -> Vec<u8> {
    let in_word = 32 / bits as usize;
    let mut codes = Vec::with_capacity(stored.len() / WORD * in_word);
    for row in stored.chunks_exact(cols.div_ceil(in_word) * WORD) {
        let of_word = |word| (0..in_word).map(move |index| bits::get(word, index, bits));
        codes.extend(row.chunks_exact(WORD).flat_map(of_word).take(cols));
    }
    packed_rows(&codes, cols, bits)
}

/// Packs rows of so many codes.
pub(super) fn packed_rows(codes: &[u8], count: usize, bits: u32) -> Vec<u8> {
    let row_bytes = (count * bits as usize).div_ceil(8);
    let mut packed = vec![0; codes.len() / count * row_bytes];
    for (codes, packed) in codes.chunks_exact(count).zip(packed.chunks_exact_mut(row_bytes)) {
        bits::pack(codes, bits, packed);
    }
    packed
}

impl ZeroPoints {
    /// Zero points packed along the groups of a row.
    fn decode(&self, stored: &[u8]) -> Vec<u8> {
        let Self { rows, groups, bits, .. } = *self;
        let mut codes = vec![0; rows * groups];
        let mut of_group = vec![0; rows];
        for group in 0..groups {
            self.unpack(stored, group, &mut of_group);
            codes.iter_mut().skip(group).step_by(groups).zip(&of_group).for_each(|(to, code)| *to = *code);
        }
        packed_rows(&codes, groups, bits)
    }

    /// Whether every zero point is `value`.
    pub(crate) fn are_all(&self, value: u8, stored: &[u8]) -> bool {
        let mut of_group = vec![0; self.rows];
        (0..self.groups).all(|group| {
            self.unpack(stored, group, &mut of_group);
            of_group.iter().all(|zero| *zero == value)
        })
    }

    /// The zero points of a group, one a row.
    fn unpack(&self, stored: &[u8], group: usize, zeros: &mut [u8]) {
        let bytes = (self.rows * self.bits as usize).div_ceil(32) * WORD;
        let stored = &stored[group * bytes..][..bytes];
        match (self.kind, self.bits) {
            (ZeroCodes::Plain, bits) => bits::unpack(stored, bits, zeros),
            (ZeroCodes::MinusOne, 3) => {
                bits::unpack(stored, 3, zeros);
                zeros.iter_mut().for_each(|zero| *zero = (*zero + 1) & 7);
            }
            (ZeroCodes::MinusOne, bits) => {
                // One in each field.
                let ones = u32::MAX / ((1 << bits) - 1);
                let add = |word: &[u8; WORD]| u32::from_le_bytes(*word).wrapping_add(ones).to_le_bytes();
                let words: Vec<u8> = stored.as_chunks().0.iter().flat_map(add).collect();
                bits::unpack(&words, bits, zeros);
            }
            (ZeroCodes::Awq, bits) => {
                for (word, zeros) in stored.chunks_exact(WORD).zip(zeros.chunks_exact_mut(AWQ_ORDER.len())) {
                    for (slot, row) in AWQ_ORDER.into_iter().enumerate() {
                        zeros[row] = bits::get(word, slot, bits);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_cuts_rows_off() {
        // Two rows of three words: each column becomes a row of 5 of its 8 bytes.
        let stored: Vec<u8> = (0..24).collect();
        let form = Reorder::Transposed { columns: 3, size: 4, row_bytes: 5 };
        assert_eq!(form.decode(&stored), [0, 1, 2, 3, 12, 4, 5, 6, 7, 16, 8, 9, 10, 11, 20]);
        let form = Reorder::Transposed { columns: 4, size: 2, row_bytes: 6 };
        assert_eq!(
            form.decode(&stored),
            [0, 1, 8, 9, 16, 17, 2, 3, 10, 11, 18, 19, 4, 5, 12, 13, 20, 21, 6, 7, 14, 15, 22, 23]
        );
    }

    #[test]
    fn transposing_goes_beyond_a_tile() {
        let (rows, columns) = (37, 41);
        let words: Vec<u32> = (0..rows * columns).collect();
        let stored: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let form = Reorder::Transposed { columns: columns as usize, size: 4, row_bytes: rows as usize * 4 };
        let wanted: Vec<u8> =
            (0..columns).flat_map(|c| (0..rows).map(move |r| r * columns + c)).flat_map(u32::to_le_bytes).collect();
        assert_eq!(form.decode(&stored), wanted);
    }

    #[test]
    fn awq_codes_one_by_one() {
        let (rows, cols) = (24, 150);
        let code = |row: usize, col: usize| (row * 7 + col * 3 + row * col / 5) as u8 & 15;
        let mut stored = Vec::new();
        for col in 0..cols {
            for first in (0..rows).step_by(8) {
                let word = (0..8).map(|slot| u32::from(code(first + AWQ_ORDER[slot], col)) << (4 * slot));
                stored.extend(word.sum::<u32>().to_le_bytes());
            }
        }
        let canonical = Reorder::AwqCodes { rows, cols }.decode(&stored);
        for row in 0..rows {
            for col in 0..cols {
                assert_eq!(bits::get(&canonical[row * 75..], col, 4), code(row, col), "{row}, {col}");
            }
        }
    }

    #[test]
    fn one_is_added_to_words_or_to_values() {
        let zeros = |rows, bits, kind, stored: &[u8]| {
            let zeros = ZeroPoints { rows, groups: 1, bits, kind };
            let mut found = vec![0; rows];
            zeros.unpack(stored, 0, &mut found);
            found
        };
        // A zero point of 0 took 1 from its neighbour when it was stored.
        assert_eq!(zeros(4, 4, ZeroCodes::MinusOne, &[0x7f, 0x76, 0, 0]), [0, 9, 7, 8]);
        assert_eq!(zeros(4, 4, ZeroCodes::Plain, &[0x7f, 0x76, 0, 0]), [15, 7, 6, 7]);
        assert_eq!(zeros(4, 3, ZeroCodes::MinusOne, &[0b10_111_000, 0b0100, 0, 0]), [1, 0, 3, 3]);
        assert_eq!(zeros(8, 4, ZeroCodes::Awq, &[0x10, 0x32, 0x54, 0x76]), [0, 4, 1, 5, 2, 6, 3, 7]);
    }
}
