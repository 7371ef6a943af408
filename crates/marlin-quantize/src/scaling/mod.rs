//! Channels that matter are made larger before they are rounded, and so lose less: AWQ (Lin et al. 2023, arXiv:2306.00978).
//!
//! A linear stays what it is when a column of its weights is multiplied by what its input is divided by. Inputs are divided for nothing
//! where they are made: in the weights of the norm before, or in the rows of the up projection before a down projection.

mod search;

use std::collections::HashMap;
use std::sync::Arc;

use marlin_checkpoint::Checkpoint;
use marlin_format::{PackedMatrix, Scheme};
use rayon::prelude::*;

pub(crate) use self::search::find_scales;
use crate::QuantizeError;
use crate::encode_matrix::{decode_rows, largest_weight, slices};
use crate::quantize::encode_error;
use crate::source::bytes_of;

/// How the weights of a model become those of its scaled equal.
#[derive(Debug, Clone, Default)]
pub(crate) struct ChannelScales {
    /// What columns of matrices are multiplied by.
    columns: HashMap<String, Arc<[f32]>>,
    /// What rows of matrices are divided by.
    rows: HashMap<String, Arc<[f32]>>,
    /// Weights of norms.
    norms: HashMap<String, Vec<f32>>,
}

impl ChannelScales {
    /// Inputs whose channels are scaled.
    pub(crate) fn inputs(&self) -> usize {
        self.norms.len() + self.rows.len()
    }

    /// Whether a matrix becomes another one.
    pub(crate) fn changes_matrix(&self, name: &str) -> bool {
        self.columns.contains_key(name) || self.rows.contains_key(name)
    }

    /// The weights of a norm that become others.
    pub(crate) fn norm(&self, name: &str) -> Option<&[f32]> {
        self.norms.get(name).map(Vec::as_slice)
    }

    /// The matrix of this name, scaled if it is to be.
    pub(crate) fn apply<'a>(
        &self,
        name: &str,
        matrix: PackedMatrix<'a>,
        checkpoint: &Checkpoint,
    ) -> Result<PackedMatrix<'a>, QuantizeError> {
        let (columns, rows) = (self.columns.get(name), self.rows.get(name));
        if columns.is_none() && rows.is_none() {
            return Ok(matrix);
        }
        let fail = |error| encode_error(checkpoint, name, error);
        // A weight that is not finite is named as it is stored.
        largest_weight(&matrix, &slices(matrix.rows, matrix.cols, 1)).map_err(fail)?;
        scaled(&matrix, columns.map(|scales| &scales[..]), rows.map(|scales| &scales[..])).map_err(fail)
    }
}

/// A matrix whose columns are multiplied and whose rows are divided, in f32.
fn scaled(
    matrix: &PackedMatrix<'_>,
    columns: Option<&[f32]>,
    rows: Option<&[f32]>,
) -> Result<PackedMatrix<'static>, marlin_format::FormatError> {
    let mut weights = decode_rows(matrix, 0..matrix.rows);
    weights.par_chunks_exact_mut(matrix.cols).enumerate().for_each(|(row, weights)| {
        let by = rows.map_or(1.0, |rows| rows[row]);
        match columns {
            Some(columns) => weights.iter_mut().zip(columns).for_each(|(weight, scale)| *weight *= scale / by),
            None => weights.iter_mut().for_each(|weight| *weight /= by),
        }
    });
    PackedMatrix::from_dense_bytes(Scheme::F32, matrix.rows, matrix.cols, bytes_of(&weights))
}
