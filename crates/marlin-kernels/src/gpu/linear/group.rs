//! Linears of equal shape that rows are divided among: their matrices side by side in the same buffers.

use std::sync::Arc;

use marlin_format::Scheme;

use super::few_rows::{SUM_OF_NO_LANES, block_of, most_rows_at_once, sums_subgroups};
use super::format::DeviceFormat;
use super::layout::{QUAD, UNIT};
use super::many_rows::heights;
use super::pack::Packing;
use super::{GpuLinear, LinearKernels, MATRIX_OF_GROUP, Part, Place, Shape, weights};
use crate::KernelError;
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::pipeline::{Binding, Kernel, Pipeline};
use crate::gpu::upload::Upload;

/// Linears of equal shape, each with a number.
#[derive(Debug)]
pub struct GpuLinearGroup {
    pub(super) parts: Vec<GroupPart>,
    pub(super) cols: usize,
    /// Rows of each matrix of a linear.
    pub(super) rows: Vec<usize>,
    /// Linears.
    pub(super) count: usize,
}

/// Parts of linears whose format and place within their linear are the same, no more than the device can bind.
#[derive(Debug)]
pub(super) struct GroupPart {
    /// Of one of them.
    pub(super) shape: Shape,
    /// The first matrix of a linear that it has rows of.
    pub(super) matrix: usize,
    /// The first row, counted over all matrices of a linear.
    pub(super) first: usize,
    /// As those of a [`Part`], of one linear after the other.
    pub(super) buffers: Vec<Storage>,
    /// The place of each linear among them, or [`NOWHERE`].
    pub(super) places: Storage,
    /// All linears are here, in their order.
    pub(super) is_whole: bool,
    pub(super) kernels: GroupKernels,
}

/// The place of a linear that is in another part; as in `matrix_of_group.wgsl`.
const NOWHERE: u32 = u32::MAX;

/// The kernels of a part.
#[derive(Debug)]
pub(super) struct GroupKernels {
    pub(super) linear: LinearKernels,
    /// They are of a gate and as large a matrix.
    pub(super) is_gated: bool,
    /// The sum over a token's experts, of linears of one matrix.
    pub(super) sum: Option<(Arc<Pipeline>, usize)>,
}

/// What parts of linears have in common that go into one part of a group.
#[derive(PartialEq)]
struct Kind<'a> {
    format: &'a DeviceFormat,
    shape: Shape,
    matrix: usize,
    first: usize,
    is_gated: bool,
}

impl<'a> Kind<'a> {
    fn of(part: &'a Part) -> Self {
        let &Part { ref format, shape, matrix, first, ref kernels, .. } = part;
        Self { format, shape, matrix, first, is_gated: kernels.gated.is_some() }
    }
}

