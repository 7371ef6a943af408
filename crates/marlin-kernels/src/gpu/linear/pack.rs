//! The input of linears, as their kernels have it.

use std::sync::Arc;

use super::few_rows::FEW_ROWS;
use super::layout::UNIT;
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::pipeline::{Binding, Kernel, Pipeline};
use crate::gpu::recorder::Recorder;
use crate::gpu::{GpuArithmetic, GpuBackend, GpuBuffer};
use crate::{Input, KernelError, StepLimits};

/// How a linear's kernel has its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// As it is, in single precision.
    None,
    /// In pairs of halves, 32 columns sharing a power of two.
    Units,
    /// As it is, one row with the weights of its norm, to be normalised and packed into units.
    Normed,
}

impl Packing {
    pub(super) fn of(arithmetic: GpuArithmetic) -> Self {
        match arithmetic {
            GpuArithmetic::Exact => Self::None,
            GpuArithmetic::Half => Self::Units,
        }
    }

    /// The bindings of a linear's input.
    pub(super) fn bindings(self) -> Vec<Binding> {
        match self {
            Self::None => vec![Binding::read("x", "f32")],
            Self::Units => vec![Binding::read("x", "vec4<u32>"), Binding::read("x_scales", "f32")],
            Self::Normed => vec![Binding::read("x", "vec4<f32>"), Binding::read("norm_weight", "vec4<f32>")],
        }
    }

    /// The functions by which a kernel reads it.
    pub(super) fn file(self) -> &'static str {
        match self {
            Self::None => include_str!("../shaders/input_exact.wgsl"),
            Self::Units => include_str!("../shaders/input_half.wgsl"),
            Self::Normed => include_str!("../shaders/input_normed.wgsl"),
        }
    }
}

/// Where a linear's kernels find its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prepared {
    /// Where it was, with the weights of its norm: kernels pack it for themselves.
    Unpacked,
    /// In single precision, normalised if it must be.
    Exact,
    /// Packed beforehand.
    Packed,
    /// Packed by the linear whose output it is.
    Output,
}

/// Normalises and packs the input of linears.
pub(super) enum Packer {
    /// Inputs stay in single precision.
    Exact {
        rms_norm: Arc<Pipeline>,
        /// Normalised rows.
        normed: Storage,
    },
    /// Inputs become halves.
    Half {
        kernels: PackKernels,
        packed: Packed,
        /// What gated linears of few rows pack themselves, while they read `packed`.
        output: Packed,
    },
}

/// Kernels that pack rows; the second of each is for rows of whole vectors.
pub(super) struct PackKernels {
    plain: [Arc<Pipeline>; 2],
    normed: [Arc<Pipeline>; 2],
}

/// Packed rows.
pub(super) struct Packed {
    halves: Storage,
    scales: Storage,
    /// What they were made of.
    source: Option<Source>,
}

/// What an input was when it was packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Source {
    buffer: u64,
    version: u64,
    /// Weights and epsilon of its norm.
    norm: Option<(u64, u32)>,
}

/// Values of a vector that kernels load at once.
pub(super) const VECTOR: usize = 4;

impl Packer {
    /// Bytes of scratch memory.
    pub(super) fn bytes(limits: &StepLimits, arithmetic: GpuArithmetic) -> usize {
        match arithmetic {
            GpuArithmetic::Exact => normed_bytes(limits),
            GpuArithmetic::Half => {
                let sizes = [limits.tokens, output_rows(limits)].map(|rows| Packed::sizes(rows, limits.width));
                sizes.as_flattened().iter().sum()
            }
        }
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        Ok(match gpu.arithmetic {
            GpuArithmetic::Exact => Self::Exact {
                rms_norm: gpu.pipeline(&Kernel::rms_norm(false))?,
                normed: gpu.storage("the normalised input of linears", normed_bytes(limits))?,
            },
            GpuArithmetic::Half => Self::Half {
                kernels: PackKernels::new(gpu)?,
                packed: Packed::new(gpu, limits.tokens, limits.width)?,
                output: Packed::new(gpu, output_rows(limits), limits.width)?,
            },
        })
    }

