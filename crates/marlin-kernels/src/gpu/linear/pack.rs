//! The input of linears, as their kernels have it.

use std::sync::Arc;

use super::few_rows::most_few_rows;
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
    /// In pairs of halves, a row sharing a power of two, padded with zeros to a multiple of [`PADDED`].
    Rows,
    /// As it is, one row with the weights of its norm, to be normalised and packed into units.
    Normed,
    /// As it is, in whole units, to be packed into units where they are multiplied.
    Direct,
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
            Self::Units | Self::Rows => vec![Binding::read("x", "vec4<u32>"), Binding::read("x_scales", "f32")],
            Self::Normed => vec![Binding::read("x", "vec4<f32>"), Binding::read("norm_weight", "vec4<f32>")],
            Self::Direct => vec![Binding::read("x", "vec4<f32>")],
        }
    }

    /// The functions by which a kernel reads it.
    pub(super) fn file(self) -> &'static str {
        match self {
            Self::None => include_str!("../shaders/input_exact.wgsl"),
            Self::Units => include_str!("../shaders/input_half.wgsl"),
            Self::Rows => include_str!("../shaders/input_rows.wgsl"),
            Self::Normed => include_str!("../shaders/input_normed.wgsl"),
            Self::Direct => include_str!("../shaders/input_direct.wgsl"),
        }
    }
}

/// The bindings of a kernel that packs its output with `pack_output.wgsl`.
pub(in crate::gpu) const PACKED_OUTPUT: [Binding; 2] =
    [Binding::write("packed_out", "vec4<u32>"), Binding::write("packed_out_scales", "f32")];

/// Where a linear's kernels find its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prepared {
    /// Where it was, with the weights of its norm if it has one: kernels pack it for themselves.
    Unpacked,
    /// In single precision, normalised if it must be.
    Exact,
    /// Packed beforehand.
    Packed,
    /// Packed by the linear whose output it is.
    Output,
}

/// Normalises and packs the input of linears.
#[expect(clippy::large_enum_variant, reason = "an encoder has one")]
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

/// Kernels that pack rows.
pub(super) struct PackKernels {
    units: ByInput,
    /// Where there are matrix units, for more rows than are few.
    rows: Option<ByInput>,
    few_rows: usize,
}

/// Of rows as they are, and of their norms; the second of each is for rows of whole vectors.
type ByInput = [[Arc<Pipeline>; 2]; 2];

/// Packed rows.
#[derive(Debug)]
pub(in crate::gpu) struct Packed {
    halves: Storage,
    scales: Storage,
    /// What they were made of.
    source: Option<Source>,
}

/// What an input was when it was packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Source {
    buffer: u64,
    version: u64,
    /// Weights and epsilon of its norm.
    norm: Option<(u64, u32)>,
}

/// Rows that are packed as they are.
pub(super) struct RowsToPack<'a> {
    pub(super) x: &'a Storage,
    pub(super) rows: usize,
    /// Stretches of a row that become rows of their own.
    pub(super) stretches: usize,
    /// Columns of a stretch that are packed, and how far apart stretches are.
    pub(super) width: usize,
    pub(super) stride: usize,
    /// For matrix units.
    pub(super) by_rows: bool,
}

/// Values of a vector that kernels load at once.
pub(in crate::gpu) const VECTOR: usize = 4;

