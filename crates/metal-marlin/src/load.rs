//! From a path to a model that runs.

use std::path::{Path, PathBuf};

use marlin_checkpoint::{Checkpoint, CheckpointError};
use marlin_kernels::{KernelError, cpu::CpuBackend};
use marlin_model::{LanguageModel, LoadOptions, ModelError};

use crate::DeviceOptions;

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No model was named and none is built in.
    #[error(
        "no MODEL given, and this program was built without a bundled model (feature `bundled-model`); \
         name a model folder"
    )]
    NoModel,
    /// There is no such folder.
    #[error(
        "there is no model folder at {path}; looked for a folder with config.json, tokenizer.json and *.safetensors",
        path = path.display()
    )]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The folder cannot be used.
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

/// Opens the checkpoint in the folder `model`, or the bundled one if there is no `model`.
pub fn open_checkpoint(model: Option<&Path>) -> Result<Checkpoint, LoadError> {
    let Some(path) = model else { return open_bundled() };
    if !path.is_dir() {
        return Err(LoadError::NotFound { path: path.to_owned() });
    }
    Checkpoint::open(path).map_err(|source| LoadError::checkpoint(&path.display().to_string(), source))
}

/// The longest context that config.json allows; `None` if it does not say, which loading the model then refuses.
pub fn allowed_context(checkpoint: &Checkpoint) -> Option<usize> {
    checkpoint.config()["max_position_embeddings"].as_u64().and_then(|n| usize::try_from(n).ok())
}

/// Loads a checkpoint's model onto the device: its weights are put into the device's own order here, once.
pub fn load_model(
    checkpoint: &Checkpoint,
    device: &DeviceOptions,
    options: &LoadOptions,
) -> Result<Box<dyn LanguageModel>, LoadError> {
    let backend = CpuBackend::new(device.cpu()).map_err(LoadError::Device)?;
    marlin_model::load_model(&backend, checkpoint, options).map_err(LoadError::Model)
}

#[cfg(feature = "bundled-model")]
fn open_bundled() -> Result<Checkpoint, LoadError> {
    crate::bundled::open().map_err(|source| LoadError::checkpoint(crate::bundled::NAME, source))
}

#[cfg(not(feature = "bundled-model"))]
fn open_bundled() -> Result<Checkpoint, LoadError> {
    Err(LoadError::NoModel)
}
