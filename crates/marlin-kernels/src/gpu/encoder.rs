//! Records the operations of a step and runs them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::attention::AttentionEncoder;
use super::device::{Gpu, Storage};
use super::experts::{GpuRouter, GpuRoutes};
use super::linear::{GpuLinear, GpuLinearGroup, LinearEncoder};
use super::pipeline::{Binding, Kernel, Pipeline};
use super::recorder::Recorder;
use super::sampling::Sampler;
use super::step::StepBuffers;
use super::{GpuBackend, GpuBuffer, GpuKvCache, GpuVector, MAX_WORKGROUPS, kv_blocks};
use crate::hadamard::{CORES, Core, MOST_ORDER};
use crate::{
    Activation, AttentionShape, Encoder, Hadamard, HostRoutes, Input, KernelError, LatentShape, QkNorm, SampleRow,
    SamplingId, Step, StepLimits,
};

/// Records operations, and runs them when it is told to.
pub struct GpuEncoder {
    gpu: Arc<Gpu>,
    kernels: Kernels,
    linear: LinearEncoder,
    attention: AttentionEncoder,
    recorder: Recorder,
    step: StepBuffers,
    sampler: Sampler,
    /// Where the host reads.
    readback: Option<wgpu::Buffer>,
    /// Cosines and sines of a step.
    angles: Vec<f32>,
}

/// Kernels over rows of activations.
struct Kernels {
    rms_norm: [Arc<Pipeline>; 2],
    /// Without and with a bias.
    layer_norm: [Arc<Pipeline>; 2],
    /// One for each of [`CORES`].
    hadamard: Vec<Arc<Pipeline>>,
    soft_cap: Arc<Pipeline>,
    select_rows: Arc<Pipeline>,
}

impl std::fmt::Debug for GpuEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuEncoder").field("gpu", &self.gpu).finish_non_exhaustive()
    }
}

impl GpuEncoder {
    pub(super) fn bytes(gpu: &Gpu, limits: &StepLimits) -> usize {
        let parts = [
            StepBuffers::bytes(limits),
            LinearEncoder::bytes(gpu, limits),
            AttentionEncoder::bytes(limits),
            Sampler::bytes(limits),
            // Where logits are read; tokens that are chosen on the device take next to nothing.
            limits.logit_rows.saturating_mul(limits.vocabulary).saturating_mul(size_of::<f32>()),
        ];
        parts.into_iter().fold(0, usize::saturating_add)
    }

    pub(super) fn new(gpu: Arc<Gpu>, limits: &StepLimits) -> Result<Self, KernelError> {
        if limits.tokens > MAX_WORKGROUPS {
            return Err(KernelError::Device(format!(
                "a GPU takes steps of at most {MAX_WORKGROUPS} tokens, found {}",
                limits.tokens
            )));
        }
        Ok(Self {
            kernels: Kernels::new(&gpu)?,
            linear: LinearEncoder::new(&gpu, limits)?,
            attention: AttentionEncoder::new(&gpu, limits)?,
            recorder: Recorder::new(gpu.clone()),
            step: StepBuffers::new(&gpu, limits)?,
            sampler: Sampler::new(&gpu, limits)?,
            readback: None,
            angles: Vec::new(),
            gpu,
        })
    }
}

impl Kernels {
    fn new(gpu: &Gpu) -> Result<Self, KernelError> {
        let (read, write) = (Binding::read, Binding::write);
        let kernel = |name, bindings: &[Binding], file| {
            gpu.pipeline(&Kernel { name, prelude: String::new(), bindings: bindings.to_vec(), files: vec![file] })
        };
        let select = [read("x", "f32"), read("logit_rows", "u32"), write("out", "f32")];
        Ok(Self {
            rms_norm: [gpu.pipeline(&Kernel::rms_norm(false))?, gpu.pipeline(&Kernel::rms_norm(true))?],
            layer_norm: [gpu.pipeline(&layer_norm_kernel(false))?, gpu.pipeline(&layer_norm_kernel(true))?],
            hadamard: CORES.iter().map(|core| gpu.pipeline(&hadamard_kernel(core))).collect::<Result<_, _>>()?,
            soft_cap: kernel("soft_cap", &[write("x", "f32")], include_str!("shaders/soft_cap.wgsl"))?,
            select_rows: kernel("select_rows", &select, include_str!("shaders/select_rows.wgsl"))?,
        })
    }
}

