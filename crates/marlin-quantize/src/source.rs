//! The weights that are quantised: a checkpoint's, or those of its equal that is rotated, or whose channels are scaled.

use std::borrow::Cow;

use marlin_checkpoint::{Checkpoint, CheckpointError, Dtype, Rotations, Tensor};
use marlin_format::{EncodeOptions, PackedMatrix, Scheme, encode};
use marlin_kernels::Hadamard;
use marlin_model::{NormWeights, Rotation, RotationBlocks, RotationParts, RowRotation, TensorRotation, WeightRotation};
use rayon::prelude::*;

use crate::QuantizeError;
use crate::encode_matrix::{decode_rows, largest_weight, slices};
use crate::moe::{ExpertMatrix, MoeLayer, expert_matrix};
use crate::quantize::encode_error;
use crate::scaling::ChannelScales;

/// A checkpoint, and how its weights are rotated before they are quantised, if they are. Tensors are rotated one at a time, as they are read.
pub(crate) struct Source<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    rotation: Option<Rotation>,
    scales: Option<ChannelScales>,
}

impl<'a> Source<'a> {
    /// # Errors
    /// Weights are rotated already, or they are to be and cannot: the architecture is not known, or has no part that can be.
    pub(crate) fn new(checkpoint: &'a Checkpoint, parts: RotationParts) -> Result<Self, QuantizeError> {
        let model = || checkpoint.name().to_owned();
        if !checkpoint.rotations().is_none() {
            return Err(QuantizeError::AlreadyRotated { model: model() });
        }
        if parts == RotationParts::default() {
            return Ok(Self { checkpoint, rotation: None, scales: None });
        }
        let rotation = Rotation::new(checkpoint, parts)?;
        if rotation.blocks() == RotationBlocks::default() {
            return Err(QuantizeError::NothingToRotate { model: model() });
        }
        Ok(Self { checkpoint, rotation: Some(rotation), scales: None })
    }

    /// The same with channels scaled.
    pub(crate) fn scaled(self, scales: ChannelScales) -> Self {
        Self { scales: Some(scales), ..self }
    }

    /// Inputs of linears whose channels are scaled, if any were to be.
    pub(crate) fn scaled_inputs(&self) -> Option<usize> {
        self.scales.as_ref().map(ChannelScales::inputs)
    }

    /// What is rotated, if anything is.
    pub(crate) fn blocks(&self) -> Option<RotationBlocks> {
        self.rotation.as_ref().map(Rotation::blocks)
    }

    /// What a decoder of these weights has to rotate.
    pub(crate) fn rotations(&self) -> Rotations {
        self.rotation.as_ref().map(Rotation::of_decoder).unwrap_or_default()
    }

    /// A checkpoint of the same model without any weight.
    pub(crate) fn without_weights(&self) -> Result<Checkpoint, QuantizeError> {
        let (name, config) = (self.checkpoint.name(), self.checkpoint.config().clone());
        Ok(Checkpoint::from_parts(name, config, Vec::new())?.with_rotations(self.rotations()))
    }

    /// The type of a tensor that is not quantised, which is `stored` in the checkpoint.
    pub(crate) fn dtype(&self, name: &str, stored: Dtype) -> Dtype {
        match self.rotation_of(name) {
            Some(TensorRotation::Weights(_)) => Dtype::F32,
            _ if self.is_scaled(name) => Dtype::F32,
            Some(TensorRotation::Norm(_)) | None => stored,
        }
    }

