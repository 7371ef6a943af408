//! Operations that work row by row: norms, rotary embedding, writing the KV cache.

use half::slice::HalfFloatSliceExt;

use super::CpuBackend;
use super::simd::{Simd, SimdLevel, WithSimd};
use super::threads::Threads;
use super::vector;
use crate::host::{HostKvCache, HostStep, KvData, KvPlane};
use crate::{AttentionShape, HostBuffer, LatentShape, QkNorm};

/// Rows of a task: a decode step of few rows is not worth waking threads for.
const TASK_ROWS: usize = 4;

/// Values of a task of [`soft_cap`], whose rows are as long as the vocabulary.
const SOFT_CAP_TASK: usize = 4096;

pub(super) const CHECKED: &str = "the backend was made for a SIMD level of this processor";

/// `out[t] = [cos(p·f_i)·scaling … | sin(p·f_i)·scaling …]`.
pub(super) fn rope_angles(positions: &[u32], inv_freq: &[f32], scaling: f32, out: &mut [f32], threads: &Threads) {
    let width = 2 * inv_freq.len();
    if width == 0 {
        return;
    }
    threads.for_each_chunk(out, TASK_ROWS * width, |task, rows| {
        for (row, &position) in rows.chunks_exact_mut(width).zip(&positions[task * TASK_ROWS..]) {
            let (cos, sin) = row.split_at_mut(inv_freq.len());
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(inv_freq) {
                let (s, c) = (position as f32 * frequency).sin_cos();
                (*cos, *sin) = (c * scaling, s * scaling);
            }
        }
    });
}

/// RMS norm of the first values of each row of `x`, as many as weights; rows begin `stride` apart.
pub(super) fn rms_norm(
    x: &[f32],
    stride: usize,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
    simd: SimdLevel,
    threads: &Threads,
) {
    let width = weight.len();
    if width == 0 {
        return;
    }
    assert!(width <= stride, "a row has a value for each weight");
    threads.for_each_chunk(out, TASK_ROWS * width, |i, rows| {
        let of_task = x[i * TASK_ROWS * stride..].chunks(stride);
        rows.chunks_exact_mut(width).zip(of_task).for_each(|(row, x)| row.copy_from_slice(&x[..width]));
        simd.dispatch(NormRows { rows, weight, eps }).expect(CHECKED);
    });
}

struct NormRows<'a> {
    rows: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl WithSimd for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.rows.chunks_exact_mut(self.weight.len()) {
            vector::rms_norm(simd, row, self.weight, self.eps);
        }
    }
}

/// Adds the RMS norm of each row of `x` to that of `out`.
pub(super) fn rms_norm_add(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32], simd: SimdLevel, threads: &Threads) {
    if weight.is_empty() {
        return;
    }
    let task = TASK_ROWS * weight.len();
    threads.for_each_chunk(out, task, |i, rows| {
        let x = &x[i * task..][..rows.len()];
        simd.dispatch(AddNormRows { x, rows, weight, eps }).expect(CHECKED);
    });
}

struct AddNormRows<'a> {
    x: &'a [f32],
    rows: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl WithSimd for AddNormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        for (row, x) in self.rows.chunks_exact_mut(width).zip(self.x.chunks_exact(width)) {
            vector::rms_norm_add(simd, x, self.weight, self.eps, row);
        }
    }
}

/// Layer norm of each row. Sums run in double precision: a mean far from 0 costs nothing.
pub(super) fn layer_norm(
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
    threads: &Threads,
) {
    let width = weight.len();
    if width == 0 {
        return;
    }
    let task = TASK_ROWS * width;
    threads.for_each_chunk(out, task, |i, rows| {
        for (x, out) in x[i * task..].chunks_exact(width).zip(rows.chunks_exact_mut(width)) {
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
            let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
            let scale = 1.0 / (variance + f64::from(eps)).sqrt();
            for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
                *out = ((f64::from(x) - mean) * scale) as f32 * weight;
            }
            for (out, &bias) in out.iter_mut().zip(bias.unwrap_or_default()) {
                *out += bias;
            }
        }
    });
}

/// `x = cap · tanh(x / cap)`.
pub(super) fn soft_cap(x: &mut HostBuffer, cap: f32, threads: &Threads) {
    threads.for_each_chunk(x.values_mut(), SOFT_CAP_TASK, |_, values| {
        values.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
    });
}

/// Norm and rotation of query and key heads.
pub(super) struct Rope<'a> {
    pub(super) shape: &'a AttentionShape,
    pub(super) norm: Option<QkNorm<'a, CpuBackend>>,
    pub(super) angles: &'a HostBuffer,
}

impl Rope<'_> {
    /// Prepares all query and key heads in place.
    pub(super) fn prepare(&self, qkv: &mut HostBuffer, simd: SimdLevel, threads: &Threads) {
        let width = qkv.width();
        threads.for_each_chunk(qkv.values_mut(), TASK_ROWS * width, |task, rows| {
            let rows = RopeRows { rope: self, first: task * TASK_ROWS, width, rows };
            simd.dispatch(rows).expect(CHECKED);
        });
    }
}

struct RopeRows<'a> {
    rope: &'a Rope<'a>,
    first: usize,
    width: usize,
    rows: &'a mut [f32],
}

