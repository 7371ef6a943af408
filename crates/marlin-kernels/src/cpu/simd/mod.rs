//! Vectors of eight or sixteen lanes, chosen at run time.
//!
//! Kernels are written once, generic over [`Simd`], and compiled for each instruction set. A value of a `Simd` type exists
//! only where its instructions do, so its methods are safe to call.

use std::fmt;

use half::f16;

use crate::KernelError;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod dots;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dots;
mod portable;

// `Simd` reads numbers as their bytes, and tiles hold them as bytes.
const _: () = assert!(cfg!(target_endian = "little"), "the CPU kernels are written for little-endian targets");

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SimdLevel {
    /// Whatever the compiler assumes of the target.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (2013 and later).
    Avx2,
    /// The same with AVX-VNNI (2021 and later).
    AvxVnni,
    /// x86-64 with AVX-512 (F, BW, DQ, VL) and its VNNI, in vectors of 512 bits (2019 and later).
    Avx512Vnni,
    /// AArch64 with Advanced SIMD.
    Neon,
    /// The same with dot products of bytes (Armv8.4, Apple's M1 and later).
    NeonDotprod,
    /// The same with products of matrices of bytes, where there are several rows of input (Armv8.6, Apple's M2 and later).
    NeonI8mm,
}

impl SimdLevel {
    const ALL: [Self; 7] =
        [Self::Portable, Self::Avx2, Self::AvxVnni, Self::Avx512Vnni, Self::Neon, Self::NeonDotprod, Self::NeonI8mm];

    /// The best level of this processor.
    pub fn detect() -> Self {
        Self::available().last().copied().unwrap_or(Self::Portable)
    }

    /// The levels that this processor has, the best one last.
    pub fn available() -> Vec<Self> {
        struct Probe;
        impl WithSimd for Probe {
            type Output = ();
            fn with_simd<S: Simd>(self, _: S) {}
        }
        Self::ALL.into_iter().filter(|level| level.dispatch(Probe).is_ok()).collect()
    }

    /// Runs `operation` compiled for this level.
    ///
    /// # Errors
    /// If this processor lacks the level.
    pub(crate) fn dispatch<W: WithSimd>(self, operation: W) -> Result<W::Output, KernelError> {
        match self {
            Self::Portable => Some(portable::Portable.vectorize(operation)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::<dots::Maddubs>::detect().map(|simd| simd.vectorize(operation)),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => avx2::Avx2::<dots::AvxVnni>::detect().map(|simd| simd.vectorize(operation)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => avx512::Avx512::detect().map(|simd| simd.vectorize(operation)),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::Neon::<neon_dots::Widening>::detect().map(|simd| simd.vectorize(operation)),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => neon::Neon::<neon_dots::Sdot>::detect().map(|simd| simd.vectorize(operation)),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => neon::Neon::<neon_dots::Smmla>::detect().map(|simd| simd.vectorize(operation)),
            #[allow(unreachable_patterns, reason = "levels of other architectures")]
            _ => None,
        }
        .ok_or_else(|| {
            KernelError::Device(format!("this processor has no {self} instructions; use another SIMD level"))
        })
    }
}

impl fmt::Display for SimdLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon-dotprod",
            Self::NeonI8mm => "neon-i8mm",
        })
    }
}

/// Code that is generic over the instruction set.
///
/// Implementations of `with_simd`, and every generic function below it, must be `#[inline(always)]` and free of closures:
/// only what is inlined into [`Simd::vectorize`] is compiled with the instruction set.
pub(crate) trait WithSimd {
    type Output;
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output;
}

/// The most lanes of any level.
pub(crate) const MOST_LANES: usize = 16;

