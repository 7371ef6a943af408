//! Blocks of weights: taken apart, decoded, and packed.
//!
//! The layouts are those of `block_q4_0` and so on in ggml (ggml-common.h); values are what `gguf.quants.dequantize` of
//! the Python package `gguf` gives. Numbers are little endian.

use half::f16;
use marlin_format::{FormatError, PackedMatrix, ScaleKind, ZeroKind, bits};

use super::GgufType;

/// Weights of the largest block.
const MOST_WEIGHTS: usize = 256;
/// Inner scales of the block that has most of them.
const MOST_SCALES: usize = 16;

/// Where the fields of a block stand, in bytes from its beginning.
struct Fields {
    /// The low bits of all codes.
    low: Codes,
    /// The high bits, if they are a field of their own.
    high: Option<Codes>,
    /// The scale: an f16, or the one byte of an E8M0.
    scale: usize,
    /// The f16 that is added, or that inner minima are multiplied with.
    minimum: Option<usize>,
    /// Integer scales of parts of the block, and integer minima.
    inner: Option<(usize, Inner)>,
}

/// A field of `width` bits of each code.
///
/// Its bytes come in runs. The lowest bits of the bytes of a run belong to the first codes, the next bits to the codes
/// that follow those, and so on: `run · 8 / width` codes.
#[derive(Clone, Copy)]
struct Codes {
    at: usize,
    bytes: usize,
    run: usize,
    width: usize,
}

/// How inner scales are stored.
#[derive(Clone, Copy)]
enum Inner {
    /// 16 bytes: a scale in the low bits, a minimum in the high bits.
    Nibbles,
    /// 12 bytes: eight scales and eight minima of 6 bits ([`six_bit_pair`]).
    SixBitPairs,
    /// 12 bytes: sixteen scales of 6 bits with 32 added. Eight bytes hold low halves, four bytes high quarters, in the
    /// order of [`Codes`].
    SixBit,
    /// 16 bytes in two's complement.
    Bytes,
}

/// A block taken apart. Codes, inner scales and inner minima are those that the scheme of its type stores, one a byte.
struct Block<'b> {
    codes: [u8; MOST_WEIGHTS],
    scale: &'b [u8],
    minimum: Option<&'b [u8]>,
    inner_scales: [u8; MOST_SCALES],
    inner_minima: [u8; MOST_SCALES],
}

impl GgufType {
    /// The layout of a block; `None` for plain floats.
    fn fields(self) -> Option<Fields> {
        let codes = |at, bytes, run, width| Codes { at, bytes, run, width };
        let one_level = |low, high, minimum| Fields { low, high, scale: 0, minimum, inner: None };
        Some(match self {
            Self::F32 | Self::F16 | Self::Bf16 => return None,
            // d, 16 bytes of codes
            Self::Q4_0 | Self::Iq4Nl => one_level(codes(2, 16, 16, 4), None, None),
            // d, m, 16 bytes of codes
            Self::Q4_1 => one_level(codes(4, 16, 16, 4), None, Some(2)),
            // d, 4 bytes of fifth bits, 16 bytes of the others
            Self::Q5_0 => one_level(codes(6, 16, 16, 4), Some(codes(2, 4, 1, 1)), None),
            // d, m, 4 bytes of fifth bits, 16 bytes of the others
            Self::Q5_1 => one_level(codes(8, 16, 16, 4), Some(codes(4, 4, 1, 1)), Some(2)),
            // d, 32 bytes of codes
            Self::Q8_0 => one_level(codes(2, 32, 32, 8), None, None),
            // e, 16 bytes of codes
            Self::Mxfp4 => one_level(codes(1, 16, 16, 4), None, None),
            // 16 bytes of inner scales, 64 bytes of codes, d, dmin
            Self::Q2K => Fields {
                low: codes(16, 64, 32, 2),
                high: None,
                scale: 80,
                minimum: Some(82),
                inner: Some((0, Inner::Nibbles)),
            },
            // 32 bytes of third bits, 64 bytes of the others, 12 bytes of inner scales, d
            Self::Q3K => Fields {
                low: codes(32, 64, 32, 2),
                high: Some(codes(0, 32, 32, 1)),
                scale: 108,
                minimum: None,
                inner: Some((96, Inner::SixBit)),
            },
            // d, dmin, 12 bytes of inner scales, 128 bytes of codes
            Self::Q4K => Fields {
                low: codes(16, 128, 32, 4),
                high: None,
                scale: 0,
                minimum: Some(2),
                inner: Some((4, Inner::SixBitPairs)),
            },
            // d, dmin, 12 bytes of inner scales, 32 bytes of fifth bits, 128 bytes of the others
            Self::Q5K => Fields {
                low: codes(48, 128, 32, 4),
                high: Some(codes(16, 32, 32, 1)),
                scale: 0,
                minimum: Some(2),
                inner: Some((4, Inner::SixBitPairs)),
            },
            // 128 bytes of low halves, 64 bytes of high quarters, 16 bytes of inner scales, d
            Self::Q6K => Fields {
                low: codes(0, 128, 64, 4),
                high: Some(codes(128, 64, 32, 2)),
                scale: 208,
                minimum: None,
                inner: Some((192, Inner::Bytes)),
            },
        })
    }

