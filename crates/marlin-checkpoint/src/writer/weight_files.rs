//! Weight files that are being written, tensor by tensor.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use marlin_format::PackedMatrix;
use safetensors::Dtype;

use super::plan::{Plan, ShardFile};
use super::write_error;
use crate::{CheckpointError, layouts};

/// The weight files of a plan that this process writes: all of them, or one of those that others write, too.
#[derive(Debug)]
pub(super) struct WeightFiles {
    /// What messages call the whole.
    out: PathBuf,
    pub(super) plan: Plan,
    /// One a shard; `None` for those of others.
    files: Vec<Option<(PathBuf, File)>>,
    /// One a tensor.
    pub(super) done: Vec<bool>,
    /// Tensors that are written, but not synced.
    unsynced: Vec<usize>,
    pub(super) unsynced_bytes: u64,
}

/// Makes a weight file of full length with its header.
pub(super) fn create(path: &Path, shard: &ShardFile) -> Result<File, CheckpointError> {
    let created = File::create_new(path).and_then(|mut file| {
        file.write_all(&shard.header)?;
        file.set_len(shard.bytes)?;
        file.sync_all()?;
        Ok(file)
    });
    created.map_err(|e| write_error(path, shard.bytes, e))
}

impl WeightFiles {
    pub(super) fn new(out: &Path, plan: Plan, files: Vec<Option<(PathBuf, File)>>, done: Vec<bool>) -> Self {
        Self { out: out.to_path_buf(), plan, files, done, unsynced: Vec::new(), unsynced_bytes: 0 }
    }

    /// Writes a planned matrix, packed or not.
    pub(super) fn write_matrix(&mut self, name: &str, matrix: &PackedMatrix<'_>) -> Result<(), CheckpointError> {
        matrix.validate().map_err(|source| CheckpointError::Format {
            file: self.out.display().to_string(),
            tensor: name.to_owned(),
            source,
        })?;
        if let Some(dtype) = layouts::dense_dtype(&matrix.scheme) {
            return self.write_raw(name, dtype, &[matrix.rows, matrix.cols], &matrix.codes);
        }
        let tensor = self.pending(name)?;
        let wanted = self.plan.tensors()[tensor].packed();
        if wanted != Some((matrix.scheme, [matrix.rows, matrix.cols])) {
            let found = format!("[{}, {}] as {}", matrix.rows, matrix.cols, matrix.scheme);
            return Err(self.not_as_planned(tensor, &found));
        }
        for slot in 0..self.plan.slots(tensor).len() {
            let content = self.plan.slots(tensor)[slot].content.clone();
            self.write_slot(tensor, slot, &content.bytes(matrix))?;
        }
        self.written(tensor);
        Ok(())
    }

    /// Writes a planned ordinary tensor.
    pub(super) fn write_raw(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        let tensor = self.pending(name)?;
        let as_planned = self.plan.tensors()[tensor].raw_content() == Some((dtype, shape));
        if !as_planned || bytes.len() as u64 != self.plan.bytes(tensor) {
            return Err(self.not_as_planned(tensor, &format!("{dtype} {shape:?} of {} bytes", bytes.len())));
        }
        self.write_slot(tensor, 0, bytes)?;
        self.written(tensor);
        Ok(())
    }

    /// Makes what is written permanent, and returns the tensors that became so.
    pub(super) fn sync(&mut self) -> Result<Vec<usize>, CheckpointError> {
        let mut shards: Vec<usize> = self.unsynced.iter().map(|tensor| self.plan.shard_of(*tensor)).collect();
        shards.sort_unstable();
        shards.dedup();
        for (path, file) in shards.into_iter().filter_map(|shard| self.files[shard].as_ref()) {
            file.sync_data().map_err(|e| write_error(path, self.bytes_left(), e))?;
        }
        self.unsynced_bytes = 0;
        Ok(std::mem::take(&mut self.unsynced))
    }

    /// Refuses to go on while a tensor of these files is missing.
    pub(super) fn require_all(&self) -> Result<(), CheckpointError> {
        match self.mine().find(|tensor| !self.done[*tensor]) {
            Some(missing) => {
                let name = &self.plan.tensors()[missing].name;
                Err(self.problem(format!("tensor `{name}` has not been written")))
            }
            None => Ok(()),
        }
    }

    /// Bytes of tensors that are not safely on disk.
    pub(super) fn bytes_left(&self) -> u64 {
        let unwritten = self.mine().filter(|tensor| !self.done[*tensor]);
        unwritten.map(|tensor| self.plan.bytes(tensor)).sum::<u64>() + self.unsynced_bytes
    }

    /// The tensors of these files.
    fn mine(&self) -> impl Iterator<Item = usize> {
        (0..self.done.len()).filter(|tensor| self.files[self.plan.shard_of(*tensor)].is_some())
    }

    /// A planned tensor that is yet to be written.
    fn pending(&self, name: &str) -> Result<usize, CheckpointError> {
        match self.plan.find(name) {
            None => Err(self.problem(format!("tensor `{name}` is not planned"))),
            Some(tensor) if self.done[tensor] => Err(self.problem(format!("tensor `{name}` is already written"))),
            Some(tensor) => Ok(tensor),
        }
    }

    fn write_slot(&self, tensor: usize, slot: usize, bytes: &[u8]) -> Result<(), CheckpointError> {
        let slot = &self.plan.slots(tensor)[slot];
        let Some((path, file)) = &self.files[slot.shard] else {
            let problem =
                format!("`{}` is in {}, which is written apart", slot.name, self.plan.shards[slot.shard].name);
            return Err(self.problem(problem));
        };
        let mut file: &File = file;
        let written = file.seek(SeekFrom::Start(slot.offset)).and_then(|_| file.write_all(bytes));
        written.map_err(|e| write_error(path, self.bytes_left(), e))
    }

    fn written(&mut self, tensor: usize) {
        self.done[tensor] = true;
        self.unsynced.push(tensor);
        self.unsynced_bytes += self.plan.bytes(tensor);
    }

    fn not_as_planned(&self, tensor: usize, found: &str) -> CheckpointError {
        let planned = &self.plan.tensors()[tensor];
        self.problem(format!("tensor `{}` is {found}; planned is {}", planned.name, planned.content()))
    }

    fn problem(&self, problem: String) -> CheckpointError {
        CheckpointError::Plan { path: self.out.clone(), problem }
    }
}
