//! Encoding: exactness on code points, error bounds, the search, shapes of all kinds, and refusals.

use crate::common::{Random, gaussian, heavy_tailed, mse};
use marlin_format::{
    ColumnOrder, Element, EncodeOptions, Encoder, Format, FormatError, Grouping, PackedMatrix, ScaleKind, ScaleSearch,
    Scheme, Sparsity, ZeroKind, abs_max, encode,
};

const RTN: EncodeOptions = EncodeOptions { search: ScaleSearch::AbsMax, power_of_two_global: false };
const MSE: EncodeOptions = EncodeOptions { search: ScaleSearch::Mse, power_of_two_global: false };

fn groupings() -> Vec<Grouping> {
    ["16", "32", "64", "100", "128", "row", "tensor", "128x128", "3x40"].map(|text| text.parse().unwrap()).to_vec()
}

/// Every format with every group size that it can have.
fn schemes() -> Vec<Scheme> {
    let mut schemes = Vec::new();
    for format in Format::ALL {
        schemes.push(format.scheme(None).unwrap());
        schemes.extend(groupings().into_iter().filter_map(|grouping| format.scheme(Some(grouping)).ok()));
    }
    schemes
}

fn quantised() -> Vec<Scheme> {
    schemes().into_iter().filter(|scheme| !scheme.is_dense()).collect()
}

fn encoded(
    values: &[f32],
    rows: usize,
    cols: usize,
    scheme: &Scheme,
    options: &EncodeOptions,
) -> PackedMatrix<'static> {
    let matrix = encode(values, rows, cols, scheme, options).unwrap_or_else(|error| panic!("{scheme}: {error}"));
    matrix.validate().unwrap_or_else(|error| panic!("{scheme}: {error}"));
    assert_eq!(matrix.bytes(), scheme.packed_bytes(rows, cols).unwrap(), "{scheme}");
    matrix
}

/// Half of the distance between a value's neighbours on the grid of the element: what rounding to nearest may cost, in
/// units of the scale.
fn half_step(element: Element, value: f32) -> f32 {
    let mut values: Vec<f32> = element.values().iter().copied().filter(|value| !value.is_nan()).collect();
    values.sort_by(f32::total_cmp);
    let above = values.iter().copied().find(|&v| v >= value);
    let below = values.iter().copied().rev().find(|&v| v <= value);
    match (below, above) {
        (Some(below), Some(above)) => (above - below) / 2.0,
        // Beyond the end: half of the last step, which is what the ranges laid over the codes allow.
        (Some(_), None) => (values[values.len() - 1] - values[values.len() - 2]) / 2.0,
        _ => (values[1] - values[0]) / 2.0,
    }
}

#[test]
fn round_to_nearest_is_within_half_a_step() {
    let (rows, cols) = (6, 301);
    for values in [gaussian(rows * cols, 1), heavy_tailed(rows * cols, 2)] {
        for scheme in quantised().into_iter().filter(|scheme| scheme.scale != ScaleKind::E8M0) {
            let matrix = encoded(&values, rows, cols, &scheme, &RTN);
            let decoded = matrix.decode();
            for (index, (&weight, &found)) in values.iter().zip(&decoded).enumerate() {
                let (row, col) = (index / cols, index % cols);
                let scale = matrix.scale_at(row, matrix.group_of(col));
                let zero = matrix.zero_at(row, matrix.group_of(col)) as f32;
                let bound =
                    if scale == 0.0 { 0.0 } else { scale.abs() * half_step(scheme.element, weight / scale + zero) };
                // Rounding the scale itself moves a value by as many rounding errors of the scale.
                let scale_error = match scheme.scale {
                    ScaleKind::F16 => (scale / 2048.0).max(2f32.powi(-25)),
                    ScaleKind::E4M3Global => {
                        let global = f32::from_le_bytes(matrix.globals[..].try_into().unwrap());
                        (scale / 16.0).max(global / 1024.0)
                    }
                    _ => 0.0,
                };
                let slack = scale_error * (weight / scale).abs() + weight.abs() * 1e-6;
                let error = (weight - found).abs();
                assert!(error <= bound + slack, "{scheme} [{row}, {col}]: {weight} became {found}, scale {scale}");
            }
        }
    }
}

