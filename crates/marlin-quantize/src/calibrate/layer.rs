//! The weights of one layer, some of them quantised.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use marlin_checkpoint::{Checkpoint, MemoryTensor};
use marlin_format::PackedMatrix;

use crate::QuantizeError;
use crate::quantize::{Origin, Task};
use crate::role::layer_and_kind;
use crate::source::Source;

/// A layer as it is being quantised.
pub(crate) struct LayerWeights<'a> {
    source: &'a Source<'a>,
    tasks: Vec<&'a Task<'a>>,
    /// Tensors of the layer that no task is about, but those whose parts tasks are about.
    kept: Vec<&'a str>,
    quantized: BTreeMap<String, Arc<PackedMatrix<'static>>>,
}

impl<'a> LayerWeights<'a> {
    /// Layer `index` of a model, whose matrices that will be quantised are those of `tasks`.
    pub(crate) fn new(source: &'a Source<'a>, index: usize, tasks: &[&'a Task<'a>]) -> Self {
        let covered: HashSet<&str> = tasks.iter().flat_map(|task| source_tensors(task)).collect();
        let kept = source
            .checkpoint
            .tensor_names()
            .filter(|name| layer_and_kind(name).0 == Some(index) && !covered.contains(name));
        Self { source, tasks: tasks.to_vec(), kept: kept.collect(), quantized: BTreeMap::new() }
    }

    /// Puts a quantised matrix in the place of the original.
    pub(crate) fn replace(&mut self, name: &str, matrix: Arc<PackedMatrix<'static>>) {
        self.quantized.insert(name.to_owned(), matrix);
    }

    /// Puts the original back.
    pub(crate) fn restore(&mut self, name: &str) {
        self.quantized.remove(name);
    }

    /// The source's tensors that hold the matrices.
    pub(crate) fn source_tensors(&self) -> impl Iterator<Item = &'a str> {
        self.tasks.iter().flat_map(|task| source_tensors(task))
    }

    /// A checkpoint of this layer alone.
    pub(crate) fn checkpoint(&self) -> Result<Checkpoint, QuantizeError> {
        let mut tensors = Vec::with_capacity(self.tasks.len() + self.kept.len());
        for task in &self.tasks {
            let matrix = match self.quantized.get(&*task.name) {
                Some(matrix) => matrix.clone(),
                None => Arc::new(task.source(self.source)?.into_owned()),
            };
            tensors.push((task.name.to_string(), MemoryTensor::matrix(matrix)));
        }
        for &name in &self.kept {
            let tensor = match self.source.checkpoint.shape(name).as_deref() {
                Some(&[len]) => MemoryTensor::vector(&self.source.vector(name, len)?),
                Some([_, _]) => MemoryTensor::matrix(Arc::new(self.source.matrix(name)?.into_owned())),
                // No layer that can be run has others.
                _ => continue,
            };
            tensors.push((name.to_owned(), tensor));
        }
        let (name, config) = (self.source.checkpoint.name(), self.source.checkpoint.config().clone());
        Ok(Checkpoint::from_parts(name, config, tensors)?)
    }
}

/// The tensors of the source that a task is about.
fn source_tensors<'a>(task: &'a Task<'a>) -> Vec<&'a str> {
    match task.from {
        Origin::Same => vec![&*task.name],
        Origin::Expert(layer, ..) => layer.fused_tensors().into(),
    }
}
