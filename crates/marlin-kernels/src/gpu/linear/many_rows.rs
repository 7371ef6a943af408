//! The kernels for many rows of input: tiles for matrix units, and what does without them.

use std::fmt::Write as _;
use std::sync::Arc;

use super::Place;
use super::format::DeviceFormat;
use super::layout::UNIT;
use super::pack::{PADDED, Packing};
use crate::KernelError;
use crate::gpu::MatrixSize;
use crate::gpu::device::{Gpu, Matrices};
use crate::gpu::pipeline::{Kernel, Pipeline};

/// Invocations that share a matrix.
const SUBGROUP: usize = 32;
/// Halves that rows in workgroup memory are padded by.
const ROW_PADDING: usize = 8;

/// The share of a product that a workgroup computes, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    /// Rows of x.
    m: usize,
    /// Rows of W; of a gated linear, half of them gate the other half.
    n: usize,
    /// Columns that lie in workgroup memory at once.
    k: usize,
    /// Subgroups along the rows of x, and along those of W.
    parts: [usize; 2],
    /// Times so many subgroups, which divide columns among themselves.
    splits: usize,
    /// Steps whose loads are under way while one is multiplied.
    ahead: usize,
    /// For no more rows of W than these in all.
    most_n: usize,
}

impl Tile {
    const fn new([m, n, k]: [usize; 3], parts: [usize; 2], splits: usize) -> Self {
        Self { m, n, k, parts, splits, ahead: 1, most_n: usize::MAX }
    }

    /// Loads so many steps ahead.
    const fn ahead(self, ahead: usize) -> Self {
        Self { ahead, ..self }
    }

    /// Only where W has few rows.
    const fn few_outputs(self) -> Self {
        Self { most_n: FEW_OUTPUTS, ..self }
    }
}

/// Up to so many rows of W make too few small tiles to keep a large device busy.
const FEW_OUTPUTS: usize = 8192;

/// Tiles for 16 × 16 matrices; of each the first that fits W and workgroup memory. With few rows, time goes into waiting for weights: small
/// workgroups wait for little, and load far ahead; where they are few, more subgroups share the columns. With many rows, it goes into unpacking them: each invocation unpacks a unit at each step, while
/// subgroups of other workgroups multiply. An H200 was faster only with all invocations unpacking.
const SIXTEEN: &[&[Tile]] = &[
    &[Tile::new([16, 32, 128], [1, 1], 4).ahead(4).few_outputs(), Tile::new([16, 32, 64], [1, 1], 2).ahead(4)],
    &[Tile::new([32, 32, 128], [1, 1], 4).ahead(4).few_outputs(), Tile::new([32, 32, 64], [1, 1], 2).ahead(4)],
    &[Tile::new([64, 64, 64], [2, 2], 1).ahead(2)],
    &[Tile::new([128, 128, 64], [4, 2], 1), Tile::new([128, 128, 32], [2, 2], 1)],
];

/// Workgroups that a device computes at once, which decides where the last ones leave it half idle: the multiprocessors of an H200. Of a smaller
/// device all tiles make many rounds.
const AT_ONCE: usize = 132;
/// Unpacking the weights of a tile takes as long as multiplying them with so many rows, as measured on an H200.
const UNPACKING_ROWS: usize = 72;

/// Tiles for 8 × 8 matrices: Apple's GPUs have 32 KiB of workgroup memory, and registers for sums of 32 × 64 a subgroup.
const EIGHT: &[&[Tile]] = &[
    &[Tile::new([16, 32, 128], [1, 1], 4)],
    &[Tile::new([32, 64, 64], [2, 2], 1)],
    &[Tile::new([64, 64, 32], [2, 1], 1)],
];

/// Rows and outputs of a workgroup of the kernel that does without matrix units.
const PLAIN_TILE: usize = 64;

/// The kernels of a part.
#[derive(Debug, Clone)]
pub(super) enum ManyRows {
    /// Without matrix units, and how many outputs there are.
    Plain(Arc<Pipeline>, usize),
    /// With them: by rows of tiles, of which there is at least one, and how many rows of W there are.
    Tiles(Vec<(Tile, Arc<Pipeline>)>, usize),
}

