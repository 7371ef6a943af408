//! How each kind of code lies in a tile and becomes numbers.
//!
//! A *chunk* is 32 columns of as many rows as a vector has lanes, of which all have codes or two of every four (see
//! [`super::pattern`]). Quantised codes of a chunk form *quads*: quad `q` holds the codes `4q .. 4q + 4` of all rows, byte `4·row + j`
//! being code `4q + j`. Vector lanes are therefore rows, and no sum ever crosses lanes. A dense chunk has eight quads, a sparse one four.

use crate::cpu::simd::Simd;

/// Columns of a chunk.
pub(super) const CHUNK: usize = 32;

/// Codes that stand for small integers: `value = unpacked byte − offset`, where the offset belongs to the group.
pub(super) trait Codes: Send + Sync + 'static {
    /// Bytes of a row in eight quads.
    const ROW_BYTES: usize;
    /// Bytes of a row in four quads.
    const HALF_ROW_BYTES: usize = Self::ROW_BYTES / 2;
    /// Unpacked bytes are signed. If not, they are at most 32.
    const SIGNED: bool;
    /// Unpacked bytes are so small (at most 16, unsigned) that the dot product of 16 of them with int8 activations fits i16.
    const SMALL: bool = false;

    /// Puts four or eight quads, of `quad` bytes each, into tile order.
    fn pack(quads: &[u8], quad: usize, tile: &mut [u8]);

    /// Takes them back out of it: the inverse of [`Codes::pack`].
    fn restore(tile: &[u8], quad: usize, quads: &mut [u8]);

    /// The integers of so many quads, four or eight.
    fn unpack<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS];
}

/// Two quads a vector, the odd one in the high nibbles.
fn pack_nibbles(quads: &[u8], quad: usize, tile: &mut [u8]) {
    for (pair, bytes) in quads.chunks_exact(2 * quad).zip(tile.chunks_exact_mut(quad)) {
        let (even, odd) = pair.split_at(quad);
        for (byte, (low, high)) in bytes.iter_mut().zip(even.iter().zip(odd)) {
            *byte = low | high << 4;
        }
    }
}

/// The inverse of [`pack_nibbles`].
fn restore_nibbles(tile: &[u8], quad: usize, quads: &mut [u8]) {
    for (bytes, pair) in tile.chunks_exact(quad).zip(quads.chunks_exact_mut(2 * quad)) {
        let (even, odd) = pair.split_at_mut(quad);
        for (byte, (low, high)) in bytes.iter().zip(even.iter_mut().zip(odd)) {
            (*low, *high) = (byte & 0x0f, byte >> 4);
        }
    }
}

#[inline(always)]
fn unpack_nibbles<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
    let mut quads = [simd.bytes(tile); QUADS];
    let mut q = 0;
    while q < QUADS {
        let v = simd.bytes(&tile[2 * S::LANES * q..]);
        quads[q] = simd.bits(v, 0, 0x0f);
        quads[q + 1] = simd.bits(v, 4, 0x0f);
        q += 2;
    }
    quads
}

/// The entries of `table` that nibbles name.
#[inline(always)]
fn lookup_nibbles<S: Simd, const QUADS: usize>(simd: S, tile: &[u8], table: &[u8; 16]) -> [S::Bytes; QUADS] {
    let mut quads = unpack_nibbles(simd, tile);
    let mut q = 0;
    while q < QUADS {
        quads[q] = simd.lookup(table, quads[q]);
        q += 1;
    }
    quads
}

/// FP4: bytes are twice the value plus 12, so that all are integers from 0 to 24.
pub(super) struct E2M1;

impl E2M1 {
    /// What is added to a doubled value.
    pub(super) const OFFSET: i32 = 12;
    /// What undoes the doubling.
    pub(super) const FACTOR: f32 = 0.5;
    const TABLE: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
}

impl Codes for E2M1 {
    const ROW_BYTES: usize = 16;
    const SIGNED: bool = false;

    fn pack(quads: &[u8], quad: usize, tile: &mut [u8]) {
        pack_nibbles(quads, quad, tile);
    }

