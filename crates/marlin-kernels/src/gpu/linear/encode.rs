//! Records linears, and prepares their input.

use std::sync::Arc;

use super::{GpuLinear, Part, Shape};
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::pipeline::{Binding, Kernel, Pipeline};
use crate::gpu::recorder::Recorder;
use crate::gpu::{GpuArithmetic, GpuBuffer};
use crate::{Activation, KernelError, StepLimits};

/// What becomes of a linear's sums; numbered as in `epilogue.wgsl`.
#[derive(Debug, Clone, Copy)]
enum Epilogue {
    Store,
    Add,
    /// The activation of the output so far, times the sum.
    GateSilu,
    GateGeluTanh,
}

/// Records linears.
pub(in crate::gpu) struct LinearEncoder {
    arithmetic: GpuArithmetic,
    pack_input: Arc<Pipeline>,
    packed: PackedInput,
}

/// The input of linears in half precision; empty where it stays as it is.
struct PackedInput {
    pairs: Storage,
    scales: Storage,
}

impl LinearEncoder {
    pub(in crate::gpu) fn bytes(limits: &StepLimits, arithmetic: GpuArithmetic) -> usize {
        PackedInput::sizes(limits, arithmetic).iter().sum()
    }

    pub(in crate::gpu) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let bindings = vec![
            Binding::read("x", "f32"),
            Binding::write("packed", "vec4<u32>"),
            Binding::write("packed_scales", "f32"),
        ];
        let files = vec![include_str!("../shaders/pack.wgsl"), include_str!("../shaders/pack_input.wgsl")];
        Ok(Self {
            arithmetic: gpu.arithmetic,
            pack_input: gpu.pipeline(&Kernel { name: "pack_input", prelude: String::new(), bindings, files })?,
            packed: PackedInput::new(gpu, limits)?,
        })
    }

    pub(in crate::gpu) fn store(
        &self,
        recorder: &mut Recorder,
        x: &GpuBuffer,
        linear: &GpuLinear,
        out: &mut GpuBuffer,
    ) {
        out.output(x.rows, linear.outputs());
        self.run(recorder, x, linear, out, |_| (Epilogue::Store, 0));
    }

    pub(in crate::gpu) fn add(&self, recorder: &mut Recorder, x: &GpuBuffer, linear: &GpuLinear, out: &mut GpuBuffer) {
        assert_eq!(
            (out.rows, out.width),
            (x.rows, linear.outputs()),
            "the residual stream has a value for each output"
        );
        self.run(recorder, x, linear, out, |_| (Epilogue::Add, 0));
    }

    pub(in crate::gpu) fn gated(
        &self,
        recorder: &mut Recorder,
        x: &GpuBuffer,
        gate_up: &GpuLinear,
        activation: Activation,
        out: &mut GpuBuffer,
    ) {
        assert!(matches!(gate_up.rows[..], [gate, up] if gate == up), "a gate and as large a matrix");
        let half = gate_up.outputs() / 2;
        out.output(x.rows, half);
        let gate = match activation {
            Activation::Silu => Epilogue::GateSilu,
            Activation::GeluTanh => Epilogue::GateGeluTanh,
        };
        let Some(part) = gate_up.as_gated() else {
            return self.run(recorder, x, gate_up, out, |matrix| match matrix {
                0 => (Epilogue::Store, 0),
                _ => (gate, half),
            });
        };
        if let Some(kernel) = part.gated_kernel(x.rows).filter(|_| x.rows > 0) {
            self.pack(recorder, x, gate_up);
            self.dispatch(recorder, part, kernel, x, out, 0, gate);
        }
    }

    /// Runs the parts of a linear, each with an epilogue that may depend on its matrix, into columns that do, too.
    fn run(
        &self,
        recorder: &mut Recorder,
        x: &GpuBuffer,
        linear: &GpuLinear,
        out: &GpuBuffer,
        epilogue: impl Fn(usize) -> (Epilogue, usize),
    ) {
        if x.rows == 0 {
            return;
        }
        self.pack(recorder, x, linear);
        for part in &linear.parts {
            let (epilogue, base) = epilogue(part.matrix);
            self.dispatch(recorder, part, part.kernel(x.rows), x, out, part.first - base, epilogue);
        }
    }

    /// Prepares the input of linears, where their arithmetic asks for it.
    fn pack(&self, recorder: &mut Recorder, x: &GpuBuffer, linear: &GpuLinear) {
        assert_eq!(x.width, linear.cols, "an input of the linear's columns");
        if self.arithmetic == GpuArithmetic::Half {
            let buffers = [&x.storage, &self.packed.pairs, &self.packed.scales];
            let workgroups = [x.width.div_ceil(32).div_ceil(64), x.rows, 1];
            recorder.dispatch(&self.pack_input, buffers, &[x.width as u32], workgroups);
        }
    }

    /// Runs one part of a linear on its prepared input.
    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    fn dispatch(
        &self,
        recorder: &mut Recorder,
        part: &Part,
        (kernel, workgroups): (&Arc<Pipeline>, [usize; 3]),
        x: &GpuBuffer,
        out: &GpuBuffer,
        first: usize,
        epilogue: Epilogue,
    ) {
        let packed = [&self.packed.pairs, &self.packed.scales];
        let exact = [&x.storage];
        let input: &[&Storage] = if self.arithmetic == GpuArithmetic::Half { &packed } else { &exact };
        let buffers = part.buffers.iter().chain(input.iter().copied()).chain([&out.storage]);
        let of_step = [x.rows as u32, first as u32, out.width as u32, epilogue as u32];
        recorder.dispatch(kernel, buffers, &with_shape::<7>(&part.shape, &of_step), workgroups);
    }
}

/// Looks up rows of a table for `rows` tokens, some of which may be rows of the last sampling.
pub(in crate::gpu) fn embed(
    recorder: &mut Recorder,
    table: &GpuLinear,
    [tokens, sampled]: [&Storage; 2],
    rows: usize,
    scale: f32,
    out: &mut GpuBuffer,
) {
    out.output(rows, table.cols);
    for part in &table.parts {
        let parameters = with_shape::<5>(&part.shape, &[part.first as u32, scale.to_bits()]);
        let units = table.cols.div_ceil(32);
        let buffers = part.buffers.iter().chain([tokens, sampled, &out.storage]);
        recorder.dispatch(&part.kernels.embed, buffers, &parameters, [units.div_ceil(64), out.rows, 1]);
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
