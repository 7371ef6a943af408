//! Linears against sums in f64 over the decoded weights.

mod restore;

use marlin_format::{ColumnOrder, Element, Format, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind};

use super::*;
use crate::Activation;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// −1 to 1.
    fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.bits() as u8).collect()
    }

    /// `bytes` of finite floats of a type.
    fn floats<const N: usize>(&mut self, bytes: usize, encode: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
        (0..bytes / N).flat_map(|_| encode(self.value())).collect()
    }

    /// A matrix whose every bit is random, as far as the scheme allows.
    fn matrix(&mut self, scheme: Scheme, rows: usize, cols: usize) -> PackedMatrix<'static> {
        let f32_bytes = |v: f32| v.to_le_bytes();
        let f16_bytes = |v: f32| half::f16::from_f32(v).to_le_bytes();
        let bf16_bytes = |v: f32| half::bf16::from_f32(v).to_le_bytes();
        let sizes = |of: Result<usize, marlin_format::FormatError>| of.unwrap();

        let count = sizes(scheme.codes_bytes(rows, cols));
        let codes = match scheme.element {
            Element::F32 => self.floats(count, f32_bytes),
            Element::F16 => self.floats(count, f16_bytes),
            Element::Bf16 => self.floats(count, bf16_bytes),
            Element::E4M3 => self.e4m3(count),
            _ => self.bytes(count),
        };
        let count = sizes(scheme.scales_bytes(rows, cols));
        let scales = match scheme.scale {
            ScaleKind::F32 => self.floats(count, f32_bytes),
            ScaleKind::F16 => self.floats(count, f16_bytes),
            ScaleKind::Bf16 => self.floats(count, bf16_bytes),
            ScaleKind::E8M0 => self.bytes(count).iter().map(|b| 112 + b % 32).collect(),
            ScaleKind::E4M3Global => self.e4m3(count),
            ScaleKind::None | ScaleKind::TwoLevel { .. } => self.bytes(count),
        };
        let count = sizes(scheme.zeros_bytes(rows, cols));
        let zeros = match scheme.zero {
            ZeroKind::F32Bias => self.floats(count, f32_bytes),
            ZeroKind::F16Bias => self.floats(count, f16_bytes),
            ZeroKind::Bf16Bias => self.floats(count, bf16_bytes),
            ZeroKind::None | ZeroKind::Integer | ZeroKind::TwoLevelMin { .. } => self.bytes(count),
        };
        let count = sizes(scheme.globals_bytes(rows, cols));
        let globals = match scheme.scale {
            ScaleKind::E4M3Global => 0.0123f32.to_le_bytes().to_vec(),
            _ => self.floats(count, f16_bytes),
        };
        let count = sizes(scheme.group_index_bytes(rows, cols)) / 4;
        let mut group_index: Vec<u32> =
            (0..count as u32).map(|column| column / scheme.group_cols(cols) as u32).collect();
        (1..count).for_each(|last| group_index.swap(last, self.below(last + 1)));
        let group_index: Vec<u8> = group_index.into_iter().flat_map(u32::to_le_bytes).collect();
        let pairs = [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110];
        let sparse_index = (0..sizes(scheme.sparse_index_bytes(rows, cols)))
            .map(|_| pairs[self.below(6)] | pairs[self.below(6)] << 4)
            .collect::<Vec<u8>>();
        let matrix = PackedMatrix {
            rows,
            cols,
            scheme,
            codes: codes.into(),
            scales: scales.into(),
            zeros: zeros.into(),
            globals: globals.into(),
            group_index: group_index.into(),
            sparse_index: sparse_index.into(),
        };
        matrix.validate().unwrap();
        matrix
    }

    fn e4m3(&mut self, count: usize) -> Vec<u8> {
        self.bytes(count).iter().map(|&b| if b & 0x7f == 0x7f { b & 0x80 } else { b }).collect()
    }

    /// Activations with an outlier of 1e5 in every row.
    fn activations(&mut self, rows: usize, width: usize) -> Vec<f32> {
        let mut x: Vec<f32> = (0..rows * width).map(|_| self.value()).collect();
        for row in x.chunks_mut(width) {
            row[self.below(width)] = if self.below(2) == 0 { 1e5 } else { -1e5 };
        }
        x
    }
}

