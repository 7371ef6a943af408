//! Quantising a checkpoint matrix by matrix, each weight rounded by itself.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use marlin_checkpoint::{Checkpoint, ExportLayout, PlannedTensor, Storage, Tensor, WriterOptions};
use marlin_format::{EncodeOptions, PackedMatrix, ScaleSearch, Scheme};
use marlin_model::{RotationBlocks, RotationParts};

use crate::calibrate::{Calibration, Calibrator, Finished, HeldOut, Kept};
use crate::capture::Observed;
use crate::encode_matrix::{encode_matrix, matrix_error};
use crate::moe::{ExpertMatrix, ExpertTensors, MoeLayer, find_moe_layers};
use crate::output::Output;
use crate::scaling::find_scales;
use crate::shard;
use crate::source::Source;
use crate::{ErrorStats, Footprint, QuantizeError, Recipe, TensorRole};

/// What a run may do and how it reports.
pub struct QuantizeOptions<'a> {
    /// Replace an existing output folder, and discard unfinished work of other settings.
    pub force: bool,
    /// Bytes written between two syncs to disk: about what has to be done again after a kill.
    pub sync_bytes: u64,
    /// Largest weight file.
    pub max_shard_bytes: u64,
    /// How the output lays packed matrices out.
    pub layout: ExportLayout,
    /// Round weights by what they are multiplied with; each by itself if there is none.
    pub calibration: Option<Calibration<'a>>,
    /// Scale the channels of linears first, as this text asks for (AWQ): an equal model, whose channels that matter are larger, is rounded.
    pub scaling: Option<Calibration<'a>>,
    /// Called after each tensor and once at the end.
    pub progress: Option<&'a mut dyn FnMut(Progress<'_>)>,
    /// Makes the model card (README.md) that the output folder gets.
    pub card: Option<&'a dyn Fn(&Report) -> String>,
    /// The plan of formats (plan.json) that the output folder gets.
    pub plan: Option<&'a str>,
}

impl Default for QuantizeOptions<'_> {
    fn default() -> Self {
        let WriterOptions { sync_bytes, max_shard_bytes, layout, .. } = WriterOptions::default();
        Self {
            force: false,
            sync_bytes,
            max_shard_bytes,
            layout,
            calibration: None,
            scaling: None,
            progress: None,
            card: None,
            plan: None,
        }
    }
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The tensor that is finished; empty at the end.
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
    /// Tensors that an earlier, interrupted run had finished, or other processes in shards.
    pub resumed: usize,
    /// What was kept on the calibration's held-out text, if there was one.
    pub kept_quality: Option<Kept>,
    /// Inputs of linears whose channels were scaled; `None` if that was not asked for.
    pub scaled_inputs: Option<usize>,
    /// What was rotated before, in which blocks.
    pub rotation: Option<RotationBlocks>,
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
    /// How far it is from the source, as it is when it is rotated.
    pub error: ErrorStats,
}

/// A tensor of the output, and where it comes from.
pub(crate) struct Task<'a> {
    pub(crate) name: Cow<'a, str>,
    pub(crate) role: TensorRole,
    pub(crate) from: Origin<'a>,
    weights: u64,
    /// Of the source.
    pub(crate) bytes: u64,
    /// Shape and storage of a matrix that is encoded; `None` keeps the tensor.
    pub(crate) matrix: Option<([usize; 2], Scheme)>,
    pub(crate) planned: PlannedTensor,
}