impl ManyRows {
    /// The kernels of linears with so many outputs.
    pub(super) fn new(
        gpu: &Gpu,
        format: &DeviceFormat,
        place: Place,
        outputs: usize,
        is_gated: bool,
    ) -> Result<Self, KernelError> {
        let Some(matrices) = gpu.matrices else {
            return Ok(Self::Plain(gpu.pipeline(&plain_kernel(format, place, is_gated))?, outputs));
        };
        let kernel = |tile: Tile| Ok((tile, gpu.pipeline(&tile.kernel(format, place, matrices, is_gated))?));
        let rows = if is_gated { 2 * outputs } else { outputs };
        let tiles = tiles(matrices.size, rows, gpu.caps.workgroup_memory as usize).map(kernel);
        Ok(Self::Tiles(tiles.collect::<Result<_, KernelError>>()?, rows))
    }

    /// The kernel for `m` rows of input, and its workgroups.
    pub(super) fn choose(&self, m: usize) -> (&Arc<Pipeline>, [usize; 3]) {
        self.choose_for_each(m, 1)
    }

    /// The same for `m` rows of input of each of `matrices`.
    pub(super) fn choose_for_each(&self, m: usize, matrices: usize) -> (&Arc<Pipeline>, [usize; 3]) {
        match self {
            Self::Plain(kernel, outputs) => (kernel, [outputs.div_ceil(PLAIN_TILE), m.div_ceil(PLAIN_TILE), matrices]),
            Self::Tiles(tiles, n) => {
                // The larger one of those that take as long.
                let fastest = tiles.iter().rev().min_by_key(|(tile, _)| tile.time(m, *n, matrices));
                let (tile, kernel) = fastest.unwrap_or(&tiles[0]);
                (kernel, [n.div_ceil(tile.n), m.div_ceil(tile.m), matrices])
            }
        }
    }

    /// The kernel whose tiles have so many rows of input, one of [`heights`], and workgroups that share the outputs.
    pub(super) fn of_height(&self, height: usize) -> (&Arc<Pipeline>, usize) {
        match self {
            Self::Plain(kernel, outputs) => (kernel, outputs.div_ceil(PLAIN_TILE)),
            Self::Tiles(tiles, n) => {
                let (tile, kernel) = tiles.iter().find(|(tile, _)| tile.m == height).expect("tiles of this height");
                (kernel, n.div_ceil(tile.n))
            }
        }
    }
}

/// Rows of input of the tiles that a device has for all matrices.
pub(super) fn heights(gpu: &Gpu) -> impl Iterator<Item = usize> {
    let of_units =
        gpu.matrices.map(|matrices| tiles(matrices.size, 1, gpu.caps.workgroup_memory as usize).map(|tile| tile.m));
    let plain = of_units.is_none().then_some(PLAIN_TILE);
    of_units.into_iter().flatten().chain(plain)
}

/// The kernel that does without matrix units.
fn plain_kernel(format: &DeviceFormat, place: Place, is_gated: bool) -> Kernel {
    let constants = format!("const GATED = {is_gated};\n");
    let file = include_str!("../shaders/linear_tile_plain.wgsl");
    let name = place.name("linear_tile_plain", "group_tile_plain");
    super::linear(format, name, place, Packing::of(format.arithmetic), constants, &[file])
}

/// The tiles of a device for `n` rows of W, by rows of input.
fn tiles(size: MatrixSize, n: usize, workgroup_memory: usize) -> impl Iterator<Item = Tile> {
    let table = match size {
        MatrixSize::Eight => EIGHT,
        MatrixSize::Sixteen => SIXTEEN,
    };
    let fits = move |tile: &&Tile| n <= tile.most_n && tile.workgroup_bytes(size) <= workgroup_memory;
    table.iter().filter_map(move |alternatives| alternatives.iter().find(fits).copied())
}

impl Tile {
    fn invocations(&self) -> usize {
        let [m, n] = self.parts;
        SUBGROUP * m * n * self.splits
    }

    /// How long it takes for `m` rows of input and `n` of each of so many W, in products of all columns.
    fn time(&self, m: usize, n: usize, matrices: usize) -> usize {
        let rounds = (m.div_ceil(self.m) * n.div_ceil(self.n) * matrices).div_ceil(AT_ONCE);
        rounds * self.n * (self.m + UNPACKING_ROWS)
    }

    fn workgroup_bytes(&self, size: MatrixSize) -> usize {
        let halves = (self.m + self.n) * (self.k + ROW_PADDING);
        let sums = self.invocations() / SUBGROUP * size.rows() * size.rows();
        2 * halves + 4 * sums
    }

