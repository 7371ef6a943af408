//! Causal attention over paged keys and values, with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! A work item is a few rows of one sequence × query heads of one KV head. It walks the keys in partitions of
//! [`PARTITION`] absolute positions, and a query's arithmetic depends on its own position only: results are bitwise
//! the same whatever else is in the step, however a prompt is cut into chunks, and on any number of threads.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::disjoint::Disjoint;
use super::kv::{load_cached, prefetch_cached};
use super::simd::{MOST_LANES, Simd, SimdLevel, WithSimd};
use super::threads::Threads;
use super::vector::{exp, load, max, sum};
use crate::host::{HostKvCache, HostKvLayer, HostStep, visible};
use crate::{AttentionShape, HostBuffer, Values};

/// Keys whose scores are exponentiated together.
const PARTITION: usize = 32;
/// Rows of a work item, which share a pass over the keys.
const TILE_ROWS: usize = 16;
/// Queries of a work item at most: its rows × its query heads, which are more where rows are few.
const TILE_QUERIES: usize = TILE_ROWS * 8;

/// The step's rows in tiles, and each thread's memory.
#[derive(Debug)]
pub(super) struct Attention {
    tiles: Vec<Tile>,
    scratch: Vec<Mutex<Scratch>>,
}

/// Rows of one sequence.
#[derive(Debug)]
struct Tile {
    sequence: usize,
    rows: Range<usize>,
}

/// A piece of a head: a whole number of vectors on every level.
type Piece = [f32; MOST_LANES];

/// What a thread needs for a work item; grows to the widest head met.
#[derive(Debug, Default)]
struct Scratch {
    /// Pieces of a query or key, the last padded with zeros.
    pieces: usize,
    /// Pieces of a value.
    value_pieces: usize,
    /// Scaled queries `[TILE_QUERIES, pieces]`.
    queries: Vec<Piece>,
    /// Weighted sums of values `[TILE_QUERIES, value_pieces]`.
    sums: Vec<Piece>,
    /// Keys of a partition `[PARTITION, pieces]`.
    keys: Vec<Piece>,
    /// Values of a partition `[PARTITION, value_pieces]`; empty if they are the first ones of keys.
    values: Vec<Piece>,
}

/// What all work items of one call share.
struct Call<'a> {
    step: &'a HostStep,
    qkv: &'a HostBuffer,
    shape: &'a AttentionShape,
    sinks: Option<&'a [f32]>,
    cache: &'a HostKvLayer,
    block_tokens: usize,
}

impl Attention {
    pub(super) fn new(threads: &Threads) -> Self {
        Self { tiles: Vec::new(), scratch: (0..threads.count()).map(|_| Mutex::default()).collect() }
    }

    /// Cuts a new step into tiles.
    pub(super) fn begin(&mut self, step: &HostStep) {
        self.tiles.clear();
        for sequence in 0..step.sequences() {
            let Range { start, end } = step.rows_of(sequence);
            let starts = (start..end).step_by(TILE_ROWS);
            self.tiles.extend(starts.map(|start| Tile { sequence, rows: start..end.min(start + TILE_ROWS) }));
        }
    }