    /// Prepares the input of a linear, which may pack its output.
    pub(super) fn prepare(
        &mut self,
        recorder: &mut Recorder,
        input: &Input<'_, GpuBackend>,
        packs_output: bool,
    ) -> Prepared {
        match self {
            Self::Exact { rms_norm, normed } => {
                if let Input::Normed { x, weight, eps } = input {
                    let parameters = [x.width as u32, eps.to_bits()];
                    recorder.dispatch(rms_norm, [&x.storage, &weight.storage, normed], &parameters, [x.rows, 1, 1]);
                }
                Prepared::Exact
            }
            Self::Half { kernels, packed, output } => {
                let source = Some(Source::of(input));
                if output.source == source && !packs_output {
                    return Prepared::Output;
                }
                if packed.source != source {
                    kernels.pack(recorder, input, packed);
                    packed.source = source;
                }
                Prepared::Packed
            }
        }
    }

    /// The buffers of a prepared input.
    pub(super) fn input<'a>(
        &'a self,
        prepared: Prepared,
        input: &Input<'a, GpuBackend>,
    ) -> impl Iterator<Item = &'a Storage> + Clone {
        let [first, second] = match (self, prepared, input) {
            (_, Prepared::Unpacked, Input::Normed { x, weight, .. }) => [Some(&x.storage), Some(&weight.storage)],
            (Self::Exact { normed, .. }, _, Input::Normed { .. }) => [Some(normed), None],
            (Self::Half { output, .. }, Prepared::Output, _) => output.buffers().map(Some),
            (Self::Half { packed, .. }, Prepared::Packed, _) => packed.buffers().map(Some),
            (_, _, input) => [Some(&rows(input).storage), None],
        };
        first.into_iter().chain(second)
    }

    /// Where linears pack their output; nowhere if they do not.
    pub(super) fn output(&self) -> impl Iterator<Item = &Storage> + Clone {
        let output = match self {
            Self::Exact { .. } => None,
            Self::Half { output, .. } => Some(output),
        };
        output.into_iter().flat_map(Packed::buffers)
    }

    /// A linear has packed its output.
    pub(super) fn output_is_packed(&mut self, out: &GpuBuffer) {
        if let Self::Half { output, .. } = self {
            output.source = Some(Source::of(&Input::Rows(out)));
        }
    }
}

/// The rows of an input, before a norm.
pub(super) fn rows<'a>(input: &Input<'a, GpuBackend>) -> &'a GpuBuffer {
    let (Input::Rows(x) | Input::Normed { x, .. }) = *input;
    x
}

/// Rows of the outputs that linears pack.
fn output_rows(limits: &StepLimits) -> usize {
    limits.tokens.min(FEW_ROWS)
}

fn normed_bytes(limits: &StepLimits) -> usize {
    limits.tokens.saturating_mul(limits.width).saturating_mul(size_of::<f32>())
}

impl PackKernels {
    fn new(gpu: &Gpu) -> Result<Self, KernelError> {
        let kernel = |is_normed, is_aligned| gpu.pipeline(&pack_kernel(is_normed, is_aligned));
        Ok(Self {
            plain: [kernel(false, false)?, kernel(false, true)?],
            normed: [kernel(true, false)?, kernel(true, true)?],
        })
    }

    fn pack(&self, recorder: &mut Recorder, input: &Input<'_, GpuBackend>, packed: &Packed) {
        let is_aligned = usize::from(rows(input).width.is_multiple_of(VECTOR));
        let to = packed.buffers();
        match input {
            Input::Rows(x) => {
                let workgroups = x.width.div_ceil(UNIT).div_ceil(PACK_UNITS);
                let buffers = [&x.storage].into_iter().chain(to);
                recorder.dispatch(&self.plain[is_aligned], buffers, &[x.width as u32, 0], [workgroups, x.rows, 1]);
            }
            Input::Normed { x, weight, eps } => {
                let buffers = [&x.storage, &weight.storage].into_iter().chain(to);
                let parameters = [x.width as u32, eps.to_bits()];
                recorder.dispatch(&self.normed[is_aligned], buffers, &parameters, [1, x.rows, 1]);
            }
        }
    }
}

