//! Records the operations of a step and runs them.

use std::sync::Arc;

use super::device::{Gpu, Storage};
use super::linear::{GpuLinear, Part, Shape};
use super::pipeline::{Binding, Kernel, Pipeline};
use super::recorder::Recorder;
use super::{GpuArithmetic, GpuBackend, GpuBuffer, GpuKvCache, GpuVector};
use crate::sampling::host::sample;
use crate::{Activation, AttentionShape, Encoder, KernelError, KvType, QkNorm, SampleRow, Step, StepLimits};

/// Workgroups along one axis, at most.
const MAX_WORKGROUPS: usize = 65535;

/// Records operations, and runs them when it is told to.
pub struct GpuEncoder {
    gpu: Arc<Gpu>,
    kernels: Kernels,
    recorder: Recorder,
    step: StepBuffers,
    packed: PackedInput,
    /// Where the host reads.
    readback: Option<wgpu::Buffer>,
    /// The host's side of sampling: logits, and token ids to sort.
    logits: Vec<f32>,
    ids: Vec<u32>,
    /// Cosines and sines of a step.
    angles: Vec<f32>,
}

/// What becomes of a linear's sums; numbered as in `epilogue.wgsl`.
#[derive(Debug, Clone, Copy)]
enum Epilogue {
    Store,
    Add,
    /// The activation of the output so far, times the sum.
    GateSilu,
    GateGeluTanh,
}

/// Kernels that no format makes a difference to.
struct Kernels {
    rms_norm: [Arc<Pipeline>; 2],
    soft_cap: Arc<Pipeline>,
    /// By KV type, without and with norms of Q and K.
    rope_store_kv: [[Arc<Pipeline>; 2]; 2],
    attention: [Arc<Pipeline>; 2],
    copy_block: [Arc<Pipeline>; 2],
    select_rows: Arc<Pipeline>,
    pack_input: Arc<Pipeline>,
}

/// The input of linears in half precision; empty where it stays as it is.
struct PackedInput {
    pairs: Storage,
    scales: Storage,
}

/// The step on the device.
struct StepBuffers {
    tokens: Storage,
    /// Position and start of the block table of each token.
    step_tokens: Storage,
    block_tables: Storage,
    logit_rows: Storage,
    /// The host's copies: positions, and what is uploaded.
    positions: Vec<u32>,
    staged: Vec<[u32; 2]>,
    rows: usize,
    logits: usize,
}

impl std::fmt::Debug for GpuEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuEncoder").field("gpu", &self.gpu).finish_non_exhaustive()
    }
}

impl GpuEncoder {
    pub(super) fn bytes(limits: &StepLimits, arithmetic: GpuArithmetic) -> usize {
        let step = StepBuffers::sizes(limits).iter().sum::<usize>() * size_of::<u32>();
        step.saturating_add(PackedInput::sizes(limits, arithmetic).iter().sum())
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
            recorder: Recorder::new(gpu.clone()),
            step: StepBuffers::new(&gpu, limits)?,
            packed: PackedInput::new(&gpu, limits)?,
            readback: None,
            logits: Vec::new(),
            ids: Vec::new(),
            angles: Vec::new(),
            gpu,
        })
    }

    /// Runs the parts of a linear, each with an epilogue that may depend on its matrix, into columns that do, too.
    fn run_linear(
        &mut self,
        x: &GpuBuffer,
        linear: &GpuLinear,
        out: &GpuBuffer,
        epilogue: impl Fn(usize) -> (Epilogue, usize),
    ) {
        if x.rows == 0 {
            return;
        }
        self.pack_input(x, linear);
        for part in &linear.parts {
            let (epilogue, base) = epilogue(part.matrix);
            self.dispatch_linear(part, part.kernel(x.rows), x, out, part.first - base, epilogue);
        }
    }

    /// Prepares the input of linears, where their arithmetic asks for it.
    fn pack_input(&mut self, x: &GpuBuffer, linear: &GpuLinear) {
        assert_eq!(x.width, linear.cols, "an input of the linear's columns");
        if self.gpu.arithmetic == GpuArithmetic::Half {
            let buffers = [&x.storage, &self.packed.pairs, &self.packed.scales];
            let workgroups = [x.width.div_ceil(32).div_ceil(64), x.rows, 1];
            self.recorder.dispatch(&self.kernels.pack_input, buffers, &[x.width as u32], workgroups);
        }
    }

    /// Runs one part of a linear on its prepared input.
    fn dispatch_linear(
        &mut self,
        part: &Part,
        (kernel, workgroups): (&Arc<Pipeline>, [usize; 3]),
        x: &GpuBuffer,
        out: &GpuBuffer,
        first: usize,
        epilogue: Epilogue,
    ) {
        let packed = [&self.packed.pairs, &self.packed.scales];
        let exact = [&x.storage];
        let input: &[&Storage] = if self.gpu.arithmetic == GpuArithmetic::Half { &packed } else { &exact };
        let buffers = part.buffers.iter().chain(input.iter().copied()).chain([&out.storage]);
        let of_step = [x.rows as u32, first as u32, out.width as u32, epilogue as u32];
        self.recorder.dispatch(kernel, buffers, &with_shape::<7>(&part.shape, &of_step), workgroups);
    }
}