    /// Attention of every row of `qkv`; `out` is `[T, heads · value_dim]`.
    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where to run it")]
    pub(super) fn run(
        &self,
        step: &HostStep,
        qkv: &HostBuffer,
        shape: &AttentionShape,
        sinks: Option<&[f32]>,
        kv: &HostKvCache,
        layer: usize,
        out: &mut HostBuffer,
        simd: SimdLevel,
        threads: &Threads,
    ) {
        assert_eq!(qkv.width(), shape.row_width(), "rows of this shape");
        let call = Call { step, qkv, shape, sinks, cache: &kv.layers[layer], block_tokens: kv.block_tokens };
        let (dim, width) = (shape.value_dim(), shape.heads * shape.value_dim());
        let out = Disjoint::new(out.output(step.rows(), width));
        let group = shape.heads / shape.kv_heads;
        let item_heads = self.item_heads(shape, threads.count());
        let head_tiles = group.div_ceil(item_heads);
        let items = self.tiles.len() * shape.kv_heads * head_tiles;
        let next = AtomicUsize::new(0);
        threads.run(self.scratch.len().min(items), &|lane| {
            let mut scratch = self.scratch[lane].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                let (item, head_tile) = (item / head_tiles, item % head_tiles);
                let (tile, kv_head) = (&self.tiles[item / shape.kv_heads], item % shape.kv_heads);
                let first = kv_head * group + head_tile * item_heads;
                let heads = first..(first + item_heads).min((kv_head + 1) * group);
                let work = Item { call: &call, tile, kv_head, heads: heads.clone(), scratch: &mut scratch };
                simd.dispatch(work).expect("the backend was made for a SIMD level of this processor");
                let sums = scratch.sums.chunks_exact(scratch.value_pieces);
                for (query, sums) in sums.take(tile.rows.len() * heads.len()).enumerate() {
                    let (row, head) = (tile.rows.start + query / heads.len(), first + query % heads.len());
                    // SAFETY: work items differ in their rows or their heads.
                    let out = unsafe { out.slice(row * width + head * dim, dim) };
                    out.copy_from_slice(&sums.as_flattened()[..dim]);
                }
            }
        });
    }

    /// Query heads of a work item. They share a pass over the keys: as many as fit, unless threads would have nothing to do.
    fn item_heads(&self, shape: &AttentionShape, threads: usize) -> usize {
        let group = shape.heads / shape.kv_heads;
        let rows = self.tiles.iter().map(|tile| tile.rows.len()).max().unwrap_or(1);
        let busy = threads.div_ceil((self.tiles.len() * shape.kv_heads).max(1));
        group.div_ceil(group.div_ceil(TILE_QUERIES / rows).max(busy.min(group)))
    }
}

/// Rows of one sequence × query heads of one KV head. Its queries are all heads of the first row, of the second, …
struct Item<'a> {
    call: &'a Call<'a>,
    tile: &'a Tile,
    kv_head: usize,
    heads: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Item<'_> {
    type Output = ();

    /// Leaves the results in `scratch.sums`.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { call, tile, kv_head, heads, scratch } = self;
        let queries = tile.rows.len() * heads.len();
        scratch.resize(call.shape);
        load_queries(simd, call, tile, &heads, &mut scratch.queries);
        scratch.sums[..queries * scratch.value_pieces].fill([0.0; MOST_LANES]);
        let mut softmax =
            Softmax { simd, scratch, largest: [f32::NEG_INFINITY; TILE_QUERIES], total: [0.0; TILE_QUERIES] };
        if let Some(sinks) = call.sinks {
            // A sink is a key that is seen first, whose value is 0.
            for query in 0..queries {
                softmax.largest[query] = sinks[heads.start + query % heads.len()];
                softmax.total[query] = 1.0;
            }
        }

        // Positions rise by one from row to row, so the first row sees furthest back and the last one furthest on.
        let seen = call.seen(tile.rows.start).start..call.seen(tile.rows.end - 1).end;
        let mut start = seen.start / PARTITION * PARTITION;
        while start < seen.end {
            let partition = start..start + PARTITION;
            call.load_keys_and_values(simd, tile.sequence, kv_head, &partition, &seen, softmax.scratch);
            let mut query = 0;
            while query < queries {
                // Queries that see the same keys of the partition share the loads.
                let keys = call.seen_in(&partition, tile.rows.start + query / heads.len());
                let mut alike = 1;
                while alike < 4
                    && query + alike < queries
                    && call.seen_in(&partition, tile.rows.start + (query + alike) / heads.len()) == keys
                {
                    alike += 1;
                }
                query += match alike {
                    4 => softmax.attend::<4>(query, keys),
                    2 | 3 => softmax.attend::<2>(query, keys),
                    _ => softmax.attend::<1>(query, keys),
                };
            }
            start += PARTITION;
        }
        softmax.normalise(queries);
    }
}

