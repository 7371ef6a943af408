//! Sums of products of bytes on x86-64: what each generation of processors has for them.

use std::arch::x86_64::*;

use super::WithSimd;
use super::avx2::Avx2;

/// Instructions that multiply bytes and sum them up, beside AVX2, FMA and F16C.
pub(crate) trait Dots: Send + Sync + Sized + 'static {
    /// [`super::Simd::ANY_UNSIGNED`].
    const ANY_UNSIGNED: bool;

    /// Whether the processor has them.
    fn detect() -> bool;

    /// Runs `operation` with all instructions enabled.
    ///
    /// # Safety
    /// The processor has them: `simd` is proof of it.
    unsafe fn vectorize<W: WithSimd>(simd: Avx2<Self>, operation: W) -> W::Output;

    /// [`super::Simd::add_dot_unsigned`].
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn add_dot_unsigned(sum: __m256i, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i;

    /// [`super::Simd::add_dot_signed`].
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn add_dot_signed(sum: __m256i, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i;
}

/// Those of AVX2, which sum in 16 bits.
pub(crate) struct Maddubs;

impl Dots for Maddubs {
    const ANY_UNSIGNED: bool = false;

    fn detect() -> bool {
        true
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn vectorize<W: WithSimd>(simd: Avx2<Self>, operation: W) -> W::Output {
        operation.with_simd(simd)
    }

    #[inline(always)]
    unsafe fn add_dot_unsigned(sum: __m256i, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        // An i16 holds two products of each of the four vectors: at most 8·32·127 = 32512.
        // SAFETY: the caller's.
        unsafe {
            let p0 = _mm256_maddubs_epi16(weights[0], x[0]);
            let p1 = _mm256_maddubs_epi16(weights[1], x[1]);
            let p2 = _mm256_maddubs_epi16(weights[2], x[2]);
            let p3 = _mm256_maddubs_epi16(weights[3], x[3]);
            let pairs = _mm256_add_epi16(_mm256_add_epi16(p0, p1), _mm256_add_epi16(p2, p3));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn add_dot_signed(sum: __m256i, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        // Pairs sum to at most 2·128·127 = 32512.
        // SAFETY: the caller's.
        unsafe {
            let (mut sum, mut q) = (sum, 0);
            while q < 4 {
                let (size, x) = signs_moved(weights[q], x[q]);
                let pairs = _mm256_maddubs_epi16(size, x);
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                q += 1;
            }
            sum
        }
    }
}

/// The first factor of all these instructions is unsigned: w·x = |w|·(x with the sign of w). |−128| = 128 is right as an unsigned byte,
/// and x is never −128, so that negating it does not overflow.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn signs_moved(weights: __m256i, x: __m256i) -> (__m256i, __m256i) {
    // SAFETY: the caller's.
    unsafe { (_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights)) }
}

/// AVX-VNNI (Alder Lake, Zen 5 and later): adds four products of bytes to each lane, exactly.
pub(crate) struct AvxVnni;

impl Dots for AvxVnni {
    const ANY_UNSIGNED: bool = true;

    fn detect() -> bool {
        is_x86_feature_detected!("avxvnni")
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn vectorize<W: WithSimd>(simd: Avx2<Self>, operation: W) -> W::Output {
        operation.with_simd(simd)
    }

    #[inline(always)]
    unsafe fn add_dot_unsigned(sum: __m256i, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        // SAFETY: the caller's.
        unsafe {
            let (mut sum, mut q) = (sum, 0);
            while q < 4 {
                sum = _mm256_dpbusd_avx_epi32(sum, weights[q], x[q]);
                q += 1;
            }
            sum
        }
    }

    #[inline(always)]
    unsafe fn add_dot_signed(sum: __m256i, weights: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
        // SAFETY: the caller's.
        unsafe {
            let (mut sum, mut q) = (sum, 0);
            while q < 4 {
                let (size, x) = signs_moved(weights[q], x[q]);
                sum = _mm256_dpbusd_avx_epi32(sum, size, x);
                q += 1;
            }
            sum
        }
    }
}
