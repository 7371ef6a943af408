//! One call of the model: a ragged batch of tokens.

use crate::{KvLayout, StepLimits};

/// A ragged batch: the new tokens of `S` sequences, one after the other.
///
/// Prefill, chunked prefill, decode, verification of a draft and perplexity are all this one thing; they differ in how many
/// tokens a sequence brings and which rows' logits are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Token ids, `[T]`, or [`Step::SAMPLED`] + a row of the last sampling, for the token that was chosen there.
    pub tokens: &'a [u32],
    /// Position of each token in its sequence, `[T]`; consecutive within a sequence.
    pub positions: &'a [u32],
    /// Where each sequence's tokens begin, `[S + 1]`, from 0 to T.
    pub sequence_offsets: &'a [u32],
    /// KV blocks of all sequences, one after the other: the token at position p of a sequence lives in slot
    /// `p % block_tokens` of block `p / block_tokens` of its table.
    pub block_tables: &'a [u32],
    /// Where each sequence's block table begins, `[S + 1]`.
    pub table_offsets: &'a [u32],
    /// Rows (indices into `tokens`) whose logits are wanted, ascending, `[L]`.
    pub logit_rows: &'a [u32],
}

/// Why a step cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The arrays do not describe a ragged batch.
    #[error("malformed step: {0}")]
    Malformed(String),
    /// A token id outside the vocabulary.
    #[error("token {token} at row {row} is outside the vocabulary of {vocabulary}")]
    Token {
        /// Its row.
        row: usize,
        /// The id.
        token: u32,
        /// Ids below this are valid.
        vocabulary: usize,
    },
    /// More tokens than the model was loaded for.
    #[error("a step of {found} tokens; the model was loaded for at most {limit}")]
    TooManyTokens {
        /// Tokens of the step.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// A position beyond the context.
    #[error("position {position} is beyond the context of {context} tokens")]
    Context {
        /// The position.
        position: usize,
        /// The context.
        context: usize,
    },
}

impl<'a> Step<'a> {
    /// From here on, a token id is a row of the last sampling ([`Encoder::sample`](crate::Encoder::sample)). No vocabulary reaches this id.
    pub const SAMPLED: u32 = 1 << 31;

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequence_offsets.len() - 1
    }

    /// Rows of sequence `s`.
    pub fn rows(&self, s: usize) -> std::ops::Range<usize> {
        self.sequence_offsets[s] as usize..self.sequence_offsets[s + 1] as usize
    }

    /// Block table of sequence `s`.
    pub fn table(&self, s: usize) -> &'a [u32] {
        &self.block_tables[self.table_offsets[s] as usize..self.table_offsets[s + 1] as usize]
    }

    /// Checks everything kernels rely on, so that they need not. `sampled` is the number of rows of the last sampling.
    pub fn validate(
        &self,
        limits: &StepLimits,
        layout: &KvLayout,
        blocks: usize,
        sampled: usize,
    ) -> Result<(), StepError> {
        let tokens = self.tokens.len();
        let malformed = |what: String| Err(StepError::Malformed(what));
        if tokens > limits.tokens {
            return Err(StepError::TooManyTokens { found: tokens, limit: limits.tokens });
        }
        if self.positions.len() != tokens {
            return malformed(format!("{tokens} tokens but {} positions", self.positions.len()));
        }
        check_offsets("sequence_offsets", self.sequence_offsets, tokens)?;
        check_offsets("table_offsets", self.table_offsets, self.block_tables.len())?;
        if self.table_offsets.len() != self.sequence_offsets.len() {
            return malformed(format!(
                "{} sequences but {} block tables",
                self.sequence_offsets.len() - 1,
                self.table_offsets.len() - 1
            ));
        }
        for (row, &token) in self.tokens.iter().enumerate() {
            match token.checked_sub(Self::SAMPLED) {
                Some(chosen) if chosen as usize >= sampled => {
                    return malformed(format!("row {row} takes the token of row {chosen} of a sampling of {sampled}"));
                }
                None if token as usize >= limits.vocabulary => {
                    return Err(StepError::Token { row, token, vocabulary: limits.vocabulary });
                }
                _ => {}
            }
        }
        if let Some(&block) = self.block_tables.iter().find(|&&b| b as usize >= blocks) {
            return malformed(format!("block {block} of a pool of {blocks}"));
        }
        for s in 0..self.sequences() {
            let positions = &self.positions[self.rows(s)];
            if positions.windows(2).any(|w| w[0].checked_add(1) != Some(w[1])) {
                return malformed(format!("positions of sequence {s} are not consecutive"));
            }
            let Some(&last) = positions.last() else { continue };
            let last = last as usize;
            if last >= limits.context {
                return Err(StepError::Context { position: last, context: limits.context });
            }
            if last / layout.block_tokens >= self.table(s).len() {
                return malformed(format!(
                    "sequence {s} reaches position {last} but has {} blocks of {} tokens",
                    self.table(s).len(),
                    layout.block_tokens
                ));
            }
        }
        if self.logit_rows.windows(2).any(|w| w[1] <= w[0]) {
            return malformed("logit rows are not ascending".into());
        }
        if let Some(&row) = self.logit_rows.last().filter(|&&r| r as usize >= tokens) {
            return malformed(format!("logit row {row} of {tokens} tokens"));
        }
        Ok(())
    }
}

