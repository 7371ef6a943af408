//! The weight files of a checkpoint.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::CheckpointError;
use crate::gguf;
use crate::shard::{Location, Shard};
use crate::source::{Bytes, Source};

/// All tensors of a model that has one weight file.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Names the weight files of a model that has several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// All weight files.
pub(crate) struct Weights {
    pub(crate) shards: Vec<Shard>,
    /// Every stored tensor, in the order of the files and of the bytes in them.
    pub(crate) tensors: Vec<(String, Location)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// The files it names; `label` is its own name in messages.
    fn shards(&self, label: &str) -> Result<BTreeSet<&str>, CheckpointError> {
        let files: BTreeSet<&str> = self.weight_map.values().map(String::as_str).collect();
        // An index must not reach outside its folder.
        match files.iter().find(|file| file.contains(['/', '\\']) || !file.ends_with(".safetensors")) {
            None => Ok(files),
            Some(file) => {
                let problem = format!("`{file}` is not the name of a safetensors file in the same folder");
                Err(CheckpointError::malformed(label, problem))
            }
        }
    }
}

/// The weight files that an index ([`INDEX_FILE`]) names, given its content. `label` is its name in messages.
///
/// # Errors
/// It is no index, or names files outside its folder.
pub fn shards_of_index(index: &[u8], label: &str) -> Result<BTreeSet<String>, CheckpointError> {
    let index: Index =
        serde_json::from_slice(index).map_err(|source| CheckpointError::Json { file: label.to_owned(), source })?;
    Ok(index.shards(label)?.into_iter().map(str::to_owned).collect())
}

/// Maps all shards.
///
/// A tensor stored twice, a shard that is missing, and an index that names a tensor its shard lacks are errors.
pub(crate) fn load(source: &Source) -> Result<Weights, CheckpointError> {
    let mut shards = Vec::new();
    let mut tensors: Vec<(String, Location)> = Vec::new();
    let mut add = |file: &str, bytes| {
        let (shard, mut found) = Shard::parse(source.label(file), bytes, shards.len())?;
        shards.push(shard);
        tensors.append(&mut found);
        Ok(())
    };

    // The order of `transformers`: the single file wins over an index beside it.
    let index: Option<Index> = if let Some(bytes) = source.map(WEIGHTS_FILE)? {
        add(WEIGHTS_FILE, bytes)?;
        None
    } else {
        let index: Index = source.json(INDEX_FILE)?.ok_or_else(|| no_weights(source))?;
        for file in index.shards(&source.label(INDEX_FILE))? {
            add(file, map_shard(source, file)?)?;
        }
        Some(index)
    };

    let mut by_name: HashMap<&str, &Location> = HashMap::with_capacity(tensors.len());
    for (name, location) in &tensors {
        if let Some(first) = by_name.insert(name, location) {
            let problem = format!("tensor `{name}` is also in {}", shards[first.shard].label);
            return Err(CheckpointError::malformed(&shards[location.shard].label, problem));
        }
    }
    if let Some(index) = &index {
        check_index(source, index, &shards, &by_name)?;
    }
    Ok(Weights { shards, tensors })
}

fn map_shard(source: &Source, file: &str) -> Result<Bytes, CheckpointError> {
    source.map(file)?.ok_or_else(|| CheckpointError::MissingFile {
        file: source.label(file),
        hint: format!("{INDEX_FILE} names it; the download is incomplete, fetch the missing file"),
    })
}

fn check_index(
    source: &Source,
    index: &Index,
    shards: &[Shard],
    by_name: &HashMap<&str, &Location>,
) -> Result<(), CheckpointError> {
    for (name, file) in &index.weight_map {
        let wanted = source.label(file);
        let found = by_name.get(name.as_str()).map(|location| &shards[location.shard].label);
        if found == Some(&wanted) {
            continue;
        }
        let elsewhere = found.map_or("no file has it".to_owned(), |found| format!("it is in {found}"));
        let problem = format!(
            "tensor `{name}` should be in {wanted}, but {elsewhere}; the folder mixes files of different checkpoints"
        );
        return Err(CheckpointError::malformed(&source.label(INDEX_FILE), problem));
    }
    Ok(())
}

/// The GGUF file of a folder that has no other weights; `None` if it has none.
///
/// # Errors
/// There are several, of which one must be chosen.
pub(crate) fn only_gguf(folder: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    if [WEIGHTS_FILE, INDEX_FILE].iter().any(|name| folder.join(name).exists()) {
        return Ok(None);
    }
    let entries = std::fs::read_dir(folder).map_err(CheckpointError::io("read", folder))?;
    let is_gguf = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "gguf");
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_gguf).collect();
    files.sort();
    match files.as_slice() {
        [] | [_] => Ok(files.pop()),
        [first, ..] if gguf::are_of_one_model(&files) => Ok(Some(first.clone())),
        [first, second, ..] => {
            let count = files.len();
            let [first, second] = [first, second].map(|path| path.display());
            let problem = format!("it holds {count} GGUF files; give the path of one of them: {first}, {second} …");
            Err(CheckpointError::malformed(&folder.display().to_string(), problem))
        }
    }
}

fn no_weights(source: &Source) -> CheckpointError {
    let other = match source {
        Source::Folder(folder) => std::fs::read_dir(folder)
            .ok()
            .and_then(|entries| {
                entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).find(|name| {
                    let extension = name.rsplit_once('.').map_or("", |(_, e)| e);
                    matches!(extension, "bin" | "pt" | "pth")
                })
            })
            .map(|name| format!(" (`{name}` is a format that is not read)")),
        Source::Static { .. } | Source::Memory { .. } | Source::Gguf { .. } => None,
    };
    CheckpointError::MissingFile {
        file: source.label(WEIGHTS_FILE),
        hint: format!(
            "neither it nor {INDEX_FILE} is there{}; the weights must be in safetensors format, or one GGUF file",
            other.unwrap_or_default()
        ),
    }
}
