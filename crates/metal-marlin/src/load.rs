//! From what a person calls a model to a model that runs.

use std::path::{Path, PathBuf};

use marlin_checkpoint::{Checkpoint, CheckpointError};
use marlin_kernels::KernelError;
use marlin_model::{LanguageModel, LoadOptions, ModelError};
use marlin_quantize::{QuantizeError, Recipe, source_fingerprint};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::device::Device;
use crate::hub::{self, Hub, HubError, HubId};
use crate::model_cache::{self, CacheError, ModelCache, Origin};

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No model was named and none is built in.
    #[error(
        "no MODEL given, and this program was built without a bundled model (feature `bundled-model`); \
         name a model folder, a GGUF file or a model of the Hugging Face Hub"
    )]
    NoModel,
    /// There is no such folder or file, and it is no name on the Hub.
    #[error(
        "there is no model folder or GGUF file at {path} (a folder has config.json, tokenizer.json and *.safetensors), and \
         that is no name on the Hugging Face Hub, such as Qwen/Qwen3-4B, either",
        path = path.display()
    )]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A revision of something that has none.
    #[error("--revision {revision} chooses a version of a model on the Hub; {model} is on this machine")]
    NoRevisions {
        /// The folder or file, or the bundled model.
        model: String,
        /// What was asked for.
        revision: String,
    },
    /// It cannot be had from the Hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The cache of quantised models cannot be used, or the model cannot be quantised into it.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The model cannot be quantised.
    #[error(transparent)]
    Quantize(Box<QuantizeError>),
    /// The folder or file cannot be used.
    #[error("cannot open the model {name}")]
    Checkpoint {
        /// Its path, or the bundled model's name.
        name: String,
        /// What is wrong with it.
        source: Box<CheckpointError>,
    },
    /// The device cannot be used.
    #[error("cannot use the device")]
    Device(#[source] KernelError),
    /// The model takes more memory than there is.
    #[error(transparent)]
    DoesNotFit(crate::memory::DoesNotFit),
    /// The model does not load.
    #[error("cannot load the model")]
    Model(#[source] ModelError),
}

impl LoadError {
    fn checkpoint(name: &str, source: CheckpointError) -> Self {
        Self::Checkpoint { name: name.to_owned(), source: Box::new(source) }
    }
}

/// How to open a model.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions<'a> {
    /// Branch, tag or commit of a model on the Hub; its branch `main` if there is none.
    pub revision: Option<&'a str>,
    /// Quantise it by this recipe, if it is not done yet.
    pub recipe: Option<&'a Recipe>,
    /// Quantise into this folder, which does not exist yet, instead of into the [`ModelCache`].
    pub out: Option<&'a Path>,
}

/// What takes its time while a model is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its files come from the Hub.
    Fetching,
    /// It is quantised.
    Quantizing,
}

/// Told how many bytes of how many are done.
pub type Progress<'a> = dyn FnMut(Stage, u64, u64) + 'a;

/// Whether a command means the model inside the binary; a folder of that name is `./bundled`.
pub fn is_bundled(model: &Path) -> bool {
    model == Path::new("bundled")
}

/// Whether this would be fetched from the Hub: it has the form `owner/name`, and is neither here nor meant to be a file.
pub fn hub_id(model: &Path) -> Option<HubId> {
    let is_file = model.extension().is_some_and(|extension| extension == "gguf");
    if is_file || model.exists() { None } else { HubId::parse(model.to_str()?) }
}

/// Opens the checkpoint in the folder or file `model`, or the bundled one if there is no `model`.
pub fn open_checkpoint(model: Option<&Path>) -> Result<Checkpoint, LoadError> {
    let Some(path) = model else { return open_bundled() };
    if !path.exists() {
        return Err(LoadError::NotFound { path: path.to_owned() });
    }
    Checkpoint::open(path).map_err(|source| LoadError::checkpoint(&path.display().to_string(), source))
}

/// Opens what a person calls a model: the bundled one (`bundled`, or nothing), a folder, a GGUF file, or a model on the Hub, which is fetched
/// unless the Hub's cache has it. With a recipe it is quantised, once: the result is kept in the [`ModelCache`].
///
/// # Errors
/// There is no such model, or it cannot be fetched, opened, quantised or kept.
pub fn open(
    model: Option<&Path>,
    options: &OpenOptions<'_>,
    progress: &mut Progress<'_>,
) -> Result<Checkpoint, LoadError> {
    let model = model.filter(|model| !is_bundled(model));
    if let Some(id) = model.and_then(hub_id) {
        return open_from_hub(&id, options, progress);
    }
    let checkpoint = open_checkpoint(model)?;
    if let Some(revision) = options.revision {
        return Err(LoadError::NoRevisions { model: checkpoint.name().to_owned(), revision: revision.to_owned() });
    }
    let Some(recipe) = options.recipe else { return Ok(checkpoint) };
    let name = checkpoint.name().to_owned();
    // A folder or file has the same entry however it is named.
    let path = checkpoint.path().and_then(|path| path.canonicalize().ok());
    let fingerprint = source_fingerprint(&checkpoint).map_err(|error| LoadError::Quantize(Box::new(error)))?;
    let origin = Origin {
        version: path
            .as_deref()
            .map_or_else(|| fingerprint.clone(), |path| format!("{fingerprint}-{}", state_of(path))),
        model: path.map_or_else(|| name.clone(), |path| path.display().to_string()),
        revision: None,
    };
    quantized(&name, &origin, recipe, options.out, || Ok(checkpoint), progress)
}

