//! Rows that compare a device with itself: a row's result is bitwise the same alone, in any batch, and on any number of threads. On a GPU it is
//! so within each kernel, and everywhere in batch-invariant mode.

use std::ops::Range;
use std::sync::Arc;

use crate::cpu::{Arithmetic, CpuBackend, CpuOptions, SimdLevel};
use crate::gpu::GpuBackend;
use crate::{Activation, AttentionShape, Backend, Encoder, Input, KvLayer, KvLayout, KvType, LinearPart};
use marlin_format::{Format, Grouping, Scheme};

use super::Table;
use super::matrices::{random, schemes};
use super::support::{Pages, Rng, limits, poisoned, read, upload};

/// Rows of the largest batch, more than two of the blocks in which rows pass over weights, and how it is cut: all at once, in
/// sevens, one by one.
const ROWS: usize = 130;
const BATCHES: [usize; 3] = [ROWS, 7, 1];
const THREADS: [usize; 2] = [1, 2];

pub(crate) fn add_rows(table: &mut Table) {
    for simd in SimdLevel::available() {
        for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
            let mode = format!("cpu-{simd}-{arithmetic:?}").to_lowercase();
            let dense = Format::ALL.map(|format| (format.to_string(), format.scheme(None)));
            let sparse = Format::SPARSE.map(|format| (format!("{format}-2of4"), format.sparse_24(None)));
            for (name, scheme) in dense.into_iter().chain(sparse) {
                let scheme = scheme.expect("its usual groups");
                table.add_plain(format!("independence/linear/{name}/{mode}"), move || {
                    equal_in_all_batches(simd, arithmetic, |backend, rows| {
                        linear(backend, &Linear::mixed(scheme), rows)
                    })
                });
            }
        }
        table.add_plain(format!("independence/rms-norm/cpu-{simd}"), move || {
            equal_in_all_batches(simd, Arithmetic::Exact, rms_norm)
        });
        for (heads, kv_heads, dim) in [(4, 4, 64), (14, 2, 80), (9, 1, 20)] {
            for window in [None, Some(9)] {
                let window_name = window.map_or(String::new(), |window| format!(",window={window}"));
                let name = format!("independence/attention/heads={heads}:{kv_heads},dim={dim}{window_name}/cpu-{simd}");
                let shape = AttentionShape { heads, kv_heads, head_dim: dim, scale: 0.1, window };
                table.add_plain(name, move || {
                    equal_in_all_batches(simd, Arithmetic::Exact, |backend, rows| attention(backend, &shape, rows))
                });
            }
        }
    }
}

/// Rows of a GPU in batches that one kernel takes, and how they are cut: by the blocks of the kernels for few rows.
const GPU_BATCHES: [(usize, [usize; 2]); 2] = [(12, [4, 3]), (24, [8, 6])];
/// Rows of batches that all kernels would take, and how they are cut.
const INVARIANT_ROWS: usize = 64;
const INVARIANT_BATCHES: [usize; 3] = [INVARIANT_ROWS, 7, 1];

/// Rows of a GPU, in its usual mode and in the batch-invariant one.
pub(crate) fn add_gpu_rows(table: &mut Table, usual: &Arc<GpuBackend>, invariant: &Arc<GpuBackend>, label: &str) {
    for name in ["fp4", "int4", "fp8", "bf16", "fp4-2of4"] {
        let (_, scheme) = schemes().into_iter().find(|(found, _)| found == name).expect("a scheme of the table");
        let backend = usual.clone();
        table.add_plain(format!("independence/linear/{name}/{label}"), move || {
            GPU_BATCHES.into_iter().try_for_each(|(rows, sizes)| {
                same_in_batches(rows, sizes, |batches| linear(&*backend, &Linear::fused(scheme), batches))
            })
        });
        let backend = invariant.clone();
        table.add_plain(format!("independence/linear/{name}/{label}-invariant"), move || {
            same_in_batches(INVARIANT_ROWS, INVARIANT_BATCHES, |batches| {
                linear(&*backend, &Linear::fused(scheme), batches)
            })
        });
    }
    for (heads, kv_heads, dim) in [(4, 4, 64), (14, 2, 80)] {
        let shape = AttentionShape { heads, kv_heads, head_dim: dim, scale: 0.1, window: None };
        let backend = invariant.clone();
        table.add_plain(
            format!("independence/attention/heads={heads}:{kv_heads},dim={dim}/{label}-invariant"),
            move || same_in_batches(ROWS, BATCHES, |batches| attention(&*backend, &shape, batches)),
        );
    }
}

