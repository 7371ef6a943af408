//! Attention of many queries of a sequence at once, on matrix units.

use super::store::{KvPlanes, kv_constants};
use super::{ATTENTION_TOKEN, sink_scores, window};
use crate::gpu::device::{Gpu, Matrices};
use crate::gpu::kv::KV_UNIT;
use crate::gpu::pipeline::{Binding, Kernel, Variants};
use crate::gpu::recorder::Recorder;
use crate::gpu::step::{StepBuffers, TILE_TOKENS};
use crate::gpu::{GpuBuffer, GpuKvCache, GpuVector};
use crate::{AttentionShape, KernelError, KvType, RopeLayout, Values};

/// How a workgroup divides its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Tile {
    /// Tokens, and query heads of each that share keys and values: a row each.
    tokens: usize,
    heads: usize,
    keys: usize,
    /// Rows that subgroups share, and subgroups that do: they divide matrices of keys, and 16 dimensions of a head at a time, among themselves.
    shared: usize,
    split: usize,
}

impl Tile {
    const fn new([tokens, heads, keys, shared, split]: [usize; 5]) -> Self {
        Self { tokens, heads, keys, shared, split }
    }

    fn rows(self) -> usize {
        self.tokens * self.heads
    }

    fn workgroups(self, heads: usize, query_tiles: usize) -> usize {
        heads / self.heads * query_tiles * (TILE_TOKENS / self.tokens)
    }
}

/// Of these the first that divides heads and fits into workgroup memory. Two subgroups share rows and two heads share keys where that is possible:
/// workgroup memory is read less often for each row, which is what takes most of the time.
const TILES: [Tile; 9] = [
    Tile::new([64, 2, 32, 32, 2]),
    Tile::new([32, 2, 32, 16, 2]),
    Tile::new([64, 1, 32, 16, 2]),
    Tile::new([32, 1, 32, 16, 2]),
    Tile::new([64, 1, 32, 16, 1]),
    Tile::new([32, 1, 32, 16, 1]),
    Tile::new([64, 1, 16, 16, 1]),
    Tile::new([32, 1, 16, 16, 1]),
    Tile::new([16, 1, 16, 16, 1]),
];

/// Larger tiles than this are for steps that make many workgroups of them.
const MANY_ROWS: usize = 64;
const MANY_WORKGROUPS: usize = 256;

/// The widest head whose sums registers hold.
const MOST_DIM: usize = 256;

/// What a query tile is, as kernels see it.
pub(super) const QUERY_TILE: &str = "struct QueryTile {\n    first: u32,\n    count: u32,\n}\n";

/// Attention by query tiles.
pub(super) struct TileAttention {
    kernels: Variants<TileVariant>,
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TileVariant {
    matrices: Matrices,
    kv_type: KvType,
    head_dim: usize,
    tile: Tile,
}

impl TileVariant {
    /// For a step of so many query tiles and these heads. `None` if such heads have no kernel on this device, or would lose precision: keys and
    /// values become half precision.
    fn new(gpu: &Gpu, kv_type: KvType, shape: &AttentionShape, tiles: usize) -> Option<Self> {
        if shape.values != Values::Cached {
            return None;
        }
        let group = shape.heads / shape.kv_heads;
        let is_worthwhile = |variant: &Self| {
            variant.tile.rows() <= MANY_ROWS || variant.tile.workgroups(shape.heads, tiles) >= MANY_WORKGROUPS
        };
        Self::of(gpu, kv_type, shape.head_dim)
            .find(|variant| group.is_multiple_of(variant.tile.heads) && is_worthwhile(variant))
    }

    /// Those that steps use for heads of this width: of one head or two that share keys, for few tokens or many.
    pub(super) fn used(gpu: &Gpu, kv_type: KvType, head_dim: usize) -> impl Iterator<Item = Self> {
        let chosen = move |[heads, tiles]: [usize; 2]| {
            let shape = AttentionShape {
                heads,
                kv_heads: 1,
                head_dim,
                scale: 1.0,
                window: None,
                values: Values::Cached,
                rope: RopeLayout::HalfSplit,
            };
            Self::new(gpu, kv_type, &shape, tiles)
        };
        [[1, 1], [2, 1], [2, MANY_WORKGROUPS]].into_iter().filter_map(chosen)
    }

    /// Those that fit.
    fn of(gpu: &Gpu, kv_type: KvType, head_dim: usize) -> impl Iterator<Item = Self> {
        let exists = kv_type != KvType::F32 && head_dim.is_multiple_of(16) && head_dim <= MOST_DIM;
        let matrices = gpu.matrices.filter(|_| exists);
        let variants =
            TILES.into_iter().filter_map(move |tile| Some(Self { matrices: matrices?, kv_type, head_dim, tile }));
        let memory = gpu.caps.workgroup_memory as usize;
        variants.filter(move |variant| variant.fits(memory))
    }

    fn fits(self, workgroup_memory: usize) -> bool {
        (self.head_dim / 16).is_multiple_of(self.tile.split) && self.workgroup_bytes() <= workgroup_memory
    }

