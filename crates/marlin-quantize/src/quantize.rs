//! Quantising a checkpoint matrix by matrix, each weight rounded by itself.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use marlin_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Layout, PlannedTensor, Storage, WriterOptions};
use marlin_format::{EncodeOptions, Scheme};

use crate::encode_matrix::{encode_matrix, matrix_error};
use crate::{ErrorStats, Footprint, QuantizeError, Recipe, TensorRole};

/// What a run may do and how it reports.
pub struct QuantizeOptions<'a> {
    /// Replace an existing output folder, and discard unfinished work of other settings.
    pub force: bool,
    /// Bytes written between two syncs to disk: about what has to be done again after a kill.
    pub sync_bytes: u64,
    /// How the output lays packed matrices out.
    pub layout: Layout,
    /// Called before each tensor and once at the end.
    pub progress: Option<&'a mut dyn FnMut(Progress<'_>)>,
}

impl Default for QuantizeOptions<'_> {
    fn default() -> Self {
        let WriterOptions { sync_bytes, layout, .. } = WriterOptions::default();
        Self { force: false, sync_bytes, layout, progress: None }
    }
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The tensor that is worked on; empty at the end.
    pub tensor: &'a str,
    /// Bytes of the source that are finished.
    pub done: u64,
    /// Bytes of the source.
    pub total: u64,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Every matrix that was encoded, in the order of the checkpoint.
    pub matrices: Vec<MatrixReport>,
    /// Matrices of unknown kind, kept as they were.
    pub kept: Vec<String>,
    /// Tensors that an earlier, interrupted run had finished.
    pub resumed: usize,
    /// The source's weights.
    pub before: Footprint,
    /// The output's weights.
    pub after: Footprint,
}

/// What became of one matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct MatrixReport {
    /// Its name.
    pub name: String,
    /// What it is to the model.
    pub role: TensorRole,
    /// Output features N, input features K.
    pub shape: [usize; 2],
    /// How it is stored now.
    pub scheme: Scheme,
    /// How far it is from the source.
    pub error: ErrorStats,
}

/// A tensor of the source and what is to become of it.
struct Task<'a> {
    name: &'a str,
    role: TensorRole,
    shape: Vec<usize>,
    bytes: u64,
    /// `None` keeps it.
    scheme: Option<Scheme>,
    planned: PlannedTensor,
}

/// Writes `source` to the folder `out` in the formats of `recipe`, and reports the error of every matrix.
///
/// Weights are decoded, encoded and compared in slices of rows on rayon's current thread pool; memory stays near one tensor.
/// The output is the same to the byte whatever the number of threads, and whether or not a run was interrupted: the same call goes on where
/// the earlier one stopped.
///
/// # Errors
/// The source is quantised already, holds NaN or infinity, has no decoder linears known here; the output cannot be written (see
/// [`CheckpointWriter::create`]) or is the source itself. A failed run leaves no output folder.
pub fn quantize(
    source: &Checkpoint,
    out: &Path,
    recipe: &Recipe,
    mut options: QuantizeOptions<'_>,
) -> Result<Report, QuantizeError> {
    let layout = options.layout;
    let recipe = &in_layout(recipe, layout)?;
    let tasks = plan(source, recipe)?;
    refuse_source_as_output(source, out)?;
    let writer_options = WriterOptions {
        fingerprint: fingerprint(source, recipe, layout)?,
        force: options.force,
        sync_bytes: options.sync_bytes,
        layout,
        ..WriterOptions::default()
    };
    let planned = tasks.iter().map(|task| task.planned.clone()).collect();
    let mut writer =
        CheckpointWriter::create(out, planned, source.config().clone(), source.side_files()?, &writer_options)?;

    let encode = EncodeOptions { search: recipe.search, power_of_two_global: layout.stores_inverse_globals() };
    let resumed = writer.resumed();
    let total = tasks.iter().map(|task| task.bytes).sum();
    let mut done = 0;
    let mut progress = |tensor: &str, done| {
        if let Some(progress) = &mut options.progress {
            progress(Progress { tensor, done, total });
        }
    };
    let mut errors = Vec::with_capacity(tasks.len());
    for task in &tasks {
        progress(task.name, done);
        // The error of a matrix that an earlier run wrote is measured when the output can be read.
        let written = if writer.is_done(task.name) { Ok(None) } else { write(source, task, &encode, &mut writer) };
        match written {
            Ok(error) => errors.push(error),
            // The same weights would fail again, and the half-written folder would be in the way of other settings.
            Err(e) if e.is_in_the_weights() => {
                writer.discard()?;
                return Err(e);
            }
            Err(e) => return Err(e),
        }
        done += task.bytes;
    }
    writer.finish()?;
    progress("", done);

    let output = Checkpoint::open(out)?;
    report(source, &output, &tasks, errors, resumed)
}

