//! Encoding weights one by one: as encoding them all at once, and with an importance of each.

use marlin_format::{EncodeOptions, Encoder, Format, Grouping, ScaleSearch, Scheme, Sparsity, abs_max, encode};

use crate::common::{Random, gaussian, heavy_tailed};

const MSE: EncodeOptions = EncodeOptions { search: ScaleSearch::Mse, power_of_two_global: false };

fn schemes() -> Vec<Scheme> {
    let groupings: [Option<Grouping>; 5] = ["32", "128", "row", "tensor", "3x40"].map(|text| text.parse().ok());
    let of = |format: Format| {
        let dense = groupings.into_iter().filter_map(move |grouping| format.scheme(grouping).ok());
        let sparse = groupings.into_iter().filter_map(move |grouping| format.sparse_24(grouping).ok());
        dense.chain(sparse)
    };
    Format::ALL.into_iter().filter(|format| !format.is_dense()).flat_map(of).collect()
}

/// The two of four that are largest in magnitude, and of equal ones the first.
fn largest_two(values: &[f32]) -> Vec<bool> {
    let keep = |quad: &[f32]| {
        let mut order = [0, 1, 2, 3];
        order.sort_by(|&a, &b| quad[b].abs().total_cmp(&quad[a].abs()).then(a.cmp(&b)));
        [0, 1, 2, 3].map(|position| order[..2].contains(&position))
    };
    values.chunks_exact(4).flat_map(keep).collect()
}

#[test]
fn one_by_one_is_as_all_at_once() {
    let (rows, cols) = (7, 320);
    for values in [gaussian(rows * cols, 1), heavy_tailed(rows * cols, 2)] {
        for scheme in schemes() {
            let encoder = Encoder::new(&scheme, rows, cols, &MSE).unwrap();
            let groups = encoder.by_groups(abs_max(&values, 0, cols).unwrap()).unwrap();
            let is_sparse = scheme.sparsity == Sparsity::TwoOfFour;
            let kept = if is_sparse { largest_two(&values) } else { Vec::new() };
            let is_kept = |index: usize| kept.get(index).copied().unwrap_or(true);
            let (tile_rows, tile_cols) = (scheme.group_rows(rows), scheme.group_cols(cols));
            let (mut codes, mut scales) = (vec![0; rows * cols], Vec::new());
            let mut decoded = vec![0.0; rows * cols];
            for first_row in (0..rows).step_by(tile_rows) {
                for first in (0..cols).step_by(tile_cols) {
                    let of_row = |row: usize| (first..cols.min(first + tile_cols)).map(move |col| row * cols + col);
                    let tile = first_row..rows.min(first_row + tile_rows);
                    let weights: Vec<usize> = tile.flat_map(of_row).filter(|&index| is_kept(index)).collect();
                    let of_group: Vec<f32> = weights.iter().map(|&index| values[index]).collect();
                    let scale = groups.choose(&of_group, None, [first_row, first, tile_cols]).unwrap();
                    for index in weights {
                        (codes[index], decoded[index]) = groups.code(scale, values[index]);
                    }
                    scales.push(scale);
                }
            }
            let packed = groups.pack(rows, &codes, &kept, &scales);
            assert_eq!(packed, encode(&values, rows, cols, &scheme, &MSE).unwrap(), "{scheme}");
            assert_eq!(packed.decode(), decoded, "{scheme}");
        }
    }
}

/// The squared error that counts is no larger than with a scale for which all weights are alike.
#[test]
fn important_weights_are_met_better() {
    let mut random = Random(3);
    for scheme in schemes().into_iter().filter(|scheme| scheme.sparsity == Sparsity::Dense) {
        let groups = Encoder::new(&scheme, 1, 32, &MSE).unwrap().by_groups(4.0).unwrap();
        let (mut alike, mut weighted) = (0.0, 0.0);
        for seed in 0..20 {
            let weights = gaussian(32, seed);
            let importance: Vec<f32> = (0..32).map(|_| random.uniform().powi(4) as f32).collect();
            let error = |scale| -> f32 {
                let error =
                    |(&weight, &importance): (&f32, &f32)| importance * (groups.code(scale, weight).1 - weight).powi(2);
                weights.iter().zip(&importance).map(error).sum()
            };
            alike += error(groups.choose(&weights, None, [0, 0, 32]).unwrap());
            weighted += error(groups.choose(&weights, Some(&importance), [0, 0, 32]).unwrap());
        }
        assert!(weighted <= alike, "{scheme}: {weighted}, {alike} where all are alike");
    }
}

#[test]
fn what_has_no_groups_is_refused() {
    let error = Encoder::new(&Scheme::BF16, 2, 32, &MSE).unwrap().by_groups(1.0).unwrap_err().to_string();
    assert!(error.contains("bf16") && error.contains("no groups"), "{error}");
    let groups = Encoder::new(&Format::Int8.scheme(None).unwrap(), 2, 256, &MSE).unwrap().by_groups(1.0).unwrap();
    let mut weights = vec![0.0; 128];
    weights[5] = 1e30;
    let error = groups.choose(&weights, None, [1, 128, 128]).unwrap_err().to_string();
    assert!(error.contains("1e30") || error.contains("1000000015047466"), "{error}");
}
