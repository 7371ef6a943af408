//! Rounding scales to what is stored of them.

use half::{bf16, f16};

use crate::decode::e8m0;
use crate::element::{E4M3, Rounding};
use crate::{Element, ScaleKind, Scheme};

/// A scale as stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    /// What the stored bits decode to, the global scale included.
    pub(super) value: f32,
    /// The stored bits.
    pub(super) bits: u32,
}

/// Rounds the scales of one matrix to their storage type.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScaleStore {
    kind: ScaleKind,
    /// The f32 that multiplies every scale; 1 unless they are [`ScaleKind::E4M3Global`].
    global: f32,
    /// Largest magnitude of an element's value less its zero point: times a scale, it must be finite.
    largest: f32,
}

impl ScaleStore {
    /// `abs_max` is the largest magnitude of the whole matrix. As NVFP4 defines it, the global scale gives the group
    /// of that weight the largest E4M3 scale, or as a power of two one of at least half of that.
    pub(super) fn new(scheme: &Scheme, abs_max: f32, power_of_two_global: bool) -> Self {
        let largest = match scheme.element {
            Element::Uint(bits) => ((1u32 << bits) - 1) as f32,
            element => element.values().iter().fold(0.0, |max: f32, value| max.max(value.abs())),
        };
        let global = match scheme.scale {
            ScaleKind::E4M3Global if abs_max > 0.0 => {
                let global = (abs_max / largest / 448.0).max(f32::from_bits(1));
                if power_of_two_global { ceil_power_of_two(global) } else { global }
            }
            _ => 1.0,
        };
        Self { kind: scheme.scale, global, largest }
    }

    /// Bytes of [`crate::PackedMatrix::globals`].
    pub(super) fn globals(&self) -> Vec<u8> {
        if self.kind == ScaleKind::E4M3Global { self.global.to_le_bytes().to_vec() } else { Vec::new() }
    }

    /// Whether a scale may be negative. E4M3 has a sign, but NVFP4 does not use it.
    pub(super) fn has_sign(&self) -> bool {
        matches!(self.kind, ScaleKind::F32 | ScaleKind::F16 | ScaleKind::Bf16)
    }

    /// Whether scales are powers of two.
    pub(super) fn is_power_of_two(&self) -> bool {
        self.kind == ScaleKind::E8M0
    }

    /// The scale of a group of zeros: 0, or the smallest there is.
    pub(super) fn zero(&self) -> Scale {
        Scale { value: self.value(0), bits: 0 }
    }

    /// The storable scale nearest to `scale`, which is not 0; never 0 itself, so that a group of tiny weights keeps
    /// what it can. `None` if weights on that scale would not be finite.
    pub(super) fn round(&self, scale: f32) -> Option<Scale> {
        let magnitude = scale.abs();
        let bits = match self.kind {
            ScaleKind::F32 => magnitude.to_bits().max(1),
            ScaleKind::F16 => u32::from(f16::from_f32(magnitude).to_bits().max(1)),
            ScaleKind::Bf16 => u32::from(bf16::from_f32(magnitude).to_bits().max(1)),
            // Adding half of the exponent's unit rounds to the nearer power of two; twice the scale, since 2^−127 is
            // subnormal.
            ScaleKind::E8M0 => (((magnitude * 2.0).to_bits() + (1 << 22)) >> 23).saturating_sub(1),
            ScaleKind::E4M3Global => u32::from(E4M3.code(magnitude / self.global).max(1)),
            ScaleKind::None | ScaleKind::TwoLevel { .. } => unreachable!("refused by Encoder::new"),
        };
        let value = self.value(bits);
        if !(value * self.largest).is_finite() {
            return None;
        }
        let sign = if scale < 0.0 { self.sign_bit() } else { 0 };
        Some(Scale { value: value.copysign(scale), bits: bits | sign })
    }

