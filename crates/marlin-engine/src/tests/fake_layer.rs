//! Drafters that are shown hidden states and hold them against what the fake model computes.

use std::collections::HashMap;

use marlin_kernels::{KvLayout, SampleRow, StepLimits};
use marlin_model::{KvPool, ModelError, PredictionInfo, PredictionLayer, StepBatch};

use super::fake_model::{HIDDEN, Sizes, VOCABULARY, hidden_state, next_token};
use crate::{AnswerId, Drafter, EngineError};

/// A slot: the token and the position of a hidden state, and the token after it.
type Slot = (u32, u32, u32);

/// A prediction layer without weights. It guesses what the fake model says wherever it has seen all of a text, and panics if it is shown
/// anything but the hidden states of consecutive tokens, each with the token that follows it.
#[derive(Debug)]
pub(super) struct FakeLayer {
    info: PredictionInfo,
    kv: KvPool,
    slots: HashMap<usize, Slot>,
    /// What the logit row of the last step has seen.
    history: Option<Vec<Slot>>,
}

impl FakeLayer {
    /// For a model of these sizes, but with blocks and steps of its own.
    pub(super) fn new(sizes: Sizes, step_tokens: usize, blocks: usize) -> Self {
        let layout = KvLayout { block_tokens: 3, layers: Vec::new() };
        let info = PredictionInfo {
            vocabulary: VOCABULARY,
            hidden_size: HIDDEN,
            context: sizes.context,
            step_tokens,
            slot_cost: 0.1,
            guess_cost: 0.2,
        };
        Self { info, kv: KvPool::new(layout, blocks), slots: HashMap::new(), history: None }
    }
}

impl PredictionLayer for FakeLayer {
    fn info(&self) -> &PredictionInfo {
        &self.info
    }

    fn kv(&mut self) -> &mut KvPool {
        &mut self.kv
    }

    fn forward(&mut self, batch: &StepBatch, before: &[f32]) -> Result<(), ModelError> {
        let step = batch.as_step();
        let PredictionInfo { context, step_tokens, .. } = self.info;
        let limits = StepLimits { tokens: step_tokens, context, width: 1, vocabulary: VOCABULARY, logit_rows: 1 };
        let block_tokens = self.kv.block_tokens();
        let layout = KvLayout { block_tokens, layers: Vec::new() };
        step.validate(&limits, &layout, self.kv.blocks(), 0)?;
        assert_eq!(before.len(), step.tokens.len() * HIDDEN);
        assert!(self.kv.pending_copies().is_empty(), "nobody shares blocks");
        assert_eq!(step.sequences(), 1);
        let place = |position: u32| {
            step.table(0)[position as usize / block_tokens] as usize * block_tokens + position as usize % block_tokens
        };
        for ((&token, &position), state) in step.tokens.iter().zip(step.positions).zip(before.chunks(HIDDEN)) {
            self.slots.insert(place(position), (state[0] as u32, state[1] as u32, token));
        }
        let last = *step.positions.last().unwrap();
        let history: Vec<Slot> = (0..=last).map(|position| self.slots[&place(position)]).collect();
        for pair in history.windows(2) {
            assert_eq!((pair[1].0, pair[1].1), (pair[0].2, pair[0].1 + 1), "slots follow each other: {history:?}");
        }
        self.history = (!step.logit_rows.is_empty()).then_some(history);
        Ok(())
    }

    fn read_logits(&mut self, _: &mut Vec<f32>) -> Result<(), ModelError> {
        unreachable!("guessing reads no logits")
    }

    fn read_hidden(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.clear();
        out.extend(self.history.as_ref().and_then(|history| history.last()).map_or([0.0; HIDDEN], |slot| {
            // As if it were the model's own for that token.
            hidden_state(slot.2, slot.1 + 1)
        }));
        Ok(())
    }

    fn most_likely(&mut self) -> Result<Option<u32>, ModelError> {
        let history = self.history.as_ref().expect("the last step had a logit row");
        let tokens: Vec<u32> = std::iter::once(history[0].0).chain(history.iter().map(|slot| slot.2)).collect();
        Ok(Some(next_token(&tokens, &SampleRow::GREEDY, None)))
    }
}

/// Keeps all that it is shown, and holds it against each text that it is to go on with. It guesses nothing but the last token again.
#[derive(Debug, Default)]
pub(super) struct Watcher {
    shown: HashMap<AnswerId, HashMap<usize, Vec<f32>>>,
}

impl Drafter for Watcher {
    fn draft(
        &mut self,
        answer: AnswerId,
        tokens: &[u32],
        most: usize,
        draft: &mut Vec<u32>,
    ) -> Result<(), EngineError> {
        // One that branched off before its first token has been shown nothing.
        for (&position, state) in self.shown.get(&answer).into_iter().flatten() {
            assert!(position + 1 < tokens.len(), "the last token is not computed yet");
            assert_eq!(state[..], hidden_state(tokens[position], position as u32), "position {position}");
        }
        draft.extend(tokens.last().filter(|_| most > 0));
        Ok(())
    }

    fn wants_hidden(&self) -> bool {
        true
    }

    fn observe(&mut self, answer: AnswerId, first: usize, hidden: &[f32]) {
        let shown = self.shown.entry(answer).or_default();
        for (position, state) in (first..).zip(hidden.chunks(HIDDEN)) {
            let before = shown.insert(position, state.to_vec());
            assert!(before.is_none_or(|before| before == state), "what comes again is the same");
        }
    }

    fn forget(&mut self, answer: AnswerId) {
        self.shown.remove(&answer);
    }
}