    /// A matrix.
    pub(crate) fn matrix(&self, name: &str) -> Result<PackedMatrix<'a>, QuantizeError> {
        self.changed(name, self.checkpoint.matrix_any(name)?)
    }

    /// A matrix of an expert.
    pub(crate) fn expert(
        &self,
        layer: &MoeLayer,
        expert: usize,
        matrix: ExpertMatrix,
    ) -> Result<PackedMatrix<'a>, QuantizeError> {
        let name = layer.expert_name(expert, matrix);
        self.changed(&name, expert_matrix(self.checkpoint, layer, expert, matrix)?)
    }

    /// A vector of finite values.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, QuantizeError> {
        let mut values = self.checkpoint.vector(name, len)?;
        if let Some(norm) = self.scaled_norm(name) {
            return Ok(norm.to_vec());
        }
        match self.rotation_of(name) {
            Some(TensorRotation::Norm(weight)) => values.fill(weight),
            Some(TensorRotation::Weights(WeightRotation { rows: Some(rows), .. })) => {
                self.check_shape(name, &[len], None, Some(&rows))?;
                runs(&mut values, 1, &rows).for_each(|run| rows.rotation.apply(run));
            }
            Some(TensorRotation::Weights(_)) | None => {}
        }
        Ok(values)
    }

    /// A tensor that is not quantised, in the type that [`Source::dtype`] says.
    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor<'a>, QuantizeError> {
        let tensor = self.checkpoint.tensor(name)?;
        let len = tensor.shape.iter().product();
        let is_norm = self.scaled_norm(name).is_some();
        let bytes = match self.rotation_of(name) {
            None if self.is_scaled(name) => self.matrix(name)?.codes.into_owned(),
            None if !is_norm => {
                let is_float = matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
                if tensor.shape.len() == 1 && is_float {
                    // Refuses what is not finite.
                    self.vector(name, len)?;
                }
                return Ok(tensor);
            }
            Some(TensorRotation::Norm(_)) | None => {
                let values = self.vector(name, len)?;
                let scheme = self.checkpoint.info(name).and_then(|info| info.scheme()).unwrap_or(Scheme::F32);
                let stored = encode(&values, 1, len, &scheme, &EncodeOptions::default());
                stored.map_err(|error| encode_error(self.checkpoint, name, error))?.codes.into_owned()
            }
            Some(TensorRotation::Weights(_)) if tensor.shape.len() == 1 => bytes_of(&self.vector(name, len)?),
            Some(TensorRotation::Weights(_)) => self.matrix(name)?.codes.into_owned(),
        };
        Ok(Tensor { dtype: self.dtype(name, tensor.dtype), shape: tensor.shape, bytes: Cow::Owned(bytes) })
    }

    fn is_scaled(&self, name: &str) -> bool {
        self.scales.as_ref().is_some_and(|scales| scales.changes_matrix(name))
    }

    fn scaled_norm(&self, name: &str) -> Option<&[f32]> {
        self.scales.as_ref()?.norm(name)
    }

    /// The matrix of this name as it is to be quantised.
    fn changed(&self, name: &str, matrix: PackedMatrix<'a>) -> Result<PackedMatrix<'a>, QuantizeError> {
        let rotated = self.rotated(name, matrix)?;
        match &self.scales {
            Some(scales) => scales.apply(name, rotated, self.checkpoint),
            None => Ok(rotated),
        }
    }

    fn rotation_of(&self, name: &str) -> Option<TensorRotation> {
        self.rotation.as_ref()?.of(name)
    }

    /// The matrix of this name, rotated if it is to be.
    fn rotated(&self, name: &str, matrix: PackedMatrix<'a>) -> Result<PackedMatrix<'a>, QuantizeError> {
        let Some(TensorRotation::Weights(rotation)) = self.rotation_of(name) else { return Ok(matrix) };
        self.check_shape(name, &[matrix.rows, matrix.cols], rotation.columns.as_ref(), rotation.rows.as_ref())?;
        let slices = slices(matrix.rows, matrix.cols, 1);
        // A weight that is not finite is named before it spoils its block.
        largest_weight(&matrix, &slices).map_err(|error| encode_error(self.checkpoint, name, error))?;
        let norm = rotation.norm.as_ref().map(|norm| self.norm(norm, matrix.cols)).transpose()?;
        let mut weights = decode_rows(&matrix, 0..matrix.rows);
        weights.par_chunks_exact_mut(matrix.cols).for_each(|row| {
            if let Some(norm) = &norm {
                row.iter_mut().zip(norm).for_each(|(weight, factor)| *weight *= factor);
            }
            if let Some(columns) = &rotation.columns {
                columns.apply(row);
            }
        });
        if let Some(rows) = &rotation.rows {
            runs(&mut weights, matrix.cols, rows).for_each(|run| rotate_rows(run, matrix.cols, &rows.rotation));
        }
        let rotated = PackedMatrix::from_dense_bytes(Scheme::F32, matrix.rows, matrix.cols, bytes_of(&weights));
        rotated.map_err(|error| encode_error(self.checkpoint, name, error))
    }

    /// Refuses what is of another shape than config.json lets one expect.
    fn check_shape(
        &self,
        tensor: &str,
        found: &[usize],
        columns: Option<&Hadamard>,
        rows: Option<&RowRotation>,
    ) -> Result<(), QuantizeError> {
        let (columns, rows) = (columns.map_or(1, Hadamard::block), rows.map_or(1, |rows| rows.kept + rows.rotated));
        let multiples = [rows, columns];
        if found.iter().zip(multiples).all(|(&size, multiple)| size > 0 && size.is_multiple_of(multiple)) {
            return Ok(());
        }
        let (file, tensor, found) = (self.checkpoint.name().to_owned(), tensor.to_owned(), found.to_vec());
        let wanted = format!("multiples of {:?}, as config.json says", &multiples[..found.len()]);
        Err(CheckpointError::Shape { file, tensor, found, wanted }.into())
    }

    fn norm(&self, norm: &NormWeights, len: usize) -> Result<Vec<f32>, QuantizeError> {
        let mut weights = self.checkpoint.vector(&norm.tensor, len)?;
        weights.iter_mut().for_each(|weight| *weight += norm.offset);
        Ok(weights)
    }
}

/// The rows that are rotated, run by run.
fn runs<'w>(weights: &'w mut [f32], cols: usize, rows: &RowRotation) -> impl Iterator<Item = &'w mut [f32]> {
    let kept = rows.kept * cols;
    weights.chunks_exact_mut((rows.kept + rows.rotated) * cols).map(move |run| &mut run[kept..])
}

/// Rotates each of the columns.
fn rotate_rows(weights: &mut [f32], cols: usize, rotation: &Hadamard) {
    let rows = weights.len() / cols;
    let mut columns = vec![0.0; weights.len()];
    columns.par_chunks_exact_mut(rows).enumerate().for_each(|(col, column)| {
        column.iter_mut().zip(weights[col..].iter().step_by(cols)).for_each(|(value, weight)| *value = *weight);
        rotation.apply(column);
    });
    weights.par_chunks_exact_mut(cols).enumerate().for_each(|(row, weights)| {
        weights.iter_mut().zip(columns[row..].iter().step_by(rows)).for_each(|(weight, value)| *weight = *value);
    });
}

pub(crate) fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
