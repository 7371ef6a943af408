//! Random matrices in every storage scheme.

use std::borrow::Cow;

use half::{bf16, f16};
use marlin_format::{
    ColumnOrder, Element, Format, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind, bits,
};

use super::support::Rng;

/// The schemes of the table by name: our own formats with their usual and other groups, and those of other programs.
pub fn schemes() -> Vec<(String, Scheme)> {
    let mut schemes: Vec<(String, Scheme)> = Vec::new();
    let grouped = [
        (Format::Fp4, vec!["32", "64", "row"]),
        (Format::Int4, vec!["32", "64", "row"]),
        (Format::Int4Sym, vec!["32", "row"]),
        (Format::Int8, vec!["32", "row"]),
        (Format::Fp8, vec!["tensor", "128", "128x128"]),
    ];
    for format in Format::ALL {
        schemes.push((format.to_string(), format.scheme(None).expect("its usual groups")));
        let others = grouped.iter().filter(|(of, _)| *of == format).flat_map(|(_, groupings)| groupings);
        for name in others {
            let grouping = name.parse().expect("a grouping");
            schemes.push((format!("{format}-g{name}"), format.scheme(Some(grouping)).expect("these groups")));
        }
    }
    for format in Format::SPARSE {
        schemes.push((format!("{format}-2of4"), format.sparse_24(None).expect("its usual groups")));
        for (_, groupings) in grouped.iter().filter(|(of, _)| *of == format) {
            for name in groupings {
                let grouping = name.parse().expect("a grouping");
                let scheme = format.sparse_24(Some(grouping)).expect("these groups");
                schemes.push((format!("{format}-2of4-g{name}"), scheme));
            }
        }
    }

    let columns = |element, group| Scheme::scaled(element, Grouping::Columns(group), ScaleKind::F16);
    let affine = |element, group, zero| Scheme { zero, ..columns(element, group) };
    let k_quant = |element, group, bits, signed, zero| Scheme {
        scale: ScaleKind::TwoLevel { bits, signed, super_group: 256 },
        ..affine(element, group, zero)
    };
    let gptq = affine(Element::Uint(4), 32, ZeroKind::Integer);
    let others = [
        ("gptq-act-order", Scheme { order: ColumnOrder::GroupIndex, ..gptq }),
        ("mlx-affine", affine(Element::Uint(4), 64, ZeroKind::F16Bias)),
        ("mlx-affine-bf16", Scheme { scale: ScaleKind::Bf16, ..affine(Element::Uint(6), 64, ZeroKind::Bf16Bias) }),
        ("u8-f32-bias", Scheme { scale: ScaleKind::F32, ..affine(Element::Uint(8), 32, ZeroKind::F32Bias) }),
        ("u5-zero", affine(Element::Uint(5), 32, ZeroKind::Integer)),
        ("s3", columns(Element::Int(3), 32)),
        ("iq4-nl", columns(Element::Iq4Nl, 32)),
        ("q2-k", k_quant(Element::Uint(2), 16, 4, false, ZeroKind::TwoLevelMin { bits: 4 })),
        ("q3-k", k_quant(Element::Int(3), 16, 6, true, ZeroKind::None)),
        ("q4-k", k_quant(Element::Uint(4), 32, 6, false, ZeroKind::TwoLevelMin { bits: 6 })),
        ("q5-k", k_quant(Element::Uint(5), 32, 6, false, ZeroKind::TwoLevelMin { bits: 6 })),
        ("q6-k", k_quant(Element::Int(6), 16, 8, true, ZeroKind::None)),
        ("nvfp4-2of4", Scheme { sparsity: Sparsity::TwoOfFour, ..Scheme::NVFP4 }),
        ("int8-2of4", Scheme { sparsity: Sparsity::TwoOfFour, ..columns(Element::Int(8), 128) }),
        ("f16-2of4", Scheme { sparsity: Sparsity::TwoOfFour, ..Scheme::F16 }),
    ];
    schemes.extend(others.map(|(name, scheme)| (name.to_owned(), scheme)));
    schemes
}

/// Whether the scheme has matrices of this many columns.
pub(crate) fn has_columns(scheme: &Scheme, cols: usize) -> bool {
    scheme.sparsity == Sparsity::Dense || cols.is_multiple_of(4)
}

/// A matrix of random codes: every code occurs, of E4M3 the two that are not numbers aside.
pub(crate) fn random(scheme: Scheme, rows: usize, cols: usize, rng: &mut Rng) -> PackedMatrix<'static> {
    let size = |bytes: Result<usize, _>| bytes.expect("a shape of the scheme");
    let groups = scheme.scale_count(rows, cols).expect("a shape of the scheme");
    let mut matrix = PackedMatrix {
        codes: Cow::Owned(codes(scheme.element, size(scheme.codes_bytes(rows, cols)), rng)),
        scales: Cow::Owned(scales(scheme.scale, size(scheme.scales_bytes(rows, cols)), rng)),
        zeros: Cow::Owned(zeros(scheme.zero, groups, size(scheme.zeros_bytes(rows, cols)), rng)),
        globals: Cow::Owned(globals(&scheme, size(scheme.globals_bytes(rows, cols)), rng)),
        ..PackedMatrix::empty(scheme, rows, cols)
    };
    if let ZeroKind::TwoLevelMin { bits } = scheme.zero {
        matrix.zeros = Cow::Owned(minima_like_scales(&matrix, bits, rng));
    }
    if scheme.order == ColumnOrder::GroupIndex {
        // Groups of the usual size, whose columns are anywhere; matrices with a common input have a common order.
        let mut rng = Rng(cols as u64);
        let mut index: Vec<u32> = (0..cols).map(|column| (column / scheme.group_cols(cols)) as u32).collect();
        (1..cols).for_each(|last| index.swap(last, rng.below(last + 1)));
        matrix.group_index = Cow::Owned(index.into_iter().flat_map(u32::to_le_bytes).collect());
    }
    if scheme.sparsity == Sparsity::TwoOfFour {
        // Low index in bits 0–1, high index in bits 2–3.
        const PAIRS: [u8; 6] = [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110];
        let bytes = size(scheme.sparse_index_bytes(rows, cols));
        let index = (0..bytes).map(|_| PAIRS[rng.below(6)] | PAIRS[rng.below(6)] << 4);
        matrix.sparse_index = Cow::Owned(index.collect());
    }
    matrix.validate().expect("a matrix of the scheme");
    matrix
}

