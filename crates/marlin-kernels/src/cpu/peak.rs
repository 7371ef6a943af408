//! How fast the processor multiplies what lies in its registers: more than any kernel reaches.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Arithmetic;
use super::simd::{MOST_LANES, Simd, SimdLevel, WithSimd};
use super::threads::Threads;

/// For how long is measured: long beside the start of a thread, short beside a test.
const LEAST_TIME: Duration = Duration::from_millis(20);
/// Tasks of a thread between looks at the clock: threads end together but for the last task.
const TASKS_PER_THREAD: usize = 64;
/// Repetitions of a task.
const STEPS: usize = 4096;
/// Sums that do not wait for each other: two products a cycle, each of which takes five.
const CHAINS: usize = 10;
/// Products that each chain adds in a step.
const PRODUCTS: usize = 4;

/// Multiply-adds a second of all threads together: of int8 dot products as those with weights of up to 5 bits, or of f32.
pub(super) fn multiply_adds_per_second(arithmetic: Arithmetic, simd: SimdLevel, threads: &Threads) -> f64 {
    let tasks = threads.count() * TASKS_PER_THREAD;
    let started = Instant::now();
    let mut done = 0.0;
    loop {
        threads.run(tasks, &|_| {
            simd.dispatch(Multiply(arithmetic)).expect("the backend was made for a SIMD level of this processor");
        });
        done += tasks as f64 * multiply_adds_of_task(arithmetic, simd);
        let elapsed = started.elapsed();
        if elapsed >= LEAST_TIME {
            return done / elapsed.as_secs_f64();
        }
    }
}

fn multiply_adds_of_task(arithmetic: Arithmetic, simd: SimdLevel) -> f64 {
    let of_product =
        simd.dispatch(OfProduct(arithmetic)).expect("the backend was made for a SIMD level of this processor");
    (STEPS * CHAINS * PRODUCTS * of_product) as f64
}

/// Multiply-adds of a product of two vectors.
struct OfProduct(Arithmetic);

impl WithSimd for OfProduct {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        match self.0 {
            Arithmetic::Exact => S::LANES,
            // Each of the vectors has four bytes a lane, which meet those of one row or of two.
            Arithmetic::Int8 => S::LANES * if S::TWO_ROWS { 8 } else { 4 },
        }
    }
}

/// A task.
struct Multiply(Arithmetic);

impl WithSimd for Multiply {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.0 {
            Arithmetic::Exact => multiply_floats(simd),
            Arithmetic::Int8 => multiply_bytes(simd),
        }
    }
}

// In both, each pair of factors is another, and may have changed from step to step for all that the compiler knows: it can neither
// share a product nor take one out of the loop.

#[inline(always)]
fn multiply_floats<S: Simd>(simd: S) {
    let factors = ([simd.splat(1.0); PRODUCTS], [simd.splat(1e-3); CHAINS]);
    let mut sums = [simd.splat(0.0); CHAINS];
    for _ in 0..STEPS {
        let (weights, x) = black_box(&factors);
        for chain in 0..CHAINS {
            for weights in weights {
                sums[chain] = simd.mul_add(*weights, x[chain], sums[chain]);
            }
        }
    }
    black_box(sums);
}

#[inline(always)]
fn multiply_bytes<S: Simd>(simd: S) {
    let ones = simd.bytes(&[1; 4 * MOST_LANES]);
    let factors = ([ones; PRODUCTS], [ones; CHAINS]);
    let mut sums = [simd.splat_i32(0); CHAINS];
    for _ in 0..STEPS {
        let (weights, x) = black_box(&factors);
        for chain in 0..CHAINS {
            sums[chain] = simd.add_products(sums[chain], *weights, [x[chain]; PRODUCTS]);
        }
    }
    black_box(sums);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_multiplies() {
        let threads = Threads::new(2).unwrap();
        for simd in SimdLevel::available() {
            for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
                let rate = multiply_adds_per_second(arithmetic, simd, &threads);
                println!("{simd} {arithmetic:?}: {:.2} G/s", rate / 1e9);
                assert!(rate > 0.0 && rate.is_finite(), "{simd}, {arithmetic:?}: {rate}");
            }
        }
    }
}
