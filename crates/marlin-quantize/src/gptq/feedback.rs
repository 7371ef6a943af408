//! Rounding weights one column after the other, with feedback of errors.

use std::ops::Range;

use marlin_format::{
    EncodeOptions, Encoder, FormatError, GroupEncoder, GroupScale, Grouping, PackedMatrix, Scheme, Sparsity,
};
use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, s};

use super::hessian::Factor;
use crate::ErrorStats;
use crate::encode_matrix::{encode_slices, largest_weight, slices};

/// Columns whose errors are handed on at once to those behind, unless groups are wider.
const BLOCK: usize = 128;
/// Scales of wider groups are chosen before any column is rounded.
const WIDEST_BLOCK: usize = 1024;
/// Scales that are tried beside the one that fits a group's targets best, as factors on it.
const NEAR: [f32; 6] = [0.97, 1.03, 0.93, 1.07, 0.88, 1.12];

/// Rounds a matrix `[N, K]` to a scheme whose columns have this Hessian.
///
/// # Errors
/// As for [`crate::encode_matrix::encode_matrix`].
pub(crate) fn round_matrix(
    source: &PackedMatrix<'_>,
    scheme: Scheme,
    options: &EncodeOptions,
    factor: &Factor,
) -> Result<(PackedMatrix<'static>, ErrorStats), FormatError> {
    let (rows, cols) = (source.rows, source.cols);
    let encoder = Encoder::new(&scheme, rows, cols, options)?;
    let slices = slices(rows, cols, encoder.slice_rows());
    let groups = encoder.by_groups(largest_weight(source, &slices)?)?;
    let rounding = Rounding::new(groups, scheme, rows, cols, factor);
    encode_slices(source, &slices, |first_row, weights| rounding.round(first_row, weights))
}

/// How the rows of a matrix are rounded. Columns are in the factor's order, unless they are said to be the matrix's.
struct Rounding<'a> {
    encoder: GroupEncoder,
    factor: &'a Factor,
    cols: usize,
    /// Rows that share a scale.
    group_rows: usize,
    /// Columns that share a scale.
    group_cols: usize,
    /// Columns that are rounded before their errors are handed on.
    block: usize,
    /// Scales are chosen before any column is rounded: groups have several rows, or more columns than a block.
    is_static: bool,
    is_sparse: bool,
}

/// Columns of a row that are rounded with one scale: weights, their targets, and what becomes of them.
#[derive(Debug, Clone, Default)]
struct Run {
    /// Weights with what makes up for earlier errors.
    targets: Vec<f32>,
    /// What weights are off by in the end.
    errors: Vec<f32>,
    codes: Vec<u8>,
    /// Under 2:4 sparsity.
    kept: Vec<bool>,
}

/// Room for a row's rounding.
#[derive(Debug, Default)]
struct Work {
    run: Run,
    best: Run,
}

/// The columns of a block of one row.
struct Block<'a> {
    /// The first column.
    from: usize,
    weights: &'a [f32],
    targets: &'a mut [f32],
    errors: &'a mut [f32],
    codes: &'a mut [u8],
    kept: &'a mut [bool],
}

impl<'a> Rounding<'a> {
    fn new(encoder: GroupEncoder, scheme: Scheme, rows: usize, cols: usize, factor: &'a Factor) -> Self {
        let (group_rows, group_cols) = (scheme.group_rows(rows), scheme.group_cols(cols).min(cols));
        let is_static = has_static_scales(scheme, cols);
        let block = if is_static { BLOCK } else { group_cols * (BLOCK / group_cols).max(1) };
        let is_sparse = scheme.sparsity == Sparsity::TwoOfFour;
        Self { encoder, factor, cols, group_rows, group_cols, block, is_static, is_sparse }
    }