/// `rows` rows in batches of each size. `run` gives the results of some rows, as many values for each.
fn same_in_batches(
    rows: usize,
    sizes: impl IntoIterator<Item = usize>,
    run: impl Fn(&[Range<usize>]) -> Vec<f32>,
) -> Result<(), String> {
    let mut first = None;
    for size in sizes {
        check_same(&mut first, run(&batches(rows, size)), &format!("in batches of {size} of {rows}"))?;
    }
    Ok(())
}

fn batches(rows: usize, size: usize) -> Vec<Range<usize>> {
    (0..rows).step_by(size).map(|start| start..rows.min(start + size)).collect()
}

/// Compares results with the first ones, bit by bit.
fn check_same(first: &mut Option<Vec<f32>>, found: Vec<f32>, how: &str) -> Result<(), String> {
    let Some(first) = first else {
        *first = Some(found);
        return Ok(());
    };
    match (0..found.len()).find(|&i| found[i].to_bits() != first[i].to_bits()) {
        None => Ok(()),
        Some(i) => {
            Err(format!("value {i} of {} is {:e} {how}, and was {:e} at first", found.len(), found[i], first[i]))
        }
    }
}

/// Runs all rows in batches of each size, on each number of threads. `run` gives the results of some rows, as many values for
/// each.
fn equal_in_all_batches(
    simd: SimdLevel,
    arithmetic: Arithmetic,
    run: impl Fn(&CpuBackend, &[Range<usize>]) -> Vec<f32>,
) -> Result<(), String> {
    let mut first = None;
    for threads in THREADS {
        let options = CpuOptions { threads: Some(threads), arithmetic, simd: Some(simd) };
        let backend = CpuBackend::new(options).map_err(|error| error.to_string())?;
        for size in BATCHES {
            let found = run(&backend, &batches(ROWS, size));
            check_same(&mut first, found, &format!("in batches of {size} on {threads} threads"))?;
        }
    }
    Ok(())
}

/// Two matrices `[n, k]` of one linear.
struct Linear {
    schemes: [Scheme; 2],
    n: usize,
    k: usize,
}

impl Linear {
    /// Of different schemes, and of no round shape.
    fn mixed(scheme: Scheme) -> Self {
        Self { schemes: [scheme, Scheme { grouping: Grouping::Tensor, ..Scheme::BF16 }], n: 41, k: 300 }
    }

    /// Which a GPU takes for one.
    fn fused(scheme: Scheme) -> Self {
        Self { schemes: [scheme; 2], n: 64, k: 320 }
    }
}