/// What int8 arithmetic makes of activations, by its definition.
fn quantised(x: &[f32], width: usize) -> Vec<f64> {
    let blocks = x.chunks(width).flat_map(|row| row.chunks(32));
    blocks
        .flat_map(|block| {
            let max = block.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            block.iter().map(move |x| f64::from((x * (127.0 / max)).round_ties_even()) * f64::from(max / 127.0))
        })
        .collect()
}

/// Rows of values, each in an order of columns; as they are if there is none.
fn in_order<T: Copy>(rows: &[T], columns: &[u32]) -> Vec<T> {
    if columns.is_empty() {
        return rows.to_vec();
    }
    rows.chunks(columns.len()).flat_map(|row| columns.iter().map(|&column| row[column as usize])).collect()
}

/// The order that undoes another.
fn inverse(columns: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; columns.len()];
    columns.iter().zip(0..).for_each(|(&column, place)| inverse[column as usize] = place);
    inverse
}

/// Schemes that kernels read as they are, besides the usual ones of each format: every group size and every storage of scales
/// and zero points that they treat differently.
fn unusual_native_schemes() -> Vec<Scheme> {
    let groupings = [
        Grouping::Columns(16),
        Grouping::Columns(32),
        Grouping::Columns(48),
        Grouping::Columns(128),
        Grouping::Row,
        Grouping::Tensor,
        Grouping::Block { rows: 5, cols: 64 },
    ];
    let all = Format::ALL.into_iter().flat_map(|format| groupings.map(|grouping| format.scheme(Some(grouping)).ok()));
    let mut schemes: Vec<Scheme> = all.flatten().collect();
    let group = |element, scale| Scheme::scaled(element, Grouping::Columns(32), scale);
    schemes.extend([
        group(Element::Iq4Nl, ScaleKind::F16),
        group(Element::Uint(4), ScaleKind::Bf16),
        group(Element::E4M3, ScaleKind::E8M0),
        Scheme { zero: ZeroKind::Integer, ..group(Element::Uint(8), ScaleKind::F16) },
        Scheme { zero: ZeroKind::Integer, ..group(Element::Int(8), ScaleKind::F16) },
        Scheme { zero: ZeroKind::Integer, ..group(Element::Int(4), ScaleKind::F32) },
    ]);
    for bits in 2..=8 {
        schemes.extend([group(Element::Uint(bits), ScaleKind::F16), group(Element::Int(bits), ScaleKind::F16)]);
    }
    schemes
}

fn two_level(bits: u8, signed: bool, super_group: u32) -> ScaleKind {
    ScaleKind::TwoLevel { bits, signed, super_group }
}

fn two_level_minima(bits: u8, scheme: Scheme) -> Scheme {
    Scheme { zero: ZeroKind::TwoLevelMin { bits }, ..scheme }
}