fn codes(element: Element, bytes: usize, rng: &mut Rng) -> Vec<u8> {
    match element {
        Element::F32 => (0..bytes / 4).flat_map(|_| rng.normal().to_le_bytes()).collect(),
        Element::F16 => (0..bytes / 2).flat_map(|_| f16::from_f32(rng.normal()).to_le_bytes()).collect(),
        Element::Bf16 => (0..bytes / 2).flat_map(|_| bf16::from_f32(rng.normal()).to_le_bytes()).collect(),
        Element::E4M3 => without_nan_codes(rng.bytes(bytes)),
        _ => rng.bytes(bytes),
    }
}

fn without_nan_codes(mut codes: Vec<u8>) -> Vec<u8> {
    for code in codes.iter_mut().filter(|code| **code & 0x7f == 0x7f) {
        *code ^= 0x40;
    }
    codes
}

fn scales(kind: ScaleKind, bytes: usize, rng: &mut Rng) -> Vec<u8> {
    match kind {
        ScaleKind::None => Vec::new(),
        ScaleKind::F32 => (0..bytes / 4).flat_map(|_| scale(rng).to_le_bytes()).collect(),
        ScaleKind::F16 => (0..bytes / 2).flat_map(|_| f16::from_f32(scale(rng)).to_le_bytes()).collect(),
        ScaleKind::Bf16 => (0..bytes / 2).flat_map(|_| bf16::from_f32(scale(rng)).to_le_bytes()).collect(),
        ScaleKind::E8M0 => (0..bytes).map(|_| 124 + rng.below(7) as u8).collect(),
        ScaleKind::E4M3Global => (0..bytes).map(|_| 0x30 + rng.below(0x18) as u8).collect(),
        ScaleKind::TwoLevel { .. } => rng.bytes(bytes),
    }
}

fn zeros(kind: ZeroKind, groups: usize, bytes: usize, rng: &mut Rng) -> Vec<u8> {
    match kind {
        ZeroKind::None => Vec::new(),
        ZeroKind::TwoLevelMin { .. } => vec![0; bytes],
        ZeroKind::Integer => rng.bytes(bytes),
        ZeroKind::F32Bias => (0..groups).flat_map(|_| rng.normal().to_le_bytes()).collect(),
        ZeroKind::F16Bias => (0..groups).flat_map(|_| f16::from_f32(rng.normal()).to_le_bytes()).collect(),
        ZeroKind::Bf16Bias => (0..groups).flat_map(|_| bf16::from_f32(rng.normal()).to_le_bytes()).collect(),
    }
}

fn globals(scheme: &Scheme, bytes: usize, rng: &mut Rng) -> Vec<u8> {
    if scheme.scale == ScaleKind::E4M3Global {
        return scale(rng).to_le_bytes().to_vec();
    }
    let has_minima = matches!(scheme.zero, ZeroKind::TwoLevelMin { .. });
    let scales: Vec<f32> = (0..if has_minima { bytes / 4 } else { bytes / 2 }).map(|_| scale(rng)).collect();
    let middle = ((1u64 << scheme.element.bits()) - 1) as f32 / 2.0;
    let minima = scales.iter().filter(|_| has_minima).map(|scale| scale * middle);
    scales.iter().copied().chain(minima).flat_map(|value| f16::from_f32(value).to_le_bytes()).collect()
}

/// Inner minima that differ from inner scales in their last two bits. With those of [`globals`] they leave about as many weights of a group
/// below zero as above, as real ones do: all of one sign, weights would sum up the rounding of activations.
fn minima_like_scales(matrix: &PackedMatrix<'_>, width: u8, rng: &mut Rng) -> Vec<u8> {
    let groups = matrix.scheme.groups_per_row(matrix.cols);
    let (mut codes, mut minima) = (vec![0; groups], vec![0; matrix.zeros.len()]);
    let row_bytes = minima.len() / matrix.rows;
    for (row, minima) in minima.chunks_exact_mut(row_bytes).enumerate() {
        bits::unpack(&matrix.scales[row * row_bytes..], width.into(), &mut codes);
        codes.iter_mut().for_each(|code| *code ^= rng.below(4) as u8);
        bits::pack(&codes, width.into(), minima);
    }
    minima
}

/// A scale, of either sign, that differs from its neighbours by up to a factor of 8.
fn scale(rng: &mut Rng) -> f32 {
    let sign = if rng.below(4) == 0 { -1.0 } else { 1.0 };
    sign * (0.25 + 1.75 * rng.uniform())
}
