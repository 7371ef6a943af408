//! Rows of the packed linears: format × epilogue, each over all shape classes.

use crate::{Activation, Backend, Encoder, Input, LinearPart, SampleRow, Step, StepLimits};
use marlin_format::{Format, PackedMatrix, Scheme};

use super::matrices::{has_columns, random, schemes};
use super::support::{Case, Ragged, Rng, limits, mean_square, poisoned, read, upload};
use super::{Device, Table};

/// Around the borders of the tiles: 8 rows of N, 4 rows of M, 32 columns of K.
const N: [usize; 5] = [1, 7, 8, 9, 17];
const M: [usize; 5] = [1, 3, 4, 5, 9];
const K: [usize; 7] = [1, 31, 32, 33, 65, 128, 300];

/// Around the borders of blocks of 64 rows of M, which pass over the weights one after the other.
const BLOCKS_M: [usize; 4] = [63, 64, 65, 129];
/// Those that meet [`BLOCKS_M`] and norms: one scheme for each kind of inner loop, and one that is converted.
const BLOCKS_SCHEMES: [&str; 9] = ["fp4", "int4", "int8", "fp8", "bf16", "fp4-2of4", "int4-2of4", "fp8-2of4", "q4-k"];

/// N, K and M around the borders of tiles of 16 to 128 rows, and of columns that are passed over in steps of 32 to 256.
const TILES: [[usize; 3]; 7] =
    [[33, 300, 16], [66, 512, 17], [64, 256, 33], [130, 68, 48], [36, 132, 64], [130, 100, 65], [67, 324, 129]];

/// The magnitude of outlier channels.
const OUTLIER: f32 = 1e5;

/// Added to the mean square of normalised rows.
const NORM_EPS: f32 = 1e-6;

/// How much larger the error of a product of two sums is: twice for independent sums, more where an input row is large, for
/// both of them.
pub(super) const PRODUCT: f64 = 4.0;

/// What a term adds to the error of a sum in single precision, where one outlier makes all partial sums large: each addition
/// rounds by up to 2^-24 of them, a variance of 2^-48 / 3.
const SUM: f64 = 2e-15;

pub(crate) fn add_rows<B: Backend>(table: &mut Table, device: &Device<B>) {
    for (name, scheme) in schemes() {
        let device = &device.for_scheme(&name, false);
        table.add(device, format!("linear/{name}"), move |device| all_shapes(device, scheme));
        table.add(device, format!("linear-bias/{name}"), move |device| some_shapes(device, scheme, Epilogue::Store));
        table.add(device, format!("linear-add/{name}"), move |device| some_shapes(device, scheme, Epilogue::Add));
        for activation in Activation::ALL {
            table.add(device, format!("linear-gated-{activation:?}/{name}").to_lowercase(), move |device| {
                some_shapes(device, scheme, Epilogue::Gated(activation))
            });
        }
        table.add(device, format!("embed/{name}"), move |device| embed(device, scheme));
        if !BLOCKS_SCHEMES.contains(&name.as_str()) {
            add_tiles(table, device, &name, scheme);
        }
    }
    table.add(device, "linear-fused/mixed".into(), fused);
    add_rows_of_many(table, device);
}

/// Rows whose inputs are of many rows, for one scheme of each kind.
pub(crate) fn add_rows_of_many<B: Backend>(table: &mut Table, device: &Device<B>) {
    let epilogues = [
        ("store", Epilogue::Store),
        ("add", Epilogue::Add),
        ("gated-silu", Epilogue::Gated(Activation::Silu)),
        ("gated-gelutanh", Epilogue::Gated(Activation::GeluTanh)),
        ("gated-clampedswiglu", Epilogue::Gated(Activation::ClampedSwiglu)),
    ];
    for (name, scheme) in schemes().into_iter().filter(|(name, _)| BLOCKS_SCHEMES.contains(&name.as_str())) {
        let device = &device.with_heavy_rows(name != "fp4");
        for (epilogue_name, epilogue) in epilogues {
            table.add(device, format!("linear-row-blocks-{epilogue_name}/{name}"), move |device| {
                row_blocks(device, scheme, epilogue)
            });
        }
        table.add(device, format!("linear-normed/{name}"), move |device| normed(device, scheme));
        add_tiles(table, device, &name, scheme);
    }
    table.add(device, "mlp/fp4".into(), mlp);
}

