//! Every level against plain arithmetic.

use std::array::from_fn;

use half::{bf16, f16};

use super::*;

/// Runs a check on every level that this processor has.
fn on_every_level<W: WithSimd<Output = ()> + Copy>(check: W) {
    for level in SimdLevel::available() {
        level.dispatch(check).unwrap();
    }
}

fn lanes<S: Simd>(simd: S, v: S::I32) -> Vec<i32> {
    floats_of(simd, simd.to_f32(v)).into_iter().map(|v| v as i32).collect()
}

fn floats_of<S: Simd>(simd: S, v: S::F32) -> Vec<f32> {
    let mut out = vec![0.0; S::LANES];
    simd.store(v, &mut out);
    out
}

/// Byte `4·lane + j` of a vector.
fn bytes<S: Simd>(simd: S, v: S::Bytes) -> Vec<u8> {
    let mut out = vec![0; 4 * S::LANES];
    for j in 0..4 {
        for (lane, value) in floats_of(simd, simd.byte_to_f32(v, j)).into_iter().enumerate() {
            out[4 * lane + j] = value as u8;
        }
    }
    out
}

/// `f(0)`, `f(1)` and so on.
fn list<T>(count: usize, f: impl FnMut(usize) -> T) -> Vec<T> {
    (0..count).map(f).collect()
}

#[test]
fn the_best_level_is_available() {
    assert!(SimdLevel::available().contains(&SimdLevel::detect()));
    assert!(SimdLevel::available().contains(&SimdLevel::Portable));
    #[cfg(target_arch = "aarch64")]
    assert!(SimdLevel::available().contains(&SimdLevel::Neon));
}

#[test]
fn bytes_are_shifted_masked_and_looked_up() {
    #[derive(Clone, Copy)]
    struct Check;
    impl WithSimd for Check {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            let table: [u8; 16] = from_fn(|i| (i * i + 30) as u8);
            let map = |from: &[u8], f: &dyn Fn(u8) -> u8| from.iter().map(|&b| f(b)).collect::<Vec<_>>();
            for start in (0..=255u8).step_by(4 * S::LANES) {
                let from = list(4 * S::LANES, |i| start + i as u8);
                let v = simd.bytes(&from);
                assert_eq!(bytes(simd, v), from);
                for shift in 0..8 {
                    let mask = 0xff >> shift;
                    assert_eq!(bytes(simd, simd.bits(v, shift, mask)), map(&from, &|b| b >> shift));
                    assert_eq!(bytes(simd, simd.bits(v, shift, mask & 1)), map(&from, &|b| b >> shift & 1));
                }
                let low = simd.bits(v, 0, 15);
                assert_eq!(bytes(simd, simd.shift_left(low, 4)), map(&from, &|b| b << 4));
                assert_eq!(bytes(simd, simd.plus_128(v)), map(&from, &|b| (i32::from(b as i8) + 128) as u8));
                assert_eq!(bytes(simd, simd.or(simd.shift_left(low, 4), low)), map(&from, &|b| b << 4 | b & 15));
                assert_eq!(bytes(simd, simd.lookup(&table, low)), map(&from, &|b| table[usize::from(b & 15)]));
                for j in 0..4 {
                    let signed = floats_of(simd, simd.signed_byte_to_f32(v, j));
                    assert_eq!(signed, list(S::LANES, |lane| f32::from(from[4 * lane + j] as i8)));
                }
            }
        }
    }
    on_every_level(Check);
}

