//! Layout of the paged KV cache.

use crate::KernelError;

/// How keys and values of a model are cached: the same block size in every layer, sizes per layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayout {
    /// Tokens of a block.
    pub block_tokens: usize,
    /// One entry a layer.
    pub layers: Vec<KvLayer>,
}

/// What one layer caches of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayer {
    /// Key and value heads.
    pub heads: usize,
    /// Width of a key head.
    pub key_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// The layer looks back over this many positions only; over all of them if `None`.
    pub window: Option<usize>,
}

/// Number format of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// Half precision. Values beyond ±65504 become infinite; a model that has such needs [`KvType::F32`].
    #[default]
    F16,
    /// Single precision.
    F32,
}

impl KvType {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::F16, Self::F32];

    /// Bytes of one cached value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

impl KvLayout {
    /// Refuses what no pool can be made of.
    pub(crate) fn check(&self) -> Result<(), KernelError> {
        if self.block_tokens == 0 {
            return Err(KernelError::Device("a KV block must hold at least one token, found block_tokens = 0".into()));
        }
        Ok(())
    }

    /// Bytes of a pool of so many blocks.
    pub fn pool_bytes(&self, kv_type: KvType, blocks: usize) -> usize {
        blocks.saturating_mul(self.block_tokens).saturating_mul(self.bytes_per_token(kv_type))
    }

    /// Bytes that one token takes over all layers.
    pub fn bytes_per_token(&self, kv_type: KvType) -> usize {
        self.layers.iter().map(|l| l.heads * (l.key_dim + l.value_dim) * kv_type.bytes()).sum()
    }
}
