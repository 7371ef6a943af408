//! How packed matrices are spread over the tensors of a folder: our own layout, and those of others, one module each.

pub(crate) mod compressed_tensors;
mod form;
pub(crate) mod metal_marlin;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use marlin_format::{FormatError, PackedMatrix, Scheme};
use safetensors::Dtype;
use serde_json::Value;

pub(crate) use self::form::Form;
use crate::shard::{Location, Shard};
use crate::{CheckpointError, QuantizationConfig};

/// How the packed matrices of an opened checkpoint are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// This project's own, which holds every scheme (`docs/formats.md`).
    MetalMarlin,
    /// That of the Python package `compressed-tensors`.
    CompressedTensors,
    /// A file of llama.cpp.
    Gguf,
}

impl Layout {
    /// The name users know it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MetalMarlin => "metal-marlin",
            Self::CompressedTensors => "compressed-tensors",
            Self::Gguf => "gguf",
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How the packed matrices of a written folder are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ExportLayout {
    /// This project's own, which holds every scheme (`docs/formats.md`).
    #[default]
    MetalMarlin,
    /// That of the Python package `compressed-tensors`, which vLLM and `transformers` read.
    CompressedTensors,
}

impl ExportLayout {
    /// All layouts that are written.
    pub const ALL: [ExportLayout; 2] = [Self::MetalMarlin, Self::CompressedTensors];

    /// The name users give it, which is that of the [`Layout`] it is read as.
    pub const fn name(self) -> &'static str {
        self.layout().name()
    }

    /// What it is read as.
    pub const fn layout(self) -> Layout {
        match self {
            Self::MetalMarlin => Layout::MetalMarlin,
            Self::CompressedTensors => Layout::CompressedTensors,
        }
    }

    /// What the layout stores for matrices of a scheme: the scheme itself, or the same codes with scales of the type
    /// that its readers expect.
    ///
    /// # Errors
    /// The layout has no place for the scheme.
    pub fn scheme(self, scheme: Scheme) -> Result<Scheme, CheckpointError> {
        match self {
            Self::MetalMarlin => Ok(scheme),
            Self::CompressedTensors => compressed_tensors::written_scheme(scheme),
        }
    }

    /// Whether embedding and head may be packed as well.
    pub const fn packs_embeddings(self) -> bool {
        matches!(self, Self::MetalMarlin)
    }

    /// Whether the f32 of NVFP4 matrices must be a power of two, because the layout stores its inverse.
    pub const fn stores_inverse_globals(self) -> bool {
        matches!(self, Self::CompressedTensors)
    }

    /// The tensors that hold the packed matrix `name`, codes first; the error says why there are none.
    pub(crate) fn parts(self, name: &str, scheme: &Scheme, rows: usize, cols: usize) -> Result<Vec<Part>, String> {
        match self {
            Self::MetalMarlin => {
                metal_marlin::parts(name, scheme, rows, cols).map_err(|source| format!("tensor `{name}`: {source}"))
            }
            Self::CompressedTensors => compressed_tensors::written_parts(name, scheme, rows, cols),
        }
    }

    /// The `quantization_config` of a folder with these packed and these plain matrices.
    pub(crate) fn quantization_config(self, packed: &[(&str, Scheme, [usize; 2])], plain: &[&str]) -> Value {
        match self {
            Self::MetalMarlin => serde_json::to_value(QuantizationConfig::describe(packed.iter().copied()))
                .expect("plain data becomes JSON"),
            Self::CompressedTensors => compressed_tensors::written_config(packed, plain),
        }
    }
}