/// A parameter block of `N` words: a shape, and what follows it.
fn with_shape<const N: usize>(shape: &Shape, rest: &[u32]) -> [u32; N] {
    let shape: [u32; 3] = bytemuck::cast(*shape);
    let mut words = [0; N];
    let (first, last) = words.split_at_mut(shape.len());
    first.copy_from_slice(&shape);
    last.copy_from_slice(rest);
    words
}

impl Kernels {
    fn new(gpu: &Gpu) -> Result<Self, KernelError> {
        let (read, write) = (Binding::read, Binding::write);
        let of_files = |name, prelude: &str, bindings: &[Binding], files: &[&'static str]| {
            let (prelude, bindings) = (prelude.into(), bindings.to_vec());
            gpu.pipeline(&Kernel { name, prelude, bindings, files: files.to_vec() })
        };
        let kernel = |name, prelude: &str, bindings: &[Binding], file| of_files(name, prelude, bindings, &[file]);
        let reduce = include_str!("shaders/reduce.wgsl");
        let rms_norm = |adds: bool| {
            let bindings = [read("x", "f32"), read("weight", "f32"), write("out", "f32")];
            of_files(
                "rms_norm",
                &format!("const ADDS = {adds};\n"),
                &bindings,
                &[reduce, include_str!("shaders/rms_norm.wgsl")],
            )
        };
        let rope_store_kv = |element: &'static str, normed: bool| {
            let mut bindings = vec![
                write("qkv", "f32"),
                read("angles", "f32"),
                write("keys", element),
                write("values", element),
                read("step_tokens", "StepToken"),
                read("block_tables", "u32"),
            ];
            let weight = if normed { "select(k_norm[i], q_norm[i], is_query)" } else { "1.0" };
            if normed {
                bindings.extend([read("q_norm", "f32"), read("k_norm", "f32")]);
            }
            let prelude = format!(
                "{STEP_TOKEN}const NORMED = {normed};\n\
                 fn to_kv(value: f32) -> {element} {{ return {element}(value); }}\n\
                 fn norm_weight(is_query: bool, i: u32) -> f32 {{ return {weight}; }}\n"
            );
            of_files("rope_store_kv", &prelude, &bindings, &[reduce, include_str!("shaders/rope_store_kv.wgsl")])
        };
        let attention = |element: &'static str| {
            let bindings = [
                read("qkv", "f32"),
                read("keys", element),
                read("values", element),
                read("step_tokens", "StepToken"),
                read("block_tables", "u32"),
                write("out", "f32"),
            ];
            of_files("attention", STEP_TOKEN, &bindings, &[reduce, include_str!("shaders/attention.wgsl")])
        };
        let copy_block = |element: &'static str| {
            kernel("copy_block", "", &[write("plane", element)], include_str!("shaders/copy_block.wgsl"))
        };
        let pack_input = [read("x", "f32"), write("packed", "vec4<u32>"), write("packed_scales", "f32")];
        let pack = include_str!("shaders/pack.wgsl");
        let select = [read("x", "f32"), read("logit_rows", "u32"), write("out", "f32")];
        Ok(Self {
            rms_norm: [rms_norm(false)?, rms_norm(true)?],
            soft_cap: kernel("soft_cap", "", &[write("x", "f32")], include_str!("shaders/soft_cap.wgsl"))?,
            rope_store_kv: [
                [rope_store_kv("f16", false)?, rope_store_kv("f16", true)?],
                [rope_store_kv("f32", false)?, rope_store_kv("f32", true)?],
            ],
            attention: [attention("f16")?, attention("f32")?],
            copy_block: [copy_block("f16")?, copy_block("f32")?],
            select_rows: kernel("select_rows", "", &select, include_str!("shaders/select_rows.wgsl"))?,
            pack_input: of_files("pack_input", "", &pack_input, &[pack, include_str!("shaders/pack_input.wgsl")])?,
        })
    }
}