    fn restore(tile: &[u8], quad: usize, quads: &mut [u8]) {
        restore_nibbles(tile, quad, quads);
    }

    #[inline(always)]
    fn unpack<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
        lookup_nibbles(simd, tile, &Self::TABLE)
    }
}

/// IQ4_NL: a table of 16 signed integers.
pub(super) struct Iq4Nl;

impl Iq4Nl {
    /// `kvalues_iq4nl` of ggml, as bytes.
    const TABLE: [u8; 16] = {
        let values: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
        let mut table = [0; 16];
        let mut i = 0;
        while i < table.len() {
            table[i] = values[i] as u8;
            i += 1;
        }
        table
    };
}

impl Codes for Iq4Nl {
    const ROW_BYTES: usize = 16;
    const SIGNED: bool = true;

    fn pack(quads: &[u8], quad: usize, tile: &mut [u8]) {
        pack_nibbles(quads, quad, tile);
    }

    fn restore(tile: &[u8], quad: usize, quads: &mut [u8]) {
        restore_nibbles(tile, quad, quads);
    }

    #[inline(always)]
    fn unpack<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
        lookup_nibbles(simd, tile, &Self::TABLE)
    }
}

/// 4-bit integers.
pub(super) struct Int4;

impl Codes for Int4 {
    const ROW_BYTES: usize = 16;
    const SIGNED: bool = false;
    const SMALL: bool = true;

    fn pack(quads: &[u8], quad: usize, tile: &mut [u8]) {
        pack_nibbles(quads, quad, tile);
    }

    fn restore(tile: &[u8], quad: usize, quads: &mut [u8]) {
        restore_nibbles(tile, quad, quads);
    }

    #[inline(always)]
    fn unpack<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
        unpack_nibbles(simd, tile)
    }
}

/// The low two bits of the quads, four a vector.
pub(super) fn pack_pairs(quads: &[u8], quad: usize, tile: &mut [u8]) {
    for (four, bytes) in quads.chunks_exact(4 * quad).zip(tile.chunks_exact_mut(quad)) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (0..4).fold(0, |byte, q| byte | (four[q * quad + i] & 3) << (2 * q));
        }
    }
}

/// The inverse of [`pack_pairs`].
pub(super) fn restore_pairs(tile: &[u8], quad: usize, quads: &mut [u8]) {
    for (bytes, four) in tile.chunks_exact(quad).zip(quads.chunks_exact_mut(4 * quad)) {
        for (q, codes) in four.chunks_exact_mut(quad).enumerate() {
            codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> (2 * q) & 3);
        }
    }
}

#[inline(always)]
fn unpack_pairs<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
    let mut quads = [simd.bytes(tile); QUADS];
    let mut q = 0;
    while q < QUADS {
        let v = simd.bytes(&tile[S::LANES * q..]);
        quads[q] = simd.bits(v, 0, 3);
        quads[q + 1] = simd.bits(v, 2, 3);
        quads[q + 2] = simd.bits(v, 4, 3);
        quads[q + 3] = simd.bits(v, 6, 3);
        q += 4;
    }
    quads
}

/// 2-bit integers.
pub(super) struct Int2;

impl Codes for Int2 {
    const ROW_BYTES: usize = 8;
    const SIGNED: bool = false;
    const SMALL: bool = true;

    fn pack(quads: &[u8], quad: usize, tile: &mut [u8]) {
        pack_pairs(quads, quad, tile);
    }

    fn restore(tile: &[u8], quad: usize, quads: &mut [u8]) {
        restore_pairs(tile, quad, quads);
    }

    #[inline(always)]
    fn unpack<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
        unpack_pairs(simd, tile)
    }
}

/// 3-bit integers: two quads a vector. Of eight quads the last two have what three vectors leave: low bits at the top of the first two
/// vectors, high bits at the top of the third.
pub(super) struct Int3;

impl Codes for Int3 {
    const ROW_BYTES: usize = 12;
    /// The upper bits of both vectors stay unused.
    const HALF_ROW_BYTES: usize = 8;
    const SIGNED: bool = false;
    const SMALL: bool = true;

