//! Storage that other programs write, by the names people know it by.

use crate::{ColumnOrder, Element, Grouping, ScaleKind, Scheme, ZeroKind};

const fn columns(element: Element, group: u32) -> Scheme {
    Scheme::scaled(element, Grouping::Columns(group), ScaleKind::F16)
}

const fn k_quant(element: Element, group: u32, bits: u8, signed: bool) -> Scheme {
    Scheme { scale: ScaleKind::TwoLevel { bits, signed, super_group: 256 }, ..columns(element, group) }
}

const fn with_zero(zero: ZeroKind, scheme: Scheme) -> Scheme {
    Scheme { zero, ..scheme }
}

const GPTQ: Scheme = with_zero(ZeroKind::Integer, columns(Element::Uint(4), 128));

/// Storage of other programs: what most checkpoints of theirs hold.
pub const FOREIGN: [(&str, Scheme); 16] = [
    ("gptq", GPTQ),
    ("gptq-act-order", Scheme { order: ColumnOrder::GroupIndex, ..GPTQ }),
    ("awq", GPTQ),
    ("fp8-block", Scheme::scaled(Element::E4M3, Grouping::Block { rows: 128, cols: 128 }, ScaleKind::F32)),
    ("mlx-4bit", with_zero(ZeroKind::Bf16Bias, Scheme { scale: ScaleKind::Bf16, ..columns(Element::Uint(4), 64) })),
    ("q4_0", columns(Element::Int(4), 32)),
    ("q4_1", with_zero(ZeroKind::F16Bias, columns(Element::Uint(4), 32))),
    ("q5_0", columns(Element::Int(5), 32)),
    ("q5_1", with_zero(ZeroKind::F16Bias, columns(Element::Uint(5), 32))),
    ("q8_0", columns(Element::Int(8), 32)),
    ("q2_k", with_zero(ZeroKind::TwoLevelMin { bits: 4 }, k_quant(Element::Uint(2), 16, 4, false))),
    ("q3_k", k_quant(Element::Int(3), 16, 6, true)),
    ("q4_k", with_zero(ZeroKind::TwoLevelMin { bits: 6 }, k_quant(Element::Uint(4), 32, 6, false))),
    ("q5_k", with_zero(ZeroKind::TwoLevelMin { bits: 6 }, k_quant(Element::Uint(5), 32, 6, false))),
    ("q6_k", k_quant(Element::Int(6), 16, 8, true)),
    ("iq4_nl", columns(Element::Iq4Nl, 32)),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_valid_and_take_the_bits_they_are_known_for() {
        let bits = [4.1562, 4.1562, 4.1562, 8.002, 4.5, 4.5, 5.0, 5.5, 6.0, 8.5, 2.625, 3.4375, 4.5, 5.5, 6.5625, 4.5];
        for ((name, scheme), wanted) in FOREIGN.into_iter().zip(bits) {
            scheme.validate().unwrap();
            let (rows, cols) = (1024, 4096);
            let index = scheme.group_index_bytes(rows, cols).unwrap();
            let found = (scheme.packed_bytes(rows, cols).unwrap() - index) as f64 * 8.0 / (rows * cols) as f64;
            assert!((found - wanted).abs() < 1e-3, "{name}: {found} bits, wanted {wanted}");
        }
    }
}
