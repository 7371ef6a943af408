//! The code of one weight.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// The code of one weight and the value it stands for, before scale and zero point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Element {
    /// IEEE single precision (unquantised).
    F32,
    /// IEEE half precision (unquantised).
    F16,
    /// bfloat16 (unquantised).
    Bf16,
    /// 4-bit float: sign, 2 exponent bits, 1 mantissa bit; magnitudes 0, ½, 1, 1½, 2, 3, 4, 6 (OCP Microscaling v1.0).
    #[serde(rename = "e2m1")]
    E2M1,
    /// 8-bit float of OCP FP8: no infinities, S.1111.111 is not a number, largest 448.
    #[serde(rename = "e4m3")]
    E4M3,
    /// Unsigned integer of 2 to 8 bits; value = code.
    Uint(u8),
    /// Signed integer of 2 to 8 bits stored with an offset; value = code − 2^(bits − 1).
    Int(u8),
    /// The 16 values of GGUF's IQ4_NL.
    Iq4Nl,
}

impl Element {
    /// Bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::E2M1 | Self::Iq4Nl => 4,
            Self::E4M3 => 8,
            Self::Uint(bits) | Self::Int(bits) => bits as u32,
        }
    }

    /// Whether codes are floats of 16 or 32 bits, which need no scale.
    pub const fn is_dense(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// The value of a code: exact, and NaN for the two NaN codes of E4M3. Bits beyond [`Element::bits`] are ignored.
    pub fn value(self, code: u32) -> f32 {
        match self {
            Self::F32 => f32::from_bits(code),
            Self::F16 => f16::from_bits(code as u16).to_f32(),
            Self::Bf16 => bf16::from_bits(code as u16).to_f32(),
            _ => {
                let values = self.values();
                values[code as usize & (values.len() - 1)]
            }
        }
    }

    /// The values of all 2^bits codes of a quantised element.
    ///
    /// # Panics
    /// If the element is dense, or an integer of fewer than 2 or more than 8 bits.
    pub fn values(self) -> &'static [f32] {
        match self {
            Self::E2M1 => &E2M1_VALUES,
            Self::E4M3 => &E4M3_VALUES,
            Self::Iq4Nl => &IQ4_NL_VALUES,
            Self::Uint(bits) => {
                assert!((2..=8).contains(&bits), "{bits}-bit integer");
                &INTEGERS[128..128 + (1 << bits)]
            }
            Self::Int(bits) => {
                assert!((2..=8).contains(&bits), "{bits}-bit integer");
                let half = 1 << (bits - 1);
                &INTEGERS[128 - half..128 + half]
            }
            Self::F32 | Self::F16 | Self::Bf16 => panic!("{self:?} has no table of values"),
        }
    }

    /// The code whose value is nearest: ties go to the even code (for floats, to the even mantissa), values beyond the
    /// largest saturate (dense elements instead overflow to infinity, as IEEE 754 says). NaN stays NaN where there is
    /// such a code; what it becomes otherwise is unspecified.
    pub fn encode_nearest(self, value: f32) -> u32 {
        match self {
            Self::F32 => value.to_bits(),
            Self::F16 => u32::from(f16::from_f32(value).to_bits()),
            Self::Bf16 => u32::from(bf16::from_f32(value).to_bits()),
            Self::E4M3 if value.is_nan() => 0x7f,
            Self::E2M1 => u32::from(E2M1.code(value)),
            Self::E4M3 => u32::from(E4M3.code(value)),
            Self::Uint(bits) => u32::from(IntegerRounding::unsigned(bits, 0).code(value)),
            Self::Int(bits) => u32::from(IntegerRounding::signed(bits).code(value)),
            Self::Iq4Nl => nearest_in(&IQ4_NL_VALUES, value),
        }
    }
}

/// Rounding of a scaled weight to the nearest value of an element. Branch-free, so that loops over it vectorise.
pub(crate) trait Rounding: Copy {
    /// The nearest value, saturating, ties to the even code. The argument is not NaN.
    fn round(self, x: f32) -> f32;
    /// The code of that value.
    fn code(self, x: f32) -> u8;
}

/// Added to and subtracted from a float below 2^22 in magnitude, this rounds it to an integer, ties to even; the low
/// bits of the sum are that integer.
const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23

/// One instruction each, as [`f32::min`] and [`f32::max`], which look for NaN, are not. The second argument wins over
/// a NaN.
#[inline(always)]
fn min(x: f32, limit: f32) -> f32 {
    if x < limit { x } else { limit }
}

#[inline(always)]
fn max(x: f32, limit: f32) -> f32 {
    if x > limit { x } else { limit }
}

/// Rounding to a float of a sign bit, `EXPONENT` exponent bits and `MANTISSA` mantissa bits. (Constants, so that loops
/// have shifts by constants.)
#[derive(Clone, Copy)]
pub(crate) struct FloatRounding<const EXPONENT: u32, const MANTISSA: u32> {
    /// Largest finite value.
    pub(crate) max: f32,
}

