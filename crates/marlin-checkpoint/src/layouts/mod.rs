//! How packed matrices are spread over the tensors of a folder: our own layout, and those of others, one module each.

mod activations;
pub(crate) mod awq;
pub(crate) mod compressed_tensors;
mod form;
pub(crate) mod fp8;
pub(crate) mod gptq;
mod gptq_export;
pub(crate) mod metal_marlin;
pub(crate) mod mlx;
pub(crate) mod modelopt;
mod pattern;
mod reorder;
mod sparse;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use marlin_format::{ColumnOrder, FormatError, PackedMatrix, ScaleKind, Scheme};
use safetensors::Dtype;
use serde_json::Value;

pub(crate) use self::form::Form;
use self::gptq_export::Transposed;
pub use self::metal_marlin::{PackedTensor, packed_tensors};
use crate::shard::{Location, Shard};
use crate::{CheckpointError, QuantizationConfig, Rotations, gguf};

/// How the packed matrices of an opened checkpoint are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// This project's own, which holds every scheme (`docs/formats.md`).
    MetalMarlin,
    /// That of the Python package `compressed-tensors`.
    CompressedTensors,
    /// That of the Python packages `auto-gptq` and `gptqmodel`.
    Gptq,
    /// That of the Python package `autoawq`.
    Awq,
    /// FP8 as `transformers` and vLLM have it.
    Fp8,
    /// That of the Python package `nvidia-modelopt`.
    ModelOpt,
    /// That of Apple's MLX, which `mlx-lm` writes.
    Mlx,
    /// That of gpt-oss as published: experts in MXFP4, all else in BF16.
    GptOss,
    /// A file of llama.cpp.
    Gguf,
}

impl Layout {
    /// The name users know it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MetalMarlin => "metal-marlin",
            Self::CompressedTensors => "compressed-tensors",
            Self::Gptq => gptq::METHOD,
            Self::Awq => awq::METHOD,
            Self::Fp8 => fp8::METHOD,
            Self::ModelOpt => modelopt::METHOD,
            Self::Mlx => "mlx",
            Self::GptOss => "gpt-oss",
            Self::Gguf => "gguf",
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Why a folder has no matrices of GGUF.
const NO_FOLDER: &str = "GGUF is one file, not a folder";

/// How the packed matrices of a written model are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ExportLayout {
    /// This project's own, which holds every scheme (`docs/formats.md`).
    #[default]
    MetalMarlin,
    /// That of the Python package `compressed-tensors`, which vLLM and `transformers` read.
    CompressedTensors,
    /// That of GPTQ, which `transformers`, GPTQModel and vLLM read.
    Gptq,
    /// One file for llama.cpp, which [`crate::GgufWriter`] writes instead of a folder.
    Gguf,
}

impl ExportLayout {
    /// All layouts that are written.
    pub const ALL: [ExportLayout; 4] = [Self::MetalMarlin, Self::CompressedTensors, Self::Gptq, Self::Gguf];