/// Units that a workgroup of `pack_input.wgsl` packs at once: a quarter of its invocations.
const PACK_UNITS: usize = 32;

/// The kernel that packs rows, or their norms.
fn pack_kernel(is_normed: bool, is_aligned: bool) -> Kernel {
    let element = if is_aligned { "vec4<f32>" } else { "f32" };
    let mut bindings = vec![Binding::read("x", element)];
    if is_normed {
        bindings.push(Binding::read("norm_weight", element));
    }
    bindings.extend([Binding::write("packed", "vec4<u32>"), Binding::write("packed_scales", "f32")]);
    Kernel {
        name: "pack_input",
        prelude: format!("const NORMED = {is_normed};\n{}", four_functions(is_normed, is_aligned)),
        bindings,
        files: vec![
            include_str!("../shaders/pack.wgsl"),
            include_str!("../shaders/pack_row.wgsl"),
            include_str!("../shaders/reduce.wgsl"),
            include_str!("../shaders/norm.wgsl"),
            include_str!("../shaders/pack_input.wgsl"),
        ],
    }
}

/// The functions by which `pack_row.wgsl` reads four columns of x, and multiplies them by the weights of a norm.
pub(super) fn four_functions(is_normed: bool, is_aligned: bool) -> String {
    let four = |buffer: &str, start: &str| {
        if is_aligned {
            return format!("if (column >= k) {{ return vec4<f32>(); }} return {buffer}[({start} + column) / 4u];");
        }
        let value = |i: usize| format!("{buffer}[{start} + min(column + {i}u, k - 1u)]");
        format!(
            "return select(vec4<f32>(), vec4<f32>({}, {}, {}, {}), vec4<u32>(column) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(k));",
            value(0),
            value(1),
            value(2),
            value(3),
        )
    };
    let weighted = if is_normed {
        format!(
            "fn weight_four(column: u32, k: u32) -> vec4<f32> {{ {} }}\n\
             fn weighted(x: vec4<f32>, column: u32, k: u32) -> vec4<f32> {{ return x * weight_four(column, k); }}\n",
            four("norm_weight", "0u")
        )
    } else {
        "fn weighted(x: vec4<f32>, column: u32, k: u32) -> vec4<f32> { return x; }\n".into()
    };
    format!("fn x_four(row: u32, column: u32, k: u32) -> vec4<f32> {{ {} }}\n{weighted}", four("x", "row * k"))
}

impl Packed {
    /// Bytes of halves and of scales.
    fn sizes(rows: usize, width: usize) -> [usize; 2] {
        let units = width.div_ceil(UNIT).saturating_mul(rows);
        [2 * UNIT, size_of::<f32>()].map(|bytes| units.saturating_mul(bytes))
    }

    fn new(gpu: &Gpu, rows: usize, width: usize) -> Result<Self, KernelError> {
        let [halves, scales] = Self::sizes(rows, width);
        let what = "the packed input of linears";
        Ok(Self { halves: gpu.storage(what, halves)?, scales: gpu.storage(what, scales)?, source: None })
    }

    fn buffers(&self) -> [&Storage; 2] {
        [&self.halves, &self.scales]
    }
}

impl Source {
    fn of(input: &Input<'_, GpuBackend>) -> Self {
        let norm = match input {
            Input::Rows(_) => None,
            Input::Normed { weight, eps, .. } => Some((weight.storage.id, eps.to_bits())),
        };
        let GpuBuffer { storage, version, .. } = rows(input);
        Self { buffer: storage.id, version: *version, norm }
    }
}
