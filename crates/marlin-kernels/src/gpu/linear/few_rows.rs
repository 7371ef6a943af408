//! The kernel for few rows of input: its tiles, its variants, and its text.

use std::sync::Arc;

use super::Place;
use super::format::DeviceFormat;
use super::layout::{QUAD, UNIT};
use super::pack::{PACK_TURNS, PACK_UNITS, PACKED_OUTPUT, Packing, Prepared, VECTOR, four_functions};
use crate::KernelError;
use crate::gpu::device::{Gpu, Matrices};
use crate::gpu::pipeline::{Kernel, Pipeline};
use crate::gpu::{GpuArithmetic, MatrixSize};

/// Rows of the input that a workgroup takes.
const ROW_BLOCKS: [usize; 3] = [1, 4, 8];

/// How many rows of input are few: more go to the kernel for many. Matrix units of 16 × 16 take 16 rows in less time than this kernel takes 8,
/// on an H200; those of 8 × 8 are not measured yet.
pub(super) fn most_few_rows(gpu: &Gpu) -> usize {
    match gpu.matrices {
        Some(Matrices { size: MatrixSize::Sixteen, .. }) => 4,
        _ => ROW_BLOCKS[ROW_BLOCKS.len() - 1],
    }
}

/// Bytes of workgroup memory in which partial sums meet; fewer rows at once fit into less.
const PARTS_BYTES: usize = 8 << 10;

/// From so many outputs on there are enough workgroups with several quads each.
const FEW_OUTPUTS: usize = 8192;

/// With more workgroups than this, a norm for each of them costs more than a kernel for all.
const MOST_NORMS: usize = 1024;
/// Bytes of workgroup memory that a kernel may take which packs its input for itself.
const NORMED_BYTES: usize = 16 << 10;

/// Columns of rows that are packed where they are multiplied, at most: each workgroup does so, and there are few of them.
const DIRECT_COLS: usize = 512;

/// Their room for units is a multiple of this, so that widths share kernels.
const STAGED_UNITS: usize = 64;

/// A workgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FewRowsTile {
    /// Neighbouring invocations that share a quad of rows. Subgroups are multiples of them.
    lanes: usize,
    /// Quads.
    quads: usize,
    /// Times so many lanes, which take turns at the units of a row.
    splits: usize,
}

impl FewRowsTile {
    const fn new(lanes: usize, quads: usize, splits: usize) -> Self {
        Self { lanes, quads, splits }
    }

    /// Short rows keep fewer invocations busy, and few outputs make few workgroups: those share out columns instead, the more the more columns there
    /// are. Where each workgroup packs the input for itself, they take more outputs, so as to be fewer. Gated linears pack their outputs, which
    /// takes whole units of them.
    fn of(cols: usize, outputs: usize, is_gated: bool, rows: usize, is_normed: bool) -> Self {
        match (cols.div_ceil(UNIT), is_gated) {
            (0..=16, _) => Self::new(8, 16, 1),
            (64.., true) if is_normed && outputs <= FEW_OUTPUTS / 4 => Self::new(16, 8, 2),
            (64, false) if rows == 1 && outputs <= FEW_OUTPUTS / 4 => Self::new(16, 2, 4),
            (64.., false) if rows == 1 && outputs <= FEW_OUTPUTS && is_normed => Self::new(16, 4, 2),
            (128.., false) if rows == 1 && outputs <= FEW_OUTPUTS / 2 => Self::new(16, 1, 8),
            (256.., false) if rows == 1 && outputs <= FEW_OUTPUTS => Self::new(16, 1, 8),
            (65.., false) if rows == 1 && outputs <= FEW_OUTPUTS => Self::new(16, 2, 4),
            (65.., false) if rows == 1 => Self::new(8, 4, 4),
            _ => Self::new(8, 8, 2),
        }
    }

    fn outputs(self) -> usize {
        self.quads * QUAD
    }
}