fn add_tiles<B: Backend>(table: &mut Table, device: &Device<B>, name: &str, scheme: Scheme) {
    let device = &device.with_heavy_rows(true);
    table.add(device, format!("linear-tiles/{name}"), move |device| tiles(device, scheme, Epilogue::Store));
    table.add(device, format!("linear-tiles-gated/{name}"), move |device| {
        tiles(device, scheme, Epilogue::Gated(Activation::Silu))
    });
}

/// All pairs of N and K; each with two values of M, which meet every N and every K.
fn all_shapes<B: Backend>(device: &Device<B>, scheme: Scheme) -> Result<(), String> {
    let mut rng = Rng(1);
    for (i, k) in K.into_iter().filter(|&k| has_columns(&scheme, k)).enumerate() {
        for (j, n) in N.into_iter().enumerate() {
            let parts = [LinearPart { weight: random(scheme, n, k, &mut rng), bias: None }];
            for m in [M[(i + j) % M.len()], M[(i + 2 * j + 1) % M.len()]] {
                check_linear(device, &parts, m, Epilogue::Store, &mut rng)?;
            }
        }
    }
    Ok(())
}

/// Each value of N, M and K, but not in all combinations; every matrix has a bias.
fn some_shapes<B: Backend>(device: &Device<B>, scheme: Scheme, epilogue: Epilogue) -> Result<(), String> {
    let mut rng = Rng(2);
    for (i, k) in K.into_iter().filter(|&k| has_columns(&scheme, k)).enumerate() {
        let (n, m) = (N[i % N.len()], M[(2 * i + 1) % M.len()]);
        let parts: Vec<_> =
            (0..epilogue.parts()).map(|_| with_bias(random(scheme, n, k, &mut rng), &mut rng)).collect();
        check_linear(device, &parts, m, epilogue, &mut rng)?;
    }
    Ok(())
}

/// Inputs that are normalised first. The last K is more than a norm's invocations take at once on a GPU.
fn normed<B: Backend>(device: &Device<B>, scheme: Scheme) -> Result<(), String> {
    let mut rng = Rng(6);
    for (i, k) in K.into_iter().chain([1088]).filter(|&k| has_columns(&scheme, k)).enumerate() {
        let parts = [32, 32].map(|n| with_bias(random(scheme, n, k, &mut rng), &mut rng));
        for m in [1, M[i % M.len()]] {
            check_normed(device, &parts[..1], m, Epilogue::Store, &mut rng)?;
            check_normed(device, &parts, m, Epilogue::Gated(Activation::Silu), &mut rng)?;
        }
    }
    Ok(())
}

/// Each value of [`BLOCKS_M`], on two panels of weights.
fn row_blocks<B: Backend>(device: &Device<B>, scheme: Scheme, epilogue: Epilogue) -> Result<(), String> {
    let mut rng = Rng(5);
    let k = if has_columns(&scheme, 65) { 65 } else { 68 };
    let parts: Vec<_> = (0..epilogue.parts()).map(|_| with_bias(random(scheme, 9, k, &mut rng), &mut rng)).collect();
    BLOCKS_M.into_iter().try_for_each(|m| check_linear(device, &parts, m, epilogue, &mut rng))
}

/// Each of [`TILES`], with biases.
fn tiles<B: Backend>(device: &Device<B>, scheme: Scheme, epilogue: Epilogue) -> Result<(), String> {
    let mut rng = Rng(6);
    TILES.into_iter().try_for_each(|[n, k, m]| {
        let parts: Vec<_> =
            (0..epilogue.parts()).map(|_| with_bias(random(scheme, n, k, &mut rng), &mut rng)).collect();
        check_linear(device, &parts, m, epilogue, &mut rng)
    })
}

