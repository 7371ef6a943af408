//! Models quantised while they are opened, kept for the next time; which models of the Hub were used; and compiled kernels.
//!
//! ```text
//! CACHE/quantized/ID/entry.json   what it was made from and how; its modification time is the last use
//! CACHE/quantized/ID/model        the model folder; there when it is whole
//! CACHE/hub/MODEL@COMMIT          a snapshot of the Hub that was used, and when
//! CACHE/kernels/GPU.pipelines     kernels as a GPU's driver compiled them
//! CACHE/tiles/ID.tiles            weights in a CPU's order, see `tile_cache`
//! CACHE/locks/ID                  held by the process that makes or removes an entry
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use marlin_checkpoint::{Checkpoint, ExportLayout};
use marlin_kernels::KernelError;
use marlin_kernels::gpu::PIPELINE_CACHE_EXTENSION;
use marlin_model::format_size;
use marlin_quantize::{QuantizeError, QuantizeOptions, Recipe, quantize};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hub::{self, CachedSnapshot, HubCache, HubError, HubId, Snapshot};

const ENTRY_FILE: &str = "entry.json";

/// Why the cache of models cannot do what it is asked to.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Nowhere to keep models.
    #[error("there is no place for quantised models: set METAL_MARLIN_CACHE to a folder, or pass --no-cache")]
    NoHome,
    /// A file cannot be read or written.
    #[error("cannot {action} {path} of the model cache (METAL_MARLIN_CACHE moves it)", path = .path.display())]
    Io {
        /// What failed.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The model cannot be quantised.
    #[error("cannot quantise {model}")]
    Quantize {
        /// The model.
        model: String,
        /// Why.
        source: Box<QuantizeError>,
    },
    /// Another process makes this entry.
    #[error("{id} is being made by another process; wait for it")]
    Busy {
        /// The entry.
        id: String,
    },
    /// A model's tiles would fill the disk.
    #[error(
        "{} more on the disk of {folder} would leave less than {} of its {} free (METAL_MARLIN_CACHE moves the cache)",
        format_size(*bytes),
        format_size(crate::tile_cache::MARGIN),
        format_size(*free),
        folder = .folder.display()
    )]
    NoRoom {
        /// Where they would be.
        folder: PathBuf,
        /// Their size.
        bytes: u64,
        /// Bytes that are free there.
        free: u64,
    },
    /// The file of a model's tiles cannot be used.
    #[error("the model cache fails (METAL_MARLIN_CACHE moves it)")]
    Tiles(#[source] KernelError),
    /// The Hub's cache.
    #[error(transparent)]
    Hub(#[from] HubError),
}

impl CacheError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

/// What is quantised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Its name to people: an id of the Hub, or a path.
    pub model: String,
    /// What tells it from others of this name: a commit, or a fingerprint of its weights.
    pub version: String,
    /// The branch or tag of the Hub that was asked for.
    pub revision: Option<String>,
}

/// A quantised model in the cache.
#[derive(Debug, Clone)]
pub struct QuantizedModel {
    /// The name of its folder.
    pub id: String,
    /// What it was made from.
    pub model: String,
    /// The commit or fingerprint of that.
    pub version: String,
    /// The scheme of its decoder's matrices.
    pub format: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// When it was opened last.
    pub last_used: SystemTime,
    /// Whether it is finished; what an interrupted run left can only be removed or finished.
    pub whole: bool,
    /// The model's folder.
    pub path: PathBuf,
}

/// A snapshot of the Hub that was used by this program.
#[derive(Debug, Clone)]
pub struct UsedSnapshot {
    /// The snapshot, in the Hub's cache.
    pub snapshot: CachedSnapshot,
    /// When it was opened last.
    pub last_used: SystemTime,
}

/// Compiled kernels of a GPU.
#[derive(Debug, Clone)]
pub struct CompiledKernels {
    /// The name of their file.
    pub id: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// When they were written.
    pub written: SystemTime,
    /// Their file.
    pub path: PathBuf,
}

/// entry.json.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Entry {
    model: String,
    version: String,
    revision: Option<String>,
    format: String,
    /// All that decides about the result besides model and version.
    recipe: String,
}

impl Entry {
    fn new(origin: &Origin, recipe: &Recipe) -> Self {
        let Origin { model, version, revision } = origin.clone();
        let format = recipe.linears.to_string();
        Self { model, version, revision, format, recipe: recipe.fingerprint(ExportLayout::MetalMarlin) }
    }

    /// A name that tells people what it is, and programs everything.
    fn id(&self) -> String {
        let Self { model, version, format, recipe, .. } = self;
        let hash = hub::hex(&Sha256::digest(format!("{model}\n{version}\n{recipe}")));
        let name = model.rsplit('/').next().unwrap_or_default();
        let words = format!("{name}-{format}").replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-");
        format!("{}-{}", words.trim_matches(['-', '.']), &hash[..12])
    }
}

/// The cache.
#[derive(Debug, Clone)]
pub struct ModelCache {
    folder: PathBuf,
}

