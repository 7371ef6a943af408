//! What the inputs of a layer's matrices are like.

use std::collections::HashMap;
use std::sync::Arc;

use marlin_kernels::cpu::CpuBackend;
use marlin_model::{LayerRunner, LoadedLayer};

use crate::QuantizeError;
use crate::capture::Observed;
use crate::quantize::Task;

/// Learns of the inputs of the matrices of `tasks` while the hidden states of all windows become those after their layer. `new` is given the
/// features of an input, `add` a window's index and rows, those of experts weighted. By the names of the matrices; those of one input share it.
pub(crate) fn learn<T>(
    runner: &mut LayerRunner<'_, Observed<CpuBackend>>,
    backend: &Observed<CpuBackend>,
    layer: &mut LoadedLayer<Observed<CpuBackend>>,
    tasks: &[&Task<'_>],
    states: &mut [Vec<f32>],
    new: impl Fn(usize) -> T,
    mut add: impl FnMut(&mut T, usize, &[f32]),
) -> Result<HashMap<String, Arc<T>>, QuantizeError> {
    let cols: HashMap<&str, usize> =
        tasks.iter().filter_map(|task| task.matrix.map(|([_, cols], _)| (&*task.name, cols))).collect();
    let inputs = layer.inputs().to_vec();
    let mut learnt: HashMap<String, (usize, T)> = HashMap::new();
    for input in &inputs {
        if let Some(&cols) = input.tensors.iter().find_map(|tensor| cols.get(tensor.as_str())) {
            learnt.insert(input.name.clone(), (cols, new(cols)));
        }
    }
    backend.watch().beside(learnt.keys().map(String::as_str));
    for (window, states) in states.iter_mut().enumerate() {
        runner.run(layer, states)?;
        backend.watch().take(|name, inputs| {
            if let Some((cols, learnt)) = learnt.get_mut(name) {
                add(learnt, window, &inputs.weighted(*cols));
            }
        });
    }
    backend.watch().only([]);
    let mut by_tensor = HashMap::new();
    for input in inputs {
        if let Some((_, learnt)) = learnt.remove(&input.name) {
            let learnt = Arc::new(learnt);
            by_tensor.extend(input.tensors.into_iter().map(|tensor| (tensor, learnt.clone())));
        }
    }
    Ok(by_tensor)
}