    /// Decodes blocks that follow each other: as many weights as they hold, each operation rounded to f32 in the order
    /// in which `gguf.quants.dequantize` does.
    ///
    /// # Panics
    /// `bytes` are no whole blocks, or `weights` has another length than they hold.
    pub fn dequantize(self, bytes: &[u8], weights: &mut [f32]) {
        assert!(bytes.len().is_multiple_of(self.block_bytes()), "{} bytes of {self}", bytes.len());
        assert_eq!(weights.len(), bytes.len() / self.block_bytes() * self.block_weights(), "weights of {self}");
        let blocks = bytes.chunks_exact(self.block_bytes());
        match self.fields() {
            Some(fields) => {
                let weights = weights.chunks_exact_mut(self.block_weights());
                blocks.zip(weights).for_each(|(block, weights)| self.dequantize_block(&fields, block, weights));
            }
            None => {
                let element = self.scheme().element;
                let code = |bytes: &[u8]| bytes.iter().rev().fold(0, |code, byte| code << 8 | u32::from(*byte));
                blocks.zip(weights).for_each(|(block, weight)| *weight = element.value(code(block)));
            }
        }
    }

    /// [`GgufType::dequantize`] into a vector of as many weights as the bytes hold.
    pub(super) fn values(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / self.block_bytes() * self.block_weights()];
        self.dequantize(bytes, &mut values);
        values
    }

    fn dequantize_block(self, fields: &Fields, block: &[u8], weights: &mut [f32]) {
        let scheme = self.scheme();
        let values = scheme.element.values();
        let block = self.take_apart(fields, block);
        let minimum = block.minimum.map_or(0.0, read_f16);
        let groups = weights.chunks_exact_mut(scheme.group_cols(MOST_WEIGHTS));
        for ((group, weights), codes) in groups.enumerate().zip(block.codes.chunks(scheme.group_cols(MOST_WEIGHTS))) {
            let scale = match scheme.scale {
                ScaleKind::TwoLevel { bits, signed, .. } => {
                    read_f16(block.scale) * integer(block.inner_scales[group], bits, signed)
                }
                // Half of what OCP says, by which ggml multiplies doubled values.
                ScaleKind::E8M0 => half_e8m0(block.scale[0]),
                _ => read_f16(block.scale),
            };
            for (weight, &code) in weights.iter_mut().zip(codes) {
                let value = values[usize::from(code)];
                *weight = match scheme.zero {
                    ZeroKind::TwoLevelMin { bits } => {
                        scale * value - minimum * integer(block.inner_minima[group], bits, false)
                    }
                    ZeroKind::F16Bias => scale * value + minimum,
                    // Doubled values are integers, which know no negative zero.
                    _ if self == Self::Mxfp4 => scale * (2.0 * value + 0.0),
                    _ => scale * value,
                };
            }
        }
    }

    /// Packs the blocks of a matrix in the scheme of this type, without loss; plain floats are borrowed.
    ///
    /// What the scheme means differs from [`GgufType::dequantize`] in one thing: zeros that ggml computes as negative
    /// may be positive and the other way round.
    ///
    /// # Errors
    /// A shape that holds no weights, or a scale that is no finite number (of MXFP4 the exponent 255, which OCP
    /// Microscaling reserves for what is not a number and ggml reads as 2^128).
    pub(super) fn pack(self, bytes: &[u8], rows: usize, cols: usize) -> Result<PackedMatrix<'_>, FormatError> {
        let scheme = self.scheme();
        let Some(fields) = self.fields() else { return PackedMatrix::from_dense_bytes(scheme, rows, cols, bytes) };
        let inner = self.block_weights() / scheme.group_cols(cols);
        let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
        let (mut super_scales, mut super_minima) = (Vec::new(), Vec::new());
        // Rows are whole blocks, and a block's part of every buffer is whole bytes, so that it follows that of the
        // block before.
        for block in bytes.chunks_exact(self.block_bytes()) {
            let block = self.take_apart(&fields, block);
            append(&block.codes[..self.block_weights()], scheme.element.bits(), &mut codes);
            match scheme.scale {
                ScaleKind::TwoLevel { bits, .. } => {
                    append(&block.inner_scales[..inner], u32::from(bits), &mut scales);
                    super_scales.extend_from_slice(block.scale);
                }
                _ => scales.extend_from_slice(block.scale),
            }
            match (scheme.zero, block.minimum) {
                (ZeroKind::TwoLevelMin { bits }, Some(minimum)) => {
                    append(&block.inner_minima[..inner], u32::from(bits), &mut zeros);
                    super_minima.extend_from_slice(minimum);
                }
                (_, minimum) => zeros.extend_from_slice(minimum.unwrap_or_default()),
            }
        }
        super_scales.append(&mut super_minima);
        let matrix = PackedMatrix {
            codes: codes.into(),
            scales: scales.into(),
            zeros: zeros.into(),
            globals: super_scales.into(),
            ..PackedMatrix::empty(scheme, rows, cols)
        };
        matrix.validate()?;
        Ok(matrix)
    }

    fn take_apart<'b>(self, fields: &Fields, block: &'b [u8]) -> Block<'b> {
        let mut codes = [0; MOST_WEIGHTS];
        fields.low.unpack(block, 0, &mut codes);
        if let Some(high) = fields.high {
            high.unpack(block, fields.low.width, &mut codes);
        }
        if self == Self::Q8_0 {
            // Two's complement; the canonical code is the value plus 128.
            codes.iter_mut().for_each(|code| *code ^= 0x80);
        }
        let (inner_scales, inner_minima) = match fields.inner {
            Some((at, inner)) => inner.unpack(&block[at..]),
            None => Default::default(),
        };
        let scale_bytes = if self.scheme().scale == ScaleKind::E8M0 { 1 } else { 2 };
        Block {
            codes,
            scale: &block[fields.scale..][..scale_bytes],
            minimum: fields.minimum.map(|at| &block[at..][..2]),
            inner_scales,
            inner_minima,
        }
    }
}

