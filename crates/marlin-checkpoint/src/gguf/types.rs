//! How the tensors of a GGUF file are stored.

use std::fmt;

use marlin_format::{Element, Grouping, ScaleKind, Scheme, ZeroKind};

/// How a tensor is stored: `ggml_type` of ggml, as far as it is read.
///
/// Rows are cut into blocks of 1, 32 or 256 weights. Each type has a [`Scheme`] that means the same, so that a matrix
/// of any of them is packed without loss:
///
/// | type | id | weights of a block | its bytes | scheme |
/// | --- | ---: | ---: | ---: | --- |
/// | F32 | 0 | 1 | 4 | f32 |
/// | F16 | 1 | 1 | 2 | f16 |
/// | BF16 | 30 | 1 | 2 | bf16 |
/// | Q4_0 | 2 | 32 | 18 | signed integers of 4 bits, an f16 scale for 32 |
/// | Q4_1 | 3 | 32 | 20 | unsigned integers of 4 bits, an f16 scale and an f16 bias for 32 |
/// | Q5_0 | 6 | 32 | 22 | signed integers of 5 bits, an f16 scale for 32 |
/// | Q5_1 | 7 | 32 | 24 | unsigned integers of 5 bits, an f16 scale and an f16 bias for 32 |
/// | Q8_0 | 8 | 32 | 34 | signed integers of 8 bits, an f16 scale for 32 |
/// | Q2_K | 10 | 256 | 84 | unsigned integers of 2 bits, 4-bit scales and minima for 16, times an f16 each for 256 |
/// | Q3_K | 11 | 256 | 110 | signed integers of 3 bits, signed 6-bit scales for 16, times an f16 for 256 |
/// | Q4_K | 12 | 256 | 144 | unsigned integers of 4 bits, 6-bit scales and minima for 32, times an f16 each for 256 |
/// | Q5_K | 13 | 256 | 176 | unsigned integers of 5 bits, 6-bit scales and minima for 32, times an f16 each for 256 |
/// | Q6_K | 14 | 256 | 210 | signed integers of 6 bits, signed 8-bit scales for 16, times an f16 for 256 |
/// | IQ4_NL | 20 | 32 | 18 | 16 values of a table, an f16 scale for 32 |
/// | MXFP4 | 39 | 32 | 17 | E2M1, a power of two for 32 |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgufType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// d · (q − 8), 4 bits.
    Q4_0,
    /// d · q + m, 4 bits.
    Q4_1,
    /// d · (q − 16), 5 bits.
    Q5_0,
    /// d · q + m, 5 bits.
    Q5_1,
    /// d · q, 8 bits in two's complement.
    Q8_0,
    /// d · scale · q − dmin · min, 2 bits.
    Q2K,
    /// d · (scale − 32) · (q − 4), 3 bits.
    Q3K,
    /// d · scale · q − dmin · min, 4 bits.
    Q4K,
    /// d · scale · q − dmin · min, 5 bits.
    Q5K,
    /// d · scale · (q − 32), 6 bits.
    Q6K,
    /// d · table\[q\], 4 bits.
    Iq4Nl,
    /// 2^(e − 127) · E2M1 (OCP Microscaling v1.0).
    Mxfp4,
}

