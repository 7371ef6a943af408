//! x86-64 with AVX2, FMA and F16C.

use std::arch::x86_64::*;

use super::{Simd, WithSimd};

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }
}

/// Evaluates intrinsics of AVX2, FMA and F16C inside methods of [`Avx2`].
macro_rules! intrinsics {
    ($e:expr) => {{
        // SAFETY: a value of `Avx2` is proof of the instructions, and loads read whole arrays behind references.
        #[allow(clippy::macro_metavars_in_unsafe, reason = "the macro is private to methods of Avx2")]
        unsafe {
            $e
        }
    }};
}

impl Simd for Avx2 {
    type Bytes = __m256i;
    type I32 = __m256i;
    type F32 = __m256;

    #[inline]
    fn vectorize<W: WithSimd>(self, operation: W) -> W::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<W: WithSimd>(simd: Avx2, operation: W) -> W::Output {
            operation.with_simd(simd)
        }
        intrinsics!(inner(self, operation))
    }

    #[inline(always)]
    fn bytes(self, from: &[u8; 32]) -> __m256i {
        intrinsics!(_mm256_loadu_si256(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn bits(self, v: __m256i, shift: u32, mask: u8) -> __m256i {
        intrinsics!({
            let shifted = _mm256_srl_epi16(v, _mm_cvtsi32_si128(shift as i32));
            _mm256_and_si256(shifted, _mm256_set1_epi8(mask as i8))
        })
    }
    #[inline(always)]
    fn shift_left(self, v: __m256i, shift: u32) -> __m256i {
        intrinsics!(_mm256_sll_epi16(v, _mm_cvtsi32_si128(shift as i32)))
    }
    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        intrinsics!(_mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: __m256i) -> __m256i {
        intrinsics!({
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, v)
        })
    }

    #[inline(always)]
    fn quad(self, x: &[i8; 16], q: usize) -> __m256i {
        let four = [x[4 * q] as u8, x[4 * q + 1] as u8, x[4 * q + 2] as u8, x[4 * q + 3] as u8];
        intrinsics!(_mm256_set1_epi32(i32::from_le_bytes(four)))
    }
    #[inline(always)]
    fn repeat_byte(self, v: __m256i) -> __m256i {
        intrinsics!({
            let first = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
            _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(first))
        })
    }
    #[inline(always)]
    fn dot_unsigned(self, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        // An i16 holds two products of each of the four vectors: at most 8·32·127 = 32512.
        intrinsics!({
            let p0 = _mm256_maddubs_epi16(weights[0], x[0]);
            let p1 = _mm256_maddubs_epi16(weights[1], x[1]);
            let p2 = _mm256_maddubs_epi16(weights[2], x[2]);
            let p3 = _mm256_maddubs_epi16(weights[3], x[3]);
            let sum = _mm256_add_epi16(_mm256_add_epi16(p0, p1), _mm256_add_epi16(p2, p3));
            _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
        })
    }
    #[inline(always)]
    fn dot_signed(self, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        // The first factor of maddubs is unsigned: w·x = |w|·(x with the sign of w). |−128| = 128 is right as an unsigned byte,
        // and x is never −128, so that negating it does not overflow. Pairs sum to at most 2·128·127 = 32512.
        intrinsics!({
            let mut sum = _mm256_setzero_si256();
            let mut q = 0;
            while q < 4 {
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights[q]), _mm256_sign_epi8(x[q], weights[q]));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                q += 1;
            }
            sum
        })
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m256i {
        intrinsics!(_mm256_set1_epi32(value))
    }
    #[inline(always)]
    fn widen_i8(self, from: &[i8; 8]) -> __m256i {
        intrinsics!(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn add_i32(self, a: __m256i, b: __m256i) -> __m256i {
        intrinsics!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i32(self, a: __m256i, b: __m256i) -> __m256i {
        intrinsics!(_mm256_sub_epi32(a, b))
    }
    #[inline(always)]
    fn mul_i16(self, a: __m256i, b: i16) -> __m256i {
        // One instruction where a 32-bit product takes two: the high halves of `b` are 0.
        intrinsics!(_mm256_madd_epi16(a, _mm256_set1_epi32(i32::from(b as u16))))
    }
    #[inline(always)]
    fn to_f32(self, v: __m256i) -> __m256 {
        intrinsics!(_mm256_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn byte_to_f32(self, v: __m256i, j: usize) -> __m256 {
        intrinsics!({
            let shifted = _mm256_srl_epi32(v, _mm_cvtsi32_si128(8 * j as i32));
            _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(0xff)))
        })
    }
    #[inline(always)]
    fn signed_byte_to_f32(self, v: __m256i, j: usize) -> __m256 {
        intrinsics!({
            let top = _mm256_sll_epi32(v, _mm_cvtsi32_si128(24 - 8 * j as i32));
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(top))
        })
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        intrinsics!(_mm256_set1_ps(value))
    }
    #[inline(always)]
    fn select(self, x: &[f32; 4], lanes: __m256i, shift: u32) -> __m256 {
        intrinsics!({
            let x = _mm_loadu_ps(x.as_ptr());
            // Higher bits are ignored.
            let lanes = _mm256_srl_epi32(lanes, _mm_cvtsi32_si128(shift as i32));
            _mm256_permutevar_ps(_mm256_set_m128(x, x), lanes)
        })
    }
    #[inline(always)]
    fn load_le_f32(self, from: &[u8; 32]) -> __m256 {
        intrinsics!(_mm256_loadu_ps(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_le_f16(self, from: &[u8; 16]) -> __m256 {
        intrinsics!(_mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_le_bf16(self, from: &[u8; 16]) -> __m256 {
        intrinsics!({
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    fn load_e8m0(self, from: &[u8; 8]) -> __m256 {
        intrinsics!({
            let exponents = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.as_ptr().cast()));
            // Exponent 0 is the subnormal 2^−127.
            _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32::<23>(exponents), _mm256_set1_epi32(1 << 22)))
        })
    }
    #[inline(always)]
    fn load_e4m3(self, from: &[u8; 8]) -> __m256 {
        intrinsics!({
            let codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(from.as_ptr().cast()));
            // Exponent and mantissa in place of f16's, and the sign, which widening has spread to bits 7 to 15. By way of f16,
            // whose subnormals are converted at full speed; those of f32 are slow to multiply.
            let halves = _mm_and_si128(_mm_slli_epi16::<7>(codes), _mm_set1_epi16(0xbf80_u16 as i16));
            // The difference of the exponent biases is 8.
            _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0))
        })
    }
    #[inline(always)]
    fn store(self, v: __m256) -> [f32; 8] {
        let mut out = [0.0; 8];
        intrinsics!(_mm256_storeu_ps(out.as_mut_ptr(), v));
        out
    }
    #[inline(always)]
    fn sums_of_lanes(self, v: [__m256; 8]) -> [f32; 8] {
        intrinsics!({
            // Each half of a vector is summed up for four vectors at once.
            let first = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
            let last = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
            let low = _mm256_permute2f128_ps::<0x20>(first, last);
            let high = _mm256_permute2f128_ps::<0x31>(first, last);
            self.store(_mm256_add_ps(low, high))
        })
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        intrinsics!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        intrinsics!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        intrinsics!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        intrinsics!(_mm256_fmadd_ps(a, b, c))
    }
}
