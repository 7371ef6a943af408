//! Attention over the paged cache, and what prepares it.

mod combine;
mod latent;
mod split;
mod store;
mod tile;

use std::sync::Arc;

use self::combine::{Combine, CombineVariant};
use self::latent::{LatentAttention, LatentVariant};
use self::split::{RotateVariant, Rotation, SplitAttention, SplitVariant};
use self::store::{LATENT_STORE_SIZE, LatentStoreVariant, StoreVariant};
use self::tile::{TileAttention, TileVariant};
use super::device::{Gpu, Storage};
use super::kv::{GpuKvLayer, KV_UNIT};
use super::linear::LinearEncoder;
use super::pipeline::{Binding, Kernel, Pipeline, Variants};
use super::recorder::Recorder;
use super::step::StepBuffers;
use super::{GpuArithmetic, GpuBackend, GpuBuffer, GpuKvCache, GpuVector};
use crate::{AttentionShape, KernelError, KvType, LatentShape, QkNorm, RopeLayout, StepLimits, Values};

/// Records attention and what the cache needs.
pub(super) struct AttentionEncoder {
    store: Variants<StoreVariant>,
    latent_store: Variants<LatentStoreVariant>,
    split: SplitAttention,
    tile: TileAttention,
    latent: LatentAttention,
    combine: Combine,
    /// Of words, and of scales in half precision.
    copy_block: [Arc<Pipeline>; 2],
}

/// Compiles the kernels for heads of these widths, and for keys and the values that are part of them, which attention does for those that it meets.
pub(super) fn compile(gpu: &Gpu, head_dims: &[usize], latent_dims: &[[usize; 2]]) -> Result<(), KernelError> {
    let cached = head_dims.iter().map(|&head_dim| (head_dim, Values::Cached));
    let latent = latent_dims.iter().map(|&[key_dim, value_dim]| (key_dim, Values::OfKeys(value_dim)));
    for (head_dim, values) in cached.chain(latent) {
        for packs in [false, true].into_iter().filter(|packs| !packs || packs_heads(gpu, head_dim, values)) {
            gpu.pipeline(&CombineVariant::new(head_dim, values, packs).kernel())?;
            for kv_type in KvType::ALL {
                for variant in [1, 2, 4].map(|group| SplitVariant::new(gpu, kv_type, head_dim, values, group, packs)) {
                    gpu.pipeline(&variant.kernel())?;
                    let ropes = [RopeLayout::HalfSplit, RopeLayout::Interleaved];
                    let rotates = ropes.into_iter().flat_map(|rope| [false, true].map(|normed| (rope, normed)));
                    for (rope, normed) in rotates.filter(|_| kv_type == KvType::F16 && values == Values::Cached) {
                        gpu.pipeline(&variant.rotating(RotateVariant { rope, normed }).kernel())?;
                    }
                }
            }
        }
    }
    for &head_dim in head_dims {
        for variant in KvType::ALL.into_iter().flat_map(|kv_type| TileVariant::used(gpu, kv_type, head_dim)) {
            gpu.pipeline(&variant.kernel())?;
        }
    }
    for &dims in latent_dims {
        for variant in KvType::ALL.into_iter().flat_map(|kv_type| LatentVariant::used(gpu, kv_type, dims)) {
            gpu.pipeline(&variant.kernel())?;
        }
    }
    for kv_type in KvType::ALL {
        for rope in [RopeLayout::HalfSplit, RopeLayout::Interleaved] {
            gpu.pipeline(&LatentStoreVariant { kv_type, rope }.kernel())?;
            for normed in [false, true] {
                gpu.pipeline(&StoreVariant { kv_type, normed, rope }.kernel())?;
            }
        }
    }
    Ok(())
}

/// Whether heads of this width can be packed for a linear as attention writes them: they are whole units of it. What latent attention gives goes to
/// a linear of each head.
fn packs_heads(gpu: &Gpu, head_dim: usize, values: Values) -> bool {
    gpu.arithmetic == GpuArithmetic::Half && head_dim.is_multiple_of(32) && values == Values::Cached
}

/// Why kernels do not take a head whose width is no multiple of [`KV_UNIT`].
fn check_units(what: &str, dim: usize) -> Result<(), KernelError> {
    if dim.is_multiple_of(KV_UNIT) {
        return Ok(());
    }
    Err(KernelError::Device(format!(
        "the GPU's latent attention has {what} whose width is a multiple of {KV_UNIT}, found {dim}; use the CPU instead"
    )))
}

/// What kernels know of a token.
const STEP_TOKEN: &str =
    "struct StepToken {\n    position: u32,\n    // Where its sequence's block table begins.\n    table: u32,\n}\n";

/// What attention's kernels know of a token.
const ATTENTION_TOKEN: &str = "struct AttentionToken {\n    row: u32,\n    position: u32,\n    // Where its sequence's block table begins.\n    \
                               table: u32,\n}\n";