/// What a tensor of the output is made of.
pub(crate) enum Made<'a> {
    /// A tensor that is not quantised.
    Kept(Tensor<'a>),
    /// A matrix that is, and how far it is from the source.
    Encoded(PackedMatrix<'static>, ErrorStats),
}

/// Where a tensor of the output comes from.
#[derive(Clone, Copy)]
pub(crate) enum Origin<'a> {
    /// The tensor of the same name.
    Same,
    /// A tensor that holds such a matrix of all experts.
    Expert(&'a MoeLayer, usize, ExpertMatrix),
}

/// Schemes of matrices by their names, and how they are encoded. All else is kept.
pub(crate) struct Assignment {
    pub(crate) schemes: BTreeMap<String, Scheme>,
    pub(crate) encode: EncodeOptions,
}

impl Assignment {
    pub(crate) fn new(encode: EncodeOptions) -> Self {
        Self { schemes: BTreeMap::new(), encode }
    }

    /// All that decides what becomes of a given model, beside the layout and the version of the quantisers.
    fn fingerprint(&self) -> String {
        format!("{:?}, {:?}", self.encode, self.schemes)
    }
}

/// Writes `source` to the folder (or GGUF file) `out` in the formats of `recipe`, and reports the error of every matrix.
///
/// Weights are decoded, encoded and compared in slices of rows on rayon's current thread pool; memory stays near one tensor.
/// The output is the same to the byte whatever the number of threads, and whether or not a run was interrupted: the same call goes on where
/// the earlier one stopped. (A GGUF file is begun anew.) It also takes over what other processes wrote by [`crate::quantize_shard`].
///
/// # Errors
/// The source is quantised or rotated already, cannot be rotated as the recipe wants it, holds NaN or infinity, has no decoder linears known here; the output cannot be written (see
/// [`CheckpointWriter::create`]) or is the source itself. A failed run leaves no output folder.
pub fn quantize(
    source: &Checkpoint,
    out: &Path,
    recipe: &Recipe,
    options: QuantizeOptions<'_>,
) -> Result<Report, QuantizeError> {
    let recipe = in_layout(recipe, options.layout)?;
    let decides = recipe.fingerprint(options.layout);
    let source = Source::new(source, recipe.rotate)?;
    run(source, out, &|name| recipe.scheme(name, 2), recipe.search, decides, options)
}

/// [`quantize`] with a scheme for each matrix that is named, and all else kept.
pub(crate) fn quantize_as(
    source: &Checkpoint,
    out: &Path,
    assignment: &Assignment,
    options: QuantizeOptions<'_>,
) -> Result<Report, QuantizeError> {
    let layout = options.layout;
    let schemes = assignment.schemes.iter().map(|(name, scheme)| Ok((name.as_str(), layout.scheme(*scheme)?)));
    let schemes: BTreeMap<&str, Scheme> = schemes.collect::<Result<_, QuantizeError>>()?;
    let decides = format!("metal-marlin {}, {layout}, {}", env!("CARGO_PKG_VERSION"), assignment.fingerprint());
    let source = Source::new(source, RotationParts::default())?;
    run(source, out, &|name| schemes.get(name).copied(), assignment.encode.search, decides, options)
}

/// Writes the output; `decides` is all that it depends on beside the source.
fn run(
    source: Source<'_>,
    out: &Path,
    scheme: &dyn Fn(&str) -> Option<Scheme>,
    search: ScaleSearch,
    decides: String,
    mut options: QuantizeOptions<'_>,
) -> Result<Report, QuantizeError> {
    let (layout, checkpoint) = (options.layout, source.checkpoint);
    let moe_layers = find_moe_layers(checkpoint)?;
    refuse_source_as_output(checkpoint, out)?;
    let encode = encode_options(search, layout);
    let text = |calibration: &Option<Calibration<'_>>| calibration.as_ref().map(Calibration::fingerprint);
    let calibration = text(&options.calibration).map_or(String::new(), |text| format!(", {text}"));
    let scaling = text(&options.scaling).map_or(String::new(), |text| format!(", channels scaled, {text}"));
    let source = match &options.scaling {
        None => source,
        Some(scaling) => {
            let scales = find_scales(&source, &tasks(&source, &moe_layers, scheme)?, &encode, scaling)?;
            source.scaled(scales)
        }
    };
    let source = &source;
    let tasks = tasks(source, &moe_layers, scheme)?;
    let writer_options = writer_options(source, &format!("{decides}{scaling}{calibration}"), &options)?;
    // What stands against running the model is said before anything is written.
    let backend = options.calibration.as_ref().map(|calibration| Observed::new(calibration.backend.clone()));
    let calibrator = backend
        .as_ref()
        .zip(options.calibration.as_ref())
        .map(|(backend, calibration)| Calibrator::new(backend, source, &tasks, &encode, calibration));
    let calibrator = calibrator.transpose()?;
    let planned = tasks.iter().map(|task| task.planned.clone()).collect();
    let mut writer = Output::create(out, planned, checkpoint, &writer_options)?;

    let resumed = writer.resumed();
    let total = tasks.iter().map(|task| task.bytes).sum();
    let mut done = 0;
    let mut progress = |tensor: &str, done| {
        if let Some(progress) = &mut options.progress {
            progress(Progress { tensor, done, total });
        }
    };
    // The error of a matrix that another process wrote is in its note; of one that an earlier run wrote, it is measured when the output can be read.
    let noted = shard::noted_errors(writer.notes())?;
    let mut errors: Vec<_> = tasks.iter().map(|task| noted.get(&*task.name).copied()).collect();
    let written = write_all(source, &tasks, &encode, calibrator, &mut writer, &mut |task, error| {
        errors[task] = error.or(errors[task]);
        done += tasks[task].bytes;
        progress(&tasks[task].name, done);
    });
    // The same weights would fail again, and the half-written folder would be in the way of other settings.
    let held_out = match written {
        Ok(held_out) => held_out,
        Err(e) => {
            if e.is_in_the_weights() {
                writer.discard()?;
            }
            return Err(e);
        }
    };
    let complete = writer.complete()?;
    // A GGUF file can be read under its name only.
    let kept = match (held_out, complete.folder()) {
        (Some(held_out), Some(folder)) => Some(held_out.measure(checkpoint, &Checkpoint::open(&folder)?)?),
        _ => None,
    };
    let report = Report { kept_quality: kept, ..report(source, complete.folder(), &tasks, errors, resumed)? };
    complete.publish(options.card.map(|card| card(&report)), options.plan)?;
    progress("", done);
    Ok(report)
}

/// Writes every tensor that no earlier run has written. `finished` is told each task, by its index, and the error of the matrix that it encoded.
fn write_all<'a>(
    source: &Source<'_>,
    tasks: &[Task<'_>],
    encode: &EncodeOptions,
    calibrator: Option<Calibrator<'a>>,
    writer: &mut Output,
    finished: &mut Finished<'_>,
) -> Result<Option<HeldOut<'a>>, QuantizeError> {
    let calibrated: HashSet<usize> = calibrator.iter().flat_map(Calibrator::tasks).collect();
    for (index, task) in tasks.iter().enumerate().filter(|(index, _)| !calibrated.contains(index)) {
        let error = if writer.is_done(&task.name) { None } else { write(source, task, encode, writer)? };
        task.release(source.checkpoint);
        finished(index, error);
    }
    calibrator.map_or(Ok(None), |calibrator| calibrator.run(writer, finished))
}

