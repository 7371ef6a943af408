//! GPTQ: rounding weights so that their errors make up for each other, as far as a layer's inputs allow.

mod drift;
mod feedback;
mod hessian;
mod order;

pub(crate) use self::drift::Drift;
pub(crate) use self::feedback::round_matrix;
pub(crate) use self::hessian::{Factor, Hessian};
pub(crate) use self::order::Order;

/// What is added to a Hessian's diagonal, as a share of its mean, if nothing else is asked for: enough for errors not to be made up for by
/// directions that only the few inputs of a calibration lack.
pub const USUAL_DAMPING: f32 = 0.01;

#[cfg(test)]
mod tests {
    use marlin_format::{EncodeOptions, Format, FormatError, Grouping, PackedMatrix, ScaleSearch, Scheme, Sparsity};

    use super::*;
    use crate::ErrorStats;
    use crate::encode_matrix::encode_matrix;

    const OPTIONS: EncodeOptions = EncodeOptions { search: ScaleSearch::Mse, power_of_two_global: false };

    /// A matrix rounded by this Hessian, in the order that suits it.
    fn gptq(
        source: &PackedMatrix<'_>,
        scheme: Scheme,
        hessian: &Hessian,
        damping: f32,
    ) -> Result<(PackedMatrix<'static>, ErrorStats), FormatError> {
        let order = Order::of(scheme, &hessian.diagonal());
        round_matrix(source, scheme, &OPTIONS, &hessian.factor(order, damping))
    }