/// The recipe with schemes as the layout stores them.
fn in_layout(recipe: &Recipe, layout: Layout) -> Result<Recipe, QuantizeError> {
    let embedding = match recipe.embedding {
        Some(scheme) if !scheme.is_dense() && !layout.packs_embeddings() => {
            return Err(QuantizeError::EmbeddingNotPacked { layout, scheme: scheme.to_string() });
        }
        other => other,
    };
    let exceptions = recipe.exceptions.iter().map(|(name, scheme)| Ok((name.clone(), layout.scheme(*scheme)?)));
    Ok(Recipe {
        linears: layout.scheme(recipe.linears)?,
        exceptions: exceptions.collect::<Result<_, QuantizeError>>()?,
        embedding,
        search: recipe.search,
    })
}

/// Decides about every tensor.
fn plan<'a>(source: &'a Checkpoint, recipe: &Recipe) -> Result<Vec<Task<'a>>, QuantizeError> {
    let mut tasks = Vec::new();
    for name in source.tensor_names() {
        let Some(info) = source.info(name) else { continue };
        let dtype = match info.storage {
            Storage::Plain(dtype) => dtype,
            Storage::Packed(scheme) => return Err(QuantizeError::already_quantized(source, name, scheme)),
        };
        let role = TensorRole::of(name, info.shape.len());
        let (scheme, planned) = match (recipe.scheme(name, info.shape.len()), info.shape.as_slice()) {
            (Some(scheme), &[rows, cols]) => (Some(scheme), PlannedTensor::matrix(name, rows, cols, scheme)),
            _ => (None, PlannedTensor::raw(name, dtype, info.shape.clone())),
        };
        tasks.push(Task { name, role, shape: info.shape, bytes: info.bytes, scheme, planned });
    }
    if !tasks.iter().any(|task| task.role == TensorRole::DecoderLinear) {
        return Err(QuantizeError::nothing_to_quantize(source));
    }
    Ok(tasks)
}

/// With `force`, the source would be replaced by its own rounding.
fn refuse_source_as_output(source: &Checkpoint, out: &Path) -> Result<(), QuantizeError> {
    match (source.folder().map(fs::canonicalize), fs::canonicalize(out)) {
        (Some(Ok(source)), Ok(out)) if source == out => Err(QuantizeError::OutputIsSource { path: out }),
        _ => Ok(()),
    }
}

/// Everything the output depends on.
fn fingerprint(source: &Checkpoint, recipe: &Recipe, layout: Layout) -> Result<String, QuantizeError> {
    Ok(format!("source {}, {}", source_fingerprint(source)?, recipe.fingerprint(layout)))
}

/// Tells models apart by config.json and the first bytes of each tensor, which is enough for two trainings of one model.
///
/// # Errors
/// The model is quantised already.
pub fn source_fingerprint(source: &Checkpoint) -> Result<String, QuantizeError> {
    const SAMPLE: usize = 256;
    let mut hasher = DefaultHasher::new();
    source.config().to_string().hash(&mut hasher);
    for name in source.tensor_names() {
        if let Some(Storage::Packed(scheme)) = source.info(name).map(|info| info.storage) {
            return Err(QuantizeError::already_quantized(source, name, scheme));
        }
        let bytes = source.tensor(name)?.bytes;
        (name, &bytes[..bytes.len().min(SAMPLE)]).hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

/// Writes one tensor; the error of a matrix that was encoded.
fn write(
    source: &Checkpoint,
    task: &Task<'_>,
    encode: &EncodeOptions,
    writer: &mut CheckpointWriter,
) -> Result<Option<ErrorStats>, QuantizeError> {
    let Some(scheme) = task.scheme else {
        let tensor = source.tensor(task.name)?;
        if let &[len] = tensor.shape
            && matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
        {
            // Refuses what is not finite.
            source.vector(task.name, len)?;
        }
        writer.write_raw(task.name, tensor.dtype, tensor.shape, tensor.bytes)?;
        return Ok(None);
    };
    let matrix = source.matrix_any(task.name)?;
    let (encoded, error) = encode_matrix(&matrix, scheme, encode).map_err(|e| encode_error(source, task.name, e))?;
    writer.write_matrix(task.name, &encoded)?;
    Ok(Some(error))
}

fn encode_error(source: &Checkpoint, tensor: &str, error: marlin_format::FormatError) -> QuantizeError {
    QuantizeError::Encode { model: source.name().to_owned(), tensor: tensor.to_owned(), source: error }
}

fn report(
    source: &Checkpoint,
    output: &Checkpoint,
    tasks: &[Task<'_>],
    errors: Vec<Option<ErrorStats>>,
    resumed: usize,
) -> Result<Report, QuantizeError> {
    let mut matrices = Vec::new();
    for (task, error) in tasks.iter().zip(errors) {
        let (Some(scheme), &[rows, cols]) = (task.scheme, task.shape.as_slice()) else { continue };
        let error = match error {
            Some(error) => error,
            None => matrix_error(&source.matrix_any(task.name)?, &output.matrix_any(task.name)?),
        };
        matrices.push(MatrixReport { name: task.name.to_owned(), role: task.role, shape: [rows, cols], scheme, error });
    }
    let unknown = tasks.iter().filter(|task| task.role == TensorRole::Unknown);
    Ok(Report {
        matrices,
        kept: unknown.map(|task| task.name.to_owned()).collect(),
        resumed,
        before: Footprint::of(source),
        after: Footprint::of(output),
    })
}
