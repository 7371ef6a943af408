//! Which columns of a chunk have codes: all of them, or two of every four. Orthogonal to what codes mean.
//!
//! The weights of a pruned column are 0, so a sparse chunk has half as many codes as columns. Which columns are kept differs from
//! row to row, so code `t` of each row, one vector, is multiplied with an input of its own in every lane. Inputs are what is
//! gathered: there are half as many products as in a dense chunk.

use super::activations::Block;
use super::codes::{CHUNK, Codes, pack_pairs, restore_pairs};
use super::tiles::Offset;
use crate::cpu::simd::{MOST_LANES, Simd};

/// The part of a chunk that a dot product is over.
pub(super) const FIRST_HALF: usize = 0;
pub(super) const SECOND_HALF: usize = 1;
pub(super) const WHOLE: usize = 2;

/// Which columns have codes.
pub(super) trait Pattern: Send + Sync + 'static {
    /// Codes of a row in a chunk.
    const STORED: usize;
    /// Bytes a row of what says where codes stand, after the codes of a chunk.
    const INDEX_ROW_BYTES: usize;
    /// The integers of a chunk, `STORED / 4` quads.
    type Quads<S: Simd>: Copy + AsRef<[S::Bytes]>;
    /// Where codes stand.
    type Index<S: Simd>: Copy;

    fn unpack<S: Simd, C: Codes>(simd: S, tile: &[u8]) -> Self::Quads<S>;
    /// Puts the positions of the stored codes (0 to 3, in quads of `quad` bytes) into tile order.
    fn pack_index(positions: &[u8], quad: usize, index: &mut [u8]);
    /// Takes them back out of it: the inverse of [`Pattern::pack_index`].
    fn restore_index(index: &[u8], quad: usize, positions: &mut [u8]);
    fn load_index<S: Simd>(simd: S, index: &[u8]) -> Self::Index<S>;
    /// The column of code `t` of a row.
    fn column(index: &[u8], row: usize, t: usize) -> usize;
    /// The input that code `t` of each row is multiplied with.
    fn input<S: Simd>(simd: S, index: Self::Index<S>, x: &[f32; CHUNK], t: usize) -> S::F32;
    /// `Σ (byte − offset) · x` over a part of the chunk.
    fn dot<S: Simd, C: Codes, const PART: usize>(
        simd: S,
        quads: Self::Quads<S>,
        index: Self::Index<S>,
        offset: &Offset<S>,
        x: &Block,
    ) -> S::I32;
    /// Adds [`Pattern::dot`] of each input row, times the scale of its input, to its sum.
    #[inline(always)]
    fn add_dots<S: Simd, C: Codes, const PART: usize, const ROWS: usize>(
        simd: S,
        quads: Self::Quads<S>,
        index: Self::Index<S>,
        offset: &Offset<S>,
        x: [&Block; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        for i in 0..ROWS {
            add_dot_of(simd, Self::dot::<S, C, PART>(simd, quads, index, offset, x[i]), x[i], &mut sums[i]);
        }
    }
}

/// All columns.
pub(super) struct Dense;

impl Pattern for Dense {
    const STORED: usize = CHUNK;
    const INDEX_ROW_BYTES: usize = 0;
    type Quads<S: Simd> = [S::Bytes; 8];
    type Index<S: Simd> = ();

    #[inline(always)]
    fn unpack<S: Simd, C: Codes>(simd: S, tile: &[u8]) -> [S::Bytes; 8] {
        C::unpack(simd, tile)
    }

    fn pack_index(_: &[u8], _: usize, _: &mut [u8]) {}

    fn restore_index(_: &[u8], _: usize, _: &mut [u8]) {}

    #[inline(always)]
    fn load_index<S: Simd>(_: S, _: &[u8]) {}

    fn column(_: &[u8], _: usize, t: usize) -> usize {
        t
    }

    #[inline(always)]
    fn input<S: Simd>(simd: S, _: (), x: &[f32; CHUNK], t: usize) -> S::F32 {
        simd.splat(x[t])
    }