pub(crate) fn encode_options(search: ScaleSearch, layout: ExportLayout) -> EncodeOptions {
    EncodeOptions { search, power_of_two_global: layout.stores_inverse_globals() }
}

/// How the output is written; `decides` is all that it depends on beside the source.
pub(crate) fn writer_options(
    source: &Source<'_>,
    decides: &str,
    options: &QuantizeOptions<'_>,
) -> Result<WriterOptions, QuantizeError> {
    Ok(WriterOptions {
        fingerprint: format!("source {}, {decides}", source_fingerprint(source.checkpoint)?),
        force: options.force,
        max_shard_bytes: options.max_shard_bytes,
        sync_bytes: options.sync_bytes,
        layout: options.layout,
        rotations: source.rotations(),
    })
}

/// The recipe with schemes as the layout stores them.
///
/// # Errors
/// The layout does not have them, or cannot say what is rotated.
pub(crate) fn in_layout(recipe: &Recipe, layout: ExportLayout) -> Result<Recipe, QuantizeError> {
    if recipe.rotate != RotationParts::default() && !layout.rotates() {
        return Err(QuantizeError::NotRotatedIn { layout });
    }
    let embedding = match recipe.embedding {
        Some(scheme) if !scheme.is_dense() && !layout.packs_embeddings() => {
            return Err(QuantizeError::EmbeddingNotPacked { layout, scheme: scheme.to_string() });
        }
        Some(scheme) if !scheme.is_dense() => Some(layout.scheme(scheme)?),
        other => other,
    };
    let exceptions = recipe.exceptions.iter().map(|(name, scheme)| Ok((name.clone(), layout.scheme(*scheme)?)));
    Ok(Recipe {
        linears: layout.scheme(recipe.linears)?,
        exceptions: exceptions.collect::<Result<_, QuantizeError>>()?,
        embedding,
        search: recipe.search,
        rotate: recipe.rotate,
    })
}