/// Schemes with biases, two levels of scales or a group index, which only dense matrices have.
fn affine_schemes() -> Vec<Scheme> {
    let group = |element, columns, scale| Scheme::scaled(element, Grouping::Columns(columns), scale);
    let mut schemes = vec![
        Scheme { zero: ZeroKind::F16Bias, ..group(Element::Uint(4), 32, ScaleKind::F16) },
        Scheme { zero: ZeroKind::Bf16Bias, ..group(Element::Uint(6), 64, ScaleKind::Bf16) },
        Scheme { zero: ZeroKind::F32Bias, ..group(Element::Uint(8), 128, ScaleKind::F32) },
        Scheme { zero: ZeroKind::F32Bias, ..group(Element::Int(3), 16, ScaleKind::E8M0) },
        Scheme { zero: ZeroKind::F16Bias, grouping: Grouping::Row, ..group(Element::Iq4Nl, 1, ScaleKind::F16) },
        // Super-groups of one group of tiles, of several of two and three chunks, and wider than K; with every kind of code.
        group(Element::Int(8), 32, two_level(8, true, 32)),
        group(Element::Int(3), 96, two_level(2, false, 192)),
        group(Element::Int(6), 48, two_level(8, true, 96)),
        group(Element::Int(4), 16, two_level(8, true, 32)),
        group(Element::Iq4Nl, 16, two_level(7, false, 96)),
        two_level_minima(4, group(Element::Uint(4), 32, two_level(7, false, 512))),
        two_level_minima(7, group(Element::Uint(4), 16, two_level(7, false, 64))),
        two_level_minima(2, group(Element::Uint(6), 16, two_level(3, false, 256))),
    ];
    let by_index = Scheme { order: ColumnOrder::GroupIndex, ..group(Element::Uint(4), 32, ScaleKind::F16) };
    schemes.extend([by_index, Scheme { zero: ZeroKind::Integer, ..by_index }]);
    // The K-quants of GGUF.
    schemes.extend([
        two_level_minima(4, group(Element::Uint(2), 16, two_level(4, false, 256))),
        group(Element::Int(3), 16, two_level(6, true, 256)),
        two_level_minima(6, group(Element::Uint(4), 32, two_level(6, false, 256))),
        two_level_minima(6, group(Element::Uint(5), 32, two_level(6, false, 256))),
        group(Element::Int(6), 16, two_level(8, true, 256)),
    ]);
    schemes
}

/// Schemes that are converted at load.
fn converted_schemes() -> Vec<Scheme> {
    let group = |element, columns| Scheme::scaled(element, Grouping::Columns(columns), ScaleKind::F16);
    vec![
        group(Element::E2M1, 24),
        Scheme { zero: ZeroKind::Integer, ..group(Element::Uint(4), 8) },
        Scheme { zero: ZeroKind::F16Bias, ..group(Element::E2M1, 32) },
        Scheme { zero: ZeroKind::F32Bias, sparsity: Sparsity::TwoOfFour, ..group(Element::Uint(6), 64) },
        Scheme { order: ColumnOrder::GroupIndex, sparsity: Sparsity::TwoOfFour, ..group(Element::Uint(4), 32) },
        Scheme { sparsity: Sparsity::TwoOfFour, ..group(Element::Int(4), 24) },
        Scheme::scaled(Element::Uint(6), Grouping::Columns(16), two_level(8, false, 64)),
        two_level_minima(8, Scheme::scaled(Element::Uint(4), Grouping::Columns(32), two_level(6, false, 128))),
        // Two levels otherwise than K-quants have them: super-groups that end within a chunk, minima besides an offset, zero points.
        Scheme::scaled(Element::Int(6), Grouping::Columns(48), two_level(8, true, 48)),
        two_level_minima(6, Scheme::scaled(Element::Int(4), Grouping::Columns(32), two_level(6, false, 128))),
        Scheme {
            zero: ZeroKind::Integer,
            ..Scheme::scaled(Element::Uint(4), Grouping::Columns(32), two_level(6, false, 128))
        },
        Scheme {
            sparsity: Sparsity::TwoOfFour,
            ..Scheme::scaled(Element::Int(4), Grouping::Columns(32), two_level(6, true, 128))
        },
    ]
}

