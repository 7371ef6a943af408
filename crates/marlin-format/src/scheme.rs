//! How a packed matrix is stored: one value per layout, no code path per layout.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::preset::usual_scale;
use crate::{Element, FormatError};

/// Everything there is to say about the storage of a matrix `[rows, cols]`.
///
/// The value of the weight at row `r`, column `c` is
/// `scale(r, c) · (value(code(r, c)) − zero(r, c)) + bias(r, c)`,
/// where `zero` and `bias` are 0 unless [`Scheme::zero`] says otherwise and `value` is what [`Element`] defines.
///
/// NVFP4, MXFP4, GPTQ, MLX-affine, Q4_K and so on are values of this type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// The code of one weight.
    pub element: Element,
    /// Which weights share a scale (and a zero point).
    #[serde(default, skip_serializing_if = "Grouping::is_tensor")]
    pub grouping: Grouping,
    /// How scales are stored.
    #[serde(default, skip_serializing_if = "ScaleKind::is_none")]
    pub scale: ScaleKind,
    /// What is subtracted from a code's value, or added after scaling.
    #[serde(default, skip_serializing_if = "ZeroKind::is_none")]
    pub zero: ZeroKind,
    /// Whether columns are assigned to groups in order or by an index.
    #[serde(default, skip_serializing_if = "ColumnOrder::is_natural")]
    pub order: ColumnOrder,
    /// Whether every code is stored or two of four.
    #[serde(default, skip_serializing_if = "Sparsity::is_dense")]
    pub sparsity: Sparsity,
}

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grouping {
    /// The whole matrix.
    #[default]
    Tensor,
    /// One output row ("per channel").
    Row,
    /// `n` consecutive columns of one row; the last group of a row may be shorter.
    Columns(u32),
    /// A tile of rows × columns; the last tiles of a row or column may be partial.
    Block {
        /// Rows of a tile.
        rows: u32,
        /// Columns of a tile.
        cols: u32,
    },
}

/// How scales are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleKind {
    /// No scale: the element's values are the weights.
    #[default]
    None,
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// A power of two, 2^(e − 127); e = 255 is not a number (OCP Microscaling v1.0).
    #[serde(rename = "e8m0")]
    E8M0,
    /// E4M3 (OCP FP8) times one f32 of the whole matrix (NVFP4).
    #[serde(rename = "e4m3_global")]
    E4M3Global,
    /// Integer scales of `bits` bits times an f16 that `super_group` columns of a row share (GGUF K-quants).
    TwoLevel {
        /// Bits of an inner scale.
        bits: u8,
        /// Inner scales are two's complement if true, unsigned if false.
        signed: bool,
        /// Columns that share one f16.
        super_group: u32,
    },
}

/// What is subtracted from a code's value, or added after scaling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroKind {
    /// Nothing.
    #[default]
    None,
    /// An integer per group, of the element's own width, packed like codes along the groups of a row.
    Integer,
    /// An f32 bias per group, added after scaling.
    F32Bias,
    /// An f16 bias per group, added after scaling.
    F16Bias,
    /// A bf16 bias per group, added after scaling.
    Bf16Bias,
    /// An unsigned inner minimum of `bits` bits times an f16 per super-group (that of [`ScaleKind::TwoLevel`]),
    /// *subtracted* after scaling (GGUF K-quants).
    TwoLevelMin {
        /// Bits of an inner minimum.
        bits: u8,
    },
}

/// How columns are assigned to groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnOrder {
    /// Column `c` belongs to group `c / group_size`.
    #[default]
    Natural,
    /// Column `c` belongs to group `g_idx[c]` (GPTQ act-order).
    GroupIndex,
}

/// Which codes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sparsity {
    /// All of them.
    #[default]
    Dense,
    /// Two of every four consecutive columns; four bits of metadata name the two (low index in bits 0–1, high index in
    /// bits 2–3).
    TwoOfFour,
}

impl Grouping {
    fn is_tensor(&self) -> bool {
        *self == Self::Tensor
    }
}
impl ScaleKind {
    fn is_none(&self) -> bool {
        *self == Self::None
    }
}
impl ZeroKind {
    fn is_none(&self) -> bool {
        *self == Self::None
    }
}
impl ColumnOrder {
    fn is_natural(&self) -> bool {
        *self == Self::Natural
    }
}
impl Sparsity {
    fn is_dense(&self) -> bool {
        *self == Self::Dense
    }
}