impl ModelCache {
    /// `METAL_MARLIN_CACHE`, or `metal-marlin` where this system keeps caches: `$XDG_CACHE_HOME`, `~/.cache`, on a Mac
    /// `~/Library/Caches`.
    ///
    /// # Errors
    /// There is no home folder.
    pub fn from_env() -> Result<Self, CacheError> {
        let named = std::env::var_os("METAL_MARLIN_CACHE").filter(|value| !value.is_empty()).map(PathBuf::from);
        let usual = || Some(dirs::cache_dir()?.join("metal-marlin"));
        let folder = named.or_else(usual).ok_or(CacheError::NoHome)?;
        let folder = std::path::absolute(&folder).map_err(CacheError::io("resolve", &folder))?;
        Ok(Self { folder })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes of everything in it.
    pub fn bytes(&self) -> u64 {
        hub::bytes_of(&self.folder)
    }

    /// The folder of `origin` quantised by `recipe`: at once if it is there, otherwise made from what `open` opens.
    /// Of processes that want the same, one makes it and the others wait. An interrupted one is finished by the next.
    ///
    /// # Errors
    /// What `open` fails with, the model cannot be quantised, or the cache cannot be written.
    pub fn quantized<E: From<CacheError>>(
        &self,
        origin: &Origin,
        recipe: &Recipe,
        open: impl FnOnce() -> Result<Checkpoint, E>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<PathBuf, E> {
        let entry = Entry::new(origin, recipe);
        let id = entry.id();
        let folder = self.quantized_folder().join(&id);
        let (model, description) = (folder.join("model"), folder.join(ENTRY_FILE));
        if !model.is_dir() {
            let _lock = self.lock(&id)?;
            // Another process may have made it meanwhile.
            if !model.is_dir() {
                let source = open()?;
                write_entry(&description, &entry)?;
                quantize_to(&source, &model, recipe, progress).inspect_err(|_| {
                    // What was not even begun is no entry.
                    if !folder.join("model.partial").exists() {
                        let _ = fs::remove_dir_all(&folder);
                    }
                })?;
            }
        }
        touch(&description);
        Ok(model)
    }

    /// The folder of a model of the Hub quantised by `recipe` when this revision was last looked up, which needs nothing of
    /// the original: it may have been removed since.
    pub fn find(&self, id: &HubId, revision: &str, recipe: &Recipe) -> Option<PathBuf> {
        let recipe = recipe.fingerprint(ExportLayout::MetalMarlin);
        let folders = names(&self.quantized_folder()).ok()?.into_iter().map(|id| self.quantized_folder().join(id));
        let is_it = |folder: &PathBuf| {
            read_entry(folder).is_some_and(|entry| {
                let same_revision = entry.version == revision || entry.revision.as_deref() == Some(revision);
                same_revision
                    && entry.model == id.to_string()
                    && entry.recipe == recipe
                    && folder.join("model").is_dir()
            })
        };
        // Of several commits that a branch was at, the one used last.
        let folder = folders.filter(is_it).max_by_key(|folder| modified(&folder.join(ENTRY_FILE)))?;
        touch(&folder.join(ENTRY_FILE));
        Some(folder.join("model"))
    }

    /// Notes that a snapshot of the Hub was used. A cache that cannot be written keeps no notes; the snapshot is used all the
    /// same.
    pub fn note_use(&self, snapshot: &Snapshot) {
        let path = self.use_of(&snapshot.id, &snapshot.commit);
        if fs::create_dir_all(self.uses_folder()).is_ok() && File::create(&path).is_ok() {
            touch(&path);
        }
    }

    /// The quantised models, by name.
    ///
    /// # Errors
    /// The cache cannot be read.
    pub fn models(&self) -> Result<Vec<QuantizedModel>, CacheError> {
        let mut models = Vec::new();
        for id in names(&self.quantized_folder())? {
            let folder = self.quantized_folder().join(&id);
            // What has no description was not put there by this program.
            let Some(Entry { model, version, format, .. }) = read_entry(&folder) else { continue };
            let path = folder.join("model");
            let (bytes, whole, last_used) = (hub::bytes_of(&folder), path.is_dir(), modified(&folder.join(ENTRY_FILE)));
            models.push(QuantizedModel { id, model, version, format, bytes, last_used, whole, path });
        }
        models.sort_by(|a, b| (&a.model, &a.format, &a.id).cmp(&(&b.model, &b.format, &b.id)));
        Ok(models)
    }

    /// The snapshots of the Hub that were used and are still there, by name.
    ///
    /// # Errors
    /// A cache cannot be read.
    pub fn snapshots(&self, hub: &HubCache) -> Result<Vec<UsedSnapshot>, CacheError> {
        let mut snapshots = Vec::new();
        for name in names(&self.uses_folder())? {
            let Some((id, commit)) = name.split_once('@') else { continue };
            let Some(id) = HubId::of_file_name(id) else { continue };
            if let Some(snapshot) = hub.find(&id, commit)? {
                snapshots.push(UsedSnapshot { snapshot, last_used: modified(&self.uses_folder().join(&name)) });
            }
        }
        Ok(snapshots)
    }

    /// Where GPUs keep their kernels ([`GpuOptions::pipeline_cache`](marlin_kernels::gpu::GpuOptions::pipeline_cache)).
    pub fn kernels_folder(&self) -> PathBuf {
        self.folder.join("kernels")
    }

    /// The compiled kernels of each GPU, by name.
    ///
    /// # Errors
    /// The cache cannot be read.
    pub fn kernels(&self) -> Result<Vec<CompiledKernels>, CacheError> {
        let folder = self.kernels_folder();
        let mut ids = names(&folder)?;
        ids.retain(|id| Path::new(id).extension().is_some_and(|extension| extension == PIPELINE_CACHE_EXTENSION));
        let file = |id: String| {
            let path = folder.join(&id);
            let bytes = fs::metadata(&path).map_or(0, |found| found.len());
            CompiledKernels { id, bytes, written: modified(&path), path }
        };
        Ok(ids.into_iter().map(file).collect())
    }

    /// Removes compiled kernels. A program that uses them goes on.
    ///
    /// # Errors
    /// They cannot be removed.
    pub fn remove_kernels(&self, kernels: &CompiledKernels) -> Result<(), CacheError> {
        fs::remove_file(&kernels.path).map_err(CacheError::io("remove", &kernels.path))
    }

    /// Removes a quantised model.
    ///
    /// # Errors
    /// Another process makes it at this moment, or it cannot be removed.
    pub fn remove_model(&self, model: &QuantizedModel) -> Result<(), CacheError> {
        let folder = self.quantized_folder().join(&model.id);
        let lock = self.open_lock(&model.id)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(CacheError::Busy { id: model.id.clone() }),
            Err(TryLockError::Error(e)) => return Err(CacheError::io("lock", &folder)(e)),
        }
        // Cut short between the two, this leaves an entry that is listed and can be removed again.
        for part in ["model", "model.partial"].map(|part| folder.join(part)) {
            match fs::remove_dir_all(&part) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(CacheError::io("remove", &part)(e)),
                _ => {}
            }
        }
        fs::remove_dir_all(&folder).map_err(CacheError::io("remove", &folder))
    }

