//! What a step runs, gathered from sequences.

use std::ops::Range;

use marlin_kernels::Step;

use crate::KvSequence;

/// Which of a sequence's new tokens to compute logits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a chunk of a prompt that goes on.
    None,
    /// The last: the next token is wanted.
    Last,
    /// The last `n`, or all if there are fewer.
    LastN(usize),
    /// All: a draft is verified, or a text is scored.
    All,
}

/// The new tokens of several sequences, to be run as one step. Kept and cleared between steps it does not allocate.
#[derive(Debug, Clone)]
pub struct StepBatch {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequence_offsets: Vec<u32>,
    block_tables: Vec<u32>,
    table_offsets: Vec<u32>,
    logit_rows: Vec<u32>,
}

impl Default for StepBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl StepBatch {
    /// A batch of nothing.
    pub fn new() -> Self {
        Self {
            tokens: Vec::new(),
            positions: Vec::new(),
            sequence_offsets: vec![0],
            block_tables: Vec::new(),
            table_offsets: vec![0],
            logit_rows: Vec::new(),
        }
    }

    /// Forgets everything but its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequence_offsets.truncate(1);
        self.block_tables.clear();
        self.table_offsets.truncate(1);
        self.logit_rows.clear();
    }

    /// Adds the last tokens of a sequence, for which [`crate::KvPool::append`] has already made room. Returns which rows of the
    /// step's logits are theirs.
    ///
    /// # Panics
    /// If `tokens` are more than the sequence has room for.
    pub fn push(&mut self, sequence: &KvSequence, tokens: &[u32], logits: LogitRows) -> Range<usize> {
        let start = sequence.len().checked_sub(tokens.len()).expect("append made room for the tokens");
        let first_row = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend((start..sequence.len()).map(|p| p as u32));
        self.sequence_offsets.push(self.tokens.len() as u32);
        self.block_tables.extend_from_slice(sequence.blocks());
        self.table_offsets.push(self.block_tables.len() as u32);

        let wanted = match logits {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::LastN(n) => n,
            LogitRows::All => tokens.len(),
        };
        let skipped = tokens.len().saturating_sub(wanted);
        let first_logits = self.logit_rows.len();
        self.logit_rows.extend((first_row + skipped..self.tokens.len()).map(|row| row as u32));
        first_logits..self.logit_rows.len()
    }

    /// The step as kernels see it.
    pub fn as_step(&self) -> Step<'_> {
        Step {
            tokens: &self.tokens,
            positions: &self.positions,
            sequence_offsets: &self.sequence_offsets,
            block_tables: &self.block_tables,
            table_offsets: &self.table_offsets,
            logit_rows: &self.logit_rows,
        }
    }

    /// Tokens of the step.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Rows of logits the step computes.
    pub fn logit_rows(&self) -> usize {
        self.logit_rows.len()
    }
}

#[cfg(test)]
mod tests {
    use marlin_kernels::{KvLayout, StepLimits};

    use super::*;
    use crate::KvPool;

    #[test]
    fn a_batch_describes_a_valid_step() {
        let layout = KvLayout { block_tokens: 4, layers: Vec::new() };
        let mut pool = KvPool::new(layout.clone(), 8);
        let (mut a, mut b) = (pool.sequence(), pool.sequence());
        pool.append(&mut a, 6).unwrap();
        pool.append(&mut b, 3).unwrap();
        let mut batch = StepBatch::new();
        for _ in 0..2 {
            batch.clear();
            assert_eq!(batch.push(&a, &[10, 11], LogitRows::Last), 0..1);
            assert_eq!(batch.push(&b, &[20, 21, 22], LogitRows::All), 1..4);
            assert_eq!(batch.push(&a, &[], LogitRows::Last), 4..4);
            assert_eq!(batch.push(&b, &[20, 21, 22], LogitRows::LastN(2)), 4..6);
            assert_eq!(batch.push(&b, &[20], LogitRows::LastN(2)), 6..7);
            assert_eq!(batch.push(&b, &[20], LogitRows::None), 7..7);
            let step = batch.as_step();
            let limits = StepLimits { tokens: 16, context: 8, width: 1, vocabulary: 23, logit_rows: 16 };
            step.validate(&limits, &layout, 8, 0).unwrap();
            assert_eq!(step.positions, [4, 5, 0, 1, 2, 0, 1, 2, 2, 2]);
            assert_eq!(step.sequence_offsets, [0, 2, 5, 5, 8, 9, 10]);
            assert_eq!((step.table(0), step.table(1)), (a.blocks(), b.blocks()));
            assert_eq!(step.logit_rows, [1, 2, 3, 4, 6, 7, 8]);
            assert_eq!((batch.tokens(), batch.logit_rows()), (10, 7));
        }
        pool.release(a);
        pool.release(b);
    }
}