impl fmt::Display for ExportLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A buffer of a [`PackedMatrix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Buffer {
    Codes,
    Scales,
    Zeros,
    Globals,
    GroupIndex,
    SparseIndex,
}

impl Buffer {
    pub(crate) fn of<'m>(self, matrix: &'m PackedMatrix<'_>) -> &'m [u8] {
        match self {
            Self::Codes => &matrix.codes,
            Self::Scales => &matrix.scales,
            Self::Zeros => &matrix.zeros,
            Self::Globals => &matrix.globals,
            Self::GroupIndex => &matrix.group_index,
            Self::SparseIndex => &matrix.sparse_index,
        }
    }

    pub(crate) fn set<'a>(self, matrix: &mut PackedMatrix<'a>, bytes: Cow<'a, [u8]>) {
        let field = match self {
            Self::Codes => &mut matrix.codes,
            Self::Scales => &mut matrix.scales,
            Self::Zeros => &mut matrix.zeros,
            Self::Globals => &mut matrix.globals,
            Self::GroupIndex => &mut matrix.group_index,
            Self::SparseIndex => &mut matrix.sparse_index,
        };
        *field = bytes;
    }
}

/// One stored tensor of a packed matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) content: Content,
}

/// What a stored tensor holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// A buffer of the matrix, in some form.
    Buffer(Buffer, Form),
    /// These bytes, which follow from scheme and shape.
    Fixed(Vec<u8>),
}

impl Content {
    /// The bytes to store for a matrix.
    pub(crate) fn bytes<'m>(&'m self, matrix: &'m PackedMatrix<'_>) -> Cow<'m, [u8]> {
        match self {
            Self::Buffer(buffer, form) => form.encode(buffer.of(matrix)),
            Self::Fixed(bytes) => Cow::Borrowed(bytes),
        }
    }
}

/// A tensor of an opened checkpoint.
pub(crate) enum Entry {
    Plain(Location),
    Packed(PackedEntry),
    Gguf(crate::gguf::GgufEntry),
    Memory(crate::MemoryTensor),
}

/// A packed matrix of an opened checkpoint.
pub(crate) struct PackedEntry {
    pub(crate) scheme: Scheme,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) buffers: Vec<(Buffer, Form, Location)>,
}

/// The tensors of a checkpoint, parts of packed matrices gathered.
pub(crate) struct Gathered {
    /// In storage order; a packed matrix stands where its first part does.
    pub(crate) tensors: Vec<(String, Entry)>,
    /// What is known of the folder and not used, one sentence each.
    pub(crate) notes: Vec<String>,
}

/// The stored tensors of a checkpoint by name, from which layouts take the parts of their matrices.
struct Stored<'s> {
    tensors: HashMap<String, Location>,
    shards: &'s [Shard],
    /// config.json, in messages.
    file: &'s str,
}

impl Stored<'_> {
    fn malformed(&self, problem: String) -> CheckpointError {
        CheckpointError::malformed(self.file, problem)
    }

    fn bytes(&self, location: &Location) -> &[u8] {
        self.shards[location.shard].tensor(&location.range)
    }

    /// The tensor `part` of a module, with its full name.
    fn require(&self, module: &str, part: &str) -> Result<(String, &Location), CheckpointError> {
        let name = format!("{module}.{part}");
        match self.tensors.get(&name) {
            Some(location) => Ok((name, location)),
            None => Err(self.malformed(format!("`{module}` is stored quantised, but the weights lack `{name}`"))),
        }
    }

    fn format_error(&self, tensor: &str, source: FormatError) -> CheckpointError {
        CheckpointError::Format { file: self.file.to_owned(), tensor: tensor.to_owned(), source }
    }

    /// Takes the parts of the matrix `name` out and checks their types and shapes.
    fn take(
        &mut self,
        name: &str,
        scheme: Scheme,
        [rows, cols]: [usize; 2],
        parts: Vec<Part>,
    ) -> Result<PackedEntry, CheckpointError> {
        let mut buffers = Vec::with_capacity(parts.len());
        for part in parts {
            let location = self.tensors.remove(&part.name).ok_or_else(|| {
                self.malformed(format!("tensor `{name}` is packed as {scheme}, but the weights lack `{}`", part.name))
            })?;
            if location.dtype != part.dtype || !same_shape(&location.shape, &part.shape) {
                let problem = format!(
                    "tensor `{}` is {} {:?}; wanted {} {:?} for `{name}` [{rows}, {cols}] packed as {scheme}",
                    part.name, location.dtype, location.shape, part.dtype, part.shape
                );
                return Err(CheckpointError::malformed(&self.shards[location.shard].label, problem));
            }
            if let Content::Buffer(buffer, form) = part.content {
                buffers.push((buffer, form, location));
            }
        }
        Ok(PackedEntry { scheme, rows, cols, buffers })
    }
}

/// Whether two shapes agree, dimensions of 1 apart: a scale a row is `[N]` to some and `[N, 1]` to others.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    let long = |shape: &&usize| **shape != 1;
    a.iter().filter(long).eq(b.iter().filter(long))
}

/// The scheme of an ordinary (not packed) matrix of this type.
pub(crate) fn dense_scheme(dtype: Dtype) -> Option<Scheme> {
    match dtype {
        Dtype::F32 => Some(Scheme::F32),
        Dtype::F16 => Some(Scheme::F16),
        Dtype::BF16 => Some(Scheme::BF16),
        _ => None,
    }
}

/// The type of an ordinary tensor that holds matrices of this scheme, if it is an unquantised one.
pub(crate) fn dense_dtype(scheme: &Scheme) -> Option<Dtype> {
    [Dtype::F32, Dtype::F16, Dtype::BF16].into_iter().find(|dtype| dense_scheme(*dtype).as_ref() == Some(scheme))
}