/// An instruction set: vectors of [`Simd::LANES`] lanes of 32 bits, or of bytes of which four belong to each lane.
///
/// All levels round alike except that only some fuse [`Simd::mul_add`], and that sums over vectors take as many partial sums as there are
/// lanes. What is loaded or stored is the beginning of a slice, which must have room for a whole vector.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector, a power of two.
    const LANES: usize;
    /// Vector registers.
    const REGISTERS: usize;
    /// Whether [`Simd::add_dot_unsigned`] takes weights of all values, up to 255.
    const ANY_UNSIGNED: bool;
    /// Whether [`Simd::dots_of_two`] takes fewer instructions than two sums of one row.
    const TWO_ROWS: bool = false;
    /// Four bytes a lane; byte `4·lane + j` is byte `j` of the lane.
    type Bytes: Copy;
    /// An i32 a lane.
    type I32: Copy;
    /// An f32 a lane.
    type F32: Copy;
    /// The level of this family that lacks nothing of this one but its dot products of bytes: what multiplies in f32 is compiled for that one only.
    type Base: Simd;

    /// The processor has it, too.
    fn base(self) -> Self::Base;

    /// Runs `operation` with this instruction set enabled.
    fn vectorize<W: WithSimd>(self, operation: W) -> W::Output;

    /// Asks for the memory `ahead` bytes after where `at` begins to be brought into the caches; only a hint.
    #[inline(always)]
    fn prefetch(self, _at: &[u8], _ahead: usize) {}
    fn bytes(self, from: &[u8]) -> Self::Bytes;
    /// `(v >> shift) & mask`, byte by byte; `mask` leaves no bit that comes from a neighbouring byte.
    fn bits(self, v: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes;
    /// `v << shift`, byte by byte, where no bit leaves its byte.
    fn shift_left(self, v: Self::Bytes, shift: u32) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Signed bytes plus 128, as unsigned ones.
    fn plus_128(self, v: Self::Bytes) -> Self::Bytes;
    /// `table[v]`, byte by byte; `v` is below 16.
    fn lookup(self, table: &[u8; 16], v: Self::Bytes) -> Self::Bytes;

    /// `x[4q .. 4q + 4]` in every lane.
    fn quad(self, x: &[i8; 16], q: usize) -> Self::Bytes;
    /// The low byte of each lane in all four of its bytes.
    fn repeat_byte(self, v: Self::I32) -> Self::Bytes;
    /// `sum` and the dot product of each lane's 16 weights with its 16 bytes of `x`. Weights are unsigned and, but for
    /// [`Simd::ANY_UNSIGNED`], at most 32, so that eight products of at most 32·127 sum to at most 32512 and fit i16 (a lane's 16 products
    /// are summed as two such sums).
    fn add_dot_unsigned(self, sum: Self::I32, weights: [Self::Bytes; 4], x: [Self::Bytes; 4]) -> Self::I32;
    /// `sum` and the dot product of each lane's 16 signed weights (−128 to 127) with its 16 bytes of `x`, none of them −128.
    fn add_dot_signed(self, sum: Self::I32, weights: [Self::Bytes; 4], x: [Self::Bytes; 4]) -> Self::I32;

    /// One of these two, with 16 bytes that all lanes share.
    #[inline(always)]
    fn add_dot_shared(self, unsigned: bool, sum: Self::I32, weights: [Self::Bytes; 4], x: &[i8; 16]) -> Self::I32 {
        let x = [self.quad(x, 0), self.quad(x, 1), self.quad(x, 2), self.quad(x, 3)];
        if unsigned { self.add_dot_unsigned(sum, weights, x) } else { self.add_dot_signed(sum, weights, x) }
    }
    /// `Σ (weight − offset) · x` of each lane for two rows of `x`, which all lanes share. Weights are signed, 16 for each run of as
    /// many inputs, none of which is −128; `minus_sums` of a row add up to `−Σ x`.
    #[inline(always)]
    fn dots_of_two<const RUNS: usize>(
        self,
        weights: [[Self::Bytes; 4]; RUNS],
        offset: Self::I32,
        x: [[&[i8; 16]; RUNS]; 2],
        minus_sums: [[i16; 2]; 2],
    ) -> [Self::I32; 2] {
        dots_of_each(self, weights, offset, x, minus_sums)
    }

    /// [`Simd::add_dot_unsigned`] or, with [`Simd::TWO_ROWS`], as many of the instructions that sum up two rows. Their sums stand in an order
    /// of their own: this serves to measure how fast they are.
    #[inline(always)]
    fn add_products(self, sum: Self::I32, weights: [Self::Bytes; 4], x: [Self::Bytes; 4]) -> Self::I32 {
        self.add_dot_unsigned(sum, weights, x)
    }

    fn splat_i32(self, value: i32) -> Self::I32;
    fn widen_i8(self, from: &[i8]) -> Self::I32;
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Two i8 a lane, as the i16 of its halves.
    fn widen_pairs(self, from: &[i8]) -> Self::I32;
    /// The low halves of the lanes of two vectors: of `low` in the low half, of `high` in the high one.
    fn pair(self, low: Self::I32, high: Self::I32) -> Self::I32;
    /// `x` in the halves of every lane.
    #[inline(always)]
    fn splat_pair(self, x: &[i16; 2]) -> Self::I32 {
        self.splat_i32(bytemuck::cast(*x))
    }
    /// The products of the i16 in the halves of lanes, which fit i16.
    fn mul_pairs(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// The dot product of the two i16 of each lane of `a` with those of `b`.
    fn dot_pairs(self, a: Self::I32, b: Self::I32) -> Self::I32;
    fn to_f32(self, v: Self::I32) -> Self::F32;
    /// Byte `j` of each lane, unsigned.
    fn byte_to_f32(self, v: Self::Bytes, j: usize) -> Self::F32;
    /// Byte `j` of each lane, signed.
    fn signed_byte_to_f32(self, v: Self::Bytes, j: usize) -> Self::F32;

    fn splat(self, value: f32) -> Self::F32;
    /// f32 in memory.
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::F32 {
        self.load_le_f32(bytemuck::cast_slice(from))
    }
    /// f16 in memory.
    #[inline(always)]
    fn load_f16(self, from: &[f16]) -> Self::F32 {
        self.load_le_f16(bytemuck::cast_slice(from))
    }
    /// `x[(lane >> shift) & 3]` for each lane.
    fn select(self, x: &[f32; 4], lanes: Self::Bytes, shift: u32) -> Self::F32;
    /// Little-endian f32.
    fn load_le_f32(self, from: &[u8]) -> Self::F32;
    /// Little-endian f16.
    fn load_le_f16(self, from: &[u8]) -> Self::F32;
    /// Little-endian bf16.
    fn load_le_bf16(self, from: &[u8]) -> Self::F32;
    /// OCP E8M0: 2^(e − 127); 255 gives infinity.
    fn load_e8m0(self, from: &[u8]) -> Self::F32;
    /// OCP E4M3, over 256; the two NaN codes give ±480 / 256.
    fn load_e4m3_over_256(self, from: &[u8]) -> Self::F32;
    fn store(self, v: Self::F32, to: &mut [f32]);
    /// The lanes; zeros where a level has fewer.
    #[inline(always)]
    fn lanes(self, v: Self::F32) -> [f32; MOST_LANES] {
        let mut lanes = [0.0; MOST_LANES];
        self.store(v, &mut lanes);
        lanes
    }
    /// The sum of the lanes of each vector: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), of sixteen lanes after 8 to 15 are added to 0 to 7.
    fn sums_of_lanes(self, vectors: [Self::F32; 8]) -> [f32; 8];
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a · b + c`, rounded once where the instruction set can.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
}

/// [`Simd::dots_of_two`], one row after the other.
#[inline(always)]
fn dots_of_each<S: Simd, const RUNS: usize>(
    simd: S,
    weights: [[S::Bytes; 4]; RUNS],
    offset: S::I32,
    x: [[&[i8; 16]; RUNS]; 2],
    minus_sums: [[i16; 2]; 2],
) -> [S::I32; 2] {
    let offset = simd.pair(offset, offset);
    let mut sums = minus_sums.map(|minus_sums| simd.dot_pairs(offset, simd.splat_pair(&minus_sums)));
    for (sum, x) in sums.iter_mut().zip(x) {
        for (weights, x) in weights.into_iter().zip(x) {
            *sum = simd.add_dot_shared(false, *sum, weights, x);
        }
    }
    sums
}

/// Bytes that come from memory together.
pub(crate) const CACHE_LINE: usize = 64;

/// The beginning of a slice.
#[inline(always)]
fn first<T, const N: usize>(from: &[T]) -> &[T; N] {
    from.first_chunk().expect("a whole vector in memory")
}

/// The beginning of a slice, to be written.
#[inline(always)]
fn first_mut<T, const N: usize>(to: &mut [T]) -> &mut [T; N] {
    to.first_chunk_mut().expect("room for a whole vector in memory")
}

#[cfg(test)]
mod tests;