impl Scheme {
    /// Unquantised bfloat16.
    pub const BF16: Scheme = Scheme::dense(Element::Bf16);
    /// Unquantised half precision.
    pub const F16: Scheme = Scheme::dense(Element::F16);
    /// Unquantised single precision.
    pub const F32: Scheme = Scheme::dense(Element::F32);
    /// E2M1 in groups of 32 with power-of-two scales (OCP Microscaling v1.0).
    pub const MXFP4: Scheme = Scheme::scaled(Element::E2M1, Grouping::Columns(32), ScaleKind::E8M0);
    /// E2M1 in groups of 16 with E4M3 scales and one f32 scale.
    pub const NVFP4: Scheme = Scheme::scaled(Element::E2M1, Grouping::Columns(16), ScaleKind::E4M3Global);

    const fn dense(element: Element) -> Scheme {
        Scheme::scaled(element, Grouping::Tensor, ScaleKind::None)
    }

    /// Scaled codes without zero points, in natural order, all stored; change the other fields from there.
    pub const fn scaled(element: Element, grouping: Grouping, scale: ScaleKind) -> Scheme {
        Scheme {
            element,
            grouping,
            scale,
            zero: ZeroKind::None,
            order: ColumnOrder::Natural,
            sparsity: Sparsity::Dense,
        }
    }

    /// Whether the weights are plain floats: no scale, every code stored.
    pub fn is_dense(&self) -> bool {
        self.element.is_dense() && self.sparsity == Sparsity::Dense
    }

    /// Checks that the parts of the scheme fit together.
    ///
    /// # Errors
    /// [`FormatError::InvalidScheme`] says which do not.
    pub fn validate(&self) -> Result<(), FormatError> {
        let invalid = |what: String| Err(FormatError::InvalidScheme(what));
        let in_bits = |bits: u8| (2..=8).contains(&bits);
        let scaled = self.scale != ScaleKind::None;

        if let Element::Uint(bits) | Element::Int(bits) = self.element
            && !in_bits(bits)
        {
            return invalid(format!("integers have 2 to 8 bits, found {bits}"));
        }
        if self.element.is_dense() && scaled {
            return invalid(format!("{} weights have no scale", self.element));
        }
        match self.grouping {
            Grouping::Columns(0) => return invalid("a group of 0 columns".into()),
            Grouping::Block { rows, cols } if rows == 0 || cols == 0 => {
                return invalid(format!("a tile of {rows} × {cols} weights"));
            }
            grouping if !scaled && grouping != Grouping::Tensor => {
                return invalid(format!("groups ({grouping}) without scales"));
            }
            _ => {}
        }
        if let ScaleKind::TwoLevel { bits, super_group, .. } = self.scale {
            let Grouping::Columns(group) = self.grouping else {
                return invalid("two-level scales need groups along columns".into());
            };
            if !in_bits(bits) {
                return invalid(format!("two-level scales have 2 to 8 bits, found {bits}"));
            }
            if super_group == 0 || super_group % group != 0 {
                return invalid(format!(
                    "{super_group} columns of a super-group are no multiple of the group of {group}"
                ));
            }
        }
        match self.zero {
            ZeroKind::None => {}
            _ if !scaled => return invalid("zero points without scales".into()),
            ZeroKind::Integer if !matches!(self.element, Element::Uint(_) | Element::Int(_)) => {
                return invalid(format!("integer zero points for {} codes", self.element));
            }
            ZeroKind::TwoLevelMin { .. } if !matches!(self.scale, ScaleKind::TwoLevel { .. }) => {
                return invalid("two-level minima without two-level scales".into());
            }
            ZeroKind::TwoLevelMin { bits } if !in_bits(bits) => {
                return invalid(format!("two-level minima have 2 to 8 bits, found {bits}"));
            }
            _ => {}
        }
        if self.order == ColumnOrder::GroupIndex && !matches!(self.grouping, Grouping::Columns(_)) {
            return invalid("a group index needs groups along columns".into());
        }
        Ok(())
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::F16 => f.write_str("f16"),
            Self::Bf16 => f.write_str("bf16"),
            Self::E2M1 => f.write_str("fp4"),
            Self::E4M3 => f.write_str("fp8"),
            Self::Uint(bits) => write!(f, "u{bits}"),
            Self::Int(bits) => write!(f, "s{bits}"),
            Self::Iq4Nl => f.write_str("iq4_nl"),
        }
    }
}

