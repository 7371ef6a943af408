//! Packed matrices: what `validate` refuses, and the accessors.

use std::borrow::Cow;

use crate::common::gaussian;
use half::f16;
use marlin_format::{
    ColumnOrder, Element, EncodeOptions, Format, FormatError, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity,
    ZeroKind, encode,
};
use proptest::prelude::*;

fn sample(format: Format) -> PackedMatrix<'static> {
    let scheme = format.scheme(None).unwrap();
    encode(&gaussian(3 * 160, 1), 3, 160, &scheme, &EncodeOptions::default()).unwrap()
}

type Field = (&'static str, for<'m> fn(&'m mut PackedMatrix<'static>) -> &'m mut Cow<'static, [u8]>);

const FIELDS: [Field; 6] = [
    ("codes", |m| &mut m.codes),
    ("scales", |m| &mut m.scales),
    ("zeros", |m| &mut m.zeros),
    ("globals", |m| &mut m.globals),
    ("group_index", |m| &mut m.group_index),
    ("sparse_index", |m| &mut m.sparse_index),
];

#[test]
fn buffers_of_the_wrong_length_are_named() {
    for format in Format::ALL {
        let whole = sample(format);
        whole.validate().unwrap();
        for (name, field) in FIELDS {
            let mut longer = whole.clone();
            field(&mut longer).to_mut().push(0);
            let mut shorter = whole.clone();
            let was_empty = field(&mut shorter).to_mut().pop().is_none();
            for wrong in [Some(longer), Some(shorter).filter(|_| !was_empty)].into_iter().flatten() {
                let error = wrong.validate().unwrap_err();
                assert!(matches!(error, FormatError::BufferLength { field, .. } if field == name), "{error}");
            }
        }
    }
    let mut short = sample(Format::Fp4);
    short.scales.to_mut().truncate(9);
    assert_eq!(
        short.validate().unwrap_err().to_string(),
        "scales has 9 bytes; 12 are wanted for [3, 160] stored as fp4 g128"
    );
}

#[test]
fn groups_out_of_range_are_refused() {
    let mut matrix = sample(Format::Int4);
    matrix.scheme.order = ColumnOrder::GroupIndex;
    let index = |groups: &[u32]| Cow::Owned(groups.iter().flat_map(|group| group.to_le_bytes()).collect::<Vec<u8>>());
    let mut groups = vec![1; 160];
    matrix.group_index = index(&groups);
    matrix.validate().unwrap();
    groups[77] = 2;
    matrix.group_index = index(&groups);
    assert_eq!(
        matrix.validate().unwrap_err().to_string(),
        "group_index puts column 77 in group 2, but a row has 2 groups"
    );
}

#[test]
fn two_of_four_metadata_names_two_ascending_columns() {
    let scheme = Scheme { sparsity: Sparsity::TwoOfFour, ..Scheme::F16 };
    let matrix = |metadata: [u8; 4]| PackedMatrix {
        rows: 2,
        cols: 12,
        scheme,
        codes: vec![0; 24].into(),
        scales: Cow::Borrowed(&[]),
        zeros: Cow::Borrowed(&[]),
        globals: Cow::Borrowed(&[]),
        group_index: Cow::Borrowed(&[]),
        sparse_index: metadata.to_vec().into(),
    };
    matrix([0x4e, 0x0c, 0x84, 0x09]).validate().unwrap();
    for bad in [0x0, 0x5, 0xf, 0x1, 0xb] {
        let error = matrix([0x4e, 0x0c, 0x84, bad]).validate().unwrap_err();
        assert_eq!(error, FormatError::SparseIndex { row: 1, col: 8, found: bad });
    }
    assert!(matrix([0x4e, 0x0c, 0x84, 0]).validate().unwrap_err().to_string().contains("row 1, columns 8–11: 0b0000"));
}

#[test]
fn scales_that_are_no_numbers_are_refused() {
    let refused = |matrix: PackedMatrix<'_>, field: &str, index: usize| {
        let error = matrix.validate().unwrap_err();
        assert!(error.to_string().starts_with(&format!("{field} value {index} is ")), "{error}");
    };
    let mut matrix = sample(Format::Mxfp4);
    matrix.scales.to_mut()[7] = 255;
    refused(matrix, "scales", 7);
    let mut matrix = sample(Format::Nvfp4);
    matrix.scales.to_mut()[11] = 0x7f;
    refused(matrix, "scales", 11);
    let mut matrix = sample(Format::Nvfp4);
    matrix.globals.to_mut().copy_from_slice(&f32::NAN.to_le_bytes());
    refused(matrix, "globals", 0);
    let mut matrix = sample(Format::Fp4);
    matrix.scales.to_mut()[6..8].copy_from_slice(&f16::INFINITY.to_le_bytes());
    refused(matrix, "scales", 3);
    let mut matrix = sample(Format::Int8);
    matrix.scheme.zero = ZeroKind::F16Bias;
    matrix.zeros = matrix.scales.clone();
    matrix.validate().unwrap();
    matrix.zeros.to_mut()[10..12].copy_from_slice(&f16::NAN.to_le_bytes());
    refused(matrix, "zeros", 5);
}

