//! Latent attention on matrix units: of the heads of one token, or of many tokens of a sequence.

use super::combine::{Combine, Splits};
use super::store::{KvPlanes, kv_constants};
use super::tile::QUERY_TILE;
use super::{ATTENTION_TOKEN, sink_scores, window};
use crate::gpu::device::{Gpu, Matrices};
use crate::gpu::kv::KV_UNIT;
use crate::gpu::pipeline::{Binding, Kernel, Variants};
use crate::gpu::recorder::Recorder;
use crate::gpu::step::{StepBuffers, TILE_TOKENS};
use crate::gpu::{GpuBuffer, GpuKvCache, GpuVector};
use crate::{AttentionShape, KernelError, KvType, Values};

/// How positions are divided.
pub(super) const SPLITS: Splits = Splits { least: 32, most: 128, workgroups: 128, one: 64 };

/// How a workgroup divides its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Tile {
    /// Query heads, of a token or of several.
    rows: usize,
    keys: usize,
    /// Subgroups that divide the dimensions of 16 rows among themselves for the scores.
    parts: usize,
}

impl Tile {
    const fn new([rows, keys, parts]: [usize; 3]) -> Self {
        Self { rows, keys, parts }
    }

    fn subgroups(self) -> usize {
        self.parts * self.rows / 16
    }
}

/// Of these the first that divides dimensions and fits into workgroup memory, of no more rows than there are.
const TILES: [Tile; 8] = [
    Tile::new([32, 16, 4]),
    Tile::new([32, 16, 2]),
    Tile::new([32, 8, 4]),
    Tile::new([32, 8, 2]),
    Tile::new([16, 16, 4]),
    Tile::new([16, 16, 2]),
    Tile::new([16, 8, 4]),
    Tile::new([16, 8, 2]),
];

/// Blocks of 16 dimensions of the queries, and of 16 by 16 sums, that registers of a subgroup hold.
const MOST_QUERY_BLOCKS: usize = 9;
const MOST_SUM_BLOCKS: usize = 8;

/// Latent attention on matrices.
#[derive(Default)]
pub(super) struct LatentAttention {
    kernels: Variants<LatentVariant>,
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct LatentVariant {
    matrices: Matrices,
    kv_type: KvType,
    key_dim: usize,
    value_dim: usize,
    tile: Tile,
}

impl LatentVariant {
    /// For so many rows: the heads of one token, or of many. `None` if such heads have no kernel on this device, or would lose precision: keys become
    /// half precision.
    fn new(gpu: &Gpu, kv_type: KvType, key_dim: usize, value_dim: usize, rows: usize) -> Option<Self> {
        let matrices = gpu.matrices.filter(|_| kv_type != KvType::F32)?;
        let variants = TILES.into_iter().map(|tile| Self { matrices, kv_type, key_dim, value_dim, tile });
        let memory = gpu.caps.workgroup_memory as usize;
        variants.into_iter().find(|variant| (variant.tile.rows == 16 || rows > 16) && variant.fits(memory))
    }

    /// Those that steps use for heads of these widths.
    pub(super) fn used(gpu: &Gpu, kv_type: KvType, [key_dim, value_dim]: [usize; 2]) -> impl Iterator<Item = Self> {
        [16, 32].into_iter().filter_map(move |rows| Self::new(gpu, kv_type, key_dim, value_dim, rows))
    }

    fn fits(self, workgroup_memory: usize) -> bool {
        let Self { matrices, key_dim, value_dim, tile, .. } = self;
        let (blocks, value_blocks) = (key_dim / 16, value_dim / 16);
        let divides = key_dim.is_multiple_of(16 * tile.parts) && value_dim.is_multiple_of(16 * tile.subgroups());
        let holds = blocks <= tile.parts * MOST_QUERY_BLOCKS && value_blocks <= tile.parts * MOST_SUM_BLOCKS;
        divides && holds && tile.keys >= matrices.size.rows() && self.workgroup_bytes() <= workgroup_memory
    }

    /// Halves of two tiles of keys.
    fn key_halves(self) -> usize {
        2 * self.tile.keys * (self.key_dim + 8)
    }