fn part(weight: &PackedMatrix<'static>) -> LinearPart<'static> {
    LinearPart { weight: weight.clone(), bias: None }
}

fn apply(linear: &TiledLinear, x: &[f32], threads: &Threads) -> Vec<f32> {
    let m = x.len() / linear.cols();
    let mut scratch = Activations::new(m, linear.cols()).unwrap();
    let mut out = vec![f32::NAN; m * linear.rows()];
    linear.apply(x, m, &mut out, Epilogue::Store, &mut scratch, threads);
    out
}

/// Compares every level and arithmetic with f64, and M rows at once with fewer of them.
fn check(weight: &PackedMatrix<'static>, random: &mut Random, threads: &Threads) {
    const M: usize = 9;
    let (n, k) = (weight.rows, weight.cols);
    let x = random.activations(M, k);
    let w = weight.decode();
    // Weights and biases are summed apart, and round apart.
    let bias = |i: usize| weight.bias_at(i / k, weight.group_of(i % k));
    let sizes: Vec<f64> =
        w.iter().enumerate().map(|(i, w)| f64::from((w - bias(i)).abs()) + f64::from(bias(i).abs())).collect();
    let mut fused = [None, None];
    for simd in SimdLevel::available() {
        for (arithmetic, fused) in [Arithmetic::Exact, Arithmetic::Int8].into_iter().zip(&mut fused) {
            let case = format!("{} [{n}, {k}] {simd} {arithmetic:?}", weight.scheme);
            let linear = TiledLinear::load(&[part(weight)], arithmetic, simd, threads).unwrap();
            let mut row = vec![f32::NAN; k];
            for (i, wanted) in w.chunks(k).enumerate() {
                linear.decode_row(i, &mut row);
                assert_eq!(row, wanted, "{case}: row {i}");
            }

            let used: Vec<f64> = match linear.forms.blocks {
                true => {
                    in_order(&quantised(&in_order(&x, linear.columns().order), k), &inverse(linear.columns().order))
                }
                false => x.iter().map(|&x| f64::from(x)).collect(),
            };
            let out = apply(&linear, &x, threads);
            for (i, &out) in out.iter().enumerate() {
                let terms = used[i / n * k..][..k].iter().zip(w[i % n * k..][..k].iter().zip(&sizes[i % n * k..]));
                let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, magnitude), (x, (&w, size))| {
                    (sum + x * f64::from(w), magnitude + x.abs() * size)
                });
                let error = (f64::from(out) - sum).abs();
                assert!(error <= 1e-6 * magnitude, "{case}: output {i} is {out}, wanted {sum} ± {}", 1e-6 * magnitude);
            }
            for m in [1, 2, 3, 4, 5] {
                assert_eq!(apply(&linear, &x[..m * k], threads), out[..m * n], "{case}: {m} rows of {M}");
            }
            // However a level multiplies bytes, integer sums are exact, and all but one fuse multiply-adds.
            if simd != SimdLevel::Portable {
                assert_eq!(*fused.get_or_insert_with(|| out.clone()), out, "{case}: another level");
            }
        }
    }
}

#[test]
fn usual_schemes_of_every_shape() {
    let (mut random, threads) = (Random(1), Threads::new(1).unwrap());
    for format in Format::ALL {
        let scheme = format.scheme(None).unwrap();
        for n in [1, 7, 8, 9, 17] {
            for k in [1, 31, 32, 33, 100, 128, 256, 300] {
                check(&random.matrix(scheme, n, k), &mut random, &threads);
            }
        }
    }
}

#[test]
fn unusual_schemes() {
    let (mut random, threads) = (Random(10), Threads::new(1).unwrap());
    for scheme in unusual_native_schemes().into_iter().chain(affine_schemes()) {
        for (n, k) in [(1, 100), (17, 33), (9, 31), (9, 300)] {
            let weight = random.matrix(scheme, n, k);
            assert!(tiles::is_native(&weight, &weight.group_order().unwrap_or_default()), "{scheme}");
            check(&weight, &mut random, &threads);
        }
    }
}

/// Any element, scale and group may be sparse.
#[test]
fn sparse_schemes() {
    let (mut random, threads) = (Random(11), Threads::new(1).unwrap());
    let usual = Format::ALL.map(|format| format.scheme(None).unwrap());
    for scheme in usual.into_iter().chain(unusual_native_schemes()) {
        let scheme = Scheme { sparsity: Sparsity::TwoOfFour, ..scheme };
        for (n, k) in [(1, 100), (17, 36), (9, 4), (9, 300)] {
            let weight = random.matrix(scheme, n, k);
            assert!(tiles::is_native(&weight, &weight.group_order().unwrap_or_default()), "{scheme}");
            check(&weight, &mut random, &threads);
        }
    }
}

