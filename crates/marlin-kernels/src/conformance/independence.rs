//! Rows that hold for the CPU: a row's result is bitwise the same alone, in any batch, and on any number of threads.

use std::ops::Range;

use crate::cpu::{Arithmetic, CpuBackend, CpuOptions, SimdLevel};
use crate::{Activation, AttentionShape, Backend, Encoder, Input, KvLayer, KvLayout, KvType, LinearPart};
use marlin_format::{Format, Grouping, Scheme};

use super::Table;
use super::matrices::random;
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
                    equal_in_all_batches(simd, arithmetic, |backend, rows| linear(backend, scheme, rows))
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

/// Runs all rows in batches of each size, on each number of threads. `run` gives the results of some rows, as many values for
/// each.
fn equal_in_all_batches(
    simd: SimdLevel,
    arithmetic: Arithmetic,
    run: impl Fn(&CpuBackend, &[Range<usize>]) -> Vec<f32>,
) -> Result<(), String> {
    let mut first: Option<Vec<f32>> = None;
    for threads in THREADS {
        let options = CpuOptions { threads: Some(threads), arithmetic, simd: Some(simd) };
        let backend = CpuBackend::new(options).map_err(|error| error.to_string())?;
        for size in BATCHES {
            let batches: Vec<_> = (0..ROWS).step_by(size).map(|start| start..ROWS.min(start + size)).collect();
            let found = run(&backend, &batches);
            let expected = first.get_or_insert_with(|| found.clone());
            if let Some(i) = (0..found.len()).find(|&i| found[i].to_bits() != expected[i].to_bits()) {
                return Err(format!(
                    "value {i} of {} is {:e} in batches of {size} on {threads} threads, {:e} in one batch on one thread",
                    found.len(),
                    found[i],
                    expected[i]
                ));
            }
        }
    }
    Ok(())
}

fn linear(backend: &CpuBackend, scheme: Scheme, batches: &[Range<usize>]) -> Vec<f32> {
    let mut rng = Rng(40);
    let (n, k) = (41, 300);
    let weight = random(scheme, n, k, &mut rng);
    let up = random(Scheme { grouping: Grouping::Tensor, ..Scheme::BF16 }, n, k, &mut rng);
    let parts = [LinearPart { weight, bias: Some(rng.normals(n)) }, LinearPart { weight: up, bias: None }];
    let linear = backend.load_linear(&parts).expect("matrices that fit together");
    let x = rng.normals(ROWS * k);
    let mut results = Vec::new();
    for batch in batches {
        let rows = batch.len();
        let x = upload(backend, k, &x[batch.start * k..batch.end * k]);
        let mut encoder = backend.encoder(&limits(rows, k)).expect("an encoder");
        let mut both = poisoned(backend, rows, 2 * n);
        let mut gated = poisoned(backend, rows, n);
        encoder.linear(Input::Rows(&x), &linear, &mut both);
        encoder.linear_gated(Input::Rows(&x), &linear, Activation::Silu, &mut gated);
        let (both, gated) =
            (read::<CpuBackend>(&mut encoder, &both, rows * 2 * n), read::<CpuBackend>(&mut encoder, &gated, rows * n));
        for row in 0..rows {
            results.extend(&both[row * 2 * n..][..2 * n]);
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
fn attention(backend: &CpuBackend, shape: &AttentionShape, batches: &[Range<usize>]) -> Vec<f32> {
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
        encoder.attention(&qkv, shape, None, &kv, 0, &mut out);
        let out = read::<CpuBackend>(&mut encoder, &out, step.rows() * out_width);
        results.extend(&out[others * out_width..]);
    }
    results
}
