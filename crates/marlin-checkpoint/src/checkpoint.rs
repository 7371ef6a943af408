//! Reading a checkpoint.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use marlin_format::{PackedMatrix, Scheme};
use safetensors::Dtype;
use serde_json::Value;

use crate::layouts::{self, Entry, Gathered, Layout, awq, compressed_tensors, fp8, gptq, metal_marlin, mlx, modelopt};
use crate::memory::MemoryTensor;
use crate::quantization::Quantization;
use crate::shard::{Location, Shard};
use crate::source::Source;
use crate::stack::MatrixStack;
use crate::weights::{self, Weights};
use crate::{CheckpointError, GenerationConfig, Gguf, QuantizationConfig, Rotations, Tokenizer, chat_template};

/// What a model is.
pub const CONFIG_FILE: &str = "config.json";

/// Small files that belong to a model and are copied along when it is quantised.
pub const SIDE_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// An opened model: a Hugging Face folder, a folder quantised by this project or in a layout that [`Layout`] names, a GGUF
/// file, files embedded in the program, or tensors made in memory.
///
/// Weights of files are mapped, not read; matrices borrow from the map wherever their bytes are in canonical order there.
pub struct Checkpoint {
    pub(crate) source: Source,
    name: String,
    pub(crate) config: Value,
    layout: Option<Layout>,
    quantization: Option<QuantizationConfig>,
    rotations: Rotations,
    notes: Vec<String>,
    pub(crate) shards: Vec<Shard>,
    /// In the order of the files and of the bytes in them.
    tensors: Vec<(String, Entry)>,
    index: HashMap<String, usize>,
}

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As an ordinary tensor.
    Plain(Dtype),
    /// As a packed matrix.
    Packed(Scheme),
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The shape its values have when unpacked.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub storage: Storage,
    /// Bytes it takes, scales and all included.
    pub bytes: u64,
}

impl TensorInfo {
    /// The scheme of a matrix in this storage; `None` if no matrix is read from it.
    pub fn scheme(&self) -> Option<Scheme> {
        match self.storage {
            Storage::Plain(dtype) => layouts::dense_scheme(dtype),
            Storage::Packed(scheme) => Some(scheme),
        }
    }
}

/// An ordinary tensor, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor<'a> {
    /// Type of an element.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Elements, little endian, row-major; borrowed from the map where they lie there in this order.
    pub bytes: Cow<'a, [u8]>,
}

