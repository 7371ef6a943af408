//! Quantising a checkpoint in parts, by processes that share nothing but folders.

use std::collections::BTreeMap;
use std::path::Path;

use marlin_checkpoint::{Checkpoint, ExportLayout, Shards};
use marlin_format::EncodeOptions;
use serde::{Deserialize, Serialize};

use crate::moe::find_moe_layers;
use crate::quantize::{Made, Task, encode_options, in_layout, refuse_source_as_output, tasks, writer_options};
use crate::source::Source;
use crate::{ErrorStats, Progress, QuantizeError, QuantizeOptions, Recipe};

/// A weight file that an output will have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedShard {
    /// Its name.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// Bytes of the source that it is made of.
    pub source_bytes: u64,
    /// The number of tensors in it, packed matrices counted once.
    pub tensors: usize,
    /// Whether it is written already.
    pub finished: bool,
}

/// The weight files that [`crate::quantize`] would write, each of which [`quantize_shard`] can write by itself.
///
/// # Errors
/// As [`quantize_shard`].
pub fn plan_shards(
    source: &Checkpoint,
    out: &Path,
    recipe: &Recipe,
    options: &QuantizeOptions<'_>,
) -> Result<Vec<PlannedShard>, QuantizeError> {
    with_shards(source, out, recipe, options, |_, tasks, _, shards| {
        let planned = |shard| {
            let source_bytes = shards.tensors(shard).map(|tensor| tasks[tensor].bytes).sum();
            Ok(PlannedShard {
                file: shards.name(shard).to_owned(),
                bytes: shards.bytes(shard),
                source_bytes,
                tensors: shards.tensors(shard).count(),
                finished: shards.is_finished(shard)?,
            })
        };
        (0..shards.count()).map(planned).collect()
    })
}

/// Writes one weight file of the output, from 0, unless it is written already; returns whether it did.
///
/// Any number of processes may do so at once on machines that share the folders: [`crate::quantize`] then takes over what is finished, writes the rest, and
/// publishes the output. It is the same to the byte whoever wrote which part of it.
///
/// # Errors
/// As [`crate::quantize`]; calibration or scaling are asked for, which run the model; the layout has one file; there are fewer weight files.
pub fn quantize_shard(
    source: &Checkpoint,
    out: &Path,
    recipe: &Recipe,
    shard: usize,
    mut options: QuantizeOptions<'_>,
) -> Result<bool, QuantizeError> {
    let mut progress = options.progress.take();
    with_shards(source, out, recipe, &options, |source, tasks, encode, shards| {
        let count = shards.count();
        if shard >= count {
            return Err(QuantizeError::NoShard { shard: shard + 1, count });
        }
        if shards.is_finished(shard)? {
            return Ok(false);
        }
        let tasks: Vec<&Task<'_>> = shards.tensors(shard).map(|tensor| &tasks[tensor]).collect();
        let total = tasks.iter().map(|task| task.bytes).sum();
        let mut writer = shards.write(shard)?;
        let (mut note, mut done) = (Note::default(), 0);
        for task in tasks {
            match task.make(source, encode)? {
                Made::Kept(tensor) => writer.write_raw(&task.name, tensor.dtype, tensor.shape, &tensor.bytes)?,
                Made::Encoded(matrix, error) => {
                    writer.write_matrix(&task.name, &matrix)?;
                    note.errors.insert(task.name.to_string(), error.into());
                }
            }
            task.release(source.checkpoint);
            done += task.bytes;
            if let Some(progress) = &mut progress {
                progress(Progress { tensor: &task.name, done, total });
            }
        }
        writer.finish(&serde_json::to_vec(&note).map_err(QuantizeError::Note)?)?;
        Ok(true)
    })
}

/// Decides about every tensor, as [`crate::quantize`] does, and where it lies.
fn with_shards<T>(
    checkpoint: &Checkpoint,
    out: &Path,
    recipe: &Recipe,
    options: &QuantizeOptions<'_>,
    use_them: impl FnOnce(&Source<'_>, &[Task<'_>], &EncodeOptions, Shards) -> Result<T, QuantizeError>,
) -> Result<T, QuantizeError> {
    let layout = options.layout;
    if layout == ExportLayout::Gguf {
        return Err(QuantizeError::NotSharded { layout });
    }
    let runs_model =
        [(options.calibration.is_some(), "weights are calibrated"), (options.scaling.is_some(), "channels are scaled")];
    if let Some((_, what)) = runs_model.into_iter().find(|(is_asked, _)| *is_asked) {
        return Err(QuantizeError::ShardNeedsModel { what });
    }
    let recipe = in_layout(recipe, layout)?;
    let source = Source::new(checkpoint, recipe.rotate)?;
    let moe_layers = find_moe_layers(checkpoint)?;
    refuse_source_as_output(checkpoint, out)?;
    let tasks = tasks(&source, &moe_layers, &|name| recipe.scheme(name, 2))?;
    let writer_options = writer_options(&source, &recipe.fingerprint(layout), options)?;
    let planned = tasks.iter().map(|task| task.planned.clone()).collect();
    let shards = Shards::new(out, planned, &writer_options)?;
    use_them(&source, &tasks, &encode_options(recipe.search, layout), shards)
}

/// What is kept of a weight file beside it.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Note {
    /// Of its packed matrices, by name.
    errors: BTreeMap<String, ErrorBits>,
}

/// Errors to the bit, which decimal numbers are not when they are read again.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct ErrorBits {
    signal: u64,
    noise: u64,
    max_abs: u32,
}

impl From<ErrorStats> for ErrorBits {
    fn from(error: ErrorStats) -> Self {
        Self { signal: error.signal.to_bits(), noise: error.noise.to_bits(), max_abs: error.max_abs.to_bits() }
    }
}

impl From<ErrorBits> for ErrorStats {
    fn from(bits: ErrorBits) -> Self {
        let [signal, noise] = [bits.signal, bits.noise].map(f64::from_bits);
        Self { signal, noise, max_abs: f32::from_bits(bits.max_abs) }
    }
}

/// The errors that processes noted of what they wrote.
pub(crate) fn noted_errors(notes: &[Vec<u8>]) -> Result<BTreeMap<String, ErrorStats>, QuantizeError> {
    let notes = notes.iter().map(|note| serde_json::from_slice::<Note>(note).map_err(QuantizeError::Note));
    let notes = notes.collect::<Result<Vec<_>, _>>()?;
    Ok(notes.into_iter().flat_map(|note| note.errors).map(|(name, error)| (name, error.into())).collect())
}
