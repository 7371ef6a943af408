//! What rounding a matrix costs the model's output.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use marlin_checkpoint::Checkpoint;
use marlin_format::{EncodeOptions, PackedMatrix, ScaleSearch, Scheme};
use marlin_kernels::cpu::CpuBackend;
use marlin_model::{LayerRunner, LoadedLayer, RotationParts};

use super::plan::planned_name;
use super::{BitPlan, PROBE, PlannedMatrix, candidates};
use crate::calibrate::{Calibration, LayerWeights, learn};
use crate::capture::Observed;
use crate::encode_matrix::{encode_matrix, weighted_error};
use crate::evaluate::divergences;
use crate::gptq::{Hessian, Order, round_matrix};
use crate::moe::find_moe_layers;
use crate::quantize::{Task, encode_error, tasks};
use crate::role::layer_and_kind;
use crate::source::Source;
use crate::{QuantizeError, TensorRole, scheme_by_name};

/// Tokens whose distributions are compared, about: KL divergence is told exactly for each of them, and differs from token to token.
const PROBE_TOKENS: usize = 2048;
/// Rows of logits that are computed at once.
const LOGIT_ROWS: usize = 128;

type Layer = LoadedLayer<Observed<CpuBackend>>;

/// Measures what each decoder linear of a model costs in each of several formats, in mean KL divergence of the model's
/// output. The plan has all of them in one format until [`BitPlan::allocate`] chooses.
///
/// Each matrix (or that of all the experts of a layer) alone is rounded to one format by GPTQ, and part of the text is run through what follows.
/// Other formats cost as much more or less as their weights' errors are larger or smaller, each column weighted by the square of its inputs.
/// Layers are loaded one at a time, once. What is kept besides are hidden states: of the whole text, and of each rounded matrix for
/// 2048 tokens.
///
/// `progress` is told how much of the work is done, of how much.
///
/// # Errors
/// The source is quantised already, has no decoder linears, holds a weight that is not finite, or cannot be run.
pub fn measure_sensitivity(
    source: &Checkpoint,
    calibration: &Calibration<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<BitPlan, QuantizeError> {
    let moe_layers = find_moe_layers(source)?;
    let weights = Source::new(source, RotationParts::default())?;
    let probe = scheme_by_name(PROBE).expect("a format");
    let tasks =
        tasks(&weights, &moe_layers, &|name| (TensorRole::of(name, 2) == TensorRole::DecoderLinear).then_some(probe))?;
    let linears: Vec<&Task<'_>> = tasks.iter().filter(|task| task.matrix.is_some()).collect();
    let backend = Observed::new(calibration.backend.clone());
    let runner = calibration.runner(&backend, &weights)?;
    let measurement = Measurement::new(&weights, calibration, &backend, runner, progress)?;
    let mut matrices = planned(&linears);
    measurement.run(&linears, &mut matrices)?;
    let mut plan = BitPlan { model: source.name().to_owned(), bits_per_weight: 0.0, predicted_kl: 0.0, matrices };
    plan.sum_up()?;
    Ok(plan)
}

/// The matrices of a plan in the order of the model, which are of the probe's format.
fn planned(linears: &[&Task<'_>]) -> Vec<PlannedMatrix> {
    let mut matrices: Vec<PlannedMatrix> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    for task in linears {
        let (shape, _) = task.matrix.expect("linears are matrices");
        let name = planned_name(&task.name);
        match known.get(&name) {
            Some(&index) => matrices[index].experts += 1,
            None => {
                known.insert(name.clone(), matrices.len());
                matrices.push(PlannedMatrix { name, format: PROBE.into(), experts: 1, shape, kl: BTreeMap::new() });
            }
        }
    }
    matrices
}

/// A matrix by its index in the plan.
struct Probe {
    matrix: usize,
    /// Hidden states of the probed tokens in the model in which it alone is rounded.
    states: Vec<Vec<f32>>,
    /// What its weights in each candidate are off by, weighted by their inputs.
    errors: Vec<f64>,
    /// The same of the rounding to nearest that the probe stands for.
    error: f64,
}

struct Measurement<'a> {
    source: &'a Source<'a>,
    calibration: &'a Calibration<'a>,
    backend: &'a Observed<CpuBackend>,
    runner: LayerRunner<'a, Observed<CpuBackend>>,
    /// Of the original, all windows.
    states: Vec<Vec<f32>>,
    /// Windows whose tokens are probed.
    probed: Range<usize>,
    probes: Vec<Probe>,
    /// Hidden states of the probed tokens in the model in which every matrix is rounded.
    rounded: Vec<Vec<f32>>,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Measurement<'a> {
    fn new(
        source: &'a Source<'a>,
        calibration: &'a Calibration<'a>,
        backend: &'a Observed<CpuBackend>,
        runner: LayerRunner<'a, Observed<CpuBackend>>,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Self, QuantizeError> {
        let windows = calibration.windows;
        let states: Vec<Vec<f32>> = windows
            .iter()
            .map(|window| Ok(runner.embed(source.checkpoint, window)?))
            .collect::<Result<_, QuantizeError>>()?;
        let mut tokens = 0;
        let is_probed = |window: &&[u32]| {
            let is_before = tokens < PROBE_TOKENS;
            tokens += window.len();
            is_before
        };
        let probed = 0..windows.iter().take_while(is_probed).count();
        let rounded = states[probed.clone()].to_vec();
        Ok(Self { source, calibration, backend, runner, states, probed, probes: Vec::new(), rounded, progress })
    }

    /// Fills in what the matrices cost.
    fn run(mut self, linears: &[&'a Task<'a>], matrices: &mut [PlannedMatrix]) -> Result<(), QuantizeError> {
        let index: HashMap<String, usize> =
            matrices.iter().enumerate().map(|(index, matrix)| (matrix.name.clone(), index)).collect();
        for layer in 0..self.runner.layers() {
            let of_layer = linears.iter().filter(|task| layer_and_kind(&task.name).0 == Some(layer));
            self.layer(layer, &of_layer.copied().collect::<Vec<_>>(), &index)?;
            (self.progress)(layer as u64 + 1, self.runner.layers() as u64 + 1);
        }
        self.costs(matrices)
    }

    /// Rounds the matrices of a layer one by one, and carries all hidden states through it.
    fn layer(
        &mut self,
        index: usize,
        tasks: &[&'a Task<'a>],
        by_name: &HashMap<String, usize>,
    ) -> Result<(), QuantizeError> {
        let mut weights = LayerWeights::new(self.source, index, tasks);
        let mut layer = self.runner.load(&weights.checkpoint()?, index)?;
        // Those before come to this layer already changed.
        for states in self.probes.iter_mut().flat_map(|probe| &mut probe.states) {
            self.runner.run(&mut layer, states)?;
        }
        let before: Vec<Vec<f32>> = self.states[self.probed.clone()].to_vec();
        let hessians = self.hessians(&mut layer, tasks)?;
        drop(layer);
        let mut together: BTreeMap<usize, Vec<&Task<'_>>> = BTreeMap::new();
        tasks.iter().for_each(|task| together.entry(by_name[&planned_name(&task.name)]).or_default().push(task));
        let mut all = Vec::new();
        for (matrix, tasks) in together {
            let mut probe = Probe { matrix, states: before.clone(), errors: Vec::new(), error: 0.0 };
            for task in &tasks {
                let Some(hessian) = hessians.get(&*task.name) else { continue };
                let rounded = Arc::new(self.round(task, hessian, &mut probe)?);
                weights.replace(&task.name, rounded.clone());
                all.push((task.name.clone(), rounded));
            }
            let mut layer = self.runner.load(&weights.checkpoint()?, index)?;
            for states in &mut probe.states {
                self.runner.run(&mut layer, states)?;
            }
            tasks.iter().for_each(|task| weights.restore(&task.name));
            self.probes.push(probe);
        }
        all.into_iter().for_each(|(name, rounded)| weights.replace(&name, rounded));
        let mut layer = self.runner.load(&weights.checkpoint()?, index)?;
        for states in &mut self.rounded {
            self.runner.run(&mut layer, states)?;
        }
        weights.source_tensors().for_each(|tensor| self.source.checkpoint.release(tensor));
        Ok(())
    }

    /// The Hessians of the linears of a layer, by the names of their matrices; the original's states become those after it.
    fn hessians(
        &mut self,
        layer: &mut Layer,
        tasks: &[&Task<'_>],
    ) -> Result<HashMap<String, Arc<Hessian>>, QuantizeError> {
        // Weights fit the text that Hessians are made of better than any other: what is compared is another one, if there is enough.
        let is_short = self.states.len() < 2 * self.probed.len();
        let probed = self.probed.clone();
        let add = |hessian: &mut Hessian, window: usize, rows: &[f32]| {
            if is_short || !probed.contains(&window) {
                hessian.add(rows);
            }
        };
        learn(&mut self.runner, self.backend, layer, tasks, &mut self.states, Hessian::new, add)
    }

    /// Rounds a matrix to the probe's format, and notes its errors in all candidates.
    fn round(
        &self,
        task: &Task<'_>,
        hessian: &Hessian,
        probe: &mut Probe,
    ) -> Result<PackedMatrix<'static>, QuantizeError> {
        let encode = EncodeOptions { search: ScaleSearch::Mse, ..EncodeOptions::default() };
        let fail = |e| encode_error(self.source.checkpoint, &task.name, e);
        let matrix = task.source(self.source)?;
        let importance = hessian.diagonal();
        let error = |scheme: Scheme| -> Result<f64, QuantizeError> {
            let (nearest, _) = encode_matrix(&matrix, scheme, &encode).map_err(fail)?;
            Ok(weighted_error(&matrix, &nearest, &importance))
        };
        let candidates = candidates();
        probe.errors.resize(candidates.len(), 0.0);
        for (sum, (name, scheme)) in probe.errors.iter_mut().zip(candidates) {
            let error = error(scheme)?;
            *sum += error;
            if name == PROBE {
                probe.error += error;
            }
        }
        let scheme = scheme_by_name(PROBE).expect("a format");
        let factor = hessian.factor(Order::of(scheme, &importance), self.calibration.damping);
        let (rounded, _) = round_matrix(&matrix, scheme, &encode, &factor).map_err(fail)?;
        Ok(rounded)
    }

    /// Compares the output of each probe with the original's.
    fn costs(mut self, matrices: &mut [PlannedMatrix]) -> Result<(), QuantizeError> {
        let changed: Vec<&[Vec<f32>]> =
            self.probes.iter().map(|probe| &probe.states[..]).chain([&self.rounded[..]]).collect();
        let kl = compare(&mut self.runner, self.source.checkpoint, &self.states[self.probed.clone()], &changed)?;
        // Errors in one matrix come on top of those in others, which are not independent of them.
        let (all, alone) = kl.split_last().expect("of the model in which all are rounded");
        let sum: f64 = alone.iter().sum();
        let together = if sum > 0.0 { all / sum } else { 1.0 };
        for (probe, kl) in self.probes.iter().zip(alone) {
            // Of experts without a token nothing is known, and nothing is lost.
            let ratio = |error: f64| if probe.error > 0.0 { error / probe.error } else { 0.0 };
            let costs = candidates().into_iter().zip(&probe.errors);
            let costs = costs.map(|((name, _), &error)| (name.to_owned(), significant(kl * together * ratio(error))));
            matrices[probe.matrix].kl = costs.collect();
        }
        let total = self.runner.layers() as u64 + 1;
        (self.progress)(total, total);
        Ok(())
    }
}

/// Mean KL divergence of what comes out of changed hidden states from what comes out of the original ones, for each change; all of
/// them are of the same windows.
fn compare(
    runner: &mut LayerRunner<'_, Observed<CpuBackend>>,
    source: &Checkpoint,
    originals: &[Vec<f32>],
    changed: &[&[Vec<f32>]],
) -> Result<Vec<f64>, QuantizeError> {
    let (width, vocabulary) = (LOGIT_ROWS * runner.hidden_size(), runner.vocabulary());
    let mut head = runner.load_head(source, LOGIT_ROWS)?;
    let (mut original, mut logits) = (Vec::new(), Vec::new());
    let (mut sums, mut rows) = (vec![0.0; changed.len()], 0);
    for (window, states) in originals.iter().enumerate() {
        for (chunk, states) in states.chunks(width).enumerate() {
            runner.logits(&mut head, states, &mut original)?;
            rows += original.len() / vocabulary;
            for (changed, sum) in changed.iter().zip(&mut sums) {
                runner.logits(&mut head, &changed[window][chunk * width..][..states.len()], &mut logits)?;
                let kl = divergences(&original, &logits, vocabulary).ok_or(QuantizeError::Logits { window })?;
                *sum += kl.into_iter().sum::<f64>();
            }
        }
    }
    Ok(sums.into_iter().map(|sum| sum / rows.max(1) as f64).collect())
}

/// Four digits of a number: more would say nothing.
fn significant(value: f64) -> f64 {
    format!("{value:.3e}").parse().expect("a number")
}
