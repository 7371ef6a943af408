//! Writing a checkpoint folder.

mod journal;
mod plan;
mod shards;
mod weight_files;
mod workspace;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use marlin_format::PackedMatrix;
use safetensors::Dtype;
use serde_json::Value;

use self::journal::{Journal, Record};
use self::plan::Plan;
pub use self::plan::PlannedTensor;
use self::shards::{ShardFolder, has_header};
pub use self::shards::{ShardWriter, Shards};
use self::weight_files::WeightFiles;
use self::workspace::Workspace;
pub(crate) use self::workspace::lock;
use crate::{CheckpointError, ExportLayout, Rotations, weights};

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
/// from there ([`CheckpointWriter::is_done`]) and the result is the same to the byte. It also takes over what other processes
/// wrote of the same plan ([`Shards`]).
#[derive(Debug)]
pub struct CheckpointWriter {
    workspace: Workspace,
    weights: WeightFiles,
    config: Value,
    side_files: Vec<(String, Vec<u8>)>,
    journal: Journal,
    sync_bytes: u64,
    resumed: usize,
    notes: Vec<Vec<u8>>,
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
        let shards = ShardFolder::new(workspace.folder(), &plan, &options.fingerprint);
        for other in shards.others()? {
            if !options.force {
                return Err(CheckpointError::other_unfinished(workspace.folder(), OTHER_SETTINGS));
            }
            workspace::remove(&other)?;
        }
        let (mut journal, mut done) = match unfinished {
            Some(unfinished) => unfinished,
            None => start(&workspace, &plan, &options.fingerprint)?,
        };
        take_over(&shards, &workspace, &plan, &mut journal, &mut done)?;
        let notes = plan.shards.iter().filter_map(|shard| shards.read_note(&shard.name).transpose());
        let notes = notes.collect::<Result<_, _>>()?;
        let files = open_files(&workspace, &plan)?;
        let resumed = done.iter().filter(|done| **done).count();
        let weights = WeightFiles::new(&workspace.out, plan, files, done);
        Ok(Self { workspace, weights, config, side_files, journal, sync_bytes: options.sync_bytes, resumed, notes })
    }

    /// Tensors that an earlier, interrupted run had finished, or other processes in shards.
    pub fn resumed(&self) -> usize {
        self.resumed
    }

    /// What was said of the shards that other processes wrote ([`ShardWriter::finish`]).
    pub fn notes(&self) -> &[Vec<u8>] {
        &self.notes
    }

    /// Whether a planned tensor is written.
    pub fn is_done(&self, name: &str) -> bool {
        self.weights.plan.find(name).is_some_and(|tensor| self.weights.done[tensor])
    }

    /// Writes a planned matrix, packed or not.
    pub fn write_matrix(&mut self, name: &str, matrix: &PackedMatrix<'_>) -> Result<(), CheckpointError> {
        self.weights.write_matrix(name, matrix)?;
        self.sync_if_due()
    }

    /// Writes a planned ordinary tensor.
    pub fn write_raw(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        self.weights.write_raw(name, dtype, shape, bytes)?;
        self.sync_if_due()
    }

    /// Keeps what the next run needs to go on after the tensors written so far, in place of what was kept before.
    ///
    /// # Errors
    /// It cannot be written; what was kept before stays.
    pub fn save_state(&mut self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), CheckpointError> {
        // It must not be ahead of the tensors.
        self.sync()?;
        let saved = self.workspace.save_state(write);
        saved.map_err(|e| write_error(&self.workspace.state(), self.weights.bytes_left(), e))
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
        drop(self.weights);
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
        self.weights.require_all()?;
        self.sync()?;
        let mut files = std::mem::take(&mut self.side_files);
        if let Some(index) = self.weights.plan.index_json() {
            files.push((weights::INDEX_FILE.to_owned(), pretty(&index)));
        }
        files.push(("config.json".to_owned(), pretty(&self.config)));
        drop(self.weights);
        let folder = CompleteFolder { workspace: self.workspace };
        files.iter().try_for_each(|(name, bytes)| folder.add(name, bytes))?;
        Ok(folder)
    }

    fn sync_if_due(&mut self) -> Result<(), CheckpointError> {
        if self.weights.unsynced_bytes >= self.sync_bytes { self.sync() } else { Ok(()) }
    }

    /// Makes what is written permanent, then says so in the journal.
    fn sync(&mut self) -> Result<(), CheckpointError> {
        let synced = self.weights.sync()?;
        let names = synced.iter().map(|tensor| self.weights.plan.tensors()[*tensor].name.as_str());
        let written = self.journal.append(names);
        written.map_err(|e| write_error(&self.workspace.journal(), self.weights.bytes_left(), e))
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

/// The journal, and which tensors it says are written.
type Unfinished = (Journal, Vec<bool>);

const OTHER_SETTINGS: &str = "of another source or other settings";

/// Makes weight files of full length with their headers, then the journal that says so.
fn start(workspace: &Workspace, plan: &Plan, fingerprint: &str) -> Result<Unfinished, CheckpointError> {
    workspace.clear()?;
    for shard in &plan.shards {
        weight_files::create(&workspace.model_file(&shard.name), shard)?;
    }
    let path = workspace.journal();
    let journal = Journal::create(&path, fingerprint).map_err(CheckpointError::io("write", &path))?;
    workspace::sync_folder(&workspace.model())?;
    workspace::sync_folder(workspace.folder())?;
    Ok((journal, vec![false; plan.tensors().len()]))
}

/// Finds the work of an interrupted run; `None` if there is none.
fn unfinished(workspace: &Workspace, plan: &Plan, fingerprint: &str) -> Result<Option<Unfinished>, CheckpointError> {
    let other = |problem: &str| CheckpointError::other_unfinished(workspace.folder(), problem);
    let path = workspace.journal();
    let record = match Record::read(&path) {
        Ok(Some(record)) => record,
        Ok(None) => return Ok(None),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => return Err(other("with a damaged journal")),
        Err(e) => return Err(CheckpointError::io("read", &path)(e)),
    };
    if record.fingerprint != fingerprint {
        return Err(other(OTHER_SETTINGS));
    }
    for (index, shard) in plan.shards.iter().enumerate() {
        if !has_header(&workspace.model_file(&shard.name), plan, index)? {
            return Err(other("of another layout"));
        }
    }
    let mut done = vec![false; plan.tensors().len()];
    for name in &record.finished {
        done[plan.find(name).ok_or_else(|| other("with a damaged journal"))?] = true;
    }
    let journal = Journal::resume(&path, &record).map_err(CheckpointError::io("open", &path))?;
    Ok(Some((journal, done)))
}

/// Puts shards that other processes have finished in the place of what is not finished here.
fn take_over(
    shards: &ShardFolder,
    workspace: &Workspace,
    plan: &Plan,
    journal: &mut Journal,
    done: &mut [bool],
) -> Result<(), CheckpointError> {
    for (index, shard) in plan.shards.iter().enumerate() {
        let of_shard = |tensor: &usize| plan.shard_of(*tensor) == index;
        let missing: Vec<usize> = (0..done.len()).filter(of_shard).filter(|tensor| !done[*tensor]).collect();
        if missing.is_empty() || !shards.is_finished(plan, index)? {
            continue;
        }
        shards.hand_over(&shard.name, &workspace.model_file(&shard.name))?;
        let names = missing.iter().map(|tensor| plan.tensors()[*tensor].name.as_str());
        let path = workspace.journal();
        journal.append(names).map_err(|e| write_error(&path, shard.bytes, e))?;
        missing.into_iter().for_each(|tensor| done[tensor] = true);
    }
    Ok(())
}

/// The weight files, one a shard.
fn open_files(workspace: &Workspace, plan: &Plan) -> Result<Vec<Option<(PathBuf, File)>>, CheckpointError> {
    let open = |path: PathBuf| match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => Ok(Some((path, file))),
        Err(e) => Err(CheckpointError::io("open", &path)(e)),
    };
    plan.shards.iter().map(|shard| open(workspace.model_file(&shard.name))).collect()
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
