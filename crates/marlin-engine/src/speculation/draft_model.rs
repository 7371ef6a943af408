//! Guesses by a smaller model.

use std::collections::HashMap;
use std::fmt;

use marlin_kernels::SampleRow;
use marlin_model::{KvSequence, LanguageModel, LogitRows, ModelInfo, StepBatch};

use super::{AnswerId, Drafter};
use crate::EngineError;

/// A smaller model with the same tokens, which says what is most likely by its own lights. Its KV cache follows each answer.
pub struct DraftModel {
    model: Box<dyn LanguageModel>,
    /// Tokens that both models know.
    vocabulary: u32,
    relative_cost: f64,
    answers: HashMap<AnswerId, Followed>,
    batch: StepBatch,
}

/// An answer in the smaller model's KV cache.
struct Followed {
    kv: KvSequence,
    /// What the cache holds.
    tokens: Vec<u32>,
}

impl Followed {
    /// How many of these tokens the cache holds, but for the last, which is computed for its logits.
    fn alike(&self, tokens: &[u32]) -> usize {
        let alike = self.tokens.iter().zip(tokens).take_while(|(own, said)| own == said).count();
        alike.min(tokens.len().saturating_sub(1))
    }
}

impl DraftModel {
    /// Guesses by `model` for another model, whose tokenizer must be the same.
    pub fn new(model: Box<dyn LanguageModel>, for_model: &ModelInfo) -> Self {
        let own = model.info();
        // Either may be padded, with tokens that the other does not know.
        let vocabulary = own.vocabulary.min(for_model.vocabulary) as u32;
        let relative_cost = own.weight_bytes as f64 / for_model.weight_bytes.max(1) as f64;
        Self { model, vocabulary, relative_cost, answers: HashMap::new(), batch: StepBatch::default() }
    }

    /// Computes `new` tokens behind what is cached, and chooses the token after them; `None` if there is no room.
    fn next_token(&mut self, followed: &mut Followed, new: &[u32]) -> Result<Option<u32>, EngineError> {
        let info = self.model.info();
        let (step_tokens, context) = (info.step_tokens, info.context);
        let whole = followed.tokens.len() + new.len();
        if whole > context {
            return Ok(None);
        }
        for chunk in new.chunks(step_tokens) {
            if self.model.kv().append(&mut followed.kv, chunk.len()).is_err() {
                return Ok(None);
            }
            let is_last = followed.kv.len() == whole;
            self.batch.clear();
            self.batch.push(&followed.kv, chunk, if is_last { LogitRows::Last } else { LogitRows::None });
            self.model.forward(&self.batch)?;
            followed.tokens.extend_from_slice(chunk);
        }
        let sampling = self.model.sample(&[SampleRow::GREEDY])?;
        let mut token = [SampleRow::NOT_FINITE];
        self.model.sampled(sampling, &mut token)?;
        Ok(Some(token[0]).filter(|&token| token != SampleRow::NOT_FINITE))
    }

    fn guess(
        &mut self,
        followed: &mut Followed,
        tokens: &[u32],
        most: usize,
        draft: &mut Vec<u32>,
    ) -> Result<(), EngineError> {
        let kept = followed.alike(tokens);
        followed.tokens.truncate(kept);
        self.model.kv().truncate(&mut followed.kv, kept);
        let mut new = &tokens[kept..];
        if new.iter().any(|&token| token >= self.vocabulary) {
            return Ok(());
        }
        while draft.len() < most {
            let Some(token) = self.next_token(followed, new)?.filter(|&token| token < self.vocabulary) else { break };
            draft.push(token);
            new = &draft[draft.len() - 1..];
        }
        Ok(())
    }
}

impl Drafter for DraftModel {
    fn draft(
        &mut self,
        answer: AnswerId,
        tokens: &[u32],
        most: usize,
        draft: &mut Vec<u32>,
    ) -> Result<(), EngineError> {
        let empty = Followed { kv: self.model.kv().sequence(), tokens: Vec::new() };
        let mut followed = self.answers.remove(&answer).unwrap_or(empty);
        let result = self.guess(&mut followed, tokens, most, draft);
        if result.is_ok() {
            self.answers.insert(answer, followed);
        } else {
            self.model.kv().release(followed.kv);
        }
        result
    }

    fn unread(&self, answer: AnswerId, tokens: &[u32]) -> usize {
        tokens.len() - self.answers.get(&answer).map_or(0, |followed| followed.alike(tokens))
    }

    fn read(&mut self, answer: AnswerId, tokens: &[u32]) -> Result<(), EngineError> {
        self.draft(answer, tokens, 1, &mut Vec::new())
    }

    fn relative_cost(&self) -> f64 {
        self.relative_cost
    }

    fn forget(&mut self, answer: AnswerId) {
        if let Some(followed) = self.answers.remove(&answer) {
            self.model.kv().release(followed.kv);
        }
    }
}

impl fmt::Debug for DraftModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DraftModel").field("model", self.model.info()).finish_non_exhaustive()
    }
}