/// The tiles of a matrix take what the kernel reads: half of the codes and two bits of position for each.
#[test]
fn sparse_tiles_are_smaller() {
    let (mut random, threads) = (Random(12), Threads::new(1).unwrap());
    let (n, k) = (64, 1024);
    for (format, dense_bits, sparse_bits) in [(Format::Fp4, 4, 3), (Format::Int4, 4, 3), (Format::Fp8, 8, 5)] {
        for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
            let simd = SimdLevel::detect();
            let tiled = |scheme: Scheme| bytes(&scheme, n, k, arithmetic, simd).unwrap();
            let (dense, sparse) = (format.scheme(None).unwrap(), format.sparse_24(None).unwrap());
            let scales = tiled(dense) - n * k * dense_bits / 8;
            assert_eq!(tiled(sparse), n * k * sparse_bits / 8 + scales, "{format}");
            let loaded = TiledLinear::load(&[part(&random.matrix(sparse, n, k))], arithmetic, simd, &threads).unwrap();
            assert_eq!(loaded.bytes(), tiled(sparse), "{format}");
        }
    }
}

#[test]
fn converted_schemes_are_exact() {
    let (mut random, threads) = (Random(2), Threads::new(2).unwrap());
    for scheme in converted_schemes() {
        for (n, k) in [(9, 4), (3, 100), (17, 256)] {
            let weight = random.matrix(scheme, n, k);
            // A group wider than K is the whole row.
            assert!(!tiles::is_native(&weight, &weight.group_order().unwrap_or_default()) || k == 4, "{scheme}");
            check(&weight, &mut random, &threads);
        }
    }
}

#[test]
fn nan_codes_of_fp8_stay_nan() {
    let threads = Threads::new(1).unwrap();
    let mut weight = Random(3).matrix(Format::Fp8.scheme(None).unwrap(), 3, 40);
    weight.codes.to_mut()[40 + 5] = 0xff;
    let linear = TiledLinear::load(&[part(&weight)], Arithmetic::Int8, SimdLevel::detect(), &threads).unwrap();
    let out = apply(&linear, &[1.0; 40], &threads);
    assert_eq!(out.iter().map(|v| v.is_nan()).collect::<Vec<_>>(), [false, true, false]);
}

#[test]
fn inputs_that_are_no_numbers_show() {
    let threads = Threads::new(1).unwrap();
    let dense = [Format::Fp4, Format::Int8, Format::Bf16].map(|format| format.scheme(None).unwrap());
    let sparse = Format::SPARSE.map(|format| format.sparse_24(None).unwrap());
    for scheme in dense.into_iter().chain(sparse) {
        let mut weight = Random(4).matrix(scheme, 9, 64);
        // Every row keeps the column of the input that is no number.
        weight.sparse_index.to_mut().fill(0x44);
        for simd in SimdLevel::available() {
            for (bad, arithmetic) in
                [(f32::NAN, Arithmetic::Exact), (f32::NAN, Arithmetic::Int8), (f32::INFINITY, Arithmetic::Int8)]
            {
                let linear = TiledLinear::load(&[part(&weight)], arithmetic, simd, &threads).unwrap();
                let mut x = vec![0.5; 2 * 64];
                x[40] = bad;
                let out = apply(&linear, &x, &threads);
                assert!(
                    out[..9].iter().all(|v| !v.is_finite()),
                    "{scheme} {simd} {arithmetic:?} {bad}: {:?}",
                    &out[..9]
                );
                assert!(out[9..].iter().all(|v| v.is_finite()), "the other row");
            }
        }
    }
}

#[test]
fn tiny_and_zero_inputs_give_zero() {
    let threads = Threads::new(1).unwrap();
    let weight = Random(5).matrix(Format::Fp4.scheme(None).unwrap(), 8, 32);
    for simd in SimdLevel::available() {
        let linear = TiledLinear::load(&[part(&weight)], Arithmetic::Int8, simd, &threads).unwrap();
        for x in [0.0, -0.0, 1e-40] {
            assert_eq!(apply(&linear, &[x; 32], &threads), [0.0; 8]);
        }
    }
}

