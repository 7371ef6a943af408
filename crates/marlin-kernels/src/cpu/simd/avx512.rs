//! x86-64 with AVX-512 and its VNNI: vectors of 512 bits.

use std::arch::x86_64::*;

use super::avx2::sums_of_eight;
use super::{Simd, WithSimd, first, first_mut};

/// Proof that the processor has AVX2, FMA, F16C, and of AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        found.then_some(Self(()))
    }
}

/// Evaluates intrinsics of these instructions inside methods of [`Avx512`].
macro_rules! intrinsics {
    ($e:expr) => {{
        // SAFETY: a value of `Avx512` is proof of the instructions, and loads read whole arrays behind references.
        #[allow(clippy::macro_metavars_in_unsafe, reason = "the macro is private to methods of Avx512")]
        unsafe {
            $e
        }
    }};
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const ANY_UNSIGNED: bool = true;
    type Bytes = __m512i;
    type I32 = __m512i;
    type F32 = __m512;
    type Base = Self;

    fn base(self) -> Self {
        self
    }

    #[inline]
    fn vectorize<W: WithSimd>(self, operation: W) -> W::Output {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn inner<W: WithSimd>(simd: Avx512, operation: W) -> W::Output {
            operation.with_simd(simd)
        }
        intrinsics!(inner(self, operation))
    }

    #[inline(always)]
    fn prefetch(self, at: &[u8], ahead: usize) {
        // Of an address where there is no memory nothing comes.
        intrinsics!(_mm_prefetch::<_MM_HINT_T0>(at.as_ptr().wrapping_add(ahead).cast()));
    }
    #[inline(always)]
    fn bytes(self, from: &[u8]) -> __m512i {
        let from: &[u8; 64] = first(from);
        intrinsics!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn bits(self, v: __m512i, shift: u32, mask: u8) -> __m512i {
        intrinsics!({
            let shifted = _mm512_srl_epi16(v, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(shifted, _mm512_set1_epi8(mask as i8))
        })
    }
    #[inline(always)]
    fn shift_left(self, v: __m512i, shift: u32) -> __m512i {
        intrinsics!(_mm512_sll_epi16(v, _mm_cvtsi32_si128(shift as i32)))
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsics!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn plus_128(self, v: __m512i) -> __m512i {
        intrinsics!(_mm512_xor_si512(v, _mm512_set1_epi8(-128)))
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: __m512i) -> __m512i {
        intrinsics!({
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, v)
        })
    }

    #[inline(always)]
    fn quad(self, x: &[i8; 16], q: usize) -> __m512i {
        let four = [x[4 * q] as u8, x[4 * q + 1] as u8, x[4 * q + 2] as u8, x[4 * q + 3] as u8];
        intrinsics!(_mm512_set1_epi32(i32::from_le_bytes(four)))
    }
    #[inline(always)]
    fn repeat_byte(self, v: __m512i) -> __m512i {
        intrinsics!({
            let first = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
            _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(first))
        })
    }
    #[inline(always)]
    fn add_dot_unsigned(self, sum: __m512i, weights: [__m512i; 4], x: [__m512i; 4]) -> __m512i {
        intrinsics!({
            let (mut sum, mut q) = (sum, 0);
            while q < 4 {
                sum = _mm512_dpbusd_epi32(sum, weights[q], x[q]);
                q += 1;
            }
            sum
        })
    }
    #[inline(always)]
    fn add_dot_signed(self, sum: __m512i, weights: [__m512i; 4], x: [__m512i; 4]) -> __m512i {
        intrinsics!({
            let (mut sum, mut q) = (sum, 0);
            while q < 4 {
                // The first factor is unsigned: w·x = |w|·(x with the sign of w), and |−128| = 128 is right as an unsigned byte.
                let negative = _mm512_movepi8_mask(weights[q]);
                let x = _mm512_mask_sub_epi8(x[q], negative, _mm512_setzero_si512(), x[q]);
                sum = _mm512_dpbusd_epi32(sum, _mm512_abs_epi8(weights[q]), x);
                q += 1;
            }
            sum
        })
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m512i {
        intrinsics!(_mm512_set1_epi32(value))
    }
    #[inline(always)]
    fn widen_i8(self, from: &[i8]) -> __m512i {
        let from: &[i8; 16] = first(from);
        intrinsics!(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsics!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i32(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsics!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn widen_pairs(self, from: &[i8]) -> __m512i {
        let from: &[i8; 32] = first(from);
        intrinsics!(_mm512_cvtepi8_epi16(_mm256_loadu_si256(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn pair(self, low: __m512i, high: __m512i) -> __m512i {
        intrinsics!(_mm512_or_si512(_mm512_slli_epi32::<16>(high), _mm512_and_si512(low, _mm512_set1_epi32(0xffff))))
    }
    #[inline(always)]
    fn mul_pairs(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsics!(_mm512_mullo_epi16(a, b))
    }
    #[inline(always)]
    fn dot_pairs(self, a: __m512i, b: __m512i) -> __m512i {
        intrinsics!(_mm512_madd_epi16(a, b))
    }
    #[inline(always)]
    fn to_f32(self, v: __m512i) -> __m512 {
        intrinsics!(_mm512_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn byte_to_f32(self, v: __m512i, j: usize) -> __m512 {
        intrinsics!({
            let shifted = _mm512_srl_epi32(v, _mm_cvtsi32_si128(8 * j as i32));
            _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(0xff)))
        })
    }
    #[inline(always)]
    fn signed_byte_to_f32(self, v: __m512i, j: usize) -> __m512 {
        intrinsics!({
            let top = _mm512_sll_epi32(v, _mm_cvtsi32_si128(24 - 8 * j as i32));
            _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(top))
        })
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        intrinsics!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn select(self, x: &[f32; 4], lanes: __m512i, shift: u32) -> __m512 {
        intrinsics!({
            let x = _mm512_broadcast_f32x4(_mm_loadu_ps(x.as_ptr()));
            // Higher bits are ignored.
            let lanes = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift as i32));
            _mm512_permutevar_ps(x, lanes)
        })
    }
    #[inline(always)]
    fn load_le_f32(self, from: &[u8]) -> __m512 {
        let from: &[u8; 64] = first(from);
        intrinsics!(_mm512_loadu_ps(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_le_f16(self, from: &[u8]) -> __m512 {
        let from: &[u8; 32] = first(from);
        intrinsics!(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_le_bf16(self, from: &[u8]) -> __m512 {
        let from: &[u8; 32] = first(from);
        intrinsics!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    fn load_e8m0(self, from: &[u8]) -> __m512 {
        let from: &[u8; 16] = first(from);
        intrinsics!({
            let exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            // Exponent 0 is the subnormal 2^−127.
            _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32::<23>(exponents), _mm512_set1_epi32(1 << 22)))
        })
    }
    #[inline(always)]
    fn load_e4m3_over_256(self, from: &[u8]) -> __m512 {
        let from: &[u8; 16] = first(from);
        intrinsics!({
            let codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.as_ptr().cast()));
            // Exponent and mantissa in place of f16's, and the sign, which widening has spread to bits 7 to 15. By way of f16,
            // whose subnormals are converted at full speed; those of f32 are slow to multiply.
            let halves = _mm256_and_si256(_mm256_slli_epi16::<7>(codes), _mm256_set1_epi16(0xbf80_u16 as i16));
            // The difference of the exponent biases is 8.
            _mm512_cvtph_ps(halves)
        })
    }
    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32]) {
        let to: &mut [f32; 16] = first_mut(to);
        intrinsics!(_mm512_storeu_ps(to.as_mut_ptr(), v));
    }
    #[inline(always)]
    fn sums_of_lanes(self, v: [__m512; 8]) -> [f32; 8] {
        intrinsics!({
            let mut halves = [_mm256_setzero_ps(); 8];
            let mut i = 0;
            while i < 8 {
                halves[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps::<1>(v[i]));
                i += 1;
            }
            sums_of_eight(halves)
        })
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsics!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsics!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsics!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsics!(_mm512_fmadd_ps(a, b, c))
    }
}
