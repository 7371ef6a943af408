//! How each kind of code lies in a tile and becomes numbers.
//!
//! A *chunk* is 8 rows × 32 columns. Quantised codes of a chunk form eight *quads*: quad `q` holds columns `4q .. 4q + 4`
//! of all rows, byte `4·row + j` being column `4q + j`. Vector lanes are therefore rows, and no sum ever crosses lanes.

use crate::cpu::simd::Simd;

/// Rows of a panel, one a vector lane.
pub(super) const LANES: usize = 8;
/// Columns of a chunk.
pub(super) const CHUNK: usize = 32;

/// The quads of a chunk, one code a byte.
pub(super) type Quads = [[u8; 4 * LANES]; CHUNK / 4];

/// Codes that stand for small integers: `value = unpacked byte − offset`, where the offset belongs to the group.
pub(super) trait Codes: Send + Sync + 'static {
    /// Bytes of a chunk.
    const CHUNK_BYTES: usize;
    /// Unpacked bytes are signed. If not, they are at most 32.
    const SIGNED: bool;

    /// Puts the codes of a chunk into tile order.
    fn pack(quads: &Quads, tile: &mut [u8]);

    /// The integers of a chunk, quad by quad.
    fn unpack<S: Simd>(simd: S, tile: &[u8]) -> [S::Bytes; 8];
}

/// Two quads a vector, the odd one in the high nibbles.
fn pack_nibbles(quads: &Quads, tile: &mut [u8]) {
    for (pair, bytes) in quads.chunks_exact(2).zip(tile.chunks_exact_mut(32)) {
        for (byte, (low, high)) in bytes.iter_mut().zip(pair[0].iter().zip(&pair[1])) {
            *byte = low | high << 4;
        }
    }
}

#[inline(always)]
fn unpack_nibbles<S: Simd>(simd: S, tile: &[u8]) -> [S::Bytes; 8] {
    let load = [array(tile, 0), array(tile, 32), array(tile, 64), array(tile, 96)];
    let v = [simd.bytes(load[0]), simd.bytes(load[1]), simd.bytes(load[2]), simd.bytes(load[3])];
    [
        simd.bits(v[0], 0, 0x0f),
        simd.bits(v[0], 4, 0x0f),
        simd.bits(v[1], 0, 0x0f),
        simd.bits(v[1], 4, 0x0f),
        simd.bits(v[2], 0, 0x0f),
        simd.bits(v[2], 4, 0x0f),
        simd.bits(v[3], 0, 0x0f),
        simd.bits(v[3], 4, 0x0f),
    ]
}

/// The entries of `table` that the nibbles of a chunk name.
#[inline(always)]
fn lookup_nibbles<S: Simd>(simd: S, tile: &[u8], table: &[u8; 16]) -> [S::Bytes; 8] {
    let mut quads = unpack_nibbles(simd, tile);
    let mut q = 0;
    while q < 8 {
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
    const CHUNK_BYTES: usize = 128;
    const SIGNED: bool = false;

    fn pack(quads: &Quads, tile: &mut [u8]) {
        pack_nibbles(quads, tile);
    }

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, tile: &[u8]) -> [S::Bytes; 8] {
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
    const CHUNK_BYTES: usize = 128;
    const SIGNED: bool = true;

    fn pack(quads: &Quads, tile: &mut [u8]) {
        pack_nibbles(quads, tile);
    }

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, tile: &[u8]) -> [S::Bytes; 8] {
        lookup_nibbles(simd, tile, &Self::TABLE)
    }
}

/// 4-bit integers.
pub(super) struct Int4;

impl Codes for Int4 {
    const CHUNK_BYTES: usize = 128;
    const SIGNED: bool = false;

    fn pack(quads: &Quads, tile: &mut [u8]) {
        pack_nibbles(quads, tile);
    }

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, tile: &[u8]) -> [S::Bytes; 8] {
        unpack_nibbles(simd, tile)
    }
}

