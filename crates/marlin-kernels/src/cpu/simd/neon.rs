//! AArch64 with Advanced SIMD: two registers a vector.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::fmt;
use std::marker::PhantomData;

use super::neon_dots::{Dots, Widening};
use super::{Simd, WithSimd, first, first_mut};

/// Proof that the processor has Advanced SIMD, and what `D` needs besides.
pub(crate) struct Neon<D>(PhantomData<D>);

impl<D> Clone for Neon<D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D> Copy for Neon<D> {}

impl<D> fmt::Debug for Neon<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::any::type_name::<Self>())
    }
}

/// The dot product of the two i16 of each of four lanes.
#[inline(always)]
unsafe fn dot_four_pairs(a: int32x4_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: the caller holds a `Neon`.
    unsafe {
        let (a, b) = (vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
        vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b))
    }
}

/// `x[(lane >> shift) & 3]` for each of four lanes.
#[inline(always)]
unsafe fn select_four(x: &[f32; 4], lanes: uint8x16_t, shift: u32) -> float32x4_t {
    // SAFETY: the caller holds a `Neon`.
    unsafe {
        let shifted = vshlq_u32(vreinterpretq_u32_u8(lanes), vdupq_n_s32(-(shift as i32)));
        let index = vandq_u32(shifted, vdupq_n_u32(3));
        // Entry i is bytes 4i to 4i + 3.
        let bytes = vaddq_u32(vmulq_n_u32(index, 0x0404_0404), vdupq_n_u32(0x0302_0100));
        let x = vreinterpretq_u8_f32(vld1q_f32(x.as_ptr()));
        vreinterpretq_f32_u8(vqtbl1q_u8(x, vreinterpretq_u8_u32(bytes)))
    }
}

impl<D: Dots> Neon<D> {
    pub(crate) fn detect() -> Option<Self> {
        (is_aarch64_feature_detected!("neon") && D::detect()).then_some(Self(PhantomData))
    }
}

/// Evaluates intrinsics of Advanced SIMD inside methods of [`Neon`].
macro_rules! intrinsics {
    ($e:expr) => {{
        // SAFETY: a value of `Neon` is proof of the instructions, and loads read whole arrays behind references.
        #[allow(clippy::macro_metavars_in_unsafe, reason = "the macro is private to methods of Neon")]
        unsafe {
            $e
        }
    }};
}

/// Bytes 0–15 and 16–31.
pub(super) type Bytes = (uint8x16_t, uint8x16_t);
/// Lanes 0–3 and 4–7.
pub(super) type I32 = (int32x4_t, int32x4_t);
/// Lanes 0–3 and 4–7.
type F32 = (float32x4_t, float32x4_t);

impl<D: Dots> Neon<D> {
    #[inline(always)]
    fn shift_bytes(self, v: Bytes, by: i8) -> Bytes {
        intrinsics!({
            let by = vdupq_n_s8(by);
            (vshlq_u8(v.0, by), vshlq_u8(v.1, by))
        })
    }

    /// Byte `j` of each lane at the top of the lane, zeros below.
    #[inline(always)]
    fn byte_at_top(self, v: Bytes, j: usize) -> (uint32x4_t, uint32x4_t) {
        intrinsics!({
            let by = vdupq_n_s32(24 - 8 * j as i32);
            (vshlq_u32(vreinterpretq_u32_u8(v.0), by), vshlq_u32(vreinterpretq_u32_u8(v.1), by))
        })
    }

    /// Bytes as lanes.
    #[inline(always)]
    fn widen_u8(self, from: &[u8; 8]) -> (uint32x4_t, uint32x4_t) {
        intrinsics!({
            let wide = vmovl_u8(vld1_u8(from.as_ptr()));
            (vmovl_u16(vget_low_u16(wide)), vmovl_u16(vget_high_u16(wide)))
        })
    }
}

impl<D: Dots> Simd for Neon<D> {
    const LANES: usize = 8;
    // 32 of 128 bits.
    const REGISTERS: usize = 16;
    const ANY_UNSIGNED: bool = false;
    const TWO_ROWS: bool = D::TWO_ROWS;
    type Bytes = Bytes;
    type I32 = I32;
    type F32 = F32;
    type Base = Neon<Widening>;

    fn base(self) -> Neon<Widening> {
        Neon(PhantomData)
    }

