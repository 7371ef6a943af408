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

/// Rounds a matrix `[N, K]` to a scheme whose columns have this factor, in their own order.
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

/// How the rows of a matrix are rounded.
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

/// The columns of a block, row by row.
struct Block<'a> {
    /// The first column.
    from: usize,
    /// Weights with what makes up for earlier errors.
    targets: &'a mut [f32],
    /// What weights are off by in the end.
    errors: &'a mut [f32],
    codes: &'a mut [u8],
    /// Under 2:4 sparsity.
    kept: &'a mut [bool],
}

impl<'a> Rounding<'a> {
    fn new(encoder: GroupEncoder, scheme: Scheme, rows: usize, cols: usize, factor: &'a Factor) -> Self {
        let (group_rows, group_cols) = (scheme.group_rows(rows), scheme.group_cols(cols).min(cols));
        let is_tile = matches!(scheme.grouping, Grouping::Block { .. } | Grouping::Tensor);
        let is_static = is_tile || group_cols > WIDEST_BLOCK;
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
        // Scales of groups are chosen block by block, and packed row by row.
        let mut of_rows: Vec<Vec<GroupScale>> = vec![Vec::with_capacity(groups); if self.is_static { 0 } else { rows }];
        let mut targets = weights.to_vec();
        let mut errors = vec![0.0; rows * self.block];
        let mut codes = vec![0; weights.len()];
        let mut kept = vec![!self.is_sparse; weights.len()];
        for from in (0..cols).step_by(self.block) {
            let to = cols.min(from + self.block);
            let width = to - from;
            for row in 0..rows {
                let columns = row * cols + from..row * cols + to;
                let block = Block {
                    from,
                    targets: &mut targets[columns.clone()],
                    errors: &mut errors[row * width..][..width],
                    codes: &mut codes[columns.clone()],
                    kept: &mut kept[columns.clone()],
                };
                let weights = &weights[columns];
                if self.is_static {
                    let of_row = &scales[row / self.group_rows * groups..][..groups];
                    self.round_block(block, weights, |_, _, group| Ok(of_row[group]))?;
                } else {
                    let of_row = &mut of_rows[row];
                    self.round_block(block, weights, |targets, kept, group| {
                        let scale = self.choose(first_row + row, group, targets, kept)?;
                        of_row.push(scale);
                        Ok(scale)
                    })?;
                }
            }
            if to < cols {
                let errors = ArrayView2::from_shape((rows, width), &errors[..rows * width]).expect("a block of errors");
                let mut targets = ArrayViewMut2::from_shape((rows, cols), &mut targets).expect("whole rows");
                let feedback = self.factor.feedback.slice(s![from..to, to..]);
                general_mat_mul(1.0, &errors, &feedback, 1.0, &mut targets.slice_mut(s![.., to..]));
            }
        }
        scales.extend(of_rows.into_iter().flatten());
        let kept = if self.is_sparse { kept } else { Vec::new() };
        Ok(self.encoder.pack(rows, &codes, &kept, &scales))
    }

    /// Rounds the columns of one row's block. `scale_of` gives the scale of a group that begins, by its targets, which of them are kept, and its
    /// index.
    fn round_block(
        &self,
        Block { from, targets, errors, codes, kept }: Block<'_>,
        weights: &[f32],
        mut scale_of: impl FnMut(&[f32], &[bool], usize) -> Result<GroupScale, FormatError>,
    ) -> Result<(), FormatError> {
        let width = targets.len();
        let mut scale = None;
        for index in 0..width {
            let col = from + index;
            if col.is_multiple_of(self.group_cols) || scale.is_none() {
                let group = index..width.min(index + self.group_cols - col % self.group_cols);
                if self.is_sparse {
                    // Which of them are kept is decided again at each four.
                    self.prune(from, group.clone(), targets, kept);
                }
                scale = Some(scale_of(&targets[group.clone()], &kept[group], col / self.group_cols)?);
            }
            if self.is_sparse && index.is_multiple_of(4) {
                self.prune(from, index..width.min(index + 4), targets, kept);
            }
            let scale = scale.expect("the first column begins a group");
            let (code, value) = if kept[index] { self.encoder.code(scale, targets[index]) } else { (0, 0.0) };
            codes[index] = code;
            let error = weights[index] - value;
            errors[index] = error;
            let feedback = self.factor.feedback.row(col);
            let feedback = &feedback.as_slice().expect("rows are contiguous")[col + 1..from + width];
            for (target, feedback) in targets[index + 1..].iter_mut().zip(feedback) {
                *target += error * feedback;
            }
        }
        Ok(())
    }

    /// Of every four columns keeps the two whose loss would cost most.
    fn prune(&self, from: usize, columns: Range<usize>, targets: &[f32], kept: &mut [bool]) {
        for first in columns.step_by(4) {
            let cost = |index: usize| targets[index] * targets[index] * self.factor.importance[from + index];
            let mut order: [usize; 4] = std::array::from_fn(|index| first + index);
            order.sort_by(|&a, &b| cost(b).total_cmp(&cost(a)));
            order.iter().enumerate().for_each(|(rank, &index)| kept[index] = rank < 2);
        }
    }

    /// The scale of a group of one row.
    fn choose(&self, row: usize, group: usize, targets: &[f32], kept: &[bool]) -> Result<GroupScale, FormatError> {
        let from = group * self.group_cols;
        let importance = &self.factor.importance[from..from + targets.len()];
        let place = [row, from, self.group_cols];
        if !self.is_sparse {
            return self.encoder.choose(targets, Some(importance), place);
        }
        let keep = |values: &[f32]| -> Vec<f32> {
            values.iter().zip(kept).filter(|(_, kept)| **kept).map(|(value, _)| *value).collect()
        };
        self.encoder.choose(&keep(targets), Some(&keep(importance)), place)
    }

    /// Scales of tiles and of groups wider than a block, by the weights as they are: `[rows of groups, groups of a row]`.
    fn static_scales(&self, first_row: usize, weights: &[f32]) -> Result<Vec<GroupScale>, FormatError> {
        let rows = weights.len() / self.cols;
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
                        self.prune(0, columns.clone(), weights, &mut kept);
                    }
                    for col in columns.clone().filter(|&col| kept[col]) {
                        group.push(weights[col]);
                        importance.push(self.factor.importance[col]);
                    }
                }
                let place = [first_row + first, from, self.group_cols];
                scales.push(self.encoder.choose(&group, Some(&importance), place)?);
            }
        }
        Ok(scales)
    }
}
