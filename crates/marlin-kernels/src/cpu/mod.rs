//! Processors: SIMD chosen at run time, weights in tile order, a thread for each performance core.
//!
//! Results are bitwise the same for any number of threads, and a row's results are the same whatever else is in the step.
//! They differ between SIMD levels (some fuse multiplication and addition) and arithmetics.
//!
//! An operation is a method of [`CpuEncoder`] that hands rows to threads; its inner loop is generic over `simd::Simd` and
//! compiled for each level.

mod attention;
mod cores;
mod disjoint;
mod experts;
mod hadamard;
mod kv;
mod layers;
mod linear;
mod peak;
mod rows;
mod simd;
mod threads;
mod tile_file;
mod vector;

use std::sync::{Arc, Mutex};

use marlin_format::Scheme;

pub use cores::default_threads;
pub use experts::{CpuRouter, CpuRoutes};
pub use layers::{Assigned, CpuLayers};
pub use linear::Arithmetic;
pub use simd::SimdLevel;
pub use threads::Threads;
pub use tile_file::{TileFile, TileFileOptions};

use self::attention::Attention;
use self::disjoint::Disjoint;
use self::linear::{Activations, Epilogue, LinearGroup, TiledLinear};
use crate::host::HostStep;
use crate::sampling::host::{HostSamplings, token_of};
use crate::{
    Activation, AttentionShape, Backend, DeviceInfo, Encoder, Hadamard, HostBuffer, HostKvCache, HostRoutes, Input,
    KernelError, KvLayout, KvType, LatentShape, LinearPart, MemoryUse, PartHeader, QkNorm, RouterWeights, Routing,
    SampleRow, SamplingId, Step, StepLimits,
};

const NAME: &str = "cpu";

/// How to use the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuOptions {
    /// Threads to run on; [`default_threads`] if `None`.
    pub threads: Option<usize>,
    /// How linears multiply.
    pub arithmetic: Arithmetic,
    /// Instructions to use; the best there are if `None`.
    pub simd: Option<SimdLevel>,
}

/// A processor. Clones share its threads.
#[derive(Debug, Clone)]
pub struct CpuBackend {
    threads: Threads,
    arithmetic: Arithmetic,
    simd: SimdLevel,
    tiles: Option<Arc<TileFile>>,
}

/// Matrices in tile order.
#[derive(Debug)]
pub struct CpuLinear(TiledLinear);

/// Linears of equal shape.
#[derive(Debug)]
pub struct CpuLinearGroup(LinearGroup);

/// Runs operations as they are called.
#[derive(Debug)]
pub struct CpuEncoder {
    threads: Threads,
    simd: SimdLevel,
    step: HostStep,
    activations: Activations,
    /// The norms of a linear's input, `[tokens, width]`.
    normed: Vec<f32>,
    /// A key of latent attention; grows to the widest met.
    key: Vec<f32>,
    attention: Attention,
    /// Token ids to sort, `[threads, vocabulary]`.
    token_ids: Vec<Mutex<Vec<u32>>>,
    samplings: HostSamplings,
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// If the processor lacks the instructions asked for, or as many threads cannot be started.
    pub fn new(options: CpuOptions) -> Result<Self, KernelError> {
        let simd = options.simd.unwrap_or_else(SimdLevel::detect);
        if !SimdLevel::available().contains(&simd) {
            let available: Vec<String> = SimdLevel::available().iter().map(ToString::to_string).collect();
            let available = available.join(", ");
            return Err(KernelError::Device(format!("this processor has no {simd} instructions; it has {available}")));
        }
        let threads = Threads::new(options.threads.unwrap_or_else(default_threads))?;
        Ok(Self { threads, arithmetic: options.arithmetic, simd, tiles: None })
    }

    /// The threads that its operations run on.
    pub fn threads(&self) -> &Threads {
        &self.threads
    }

    /// The same processor, for loading one model whose linears are kept in a file, or come from it.
    pub fn with_tiles(&self, file: Arc<TileFile>) -> Self {
        Self { tiles: Some(file), ..self.clone() }
    }

    /// A fingerprint of the order that linears are put into: those that were put into it by a backend of the same layout are what this one
    /// would make of them, to the bit.
    ///
    /// # Errors
    /// There is no memory for a few small matrices.
    pub fn tile_layout(&self) -> Result<String, KernelError> {
        linear::layout(self.arithmetic, self.simd)
    }

    /// What its results depend on beside the model: two processors, or two uses of one, of which it is the same give the same bits. The number
    /// of threads is not in it.
    pub fn numerics(&self) -> String {
        format!("cpu {} {} {:?}", std::env::consts::ARCH, self.simd, self.arithmetic)
    }