    #[inline]
    fn vectorize<W: WithSimd>(self, operation: W) -> W::Output {
        intrinsics!(D::vectorize(self, operation))
    }

    #[inline(always)]
    fn bytes(self, from: &[u8]) -> Bytes {
        let from: &[u8; 32] = first(from);
        intrinsics!((vld1q_u8(from.as_ptr()), vld1q_u8(from[16..].as_ptr())))
    }
    #[inline(always)]
    fn bits(self, v: Bytes, shift: u32, mask: u8) -> Bytes {
        let v = self.shift_bytes(v, -(shift as i8));
        intrinsics!({
            let mask = vdupq_n_u8(mask);
            (vandq_u8(v.0, mask), vandq_u8(v.1, mask))
        })
    }
    #[inline(always)]
    fn shift_left(self, v: Bytes, shift: u32) -> Bytes {
        self.shift_bytes(v, shift as i8)
    }
    #[inline(always)]
    fn or(self, a: Bytes, b: Bytes) -> Bytes {
        intrinsics!((vorrq_u8(a.0, b.0), vorrq_u8(a.1, b.1)))
    }
    #[inline(always)]
    fn plus_128(self, v: Bytes) -> Bytes {
        intrinsics!({
            let top = vdupq_n_u8(0x80);
            (veorq_u8(v.0, top), veorq_u8(v.1, top))
        })
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: Bytes) -> Bytes {
        intrinsics!({
            let table = vld1q_u8(table.as_ptr());
            (vqtbl1q_u8(table, v.0), vqtbl1q_u8(table, v.1))
        })
    }

    #[inline(always)]
    fn quad(self, x: &[i8; 16], q: usize) -> Bytes {
        let four = [x[4 * q] as u8, x[4 * q + 1] as u8, x[4 * q + 2] as u8, x[4 * q + 3] as u8];
        intrinsics!({
            let v = vreinterpretq_u8_u32(vdupq_n_u32(u32::from_le_bytes(four)));
            (v, v)
        })
    }
    #[inline(always)]
    fn repeat_byte(self, v: I32) -> Bytes {
        const FIRST: [u8; 16] = [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12];
        intrinsics!({
            let first = vld1q_u8(FIRST.as_ptr());
            (vqtbl1q_u8(vreinterpretq_u8_s32(v.0), first), vqtbl1q_u8(vreinterpretq_u8_s32(v.1), first))
        })
    }
    #[inline(always)]
    fn add_dot_unsigned(self, sum: I32, weights: [Bytes; 4], x: [Bytes; 4]) -> I32 {
        // Weights of at most 32 are the same signed.
        self.add_dot_signed(sum, weights, x)
    }
    #[inline(always)]
    fn add_dot_signed(self, sum: I32, weights: [Bytes; 4], x: [Bytes; 4]) -> I32 {
        let ([a, b, c, d], [x0, x1, x2, x3]) = (weights, x);
        intrinsics!((
            D::add_dot(sum.0, [a.0, b.0, c.0, d.0], [x0.0, x1.0, x2.0, x3.0]),
            D::add_dot(sum.1, [a.1, b.1, c.1, d.1], [x0.1, x1.1, x2.1, x3.1])
        ))
    }