/// What kernels know of a token.
const STEP_TOKEN: &str =
    "struct StepToken {\n    position: u32,\n    // Where its sequence's block table begins.\n    table: u32,\n}\n";

/// Index of a KV type's kernels.
fn kv_index(kv_type: KvType) -> usize {
    match kv_type {
        KvType::F16 => 0,
        KvType::F32 => 1,
    }
}

impl PackedInput {
    /// Bytes of pairs and of scales.
    fn sizes(limits: &StepLimits, arithmetic: GpuArithmetic) -> [usize; 2] {
        match arithmetic {
            GpuArithmetic::Exact => [0, 0],
            GpuArithmetic::Half => {
                let units = limits.width.div_ceil(32).saturating_mul(limits.tokens);
                [64, 4].map(|bytes| units.saturating_mul(bytes))
            }
        }
    }

    fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let [pairs, scales] = Self::sizes(limits, gpu.arithmetic);
        let what = "the packed input of linears";
        Ok(Self { pairs: gpu.storage(what, pairs)?, scales: gpu.storage(what, scales)? })
    }
}

impl StepBuffers {
    /// Words of each buffer: tokens, positions and tables of tokens, block tables, logit rows.
    fn sizes(limits: &StepLimits) -> [usize; 4] {
        let StepLimits { tokens, context, .. } = *limits;
        // Enough for one sequence in blocks of one token. Block tables of many sequences may make it grow.
        [tokens, 2 * tokens, context, tokens]
    }

    fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let make = |what, words: usize| gpu.storage(what, words.saturating_mul(size_of::<u32>()));
        let [tokens, step_tokens, block_tables, logit_rows] = Self::sizes(limits);
        Ok(Self {
            tokens: make("the step's tokens", tokens)?,
            step_tokens: make("the step's positions", step_tokens)?,
            block_tables: make("the step's block tables", block_tables)?,
            logit_rows: make("the step's logit rows", logit_rows)?,
            positions: Vec::with_capacity(limits.tokens),
            staged: Vec::with_capacity(limits.tokens),
            rows: 0,
            logits: 0,
        })
    }
}

impl Encoder<GpuBackend> for GpuEncoder {
    fn begin(&mut self, step: &Step<'_>) {
        // What is recorded reads the step before.
        self.recorder.flush();
        let buffers = &mut self.step;
        buffers.positions.clear();
        buffers.positions.extend_from_slice(step.positions);
        buffers.staged.clear();
        for sequence in 0..step.sequences() {
            let table = step.table_offsets[sequence];
            buffers.staged.extend(step.rows(sequence).map(|row| [step.positions[row], table]));
        }
        (buffers.rows, buffers.logits) = (step.tokens.len(), step.logit_rows.len());
        let tables = size_of_val(step.block_tables) as u64;
        if tables > buffers.block_tables.buffer.size() {
            let larger =
                self.gpu.storage("the step's block tables", size_of_val(step.block_tables).next_power_of_two());
            match larger {
                Ok(larger) => buffers.block_tables = larger,
                Err(error) => {
                    // No operation of this step finds a row.
                    (buffers.rows, buffers.logits) = (0, 0);
                    return self.gpu.fail(&error);
                }
            }
        }
        self.gpu.write(&buffers.tokens, 0, bytemuck::cast_slice(step.tokens));
        self.gpu.write(&buffers.step_tokens, 0, bytemuck::cast_slice(&buffers.staged));
        self.gpu.write(&buffers.block_tables, 0, bytemuck::cast_slice(step.block_tables));
        self.gpu.write(&buffers.logit_rows, 0, bytemuck::cast_slice(step.logit_rows));
    }

