//! Writing a checkpoint folder.

mod journal;
mod plan;
mod workspace;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use marlin_format::PackedMatrix;
use safetensors::Dtype;
use serde_json::Value;

use self::journal::{Journal, Record};
use self::plan::Plan;
pub use self::plan::PlannedTensor;
use self::workspace::Workspace;
pub(crate) use self::workspace::lock;
use crate::{CheckpointError, ExportLayout, Rotations, layouts, weights};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// How to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriterOptions {
    /// Stands for everything the result depends on (source model, method, settings). Unfinished work is resumed only
    /// under the fingerprint it was begun with.
    pub fingerprint: String,
    /// Replace an existing model folder, and discard unfinished work of another fingerprint.
    pub force: bool,
    /// Largest weight file; a tensor that alone is larger gets a file of its own.
    pub max_shard_bytes: u64,
    /// Tensor bytes between two syncs to disk: what a kill can cost, about a second of quantising.
    pub sync_bytes: u64,
    /// How packed matrices are laid out.
    pub layout: ExportLayout,
    /// What the weights expect to be rotated.
    pub rotations: Rotations,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            fingerprint: String::new(),
            force: false,
            max_shard_bytes: 4 * GIB,
            sync_bytes: 4 * MIB,
            layout: ExportLayout::default(),
            rotations: Rotations::default(),
        }
    }
}

/// Writes a checkpoint folder, one tensor at a time in any order.
///
/// Everything grows in `OUT.partial` beside the output and becomes `OUT` by one rename in [`CheckpointWriter::finish`].
/// Sizes are known from the plan, so weight files get their headers first and each tensor is written straight to its
/// place. A writer that is dropped or killed leaves its work; the next one with the same fingerprint and plan goes on
/// from there ([`CheckpointWriter::is_done`]) and the result is the same to the byte.
#[derive(Debug)]
pub struct CheckpointWriter {
    workspace: Workspace,
    plan: Plan,
    config: Value,
    side_files: Vec<(String, Vec<u8>)>,
    /// One a shard.
    files: Vec<File>,
    journal: Journal,
    done: Vec<bool>,
    /// Tensors written but not yet in the journal.
    unsynced: Vec<usize>,
    unsynced_bytes: u64,
    sync_bytes: u64,
    resumed: usize,
}

impl CheckpointWriter {
    /// Starts or resumes a folder.
    ///
    /// `config` is the model's config.json; its `quantization_config` is written by this function from the plan.
    /// `side_files` are copied as they are (see [`crate::Checkpoint::side_files`]).
    ///
    /// # Errors
    /// The output exists and `force` is not set, or is no model folder; another process writes it; unfinished work of
    /// another fingerprint or plan is there and `force` is not set; names or shapes of the plan are impossible.
    pub fn create(
        out: &Path,
        tensors: Vec<PlannedTensor>,
        config: Value,
        side_files: Vec<(String, Vec<u8>)>,
        options: &WriterOptions,
    ) -> Result<Self, CheckpointError> {
        let impossible = |problem| CheckpointError::Plan { path: out.to_path_buf(), problem };
        let plan = Plan::new(tensors, options.layout, options.max_shard_bytes).map_err(impossible)?;
        let config = plan.config(config, options.rotations, out)?;
        check_side_files(&side_files).map_err(impossible)?;

        let workspace = Workspace::open(out, options.force)?;
        let unfinished = match unfinished(&workspace, &plan, &options.fingerprint) {
            Err(CheckpointError::OtherUnfinished { .. }) if options.force => None,
            other => other?,
        };
        let (files, journal, done) = match unfinished {
            Some(unfinished) => unfinished,
            None => start(&workspace, &plan, &options.fingerprint)?,
        };
        let resumed = done.iter().filter(|done| **done).count();
        Ok(Self {
            workspace,
            plan,
            config,
            side_files,
            files,
            journal,
            done,
            unsynced: Vec::new(),
            unsynced_bytes: 0,
            sync_bytes: options.sync_bytes,
            resumed,
        })
    }

    /// Tensors that an earlier, interrupted run had finished.
    pub fn resumed(&self) -> usize {
        self.resumed
    }

    /// Whether a planned tensor is written.
    pub fn is_done(&self, name: &str) -> bool {
        self.plan.find(name).is_some_and(|tensor| self.done[tensor])
    }