    /// Removes a snapshot from the Hub's cache.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove_snapshot(&self, hub: &HubCache, used: &UsedSnapshot) -> Result<(), CacheError> {
        hub.remove(&used.snapshot)?;
        let path = self.use_of(&used.snapshot.id, &used.snapshot.commit);
        fs::remove_file(&path).map_err(CacheError::io("remove", &path))
    }

    fn quantized_folder(&self) -> PathBuf {
        self.folder.join("quantized")
    }

    fn uses_folder(&self) -> PathBuf {
        self.folder.join("hub")
    }

    fn use_of(&self, id: &HubId, commit: &str) -> PathBuf {
        self.uses_folder().join(format!("{}@{commit}", id.file_name()))
    }

    /// Waits until no other process makes or removes the entry.
    fn lock(&self, id: &str) -> Result<File, CacheError> {
        let lock = self.open_lock(id)?;
        lock.lock().map_err(CacheError::io("lock", &self.lock_path(id)))?;
        Ok(lock)
    }

    /// Locks are never removed: a process that waits for one must not end up with a file that others no longer see.
    pub(crate) fn open_lock(&self, id: &str) -> Result<File, CacheError> {
        let path = self.lock_path(id);
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder).map_err(CacheError::io("create", folder))?;
        File::create(&path).map_err(CacheError::io("create", &path))
    }

    pub(crate) fn lock_path(&self, id: &str) -> PathBuf {
        self.folder.join("locks").join(id)
    }
}

/// Quantises on the current thread pool, going on after an interrupted run.
pub(crate) fn quantize_to(
    source: &Checkpoint,
    out: &Path,
    recipe: &Recipe,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), CacheError> {
    let mut progress = |now: marlin_quantize::Progress<'_>| progress(now.done, now.total);
    let options = QuantizeOptions { force: true, progress: Some(&mut progress), ..QuantizeOptions::default() };
    let error = |e| CacheError::Quantize { model: source.name().to_owned(), source: Box::new(e) };
    quantize(source, out, recipe, options).map(|_| ()).map_err(error)
}

fn read_entry(folder: &Path) -> Option<Entry> {
    serde_json::from_slice(&fs::read(folder.join(ENTRY_FILE)).ok()?).ok()
}

/// Writes the description of an entry beside its place and renames it.
fn write_entry(path: &Path, entry: &Entry) -> Result<(), CacheError> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(CacheError::io("create", folder))?;
    let bytes = serde_json::to_vec_pretty(entry).map_err(|e| CacheError::io("write", path)(e.into()))?;
    let beside = path.with_extension("new");
    let written = File::create(&beside).and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()));
    written.and_then(|()| fs::rename(&beside, path)).map_err(CacheError::io("write", path))
}

/// Sets a file's modification time to now. Where that is not allowed, the time of last use stays what it was.
pub(crate) fn touch(path: &Path) {
    let _ = File::options().append(true).open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

pub(crate) fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).and_then(|found| found.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Names in a folder, sorted; none if it does not exist.
pub(crate) fn names(folder: &Path) -> Result<Vec<String>, CacheError> {
    Ok(hub::entries(folder)?)
}
