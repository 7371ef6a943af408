//! An encoder that reads what linears are given before it runs them.

use marlin_kernels::{
    Activation, AttentionShape, Backend, Encoder, Hadamard, HostRoutes, Input, KernelError, LatentShape, QkNorm,
    Routing, SampleRow, SamplingId, Step,
};

use super::Watch;
use super::backend::{KnownRoutes, KnownVector, NamedGroup, NamedLinear, Observed, Rows};

/// Runs the operations of `B`.
pub(crate) struct ObservedEncoder<B: Backend> {
    inner: B::Encoder,
    watch: Watch,
    /// Tokens of the step.
    tokens: usize,
    /// Watched linears whose inputs the step has yet to come to; 0 in steps that go on behind them.
    awaited: usize,
    /// They were all there: the rest of the step is of no account to anyone.
    is_over: bool,
    /// The module of the heads whose queries are about to meet latent vectors.
    latent: String,
    /// A failure to read, told when the step ends.
    failure: Option<KernelError>,
    /// What was read.
    rows: Vec<f32>,
}

type Buffer<B> = Rows<<B as Backend>::Buffer>;
type Linear<B> = NamedLinear<<B as Backend>::Linear>;
type Group<B> = NamedGroup<<B as Backend>::LinearGroup>;
type Vector<B> = KnownVector<<B as Backend>::Vector>;
type Routes<B> = KnownRoutes<<B as Backend>::Routes>;

impl<B: Backend> ObservedEncoder<B> {
    pub(super) fn new(inner: B::Encoder, watch: Watch) -> Self {
        Self {
            inner,
            watch,
            tokens: 0,
            awaited: 0,
            is_over: false,
            latent: String::new(),
            failure: None,
            rows: Vec::new(),
        }
    }

    /// Tells the watch the inputs of a linear.
    fn observe(&mut self, name: &str, cols: usize, x: &Input<'_, Observed<B>>) {
        if !self.is_over && self.watch.watches(name) && self.read_input(cols, x) {
            self.watch.add(name, &self.rows, &[]);
            self.came(1);
        }
    }

    /// Counts linears whose inputs were seen.
    fn came(&mut self, linears: usize) {
        if self.awaited > 0 {
            self.awaited -= linears;
            self.is_over = self.awaited == 0;
        }
    }

    /// The watched ones of a group.
    fn watched(&self, names: &[String]) -> usize {
        if self.is_over { 0 } else { names.iter().filter(|name| self.watch.watches(name)).count() }
    }

    /// Reads the first `cols` values of each token's row, normalised if they are to be; false if that failed.
    fn read_input(&mut self, cols: usize, x: &Input<'_, Observed<B>>) -> bool {
        let x_rows = match x {
            Input::Rows(x) | Input::Normed { x, .. } => x,
        };
        if !self.read_rows(x_rows, self.tokens) {
            return false;
        }
        keep_columns(&mut self.rows, x_rows.width, 0, cols);
        if let Input::Normed { weight, eps, .. } = x {
            self.rows.chunks_exact_mut(cols).for_each(|row| normalize(row, &weight.values, *eps));
        }
        true
    }

    /// Reads the rows of a buffer, of which there are `rows`; false if that failed.
    fn read_rows(&mut self, x: &Buffer<B>, rows: usize) -> bool {
        self.rows.resize(rows * x.width, 0.0);
        let result = self.inner.read(&x.inner, &mut self.rows);
        self.keep_failure(result)
    }

    fn keep_failure(&mut self, result: Result<(), KernelError>) -> bool {
        let is_fine = result.is_ok();
        if let (Err(failure), None) = (result, &self.failure) {
            self.failure = Some(failure);
        }
        is_fine
    }

    fn read_host_routes(&mut self, routes: &mut Routes<B>) -> bool {
        let KnownRoutes { inner, host, .. } = routes;
        let result = self.inner.read_routes(inner, host);
        self.keep_failure(result)
    }

    fn end(&mut self, result: Result<(), KernelError>) -> Result<(), KernelError> {
        self.failure.take().map_or(result, Err)
    }
}