    /// Writes a planned matrix, packed or not.
    pub fn write_matrix(&mut self, name: &str, matrix: &PackedMatrix<'_>) -> Result<(), CheckpointError> {
        matrix.validate().map_err(|source| CheckpointError::Format {
            file: self.workspace.out.display().to_string(),
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
        self.finished(tensor)
    }

    /// Writes a planned ordinary tensor.
    pub fn write_raw(
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
        self.finished(tensor)
    }

    /// Keeps what the next run needs to go on after the tensors written so far, in place of what was kept before.
    ///
    /// # Errors
    /// It cannot be written; what was kept before stays.
    pub fn save_state(&mut self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), CheckpointError> {
        // It must not be ahead of the tensors.
        self.sync()?;
        let saved = self.workspace.save_state(write);
        saved.map_err(|e| write_error(&self.workspace.state(), self.bytes_left(), e))
    }

    /// What an earlier run kept, if it was interrupted after it did.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn state(&self) -> Result<Option<File>, CheckpointError> {
        let path = self.workspace.state();
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(CheckpointError::io("open", &path)(e)),
        }
    }

    /// Removes what was written. For work that can never be finished as planned; a writer that is only dropped can be resumed.
    pub fn discard(self) -> Result<(), CheckpointError> {
        drop(self.files);
        self.workspace.discard()
    }

    /// Completes the folder and renames it to the output.
    ///
    /// # Errors
    /// A planned tensor is missing, or the output has come to exist meanwhile. Nothing is lost then: the unfinished
    /// folder stays.
    pub fn finish(self) -> Result<(), CheckpointError> {
        self.complete()?.publish()
    }

    /// Completes the folder, which can then be read, and does not rename it yet.
    ///
    /// # Errors
    /// A planned tensor is missing.
    pub fn complete(mut self) -> Result<CompleteFolder, CheckpointError> {
        if let Some(missing) = self.done.iter().position(|done| !done) {
            let name = &self.plan.tensors()[missing].name;
            return Err(self.problem(format!("tensor `{name}` has not been written")));
        }
        self.sync()?;
        let mut files = std::mem::take(&mut self.side_files);
        if let Some(index) = self.plan.index_json() {
            files.push((weights::INDEX_FILE.to_owned(), pretty(&index)));
        }
        files.push(("config.json".to_owned(), pretty(&self.config)));
        drop(self.files);
        let folder = CompleteFolder { workspace: self.workspace };
        files.iter().try_for_each(|(name, bytes)| folder.add(name, bytes))?;
        Ok(folder)
    }

    /// A planned tensor that is yet to be written.
    fn pending(&self, name: &str) -> Result<usize, CheckpointError> {
        match self.plan.find(name) {
            None => Err(self.problem(format!("tensor `{name}` is not planned"))),
            Some(tensor) if self.done[tensor] => Err(self.problem(format!("tensor `{name}` is already written"))),
            Some(tensor) => Ok(tensor),
        }
    }

    fn write_slot(&mut self, tensor: usize, slot: usize, bytes: &[u8]) -> Result<(), CheckpointError> {
        let slot = &self.plan.slots(tensor)[slot];
        let mut file = &self.files[slot.shard];
        file.seek(SeekFrom::Start(slot.offset)).and_then(|_| file.write_all(bytes)).map_err(|e| {
            write_error(&self.workspace.model_file(&self.plan.shards[slot.shard].name), self.bytes_left(), e)
        })
    }

    fn finished(&mut self, tensor: usize) -> Result<(), CheckpointError> {
        self.done[tensor] = true;
        self.unsynced.push(tensor);
        self.unsynced_bytes += self.plan.bytes(tensor);
        if self.unsynced_bytes >= self.sync_bytes { self.sync() } else { Ok(()) }
    }

    /// Makes what is written permanent, then says so in the journal.
    fn sync(&mut self) -> Result<(), CheckpointError> {
        let mut shards: Vec<usize> = self.unsynced.iter().map(|t| self.plan.slots(*t)[0].shard).collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            let path = self.workspace.model_file(&self.plan.shards[shard].name);
            self.files[shard].sync_data().map_err(|e| write_error(&path, self.bytes_left(), e))?;
        }
        let names = self.unsynced.iter().map(|t| self.plan.tensors()[*t].name.as_str());
        let written = self.journal.append(names);
        written.map_err(|e| write_error(&self.workspace.journal(), self.bytes_left(), e))?;
        self.unsynced.clear();
        self.unsynced_bytes = 0;
        Ok(())
    }

    /// Bytes of tensors that are not safely on disk.
    fn bytes_left(&self) -> u64 {
        let unwritten = (0..self.done.len()).filter(|tensor| !self.done[*tensor]);
        unwritten.map(|tensor| self.plan.bytes(tensor)).sum::<u64>() + self.unsynced_bytes
    }

    fn not_as_planned(&self, tensor: usize, found: &str) -> CheckpointError {
        let planned = &self.plan.tensors()[tensor];
        self.problem(format!("tensor `{}` is {found}; planned is {}", planned.name, planned.content()))
    }

    fn problem(&self, problem: String) -> CheckpointError {
        CheckpointError::Plan { path: self.workspace.out.clone(), problem }
    }
}

