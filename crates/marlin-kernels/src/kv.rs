//! Layout of the paged KV cache.

use half::f16;
use marlin_format::Element;

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
///
/// Of the quantised ones, a head's key or value of a token is rounded by itself, and some of its values share a scale in half
/// precision: the largest magnitude over the largest code. Codes are relative to the scale as it is stored, rounded to nearest, ties to
/// even. A head that holds what is not finite gets an infinite scale, so that all it gives is not finite either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// Half precision. Values beyond ±65504 become infinite; a model that has such needs [`KvType::F32`].
    #[default]
    F16,
    /// Single precision.
    F32,
    /// [`Element::E4M3`], a scale for each head of a token.
    Fp8,
    /// Integers of 8 bits, a scale for each head of a token.
    Int8,
    /// [`Element::E2M1`], a scale for each 32 values of a head.
    Fp4,
}

/// How a quantised type stores a head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct KvCode {
    pub(crate) element: Element,
    /// The largest value of a code that is used.
    pub(crate) largest: f32,
    /// Values that share a scale, fewer at the end of a head.
    pub(crate) group: usize,
}

impl KvType {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::F16, Self::F32, Self::Fp8, Self::Int8, Self::Fp4];

    /// Its name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Fp4 => "fp4",
        }
    }

    /// The codes of a quantised type.
    pub(crate) fn code(self) -> Option<KvCode> {
        let (element, largest, group) = match self {
            Self::F16 | Self::F32 => return None,
            Self::Fp8 => (Element::E4M3, 448.0, usize::MAX),
            Self::Int8 => (Element::Int(8), 127.0, usize::MAX),
            Self::Fp4 => (Element::E2M1, 6.0, 32),
        };
        Some(KvCode { element, largest, group })
    }

    /// Bytes of a key or a value of one head of one token, scales included.
    pub fn head_bytes(self, dim: usize) -> usize {
        match self.code() {
            None if self == Self::F32 => dim * size_of::<f32>(),
            None => dim * size_of::<f16>(),
            Some(code) => code.bytes(dim) + code.scales(dim) * size_of::<f16>(),
        }
    }
}

impl KvCode {
    /// Bytes of a head's codes.
    pub(crate) fn bytes(self, dim: usize) -> usize {
        (dim * self.element.bits() as usize).div_ceil(8)
    }

    /// Scales of a head.
    pub(crate) fn scales(self, dim: usize) -> usize {
        dim.div_ceil(self.group)
    }
}

impl KvLayer {
    /// Bytes that one token takes.
    pub fn bytes_per_token(&self, kv_type: KvType) -> usize {
        self.heads * (kv_type.head_bytes(self.key_dim) + kv_type.head_bytes(self.value_dim))
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
        self.layers.iter().map(|layer| layer.bytes_per_token(kv_type)).sum()
    }
}
