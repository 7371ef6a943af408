//! One matrix: slices of rows, in parallel.

use std::ops::Range;

use marlin_format::{EncodeOptions, Encoder, FormatError, PackedMatrix, Scheme, abs_max};
use rayon::prelude::*;

use crate::ErrorStats;

/// Weights of a slice, about: large enough to be worth a task, small enough for f32 copies not to count.
const SLICE_WEIGHTS: usize = 1 << 16;

/// Encodes a matrix and compares the result with it, in slices of rows on rayon's current thread pool.
///
/// # Errors
/// A weight is not finite or too large for the scheme, or the scheme is decoded only or has no such shape.
pub fn encode_matrix(
    source: &PackedMatrix<'_>,
    scheme: Scheme,
    options: &EncodeOptions,
) -> Result<(PackedMatrix<'static>, ErrorStats), FormatError> {
    let (rows, cols) = (source.rows, source.cols);
    let mut encoder = Encoder::new(&scheme, rows, cols, options)?;
    let slices = slices(rows, cols, encoder.slice_rows());
    if encoder.needs_abs_max() {
        encoder = encoder.with_abs_max(largest_weight(source, &slices)?);
    }
    encode_slices(source, &slices, |first_row, weights| encoder.encode_rows(first_row, weights))
}

/// The largest magnitude of a matrix.
///
/// # Errors
/// A weight is not finite.
pub(crate) fn largest_weight(source: &PackedMatrix<'_>, slices: &[Range<usize>]) -> Result<f32, FormatError> {
    let maxima = in_parallel(slices, |rows| abs_max(&decode_rows(source, rows.clone()), rows.start, source.cols));
    maxima.into_iter().try_fold(0.0, |max: f32, slice| slice.map(|slice| max.max(slice)))
}

/// Encodes a matrix slice by slice, given the first row of each and its weights, and compares the result with it.
pub(crate) fn encode_slices(
    source: &PackedMatrix<'_>,
    slices: &[Range<usize>],
    encode: impl Fn(usize, &[f32]) -> Result<PackedMatrix<'static>, FormatError> + Sync + Send,
) -> Result<(PackedMatrix<'static>, ErrorStats), FormatError> {
    let encoded = in_parallel(slices, |rows| {
        let weights = decode_rows(source, rows.clone());
        let part = encode(rows.start, &weights)?;
        let errors = row_errors(&weights, &part.decode(), source.cols);
        Ok::<_, FormatError>((part, errors))
    });
    let (mut parts, mut errors) = (Vec::with_capacity(slices.len()), Vec::with_capacity(source.rows));
    for slice in encoded {
        let (part, slice_errors) = slice?;
        parts.push(part);
        errors.extend(slice_errors);
    }
    Ok((PackedMatrix::concat_rows(&parts)?, total(errors)))
}

/// Compares a matrix with what it became: the error that [`encode_matrix`] would report.
pub(crate) fn matrix_error(source: &PackedMatrix<'_>, encoded: &PackedMatrix<'_>) -> ErrorStats {
    let errors = in_parallel(&slices(source.rows, source.cols, 1), |rows| {
        row_errors(&decode_rows(source, rows.clone()), &decode_rows(encoded, rows.clone()), source.cols)
    });
    total(errors.into_iter().flatten())
}

/// Σ over weights of the square of what they are off by, times what their column counts.
pub(crate) fn weighted_error(matrix: &PackedMatrix<'_>, rounded: &PackedMatrix<'_>, importance: &[f32]) -> f64 {
    let of_row = |row: usize| {
        let (mut weights, mut values) = (vec![0.0; matrix.cols], vec![0.0; matrix.cols]);
        matrix.decode_row(row, &mut weights);
        rounded.decode_row(row, &mut values);
        let errors = weights.iter().zip(&values).zip(importance);
        errors.map(|((weight, value), importance)| f64::from(importance * (weight - value) * (weight - value))).sum()
    };
    // In the order of the rows, so that the sum does not depend on the number of threads.
    (0..matrix.rows).into_par_iter().map(of_row).collect::<Vec<f64>>().iter().sum()
}