    fn pack(quads: &[u8], quad: usize, tile: &mut [u8]) {
        for (v, bytes) in tile.chunks_exact_mut(quad).enumerate() {
            for (i, byte) in bytes.iter_mut().enumerate() {
                let code = |q: usize| quads[q * quad + i];
                *byte = code(2 * v) | code(2 * v + 1) << 3;
                if quads.len() == 8 * quad {
                    *byte |= if v < 2 { code(6 + v) << 6 } else { (code(6) >> 2) << 6 | (code(7) >> 2) << 7 };
                }
            }
        }
    }

    fn restore(tile: &[u8], quad: usize, quads: &mut [u8]) {
        for (v, pair) in quads.chunks_exact_mut(2 * quad).enumerate() {
            let (even, odd) = pair.split_at_mut(quad);
            for i in 0..quad {
                let byte = |v: usize| tile[v * quad + i];
                (even[i], odd[i]) = match v {
                    3 => (byte(0) >> 6 | byte(2) >> 4 & 4, byte(1) >> 6 | byte(2) >> 5 & 4),
                    _ => (byte(v) & 7, byte(v) >> 3 & 7),
                };
            }
        }
    }

    #[inline(always)]
    fn unpack<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
        let mut vectors = [simd.bytes(tile); 3];
        let mut quads = [vectors[0]; QUADS];
        let mut q = 0;
        while q < QUADS && q < 6 {
            let v = simd.bytes(&tile[2 * S::LANES * q..]);
            quads[q] = simd.bits(v, 0, 7);
            quads[q + 1] = simd.bits(v, 3, 7);
            vectors[q / 2] = v;
            q += 2;
        }
        if QUADS == 8 {
            quads[6] = simd.or(simd.bits(vectors[0], 6, 3), simd.bits(vectors[2], 4, 4));
            quads[7] = simd.or(simd.bits(vectors[1], 6, 3), simd.bits(vectors[2], 5, 4));
        }
        quads
    }
}

/// One bit of each quad: bit `q` of a byte belongs to quad `q`.
fn pack_bits(quads: &[u8], quad: usize, bit: u32, tile: &mut [u8]) {
    for (i, byte) in tile.iter_mut().enumerate() {
        *byte = quads.chunks_exact(quad).rev().fold(0, |byte, quad| byte << 1 | (quad[i] >> bit & 1));
    }
}

/// The inverse of [`pack_bits`]: adds the bit to quads that have the others.
fn restore_bits(tile: &[u8], quad: usize, bit: u32, quads: &mut [u8]) {
    for (q, codes) in quads.chunks_exact_mut(quad).enumerate() {
        codes.iter_mut().zip(tile).for_each(|(code, byte)| *code |= (byte >> q & 1) << bit);
    }
}

/// Adds bits packed by [`pack_bits`] to quads.
#[inline(always)]
fn add_bits<S: Simd, const QUADS: usize>(simd: S, quads: &mut [S::Bytes; QUADS], bit: u32, tile: &[u8]) {
    let bits = simd.bytes(tile);
    let mut q = 0;
    while q < QUADS {
        quads[q] = simd.or(quads[q], simd.shift_left(simd.bits(bits, q as u32, 1), bit));
        q += 1;
    }
}

/// 5-bit integers: the low four bits as in [`Int4`], then one vector whose bit `q` belongs to quad `q`.
pub(super) struct Int5;

impl Codes for Int5 {
    const ROW_BYTES: usize = 20;
    /// The upper half of the last vector's bits stays unused.
    const HALF_ROW_BYTES: usize = 12;
    const SIGNED: bool = false;

    fn pack(quads: &[u8], quad: usize, tile: &mut [u8]) {
        let (low, high) = tile.split_at_mut(quads.len() / 2);
        pack_nibbles(&low_nibbles(quads), quad, low);
        pack_bits(quads, quad, 4, high);
    }

    fn restore(tile: &[u8], quad: usize, quads: &mut [u8]) {
        let (low, high) = tile.split_at(quads.len() / 2);
        restore_nibbles(low, quad, quads);
        restore_bits(high, quad, 4, quads);
    }

