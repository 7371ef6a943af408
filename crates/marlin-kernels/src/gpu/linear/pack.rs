//! The input of linears in half precision.

use std::sync::Arc;

use super::ROW_BLOCKS;
use crate::gpu::GpuArithmetic;
use crate::gpu::GpuBuffer;
use crate::gpu::device::{Gpu, Matrices, Storage};
use crate::gpu::pipeline::{Binding, Kernel, Pipeline};
use crate::gpu::recorder::Recorder;
use crate::{KernelError, StepLimits};

/// Columns that packed rows are padded to a multiple of, with zeros.
pub(super) const PADDED: usize = 512;

/// How a linear's kernel has its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// As it is, in single precision.
    None,
    /// In pairs of halves, 32 columns sharing a power of two.
    Units,
    /// In pairs of halves, a row sharing a power of two.
    Rows,
}

impl Packing {
    /// That of `m` rows.
    pub(super) fn of(arithmetic: GpuArithmetic, matrices: Option<Matrices>, m: usize) -> Self {
        let is_few = ROW_BLOCKS.last().is_some_and(|few| m <= *few);
        match (arithmetic, matrices) {
            (GpuArithmetic::Exact, _) => Self::None,
            (GpuArithmetic::Half, Some(_)) if !is_few => Self::Rows,
            (GpuArithmetic::Half, _) => Self::Units,
        }
    }

    /// The bindings of a linear's input.
    pub(super) fn bindings(self) -> Vec<Binding> {
        match self {
            Self::None => vec![Binding::read("x", "f32")],
            Self::Units => vec![Binding::read("x", "vec4<u32>"), Binding::read("x_scales", "f32")],
            Self::Rows => vec![Binding::read("x", "Octet"), Binding::read("x_scales", "f32")],
        }
    }
}

/// Packs the input of linears, and keeps it until the next is packed.
pub(super) struct Packer {
    arithmetic: GpuArithmetic,
    matrices: Option<Matrices>,
    units: Arc<Pipeline>,
    rows: Arc<Pipeline>,
    halves: Storage,
    scales: Storage,
}

impl Packer {
    /// Bytes of scratch memory.
    pub(super) fn bytes(limits: &StepLimits, arithmetic: GpuArithmetic) -> usize {
        Self::sizes(limits, arithmetic).iter().sum()
    }

    /// Bytes of halves and of scales.
    fn sizes(limits: &StepLimits, arithmetic: GpuArithmetic) -> [usize; 2] {
        if arithmetic == GpuArithmetic::Exact {
            return [0, 0];
        }
        let padded = limits.width.div_ceil(PADDED) * PADDED;
        let units = limits.width.div_ceil(32);
        [2 * padded, 4 * units].map(|bytes| bytes.saturating_mul(limits.tokens))
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let kernel = |name, prelude: String, file| {
            let bindings = vec![
                Binding::read("x", "f32"),
                Binding::write("packed", "vec4<u32>"),
                Binding::write("packed_scales", "f32"),
            ];
            let files = vec![include_str!("../shaders/pack.wgsl"), file];
            gpu.pipeline(&Kernel { name, prelude, bindings, files })
        };
        let [halves, scales] = Self::sizes(limits, gpu.arithmetic);
        let what = "the packed input of linears";
        Ok(Self {
            arithmetic: gpu.arithmetic,
            matrices: gpu.matrices,
            units: kernel("pack_input", String::new(), include_str!("../shaders/pack_input.wgsl"))?,
            rows: kernel(
                "pack_rows",
                format!("const PADDED = {PADDED}u;\n"),
                include_str!("../shaders/pack_rows.wgsl"),
            )?,
            halves: gpu.storage(what, halves)?,
            scales: gpu.storage(what, scales)?,
        })
    }

    /// Packs the input of linears as their kernels for so many rows want it.
    pub(super) fn pack(&self, recorder: &mut Recorder, x: &GpuBuffer) {
        let (kernel, workgroups) = match self.packing(x.rows) {
            Packing::None => return,
            Packing::Units => (&self.units, [x.width.div_ceil(32).div_ceil(64), x.rows, 1]),
            Packing::Rows => (&self.rows, [x.rows, 1, 1]),
        };
        recorder.dispatch(kernel, [&x.storage, &self.halves, &self.scales], &[x.width as u32], workgroups);
    }

    /// The buffers of a linear's input, after it was packed.
    pub(super) fn input<'a>(&'a self, x: &'a GpuBuffer) -> impl Iterator<Item = &'a Storage> + Clone {
        let [first, second] = match self.packing(x.rows) {
            Packing::None => [Some(&x.storage), None],
            Packing::Units | Packing::Rows => [Some(&self.halves), Some(&self.scales)],
        };
        first.into_iter().chain(second)
    }

    fn packing(&self, m: usize) -> Packing {
        Packing::of(self.arithmetic, self.matrices, m)
    }
}