/// OCP Microscaling: the scale is 2^(floor(log2 amax) − 2), and only weights above 6 scales saturate.
#[test]
fn mxfp4_scales_follow_the_specification() {
    let (rows, cols) = (8, 64);
    let values = gaussian(rows * cols, 3);
    let matrix = encoded(&values, rows, cols, &Scheme::MXFP4, &RTN);
    for (group, weights) in values.chunks(32).enumerate() {
        let largest = weights.iter().fold(0.0f32, |max, w| max.max(w.abs()));
        let exponent = f64::from(largest).log2().floor() as i32 - 2;
        assert_eq!(i32::from(matrix.scales[group]), exponent + 127);
        let scale = 2f32.powi(exponent);
        let mut decoded = vec![0.0; cols];
        matrix.decode_row(group / 2, &mut decoded);
        for (&weight, &found) in weights.iter().zip(&decoded[group % 2 * 32..]) {
            let nearest =
                Element::E2M1.values().iter().map(|value| (weight - scale * value).abs()).fold(f32::MAX, f32::min);
            assert_eq!((weight - found).abs(), nearest);
        }
    }
}

#[test]
fn nvfp4_gives_the_largest_group_the_largest_scale() {
    let mut values = gaussian(4 * 48, 4);
    values[100] = -0.75;
    let matrix = encoded(&values, 4, 48, &Scheme::NVFP4, &RTN);
    let global = f32::from_le_bytes(matrix.globals[..].try_into().unwrap());
    assert_eq!(global, 0.75 / (6.0 * 448.0));
    assert_eq!(Element::E4M3.value(u32::from(matrix.scales[100 / 16])), 448.0);
    assert_eq!(matrix.decode()[100], -0.75);
}

/// Weights that a scheme can store exactly come back exactly, and encoding what was decoded changes nothing. (For
/// symmetric integers it is the search that finds exact scales: round-to-nearest lays the range half a step further
/// out.)
#[test]
fn code_points_are_kept() {
    let (rows, cols) = (5, 96);
    for scheme in quantised().into_iter().filter(|scheme| !matches!(scheme.element, Element::Int(_))) {
        let mut random = Random(5);
        let step = if scheme.scale == ScaleKind::E8M0 { 0.25 } else { 0.375 };
        let usable: Vec<f32> = scheme.element.values().iter().copied().filter(|value| !value.is_nan()).collect();
        let largest = usable.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        // A zero point in the middle of the range, and the whole range in every group, fix scale and zero point.
        let zero = if scheme.zero == ZeroKind::Integer { (largest / 2.0).floor() } else { 0.0 };
        let values: Vec<f32> = (0..rows * cols)
            .map(|index| match (scheme.zero, index % 4) {
                (ZeroKind::Integer, 0) => (0.0 - zero) * step,
                (_, 0 | 1) => (largest - zero) * step,
                _ => (usable[random.bits() as usize % usable.len()] - zero) * step,
            })
            .collect();
        let once = encoded(&values, rows, cols, &scheme, &RTN);
        assert_eq!(once.decode(), values, "{scheme}");
        let twice = encoded(&once.decode(), rows, cols, &scheme, &RTN);
        assert_eq!(once.decode(), twice.decode(), "{scheme}");
    }
}

/// The search finds the exact scale where one exists, also for symmetric integers.
#[test]
fn the_search_finds_exact_scales() {
    for (bits, grouping) in [(4, "32"), (8, "row"), (3, "64"), (2, "16")] {
        let scheme = Scheme::scaled(Element::Int(bits), grouping.parse().unwrap(), ScaleKind::F32);
        let half = 1i64 << (bits - 1);
        let mut random = Random(u64::from(bits));
        let values: Vec<f32> = (0..4 * 64)
            .map(|index| match index % 16 {
                0 => -half as f32 * 0.125,
                _ => (random.bits() as i64).rem_euclid(2 * half).wrapping_sub(half) as f32 * 0.125,
            })
            .collect();
        let matrix = encoded(&values, 4, 64, &scheme, &MSE);
        assert!(mse(&values, &matrix.decode()) < 1e-12, "{scheme}: {}", mse(&values, &matrix.decode()));
    }
}

#[test]
fn the_search_beats_round_to_nearest_on_every_format() {
    let (rows, cols) = (64, 512);
    for (name, values) in [("gaussian", gaussian(rows * cols, 6)), ("heavy-tailed", heavy_tailed(rows * cols, 7))] {
        for format in Format::ALL.into_iter().filter(|format| !format.is_dense()) {
            let scheme = format.scheme(None).unwrap();
            let rtn = mse(&values, &encoded(&values, rows, cols, &scheme, &RTN).decode());
            let searched = mse(&values, &encoded(&values, rows, cols, &scheme, &MSE).decode());
            println!("{name} {scheme}: {rtn:.4e} {searched:.4e} {:.3}", searched / rtn);
            assert!(searched < rtn, "{name} {scheme}: {searched:e} against {rtn:e}");
        }
    }
}

