//! Writing a model as one GGUF file, which llama.cpp loads.

mod blocks;
mod file;
mod metadata;
mod tensors;
mod vocabulary;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use marlin_format::{PackedMatrix, Scheme};
use safetensors::Dtype;

pub(crate) use self::blocks::written_scheme;
use self::tensors::Place;
use super::GgufType;
use crate::writer::lock;
use crate::{Checkpoint, CheckpointError, PlannedTensor, layouts};

/// Writes a GGUF file, one tensor at a time in any order.
///
/// Everything grows in `OUT.partial` beside the output and becomes `OUT` by one rename in [`GgufWriter::finish`].
/// Unlike a folder, an unfinished file is not resumed: the next run begins anew.
#[derive(Debug)]
pub struct GgufWriter {
    out: PathBuf,
    partial: PathBuf,
    force: bool,
    file: File,
    places: HashMap<String, Place>,
    /// Planned tensors that are yet to be written.
    missing: HashSet<String>,
}

impl GgufWriter {
    /// Starts a file: the metadata of `source` (config.json, tokenizer, chat template) and room for every tensor, under
    /// the names that they have at Hugging Face.
    ///
    /// # Errors
    /// The output exists and `force` is not set, or is no file; llama.cpp has no place for the architecture, a setting,
    /// the tokenizer, a tensor or its format.
    pub fn create(
        out: &Path,
        tensors: &[PlannedTensor],
        source: &Checkpoint,
        force: bool,
    ) -> Result<Self, CheckpointError> {
        let out = std::path::absolute(out).map_err(CheckpointError::io("resolve", out))?;
        check_output(&out, force)?;
        let impossible = |problem| CheckpointError::Plan { path: out.clone(), problem };
        let model = metadata::Model::read(source.config()).map_err(impossible)?;
        let layout = tensors::plan(&model, tensors).map_err(impossible)?;
        let mut metadata = model.metadata(source.name(), layout.file_type());
        metadata.extend(vocabulary::metadata(source, model.vocabulary)?);
        let header = file::header(&metadata, &layout.stored).map_err(impossible)?;

        let mut partial = out.clone().into_os_string();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let mut file = lock(&partial, &partial)?;
        let started = file.set_len(0).and_then(|()| file.write_all(&header.bytes));
        started.and_then(|()| file.set_len(header.file_bytes)).map_err(CheckpointError::io("write", &partial))?;
        let mut places = layout.places;
        places.values_mut().for_each(|place| place.offset += header.offsets[place.stored]);
        let missing = places.keys().cloned().collect();
        let mut writer = Self { out, partial, force, file, places, missing };
        for (index, bytes) in layout.constants {
            writer.write_at(header.offsets[index], &bytes)?;
        }
        Ok(writer)
    }

    /// Writes a planned matrix, in the scheme that was planned.
    ///
    /// # Errors
    /// It was not planned so, or the file cannot be written.
    pub fn write_matrix(&mut self, name: &str, matrix: &PackedMatrix<'_>) -> Result<(), CheckpointError> {
        matrix.validate().map_err(|source| CheckpointError::Format {
            file: self.out.display().to_string(),
            tensor: name.to_owned(),
            source,
        })?;
        let place = self.pending(name)?;
        let bytes = match place.tensor_type == GgufType::F32 {
            // What is small and sensitive is kept in f32, whatever it was.
            true if matrix.scheme != Scheme::F32 => {
                matrix.decode().iter().flat_map(|value| value.to_le_bytes()).collect()
            }
            _ => blocks::encode(matrix, place.tensor_type).ok_or_else(|| self.not_as_planned(name))?,
        };
        self.write_place(name, &place, bytes)
    }

    /// Writes a planned ordinary tensor.
    ///
    /// # Errors
    /// As for [`GgufWriter::write_matrix`].
    pub fn write_raw(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        let scheme = layouts::dense_scheme(dtype).ok_or_else(|| self.not_as_planned(name))?;
        // A vector is one row.
        let [rows, cols] = match *shape {
            [rows, cols] => [rows, cols],
            [len] => [1, len],
            _ => return Err(self.not_as_planned(name)),
        };
        let format =
            |source| CheckpointError::Format { file: self.out.display().to_string(), tensor: name.to_owned(), source };
        let matrix = PackedMatrix::from_dense_bytes(scheme, rows, cols, bytes).map_err(format)?;
        self.write_matrix(name, &matrix)
    }

    /// Removes what was written.
    ///
    /// # Errors
    /// The unfinished file cannot be removed.
    pub fn discard(self) -> Result<(), CheckpointError> {
        fs::remove_file(&self.partial).map_err(CheckpointError::io("remove", &self.partial))
    }

    /// Completes the file and renames it to the output.
    ///
    /// # Errors
    /// A planned tensor is missing, or the output has come to exist meanwhile.
    pub fn finish(self) -> Result<(), CheckpointError> {
        if let Some(name) = self.missing.iter().min() {
            return Err(self.problem(format!("tensor `{name}` has not been written")));
        }
        self.file.sync_all().map_err(CheckpointError::io("sync", &self.partial))?;
        check_output(&self.out, self.force)?;
        fs::rename(&self.partial, &self.out).map_err(CheckpointError::io("rename", &self.partial))?;
        let folder = self.out.parent().unwrap_or(&self.out);
        File::open(folder).and_then(|opened| opened.sync_all()).map_err(CheckpointError::io("sync", folder))
    }

    fn pending(&self, name: &str) -> Result<Place, CheckpointError> {
        match self.places.get(name) {
            None => Err(self.problem(format!("tensor `{name}` is not planned"))),
            Some(_) if !self.missing.contains(name) => Err(self.problem(format!("tensor `{name}` is already written"))),
            Some(place) => Ok(place.clone()),
        }
    }

    fn write_place(&mut self, name: &str, place: &Place, bytes: Vec<u8>) -> Result<(), CheckpointError> {
        if bytes.len() as u64 != place.bytes {
            return Err(self.not_as_planned(name));
        }
        let bytes = match place.paired_heads {
            Some(heads) => tensors::in_pairs(&bytes, place.rows, heads),
            None => bytes,
        };
        self.write_at(place.offset, &bytes)?;
        self.missing.remove(name);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let written = self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.write_all(bytes));
        written.map_err(CheckpointError::io("write", &self.partial))
    }

    fn not_as_planned(&self, name: &str) -> CheckpointError {
        self.problem(format!("tensor `{name}` is not what was planned"))
    }

    fn problem(&self, problem: String) -> CheckpointError {
        CheckpointError::Plan { path: self.out.clone(), problem }
    }
}

/// Refuses an output that exists, but for a file that is to be replaced.
fn check_output(out: &Path, force: bool) -> Result<(), CheckpointError> {
    let problem = |problem: &str| CheckpointError::Plan { path: out.to_path_buf(), problem: problem.to_owned() };
    match fs::symlink_metadata(out) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(CheckpointError::io("look at", out)(e)),
        Ok(_) if !force => Err(CheckpointError::OutputExists { path: out.to_path_buf() }),
        Ok(found) if found.is_file() && out.extension().is_some_and(|extension| extension == "gguf") => Ok(()),
        Ok(_) => Err(problem("it exists and is no *.gguf file, so it is not replaced; choose another name")),
    }
}