/// Values that a workgroup rotates: the largest Hadamard block that is done at once. Every device has memory for them.
const HADAMARD_TILE: usize = 4096;
/// Smaller blocks, or parts of them, share a workgroup, up to so many values.
const SHARED_HADAMARD_TILE: usize = 1024;

fn hadamard_kernel(core: &Core) -> Kernel {
    // A bit for each value of a row of H_m, set where that is negative.
    let row = |signs: &[f32; MOST_ORDER]| {
        let bits = (0u64..).zip(signs).fold(0, |bits, (j, sign)| bits | u64::from(*sign < 0.0) << j);
        format!("vec2({}u, {}u)", bits as u32, bits >> 32)
    };
    let rows: Vec<_> = core.rows().iter().map(row).collect();
    let (order, rows) = (rows.len(), rows.join(", "));
    let signs = format!("const SIGNS = array<vec2<u32>, ORDER>({rows});\n    return SIGNS[row];");
    Kernel {
        name: "hadamard",
        prelude: format!(
            "const MOST = {HADAMARD_TILE}u;\nconst ORDER = {order}u;\n\
             fn signs_of(row: u32) -> vec2<u32> {{\n    {signs}\n}}\n"
        ),
        bindings: vec![Binding::write("x", "f32")],
        files: vec![include_str!("shaders/hadamard.wgsl")],
    }
}

fn layer_norm_kernel(has_bias: bool) -> Kernel {
    let bias = if has_bias { "bias[i]" } else { "0.0" };
    let (read, write) = (Binding::read, Binding::write);
    let mut bindings = vec![read("x", "f32"), read("weight", "f32"), write("out", "f32")];
    bindings.extend(has_bias.then(|| read("bias", "f32")));
    Kernel {
        name: "layer_norm",
        prelude: format!("const HAS_BIAS = {has_bias};\nfn bias_of(i: u32) -> f32 {{\n    return {bias};\n}}\n"),
        bindings,
        files: vec![include_str!("shaders/reduce.wgsl"), include_str!("shaders/layer_norm.wgsl")],
    }
}

impl Encoder<GpuBackend> for GpuEncoder {
    fn begin(&mut self, step: &Step<'_>) {
        // What is recorded reads the step before.
        self.recorder.flush();
        if let Err(error) = self.step.begin(&self.gpu, step) {
            self.gpu.fail(&error);
        }
    }

    fn embed(&mut self, table: &GpuLinear, scale: f32, out: &mut GpuBuffer) {
        let tokens = [&self.step.tokens, &self.sampler.sampled];
        self.linear.embed(&self.gpu, &mut self.recorder, table, tokens, self.step.rows, scale, out);
    }

    fn rope_angles(&mut self, inv_freq: &GpuVector, scaling: f32, out: &mut GpuBuffer) {
        // On the host, because devices' sines of large angles are far off. What is recorded may read the angles before.
        self.recorder.flush();
        let half = inv_freq.values.len();
        out.output(self.step.rows, 2 * half);
        self.angles.clear();
        for &position in &self.step.positions {
            let angle = |frequency: &f32| f64::from(position as f32 * frequency);
            let scaled = |value: f64| (value * f64::from(scaling)) as f32;
            self.angles.extend(inv_freq.values.iter().map(|frequency| scaled(angle(frequency).cos())));
            self.angles.extend(inv_freq.values.iter().map(|frequency| scaled(angle(frequency).sin())));
        }
        self.gpu.write(&out.storage, 0, bytemuck::cast_slice(&self.angles));
    }

    fn rms_norm(&mut self, x: &GpuBuffer, weight: &GpuVector, eps: f32, out: &mut GpuBuffer) {
        out.output(x.rows, x.width);
        self.rms_norm_into(0, x, weight, eps, out);
    }

    fn rms_norm_add(&mut self, x: &GpuBuffer, weight: &GpuVector, eps: f32, out: &mut GpuBuffer) {
        assert_eq!((out.rows, out.width), (x.rows, x.width), "the residual stream has a value for each input value");
        out.written();
        self.rms_norm_into(1, x, weight, eps, out);
    }