/// The low two bits of the quads, four a vector.
fn pack_pairs(quads: &Quads, tile: &mut [u8]) {
    for (four, bytes) in quads.chunks_exact(4).zip(tile.chunks_exact_mut(32)) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (0..4).fold(0, |byte, q| byte | (four[q][i] & 3) << (2 * q));
        }
    }
}

#[inline(always)]
fn unpack_pairs<S: Simd>(simd: S, tile: &[u8]) -> [S::Bytes; 8] {
    let (low, high) = (simd.bytes(array(tile, 0)), simd.bytes(array(tile, 32)));
    [
        simd.bits(low, 0, 3),
        simd.bits(low, 2, 3),
        simd.bits(low, 4, 3),
        simd.bits(low, 6, 3),
        simd.bits(high, 0, 3),
        simd.bits(high, 2, 3),
        simd.bits(high, 4, 3),
        simd.bits(high, 6, 3),
    ]
}

/// 2-bit integers.
pub(super) struct Int2;

impl Codes for Int2 {
    const CHUNK_BYTES: usize = 64;
    const SIGNED: bool = false;

    fn pack(quads: &Quads, tile: &mut [u8]) {
        pack_pairs(quads, tile);
    }

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, tile: &[u8]) -> [S::Bytes; 8] {
        unpack_pairs(simd, tile)
    }
}

/// 3-bit integers: the low two bits as in [`Int2`], then one vector whose bit `q` belongs to quad `q`.
pub(super) struct Int3;

impl Codes for Int3 {
    const CHUNK_BYTES: usize = 96;
    const SIGNED: bool = false;

    fn pack(quads: &Quads, tile: &mut [u8]) {
        pack_pairs(quads, tile);
        for (i, byte) in tile[64..].iter_mut().enumerate() {
            *byte = (0..8).fold(0, |byte, q| byte | (quads[q][i] >> 2 & 1) << q);
        }
    }

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, tile: &[u8]) -> [S::Bytes; 8] {
        let mut quads = unpack_pairs(simd, tile);
        let high = simd.bytes(array(tile, 64));
        let mut q = 0;
        while q < 8 {
            let bit = simd.shift_left(simd.bits(high, q as u32, 1), 2);
            quads[q] = simd.or(quads[q], bit);
            q += 1;
        }
        quads
    }
}

/// Integers of 5 to 8 bits: bytes are the code minus 128, signed.
pub(super) struct Int8;

impl Int8 {
    /// What is added to a code.
    pub(super) const OFFSET: i32 = -128;
}

impl Codes for Int8 {
    const CHUNK_BYTES: usize = 256;
    const SIGNED: bool = true;

    fn pack(quads: &Quads, tile: &mut [u8]) {
        for (byte, code) in tile.iter_mut().zip(quads.as_flattened()) {
            *byte = code ^ 0x80;
        }
    }

    #[inline(always)]
    fn unpack<S: Simd>(simd: S, tile: &[u8]) -> [S::Bytes; 8] {
        let mut quads = [simd.bytes(array(tile, 0)); 8];
        let mut q = 1;
        while q < 8 {
            quads[q] = simd.bytes(array(tile, 32 * q));
            q += 1;
        }
        quads
    }
}

/// Codes that are floats. A chunk is `[columns, rows]`, so that a column is one vector.
pub(super) trait Floats: Send + Sync + 'static {
    /// Bytes of a code.
    const BYTES: usize;

    /// Column `k` of a chunk.
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32;
}

pub(super) struct E4M3;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct F32;

impl Floats for E4M3 {
    const BYTES: usize = 1;
    #[inline(always)]
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32 {
        simd.load_e4m3(array(tile, 8 * k))
    }
}

impl Floats for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32 {
        simd.load_le_f16(array(tile, 16 * k))
    }
}

impl Floats for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32 {
        simd.load_le_bf16(array(tile, 16 * k))
    }
}

impl Floats for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn column<S: Simd>(simd: S, tile: &[u8], k: usize) -> S::F32 {
        simd.load_le_f32(array(tile, 32 * k))
    }
}

/// `bytes[at .. at + N]` as an array.
#[inline(always)]
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..].first_chunk().expect("tiles have whole chunks")
}