/// The columns of a group (`128`), `row`, `tensor`, or a tile (`128x128`); [`Grouping::from_str`] reads the same.
impl fmt::Display for Grouping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor => f.write_str("tensor"),
            Self::Row => f.write_str("row"),
            Self::Columns(columns) => write!(f, "{columns}"),
            Self::Block { rows, cols } => write!(f, "{rows}x{cols}"),
        }
    }
}

impl FromStr for Grouping {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let positive = |number: &str| number.parse().ok().filter(|&n: &u32| n > 0);
        let parsed = match text {
            "tensor" => Some(Self::Tensor),
            "row" => Some(Self::Row),
            _ => match text.split_once('x') {
                Some((rows, cols)) => positive(rows).zip(positive(cols)).map(|(rows, cols)| Self::Block { rows, cols }),
                None => positive(text).map(Self::Columns),
            },
        };
        parsed.ok_or_else(|| FormatError::UnknownGrouping(text.into()))
    }
}

/// A short name: that of the format where it has one (`bf16`, `fp4 g128`, `int4 g128`, `fp8 row`, `mxfp4`), followed
/// by whatever differs from its usual storage.
impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fixed = match (self.element, self.grouping, self.scale) {
            (Element::E2M1, Grouping::Columns(32), ScaleKind::E8M0) => Some("mxfp4"),
            (Element::E4M3, Grouping::Columns(32), ScaleKind::E8M0) => Some("mxfp8"),
            (Element::E2M1, Grouping::Columns(16), ScaleKind::E4M3Global) => Some("nvfp4"),
            _ => None,
        };
        match fixed {
            Some(name) => f.write_str(name)?,
            None => self.fmt_codes_and_scales(f)?,
        }
        match self.zero {
            ZeroKind::None | ZeroKind::Integer => {}
            ZeroKind::F32Bias => f.write_str(" + f32 bias")?,
            ZeroKind::F16Bias => f.write_str(" + f16 bias")?,
            ZeroKind::Bf16Bias => f.write_str(" + bf16 bias")?,
            ZeroKind::TwoLevelMin { bits } => write!(f, " - {bits}-bit minima")?,
        }
        if self.order == ColumnOrder::GroupIndex {
            f.write_str(", group index")?;
        }
        if self.sparsity == Sparsity::TwoOfFour {
            f.write_str(", 2:4")?;
        }
        Ok(())
    }
}

impl Scheme {
    fn fmt_codes_and_scales(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.element, self.zero) {
            (Element::Uint(8), ZeroKind::Integer) => f.write_str("int8-asym")?,
            (Element::Uint(bits), ZeroKind::Integer) => write!(f, "int{bits}")?,
            (Element::Int(8), ZeroKind::None) => f.write_str("int8")?,
            (Element::Int(bits), ZeroKind::None) => write!(f, "int{bits}-sym")?,
            (element, ZeroKind::Integer) => write!(f, "{element} with zero points")?,
            (element, _) => write!(f, "{element}")?,
        }
        if self.scale == ScaleKind::None {
            return Ok(());
        }
        match self.grouping {
            Grouping::Columns(columns) => write!(f, " g{columns}")?,
            other => write!(f, " {other}")?,
        }
        match self.scale {
            scale if scale == usual_scale(self.element, self.grouping) => Ok(()),
            ScaleKind::None => Ok(()),
            ScaleKind::F32 => f.write_str(" f32 scales"),
            ScaleKind::F16 => f.write_str(" f16 scales"),
            ScaleKind::Bf16 => f.write_str(" bf16 scales"),
            ScaleKind::E8M0 => f.write_str(" e8m0 scales"),
            ScaleKind::E4M3Global => f.write_str(" e4m3 scales"),
            ScaleKind::TwoLevel { bits, super_group, .. } => write!(f, " {bits}-bit scales per {super_group}"),
        }
    }
}