    fn value(&self, bits: u32) -> f32 {
        match self.kind {
            ScaleKind::F32 => f32::from_bits(bits),
            ScaleKind::F16 => f16::from_bits(bits as u16).to_f32(),
            ScaleKind::Bf16 => bf16::from_bits(bits as u16).to_f32(),
            ScaleKind::E8M0 => e8m0(bits as u8),
            ScaleKind::E4M3Global => Element::E4M3.value(bits) * self.global,
            ScaleKind::None | ScaleKind::TwoLevel { .. } => unreachable!("refused by Encoder::new"),
        }
    }

    fn sign_bit(&self) -> u32 {
        if self.kind == ScaleKind::F32 { 1 << 31 } else { 1 << 15 }
    }

    /// Appends the stored bytes of a scale.
    pub(super) fn push(&self, scale: Scale, bytes: &mut Vec<u8>) {
        let length = match self.kind {
            ScaleKind::F32 => 4,
            ScaleKind::F16 | ScaleKind::Bf16 => 2,
            _ => 1,
        };
        bytes.extend_from_slice(&scale.bits.to_le_bytes()[..length]);
    }
}

/// The smallest power of two that is not smaller and has a finite inverse.
fn ceil_power_of_two(x: f32) -> f32 {
    let x = x.max(f32::MIN_POSITIVE);
    let floor = f32::from_bits(x.to_bits() & 0x7f80_0000);
    if floor < x { floor * 2.0 } else { floor }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Grouping;

    fn store(kind: ScaleKind, abs_max: f32) -> ScaleStore {
        ScaleStore::new(&Scheme::scaled(Element::E2M1, Grouping::Row, kind), abs_max, false)
    }

    #[test]
    fn powers_of_two_round_to_the_nearer() {
        let store = store(ScaleKind::E8M0, 1.0);
        // 2^125 · 6 is the last that is finite.
        for code in 0..=252u32 {
            let power = 2f64.powi(code as i32 - 127);
            for (factor, wanted) in [(1.0, code), (1.49, code), (1.51, code + 1), (0.76, code)] {
                let rounded = store.round((power * factor) as f32);
                let wanted = Some(wanted).filter(|&bits| bits <= 252);
                assert_eq!(rounded.map(|scale| scale.bits), wanted, "{power:e} · {factor}");
            }
            assert_eq!(f64::from(store.round(power as f32).unwrap().value), power);
        }
    }

    #[test]
    fn no_scale_rounds_to_zero_or_infinity() {
        for kind in [ScaleKind::F32, ScaleKind::F16, ScaleKind::Bf16, ScaleKind::E8M0, ScaleKind::E4M3Global] {
            let store = store(kind, 1.0);
            assert!(store.round(f32::from_bits(1)).unwrap().value > 0.0, "{kind:?}");
            if kind == ScaleKind::E4M3Global {
                assert_eq!(store.round(f32::MAX).unwrap().bits, 0x7e, "E4M3 saturates");
            } else {
                assert_eq!(store.round(f32::MAX / 2.0), None, "{kind:?}");
            }
        }
    }

    #[test]
    fn powers_of_two_have_exact_inverses() {
        for (x, wanted) in [(1.0, 1.0), (1.1, 2.0), (0.75, 1.0), (1e-45, f32::MIN_POSITIVE), (1.2e35, 2f32.powi(117))] {
            assert_eq!(ceil_power_of_two(x), wanted, "{x:e}");
            assert_eq!(1.0 / (1.0 / wanted), wanted);
        }
    }

    #[test]
    fn signs_are_stored_where_there_are_any() {
        for (kind, bits) in [(ScaleKind::F32, 0xbf00_0000), (ScaleKind::F16, 0xb800), (ScaleKind::Bf16, 0xbf00)] {
            let store = store(kind, 1.0);
            assert!(store.has_sign());
            assert_eq!(store.round(-0.5), Some(Scale { value: -0.5, bits }));
        }
        assert!(!store(ScaleKind::E8M0, 1.0).has_sign());
        assert!(!store(ScaleKind::E4M3Global, 1.0).has_sign());
    }
}
