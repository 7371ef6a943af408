//! What can go wrong with a checkpoint.

use std::io;
use std::path::{Path, PathBuf};

use marlin_format::{FormatError, Scheme};

/// An error of reading or writing a checkpoint; its message names the file, what was found, what was wanted, and what
/// to do.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried, for example `read`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// No space for the output; what is finished stays for a later run.
    #[error(
        "no space left for {path}: {needed} bytes are still to be written; \
         free some space and run the same command to resume"
    )]
    DiskFull {
        /// The file being written.
        path: PathBuf,
        /// Bytes of tensors not yet written.
        needed: u64,
        /// The reason.
        source: io::Error,
    },
    /// A file of the output is larger than files may be; what is finished stays for a later run.
    #[error(
        "{path} would be larger than a file may be here; raise the limit (`ulimit -f`) or choose a file system with \
         larger files, and run the same command to resume"
    )]
    FileLimit {
        /// The file being written.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The path given leads nowhere.
    #[error(
        "{path} is neither a folder nor a file; a model is a folder that holds config.json and *.safetensors files, or a \
         *.gguf file"
    )]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// A file that must be there is not.
    #[error("{file} is missing; {hint}")]
    MissingFile {
        /// The file.
        file: String,
        /// What to do.
        hint: String,
    },
    /// A JSON file that cannot be parsed; the source names line and column.
    #[error("{file} is not the JSON expected")]
    Json {
        /// The file.
        file: String,
        /// The reason, with line and column.
        source: serde_json::Error,
    },
    /// A file that contradicts itself or others.
    #[error("{file}: {problem}")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A file shorter than its own header says.
    #[error(
        "{file} is truncated: it holds {found} bytes of tensor data, its header describes {wanted}; \
         download or copy it again"
    )]
    Truncated {
        /// The file.
        file: String,
        /// Bytes found.
        found: usize,
        /// Bytes described.
        wanted: usize,
    },
    /// Weights in a quantised layout that is not read.
    #[error(
        "{file}: the weights are quantised as `{layout}`, a layout that is not read yet; \
         use the unquantised checkpoint and quantise it with `metal-marlin quantize`"
    )]
    ForeignLayout {
        /// config.json.
        file: String,
        /// Its quant_method.
        layout: String,
    },
    /// A scheme that the layout asked for does not have.
    #[error(
        "the layout {layout} has no place for {scheme}; it takes {known}; choose one of them, or the layout metal-marlin"
    )]
    NoPlace {
        /// The layout.
        layout: &'static str,
        /// What it has a place for.
        known: &'static str,
        /// The scheme.
        scheme: Box<Scheme>,
    },
    /// A folder of ours, made by a later version.
    #[error(
        "{file}: quantization_config has version {found}, this program reads version {supported}; \
         update the program or quantise again"
    )]
    Version {
        /// config.json.
        file: String,
        /// The version found.
        found: String,
        /// The version read.
        supported: u32,
    },
    /// No such tensor.
    #[error(
        "{model} has no tensor `{tensor}`; its config.json and its weights do not belong together, or weights are missing"
    )]
    NoTensor {
        /// The model.
        model: String,
        /// The name asked for.
        tensor: String,
    },
    /// A tensor of another shape.
    #[error("{file}: tensor `{tensor}` has shape {found:?}, wanted {wanted}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape wanted, in words.
        wanted: String,
    },
    /// A tensor of another type.
    #[error("{file}: tensor `{tensor}` is stored as {found}, wanted {wanted}")]
    Type {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// How it is stored.
        found: String,
        /// What would do.
        wanted: &'static str,
    },
    /// A tensor that holds an infinity or NaN.
    #[error("{file}: tensor `{tensor}` holds {value} at index {index}; the checkpoint is damaged")]
    NotFinite {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The first such element.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A packed matrix that its scheme does not allow.
    #[error("{file}: tensor `{tensor}` is malformed")]
    Format {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The reason.
        source: FormatError,
    },
    /// A tokenizer that cannot be built, or refuses its input.
    #[error("{file}: {problem}")]
    Tokenizer {
        /// tokenizer.json.
        file: String,
        /// The reason.
        problem: String,
    },
    /// A tokenizer that belongs to another model.
    #[error(
        "{file} has {found} tokens, but config.json says vocab_size = {wanted}: the tokenizer belongs to another model; \
         copy tokenizer.json and config.json from the model the weights are of"
    )]
    OtherVocabulary {
        /// tokenizer.json.
        file: String,
        /// Tokens of its vocabulary, those added to it not counted.
        found: usize,
        /// `vocab_size` of config.json.
        wanted: u64,
    },
    /// The output folder exists.
    #[error("{path} exists; choose another folder or pass --force to replace it")]
    OutputExists {
        /// The output folder.
        path: PathBuf,
    },
    /// The output path holds something that is not a model, which is never replaced.
    #[error(
        "{path} exists and is not a model folder (it has no config.json), so it is not replaced; choose another folder"
    )]
    NotAModel {
        /// The output path.
        path: PathBuf,
    },
    /// Another process writes the same folder.
    #[error("another process is writing {path}; wait for it or choose another folder")]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// Unfinished work of other settings.
    #[error(
        "{path} holds an unfinished model {problem}; run with the same model and settings to resume it, \
         or pass --force to discard it"
    )]
    OtherUnfinished {
        /// The folder of unfinished work.
        path: PathBuf,
        /// How it differs.
        problem: String,
    },
    /// Folder of unfinished work holds files that this project did not put there.
    #[error("{path} holds `{entry}`, which is not part of an unfinished model; move it away")]
    Foreign {
        /// The folder of unfinished work.
        path: PathBuf,
        /// The first such file.
        entry: String,
    },
    /// The writer was asked for something its plan does not have.
    #[error("writing {path}: {problem}")]
    Plan {
        /// The output folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

impl CheckpointError {
    /// Unfinished work in the folder `partial` that is not what is to be written.
    pub(crate) fn other_unfinished(partial: &Path, problem: &str) -> Self {
        Self::OtherUnfinished { path: partial.to_path_buf(), problem: problem.to_owned() }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn malformed(file: &str, problem: impl Into<String>) -> Self {
        Self::Malformed { file: file.to_owned(), problem: problem.into() }
    }
}
