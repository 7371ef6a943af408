//! What a linear's inputs say about its weights: which errors matter, and which make up for each other.

use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::order::Order;

/// Rows and columns that are worked on at once: of these blocks many fit into a core's cache, and each is worth a task.
/// Results do not depend on the number of threads, because blocks do not.
const BLOCK: usize = 64;

/// Σ x·xᵀ over the inputs x of a linear, `[K, K]`. The squared error of its outputs is `tr(E·H·Eᵀ)` for errors E of its
/// weights: half of the second derivative by them, the Hessian of GPTQ (Frantar et al. 2022, arXiv:2210.17323).
#[derive(Debug, Clone)]
pub(crate) struct Hessian {
    /// Only the upper triangle of blocks counts.
    sum: Array2<f32>,
    rows: u64,
}

/// A Hessian as `U·diag(d)·Uᵀ` with U upper triangular and ones on its diagonal. Rounding the columns of weights one after
/// the other, each after the errors e of those before have been made up for by adding `e·U`, leaves the squared error
/// `Σ d·η²` of roundings η (LDLQ: Chee et al. 2023, arXiv:2307.13304, theorem 6: what GPTQ computes, without an inverse).
#[derive(Debug, Clone)]
pub(crate) struct Factor {
    /// The order that U and d are in.
    pub(crate) order: Order,
    /// U, `[K, K]`; what is below the diagonal does not count.
    pub(crate) feedback: Array2<f32>,
    /// d, `[K]`.
    pub(crate) importance: Vec<f32>,
}

impl Hessian {
    /// That of no inputs.
    pub(crate) fn new(cols: usize) -> Self {
        Self { sum: Array2::zeros((cols, cols)), rows: 0 }
    }

    /// Input features, K.
    pub(crate) fn cols(&self) -> usize {
        self.sum.nrows()
    }

    /// Inputs that were added.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Adds inputs, `[rows, K]`, on rayon's current threads.
    ///
    /// # Panics
    /// They are no whole rows.
    pub(crate) fn add(&mut self, inputs: &[f32]) {
        let cols = self.cols();
        let inputs = ArrayView2::from_shape((inputs.len() / cols, cols), inputs).expect("inputs are whole rows");
        self.rows += inputs.nrows() as u64;
        blocks_of_rows(&mut self.sum).into_par_iter().for_each(|(rows, mut sum)| {
            let from = rows.start;
            let transposed = inputs.slice(s![.., rows]).reversed_axes();
            general_mat_mul(1.0, &transposed, &inputs.slice(s![.., from..]), 1.0, &mut sum.slice_mut(s![.., from..]));
        });
    }

    /// Σ of the products of two columns' inputs.
    fn of_pair(&self, a: usize, b: usize) -> f32 {
        self.sum[[a.min(b), a.max(b)]]
    }

    /// How much each column counts by itself.
    pub(crate) fn diagonal(&self) -> Vec<f32> {
        self.sum.diag().to_vec()
    }

    /// The factor of this Hessian, whose columns are brought into an order, with `damping` times its mean diagonal added to the diagonal. Columns whose inputs were always 0 get that
    /// mean besides: their weights do not matter.
    ///
    /// Damping is the larger, the fewer inputs there were for each column: what a few inputs do not show is not taken for certain. Without any
    /// there is nothing to make up for. More is added, ten times as much each time, until there is a factor.
    pub(crate) fn factor(&self, order: Order, damping: f32) -> Factor {
        let cols = self.cols();
        let damping = damping * (1.0 + cols as f32 / self.rows.max(1) as f32);
        let diagonal = self.sum.diag();
        let mean = diagonal.iter().map(|&value| f64::from(value)).sum::<f64>() / cols as f64;
        let mean = if mean > 0.0 { mean as f32 } else { 1.0 };
        let mut damping = damping;
        loop {
            let mut h = Array2::zeros(self.sum.dim());
            h.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(a, mut row)| {
                row.iter_mut()
                    .enumerate()
                    .for_each(|(b, value)| *value = self.of_pair(order.column(a), order.column(b)) / mean);
            });
            h.diag_mut().iter_mut().for_each(|value| *value = if *value == 0.0 { 1.0 } else { *value } + damping);
            if factorize(&mut h) {
                return Factor::of(order, h, mean);
            }
            damping = (damping * 10.0).max(1e-3);
        }
    }
}

