//! A step's tokens, positions and block tables on the device.

use super::device::{Gpu, Storage};
use crate::{KernelError, Step, StepLimits};

/// Tokens of a query tile, at most: attention takes those of a sequence together.
pub(super) const TILE_TOKENS: usize = 64;

/// Tokens that a sequence must bring for them to fill query tiles: fewer would leave most of one empty.
const LEAST_TILED: usize = 16;

/// The step on the device.
pub(super) struct StepBuffers {
    pub(super) tokens: Storage,
    /// Position and start of the block table of each token.
    pub(super) step_tokens: Storage,
    /// Row, position and start of the block table of each token, those that no query tile has first.
    pub(super) attention_tokens: Storage,
    /// Where in them each query tile begins, and its tokens.
    pub(super) query_tiles: Storage,
    pub(super) block_tables: Storage,
    pub(super) logit_rows: Storage,
    /// The host's copies: positions, and what is uploaded.
    pub(super) positions: Vec<u32>,
    staged: Vec<[u32; 2]>,
    staged_attention: Vec<[u32; 3]>,
    staged_tiles: Vec<[u32; 2]>,
    /// Tokens of the step.
    pub(super) rows: usize,
    /// Those that no query tile has.
    pub(super) untiled: usize,
    /// No sequence brings more than one.
    pub(super) is_decode: bool,
    /// Rows whose logits are wanted.
    pub(super) logits: usize,
}

impl StepBuffers {
    /// Words of each buffer: tokens, positions and tables of tokens, tokens of attention, query tiles, block tables, logit rows.
    fn sizes(limits: &StepLimits) -> [usize; 6] {
        let StepLimits { tokens, context, .. } = *limits;
        // Enough for one sequence in blocks of one token. Block tables of many sequences may make it grow.
        [tokens, 2 * tokens, 3 * tokens, 2 * tokens.div_ceil(LEAST_TILED), context, tokens]
    }

    pub(super) fn bytes(limits: &StepLimits) -> usize {
        Self::sizes(limits).iter().sum::<usize>() * size_of::<u32>()
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let make = |what, words: usize| gpu.storage(what, words.saturating_mul(size_of::<u32>()));
        let [tokens, step_tokens, attention_tokens, query_tiles, block_tables, logit_rows] = Self::sizes(limits);
        Ok(Self {
            tokens: make("the step's tokens", tokens)?,
            step_tokens: make("the step's positions", step_tokens)?,
            attention_tokens: make("the step's positions", attention_tokens)?,
            query_tiles: make("the step's query tiles", query_tiles)?,
            block_tables: make("the step's block tables", block_tables)?,
            logit_rows: make("the step's logit rows", logit_rows)?,
            positions: Vec::with_capacity(limits.tokens),
            staged: Vec::with_capacity(limits.tokens),
            staged_attention: Vec::with_capacity(limits.tokens),
            staged_tiles: Vec::with_capacity(limits.tokens.div_ceil(LEAST_TILED)),
            rows: 0,
            untiled: 0,
            is_decode: false,
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
        self.divide_among_tiles(step);
        self.is_decode = (0..step.sequences()).all(|sequence| step.rows(sequence).len() <= 1);
        (self.rows, self.logits) = (0, 0);
        let tables = size_of_val(step.block_tables);
        if tables as u64 > self.block_tables.buffer.size() {
            self.block_tables = gpu.storage("the step's block tables", tables.next_power_of_two())?;
        }
        (self.rows, self.logits) = (step.tokens.len(), step.logit_rows.len());
        gpu.write(&self.tokens, 0, bytemuck::cast_slice(step.tokens));
        gpu.write(&self.step_tokens, 0, bytemuck::cast_slice(&self.staged));
        gpu.write(&self.attention_tokens, 0, bytemuck::cast_slice(&self.staged_attention));
        gpu.write(&self.query_tiles, 0, bytemuck::cast_slice(&self.staged_tiles));
        gpu.write(&self.block_tables, 0, bytemuck::cast_slice(step.block_tables));
        gpu.write(&self.logit_rows, 0, bytemuck::cast_slice(step.logit_rows));
        Ok(())
    }

    /// Puts the tokens of sequences that bring few of them first, and cuts those of others into query tiles.
    fn divide_among_tiles(&mut self, step: &Step<'_>) {
        let Self { staged_attention, staged_tiles, .. } = self;
        staged_attention.clear();
        staged_tiles.clear();
        for tiled in [false, true] {
            for sequence in 0..step.sequences() {
                let (rows, table) = (step.rows(sequence), step.table_offsets[sequence]);
                if (rows.len() >= LEAST_TILED) != tiled {
                    continue;
                }
                let first = staged_attention.len() as u32;
                if tiled {
                    let starts = (0..rows.len() as u32).step_by(TILE_TOKENS);
                    let tile = |start: u32| [first + start, (rows.len() as u32 - start).min(TILE_TOKENS as u32)];
                    staged_tiles.extend(starts.map(tile));
                }
                staged_attention.extend(rows.map(|row| [row as u32, step.positions[row], table]));
            }
            if !tiled {
                self.untiled = staged_attention.len();
            }
        }
    }

    /// Query tiles of the step.
    pub(super) fn tiles(&self) -> usize {
        self.staged_tiles.len()
    }

    /// Row, position and start of the block table of one of the tokens of attention.
    pub(super) fn attention_token(&self, index: usize) -> [u32; 3] {
        self.staged_attention[index]
    }

    /// Positions of the first `count` of the tokens of attention.
    pub(super) fn attention_positions(&self, count: usize) -> impl Iterator<Item = u32> {
        self.staged_attention[..count].iter().map(|[_, position, _]| *position)
    }
}