/// Tells states of a folder apart by its files' names, sizes and times of change, and those of a file alike: what was made from one
/// state does not stand for another, be it that only the chat template was edited.
fn state_of(path: &Path) -> String {
    let paths = match std::fs::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => vec![path.to_owned()],
    };
    let state = |path: PathBuf| {
        let metadata = std::fs::metadata(&path).ok()?;
        Some(format!("{:?} {} {:?}\n", path.file_name()?, metadata.len(), metadata.modified().ok()))
    };
    let mut files: Vec<String> = paths.into_iter().filter_map(state).collect();
    files.sort();
    hub::hex(&Sha256::digest(files.concat())[..8])
}

/// Opens a model of which only config and headers are wanted. Of one on the Hub that the cache lacks no more than that is
/// fetched, into the temporary folder that comes with it; its weights read as zeros.
///
/// # Errors
/// As for [`open`].
pub fn open_headers(
    model: Option<&Path>,
    revision: Option<&str>,
    progress: &mut Progress<'_>,
) -> Result<(Checkpoint, Option<TempDir>), LoadError> {
    if let Some(id) = model.filter(|model| !is_bundled(model)).and_then(hub_id) {
        let hub = Hub::from_env()?;
        if hub.cached(&id, revision.unwrap_or(hub::DEFAULT_REVISION)).is_err()
            && let Some(folder) =
                hub.headers(&id, revision, &mut |done, total| progress(Stage::Fetching, done, total))?
        {
            let checkpoint = open_checkpoint(Some(folder.path()))?.with_name(hub_name(&id, revision));
            return Ok((checkpoint, Some(folder)));
        }
    }
    Ok((open(model, &OpenOptions { revision, ..OpenOptions::default() }, progress)?, None))
}

/// What a model of the Hub is called in messages.
fn hub_name(id: &HubId, revision: Option<&str>) -> String {
    revision.map_or_else(|| id.to_string(), |revision| format!("{id}@{revision}"))
}

fn open_from_hub(id: &HubId, options: &OpenOptions<'_>, progress: &mut Progress<'_>) -> Result<Checkpoint, LoadError> {
    let hub = Hub::from_env()?;
    let revision = options.revision.unwrap_or(hub::DEFAULT_REVISION);
    let name = hub_name(id, options.revision);
    if let (Some(recipe), None, Err(_)) = (options.recipe, options.out, hub.cached(id, revision)) {
        // Whoever has the quantised model may have removed the original.
        if let Some(folder) = ModelCache::from_env()?.find(id, revision, recipe) {
            return open_quantized(&folder, &name, recipe);
        }
    }
    let snapshot = hub.snapshot(id, options.revision, &mut |done, total| progress(Stage::Fetching, done, total))?;
    if let Ok(cache) = ModelCache::from_env() {
        cache.note_use(&snapshot);
    }
    let open = || Ok(open_checkpoint(Some(&snapshot.folder))?.with_name(&name));
    let Some(recipe) = options.recipe else { return open() };
    let origin =
        Origin { model: id.to_string(), version: snapshot.commit.clone(), revision: Some(revision.to_owned()) };
    quantized(&name, &origin, recipe, options.out, open, progress)
}

/// The model quantised by a recipe, in `out` or in the cache.
fn quantized(
    name: &str,
    origin: &Origin,
    recipe: &Recipe,
    out: Option<&Path>,
    open: impl FnOnce() -> Result<Checkpoint, LoadError>,
    progress: &mut Progress<'_>,
) -> Result<Checkpoint, LoadError> {
    let mut progress = |done, total| progress(Stage::Quantizing, done, total);
    match out {
        Some(out) => {
            model_cache::quantize_to(&open()?, out, recipe, &mut progress)?;
            open_quantized(out, name, recipe)
        }
        None => {
            let folder = ModelCache::from_env()?.quantized(origin, recipe, open, &mut progress)?;
            open_quantized(&folder, name, recipe)
        }
    }
}

fn open_quantized(folder: &Path, name: &str, recipe: &Recipe) -> Result<Checkpoint, LoadError> {
    Ok(open_checkpoint(Some(folder))?.with_name(format!("{name} in {}", recipe.linears)))
}

/// The longest context that config.json allows; `None` if it does not say, which loading the model then refuses.
pub fn allowed_context(checkpoint: &Checkpoint) -> Option<usize> {
    checkpoint.config()["max_position_embeddings"].as_u64().and_then(|n| usize::try_from(n).ok())
}

/// Loads a checkpoint's model onto the device: its weights are put into the device's own order here, once.
pub fn load_model(
    checkpoint: &Checkpoint,
    device: &Device,
    options: &LoadOptions,
) -> Result<Box<dyn LanguageModel>, LoadError> {
    device.load(checkpoint, options, None).map_err(LoadError::Model)
}

#[cfg(feature = "bundled-model")]
fn open_bundled() -> Result<Checkpoint, LoadError> {
    crate::bundled::open().map_err(|source| LoadError::checkpoint(crate::bundled::NAME, source))
}

#[cfg(not(feature = "bundled-model"))]
fn open_bundled() -> Result<Checkpoint, LoadError> {
    Err(LoadError::NoModel)
}