    /// Rounds whole rows, the first of which is row `first_row` of the matrix.
    fn round(&self, first_row: usize, weights: &[f32]) -> Result<PackedMatrix<'static>, FormatError> {
        let cols = self.cols;
        let rows = weights.len() / cols;
        let groups = cols.div_ceil(self.group_cols);
        let mut scales = if self.is_static { self.static_scales(first_row, weights)? } else { Vec::new() };
        let mut chosen = vec![None; if self.is_static { 0 } else { rows * groups }];
        let weights = self.factor.order.gather(weights);
        let mut targets = weights.clone();
        let mut errors = vec![0.0; rows * self.block];
        let mut codes = vec![0; weights.len()];
        let mut kept = vec![!self.is_sparse; weights.len()];
        let mut work = Work::default();
        for from in (0..cols).step_by(self.block) {
            let to = cols.min(from + self.block);
            let width = to - from;
            for row in 0..rows {
                let columns = row * cols + from..row * cols + to;
                let block = Block {
                    from,
                    weights: &weights[columns.clone()],
                    targets: &mut targets[columns.clone()],
                    errors: &mut errors[row * width..][..width],
                    codes: &mut codes[columns.clone()],
                    kept: &mut kept[columns],
                };
                if self.is_static {
                    self.round_static(block, &scales[row / self.group_rows * groups..][..groups], &mut work);
                } else {
                    self.round_searching(block, first_row + row, &mut chosen[row * groups..][..groups], &mut work)?;
                }
            }
            if to < cols {
                let errors = ArrayView2::from_shape((rows, width), &errors[..rows * width]).expect("a block of errors");
                let mut targets = ArrayViewMut2::from_shape((rows, cols), &mut targets).expect("whole rows");
                let feedback = self.factor.feedback.slice(s![from..to, to..]);
                general_mat_mul(1.0, &errors, &feedback, 1.0, &mut targets.slice_mut(s![.., to..]));
            }
        }
        scales.extend(chosen.into_iter().map(|scale| scale.expect("every group has columns")));
        let codes = self.factor.order.scatter(&codes);
        let kept = if self.is_sparse { self.factor.order.scatter(&kept) } else { Vec::new() };
        Ok(self.encoder.pack(rows, &codes, &kept, &scales))
    }

    /// Rounds a block whose scales are given, by group of the row.
    fn round_static(&self, mut block: Block<'_>, scales: &[GroupScale], work: &mut Work) {
        let from = block.from;
        let group = |index: usize| self.factor.order.column(from + index) / self.group_cols;
        let width = block.weights.len();
        let mut first = 0;
        while first < width {
            let end = (first + 1..width).find(|&index| group(index) != group(first)).unwrap_or(width);
            self.round_run(&block, first..end, scales[group(first)], f64::INFINITY, &mut work.run);
            std::mem::swap(&mut work.run, &mut work.best);
            self.keep(&mut block, first..end, &work.best);
            first = end;
        }
    }

    /// Rounds a block of whole groups, choosing the scale of each when it is reached: of scales near the one that fits its targets best,
    /// the one with which errors cost least when they are made up for.
    fn round_searching(
        &self,
        mut block: Block<'_>,
        row: usize,
        chosen: &mut [Option<GroupScale>],
        work: &mut Work,
    ) -> Result<(), FormatError> {
        let width = block.weights.len();
        for first in (0..width).step_by(self.group_cols) {
            let columns = first..width.min(first + self.group_cols);
            let targets = &block.targets[columns.clone()];
            let importance = &self.factor.importance[block.from + first..][..targets.len()];
            let group = self.factor.order.column(block.from + first) / self.group_cols;
            let place = [row, group * self.group_cols, self.group_cols];
            let mut scale = if self.is_sparse {
                let mut kept = vec![true; targets.len()];
                prune(targets, importance, &mut kept);
                self.encoder.choose(&keep(targets, &kept), Some(&keep(importance, &kept)), place)?
            } else {
                self.encoder.choose(targets, Some(importance), place)?
            };
            let mut least = self.round_run(&block, columns.clone(), scale, f64::INFINITY, &mut work.best);
            let fitting = scale;
            for factor in NEAR {
                let Some(near) = self.encoder.scaled(fitting, factor) else { continue };
                let cost = self.round_run(&block, columns.clone(), near, least, &mut work.run);
                if cost < least {
                    (least, scale) = (cost, near);
                    std::mem::swap(&mut work.run, &mut work.best);
                }
            }
            chosen[group] = Some(scale);
            self.keep(&mut block, columns, &work.best);
        }
        Ok(())
    }

    /// Rounds columns of a block one after the other with this scale, and gives what their errors cost; not all of them if they cost
    /// `limit` or more.
    fn round_run(&self, block: &Block<'_>, columns: Range<usize>, scale: GroupScale, limit: f64, run: &mut Run) -> f64 {
        let (first, width) = (block.from + columns.start, columns.len());
        let (weights, targets) = (&block.weights[columns.clone()], &block.targets[columns]);
        let importance = &self.factor.importance[first..first + width];
        targets.clone_into(&mut run.targets);
        run.errors.resize(width, 0.0);
        run.codes.resize(width, 0);
        run.kept.clear();
        run.kept.resize(width, true);
        let mut total = 0.0;
        for index in 0..width {
            if self.is_sparse && index.is_multiple_of(4) {
                let four = index..width.min(index + 4);
                prune(&run.targets[four.clone()], &importance[four.clone()], &mut run.kept[four]);
            }
            let target = run.targets[index];
            let (code, value) = if run.kept[index] { self.encoder.code(scale, target) } else { (0, 0.0) };
            run.codes[index] = code;
            let off = target - value;
            total += f64::from(importance[index]) * f64::from(off * off);
            if total >= limit {
                return total;
            }
            let error = weights[index] - value;
            run.errors[index] = error;
            let feedback = self.factor.feedback.row(first + index);
            let feedback = &feedback.as_slice().expect("rows are contiguous")[first + index + 1..first + width];
            for (target, feedback) in run.targets[index + 1..].iter_mut().zip(feedback) {
                *target += error * feedback;
            }
        }
        total
    }

    /// Puts rounded columns into their block, and hands their errors on to those behind.
    fn keep(&self, block: &mut Block<'_>, columns: Range<usize>, run: &Run) {
        let width = block.weights.len();
        block.codes[columns.clone()].copy_from_slice(&run.codes);
        block.errors[columns.clone()].copy_from_slice(&run.errors);
        block.kept[columns.clone()].copy_from_slice(&run.kept);
        if columns.end == width {
            return;
        }
        for (col, error) in columns.clone().zip(&run.errors) {
            let feedback = self.factor.feedback.row(block.from + col);
            let feedback =
                &feedback.as_slice().expect("rows are contiguous")[block.from + columns.end..block.from + width];
            for (target, feedback) in block.targets[columns.end..].iter_mut().zip(feedback) {
                *target += error * feedback;
            }
        }
    }

    /// Scales of tiles and of groups wider than a block, by the weights as they are, whose columns are the matrix's: `[rows of groups,
    /// groups of a row]`.
    fn static_scales(&self, first_row: usize, weights: &[f32]) -> Result<Vec<GroupScale>, FormatError> {
        let rows = weights.len() / self.cols;
        let of_columns = self.factor.order.scatter(&self.factor.importance);
        let mut scales = Vec::new();
        let (mut group, mut importance, mut kept) = (Vec::new(), Vec::new(), vec![true; self.cols]);
        for first in (0..rows).step_by(self.group_rows) {
            for from in (0..self.cols).step_by(self.group_cols) {
                let columns = from..self.cols.min(from + self.group_cols);
                group.clear();
                importance.clear();
                for row in first..rows.min(first + self.group_rows) {
                    let weights = &weights[row * self.cols..][..self.cols];
                    if self.is_sparse {
                        let columns = columns.clone();
                        prune(&weights[columns.clone()], &of_columns[columns.clone()], &mut kept[columns]);
                    }
                    for col in columns.clone().filter(|&col| kept[col]) {
                        group.push(weights[col]);
                        importance.push(of_columns[col]);
                    }
                }
                let place = [first_row + first, from, self.group_cols];
                scales.push(self.encoder.choose(&group, Some(&importance), place)?);
            }
        }
        Ok(scales)
    }
}

/// Scales are chosen before any column is rounded: groups have several rows, or are wider than a block can be.
pub(super) fn has_static_scales(scheme: Scheme, cols: usize) -> bool {
    let is_tile = matches!(scheme.grouping, Grouping::Block { .. } | Grouping::Tensor);
    is_tile || scheme.group_cols(cols).min(cols) > WIDEST_BLOCK
}

/// Of every four weights keeps the two whose loss would cost most.
fn prune(weights: &[f32], importance: &[f32], kept: &mut [bool]) {
    for ((weights, importance), kept) in weights.chunks(4).zip(importance.chunks(4)).zip(kept.chunks_mut(4)) {
        let cost = |index: usize| weights[index] * weights[index] * importance[index];
        let mut order: [usize; 4] = [0, 1, 2, 3];
        let order = &mut order[..weights.len()];
        order.sort_by(|&a, &b| cost(b).total_cmp(&cost(a)));
        order.iter().enumerate().for_each(|(rank, &index)| kept[index] = rank < 2);
    }
}

/// The values that are kept.
fn keep(values: &[f32], kept: &[bool]) -> Vec<f32> {
    values.iter().zip(kept).filter(|(_, kept)| **kept).map(|(value, _)| *value).collect()
}
