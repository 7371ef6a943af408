//! Every code of every element against its definition, and rounding onto the codes.

use half::{bf16, f16};
use marlin_format::Element;

/// A small float by its definition: sign, exponent with `bias`, `mantissa` bits.
fn small_float(code: u32, exponent_bits: u32, mantissa_bits: u32, bias: i32) -> f64 {
    let mantissa = f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
    let exponent = (code >> mantissa_bits & ((1 << exponent_bits) - 1)) as i32;
    let sign = if code >> (mantissa_bits + exponent_bits) & 1 == 1 { -1.0 } else { 1.0 };
    let magnitude =
        if exponent == 0 { mantissa * 2f64.powi(1 - bias) } else { (1.0 + mantissa) * 2f64.powi(exponent - bias) };
    sign * magnitude
}

/// Quantised elements and their values in f64, NaN where a code has none.
fn definitions() -> Vec<(Element, Vec<f64>)> {
    let e2m1 = (0..16).map(|code| small_float(code, 2, 1, 1)).collect();
    let e4m3 = (0..256).map(|code| if code & 0x7f == 0x7f { f64::NAN } else { small_float(code, 4, 3, 7) }).collect();
    let iq4_nl = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113].map(f64::from).to_vec();
    let mut all = vec![(Element::E2M1, e2m1), (Element::E4M3, e4m3), (Element::Iq4Nl, iq4_nl)];
    for bits in 2..=8u8 {
        all.push((Element::Uint(bits), (0..1 << bits).map(f64::from).collect()));
        all.push((Element::Int(bits), (0..1 << bits).map(|code| f64::from(code - (1 << (bits - 1)))).collect()));
    }
    all
}

#[test]
fn every_code_has_its_value() {
    for (element, values) in definitions() {
        assert_eq!(1 << element.bits(), values.len(), "{element:?}");
        assert_eq!(element.values().len(), values.len(), "{element:?}");
        for (code, &value) in values.iter().enumerate() {
            let found = element.value(code as u32);
            assert_eq!(found.to_bits(), element.values()[code].to_bits());
            if value.is_nan() {
                assert!(found.is_nan(), "{element:?} code {code}");
            } else {
                assert_eq!(f64::from(found), value, "{element:?} code {code}");
                assert_eq!(found.is_sign_negative(), value.is_sign_negative(), "{element:?} code {code}");
            }
        }
    }
}

#[test]
fn e2m1_is_the_published_list() {
    let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for (index, magnitude) in magnitudes.into_iter().enumerate() {
        assert_eq!(Element::E2M1.value(index as u32), magnitude);
        assert_eq!(Element::E2M1.value(index as u32 | 8), -magnitude);
    }
}

#[test]
fn dense_codes_are_their_floats() {
    for code in 0..=u16::MAX {
        let same = |element: Element, value: f32| {
            let found = element.value(u32::from(code));
            assert!(found.to_bits() == value.to_bits() || found.is_nan() && value.is_nan(), "{element:?} {code:#x}");
            if !value.is_nan() {
                assert_eq!(element.encode_nearest(value), u32::from(code), "{element:?} {code:#x}");
            }
        };
        same(Element::F16, f16::from_bits(code).to_f32());
        same(Element::Bf16, bf16::from_bits(code).to_f32());
    }
    for value in [0.0, -0.0, 1.5, f32::MAX, f32::from_bits(1), f32::INFINITY] {
        assert_eq!(Element::F32.value(value.to_bits()).to_bits(), value.to_bits());
        assert_eq!(Element::F32.encode_nearest(value), value.to_bits());
    }
}

#[test]
fn code_points_encode_to_themselves() {
    for (element, values) in definitions() {
        for code in 0..values.len() as u32 {
            let value = element.value(code);
            if !value.is_nan() {
                assert_eq!(element.encode_nearest(value), code, "{element:?} {value}");
            }
        }
    }
    assert!(Element::E4M3.value(Element::E4M3.encode_nearest(f32::NAN)).is_nan());
}

/// Between any two neighbours: a little to either side of the middle goes to the nearer, the middle to the even code.
#[test]
fn the_nearest_code_wins_and_ties_go_to_even() {
    for (element, values) in definitions() {
        let mut codes: Vec<u32> = (0..values.len() as u32).filter(|&code| !values[code as usize].is_nan()).collect();
        codes.sort_by(|&a, &b| values[a as usize].total_cmp(&values[b as usize]));
        for pair in codes.windows(2) {
            let (low, high) = (values[pair[0] as usize], values[pair[1] as usize]);
            if low == high {
                continue; // −0 and 0
            }
            let middle = ((low + high) / 2.0) as f32;
            let encode = |x: f32| f64::from(element.value(element.encode_nearest(x)));
            assert_eq!(encode(middle.next_down()), low, "{element:?} below {middle}");
            assert_eq!(encode(middle.next_up()), high, "{element:?} above {middle}");
            let even = if pair[0] % 2 == 0 { low } else { high };
            assert_eq!(encode(middle), even, "{element:?} at {middle}");
        }
    }
}

#[test]
fn values_out_of_range_saturate() {
    for (element, values) in definitions() {
        let finite = values.iter().copied().filter(|value| !value.is_nan());
        let (low, high) = finite.fold((0.0f64, 0.0f64), |(low, high), value| (low.min(value), high.max(value)));
        for beyond in [1e4, f32::MAX, f32::INFINITY] {
            assert_eq!(f64::from(element.value(element.encode_nearest(beyond))), high, "{element:?}");
            assert_eq!(f64::from(element.value(element.encode_nearest(-beyond))), low, "{element:?}");
        }
    }
}

/// A signed zero keeps its sign where there are two zeros.
#[test]
fn small_values_round_to_zero() {
    for tiny in [f32::from_bits(1), 1e-30] {
        assert_eq!(Element::E2M1.encode_nearest(tiny), 0);
        assert_eq!(Element::E2M1.encode_nearest(-tiny), 8);
        assert_eq!(Element::E4M3.encode_nearest(tiny), 0);
        assert_eq!(Element::E4M3.encode_nearest(-tiny), 0x80);
        assert_eq!(Element::Int(4).encode_nearest(-tiny), 8);
        assert_eq!(Element::Uint(4).encode_nearest(-tiny), 0);
    }
}