/// The kernels of a part.
#[derive(Debug, Clone)]
pub(super) struct FewRows {
    /// By rows of the input, which are [`ROW_BLOCKS`].
    blocks: Vec<FewRowsKernel>,
    /// For the norm of one row, where it is worth packing it in each workgroup.
    normed: Option<FewRowsKernel>,
    /// As `blocks`, for rows that are packed where they are multiplied: heads', which are short. They can pack their output.
    direct: Vec<FewRowsKernel>,
    /// They pack their output.
    packs_output: bool,
    /// They are the only ones: many rows are blocks of few.
    takes_all: bool,
}

/// One of them.
#[derive(Debug, Clone)]
struct FewRowsKernel {
    /// Rows of the input that a workgroup takes, at most.
    rows: usize,
    /// Workgroups that share the outputs.
    workgroups: usize,
    pipeline: Arc<Pipeline>,
}

impl FewRows {
    /// The kernels of linears with so many outputs.
    pub(super) fn new(
        gpu: &Gpu,
        format: &DeviceFormat,
        place: Place,
        cols: usize,
        outputs: usize,
        is_gated: bool,
    ) -> Result<Self, KernelError> {
        let variant = |rows, packing, place| {
            let tile = FewRowsTile::of(cols, outputs, is_gated, rows, packing == Packing::Normed);
            let sums_subgroups = sums_subgroups(gpu, format, tile.lanes);
            Variant { tile, place, rows, is_gated, packing, sums_subgroups, cols }
        };
        let kernel = |variant: Variant| {
            Ok::<_, KernelError>(FewRowsKernel {
                rows: variant.rows,
                workgroups: outputs.div_ceil(variant.tile.outputs()),
                pipeline: gpu.pipeline(&variant.kernel(format))?,
            })
        };
        let normed = variant(1, Packing::Normed, place.of_norms());
        let most = most_rows_at_once(gpu);
        let is_made = |rows: &usize| *rows == most || *rows < most && !gpu.batch_invariant;
        let blocks = |packing| {
            let kernels = ROW_BLOCKS.into_iter().filter(is_made).map(|rows| kernel(variant(rows, packing, place)));
            kernels.collect::<Result<Vec<_>, KernelError>>()
        };
        // Of a group, norms are the input of gated linears alone.
        let is_worth_it = !gpu.batch_invariant
            && (place == Place::Plain || is_gated)
            && format.arithmetic == GpuArithmetic::Half
            && cols.is_multiple_of(VECTOR)
            && outputs.div_ceil(normed.tile.outputs()) <= MOST_NORMS
            && normed.workgroup_bytes() <= NORMED_BYTES;
        let is_short = matches!(place, Place::Group(_))
            && !is_gated
            && format.arithmetic == GpuArithmetic::Half
            && cols <= DIRECT_COLS
            && cols.is_multiple_of(UNIT);
        Ok(Self {
            blocks: blocks(Packing::of(format.arithmetic))?,
            normed: is_worth_it.then(|| kernel(normed)).transpose()?,
            direct: if is_short { blocks(Packing::Direct)? } else { Vec::new() },
            packs_output: packs_output(format, is_gated),
            takes_all: gpu.batch_invariant,
        })
    }

    /// The kernel for `m` rows that it packs itself, and its workgroups; `None` if they are many, or not worth it.
    pub(super) fn choose_direct(&self, m: usize) -> Option<(&Arc<Pipeline>, [usize; 3])> {
        self.enough(&self.direct, m)
    }

    /// The kernel for `m` rows, and its workgroups; `None` if they are many.
    pub(super) fn choose(&self, m: usize, prepared: Prepared) -> Option<(&Arc<Pipeline>, [usize; 3])> {
        if prepared == Prepared::Unpacked {
            return self.normed.as_ref().map(|kernel| kernel.run(m));
        }
        self.enough(&self.blocks, m)
    }

    fn enough<'a>(&self, blocks: &'a [FewRowsKernel], m: usize) -> Option<(&'a Arc<Pipeline>, [usize; 3])> {
        let enough = blocks.iter().find(|kernel| m <= kernel.rows);
        enough.or_else(|| blocks.last().filter(|_| self.takes_all)).map(|kernel| kernel.run(m))
    }

    /// Whether there is a kernel that normalises its `m` rows of input.
    pub(super) fn normalises(&self, m: usize) -> bool {
        m == 1 && self.normed.is_some()
    }

    /// Whether the kernel for `m` rows packs its output.
    pub(super) fn packs_output(&self, m: usize) -> bool {
        self.packs_output && (self.takes_all || self.blocks.iter().any(|kernel| m <= kernel.rows))
    }
}

