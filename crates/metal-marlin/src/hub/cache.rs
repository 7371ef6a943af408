//! The Hub's cache, laid out as `huggingface_hub` does it.
//!
//! ```text
//! CACHE/models--OWNER--NAME/
//!   blobs/ETAG               contents, by SHA-256 or git's hash
//!   blobs/ETAG.incomplete    what has arrived of one
//!   snapshots/COMMIT/FILE    links to blobs
//!   refs/REVISION            the commit of a branch or tag
//! CACHE/.locks/models--OWNER--NAME/ETAG.lock
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use marlin_checkpoint::{CONFIG_FILE, INDEX_FILE, TOKENIZER_FILE, WEIGHTS_FILE, shards_of_index};

use super::{HubError, HubId, id, text};

/// The folder in which the Hub's tools keep what they download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubCache {
    folder: PathBuf,
}

/// A snapshot in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedSnapshot {
    /// The model.
    pub id: HubId,
    /// The commit.
    pub commit: String,
    /// Branches and tags that are at this commit as far as the cache knows.
    pub revisions: Vec<String>,
    /// Bytes of its files.
    pub bytes: u64,
    /// Holds its files.
    pub folder: PathBuf,
}

impl HubCache {
    /// `HF_HUB_CACHE`, or `hub` in `HF_HOME`, which is `~/.cache/huggingface` by default.
    ///
    /// # Errors
    /// There is no home folder.
    pub fn from_env() -> Result<Self, HubError> {
        let named = text("HF_HUB_CACHE").or_else(|| text("HUGGINGFACE_HUB_CACHE")).map(expand);
        let folder = named.or_else(|| Some(hf_home()?.join("hub"))).ok_or(HubError::NoHome)?;
        let folder = std::path::absolute(&folder).map_err(HubError::io("resolve", &folder))?;
        Ok(Self { folder })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn repo(&self, id: &HubId) -> Repo {
        let name = id.folder_name();
        Repo { id: id.clone(), folder: self.folder.join(&name), locks: self.folder.join(".locks").join(name) }
    }

    /// Models of which there is something.
    ///
    /// # Errors
    /// The folder cannot be read. One that does not exist has no models.
    pub fn models(&self) -> Result<Vec<HubId>, HubError> {
        let names = entries(&self.folder)?;
        Ok(names.iter().filter_map(|name| HubId::of_folder(name)).collect())
    }

    /// Bytes of all models in it.
    pub fn bytes(&self) -> u64 {
        let models = self.models().unwrap_or_default();
        models.iter().map(|id| bytes_of(&self.folder.join(id.folder_name()))).sum()
    }

    /// One snapshot; `None` if it is not there.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn find(&self, id: &HubId, commit: &str) -> Result<Option<CachedSnapshot>, HubError> {
        let repo = self.repo(id);
        let folder = repo.snapshot(commit);
        if !id::is_commit(commit) || !folder.is_dir() {
            return Ok(None);
        }
        let bytes =
            repo.blobs_of(commit)?.iter().filter_map(|blob| fs::metadata(blob).ok()).map(|blob| blob.len()).sum();
        Ok(Some(CachedSnapshot {
            id: id.clone(),
            commit: commit.to_owned(),
            revisions: repo.revisions_at(commit)?,
            bytes,
            folder,
        }))
    }

    /// Removes a snapshot: the contents that no other snapshot has, its links, and the revisions that are at it. The model's
    /// whole folder goes with its last snapshot, unless a download is under way in it.
    ///
    /// # Errors
    /// Something cannot be removed; calling again goes on.
    pub fn remove(&self, snapshot: &CachedSnapshot) -> Result<(), HubError> {
        let repo = self.repo(&snapshot.id);
        // Nothing else is ever removed, whatever the caller made up.
        if repo.snapshot(&snapshot.commit) != snapshot.folder || !id::is_commit(&snapshot.commit) {
            return Err(HubError::Revision { revision: snapshot.commit.clone() });
        }
        let mut others = entries(&repo.folder.join("snapshots"))?;
        others.retain(|commit| *commit != snapshot.commit);
        let mut kept = BTreeSet::new();
        for other in &others {
            kept.extend(repo.blobs_of(other)?);
        }
        // Links last: as long as they are there, the snapshot is listed and can be removed again.
        for blob in repo.blobs_of(&snapshot.commit)?.difference(&kept) {
            fs::remove_file(blob).map_err(HubError::io("remove", blob))?;
        }
        fs::remove_dir_all(&snapshot.folder).map_err(HubError::io("remove", &snapshot.folder))?;
        for revision in repo.revisions_at(&snapshot.commit)? {
            let path = repo.reference(&revision);
            fs::remove_file(&path).map_err(HubError::io("remove", &path))?;
        }
        if others.is_empty() && entries(&repo.folder.join("blobs"))?.is_empty() {
            fs::remove_dir_all(&repo.folder).map_err(HubError::io("remove", &repo.folder))?;
        }
        Ok(())
    }
}

/// `HF_HOME` or its default; `None` if there is no home folder.
pub(super) fn hf_home() -> Option<PathBuf> {
    let in_cache = |cache: PathBuf| cache.join("huggingface");
    let home = || text("XDG_CACHE_HOME").map(expand).or_else(|| Some(dirs::home_dir()?.join(".cache")));
    text("HF_HOME").map(expand).or_else(|| home().map(in_cache))
}