#[test]
fn dense_matrices_borrow_their_bytes() {
    let bytes: Vec<u8> = [1.0f32, -2.0, 0.5, 4.0, 0.0, 8.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let matrix = PackedMatrix::from_dense_bytes(Scheme::F32, 2, 3, &bytes[..]).unwrap();
    assert!(matches!(matrix.codes, Cow::Borrowed(_)));
    assert_eq!(matrix.decode(), [1.0, -2.0, 0.5, 4.0, 0.0, 8.0]);
    assert_eq!(matrix.code(1, 2), 8f32.to_bits());
    assert_eq!((matrix.scale_at(1, 0), matrix.zero_at(1, 0), matrix.bias_at(1, 0)), (1.0, 0, 0.0));
    assert_eq!(matrix.borrowed(), matrix);
    let owned: PackedMatrix<'static> = matrix.clone().into_owned();
    assert_eq!(owned, matrix);
    assert!(PackedMatrix::from_dense_bytes(Scheme::F32, 2, 4, &bytes[..]).is_err());
    assert!(PackedMatrix::from_dense_bytes(Scheme::MXFP4, 2, 3, &bytes[..3]).is_err());
}

#[test]
fn rows_join_only_with_their_like() {
    let refused = |parts: &[PackedMatrix<'_>]| {
        assert!(matches!(PackedMatrix::concat_rows(parts), Err(FormatError::RowSlice { .. })));
    };
    refused(&[sample(Format::Fp4), sample(Format::Int4)]);
    let scheme = Format::Fp8.scheme("2x64".parse().ok()).unwrap();
    let odd = encode(&gaussian(3 * 64, 2), 3, 64, &scheme, &EncodeOptions::default()).unwrap();
    refused(&[odd.clone(), odd.clone()]);
    assert_eq!(PackedMatrix::concat_rows(std::slice::from_ref(&odd)).unwrap(), odd);
    assert!(matches!(PackedMatrix::concat_rows(&[]), Err(FormatError::Empty { .. })));
    let joined = PackedMatrix::concat_rows(&[sample(Format::Bf16), sample(Format::Bf16)]).unwrap();
    assert_eq!(joined.rows, 6);
    assert_eq!(joined.decode()[480..], sample(Format::Bf16).decode());
}

#[test]
fn rows_are_cut_where_their_scales_allow() {
    let scheme = Format::Fp8.scheme("2x64".parse().ok()).unwrap();
    let tiled = encode(&gaussian(5 * 64, 2), 5, 64, &scheme, &EncodeOptions::default()).unwrap();
    assert_eq!(tiled.slice_rows(2..5).unwrap().decode(), tiled.decode()[2 * 64..]);
    let refused = |range: std::ops::Range<usize>, message: &str| {
        let error = tiled.slice_rows(range).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    refused(1..3, "row 1 lies within a tile of 2");
    refused(4..6, "rows 4..6 of 5");
    refused(3..3, "rows 3..3 of 5");
    let mut short = tiled.clone();
    short.codes.to_mut().pop();
    assert!(matches!(short.slice_rows(0..2), Err(FormatError::BufferLength { field: "codes", .. })));

    for format in Format::ALL {
        let whole = sample(format);
        let slice = whole.slice_rows(1..3).unwrap();
        slice.validate().unwrap();
        assert_eq!(slice.decode(), whole.decode()[160..], "{format}");
    }
    let two_level = two_level();
    let slice = two_level.slice_rows(1..3).unwrap();
    slice.validate().unwrap();
    assert_eq!(slice.decode(), two_level.decode()[256..]);
}

/// Scales and minima of two levels, as GGUF's Q4_K has them.
fn two_level() -> PackedMatrix<'static> {
    let scheme = Scheme {
        zero: ZeroKind::TwoLevelMin { bits: 6 },
        ..Scheme::scaled(
            Element::Uint(4),
            Grouping::Columns(32),
            ScaleKind::TwoLevel { bits: 6, signed: false, super_group: 256 },
        )
    };
    let (rows, cols) = (3, 256);
    let mut random = crate::common::Random(3);
    let mut bytes = |count: usize| (0..count).map(|_| random.bits() as u8 % 60).collect::<Vec<u8>>().into();
    PackedMatrix {
        rows,
        cols,
        scheme,
        codes: bytes(scheme.codes_bytes(rows, cols).unwrap()),
        scales: bytes(scheme.scales_bytes(rows, cols).unwrap()),
        zeros: bytes(scheme.zeros_bytes(rows, cols).unwrap()),
        globals: bytes(scheme.globals_bytes(rows, cols).unwrap()),
        group_index: bytes(0),
        sparse_index: bytes(0),
    }
}

/// An integer scheme of any width, grouping and zero point, with buffers of random bytes.
fn any_matrix() -> impl Strategy<Value = PackedMatrix<'static>> {
    let grouping = prop_oneof![
        Just(Grouping::Tensor),
        Just(Grouping::Row),
        (1u32..70).prop_map(Grouping::Columns),
        (1u32..5, 1u32..70).prop_map(|(rows, cols)| Grouping::Block { rows, cols }),
    ];
    (2u8..=8, any::<bool>(), grouping, any::<bool>(), 1usize..6, 1usize..140, any::<u64>()).prop_map(
        |(bits, signed, grouping, zeros, rows, cols, seed)| {
            let element = if signed { Element::Int(bits) } else { Element::Uint(bits) };
            let zero = if zeros { ZeroKind::Integer } else { ZeroKind::None };
            let scheme = Scheme { zero, ..Scheme::scaled(element, grouping, ScaleKind::E8M0) };
            let mut random = crate::common::Random(seed);
            let mut bytes = |count: usize| (0..count).map(|_| random.bits() as u8 % 200).collect::<Vec<u8>>().into();
            PackedMatrix {
                rows,
                cols,
                scheme,
                codes: bytes(scheme.codes_bytes(rows, cols).unwrap()),
                scales: bytes(scheme.scales_bytes(rows, cols).unwrap()),
                zeros: bytes(scheme.zeros_bytes(rows, cols).unwrap()),
                globals: bytes(0),
                group_index: bytes(0),
                sparse_index: bytes(0),
            }
        },
    )
}