#[test]
fn dot_products_hold_at_their_extremes() {
    #[derive(Clone, Copy)]
    struct Check;
    impl WithSimd for Check {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            let weights =
                |f: &dyn Fn(usize) -> u8| -> [Vec<u8>; 4] { from_fn(|q| list(4 * S::LANES, |i| f(31 * q + 7 * i))) };
            let start = simd.splat_i32(-9);
            let inputs: [[i8; 16]; 4] = [[127; 16], [-127; 16], [0; 16], from_fn(|i| (16 * i as i32 - 120) as i8)];
            for x in inputs {
                // The same inputs in every lane, and others in each.
                let quads: [_; 4] = from_fn(|q| simd.quad(&x, q));
                assert_eq!(quads.map(|v| bytes(simd, v)), from_fn(|q| list(4 * S::LANES, |i| x[4 * q + i % 4] as u8)));
                let rotated: [Vec<u8>; 4] = from_fn(|q| list(4 * S::LANES, |i| x[(4 * q + 3 * i) % 16] as u8));
                for x in [quads, rotated.each_ref().map(|x| simd.bytes(x))] {
                    let plain_x = x.map(|x| bytes(simd, x));
                    for w in [weights(&|_| 32), weights(&|_| 0), weights(&|i| (i % 33) as u8)] {
                        let dot = simd.add_dot_unsigned(start, w.each_ref().map(|w| simd.bytes(w)), x);
                        assert_eq!(lanes(simd, dot), plain_dot(-9, &w, &plain_x, i32::from));
                    }
                    for w in [weights(&|_| 255), weights(&|i| i as u8)] {
                        if S::ANY_UNSIGNED {
                            let dot = simd.add_dot_unsigned(start, w.each_ref().map(|w| simd.bytes(w)), x);
                            assert_eq!(lanes(simd, dot), plain_dot(-9, &w, &plain_x, i32::from));
                        }
                    }
                    for w in [weights(&|_| 0x80), weights(&|_| 127), weights(&|i| i as u8)] {
                        let dot = simd.add_dot_signed(start, w.each_ref().map(|w| simd.bytes(w)), x);
                        assert_eq!(lanes(simd, dot), plain_dot(-9, &w, &plain_x, |w| i32::from(w as i8)));
                    }
                }
            }
        }
    }
    on_every_level(Check);
}

#[test]
fn dot_products_with_inputs_that_lanes_share() {
    #[derive(Clone, Copy)]
    struct Check;
    impl WithSimd for Check {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            // Every byte has another place, so that one that meets the wrong input shows.
            let place = |half: usize, q: usize, i: usize| (67 * half + 16 * q + 29 * i) as u8;
            let halves: [[Vec<u8>; 4]; 2] =
                from_fn(|half| from_fn(|q| list(4 * S::LANES, |i| [0x80, 0x7f, place(half, q, i)][(i + q) % 3])));
            let weights = halves.each_ref().map(|half| half.each_ref().map(|quad| simd.bytes(quad)));
            let small: [Vec<u8>; 4] = from_fn(|q| list(4 * S::LANES, |i| place(0, q, i) % 33));
            let x: [[[i8; 16]; 2]; 2] = from_fn(|row| {
                from_fn(|half| {
                    from_fn(|i| [127, -127, (97 * row + 41 * half + 13 * i) as i8 | 1][(i + row + half) % 3])
                })
            });
            let shared = |x: &[i8; 16]| from_fn(|q| list(4 * S::LANES, |i| x[4 * q + i % 4] as u8));
            let signed = |w| i32::from(w as i8);
            let dot = |half: usize, row: usize| plain_dot(0, &halves[half], &shared(&x[row][half]), signed);

            let start = simd.splat_i32(-9);
            let sum = simd.add_dot_shared(false, start, weights[1], &x[0][1]);
            assert_eq!(lanes(simd, sum), list(S::LANES, |lane| dot(1, 0)[lane] - 9));
            let sum = simd.add_dot_shared(true, start, small.each_ref().map(|w| simd.bytes(w)), &x[1][0]);
            assert_eq!(lanes(simd, sum), plain_dot(-9, &small, &shared(&x[1][0]), i32::from));

            let offsets = list(S::LANES, |lane| [-128, 127, 5, 0][lane % 4]);
            let (offset, minus_sums) = (simd.widen_i8(&offsets), [[2032, 2032], [-2032, 77]]);
            let correction =
                |row: usize, lane: usize| minus_sums[row].map(i32::from).iter().sum::<i32>() * i32::from(offsets[lane]);
            for (half, weights) in weights.into_iter().enumerate() {
                let x = [[&x[0][half]], [&x[1][half]]];
                for (row, sum) in simd.dots_of_two([weights], offset, x, minus_sums).into_iter().enumerate() {
                    let wanted = list(S::LANES, |lane| dot(half, row)[lane] + correction(row, lane));
                    assert_eq!(lanes(simd, sum), wanted, "half {half}, row {row}");
                }
            }
            let x = x.each_ref().map(|row| row.each_ref());
            for (row, sum) in simd.dots_of_two(weights, offset, x, minus_sums).into_iter().enumerate() {
                let wanted = list(S::LANES, |lane| dot(0, row)[lane] + dot(1, row)[lane] + correction(row, lane));
                assert_eq!(lanes(simd, sum), wanted, "row {row}");
            }
        }
    }
    on_every_level(Check);
}

