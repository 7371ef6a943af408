//! The oracle: plain loops, meant to be read and to be right rather than fast.
//!
//! Activations are f32 as everywhere; sums run in f64, so that another backend's error is its own. Weights are decoded
//! by [`PackedMatrix::decode_row`], the definition of every number format.
//!
//! [`PackedMatrix::decode_row`]: marlin_format::PackedMatrix::decode_row

mod sample;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

use half::f16;
use marlin_format::{FormatError, Scheme};

use crate::host::{HostStep, KvData, KvPlane, allocate, visible};
use crate::routing::{Dispatch, choose};
use crate::sampling::host::{HostSamplings, token_of};
use crate::{
    Activation, AttentionShape, Backend, DeviceInfo, Encoder, Hadamard, HostBuffer, HostKvCache, HostRoutes, Input,
    KernelError, KvLayout, KvType, LatentShape, LinearPart, MemoryUse, QkNorm, RopeLayout, RouterWeights, Routing,
    SampleRow, SamplingId, Step, StepLimits, Values,
};

const NAME: &str = "reference";

/// The reference device.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReferenceBackend;

/// Decoded weights `[rows, cols]` and a bias.
#[derive(Debug)]
pub struct ReferenceLinear {
    weights: Vec<f32>,
    bias: Vec<f32>,
    cols: usize,
}

/// A router's weights and what it does with them.
#[derive(Debug)]
pub struct ReferenceRouter {
    routing: Routing,
    weights: ReferenceLinear,
    correction: Option<Vec<f32>>,
}

/// Routes of a step, and the pairs of token and expert sorted by expert.
#[derive(Debug)]
pub struct ReferenceRoutes {
    slots: usize,
    routes: HostRoutes,
    dispatch: Dispatch,
}

/// Runs operations as they are called.
#[derive(Debug, Default)]
pub struct ReferenceEncoder {
    step: HostStep,
    samplings: HostSamplings,
}

impl MemoryUse for ReferenceBackend {
    fn linear_bytes(&self, scheme: &Scheme, rows: usize, cols: usize) -> Result<usize, KernelError> {
        scheme.packed_bytes(rows, cols)?;
        let values = rows.checked_mul(cols).and_then(|weights| weights.checked_add(rows));
        let bytes = values.and_then(|values| values.checked_mul(size_of::<f32>()));
        Ok(bytes.ok_or(FormatError::TooLarge { rows, cols })?)
    }

    fn encoder_bytes(&self, _limits: &StepLimits) -> usize {
        0
    }

    fn routes_bytes(&self, routing: &Routing, tokens: usize, _width: usize) -> usize {
        tokens.saturating_mul(routing.experts + 4 * routing.slots()).saturating_mul(size_of::<f32>())
    }
}

impl Backend for ReferenceBackend {
    type Buffer = HostBuffer;
    type Linear = ReferenceLinear;
    type LinearGroup = Vec<ReferenceLinear>;
    type Router = ReferenceRouter;
    type Routes = ReferenceRoutes;
    type Vector = Vec<f32>;
    type KvCache = HostKvCache;
    type Encoder = ReferenceEncoder;

    const OVERLAPS: bool = false;

    fn info(&self) -> DeviceInfo {
        DeviceInfo { name: NAME.into(), detail: "plain loops, f64 sums, 1 thread".into() }
    }

