//! Guesses by a layer of the model itself.

use std::collections::{HashMap, VecDeque};
use std::fmt;

use marlin_model::{KvSequence, LogitRows, PredictionLayer, StepBatch};

use super::{AnswerId, Drafter};
use crate::EngineError;

/// Hidden states of an answer that wait to be read; of more, the last. So an answer takes little memory, and a long prompt little time: the
/// layer then begins where they do, and sees nothing before.
const MOST_WAITING: usize = 64;

/// The layer that a model has for predicting further tokens (multi-token prediction, MTP): it guesses the token after the next from what the model
/// made of the last one. Its KV cache follows each answer.
pub struct MtpDrafter {
    layer: Box<dyn PredictionLayer>,
    answers: HashMap<AnswerId, Followed>,
    // Kept for their memory.
    batch: StepBatch,
    before: Vec<f32>,
    state: Vec<f32>,
}

/// An answer in the layer's KV cache. Slot `i` is of the hidden state at position `first + i`, and of the token after it.
struct Followed {
    kv: KvSequence,
    /// The position of the first hidden state.
    first: usize,
    /// Those behind the cached ones, a row each.
    waiting: VecDeque<f32>,
}

impl Followed {
    /// The position behind the last hidden state, if rows are so wide.
    fn end(&self, width: usize) -> usize {
        self.first + self.kv.len() + self.waiting.len() / width
    }
}

impl MtpDrafter {
    /// Guesses by a model's layer for that model.
    pub fn new(layer: Box<dyn PredictionLayer>) -> Self {
        let (batch, before, state) = (StepBatch::default(), Vec::new(), Vec::new());
        Self { layer, answers: HashMap::new(), batch, before, state }
    }

    /// Forgets all of an answer that was cached, and begins at `first`.
    fn begin(&mut self, followed: &mut Followed, first: usize) {
        let empty = self.layer.kv().sequence();
        self.layer.kv().release(std::mem::replace(&mut followed.kv, empty));
        followed.first = first;
    }

    /// Computes the slots of `tokens` and the hidden states in `self.before`; tells whether there was room.
    fn forward(&mut self, kv: &mut KvSequence, tokens: &[u32], logits: LogitRows) -> Result<bool, EngineError> {
        if kv.len() + tokens.len() > self.layer.info().context || self.layer.kv().append(kv, tokens.len()).is_err() {
            return Ok(false);
        }
        self.batch.clear();
        self.batch.push(kv, tokens, logits);
        self.layer.forward(&self.batch, &self.before)?;
        Ok(true)
    }

    /// Computes what waits but for `kept` slots, a step's worth at a time; tells whether there was room.
    fn catch_up(&mut self, followed: &mut Followed, tokens: &[u32], kept: usize) -> Result<bool, EngineError> {
        let (width, step_tokens) = (self.layer.info().hidden_size, self.layer.info().step_tokens);
        loop {
            let waiting = followed.waiting.len() / width;
            let count = waiting.saturating_sub(kept).min(step_tokens);
            if count == 0 {
                return Ok(true);
            }
            let next = followed.first + followed.kv.len() + 1;
            self.before.clear();
            self.before.extend(followed.waiting.range(..count * width));
            let logits = if count == waiting { LogitRows::Last } else { LogitRows::None };
            if !self.forward(&mut followed.kv, &tokens[next..next + count], logits)? {
                return Ok(false);
            }
            followed.waiting.drain(..count * width);
        }
    }