    #[inline(always)]
    fn add_dot_shared(self, _: bool, sum: I32, weights: [Bytes; 4], x: &[i8; 16]) -> I32 {
        let [a, b, c, d] = weights;
        intrinsics!({
            let x = vld1q_s8(x.as_ptr());
            (D::add_dot_shared(sum.0, [a.0, b.0, c.0, d.0], x), D::add_dot_shared(sum.1, [a.1, b.1, c.1, d.1], x))
        })
    }
    #[inline(always)]
    fn dots_of_two<const RUNS: usize>(
        self,
        weights: [[Bytes; 4]; RUNS],
        offset: I32,
        x: [[&[i8; 16]; RUNS]; 2],
        minus_sums: [[i16; 2]; 2],
    ) -> [I32; 2] {
        intrinsics!(D::dots_of_two(self, weights, offset, x, minus_sums))
    }
    #[inline(always)]
    fn add_products(self, sum: I32, weights: [Bytes; 4], x: [Bytes; 4]) -> I32 {
        let ([a, b, c, d], [x0, x1, x2, x3]) = (weights, x);
        intrinsics!((
            D::add_products(sum.0, [a.0, b.0, c.0, d.0], [x0.0, x1.0, x2.0, x3.0]),
            D::add_products(sum.1, [a.1, b.1, c.1, d.1], [x0.1, x1.1, x2.1, x3.1])
        ))
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> I32 {
        intrinsics!((vdupq_n_s32(value), vdupq_n_s32(value)))
    }
    #[inline(always)]
    fn widen_i8(self, from: &[i8]) -> I32 {
        let from: &[i8; 8] = first(from);
        intrinsics!({
            let wide = vmovl_s8(vld1_s8(from.as_ptr()));
            (vmovl_s16(vget_low_s16(wide)), vmovl_s16(vget_high_s16(wide)))
        })
    }
    #[inline(always)]
    fn add_i32(self, a: I32, b: I32) -> I32 {
        intrinsics!((vaddq_s32(a.0, b.0), vaddq_s32(a.1, b.1)))
    }
    #[inline(always)]
    fn sub_i32(self, a: I32, b: I32) -> I32 {
        intrinsics!((vsubq_s32(a.0, b.0), vsubq_s32(a.1, b.1)))
    }
    #[inline(always)]
    fn widen_pairs(self, from: &[i8]) -> I32 {
        let from: &[i8; 16] = first(from);
        intrinsics!({
            let v = vld1q_s8(from.as_ptr());
            (vreinterpretq_s32_s16(vmovl_s8(vget_low_s8(v))), vreinterpretq_s32_s16(vmovl_high_s8(v)))
        })
    }
    #[inline(always)]
    fn pair(self, low: I32, high: I32) -> I32 {
        intrinsics!((vsliq_n_s32::<16>(low.0, high.0), vsliq_n_s32::<16>(low.1, high.1)))
    }
    #[inline(always)]
    fn mul_pairs(self, a: I32, b: I32) -> I32 {
        intrinsics!({
            let low = vmulq_s16(vreinterpretq_s16_s32(a.0), vreinterpretq_s16_s32(b.0));
            let high = vmulq_s16(vreinterpretq_s16_s32(a.1), vreinterpretq_s16_s32(b.1));
            (vreinterpretq_s32_s16(low), vreinterpretq_s32_s16(high))
        })
    }
    #[inline(always)]
    fn dot_pairs(self, a: I32, b: I32) -> I32 {
        intrinsics!((dot_four_pairs(a.0, b.0), dot_four_pairs(a.1, b.1)))
    }
    #[inline(always)]
    fn to_f32(self, v: I32) -> F32 {
        intrinsics!((vcvtq_f32_s32(v.0), vcvtq_f32_s32(v.1)))
    }
    #[inline(always)]
    fn byte_to_f32(self, v: Bytes, j: usize) -> F32 {
        let v = self.byte_at_top(v, j);
        intrinsics!((vcvtq_f32_u32(vshrq_n_u32::<24>(v.0)), vcvtq_f32_u32(vshrq_n_u32::<24>(v.1))))
    }
    #[inline(always)]
    fn signed_byte_to_f32(self, v: Bytes, j: usize) -> F32 {
        let v = self.byte_at_top(v, j);
        intrinsics!({
            let (low, high) = (vreinterpretq_s32_u32(v.0), vreinterpretq_s32_u32(v.1));
            (vcvtq_f32_s32(vshrq_n_s32::<24>(low)), vcvtq_f32_s32(vshrq_n_s32::<24>(high)))
        })
    }

    #[inline(always)]
    fn splat(self, value: f32) -> F32 {
        intrinsics!((vdupq_n_f32(value), vdupq_n_f32(value)))
    }
    #[inline(always)]
    fn select(self, x: &[f32; 4], lanes: Bytes, shift: u32) -> F32 {
        intrinsics!((select_four(x, lanes.0, shift), select_four(x, lanes.1, shift)))
    }
    #[inline(always)]
    fn load_le_f32(self, from: &[u8]) -> F32 {
        let from: &[u8; 32] = first(from);
        intrinsics!((
            vreinterpretq_f32_u8(vld1q_u8(from.as_ptr())),
            vreinterpretq_f32_u8(vld1q_u8(from[16..].as_ptr()))
        ))
    }
    #[inline(always)]
    fn load_le_f16(self, from: &[u8]) -> F32 {
        let from: &[u8; 16] = first(from);
        intrinsics!({
            let codes = vld1q_u8(from.as_ptr());
            let (low, high): F32;
            // The intrinsics for FCVTL need a later Rust than this crate's.
            asm!(
                "fcvtl {low:v}.4s, {codes:v}.4h",
                "fcvtl2 {high:v}.4s, {codes:v}.8h",
                codes = in(vreg) codes,
                low = out(vreg) low,
                high = lateout(vreg) high,
                options(pure, nomem, nostack, preserves_flags)
            );
            (low, high)
        })
    }
    #[inline(always)]
    fn load_le_bf16(self, from: &[u8]) -> F32 {
        let from: &[u8; 16] = first(from);
        intrinsics!({
            let codes = vreinterpretq_u16_u8(vld1q_u8(from.as_ptr()));
            let (low, high) = (vshll_n_u16::<16>(vget_low_u16(codes)), vshll_n_u16::<16>(vget_high_u16(codes)));
            (vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high))
        })
    }
    #[inline(always)]
    fn load_e8m0(self, from: &[u8]) -> F32 {
        let from: &[u8; 8] = first(from);
        let exponents = self.widen_u8(from);
        intrinsics!({
            // Exponent 0 is the subnormal 2^−127.
            let least = vdupq_n_u32(1 << 22);
            let low = vmaxq_u32(vshlq_n_u32::<23>(exponents.0), least);
            let high = vmaxq_u32(vshlq_n_u32::<23>(exponents.1), least);
            (vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high))
        })
    }
    #[inline(always)]
    fn load_e4m3_over_256(self, from: &[u8]) -> F32 {
        let from: &[u8; 8] = first(from);
        let codes = self.widen_i8(&from.map(|code| code as i8));
        intrinsics!({
            // Exponent and mantissa in place of f32's, and the sign, which widening has spread to bits 7 to 31.
            let kept = vdupq_n_s32(0x87f0_0000_u32 as i32);
            let low = vandq_s32(vshlq_n_s32::<20>(codes.0), kept);
            let high = vandq_s32(vshlq_n_s32::<20>(codes.1), kept);
            // The difference of the exponent biases, less 8.
            let factor = f32::from_bits((127 + 112) << 23);
            (vmulq_n_f32(vreinterpretq_f32_s32(low), factor), vmulq_n_f32(vreinterpretq_f32_s32(high), factor))
        })
    }
    #[inline(always)]
    fn store(self, v: F32, to: &mut [f32]) {
        let to: &mut [f32; 8] = first_mut(to);
        let (low, high) = to.split_at_mut(4);
        intrinsics!({
            vst1q_f32(low.as_mut_ptr(), v.0);
            vst1q_f32(high.as_mut_ptr(), v.1);
        });
    }
    #[inline(always)]
    fn sums_of_lanes(self, v: [F32; 8]) -> [f32; 8] {
        intrinsics!({
            // Each half of a vector is summed up for four vectors at once.
            let low = vpaddq_f32(vpaddq_f32(v[0].0, v[1].0), vpaddq_f32(v[2].0, v[3].0));
            let high = vpaddq_f32(vpaddq_f32(v[0].1, v[1].1), vpaddq_f32(v[2].1, v[3].1));
            let first_four = vaddq_f32(low, high);
            let low = vpaddq_f32(vpaddq_f32(v[4].0, v[5].0), vpaddq_f32(v[6].0, v[7].0));
            let high = vpaddq_f32(vpaddq_f32(v[4].1, v[5].1), vpaddq_f32(v[6].1, v[7].1));
            let mut sums = [0.0; 8];
            self.store((first_four, vaddq_f32(low, high)), &mut sums);
            sums
        })
    }
    #[inline(always)]
    fn add(self, a: F32, b: F32) -> F32 {
        intrinsics!((vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1)))
    }
    #[inline(always)]
    fn sub(self, a: F32, b: F32) -> F32 {
        intrinsics!((vsubq_f32(a.0, b.0), vsubq_f32(a.1, b.1)))
    }
    #[inline(always)]
    fn mul(self, a: F32, b: F32) -> F32 {
        intrinsics!((vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1)))
    }
    #[inline(always)]
    fn mul_add(self, a: F32, b: F32, c: F32) -> F32 {
        intrinsics!((vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1)))
    }
}
