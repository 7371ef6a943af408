//! Quantising layer after layer by what their linears are given.
//!
//! The hidden states of a calibration text are carried through the model, a layer at a time, as the layers quantised so far leave them.
//! In a layer, linears are quantised in the order in which they run, each by inputs that those before it make when they are quantised: what
//! one rounds off, the next can make up for. In memory are one layer, the hidden states, and the Hessians of linears that run side by side.

mod held_out;
mod layer;
mod learn;
mod seen;
mod states;

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use marlin_format::{EncodeOptions, PackedMatrix};
use marlin_kernels::cpu::CpuBackend;
use marlin_model::{LayerRunner, LoadedLayer, SharedInput};

pub(crate) use self::held_out::HeldOut;
pub use self::held_out::Kept;
pub(crate) use self::layer::LayerWeights;
pub(crate) use self::learn::learn;
use self::seen::Seen;
use self::states::States;
use crate::capture::Observed;
use crate::encode_matrix::{largest_weight, matrix_error, slices};
use crate::gptq::{Factor, Order, round_matrix};
use crate::output::Output;
use crate::quantize::{Task, encode_error};
use crate::role::layer_and_kind;
use crate::source::Source;
use crate::{ErrorStats, QuantizeError, TensorRole, USUAL_DAMPING, Windows};

/// [`Calibration::memory`], if nothing else is asked for.
const USUAL_MEMORY: usize = 1 << 30;

/// What weights are quantised by.
#[derive(Clone)]
pub struct Calibration<'a> {
    /// A text like those that the model will read and write; each window is run by itself.
    pub windows: &'a Windows,
    /// What runs the layers.
    pub backend: CpuBackend,
    /// What is added to the diagonal of Hessians, as a share of its mean.
    pub damping: f32,
    /// Memory for what is learnt of inputs at once, in bytes: two matrices of K x K in f32 for an input of K features. A layer of many experts
    /// is run the more often, the less there is.
    pub memory: usize,
    /// A text that weights are not fitted to, on which is measured what they keep.
    pub held_out: Option<&'a Windows>,
}

impl<'a> Calibration<'a> {
    /// A calibration with the usual damping.
    pub fn new(windows: &'a Windows, backend: CpuBackend) -> Self {
        Self { windows, backend, damping: USUAL_DAMPING, memory: USUAL_MEMORY, held_out: None }
    }

    /// What runs the layers of a model over the texts.
    ///
    /// # Errors
    /// The architecture is not supported, windows are longer than its context, or a token is not in its vocabulary.
    pub(crate) fn runner<'b>(
        &self,
        backend: &'b Observed<CpuBackend>,
        source: &Source<'_>,
    ) -> Result<LayerRunner<'b, Observed<CpuBackend>>, QuantizeError> {
        let texts = || [Some(self.windows), self.held_out].into_iter().flatten().flat_map(Windows::iter);
        let longest = texts().map(<[u32]>::len).max().unwrap_or(0);
        let runner = LayerRunner::new(backend, &source.without_weights()?, longest)?;
        texts().try_for_each(|window| runner.check_tokens(window))?;
        Ok(runner)
    }

    /// All that decides what becomes of a given model and recipe.
    pub(crate) fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.windows.iter().for_each(|window| window.hash(&mut hasher));
        format!("gptq, damping {}, text {:016x}", self.damping, hasher.finish())
    }
}

/// Quantises the decoder's linears of a model, layer by layer.
pub(crate) struct Calibrator<'a> {
    source: &'a Source<'a>,
    tasks: &'a [Task<'a>],
    encode: &'a EncodeOptions,
    calibration: &'a Calibration<'a>,
    backend: &'a Observed<CpuBackend>,
    runner: LayerRunner<'a, Observed<CpuBackend>>,
    /// Indices of the tasks that are quantised in the course of each layer.
    by_layer: Vec<Vec<usize>>,
}

/// Is told each task that is finished, by its index, and the error of its matrix unless an earlier run had written it.
pub(crate) type Finished<'a> = dyn FnMut(usize, Option<ErrorStats>) + 'a;