fn intersection(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

impl Call<'_> {
    /// The positions that a row sees.
    fn seen(&self, row: usize) -> Range<usize> {
        visible(self.step.positions[row] as usize, self.shape.window)
    }

    /// Those of a partition, counted from its start.
    fn seen_in(&self, partition: &Range<usize>, row: usize) -> Range<usize> {
        let keys = intersection(partition, &self.seen(row));
        keys.start - partition.start..keys.end - partition.start
    }

    /// Loads the keys and values of a partition that are seen, and has those of the next one fetched: while these are multiplied, they arrive.
    #[inline(always)]
    fn load_keys_and_values<S: Simd>(
        &self,
        simd: S,
        sequence: usize,
        kv_head: usize,
        partition: &Range<usize>,
        seen: &Range<usize>,
        scratch: &mut Scratch,
    ) {
        let HostKvLayer { keys, values } = self.cache;
        let Scratch { pieces, value_pieces, .. } = *scratch;
        let are_cached = self.shape.values == Values::Cached;
        for position in intersection(partition, seen) {
            let (slot, place) = (self.step.slot(sequence, position, self.block_tokens), position - partition.start);
            load_cached(simd, keys, kv_head, slot, scratch.keys[place * pieces..][..pieces].as_flattened_mut());
            if are_cached {
                let to = scratch.values[place * value_pieces..][..value_pieces].as_flattened_mut();
                load_cached(simd, values, kv_head, slot, to);
            }
            if position + PARTITION < seen.end {
                let slot = self.step.slot(sequence, position + PARTITION, self.block_tokens);
                prefetch_cached(simd, keys, kv_head, slot);
                prefetch_cached(simd, values, kv_head, slot);
            }
        }
    }
}

/// Loads the scaled queries of a work item, padded with zeros.
#[inline(always)]
fn load_queries<S: Simd>(simd: S, call: &Call<'_>, tile: &Tile, heads: &Range<usize>, to: &mut [Piece]) {
    let dim = call.shape.head_dim;
    let scale = simd.splat(call.shape.scale);
    let mut rows = to.chunks_exact_mut(dim.div_ceil(MOST_LANES));
    for row in tile.rows.clone() {
        for head in heads.clone() {
            let from = &call.qkv.row(row)[head * dim..][..dim];
            let Some(to) = rows.next() else { unreachable!("scratch holds a whole tile") };
            for (i, to) in to.as_flattened_mut().chunks_exact_mut(S::LANES).enumerate() {
                let values = load(simd, from, (i * S::LANES).min(dim));
                simd.store(simd.mul(values, scale), to);
            }
        }
    }
}

impl Scratch {
    /// Makes room for heads of this shape.
    fn resize(&mut self, shape: &AttentionShape) {
        self.pieces = shape.head_dim.div_ceil(MOST_LANES);
        self.value_pieces = shape.value_dim().div_ceil(MOST_LANES);
        let loaded_pieces = if shape.values == Values::Cached { self.value_pieces } else { 0 };
        let zero = [0.0; MOST_LANES];
        self.queries.resize(TILE_QUERIES * self.pieces, zero);
        self.sums.resize(TILE_QUERIES * self.value_pieces, zero);
        self.keys.resize(PARTITION * self.pieces, zero);
        self.values.resize(PARTITION * loaded_pieces, zero);
    }

    /// The weighted sums, the values of a partition, and pieces from one value to the next.
    #[inline(always)]
    fn sums_and_values(&mut self) -> (&mut [Piece], &[Piece], usize) {
        match &self.values[..] {
            [] => (&mut self.sums, &self.keys, self.pieces),
            values => (&mut self.sums, values, self.value_pieces),
        }
    }
}

/// The running softmax of a work item's queries.
struct Softmax<'a, S> {
    simd: S,
    scratch: &'a mut Scratch,
    /// The largest score of each query so far.
    largest: [f32; TILE_QUERIES],
    /// The sum of `exp(score − largest)` of each query.
    total: [f32; TILE_QUERIES],
}

