//! What a quantised model is written to.

use std::path::Path;

use marlin_checkpoint::{
    Checkpoint, CheckpointError, CheckpointWriter, Dtype, ExportLayout, GgufWriter, PlannedTensor, WriterOptions,
};
use marlin_format::PackedMatrix;

/// A folder, or a GGUF file.
pub(crate) enum Output {
    Folder(Box<CheckpointWriter>),
    Gguf(Box<GgufWriter>),
}

impl Output {
    pub(crate) fn create(
        out: &Path,
        planned: Vec<PlannedTensor>,
        source: &Checkpoint,
        options: &WriterOptions,
    ) -> Result<Self, CheckpointError> {
        if options.layout == ExportLayout::Gguf {
            return Ok(Self::Gguf(Box::new(GgufWriter::create(out, &planned, source, options.force)?)));
        }
        let side_files = source.side_files()?;
        let writer = CheckpointWriter::create(out, planned, source.config().clone(), side_files, options)?;
        Ok(Self::Folder(Box::new(writer)))
    }

    /// Tensors that an earlier, interrupted run had finished.
    pub(crate) fn resumed(&self) -> usize {
        match self {
            Self::Folder(writer) => writer.resumed(),
            Self::Gguf(_) => 0,
        }
    }

    /// Whether an earlier run wrote a tensor.
    pub(crate) fn is_done(&self, name: &str) -> bool {
        match self {
            Self::Folder(writer) => writer.is_done(name),
            Self::Gguf(_) => false,
        }
    }

    pub(crate) fn write_matrix(&mut self, name: &str, matrix: &PackedMatrix<'_>) -> Result<(), CheckpointError> {
        match self {
            Self::Folder(writer) => writer.write_matrix(name, matrix),
            Self::Gguf(writer) => writer.write_matrix(name, matrix),
        }
    }

    pub(crate) fn write_raw(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        match self {
            Self::Folder(writer) => writer.write_raw(name, dtype, shape, bytes),
            Self::Gguf(writer) => writer.write_raw(name, dtype, shape, bytes),
        }
    }

    pub(crate) fn discard(self) -> Result<(), CheckpointError> {
        match self {
            Self::Folder(writer) => writer.discard(),
            Self::Gguf(writer) => writer.discard(),
        }
    }

    pub(crate) fn finish(self) -> Result<(), CheckpointError> {
        match self {
            Self::Folder(writer) => writer.finish(),
            Self::Gguf(writer) => writer.finish(),
        }
    }
}
