//! The folder beside the output in which a model grows until it is whole.
//!
//! ```text
//! OUT.partial/
//!   lock       held by the process that writes
//!   journal    fingerprint of the work and names of finished tensors
//!   state      what whoever makes the tensors needs to go on, if he keeps anything
//!   shards/    weight files that are written apart; see `shards`
//!   model/     becomes OUT by one rename
//!   replaced/  the old OUT, between two renames only
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::CheckpointError;

pub(super) const JOURNAL: &str = "journal";
pub(super) const SHARDS: &str = "shards";
const ENTRIES: [&str; 7] = ["lock", JOURNAL, "state", "state.new", SHARDS, "model", "replaced"];

#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) out: PathBuf,
    folder: PathBuf,
    force: bool,
    /// Holds the lock until dropped.
    _lock: File,
}

impl Workspace {
    /// Makes or reopens the folder for `out` and locks it. An existing output is refused unless `force`.
    pub(super) fn open(out: &Path, force: bool) -> Result<Self, CheckpointError> {
        let (out, folder) = partial(out)?;
        check_output(&out, force)?;
        fs::create_dir_all(&folder).map_err(CheckpointError::io("create", &folder))?;
        let lock = lock(&folder.join("lock"), &folder)?;
        let workspace = Self { out, folder, force, _lock: lock };
        workspace.refuse_foreign_entries()?;
        workspace.recover()?;
        check_output(&workspace.out, force)?;
        Ok(workspace)
    }

    /// The folder itself, for messages.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn journal(&self) -> PathBuf {
        self.folder.join(JOURNAL)
    }

    pub(super) fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Replaces the state by what `write` writes, whole or not at all.
    pub(super) fn save_state(&self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        let new = self.folder.join("state.new");
        let mut file = BufWriter::new(File::create(&new)?);
        write(&mut file)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&new, self.state())
    }

    /// A file of the model that grows.
    pub(super) fn model_file(&self, name: &str) -> PathBuf {
        self.model().join(name)
    }

    /// Discards whatever is unfinished and starts with an empty model folder.
    pub(super) fn clear(&self) -> Result<(), CheckpointError> {
        // The journal goes first: without it nothing counts as finished.
        remove(&self.journal())?;
        self.remove_state()?;
        sync_folder(&self.folder)?;
        remove(&self.model())?;
        let model = self.model();
        fs::create_dir(&model).map_err(CheckpointError::io("create", &model))
    }

    fn remove_state(&self) -> Result<(), CheckpointError> {
        remove(&self.state()).and_then(|()| remove(&self.folder.join("state.new")))
    }

    /// Removes the folder with all that is unfinished.
    pub(super) fn discard(self) -> Result<(), CheckpointError> {
        self.clear()?;
        remove(&self.folder)
    }

    /// Renames the finished model, all of whose files are synced, to the output, and removes the folder.
    pub(super) fn publish(self) -> Result<(), CheckpointError> {
        sync_folder(&self.model())?;
        check_output(&self.out, self.force)?;
        let replaced = self.replaced();
        let replaces = self.out.exists();
        if replaces {
            rename(&self.out, &replaced)?;
        }
        if let Err(e) = rename(&self.model(), &self.out) {
            if replaces {
                rename(&replaced, &self.out)?;
            }
            return Err(e);
        }
        sync_folder(self.out.parent().unwrap_or(&self.out))?;

        // The model is whole; if something of the folder stays behind, the next run to this output removes it.
        let _ = remove(&replaced)
            .and_then(|()| remove(&self.journal()))
            .and_then(|()| self.remove_state())
            .and_then(|()| remove(&self.folder.join(SHARDS)))
            .and_then(|()| remove(&self.folder.join("lock")));
        let _ = fs::remove_dir(&self.folder);
        Ok(())
    }

    /// The folder that becomes the output.
    pub(super) fn model(&self) -> PathBuf {
        self.folder.join("model")
    }

    fn replaced(&self) -> PathBuf {
        self.folder.join("replaced")
    }

    /// Finishes or undoes a replacement that was cut short.
    fn recover(&self) -> Result<(), CheckpointError> {
        let replaced = self.replaced();
        if self.out.exists() {
            remove(&replaced)
        } else if replaced.exists() {
            rename(&replaced, &self.out)
        } else {
            Ok(())
        }
    }

    fn refuse_foreign_entries(&self) -> Result<(), CheckpointError> {
        let failed = |e| CheckpointError::io("read", &self.folder)(e);
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if !ENTRIES.iter().any(|known| name == *known) {
                let entry = name.to_string_lossy().into_owned();
                return Err(CheckpointError::Foreign { path: self.folder.clone(), entry });
            }
        }
        Ok(())
    }
}

/// The output as an absolute path, and the folder beside it.
pub(super) fn partial(out: &Path) -> Result<(PathBuf, PathBuf), CheckpointError> {
    let out = std::path::absolute(out).map_err(CheckpointError::io("resolve", out))?;
    let (Some(parent), Some(name)) = (out.parent(), out.file_name()) else {
        let problem = "the output needs a folder name of its own".to_owned();
        return Err(CheckpointError::Plan { path: out, problem });
    };
    let mut partial = name.to_owned();
    partial.push(".partial");
    let folder = parent.join(partial);
    Ok((out, folder))
}

/// Only a model folder may be replaced, and only if asked; an empty folder is as good as none then.
pub(super) fn check_output(out: &Path, force: bool) -> Result<(), CheckpointError> {
    let found = match fs::symlink_metadata(out) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(CheckpointError::io("look at", out)(e)),
    };
    let path = out.to_path_buf();
    if !force {
        return Err(CheckpointError::OutputExists { path });
    }
    let is_model = || out.join("config.json").is_file();
    let is_empty = || fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    if found.is_dir() && (is_model() || is_empty()) { Ok(()) } else { Err(CheckpointError::NotAModel { path }) }
}

/// Opens or makes the file `path` and locks it until it is dropped. `work` names what it stands for in messages.
pub(crate) fn lock(path: &Path, work: &Path) -> Result<File, CheckpointError> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(CheckpointError::io("create", path))?;
    let locked = || CheckpointError::Locked { path: work.to_path_buf() };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(locked()),
        Err(TryLockError::Error(e)) => return Err(CheckpointError::io("lock", path)(e)),
    }
    // A process that finished in this moment has removed or renamed the file that was locked here.
    let identity = |found: fs::Metadata| (found.dev(), found.ino());
    match (file.metadata().map(identity), fs::metadata(path).map(identity)) {
        (Ok(locked_file), Ok(current)) if locked_file == current => Ok(file),
        _ => Err(locked()),
    }
}

pub(super) fn rename(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    fs::rename(from, to).map_err(CheckpointError::io("rename into place", to))
}

/// Removes a file or a folder of the workspace, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), CheckpointError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(CheckpointError::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Makes renames, creations and removals in a folder permanent.
pub(super) fn sync_folder(folder: &Path) -> Result<(), CheckpointError> {
    File::open(folder).and_then(|opened| opened.sync_all()).map_err(CheckpointError::io("sync", folder))
}