    /// How often parts of `linear_tile.wgsl` are repeated.
    fn counts(&self, size: MatrixSize) -> [(&'static str, usize); 5] {
        let [parts_m, parts_n] = self.parts;
        [
            ("X_OCTETS", self.m * self.k / 8 / self.invocations()),
            ("W_UNITS", self.n * self.k / UNIT / self.invocations()),
            ("ROWS", self.m / parts_m / size.rows()),
            ("PAIRS", self.n / parts_n / size.rows() / 2),
            ("DEPTH", self.k / self.splits / size.rows()),
        ]
    }

    /// The kernel of a format.
    fn kernel(&self, format: &DeviceFormat, place: Place, matrices: Matrices, is_gated: bool) -> Kernel {
        let Self { m, n, k, parts: [parts_m, parts_n], splits, ahead, .. } = self;
        let size = matrices.size.rows();
        let mut constants = format!(
            "const SIZE = {size}u;\nconst TILE_M = {m}u;\nconst TILE_N = {n}u;\nconst TILE_K = {k}u;\n\
             const PARTS_M = {parts_m}u;\nconst PARTS_N = {parts_n}u;\nconst SPLITS = {splits}u;\n\
             const AHEAD = {ahead}u;\n\
             const PADDED = {PADDED}u;\nconst ROW_PADDING = {ROW_PADDING}u;\nconst GATED = {is_gated};\n"
        );
        for (name, count) in self.counts(matrices.size) {
            // Writing to a string does not fail.
            let _ = writeln!(constants, "const {name} = {count}u;");
        }
        let files = [matrices.module(), include_str!("../shaders/linear_tile.wgsl")];
        let name = place.name("linear_tile", "group_tile");
        super::linear(format, name, place, Packing::Rows, constants, &files)
    }
}

#[cfg(test)]
mod tests {
    use marlin_format::{Format, Scheme};

    use super::*;
    use crate::gpu::device::MATRICES_WORKGROUP_MEMORY;
    use crate::gpu::{GpuArithmetic, spirv};

    fn table() -> impl Iterator<Item = (MatrixSize, &'static Tile)> {
        let of = |size, table: &'static [&'static [Tile]]| {
            table.iter().flat_map(|alternatives| alternatives.iter()).map(move |tile| (size, tile))
        };
        of(MatrixSize::Eight, EIGHT).chain(of(MatrixSize::Sixteen, SIXTEEN))
    }

    #[test]
    fn invocations_divide_tiles_evenly() {
        for (size, tile) in table() {
            let [parts_m, parts_n] = tile.parts;
            let [x_octets, w_units, rows, pairs, depth] = tile.counts(size).map(|(_, count)| count);
            assert_eq!(x_octets * tile.invocations() * 8, tile.m * tile.k, "{tile:?}");
            assert_eq!(w_units * tile.invocations() * UNIT, tile.n * tile.k, "{tile:?}");
            assert_eq!(rows * size.rows() * parts_m, tile.m, "{tile:?}");
            assert_eq!(pairs * 2 * size.rows() * parts_n, tile.n, "{tile:?}");
            assert_eq!(depth * size.rows() * tile.splits, tile.k, "{tile:?}");
            assert!(PADDED.is_multiple_of(tile.k * tile.ahead), "{tile:?}");
        }
    }

    #[test]
    fn every_device_has_tiles_for_all_rows() {
        for (size, n) in
            [(MatrixSize::Eight, 1), (MatrixSize::Sixteen, FEW_OUTPUTS), (MatrixSize::Sixteen, FEW_OUTPUTS + 1)]
        {
            let of = |memory| tiles(size, n, memory as usize).map(|tile| tile.m).collect::<Vec<_>>();
            let smallest = of(MATRICES_WORKGROUP_MEMORY);
            assert_eq!(smallest, of(MATRICES_WORKGROUP_MEMORY * 2));
            assert!(smallest.is_sorted() && !smallest.is_empty());
        }
    }

    /// Vulkan's drivers see what naga makes of WGSL. That Metal's kernels translate is tested for all of them together.
    #[test]
    fn kernels_for_cooperative_matrices_become_spirv() {
        let schemes =
            [Format::Fp4, Format::Int4, Format::Int8].map(|format| format.scheme(None).expect("its usual groups"));
        let matrices = Matrices { size: MatrixSize::Sixteen, is_emulated: false };
        for scheme in schemes.into_iter().chain([Scheme::BF16, Scheme::NVFP4, Scheme::MXFP4]) {
            let format = DeviceFormat::of(&scheme, GpuArithmetic::Half);
            for (tile, is_gated) in SIXTEEN.iter().flat_map(|tiles| tiles.iter()).zip([false, true].into_iter().cycle())
            {
                for place in [Place::Plain, Place::Group(8)] {
                    let what = format!("{tile:?} for {scheme}, {place:?}");
                    spirv::assert_cooperative(&tile.kernel(&format, place, matrices, is_gated), &what);
                }
            }
        }
    }
}