    /// Guesses behind `tokens`, whose last one but one has the last hidden state.
    fn guess(
        &mut self,
        followed: &mut Followed,
        tokens: &[u32],
        most: usize,
        draft: &mut Vec<u32>,
    ) -> Result<(), EngineError> {
        if !self.catch_up(followed, tokens, 0)? {
            return Ok(());
        }
        let true_slots = followed.kv.len();
        while let Some(token) = self.layer.most_likely()? {
            draft.push(token);
            if draft.len() == most {
                break;
            }
            self.layer.read_hidden(&mut self.state)?;
            std::mem::swap(&mut self.before, &mut self.state);
            if !self.forward(&mut followed.kv, &[token], LogitRows::Last)? {
                break;
            }
        }
        // The model has its own states for what follows.
        self.layer.kv().truncate(&mut followed.kv, true_slots);
        Ok(())
    }

    /// Whether there is something to guess from: the hidden state before the last token, not computed yet.
    fn is_ready(&self, followed: &Followed, tokens: &[u32]) -> bool {
        !followed.waiting.is_empty() && followed.end(self.layer.info().hidden_size) + 1 == tokens.len()
    }

    /// Does something with what is known of an answer, which is forgotten if that fails.
    fn with(
        &mut self,
        answer: AnswerId,
        act: impl FnOnce(&mut Self, &mut Followed) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let Some(mut followed) = self.answers.remove(&answer) else { return Ok(()) };
        let result = act(self, &mut followed);
        if result.is_ok() {
            self.answers.insert(answer, followed);
        } else {
            self.layer.kv().release(followed.kv);
        }
        result
    }
}

impl Drafter for MtpDrafter {
    fn draft(
        &mut self,
        answer: AnswerId,
        tokens: &[u32],
        most: usize,
        draft: &mut Vec<u32>,
    ) -> Result<(), EngineError> {
        self.with(answer, |this, followed| {
            if this.is_ready(followed, tokens) { this.guess(followed, tokens, most, draft) } else { Ok(()) }
        })
    }

    fn unread(&self, answer: AnswerId, tokens: &[u32]) -> usize {
        let width = self.layer.info().hidden_size;
        let ready = self.answers.get(&answer).filter(|followed| self.is_ready(followed, tokens));
        ready.map_or(0, |followed| followed.waiting.len() / width)
    }

    fn read(&mut self, answer: AnswerId, tokens: &[u32]) -> Result<(), EngineError> {
        // The last slot is what a guess comes from.
        self.with(answer, |this, followed| this.catch_up(followed, tokens, 1).map(drop))
    }

    fn wants_hidden(&self) -> bool {
        true
    }

    fn observe(&mut self, answer: AnswerId, first: usize, hidden: &[f32]) {
        let width = self.layer.info().hidden_size;
        // Of a long prompt's step the end is enough.
        let surplus = (hidden.len() / width).saturating_sub(MOST_WAITING);
        let (first, hidden) = (first + surplus, &hidden[surplus * width..]);
        let mut followed = match self.answers.remove(&answer) {
            Some(followed) => followed,
            None => Followed { kv: self.layer.kv().sequence(), first, waiting: VecDeque::new() },
        };
        let end = followed.end(width);
        if first > end {
            // What lies between will not come.
            followed.waiting.clear();
            self.begin(&mut followed, first);
        }
        // What is known may come again.
        let known = end.saturating_sub(first).min(hidden.len() / width);
        followed.waiting.extend(&hidden[known * width..]);
        let surplus = (followed.waiting.len() / width).saturating_sub(MOST_WAITING);
        if surplus > 0 {
            let first = followed.end(width) - MOST_WAITING;
            followed.waiting.drain(..surplus * width);
            self.begin(&mut followed, first);
        }
        self.answers.insert(answer, followed);
    }

    fn relative_cost(&self) -> f64 {
        self.layer.info().guess_cost
    }

    fn reading_cost(&self) -> f64 {
        self.layer.info().slot_cost
    }

    fn forget(&mut self, answer: AnswerId) {
        if let Some(followed) = self.answers.remove(&answer) {
            self.layer.kv().release(followed.kv);
        }
    }
}

impl fmt::Debug for MtpDrafter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MtpDrafter").field("layer", self.layer.info()).finish_non_exhaustive()
    }
}