    fn layer_norm(
        &mut self,
        x: &GpuBuffer,
        weight: &GpuVector,
        bias: Option<&GpuVector>,
        eps: f32,
        out: &mut GpuBuffer,
    ) {
        let is_as_wide = |vector: &GpuVector| vector.values.len() == x.width;
        assert!(is_as_wide(weight) && bias.is_none_or(is_as_wide), "a weight for each value of a row");
        out.output(x.rows, x.width);
        let kernel = &self.kernels.layer_norm[usize::from(bias.is_some())];
        let buffers = [&x.storage, &weight.storage, &out.storage].into_iter().chain(bias.map(|bias| &bias.storage));
        self.recorder.dispatch(kernel, buffers, &[x.width as u32, eps.to_bits()], [x.rows, 1, 1]);
    }

    fn hadamard(&mut self, x: &mut GpuBuffer, rotation: &Hadamard) {
        rotation.check(x.width);
        x.written();
        // A pass multiplies by a factor of the Kronecker product, whose values lie `done` apart. H_m comes last, with what is left of
        // H_2ᵏ once a tile holds both.
        let mut done = 1;
        while done < rotation.block() {
            let left = rotation.block() / done;
            let (core, part) = if left <= HADAMARD_TILE {
                (rotation.core(), left)
            } else {
                (0, (rotation.run() / done).min(HADAMARD_TILE))
            };
            // Parts in a row lie one after the other in the first pass, and side by side in those that follow.
            let shared = (SHARED_HADAMARD_TILE / part).max(1);
            let columns = if done == 1 { 1 } else { (1 << shared.ilog2()).min(done) };
            let tile = part * if done == 1 { shared } else { columns };
            let factor = (1.0 / (part as f64).sqrt()) as f32;
            let [width, block, stride] = [x.width, part * columns, done].map(|size| size as u32);
            let parameters = [width, block, stride, columns as u32, tile as u32, factor.to_bits()];
            let workgroups = [x.width.div_ceil(tile), x.rows, 1];
            self.recorder.dispatch(&self.kernels.hadamard[core], [&x.storage], &parameters, workgroups);
            done *= part;
        }
    }

    fn soft_cap(&mut self, x: &mut GpuBuffer, cap: f32) {
        x.written();
        let count = x.rows * x.width;
        let workgroups = count.div_ceil(256).min(MAX_WORKGROUPS);
        let parameters = [count as u32, cap.to_bits()];
        self.recorder.dispatch(&self.kernels.soft_cap, [&x.storage], &parameters, [workgroups, 1, 1]);
    }

    fn linear(&mut self, x: Input<'_, GpuBackend>, linear: &GpuLinear, out: &mut GpuBuffer) {
        self.linear.store(&self.gpu, &mut self.recorder, x, linear, out);
    }

    fn linear_add(&mut self, x: &GpuBuffer, linear: &GpuLinear, out: &mut GpuBuffer) {
        self.linear.add(&self.gpu, &mut self.recorder, Input::Rows(x), linear, out);
    }

    fn linear_gated(
        &mut self,
        x: Input<'_, GpuBackend>,
        gate_up: &GpuLinear,
        activation: Activation,
        out: &mut GpuBuffer,
    ) {
        self.linear.gated(&self.gpu, &mut self.recorder, x, gate_up, activation, out);
    }

    fn route(&mut self, x: Input<'_, GpuBackend>, router: &GpuRouter, routes: &mut GpuRoutes) {
        router.route(&self.gpu, &mut self.recorder, &x, routes);
    }

    fn expert_gated(
        &mut self,
        x: Input<'_, GpuBackend>,
        routes: &mut GpuRoutes,
        gate_up: &GpuLinearGroup,
        activation: Activation,
        out: &mut GpuBuffer,
    ) {
        self.linear.expert_gated(&mut self.recorder, x, routes, gate_up, activation, out);
    }

    fn expert_combine(&mut self, x: &GpuBuffer, routes: &mut GpuRoutes, down: &GpuLinearGroup, out: &mut GpuBuffer) {
        self.linear.expert_combine(&self.gpu, &mut self.recorder, x, routes, down, out);
    }

