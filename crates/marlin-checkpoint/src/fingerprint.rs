//! What tells one state of a model from another, without reading its weights.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::SystemTime;

use crate::Checkpoint;
use crate::source::Source;

/// Bytes at the beginning of each stored buffer that count.
const SAMPLE: usize = 256;

impl Checkpoint {
    /// Tells states of a model folder or GGUF file apart: by config.json, by header, size and time of change of each weight file, and by the first
    /// bytes of each tensor. `None` for a model that is neither.
    ///
    /// A page or two are read of each tensor. A change that keeps size and time of a file and the beginnings of all its tensors, which
    /// takes intent, goes unnoticed.
    pub fn fingerprint(&self) -> Option<String> {
        if !matches!(self.source, Source::Folder(_) | Source::Gguf { .. }) {
            return None;
        }
        let mut hasher = DefaultHasher::new();
        self.config.to_string().hash(&mut hasher);
        for shard in &self.shards {
            let changed = shard.bytes.changed().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
            (shard.bytes.len(), changed, shard.header()).hash(&mut hasher);
        }
        for name in self.tensor_names() {
            name.hash(&mut hasher);
            for location in self.locations(name) {
                let bytes = self.shards[location.shard].tensor(&location.range);
                bytes[..bytes.len().min(SAMPLE)].hash(&mut hasher);
            }
        }
        self.release_all();
        Some(format!("{:016x}", hasher.finish()))
    }
}