/// On every group of every scheme, not only on average.
#[test]
fn the_search_is_never_worse() {
    let (rows, cols) = (7, 205);
    for values in [gaussian(rows * cols, 8), heavy_tailed(rows * cols, 9)] {
        for scheme in quantised() {
            let rtn = encoded(&values, rows, cols, &scheme, &RTN);
            let searched = encoded(&values, rows, cols, &scheme, &MSE);
            let (rtn, searched) = (rtn.decode(), searched.decode());
            assert!(mse(&values, &searched) <= mse(&values, &rtn), "{scheme}");
            if let Grouping::Columns(group) = scheme.grouping {
                for row in 0..rows {
                    for start in (0..cols).step_by(group as usize) {
                        let span = row * cols + start..row * cols + cols.min(start + group as usize);
                        let (rtn, searched) = (
                            mse(&values[span.clone()], &rtn[span.clone()]),
                            mse(&values[span.clone()], &searched[span.clone()]),
                        );
                        assert!(searched <= rtn * (1.0 + 1e-5), "{scheme} {span:?}: {searched:e} against {rtn:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn any_shape_encodes() {
    for (rows, cols) in [(1, 1), (1, 7), (5, 1), (3, 127), (2, 129), (130, 3), (129, 257)] {
        let values = gaussian(rows * cols, 10);
        let power = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64;
        for scheme in schemes() {
            for options in [RTN, MSE] {
                if options == MSE && rows * cols > 1000 && scheme.grouping != Grouping::Columns(128) {
                    continue;
                }
                let matrix = encoded(&values, rows, cols, &scheme, &options);
                let error = mse(&values, &matrix.decode()) / power;
                // Two bits for a whole matrix keep little, but more than zeros would.
                assert!(error < 1.0, "{scheme} [{rows}, {cols}]: relative error {error}");
            }
        }
    }
}

#[test]
fn zeros_stay_zeros() {
    for scheme in schemes() {
        for options in [RTN, MSE] {
            let decoded = encoded(&[0.0; 3 * 40], 3, 40, &scheme, &options).decode();
            assert!(decoded.iter().all(|&weight| weight == 0.0), "{scheme}");
            let mut values = gaussian(3 * 40, 11);
            values[..20].fill(0.0);
            let decoded = encoded(&values, 3, 40, &scheme, &options).decode();
            assert!(decoded[..20].iter().all(|&weight| weight == 0.0), "{scheme}");
        }
    }
}

#[test]
fn tiny_weights_neither_fail_nor_grow() {
    for magnitude in [f32::from_bits(1), 1e-38, 1e-20, 1e-9] {
        let mut values = vec![magnitude; 2 * 32];
        values[3] = -magnitude;
        for scheme in schemes() {
            for options in [RTN, MSE] {
                let decoded = encoded(&values, 2, 32, &scheme, &options).decode();
                for (weight, found) in values.iter().zip(decoded) {
                    assert!(
                        found.is_finite() && found.abs() <= 2.0 * weight.abs().max(1e-7),
                        "{scheme}: {weight} {found}"
                    );
                }
            }
        }
    }
}

#[test]
fn weights_beyond_the_range_are_refused_by_position() {
    let mut values = gaussian(3 * 64, 12);
    values[2 * 64 + 37] = -3e38;
    for scheme in schemes() {
        for options in [RTN, MSE] {
            match encode(&values, 3, 64, &scheme, &options) {
                Ok(matrix) => assert!(matrix.decode().iter().all(|weight| weight.is_finite()), "{scheme}"),
                Err(FormatError::WeightRange { row, col, value, .. }) => {
                    assert_eq!((row, col, value), (2, 37, -3e38), "{scheme}");
                }
                Err(error) => panic!("{scheme}: {error}"),
            }
        }
    }
    let error = encode(&values, 3, 64, &Format::Fp4.scheme(None).unwrap(), &RTN).unwrap_err();
    assert!(error.to_string().contains("row 2, column 37 is too large for fp4 g128"), "{error}");
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_position() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = gaussian(3 * 40, 13);
        values[2 * 40 + 5] = bad;
        for scheme in schemes() {
            let error = encode(&values, 3, 40, &scheme, &MSE).unwrap_err();
            assert!(matches!(error, FormatError::NonFinite { row: 2, col: 5, .. }), "{scheme}: {error}");
        }
        assert!(abs_max(&values, 10, 40).unwrap_err().to_string().contains("row 12, column 5"));
    }
    assert_eq!(abs_max(&[0.5, -2.0, 1.0, 0.0], 0, 2).unwrap(), 2.0);
}

#[test]
fn dense_formats_round_to_even() {
    let values = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1.0 - 1.0 / 2048.0, 1.0 + 3.0 / 2048.0];
    assert_eq!(encoded(&values, 1, 4, &Scheme::BF16, &RTN).decode(), [1.0, 1.0 + 4.0 / 256.0, -1.0, 1.0]);
    assert_eq!(encoded(&values, 1, 4, &Scheme::F16, &RTN).decode(), [values[0], values[1], -1.0, 1.0 + 4.0 / 2048.0]);
    assert_eq!(encoded(&values, 2, 2, &Scheme::F32, &RTN).decode(), values);
}

#[test]
fn what_is_decoded_only_is_refused_with_a_reason() {
    let two_level = ScaleKind::TwoLevel { bits: 8, signed: true, super_group: 256 };
    let groups = Grouping::Columns(16);
    let refused = [
        Scheme { sparsity: Sparsity::TwoOfFour, ..Scheme::scaled(Element::E2M1, Grouping::Columns(6), ScaleKind::F16) },
        Scheme { order: ColumnOrder::GroupIndex, ..Scheme::scaled(Element::Int(4), groups, ScaleKind::F16) },
        Scheme::scaled(Element::Int(6), groups, two_level),
        Scheme::scaled(Element::Iq4Nl, groups, ScaleKind::F16),
        Scheme::scaled(Element::Uint(4), groups, ScaleKind::F16),
        Scheme { zero: ZeroKind::F16Bias, ..Scheme::scaled(Element::Uint(4), groups, ScaleKind::F16) },
        Scheme { zero: ZeroKind::Integer, ..Scheme::scaled(Element::Uint(4), groups, ScaleKind::E8M0) },
        Scheme { zero: ZeroKind::Integer, ..Scheme::scaled(Element::Int(4), groups, ScaleKind::F16) },
        Scheme::scaled(Element::E4M3, Grouping::Tensor, ScaleKind::None),
    ];
    for scheme in refused {
        scheme.validate().unwrap();
        let error = encode(&[0.5; 256], 1, 256, &scheme, &RTN).unwrap_err();
        assert!(matches!(error, FormatError::Unsupported { .. }), "{scheme}: {error}");
    }
    assert!(matches!(encode(&[0.5; 7], 2, 4, &Scheme::BF16, &RTN), Err(FormatError::ValueCount { .. })));
    assert!(matches!(encode(&[], 0, 4, &Scheme::BF16, &RTN), Err(FormatError::Empty { .. })));
}

/// Slices of rows, joined, are the matrix encoded at once.
#[test]
fn slices_join_to_the_whole() {
    let (rows, cols) = (13, 150);
    let values = gaussian(rows * cols, 14);
    let largest = abs_max(&values, 0, cols).unwrap();
    for scheme in schemes() {
        let whole = encoded(&values, rows, cols, &scheme, &MSE);
        let encoder = Encoder::new(&scheme, rows, cols, &MSE).unwrap().with_abs_max(largest);
        let slice = encoder.slice_rows() * 2;
        let parts: Vec<_> = values
            .chunks(slice * cols)
            .enumerate()
            .map(|(index, values)| encoder.encode_rows(index * slice, values).unwrap())
            .collect();
        assert_eq!(PackedMatrix::concat_rows(&parts).unwrap(), whole, "{scheme}");
    }
}

#[test]
fn slices_that_cannot_stand_alone_are_refused() {
    let values = gaussian(6 * 32, 15);
    let encoder = |format: Format, grouping: Option<&str>| {
        let scheme = format.scheme(grouping.map(|text| text.parse().unwrap())).unwrap();
        Encoder::new(&scheme, 6, 32, &RTN).unwrap()
    };
    let refused = |result: Result<PackedMatrix<'_>, FormatError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, FormatError::RowSlice { .. }), "{error}");
    };
    refused(encoder(Format::Fp8, Some("tensor")).encode_rows(0, &values[..64]));
    refused(encoder(Format::Fp8, Some("4x32")).encode_rows(2, &values[..128]));
    refused(encoder(Format::Fp8, Some("4x32")).encode_rows(0, &values[..64]));
    refused(encoder(Format::Nvfp4, None).encode_rows(0, &values[..64]));
    encoder(Format::Fp8, Some("4x32")).encode_rows(4, &values[..64]).unwrap();

    let encode_one = |values: &[f32]| encode(values, 2, 32, &Scheme::NVFP4, &RTN).unwrap();
    refused(PackedMatrix::concat_rows(&[encode_one(&values[..64]), encode_one(&values[64..128])]));
}