fn inner<'a, B: Backend>(x: &Input<'a, Observed<B>>) -> Input<'a, B> {
    match *x {
        Input::Rows(x) => Input::Rows(&x.inner),
        Input::Normed { x, weight, eps } => Input::Normed { x: &x.inner, weight: &weight.inner, eps },
    }
}

/// Keeps `cols` values of each row from `first` on.
fn keep_columns(rows: &mut Vec<f32>, width: usize, first: usize, cols: usize) {
    if cols == width {
        return;
    }
    let count = rows.len() / width;
    for row in 0..count {
        rows.copy_within(row * width + first..row * width + first + cols, row * cols);
    }
    rows.truncate(count * cols);
}

/// The RMS norm of a row.
fn normalize(row: &mut [f32], weight: &[f32], eps: f32) {
    let square: f32 = row.iter().map(|value| value * value).sum();
    let factor = 1.0 / (square / row.len() as f32 + eps).sqrt();
    row.iter_mut().zip(weight).for_each(|(value, weight)| *value *= factor * weight);
}

/// The tokens of each expert with their weights, shared experts behind the routed ones.
fn rows_by_expert(routing: &Routing, tokens: usize, routes: &HostRoutes) -> Vec<Vec<(usize, f32)>> {
    let mut rows = vec![Vec::new(); routing.all_experts()];
    let slots = routing.slots();
    for token in 0..tokens {
        for slot in token * slots..(token + 1) * slots {
            rows[routes.experts[slot] as usize].push((token, routes.weights[slot]));
        }
    }
    rows
}

impl<B: Backend> Encoder<Observed<B>> for ObservedEncoder<B> {
    fn begin(&mut self, step: &Step<'_>) {
        self.tokens = step.tokens.len();
        self.awaited = self.watch.awaited();
        self.is_over = false;
        self.inner.begin(step);
    }

    fn embed(&mut self, table: &Linear<B>, scale: f32, out: &mut Buffer<B>) {
        if !self.is_over {
            self.inner.embed(&table.inner, scale, &mut out.inner);
        }
    }

    fn rope_angles(&mut self, inv_freq: &Vector<B>, scaling: f32, out: &mut Buffer<B>) {
        if !self.is_over {
            self.inner.rope_angles(&inv_freq.inner, scaling, &mut out.inner);
        }
    }

    fn rms_norm(&mut self, x: &Buffer<B>, weight: &Vector<B>, eps: f32, out: &mut Buffer<B>) {
        if !self.is_over {
            self.inner.rms_norm(&x.inner, &weight.inner, eps, &mut out.inner);
        }
    }

    fn rms_norm_add(&mut self, x: &Buffer<B>, weight: &Vector<B>, eps: f32, out: &mut Buffer<B>) {
        if !self.is_over {
            self.inner.rms_norm_add(&x.inner, &weight.inner, eps, &mut out.inner);
        }
    }

    fn layer_norm(
        &mut self,
        x: &Buffer<B>,
        weight: &Vector<B>,
        bias: Option<&Vector<B>>,
        eps: f32,
        out: &mut Buffer<B>,
    ) {
        if !self.is_over {
            self.inner.layer_norm(&x.inner, &weight.inner, bias.map(|bias| &bias.inner), eps, &mut out.inner);
        }
    }

    fn hadamard(&mut self, x: &mut Buffer<B>, rotation: &Hadamard) {
        if !self.is_over {
            self.inner.hadamard(&mut x.inner, rotation);
        }
    }

    fn soft_cap(&mut self, x: &mut Buffer<B>, cap: f32) {
        if !self.is_over {
            self.inner.soft_cap(&mut x.inner, cap);
        }
    }

    fn linear(&mut self, x: Input<'_, Observed<B>>, linear: &Linear<B>, out: &mut Buffer<B>) {
        self.observe(&linear.name, linear.cols, &x);
        if !self.is_over {
            self.inner.linear(inner(&x), &linear.inner, &mut out.inner);
        }
    }

