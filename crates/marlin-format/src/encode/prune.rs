//! 2:4 sparsity: which two of four weights are kept.

use crate::bits;
use crate::size::sparse_row_bytes;

/// What pruning leaves of whole rows.
pub(super) struct Pruned {
    /// The weights kept, half as many as there were, in the order of their columns.
    pub(super) kept: Vec<f32>,
    /// [`crate::PackedMatrix::sparse_index`].
    pub(super) sparse_index: Vec<u8>,
}

/// Keeps the two of four weights that are largest in magnitude; of equal ones, those of the lower columns.
pub(super) fn two_of_four(values: &[f32], cols: usize) -> Pruned {
    let mut kept = Vec::with_capacity(values.len() / 2);
    let mut sparse_index = vec![0; values.len() / cols * sparse_row_bytes(cols)];
    let mut pairs = vec![0; cols / 4];
    for (row, index) in values.chunks_exact(cols).zip(sparse_index.chunks_exact_mut(sparse_row_bytes(cols))) {
        for (quad, pair) in row.as_chunks().0.iter().zip(&mut pairs) {
            let [low, high] = largest_two(quad);
            kept.extend([quad[low], quad[high]]);
            *pair = (low | high << 2) as u8;
        }
        bits::pack(&pairs, 4, index);
    }
    Pruned { kept, sparse_index }
}

/// Positions in ascending order.
fn largest_two(quad: &[f32; 4]) -> [usize; 2] {
    let larger = |a: usize, b: usize| if quad[b].abs() > quad[a].abs() { b } else { a };
    let first = (1..4).fold(0, larger);
    let others = (0..4).filter(|&position| position != first);
    let second = others.reduce(larger).unwrap_or(first);
    [first.min(second), first.max(second)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_and_then_the_lower_are_kept() {
        for (quad, kept) in [
            ([1.0, -3.0, 2.0, 0.5], [1, 2]),
            ([0.0; 4], [0, 1]),
            ([1.0, -1.0, 1.0, 1.0], [0, 1]),
            ([0.0, 0.0, 0.0, -2.0], [0, 3]),
            ([1.0, 2.0, -2.0, 1.0], [1, 2]),
            ([5.0, 1.0, 1.0, -1.0], [0, 1]),
            ([-0.0, 0.0, 1e-45, 0.0], [0, 2]),
        ] {
            assert_eq!(largest_two(&quad), kept, "{quad:?}");
        }
    }
}
