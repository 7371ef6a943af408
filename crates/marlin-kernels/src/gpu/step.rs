//! A step's tokens, positions and block tables on the device.

use super::device::{Gpu, Storage};
use crate::{KernelError, Step, StepLimits};

/// The step on the device.
pub(super) struct StepBuffers {
    pub(super) tokens: Storage,
    /// Position and start of the block table of each token.
    pub(super) step_tokens: Storage,
    pub(super) block_tables: Storage,
    pub(super) logit_rows: Storage,
    /// The host's copies: positions, and what is uploaded.
    pub(super) positions: Vec<u32>,
    staged: Vec<[u32; 2]>,
    /// Tokens of the step.
    pub(super) rows: usize,
    /// Rows whose logits are wanted.
    pub(super) logits: usize,
}

impl StepBuffers {
    /// Words of each buffer: tokens, positions and tables of tokens, block tables, logit rows.
    fn sizes(limits: &StepLimits) -> [usize; 4] {
        let StepLimits { tokens, context, .. } = *limits;
        // Enough for one sequence in blocks of one token. Block tables of many sequences may make it grow.
        [tokens, 2 * tokens, context, tokens]
    }

    pub(super) fn bytes(limits: &StepLimits) -> usize {
        Self::sizes(limits).iter().sum::<usize>() * size_of::<u32>()
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let make = |what, words: usize| gpu.storage(what, words.saturating_mul(size_of::<u32>()));
        let [tokens, step_tokens, block_tables, logit_rows] = Self::sizes(limits);
        Ok(Self {
            tokens: make("the step's tokens", tokens)?,
            step_tokens: make("the step's positions", step_tokens)?,
            block_tables: make("the step's block tables", block_tables)?,
            logit_rows: make("the step's logit rows", logit_rows)?,
            positions: Vec::with_capacity(limits.tokens),
            staged: Vec::with_capacity(limits.tokens),
            rows: 0,
            logits: 0,
        })
    }

    /// Takes over a step. If its block tables have no room, no operation of it finds a row.
    pub(super) fn begin(&mut self, gpu: &Gpu, step: &Step<'_>) -> Result<(), KernelError> {
        self.positions.clear();
        self.positions.extend_from_slice(step.positions);
        self.staged.clear();
        for sequence in 0..step.sequences() {
            let table = step.table_offsets[sequence];
            self.staged.extend(step.rows(sequence).map(|row| [step.positions[row], table]));
        }
        (self.rows, self.logits) = (0, 0);
        let tables = size_of_val(step.block_tables);
        if tables as u64 > self.block_tables.buffer.size() {
            self.block_tables = gpu.storage("the step's block tables", tables.next_power_of_two())?;
        }
        (self.rows, self.logits) = (step.tokens.len(), step.logit_rows.len());
        gpu.write(&self.tokens, 0, bytemuck::cast_slice(step.tokens));
        gpu.write(&self.step_tokens, 0, bytemuck::cast_slice(&self.staged));
        gpu.write(&self.block_tables, 0, bytemuck::cast_slice(step.block_tables));
        gpu.write(&self.logit_rows, 0, bytemuck::cast_slice(step.logit_rows));
        Ok(())
    }
}