/// Three parts of different schemes and uneven heights, many rows: threads and batch change nothing, bit for bit.
#[test]
fn outputs_depend_on_neither_threads_nor_batch() {
    let dense = [Format::Fp4, Format::Bf16, Format::Nvfp4].map(|format| format.scheme(None).unwrap());
    let sparse = Format::SPARSE.map(|format| format.sparse_24(None).unwrap());
    for schemes in [dense, sparse] {
        check_threads_and_batches(schemes);
    }
}

fn check_threads_and_batches(schemes: [Scheme; 3]) {
    let mut random = Random(6);
    let (m, k) = (130, 100);
    let one = Threads::new(1).unwrap();
    let parts: Vec<_> = schemes
        .iter()
        .zip([17, 3, 24])
        .map(|(&scheme, n)| {
            let bias = Some((0..n).map(|_| random.value()).collect());
            LinearPart { weight: random.matrix(scheme, n, k), bias }
        })
        .collect();
    let x = random.activations(m, k);
    for simd in SimdLevel::available() {
        for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
            let linear = TiledLinear::load(&parts, arithmetic, simd, &one).unwrap();
            assert_eq!((linear.rows(), linear.part_rows(), linear.cols()), (44, &[17, 3, 24][..], k));
            let out = apply(&linear, &x, &one);
            assert!(out.iter().all(|v| v.is_finite()));
            for rows in [1, 7, 64] {
                assert_eq!(apply(&linear, &x[..rows * k], &one), out[..rows * 44]);
            }
            for threads in [2, 3] {
                let threads = Threads::new(threads).unwrap();
                let linear = TiledLinear::load(&parts, arithmetic, simd, &threads).unwrap();
                assert_eq!(apply(&linear, &x, &threads), out, "{} threads", threads.count());
            }
        }
    }
}

#[test]
fn epilogues() {
    let mut random = Random(7);
    let (m, n, k) = (5, 9, 64);
    let threads = Threads::new(2).unwrap();
    let mut part = |format: Format| LinearPart {
        weight: random.matrix(format.scheme(None).unwrap(), n, k),
        bias: Some((0..n).map(|i| i as f32).collect()),
    };
    let parts = [part(Format::Fp4), part(Format::Fp8)];
    let x: Vec<f32> = (0..m * k).map(|_| random.value() * 0.1).collect();
    let linear = TiledLinear::load(&parts, Arithmetic::Exact, SimdLevel::detect(), &threads).unwrap();
    let mut scratch = Activations::new(m, k).unwrap();

    let mut stored = vec![f32::NAN; m * 2 * n];
    linear.apply(&x, m, &mut stored, Epilogue::Store, &mut scratch, &threads);
    let weights: Vec<Vec<f32>> = parts.iter().map(|part| part.weight.decode()).collect();
    for (i, &value) in stored.iter().enumerate() {
        let (row, column) = (i / (2 * n), i % (2 * n));
        let weights = &weights[column / n][column % n * k..][..k];
        let dot: f64 = weights.iter().zip(&x[row * k..]).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
        let wanted = dot + (column % n) as f64;
        assert!((f64::from(value) - wanted).abs() < 1e-4 * wanted.abs().max(1.0), "{value} {wanted}");
    }

    let mut added: Vec<f32> = (0..stored.len()).map(|i| i as f32).collect();
    linear.apply(&x, m, &mut added, Epilogue::Add, &mut scratch, &threads);
    for (i, (&added, &stored)) in added.iter().zip(&stored).enumerate() {
        assert_eq!(added, i as f32 + stored);
    }

    let silu = |g: f64| g / (1.0 + (-g).exp());
    let gelu = |g: f64| 0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh());
    let activations: [(Activation, &dyn Fn(f64) -> f64); 2] =
        [(Activation::Silu, &silu), (Activation::GeluTanh, &gelu)];
    for (activation, wanted) in activations {
        let mut gated = vec![f32::NAN; m * n];
        linear.apply(&x, m, &mut gated, Epilogue::Gated(activation), &mut scratch, &threads);
        for (i, &value) in gated.iter().enumerate() {
            let row = &stored[i / n * 2 * n..];
            let (gate, up) = (f64::from(row[i % n]), f64::from(row[n + i % n]));
            let wanted = wanted(gate) * up;
            assert!(
                (f64::from(value) - wanted).abs() <= 1e-5 * wanted.abs().max(1e-3),
                "{activation:?} {value} {wanted}"
            );
        }
    }
}