impl Factor {
    /// Of `M`, where the Hessian is `scale · M·Mᵀ`.
    fn of(order: Order, mut m: Array2<f32>, scale: f32) -> Self {
        let diagonal = m.diag().to_vec();
        m.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| {
            row.iter_mut().zip(&diagonal).for_each(|(value, diagonal)| *value /= diagonal);
        });
        Self { order, feedback: m, importance: diagonal.iter().map(|value| scale * value * value).collect() }
    }
}

impl Factor {
    /// Replaces a row vector r, whose columns are in the factor's order, by `r·H⁻¹`.
    pub(super) fn solve(&self, row: &mut [f32]) {
        let cols = row.len();
        let feedback = |col: usize| self.feedback.row(col).to_slice().expect("rows are contiguous");
        // y·U·D·Uᵀ = r: first y' = r·U⁻ᵀ, from the last column; U is 1 on its diagonal.
        for col in (0..cols).rev() {
            let u = feedback(col);
            let known: f32 = row[col + 1..].iter().zip(&u[col + 1..]).map(|(value, u)| value * u).sum();
            row[col] -= known;
        }
        row.iter_mut().zip(&self.importance).for_each(|(value, importance)| *value /= importance);
        // Then y''·U⁻¹, from the first.
        for col in 0..cols {
            let value = row[col];
            let u = feedback(col);
            row[col + 1..].iter_mut().zip(&u[col + 1..]).for_each(|(later, u)| *later -= value * u);
        }
    }
}

/// Replaces the upper triangle of a symmetric matrix H by that of M, upper triangular with `H = M·Mᵀ`: Cholesky's
/// factorisation from the last column to the first, block by block. False if H is not positive definite, as far as single
/// precision tells.
fn factorize(h: &mut Array2<f32>) -> bool {
    let cols = h.nrows();
    for from in (0..cols).step_by(BLOCK).rev() {
        let block = from..cols.min(from + BLOCK);
        let mut corner = h.slice(s![block.clone(), block.clone()]).to_owned();
        if !factorize_corner(&mut corner.view_mut()) {
            return false;
        }
        h.slice_mut(s![block.clone(), block.clone()]).assign(&corner);
        let (mut above, _) = h.view_mut().split_at(Axis(0), from);
        // P = H₁₂·M₂₂⁻ᵀ, row by row.
        above.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| {
            let mut row = row.slice_mut(s![block.clone()]);
            for col in (0..row.len()).rev() {
                let mut value = row[col];
                for later in col + 1..row.len() {
                    value -= row[later] * corner[[col, later]];
                }
                row[col] = value / corner[[col, col]];
            }
        });
        // H₁₁ − P·Pᵀ
        let p = above.slice(s![.., block]).to_owned();
        let mut rest = above.slice_mut(s![.., ..from]);
        blocks_of_view(&mut rest).into_par_iter().for_each(|(rows, mut rest)| {
            let right = p.slice(s![rows.start.., ..]);
            let mut rest = rest.slice_mut(s![.., rows.start..]);
            general_mat_mul(-1.0, &p.slice(s![rows, ..]), &right.reversed_axes(), 1.0, &mut rest);
        });
    }
    true
}

/// [`factorize`] of a small matrix, in double precision.
fn factorize_corner(h: &mut ArrayViewMut2<'_, f32>) -> bool {
    let size = h.nrows();
    let mut m = h.mapv(f64::from);
    for col in (0..size).rev() {
        let later = |row: usize, m: &Array2<f64>| (col + 1..size).map(|k| m[[row, k]] * m[[col, k]]).sum::<f64>();
        let diagonal = m[[col, col]] - later(col, &m);
        // Also false for NaN.
        let is_positive = diagonal > f64::from(h[[col, col]]) * 1e-7;
        if !is_positive {
            return false;
        }
        let diagonal = diagonal.sqrt();
        m[[col, col]] = diagonal;
        for row in 0..col {
            m[[row, col]] = (m[[row, col]] - later(row, &m)) / diagonal;
        }
    }
    h.zip_mut_with(&m, |h, &m| *h = m as f32);
    true
}

