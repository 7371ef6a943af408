//! The forms in which layouts store the buffers of a packed matrix.

use std::borrow::Cow;

use marlin_format::bits;

use super::reorder::Reorder;

/// How stored bytes relate to those of the canonical order. Both directions expect buffers of the right length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As they are.
    Same,
    /// Every row is filled up to whole 32-bit words.
    Words {
        /// Bytes of a row without the filling.
        row_bytes: usize,
    },
    /// Bytes in two's complement, where the canonical code is the value plus 128.
    TwosComplement,
    /// Zero points of `bits` bits packed down the rows into 32-bit words `[ceil(rows · bits / 32), groups]`, where the
    /// canonical order packs them along the groups of a row.
    DownRows {
        /// Rows of zero points.
        rows: usize,
        /// Zero points of a row.
        groups: usize,
        /// Bits of a zero point.
        bits: u32,
    },
    /// The inverse of an f32.
    Inverse,
    /// In the order of another package, which is only read.
    Reordered(Reorder),
}

const WORD: usize = 4;

impl Form {
    /// Canonical bytes from stored ones.
    pub(crate) fn decode<'b>(&self, stored: &'b [u8]) -> Cow<'b, [u8]> {
        match *self {
            Self::Words { row_bytes } if row_bytes % WORD != 0 => {
                let rows = stored.chunks_exact(row_bytes.next_multiple_of(WORD));
                rows.flat_map(|row| &row[..row_bytes]).copied().collect()
            }
            Self::Same | Self::Words { .. } => Cow::Borrowed(stored),
            Self::TwosComplement => flip_signs(stored),
            Self::DownRows { rows, groups, bits } => {
                let mut codes = vec![0; rows * groups];
                let (mut stream, mut column) = (vec![0; column_bytes(rows, bits)], vec![0; rows]);
                for group in 0..groups {
                    for (word, bytes) in stream.chunks_exact_mut(WORD).enumerate() {
                        bytes.copy_from_slice(&stored[(word * groups + group) * WORD..][..WORD]);
                    }
                    bits::unpack(&stream, bits, &mut column);
                    codes.iter_mut().skip(group).step_by(groups).zip(&column).for_each(|(to, code)| *to = *code);
                }
                let row_bytes = (groups * bits as usize).div_ceil(8);
                let mut packed = vec![0; rows * row_bytes];
                for (codes, packed) in codes.chunks_exact(groups).zip(packed.chunks_exact_mut(row_bytes)) {
                    bits::pack(codes, bits, packed);
                }
                Cow::Owned(packed)
            }
            Self::Inverse => inverse(stored),
            Self::Reordered(order) => Cow::Owned(order.decode(stored)),
        }
    }

    /// Stored bytes from canonical ones.
    pub(crate) fn encode<'b>(&self, canonical: &'b [u8]) -> Cow<'b, [u8]> {
        match *self {
            Self::Words { row_bytes } if row_bytes % WORD != 0 => {
                let filled = row_bytes.next_multiple_of(WORD);
                let mut stored = vec![0; canonical.len() / row_bytes * filled];
                for (row, to) in canonical.chunks_exact(row_bytes).zip(stored.chunks_exact_mut(filled)) {
                    to[..row_bytes].copy_from_slice(row);
                }
                Cow::Owned(stored)
            }
            Self::Same | Self::Words { .. } => Cow::Borrowed(canonical),
            Self::TwosComplement => flip_signs(canonical),
            Self::DownRows { rows, groups, bits } => {
                let row_bytes = (groups * bits as usize).div_ceil(8);
                let mut codes = vec![0; rows * groups];
                for (codes, packed) in codes.chunks_exact_mut(groups).zip(canonical.chunks_exact(row_bytes)) {
                    bits::unpack(packed, bits, codes);
                }
                let mut stream = vec![0; column_bytes(rows, bits)];
                let mut stored = vec![0; stream.len() * groups];
                for group in 0..groups {
                    let column: Vec<u8> = codes.iter().skip(group).step_by(groups).copied().collect();
                    bits::pack(&column, bits, &mut stream);
                    for (word, bytes) in stream.chunks_exact(WORD).enumerate() {
                        stored[(word * groups + group) * WORD..][..WORD].copy_from_slice(bytes);
                    }
                }
                Cow::Owned(stored)
            }
            Self::Inverse => inverse(canonical),
            Self::Reordered(order) => unreachable!("no layout that is written has {order:?}"),
        }
    }
}

/// Bytes of a column of codes in whole words.
fn column_bytes(rows: usize, bits: u32) -> usize {
    (rows * bits as usize).div_ceil(32) * WORD
}

/// Adds or subtracts 128, which is the same in a byte.
fn flip_signs<'b>(bytes: &[u8]) -> Cow<'b, [u8]> {
    bytes.iter().map(|byte| byte ^ 0x80).collect()
}

fn inverse<'b>(bytes: &[u8]) -> Cow<'b, [u8]> {
    bytes.as_chunks::<4>().0.iter().flat_map(|&bytes| (1.0 / f32::from_le_bytes(bytes)).to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_undone() {
        let bytes: Vec<u8> = (0..60u8).map(|i| i.wrapping_mul(37)).collect();
        for form in [Form::Same, Form::Words { row_bytes: 4 }, Form::Words { row_bytes: 5 }, Form::TwosComplement] {
            assert_eq!(*form.decode(&form.encode(&bytes)), *bytes, "{form:?}");
        }
        assert!(matches!(Form::Words { row_bytes: 12 }.decode(&bytes), Cow::Borrowed(_)));
        assert_eq!(*Form::Words { row_bytes: 3 }.encode(&[1, 2, 3, 4, 5, 6]), [1, 2, 3, 0, 4, 5, 6, 0]);
        assert_eq!(*Form::TwosComplement.encode(&[0, 127, 128, 255]), [0x80, 0xff, 0, 127]);
        assert_eq!(*Form::Inverse.encode(&4f32.to_le_bytes()), 0.25f32.to_le_bytes());
    }

    #[test]
    fn zero_points_down_the_rows() {
        // Nine rows of three 4-bit codes: the ninth row begins the second word of each column.
        let form = Form::DownRows { rows: 9, groups: 3, bits: 4 };
        let canonical: Vec<u8> = (0..9u8).flat_map(|row| [row | 0xa0, 0x0c]).collect();
        let stored = form.encode(&canonical);
        assert_eq!(stored.len(), 2 * 3 * 4);
        assert_eq!(stored[..4], 0x7654_3210u32.to_le_bytes());
        assert_eq!(stored[4..8], 0xaaaa_aaaau32.to_le_bytes());
        assert_eq!(stored[12..16], 8u32.to_le_bytes());
        assert_eq!(*form.decode(&stored), *canonical);
        for bits in 2..=8 {
            let form = Form::DownRows { rows: 13, groups: 5, bits };
            let codes: Vec<u8> = (0..65u8).map(|i| i.wrapping_mul(91) >> (8 - bits)).collect();
            let row_bytes = (5 * bits as usize).div_ceil(8);
            let mut canonical = vec![0; 13 * row_bytes];
            for (codes, row) in codes.chunks(5).zip(canonical.chunks_mut(row_bytes)) {
                bits::pack(codes, bits, row);
            }
            assert_eq!(*form.decode(&form.encode(&canonical)), *canonical, "{bits} bits");
        }
    }
}
