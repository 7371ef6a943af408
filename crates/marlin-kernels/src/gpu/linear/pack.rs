//! The input of linears, as their kernels have it.

use std::sync::Arc;

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
        }
    }
}

/// Normalises and packs the input of linears.
pub(super) enum Packer {
    /// Inputs stay in single precision.
    Exact {
        rms_norm: Arc<Pipeline>,
        /// Normalised rows.
        normed: Storage,
    },
    Half {
        kernels: PackKernels,
        packed: Packed,
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
const VECTOR: usize = 4;

impl Packer {
    /// Bytes of scratch memory.
    pub(super) fn bytes(limits: &StepLimits, arithmetic: GpuArithmetic) -> usize {
        match arithmetic {
            GpuArithmetic::Exact => normed_bytes(limits),
            GpuArithmetic::Half => Packed::sizes(limits.tokens, limits.width).iter().sum(),
        }
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        Ok(match gpu.arithmetic {
            GpuArithmetic::Exact => Self::Exact {
                rms_norm: gpu.pipeline(&Kernel::rms_norm(false))?,
                normed: gpu.storage("the normalised input of linears", normed_bytes(limits))?,
            },
            GpuArithmetic::Half => {
                Self::Half { kernels: PackKernels::new(gpu)?, packed: Packed::new(gpu, limits.tokens, limits.width)? }
            }
        })
    }

    /// Prepares the input of a linear for [`Packer::buffers`].
    pub(super) fn prepare(&mut self, recorder: &mut Recorder, input: &Input<'_, GpuBackend>) {
        match (self, input) {
            (Self::Exact { .. }, Input::Rows(_)) => {}
            (Self::Exact { rms_norm, normed }, Input::Normed { x, weight, eps }) => {
                let parameters = [x.width as u32, eps.to_bits()];
                recorder.dispatch(rms_norm, [&x.storage, &weight.storage, normed], &parameters, [x.rows, 1, 1]);
            }
            (Self::Half { kernels, packed }, input) => {
                let source = Some(Source::of(input));
                if packed.source != source {
                    kernels.pack(recorder, input, packed);
                    packed.source = source;
                }
            }
        }
    }

    /// The buffers of a linear's input, after it was prepared.
    pub(super) fn buffers<'a>(&'a self, input: &Input<'a, GpuBackend>) -> impl Iterator<Item = &'a Storage> + Clone {
        let [first, second] = match (self, input) {
            (Self::Exact { .. }, Input::Rows(x)) => [Some(&x.storage), None],
            (Self::Exact { normed, .. }, Input::Normed { .. }) => [Some(normed), None],
            (Self::Half { packed, .. }, _) => [Some(&packed.halves), Some(&packed.scales)],
        };
        first.into_iter().chain(second)
    }
}

/// The rows of an input, before a norm.
pub(super) fn rows<'a>(input: &Input<'a, GpuBackend>) -> &'a GpuBuffer {
    let (Input::Rows(x) | Input::Normed { x, .. }) = *input;
    x
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
        let to = [&packed.halves, &packed.scales];
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
fn four_functions(is_normed: bool, is_aligned: bool) -> String {
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
