//! In which order the columns of a matrix are rounded.

use marlin_format::{Scheme, Sparsity};

use super::feedback::has_static_scales;

/// An order of columns. Those that count most come first, as far as groups allow: errors of later columns have fewer left to make up for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Order {
    /// The column at each position.
    columns: Vec<u32>,
}

impl Order {
    /// Columns as they are.
    pub(crate) fn natural(cols: usize) -> Self {
        Self { columns: (0..cols as u32).collect() }
    }

    /// The order for a scheme, given how much each column counts. Groups whose scale is chosen when they are reached stay together, as do fours
    /// of which two are kept.
    pub(crate) fn of(scheme: Scheme, importance: &[f32]) -> Self {
        let cols = importance.len();
        let group = if has_static_scales(scheme, cols) { cols } else { scheme.group_cols(cols).min(cols) };
        let unit = if scheme.sparsity == Sparsity::TwoOfFour { 4 } else { 1 };
        let mut groups: Vec<Vec<u32>> =
            (0..cols as u32).collect::<Vec<_>>().chunks(group).map(<[u32]>::to_vec).collect();
        let sum = |columns: &[u32]| columns.iter().map(|&col| f64::from(importance[col as usize])).sum::<f64>();
        // A last group that is narrower stays last, so that blocks are whole groups.
        let whole = cols / group;
        groups[..whole].sort_by(|a, b| sum(b).total_cmp(&sum(a)));
        let columns = groups.iter().flat_map(|group| {
            let mut units: Vec<&[u32]> = group.chunks(unit).collect();
            units.sort_by(|a, b| sum(b).total_cmp(&sum(a)));
            units.concat()
        });
        Self { columns: columns.collect() }
    }

    /// The column at a position.
    pub(crate) fn column(&self, position: usize) -> usize {
        self.columns[position] as usize
    }

    /// Rows of values by column, brought into this order.
    pub(crate) fn gather<T: Copy>(&self, rows: &[T]) -> Vec<T> {
        rows.chunks_exact(self.columns.len())
            .flat_map(|row| self.columns.iter().map(|&col| row[col as usize]))
            .collect()
    }

    /// Rows of values in this order, brought back to their columns.
    pub(crate) fn scatter<T: Copy>(&self, rows: &[T]) -> Vec<T> {
        let mut by_column = rows.to_vec();
        for (row, values) in by_column.chunks_exact_mut(self.columns.len()).zip(rows.chunks_exact(self.columns.len())) {
            self.columns.iter().zip(values).for_each(|(&col, value)| row[col as usize] = *value);
        }
        by_column
    }
}