impl GpuLinearGroup {
    /// Copies linears, which need not be loaded any more, into the group's own memory.
    pub(in crate::gpu) fn new(gpu: &Gpu, linears: &[GpuLinear]) -> Result<Self, KernelError> {
        let Some(first) = linears.first() else {
            return Err(KernelError::Device("a group needs at least one linear, found none".into()));
        };
        if linears.iter().any(|linear| linear.columns.is_some()) {
            return Err(KernelError::OrderedGroup);
        }
        for (number, linear) in linears.iter().enumerate() {
            if (linear.cols, &linear.rows) != (first.cols, &first.rows) {
                return Err(KernelError::Device(format!(
                    "linears of a group have the same shape; the first has matrices of {:?} rows and {} columns, number {number} of {:?} rows and {} columns",
                    first.rows, first.cols, linear.rows, linear.cols
                )));
            }
        }
        let mut kinds: Vec<(Kind<'_>, Vec<(usize, &Part)>)> = Vec::new();
        for (number, part) in
            linears.iter().enumerate().flat_map(|(i, linear)| linear.parts.iter().map(move |part| (i, part)))
        {
            let kind = Kind::of(part);
            match kinds.iter_mut().find(|(other, _)| *other == kind) {
                Some((_, parts)) => parts.push((number, part)),
                None => kinds.push((kind, vec![(number, part)])),
            }
        }
        // A gate comes before what it gates.
        kinds.sort_by_key(|(kind, _)| (kind.matrix, kind.first));
        let mut parts = Vec::new();
        for (kind, of_kind) in &kinds {
            let largest = kind.format.buffer_bytes(&kind.shape).into_iter().max().unwrap_or(0).max(1);
            let most = usize::try_from(gpu.caps.max_binding).unwrap_or(usize::MAX) / largest;
            for of_kind in of_kind.chunks(most.max(1)) {
                parts.push(GroupPart::new(gpu, kind, of_kind, linears.len(), first.rows.len() == 1)?);
            }
        }
        // What was copied is given back when its copies have run.
        gpu.wait()?;
        Ok(Self { parts, cols: first.cols, rows: first.rows.clone(), count: linears.len() })
    }

    /// Bytes of the largest buffer of each part.
    #[cfg(test)]
    pub(in crate::gpu) fn part_sizes(&self) -> Vec<u64> {
        let largest = |part: &GroupPart| part.buffers.iter().map(|buffer| buffer.buffer.size()).max().unwrap_or(0);
        self.parts.iter().map(largest).collect()
    }

    /// All rows of a linear.
    pub(super) fn outputs(&self) -> usize {
        self.rows.iter().sum()
    }
}

impl GroupPart {
    fn new(
        gpu: &Gpu,
        kind: &Kind<'_>,
        parts: &[(usize, &Part)],
        count: usize,
        is_single: bool,
    ) -> Result<Self, KernelError> {
        let &Kind { format, shape, matrix, first, is_gated } = kind;
        let mut commands = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut buffers = Vec::new();
        for (index, bytes) in format.buffer_bytes(&shape).into_iter().enumerate() {
            let joint = gpu.weight_storage("the weights of a group of linears", parts.len() * bytes, false)?;
            for (place, (_, part)) in parts.iter().enumerate() {
                let (from, at) = (&part.buffers[index].buffer, (place * bytes) as u64);
                commands.copy_buffer_to_buffer(from, 0, &joint.buffer, at, bytes as u64);
            }
            buffers.push(joint);
        }
        gpu.queue.submit([commands.finish()]);
        let mut places = vec![NOWHERE; count];
        (0..).zip(parts).for_each(|(place, &(number, _))| places[number] = place);
        Ok(Self {
            shape,
            matrix,
            first,
            buffers,
            is_whole: (0..).zip(&places).all(|(number, &place)| number == place),
            places: Upload::all(gpu, "the places of linears", &places)?,
            kernels: GroupKernels::new(gpu, format, &shape, count, is_gated, is_single)?,
        })
    }
}

impl GroupKernels {
    fn new(
        gpu: &Gpu,
        format: &DeviceFormat,
        shape: &Shape,
        count: usize,
        is_gated: bool,
        is_single: bool,
    ) -> Result<Self, KernelError> {
        let (cols, rows) = (shape.k as usize, shape.rows as usize);
        let outputs = if is_gated { rows / 2 } else { rows };
        let sum = || {
            let tile @ SumTile { lanes, quads } = SumTile::of(cols);
            let kernel = sum_kernel(format, tile, sums_subgroups(gpu, format, lanes));
            Ok::<_, KernelError>((gpu.pipeline(&kernel)?, rows.div_ceil(QUAD * quads)))
        };
        Ok(Self {
            linear: LinearKernels::new(gpu, format, Place::Group(count), cols, outputs, is_gated)?,
            is_gated,
            sum: is_single.then(sum).transpose()?,
        })
    }

