//! Weight files that are written apart from each other, by processes that only share the folder.
//!
//! ```text
//! OUT.partial/shards/
//!   KEY/                                     stands for all that the weight files depend on
//!     model-00002-of-00009.safetensors.PID-TIME  grows
//!     model-00002-of-00009.safetensors           is whole
//!     model-00002-of-00009.note                  what its maker says of it: now it counts
//! ```
//!
//! Nobody locks anything here. Who writes a shard writes a file of its own and renames it when it is whole; if several write the same shard, they
//! write the same bytes. A [`super::CheckpointWriter`] of the same plan takes over what counts.

use std::collections::HashSet;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::time::SystemTime;

use marlin_format::PackedMatrix;
use safetensors::Dtype;

use super::journal::Record;
use super::plan::{Plan, PlannedTensor};
use super::weight_files::{self, WeightFiles};
use super::workspace::{self, check_output, partial, sync_folder};
use super::{OTHER_SETTINGS, WriterOptions, write_error};
use crate::CheckpointError;

/// The weight files that an output folder will have, each of which a process can write by itself.
///
/// Any number of processes may do so at once, on machines that share the folder. A [`super::CheckpointWriter`] that is made with the same tensors and
/// options then takes over the finished ones.
#[derive(Debug)]
pub struct Shards {
    out: PathBuf,
    plan: Plan,
    folder: ShardFolder,
    /// Tensors that a [`super::CheckpointWriter`] has written or taken over.
    done: HashSet<String>,
}

impl Shards {
    /// The shards of the folder `out`; nothing is written yet.
    ///
    /// # Errors
    /// As [`super::CheckpointWriter::create`], but for processes that write the same.
    pub fn new(out: &Path, tensors: Vec<PlannedTensor>, options: &WriterOptions) -> Result<Self, CheckpointError> {
        let impossible = |problem| CheckpointError::Plan { path: out.to_path_buf(), problem };
        let plan = Plan::new(tensors, options.layout, options.max_shard_bytes).map_err(impossible)?;
        let (out, partial) = partial(out)?;
        check_output(&out, options.force)?;
        let journal = partial.join(workspace::JOURNAL);
        let record = Record::read(&journal).map_err(CheckpointError::io("read", &journal))?;
        let (of_ours, of_others) = record.into_iter().partition::<Vec<_>, _>(|r| r.fingerprint == options.fingerprint);
        let folder = ShardFolder::new(&partial, &plan, &options.fingerprint);
        if !options.force && (!of_others.is_empty() || folder.others()?.next().is_some()) {
            return Err(CheckpointError::other_unfinished(&partial, OTHER_SETTINGS));
        }
        let done = of_ours.into_iter().flat_map(|record| record.finished).collect();
        Ok(Self { out, plan, folder, done })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.plan.shards.len()
    }

    /// The file's name.
    pub fn name(&self, shard: usize) -> &str {
        &self.plan.shards[shard].name
    }

    /// The file's length.
    pub fn bytes(&self, shard: usize) -> u64 {
        self.plan.shards[shard].bytes
    }

    /// The planned tensors in it, by their place in the plan.
    pub fn tensors(&self, shard: usize) -> impl Iterator<Item = usize> {
        (0..self.plan.tensors().len()).filter(move |tensor| self.plan.shard_of(*tensor) == shard)
    }

    /// Whether somebody has written it.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn is_finished(&self, shard: usize) -> Result<bool, CheckpointError> {
        let is_done = |tensor: usize| self.done.contains(&self.plan.tensors()[tensor].name);
        Ok(self.tensors(shard).all(is_done) || self.folder.is_finished(&self.plan, shard)?)
    }

    /// Begins to write one of them.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn write(self, shard: usize) -> Result<ShardWriter, CheckpointError> {
        let Self { out, plan, folder, .. } = self;
        fs::create_dir_all(&folder.path).map_err(CheckpointError::io("create", &folder.path))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let grows = folder.path.join(format!("{}.{}-{now}", plan.shards[shard].name, process::id()));
        let file = weight_files::create(&grows, &plan.shards[shard])?;
        let mut files: Vec<_> = plan.shards.iter().map(|_| None).collect();
        files[shard] = Some((grows.clone(), file));
        let done = vec![false; plan.tensors().len()];
        Ok(ShardWriter { weights: WeightFiles::new(&out, plan, files, done), folder, shard, grows })
    }
}