impl WithSimd for RopeRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Rope { shape, norm, angles } = self.rope;
        for (i, row) in self.rows.chunks_exact_mut(self.width).enumerate() {
            let heads = row.chunks_exact_mut(shape.head_dim).take(shape.heads + shape.kv_heads);
            for (h, head) in heads.enumerate() {
                if let Some(norm) = norm {
                    let weight = if h < shape.heads { norm.q } else { norm.k };
                    vector::rms_norm(simd, head, weight, norm.eps);
                }
                vector::rotate(head, angles.row(self.first + i), shape.rope);
            }
        }
    }
}

/// What prepares latent attention.
pub(super) struct Latent<'a> {
    pub(super) shape: &'a LatentShape,
    pub(super) norm: &'a [f32],
    pub(super) eps: f32,
    pub(super) angles: &'a HostBuffer,
}

impl Latent<'_> {
    /// Writes the key of each row of `kv` to the cache, one after the other as [`store_kv`] does; `key` is scratch memory.
    pub(super) fn store_keys(
        &self,
        step: &HostStep,
        kv: &HostBuffer,
        key: &mut Vec<f32>,
        cache: &mut HostKvCache,
        layer: usize,
        simd: SimdLevel,
    ) {
        let beside = kv
            .width()
            .checked_sub(self.shape.key_dim())
            .expect("rows that end in a latent vector and the rotated part");
        key.resize(self.shape.key_dim(), 0.0);
        for (sequence, row) in step.sequence_rows() {
            key.copy_from_slice(&kv.row(row)[beside..]);
            simd.dispatch(LatentKey { latent: self, row, key }).expect(CHECKED);
            let slot = step.slot(sequence, step.positions[row] as usize, cache.block_tokens);
            store(&mut cache.layers[layer].keys, 0, slot, key);
        }
    }

    /// Rotates the last part of each head of `q`, and writes it behind the first `rank` values of that head of `queries`.
    pub(super) fn rotate_queries(&self, q: &HostBuffer, queries: &mut HostBuffer, simd: SimdLevel, threads: &Threads) {
        let LatentShape { heads, nope_dim, rope_dim, .. } = *self.shape;
        assert_eq!(q.width(), heads * (nope_dim + rope_dim), "rows of as many heads");
        let width = heads * self.shape.key_dim();
        let queries = queries.output(q.rows(), width);
        threads.for_each_chunk(queries, TASK_ROWS * width, |task, queries| {
            let queries = LatentQueries { latent: self, q, first: task * TASK_ROWS, queries };
            simd.dispatch(queries).expect(CHECKED);
        });
    }
}

/// Rotation of the queries of some rows.
struct LatentQueries<'a> {
    latent: &'a Latent<'a>,
    q: &'a HostBuffer,
    first: usize,
    queries: &'a mut [f32],
}

impl WithSimd for LatentQueries<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { latent: Latent { shape, angles, .. }, q, first, queries } = self;
        let LatentShape { heads, nope_dim, rope_dim, rank, rope } = **shape;
        let (from, to) = (nope_dim + rope_dim, shape.key_dim());
        for (i, queries) in queries.chunks_exact_mut(heads * to).enumerate() {
            for (query, head) in queries.chunks_exact_mut(to).zip(q.row(first + i).chunks_exact(from)) {
                query[rank..].copy_from_slice(&head[nope_dim..]);
                vector::rotate(&mut query[rank..], angles.row(first + i), rope);
            }
        }
    }
}

/// Norm and rotation of a key.
struct LatentKey<'a> {
    latent: &'a Latent<'a>,
    row: usize,
    key: &'a mut [f32],
}

impl WithSimd for LatentKey<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { latent: Latent { shape, norm, eps, angles }, row, key } = self;
        let (latent, rotated) = key.split_at_mut(shape.rank);
        vector::rms_norm(simd, latent, norm, *eps);
        vector::rotate(rotated, angles.row(row), shape.rope);
    }
}

/// Writes the K and V heads of each row to the cache.
///
/// One thread does it: a row is a few kilobytes, and two sequences that (wrongly) share a block then still write one after
/// the other.
pub(super) fn store_kv(step: &HostStep, qkv: &HostBuffer, shape: &AttentionShape, kv: &mut HostKvCache, layer: usize) {
    let cache = &mut kv.layers[layer];
    for (sequence, row) in step.sequence_rows() {
        let slot = step.slot(sequence, step.positions[row] as usize, kv.block_tokens);
        let (keys, values) = qkv.row(row)[shape.heads * shape.head_dim..].split_at(shape.kv_heads * shape.head_dim);
        for head in 0..shape.kv_heads {
            let range = head * shape.head_dim..(head + 1) * shape.head_dim;
            store(&mut cache.keys, head, slot, &keys[range.clone()]);
            store(&mut cache.values, head, slot, &values[range]);
        }
    }
}

fn store(plane: &mut KvPlane, head: usize, slot: usize, values: &[f32]) {
    let (row, range) = (plane.row(head, slot), plane.range(head, slot));
    match &mut plane.data {
        KvData::F32(data) => data[range].copy_from_slice(values),
        KvData::F16(data) => data[range].convert_from_f32_slice(values),
        KvData::Codes(codes) => codes.store(row, values),
    }
}