/// `~` is the home folder, as the Hub's tools have it.
fn expand(path: String) -> PathBuf {
    match (path.strip_prefix('~'), dirs::home_dir()) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => PathBuf::from(path),
    }
}

/// A model's folder in the cache.
#[derive(Debug)]
pub(super) struct Repo {
    id: HubId,
    folder: PathBuf,
    locks: PathBuf,
}

impl Repo {
    pub(super) fn id(&self) -> &HubId {
        &self.id
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.folder.join("refs").join(revision)
    }

    /// The commit that a revision was at when it was last fetched.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if id::is_commit(revision) {
            return self.snapshot(revision).is_dir().then(|| revision.to_owned());
        }
        let commit = fs::read_to_string(self.reference(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| id::is_commit(commit))
    }

    /// Notes the commit of a branch or tag.
    pub(super) fn set_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        replace(&self.reference(revision), |path| File::create(path)?.write_all(commit.as_bytes()))
    }

    /// Waits for others, also other programs, that fetch this blob.
    pub(super) fn lock(&self, etag: &str) -> Result<File, HubError> {
        fs::create_dir_all(&self.locks).map_err(HubError::io("create", &self.locks))?;
        let path = self.locks.join(format!("{etag}.lock"));
        let locked = File::create(&path).and_then(|file| file.lock().map(|()| file));
        locked.map_err(HubError::io("lock", &path))
    }

    /// Whether a snapshot has a file.
    pub(super) fn is_linked(&self, commit: &str, file: &str) -> bool {
        self.snapshot(commit).join(file).is_file()
    }

    /// Puts a blob into a snapshot as `file`.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let target = Path::new("../../blobs").join(etag);
        replace(&self.snapshot(commit).join(file), |path| std::os::unix::fs::symlink(&target, path))
    }

    /// Branches and tags at a commit.
    fn revisions_at(&self, commit: &str) -> Result<Vec<String>, HubError> {
        let mut found = Vec::new();
        let mut folders = vec![String::new()];
        while let Some(folder) = folders.pop() {
            for name in entries(&self.reference(&folder))? {
                let revision = format!("{folder}{name}");
                if self.reference(&revision).is_dir() {
                    folders.push(format!("{revision}/"));
                } else if self.commit(&revision).as_deref() == Some(commit) {
                    found.push(revision);
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// The blobs that a snapshot links to, in folders of it too.
    fn blobs_of(&self, commit: &str) -> Result<BTreeSet<PathBuf>, HubError> {
        let blobs = self.folder.join("blobs");
        let mut found = BTreeSet::new();
        let mut folders = vec![self.snapshot(commit)];
        while let Some(folder) = folders.pop() {
            for name in entries(&folder)? {
                let path = folder.join(name);
                if let Ok(target) = fs::read_link(&path) {
                    let name = target.file_name().map(|name| blobs.join(name));
                    found.extend(name.filter(|blob| fs::symlink_metadata(blob).is_ok()));
                } else if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        Ok(found)
    }
}

/// The first file that a folder lacks to be a whole model.
pub(super) fn first_missing(folder: &Path) -> Option<String> {
    let is_missing = |file: &str| !folder.join(file).is_file();
    if let Some(file) = [CONFIG_FILE, TOKENIZER_FILE].into_iter().find(|file| is_missing(file)) {
        return Some(file.to_owned());
    }
    if !is_missing(WEIGHTS_FILE) {
        return None;
    }
    // An index that cannot be read is reported when the model is opened.
    let Ok(index) = fs::read(folder.join(INDEX_FILE)) else { return Some(WEIGHTS_FILE.to_owned()) };
    shards_of_index(&index, INDEX_FILE).ok()?.into_iter().find(|shard| is_missing(shard))
}

/// Makes a file or link beside `path` and renames it into place, so that it is whole or not there.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), HubError> {
    let (folder, name) = (path.parent().unwrap_or(path), path.file_name().unwrap_or_default());
    fs::create_dir_all(folder).map_err(HubError::io("create", folder))?;
    let mut beside = std::ffi::OsString::from(format!(".{}-", std::process::id()));
    beside.push(name);
    let beside = folder.join(beside);
    let _ = fs::remove_file(&beside);
    make(&beside).and_then(|()| fs::rename(&beside, path)).map_err(|e| {
        let _ = fs::remove_file(&beside);
        HubError::io("write", path)(e)
    })
}

/// Names in a folder, sorted; none if it does not exist.
pub(crate) fn entries(folder: &Path) -> Result<Vec<String>, HubError> {
    let listed = match fs::read_dir(folder) {
        Ok(listed) => listed,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(HubError::io("read", folder)(e)),
    };
    let names = listed.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<io::Result<Vec<_>>>().map_err(HubError::io("read", folder))?;
    names.sort_unstable();
    Ok(names)
}

/// Bytes of the files in a folder and below. Links are not followed, and what cannot be read counts nothing.
pub(crate) fn bytes_of(folder: &Path) -> u64 {
    let mut bytes = 0;
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(found) if found.is_dir() => folders.push(entry.path()),
                Ok(found) if found.is_file() => bytes += found.len(),
                _ => {}
            }
        }
    }
    bytes
}