    fn linear_add(&mut self, x: &Buffer<B>, linear: &Linear<B>, out: &mut Buffer<B>) {
        self.observe(&linear.name, linear.cols, &Input::Rows(x));
        if !self.is_over {
            self.inner.linear_add(&x.inner, &linear.inner, &mut out.inner);
        }
    }

    fn linear_gated(
        &mut self,
        x: Input<'_, Observed<B>>,
        gate_up: &Linear<B>,
        activation: Activation,
        out: &mut Buffer<B>,
    ) {
        self.observe(&gate_up.name, gate_up.cols, &x);
        if !self.is_over {
            self.inner.linear_gated(inner(&x), &gate_up.inner, activation, &mut out.inner);
        }
    }

    fn route(&mut self, x: Input<'_, Observed<B>>, router: &B::Router, routes: &mut Routes<B>) {
        if !self.is_over {
            self.inner.route(inner(&x), router, &mut routes.inner);
        }
    }

    fn expert_gated(
        &mut self,
        x: Input<'_, Observed<B>>,
        routes: &mut Routes<B>,
        gate_up: &Group<B>,
        activation: Activation,
        out: &mut Buffer<B>,
    ) {
        let cols = gate_up.cols;
        let watched = self.watched(&gate_up.names);
        if watched > 0 && self.read_host_routes(routes) && self.read_input(cols, &x) {
            let by_expert = rows_by_expert(&routes.routing, self.tokens, &routes.host);
            for (name, routes) in gate_up.names.iter().zip(by_expert) {
                let row = |&(token, _): &(usize, f32)| &self.rows[token * cols..][..cols];
                let inputs: Vec<f32> = routes.iter().flat_map(row).copied().collect();
                self.watch.add(name, &inputs, &routes);
            }
            self.came(watched);
        }
        if !self.is_over {
            self.inner.expert_gated(inner(&x), &mut routes.inner, &gate_up.inner, activation, &mut out.inner);
        }
    }

    fn expert_combine(&mut self, x: &Buffer<B>, routes: &mut Routes<B>, down: &Group<B>, out: &mut Buffer<B>) {
        let cols = down.cols;
        let watched = self.watched(&down.names);
        if watched > 0 && self.read_host_routes(routes) && self.read_rows(x, self.tokens * routes.routing.slots()) {
            keep_columns(&mut self.rows, x.width, 0, cols);
            let by_expert = rows_by_expert(&routes.routing, self.tokens, &routes.host);
            let mut rest = self.rows.as_slice();
            for (name, routes) in down.names.iter().zip(by_expert) {
                let (inputs, after) = rest.split_at(routes.len() * cols);
                self.watch.add(name, inputs, &routes);
                rest = after;
            }
            self.came(watched);
        }
        if !self.is_over {
            self.inner.expert_combine(&x.inner, &mut routes.inner, &down.inner, &mut out.inner);
        }
    }

    fn head_linear(&mut self, x: &Buffer<B>, heads: &Group<B>, out: &mut Buffer<B>) {
        // A module and its heads: see `SharedInput::name`.
        if let Some(module) = heads.names.first().and_then(|name| name.strip_suffix(".0.keys")) {
            module.clone_into(&mut self.latent);
        }
        if !self.is_over {
            self.inner.head_linear(&x.inner, &heads.inner, &mut out.inner);
        }
    }

    fn rope_store_kv(
        &mut self,
        qkv: &mut Buffer<B>,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, Observed<B>>>,
        angles: &Buffer<B>,
        kv: &mut B::KvCache,
        layer: usize,
    ) {
        let norm = norm.map(|QkNorm { q, k, eps }| QkNorm { q: &q.inner, k: &k.inner, eps });
        if !self.is_over {
            self.inner.rope_store_kv(&mut qkv.inner, shape, norm, &angles.inner, kv, layer);
        }
    }