#[test]
fn packed_weights_stay_packed() {
    let threads = Threads::new(1).unwrap();
    for (format, bits) in [(Format::Fp4, 4.125), (Format::Mxfp4, 4.25), (Format::Nvfp4, 4.5), (Format::Bf16, 16.0)] {
        let weight = Random(8).matrix(format.scheme(None).unwrap(), 64, 256);
        let linear = TiledLinear::load(&[part(&weight)], Arithmetic::Int8, SimdLevel::detect(), &threads).unwrap();
        assert_eq!(linear.bytes() as f64 * 8.0 / (64.0 * 256.0), bits, "{format}");
    }
}

#[test]
fn memory_is_told_before_loading() {
    let (mut random, threads) = (Random(10), Threads::new(1).unwrap());
    let usual = Format::ALL.map(|format| format.scheme(None).unwrap());
    let all = usual.into_iter().chain(unusual_native_schemes()).chain(affine_schemes()).chain(converted_schemes());
    for scheme in all {
        for (rows, cols) in [(8, 128), (13, 192), (1, 4), (9, 100)] {
            for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
                let (level, weight) = (SimdLevel::Portable, random.matrix(scheme, rows, cols));
                let loaded = TiledLinear::load(&[part(&weight)], arithmetic, level, &threads).unwrap().bytes();
                assert_eq!(bytes(&scheme, rows, cols, arithmetic, level).unwrap(), loaded, "{scheme} [{rows}, {cols}]");
            }
        }
    }
    for (rows, cols) in [(0, 4), (usize::MAX, 4), (1, usize::MAX / 4)] {
        let told = bytes(&Scheme::BF16, rows, cols, Arithmetic::Int8, SimdLevel::Portable);
        assert!(matches!(told, Err(KernelError::Format(_))), "[{rows}, {cols}]: {told:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (mut random, threads) = (Random(9), Threads::new(1).unwrap());
    let mut matrix = |n, k| random.matrix(Scheme::F32, n, k);
    let load = |parts: &[LinearPart<'_>]| TiledLinear::load(parts, Arithmetic::Exact, SimdLevel::Portable, &threads);

    let error = load(&[part(&matrix(2, 3)), part(&matrix(2, 4))]).unwrap_err();
    assert!(matches!(error, KernelError::FusedWidth { first: 3, part: 1, found: 4 }), "{error}");
    let error = load(&[LinearPart { weight: matrix(2, 3), bias: Some(vec![0.0]) }]).unwrap_err();
    assert!(matches!(error, KernelError::BiasLength { rows: 2, found: 1 }), "{error}");
    let mut short = matrix(2, 3);
    short.codes.to_mut().pop();
    assert!(matches!(load(&[part(&short)]).unwrap_err(), KernelError::Format(_)));
    assert!(load(&[]).unwrap_err().to_string().contains("at least one matrix"));

    let absent = if cfg!(target_arch = "x86_64") { SimdLevel::Neon } else { SimdLevel::Avx2 };
    let error = TiledLinear::load(&[part(&matrix(2, 3))], Arithmetic::Exact, absent, &threads).unwrap_err();
    assert!(error.to_string().contains("has no"), "{error}");
}

fn heads(count: usize, n: usize, k: usize, random: &mut Random, threads: &Threads) -> Vec<TiledLinear> {
    let scheme = Format::Fp4.scheme(None).unwrap();
    let mut load =
        || TiledLinear::load(&[part(&random.matrix(scheme, n, k))], Arithmetic::Int8, SimdLevel::detect(), threads);
    (0..count).map(|_| load().unwrap()).collect()
}

#[test]
fn groups_are_of_one_shape() {
    let (mut random, threads) = (Random(13), Threads::new(1).unwrap());
    assert_eq!(LinearGroup::new(heads(2, 9, 64, &mut random, &threads)).unwrap().len(), 2);
    let found = LinearGroup::new(Vec::new()).unwrap_err().to_string();
    assert!(found.contains("at least one linear"), "{found}");
    for (n, k) in [(8, 64), (9, 32)] {
        let mut linears = heads(2, 9, 64, &mut random, &threads);
        linears.extend(heads(1, n, k, &mut random, &threads));
        let found = LinearGroup::new(linears).unwrap_err().to_string();
        let wanted = format!("linear 0 has parts of [9] rows, 64 columns; linear 2: parts of [{n}] rows, {k} columns");
        assert!(found.contains(&wanted), "{found}");
    }
}

/// As many heads at once as scratch memory has room for; results are the same, and what follows a head's outputs stays.
#[test]
fn stretches_need_room_for_one_head() {
    let (mut random, threads) = (Random(14), Threads::new(2).unwrap());
    let (m, n, k, from, to) = (2, 9, 40, 44, 12);
    let linears = heads(5, n, k, &mut random, &threads);
    let x: Vec<f32> = (0..m * 5 * from).map(|_| random.value()).collect();
    let mut wanted = vec![7.0; m * 5 * to];
    for (head, linear) in linears.iter().enumerate() {
        for row in 0..m {
            let out = apply(linear, &x[row * 5 * from + head * from..][..k], &threads);
            wanted[row * 5 * to + head * to..][..n].copy_from_slice(&out);
        }
    }
    let group = LinearGroup::new(linears).unwrap();
    for room in [k, 2 * k, 5 * from] {
        let mut out = vec![7.0; wanted.len()];
        group.stretches(&x, m, &mut out, &mut Activations::new(m, room).unwrap(), &threads);
        assert_eq!(out, wanted, "room for {room} values");
    }
}

/// A GPTQ matrix whose groups have other sizes than in natural order, and matrices of one linear in different orders: what has no common
/// order is converted, and means the same.
#[test]
fn columns_in_any_order() {
    let (mut random, threads) = (Random(15), Threads::new(2).unwrap());
    let natural = Scheme::scaled(Element::Uint(4), Grouping::Columns(32), ScaleKind::F16);
    let by_index = Scheme { order: ColumnOrder::GroupIndex, zero: ZeroKind::Integer, ..natural };
    let (n, k, m) = (9, 100, 3);
    let matrices = [by_index, by_index, natural].map(|scheme| random.matrix(scheme, n, k));
    let mut irregular = matrices[0].clone();
    irregular.group_index.to_mut()[..4].copy_from_slice(&[1, 0, 0, 0]);
    irregular.group_index.to_mut()[4..8].copy_from_slice(&[1, 0, 0, 0]);
    irregular.group_index.to_mut()[8..12].copy_from_slice(&[1, 0, 0, 0]);
    assert!(irregular.group_order().is_none() && matrices[0].group_order().is_some());
    check(&irregular, &mut random, &threads);

    let x: Vec<f32> = (0..m * k).map(|_| random.value()).collect();
    let simd = SimdLevel::detect();
    let load = |parts: &[LinearPart<'_>]| TiledLinear::load(parts, Arithmetic::Exact, simd, &threads).unwrap();
    let parts: Vec<_> = matrices.iter().chain([&irregular]).map(part).collect();
    let out = apply(&load(&parts), &x, &threads);
    for (index, matrix) in matrices.iter().chain([&irregular]).enumerate() {
        let w = matrix.decode();
        for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
            let terms = x[row * k..][..k].iter().zip(&w[column * k..][..k]).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let (found, wanted) = (f64::from(out[(row * 4 + index) * n + column]), terms.sum::<f64>());
            assert!((found - wanted).abs() < 1e-4 * wanted.abs().max(1.0), "matrix {index}: {found}, wanted {wanted}");
        }
    }

    let error = LinearGroup::new(vec![load(&parts[2..3]), load(&parts[..1])]).unwrap_err();
    assert!(matches!(error, KernelError::OrderedGroup), "{error}");
}