/// Decides about every tensor.
pub(crate) fn tasks<'a>(
    source: &Source<'a>,
    moe_layers: &'a [MoeLayer],
    scheme: &dyn Fn(&str) -> Option<Scheme>,
) -> Result<Vec<Task<'a>>, QuantizeError> {
    let mut tasks = Vec::new();
    for name in source.checkpoint.tensor_names() {
        let Some(info) = source.checkpoint.info(name) else { continue };
        let dtype = match info.storage {
            Storage::Plain(dtype) => dtype,
            Storage::Packed(scheme) => return Err(QuantizeError::already_quantized(source.checkpoint, name, scheme)),
        };
        let of_experts = matrices_of_experts(moe_layers, name, &info.shape, info.bytes, scheme);
        if !of_experts.is_empty() {
            tasks.extend(of_experts);
            continue;
        }
        let role = TensorRole::of(name, info.shape.len());
        let (matrix, planned) = match (info.shape.as_slice(), scheme(name)) {
            (&[rows, cols], Some(scheme)) => {
                (Some(([rows, cols], scheme)), PlannedTensor::matrix(name, rows, cols, scheme))
            }
            _ => (None, PlannedTensor::raw(name, source.dtype(name, dtype), info.shape.clone())),
        };
        let weights = info.shape.iter().map(|&n| n as u64).product();
        tasks.push(Task { name: name.into(), role, from: Origin::Same, weights, bytes: info.bytes, matrix, planned });
    }
    if !tasks.iter().any(|task| task.role == TensorRole::DecoderLinear) {
        return Err(QuantizeError::nothing_to_quantize(source.checkpoint));
    }
    Ok(tasks)
}

/// What becomes of a tensor that holds matrices of all experts; nothing, if it is none or is kept.
fn matrices_of_experts<'a>(
    moe_layers: &'a [MoeLayer],
    name: &str,
    shape: &[usize],
    bytes: u64,
    scheme: &dyn Fn(&str) -> Option<Scheme>,
) -> Vec<Task<'a>> {
    let found = moe_layers.iter().find_map(|layer| match &layer.experts {
        ExpertTensors::Fused { gate_up, transposed, .. } if gate_up == name => {
            Some((layer, &[ExpertMatrix::Gate, ExpertMatrix::Up][..], *transposed))
        }
        ExpertTensors::Fused { down, transposed, .. } if down == name => {
            Some((layer, &[ExpertMatrix::Down][..], *transposed))
        }
        _ => None,
    });
    let (Some((layer, matrices, transposed)), &[experts, first, second]) = (found, shape) else { return Vec::new() };
    let [rows, cols] = if transposed { [second, first] } else { [first, second] };
    let rows = rows / matrices.len();
    let pairs = (0..experts).flat_map(|expert| matrices.iter().map(move |&matrix| (expert, matrix)));
    let task = |(expert, matrix): (usize, ExpertMatrix)| {
        let name = layer.expert_name(expert, matrix);
        let scheme = scheme(&name)?;
        Some(Task {
            role: TensorRole::of(&name, 2),
            from: Origin::Expert(layer, expert, matrix),
            weights: (rows * cols) as u64,
            bytes: bytes / (experts * matrices.len()) as u64,
            matrix: Some(([rows, cols], scheme)),
            planned: PlannedTensor::matrix(&name, rows, cols, scheme),
            name: name.into(),
        })
    };
    // All of them or none: what is kept stays one tensor.
    pairs.map(task).collect::<Option<_>>().unwrap_or_default()
}

