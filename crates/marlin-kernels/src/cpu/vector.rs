//! Vector arithmetic that several operations share, generic over the instruction set.
//!
//! Sums run in a fixed number of partial sums, so that a result depends on the data and the instruction set alone.

use super::simd::{MOST_LANES, Simd};
use crate::{Activation, RopeLayout};

/// A vector of values from `start` on; zeros beyond the end.
#[inline(always)]
pub(super) fn load<S: Simd>(simd: S, from: &[f32], start: usize) -> S::F32 {
    let from = &from[start..];
    if from.len() >= S::LANES {
        return simd.load(from);
    }
    let mut padded = [0.0; MOST_LANES];
    padded[..from.len()].copy_from_slice(from);
    simd.load(&padded)
}

/// Dot products of several vectors with `y`, of equal lengths. Each is the same to the bit as if computed alone.
#[inline(always)]
pub(super) fn dots<S: Simd, const N: usize>(simd: S, xs: [&[f32]; N], y: &[f32]) -> [f32; N] {
    let mut even = [simd.splat(0.0); N];
    let mut odd = [simd.splat(0.0); N];
    let mut start = 0;
    while start < y.len() {
        let values = load(simd, y, start);
        for n in 0..N {
            even[n] = simd.mul_add(load(simd, xs[n], start), values, even[n]);
        }
        start += S::LANES;
        if start < y.len() {
            let values = load(simd, y, start);
            for n in 0..N {
                odd[n] = simd.mul_add(load(simd, xs[n], start), values, odd[n]);
            }
            start += S::LANES;
        }
    }
    let mut results = [0.0; N];
    for n in 0..N {
        results[n] = sum(simd.lanes(simd.add(even[n], odd[n])));
    }
    results
}

/// The sum of all values, by halves.
#[inline(always)]
pub(super) fn sum<const N: usize>(mut values: [f32; N]) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            values[i] += values[i + half];
        }
        half /= 2;
    }
    values[0]
}

/// The largest of all values and `least`, by halves. If there are NaNs, any of them.
#[inline(always)]
pub(super) fn max<const N: usize>(mut values: [f32; N], least: f32) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            values[i] = if values[i + half] > values[i] { values[i + half] } else { values[i] };
        }
        half /= 2;
    }
    if values[0] > least { values[0] } else { least }
}

/// eˣ for x ≤ 0 within 2 ulp; 0 below −87. (Cephes' expf, arranged without branches so that loops over it vectorise.)
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 = 0.693359375 − 2.12194440e-4, of which the first has few enough bits for an exact product.
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let result = (p * r * r + r + 1.0) * power;
    if x < -87.0 { 0.0 } else { result }
}

/// x · σ(x).
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    // σ(x) of |x|, and σ(−x) = 1 − σ(x) without the difference.
    let e = exp(-x.abs());
    x * (if x < 0.0 { e } else { 1.0 }) / (1.0 + e)
}

/// x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    // (1 + tanh(y)) / 2 = σ(2y)
    let y = 2.0 * 0.797_884_6 * (x + 0.044715 * x * x * x);
    let e = exp(-y.abs());
    x * (if y < 0.0 { e } else { 1.0 }) / (1.0 + e)
}

/// [`Activation::ClampedSwiglu`] of a gate and what it gates.
#[inline(always)]
pub(super) fn clamped_swiglu(gate: f32, up: f32) -> f32 {
    let limit = Activation::SWIGLU_LIMIT;
    // NaN stays NaN, unlike under `f32::min`.
    let gate = if gate > limit { limit } else { gate };
    silu(Activation::SWIGLU_ALPHA * gate) * (1.0 / Activation::SWIGLU_ALPHA) * (up.clamp(-limit, limit) + 1.0)
}

/// `x = x / sqrt(mean(x²) + eps) · weight`.
#[inline(always)]
pub(super) fn rms_norm<S: Simd>(simd: S, x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = inverse_rms(simd, x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

/// `out += x / sqrt(mean(x²) + eps) · weight`.
#[inline(always)]
pub(super) fn rms_norm_add<S: Simd>(simd: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = inverse_rms(simd, x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out += x * scale * weight;
    }
}

#[inline(always)]
fn inverse_rms<S: Simd>(simd: S, x: &[f32], eps: f32) -> f32 {
    let [square] = dots(simd, [x], x);
    1.0 / (square / x.len() as f32 + eps).sqrt()
}

/// Rotates the first dimensions of a head; `angles` are as many cosines as there are pairs, then as many sines.
#[inline(always)]
pub(super) fn rotate(head: &mut [f32], angles: &[f32], layout: RopeLayout) {
    let half = angles.len() / 2;
    let (cos, sin) = angles.split_at(half);
    match layout {
        RopeLayout::HalfSplit => {
            let (low, high) = head[..2 * half].split_at_mut(half);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
        RopeLayout::Interleaved => {
            for (([a, b], cos), sin) in head[..2 * half].as_chunks_mut().0.iter_mut().zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_and_zero_far_out() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) is off by {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-87.5), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn activations_are_exact_to_a_few_bits() {
        for i in -20_000..=20_000 {
            let x = i as f32 / 1000.0;
            let wide = f64::from(x);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            for (found, exact) in
                [(silu(x), wide / (1.0 + (-wide).exp())), (gelu_tanh(x), wide / (1.0 + (-2.0 * inner).exp()))]
            {
                // Far out on the left, an error of the exponent is one of the result.
                let bound = 1e-6 * exact.abs() * (1.0 + inner.abs()) + 1e-36;
                assert!((f64::from(found) - exact).abs() <= bound, "{x}: {found:e}, {exact:e}");
            }
        }
        assert!(silu(f32::NAN).is_nan() && gelu_tanh(f32::NAN).is_nan());
        assert_eq!((silu(-200.0), silu(200.0), gelu_tanh(-200.0), gelu_tanh(200.0)), (0.0, 200.0, 0.0, 200.0));
    }
}
