//! 2:4 sparsity: which weights are kept, how they are rounded, and what it takes to store them.

use marlin_format::{
    Element, EncodeOptions, Encoder, Format, FormatError, Grouping, PackedMatrix, ScaleKind, ScaleSearch, Scheme,
    Sparsity, abs_max, encode,
};
use proptest::prelude::*;

use crate::common::{gaussian, heavy_tailed, mse};

const RTN: EncodeOptions = EncodeOptions { search: ScaleSearch::AbsMax, power_of_two_global: false };
const MSE: EncodeOptions = EncodeOptions { search: ScaleSearch::Mse, power_of_two_global: false };

/// The variants of our formats, at every kind of group, and schemes that only [`Scheme`] can name.
fn schemes() -> Vec<Scheme> {
    let groupings = ["32", "64", "128", "row", "tensor", "3x40"].map(|text| text.parse().unwrap());
    let of = |format: Format| groupings.into_iter().map(move |grouping| format.sparse_24(Some(grouping)).unwrap());
    let sparse = |scheme| Scheme { sparsity: Sparsity::TwoOfFour, ..scheme };
    let others = [sparse(Scheme::BF16), sparse(Scheme::F32), sparse(Scheme::NVFP4), sparse(Scheme::MXFP4)];
    Format::SPARSE.into_iter().flat_map(of).chain(others).collect()
}

fn encoded(values: &[f32], rows: usize, scheme: &Scheme, options: &EncodeOptions) -> PackedMatrix<'static> {
    let matrix = encode(values, rows, values.len() / rows, scheme, options).unwrap();
    matrix.validate().unwrap_or_else(|error| panic!("{scheme}: {error}"));
    matrix
}

/// The weights with the two smaller of every four set to 0, those of the higher columns where two are equal.
fn pruned(values: &[f32]) -> Vec<f32> {
    let prune = |quad: &[f32]| {
        let mut order = [0, 1, 2, 3];
        order.sort_by(|&a, &b| quad[b].abs().total_cmp(&quad[a].abs()).then(a.cmp(&b)));
        [0, 1, 2, 3].map(|position| if order[..2].contains(&position) { quad[position] } else { 0.0 })
    };
    values.chunks_exact(4).flat_map(prune).collect()
}

#[test]
fn bits_per_weight_count_the_metadata() {
    // Half of the codes, a bit of metadata, a 16-bit scale (and a zero point of 4 bits) for 128 columns; a 32-bit one a row.
    for (format, bits) in [(Format::Fp4, 3.125), (Format::Int4, 3.156_25), (Format::Fp8, 5.0 + 32.0 / 1024.0)] {
        let scheme = format.sparse_24(None).unwrap();
        assert_eq!(scheme.bits_per_weight(16, 1024), bits, "{scheme}");
        assert_eq!(scheme.to_string(), format!("{}, 2:4", format.scheme(None).unwrap()));
    }
}

/// The example of docs/formats.md.
#[test]
fn the_documented_bytes() {
    let weights = [0.5, 0.25, 1.0, 0.0, 0.0, -0.5, 0.25, 3.0];
    let matrix = encoded(&weights, 1, &Format::Fp4.sparse_24(Some(Grouping::Row)).unwrap(), &RTN);
    assert_eq!((&matrix.codes[..], &matrix.scales[..]), (&[0x42, 0x7a][..], &[0x00, 0x38][..]));
    assert_eq!(&matrix.sparse_index[..], [0xd8]);
    assert_eq!(matrix.decode(), [0.5, 0.0, 1.0, 0.0, 0.0, -0.5, 0.0, 3.0]);
}

#[test]
fn other_formats_have_no_variant() {
    for format in Format::ALL.into_iter().filter(|format| !Format::SPARSE.contains(format)) {
        let error = format.sparse_24(None).unwrap_err().to_string();
        assert_eq!(error, format!("{format} has no variant with 2:4 sparsity; fp4, int4, fp8 have one"));
    }
}

#[test]
fn columns_come_in_fours() {
    for scheme in schemes() {
        for cols in [1, 2, 3, 6, 127] {
            let error = encode(&vec![1.0; cols], 1, cols, &scheme, &RTN).unwrap_err();
            assert_eq!(error, FormatError::SparseColumns { cols }, "{scheme}");
        }
    }
}

