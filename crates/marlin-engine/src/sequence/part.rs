//! Where an answer stands, what a step has of it, and the room that it takes.

use std::ops::Range;

use crate::RequestId;
use crate::speculation::AnswerId;

/// Where an answer stands in line: by the priority of its request, then by when that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) priority: i32,
    pub(crate) request: RequestId,
    pub(crate) choice: u32,
}

/// Whether the store on disk was asked for what an answer begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lookup {
    NotYet,
    /// Blocks are on their way.
    Waiting,
    Done,
}

/// An answer's part in a step.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) rank: Rank,
    /// Its tokens among the step's.
    pub(crate) tokens: Range<usize>,
    /// The position of the first of them.
    pub(crate) start: usize,
    /// Tokens that it has computed when the step is done.
    pub(super) computed: usize,
    /// Its rows of the step's logits.
    pub(crate) rows: Range<usize>,
    /// The step computes the last of its tokens.
    pub(super) is_complete: bool,
    /// Its next token comes from the last of the rows, but for those of guesses.
    pub(crate) is_sampled: bool,
    /// Guesses, each of which has a row behind that of the next token.
    pub(crate) drafted: usize,
}

/// What came of a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Computed<'a> {
    /// If they were read, `vocabulary` to a row.
    pub(crate) logits: &'a [f32],
    pub(crate) vocabulary: usize,
    /// Hidden states of all tokens, if they were read, `hidden_size` to a row.
    pub(crate) hidden: &'a [f32],
    pub(crate) hidden_size: usize,
    /// A token to a row.
    pub(crate) sampled: &'a [u32],
}

impl Rank {
    /// The answer's name.
    pub(crate) fn answer(self) -> AnswerId {
        AnswerId { request: self.request, choice: self.choice }
    }
}

impl Part {
    /// The row of its next token; those of its guesses follow.
    pub(super) fn next_row(&self) -> usize {
        self.rows.end - 1 - self.drafted
    }
}

/// The room an answer takes at worst.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Tokens, prompt included.
    pub(crate) tokens: usize,
    /// KV blocks for them.
    pub(crate) kv_blocks: usize,
}

impl Room {
    pub(crate) fn new(prompt: usize, max_tokens: usize, context: usize, block_tokens: usize) -> Self {
        let tokens = prompt.saturating_add(max_tokens).min(context);
        // The last generated token is never fed back.
        let computed = prompt.max(tokens - 1);
        Self { tokens, kv_blocks: computed.div_ceil(block_tokens) }
    }
}