    /// As `attention_latent.wgsl` divides it: weights and keys, scores, places of two tiles, a value of each quad and of each row, flags.
    fn workgroup_bytes(self) -> usize {
        let Tile { rows, keys, parts } = self.tile;
        2 * (rows * (keys + 8) + self.key_halves()) + 4 * (parts * rows * keys + 2 * keys + rows * keys / 4 + rows + 4)
    }

    pub(super) fn kernel(self) -> Kernel {
        let Self { matrices, kv_type, key_dim, value_dim, tile } = self;
        let Tile { rows, keys, parts } = tile;
        let size = matrices.size.rows();
        let invocations = 32 * tile.subgroups();
        let units = keys * key_dim / KV_UNIT;
        let blocks = key_dim / 16 / parts;
        // Queries pass through the keys' memory.
        let fits = |turn: &usize| rows * (16 * parts * turn + 8) <= self.key_halves();
        let query_blocks = (1..=blocks).rev().filter(|turn| blocks.is_multiple_of(*turn)).find(fits).unwrap_or(1);
        let constants = [
            ("SIZE", size),
            ("DIM", key_dim),
            ("VALUE_DIM", value_dim),
            ("CHUNKS", key_dim / KV_UNIT),
            ("ROWS", rows),
            ("TILE_KEYS", keys),
            // Quads of a row's scores.
            ("QUADS", keys / 4),
            ("PARTS", parts),
            // 16 dimensions of a part, those that are loaded at a time, and times; those of the sums that a subgroup has; matrices along 16, along all
            // rows and along the keys; units of a tile that each invocation brings.
            ("BLOCKS", blocks),
            ("QUERY_BLOCKS", query_blocks),
            ("QUERY_TURNS", blocks / query_blocks),
            ("VALUE_BLOCKS", value_dim / 16 / tile.subgroups()),
            ("PER_BLOCK", 16 / size),
            ("ROW_MATRICES", rows / size),
            ("KEY_MATRICES", keys / size),
            ("LOADS", units.div_ceil(invocations)),
        ];
        let constants = constants.into_iter().chain(SPLITS.constants());
        let constants: String = constants.map(|(name, value)| format!("const {name} = {value}u;\n")).collect();
        let all_loads = units.is_multiple_of(invocations);
        let prelude = format!(
            "{ATTENTION_TOKEN}{QUERY_TILE}{}{constants}const ALL_LOADS = {all_loads};\n",
            kv_constants(kv_type)
        );
        let planes = KvPlanes::of(kv_type);
        let (read, write) = (Binding::read, Binding::write);
        let mut bindings = vec![
            read("queries", "vec4<f32>"),
            read("keys", planes.reads),
            read("values", planes.reads),
            read("attention_tokens", "AttentionToken"),
            read("query_tiles", "QueryTile"),
            read("block_tables", "u32"),
            write("split_sums", "vec4<f32>"),
            write("split_softmax", "vec2<f32>"),
            write("out", "vec4<f32>"),
            read("sinks", "f32"),
        ];
        if kv_type.code().is_some() {
            bindings.extend([read("key_scales", "f16"), read("value_scales", "f16")]);
        }
        let files = vec![
            matrices.module(),
            planes.load,
            include_str!("../shaders/attention_sinks.wgsl"),
            include_str!("../shaders/attention_splits.wgsl"),
            include_str!("../shaders/attention_units.wgsl"),
            include_str!("../shaders/attention_latent.wgsl"),
        ];
        Kernel { name: "attention_latent", prelude, bindings, files }
    }
}

/// What a dispatch is of.
struct Part {
    variant: LatentVariant,
    /// The first of the tokens of attention, and how many; or query tiles.
    first: usize,
    count: usize,
    is_tiled: bool,
    /// Rows of each.
    rows: usize,
    splits: usize,
}

impl LatentAttention {
    /// Attention of a step's tokens; `false` if such heads have no kernel.
    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn run(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &StepBuffers,
        queries: &GpuBuffer,
        shape: &AttentionShape,
        sinks: Option<&GpuVector>,
        kv: &GpuKvCache,
        layer: usize,
        out: &GpuBuffer,
        combine: &mut Combine,
    ) -> Result<bool, KernelError> {
        let Values::OfKeys(value_dim) = shape.values else { return Ok(false) };
        let variant = |rows| LatentVariant::new(gpu, kv.kv_type, shape.head_dim, value_dim, rows);
        let tile_rows = TILE_TOKENS * shape.heads;
        let (Some(of_token), Some(of_tile)) = (variant(shape.heads), variant(tile_rows)) else { return Ok(false) };
        let window = window(shape);
        let most_splits = SPLITS.most(shape.heads.div_ceil(of_token.tile.rows));
        let splits_of = |position: u32| SPLITS.count((position + 1).min(window) as usize, most_splits);
        let splits = step.attention_positions(step.untiled).map(splits_of).max().unwrap_or(1);
        let most = if splits == 1 { step.untiled } else { combine.rows(shape, splits) };
        let of_tokens = (0..step.untiled).step_by(most.max(1)).map(|first| Part {
            variant: of_token,
            first,
            count: most.min(step.untiled - first),
            is_tiled: false,
            rows: shape.heads,
            splits,
        });
        let of_tiles = (step.tiles() > 0).then(|| Part {
            variant: of_tile,
            first: 0,
            count: step.tiles(),
            is_tiled: true,
            rows: tile_rows,
            splits: 1,
        });

        let cache = &kv.layers[layer];
        let StepBuffers { attention_tokens, query_tiles, block_tables, .. } = step;
        for Part { variant, first, count, is_tiled, rows, splits } in of_tokens.chain(of_tiles) {
            let kernel = self.kernels.get(gpu, variant, LatentVariant::kernel)?;
            let [row, position, table] = step.attention_token(first);
            let inputs = [&queries.storage, &cache.keys.storage, &cache.values.storage];
            let of_step = [attention_tokens, query_tiles, block_tables];
            let outputs = [&combine.sums, &combine.softmax, &out.storage, sink_scores(sinks, queries)];
            let scales = cache.keys.scales.iter().chain(&cache.values.scales);
            let parameters = [
                shape.heads as u32,
                shape.scale.to_bits(),
                window,
                kv.block_tokens as u32,
                most_splits,
                first as u32,
                u32::from(sinks.is_some()),
                u32::from(is_tiled),
                row,
                position,
                table,
            ];
            let workgroups = [splits, rows.div_ceil(variant.tile.rows), count];
            let buffers = inputs.into_iter().chain(of_step).chain(outputs).chain(scales);
            recorder.dispatch(kernel, buffers, &parameters, workgroups);
            if splits > 1 {
                let rows = [first, count, splits];
                combine.run(gpu, recorder, step, rows, queries, shape, sinks, out, None)?;
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{MatrixSize, spirv};

    #[test]
    fn kernels_for_cooperative_matrices_become_spirv() {
        let matrices = Matrices { size: MatrixSize::Sixteen, is_emulated: false };
        for (kv_type, key_dim, value_dim) in [(KvType::F16, 576, 512), (KvType::Fp8, 288, 256), (KvType::Fp4, 192, 128)]
        {
            for tile in TILES {
                let variant = LatentVariant { matrices, kv_type, key_dim, value_dim, tile };
                if variant.fits(48 << 10) {
                    spirv::assert_cooperative(&variant.kernel(), &format!("{variant:?}"));
                }
            }
        }
    }

    #[test]
    fn wide_keys_fit_where_there_is_least_memory() {
        for (size, memory) in [(MatrixSize::Sixteen, 48 << 10), (MatrixSize::Eight, 32 << 10)] {
            let matrices = Matrices { size, is_emulated: false };
            let variant = |tile| LatentVariant { matrices, kv_type: KvType::F16, key_dim: 576, value_dim: 512, tile };
            let fitting: Vec<Tile> = TILES.into_iter().filter(|&tile| variant(tile).fits(memory)).collect();
            assert!([16, 32].iter().all(|&rows| fitting.iter().any(|tile| tile.rows == rows)), "{size:?}: {fitting:?}");
        }
    }
}
