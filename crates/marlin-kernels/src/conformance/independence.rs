//! Rows that compare a device with itself: a row's result is bitwise the same alone, in any batch, and on any number of threads. On a GPU it is
//! so within each kernel, and everywhere in batch-invariant mode.

use std::ops::Range;
use std::sync::Arc;

use crate::cpu::{Arithmetic, CpuBackend, CpuOptions, SimdLevel};
use crate::gpu::GpuBackend;
use crate::{
    Activation, AttentionShape, Backend, Encoder, HostRoutes, Input, KvLayer, KvLayout, KvType, LatentShape,
    LinearPart, RopeLayout, RouterScore, RouterWeights, Routing, Values,
};
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
        for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
            let mode = format!("cpu-{simd}-{arithmetic:?}").to_lowercase();
            let of = |format: Format| format.scheme(None).expect("its usual groups");
            let each = Format::ALL.map(|format| (format.to_string(), vec![of(format)]));
            let mixed = [of(Format::Fp4), Scheme::BF16, of(Format::Int3), of(Format::Nvfp4), of(Format::Fp8)];
            for (name, schemes) in each.into_iter().chain([("mixed".into(), mixed.to_vec())]) {
                table.add_plain(format!("independence/experts/{name}/{mode}"), move || {
                    equal_in_all_batches(simd, arithmetic, |backend, batches| experts(backend, &schemes, batches))
                });
            }
            for (heads, nope_dim, rope_dim, rank) in [(20, 64, 16, 128), (3, 24, 8, 40)] {
                let shape = LatentShape { heads, nope_dim, rope_dim, rank, rope: RopeLayout::Interleaved };
                let name = format!("heads={heads},dims={nope_dim}+{rope_dim},rank={rank}");
                table.add_plain(format!("independence/latent-attention/{name}/{mode}"), move || {
                    equal_in_all_batches(simd, arithmetic, |backend, batches| {
                        latent_attention(backend, &shape, batches)
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
                let shape = AttentionShape {
                    heads,
                    kv_heads,
                    head_dim: dim,
                    scale: 0.1,
                    window,
                    values: Values::Cached,
                    rope: RopeLayout::HalfSplit,
                };
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
        let backend = usual.clone();
        table.add_plain(format!("independence/experts/{name}/{label}"), move || {
            GPU_BATCHES.into_iter().try_for_each(|(rows, sizes)| {
                same_in_batches(rows, sizes, |batches| mixture(&*backend, scheme, batches))
            })
        });
        let backend = invariant.clone();
        table.add_plain(format!("independence/experts/{name}/{label}-invariant"), move || {
            same_in_batches(INVARIANT_ROWS, INVARIANT_BATCHES, |batches| mixture(&*backend, scheme, batches))
        });
    }
    for (heads, kv_heads, dim) in [(4, 4, 64), (14, 2, 80)] {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim: dim,
            scale: 0.1,
            window: None,
            values: Values::Cached,
            rope: RopeLayout::HalfSplit,
        };
        let backend = invariant.clone();
        table.add_plain(
            format!("independence/attention/heads={heads}:{kv_heads},dim={dim}/{label}-invariant"),
            move || same_in_batches(ROWS, BATCHES, |batches| attention(&*backend, &shape, batches)),
        );
    }
    let latent = LatentShape { heads: 5, nope_dim: 64, rope_dim: 64, rank: 128, rope: RopeLayout::Interleaved };
    let backend = invariant.clone();
    table.add_plain(format!("independence/latent-attention/{label}-invariant"), move || {
        same_in_batches(ROWS, BATCHES, |batches| latent_attention(&*backend, &latent, batches))
    });
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

/// What a mixture of experts adds to some rows by their norms, and what linears of heads make of them.
fn mixture<B: Backend>(backend: &B, scheme: Scheme, batches: &[Range<usize>]) -> Vec<f32> {
    let (hidden, width, heads) = (128, 64, 4);
    let routing = Routing {
        experts: 5,
        top_k: 2,
        shared: 1,
        score: RouterScore::Sigmoid,
        groups: 1,
        top_groups: 1,
        normalize: true,
        scale: 1.5,
    };
    let mut rng = Rng(43);
    let mut group = |count: usize, parts: usize, rows: usize, cols: usize| {
        let mut linear = || {
            let mut part =
                || LinearPart { weight: random(scheme, rows, cols, &mut rng), bias: Some(rng.normals(rows)) };
            backend.load_linear(&(0..parts).map(|_| part()).collect::<Vec<_>>()).expect("matrices that fit together")
        };
        backend.group_linears((0..count).map(|_| linear()).collect()).expect("linears of one shape")
    };
    let gate_up = group(routing.all_experts(), 2, width, hidden);
    let down = group(routing.all_experts(), 1, hidden, width);
    let of_heads = group(heads, 1, hidden / heads, hidden / heads);
    let weight = rng.normals(routing.experts * hidden);
    let router = RouterWeights { routing, weight: &weight, bias: None, correction: None };
    let router = backend.load_router(&router).expect("a router");
    let norm = backend.load_vector(&rng.normals(hidden)).expect("a vector");
    let x = rng.normals(INVARIANT_ROWS * hidden);
    let mut results = Vec::new();
    for batch in batches {
        let (rows, pairs) = (batch.len(), batch.len() * routing.slots());
        let mut out = upload(backend, hidden, &x[batch.start * hidden..batch.end * hidden]);
        let mut routes = backend.routes(&routing, rows, hidden).expect("routes");
        let mut encoder = backend.encoder(&limits(rows, hidden)).expect("an encoder");
        let mut gated = poisoned(backend, pairs, width);
        let mut headed = poisoned(backend, rows, hidden);
        let normed = || Input::Normed { x: &out, weight: &norm, eps: 1e-5 };
        encoder.route(normed(), &router, &mut routes);
        encoder.expert_gated(normed(), &mut routes, &gate_up, Activation::Silu, &mut gated);
        encoder.expert_combine(&gated, &mut routes, &down, &mut out);
        encoder.head_linear(&out, &of_heads, &mut headed);
        let mut read = |buffer| read::<B>(&mut encoder, buffer, rows * hidden);
        let (out, headed) = (read(&out), read(&headed));
        for (out, headed) in out.chunks_exact(hidden).zip(headed.chunks_exact(hidden)) {
            results.extend(out);
            results.extend(headed);
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

/// What a bystander brings to each step at most.
const BYSTANDER: usize = 3;

/// The positions that the other sequence of a step brings: more or fewer from step to step, none to the only one.
fn bystander(step: usize, steps: usize) -> Range<usize> {
    let first = step * BYSTANDER;
    if steps == 1 { 0..0 } else { first..first + step % (BYSTANDER + 1) }
}

/// One sequence in chunks, while another one takes part in every step.
fn attention<B: Backend>(backend: &B, shape: &AttentionShape, batches: &[Range<usize>]) -> Vec<f32> {
    let mut rng = Rng(42);
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let out_width = shape.heads * shape.head_dim;
    let pages = Pages::new(16, &[ROWS * BYSTANDER, ROWS], &mut rng);
    let layer =
        KvLayer { heads: shape.kv_heads, key_dim: shape.head_dim, value_dim: shape.head_dim, window: shape.window };
    let layout = KvLayout { block_tokens: 16, layers: vec![layer] };
    let mut kv = backend.kv_cache(&layout, KvType::F16, pages.blocks).expect("a cache");
    let inv_freq = backend.load_vector(&[1.0, 0.1, 0.01]).expect("a vector");
    let rows = rng.normals(ROWS * width);
    let mut results = Vec::new();
    for (i, batch) in batches.iter().enumerate() {
        let other = bystander(i, batches.len());
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
        let out = read::<B>(&mut encoder, &out, step.rows() * out_width);
        results.extend(&out[others * out_width..]);
    }
    results
}

/// The routes of some rows, what their experts make of them, and the sums of those. Rows of a batch stand in reversed order; one expert has all of
/// them, others none or a few.
fn experts(backend: &CpuBackend, schemes: &[Scheme], batches: &[Range<usize>]) -> Vec<f32> {
    const HIDDEN: usize = 100;
    const WIDTH: usize = 41;
    let routing = Routing {
        experts: 9,
        top_k: 3,
        shared: 1,
        score: RouterScore::Sigmoid,
        groups: 3,
        top_groups: 2,
        normalize: true,
        scale: 1.5,
    };
    let slots = routing.slots();
    let mut rng = Rng(43);
    let weight = rng.normals(routing.experts * HIDDEN);
    let correction = rng.normals(routing.experts);
    let router = RouterWeights { routing, weight: &weight, bias: None, correction: Some(&correction) };
    let router = backend.load_router(&router).expect("a router");
    let mut group = |parts: usize, n, k| {
        let linears = (0..routing.all_experts()).map(|expert| {
            let scheme = schemes[expert % schemes.len()];
            let mut part = || LinearPart { weight: random(scheme, n, k, &mut rng), bias: Some(rng.normals(n)) };
            let parts: Vec<_> = (0..parts).map(|_| part()).collect();
            backend.load_linear(&parts).expect("matrices that fit together")
        });
        backend.group_linears(linears.collect()).expect("linears of one shape")
    };
    let (gate_up, down) = (group(2, WIDTH, HIDDEN), group(1, HIDDEN, WIDTH));
    let norm = backend.load_vector(&rng.normals(HIDDEN)).expect("a vector");
    let x = rng.normals(ROWS * HIDDEN);
    let mut results = Vec::new();
    for batch in batches {
        let rows = batch.len();
        let reversed: Vec<f32> = batch.clone().rev().flat_map(|row| &x[row * HIDDEN..][..HIDDEN]).copied().collect();
        let x = upload(backend, HIDDEN, &reversed);
        let mut encoder = backend.encoder(&limits(rows, HIDDEN)).expect("an encoder");
        let mut routes = backend.routes(&routing, rows, HIDDEN).expect("routes");
        let mut gated = poisoned(backend, rows * slots, WIDTH);
        let mut out = upload(backend, HIDDEN, &reversed);
        let normed = || Input::Normed { x: &x, weight: &norm, eps: 1e-5 };
        encoder.route(normed(), &router, &mut routes);
        encoder.expert_gated(normed(), &mut routes, &gate_up, Activation::Silu, &mut gated);
        encoder.expert_combine(&gated, &mut routes, &down, &mut out);
        let mut chosen = HostRoutes::default();
        encoder.read_routes(&mut routes, &mut chosen).expect("routes");
        let gated = read::<CpuBackend>(&mut encoder, &gated, rows * slots * WIDTH);
        let out = read::<CpuBackend>(&mut encoder, &out, rows * HIDDEN);
        let mut sorted: Vec<usize> = (0..rows * slots).collect();
        sorted.sort_by_key(|&pair| chosen.experts[pair]);
        for row in (0..rows).rev() {
            let pairs = row * slots..(row + 1) * slots;
            results.extend(&chosen.logits[row * routing.experts..][..routing.experts]);
            results.extend(chosen.experts[pairs.clone()].iter().map(|&expert| expert as f32));
            results.extend(&chosen.weights[pairs.clone()]);
            for pair in pairs {
                let place = sorted.iter().position(|&other| other == pair).expect("a place for each pair");
                results.extend(&gated[place * WIDTH..][..WIDTH]);
            }
            results.extend(&out[row * HIDDEN..][..HIDDEN]);
        }
    }
    results
}

/// Latent attention of one sequence in chunks, with the linears of heads before and after it, while another one takes part in every step.
fn latent_attention<B: Backend>(backend: &B, shape: &LatentShape, batches: &[Range<usize>]) -> Vec<f32> {
    const VALUE_DIM: usize = 20;
    let mut rng = Rng(44);
    let LatentShape { heads, nope_dim, rope_dim, rank, rope } = *shape;
    let (q_width, kv_width, out_width) = (heads * (nope_dim + rope_dim), shape.key_dim(), heads * VALUE_DIM);
    let scheme = Format::Fp4.scheme(None).expect("its usual groups");
    let mut group = |n, k| {
        let linears = (0..heads).map(|_| {
            let part = LinearPart { weight: random(scheme, n, k, &mut rng), bias: None };
            backend.load_linear(&[part]).expect("a matrix")
        });
        backend.group_linears(linears.collect()).expect("linears of one shape")
    };
    let (absorb, expand) = (group(rank, nope_dim), group(VALUE_DIM, rank));
    let bystander = 3;
    let pages = Pages::new(16, &[ROWS * bystander, ROWS], &mut rng);
    let layer = KvLayer { heads: 1, key_dim: kv_width, value_dim: 0, window: None };
    let layout = KvLayout { block_tokens: 16, layers: vec![layer] };
    let mut cache = backend.kv_cache(&layout, KvType::F16, pages.blocks).expect("a cache");
    let norm = backend.load_vector(&rng.normals(rank)).expect("a vector");
    let inv_freq: Vec<f32> = (0..rope_dim / 2).map(|i| 0.5f32.powi(i as i32)).collect();
    let inv_freq = backend.load_vector(&inv_freq).expect("a vector");
    let attention = AttentionShape {
        heads,
        kv_heads: 1,
        head_dim: kv_width,
        values: Values::OfKeys(rank),
        scale: 0.02,
        window: None,
        rope,
    };
    let (q_rows, kv_rows) = (rng.normals(ROWS * q_width), rng.normals(ROWS * kv_width));
    let mut results = Vec::new();
    for (i, batch) in batches.iter().enumerate() {
        // The other sequence brings more or fewer tokens from step to step.
        let other = if batches.len() == 1 { 0..0 } else { i * bystander..i * bystander + i % (bystander + 1) };
        let others = other.len();
        let step = pages.step(&[other, batch.clone()]);
        let mut rows = |of: &[f32], width: usize| {
            let mut values = rng.normals(others * width);
            values.extend(&of[batch.start * width..batch.end * width]);
            upload(backend, width, &values)
        };
        let (q, kv) = (rows(&q_rows, q_width), rows(&kv_rows, kv_width));
        let widest = heads * kv_width.max(nope_dim + rope_dim);
        let mut encoder = backend.encoder(&limits(step.rows(), widest)).expect("an encoder");
        let mut angles = poisoned(backend, step.rows(), rope_dim);
        let mut queries = poisoned(backend, step.rows(), heads * kv_width);
        let mut latent = poisoned(backend, step.rows(), heads * rank);
        let mut out = poisoned(backend, step.rows(), out_width);
        encoder.begin(&step.step());
        encoder.rope_angles(&inv_freq, 1.0, &mut angles);
        encoder.latent_store_kv(&q, &kv, shape, &norm, 1e-6, &angles, &mut cache, 0, &mut queries);
        encoder.head_linear(&q, &absorb, &mut queries);
        encoder.attention(&queries, &attention, None, &cache, 0, &mut latent);
        encoder.head_linear(&latent, &expand, &mut out);
        let latent = read::<B>(&mut encoder, &latent, step.rows() * heads * rank);
        let out = read::<B>(&mut encoder, &out, step.rows() * out_width);
        for row in others..step.rows() {
            results.extend(&latent[row * heads * rank..][..heads * rank]);
            results.extend(&out[row * out_width..][..out_width]);
        }
    }
    results
}