    #[inline(always)]
    fn unpack<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
        let mut quads = unpack_nibbles(simd, tile);
        add_bits(simd, &mut quads, 4, &tile[2 * S::LANES * QUADS..]);
        quads
    }
}

/// 6-bit integers: the low four bits as in [`Int4`], then the others as in [`Int2`].
pub(super) struct Int6;

impl Codes for Int6 {
    const ROW_BYTES: usize = 24;
    /// As bytes they are the same signed, and too large for unsigned ones.
    const SIGNED: bool = true;

    fn pack(quads: &[u8], quad: usize, tile: &mut [u8]) {
        let (low, high) = tile.split_at_mut(quads.len() / 2);
        pack_nibbles(&low_nibbles(quads), quad, low);
        let high_pairs: Vec<u8> = quads.iter().map(|code| code >> 4).collect();
        pack_pairs(&high_pairs, quad, high);
    }

    fn restore(tile: &[u8], quad: usize, quads: &mut [u8]) {
        let (low, high) = tile.split_at(quads.len() / 2);
        let mut high_pairs = vec![0; quads.len()];
        restore_pairs(high, quad, &mut high_pairs);
        restore_nibbles(low, quad, quads);
        quads.iter_mut().zip(high_pairs).for_each(|(code, high)| *code |= high << 4);
    }

    #[inline(always)]
    fn unpack<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
        let mut quads = unpack_nibbles::<S, QUADS>(simd, tile);
        let high = unpack_pairs::<S, QUADS>(simd, &tile[2 * S::LANES * QUADS..]);
        let mut q = 0;
        while q < QUADS {
            quads[q] = simd.or(quads[q], simd.shift_left(high[q], 4));
            q += 1;
        }
        quads
    }
}

fn low_nibbles(codes: &[u8]) -> Vec<u8> {
    codes.iter().map(|code| code & 0x0f).collect()
}

/// Integers of 7 or 8 bits: bytes are the code minus 128, signed.
pub(super) struct Int8;

impl Int8 {
    /// What is added to a code.
    pub(super) const OFFSET: i32 = -128;
}

impl Codes for Int8 {
    const ROW_BYTES: usize = 32;
    const SIGNED: bool = true;

    fn pack(quads: &[u8], _: usize, tile: &mut [u8]) {
        for (byte, code) in tile.iter_mut().zip(quads) {
            *byte = code ^ 0x80;
        }
    }

    fn restore(tile: &[u8], _: usize, quads: &mut [u8]) {
        for (code, byte) in quads.iter_mut().zip(tile) {
            *code = byte ^ 0x80;
        }
    }

    #[inline(always)]
    fn unpack<S: Simd, const QUADS: usize>(simd: S, tile: &[u8]) -> [S::Bytes; QUADS] {
        let mut quads = [simd.bytes(tile); QUADS];
        let mut q = 1;
        while q < QUADS {
            quads[q] = simd.bytes(&tile[4 * S::LANES * q..]);
            q += 1;
        }
        quads
    }
}

/// Codes that are floats. A chunk is `[codes of a row, rows]`, so that code `k` of every row is one vector.
pub(super) trait Floats: Send + Sync + 'static {
    /// Bytes of a code.
    const BYTES: usize;

    /// Code `k` of each row, [`E4M3`] over its factor.
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32;
}

pub(super) struct E4M3;

impl E4M3 {
    /// What loading leaves out.
    pub(super) const FACTOR: f32 = 256.0;
}

pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct F32;

impl Floats for E4M3 {
    const BYTES: usize = 1;
    #[inline(always)]
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32 {
        simd.load_e4m3_over_256(&tile[S::LANES * k..])
    }
}

impl Floats for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32 {
        simd.load_le_f16(&tile[2 * S::LANES * k..])
    }
}

impl Floats for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32 {
        simd.load_le_bf16(&tile[2 * S::LANES * k..])
    }
}

impl Floats for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32 {
        simd.load_le_f32(&tile[4 * S::LANES * k..])
    }
}