proptest! {
    /// Whole rows decode as the accessors say, one weight at a time.
    #[test]
    fn rows_decode_as_their_parts(matrix in any_matrix()) {
        matrix.validate().unwrap();
        let mut weights = vec![0.0; matrix.cols];
        let mut codes = vec![0; matrix.cols];
        for row in 0..matrix.rows {
            matrix.decode_row(row, &mut weights);
            matrix.unpack_codes_row(row, &mut codes);
            for col in 0..matrix.cols {
                prop_assert_eq!(u32::from(codes[col]), matrix.code(row, col));
                let group = matrix.group_of(col);
                let value = matrix.scheme.element.value(matrix.code(row, col)) - matrix.zero_at(row, group) as f32;
                prop_assert_eq!(weights[col], matrix.scale_at(row, group) * value);
            }
        }
        let tile = matrix.scheme.group_rows(1);
        for start in (0..matrix.rows).step_by(tile) {
            let slice = matrix.slice_rows(start..matrix.rows).unwrap();
            slice.validate().unwrap();
            prop_assert_eq!(slice.decode(), &matrix.decode()[start * matrix.cols..]);
        }
    }
}

#[test]
fn columns_are_transposed() {
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let matrix = PackedMatrix::from_dense_bytes(Scheme::F32, 3, 4, bytes(&values)).unwrap();
    let all = matrix.transposed_columns(0, 1).unwrap();
    assert_eq!((all.rows, all.cols), (4, 3));
    assert_eq!(all.decode(), [0.0, 4.0, 8.0, 1.0, 5.0, 9.0, 2.0, 6.0, 10.0, 3.0, 7.0, 11.0]);
    let odd = matrix.transposed_columns(1, 2).unwrap();
    assert_eq!((odd.rows, odd.decode()), (2, vec![1.0, 5.0, 9.0, 3.0, 7.0, 11.0]));
    assert!(matrix.transposed_columns(4, 1).is_err());
    let packed = PackedMatrix::empty(Scheme::MXFP4, 3, 32);
    assert!(packed.transposed_columns(0, 1).unwrap_err().to_string().contains("no dense format"));
}
