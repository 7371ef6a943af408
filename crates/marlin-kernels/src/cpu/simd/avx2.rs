//! x86-64 with AVX2, FMA and F16C, and the ways in which such processors multiply bytes.

use std::arch::x86_64::*;
use std::fmt;
use std::marker::PhantomData;

use super::dots::{Dots, Maddubs};
use super::{Simd, WithSimd, first, first_mut};

/// Proof that the processor has AVX2, FMA and F16C, and what `D` needs besides.
pub(crate) struct Avx2<D>(PhantomData<D>);

impl<D> Clone for Avx2<D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D> Copy for Avx2<D> {}

impl<D> fmt::Debug for Avx2<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::any::type_name::<Self>())
    }
}

impl<D: Dots> Avx2<D> {
    pub(crate) fn detect() -> Option<Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        (found && D::detect()).then_some(Self(PhantomData))
    }
}

/// [`Simd::sums_of_lanes`].
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
pub(super) unsafe fn sums_of_eight(v: [__m256; 8]) -> [f32; 8] {
    let mut sums = [0.0; 8];
    // SAFETY: the caller's, and the array has room for a vector.
    unsafe {
        // Each half of a vector is summed up for four vectors at once.
        let first = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        let last = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
        let low = _mm256_permute2f128_ps::<0x20>(first, last);
        let high = _mm256_permute2f128_ps::<0x31>(first, last);
        _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(low, high));
    }
    sums
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

impl<D: Dots> Simd for Avx2<D> {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const ANY_UNSIGNED: bool = D::ANY_UNSIGNED;
    type Bytes = __m256i;
    type I32 = __m256i;
    type F32 = __m256;
    type Base = Avx2<Maddubs>;

    fn base(self) -> Avx2<Maddubs> {
        Avx2(PhantomData)
    }

    #[inline]
    fn vectorize<W: WithSimd>(self, operation: W) -> W::Output {
        intrinsics!(D::vectorize(self, operation))
    }

    #[inline(always)]
    fn prefetch(self, at: &[u8], ahead: usize) {
        // Of an address where there is no memory nothing comes.
        intrinsics!(_mm_prefetch::<_MM_HINT_T0>(at.as_ptr().wrapping_add(ahead).cast()));
    }
    #[inline(always)]
    fn bytes(self, from: &[u8]) -> __m256i {
        let from: &[u8; 32] = first(from);
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
    fn plus_128(self, v: __m256i) -> __m256i {
        intrinsics!(_mm256_xor_si256(v, _mm256_set1_epi8(-128)))
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
    fn add_dot_unsigned(self, sum: __m256i, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        intrinsics!(D::add_dot_unsigned(sum, weights, x))
    }
    #[inline(always)]
    fn add_dot_signed(self, sum: __m256i, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        intrinsics!(D::add_dot_signed(sum, weights, x))
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m256i {
        intrinsics!(_mm256_set1_epi32(value))
    }
    #[inline(always)]
    fn widen_i8(self, from: &[i8]) -> __m256i {
        let from: &[i8; 8] = first(from);
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
    fn widen_pairs(self, from: &[i8]) -> __m256i {
        let from: &[i8; 16] = first(from);
        intrinsics!(_mm256_cvtepi8_epi16(_mm_loadu_si128(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn pair(self, low: __m256i, high: __m256i) -> __m256i {
        intrinsics!(_mm256_or_si256(_mm256_slli_epi32::<16>(high), _mm256_and_si256(low, _mm256_set1_epi32(0xffff))))
    }
    #[inline(always)]
    fn mul_pairs(self, a: __m256i, b: __m256i) -> __m256i {
        intrinsics!(_mm256_mullo_epi16(a, b))
    }
    #[inline(always)]
    fn dot_pairs(self, a: __m256i, b: __m256i) -> __m256i {
        intrinsics!(_mm256_madd_epi16(a, b))
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
    fn load_le_f32(self, from: &[u8]) -> __m256 {
        let from: &[u8; 32] = first(from);
        intrinsics!(_mm256_loadu_ps(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_le_f16(self, from: &[u8]) -> __m256 {
        let from: &[u8; 16] = first(from);
        intrinsics!(_mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_le_bf16(self, from: &[u8]) -> __m256 {
        let from: &[u8; 16] = first(from);
        intrinsics!({
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    fn load_e8m0(self, from: &[u8]) -> __m256 {
        let from: &[u8; 8] = first(from);
        intrinsics!({
            let exponents = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.as_ptr().cast()));
            // Exponent 0 is the subnormal 2^−127.
            _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32::<23>(exponents), _mm256_set1_epi32(1 << 22)))
        })
    }
    #[inline(always)]
    fn load_e4m3_over_256(self, from: &[u8]) -> __m256 {
        let from: &[u8; 8] = first(from);
        intrinsics!({
            let codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(from.as_ptr().cast()));
            // Exponent and mantissa in place of f16's, and the sign, which widening has spread to bits 7 to 15. By way of f16,
            // whose subnormals are converted at full speed; those of f32 are slow to multiply.
            let halves = _mm_and_si128(_mm_slli_epi16::<7>(codes), _mm_set1_epi16(0xbf80_u16 as i16));
            // The difference of the exponent biases is 8.
            _mm256_cvtph_ps(halves)
        })
    }
    #[inline(always)]
    fn store(self, v: __m256, to: &mut [f32]) {
        let to: &mut [f32; 8] = first_mut(to);
        intrinsics!(_mm256_storeu_ps(to.as_mut_ptr(), v));
    }
    #[inline(always)]
    fn sums_of_lanes(self, v: [__m256; 8]) -> [f32; 8] {
        intrinsics!(sums_of_eight(v))
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
