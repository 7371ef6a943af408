//! Attention of many queries of a sequence at once, on matrix units.

use super::store::{KvPlanes, kv_constants};
use super::{ATTENTION_TOKEN, window};
use crate::gpu::device::{Gpu, Matrices};
use crate::gpu::kv::KV_UNIT;
use crate::gpu::pipeline::{Binding, Kernel, Variants};
use crate::gpu::recorder::Recorder;
use crate::gpu::step::{StepBuffers, TILE_TOKENS};
use crate::gpu::{GpuBuffer, GpuKvCache};
use crate::{AttentionShape, KernelError, KvType};

/// Queries and keys of a workgroup's tile; of these the first that fits into workgroup memory. A subgroup has 16 queries, whose sums its
/// registers hold.
const TILES: [[usize; 2]; 3] = [[64, 32], [32, 32], [32, 16]];

/// The widest head whose sums registers hold.
const MOST_DIM: usize = 256;

/// What a query tile is, as kernels see it.
const QUERY_TILE: &str = "struct QueryTile {\n    first: u32,\n    count: u32,\n}\n";

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
    queries: usize,
    keys: usize,
}

impl TileVariant {
    /// `None` if such heads have no kernel on this device, or would lose precision: keys and values become half precision.
    pub(super) fn new(gpu: &Gpu, kv_type: KvType, head_dim: usize) -> Option<Self> {
        let matrices = gpu.matrices?;
        if kv_type == KvType::F32 || !head_dim.is_multiple_of(16) || head_dim > MOST_DIM {
            return None;
        }
        let fits = |&[queries, keys]: &[usize; 2]| {
            let variant = Self { matrices, kv_type, head_dim, queries, keys };
            (variant.workgroup_bytes() <= gpu.caps.workgroup_memory as usize).then_some(variant)
        };
        TILES.iter().find_map(fits)
    }

    /// As `attention_tile.wgsl` divides it: weights, keys, values, scores, a value of each invocation and of each query, a flag.
    fn workgroup_bytes(self) -> usize {
        let Self { head_dim, queries, keys, .. } = self;
        let halves = queries * (keys + 8) + keys * (head_dim + 8) + head_dim * (keys + 8);
        2 * halves + 4 * (queries * (keys + 4) + 3 * queries + 1)
    }

    pub(super) fn kernel(self) -> Kernel {
        let Self { matrices, kv_type, head_dim, queries, keys } = self;
        let size = matrices.size.rows();
        let constants = [
            ("SIZE", size),
            ("DIM", head_dim),
            ("CHUNKS", head_dim / KV_UNIT),
            ("TILE_ROWS", queries),
            ("TILE_KEYS", keys),
            // Workgroups of a query tile; 16 dimensions of a head, and matrices along those; matrices of keys; octets of scores.
            ("PARTS", TILE_TOKENS / queries),
            ("BLOCKS", head_dim / 16),
            ("PER_BLOCK", 16 / size),
            ("KEY_BLOCKS", keys / size),
            ("OCTETS", keys / 16),
        ];
        let constants: String = constants.iter().map(|(name, value)| format!("const {name} = {value}u;\n")).collect();
        let prelude = format!("{ATTENTION_TOKEN}{QUERY_TILE}{}{constants}", kv_constants(kv_type));
        let planes = KvPlanes::of(kv_type);
        let read = Binding::read;
        let mut bindings = vec![
            read("qkv", "vec4<f32>"),
            read("keys", planes.reads),
            read("values", planes.reads),
            read("attention_tokens", "AttentionToken"),
            read("query_tiles", "QueryTile"),
            read("block_tables", "u32"),
            Binding::write("out", "f32"),
        ];
        if kv_type.code().is_some() {
            bindings.extend([read("key_scales", "f16"), read("value_scales", "f16")]);
        }
        let files = vec![matrices.module(), planes.load, include_str!("../shaders/attention_tile.wgsl")];
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
        kv: &GpuKvCache,
        layer: usize,
        out: &GpuBuffer,
    ) -> Result<bool, KernelError> {
        let Some(variant) = TileVariant::new(gpu, kv.kv_type, shape.head_dim) else { return Ok(false) };
        let kernel = self.kernels.get(gpu, variant, TileVariant::kernel)?;
        let cache = &kv.layers[layer];
        let StepBuffers { attention_tokens, query_tiles, block_tables, .. } = step;
        let (keys, values) = (&cache.keys.storage, &cache.values.storage);
        let buffers = [&qkv.storage, keys, values, attention_tokens, query_tiles, block_tables, &out.storage];
        let scales = cache.keys.scales.iter().chain(&cache.values.scales);
        let parameters = [
            shape.heads as u32,
            shape.kv_heads as u32,
            shape.scale.to_bits(),
            window(shape),
            kv.block_tokens as u32,
            kv.slots() as u32,
        ];
        let workgroups = [shape.heads, step.tiles() * (TILE_TOKENS / variant.queries), 1];
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
        for (kv_type, head_dim) in [(KvType::F16, 64), (KvType::F16, 128), (KvType::Fp8, 80), (KvType::Fp4, 256)] {
            for [queries, keys] in TILES {
                let variant = TileVariant { matrices, kv_type, head_dim, queries, keys };
                spirv::assert_cooperative(&variant.kernel(), &format!("{variant:?}"));
            }
        }
    }
}