/// Three matrices of different heights in one linear, with neighbouring schemes of the table and biases on some.
fn fused<B: Backend>(device: &Device<B>) -> Result<(), String> {
    let mut rng = Rng(3);
    let schemes = schemes();
    for i in 0..schemes.len() {
        for (k, m) in [(36, 1), (128, 5), (300, 9)] {
            let scheme = |j: usize| schemes[(i + j) % schemes.len()].1;
            let parts = [
                with_bias(random(scheme(0), 17, k, &mut rng), &mut rng),
                LinearPart { weight: random(scheme(1), 1, k, &mut rng), bias: None },
                with_bias(random(scheme(2), 9, k, &mut rng), &mut rng),
            ];
            check_linear(device, &parts, m, Epilogue::Store, &mut rng)?;
        }
    }
    Ok(())
}

/// The linears of a gated MLP, one of which takes what the other gives, and gives it to be normalised.
fn mlp<B: Backend>(device: &Device<B>) -> Result<(), String> {
    let scheme = Format::Fp4.scheme(None).expect("its usual groups");
    let mut rng = Rng(7);
    for (hidden, intermediate) in [(64, 96), (128, 36), (32, 1088), (1088, 32)] {
        for m in [1, 2, 8, 9] {
            let mut part = |n, k| LinearPart { weight: random(scheme, n, k, &mut rng), bias: None };
            let gate_up = [part(intermediate, hidden), part(intermediate, hidden)];
            let down = [part(hidden, intermediate)];
            let norm = (0..hidden).map(|_| 0.5 + rng.uniform()).collect();
            let case = Mlp { gate_up, down, norm, x: rng.normals(m * hidden), m };
            // Errors of one linear are inputs of the next.
            let bound = 4.0 * PRODUCT * device.bounds.linear;
            device.check(&case, bound, &format!("hidden={hidden},intermediate={intermediate},m={m}"))?;
        }
    }
    Ok(())
}

/// Twice `x += down(gate_up(norm(x)))`.
struct Mlp<'a> {
    gate_up: [LinearPart<'a>; 2],
    down: [LinearPart<'a>; 1],
    norm: Vec<f32>,
    /// `[m, hidden]`.
    x: Vec<f32>,
    m: usize,
}

impl Case for Mlp<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let (hidden, intermediate) = (self.norm.len(), self.gate_up[0].weight.rows);
        let gate_up = backend.load_linear(&self.gate_up).expect("matrices that fit together");
        let down = backend.load_linear(&self.down).expect("a matrix");
        let norm = backend.load_vector(&self.norm).expect("a vector");
        let mut encoder = backend.encoder(&limits(self.m, hidden.max(intermediate))).expect("an encoder");
        let mut x = upload(backend, hidden, &self.x);
        let mut gated = poisoned(backend, self.m, intermediate);
        for _ in 0..2 {
            let normed = Input::Normed { x: &x, weight: &norm, eps: NORM_EPS };
            encoder.linear_gated(normed, &gate_up, Activation::Silu, &mut gated);
            encoder.linear_add(&gated, &down, &mut x);
        }
        read::<B>(&mut encoder, &x, self.m * hidden)
    }
}