/// A folder that lacks nothing but its name; see [`CheckpointWriter::complete`]. Dropped, it can be resumed like any
/// other.
#[derive(Debug)]
pub struct CompleteFolder {
    workspace: Workspace,
}

impl CompleteFolder {
    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.workspace.model()
    }

    /// Adds a small file, or replaces it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn add(&self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let path = self.workspace.model_file(name);
        File::create(&path)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
            .map_err(|e| write_error(&path, bytes.len() as u64, e))
    }

    /// Renames it to the output.
    ///
    /// # Errors
    /// The output has come to exist meanwhile.
    pub fn publish(self) -> Result<(), CheckpointError> {
        self.workspace.publish()
    }
}

type Unfinished = (Vec<File>, Journal, Vec<bool>);

/// Makes weight files of full length with their headers, then the journal that says so.
fn start(workspace: &Workspace, plan: &Plan, fingerprint: &str) -> Result<Unfinished, CheckpointError> {
    workspace.clear()?;
    let mut files = Vec::with_capacity(plan.shards.len());
    for shard in &plan.shards {
        let path = workspace.model_file(&shard.name);
        let file = File::create_new(&path)
            .and_then(|mut file| {
                file.write_all(&shard.header)?;
                file.set_len(shard.bytes)?;
                file.sync_all()?;
                Ok(file)
            })
            .map_err(|e| write_error(&path, shard.bytes, e))?;
        files.push(file);
    }
    let path = workspace.journal();
    let journal = Journal::create(&path, fingerprint).map_err(CheckpointError::io("write", &path))?;
    workspace::sync_folder(&workspace.model())?;
    workspace::sync_folder(workspace.folder())?;
    Ok((files, journal, vec![false; plan.tensors().len()]))
}

/// Reopens the work of an interrupted run; `None` if there is none.
fn unfinished(workspace: &Workspace, plan: &Plan, fingerprint: &str) -> Result<Option<Unfinished>, CheckpointError> {
    let other = |problem: &str| CheckpointError::OtherUnfinished {
        path: workspace.folder().to_path_buf(),
        problem: problem.to_owned(),
    };
    let path = workspace.journal();
    let record = match Record::read(&path) {
        Ok(Some(record)) => record,
        Ok(None) => return Ok(None),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => return Err(other("with a damaged journal")),
        Err(e) => return Err(CheckpointError::io("read", &path)(e)),
    };
    if record.fingerprint != fingerprint {
        return Err(other("of another source or other settings"));
    }
    let mut files = Vec::with_capacity(plan.shards.len());
    for shard in &plan.shards {
        let path = workspace.model_file(&shard.name);
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let mut file = match opened {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(other("of another layout")),
            Err(e) => return Err(CheckpointError::io("open", &path)(e)),
        };
        let mut header = vec![0; shard.header.len()];
        let length = file.metadata().map_err(CheckpointError::io("read", &path))?.len();
        if length != shard.bytes || file.read_exact(&mut header).is_err() || header != shard.header {
            return Err(other("of another layout"));
        }
        files.push(file);
    }
    let mut done = vec![false; plan.tensors().len()];
    for name in &record.finished {
        done[plan.find(name).ok_or_else(|| other("with a damaged journal"))?] = true;
    }
    let journal = Journal::resume(&path, &record).map_err(CheckpointError::io("open", &path))?;
    Ok(Some((files, journal, done)))
}

fn check_side_files(files: &[(String, Vec<u8>)]) -> Result<(), String> {
    for (name, _) in files {
        let plain = !name.is_empty() && !name.contains(['/', '\\']) && !name.starts_with('.');
        if !plain || name == "config.json" || name == weights::INDEX_FILE || name.ends_with(".safetensors") {
            return Err(format!("`{name}` cannot be copied beside the weights"));
        }
    }
    Ok(())
}

fn write_error(path: &Path, needed: u64, source: io::Error) -> CheckpointError {
    let path = path.to_path_buf();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CheckpointError::DiskFull { path, needed, source },
        io::ErrorKind::FileTooLarge => CheckpointError::FileLimit { path, source },
        _ => CheckpointError::Io { action: "write", path, source },
    }
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = format!("{value:#}");
    text.push('\n');
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_apart() {
        let error = write_error(Path::new("out/x"), 123, io::ErrorKind::StorageFull.into()).to_string();
        assert!(error.contains("out/x") && error.contains("123 bytes") && error.contains("resume"), "{error}");
        let error = write_error(Path::new("out/x"), 123, io::ErrorKind::FileTooLarge.into()).to_string();
        assert!(error.contains("out/x") && error.contains("ulimit -f") && error.contains("resume"), "{error}");
        let error = write_error(Path::new("out/x"), 123, io::ErrorKind::PermissionDenied.into());
        assert!(matches!(error, CheckpointError::Io { .. }));
    }
}
