//! The layer of a model that predicts further tokens, as those who guess by it see it.

use crate::{KvPool, ModelError, StepBatch};

/// A layer behind the last one of a model, which predicts the token after the next (multi-token prediction: DeepSeek-V3, section 2.2; GLM-4.5
/// calls it NextN). It has keys and values of its own; embedding and head are the model's.
///
/// A slot of it holds a token and the hidden state of the token before, after the model's last norm, and its logits are of the token that
/// follows. To guess further, a slot takes the token that was guessed and the layer's own state of the slot before
/// ([`PredictionLayer::read_hidden`]).
pub trait PredictionLayer: Send {
    /// Sizes and costs.
    fn info(&self) -> &PredictionInfo;

    /// The blocks of its own KV cache.
    fn kv(&mut self) -> &mut KvPool;

    /// Starts a step of slots, which leaves logits of its logit row on the device. `before` are the hidden states before their tokens,
    /// `[T, hidden]`. A batch of no tokens does nothing.
    ///
    /// # Errors
    /// The batch does not fit [`PredictionInfo`], or has more than one logit row; there are not as many hidden states; the device failed.
    fn forward(&mut self, batch: &StepBatch, before: &[f32]) -> Result<(), ModelError>;

    /// Reads the logits of the last step's logit row, `[vocabulary]`, into `out` (resized to fit; empty if it had none).
    ///
    /// # Errors
    /// The device failed.
    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError>;

    /// Reads the layer's own state of the last step's logit row, after its norm, `[hidden]`, into `out` (resized to fit; empty if it had none).
    ///
    /// # Errors
    /// The device failed.
    fn read_hidden(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError>;

    /// The most likely token of the last step's logit row, whose logits are consumed; `None` if they are not finite.
    ///
    /// # Errors
    /// The step had no logit row, or they are consumed already; the device failed.
    fn most_likely(&mut self) -> Result<Option<u32>, ModelError>;
}

/// Sizes and costs of a prediction layer.
#[derive(Debug, Clone, PartialEq)]
pub struct PredictionInfo {
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Width of hidden states.
    pub hidden_size: usize,
    /// Most slots of a sequence.
    pub context: usize,
    /// Most slots of a step.
    pub step_tokens: usize,
    /// Weights that a slot is multiplied with, as a share of those that a token is in the model.
    pub slot_cost: f64,
    /// The same with the head, for a slot whose logits are wanted.
    pub guess_cost: f64,
}