impl FewRowsKernel {
    fn run(&self, m: usize) -> (&Arc<Pipeline>, [usize; 3]) {
        (&self.pipeline, [self.workgroups, m.div_ceil(self.rows), 1])
    }
}

/// Rows of the largest block. In single precision larger blocks have more sums than registers.
pub(super) fn most_rows_at_once(gpu: &Gpu) -> usize {
    match gpu.arithmetic {
        GpuArithmetic::Exact => 4,
        GpuArithmetic::Half => most_few_rows(gpu),
    }
}

/// The block that takes so many rows; the largest one if none does.
pub(super) fn block_of(gpu: &Gpu, rows: usize) -> usize {
    let most = most_rows_at_once(gpu);
    if gpu.batch_invariant {
        return most;
    }
    ROW_BLOCKS.into_iter().find(|block| rows <= *block).map_or(most, |block| block.min(most))
}

/// Whether subgroups sum over lanes: not in single precision, so that every device shows both ways to be right.
pub(super) fn sums_subgroups(gpu: &Gpu, format: &DeviceFormat, lanes: usize) -> bool {
    format.arithmetic == GpuArithmetic::Half && gpu.caps.subgroups && gpu.caps.subgroup[0] as usize >= lanes
}

/// Whether the next linear finds its input packed: what is gated goes into one.
fn packs_output(format: &DeviceFormat, is_gated: bool) -> bool {
    is_gated && format.arithmetic == GpuArithmetic::Half
}

/// Sums of lanes meet where those of splits do.
pub(super) const SUM_OF_NO_LANES: &str = "fn sum_of_lanes(value: vec4<f32>) -> vec4<f32> { return value; }\n";

/// A kernel to be made.
#[derive(Debug, Clone, Copy)]
struct Variant {
    tile: FewRowsTile,
    place: Place,
    /// Rows of the input.
    rows: usize,
    is_gated: bool,
    packing: Packing,
    /// Subgroups sum over lanes.
    sums_subgroups: bool,
    cols: usize,
}

impl Variant {
    /// Matrices that are multiplied together.
    fn matrices(self) -> usize {
        if self.is_gated { 2 } else { 1 }
    }

    /// Partial sums of an output that meet in workgroup memory.
    fn parts(self) -> usize {
        if self.sums_subgroups { self.tile.splits } else { self.tile.splits * self.tile.lanes }
    }

    /// Bytes of the partial sums of a row of input.
    fn row_bytes(self) -> usize {
        self.parts() * self.matrices() * self.tile.outputs() * size_of::<f32>()
    }

    /// Rows of input whose sums meet at once.
    fn rows_at_once(self) -> usize {
        let fits = |rows: &usize| rows * self.row_bytes() <= PARTS_BYTES;
        (0..).map(|power| self.rows >> power).take_while(|rows| *rows > 1).find(fits).unwrap_or(1)
    }

    /// Units of the input that a workgroup has room for.
    fn staged_units(self) -> usize {
        self.cols.div_ceil(UNIT).next_multiple_of(STAGED_UNITS)
    }

    /// It has room for what it packs of its output.
    fn keeps_output(self) -> bool {
        self.is_gated || self.packing == Packing::Direct
    }

    fn workgroup_bytes(self) -> usize {
        let kept = if self.keeps_output() { self.rows_at_once() * self.tile.outputs() * size_of::<f32>() } else { 0 };
        // Halves and a scale of each unit, and what 128 invocations reduce: maxima of four octets, and sums.
        let staged =
            if self.packing == Packing::Normed { self.staged_units() * (2 * UNIT + 4) + 5 * 128 * 4 } else { 0 };
        self.rows_at_once() * self.row_bytes() + kept + staged
    }