impl Checkpoint {
    /// Opens a folder and checks that its files agree: the index with the shards, every shard's header with its length,
    /// and the packed matrices with config.json. Or opens a GGUF file, by its own path or as the only one in a folder
    /// without other weights; one of several that a model was split into stands for all. Weight files must not be changed
    /// while the checkpoint is open.
    ///
    /// # Errors
    /// There is no such folder or file, a file is missing, or one contradicts itself or another.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let gguf = if path.is_dir() { weights::only_gguf(path)? } else { path.is_file().then(|| path.to_path_buf()) };
        match gguf {
            Some(file) => Self::open_gguf(&file),
            None if path.is_dir() => Self::load(Source::Folder(path.to_path_buf())),
            None => Err(CheckpointError::NotFound { path: path.to_path_buf() }),
        }
    }

    fn open_gguf(path: &Path) -> Result<Self, CheckpointError> {
        let gguf = Gguf::open(path)?;
        let config = gguf.config()?;
        let (shards, tensors) = (gguf.shards(), gguf.model(&config)?);
        let index = index(&tensors);
        Ok(Self {
            name: gguf.label().to_owned(),
            source: Source::Gguf { path: path.to_path_buf(), gguf: Box::new(gguf) },
            config,
            layout: Some(Layout::Gguf),
            quantization: None,
            rotations: Rotations::default(),
            notes: Vec::new(),
            shards,
            tensors,
            index,
        })
    }

    /// Opens a model whose files, as `(name, bytes)`, are embedded in the program. `name` stands for the folder in
    /// messages.
    pub fn from_static(name: &str, files: &'static [(&'static str, &'static [u8])]) -> Result<Self, CheckpointError> {
        Self::load(Source::Static { name: name.to_owned(), files })
    }

    /// A model made in memory: `config` is what config.json would hold, `tensors` have the names they would have in files.
    /// It has no tokenizer and no other file. `name` stands for the folder in messages.
    ///
    /// # Errors
    /// `config` is no JSON object, a tensor is there twice, or a matrix is malformed.
    pub fn from_parts(
        name: &str,
        config: Value,
        tensors: Vec<(String, MemoryTensor)>,
    ) -> Result<Self, CheckpointError> {
        let source = Source::Memory { name: name.to_owned() };
        if !config.is_object() {
            return Err(CheckpointError::malformed(&source.label(CONFIG_FILE), "it is no JSON object"));
        }
        let mut index = HashMap::with_capacity(tensors.len());
        let mut checked = HashSet::new();
        for (position, (tensor, made)) in tensors.iter().enumerate() {
            if index.insert(tensor.clone(), position).is_some() {
                return Err(CheckpointError::malformed(name, format!("tensor `{tensor}` is there twice")));
            }
            // One that several tensors share is checked once, and a vector is right by construction.
            if made.shape.len() == 2 && checked.insert(Arc::as_ptr(&made.values)) {
                let format = |source| CheckpointError::Format { file: name.to_owned(), tensor: tensor.clone(), source };
                made.values.validate().map_err(format)?;
            }
        }
        let packed = tensors.iter().filter_map(|(tensor, made)| match made.info().storage {
            Storage::Packed(scheme) => Some((tensor.as_str(), scheme, [made.values.rows, made.values.cols])),
            Storage::Plain(_) => None,
        });
        let described = QuantizationConfig::describe(packed, Rotations::default());
        let quantization = (!described.tensors.is_empty()).then_some(described);
        let tensors = tensors.into_iter().map(|(tensor, made)| (tensor, Entry::Memory(made))).collect();
        Ok(Self {
            name: source.name(),
            source,
            config,
            layout: quantization.as_ref().map(|_| Layout::MetalMarlin),
            quantization,
            rotations: Rotations::default(),
            notes: Vec::new(),
            shards: Vec::new(),
            tensors,
            index,
        })
    }

    fn load(source: Source) -> Result<Self, CheckpointError> {
        let config_label = source.label(CONFIG_FILE);
        let config: Value = source.json(CONFIG_FILE)?.ok_or_else(|| CheckpointError::MissingFile {
            file: config_label.clone(),
            hint: "a model folder holds config.json beside its *.safetensors files".to_owned(),
        })?;
        if !config.is_object() {
            return Err(CheckpointError::malformed(&config_label, "it holds no JSON object"));
        }
        let quantization = Quantization::read(&config, &source)?;
        let Weights { shards, tensors: stored } = weights::load(&source)?;
        let Gathered { tensors, notes } = match &quantization {
            Some((Quantization::Ours(config), file)) => metal_marlin::gather(config, stored, &shards, file)?,
            Some((Quantization::CompressedTensors(config), file)) => {
                compressed_tensors::gather(config, stored, &shards, file)?
            }
            Some((Quantization::Gptq(config), file)) => gptq::gather(config, stored, &shards, file)?,
            Some((Quantization::Awq(config), file)) => awq::gather(config, stored, &shards, file)?,
            Some((Quantization::Fp8(config), file)) => fp8::gather(config, stored, &shards, file)?,
            Some((Quantization::ModelOpt(config), file)) => modelopt::gather(config, stored, &shards, file)?,
            Some((Quantization::Mlx(config), file)) => mlx::gather(Some(config), stored, &shards, file)?,
            // MLX has stacks in unquantised folders too, under names that no one else uses.
            Some((Quantization::GptOss, _)) | None => mlx::gather(None, stored, &shards, &config_label)?,
        };
        let (layout, quantization) = match quantization.map(|(quantization, _)| quantization) {
            Some(Quantization::Ours(config)) => (Some(Layout::MetalMarlin), Some(config)),
            Some(Quantization::CompressedTensors(_)) => (Some(Layout::CompressedTensors), None),
            Some(Quantization::Gptq(_)) => (Some(Layout::Gptq), None),
            Some(Quantization::Awq(_)) => (Some(Layout::Awq), None),
            Some(Quantization::Fp8(_)) => (Some(Layout::Fp8), None),
            Some(Quantization::ModelOpt(_)) => (Some(Layout::ModelOpt), None),
            Some(Quantization::Mlx(_)) => (Some(Layout::Mlx), None),
            Some(Quantization::GptOss) => (Some(Layout::GptOss), None),
            None => (None, None),
        };
        let rotations = quantization.as_ref().map_or(Rotations::default(), |quantization| quantization.rotations);
        let tensors = as_in_causal_lm(tensors);
        let (name, index) = (source.name(), index(&tensors));
        Ok(Self { name, source, config, layout, quantization, rotations, notes, shards, tensors, index })
    }

    /// The folder, or the name given to the model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same model under another name in messages, for a folder whose path tells a reader little. Messages about single
    /// files still name their path.
    pub fn with_name(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// The same model with weights that expect these rotations, for one that is made in memory.
    pub fn with_rotations(self, rotations: Rotations) -> Self {
        Self { rotations, ..self }
    }

    /// What its weights expect to be rotated, which only folders in our own layout say.
    pub fn rotations(&self) -> Rotations {
        self.rotations
    }

    /// The folder or file it was opened from; `None` if its files are embedded or it was made in memory.
    pub fn path(&self) -> Option<&Path> {
        match &self.source {
            Source::Folder(path) | Source::Gguf { path, .. } => Some(path),
            Source::Static { .. } | Source::Memory { .. } => None,
        }
    }

    /// config.json.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The whole of another small file of the model; `None` if there is none.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        self.source.read(name)
    }

    /// The files a converted copy of the model needs beside config.json and the weights: tokenizer, chat template,
    /// generation settings.
    pub fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        let mut files = Vec::new();
        for name in SIDE_FILES {
            if let Some(bytes) = self.source.read(name)? {
                files.push((name.to_owned(), bytes.into_owned()));
            }
        }
        Ok(files)
    }

    /// Names of all tensors in storage order. A packed matrix is one tensor.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The shape of a tensor, unpacked.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.info(name).map(|info| info.shape)
    }

    /// Shape, storage and size of a tensor.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(match self.entry(name)? {
            Entry::Plain(location) => TensorInfo {
                shape: location.shape.clone(),
                storage: Storage::Plain(location.dtype),
                bytes: location.range.len() as u64,
            },
            Entry::Packed(packed) => TensorInfo {
                shape: vec![packed.rows, packed.cols],
                storage: Storage::Packed(packed.scheme),
                bytes: packed.buffers.iter().map(|(_, _, location)| location.range.len() as u64).sum(),
            },
            Entry::Gguf(gguf) => gguf.info(),
            Entry::Memory(made) => made.info(),
        })
    }

    /// Bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.tensor_names().filter_map(|name| self.info(name)).map(|info| info.bytes).sum()
    }

    /// What the folder says about its quantisation and this program does not follow, one sentence each: weights are
    /// read exactly, how activations or the KV cache are to be rounded is not imitated.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// How matrices are laid out; `None` for a folder of an unquantised model.
    pub fn layout(&self) -> Option<Layout> {
        self.layout
    }

    /// Whether there are packed matrices.
    pub fn is_quantized(&self) -> bool {
        let mut tensors = self.tensor_names().filter_map(|name| self.info(name));
        tensors.any(|info| matches!(info.storage, Storage::Packed(_)))
    }

    /// What a folder in our own layout says about its packed matrices; `None` for an unquantised model and for the
    /// layouts of others, whose matrices [`Checkpoint::info`] describes all the same.
    pub fn quantization(&self) -> Option<&QuantizationConfig> {
        self.quantization.as_ref()
    }

    /// A matrix of the shape `[rows, cols]`, borrowed from the map where it lies there in canonical order.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<PackedMatrix<'_>, CheckpointError> {
        let matrix = self.matrix_any(name)?;
        if (matrix.rows, matrix.cols) != (rows, cols) {
            return Err(self.wrong_shape(name, vec![matrix.rows, matrix.cols], format!("[{rows}, {cols}]")));
        }
        Ok(matrix)
    }

    /// A matrix of whatever shape it has, borrowed likewise: packed, or BF16, F16 or F32.
    pub fn matrix_any(&self, name: &str) -> Result<PackedMatrix<'_>, CheckpointError> {
        let not_a_matrix = |shape: &[usize]| self.wrong_shape(name, shape.to_vec(), "a matrix [rows, cols]".to_owned());
        let format_error =
            |source| CheckpointError::Format { file: self.file_of(name), tensor: name.to_owned(), source };
        let matrix = match self.require(name)? {
            Entry::Plain(location) => {
                let &[rows, cols] = location.shape.as_slice() else { return Err(not_a_matrix(&location.shape)) };
                let scheme =
                    layouts::dense_scheme(location.dtype).ok_or_else(|| self.wrong_type(name, "BF16, F16 or F32"))?;
                let mut matrix = PackedMatrix::empty(scheme, rows, cols);
                matrix.codes = Cow::Borrowed(self.bytes(location));
                matrix
            }
            Entry::Packed(packed) => {
                let mut matrix = PackedMatrix::empty(packed.scheme, packed.rows, packed.cols);
                for (buffer, form, location) in &packed.buffers {
                    buffer.set(&mut matrix, form.decode(self.bytes(location)));
                }
                for (buffer, bytes) in &packed.constants {
                    buffer.set(&mut matrix, Cow::Borrowed(*bytes));
                }
                matrix
            }
            Entry::Gguf(gguf) => {
                let matrix = gguf.matrix(&self.shards).ok_or_else(|| not_a_matrix(gguf.shape()))?;
                return matrix.map_err(format_error);
            }
            Entry::Memory(made) if made.shape.len() == 2 => return Ok(made.values.borrowed()),
            Entry::Memory(made) => return Err(not_a_matrix(&made.shape)),
        };
        matrix.validate().map_err(format_error)?;
        Ok(matrix)
    }

    /// A vector of `len` finite values (norm weights, a bias), converted to f32 from BF16, F16 or F32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let wrong_type = || self.wrong_type(name, "BF16, F16 or F32");
        let tensor = self.tensor(name).map_err(|e| match e {
            CheckpointError::Type { .. } => wrong_type(),
            other => other,
        })?;
        if tensor.shape != [len] {
            return Err(self.wrong_shape(name, tensor.shape.to_vec(), format!("[{len}]")));
        }
        let pairs = || tensor.bytes.as_chunks::<2>().0.iter();
        let values: Vec<f32> = match tensor.dtype {
            Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F16 => pairs().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F32 => tensor.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            _ => return Err(wrong_type()),
        };
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            let (file, tensor) = (self.file_of(name), name.to_owned());
            return Err(CheckpointError::NotFinite { file, tensor, index, value: values[index] });
        }
        Ok(values)
    }

    /// An ordinary tensor as it is stored, for copying it verbatim. Packed matrices are had from
    /// [`Checkpoint::matrix_any`].
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, CheckpointError> {
        match self.require(name)? {
            Entry::Plain(location) => {
                Ok(Tensor { dtype: location.dtype, shape: &location.shape, bytes: self.bytes(location).into() })
            }
            Entry::Packed(_) => Err(self.wrong_type(name, "an ordinary tensor")),
            Entry::Gguf(gguf) => match gguf.info().storage {
                Storage::Plain(dtype) => Ok(Tensor { dtype, shape: gguf.shape(), bytes: gguf.bytes(&self.shards) }),
                Storage::Packed(_) => Err(self.wrong_type(name, "an ordinary tensor")),
            },
            Entry::Memory(made) => match layouts::dense_dtype(&made.values.scheme) {
                Some(dtype) => Ok(Tensor { dtype, shape: &made.shape, bytes: (&*made.values.codes).into() }),
                None => Err(self.wrong_type(name, "an ordinary tensor")),
            },
        }
    }

    /// A tensor `[count, rows, cols]` of plain floats: as many matrices, borrowed from the map.
    pub fn stack(&self, name: &str) -> Result<MatrixStack<'_>, CheckpointError> {
        let Tensor { dtype, shape, bytes: Cow::Borrowed(bytes) } = self.tensor(name)? else {
            return Err(self.wrong_type(name, "one run of plain floats"));
        };
        let &[count, rows, cols] = shape else {
            return Err(self.wrong_shape(name, shape.to_vec(), "matrices [count, rows, cols]".to_owned()));
        };
        if shape.contains(&0) {
            return Err(self.wrong_shape(name, shape.to_vec(), "matrices that are not empty".to_owned()));
        }
        let scheme = layouts::dense_scheme(dtype).ok_or_else(|| self.wrong_type(name, "BF16, F16 or F32"))?;
        Ok(MatrixStack { scheme, shape: [count, rows, cols], bytes })
    }

    /// Gives back the memory of what was read of a mapped tensor, for a loader that has a copy of its own: it does not lie in memory
    /// twice. The tensor can still be read; it then comes from the file again.
    pub fn release(&self, name: &str) {
        for location in self.locations(name) {
            self.shards[location.shard].bytes.release(&location.range);
        }
    }

    /// [`Checkpoint::release`] of all tensors, and of what the system mapped around those that were read.
    pub fn release_all(&self) {
        self.shards.iter().for_each(|shard| shard.bytes.release(&(0..shard.bytes.len())));
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// There is none, it cannot be built, or it has a larger vocabulary than config.json says.
    pub fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        Tokenizer::read(&self.source, self.config["vocab_size"].as_u64())
    }

    /// The chat template (Jinja): chat_template.jinja, or else that of tokenizer_config.json; `None` if there is none.
    pub fn chat_template(&self) -> Result<Option<String>, CheckpointError> {
        chat_template::read(&self.source)
    }

    /// The special tokens that tokenizer_config.json names, as chat templates know them: `bos_token`, `eos_token` and
    /// the like. Empty if there is no such file.
    pub fn special_tokens(&self) -> Result<BTreeMap<String, String>, CheckpointError> {
        chat_template::special_tokens(&self.source)
    }

    /// The recommended generation settings.
    pub fn generation_config(&self) -> Result<GenerationConfig, CheckpointError> {
        GenerationConfig::read(&self.source, &self.config)
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.index.get(name).map(|i| &self.tensors[*i].1)
    }

    /// Where the stored buffers of a tensor lie; nowhere for one made in memory.
    pub(crate) fn locations(&self, name: &str) -> Vec<&Location> {
        match self.entry(name) {
            Some(Entry::Plain(location)) => vec![location],
            Some(Entry::Packed(packed)) => packed.buffers.iter().map(|(_, _, location)| location).collect(),
            Some(Entry::Gguf(gguf)) => gguf.locations().collect(),
            Some(Entry::Memory(_)) | None => Vec::new(),
        }
    }

    fn require(&self, name: &str) -> Result<&Entry, CheckpointError> {
        self.entry(name).ok_or_else(|| CheckpointError::NoTensor { model: self.name.clone(), tensor: name.to_owned() })
    }

    fn bytes(&self, location: &Location) -> &[u8] {
        self.shards[location.shard].tensor(&location.range)
    }

    /// The shard of an existing tensor (of its codes, if packed); the model for one of a GGUF file or made in memory.
    fn file_of(&self, name: &str) -> String {
        let shard = match self.entry(name) {
            Some(Entry::Plain(location)) => location.shard,
            Some(Entry::Packed(packed)) => packed.buffers[0].2.shard,
            Some(Entry::Gguf(_) | Entry::Memory(_)) | None => return self.name.clone(),
        };
        self.shards[shard].label.clone()
    }

    fn wrong_shape(&self, name: &str, found: Vec<usize>, wanted: String) -> CheckpointError {
        CheckpointError::Shape { file: self.file_of(name), tensor: name.to_owned(), found, wanted }
    }

    fn wrong_type(&self, name: &str, wanted: &'static str) -> CheckpointError {
        let found = match self.info(name).map(|info| info.storage) {
            Some(Storage::Plain(dtype)) => dtype.to_string(),
            Some(Storage::Packed(scheme)) => format!("packed {scheme}"),
            None => "nothing".to_owned(),
        };
        CheckpointError::Type { file: self.file_of(name), tensor: name.to_owned(), found, wanted }
    }
}

/// Tensors under the names that they have in a model with a head. Models for embeddings (Qwen3-Embedding) are saved without the part that
/// has it, and without the name of what is inside.
fn as_in_causal_lm(mut tensors: Vec<(String, Entry)>) -> Vec<(String, Entry)> {
    if tensors.iter().any(|(name, _)| name == "embed_tokens.weight") {
        tensors
            .iter_mut()
            .filter(|(name, _)| !name.starts_with("lm_head."))
            .for_each(|(name, _)| *name = format!("model.{name}"));
    }
    tensors
}

/// Where each tensor is found.
fn index(tensors: &[(String, Entry)]) -> HashMap<String, usize> {
    tensors.iter().enumerate().map(|(index, (name, _))| (name.clone(), index)).collect()
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("name", &self.name).field("tensors", &self.tensors.len()).finish()
    }
}