    fn load_linear(&self, parts: &[LinearPart<'_>]) -> Result<ReferenceLinear, KernelError> {
        let cols = crate::backend::check_parts(parts)?;
        let rows: usize = parts.iter().map(|part| part.weight.rows).sum();
        let mut linear = ReferenceLinear { weights: vec![0.0; rows * cols], bias: Vec::with_capacity(rows), cols };
        let mut weights = linear.weights.chunks_exact_mut(cols.max(1));
        for part in parts {
            for (row, decoded) in (0..part.weight.rows).zip(&mut weights) {
                part.weight.decode_row(row, decoded);
            }
            match &part.bias {
                Some(bias) => linear.bias.extend(bias),
                None => linear.bias.resize(linear.bias.len() + part.weight.rows, 0.0),
            }
        }
        Ok(linear)
    }

    fn group_linears(&self, linears: Vec<ReferenceLinear>) -> Result<Vec<ReferenceLinear>, KernelError> {
        Ok(linears)
    }

    fn load_router(&self, router: &RouterWeights<'_>) -> Result<ReferenceRouter, KernelError> {
        let cols = router.check()?;
        let bias = router.bias.map_or_else(|| vec![0.0; router.routing.experts], <[f32]>::to_vec);
        Ok(ReferenceRouter {
            routing: router.routing,
            weights: ReferenceLinear { weights: router.weight.to_vec(), bias, cols },
            correction: router.correction.map(<[f32]>::to_vec),
        })
    }

    fn routes(&self, routing: &Routing, tokens: usize, _width: usize) -> Result<ReferenceRoutes, KernelError> {
        let (slots, what) = (routing.slots(), "routes");
        let dispatch = Dispatch::new(routing.all_experts(), tokens.saturating_mul(slots), NAME)?;
        let routes = HostRoutes {
            logits: allocate(what, &[tokens, routing.experts], NAME)?,
            experts: allocate(what, &[tokens, slots], NAME)?,
            weights: allocate(what, &[tokens, slots], NAME)?,
            tiles: Vec::new(),
        };
        Ok(ReferenceRoutes { slots, routes, dispatch })
    }

    fn load_vector(&self, values: &[f32]) -> Result<Vec<f32>, KernelError> {
        Ok(values.to_vec())
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<HostBuffer, KernelError> {
        HostBuffer::new(rows, width, NAME)
    }

    fn upload(&self, buffer: &mut HostBuffer, rows: usize, values: &[f32]) -> Result<(), KernelError> {
        buffer.upload(rows, values)
    }

    fn kv_cache(&self, layout: &KvLayout, kv_type: KvType, blocks: usize) -> Result<HostKvCache, KernelError> {
        HostKvCache::new(layout, kv_type, blocks, NAME)
    }

    fn encoder(&self, _limits: &StepLimits) -> Result<ReferenceEncoder, KernelError> {
        Ok(ReferenceEncoder::default())
    }
}

impl ReferenceLinear {
    fn rows(&self) -> usize {
        self.bias.len()
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.weights[row * self.cols..][..self.cols]
    }

    /// One output value.
    fn output(&self, x: &[f32], row: usize) -> f64 {
        dot(x, self.row(row)) + f64::from(self.bias[row])
    }
}

impl Encoder<ReferenceBackend> for ReferenceEncoder {
    fn begin(&mut self, step: &Step<'_>) {
        self.step.begin(step, self.samplings.last());
    }

    fn embed(&mut self, table: &ReferenceLinear, scale: f32, out: &mut HostBuffer) {
        out.output(self.step.rows(), table.cols);
        for (t, &token) in self.step.tokens.iter().enumerate() {
            for (y, &weight) in out.row_mut(t).iter_mut().zip(table.row(token as usize)) {
                *y = weight * scale;
            }
        }
    }

    fn rope_angles(&mut self, inv_freq: &Vec<f32>, scaling: f32, out: &mut HostBuffer) {
        out.output(self.step.rows(), 2 * inv_freq.len());
        for (t, &position) in self.step.positions.iter().enumerate() {
            let (cos, sin) = out.row_mut(t).split_at_mut(inv_freq.len());
            for (i, &frequency) in inv_freq.iter().enumerate() {
                let angle = f64::from(position as f32 * frequency);
                cos[i] = (angle.cos() * f64::from(scaling)) as f32;
                sin[i] = (angle.sin() * f64::from(scaling)) as f32;
            }
        }
    }

    fn rms_norm(&mut self, x: &HostBuffer, weight: &Vec<f32>, eps: f32, out: &mut HostBuffer) {
        out.output(x.rows(), x.width()).copy_from_slice(x.values());
        for t in 0..x.rows() {
            rms_norm(out.row_mut(t), weight, eps);
        }
    }

    fn rms_norm_add(&mut self, x: &HostBuffer, weight: &Vec<f32>, eps: f32, out: &mut HostBuffer) {
        assert_eq!(out.rows(), x.rows(), "the residual stream has a row for each input row");
        for t in 0..x.rows() {
            let mut normed = x.row(t).to_vec();
            rms_norm(&mut normed, weight, eps);
            for (y, normed) in out.row_mut(t).iter_mut().zip(normed) {
                *y += normed;
            }
        }
    }

    fn layer_norm(
        &mut self,
        x: &HostBuffer,
        weight: &Vec<f32>,
        bias: Option<&Vec<f32>>,
        eps: f32,
        out: &mut HostBuffer,
    ) {
        let width = x.width();
        assert!(weight.len() == width && bias.is_none_or(|bias| bias.len() == width), "a weight for each value");
        out.output(x.rows(), width);
        for t in 0..x.rows() {
            let mean = x.row(t).iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
            let variance = x.row(t).iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
            let scale = 1.0 / (variance + f64::from(eps)).sqrt();
            for (i, y) in out.row_mut(t).iter_mut().enumerate() {
                let normed = (f64::from(x.row(t)[i]) - mean) * scale * f64::from(weight[i]);
                *y = (normed + bias.map_or(0.0, |bias| f64::from(bias[i]))) as f32;
            }
        }
    }

    fn hadamard(&mut self, x: &mut HostBuffer, rotation: &Hadamard) {
        rotation.check(x.width());
        rotation.apply(x.values_mut());
    }

    fn soft_cap(&mut self, x: &mut HostBuffer, cap: f32) {
        let cap = f64::from(cap);
        for x in x.values_mut() {
            *x = (cap * (f64::from(*x) / cap).tanh()) as f32;
        }
    }

    fn linear(&mut self, x: Input<'_, ReferenceBackend>, linear: &ReferenceLinear, out: &mut HostBuffer) {
        let x = rows(x);
        out.output(x.rows(), linear.rows());
        for t in 0..x.rows() {
            for (n, y) in out.row_mut(t).iter_mut().enumerate() {
                *y = linear.output(x.row(t), n) as f32;
            }
        }
    }

    fn linear_add(&mut self, x: &HostBuffer, linear: &ReferenceLinear, out: &mut HostBuffer) {
        assert_eq!(out.rows(), x.rows(), "the residual stream has a row for each input row");
        for t in 0..x.rows() {
            for (n, y) in out.row_mut(t).iter_mut().enumerate() {
                *y = (f64::from(*y) + linear.output(x.row(t), n)) as f32;
            }
        }
    }

    fn linear_gated(
        &mut self,
        x: Input<'_, ReferenceBackend>,
        gate_up: &ReferenceLinear,
        activation: Activation,
        out: &mut HostBuffer,
    ) {
        let x = rows(x);
        let half = gate_up.rows() / 2;
        out.output(x.rows(), half);
        for t in 0..x.rows() {
            for (n, y) in out.row_mut(t).iter_mut().enumerate() {
                let (gate, up) = (gate_up.output(x.row(t), n), gate_up.output(x.row(t), half + n));
                *y = gated(activation, gate, up) as f32;
            }
        }
    }

    fn route(&mut self, x: Input<'_, ReferenceBackend>, router: &ReferenceRouter, routes: &mut ReferenceRoutes) {
        let (x, routing) = (rows(x), &router.routing);
        let HostRoutes { logits, experts, weights, .. } = &mut routes.routes;
        logits.resize(x.rows() * routing.experts, 0.0);
        experts.resize(x.rows() * routing.slots(), 0);
        weights.resize(x.rows() * routing.slots(), 0.0);
        let chosen = experts.chunks_exact_mut(routing.slots()).zip(weights.chunks_exact_mut(routing.slots()));
        for (t, (logits, (experts, weights))) in logits.chunks_exact_mut(routing.experts).zip(chosen).enumerate() {
            for (e, logit) in logits.iter_mut().enumerate() {
                *logit = router.weights.output(x.row(t), e) as f32;
            }
            let mut scratch = [vec![0.0; routing.experts], vec![0.0; routing.experts]];
            let [scores, choice] = &mut scratch;
            choose(routing, logits, router.correction.as_deref(), [scores, choice], experts, weights);
        }
        routes.dispatch.sort(experts);
    }

    fn expert_gated(
        &mut self,
        x: Input<'_, ReferenceBackend>,
        routes: &mut ReferenceRoutes,
        gate_up: &Vec<ReferenceLinear>,
        activation: Activation,
        out: &mut HostBuffer,
    ) {
        let x = rows(x);
        let half = gate_up[0].rows() / 2;
        out.output(routes.dispatch.pairs.len(), half);
        for (e, linear) in gate_up.iter().enumerate() {
            for place in routes.dispatch.of(e) {
                let x = x.row(routes.dispatch.pairs[place] as usize / routes.slots);
                for (n, y) in out.row_mut(place).iter_mut().enumerate() {
                    *y = gated(activation, linear.output(x, n), linear.output(x, half + n)) as f32;
                }
            }
        }
    }

    fn expert_combine(
        &mut self,
        x: &HostBuffer,
        routes: &mut ReferenceRoutes,
        down: &Vec<ReferenceLinear>,
        out: &mut HostBuffer,
    ) {
        let ReferenceRoutes { slots, routes: HostRoutes { experts, weights, .. }, dispatch } = &*routes;
        assert_eq!(out.rows() * slots, x.rows(), "a row of each token for each of its experts");
        for t in 0..out.rows() {
            let pairs = t * slots..(t + 1) * slots;
            for (n, y) in out.row_mut(t).iter_mut().enumerate() {
                let term = |pair: usize| {
                    let x = x.row(dispatch.places[pair] as usize);
                    f64::from(weights[pair]) * down[experts[pair] as usize].output(x, n)
                };
                *y = (f64::from(*y) + pairs.clone().map(term).sum::<f64>()) as f32;
            }
        }
    }

    fn head_linear(&mut self, x: &HostBuffer, heads: &Vec<ReferenceLinear>, out: &mut HostBuffer) {
        let (from, to) = (x.width() / heads.len(), out.width() / heads.len());
        out.output(x.rows(), out.width());
        for t in 0..x.rows() {
            for (h, linear) in heads.iter().enumerate() {
                let x = &x.row(t)[h * from..][..linear.cols];
                for (n, y) in out.row_mut(t)[h * to..][..linear.rows()].iter_mut().enumerate() {
                    *y = linear.output(x, n) as f32;
                }
            }
        }
    }

    fn rope_store_kv(
        &mut self,
        qkv: &mut HostBuffer,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, ReferenceBackend>>,
        angles: &HostBuffer,
        kv: &mut HostKvCache,
        layer: usize,
    ) {
        let block_tokens = kv.block_tokens;
        let cache = &mut kv.layers[layer];
        for (sequence, t) in self.step.sequence_rows() {
            let slot = self.step.slot(sequence, self.step.positions[t] as usize, block_tokens);
            for (h, head) in qkv.row_mut(t).chunks_exact_mut(shape.head_dim).enumerate() {
                let is_query = h < shape.heads;
                let is_value = h >= shape.heads + shape.kv_heads;
                if is_value {
                    store(&mut cache.values, h - shape.heads - shape.kv_heads, slot, head);
                    continue;
                }
                if let Some(norm) = &norm {
                    rms_norm(head, if is_query { norm.q } else { norm.k }, norm.eps);
                }
                rotate(head, angles.row(t), shape.rope);
                if !is_query {
                    store(&mut cache.keys, h - shape.heads, slot, head);
                }
            }
        }
    }

    fn latent_store_kv(
        &mut self,
        q: &HostBuffer,
        kv: &HostBuffer,
        shape: &LatentShape,
        norm: &Vec<f32>,
        eps: f32,
        angles: &HostBuffer,
        cache: &mut HostKvCache,
        layer: usize,
        queries: &mut HostBuffer,
    ) {
        let LatentShape { heads, nope_dim, rope_dim, rank, rope } = *shape;
        let block_tokens = cache.block_tokens;
        queries.output(q.rows(), heads * shape.key_dim());
        for (sequence, t) in self.step.sequence_rows() {
            let mut key = kv.row(t)[kv.width() - shape.key_dim()..].to_vec();
            rms_norm(&mut key[..rank], norm, eps);
            rotate(&mut key[rank..], angles.row(t), rope);
            let slot = self.step.slot(sequence, self.step.positions[t] as usize, block_tokens);
            store(&mut cache.layers[layer].keys, 0, slot, &key);
            let of_heads = q.row(t).chunks_exact(nope_dim + rope_dim);
            for (query, head) in queries.row_mut(t).chunks_exact_mut(shape.key_dim()).zip(of_heads) {
                query[rank..].copy_from_slice(&head[nope_dim..]);
                rotate(&mut query[rank..], angles.row(t), rope);
            }
        }
    }

    fn attention(
        &mut self,
        qkv: &HostBuffer,
        shape: &AttentionShape,
        sinks: Option<&Vec<f32>>,
        kv: &HostKvCache,
        layer: usize,
        out: &mut HostBuffer,
    ) {
        let cache = &kv.layers[layer];
        let value_dim = shape.value_dim();
        out.output(self.step.rows(), shape.heads * value_dim);
        for (sequence, t) in self.step.sequence_rows() {
            let visible = visible(self.step.positions[t] as usize, shape.window);
            let slots: Vec<usize> = visible.map(|p| self.step.slot(sequence, p, kv.block_tokens)).collect();
            let queries = qkv.row(t).chunks_exact(shape.head_dim);
            let outputs = out.row_mut(t).chunks_exact_mut(value_dim);
            for (head, (query, output)) in queries.zip(outputs).enumerate() {
                let kv_head = head / (shape.heads / shape.kv_heads);
                let score = |&slot: &usize| dot(query, &load(&cache.keys, kv_head, slot)) * f64::from(shape.scale);
                let scores: Vec<f64> = slots.iter().map(score).collect();
                let sink = sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
                let largest = scores.iter().copied().fold(sink, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total = weights.iter().sum::<f64>() + (sink - largest).exp();
                let mut sums = vec![0.0; value_dim];
                for (&slot, weight) in slots.iter().zip(weights) {
                    let values = match shape.values {
                        Values::Cached => load(&cache.values, kv_head, slot),
                        Values::OfKeys(dim) => load(&cache.keys, kv_head, slot)[..dim].to_vec(),
                    };
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum += weight / total * f64::from(value);
                    }
                }
                for (y, sum) in output.iter_mut().zip(sums) {
                    *y = sum as f32;
                }
            }
        }
    }

    fn select_logit_rows(&mut self, x: &HostBuffer, out: &mut HostBuffer) {
        out.output(self.step.logit_rows.len(), x.width());
        for (l, &row) in self.step.logit_rows.iter().enumerate() {
            out.row_mut(l).copy_from_slice(x.row(row as usize));
        }
    }

    fn sample(&mut self, logits: &mut HostBuffer, rows: &[SampleRow<'_>]) -> SamplingId {
        assert_eq!(rows.len(), logits.rows(), "one choice per row of logits");
        let (id, before, tokens) = self.samplings.begin(rows.len());
        for (l, (row, token)) in rows.iter().zip(tokens).enumerate() {
            *token = sample::sample(row, logits.row_mut(l), token_of(before, row.last_sampled));
        }
        id
    }

    fn sampled(&mut self, sampling: SamplingId, tokens: &mut [u32]) -> Result<(), KernelError> {
        self.samplings.read(sampling, tokens)
    }

    fn copy_kv_blocks(&mut self, kv: &mut HostKvCache, pairs: &[(u32, u32)]) {
        kv.copy_blocks(pairs);
    }

    fn read_kv_blocks(&mut self, kv: &HostKvCache, blocks: &[u32], out: &mut [u8]) -> Result<(), KernelError> {
        kv.read_blocks(blocks, out);
        Ok(())
    }

    fn write_kv_blocks(&mut self, kv: &mut HostKvCache, blocks: &[u32], bytes: &[u8]) -> Result<(), KernelError> {
        kv.write_blocks(blocks, bytes);
        Ok(())
    }

    fn read_routes(&mut self, routes: &mut ReferenceRoutes, out: &mut HostRoutes) -> Result<(), KernelError> {
        out.clone_from(&routes.routes);
        out.one_tile_each(routes.dispatch.offsets.len() - 1);
        Ok(())
    }

    fn start(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    fn submit(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    fn read(&mut self, buffer: &HostBuffer, out: &mut [f32]) -> Result<(), KernelError> {
        buffer.read(out)
    }

    fn write(&mut self, buffer: &mut HostBuffer, rows: usize, values: &[f32]) -> Result<(), KernelError> {
        buffer.upload(rows, values)
    }
}

/// The rows that a linear multiplies.
fn rows(x: Input<'_, ReferenceBackend>) -> Cow<'_, HostBuffer> {
    match x {
        Input::Rows(x) => Cow::Borrowed(x),
        Input::Normed { x, weight, eps } => {
            let mut normed = x.first_columns(weight.len());
            normed.values_mut().chunks_exact_mut(weight.len()).for_each(|row| rms_norm(row, weight, eps));
            Cow::Owned(normed)
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// `x / sqrt(mean(x²) + eps) · weight`, summed in f64: what [`Encoder::rms_norm`] gives of a row but for rounding.
///
/// # Panics
/// If there is not a weight for each value.
pub fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(x.len(), weight.len());
    let mean_square = dot(x, x) / x.len() as f64;
    let scale = 1.0 / (mean_square + f64::from(eps)).sqrt();
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = (f64::from(*x) * scale * f64::from(weight)) as f32;
    }
}

/// Rotates the first dimensions of a head, as many as there are angles.
fn rotate(head: &mut [f32], angles: &[f32], layout: RopeLayout) {
    let half = angles.len() / 2;
    let (cos, sin) = angles.split_at(half);
    for i in 0..half {
        let (first, second) = match layout {
            RopeLayout::HalfSplit => (i, i + half),
            RopeLayout::Interleaved => (2 * i, 2 * i + 1),
        };
        let (a, b) = (f64::from(head[first]), f64::from(head[second]));
        let (cos, sin) = (f64::from(cos[i]), f64::from(sin[i]));
        head[first] = (a * cos - b * sin) as f32;
        head[second] = (b * cos + a * sin) as f32;
    }
}

fn gated(activation: Activation, gate: f64, up: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Silu => gate * sigmoid(gate) * up,
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate * gate * gate);
            0.5 * gate * (1.0 + inner.tanh()) * up
        }
        Activation::ClampedSwiglu => {
            let limit = f64::from(Activation::SWIGLU_LIMIT);
            // NaN stays NaN, unlike under `f64::min`.
            let gate = if gate > limit { limit } else { gate };
            gate * sigmoid(f64::from(Activation::SWIGLU_ALPHA) * gate) * (up.clamp(-limit, limit) + 1.0)
        }
    }
}

fn store(plane: &mut KvPlane, head: usize, slot: usize, values: &[f32]) {
    let (row, range) = (plane.row(head, slot), plane.range(head, slot));
    match &mut plane.data {
        KvData::F32(data) => data[range].copy_from_slice(values),
        KvData::F16(data) => {
            for (stored, &value) in data[range].iter_mut().zip(values) {
                *stored = f16::from_f32(value);
            }
        }
        KvData::Codes(codes) => codes.store(row, values),
    }
}

fn load(plane: &KvPlane, head: usize, slot: usize) -> Vec<f32> {
    let range = plane.range(head, slot);
    match &plane.data {
        KvData::F32(data) => data[range].to_vec(),
        KvData::F16(data) => data[range].iter().map(|value| value.to_f32()).collect(),
        KvData::Codes(codes) => {
            let mut values = vec![0.0; plane.dim];
            codes.load(plane.row(head, slot), &mut values);
            values
        }
    }
}