pub(super) fn with_bias(weight: PackedMatrix<'static>, rng: &mut Rng) -> LinearPart<'static> {
    let bias = Some(rng.normals(weight.rows));
    LinearPart { weight, bias }
}

/// Checks one shape with tame activations, and with outlier channels.
fn check_linear<B: Backend>(
    device: &Device<B>,
    parts: &[LinearPart<'_>],
    m: usize,
    epilogue: Epilogue,
    rng: &mut Rng,
) -> Result<(), String> {
    check_input(device, parts, m, epilogue, None, rng)
}

/// The same of the norms of activations.
fn check_normed<B: Backend>(
    device: &Device<B>,
    parts: &[LinearPart<'_>],
    m: usize,
    epilogue: Epilogue,
    rng: &mut Rng,
) -> Result<(), String> {
    let weight = (0..parts[0].weight.cols).map(|_| 0.5 + rng.uniform()).collect();
    check_input(device, parts, m, epilogue, Some(weight), rng)
}

fn check_input<B: Backend>(
    device: &Device<B>,
    parts: &[LinearPart<'_>],
    m: usize,
    epilogue: Epilogue,
    norm: Option<Vec<f32>>,
    rng: &mut Rng,
) -> Result<(), String> {
    let k = parts[0].weight.cols;
    let n: Vec<String> = parts.iter().map(|part| part.weight.rows.to_string()).collect();
    for outliers in [false, true] {
        let mut x = rng.normals(m * k);
        if outliers {
            let channel = rng.below(k);
            x.iter_mut().skip(channel).step_by(k).for_each(|x| *x = OUTLIER * x.signum());
        }
        let residual = rng.normals(m * parts.iter().map(|part| part.weight.rows).sum::<usize>());
        let case = Linear { parts, x, m, norm: norm.clone(), epilogue, residual };
        let normed = if norm.is_some() { " normed" } else { "" };
        let what = format!("n={},k={k},m={m}{normed}{}", n.join("+"), if outliers { " with outliers" } else { "" });
        // The mean of few squares strays far from what is expected of it.
        let outputs = m * parts.iter().map(|part| part.weight.rows).sum::<usize>();
        let factor = if matches!(epilogue, Epilogue::Gated(_)) { PRODUCT } else { 1.0 };
        let bound = factor * (device.bounds.linear + SUM * k as f64) * (1.0 + 10.0 / outputs as f64);
        device.check(&case, bound, &what)?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Epilogue {
    Store,
    Add,
    Gated(Activation),
}

impl Epilogue {
    /// Matrices that it takes.
    fn parts(self) -> usize {
        if matches!(self, Self::Gated(_)) { 2 } else { 1 }
    }
}

struct Linear<'a> {
    parts: &'a [LinearPart<'a>],
    /// `[m, K]`.
    x: Vec<f32>,
    m: usize,
    /// The weights of a norm that `x` goes through first.
    norm: Option<Vec<f32>>,
    epilogue: Epilogue,
    /// What [`Epilogue::Add`] adds to, `[m, N]`.
    residual: Vec<f32>,
}

impl Case for Linear<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let k = self.parts[0].weight.cols;
        let rows: usize = self.parts.iter().map(|part| part.weight.rows).sum();
        let n = if matches!(self.epilogue, Epilogue::Gated(_)) { rows / 2 } else { rows };
        let linear = backend.load_linear(self.parts).expect("matrices that fit together");
        let mut encoder = backend.encoder(&limits(self.m, k)).expect("an encoder");
        let mut out = poisoned(backend, self.m, n);
        let norm = self.norm.as_ref().map(|norm| backend.load_vector(norm).expect("a vector"));
        // The first pass leaves NaN in whatever scratch memory the second one uses.
        for x in [&vec![f32::NAN; self.x.len()], &self.x] {
            let x = upload(backend, k, x);
            let input = match &norm {
                None => Input::Rows(&x),
                Some(weight) => Input::Normed { x: &x, weight, eps: NORM_EPS },
            };
            match self.epilogue {
                Epilogue::Store => encoder.linear(input, &linear, &mut out),
                Epilogue::Gated(activation) => encoder.linear_gated(input, &linear, activation, &mut out),
                Epilogue::Add => {
                    // What is recorded runs after uploads otherwise.
                    encoder.submit().expect("a submission");
                    backend.upload(&mut out, self.m, &self.residual).expect("as many values");
                    encoder.linear_add(&x, &linear, &mut out);
                }
            }
        }
        read::<B>(&mut encoder, &out, self.m * n)
    }

    /// The mean square of outputs if terms had random signs: a single output may be small by cancellation, and all of them where
    /// the weights of an outlier channel are 0.
    fn energy(&self, _: &[f32]) -> f64 {
        let input = self.input();
        let square = |values: &[f32]| mean_square(values.iter().map(|&value| f64::from(value)));
        let sums = self.parts.iter().map(|part| {
            let mut weights = vec![0.0; part.weight.rows * part.weight.cols];
            for (row, weights) in weights.chunks_exact_mut(part.weight.cols).enumerate() {
                part.weight.decode_row(row, weights);
            }
            let bias = part.bias.as_deref().map_or(0.0, square);
            square(&weights) * square(&input) * part.weight.cols as f64 + bias
        });
        let sums: Vec<f64> = sums.collect();
        let mean = sums.iter().sum::<f64>() / sums.len() as f64;
        match self.epilogue {
            Epilogue::Store => mean,
            Epilogue::Add => mean + square(&self.residual),
            Epilogue::Gated(_) => sums[0] * sums[1],
        }
    }
}

impl Linear<'_> {
    /// What is multiplied, `[m, K]`.
    fn input(&self) -> Vec<f32> {
        let Some(weight) = &self.norm else {
            return self.x.clone();
        };
        let rows = self.x.chunks_exact(weight.len()).flat_map(|row| {
            let scale = (mean_square(row.iter().map(|&x| f64::from(x))) + f64::from(NORM_EPS)).sqrt().recip();
            row.iter().zip(weight).map(move |(&x, &weight)| (f64::from(x) * scale * f64::from(weight)) as f32)
        });
        rows.collect()
    }
}

fn embed<B: Backend>(device: &Device<B>, scheme: Scheme) -> Result<(), String> {
    let mut rng = Rng(4);
    for k in K.into_iter().filter(|&k| has_columns(&scheme, k)) {
        let vocabulary = 19;
        let table = random(scheme, vocabulary, k, &mut rng);
        let tokens = [18, 0, 7, 8, 7].map(|token| token as u32).to_vec();
        let mut case =
            Embed { table: [LinearPart { weight: table, bias: None }], tokens, scale: 1.0, is_sampled: false };
        for (scale, is_sampled) in [(1.0, false), (55.5, true)] {
            (case.scale, case.is_sampled) = (scale, is_sampled);
            device.check(&case, device.bounds.embed, &format!("k={k}, scale={scale}, sampled={is_sampled}"))?;
        }
    }
    Ok(())
}

struct Embed<'a> {
    table: [LinearPart<'a>; 1],
    tokens: Vec<u32>,
    scale: f32,
    /// The step takes its tokens from a sampling, which chooses the same ones.
    is_sampled: bool,
}

impl Case for Embed<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let k = self.table[0].weight.cols;
        let table = backend.load_linear(&self.table).expect("a table");
        let count = self.tokens.len();
        let mut step = Ragged::of_tokens(self.tokens.clone(), 0);
        let limits = StepLimits { logit_rows: count, vocabulary: self.table[0].weight.rows, ..limits(count, k) };
        let mut encoder = backend.encoder(&limits).expect("an encoder");
        if self.is_sampled {
            let logits = self.tokens.iter().flat_map(|&token| {
                (0..limits.vocabulary).map(move |other| if other == token as usize { 1.0 } else { 0.0 })
            });
            let mut logits = upload(backend, limits.vocabulary, &logits.collect::<Vec<f32>>());
            encoder.sample(&mut logits, &vec![SampleRow::GREEDY; count]);
            step.tokens = (0..count as u32).map(|row| Step::SAMPLED + row).collect();
        }
        let mut out = poisoned(backend, self.tokens.len(), k);
        encoder.begin(&step.step());
        encoder.embed(&table, self.scale, &mut out);
        read::<B>(&mut encoder, &out, self.tokens.len() * k)
    }

    /// A weight may be small as the difference of a scaled code and a minimum, of which each is rounded.
    fn energy(&self, expected: &[f32]) -> f64 {
        let table = &self.table[0].weight;
        let rows = self.tokens.iter().flat_map(|&token| (0..table.cols).map(move |col| (token as usize, col)));
        mean_square(rows.zip(expected).map(|((row, col), &expected)| {
            let bias = (table.bias_at(row, table.group_of(col)) * self.scale).abs();
            f64::from(expected.abs() + bias)
        }))
    }
}