    /// What its linears multiply.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// Takes a linear back out of tile order: its parts as [`Backend::load_linear`] was given them, to the bit. Two things may differ, and neither
    /// in what it means. Bits at the end of a row that no code uses come back as 0. A part that no kernel reads as it was comes back in what
    /// was made of it, f32: of a scheme that [`MemoryUse::conversion`] names, with NaN codes of E4M3, with groups of an index that are not of
    /// their usual size, or with columns in another order than an earlier part has.
    ///
    /// # Errors
    /// There is no memory for the matrices. Or tiles hold none: those of a damaged file, or of a scale of a whole matrix so large that kernels
    /// multiply by infinity.
    pub fn unpack_linear(&self, linear: &CpuLinear) -> Result<Vec<LinearPart<'static>>, KernelError> {
        linear.0.restore(&self.threads)
    }

    /// [`CpuBackend::unpack_linear`] of each linear of a group, one after the other: no more than one need be held.
    pub fn unpack_group(
        &self,
        group: &CpuLinearGroup,
    ) -> impl ExactSizeIterator<Item = Result<Vec<LinearPart<'static>>, KernelError>> {
        group.0.linears().iter().map(|linear| linear.restore(&self.threads))
    }

    /// Multiply-adds a second that its threads reach together in its arithmetic with nothing to load or to store: what bounds
    /// linears of many rows. Measured anew by each call, for 20 ms or a little longer.
    pub fn multiply_adds_per_second(&self) -> f64 {
        peak::multiply_adds_per_second(self.arithmetic, self.simd, &self.threads)
    }
}

impl CpuLinear {
    /// Output features of each part.
    pub fn part_rows(&self) -> &[usize] {
        self.0.part_rows()
    }

    /// Input features, K.
    pub fn cols(&self) -> usize {
        self.0.cols()
    }

    /// Bytes it takes in memory.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl CpuLinearGroup {
    /// Number of linears.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Output features of each part of one.
    pub fn part_rows(&self) -> &[usize] {
        self.0.part_rows()
    }

    /// Input features of each, K.
    pub fn cols(&self) -> usize {
        self.0.cols()
    }

    /// Bytes they take in memory.
    pub fn bytes(&self) -> usize {
        self.0.linears().iter().map(TiledLinear::bytes).sum()
    }
}

impl MemoryUse for CpuBackend {
    fn linear_bytes(&self, scheme: &Scheme, rows: usize, cols: usize) -> Result<usize, KernelError> {
        linear::bytes(scheme, rows, cols, self.arithmetic, self.simd)
    }

    fn conversion(&self, scheme: &Scheme, cols: usize) -> Option<Scheme> {
        linear::conversion(scheme, cols)
    }

    fn routes_bytes(&self, routing: &Routing, tokens: usize, width: usize) -> usize {
        CpuRoutes::bytes(routing, tokens, width, &self.threads)
    }

    fn encoder_bytes(&self, limits: &StepLimits) -> usize {
        let sampling = self.threads.count().saturating_mul(limits.vocabulary).saturating_mul(size_of::<u32>());
        let normed = limits.tokens.saturating_mul(limits.width).saturating_mul(size_of::<f32>());
        Activations::bytes(limits.tokens, limits.width).saturating_add(normed).saturating_add(sampling)
    }
}

impl Backend for CpuBackend {
    type Buffer = HostBuffer;
    type Linear = CpuLinear;
    type LinearGroup = CpuLinearGroup;
    type Router = CpuRouter;
    type Routes = CpuRoutes;
    type Vector = Vec<f32>;
    type KvCache = HostKvCache;
    type Encoder = CpuEncoder;

    const OVERLAPS: bool = false;

    fn info(&self) -> DeviceInfo {
        let arithmetic = match self.arithmetic {
            Arithmetic::Exact => "f32 activations",
            Arithmetic::Int8 => "int8 activations",
        };
        let threads = self.threads.count();
        let plural = if threads == 1 { "" } else { "s" };
        DeviceInfo { name: NAME.into(), detail: format!("{}, {threads} thread{plural}, {arithmetic}", self.simd) }
    }

