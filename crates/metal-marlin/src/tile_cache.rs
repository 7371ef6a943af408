//! Models in the order that a CPU reads their weights in, kept for the next start.
//!
//! ```text
//! CACHE/tiles/ID.tiles     the weights; its modification time is the last use
//! CACHE/tiles/ID.partial   the same, unfinished
//! CACHE/locks/ID           held by the process that makes it
//! ```

use std::fs::{self, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use marlin_checkpoint::Checkpoint;
use marlin_kernels::KernelError;
use marlin_kernels::cpu::{CpuBackend, TileFile, TileFileOptions};
use marlin_model::{ExpertLayers, LanguageModel, LoadOptions};
use sha2::{Digest, Sha256};

use crate::LoadError;
use crate::device::Device;
use crate::doctor::chain;
use crate::hub;
use crate::load::load_model;
use crate::model_cache::{CacheError, ModelCache, modified, names, touch};

/// Smaller models are put into order in a fraction of a second, which is not worth a second copy on disk.
const LEAST_BYTES: u64 = 256 << 20;
/// What is left free on the disk.
pub(crate) const MARGIN: u64 = 1 << 30;

const EXTENSION: &str = "tiles";
const PARTIAL_EXTENSION: &str = "partial";

/// The tiles of a model in the cache.
#[derive(Debug, Clone)]
pub struct KeptTiles {
    /// The name of their file without its extension.
    pub id: String,
    /// The folder of the model that they were made from; `None` for what is unfinished or of another version of this program.
    pub model: Option<PathBuf>,
    /// Bytes on disk.
    pub bytes: u64,
    /// When they were used last.
    pub last_used: SystemTime,
    /// Whether they are finished; what an interrupted run left is of no use.
    pub whole: bool,
    /// Their file.
    pub path: PathBuf,
}

/// Loads a model as [`load_model`] does. On a CPU, a model of 256 MiB or more that lies in a folder is mapped from the [`ModelCache`] if its
/// tiles are there, and they are put there if not, where the disk leaves a gibibyte free. So are experts that a GPU leaves to the CPU. Why
/// they cannot be is said on standard error.
///
/// # Errors
/// The model does not load.
pub fn load_model_kept(
    checkpoint: &Checkpoint,
    device: &Device,
    options: &LoadOptions,
) -> Result<Box<dyn LanguageModel>, LoadError> {
    let Some(cpu) = device.cpu().or(device.offload().map(|offload| &offload.host)) else {
        return load_model(checkpoint, device, options);
    };
    let file = ModelCache::from_env().and_then(|cache| cache.tile_file(cpu, device, checkpoint, options));
    let file = file.unwrap_or_else(|error| {
        warn(&error);
        None
    });
    let Some(file) = file.map(Arc::new) else { return load_model(checkpoint, device, options) };
    let model = device.load(checkpoint, options, Some(&file)).map_err(LoadError::Model)?;
    file.finish();
    Ok(model)
}

fn warn(error: &dyn std::error::Error) {
    eprintln!(
        "warning: this model is not kept for a faster start next time (--no-cache does not try): {}",
        chain(error)
    );
}

impl ModelCache {
    /// Where the tiles of each model are.
    pub fn tiles_folder(&self) -> PathBuf {
        self.folder().join("tiles")
    }

    /// The tiles of each model, by name.
    ///
    /// # Errors
    /// The cache cannot be read.
    pub fn tiles(&self) -> Result<Vec<KeptTiles>, CacheError> {
        let kept = |name: String| {
            let path = self.tiles_folder().join(name);
            let extension = path.extension()?;
            let whole = extension == EXTENSION;
            if !whole && extension != PARTIAL_EXTENSION {
                return None;
            }
            let bytes = fs::metadata(&path).map_or(0, |found| found.len());
            let (id, last_used) = (path.file_stem()?.to_string_lossy().into_owned(), modified(&path));
            Some(KeptTiles { id, model: TileFile::model_of(&path).map(PathBuf::from), bytes, last_used, whole, path })
        };
        Ok(names(&self.tiles_folder())?.into_iter().filter_map(kept).collect())
    }

    /// Removes tiles. A program that uses them goes on.
    ///
    /// # Errors
    /// Another process makes them at this moment, or they cannot be removed.
    pub fn remove_tiles(&self, tiles: &KeptTiles) -> Result<(), CacheError> {
        let lock = self.open_lock(&tiles.id)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(CacheError::Busy { id: tiles.id.clone() }),
            Err(TryLockError::Error(e)) => return Err(CacheError::io("lock", &tiles.path)(e)),
        }
        fs::remove_file(&tiles.path).map_err(CacheError::io("remove", &tiles.path))
    }

    /// The file of the tiles that a processor loads of a model, to read or to make; `None` for a model that none is kept of, and while
    /// another process makes it. Experts that are left to the processor have a file of their own, unless all of the model has one.
    fn tile_file(
        &self,
        cpu: &CpuBackend,
        device: &Device,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
    ) -> Result<Option<TileFile>, CacheError> {
        let path = checkpoint.path().and_then(|path| path.canonicalize().ok());
        let (Some(source), Some(fingerprint)) = (path, checkpoint.fingerprint()) else { return Ok(None) };
        // What is wrong with the model is for loading it to say.
        let Ok((plan, layers)) =
            device.planner(checkpoint).and_then(|planner| Ok((planner.plan(options)?, planner.host_layers())))
        else {
            return Ok(None);
        };
        let bytes = plan.host.map_or(plan.weights, |host| host.weights);
        if bytes < LEAST_BYTES {
            return Ok(None);
        }
        let layout = cpu.tile_layout()?;
        let file_of = |layers: Option<&ExpertLayers>| {
            let id = id(checkpoint.name(), &source, layers, &layout);
            let (path, lock) = (self.tiles_folder().join(format!("{id}.{EXTENSION}")), self.lock_path(&id));
            let (fingerprint, model) = (fingerprint.clone(), source.display().to_string());
            TileFileOptions { path, lock, fingerprint, model, report: |e| warn(e) }
        };
        if layers.is_some() {
            let whole = file_of(None);
            if let Some(file) = TileFile::open_stored(cpu, &whole)? {
                touch(&whole.path);
                return Ok(Some(file));
            }
        }
        let options = file_of(layers.as_ref());
        let path = options.path.clone();
        let file = TileFile::open(cpu, options)?;
        match &file {
            Some(file) if file.is_stored() => touch(&path),
            Some(_) => self.require_room(bytes)?,
            None => {}
        }
        Ok(file)
    }

    /// Refuses to fill the disk.
    fn require_room(&self, bytes: u64) -> Result<(), CacheError> {
        let folder = self.tiles_folder();
        match free_bytes(&folder).map_err(CacheError::io("look at", &folder))? {
            free if free.saturating_sub(MARGIN) < bytes => Err(CacheError::NoRoom { folder, bytes, free }),
            _ => Ok(()),
        }
    }
}

/// A name that tells people what it is, and programs everything but the state of the weights: what was made of an older one is replaced.
/// `layers` are those whose experts it holds, if it holds nothing else.
fn id(name: &str, source: &Path, layers: Option<&ExpertLayers>, layout: &str) -> String {
    let experts = layers.map_or_else(String::new, |layers| format!("\nexperts of layers {layers}"));
    let hash = hub::hex(&Sha256::digest(format!("{}\n{layout}{experts}", source.display())));
    let name = name.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let words = name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-");
    let part = if layers.is_some() { "-experts" } else { "" };
    format!("{}{part}-{}", words.trim_matches(['-', '.']), &hash[..12])
}

/// Bytes that a user may still write to the disk of a folder.
fn free_bytes(folder: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(folder)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

impl From<KernelError> for CacheError {
    fn from(source: KernelError) -> Self {
        Self::Tiles(source)
    }
}
