//! In which order the columns of a matrix are rounded.

use marlin_format::{Scheme, Sparsity};

use super::feedback::has_static_scales;

/// An order of columns. Those that count most come first, as far as groups allow: errors of later columns have fewer left to make up for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Order {
    /// The column at each position.
    pub(super) columns: Vec<u32>,
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

#[cfg(test)]
mod tests {
    use marlin_format::{Format, Grouping};

    use super::*;

    fn order(format: Format, grouping: Grouping, sparse: bool, importance: &[f32]) -> Vec<u32> {
        let scheme = if sparse { format.sparse_24(Some(grouping)) } else { format.scheme(Some(grouping)) };
        Order::of(scheme.unwrap(), importance).columns
    }

    #[test]
    fn groups_and_fours_stay_together() {
        let mut importance = [1.0; 40];
        (importance[3], importance[18], importance[21], importance[38]) = (2.0, 9.0, 5.0, 90.0);
        let columns = order(Format::Int4, Grouping::Columns(16), false, &importance);
        // The second group first, the narrow one last; in each the largest first.
        assert_eq!((columns[0], columns[1], columns[16], columns[32]), (18, 21, 3, 38));
        assert!(columns[..16].iter().all(|col| (16..32).contains(col)));
        let columns = order(Format::Int4, Grouping::Columns(16), true, &importance);
        assert_eq!(columns[..8], [16, 17, 18, 19, 20, 21, 22, 23]);
        // Scales of tiles are chosen before: nothing need stay together.
        let columns = order(Format::Fp8, Grouping::Block { rows: 8, cols: 8 }, false, &importance);
        assert_eq!(columns[..5], [38, 18, 21, 3, 0]);
    }

    #[test]
    fn what_is_gathered_is_scattered_back() {
        let order = Order { columns: vec![2, 0, 1] };
        let gathered = order.gather(&[10, 11, 12, 20, 21, 22]);
        assert_eq!(gathered, [12, 10, 11, 22, 20, 21]);
        assert_eq!(order.scatter(&gathered), [10, 11, 12, 20, 21, 22]);
    }
}