    /// The name users give it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MetalMarlin => Layout::MetalMarlin.name(),
            Self::CompressedTensors => Layout::CompressedTensors.name(),
            Self::Gptq => Layout::Gptq.name(),
            Self::Gguf => Layout::Gguf.name(),
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
            Self::Gptq => gptq_export::written_scheme(scheme),
            Self::Gguf => gguf::written_scheme(scheme),
        }
    }

    /// Whether it can say that activations are to be rotated.
    pub const fn rotates(self) -> bool {
        matches!(self, Self::MetalMarlin)
    }

    /// Whether embedding and head may be packed as well.
    pub const fn packs_embeddings(self) -> bool {
        matches!(self, Self::MetalMarlin | Self::Gguf)
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
            Self::Gptq => gptq_export::written_parts(name, scheme, rows, cols),
            Self::Gguf => Err(NO_FOLDER.to_owned()),
        }
    }

    /// The `quantization_config` of a folder with these packed and these plain matrices, and these rotations; the error says why there is none.
    pub(crate) fn quantization_config(
        self,
        packed: &[(&str, Scheme, [usize; 2])],
        plain: &[&str],
        rotations: Rotations,
    ) -> Result<Value, String> {
        if !rotations.is_none() && !self.rotates() {
            return Err(format!("the layout {self} cannot say that activations are to be rotated"));
        }
        match self {
            Self::MetalMarlin => {
                let described = QuantizationConfig::describe(packed.iter().copied(), rotations);
                Ok(serde_json::to_value(described).expect("plain data becomes JSON"))
            }
            Self::CompressedTensors => Ok(compressed_tensors::written_config(packed, plain)),
            Self::Gptq => gptq_export::written_config(packed, plain),
            Self::Gguf => Err(NO_FOLDER.to_owned()),
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

impl Part {
    /// The tensor `suffix` of a module, which holds a buffer in some form.
    fn of_buffer(module: &str, suffix: &str, dtype: Dtype, shape: Vec<usize>, buffer: Buffer, form: Form) -> Self {
        Self { name: format!("{module}.{suffix}"), dtype, shape, content: Content::Buffer(buffer, form) }
    }
}

/// What a stored tensor holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// A buffer of the matrix, in some form.
    Buffer(Buffer, Form),
    /// A buffer of the matrix as GPTQ has it.
    Transposed(Transposed),
    /// These bytes, which follow from scheme and shape.
    Fixed(Vec<u8>),
}

impl Content {
    /// The bytes to store for a matrix.
    pub(crate) fn bytes<'m>(&'m self, matrix: &'m PackedMatrix<'_>) -> Cow<'m, [u8]> {
        match self {
            Self::Buffer(buffer, form) => form.encode(buffer.of(matrix)),
            Self::Transposed(transposed) => transposed.bytes(matrix),
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
    /// Buffers that are the same in every matrix of the layout and are not stored.
    pub(crate) constants: Vec<(Buffer, &'static [u8])>,
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

impl<'s> Stored<'s> {
    /// Gathers what `linear` makes of every module `X` that has one of the tensors `X.mark` into `X.weight`; the other
    /// tensors stay as they are.
    fn gather(
        tensors: Vec<(String, Location)>,
        shards: &'s [Shard],
        file: &'s str,
        marks: &[&str],
        mut linear: impl FnMut(&str, &mut Self) -> Result<PackedEntry, CheckpointError>,
    ) -> Result<Vec<(String, Entry)>, CheckpointError> {
        let order: Vec<String> = tensors.iter().map(|(name, _)| name.clone()).collect();
        let mut stored = Self { tensors: tensors.into_iter().collect(), shards, file };
        let mut packed = HashMap::new();
        for name in &order {
            let module = name.rsplit_once('.').and_then(|(module, part)| marks.contains(&part).then_some(module));
            // What is no longer there belongs to a linear that is already gathered.
            let Some(module) = module.filter(|_| stored.tensors.contains_key(name)) else { continue };
            let (weight, entry) = (format!("{module}.weight"), linear(module, &mut stored)?);
            if stored.tensors.contains_key(&weight) {
                return Err(stored.malformed(format!("`{module}` is stored both quantised and as `{weight}`")));
            }
            packed.insert(name.as_str(), (weight, entry));
        }
        let entry = |name: &String| match packed.remove(name.as_str()) {
            Some((weight, entry)) => Some((weight, Entry::Packed(entry))),
            None => stored.tensors.remove(name).map(|location| (name.clone(), Entry::Plain(location))),
        };
        Ok(order.iter().filter_map(entry).collect())
    }

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

    /// A part `name` that is not what it should be.
    fn wrong_part(&self, name: &str, found: &Location, wanted: &str) -> CheckpointError {
        let problem = format!("tensor `{name}` is {} {:?}; wanted {wanted}", found.dtype, found.shape);
        CheckpointError::malformed(&self.shards[found.shard].label, problem)
    }

    /// How the scales in the tensor `part` of a module are stored, which may be in any float type.
    fn float_scale(&self, module: &str, part: &str) -> Result<ScaleKind, CheckpointError> {
        let (name, location) = self.require(module, part)?;
        match location.dtype {
            Dtype::F32 => Ok(ScaleKind::F32),
            Dtype::F16 => Ok(ScaleKind::F16),
            Dtype::BF16 => Ok(ScaleKind::Bf16),
            _ => Err(self.wrong_part(&name, location, "F32, F16 or BF16")),
        }
    }

    /// The order of columns that the index `name` gives, which need not be there. One is taken out that says what is so
    /// without it: that columns are in groups in order.
    fn column_order(&mut self, name: &str, cols: usize, scheme: &Scheme) -> Result<ColumnOrder, CheckpointError> {
        let Some(location) = self.tensors.get(name) else { return Ok(ColumnOrder::Natural) };
        if location.dtype != Dtype::I32 || location.shape != [cols] {
            return Err(self.wrong_part(name, location, &format!("I32 [{cols}]")));
        }
        let (groups, group) = (scheme.groups_per_row(cols), scheme.group_cols(cols));
        let mut natural = true;
        for (col, bytes) in self.bytes(location).as_chunks().0.iter().enumerate() {
            let found = i32::from_le_bytes(*bytes);
            if !usize::try_from(found).is_ok_and(|found| found < groups) {
                let problem = format!("tensor `{name}` puts column {col} into group {found} of {groups}");
                return Err(CheckpointError::malformed(&self.shards[location.shard].label, problem));
            }
            natural &= found as usize == col / group;
        }
        if natural {
            self.tensors.remove(name);
        }
        Ok(if natural { ColumnOrder::Natural } else { ColumnOrder::GroupIndex })
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
                let (dtype, shape) = (part.dtype, part.shape);
                let wanted = format!("{dtype} {shape:?} for `{name}` [{rows}, {cols}] packed as {scheme}");
                return Err(self.wrong_part(&part.name, &location, &wanted));
            }
            if let Content::Buffer(buffer, form) = part.content {
                buffers.push((buffer, form, location));
            }
        }
        Ok(PackedEntry { scheme, rows, cols, buffers, constants: Vec::new() })
    }
}

/// Whether two shapes agree, dimensions of 1 apart: a scale a row is `[N]` to some and `[N, 1]` to others.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    let long = |shape: &&usize| **shape != 1;
    a.iter().filter(long).eq(b.iter().filter(long))
}

/// The type of one-level scales, and the bytes of one.
fn scale_type(kind: ScaleKind) -> (Dtype, usize) {
    match kind {
        ScaleKind::F32 => (Dtype::F32, 4),
        ScaleKind::F16 => (Dtype::F16, 2),
        ScaleKind::Bf16 => (Dtype::BF16, 2),
        ScaleKind::E4M3Global => (Dtype::F8_E4M3, 1),
        _ => (Dtype::U8, 1),
    }
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
