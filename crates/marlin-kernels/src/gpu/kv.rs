//! The paged cache on the device.

use half::f16;

use super::device::{Gpu, Storage};
use crate::{AttentionShape, KernelError, KvLayer, KvLayout, KvType, Values};

/// Widest head that the attention kernels have room for.
const MAX_HEAD_DIM: usize = 512;

/// Widest key whose first values are the values: a latent vector and what is rotated.
pub(super) const MAX_LATENT_DIM: usize = 1024;

/// Values of a head that kernels load at once.
pub(super) const KV_UNIT: usize = 8;

/// A pool of KV blocks.
#[derive(Debug)]
pub struct GpuKvCache {
    pub(super) kv_type: KvType,
    pub(super) block_tokens: usize,
    pub(super) blocks: usize,
    pub(super) layers: Vec<GpuKvLayer>,
}

/// Keys and values of one layer, `[heads, slots, dim]` each.
#[derive(Debug)]
pub(super) struct GpuKvLayer {
    pub(super) heads: usize,
    pub(super) keys: GpuKvPlane,
    pub(super) values: GpuKvPlane,
}

#[derive(Debug)]
pub(super) struct GpuKvPlane {
    /// 0 if values are those of keys: there is the least of memory that can be bound.
    pub(super) dim: usize,
    /// Values or codes.
    pub(super) storage: Storage,
    /// Of codes.
    pub(super) scales: Option<Storage>,
}

impl GpuKvLayer {
    /// Kernels rely on it.
    pub(super) fn check(&self, shape: &AttentionShape) {
        assert!(shape.kv_heads == self.heads && shape.heads.is_multiple_of(shape.kv_heads), "heads of the cache");
        let cached = match shape.values {
            Values::Cached => shape.head_dim,
            Values::OfKeys(_) => 0,
        };
        assert!(self.keys.dim == shape.head_dim && self.values.dim == cached, "heads of the cache's width");
    }
}

/// Whether kernels have room for a layer's heads: those of keys that are values, too, may be wider.
fn check_dims(layer: &KvLayer) -> Result<(), KernelError> {
    let (most, dims) = match layer.value_dim {
        0 => (MAX_LATENT_DIM, [layer.key_dim; 2]),
        value_dim => (MAX_HEAD_DIM, [layer.key_dim, value_dim]),
    };
    let fits = |dim: &usize| (KV_UNIT..=most).contains(dim) && dim.is_multiple_of(KV_UNIT);
    dims.into_iter().find(|dim| !fits(dim)).map_or(Ok(()), |dim| {
        Err(KernelError::Device(format!(
            "the GPU's attention has heads of {KV_UNIT} to {most} dimensions, multiples of {KV_UNIT}, found {dim}; \
             use the CPU instead"
        )))
    })
}

impl GpuKvPlane {
    /// Words of a slot of one head.
    pub(super) fn words(&self, kv_type: KvType) -> usize {
        value_bytes(kv_type, self.dim) / size_of::<u32>()
    }

    /// Scales of a slot of one head.
    pub(super) fn scales_of_head(&self, kv_type: KvType) -> usize {
        kv_type.code().map_or(0, |code| code.scales(self.dim))
    }
}

/// Bytes of a head's values, or of their codes without the scales.
fn value_bytes(kv_type: KvType, dim: usize) -> usize {
    kv_type.code().map_or_else(|| kv_type.head_bytes(dim), |code| code.bytes(dim))
}

/// The plane of a layer that is the largest, in words, and its bytes of a slot. The scales of codes are fewer than the codes.
fn largest_plane(layout: &KvLayout, kv_type: KvType) -> Option<(&'static str, usize)> {
    let planes = layout.layers.iter().flat_map(|layer| {
        [("keys", layer.key_dim), ("values", layer.value_dim)]
            .map(|(plane, dim)| (plane, layer.heads.saturating_mul(value_bytes(kv_type, dim))))
    });
    // Of those of a size the first.
    planes.rev().max_by_key(|(_, bytes)| *bytes)
}

impl GpuKvCache {
    pub(super) fn new(gpu: &Gpu, layout: &KvLayout, kv_type: KvType, blocks: usize) -> Result<Self, KernelError> {
        layout.check()?;
        layout.layers.iter().try_for_each(check_dims)?;
        Self::check_blocks(gpu, layout, kv_type, blocks)?;
        let slots = blocks.saturating_mul(layout.block_tokens);
        let plane = |heads: usize, dim: usize| -> Result<_, KernelError> {
            let storage = |bytes: usize| gpu.storage("the KV cache", heads.saturating_mul(slots).saturating_mul(bytes));
            let scales = kv_type.code().map(|code| code.scales(dim) * size_of::<f16>());
            Ok(GpuKvPlane {
                dim,
                storage: storage(value_bytes(kv_type, dim))?,
                scales: scales.map(storage).transpose()?,
            })
        };
        let layers = layout.layers.iter().map(|layer| {
            Ok(GpuKvLayer {
                heads: layer.heads,
                keys: plane(layer.heads, layer.key_dim)?,
                values: plane(layer.heads, layer.value_dim)?,
            })
        });
        Ok(Self {
            kv_type,
            block_tokens: layout.block_tokens,
            blocks,
            layers: layers.collect::<Result<_, KernelError>>()?,
        })
    }

    /// As [`MemoryUse::most_kv_blocks`](crate::MemoryUse::most_kv_blocks).
    pub(super) fn most_blocks(gpu: &Gpu, layout: &KvLayout, kv_type: KvType) -> usize {
        let Some((_, slot_bytes)) = largest_plane(layout, kv_type) else { return usize::MAX };
        // Buffers are multiples of 16 bytes.
        let binding = usize::try_from(gpu.caps.max_binding / 16 * 16).unwrap_or(usize::MAX);
        (binding / slot_bytes.max(1)) / layout.block_tokens.max(1)
    }

    /// As [`MemoryUse::check_kv_blocks`](crate::MemoryUse::check_kv_blocks).
    pub(super) fn check_blocks(
        gpu: &Gpu,
        layout: &KvLayout,
        kv_type: KvType,
        blocks: usize,
    ) -> Result<(), KernelError> {
        let most = Self::most_blocks(gpu, layout, kv_type);
        match largest_plane(layout, kv_type) {
            Some((plane, slot_bytes)) if blocks > most => {
                let tokens = blocks.saturating_mul(layout.block_tokens);
                let what = format!("one layer of the KV cache ({plane} of {tokens} tokens in {})", kv_type.name());
                let advice = format!(
                    "choose room for {} tokens at most besides a spare block, by a shorter context (--context), fewer sequences at once (--streams, \
                     --concurrency) or keys and values of fewer bits (--kv), or use the CPU instead",
                    most.saturating_sub(1) * layout.block_tokens
                );
                Err(gpu.beyond_binding(&what, slot_bytes.saturating_mul(tokens), &advice))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn slots(&self) -> usize {
        self.blocks * self.block_tokens
    }
}