/// Errors row by row, so that their sum does not depend on how rows are sliced.
fn row_errors(source: &[f32], decoded: &[f32], cols: usize) -> Vec<ErrorStats> {
    source.chunks_exact(cols).zip(decoded.chunks_exact(cols)).map(|(w, d)| ErrorStats::of(w, d)).collect()
}

fn total(rows: impl IntoIterator<Item = ErrorStats>) -> ErrorStats {
    rows.into_iter().fold(ErrorStats::default(), ErrorStats::merge)
}

/// Cuts rows into slices that are multiples of `tile` rows, the last one excepted.
pub(crate) fn slices(rows: usize, cols: usize, tile: usize) -> Vec<Range<usize>> {
    let tiles = (SLICE_WEIGHTS / cols.max(1) / tile.max(1)).max(1);
    let step = tiles.saturating_mul(tile).max(1);
    (0..rows).step_by(step).map(|start| start..rows.min(start.saturating_add(step))).collect()
}

/// Results in the order of the slices, so that sums and errors do not depend on the number of threads.
fn in_parallel<T: Send>(slices: &[Range<usize>], work: impl Fn(&Range<usize>) -> T + Sync + Send) -> Vec<T> {
    slices.par_iter().map(work).collect()
}

pub(crate) fn decode_rows(matrix: &PackedMatrix<'_>, rows: Range<usize>) -> Vec<f32> {
    let mut weights = vec![0.0; rows.len() * matrix.cols];
    for (row, weights) in rows.zip(weights.chunks_exact_mut(matrix.cols)) {
        matrix.decode_row(row, weights);
    }
    weights
}

#[cfg(test)]
mod tests {
    use marlin_format::{Format, Grouping};

    use super::*;

    /// Reproducible weights without structure, larger in some rows.
    fn weights(rows: usize, cols: usize) -> Vec<f32> {
        let mut state = 1u32;
        (0..rows * cols)
            .map(|i| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / 16_777_216.0 - 0.5 + (i / cols % 7) as f32 * 0.1
            })
            .collect()
    }

    fn dense(weights: &[f32], rows: usize, cols: usize) -> PackedMatrix<'static> {
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        PackedMatrix::from_dense_bytes(Scheme::F32, rows, cols, bytes).unwrap()
    }

    #[test]
    fn slices_do_not_change_the_result() {
        // Several slices, of which the last is short and ends within a tile of 128 rows.
        let (rows, cols) = (700, 200);
        let weights = weights(rows, cols);
        let source = dense(&weights, rows, cols);
        let options = EncodeOptions::default();
        for format in Format::ALL {
            let tiles = (format == Format::Fp8).then_some(Grouping::Block { rows: 128, cols: 128 });
            let scheme = format.scheme(tiles).unwrap();
            let (sliced, error) = encode_matrix(&source, scheme, &options).unwrap();
            let whole = marlin_format::encode(&weights, rows, cols, &scheme, &options).unwrap();
            assert_eq!(sliced, whole, "{format}");
            assert_eq!(error, matrix_error(&source, &whole), "{format}");
            let plain = ErrorStats::of(&weights, &whole.decode());
            assert!((error.noise - plain.noise).abs() <= 1e-9 * plain.noise, "{format}: {error:?} {plain:?}");
            assert_eq!(error.max_abs, plain.max_abs);
        }
    }

    #[test]
    fn a_scale_for_the_whole_matrix() {
        let source = dense(&weights(700, 200), 700, 200);
        let scheme = Format::Fp8.scheme(Some(Grouping::Tensor)).unwrap();
        let (encoded, _) = encode_matrix(&source, scheme, &EncodeOptions::default()).unwrap();
        assert_eq!(encoded.scales.len(), 4);
    }

    #[test]
    fn the_first_weight_that_is_not_finite_is_named() {
        let mut weights = weights(700, 200);
        weights[650 * 200 + 3] = f32::NAN;
        weights[600 * 200 + 7] = f32::INFINITY;
        let source = dense(&weights, 700, 200);
        for format in [Format::Fp4, Format::Nvfp4, Format::Bf16] {
            let error = encode_matrix(&source, format.scheme(None).unwrap(), &EncodeOptions::default()).unwrap_err();
            let FormatError::NonFinite { row: 600, col: 7, .. } = error else { panic!("{format}: {error}") };
        }
    }
}
