//! Records linears, and prepares their input.

use std::sync::Arc;

use super::pack::Packer;
use super::{GpuLinear, Part, Shape};
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::pipeline::Pipeline;
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
    packer: Packer,
}

impl LinearEncoder {
    pub(in crate::gpu) fn bytes(limits: &StepLimits, arithmetic: GpuArithmetic) -> usize {
        Packer::bytes(limits, arithmetic)
    }

    pub(in crate::gpu) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        Ok(Self { packer: Packer::new(gpu, limits)? })
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

    /// Prepares the input of a linear.
    fn pack(&self, recorder: &mut Recorder, x: &GpuBuffer, linear: &GpuLinear) {
        assert_eq!(x.width, linear.cols, "an input of the linear's columns");
        self.packer.pack(recorder, x);
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
        let buffers = part.buffers.iter().chain(self.packer.input(x)).chain([&out.storage]);
        let of_step = [x.rows as u32, first as u32, out.width as u32, epilogue as u32];
        recorder.dispatch(kernel, buffers, &with_shape::<7>(&part.shape, &of_step), workgroups);
    }
}

/// Looks up rows of a table for `rows` tokens.
pub(in crate::gpu) fn embed(
    recorder: &mut Recorder,
    table: &GpuLinear,
    tokens: &Storage,
    rows: usize,
    scale: f32,
    out: &mut GpuBuffer,
) {
    out.output(rows, table.cols);
    for part in &table.parts {
        let parameters = with_shape::<5>(&part.shape, &[part.first as u32, scale.to_bits()]);
        let units = table.cols.div_ceil(32);
        let buffers = part.buffers.iter().chain([tokens, &out.storage]);
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