impl<'a> Calibrator<'a> {
    /// # Errors
    /// The model cannot be run: its architecture is not supported, windows are longer than its context, or a token is not in its vocabulary.
    pub(crate) fn new(
        backend: &'a Observed<CpuBackend>,
        source: &'a Source<'a>,
        tasks: &'a [Task<'a>],
        encode: &'a EncodeOptions,
        calibration: &'a Calibration<'a>,
    ) -> Result<Self, QuantizeError> {
        let runner = calibration.runner(backend, source)?;
        let mut by_layer = vec![Vec::new(); runner.layers()];
        for (index, task) in tasks.iter().enumerate() {
            let is_packed = task.matrix.is_some_and(|(_, scheme)| !scheme.is_dense());
            // Layers for multi-token prediction follow those that are run.
            let layer = layer_and_kind(&task.name).0.and_then(|layer| by_layer.get_mut(layer));
            if let Some(of_layer) = layer.filter(|_| is_packed && task.role == TensorRole::DecoderLinear) {
                of_layer.push(index);
            }
        }
        Ok(Self { source, tasks, encode, calibration, backend, runner, by_layer })
    }

    /// The tasks that are its own, by their indices.
    pub(crate) fn tasks(&self) -> impl Iterator<Item = usize> + '_ {
        self.by_layer.iter().flatten().copied()
    }

    /// Quantises and writes the matrices of its tasks, and gives what became of the held-out text.
    ///
    /// # Errors
    /// A weight is not finite or too large for its format, the model cannot be run, or the output cannot be written.
    pub(crate) fn run(
        mut self,
        output: &mut Output,
        finished: &mut Finished<'_>,
    ) -> Result<Option<HeldOut<'a>>, QuantizeError> {
        let mut states = self.states(output)?;
        self.by_layer[..states.layer].iter().flatten().for_each(|&task| finished(task, None));
        for layer in states.layer..self.by_layer.len() {
            self.layer(layer, &mut states, output, finished)?;
            states.layer = layer + 1;
            output.save_state(|file| states.write(file))?;
        }
        let windows = self.calibration.held_out;
        Ok(windows.map(|windows| HeldOut { runner: self.runner, windows, states: states.held_out }))
    }

    /// The hidden states that an earlier run kept, or else those before the first layer.
    fn states(&self, output: &Output) -> Result<States, QuantizeError> {
        let (tasks, Calibration { windows, held_out, .. }) = (&self.tasks, self.calibration);
        let kept = States::read(output.state()?, windows, *held_out, self.runner.hidden_size())?.filter(|states| {
            let before = self.by_layer.get(..states.layer);
            before.is_some_and(|before| before.iter().flatten().all(|&task| output.is_done(&tasks[task].name)))
        });
        kept.map_or_else(|| States::new(&self.runner, self.source.checkpoint, windows, *held_out), Ok)
    }

    /// Quantises the matrices of a layer, and carries the hidden states through what it became.
    fn layer(
        &mut self,
        index: usize,
        states: &mut States,
        output: &mut Output,
        finished: &mut Finished<'_>,
    ) -> Result<(), QuantizeError> {
        let tasks = &self.by_layer[index];
        let of_layer: Vec<&Task<'_>> = tasks.iter().map(|&task| &self.tasks[task]).collect();
        let mut weights = LayerWeights::new(self.source, index, &of_layer);
        let unquantized = weights.checkpoint()?;
        let mut layer = self.runner.load(&unquantized, index)?;
        let mut original = self.runner.load(&unquantized, index)?;
        drop(unquantized);
        let by_name: HashMap<&str, usize> = tasks.iter().map(|&task| (&*self.tasks[task].name, task)).collect();
        let inputs = layer.inputs().to_vec();
        let is_watched =
            |input: &&SharedInput| input.tensors.iter().any(|tensor| by_name.contains_key(tensor.as_str()));
        let stages = stages(inputs.iter().filter(is_watched));
        for (stage, watched) in stages.iter().enumerate() {
            let portions = self.portions(watched, &by_name);
            for (portion, watched) in portions.iter().enumerate() {
                let is_last = stage + 1 == stages.len() && portion + 1 == portions.len();
                let seen = self.watch(watched, &by_name, [&mut original, &mut layer], states, is_last)?;
                for input in *watched {
                    let seen = &seen[&input.name];
                    let of_input = input.tensors.iter().filter_map(|tensor| by_name.get(tensor.as_str()).copied());
                    for (task, matrix, error) in self.round(seen, of_input)? {
                        let name = &self.tasks[task].name;
                        let is_done = output.is_done(name);
                        if !is_done {
                            output.write_matrix(name, &matrix)?;
                        }
                        finished(task, (!is_done).then_some(error));
                        weights.replace(name, Arc::new(matrix));
                    }
                }
            }
            layer = self.runner.load(&weights.checkpoint()?, index)?;
        }
        self.backend.watch().only([]);
        states.windows.iter_mut().try_for_each(|states| self.runner.run(&mut layer, states))?;
        if stages.is_empty() {
            states.originals.iter_mut().try_for_each(|states| self.runner.run(&mut original, states))?;
        }
        let [quantized, originals] = &mut states.held_out;
        quantized.iter_mut().try_for_each(|states| self.runner.run(&mut layer, states))?;
        originals.iter_mut().try_for_each(|states| self.runner.run(&mut original, states))?;
        // A model larger than memory must not stay mapped.
        weights.source_tensors().for_each(|tensor| self.source.checkpoint.release(tensor));
        Ok(())
    }

    /// Features of an input, if a matrix that is quantised is multiplied with it.
    fn cols(&self, input: &SharedInput, by_name: &HashMap<&str, usize>) -> Option<usize> {
        let task = input.tensors.iter().find_map(|tensor| by_name.get(tensor.as_str()))?;
        self.tasks[*task].matrix.map(|([_, cols], _)| cols)
    }

    /// Inputs of a stage in portions of which all is learnt at once.
    fn portions<'i>(
        &self,
        inputs: &'i [&'i SharedInput],
        by_name: &HashMap<&str, usize>,
    ) -> Vec<&'i [&'i SharedInput]> {
        let bytes = |input: &&SharedInput| {
            let cols = self.cols(input, by_name).unwrap_or(0);
            2 * cols * cols * size_of::<f32>()
        };
        let largest = inputs.iter().map(bytes).max().unwrap_or(0).max(1);
        inputs.chunks((self.calibration.memory / largest).max(1)).collect()
    }

    /// Rounds the matrices of tasks that share an input.
    fn round(&self, seen: &Seen, tasks: impl Iterator<Item = usize>) -> Result<Vec<Rounded>, QuantizeError> {
        let damping = self.calibration.damping;
        let (correction, diagonal) = (seen.drift.correction(&seen.hessian, damping), seen.hessian.diagonal());
        let mut factor: Option<Factor> = None;
        let mut rounded = Vec::new();
        for index in tasks {
            let task = &self.tasks[index];
            let (_, scheme) = task.matrix.expect("what is calibrated is a matrix");
            let matrix = task.source(self.source)?;
            let order = Order::of(scheme, &diagonal);
            // Matrices side by side mostly are of one scheme.
            let factor = match factor.take().filter(|factor| factor.order == order) {
                Some(same) => factor.insert(same),
                None => factor.insert(seen.hessian.factor(order, damping)),
            };
            // A weight that is not finite is named before it spoils its row.
            let encoded = largest_weight(&matrix, &slices(matrix.rows, matrix.cols, 1))
                .and_then(|_| correction.apply(&matrix))
                .and_then(|corrected| round_matrix(&corrected, scheme, self.encode, factor));
            let (encoded, _) = encoded.map_err(|e| encode_error(self.source.checkpoint, &task.name, e))?;
            let error = matrix_error(&matrix, &encoded);
            rounded.push((index, encoded, error));
        }
        Ok(rounded)
    }

    /// What these inputs are over the hidden states, by their names, in the original layer and as it is now. The last time that a layer is
    /// looked at, the original's hidden states become those after it.
    fn watch(
        &mut self,
        inputs: &[&SharedInput],
        by_name: &HashMap<&str, usize>,
        [original, layer]: [&mut LoadedLayer<Observed<CpuBackend>>; 2],
        states: &mut States,
        is_last: bool,
    ) -> Result<HashMap<String, Seen>, QuantizeError> {
        let seen_of = |input: &&SharedInput| Some((input.name.clone(), Seen::new(self.cols(input, by_name)?)));
        let mut seen: HashMap<String, Seen> = inputs.iter().filter_map(seen_of).collect();
        let names = || inputs.iter().map(|input| input.name.as_str());
        let mut after = Vec::new();
        for (states, originals) in states.windows.iter().zip(&mut states.originals) {
            let mut unquantized = HashMap::new();
            if is_last {
                self.backend.watch().beside(names());
                self.runner.run(original, originals)?;
            } else {
                self.backend.watch().only(names());
                originals.clone_into(&mut after);
                self.runner.run(original, &mut after)?;
            }
            self.backend.watch().take(|name, inputs| {
                unquantized.insert(name.to_owned(), inputs);
            });
            self.backend.watch().only(names());
            states.clone_into(&mut after);
            self.runner.run(layer, &mut after)?;
            self.backend.watch().take(|name, inputs| {
                if let (Some(seen), Some(originals)) = (seen.get_mut(name), unquantized.remove(name)) {
                    seen.add(originals, inputs);
                }
            });
        }
        Ok(seen)
    }
}

/// A task, its matrix in the end, and how far that is from the source.
type Rounded = (usize, PackedMatrix<'static>, ErrorStats);

/// Inputs in the order in which they come to be; those side by side do not depend on each other's matrices.
fn stages<'a>(inputs: impl Iterator<Item = &'a SharedInput>) -> Vec<Vec<&'a SharedInput>> {
    let mut stages: BTreeMap<usize, Vec<&SharedInput>> = BTreeMap::new();
    for input in inputs {
        let tensor = input.tensors.first().map_or("", String::as_str);
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor).rsplit('.').next().unwrap_or(tensor);
        let stage = match module {
            "q_b_proj" | "kv_b_proj" => 1,
            "o_proj" => 2,
            "gate_proj" | "up_proj" | "gate_up_proj" | "w1" | "w3" => 3,
            "down_proj" | "w2" => 4,
            _ => 0,
        };
        stages.entry(stage).or_default().push(input);
    }
    stages.into_values().collect()
}