    #[inline(always)]
    fn dot<S: Simd, C: Codes, const PART: usize>(
        simd: S,
        w: [S::Bytes; 8],
        _: (),
        offset: &Offset<S>,
        x: &Block,
    ) -> S::I32 {
        let [x_first, x_second] = x.halves();
        // Where all unsigned weights are allowed, they take fewer instructions than signed ones.
        let (mut w, mut pairs, unsigned) = (w, offset.pairs, !C::SIGNED || S::ANY_UNSIGNED);
        if C::SIGNED && unsigned {
            let mut q = 0;
            while q < 8 {
                w[q] = simd.plus_128(w[q]);
                q += 1;
            }
            let plus_128 = simd.add_i32(offset.integers, simd.splat_i32(128));
            pairs = simd.pair(plus_128, plus_128);
        }
        // Σ (byte − offset)·x = Σ byte·x − offset·Σx.
        let mut sum = simd.dot_pairs(pairs, simd.splat_pair(&minus_sums::<PART>(x)));
        if PART != SECOND_HALF {
            sum = simd.add_dot_shared(unsigned, sum, [w[0], w[1], w[2], w[3]], x_first);
        }
        if PART != FIRST_HALF {
            sum = simd.add_dot_shared(unsigned, sum, [w[4], w[5], w[6], w[7]], x_second);
        }
        sum
    }

    #[inline(always)]
    fn add_dots<S: Simd, C: Codes, const PART: usize, const ROWS: usize>(
        simd: S,
        w: [S::Bytes; 8],
        index: (),
        offset: &Offset<S>,
        x: [&Block; ROWS],
        sums: &mut [S::F32; ROWS],
    ) {
        let mut row = 0;
        while S::TWO_ROWS && row + 2 <= ROWS {
            let pair = [x[row], x[row + 1]];
            let [first, second] = dots_of_two::<S, PART>(simd, w, offset.integers, pair);
            add_dot_of(simd, first, pair[0], &mut sums[row]);
            add_dot_of(simd, second, pair[1], &mut sums[row + 1]);
            row += 2;
        }
        while row < ROWS {
            add_dot_of(simd, Self::dot::<S, C, PART>(simd, w, index, offset, x[row]), x[row], &mut sums[row]);
            row += 1;
        }
    }
}

/// [`Dense::dot`] of two rows of input. Bytes that are unsigned are at most 32, and the same signed.
#[inline(always)]
fn dots_of_two<S: Simd, const PART: usize>(simd: S, w: [S::Bytes; 8], offset: S::I32, x: [&Block; 2]) -> [S::I32; 2] {
    let (first, second) = ([w[0], w[1], w[2], w[3]], [w[4], w[5], w[6], w[7]]);
    let [[a_first, a_second], [b_first, b_second]] = [x[0].halves(), x[1].halves()];
    let minus_sums = [minus_sums::<PART>(x[0]), minus_sums::<PART>(x[1])];
    match PART {
        FIRST_HALF => simd.dots_of_two([first], offset, [[a_first], [b_first]], minus_sums),
        SECOND_HALF => simd.dots_of_two([second], offset, [[a_second], [b_second]], minus_sums),
        _ => simd.dots_of_two([first, second], offset, [[a_first, a_second], [b_first, b_second]], minus_sums),
    }
}

/// `−Σ x` over a part of the chunk, as two terms.
#[inline(always)]
fn minus_sums<const PART: usize>(x: &Block) -> [i16; 2] {
    match PART {
        FIRST_HALF => [x.minus_sums[0], 0],
        SECOND_HALF => [0, x.minus_sums[1]],
        _ => x.minus_sums,
    }
}

/// Two of every four columns. Codes `2q` and `2q + 1` of a row stand in columns `4q .. 4q + 4`. Their positions there take two
/// bits each in one vector: bits `2s` and `2s + 1` of byte `4·row + j` are that of code `4s + j`.
pub(super) struct TwoOfFour;