impl GgufType {
    /// All types that are read.
    pub const ALL: [GgufType; 15] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Mxfp4,
    ];

    /// Number in files, name in ggml, weights of a block, bytes of a block.
    const fn row(self) -> (u32, &'static str, usize, usize) {
        match self {
            Self::F32 => (0, "F32", 1, 4),
            Self::F16 => (1, "F16", 1, 2),
            Self::Bf16 => (30, "BF16", 1, 2),
            Self::Q4_0 => (2, "Q4_0", 32, 18),
            Self::Q4_1 => (3, "Q4_1", 32, 20),
            Self::Q5_0 => (6, "Q5_0", 32, 22),
            Self::Q5_1 => (7, "Q5_1", 32, 24),
            Self::Q8_0 => (8, "Q8_0", 32, 34),
            Self::Q2K => (10, "Q2_K", 256, 84),
            Self::Q3K => (11, "Q3_K", 256, 110),
            Self::Q4K => (12, "Q4_K", 256, 144),
            Self::Q5K => (13, "Q5_K", 256, 176),
            Self::Q6K => (14, "Q6_K", 256, 210),
            Self::Iq4Nl => (20, "IQ4_NL", 32, 18),
            Self::Mxfp4 => (39, "MXFP4", 32, 17),
        }
    }

    /// The number in files.
    pub(super) const fn id(self) -> u32 {
        self.row().0
    }

    /// The type with this number.
    pub(super) fn from_id(id: u32) -> Result<Self, String> {
        if let Some(found) = Self::ALL.into_iter().find(|known| known.row().0 == id) {
            return Ok(found);
        }
        let known: Vec<String> = Self::ALL.iter().map(ToString::to_string).collect();
        let name = match UNREAD.iter().find(|(unread, _)| *unread == id) {
            Some((_, name)) => format!("{name} (type {id}), which is not read yet"),
            None => format!("type {id}, which is unknown"),
        };
        Err(format!("it is stored as {name}; take a file whose tensors are {}", known.join(", ")))
    }

    /// Weights of a block.
    pub const fn block_weights(self) -> usize {
        self.row().2
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Bytes of a tensor of this shape, outermost dimension first.
    pub(super) fn bytes(self, shape: &[usize]) -> Result<usize, String> {
        let (cols, block) = (shape.last().copied().unwrap_or(1), self.block_weights());
        if !cols.is_multiple_of(block) {
            return Err(format!(
                "rows of {cols} weights are no whole blocks of {self}, which have {block}; {}",
                super::DAMAGED
            ));
        }
        let weights = shape.iter().try_fold(1, |product: usize, &size| product.checked_mul(size));
        weights
            .and_then(|weights| (weights / block).checked_mul(self.block_bytes()))
            .ok_or_else(|| format!("its shape {shape:?} is too large to address; {}", super::DAMAGED))
    }

    /// The scheme that means the same, bit by bit.
    pub const fn scheme(self) -> Scheme {
        const fn scaled(element: Element, group: u32, scale: ScaleKind, zero: ZeroKind) -> Scheme {
            Scheme { zero, ..Scheme::scaled(element, Grouping::Columns(group), scale) }
        }
        const fn two_level(bits: u8, signed: bool) -> ScaleKind {
            ScaleKind::TwoLevel { bits, signed, super_group: 256 }
        }
        use Element::{E2M1, Int, Iq4Nl, Uint};
        use ScaleKind::{E8M0, F16};
        use ZeroKind::{F16Bias, None, TwoLevelMin};
        match self {
            Self::F32 => Scheme::F32,
            Self::F16 => Scheme::F16,
            Self::Bf16 => Scheme::BF16,
            Self::Q4_0 => scaled(Int(4), 32, F16, None),
            Self::Q4_1 => scaled(Uint(4), 32, F16, F16Bias),
            Self::Q5_0 => scaled(Int(5), 32, F16, None),
            Self::Q5_1 => scaled(Uint(5), 32, F16, F16Bias),
            Self::Q8_0 => scaled(Int(8), 32, F16, None),
            Self::Q2K => scaled(Uint(2), 16, two_level(4, false), TwoLevelMin { bits: 4 }),
            Self::Q3K => scaled(Int(3), 16, two_level(6, true), None),
            Self::Q4K => scaled(Uint(4), 32, two_level(6, false), TwoLevelMin { bits: 6 }),
            Self::Q5K => scaled(Uint(5), 32, two_level(6, false), TwoLevelMin { bits: 6 }),
            Self::Q6K => scaled(Int(6), 16, two_level(8, true), None),
            Self::Iq4Nl => scaled(Iq4Nl, 32, F16, None),
            Self::Mxfp4 => scaled(E2M1, 32, E8M0, None),
        }
    }
}

/// The name in ggml.
impl fmt::Display for GgufType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().1)
    }
}

/// Types of ggml that are not read, for messages.
const UNREAD: [(u32, &str); 19] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];