/// The peak counts on how many there are.
#[test]
fn every_product_is_added() {
    #[derive(Clone, Copy)]
    struct Check;
    impl WithSimd for Check {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            let (weights, x) = (simd.bytes(&[3; 4 * MOST_LANES]), simd.quad(&[-5; 16], 0));
            let sum = simd.add_products(simd.splat_i32(7), [weights; 4], [x; 4]);
            let products = if S::TWO_ROWS { 32 } else { 16 };
            assert_eq!(lanes(simd, sum), list(S::LANES, |_| 7 - 15 * products));
        }
    }
    on_every_level(Check);
}

fn plain_dot(start: i32, w: &[Vec<u8>; 4], x: &[Vec<u8>; 4], value: fn(u8) -> i32) -> Vec<i32> {
    let product = |k: usize, i: usize| value(w[k][i]) * i32::from(x[k][i] as i8);
    list(w[0].len() / 4, |lane| start + (0..16).map(|k| product(k / 4, 4 * lane + k % 4)).sum::<i32>())
}

#[test]
fn integers() {
    #[derive(Clone, Copy)]
    struct Check;
    impl WithSimd for Check {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            let from = list(S::LANES, |i| [-128, -127, -1, 0, 1, 2, 100, 127][i * 3 % 8]);
            let map = |f: &dyn Fn(i32) -> i32| from.iter().map(|&v| f(i32::from(v))).collect::<Vec<_>>();
            let v = simd.widen_i8(&from);
            assert_eq!(lanes(simd, v), map(&|v| v));
            assert_eq!(bytes(simd, simd.repeat_byte(v)), list(4 * S::LANES, |i| from[i / 4] as u8));
            assert_eq!(lanes(simd, simd.add_i32(v, simd.splat_i32(70_000))), map(&|v| v + 70_000));
            assert_eq!(lanes(simd, simd.sub_i32(v, simd.splat_i32(-9))), map(&|v| v + 9));
            let pairs = list(2 * S::LANES, |i| [-128, 3, 127, -1, 0, 100, -128, -128, 5, -7][i % 10]);
            let halves =
                |f: &dyn Fn(i32, i32) -> i32| list(S::LANES, |i| f(pairs[2 * i].into(), pairs[2 * i + 1].into()));
            let p = simd.widen_pairs(&pairs);
            for [a, b] in [[-4064, 1], [0, -1], [4064, 4064], [-4064, 0], [3, 5]] {
                let x = simd.splat_pair(&[a, b]);
                let (a, b) = (i32::from(a), i32::from(b));
                assert_eq!(lanes(simd, simd.dot_pairs(simd.pair(v, v), x)), map(&|v| v * (a + b)));
                assert_eq!(lanes(simd, simd.dot_pairs(p, x)), halves(&|low, high| low * a + high * b));
                let high = simd.splat_i32(-31);
                assert_eq!(lanes(simd, simd.dot_pairs(simd.pair(v, high), x)), map(&|v| v * a - 31 * b));
            }
            let (products, x) = (simd.mul_pairs(p, simd.splat_pair(&[-31, 200])), simd.splat_pair(&[30_000, -32_768]));
            let wanted = halves(&|low, high| -31 * low * 30_000 + 200 * high * -32_768);
            assert_eq!(lanes(simd, simd.dot_pairs(products, x)), wanted);
        }
    }
    on_every_level(Check);
}

