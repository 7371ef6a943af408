//! Weights that make up for what earlier layers rounded off.

use marlin_format::{FormatError, PackedMatrix, Scheme};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

use super::hessian::{Hessian, blocks_of_rows};
use super::order::Order;

/// Σ (x - x̂)·x̂ᵀ over the inputs x̂ of a linear in the quantised model and those that it has in the original, x: how far, and where, the
/// layers before have drifted.
#[derive(Debug, Clone)]
pub(crate) struct Drift {
    sum: Array2<f32>,
}

/// `I + Σ (x - x̂)·x̂ᵀ · H⁻¹`: weights times this give on x̂, as well as they can, what they give on x (the asymmetric calibration of GPTAQ: Li et al.
/// 2025, arXiv:2504.02692, in the form of a least-squares fit).
#[derive(Debug, Clone)]
pub(crate) struct Correction(Array2<f32>);

impl Drift {
    /// That of no inputs.
    pub(crate) fn new(cols: usize) -> Self {
        Self { sum: Array2::zeros((cols, cols)) }
    }

    /// Adds inputs of the same tokens, `[rows, K]`, on rayon's current threads.
    pub(crate) fn add(&mut self, originals: &[f32], inputs: &[f32]) {
        let cols = self.sum.nrows();
        let rows = inputs.len() / cols;
        let inputs = ArrayView2::from_shape((rows, cols), inputs).expect("inputs are whole rows");
        let originals = ArrayView2::from_shape((rows, cols), originals).expect("inputs are of the same tokens");
        let drift = &originals - &inputs;
        blocks_of_rows(&mut self.sum).into_par_iter().for_each(|(rows, mut sum)| {
            let transposed = drift.slice(s![.., rows]).reversed_axes();
            general_mat_mul(1.0, &transposed, &inputs, 1.0, &mut sum);
        });
    }

    /// What makes up for the drift, given the Hessian of the inputs x̂: the less of it, the fewer inputs there were for each of its columns to
    /// be learnt from.
    pub(crate) fn correction(&self, hessian: &Hessian, damping: f32) -> Correction {
        let cols = self.sum.nrows();
        let factor = hessian.factor(Order::natural(cols), damping);
        let share = hessian.rows() as f32 / (hessian.rows() as f32 + cols as f32);
        let mut correction = &self.sum * share;
        correction.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| {
            factor.solve(row.as_slice_mut().expect("rows are contiguous"));
        });
        correction.diag_mut().iter_mut().for_each(|value| *value += 1.0);
        Correction(correction)
    }
}

impl Correction {
    /// The weights of a matrix, `[N, K]`, times this, in f32.
    pub(crate) fn apply(&self, matrix: &PackedMatrix<'_>) -> Result<PackedMatrix<'static>, FormatError> {
        let (rows, cols) = (matrix.rows, matrix.cols);
        let weights = Array2::from_shape_vec((rows, cols), matrix.decode()).expect("a matrix");
        let mut corrected = Array2::<f32>::zeros((rows, cols));
        blocks_of_rows(&mut corrected).into_par_iter().for_each(|(rows, mut out)| {
            general_mat_mul(1.0, &weights.slice(s![rows, ..]), &self.0, 0.0, &mut out);
        });
        let bytes: Vec<u8> = corrected.iter().flat_map(|value| value.to_le_bytes()).collect();
        PackedMatrix::from_dense_bytes(Scheme::F32, rows, cols, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gptq::tests::inputs;

    /// If the inputs that the quantised model sees are a linear function of those of the original, its inverse is found.
    #[test]
    fn weights_undo_what_happened_to_their_inputs() {
        let (tokens, cols) = (20_000, 12);
        let originals = inputs(tokens, cols, 4);
        let mut seen = originals.clone();
        for row in seen.chunks_exact_mut(cols) {
            row[3] += 0.25 * row[7];
            row[5] *= 0.5;
        }
        let (mut hessian, mut drift) = (Hessian::new(cols), Drift::new(cols));
        for (originals, seen) in originals.chunks(100 * cols).zip(seen.chunks(100 * cols)) {
            hessian.add(seen);
            drift.add(originals, seen);
        }
        let weights: Vec<f32> = (0..cols).map(|col| col as f32 - 4.5).collect();
        let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        let matrix = PackedMatrix::from_dense_bytes(Scheme::F32, 1, cols, bytes).unwrap();
        let corrected = drift.correction(&hessian, 1e-6).apply(&matrix).unwrap().decode();
        for (row, original) in seen.chunks_exact(cols).zip(originals.chunks_exact(cols)).take(100) {
            let dot = |x: &[f32], w: &[f32]| -> f32 { x.iter().zip(w).map(|(x, w)| x * w).sum() };
            let (found, wanted) = (dot(row, &corrected), dot(original, &weights));
            assert!((found - wanted).abs() < 2e-2, "{found}, {wanted}");
        }
        // Nothing happened to none.
        let corrected = Drift::new(cols).correction(&hessian, 0.01).apply(&matrix).unwrap().decode();
        assert_eq!(corrected, weights);
    }
}