/// Blocks of whole rows, with the rows they are.
pub(super) fn blocks_of_rows(matrix: &mut Array2<f32>) -> Vec<(Range<usize>, ArrayViewMut2<'_, f32>)> {
    let rows = matrix.nrows();
    let blocks = matrix.axis_chunks_iter_mut(Axis(0), BLOCK).enumerate();
    blocks.map(|(index, block)| (index * BLOCK..rows.min((index + 1) * BLOCK), block)).collect()
}

fn blocks_of_view<'a>(matrix: &'a mut ArrayViewMut2<'_, f32>) -> Vec<(Range<usize>, ArrayViewMut2<'a, f32>)> {
    let rows = matrix.nrows();
    let blocks = matrix.axis_chunks_iter_mut(Axis(0), BLOCK).enumerate();
    blocks.map(|(index, block)| (index * BLOCK..rows.min((index + 1) * BLOCK), block)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gptq::tests::inputs;

    #[test]
    fn the_factor_gives_the_hessian_back() {
        for (rows, cols) in [(500, 7), (500, 64), (700, 200), (90, 200)] {
            let mut hessian = Hessian::new(cols);
            let x = inputs(rows, cols, 1);
            x.chunks(37 * cols).for_each(|chunk| hessian.add(chunk));
            assert_eq!(hessian.rows(), rows as u64);
            let Factor { feedback, importance, .. } = hessian.factor(Order::natural(cols), 0.01);
            let sum = |a: usize, b: usize| -> f64 { x.chunks(cols).map(|x| f64::from(x[a]) * f64::from(x[b])).sum() };
            let mean = (0..cols).map(|col| sum(col, col)).sum::<f64>() / cols as f64;
            for a in 0..cols {
                assert_eq!(feedback[[a, a]], 1.0);
                for b in a..cols {
                    let of_factor: f64 = (b..cols)
                        .map(|k| f64::from(feedback[[a, k]]) * f64::from(feedback[[b, k]]) * f64::from(importance[k]))
                        .sum();
                    let damping = 0.01 * (1.0 + cols as f64 / rows as f64);
                    let wanted = sum(a, b) + if a == b { damping * mean } else { 0.0 };
                    assert!((of_factor - wanted).abs() < 2e-5 * mean, "{a}, {b} of {cols}: {of_factor}, {wanted}");
                }
            }
        }
    }

    #[test]
    fn a_row_is_solved_for() {
        let (rows, cols) = (300, 70);
        let mut hessian = Hessian::new(cols);
        let x = inputs(rows, cols, 1);
        hessian.add(&x);
        // Whatever the order, r·H gives r back.
        let order = Order { columns: (0..cols as u32).map(|col| (col * 3 + 1) % cols as u32).collect() };
        let factor = hessian.factor(order.clone(), 0.0);
        let wanted: Vec<f32> = (0..cols).map(|col| (col as f32 * 0.7).sin()).collect();
        let times_h =
            |a: usize| -> f64 { (0..cols).map(|b| f64::from(wanted[b]) * f64::from(hessian.of_pair(a, b))).sum() };
        let mut row = order.gather(&(0..cols).map(|a| times_h(a) as f32).collect::<Vec<_>>());
        factor.solve(&mut row);
        for (found, wanted) in order.scatter(&row).iter().zip(&wanted) {
            assert!((found - wanted).abs() < 1e-2, "{found}, {wanted}");
        }
    }

    #[test]
    fn a_hessian_of_few_inputs_or_none_has_a_factor() {
        for x in [vec![], vec![0.0; 8], vec![1.0; 8], vec![1e-20, 0.0, 0.0, 0.0, 1e10, 0.0, 0.0, 0.0]] {
            let mut hessian = Hessian::new(4);
            hessian.add(&x);
            let Factor { feedback, importance, .. } = hessian.factor(Order::natural(4), 0.0);
            assert!(importance.iter().all(|&d| d > 0.0 && d.is_finite()), "{importance:?}");
            assert!((0..4).all(|a| (a..4).all(|b| feedback[[a, b]].is_finite())), "{feedback}");
        }
    }
}