    fn embed(&mut self, table: &GpuLinear, scale: f32, out: &mut GpuBuffer) {
        out.output(self.step.rows, table.cols);
        for part in &table.parts {
            let parameters = with_shape::<5>(&part.shape, &[part.first as u32, scale.to_bits()]);
            let units = table.cols.div_ceil(32);
            let buffers = part.buffers.iter().chain([&self.step.tokens, &out.storage]);
            self.recorder.dispatch(&part.kernels.embed, buffers, &parameters, [units.div_ceil(64), out.rows, 1]);
        }
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
        self.rms_norm_into(1, x, weight, eps, out);
    }

    fn soft_cap(&mut self, x: &mut GpuBuffer, cap: f32) {
        let count = x.rows * x.width;
        let workgroups = count.div_ceil(256).min(MAX_WORKGROUPS);
        let parameters = [count as u32, cap.to_bits()];
        self.recorder.dispatch(&self.kernels.soft_cap, [&x.storage], &parameters, [workgroups, 1, 1]);
    }

    fn linear(&mut self, x: &GpuBuffer, linear: &GpuLinear, out: &mut GpuBuffer) {
        out.output(x.rows, linear.outputs());
        self.run_linear(x, linear, out, |_| (Epilogue::Store, 0));
    }

    fn linear_add(&mut self, x: &GpuBuffer, linear: &GpuLinear, out: &mut GpuBuffer) {
        assert_eq!(
            (out.rows, out.width),
            (x.rows, linear.outputs()),
            "the residual stream has a value for each output"
        );
        self.run_linear(x, linear, out, |_| (Epilogue::Add, 0));
    }

    fn linear_gated(&mut self, x: &GpuBuffer, gate_up: &GpuLinear, activation: Activation, out: &mut GpuBuffer) {
        assert!(matches!(gate_up.rows[..], [gate, up] if gate == up), "a gate and as large a matrix");
        let half = gate_up.outputs() / 2;
        out.output(x.rows, half);
        let gate = match activation {
            Activation::Silu => Epilogue::GateSilu,
            Activation::GeluTanh => Epilogue::GateGeluTanh,
        };
        let Some(part) = gate_up.as_gated() else {
            return self.run_linear(x, gate_up, out, |matrix| match matrix {
                0 => (Epilogue::Store, 0),
                _ => (gate, half),
            });
        };
        if let Some(kernel) = part.gated_kernel(x.rows).filter(|_| x.rows > 0) {
            self.pack_input(x, gate_up);
            self.dispatch_linear(part, kernel, x, out, 0, gate);
        }
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
        let cache = &kv.layers[layer];
        cache.check(shape);
        assert_eq!((qkv.rows, qkv.width), (self.step.rows, (shape.heads + 2 * shape.kv_heads) * shape.head_dim));
        assert!(angles.rows == qkv.rows && angles.width.is_multiple_of(2) && angles.width <= shape.head_dim);
        for norm in norm.iter().flat_map(|norm| [norm.q, norm.k]) {
            assert_eq!(norm.values.len(), shape.head_dim, "a norm over a head");
        }
        let kernel = &self.kernels.rope_store_kv[kv_index(kv.kv_type)][usize::from(norm.is_some())];
        let StepBuffers { step_tokens, block_tables, .. } = &self.step;
        let buffers =
            [&qkv.storage, &angles.storage, &cache.keys.storage, &cache.values.storage, step_tokens, block_tables];
        let norms = norm.iter().flat_map(|norm| [&norm.q.storage, &norm.k.storage]);
        let parameters = [
            shape.heads as u32,
            shape.kv_heads as u32,
            shape.head_dim as u32,
            angles.width as u32,
            kv.block_tokens as u32,
            kv.slots() as u32,
            norm.as_ref().map_or(0.0, |norm| norm.eps).to_bits(),
        ];
        let workgroups = [shape.heads + 2 * shape.kv_heads, qkv.rows, 1];
        self.recorder.dispatch(kernel, buffers.into_iter().chain(norms), &parameters, workgroups);
    }