/// Positions that a query looks back over, as kernels see it.
fn window(shape: &AttentionShape) -> u32 {
    shape.window.and_then(|window| u32::try_from(window).ok()).unwrap_or(u32::MAX)
}

/// What is bound as the sinks; anything will do if there are none.
fn sink_scores<'a>(sinks: Option<&'a GpuVector>, qkv: &'a GpuBuffer) -> &'a Storage {
    sinks.map_or(&qkv.storage, |sinks| &sinks.storage)
}

/// Holds what prepares attention against the cache's layer and the step.
fn check_rotation(
    kv: &GpuKvCache,
    layer: usize,
    step: &StepBuffers,
    qkv: &GpuBuffer,
    shape: &AttentionShape,
    Rotation { angles, norm }: &Rotation<'_>,
) {
    kv.layers[layer].check(shape);
    assert_eq!((qkv.rows, qkv.width, shape.values), (step.rows, shape.row_width(), Values::Cached));
    assert!(angles.rows == qkv.rows && angles.width.is_multiple_of(2) && angles.width <= shape.head_dim);
    for norm in norm.iter().flat_map(|norm| [norm.q, norm.k]) {
        assert_eq!(norm.values.len(), shape.head_dim, "a norm over a head");
    }
}

impl AttentionEncoder {
    pub(super) fn bytes(limits: &StepLimits) -> usize {
        Combine::bytes(limits)
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let copy_block = |element: &'static str| {
            let bindings = vec![Binding::write("plane", element)];
            let files = vec![include_str!("../shaders/copy_block.wgsl")];
            gpu.pipeline(&Kernel { name: "copy_block", prelude: String::new(), bindings, files })
        };
        Ok(Self {
            store: Variants::default(),
            latent_store: Variants::default(),
            split: SplitAttention::default(),
            tile: TileAttention::new(),
            latent: LatentAttention::default(),
            combine: Combine::new(gpu, limits)?,
            copy_block: [copy_block("u32")?, copy_block("f16")?],
        })
    }

    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn rope_store_kv(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &StepBuffers,
        qkv: &mut GpuBuffer,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, GpuBackend>>,
        angles: &GpuBuffer,
        kv: &mut GpuKvCache,
        layer: usize,
    ) {
        let rotation = Rotation { angles, norm };
        check_rotation(kv, layer, step, qkv, shape, &rotation);
        let (cache, norm) = (&kv.layers[layer], rotation.norm);
        qkv.written();
        let variant = StoreVariant { kv_type: kv.kv_type, normed: norm.is_some(), rope: shape.rope };
        let kernel = match self.store.get(gpu, variant, StoreVariant::kernel) {
            Ok(kernel) => kernel,
            Err(error) => return gpu.fail(&error),
        };
        let StepBuffers { step_tokens, block_tables, .. } = step;
        let buffers =
            [&qkv.storage, &angles.storage, &cache.keys.storage, &cache.values.storage, step_tokens, block_tables];
        let scales = cache.keys.scales.iter().chain(&cache.values.scales);
        let norms = norm.iter().flat_map(|norm| [&norm.q.storage, &norm.k.storage]);
        let parameters = [
            shape.heads as u32,
            shape.kv_heads as u32,
            shape.head_dim as u32,
            angles.width as u32,
            kv.block_tokens as u32,
            kv.slots() as u32,
            norm.as_ref().map_or(0.0, |norm| norm.eps).to_bits(),
        ];
        let workgroups = [shape.heads + 2 * shape.kv_heads, qkv.rows, 1];
        recorder.dispatch(kernel, buffers.into_iter().chain(scales).chain(norms), &parameters, workgroups);
    }

    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn latent_store_kv(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &StepBuffers,
        q: &GpuBuffer,
        kv: &GpuBuffer,
        shape: &LatentShape,
        norm: &GpuVector,
        eps: f32,
        angles: &GpuBuffer,
        cache: &mut GpuKvCache,
        layer: usize,
        queries: &mut GpuBuffer,
    ) {
        let LatentShape { heads, nope_dim, rope_dim, rank, rope } = *shape;
        let key_dim = shape.key_dim();
        let GpuKvLayer { heads: kv_heads, keys, values } = &cache.layers[layer];
        assert_eq!((*kv_heads, keys.dim, values.dim), (1, key_dim, 0), "a cache of latent vectors");
        assert_eq!((q.rows, q.width), (step.rows, heads * (nope_dim + rope_dim)));
        assert_eq!((kv.rows, norm.values.len()), (step.rows, rank));
        assert!(kv.width >= key_dim, "rows that end in a latent vector and the rotated part");
        assert_eq!((angles.rows, angles.width, rope_dim % 2), (step.rows, rope_dim, 0));
        queries.output(step.rows, heads * key_dim);
        let variant = LatentStoreVariant { kv_type: cache.kv_type, rope };
        let kernel = match self.latent_store.get(gpu, variant, LatentStoreVariant::kernel) {
            Ok(kernel) => kernel,
            Err(error) => return gpu.fail(&error),
        };
        let StepBuffers { step_tokens, block_tables, .. } = step;
        let (rows, vectors) = ([&q.storage, &kv.storage], [&norm.storage, &angles.storage]);
        let planes = [&keys.storage, &values.storage, step_tokens, block_tables, &queries.storage];
        let buffers = rows.into_iter().chain(vectors).chain(planes).chain(keys.scales.iter().chain(&values.scales));
        let parameters = [
            heads as u32,
            nope_dim as u32,
            rope_dim as u32,
            rank as u32,
            key_dim as u32,
            cache.block_tokens as u32,
            eps.to_bits(),
            kv.width as u32,
        ];
        let workgroups = [1 + (heads * rope_dim / 2).div_ceil(LATENT_STORE_SIZE), step.rows, 1];
        recorder.dispatch(kernel, buffers, &parameters, workgroups);
    }

    /// [`Self::rope_store_kv`] and [`Self::attention`], in one kernel where that can be.
    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn rope_attention(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &StepBuffers,
        qkv: &mut GpuBuffer,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, GpuBackend>>,
        angles: &GpuBuffer,
        sinks: Option<&GpuVector>,
        kv: &mut GpuKvCache,
        layer: usize,
        out: &mut GpuBuffer,
        linear: &mut LinearEncoder,
    ) {
        let rotation = Rotation { angles, norm };
        if rotation.fits(gpu, step, shape, kv.kv_type) {
            check_rotation(kv, layer, step, qkv, shape, &rotation);
            self.attention(gpu, recorder, step, qkv, shape, sinks, kv, layer, out, linear, Some(&rotation));
        } else {
            self.rope_store_kv(gpu, recorder, step, qkv, shape, rotation.norm, angles, kv, layer);
            self.attention(gpu, recorder, step, qkv, shape, sinks, kv, layer, out, linear, None);
        }
    }

    /// Attention of rows that are prepared, or that `rotation` prepares on the way.
    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn attention(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &StepBuffers,
        qkv: &GpuBuffer,
        shape: &AttentionShape,
        sinks: Option<&GpuVector>,
        kv: &GpuKvCache,
        layer: usize,
        out: &mut GpuBuffer,
        linear: &mut LinearEncoder,
        rotation: Option<&Rotation<'_>>,
    ) {
        out.output(step.rows, shape.heads * shape.value_dim());
        kv.layers[layer].check(shape);
        assert_eq!((qkv.rows, qkv.width), (step.rows, shape.row_width()));
        assert!(sinks.is_none_or(|sinks| sinks.values.len() == shape.heads), "a sink for each head");
        let Self { split, tile, latent, combine, .. } = self;
        let mut run = || {
            check_units("values", shape.value_dim())?;
            if latent.run(gpu, recorder, step, qkv, shape, sinks, kv, layer, out, combine)? {
                return Ok(());
            }
            let tiled = tile.run(gpu, recorder, step, qkv, shape, sinks, kv, layer, out)?;
            let tokens = if tiled { step.untiled } else { step.rows };
            // The linear that follows finds its input packed, if all of it is.
            let packs = tokens == step.rows && packs_heads(gpu, shape.head_dim, shape.values);
            let packed = if packs { linear.pack_output(out) } else { None };
            split.run(gpu, recorder, step, tokens, qkv, shape, sinks, kv, layer, out, combine, packed, rotation)
        };
        if let Err(error) = run() {
            gpu.fail(&error);
        }
    }

    pub(super) fn copy_blocks(&self, recorder: &mut Recorder, kv: &GpuKvCache, pairs: &[(u32, u32)]) {
        let within = |&block: &u32| (block as usize) < kv.blocks;
        assert!(pairs.iter().all(|(from, to)| within(from) && within(to)), "blocks of the cache");
        for (layer, plane) in kv.layers.iter().flat_map(|layer| [(layer, &layer.keys), (layer, &layer.values)]) {
            let scales = plane.scales.as_ref().map(|scales| (scales, plane.scales_of_head(kv.kv_type), 1));
            for (storage, slot, kernel) in
                [Some((&plane.storage, plane.words(kv.kv_type), 0)), scales].into_iter().flatten()
            {
                let (block, head) = (kv.block_tokens * slot, kv.slots() * slot);
                for &(from, to) in pairs {
                    let parameters = [block as u32, head as u32, from, to];
                    let workgroups = [block.div_ceil(64), layer.heads, 1];
                    recorder.dispatch(&self.copy_block[kernel], [storage], &parameters, workgroups);
                }
            }
        }
    }
}