    fn kernel(self, format: &DeviceFormat) -> Kernel {
        let FewRowsTile { lanes, quads, splits } = self.tile;
        let (rows, parts, rows_at_once, matrices) = (self.rows, self.parts(), self.rows_at_once(), self.matrices());
        let mut prelude = format!(
            "const MB = {rows}u;\nconst LANES = {lanes}u;\nconst QUADS = {quads}u;\nconst SPLITS = {splits}u;\n\
             const PARTS = {parts}u;\nconst ROWS_AT_ONCE = {rows_at_once}u;\nconst MATRICES = {matrices}u;\nconst GATED = {};\n",
            self.is_gated
        );
        let mut files = Vec::new();
        let packs_output = self.keeps_output() && format.arithmetic == GpuArithmetic::Half;
        if packs_output || self.packing == Packing::Normed {
            files.push(include_str!("../shaders/pack.wgsl"));
        }
        if packs_output {
            let wants = if self.is_gated { "true" } else { "params.packs_output == 1u" };
            prelude += &format!(
                "const KEPT = {}u;\nfn wants_packed() -> bool {{ return {wants}; }}\n",
                rows_at_once * self.tile.outputs()
            );
            files.extend([include_str!("../shaders/pack_output.wgsl"), include_str!("../shaders/pack_kept.wgsl")]);
        } else {
            prelude += "fn keep_output(i: u32, value: f32) {}\nfn pack_kept(shape: Shape, rows: Rows, first: u32, first_m: u32, index: u32) {}\n";
        }
        if self.packing == Packing::Normed {
            let turns = (self.staged_units() / PACK_UNITS).min(PACK_TURNS);
            prelude += &format!(
                "const UNITS = {}u;\nconst TURNS = {turns}u;\n{}",
                self.staged_units(),
                four_functions(true, true, "k")
            );
            files.extend([
                include_str!("../shaders/pack_row.wgsl"),
                include_str!("../shaders/reduce.wgsl"),
                include_str!("../shaders/norm.wgsl"),
            ]);
        } else {
            prelude +=
                "fn prepare_input(shape: Shape, index: u32) {}\nfn input_factor(shape: Shape) -> f32 { return 1.0; }\n";
        }
        if self.sums_subgroups {
            files.push(include_str!("../shaders/lanes_subgroup.wgsl"));
        } else {
            prelude += SUM_OF_NO_LANES;
        }
        files.extend([include_str!("../shaders/linear_sums.wgsl"), include_str!("../shaders/linear_rows.wgsl")]);
        let name = self.place.name("linear_rows", "group_rows");
        let mut kernel = super::linear(format, name, self.place, self.packing, prelude, &files);
        kernel.bindings.extend(PACKED_OUTPUT.into_iter().filter(|_| packs_output));
        kernel
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variants() -> Vec<Variant> {
        let mut variants = Vec::new();
        for units in [1, 17, 65, 256, 4096] {
            for (outputs, is_gated) in [(FEW_OUTPUTS, false), (FEW_OUTPUTS + 1, false), (FEW_OUTPUTS, true)] {
                let blocks = ROW_BLOCKS.map(|rows| (rows, Packing::Units));
                for (rows, packing) in blocks.into_iter().chain([(1, Packing::Normed), (4, Packing::Direct)]) {
                    let cols = units * UNIT;
                    let tile = FewRowsTile::of(cols, outputs, is_gated, rows, packing == Packing::Normed);
                    let place = Place::Plain;
                    let of = |sums_subgroups| Variant { tile, place, rows, is_gated, packing, sums_subgroups, cols };
                    variants.extend([of(false), of(true)]);
                }
            }
        }
        variants
    }

    #[test]
    fn workgroups_fit_every_device() {
        for variant in variants() {
            let FewRowsTile { lanes, quads, splits } = variant.tile;
            // `pack_row.wgsl` takes 128 invocations, and no device must have more than 256.
            assert!((128..=256).contains(&(lanes * quads * splits)), "{variant:?}");
            assert!(variant.rows.is_multiple_of(variant.rows_at_once()), "{variant:?}");
            // Those that would pack too many columns are not made.
            assert!(variant.packing == Packing::Normed || variant.workgroup_bytes() <= 16 << 10, "{variant:?}");
            let packs_short = variant.packing == Packing::Direct && variant.cols <= DIRECT_COLS;
            assert!(!(variant.is_gated || packs_short) || variant.tile.outputs().is_multiple_of(UNIT), "{variant:?}");
        }
    }
}