fn check_offsets(name: &str, offsets: &[u32], end: usize) -> Result<(), StepError> {
    let ascending = offsets.windows(2).all(|w| w[0] <= w[1]);
    if offsets.first() != Some(&0) || offsets.last().map(|&o| o as usize) != Some(end) || !ascending {
        return Err(StepError::Malformed(format!("{name} must rise from 0 to {end}, found {offsets:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvLayer;

    const LIMITS: StepLimits = StepLimits { tokens: 8, context: 20, width: 1, vocabulary: 100, logit_rows: 8 };
    const BLOCKS: usize = 6;

    /// Two sequences: three tokens from position 3 on, one at position 9; blocks of 4 tokens.
    const STEP: Step<'static> = Step {
        tokens: &[1, 2, 99, 4],
        positions: &[3, 4, 5, 9],
        sequence_offsets: &[0, 3, 4],
        block_tables: &[5, 0, 1, 2, 3],
        table_offsets: &[0, 2, 5],
        logit_rows: &[1, 3],
    };

    fn validate(step: Step<'_>) -> Result<(), StepError> {
        let layer = KvLayer { heads: 1, key_dim: 1, value_dim: 1, window: None };
        step.validate(&LIMITS, &KvLayout { block_tokens: 4, layers: vec![layer] }, BLOCKS, 2)
    }

    #[test]
    fn a_ragged_batch_is_valid() {
        assert_eq!(validate(STEP), Ok(()));
        assert_eq!((STEP.sequences(), STEP.rows(1), STEP.table(1)), (2, 3..4, &[1, 2, 3][..]));
        let resting = Step { sequence_offsets: &[0, 3, 3, 4], table_offsets: &[0, 2, 2, 5], ..STEP };
        assert_eq!(validate(resting), Ok(()));
        let nothing = Step { tokens: &[], positions: &[], sequence_offsets: &[0], logit_rows: &[], ..STEP };
        assert_eq!(validate(Step { block_tables: &[], table_offsets: &[0], ..nothing }), Ok(()));
    }

    #[test]
    fn limits_are_kept() {
        let tokens = [0; 9];
        assert_eq!(validate(Step { tokens: &tokens, ..STEP }), Err(StepError::TooManyTokens { found: 9, limit: 8 }));
        let found = validate(Step { tokens: &[1, 100, 2, 3], ..STEP });
        assert_eq!(found, Err(StepError::Token { row: 1, token: 100, vocabulary: 100 }));
        let found = validate(Step { positions: &[3, 4, 5, 20], ..STEP });
        assert_eq!(found, Err(StepError::Context { position: 20, context: 20 }));
    }

    #[test]
    fn malformed_steps_are_refused() {
        let cases = [
            (Step { positions: &[3, 4, 5], ..STEP }, "4 tokens but 3 positions"),
            (Step { sequence_offsets: &[], ..STEP }, "sequence_offsets must rise from 0 to 4"),
            (Step { sequence_offsets: &[1, 3, 4], ..STEP }, "sequence_offsets must rise from 0 to 4"),
            (Step { sequence_offsets: &[0, 3, 5], ..STEP }, "sequence_offsets must rise from 0 to 4"),
            (Step { sequence_offsets: &[0, 5, 4], ..STEP }, "sequence_offsets must rise from 0 to 4"),
            (Step { table_offsets: &[0, 2, 4], ..STEP }, "table_offsets must rise from 0 to 5"),
            (Step { table_offsets: &[0, 5], ..STEP }, "2 sequences but 1 block tables"),
            (Step { block_tables: &[5, 0, 1, 2, 6], ..STEP }, "block 6 of a pool of 6"),
            (Step { positions: &[3, 5, 6, 9], ..STEP }, "positions of sequence 0 are not consecutive"),
            (
                Step { positions: &[u32::MAX - 1, u32::MAX, 0, 9], ..STEP },
                "positions of sequence 0 are not consecutive",
            ),
            (Step { positions: &[6, 7, 8, 9], ..STEP }, "sequence 0 reaches position 8 but has 2 blocks of 4 tokens"),
            (Step { logit_rows: &[3, 1], ..STEP }, "logit rows are not ascending"),
            (Step { logit_rows: &[1, 1], ..STEP }, "logit rows are not ascending"),
            (Step { logit_rows: &[1, 4], ..STEP }, "logit row 4 of 4 tokens"),
        ];
        for (step, message) in cases {
            let found = validate(step).unwrap_err().to_string();
            assert!(found.contains(message), "{found:?} does not say {message:?}");
        }
    }
}
