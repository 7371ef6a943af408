//! The formats this project writes, by name.

use std::fmt;
use std::str::FromStr;

use crate::{Element, FormatError, Grouping, ScaleKind, Scheme, Sparsity, ZeroKind};

/// A format by the name users give it; [`Format::scheme`] says what it stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// E2M1 with f16 scales, in groups of 128.
    Fp4,
    /// Unsigned 4-bit integers with zero points and f16 scales, in groups of 128.
    Int4,
    /// Signed 4-bit integers with f16 scales, in groups of 128.
    Int4Sym,
    /// Signed 8-bit integers with f16 scales, in groups of 128.
    Int8,
    /// E4M3 with one f32 scale a row.
    Fp8,
    /// Unsigned 3-bit integers with zero points and f16 scales, in groups of 64.
    Int3,
    /// Unsigned 2-bit integers with zero points and f16 scales, in groups of 32.
    Int2,
    /// E2M1 with power-of-two scales, in groups of 32 (OCP Microscaling v1.0).
    Mxfp4,
    /// E2M1 with E4M3 scales, in groups of 16, and one f32 for the matrix.
    Nvfp4,
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
    /// Single precision.
    F32,
}

impl Format {
    /// All formats.
    pub const ALL: [Format; 12] = [
        Self::Fp4,
        Self::Int4,
        Self::Int4Sym,
        Self::Int8,
        Self::Fp8,
        Self::Int3,
        Self::Int2,
        Self::Mxfp4,
        Self::Nvfp4,
        Self::Bf16,
        Self::F16,
        Self::F32,
    ];

    /// The name users give it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp4 => "fp4",
            Self::Int4 => "int4",
            Self::Int4Sym => "int4-sym",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
            Self::Int3 => "int3",
            Self::Int2 => "int2",
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Whether weights stay floats of 16 or 32 bits.
    pub const fn is_dense(self) -> bool {
        matches!(self, Self::Bf16 | Self::F16 | Self::F32)
    }

    /// What the format stores, with its usual groups if `grouping` is `None`.
    ///
    /// Fewer bits take smaller groups, whose scales then cost more. FP8 carries an exponent in every code, so finer
    /// scales than one a row gain it next to nothing; a scale a row can be applied after the sum over K. Scales are
    /// f16 for groups along columns and for rows, and f32 for FP8's rows, tiles and whole matrices, which have so few
    /// that their size does not count.
    ///
    /// # Errors
    /// The format does not have such groups.
    pub fn scheme(self, grouping: Option<Grouping>) -> Result<Scheme, FormatError> {
        let integer_zeros = |scheme| Scheme { zero: ZeroKind::Integer, ..scheme };
        let scaled = |element, usual| -> Result<Scheme, FormatError> {
            let grouping = grouping.unwrap_or(usual);
            let scheme = Scheme::scaled(element, grouping, usual_scale(element, grouping));
            scheme.validate()?;
            Ok(scheme)
        };
        match self {
            Self::Fp4 => scaled(Element::E2M1, Grouping::Columns(128)),
            Self::Int4 => scaled(Element::Uint(4), Grouping::Columns(128)).map(integer_zeros),
            Self::Int4Sym => scaled(Element::Int(4), Grouping::Columns(128)),
            Self::Int8 => scaled(Element::Int(8), Grouping::Columns(128)),
            Self::Fp8 => scaled(Element::E4M3, Grouping::Row),
            Self::Int3 => scaled(Element::Uint(3), Grouping::Columns(64)).map(integer_zeros),
            Self::Int2 => scaled(Element::Uint(2), Grouping::Columns(32)).map(integer_zeros),
            Self::Mxfp4 => self.fixed(Scheme::MXFP4, grouping, "32 only"),
            Self::Nvfp4 => self.fixed(Scheme::NVFP4, grouping, "16 only"),
            Self::Bf16 => self.fixed(Scheme::BF16, grouping, "none"),
            Self::F16 => self.fixed(Scheme::F16, grouping, "none"),
            Self::F32 => self.fixed(Scheme::F32, grouping, "none"),
        }
    }

    /// Formats with a variant of 2:4 sparsity.
    pub const SPARSE: [Format; 3] = [Self::Fp4, Self::Int4, Self::Fp8];

    /// What the variant with 2:4 sparsity stores: the two largest of every four weights, as [`Format::scheme`] says, and
    /// a bit per weight that says which two they are. A scale still belongs to as many columns.
    ///
    /// # Errors
    /// The format has no such variant (see [`Format::SPARSE`]) or no such groups.
    pub fn sparse_24(self, grouping: Option<Grouping>) -> Result<Scheme, FormatError> {
        if !Self::SPARSE.contains(&self) {
            let known = Self::SPARSE.map(Self::name).join(", ");
            return Err(FormatError::FormatSparsity { format: self.name(), known });
        }
        Ok(Scheme { sparsity: Sparsity::TwoOfFour, ..self.scheme(grouping)? })
    }

    fn fixed(self, scheme: Scheme, grouping: Option<Grouping>, allowed: &'static str) -> Result<Scheme, FormatError> {
        match grouping {
            Some(found) if self.is_dense() || found != scheme.grouping => {
                Err(FormatError::FormatGrouping { format: self.name(), found, allowed })
            }
            _ => Ok(scheme),
        }
    }
}

/// The type of scales that our formats have in such groups; a scheme's name leaves it out.
pub(crate) fn usual_scale(element: Element, grouping: Grouping) -> ScaleKind {
    match grouping {
        Grouping::Columns(_) => ScaleKind::F16,
        Grouping::Row if element != Element::E4M3 => ScaleKind::F16,
        _ => ScaleKind::F32,
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| FormatError::UnknownFormat {
            found: name.into(),
            known: Self::ALL.map(Self::name).join(", "),
        })
    }
}
