//! Sums of products of bytes on AArch64: what each generation of processors has for them.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::neon::{Bytes, I32, Neon};
use super::{WithSimd, dots_of_each};

/// Instructions that multiply bytes and sum them up, beside Advanced SIMD.
pub(crate) trait Dots: Send + Sync + Sized + 'static {
    /// [`super::Simd::TWO_ROWS`].
    const TWO_ROWS: bool = false;

    /// Whether the processor has them.
    fn detect() -> bool;

    /// Runs `operation` with all instructions enabled.
    ///
    /// # Safety
    /// The processor has them: `simd` is proof of it.
    unsafe fn vectorize<W: WithSimd>(simd: Neon<Self>, operation: W) -> W::Output;

    /// `sum` and the dot products of four lanes' 16 weights with their 16 bytes of `x`.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn add_dot(sum: int32x4_t, weights: [uint8x16_t; 4], x: [uint8x16_t; 4]) -> int32x4_t;

    /// The same with 16 inputs that all lanes share.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn add_dot_shared(sum: int32x4_t, weights: [uint8x16_t; 4], x: int8x16_t) -> int32x4_t;

    /// [`super::Simd::dots_of_two`].
    ///
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn dots_of_two<const RUNS: usize>(
        simd: Neon<Self>,
        weights: [[Bytes; 4]; RUNS],
        offset: I32,
        x: [[&[i8; 16]; RUNS]; 2],
        minus_sums: [[i16; 2]; 2],
    ) -> [I32; 2] {
        dots_of_each(simd, weights, offset, x, minus_sums)
    }

    /// [`super::Simd::add_products`].
    ///
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn add_products(sum: int32x4_t, weights: [uint8x16_t; 4], x: [uint8x16_t; 4]) -> int32x4_t {
        // SAFETY: the caller's.
        unsafe { Self::add_dot(sum, weights, x) }
    }
}

/// Those of every processor, which multiply to 16 bits.
pub(crate) struct Widening;

impl Dots for Widening {
    fn detect() -> bool {
        true
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn vectorize<W: WithSimd>(simd: Neon<Self>, operation: W) -> W::Output {
        operation.with_simd(simd)
    }

    #[inline(always)]
    unsafe fn add_dot(
        sum: int32x4_t,
        [w0, w1, w2, w3]: [uint8x16_t; 4],
        [x0, x1, x2, x3]: [uint8x16_t; 4],
    ) -> int32x4_t {
        // SAFETY: the caller's.
        unsafe { vaddq_s32(sum, vaddq_s32(dot_pair([w0, w1], [x0, x1]), dot_pair([w2, w3], [x2, x3]))) }
    }

    #[inline(always)]
    unsafe fn add_dot_shared(sum: int32x4_t, weights: [uint8x16_t; 4], x: int8x16_t) -> int32x4_t {
        // SAFETY: the caller's.
        unsafe {
            let x = vreinterpretq_u32_s8(x);
            let quads = [
                vreinterpretq_u8_u32(vdupq_laneq_u32::<0>(x)),
                vreinterpretq_u8_u32(vdupq_laneq_u32::<1>(x)),
                vreinterpretq_u8_u32(vdupq_laneq_u32::<2>(x)),
                vreinterpretq_u8_u32(vdupq_laneq_u32::<3>(x)),
            ];
            Self::add_dot(sum, weights, quads)
        }
    }
}

/// Sums of the products of weights with inputs over two quads, four lanes at a time. An i16 holds one product of each quad: at
/// most 2·128·127 = 32512.
#[inline(always)]
unsafe fn dot_pair(w: [uint8x16_t; 2], x: [uint8x16_t; 2]) -> int32x4_t {
    // SAFETY: the caller holds a `Neon`.
    unsafe {
        let (w0, w1) = (vreinterpretq_s8_u8(w[0]), vreinterpretq_s8_u8(w[1]));
        let (x0, x1) = (vreinterpretq_s8_u8(x[0]), vreinterpretq_s8_u8(x[1]));
        let low = vmlal_s8(vmull_s8(vget_low_s8(w0), vget_low_s8(x0)), vget_low_s8(w1), vget_low_s8(x1));
        let high = vmlal_s8(vmull_s8(vget_high_s8(w0), vget_high_s8(x0)), vget_high_s8(w1), vget_high_s8(x1));
        // Four products of each lane lie side by side: two steps of pairwise sums.
        vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))
    }
}