impl Packer {
    /// Bytes of scratch memory.
    pub(super) fn bytes(gpu: &Gpu, limits: &StepLimits) -> usize {
        match gpu.arithmetic {
            GpuArithmetic::Exact => normed_bytes(limits),
            GpuArithmetic::Half => {
                let sizes = [limits.tokens, output_rows(gpu, limits)].map(|rows| Packed::sizes(rows, limits.width));
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
                output: Packed::new(gpu, output_rows(gpu, limits), limits.width)?,
            },
        })
    }

    /// Packs the rows of a group's input into memory of its own, if kernels want it packed.
    pub(super) fn pack_rows_of(&self, recorder: &mut Recorder, rows: &RowsToPack<'_>, packed: &Packed) {
        if let Self::Half { kernels, .. } = self {
            kernels.pack_rows_of(recorder, rows, None, packed);
        }
    }

    /// Packs stretches of rows, each as a row of its own, so many of each row. What was packed before is lost.
    pub(super) fn prepare_heads(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        rows: &RowsToPack<'_>,
    ) -> Result<Prepared, KernelError> {
        let Self::Half { kernels, packed, .. } = self else {
            return Ok(Prepared::Exact);
        };
        packed.source = None;
        let count = rows.rows * rows.stretches;
        if !packed.has_room_for(count, rows.width) {
            // Stretches are padded, each for itself; a model has the same ones in each step.
            *packed = Packed::new(gpu, count, rows.width)?;
        }
        kernels.pack_rows_of(recorder, rows, None, packed);
        Ok(Prepared::Packed)
    }

    /// Whether kernels want rows packed as those on matrix units do, if a step has so many.
    pub(super) fn packs_rows(&self, m: usize) -> bool {
        matches!(self, Self::Half { kernels, .. } if kernels.packs_rows(m))
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
                    let parameters = [columns(input) as u32, eps.to_bits(), x.width as u32];
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
            (_, Prepared::Unpacked, Input::Rows(x)) => [Some(&x.storage), None],
            (Self::Exact { normed, .. }, _, Input::Normed { .. }) => [Some(normed), None],
            (Self::Half { output, .. }, Prepared::Output, _) => output.buffers().map(Some),
            (Self::Half { packed, .. }, Prepared::Packed, _) => packed.buffers().map(Some),
            (_, _, input) => [Some(&rows(input).storage), None],
        };
        first.into_iter().chain(second)
    }

    /// Whether what linears pack of `out` has room: rows are few, and no wider than inputs.
    pub(super) fn has_room_for_output(&self, out: &GpuBuffer) -> bool {
        matches!(self, Self::Half { output, .. } if output.has_room_for(out.rows, out.width))
    }

    /// Where linears pack their output; nowhere if they do not.
    pub(super) fn output(&self) -> impl Iterator<Item = &Storage> + Clone {
        let output = match self {
            Self::Exact { .. } => None,
            Self::Half { output, .. } => Some(output),
        };
        output.into_iter().flat_map(Packed::buffers)
    }

    /// Where another operation packs what it is about to write.
    pub(super) fn pack_output(&mut self, out: &GpuBuffer) -> Option<[&Storage; 2]> {
        let Self::Half { kernels, packed, .. } = self else {
            return None;
        };
        let wants_units = kernels.rows.is_none() || out.rows <= kernels.few_rows;
        if !wants_units || !packed.has_room_for(out.rows, out.width) {
            return None;
        }
        packed.source = Some(Source::of(&Input::Rows(out)));
        Some(packed.buffers())
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

/// Columns of an input: a norm has as many as weights, and leaves the rest of a row out.
pub(super) fn columns(input: &Input<'_, GpuBackend>) -> usize {
    match input {
        Input::Rows(x) => x.width,
        Input::Normed { x, weight, .. } => {
            assert!(weight.values.len() <= x.width, "a row has a value for each weight");
            weight.values.len()
        }
    }
}

/// Rows of the outputs that linears pack.
fn output_rows(gpu: &Gpu, limits: &StepLimits) -> usize {
    if gpu.batch_invariant { limits.tokens } else { limits.tokens.min(most_few_rows(gpu)) }
}

fn normed_bytes(limits: &StepLimits) -> usize {
    limits.tokens.saturating_mul(limits.width).saturating_mul(size_of::<f32>())
}

impl PackKernels {
    fn new(gpu: &Gpu) -> Result<Self, KernelError> {
        let by_input = |kernel: &dyn Fn(bool, bool) -> Kernel| {
            let kernel = |is_normed, is_aligned| gpu.pipeline(&kernel(is_normed, is_aligned));
            Ok::<_, KernelError>([
                [kernel(false, false)?, kernel(false, true)?],
                [kernel(true, false)?, kernel(true, true)?],
            ])
        };
        Ok(Self {
            units: by_input(&pack_units_kernel)?,
            rows: gpu.matrices.map(|_| by_input(&pack_rows_kernel)).transpose()?,
            few_rows: most_few_rows(gpu),
        })
    }

    fn packs_rows(&self, m: usize) -> bool {
        self.rows.is_some() && m > self.few_rows
    }

    fn pack(&self, recorder: &mut Recorder, input: &Input<'_, GpuBackend>, packed: &Packed) {
        let &GpuBuffer { rows, width: stride, ref storage, .. } = rows(input);
        let norm = match input {
            Input::Rows(_) => None,
            Input::Normed { weight, eps, .. } => Some((&weight.storage, *eps)),
        };
        let by_rows = self.packs_rows(rows);
        let rows = RowsToPack { x: storage, rows, stretches: 1, width: columns(input), stride, by_rows };
        self.pack_rows_of(recorder, &rows, norm, packed);
    }

    fn pack_rows_of(
        &self,
        recorder: &mut Recorder,
        rows: &RowsToPack<'_>,
        norm: Option<(&Storage, f32)>,
        packed: &Packed,
    ) {
        let &RowsToPack { x, rows, stretches, width, stride, by_rows } = rows;
        let by_rows = self.rows.as_ref().filter(|_| by_rows);
        let of_row = match (by_rows, norm) {
            (None, None) => width.div_ceil(UNIT).div_ceil(PACK_UNITS),
            _ => 1,
        };
        let is_aligned = width.is_multiple_of(VECTOR) && stride.is_multiple_of(VECTOR);
        let kernel = &by_rows.unwrap_or(&self.units)[usize::from(norm.is_some())][usize::from(is_aligned)];
        let (weight, eps) = norm.unzip();
        let buffers = [x].into_iter().chain(weight).chain(packed.buffers());
        let parameters = [width as u32, eps.unwrap_or(0.0).to_bits(), stride as u32];
        recorder.dispatch(kernel, buffers, &parameters, [of_row, rows, stretches]);
    }
}

/// Units that a workgroup of `pack_input.wgsl` packs at once: a quarter of its invocations.
pub(super) const PACK_UNITS: usize = 32;

/// Turns of `pack_row.wgsl` that are loaded at once, at most: in each, 128 invocations take eight columns.
pub(super) const PACK_TURNS: usize = 4;

/// Columns that packed rows are padded to a multiple of.
pub(super) const PADDED: usize = 512;

/// The kernel that packs units of rows, or of their norms.
fn pack_units_kernel(is_normed: bool, is_aligned: bool) -> Kernel {
    let files = [include_str!("../shaders/pack_row.wgsl"), include_str!("../shaders/pack_input.wgsl")];
    pack_kernel("pack_input", is_normed, is_aligned, &files)
}

/// The kernel that packs whole rows, or their norms.
fn pack_rows_kernel(is_normed: bool, is_aligned: bool) -> Kernel {
    pack_kernel("pack_rows", is_normed, is_aligned, &[include_str!("../shaders/pack_rows.wgsl")])
}

fn pack_kernel(name: &'static str, is_normed: bool, is_aligned: bool, of_kernel: &[&'static str]) -> Kernel {
    let element = if is_aligned { "vec4<f32>" } else { "f32" };
    let mut bindings = vec![Binding::read("x", element)];
    if is_normed {
        bindings.push(Binding::read("norm_weight", element));
    }
    bindings.extend([Binding::write("packed", "vec4<u32>"), Binding::write("packed_scales", "f32")]);
    let mut files = vec![
        include_str!("../shaders/pack.wgsl"),
        include_str!("../shaders/reduce.wgsl"),
        include_str!("../shaders/norm.wgsl"),
    ];
    files.extend(of_kernel);
    let prelude = format!(
        "const NORMED = {is_normed};\nconst PADDED = {PADDED}u;\nconst TURNS = {PACK_TURNS}u;\n{}",
        four_functions(is_normed, is_aligned, "params.stride")
    );
    Kernel { name, prelude, bindings, files }
}