proptest! {
    #[test]
    fn the_two_largest_of_four_are_kept_and_rounded_as_a_matrix_of_their_own(
        (rows, quads) in (1usize..5, 1usize..50),
        seed in any::<u64>(),
        scheme in prop::sample::select(schemes()),
        options in prop::sample::select(vec![RTN, MSE]),
    ) {
        let cols = 4 * quads;
        let values = heavy_tailed(rows * cols, seed);
        let matrix = encoded(&values, rows, &scheme, &options);
        let decoded = matrix.decode();
        for (found, wanted) in decoded.iter().zip(pruned(&values)) {
            prop_assert!(wanted != 0.0 || *found == 0.0, "a pruned weight is {found}");
        }
        // Scales see the kept weights alone, so dropping the others first changes nothing.
        prop_assert_eq!(&encoded(&pruned(&values), rows, &scheme, &options), &matrix);
        // Each group holds the half of its columns that a dense matrix of the kept weights has in a group of half the size.
        let kept: Vec<f32> = pruned(&values).chunks(4).zip(values.chunks(4)).flat_map(|(p, v)| {
            (0..4).filter(|&i| p[i] == v[i]).map(|i| v[i]).collect::<Vec<_>>()
        }).collect();
        let grouping = match scheme.grouping {
            Grouping::Columns(n) => Grouping::Columns(n / 2),
            Grouping::Block { rows, cols } => Grouping::Block { rows, cols: cols / 2 },
            whole => whole,
        };
        let dense = encoded(&kept, rows, &Scheme { grouping, sparsity: Sparsity::Dense, ..scheme }, &options);
        prop_assert_eq!((&matrix.codes, &matrix.scales, &matrix.zeros), (&dense.codes, &dense.scales, &dense.zeros));
    }

    #[test]
    fn representable_weights_come_back_exactly(quads in 1usize..40, seed in any::<u64>()) {
        // Multiples of 1/8, of which the largest is the element's largest value times a power of two.
        let values = |largest: f32| -> Vec<f32> {
            let small = |v: &f32| [0.0f32, 0.125, 0.25, 0.375, 0.5, 0.75][(v.to_bits() % 6) as usize].copysign(*v);
            [largest, -largest, 0.0, 0.125].into_iter().chain(gaussian(quads * 4, seed).iter().map(small)).collect()
        };
        for grouping in ["row", "tensor"].map(|text| text.parse().ok()) {
            for (format, largest) in [(Format::Fp4, 0.75), (Format::Fp8, 0.875)] {
                let (scheme, values) = (format.sparse_24(grouping).unwrap(), values(largest));
                prop_assert_eq!(encoded(&values, 1, &scheme, &RTN).decode(), pruned(&values), "{}", scheme);
            }
        }
        let values = values(0.75);
        let scheme = Scheme { sparsity: Sparsity::TwoOfFour, ..Scheme::BF16 };
        prop_assert_eq!(encoded(&values, 1, &scheme, &RTN).decode(), pruned(&values));
        let whole: Vec<f32> = values.iter().map(|v| (v * 8.0).abs()).chain([15.0, 15.0, 0.0, 0.0]).collect();
        let scheme = Format::Int4.sparse_24(Some(Grouping::Row)).unwrap();
        prop_assert_eq!(encoded(&whole, 1, &scheme, &RTN).decode(), pruned(&whole));
    }
}

#[test]
fn a_searched_scale_is_no_worse_than_the_largest_weight_s() {
    let values = gaussian(8 * 512, 3);
    for format in Format::SPARSE {
        let scheme = format.sparse_24(None).unwrap();
        let error = |options| mse(&encoded(&values, 8, &scheme, options).decode(), &values);
        assert!(error(&MSE) < error(&RTN), "{scheme}");
        // Pruning alone costs about 12 % of the energy of normal weights.
        let energy = mse(&values, &vec![0.0; values.len()]);
        let share = error(&MSE) / energy;
        assert!((0.08..0.16).contains(&share), "{scheme}: {share}");
    }
}

#[test]
fn slices_join_to_the_whole() {
    let (rows, cols) = (13, 152);
    let values = gaussian(rows * cols, 14);
    let largest = abs_max(&values, 0, cols).unwrap();
    for scheme in schemes() {
        let whole = encoded(&values, rows, &scheme, &MSE);
        let encoder = Encoder::new(&scheme, rows, cols, &MSE).unwrap().with_abs_max(largest);
        let step = encoder.slice_rows();
        let parts: Vec<_> = (0..rows)
            .step_by(step)
            .map(|row| {
                encoder.encode_rows(row, &values[row * cols..rows.min(row.saturating_add(step)) * cols]).unwrap()
            })
            .collect();
        assert_eq!(PackedMatrix::concat_rows(&parts).unwrap(), whole, "{scheme}");
    }
}

#[test]
fn weights_that_do_not_fit_are_named_where_they_stand() {
    let mut values = vec![0.5; 2 * 40];
    values[40 + 23] = 1e30;
    let scheme = Format::Fp4.sparse_24(None).unwrap();
    let error = encode(&values, 2, 40, &scheme, &RTN).unwrap_err();
    assert_eq!(error, FormatError::WeightRange { row: 1, col: 23, value: 1e30, scheme: Box::new(scheme) });
    values[40 + 23] = f32::NAN;
    let error = encode(&values, 2, 40, &scheme, &RTN).unwrap_err();
    assert!(matches!(error, FormatError::NonFinite { row: 1, col: 23, .. }), "{error}");
    let odd =
        Scheme { sparsity: Sparsity::TwoOfFour, ..Scheme::scaled(Element::E2M1, Grouping::Columns(6), ScaleKind::F16) };
    assert!(encode(&[0.5; 12], 1, 12, &odd, &RTN).unwrap_err().to_string().contains("multiple of 4 columns"));
}