/// SDOT (Armv8.4, Apple's M1 and later): adds four products of signed bytes to each lane, exactly.
pub(crate) struct Sdot;

impl Dots for Sdot {
    fn detect() -> bool {
        is_aarch64_feature_detected!("dotprod")
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn vectorize<W: WithSimd>(simd: Neon<Self>, operation: W) -> W::Output {
        operation.with_simd(simd)
    }

    #[inline(always)]
    unsafe fn add_dot(sum: int32x4_t, weights: [uint8x16_t; 4], x: [uint8x16_t; 4]) -> int32x4_t {
        let (mut sum, mut q) = (sum, 0);
        while q < 4 {
            // SAFETY: the caller's; the instruction has no other effect. Its intrinsic needs a later Rust than this crate's.
            unsafe {
                asm!(
                    ".arch_extension dotprod",
                    "sdot {sum:v}.4s, {weights:v}.16b, {x:v}.16b",
                    sum = inout(vreg) sum,
                    weights = in(vreg) weights[q],
                    x = in(vreg) x[q],
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
            q += 1;
        }
        sum
    }

    #[inline(always)]
    unsafe fn add_dot_shared(sum: int32x4_t, [w0, w1, w2, w3]: [uint8x16_t; 4], x: int8x16_t) -> int32x4_t {
        // SAFETY: the caller's.
        unsafe {
            sdot_shared::<3>(sdot_shared::<2>(sdot_shared::<1>(sdot_shared::<0>(sum, w0, x), w1, x), w2, x), w3, x)
        }
    }
}

/// `sum` and the dot products of four lanes' four weights with inputs `4Q .. 4Q + 4`.
///
/// # Safety
/// The processor has SDOT.
#[inline(always)]
unsafe fn sdot_shared<const Q: usize>(mut sum: int32x4_t, weights: uint8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's; the instruction has no other effect.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {weights:v}.16b, {x:v}.4b[{q}]",
            sum = inout(vreg) sum,
            weights = in(vreg) weights,
            x = in(vreg) x,
            q = const Q,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// SMMLA besides (i8mm: Armv8.6, Apple's M2, Neoverse V1 and N2, and later): multiplies two rows of eight signed bytes with two others, and
/// adds the four dot products to the lanes, exactly.
pub(crate) struct Smmla;

impl Dots for Smmla {
    const TWO_ROWS: bool = true;

    fn detect() -> bool {
        Sdot::detect() && is_aarch64_feature_detected!("i8mm")
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod,i8mm")]
    unsafe fn vectorize<W: WithSimd>(simd: Neon<Self>, operation: W) -> W::Output {
        operation.with_simd(simd)
    }

    #[inline(always)]
    unsafe fn add_dot(sum: int32x4_t, weights: [uint8x16_t; 4], x: [uint8x16_t; 4]) -> int32x4_t {
        // One row of input would leave half of each product unused.
        // SAFETY: the caller's; `detect` asks for SDOT, too.
        unsafe { Sdot::add_dot(sum, weights, x) }
    }

    #[inline(always)]
    unsafe fn add_dot_shared(sum: int32x4_t, weights: [uint8x16_t; 4], x: int8x16_t) -> int32x4_t {
        // SAFETY: as above.
        unsafe { Sdot::add_dot_shared(sum, weights, x) }
    }

    #[inline(always)]
    unsafe fn dots_of_two<const RUNS: usize>(
        _: Neon<Self>,
        weights: [[Bytes; 4]; RUNS],
        offset: I32,
        x: [[&[i8; 16]; RUNS]; 2],
        minus_sums: [[i16; 2]; 2],
    ) -> [I32; 2] {
        // SAFETY: the caller's; loads read whole arrays behind references.
        unsafe {
            // Each of two lanes of weights and both rows of input: row 0 with either lane, then row 1.
            let mut sums = [vdupq_n_s32(0); 4];
            let mut run = 0;
            while run < RUNS {
                let (row_0, row_1) = (load_eights(x[0][run]), load_eights(x[1][run]));
                let [w0, w1, w2, w3] = weights[run];
                add_eights(&mut sums, vzip1q_u64(row_0, row_1), w0, w1);
                add_eights(&mut sums, vzip2q_u64(row_0, row_1), w2, w3);
                run += 1;
            }
            let (low, high) = (rows_apart(sums[0], sums[1]), rows_apart(sums[2], sums[3]));
            let [minus_sum_0, minus_sum_1] = [sum_of_pair(minus_sums[0]), sum_of_pair(minus_sums[1])];
            [
                (vmlaq_s32(low.0, offset.0, minus_sum_0), vmlaq_s32(high.0, offset.1, minus_sum_0)),
                (vmlaq_s32(low.1, offset.0, minus_sum_1), vmlaq_s32(high.1, offset.1, minus_sum_1)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn add_products(sum: int32x4_t, weights: [uint8x16_t; 4], x: [uint8x16_t; 4]) -> int32x4_t {
        let (mut sum, mut q) = (sum, 0);
        while q < 4 {
            // SAFETY: the caller's.
            unsafe { sum = smmla(sum, x[q], weights[q]) };
            q += 1;
        }
        sum
    }
}

/// 16 inputs as two runs of eight.
///
/// # Safety
/// The processor has Advanced SIMD.
#[inline(always)]
unsafe fn load_eights(x: &[i8; 16]) -> uint64x2_t {
    // SAFETY: the caller's; a whole array is read.
    unsafe { vreinterpretq_u64_s8(vld1q_s8(x.as_ptr())) }
}

/// Adds the products of eight inputs of two rows, `x`, with the weights of eight lanes, of which each quad has four.
///
/// # Safety
/// The processor has SMMLA.
#[inline(always)]
unsafe fn add_eights(sums: &mut [int32x4_t; 4], x: uint64x2_t, even: Bytes, odd: Bytes) {
    // SAFETY: the caller's.
    unsafe {
        let (x, low, high) = (vreinterpretq_u8_u64(x), two_lanes_each(even.0, odd.0), two_lanes_each(even.1, odd.1));
        sums[0] = smmla(sums[0], x, low.0);
        sums[1] = smmla(sums[1], x, low.1);
        sums[2] = smmla(sums[2], x, high.0);
        sums[3] = smmla(sums[3], x, high.1);
    }
}

/// Eight weights of lanes 0 and 1, and of lanes 2 and 3.
///
/// # Safety
/// The processor has Advanced SIMD.
#[inline(always)]
unsafe fn two_lanes_each(even: uint8x16_t, odd: uint8x16_t) -> (uint8x16_t, uint8x16_t) {
    // SAFETY: the caller's.
    unsafe {
        let (even, odd) = (vreinterpretq_u32_u8(even), vreinterpretq_u32_u8(odd));
        (vreinterpretq_u8_u32(vzip1q_u32(even, odd)), vreinterpretq_u8_u32(vzip2q_u32(even, odd)))
    }
}

/// `sum[2i + j] + Σ x[i] · weights[j]`, where `x` and `weights` are two rows of eight signed bytes.
///
/// # Safety
/// The processor has SMMLA.
#[inline(always)]
unsafe fn smmla(mut sum: int32x4_t, x: uint8x16_t, weights: uint8x16_t) -> int32x4_t {
    // SAFETY: the caller's; the instruction has no other effect. Its intrinsic is not stable yet.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sum:v}.4s, {x:v}.16b, {weights:v}.16b",
            sum = inout(vreg) sum,
            x = in(vreg) x,
            weights = in(vreg) weights,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// What [`smmla`] has summed up for lanes 0 and 1, and for lanes 2 and 3, as four lanes of either row of input.
///
/// # Safety
/// The processor has Advanced SIMD.
#[inline(always)]
unsafe fn rows_apart(low: int32x4_t, high: int32x4_t) -> (int32x4_t, int32x4_t) {
    // SAFETY: the caller's.
    unsafe {
        let (low, high) = (vreinterpretq_s64_s32(low), vreinterpretq_s64_s32(high));
        (vreinterpretq_s32_s64(vzip1q_s64(low, high)), vreinterpretq_s32_s64(vzip2q_s64(low, high)))
    }
}

/// The sum of both in every lane.
///
/// # Safety
/// The processor has Advanced SIMD.
#[inline(always)]
unsafe fn sum_of_pair(pair: [i16; 2]) -> int32x4_t {
    // SAFETY: the caller's.
    unsafe { vpaddlq_s16(vreinterpretq_s16_s32(vdupq_n_s32(bytemuck::cast(pair)))) }
}
