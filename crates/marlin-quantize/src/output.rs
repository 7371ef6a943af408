//! What a quantised model is written to.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use marlin_checkpoint::{
    Checkpoint, CheckpointError, CheckpointWriter, CompleteFolder, Dtype, ExportLayout, GgufWriter, PlannedTensor,
    WriterOptions,
};
use marlin_format::PackedMatrix;

/// What a folder says of itself on the Hub.
const CARD_FILE: &str = "README.md";
const PLAN_FILE: &str = "plan.json";

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

    /// What other processes said of the shards that they wrote.
    pub(crate) fn notes(&self) -> &[Vec<u8>] {
        match self {
            Self::Folder(writer) => writer.notes(),
            Self::Gguf(_) => &[],
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

    /// Keeps what the next run needs to go on from here, where an output can be gone on with.
    pub(crate) fn save_state(
        &mut self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), CheckpointError> {
        match self {
            Self::Folder(writer) => writer.save_state(write),
            Self::Gguf(_) => Ok(()),
        }
    }

    /// What an earlier, interrupted run kept.
    pub(crate) fn state(&self) -> Result<Option<File>, CheckpointError> {
        match self {
            Self::Folder(writer) => writer.state(),
            Self::Gguf(_) => Ok(None),
        }
    }

    pub(crate) fn discard(self) -> Result<(), CheckpointError> {
        match self {
            Self::Folder(writer) => writer.discard(),
            Self::Gguf(writer) => writer.discard(),
        }
    }

    /// Whole, but not under its name yet.
    pub(crate) fn complete(self) -> Result<Complete, CheckpointError> {
        match self {
            Self::Folder(writer) => writer.complete().map(Complete::Folder),
            Self::Gguf(writer) => Ok(Complete::Gguf(writer)),
        }
    }
}

/// An output with all of its tensors.
pub(crate) enum Complete {
    Folder(CompleteFolder),
    Gguf(Box<GgufWriter>),
}

impl Complete {
    /// The folder to read; `None` of what no earlier run can have begun.
    pub(crate) fn folder(&self) -> Option<PathBuf> {
        match self {
            Self::Folder(folder) => Some(folder.path()),
            Self::Gguf(_) => None,
        }
    }

    /// Adds a model card and a plan of formats, where there is a folder to hold them, and gives the output its name.
    pub(crate) fn publish(self, card: Option<String>, plan: Option<&str>) -> Result<(), CheckpointError> {
        match self {
            Self::Folder(folder) => {
                card.iter().try_for_each(|card| folder.add(CARD_FILE, card.as_bytes()))?;
                plan.iter().try_for_each(|plan| folder.add(PLAN_FILE, plan.as_bytes()))?;
                folder.publish()
            }
            Self::Gguf(writer) => writer.finish(),
        }
    }
}
