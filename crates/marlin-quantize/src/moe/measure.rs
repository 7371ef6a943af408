//! Where the tokens of a text go.

use marlin_model::{LanguageModel, LayerRouting, LogitRows, StepBatch};

use crate::{QuantizeError, Windows};

/// Runs a model that was loaded with `measure_routing` over the windows of a text, each from an empty context, and gives the load of its layers with
/// experts. `progress` is told the tokens done so far.
///
/// # Errors
/// The model has no experts, or fails.
pub fn measure_routing(
    model: &mut dyn LanguageModel,
    windows: &Windows,
    mut progress: impl FnMut(usize),
) -> Result<Vec<LayerRouting>, QuantizeError> {
    if model.routing().is_empty() {
        return Err(QuantizeError::NoExperts { architecture: model.info().architecture.clone() });
    }
    let chunk = model.info().step_tokens;
    let (mut batch, mut done) = (StepBatch::new(), 0);
    let mut sequence = model.kv().sequence();
    for window in windows.iter() {
        model.kv().truncate(&mut sequence, 0);
        for tokens in window.chunks(chunk) {
            model.kv().append(&mut sequence, tokens.len())?;
            batch.clear();
            batch.push(&sequence, tokens, LogitRows::None);
            model.forward(&batch)?;
            done += tokens.len();
            progress(done);
        }
    }
    model.kv().release(sequence);
    Ok(model.routing().to_vec())
}
