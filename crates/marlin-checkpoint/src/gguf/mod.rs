//! GGUF files, the format of llama.cpp (versions 2 and 3, little endian).
//!
//! A file is a header and the bytes of its tensors. The header: the magic number `GGUF`, a version, the number of
//! tensors and of entries of metadata; the metadata, a key, a type and a value each; of every tensor its name, its
//! dimensions, its [`GgufType`] and the offset of its bytes. After it everything is aligned to `general.alignment`
//! bytes, or 32 (docs/gguf.md of ggml).

mod block;
mod config;
mod cursor;
mod entry;
mod header;
mod model;
mod pre_tokenizer;
mod small_files;
mod split;
mod tokenizer;
mod types;
mod value;
mod vocabulary;
mod writer;

#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;
use std::path::Path;

use marlin_format::PackedMatrix;

pub use types::GgufType;
pub use value::{GgufArray, GgufValue, GgufValueType};
pub use writer::GgufWriter;
pub(crate) use writer::written_scheme;

use self::cursor::Cursor;
pub(crate) use self::entry::GgufEntry;
use self::header::Header;
pub(crate) use self::split::are_of_one_model;
use crate::layouts::Entry;
use crate::shard::Shard;
use crate::source::Bytes;
use crate::{CONFIG_FILE, CheckpointError, Tokenizer};

/// What to do about a file that contradicts itself.
const DAMAGED: &str = "the file is damaged, download or copy it again";

/// An opened GGUF file, or the several files that a model was split into. Tensors are mapped, not read.
pub struct Gguf {
    /// Never empty. The first holds the metadata.
    files: Vec<Shard>,
    /// That of the first file, with the tensors of all.
    header: Header,
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name in llama.cpp.
    pub name: String,
    /// Dimensions, outermost first: `[rows, cols]` of a matrix, of which files give the columns first.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub tensor_type: GgufType,
    /// Which of several files it is in.
    file: usize,
    /// In the file.
    range: Range<usize>,
}

impl Gguf {
    /// Opens a file and checks all of its header: that every value of the metadata and every byte of the tensors is
    /// there. Of a model in several files (`NAME-00001-of-00003.gguf`) any of them stands for all, which lie side by
    /// side. Files must not be changed while they are open.
    ///
    /// # Errors
    /// A file cannot be mapped, is no GGUF file of version 2 or 3, contradicts itself or others of the model, or holds a
    /// tensor of a type that is not read.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let given = Self::open_file(path, "give the path of a *.gguf file")?;
        split::open_all(given, path)
    }

    /// One file by itself.
    fn open_file(path: &Path, hint: &str) -> Result<Self, CheckpointError> {
        let label = path.display().to_string();
        let bytes = Bytes::map(path)?
            .ok_or_else(|| CheckpointError::MissingFile { file: label.clone(), hint: hint.to_owned() })?;
        bytes.refuse_lfs_pointer(&label)?;
        let header = Header::parse(&bytes).map_err(|problem| CheckpointError::malformed(&label, problem))?;
        Ok(Self { files: vec![Shard::of_header(label, bytes, header.bytes)], header })
    }

    /// The path of the first file.
    pub(crate) fn label(&self) -> &str {
        &self.files[0].label
    }

    /// A small file that a model of Hugging Face has, made of the metadata; `None` if there is none of this name.
    pub(crate) fn small_file(&self, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        match name {
            CONFIG_FILE => Ok(Some(self.config()?.to_string().into_bytes())),
            _ => small_files::read(self, name).map_err(|problem| self.malformed(problem)),
        }
    }

    /// config.json as `transformers` would have it.
    pub(crate) fn config(&self) -> Result<serde_json::Value, CheckpointError> {
        config::config(self).map_err(|problem| self.malformed(problem))
    }

    /// The tensors as Hugging Face has them, in the order of the files. `config` is its config.json.
    pub(crate) fn model(&self, config: &serde_json::Value) -> Result<Vec<(String, Entry)>, CheckpointError> {
        model::tensors(self, config).map_err(|problem| self.malformed(problem))
    }

    /// The files that tensors lie in.
    pub(crate) fn shards(&self) -> Vec<Shard> {
        self.files.clone()
    }

    fn malformed(&self, problem: String) -> CheckpointError {
        CheckpointError::malformed(self.label(), problem)
    }

    /// The version of the format, 2 or 3, which differ in nothing that is read.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// Keys of the metadata in alphabetical order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.header.metadata.keys().map(String::as_str)
    }

    /// A value of the metadata; `None` if there is no such key.
    pub fn value(&self, key: &str) -> Option<GgufValue<'_>> {
        let (value_type, at) = *self.header.metadata.get(key)?;
        // It was read when the file was opened.
        Cursor::new(&self.files[0].bytes, at).value(value_type).ok()
    }

    /// The tokenizer of the file.
    ///
    /// # Errors
    /// There is none, it is of a kind that is not read, or it contradicts itself.
    pub fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        Tokenizer::of_gguf(self, None)
    }

    /// All tensors in the order of the header.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.header.tensors
    }

    /// A tensor; `None` if there is none of this name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.header.index.get(name).map(|index| &self.header.tensors[*index])
    }

    /// A matrix `[rows, cols]` packed in the scheme of its type ([`GgufType::scheme`]), without loss. Plain floats are
    /// borrowed from the map.
    ///
    /// # Errors
    /// There is no such tensor, it has another number of dimensions, or a scale in it is no finite number.
    pub fn matrix(&self, name: &str) -> Result<PackedMatrix<'_>, CheckpointError> {
        let tensor = self.require(name)?;
        let (file, name) = (self.files[tensor.file].label.clone(), tensor.name.clone());
        let &[rows, cols] = tensor.shape.as_slice() else {
            let (found, wanted) = (tensor.shape.clone(), "a matrix [rows, cols]".to_owned());
            return Err(CheckpointError::Shape { file, tensor: name, found, wanted });
        };
        let packed = tensor.tensor_type.pack(self.stored(tensor), rows, cols);
        packed.map_err(|source| CheckpointError::Format { file, tensor: name, source })
    }

    /// All values of a tensor of any type and shape, row-major, as `gguf.quants.dequantize` of the Python package gives
    /// them, bit by bit.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn values(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let tensor = self.require(name)?;
        Ok(tensor.tensor_type.values(self.stored(tensor)))
    }

    /// Gives back the memory of what was read of a tensor, for a loader that has a copy of its own; it can still be
    /// read.
    pub fn release(&self, name: &str) {
        if let Some(tensor) = self.tensor(name) {
            self.files[tensor.file].bytes.release(&tensor.range);
        }
    }

    fn stored(&self, tensor: &GgufTensor) -> &[u8] {
        &self.files[tensor.file].bytes[tensor.range.clone()]
    }

    fn require(&self, name: &str) -> Result<&GgufTensor, CheckpointError> {
        self.tensor(name).ok_or_else(|| {
            let count = self.header.tensors.len();
            self.malformed(format!("none of its {count} tensors is `{name}`; the file is of another model"))
        })
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensors = self.header.tensors.len();
        f.debug_struct("Gguf").field("file", &self.label()).field("tensors", &tensors).finish()
    }
}