/// Writes one weight file; see [`Shards::write`]. Dropped before it is finished, it removes the file.
#[derive(Debug)]
pub struct ShardWriter {
    weights: WeightFiles,
    folder: ShardFolder,
    shard: usize,
    grows: PathBuf,
}

impl ShardWriter {
    /// Writes a planned matrix of this shard, packed or not.
    pub fn write_matrix(&mut self, name: &str, matrix: &PackedMatrix<'_>) -> Result<(), CheckpointError> {
        self.weights.write_matrix(name, matrix)
    }

    /// Writes a planned ordinary tensor of this shard.
    pub fn write_raw(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        self.weights.write_raw(name, dtype, shape, bytes)
    }

    /// Gives the file its name. `note` is kept for whoever takes it over ([`super::CheckpointWriter::notes`]).
    ///
    /// # Errors
    /// A tensor is missing, or the file cannot be completed.
    pub fn finish(mut self, note: &[u8]) -> Result<(), CheckpointError> {
        self.weights.require_all()?;
        self.weights.sync()?;
        let name = &self.weights.plan.shards[self.shard].name;
        workspace::rename(&self.grows, &self.folder.path.join(name))?;
        sync_folder(&self.folder.path)?;
        let mut note_grows = self.grows.clone().into_os_string();
        note_grows.push(".note");
        let note_grows = PathBuf::from(note_grows);
        File::create(&note_grows)
            .and_then(|mut file| file.write_all(note).and_then(|()| file.sync_all()))
            .map_err(|e| write_error(&note_grows, note.len() as u64, e))?;
        workspace::rename(&note_grows, &self.folder.note(name))?;
        sync_folder(&self.folder.path)
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        // Once it is renamed, there is nothing to remove. What stays behind takes room until the output is finished, and no more.
        let _ = fs::remove_file(&self.grows);
    }
}

/// Where shards of one plan lie.
#[derive(Debug)]
pub(super) struct ShardFolder {
    path: PathBuf,
}

impl ShardFolder {
    /// In the folder `partial`. Its name stands for all that the weight files depend on.
    pub(super) fn new(partial: &Path, plan: &Plan, fingerprint: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        fingerprint.hash(&mut hasher);
        plan.shards.iter().for_each(|shard| (&shard.name, &shard.header, shard.bytes).hash(&mut hasher));
        Self { path: partial.join(workspace::SHARDS).join(format!("{:016x}", hasher.finish())) }
    }

    /// Folders of other plans beside it.
    pub(super) fn others(&self) -> Result<impl Iterator<Item = PathBuf>, CheckpointError> {
        let parent = self.path.parent().unwrap_or(&self.path);
        let entries = match fs::read_dir(parent) {
            Ok(entries) => entries.collect::<io::Result<Vec<_>>>(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(e),
        };
        let entries = entries.map_err(CheckpointError::io("read", parent))?;
        Ok(entries.into_iter().map(|entry| entry.path()).filter(|path| *path != self.path))
    }

    /// Whether a whole file is here.
    pub(super) fn is_finished(&self, plan: &Plan, shard: usize) -> Result<bool, CheckpointError> {
        // A network file system may remember that a file was missing; that the folder is opened makes it look again.
        let _ = File::open(&self.path);
        let name = &plan.shards[shard].name;
        Ok(self.note(name).exists() && has_header(&self.path.join(name), plan, shard)?)
    }

    /// Moves a finished file to where the others grow.
    pub(super) fn hand_over(&self, name: &str, to: &Path) -> Result<(), CheckpointError> {
        workspace::rename(&self.path.join(name), to)?;
        sync_folder(to.parent().unwrap_or(to))
    }

    /// What the maker of a shard said of it, if it was written here.
    pub(super) fn read_note(&self, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        let path = self.note(name);
        match fs::read(&path) {
            Ok(note) => Ok(Some(note)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(CheckpointError::io("read", &path)(e)),
        }
    }

    fn note(&self, name: &str) -> PathBuf {
        self.path.join(name).with_extension("note")
    }
}

/// Whether a file is there with the length and the header of a shard.
pub(super) fn has_header(path: &Path, plan: &Plan, shard: usize) -> Result<bool, CheckpointError> {
    let shard = &plan.shards[shard];
    let read = File::open(path).and_then(|mut file| {
        let mut header = vec![0; shard.header.len()];
        let length = file.metadata()?.len();
        Ok(length == shard.bytes && file.read_exact(&mut header).is_ok() && header == shard.header)
    });
    match read {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        read => read.map_err(CheckpointError::io("read", path)),
    }
}
