//! Records linears, and prepares their input.

use super::pack::{Packer, Prepared, Source, columns, rows};
use super::{GpuLinear, LinearKernels, Part, Shape};
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::recorder::Recorder;
use crate::gpu::{GpuBackend, GpuBuffer};
use crate::{Activation, Input, KernelError, StepLimits};

/// What becomes of a linear's sums; numbered as in `epilogue.wgsl`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Epilogue {
    Store,
    Add,
    /// The activation of the output so far, times the sum.
    GateSilu,
    GateGeluTanh,
    GateClampedSwiglu,
}

impl Epilogue {
    pub(super) fn gate(activation: Activation) -> Self {
        match activation {
            Activation::Silu => Self::GateSilu,
            Activation::GeluTanh => Self::GateGeluTanh,
            Activation::ClampedSwiglu => Self::GateClampedSwiglu,
        }
    }
}

/// Records linears.
pub(in crate::gpu) struct LinearEncoder {
    pub(super) packer: Packer,
    /// Rows in the order of a linear's columns; made for the first linear that has an order of its own.
    ordered: Option<GpuBuffer>,
    /// Values that the input of a linear has at most.
    most_values: usize,
    /// The memory of routes in which rows of experts are packed, and what they were made of.
    pub(super) packed_experts: Option<(u64, Source)>,
}

impl LinearEncoder {
    pub(in crate::gpu) fn bytes(gpu: &Gpu, limits: &StepLimits) -> usize {
        Packer::bytes(gpu, limits)
    }

