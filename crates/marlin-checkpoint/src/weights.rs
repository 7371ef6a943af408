//! The weight files of a checkpoint.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Deserialize;

use crate::CheckpointError;
use crate::shard::{Location, Shard};
use crate::source::{Bytes, Source};

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

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
    let index: Option<Index> = if let Some(bytes) = source.map(SINGLE_FILE)? {
        add(SINGLE_FILE, bytes)?;
        None
    } else {
        let index: Index = source.json(INDEX_FILE)?.ok_or_else(|| no_weights(source))?;
        let files: BTreeSet<&String> = index.weight_map.values().collect();
        for file in files {
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
    // An index must not reach outside its folder.
    if file.contains(['/', '\\']) || !file.ends_with(".safetensors") {
        let problem = format!("`{file}` is not the name of a safetensors file in the same folder");
        return Err(CheckpointError::malformed(&source.label(INDEX_FILE), problem));
    }
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

fn no_weights(source: &Source) -> CheckpointError {
    let other = match source {
        Source::Folder(folder) => std::fs::read_dir(folder)
            .ok()
            .and_then(|entries| {
                entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).find(|name| {
                    let extension = name.rsplit_once('.').map_or("", |(_, e)| e);
                    matches!(extension, "bin" | "gguf" | "pt" | "pth")
                })
            })
            .map(|name| format!(" (`{name}` is a format that is not read)")),
        Source::Static { .. } | Source::Memory { .. } => None,
    };
    CheckpointError::MissingFile {
        file: source.label(SINGLE_FILE),
        hint: format!(
            "neither it nor {INDEX_FILE} is there{}; the weights must be in safetensors format",
            other.unwrap_or_default()
        ),
    }
}