    /// Reproducible numbers from -0.5 to 0.5.
    fn random(seed: u32) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0 - 0.5
        }
    }

    /// Inputs `[rows, cols]` that depend on each other, some columns of which are large.
    pub(super) fn inputs(rows: usize, cols: usize, seed: u32) -> Vec<f32> {
        let mut random = random(seed);
        let mut x = Vec::with_capacity(rows * cols);
        for _ in 0..rows {
            let shared: [f32; 3] = std::array::from_fn(|_| random());
            for col in 0..cols {
                let size = if col % 11 == 5 { 6.0 } else { 1.0 };
                x.push(size * (random() + shared[col % 3]));
            }
        }
        x
    }

    fn weights(rows: usize, cols: usize) -> PackedMatrix<'static> {
        // Sums of four are nearly normal.
        let mut random = random(9);
        let weights = (0..rows * cols).flat_map(|_| (random() + random() + random() + random()).to_le_bytes());
        PackedMatrix::from_dense_bytes(Scheme::F32, rows, cols, weights.collect::<Vec<u8>>()).unwrap()
    }

    fn schemes() -> Vec<Scheme> {
        let groupings: [Option<Grouping>; 6] = [
            None,
            "32".parse().ok(),
            "256".parse().ok(),
            "row".parse().ok(),
            "tensor".parse().ok(),
            "8x64".parse().ok(),
        ];
        let of = |format: Format| {
            let dense = groupings.into_iter().filter_map(move |grouping| format.scheme(grouping).ok());
            let sparse = groupings.into_iter().filter_map(move |grouping| format.sparse_24(grouping).ok());
            dense.chain(sparse)
        };
        Format::ALL.into_iter().filter(|format| !format.is_dense()).flat_map(of).collect()
    }

    /// `Σ (x·Eᵀ)²` over inputs and outputs.
    fn output_error(x: &[f32], source: &PackedMatrix<'_>, rounded: &PackedMatrix<'_>) -> f64 {
        let (source_values, rounded_values, cols) = (source.decode(), rounded.decode(), source.cols);
        let errors: Vec<f64> =
            source_values.iter().zip(&rounded_values).map(|(w, r)| f64::from(*w) - f64::from(*r)).collect();
        let of_pair = |x: &[f32], e: &[f64]| x.iter().zip(e).map(|(x, e)| f64::from(*x) * e).sum::<f64>().powi(2);
        x.chunks(cols).map(|x| errors.chunks(cols).map(|e| of_pair(x, e)).sum::<f64>()).sum()
    }

    #[test]
    fn inputs_without_correlation_leave_nothing_to_make_up_for() {
        let (rows, cols) = (21, 304);
        let source = weights(rows, cols);
        let mut hessian = Hessian::new(cols);
        for col in 0..cols {
            let mut x = vec![0.0; cols];
            x[col] = 1.0;
            hessian.add(&x);
        }
        for scheme in schemes() {
            let (_, found) = gptq(&source, scheme, &hessian, 0.0).unwrap();
            let (_, nearest) = encode_matrix(&source, scheme, &OPTIONS).unwrap();
            // Scales near the best that the encoder found are tried as well.
            let ratio = found.noise / nearest.noise;
            assert!((0.9..1.0 + 1e-6).contains(&ratio), "{scheme}: {ratio}");
        }
    }

    #[test]
    fn outputs_are_nearer_than_by_rounding_to_nearest() {
        let (rows, cols) = (21, 304);
        let source = weights(rows, cols);
        let x = inputs(1000, cols, 5);
        let mut hessian = Hessian::new(cols);
        hessian.add(&x);
        for scheme in schemes() {
            let (found, error) = gptq(&source, scheme, &hessian, USUAL_DAMPING).unwrap();
            found.validate().unwrap();
            let (nearest, nearest_error) = encode_matrix(&source, scheme, &OPTIONS).unwrap();
            let ratio = output_error(&x, &source, &found) / output_error(&x, &source, &nearest);
            assert!(ratio < 0.7, "{scheme}: {ratio}");
            // Only on the whole: each weight by itself is further off.
            let is_dense = scheme.sparsity == Sparsity::Dense;
            assert!(!is_dense || error.noise > nearest_error.noise, "{scheme}: {error:?}, {nearest_error:?}");
        }
    }

    /// The algorithm as it was published, in double precision, with the inverse of the Hessian.
    #[test]
    fn codes_are_those_of_the_published_algorithm() {
        let (rows, cols) = (16, 96);
        let source = weights(rows, cols);
        let x = inputs(400, cols, 3);
        let mut hessian = Hessian::new(cols);
        hessian.add(&x);
        let scheme = Format::Fp4.scheme(Some(Grouping::Row)).unwrap();
        // One scale a row.
        let factor = hessian.factor(Order::natural(cols), USUAL_DAMPING);
        let (found, _) = round_matrix(&source, scheme, &OPTIONS, &factor).unwrap();

        let mut h = vec![0f64; cols * cols];
        for x in x.chunks(cols) {
            for a in 0..cols {
                for b in 0..cols {
                    h[a * cols + b] += f64::from(x[a]) * f64::from(x[b]);
                }
            }
        }
        let mean = (0..cols).map(|col| h[col * cols + col]).sum::<f64>() / cols as f64;
        let damping = f64::from(USUAL_DAMPING) * (1.0 + cols as f64 / 400.0);
        (0..cols).for_each(|col| h[col * cols + col] += damping * mean);
        let mut inverse = inverted(h, cols);
        let (decoded, mut target) = (found.decode(), source.decode().into_iter().map(f64::from).collect::<Vec<_>>());
        let scales: Vec<f64> = (0..rows).map(|row| f64::from(found.scale_at(row, 0))).collect();
        let values = scheme.element.values();
        let mut same = 0;
        for col in 0..cols {
            let pivot = inverse[col * cols + col];
            for row in 0..rows {
                let weight = target[row * cols + col];
                let of = |value: f32| f64::from(value) * scales[row];
                let nearest = values.iter().map(|value| of(*value));
                let nearest = nearest.min_by(|a, b| (a - weight).abs().total_cmp(&(b - weight).abs())).unwrap();
                same += usize::from((nearest - f64::from(decoded[row * cols + col])).abs() < 1e-6);
                for later in col..cols {
                    target[row * cols + later] -= (weight - nearest) / pivot * inverse[col * cols + later];
                }
            }
            // What the inverse is without this column.
            let of_column: Vec<f64> = inverse[col * cols..(col + 1) * cols].to_vec();
            for a in 0..cols {
                for b in 0..cols {
                    inverse[a * cols + b] -= of_column[a] * of_column[b] / pivot;
                }
            }
        }
        assert!(same > rows * cols * 98 / 100, "{same} of {}", rows * cols);
    }

    /// Gauss and Jordan.
    fn inverted(mut h: Vec<f64>, size: usize) -> Vec<f64> {
        let mut inverse: Vec<f64> = (0..size * size).map(|i| f64::from(u8::from(i % (size + 1) == 0))).collect();
        for pivot in 0..size {
            let factor = 1.0 / h[pivot * size + pivot];
            for matrix in [&mut h, &mut inverse] {
                matrix[pivot * size..(pivot + 1) * size].iter_mut().for_each(|value| *value *= factor);
            }
            for row in (0..size).filter(|&row| row != pivot) {
                let factor = h[row * size + pivot];
                for matrix in [&mut h, &mut inverse] {
                    for col in 0..size {
                        matrix[row * size + col] -= factor * matrix[pivot * size + col];
                    }
                }
            }
        }
        inverse
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let (rows, cols) = (3, 64);
        let mut values = weights(rows, cols).decode();
        values[cols + 7] = f32::NAN;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let source = PackedMatrix::from_dense_bytes(Scheme::F32, rows, cols, bytes).unwrap();
        let scheme = Format::Fp4.scheme(None).unwrap();
        let error = gptq(&source, scheme, &Hessian::new(cols), USUAL_DAMPING).unwrap_err();
        let FormatError::NonFinite { row: 1, col: 7, .. } = error else { panic!("{error}") };
    }
}