    /// As `attention_tile.wgsl` divides it: weights, keys and values, scores, places of two tiles, a value of each row, flags.
    fn workgroup_bytes(self) -> usize {
        let Self { head_dim, tile, .. } = self;
        let (rows, keys) = (tile.rows(), tile.keys);
        let halves = rows * (keys + 8) + 2 * keys * (head_dim + 8);
        2 * halves + 4 * (rows * (keys + 4) + 2 * keys + rows + 4)
    }

    pub(super) fn kernel(self) -> Kernel {
        let Self { matrices, kv_type, head_dim, tile } = self;
        let Tile { tokens, heads, keys, shared, split } = tile;
        let size = matrices.size.rows();
        let invocations = 32 * split * (tile.rows() / shared);
        let units = keys * head_dim / KV_UNIT;
        let constants = [
            ("SIZE", size),
            ("DIM", head_dim),
            ("CHUNKS", head_dim / KV_UNIT),
            ("TILE_TOKENS", tokens),
            ("HEADS", heads),
            ("TILE_KEYS", keys),
            ("SHARED_ROWS", shared),
            ("SPLIT", split),
            // Workgroups of a query tile; 16 dimensions of a head, those of a subgroup, and matrices along 16; matrices along the rows of a
            // subgroup; matrices of keys, and those of a subgroup; octets of scores of an invocation, of which a row has so many; units of a
            // tile that each brings.
            ("PARTS", TILE_TOKENS / tokens),
            ("ALL_BLOCKS", head_dim / 16),
            ("BLOCKS", head_dim / 16 / split),
            ("PER_BLOCK", 16 / size),
            ("ROW_BLOCKS", shared / size),
            ("ALL_KEY_BLOCKS", keys / size),
            ("KEY_BLOCKS", keys / size / split),
            ("OCTETS", keys / KV_UNIT * tile.rows() / invocations),
            ("PER_ROW", invocations / tile.rows()),
            ("LOADS", units.div_ceil(invocations)),
        ];
        let all_loads = units.is_multiple_of(invocations);
        let constants: String = constants.iter().map(|(name, value)| format!("const {name} = {value}u;\n")).collect();
        let prelude = format!(
            "{ATTENTION_TOKEN}{QUERY_TILE}{}{constants}const ALL_LOADS = {all_loads};\n",
            kv_constants(kv_type)
        );
        let planes = KvPlanes::of(kv_type);
        let read = Binding::read;
        let mut bindings = vec![
            read("qkv", "vec4<f32>"),
            read("keys", planes.reads),
            read("values", planes.reads),
            read("attention_tokens", "AttentionToken"),
            read("query_tiles", "QueryTile"),
            read("block_tables", "u32"),
            Binding::write("out", "vec4<f32>"),
            read("sinks", "f32"),
        ];
        if kv_type.code().is_some() {
            bindings.extend([read("key_scales", "f16"), read("value_scales", "f16")]);
        }
        let files = vec![
            matrices.module(),
            planes.load,
            include_str!("../shaders/attention_sinks.wgsl"),
            include_str!("../shaders/attention_units.wgsl"),
            include_str!("../shaders/attention_tile.wgsl"),
        ];
        Kernel { name: "attention_tile", prelude, bindings, files }
    }
}

impl TileAttention {
    pub(super) fn new() -> Self {
        Self { kernels: Variants::default() }
    }

    /// Attention of a step's query tiles; `false` if such heads have no kernel.
    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn run(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &StepBuffers,
        qkv: &GpuBuffer,
        shape: &AttentionShape,
        sinks: Option<&GpuVector>,
        kv: &GpuKvCache,
        layer: usize,
        out: &GpuBuffer,
    ) -> Result<bool, KernelError> {
        let Some(variant) = TileVariant::new(gpu, kv.kv_type, shape, step.tiles()) else { return Ok(false) };
        let kernel = self.kernels.get(gpu, variant, TileVariant::kernel)?;
        let cache = &kv.layers[layer];
        let StepBuffers { attention_tokens, query_tiles, block_tables, .. } = step;
        let (keys, values) = (&cache.keys.storage, &cache.values.storage);
        let sink_scores = sink_scores(sinks, qkv);
        let buffers =
            [&qkv.storage, keys, values, attention_tokens, query_tiles, block_tables, &out.storage, sink_scores];
        let scales = cache.keys.scales.iter().chain(&cache.values.scales);
        let parameters = [
            shape.heads as u32,
            shape.kv_heads as u32,
            shape.scale.to_bits(),
            window(shape),
            kv.block_tokens as u32,
            kv.slots() as u32,
            u32::from(sinks.is_some()),
        ];
        let Tile { tokens, heads, .. } = variant.tile;
        let workgroups = [shape.heads / heads, step.tiles() * (TILE_TOKENS / tokens), 1];
        recorder.dispatch(kernel, buffers.into_iter().chain(scales), &parameters, workgroups);
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
        for (kv_type, head_dim) in [(KvType::F16, 64_usize), (KvType::F16, 128), (KvType::Fp8, 80), (KvType::Fp4, 256)]
        {
            for tile in TILES.into_iter().filter(|tile| (head_dim / 16).is_multiple_of(tile.split)) {
                let variant = TileVariant { matrices, kv_type, head_dim, tile };
                spirv::assert_cooperative(&variant.kernel(), &format!("{variant:?}"));
            }
        }
    }
}