pub(crate) const E2M1: FloatRounding<2, 1> = FloatRounding { max: 6.0 };
pub(crate) const E4M3: FloatRounding<4, 3> = FloatRounding { max: 448.0 };

impl<const EXPONENT: u32, const MANTISSA: u32> FloatRounding<EXPONENT, MANTISSA> {
    /// The smallest normal value is 2^(1 − bias).
    const BIAS: u32 = (1 << (EXPONENT - 1)) - 1;
    const MIN_NORMAL: f32 = f32::from_bits((128 - Self::BIAS) << 23);
    /// Rounds to multiples of the smallest subnormal, as [`ROUND`] does to integers.
    const ROUND_SUBNORMAL: f32 = ROUND * f32::from_bits((128 - Self::BIAS - MANTISSA) << 23);
    /// Mantissa bits that f32 has beyond these.
    const DROPPED: u32 = 23 - MANTISSA;

    /// The bits of a float, rounded to the mantissa that is kept; the dropped bits are not cleared.
    #[inline(always)]
    fn round_bits(magnitude: f32) -> u32 {
        let bits = magnitude.to_bits();
        bits + ((1 << (Self::DROPPED - 1)) - 1) + (bits >> Self::DROPPED & 1)
    }
}

impl<const EXPONENT: u32, const MANTISSA: u32> Rounding for FloatRounding<EXPONENT, MANTISSA> {
    #[inline(always)]
    fn round(self, x: f32) -> f32 {
        let magnitude = min(x.abs(), self.max);
        let normal = f32::from_bits(Self::round_bits(magnitude) >> Self::DROPPED << Self::DROPPED);
        let subnormal = (magnitude + Self::ROUND_SUBNORMAL) - Self::ROUND_SUBNORMAL;
        let rounded = if magnitude < Self::MIN_NORMAL { subnormal } else { normal };
        rounded.copysign(x)
    }

    #[inline(always)]
    fn code(self, x: f32) -> u8 {
        let magnitude = min(x.abs(), self.max);
        let normal = (Self::round_bits(magnitude) >> Self::DROPPED).wrapping_sub((127 - Self::BIAS) << MANTISSA);
        let subnormal = (magnitude + Self::ROUND_SUBNORMAL).to_bits() & 0xff;
        let code = if magnitude < Self::MIN_NORMAL { subnormal } else { normal };
        (code | (x.to_bits() >> 31) << (EXPONENT + MANTISSA)) as u8
    }
}

/// Rounding to integers `low ..= high` with code `value − low`.
#[derive(Clone, Copy)]
pub(crate) struct IntegerRounding {
    low: f32,
    high: f32,
}

impl IntegerRounding {
    /// Codes 0 to 2^bits − 1 around a zero point.
    pub(crate) fn unsigned(bits: u8, zero: u8) -> Self {
        let zero = f32::from(zero);
        Self { low: -zero, high: ((1u32 << bits) - 1) as f32 - zero }
    }

    /// −2^(bits − 1) to 2^(bits − 1) − 1.
    pub(crate) fn signed(bits: u8) -> Self {
        let half = (1u32 << (bits - 1)) as f32;
        Self { low: -half, high: half - 1.0 }
    }
}

impl Rounding for IntegerRounding {
    #[inline(always)]
    fn round(self, x: f32) -> f32 {
        (min(max(x, self.low), self.high) + ROUND) - ROUND
    }

    #[inline(always)]
    fn code(self, x: f32) -> u8 {
        (min(max(x, self.low), self.high) + ROUND).to_bits().wrapping_sub((self.low + ROUND).to_bits()) as u8
    }
}

/// The index nearest to `value` in an ascending table: how many midpoints of neighbours lie below it, ties going to
/// the even index.
fn nearest_in(values: &[f32], value: f32) -> u32 {
    let beyond = |(index, pair): &(usize, &[f32])| {
        let middle = (pair[0] + pair[1]) / 2.0;
        value > middle || (value == middle && index % 2 == 1)
    };
    values.windows(2).enumerate().filter(beyond).count() as u32
}

const E2M1_VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// `kvalues_iq4nl` of ggml.
const IQ4_NL_VALUES: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// −128 to 255: every integer element is a run of it.
static INTEGERS: [f32; 384] = {
    let mut values = [0.0; 384];
    let mut i = 0;
    while i < values.len() {
        values[i] = i as f32 - 128.0;
        i += 1;
    }
    values
};

static E4M3_VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < values.len() {
        values[code] = e4m3(code as u8);
        code += 1;
    }
    values
};

const fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (code as u32 >> 3 & 15, code as u32 & 7);
    let magnitude = if exponent == 15 && mantissa == 7 {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        f32::from_bits((exponent + 127 - 7) << 23 | mantissa << 20)
    };
    if code >= 128 { -magnitude } else { magnitude }
}