/// The products of some rows and of their norms, and what both matrices make of the norms as gate and what it gates.
fn linear<B: Backend>(backend: &B, shape: &Linear, batches: &[Range<usize>]) -> Vec<f32> {
    let mut rng = Rng(40);
    let Linear { schemes, n, k } = *shape;
    let [weight, up] = schemes.map(|scheme| random(scheme, n, k, &mut rng));
    let parts = [LinearPart { weight, bias: Some(rng.normals(n)) }, LinearPart { weight: up, bias: None }];
    let linear = backend.load_linear(&parts).expect("matrices that fit together");
    let norm = backend.load_vector(&rng.normals(k)).expect("a vector");
    let x = rng.normals(ROWS * k);
    let mut results = Vec::new();
    for batch in batches {
        let rows = batch.len();
        let x = upload(backend, k, &x[batch.start * k..batch.end * k]);
        let normed = || Input::Normed { x: &x, weight: &norm, eps: 1e-5 };
        let mut encoder = backend.encoder(&limits(rows, k)).expect("an encoder");
        let mut plain = poisoned(backend, rows, 2 * n);
        let mut of_norm = poisoned(backend, rows, 2 * n);
        let mut gated = poisoned(backend, rows, n);
        encoder.linear(Input::Rows(&x), &linear, &mut plain);
        encoder.linear(normed(), &linear, &mut of_norm);
        encoder.linear_gated(normed(), &linear, Activation::Silu, &mut gated);
        let mut read = |buffer, width| read::<B>(&mut encoder, buffer, rows * width);
        let (plain, of_norm, gated) = (read(&plain, 2 * n), read(&of_norm, 2 * n), read(&gated, n));
        for row in 0..rows {
            results.extend(&plain[row * 2 * n..][..2 * n]);
            results.extend(&of_norm[row * 2 * n..][..2 * n]);
            results.extend(&gated[row * n..][..n]);
        }
    }
    results
}

fn rms_norm(backend: &CpuBackend, batches: &[Range<usize>]) -> Vec<f32> {
    let mut rng = Rng(41);
    let width = 333;
    let weight = backend.load_vector(&rng.normals(width)).expect("a vector");
    let x = rng.normals(ROWS * width);
    let mut results = Vec::new();
    for batch in batches {
        let x = upload(backend, width, &x[batch.start * width..batch.end * width]);
        let mut encoder = backend.encoder(&limits(batch.len(), width)).expect("an encoder");
        let mut out = poisoned(backend, batch.len(), width);
        encoder.rms_norm(&x, &weight, 1e-5, &mut out);
        results.extend(read::<CpuBackend>(&mut encoder, &out, batch.len() * width));
    }
    results
}

/// One sequence in chunks, while another one takes part in every step.
fn attention<B: Backend>(backend: &B, shape: &AttentionShape, batches: &[Range<usize>]) -> Vec<f32> {
    let mut rng = Rng(42);
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let out_width = shape.heads * shape.head_dim;
    let bystander = 3;
    let pages = Pages::new(16, &[ROWS * bystander, ROWS], &mut rng);
    let layer =
        KvLayer { heads: shape.kv_heads, key_dim: shape.head_dim, value_dim: shape.head_dim, window: shape.window };
    let layout = KvLayout { block_tokens: 16, layers: vec![layer] };
    let mut kv = backend.kv_cache(&layout, KvType::F16, pages.blocks).expect("a cache");
    let inv_freq = backend.load_vector(&[1.0, 0.1, 0.01]).expect("a vector");
    let rows = rng.normals(ROWS * width);
    let mut results = Vec::new();
    for (i, batch) in batches.iter().enumerate() {
        // The other sequence brings more or fewer tokens from step to step.
        let other = if batches.len() == 1 { 0..0 } else { i * bystander..i * bystander + i % (bystander + 1) };
        let others = other.len();
        let step = pages.step(&[other, batch.clone()]);
        let mut values = rng.normals(others * width);
        values.extend(&rows[batch.start * width..batch.end * width]);
        let mut qkv = upload(backend, width, &values);
        let mut encoder = backend.encoder(&limits(step.rows(), width)).expect("an encoder");
        let mut angles = poisoned(backend, step.rows(), 6);
        let mut out = poisoned(backend, step.rows(), out_width);
        encoder.begin(&step.step());
        encoder.rope_angles(&inv_freq, 1.0, &mut angles);
        encoder.rope_store_kv(&mut qkv, shape, None, &angles, &mut kv, 0);
        encoder.attention(&qkv, shape, &kv, 0, &mut out);
        let out = read::<B>(&mut encoder, &out, step.rows() * out_width);
        results.extend(&out[others * out_width..]);
    }
    results
}