/// With `force`, the source would be replaced by its own rounding.
pub(crate) fn refuse_source_as_output(source: &Checkpoint, out: &Path) -> Result<(), QuantizeError> {
    match (source.path().map(fs::canonicalize), fs::canonicalize(out)) {
        (Some(Ok(source)), Ok(out)) if source == out => Err(QuantizeError::OutputIsSource { path: out }),
        _ => Ok(()),
    }
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
    source: &Source<'_>,
    task: &Task<'_>,
    encode: &EncodeOptions,
    writer: &mut Output,
) -> Result<Option<ErrorStats>, QuantizeError> {
    match task.make(source, encode)? {
        Made::Kept(tensor) => {
            writer.write_raw(&task.name, tensor.dtype, tensor.shape, &tensor.bytes)?;
            Ok(None)
        }
        Made::Encoded(matrix, error) => {
            writer.write_matrix(&task.name, &matrix)?;
            Ok(Some(error))
        }
    }
}

pub(crate) fn encode_error(source: &Checkpoint, tensor: &str, error: marlin_format::FormatError) -> QuantizeError {
    QuantizeError::Encode { model: source.name().to_owned(), tensor: tensor.to_owned(), source: error }
}

impl Task<'_> {
    /// What the tensor takes in the output.
    fn footprint(&self) -> Footprint {
        let packed = self.matrix.and_then(|([rows, cols], scheme)| scheme.packed_bytes(rows, cols).ok());
        Footprint::of_tensor(self.role, self.weights, packed.map_or(self.bytes, |bytes| bytes as u64))
    }

    /// What is written, of what the source has.
    pub(crate) fn make<'a>(&self, source: &Source<'a>, encode: &EncodeOptions) -> Result<Made<'a>, QuantizeError> {
        let Some((_, scheme)) = self.matrix else { return Ok(Made::Kept(source.tensor(&self.name)?)) };
        let encoded = encode_matrix(&self.source(source)?, scheme, encode);
        let (matrix, error) = encoded.map_err(|e| encode_error(source.checkpoint, &self.name, e))?;
        Ok(Made::Encoded(matrix, error))
    }

    /// Gives back the memory of what was read of the source, so that a model larger than memory does not stay mapped. Of experts that are one
    /// tensor, with the last of them.
    pub(crate) fn release(&self, source: &Checkpoint) {
        match self.from {
            Origin::Same => source.release(&self.name),
            Origin::Expert(layer, expert, _) if expert + 1 == layer.experts() => {
                layer.fused_tensors().into_iter().for_each(|tensor| source.release(tensor));
            }
            Origin::Expert(..) => {}
        }
    }

    /// The matrix before it is encoded.
    pub(crate) fn source<'a>(&self, source: &Source<'a>) -> Result<PackedMatrix<'a>, QuantizeError> {
        match self.from {
            Origin::Same => source.matrix(&self.name),
            Origin::Expert(layer, expert, matrix) => source.expert(layer, expert, matrix),
        }
    }
}

fn report(
    source: &Source<'_>,
    output: Option<PathBuf>,
    tasks: &[Task<'_>],
    errors: Vec<Option<ErrorStats>>,
    resumed: usize,
) -> Result<Report, QuantizeError> {
    // What an earlier run wrote is compared with the source as it is read.
    let is_measured = |(task, error): (&Task<'_>, &Option<ErrorStats>)| task.matrix.is_none() || error.is_some();
    let output = output
        .filter(|_| !tasks.iter().zip(&errors).all(is_measured))
        .map(|folder| Checkpoint::open(&folder))
        .transpose()?;
    let mut matrices = Vec::new();
    for (task, error) in tasks.iter().zip(errors) {
        let Some((shape, scheme)) = task.matrix else { continue };
        let error = match (error, &output) {
            (Some(error), _) => error,
            (None, Some(output)) => matrix_error(&task.source(source)?, &output.matrix_any(&task.name)?),
            (None, None) => unreachable!("a matrix that this run did not encode was encoded by an earlier one"),
        };
        matrices.push(MatrixReport { name: task.name.to_string(), role: task.role, shape, scheme, error });
    }
    let unknown = tasks.iter().filter(|task| task.role == TensorRole::Unknown && task.matrix.is_none());
    Ok(Report {
        matrices,
        kept: unknown.map(|task| task.name.to_string()).collect(),
        resumed,
        kept_quality: None,
        scaled_inputs: source.scaled_inputs(),
        rotation: source.blocks(),
        before: Footprint::of(source.checkpoint),
        after: tasks.iter().map(Task::footprint).sum(),
    })
}