    fn attention(
        &mut self,
        qkv: &GpuBuffer,
        shape: &AttentionShape,
        kv: &GpuKvCache,
        layer: usize,
        out: &mut GpuBuffer,
    ) {
        out.output(self.step.rows, shape.heads * shape.head_dim);
        let cache = &kv.layers[layer];
        cache.check(shape);
        assert_eq!((qkv.rows, qkv.width), (self.step.rows, (shape.heads + 2 * shape.kv_heads) * shape.head_dim));
        let kernel = &self.kernels.attention[kv_index(kv.kv_type)];
        let StepBuffers { step_tokens, block_tables, .. } = &self.step;
        let buffers =
            [&qkv.storage, &cache.keys.storage, &cache.values.storage, step_tokens, block_tables, &out.storage];
        let parameters = [
            shape.heads as u32,
            shape.kv_heads as u32,
            shape.head_dim as u32,
            shape.scale.to_bits(),
            shape.window.and_then(|window| u32::try_from(window).ok()).unwrap_or(u32::MAX),
            kv.block_tokens as u32,
            kv.slots() as u32,
        ];
        self.recorder.dispatch(kernel, buffers, &parameters, [shape.heads, out.rows, 1]);
    }

    fn select_logit_rows(&mut self, x: &GpuBuffer, out: &mut GpuBuffer) {
        assert_eq!(x.rows, self.step.rows, "a row for each token");
        out.output(self.step.logits, x.width);
        let buffers = [&x.storage, &self.step.logit_rows, &out.storage];
        let workgroups = [x.width.div_ceil(256), out.rows, 1];
        self.recorder.dispatch(&self.kernels.select_rows, buffers, &[x.width as u32], workgroups);
    }

    fn sample(
        &mut self,
        logits: &mut GpuBuffer,
        rows: &[SampleRow<'_>],
        tokens: &mut [u32],
    ) -> Result<(), KernelError> {
        assert!(rows.len() == logits.rows && tokens.len() == logits.rows, "one choice per row of logits");
        let mut values = std::mem::take(&mut self.logits);
        values.resize(logits.rows * logits.width, 0.0);
        let read = self.read(logits, &mut values);
        self.ids.resize(logits.width, 0);
        if read.is_ok() {
            for ((row, token), values) in rows.iter().zip(tokens).zip(values.chunks_exact_mut(logits.width.max(1))) {
                *token = sample(row, values, &mut self.ids);
            }
        }
        self.logits = values;
        read
    }

    fn copy_kv_blocks(&mut self, kv: &mut GpuKvCache, pairs: &[(u32, u32)]) {
        let within = |&block: &u32| (block as usize) < kv.blocks;
        assert!(pairs.iter().all(|(from, to)| within(from) && within(to)), "blocks of the cache");
        let kernel = &self.kernels.copy_block[kv_index(kv.kv_type)];
        for layer in &kv.layers {
            for plane in [&layer.keys, &layer.values] {
                let (block, head) = (kv.block_tokens * plane.dim, kv.slots() * plane.dim);
                for &(from, to) in pairs {
                    let parameters = [block as u32, head as u32, from, to];
                    let workgroups = [block.div_ceil(64), layer.heads, 1];
                    self.recorder.dispatch(kernel, [&plane.storage], &parameters, workgroups);
                }
            }
        }
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
        if out.is_empty() {
            return self.submit();
        }
        self.recorder.flush();
        let bytes = size_of_val(out) as u64;
        // Kept for the next time only if nothing goes wrong.
        let kept = self.readback.take().filter(|readback| readback.size() >= bytes);
        let readback = kept.unwrap_or_else(|| {
            self.gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("readback"),
                size: bytes,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        });
        let mut commands = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        commands.copy_buffer_to_buffer(&buffer.storage.buffer, 0, &readback, 0, bytes);
        self.gpu.queue.submit([commands.finish()]);
        // If it cannot be mapped, `get_mapped_range` fails.
        readback.map_async(wgpu::MapMode::Read, ..bytes, |_| ());
        self.gpu.wait()?;
        let mapped = readback.get_mapped_range(..bytes);
        let mapped = mapped.map_err(|error| KernelError::Device(format!("cannot read from the device: {error}")))?;
        out.copy_from_slice(bytemuck::cast_slice(&mapped));
        drop(mapped);
        readback.unmap();
        self.readback = Some(readback);
        Ok(())
    }
}

impl GpuEncoder {
    fn rms_norm_into(&mut self, variant: usize, x: &GpuBuffer, weight: &GpuVector, eps: f32, out: &GpuBuffer) {
        assert_eq!(weight.values.len(), x.width, "a weight for each value of a row");
        let buffers = [&x.storage, &weight.storage, &out.storage];
        let parameters = [x.width as u32, eps.to_bits()];
        self.recorder.dispatch(&self.kernels.rms_norm[variant], buffers, &parameters, [x.rows, 1, 1]);
    }
}