    fn head_linear(&mut self, x: &GpuBuffer, heads: &GpuLinearGroup, out: &mut GpuBuffer) {
        if let Err(error) = self.linear.head_linear(&self.gpu, &mut self.recorder, x, heads, out) {
            self.gpu.fail(&error);
        }
    }

    fn latent_store_kv(
        &mut self,
        q: &GpuBuffer,
        kv: &GpuBuffer,
        shape: &LatentShape,
        norm: &GpuVector,
        eps: f32,
        angles: &GpuBuffer,
        cache: &mut GpuKvCache,
        layer: usize,
        queries: &mut GpuBuffer,
    ) {
        let Self { gpu, recorder, step, attention, .. } = self;
        attention.latent_store_kv(gpu, recorder, step, q, kv, shape, norm, eps, angles, cache, layer, queries);
    }

    fn read_routes(&mut self, routes: &mut GpuRoutes, out: &mut HostRoutes) -> Result<(), KernelError> {
        routes.choose(&mut self.recorder);
        out.logits.resize(routes.tokens * routes.routing.experts, 0.0);
        out.experts.resize(routes.pairs(), 0);
        out.weights.resize(routes.pairs(), 0.0);
        self.read_storage(&routes.logits, bytemuck::cast_slice_mut(&mut out.logits))?;
        self.read_storage(&routes.experts, bytemuck::cast_slice_mut(&mut out.experts))?;
        self.read_storage(&routes.weights, bytemuck::cast_slice_mut(&mut out.weights))?;
        let experts = routes.routing.all_experts();
        if routes.tokens == 1 {
            // What chose them need not have written tiles.
            out.one_tile_each(experts);
            return Ok(());
        }
        // Expert, first row and end of each.
        let mut tiles = vec![[0u32; 4]; routes.tile_count()];
        self.read_storage(&routes.tiles, bytemuck::cast_slice_mut(&mut tiles))?;
        out.tiles.clear();
        out.tiles.resize(experts, 0);
        tiles.iter().filter(|[_, first, end, _]| first < end).for_each(|[e, ..]| out.tiles[*e as usize] += 1);
        Ok(())
    }

    fn rope_store_kv(
        &mut self,
        qkv: &mut GpuBuffer,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, GpuBackend>>,
        angles: &GpuBuffer,
        kv: &mut GpuKvCache,
        layer: usize,
    ) {
        self.attention.rope_store_kv(&self.gpu, &mut self.recorder, &self.step, qkv, shape, norm, angles, kv, layer);
    }

    fn attention(
        &mut self,
        qkv: &GpuBuffer,
        shape: &AttentionShape,
        sinks: Option<&GpuVector>,
        kv: &GpuKvCache,
        layer: usize,
        out: &mut GpuBuffer,
    ) {
        let Self { gpu, recorder, step, linear, .. } = self;
        self.attention.attention(gpu, recorder, step, qkv, shape, sinks, kv, layer, out, linear, None);
    }

    fn rope_attention(
        &mut self,
        qkv: &mut GpuBuffer,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, GpuBackend>>,
        angles: &GpuBuffer,
        sinks: Option<&GpuVector>,
        kv: &mut GpuKvCache,
        layer: usize,
        out: &mut GpuBuffer,
    ) {
        let Self { gpu, recorder, step, linear, attention, .. } = self;
        attention.rope_attention(gpu, recorder, step, qkv, shape, norm, angles, sinks, kv, layer, out, linear);
    }

    fn select_logit_rows(&mut self, x: &GpuBuffer, out: &mut GpuBuffer) {
        assert_eq!(x.rows, self.step.rows, "a row for each token");
        out.output(self.step.logits, x.width);
        let buffers = [&x.storage, &self.step.logit_rows, &out.storage];
        let workgroups = [x.width.div_ceil(256), out.rows, 1];
        self.recorder.dispatch(&self.kernels.select_rows, buffers, &[x.width as u32], workgroups);
    }