/// The functions by which `pack_row.wgsl` reads four columns of x, whose rows are `stride` apart, and multiplies them by the weights of a norm.
pub(in crate::gpu) fn four_functions(is_normed: bool, is_aligned: bool, stride: &str) -> String {
    let weighted = if is_normed {
        format!(
            "{}fn weighted(x: vec4<f32>, column: u32, k: u32) -> vec4<f32> {{ return x * norm_weight_four(0u, column, k); }}\n",
            four_function("norm_weight", is_aligned, "k")
        )
    } else {
        "fn weighted(x: vec4<f32>, column: u32, k: u32) -> vec4<f32> { return x; }\n".into()
    };
    four_function("x", is_aligned, stride) + &weighted
}

/// The function that reads four columns of a row of a buffer, 0 beyond the last of `k`.
pub(in crate::gpu) fn four_function(buffer: &str, is_aligned: bool, stride: &str) -> String {
    let body = if is_aligned {
        format!("if (column >= k) {{ return vec4<f32>(); }} return {buffer}[(row * {stride} + column) / 4u];")
    } else {
        let value = |i: usize| format!("{buffer}[row * {stride} + min(column + {i}u, k - 1u)]");
        format!(
            "return select(vec4<f32>(), vec4<f32>({}, {}, {}, {}), vec4<u32>(column) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(k));",
            value(0),
            value(1),
            value(2),
            value(3),
        )
    };
    format!("fn {buffer}_four(row: u32, column: u32, k: u32) -> vec4<f32> {{ {body} }}\n")
}

impl Packed {
    /// Bytes of halves and of scales, however rows are packed.
    fn sizes(rows: usize, width: usize) -> [usize; 2] {
        let units = (width.div_ceil(PADDED) * (PADDED / UNIT)).saturating_mul(rows);
        [2 * UNIT, size_of::<f32>()].map(|bytes| units.saturating_mul(bytes))
    }

    pub(in crate::gpu) fn new(gpu: &Gpu, rows: usize, width: usize) -> Result<Self, KernelError> {
        let [halves, scales] = Self::sizes(rows, width);
        let what = "the packed input of linears";
        Ok(Self { halves: gpu.storage(what, halves)?, scales: gpu.storage(what, scales)?, source: None })
    }

    fn has_room_for(&self, rows: usize, width: usize) -> bool {
        Self::sizes(rows, width)[0] as u64 <= self.halves.buffer.size()
    }

    /// Bytes that rows take.
    pub(in crate::gpu) fn bytes(rows: usize, width: usize) -> usize {
        Self::sizes(rows, width).into_iter().fold(0, usize::saturating_add)
    }

    /// Which memory it is.
    pub(super) fn id(&self) -> u64 {
        self.halves.id
    }

    pub(super) fn buffers(&self) -> [&Storage; 2] {
        [&self.halves, &self.scales]
    }
}

impl Source {
    pub(super) fn of(input: &Input<'_, GpuBackend>) -> Self {
        let norm = match input {
            Input::Rows(_) => None,
            Input::Normed { weight, eps, .. } => Some((weight.storage.id, eps.to_bits())),
        };
        let GpuBuffer { storage, version, .. } = rows(input);
        Self { buffer: storage.id, version: *version, norm }
    }
}