    pub(in crate::gpu) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let most_values = limits.tokens.saturating_mul(limits.width);
        Ok(Self { packer: Packer::new(gpu, limits)?, ordered: None, most_values, packed_experts: None })
    }

    pub(in crate::gpu) fn store(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        x: Input<'_, GpuBackend>,
        linear: &GpuLinear,
        out: &mut GpuBuffer,
    ) {
        out.output(rows(&x).rows, linear.outputs());
        self.run(gpu, recorder, &x, linear, out, |part| (&part.kernels.plain, Epilogue::Store, part.first));
    }

    pub(in crate::gpu) fn add(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        x: Input<'_, GpuBackend>,
        linear: &GpuLinear,
        out: &mut GpuBuffer,
    ) {
        out.written();
        assert_eq!(
            (out.rows, out.width),
            (rows(&x).rows, linear.outputs()),
            "the residual stream has a value for each output"
        );
        self.run(gpu, recorder, &x, linear, out, |part| (&part.kernels.plain, Epilogue::Add, part.first));
    }

    pub(in crate::gpu) fn gated(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        x: Input<'_, GpuBackend>,
        gate_up: &GpuLinear,
        activation: Activation,
        out: &mut GpuBuffer,
    ) {
        assert!(matches!(gate_up.rows[..], [gate, up] if gate == up), "a gate and as large a matrix");
        let half = gate_up.outputs() / 2;
        out.output(rows(&x).rows, half);
        let gate = Epilogue::gate(activation);
        self.run(gpu, recorder, &x, gate_up, out, |part| match (&part.kernels.gated, part.matrix) {
            (Some(kernels), _) => (kernels, gate, part.first),
            (None, 0) => (&part.kernels.plain, Epilogue::Store, part.first),
            (None, _) => (&part.kernels.plain, gate, part.first - half),
        });
    }

    /// Looks up rows of a table for `rows` tokens, some of which may be rows of the last sampling.
    #[expect(clippy::too_many_arguments, reason = "what a lookup reads and writes, and where it is recorded")]
    pub(in crate::gpu) fn embed(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        table: &GpuLinear,
        tokens: [&Storage; 2],
        rows: usize,
        scale: f32,
        out: &mut GpuBuffer,
    ) {
        let Some(columns) = &table.columns else {
            return embed_parts(recorder, table, tokens, rows, scale, out);
        };
        if let Some(mut ordered) = self.take_ordered(gpu, table.cols) {
            embed_parts(recorder, table, tokens, rows, scale, &mut ordered);
            columns.put_back(recorder, &ordered, out);
            self.ordered = Some(ordered);
        }
    }

    /// Where an operation packs `out`, which it is about to write, for the linear that takes it: with `pack_output.wgsl`.
    pub(in crate::gpu) fn pack_output(&mut self, out: &GpuBuffer) -> Option<[&Storage; 2]> {
        self.packer.pack_output(out)
    }

    /// Runs the parts of a linear, each with the kernels, the epilogue and the first output that `of_part` gives.
    fn run<'a>(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        x: &Input<'_, GpuBackend>,
        linear: &'a GpuLinear,
        out: &GpuBuffer,
        of_part: impl Fn(&'a Part) -> (&'a LinearKernels, Epilogue, usize),
    ) {
        assert_eq!(columns(x), linear.cols, "an input of the linear's columns");
        if out.rows == 0 {
            return;
        }
        let Some(columns) = &linear.columns else {
            return self.run_parts(recorder, x, linear, out, of_part);
        };
        if let Some(mut ordered) = self.take_ordered(gpu, linear.cols) {
            columns.put_in_order(recorder, x, &mut ordered);
            self.run_parts(recorder, &Input::Rows(&ordered), linear, out, of_part);
            self.ordered = Some(ordered);
        }
    }

    /// Memory for rows of so many columns, until it is given back. Without any the step fails.
    fn take_ordered(&mut self, gpu: &Gpu, cols: usize) -> Option<GpuBuffer> {
        let what = "the input of linears in the order of their columns";
        let made = match self.ordered.take() {
            Some(ordered) => Ok(ordered),
            None => gpu.storage(what, self.most_values.saturating_mul(size_of::<f32>())).map(|storage| GpuBuffer {
                storage,
                rows: 0,
                width: 0,
                capacity: 0,
                version: 0,
            }),
        };
        let ordered = made.map(|ordered| GpuBuffer { width: cols, capacity: self.most_values / cols, ..ordered });
        ordered.inspect_err(|error| gpu.fail(error)).ok()
    }

    /// Runs the parts of a linear on an input in the order of its columns.
    fn run_parts<'a>(
        &mut self,
        recorder: &mut Recorder,
        x: &Input<'_, GpuBackend>,
        linear: &'a GpuLinear,
        out: &GpuBuffer,
        of_part: impl Fn(&'a Part) -> (&'a LinearKernels, Epilogue, usize),
    ) {
        let m = out.rows;
        let eps = match x {
            Input::Rows(_) => 0.0,
            Input::Normed { eps, .. } => *eps,
        };
        let normalises = |part: &'a Part| of_part(part).0.few_rows.normalises(m);
        let prepared = match x {
            Input::Normed { .. } if linear.parts.iter().all(normalises) => Prepared::Unpacked,
            _ => {
                let packs_output = linear.parts.iter().any(|part| of_part(part).0.packs_output(m));
                self.packer.prepare(recorder, x, packs_output)
            }
        };
        for part in &linear.parts {
            let (kernels, epilogue, first) = of_part(part);
            let (kernel, workgroups) = kernels.choose(m, prepared);
            let packs_output = kernels.packs_output(m);
            let output = self.packer.output().filter(|_| packs_output);
            let buffers = part.buffers.iter().chain(self.packer.input(prepared, x)).chain([&out.storage]).chain(output);
            let of_step = [m as u32, first as u32, out.width as u32, epilogue as u32, eps.to_bits()];
            recorder.dispatch(kernel, buffers, &with_shape::<8>(&part.shape, &of_step), workgroups);
            if packs_output {
                self.packer.output_is_packed(out);
            }
        }
    }
}

/// Looks up rows of a table in the order of its columns.
fn embed_parts(
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
pub(super) fn with_shape<const N: usize>(shape: &Shape, rest: &[u32]) -> [u32; N] {
    let shape: [u32; 3] = bytemuck::cast(*shape);
    let mut words = [0; N];
    let (first, last) = words.split_at_mut(shape.len());
    first.copy_from_slice(&shape);
    last.copy_from_slice(rest);
    words
}