    fn sample(&mut self, logits: &mut GpuBuffer, rows: &[SampleRow<'_>]) -> SamplingId {
        logits.written();
        self.sampler.sample(&self.gpu, &mut self.recorder, logits, rows)
    }

    fn sampled(&mut self, sampling: SamplingId, tokens: &mut [u32]) -> Result<(), KernelError> {
        self.sampler.read(&self.gpu, sampling, tokens)
    }

    fn copy_kv_blocks(&mut self, kv: &mut GpuKvCache, pairs: &[(u32, u32)]) {
        self.attention.copy_blocks(&mut self.recorder, kv, pairs);
    }

    fn read_kv_blocks(&mut self, kv: &GpuKvCache, blocks: &[u32], out: &mut [u8]) -> Result<(), KernelError> {
        kv_blocks::read(&self.gpu, &mut self.recorder, kv, blocks, out)
    }

    fn write_kv_blocks(&mut self, kv: &mut GpuKvCache, blocks: &[u32], bytes: &[u8]) -> Result<(), KernelError> {
        kv_blocks::write(&self.gpu, &mut self.recorder, kv, blocks, bytes)
    }

    fn start(&mut self) -> Result<(), KernelError> {
        self.recorder.flush();
        self.gpu.check()
    }

    fn submit(&mut self) -> Result<(), KernelError> {
        self.recorder.flush();
        self.gpu.wait()
    }

    fn read(&mut self, buffer: &GpuBuffer, out: &mut [f32]) -> Result<(), KernelError> {
        let GpuBuffer { rows, width, capacity, .. } = *buffer;
        if out.len() != rows * width {
            return Err(KernelError::BufferShape { found: out.len(), rows, width, capacity });
        }
        self.read_storage(&buffer.storage, bytemuck::cast_slice_mut(out))
    }

    fn write(&mut self, buffer: &mut GpuBuffer, rows: usize, values: &[f32]) -> Result<(), KernelError> {
        // What is recorded reads the rows before.
        self.recorder.flush();
        buffer.upload(&self.gpu, rows, values)
    }
}

impl GpuEncoder {
    /// The time that the device takes for what `record` records, and for that alone.
    ///
    /// # Errors
    /// The device has no clock (see [`GpuCaps::timestamps`](super::GpuCaps::timestamps)), or failed.
    pub fn timed(&mut self, record: impl FnOnce(&mut Self)) -> Result<Duration, KernelError> {
        self.recorder.start_timing()?;
        record(self);
        self.recorder.stop_timing().map(Duration::from_secs_f64)
    }

    /// The time for what `record` records: by the device's clock, or, where it has none, by the host's until all of it has run.
    ///
    /// # Errors
    /// The device failed.
    pub fn timed_or_waited(&mut self, record: impl FnOnce(&mut Self)) -> Result<Duration, KernelError> {
        if self.gpu.caps.timestamps {
            return self.timed(record);
        }
        self.submit()?;
        let start = Instant::now();
        record(self);
        self.submit()?;
        Ok(start.elapsed())
    }

    /// Where kernels are recorded.
    pub(super) fn recorder(&mut self) -> &mut Recorder {
        &mut self.recorder
    }

    /// How many kernels were recorded since the encoder was made.
    pub fn dispatches(&self) -> u64 {
        self.recorder.dispatches()
    }

    /// Runs whatever is recorded and reads the first bytes of a buffer.
    fn read_storage(&mut self, storage: &Storage, out: &mut [u8]) -> Result<(), KernelError> {
        if out.is_empty() {
            return self.submit();
        }
        let bytes = out.len() as u64;
        // Kept for the next time only if nothing goes wrong.
        let kept = self.readback.take().filter(|readback| readback.size() >= bytes);
        let readback = kept.unwrap_or_else(|| self.gpu.readback("readback", bytes));
        let copied = self.recorder.flush_and_copy(storage, &readback, bytes);
        self.gpu.read_mapped(&readback, Some(copied), out)?;
        self.readback = Some(readback);
        Ok(())
    }

    fn rms_norm_into(&mut self, variant: usize, x: &GpuBuffer, weight: &GpuVector, eps: f32, out: &GpuBuffer) {
        assert_eq!(weight.values.len(), x.width, "a weight for each value of a row");
        let buffers = [&x.storage, &weight.storage, &out.storage];
        let parameters = [x.width as u32, eps.to_bits(), x.width as u32];
        self.recorder.dispatch(&self.kernels.rms_norm[variant], buffers, &parameters, [x.rows, 1, 1]);
    }
}