#[test]
fn every_code_of_every_float_is_exact() {
    #[derive(Clone, Copy)]
    struct Check;
    impl WithSimd for Check {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            for start in (0..=u16::MAX).step_by(S::LANES) {
                let codes = list(S::LANES, |i| start + i as u16);
                let le: Vec<u8> = codes.iter().flat_map(|code| code.to_le_bytes()).collect();
                same(simd, simd.load_le_f16(&le), codes.iter().map(|&c| f16::from_bits(c).to_f32()));
                same(simd, simd.load_le_bf16(&le), codes.iter().map(|&c| bf16::from_bits(c).to_f32()));
            }
            for start in (0..=u8::MAX).step_by(S::LANES) {
                let codes = list(S::LANES, |i| start + i as u8);
                let e4m3 = codes.iter().map(|&c| match c & 0x7f {
                    0x7f => 480f32.copysign(if c < 128 { 1.0 } else { -1.0 }),
                    _ => marlin_format::Element::E4M3.value(u32::from(c)),
                });
                same(simd, simd.load_e4m3_over_256(&codes), e4m3.map(|value| value / 256.0));
                // 2^128 overflows to the infinity wanted for code 255.
                same(simd, simd.load_e8m0(&codes), codes.iter().map(|&c| 2f64.powi(i32::from(c) - 127) as f32));
            }
        }
    }
    on_every_level(Check);
}

/// Equal bit for bit, but any NaN for a NaN.
fn same<S: Simd>(simd: S, found: S::F32, wanted: impl Iterator<Item = f32>) {
    for (found, wanted) in floats_of(simd, found).into_iter().zip(wanted) {
        assert!(found.to_bits() == wanted.to_bits() || found.is_nan() && wanted.is_nan(), "{found:e} {wanted:e}");
    }
}

#[test]
fn floats() {
    #[derive(Clone, Copy)]
    struct Check;
    impl WithSimd for Check {
        type Output = ();
        fn with_simd<S: Simd>(self, simd: S) {
            let numbers = [1.0, -2.0, 0.5, 3.0, 1e10, -0.0, 7.0, 8.0, 4.0, 0.25, -1.5, 2.0, 1e-10, 1.0, 3.0, 0.0];
            let (a, b) = (list(S::LANES, |i| numbers[i]), list(S::LANES, |i| numbers[(i + 8) % 16]));
            let (va, vb, two) = (simd.load(&a), simd.load(&b), simd.splat(2.0));
            assert_eq!(floats_of(simd, simd.add(va, vb)), list(S::LANES, |i| a[i] + b[i]));
            assert_eq!(floats_of(simd, simd.sub(va, vb)), list(S::LANES, |i| a[i] - b[i]));
            assert_eq!(floats_of(simd, simd.mul(va, vb)), list(S::LANES, |i| a[i] * b[i]));
            let mut lanes = a.clone();
            lanes.resize(MOST_LANES, 0.0);
            assert_eq!(simd.lanes(va).to_vec(), lanes);
            let from = list(4 * S::LANES, |i| (37 * i + 11) as u8);
            let entries = [1.5, -2.0, f32::INFINITY, 3e-40];
            for shift in (0..32).step_by(2) {
                let entry = |i: usize| entries[usize::from(from[4 * i + shift / 8] >> (shift % 8) & 3)];
                let found = simd.select(&entries, simd.bytes(&from), shift as u32);
                assert_eq!(floats_of(simd, found), list(S::LANES, entry));
            }
            // The order shows in the last bits.
            let rows: [Vec<f32>; 8] = from_fn(|r| list(S::LANES, |i| 1.0 / (1 + 9 * r + i) as f32));
            let sum = |row: &Vec<f32>| {
                let r = list(8, |i| row[i..].iter().step_by(8).copied().reduce(|a, b| a + b).unwrap());
                ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]))
            };
            assert_eq!(simd.sums_of_lanes(rows.each_ref().map(|row| simd.load(row))), rows.each_ref().map(sum));
            for (i, found) in floats_of(simd, simd.mul_add(va, vb, two)).into_iter().enumerate() {
                let fused = a[i].mul_add(b[i], 2.0);
                assert!((found - fused).abs() <= f32::EPSILON * fused.abs(), "{found} {fused}");
            }
        }
    }
    on_every_level(Check);
}