impl TwoOfFour {
    /// What the positions of an even and of an odd quad's codes are added to: their place among the 16 inputs of a half.
    const PLACES: [[u8; 4 * MOST_LANES]; 2] = {
        let mut places = [[0; 4 * MOST_LANES]; 2];
        let mut i = 0;
        while i < 4 * MOST_LANES {
            places[0][i] = if i % 4 < 2 { 0 } else { 4 };
            places[1][i] = places[0][i] + 8;
            i += 1;
        }
        places
    };

    /// The inputs that the codes of quad `s` are multiplied with.
    #[inline(always)]
    fn gather<S: Simd>(simd: S, index: S::Bytes, x: &[i8; 16], s: usize) -> S::Bytes {
        let place = simd.or(simd.bits(index, 2 * s as u32, 3), simd.bytes(&Self::PLACES[s % 2]));
        simd.lookup(bytemuck::cast_ref(x), place)
    }
}

impl Pattern for TwoOfFour {
    const STORED: usize = CHUNK / 2;
    const INDEX_ROW_BYTES: usize = 4;
    type Quads<S: Simd> = [S::Bytes; 4];
    type Index<S: Simd> = S::Bytes;

    #[inline(always)]
    fn unpack<S: Simd, C: Codes>(simd: S, tile: &[u8]) -> [S::Bytes; 4] {
        C::unpack(simd, tile)
    }

    fn pack_index(positions: &[u8], quad: usize, index: &mut [u8]) {
        pack_pairs(positions, quad, index);
    }

    fn restore_index(index: &[u8], quad: usize, positions: &mut [u8]) {
        restore_pairs(index, quad, positions);
    }

    #[inline(always)]
    fn load_index<S: Simd>(simd: S, index: &[u8]) -> S::Bytes {
        simd.bytes(index)
    }

    fn column(index: &[u8], row: usize, t: usize) -> usize {
        let position = index[4 * row + t % 4] >> (2 * (t / 4)) & 3;
        t / 2 * 4 + usize::from(position)
    }

    #[inline(always)]
    fn input<S: Simd>(simd: S, index: S::Bytes, x: &[f32; CHUNK], t: usize) -> S::F32 {
        let four = x[t / 2 * 4..].first_chunk().expect("32 inputs");
        simd.select(four, index, (8 * (t % 4) + 2 * (t / 4)) as u32)
    }

    #[inline(always)]
    fn dot<S: Simd, C: Codes, const PART: usize>(
        simd: S,
        w: [S::Bytes; 4],
        index: S::Bytes,
        offset: &Offset<S>,
        x: &Block,
    ) -> S::I32 {
        let [first, second] = x.halves();
        let mut inputs = [simd.bytes(&[0; 4 * MOST_LANES]); 4];
        if PART != SECOND_HALF {
            inputs[0] = Self::gather(simd, index, first, 0);
            inputs[1] = Self::gather(simd, index, first, 1);
        }
        if PART != FIRST_HALF {
            inputs[2] = Self::gather(simd, index, second, 2);
            inputs[3] = Self::gather(simd, index, second, 3);
        }
        // Rows differ in which inputs they keep, and so in their sum.
        let offset = [simd.repeat_byte(offset.integers); 4];
        let zero = simd.splat_i32(0);
        let unsigned = !C::SIGNED;
        simd.sub_i32(add_dot(simd, unsigned, zero, w, inputs), add_dot(simd, unsigned, zero, offset, inputs))
    }
}

/// `sum += dot · scale of x`
#[inline(always)]
pub(super) fn add_dot_of<S: Simd>(simd: S, dot: S::I32, x: &Block, sum: &mut S::F32) {
    *sum = simd.mul_add(simd.to_f32(dot), simd.splat(x.scale), *sum);
}

#[inline(always)]
fn add_dot<S: Simd>(simd: S, unsigned: bool, sum: S::I32, weights: [S::Bytes; 4], x: [S::Bytes; 4]) -> S::I32 {
    if unsigned { simd.add_dot_unsigned(sum, weights, x) } else { simd.add_dot_signed(sum, weights, x) }
}
