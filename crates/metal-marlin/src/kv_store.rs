//! Where blocks of the KV cache outlive the process, and what they depend on.

use std::path::PathBuf;

use marlin_checkpoint::{Checkpoint, CheckpointError};
use marlin_engine::{BlockStore, BlockStoreOptions, StoreError};
use sha2::{Digest, Sha256};

use crate::device::Device;
use crate::doctor::chain;
use crate::hub::hex;

/// Files by which a text becomes tokens.
const TOKENIZER_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub enum KvStoreError {
    /// The model has no files that tell it from others.
    #[error(
        "{model} is no folder or file, and nothing tells what is kept for it from what is kept for others; leave --kv-cache-dir out"
    )]
    NoFiles {
        /// The model.
        model: String,
    },
    /// The model's files cannot be read.
    #[error("cannot tell the model from others, for what is kept of its KV cache")]
    Model(#[from] CheckpointError),
    /// The folder cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Opens a folder for what a model on this device leaves in its KV cache; what later goes wrong is said on standard error.
///
/// # Errors
/// The model cannot be told from others, or the folder cannot be made, read or written.
pub fn open_kv_store(
    folder: PathBuf,
    max_bytes: u64,
    checkpoint: &Checkpoint,
    device: &Device,
) -> Result<BlockStore, KvStoreError> {
    let version = env!("CARGO_PKG_VERSION");
    let fingerprint = format!("metal-marlin {version}, {}, {}", model_fingerprint(checkpoint)?, device.numerics());
    let report = |error: &StoreError| eprintln!("warning: {}", chain(error));
    Ok(BlockStore::open(BlockStoreOptions { folder, max_bytes, fingerprint, report })?)
}

/// Tells the state of a model, weights and tokenizer, from all others. The weights of a folder or GGUF file are told as
/// [`Checkpoint::fingerprint`] does; those inside the program by every byte.
fn model_fingerprint(checkpoint: &Checkpoint) -> Result<String, KvStoreError> {
    let mut hash = Sha256::new();
    let mut part = |name: &str, bytes: &[u8]| {
        // With lengths, no part can pass for the end of another.
        for bytes in [name.as_bytes(), bytes] {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
    };
    part("config", checkpoint.config().to_string().as_bytes());
    match checkpoint.fingerprint() {
        Some(fingerprint) => part("weights", fingerprint.as_bytes()),
        None => {
            let weights = checkpoint.file("model.safetensors")?;
            let model = checkpoint.name();
            let weights = weights.ok_or_else(|| KvStoreError::NoFiles { model: model.to_owned() })?;
            part("weights", &weights);
        }
    }
    for name in TOKENIZER_FILES {
        if let Some(file) = checkpoint.file(name)? {
            part(name, &file);
        }
    }
    Ok(format!("model {}", hex(&hash.finalize())))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;

    use super::*;

    /// The fingerprint of the folder after a change, which leaves times as they were.
    fn after(folder: &Path, file: &str, change: impl Fn(&mut Vec<u8>)) -> String {
        let path = folder.join(file);
        let (before, time) = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap());
        let write = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        };
        let mut changed = before.clone();
        change(&mut changed);
        write(&changed);
        let found = model_fingerprint(&Checkpoint::open(folder).unwrap()).unwrap();
        write(&before);
        found
    }

    #[test]
    fn models_and_tokenizers_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/model"));
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
            fs::copy(source.join(file), folder.path().join(file)).unwrap();
        }
        let same = after(folder.path(), "config.json", |_| ());
        assert_eq!(after(folder.path(), "tokenizer.json", |_| ()), same);
        let space = |bytes: &mut Vec<u8>| bytes.push(b' ');
        assert_ne!(after(folder.path(), "tokenizer.json", space), same);
        assert_ne!(after(folder.path(), "tokenizer_config.json", space), same);
        let theta = |bytes: &mut Vec<u8>| {
            let end = bytes.iter().rposition(|&byte| byte == b'}').unwrap();
            bytes.splice(end..end, *b", \"rope_theta_of_another\": 1");
        };
        assert_ne!(after(folder.path(), "config.json", theta), same);
        // The last tensor's first byte.
        let weight = |bytes: &mut Vec<u8>| {
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[8 + header] ^= 1;
        };
        assert_ne!(after(folder.path(), "model.safetensors", weight), same);
        // Of training that changed all weights somewhere, the time tells.
        let path = folder.path().join("model.safetensors");
        File::options().write(true).open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_ne!(after(folder.path(), "config.json", |_| ()), same);
    }

    #[cfg(feature = "bundled-model")]
    #[test]
    fn the_model_inside_the_program_is_told_by_its_bytes() {
        let bundled = || model_fingerprint(&crate::load::open_checkpoint(None).unwrap()).unwrap();
        assert_eq!(bundled(), bundled());
    }
}