    /// The kernel for tiles of so many rows, and workgroups that share the outputs.
    pub(super) fn of_height(&self, height: usize, prepared: super::Prepared) -> (&Arc<Pipeline>, usize) {
        match self.linear.few_rows.choose(height, prepared) {
            Some((kernel, [workgroups, ..])) => (kernel, workgroups),
            None => self.linear.many_rows.of_height(height),
        }
    }
}

/// Rows that a workgroup takes of an expert in a step of so many tokens, each with so many of `experts`.
///
/// As many as an expert may have while those are few, so that each weight is read once. Of more tokens, tiles fit what an expert has on average, or
/// twice of that: unpacking weights twice costs more than multiplying rows that are not there.
pub(in crate::gpu) fn step_height(gpu: &Gpu, tokens: usize, slots: usize, experts: usize) -> usize {
    let few = most_rows_at_once(gpu);
    if tokens <= few || gpu.batch_invariant {
        return block_of(gpu, tokens);
    }
    let average = tokens * slots / experts.max(1);
    let wanted = match average {
        _ if tokens <= 16 => 16,
        0..=16 => 32,
        17..=80 => 64,
        _ => 128,
    };
    // Without matrix units larger tiles are slow, and packing does not differ.
    if gpu.matrices.is_none() && average <= few {
        return few;
    }
    heights(gpu).find(|height| *height >= wanted).or_else(|| heights(gpu).last()).unwrap_or(few)
}

/// Compiles the kernels of groups of linears of `[rows, cols]` in a scheme: of one matrix, and of two that go together or do not.
pub(in crate::gpu) fn compile(gpu: &Gpu, scheme: &Scheme, rows: usize, cols: usize) -> Result<(), KernelError> {
    /// Linears of a group, which kernels have room for when they choose among them.
    const COUNT: usize = 128;
    let groups = scheme.groups_per_row(cols) as u32;
    for format in DeviceFormat::all_of(scheme, gpu.arithmetic) {
        for (rows, is_gated) in [(rows, false), (2 * rows, true)] {
            let shape = Shape { k: cols as u32, rows: rows as u32, groups };
            GroupKernels::new(gpu, &format, &shape, COUNT, is_gated, !is_gated)?;
        }
    }
    Ok(())
}

/// A workgroup that sums over the experts of one token: lanes that share a quad of rows of each expert, and quads.
#[derive(Debug, Clone, Copy)]
struct SumTile {
    lanes: usize,
    quads: usize,
}

impl SumTile {
    /// Slots that are summed up at once.
    const SPLITS: usize = 8;

    /// Short rows keep fewer lanes busy.
    fn of(cols: usize) -> Self {
        match cols.div_ceil(UNIT) {
            0..=16 => Self { lanes: 8, quads: 4 },
            _ => Self { lanes: 32, quads: 1 },
        }
    }
}

/// The kernel that sums over the experts of one token.
fn sum_kernel(format: &DeviceFormat, SumTile { lanes, quads }: SumTile, sums_subgroups: bool) -> Kernel {
    let packing = Packing::of(format.arithmetic);
    let splits = SumTile::SPLITS;
    let parts = if sums_subgroups { splits } else { splits * lanes };
    let mut prelude = format!(
        "{}const LANES = {lanes}u;\nconst QUADS = {quads}u;\nconst SPLITS = {splits}u;\nconst PARTS = {parts}u;\n\
         const ROWS_AT_ONCE = 1u;\nconst MATRICES = 1u;\n",
        format.module()
    );
    let mut bindings = format.bindings();
    bindings.extend(packing.bindings());
    bindings.extend([
        Binding::write("out", "f32"),
        Binding::read("experts", "u32"),
        Binding::read("weights", "f32"),
        Binding::read("matrices", "u32"),
    ]);
    let mut files = weights(format);
    files.extend([MATRIX_OF_GROUP, packing.file(), include_str!("../shaders/linear_sums.wgsl")]);
    if sums_subgroups {
        files.push(include_str!("../shaders/lanes_subgroup.wgsl"));
    } else {
        prelude += SUM_OF_NO_LANES;
    }
    files.push(include_str!("../shaders/expert_sum.wgsl"));
    Kernel { name: "expert_sum", prelude, bindings, files }
}