impl Codes {
    /// Adds the bits of this field to codes, shifted to the left.
    fn unpack(self, block: &[u8], shift: usize, codes: &mut [u8]) {
        let Self { at, bytes, run, width } = self;
        let runs = block[at..][..bytes].chunks_exact(run);
        for (bytes, codes) in runs.zip(codes.chunks_mut(run * 8 / width)) {
            for (plane, codes) in codes.chunks_mut(run).enumerate() {
                for (code, byte) in codes.iter_mut().zip(bytes) {
                    *code |= (byte >> (plane * width) & (0xff >> (8 - width))) << shift;
                }
            }
        }
    }
}

impl Inner {
    /// Inner scales and inner minima from the bytes that begin with them.
    fn unpack(self, bytes: &[u8]) -> ([u8; MOST_SCALES], [u8; MOST_SCALES]) {
        let (mut scales, mut minima) = ([0; MOST_SCALES], [0; MOST_SCALES]);
        match self {
            Self::Nibbles => {
                for ((scale, minimum), byte) in scales.iter_mut().zip(&mut minima).zip(bytes) {
                    (*scale, *minimum) = (byte & 15, byte >> 4);
                }
            }
            Self::SixBitPairs => {
                for (index, (scale, minimum)) in scales.iter_mut().zip(&mut minima).take(8).enumerate() {
                    (*scale, *minimum) = six_bit_pair(bytes, index);
                }
            }
            Self::SixBit => {
                Codes { at: 0, bytes: 8, run: 8, width: 4 }.unpack(bytes, 0, &mut scales);
                Codes { at: 8, bytes: 4, run: 4, width: 2 }.unpack(bytes, 4, &mut scales);
                // To two's complement of 6 bits.
                scales.iter_mut().for_each(|scale| *scale ^= 0x20);
            }
            Self::Bytes => scales.copy_from_slice(&bytes[..MOST_SCALES]),
        }
        (scales, minima)
    }
}

/// Scale and minimum number `index` of eight. Bytes 0 to 3 hold the first four scales and bytes 4 to 7 the first four
/// minima in their low six bits; bytes 8 to 11 hold the low halves of the other scales and, in the high bits, minima,
/// whose highest two bits are those left over in bytes 0 to 7.
fn six_bit_pair(bytes: &[u8], index: usize) -> (u8, u8) {
    let low = index % 4;
    if index < 4 {
        (bytes[low] & 63, bytes[4 + low] & 63)
    } else {
        (bytes[8 + low] & 15 | bytes[low] >> 6 << 4, bytes[8 + low] >> 4 | bytes[4 + low] >> 6 << 4)
    }
}

/// The integer that `bits` bits stand for.
fn integer(code: u8, bits: u8, signed: bool) -> f32 {
    let offset = if signed && code >> (bits - 1) == 1 { 1 << bits } else { 0 };
    (i32::from(code) - offset) as f32
}

fn read_f16(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// 2^(code − 128), of which the two smallest are subnormal in f32.
fn half_e8m0(code: u8) -> f32 {
    match code {
        0 | 1 => f32::from_bits(0x0020_0000 << code),
        _ => f32::from_bits((u32::from(code) - 1) << 23),
    }
}

/// Packs codes behind those that are there.
fn append(codes: &[u8], width: u32, packed: &mut Vec<u8>) {
    let start = packed.len();
    packed.resize(start + codes.len() * width as usize / 8, 0);
    bits::pack(codes, width, &mut packed[start..]);
}