    fn latent_store_kv(
        &mut self,
        q: &Buffer<B>,
        kv: &Buffer<B>,
        shape: &LatentShape,
        norm: &Vector<B>,
        eps: f32,
        angles: &Buffer<B>,
        cache: &mut B::KvCache,
        layer: usize,
        queries: &mut Buffer<B>,
    ) {
        if !self.is_over && self.watch.watches(&self.latent) && self.read_rows(kv, self.tokens) {
            keep_columns(&mut self.rows, kv.width, kv.width - shape.key_dim(), shape.rank);
            self.rows.chunks_exact_mut(shape.rank).for_each(|row| normalize(row, &norm.values, eps));
            self.watch.add(&self.latent, &self.rows, &[]);
            self.came(1);
        }
        if !self.is_over {
            self.inner.latent_store_kv(
                &q.inner,
                &kv.inner,
                shape,
                &norm.inner,
                eps,
                &angles.inner,
                cache,
                layer,
                &mut queries.inner,
            );
        }
    }

    fn attention(
        &mut self,
        qkv: &Buffer<B>,
        shape: &AttentionShape,
        sinks: Option<&Vector<B>>,
        kv: &B::KvCache,
        layer: usize,
        out: &mut Buffer<B>,
    ) {
        let sinks = sinks.map(|sinks| &sinks.inner);
        if !self.is_over {
            self.inner.attention(&qkv.inner, shape, sinks, kv, layer, &mut out.inner);
        }
    }

    fn rope_attention(
        &mut self,
        qkv: &mut Buffer<B>,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, Observed<B>>>,
        angles: &Buffer<B>,
        sinks: Option<&Vector<B>>,
        kv: &mut B::KvCache,
        layer: usize,
        out: &mut Buffer<B>,
    ) {
        let norm = norm.map(|QkNorm { q, k, eps }| QkNorm { q: &q.inner, k: &k.inner, eps });
        let sinks = sinks.map(|sinks| &sinks.inner);
        let angles = &angles.inner;
        if !self.is_over {
            self.inner.rope_attention(&mut qkv.inner, shape, norm, angles, sinks, kv, layer, &mut out.inner);
        }
    }

    fn select_logit_rows(&mut self, x: &Buffer<B>, out: &mut Buffer<B>) {
        if !self.is_over {
            self.inner.select_logit_rows(&x.inner, &mut out.inner);
        }
    }

    fn sample(&mut self, logits: &mut Buffer<B>, rows: &[SampleRow<'_>]) -> SamplingId {
        self.inner.sample(&mut logits.inner, rows)
    }

    fn sampled(&mut self, sampling: SamplingId, tokens: &mut [u32]) -> Result<(), KernelError> {
        self.inner.sampled(sampling, tokens)
    }

    fn copy_kv_blocks(&mut self, kv: &mut B::KvCache, pairs: &[(u32, u32)]) {
        if !self.is_over {
            self.inner.copy_kv_blocks(kv, pairs);
        }
    }

    fn read_kv_blocks(&mut self, kv: &B::KvCache, blocks: &[u32], out: &mut [u8]) -> Result<(), KernelError> {
        self.inner.read_kv_blocks(kv, blocks, out)
    }

    fn write_kv_blocks(&mut self, kv: &mut B::KvCache, blocks: &[u32], bytes: &[u8]) -> Result<(), KernelError> {
        self.inner.write_kv_blocks(kv, blocks, bytes)
    }

    fn read_routes(&mut self, routes: &mut Routes<B>, out: &mut HostRoutes) -> Result<(), KernelError> {
        self.inner.read_routes(&mut routes.inner, out)
    }

    fn start(&mut self) -> Result<(), KernelError> {
        let result = self.inner.start();
        self.end(result)
    }

    fn submit(&mut self) -> Result<(), KernelError> {
        let result = self.inner.submit();
        self.end(result)
    }

    fn read(&mut self, buffer: &Buffer<B>, out: &mut [f32]) -> Result<(), KernelError> {
        let result = self.inner.read(&buffer.inner, out);
        self.end(result)
    }

    fn write(&mut self, buffer: &mut Buffer<B>, rows: usize, values: &[f32]) -> Result<(), KernelError> {
        self.inner.write(&mut buffer.inner, rows, values)
    }
}