impl<S: Simd> Softmax<'_, S> {
    /// Takes `keys` of the loaded partition into `N` queries from `first` on; gives `N`.
    #[inline(always)]
    fn attend<const N: usize>(&mut self, first: usize, keys: Range<usize>) -> usize {
        if keys.is_empty() {
            return N;
        }
        let mut weights = self.scores::<N>(first, &keys);

        let mut shrink = [0.0; N];
        for n in 0..N {
            let (largest, total) = (&mut self.largest[first + n], &mut self.total[first + n]);
            let new = max(weights[n], *largest);
            for weight in &mut weights[n] {
                *weight = exp(*weight - new);
            }
            shrink[n] = exp(*largest - new);
            *total = *total * shrink[n] + sum(weights[n]);
            *largest = new;
        }

        let mut n = 0;
        // Queries share each value: four where registers hold as much.
        while S::LANES == MOST_LANES && n + 4 <= N {
            let shrink = [shrink[n], shrink[n + 1], shrink[n + 2], shrink[n + 3]];
            let weights = [&weights[n], &weights[n + 1], &weights[n + 2], &weights[n + 3]];
            self.add_values::<4>(first + n, &keys, shrink, weights);
            n += 4;
        }
        while n + 2 <= N {
            self.add_values::<2>(first + n, &keys, [shrink[n], shrink[n + 1]], [&weights[n], &weights[n + 1]]);
            n += 2;
        }
        if n < N {
            self.add_values::<1>(first + n, &keys, [shrink[n]], [&weights[n]]);
        }
        N
    }

    /// Scores of `keys`; −∞ for others.
    #[inline(always)]
    fn scores<const N: usize>(&self, first: usize, keys: &Range<usize>) -> [[f32; PARTITION]; N] {
        let mut scores = [[f32::NEG_INFINITY; PARTITION]; N];
        let mut eight = keys.start / 8 * 8;
        while eight < keys.end {
            let mut n = 0;
            // Queries share each key: four where registers hold as much.
            while S::LANES == MOST_LANES && n + 4 <= N {
                for (i, of_eight) in self.scores_of_eight::<4>(first + n, eight).iter().enumerate() {
                    scores[n + i][eight..eight + 8].copy_from_slice(of_eight);
                }
                n += 4;
            }
            while n + 2 <= N {
                let [a, b] = self.scores_of_eight::<2>(first + n, eight);
                scores[n][eight..eight + 8].copy_from_slice(&a);
                scores[n + 1][eight..eight + 8].copy_from_slice(&b);
                n += 2;
            }
            if n < N {
                let [a] = self.scores_of_eight::<1>(first + n, eight);
                scores[n][eight..eight + 8].copy_from_slice(&a);
            }
            eight += 8;
        }
        for scores in &mut scores {
            // Of keys that are not seen, whatever lay in memory was multiplied.
            scores[..keys.start].fill(f32::NEG_INFINITY);
            scores[keys.end..].fill(f32::NEG_INFINITY);
        }
        scores
    }

    /// Scores of `N` queries from `first` on for eight keys from `key` on.
    #[inline(always)]
    fn scores_of_eight<const N: usize>(&self, first: usize, key: usize) -> [[f32; 8]; N] {
        let (low, high) = (self.products::<N>(first, key), self.products::<N>(first, key + 4));
        let mut scores = [[0.0; 8]; N];
        for n in 0..N {
            let ([a, b, c, d], [e, f, g, h]) = (low[n], high[n]);
            scores[n] = self.simd.sums_of_lanes([a, b, c, d, e, f, g, h]);
        }
        scores
    }

    /// Products of `N` queries from `first` on with four keys from `key` on, of which the lanes are still to be summed up.
    #[inline(always)]
    fn products<const N: usize>(&self, first: usize, key: usize) -> [[S::F32; 4]; N] {
        let (simd, pieces) = (self.simd, self.scratch.pieces);
        let mut queries = [&self.scratch.queries[..0]; N];
        for (n, query) in queries.iter_mut().enumerate() {
            *query = &self.scratch.queries[(first + n) * pieces..][..pieces];
        }
        let mut keys = [&self.scratch.keys[..0]; 4];
        for (k, keys) in keys.iter_mut().enumerate() {
            *keys = &self.scratch.keys[(key + k) * pieces..][..pieces];
        }
        let mut products = [[simd.splat(0.0); 4]; N];
        for i in 0..pieces {
            let mut at = 0;
            while at < MOST_LANES {
                let mut query = [simd.splat(0.0); N];
                for n in 0..N {
                    query[n] = simd.load(&queries[n][i][at..]);
                }
                for k in 0..4 {
                    let key = simd.load(&keys[k][i][at..]);
                    for n in 0..N {
                        products[n][k] = simd.mul_add(query[n], key, products[n][k]);
                    }
                }
                at += S::LANES;
            }
        }
        products
    }

    /// `sums = sums · shrink + Σ weight · value`
    #[inline(always)]
    fn add_values<const N: usize>(
        &mut self,
        first: usize,
        keys: &Range<usize>,
        shrink: [f32; N],
        weights: [&[f32; PARTITION]; N],
    ) {
        let mut piece = 0;
        // Four vectors of each query at a time are what registers hold.
        while S::LANES == MOST_LANES && piece + 4 <= self.scratch.value_pieces {
            self.add_pieces::<N, 4>(first, piece, keys, shrink, weights);
            piece += 4;
        }
        while piece + 2 <= self.scratch.value_pieces {
            self.add_pieces::<N, 2>(first, piece, keys, shrink, weights);
            piece += 2;
        }
        if piece < self.scratch.value_pieces {
            self.add_pieces::<N, 1>(first, piece, keys, shrink, weights);
        }
    }

    /// [`Self::add_values`] of `P` pieces of a value.
    #[inline(always)]
    fn add_pieces<const N: usize, const P: usize>(
        &mut self,
        first: usize,
        piece: usize,
        keys: &Range<usize>,
        shrink: [f32; N],
        weights: [&[f32; PARTITION]; N],
    ) {
        let (simd, pieces) = (self.simd, self.scratch.value_pieces);
        let vectors = MOST_LANES / S::LANES;
        let (sums, values, stride) = self.scratch.sums_and_values();
        let sums = &mut sums[first * pieces + piece..][..(N - 1) * pieces + P];
        let mut partial = [[[simd.splat(0.0); 2]; P]; N];
        for n in 0..N {
            for p in 0..P {
                for v in 0..vectors {
                    let sum = simd.load(&sums[n * pieces + p][v * S::LANES..]);
                    partial[n][p][v] = simd.mul(sum, simd.splat(shrink[n]));
                }
            }
        }
        let seen = values[keys.start * stride..keys.end * stride].chunks_exact(stride);
        for (key, values) in keys.clone().zip(seen) {
            let values = &values[piece..][..P];
            for p in 0..P {
                for v in 0..vectors {
                    let value = simd.load(&values[p][v * S::LANES..]);
                    for n in 0..N {
                        partial[n][p][v] = simd.mul_add(simd.splat(weights[n][key]), value, partial[n][p][v]);
                    }
                }
            }
        }
        for n in 0..N {
            for p in 0..P {
                for v in 0..vectors {
                    simd.store(partial[n][p][v], &mut sums[n * pieces + p][v * S::LANES..]);
                }
            }
        }
    }

    #[inline(always)]
    fn normalise(self, queries: usize) {
        for (sums, total) in self.scratch.sums.chunks_exact_mut(self.scratch.value_pieces).zip(&self.total[..queries]) {
            let share = 1.0 / total;
            for sum in sums.as_flattened_mut() {
                *sum *= share;
            }
        }
    }
}