    fn load_linear(&self, parts: &[LinearPart<'_>]) -> Result<CpuLinear, KernelError> {
        TiledLinear::load(parts, self.arithmetic, self.simd, &self.threads).map(CpuLinear)
    }

    fn load_named_linear(&self, name: &str, parts: &[LinearPart<'_>]) -> Result<CpuLinear, KernelError> {
        let Some(file) = &self.tiles else { return self.load_linear(parts) };
        TiledLinear::load_kept(file, name, parts, self.arithmetic, self.simd, &self.threads).map(CpuLinear)
    }

    fn find_linear(&self, name: &str, parts: &[PartHeader]) -> Option<CpuLinear> {
        TiledLinear::find(self.tiles.as_ref()?, name, parts, self.arithmetic, self.simd).map(CpuLinear)
    }

    fn group_linears(&self, linears: Vec<CpuLinear>) -> Result<CpuLinearGroup, KernelError> {
        LinearGroup::new(linears.into_iter().map(|linear| linear.0).collect()).map(CpuLinearGroup)
    }

    fn load_router(&self, weights: &RouterWeights<'_>) -> Result<CpuRouter, KernelError> {
        CpuRouter::new(weights)
    }

    fn routes(&self, routing: &Routing, tokens: usize, width: usize) -> Result<CpuRoutes, KernelError> {
        CpuRoutes::new(routing, tokens, width, &self.threads)
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

    fn encoder(&self, limits: &StepLimits) -> Result<CpuEncoder, KernelError> {
        let ids = || crate::host::allocate("sampling", &[limits.vocabulary], NAME).map(Mutex::new);
        Ok(CpuEncoder {
            threads: self.threads.clone(),
            simd: self.simd,
            step: HostStep::default(),
            activations: Activations::new(limits.tokens, limits.width)?,
            normed: crate::host::allocate("the norms of a linear's input", &[limits.tokens, limits.width], NAME)?,
            key: Vec::new(),
            attention: Attention::new(&self.threads),
            token_ids: (0..self.threads.count()).map(|_| ids()).collect::<Result<_, _>>()?,
            samplings: HostSamplings::default(),
        })
    }
}

impl CpuEncoder {
    fn apply(
        &mut self,
        x: Input<'_, CpuBackend>,
        linear: &CpuLinear,
        width: usize,
        out: &mut HostBuffer,
        epilogue: Epilogue<'_>,
    ) {
        let (values, rows) = input(x, linear.0.cols(), &mut self.normed, self.simd, &self.threads);
        let out = out.output(rows, width);
        linear.0.apply(values, rows, out, epilogue, &mut self.activations, &self.threads);
    }
}

/// The input of linears of so many columns, and its rows. Norms are written to `normed`.
fn input<'a>(
    x: Input<'a, CpuBackend>,
    cols: usize,
    normed: &'a mut [f32],
    simd: SimdLevel,
    threads: &Threads,
) -> (&'a [f32], usize) {
    match x {
        Input::Rows(x) => {
            assert_eq!(x.width(), cols, "an input as wide as the linear's columns");
            (x.values(), x.rows())
        }
        Input::Normed { x, weight, eps } => {
            assert_eq!(weight.len(), cols, "a norm as wide as the linear's columns");
            let normed = &mut normed[..x.rows() * cols];
            rows::rms_norm(x.values(), x.width(), weight, eps, normed, simd, threads);
            (normed, x.rows())
        }
    }
}

impl Encoder<CpuBackend> for CpuEncoder {
    fn begin(&mut self, step: &Step<'_>) {
        self.step.begin(step, self.samplings.last());
        self.attention.begin(&self.step);
    }

    fn embed(&mut self, table: &CpuLinear, scale: f32, out: &mut HostBuffer) {
        let width = table.0.cols();
        let out = out.output(self.step.rows(), width);
        let tokens = &self.step.tokens;
        self.threads.for_each_chunk(out, width, |row, out| {
            table.0.decode_row(tokens[row] as usize, out);
            out.iter_mut().for_each(|value| *value *= scale);
        });
    }

    fn rope_angles(&mut self, inv_freq: &Vec<f32>, scaling: f32, out: &mut HostBuffer) {
        let width = 2 * inv_freq.len();
        let out = out.output(self.step.rows(), width);
        rows::rope_angles(&self.step.positions, inv_freq, scaling, out, &self.threads);
    }

    fn rms_norm(&mut self, x: &HostBuffer, weight: &Vec<f32>, eps: f32, out: &mut HostBuffer) {
        let width = x.width();
        assert_eq!(weight.len(), width, "a norm weight for each value of a row");
        let out = out.output(x.rows(), width);
        rows::rms_norm(x.values(), x.width(), weight, eps, out, self.simd, &self.threads);
    }

    fn rms_norm_add(&mut self, x: &HostBuffer, weight: &Vec<f32>, eps: f32, out: &mut HostBuffer) {
        let width = x.width();
        assert_eq!(weight.len(), width, "a norm weight for each value of a row");
        assert_eq!(out.rows(), x.rows(), "the residual stream has a row for each input row");
        let out = out.output(x.rows(), width);
        rows::rms_norm_add(x.values(), weight, eps, out, self.simd, &self.threads);
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
        let out = out.output(x.rows(), width);
        rows::layer_norm(x.values(), weight, bias.map(Vec::as_slice), eps, out, &self.threads);
    }

    fn hadamard(&mut self, x: &mut HostBuffer, rotation: &Hadamard) {
        rotation.check(x.width());
        hadamard::rotate(x.values_mut(), rotation, self.simd, &self.threads);
    }

    fn soft_cap(&mut self, x: &mut HostBuffer, cap: f32) {
        rows::soft_cap(x, cap, &self.threads);
    }

    fn linear(&mut self, x: Input<'_, CpuBackend>, linear: &CpuLinear, out: &mut HostBuffer) {
        self.apply(x, linear, linear.0.rows(), out, Epilogue::Store);
    }

    fn linear_add(&mut self, x: &HostBuffer, linear: &CpuLinear, out: &mut HostBuffer) {
        assert_eq!(out.rows(), x.rows(), "the residual stream has a row for each input row");
        self.apply(Input::Rows(x), linear, linear.0.rows(), out, Epilogue::Add);
    }

    fn linear_gated(
        &mut self,
        x: Input<'_, CpuBackend>,
        gate_up: &CpuLinear,
        activation: Activation,
        out: &mut HostBuffer,
    ) {
        self.apply(x, gate_up, gate_up.0.part_rows()[0], out, Epilogue::Gated(activation));
    }

    fn route(&mut self, x: Input<'_, CpuBackend>, router: &CpuRouter, routes: &mut CpuRoutes) {
        let (values, rows) = input(x, router.hidden(), &mut self.normed, self.simd, &self.threads);
        router.route(values, rows, routes, self.simd, &self.threads);
    }

    fn expert_gated(
        &mut self,
        x: Input<'_, CpuBackend>,
        routes: &mut CpuRoutes,
        gate_up: &CpuLinearGroup,
        activation: Activation,
        out: &mut HostBuffer,
    ) {
        let (group, sorted) = (&gate_up.0, routes.sorted_for(gate_up.0.len()));
        let (values, rows) = input(x, group.cols(), &mut self.normed, self.simd, &self.threads);
        assert_eq!(rows, sorted.token_count(), "the rows that were routed");
        let out = out.output(sorted.tokens().len(), group.part_rows()[0]);
        group.gated(values, sorted, activation, out, &mut self.activations, &self.threads);
    }

    fn expert_combine(&mut self, x: &HostBuffer, routes: &mut CpuRoutes, down: &CpuLinearGroup, out: &mut HostBuffer) {
        let (group, sorted) = (&down.0, routes.sorted_for(down.0.len()));
        assert_eq!(x.width(), group.cols(), "an input as wide as the linears' columns");
        assert_eq!(x.rows(), sorted.tokens().len(), "a row of each token for each of its experts");
        assert_eq!(out.rows(), sorted.token_count(), "the rows that were routed");
        let out = out.output(sorted.token_count(), group.part_rows()[0]);
        group.combine(x.values(), sorted, out, &mut routes.activations(), &self.threads);
    }

    fn head_linear(&mut self, x: &HostBuffer, heads: &CpuLinearGroup, out: &mut HostBuffer) {
        let width = out.width();
        let out = out.output(x.rows(), width);
        heads.0.stretches(x.values(), x.rows(), out, &mut self.activations, &self.threads);
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
        let latent = rows::Latent { shape, norm, eps, angles };
        latent.store_keys(&self.step, kv, &mut self.key, cache, layer, self.simd);
        latent.rotate_queries(q, queries, self.simd, &self.threads);
    }

    fn read_routes(&mut self, routes: &mut CpuRoutes, out: &mut HostRoutes) -> Result<(), KernelError> {
        out.clone_from(routes.host());
        out.one_tile_each(routes.experts());
        Ok(())
    }

    fn rope_store_kv(
        &mut self,
        qkv: &mut HostBuffer,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, CpuBackend>>,
        angles: &HostBuffer,
        kv: &mut HostKvCache,
        layer: usize,
    ) {
        let rope = rows::Rope { shape, norm, angles };
        rope.prepare(qkv, self.simd, &self.threads);
        rows::store_kv(&self.step, qkv, shape, kv, layer);
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
        let sinks = sinks.map(Vec::as_slice);
        assert!(sinks.is_none_or(|sinks| sinks.len() == shape.heads), "a sink for each head");
        self.attention.run(&self.step, qkv, shape, sinks, kv, layer, out, self.simd, &self.threads);
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
        let width = logits.width();
        let lanes = self.token_ids.len().min(rows.len());
        let logits = Disjoint::new(logits.values_mut());
        let tokens = Disjoint::new(tokens);
        self.threads.run(lanes, &|lane| {
            let mut ids = self.token_ids[lane].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            for row in (lane..rows.len()).step_by(lanes) {
                // SAFETY: each row belongs to one lane.
                let (logits, token) = unsafe { (logits.slice(row * width, width), tokens.slice(row, 1)) };
                let last = token_of(before, rows[row].last_sampled);
                token[0] = crate::sampling::host::sample(&rows[row], logits, last, &mut ids);
            }
        });
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
