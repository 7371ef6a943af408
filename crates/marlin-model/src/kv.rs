//! The host's side of the paged KV cache: which blocks a sequence owns.

use marlin_kernels::KvLayout;

use crate::ModelError;

/// A sequence's cached tokens: its length and block table. Made by [`KvPool::sequence`] and [`KvPool::fork`].
///
/// Give it back with [`KvPool::release`]: dropping it would keep its blocks from everyone else for as long as the pool lives.
#[derive(Debug)]
#[must_use = "a sequence that is dropped keeps its blocks; release it"]
pub struct KvSequence {
    blocks: Vec<u32>,
    len: usize,
}

impl KvSequence {
    /// Tokens there is room for, cached or about to be.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a sequence of no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its block table: the token at position p lives in block `p / block_tokens` of it.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

/// Allocates KV blocks; blocks are shared between forks and copied when one of them writes.
///
/// Copies are recorded by [`KvPool::append`] and run at the beginning of the next [`crate::LanguageModel::forward`]. Until then the block
/// copied from cannot be given to anyone else, and a copy whose target is given back is forgotten, so recorded copies
/// never read or write each other's blocks and may run in any order.
///
/// Sequences belong to the pool that made them; with another pool's sequence any method may panic.
#[derive(Debug)]
pub struct KvPool {
    layout: KvLayout,
    /// How many block tables name each block.
    references: Vec<u32>,
    free: Vec<u32>,
    /// Copies `(from, to)` not yet run. `from` is no block's `to`, and stays out of `free`.
    pending_copies: Vec<(u32, u32)>,
}

impl KvPool {
    /// A pool of `blocks` free blocks.
    ///
    /// # Panics
    /// If a block's number does not fit a u32.
    pub fn new(layout: KvLayout, blocks: usize) -> Self {
        let count = u32::try_from(blocks).expect("blocks are numbered by u32");
        // The lowest block is handed out first.
        let free = (0..count).rev().collect();
        Self { layout, references: vec![0; blocks], free, pending_copies: Vec::new() }
    }

    /// An empty sequence.
    pub fn sequence(&self) -> KvSequence {
        KvSequence { blocks: Vec::new(), len: 0 }
    }

    /// Makes room for `tokens` more tokens at the end of a sequence; nothing changes if the pool has too few blocks.
    /// Blocks shared with a fork that would be written are replaced by copies.
    pub fn append(&mut self, sequence: &mut KvSequence, tokens: usize) -> Result<(), ModelError> {
        if tokens == 0 {
            return Ok(());
        }
        let block_tokens = self.layout.block_tokens;
        let len = sequence.len.saturating_add(tokens);
        let new_blocks = len.div_ceil(block_tokens) - sequence.blocks.len();
        // Only the last block can be partly filled, so it alone can be shared and written.
        let shared = sequence
            .blocks
            .last()
            .copied()
            .filter(|&last| !sequence.len.is_multiple_of(block_tokens) && self.references[last as usize] > 1);
        let needed = new_blocks + usize::from(shared.is_some());
        if needed > self.free.len() {
            return Err(ModelError::OutOfBlocks {
                len: sequence.len,
                tokens,
                needed,
                free: self.free.len(),
                blocks: self.references.len(),
                block_tokens,
            });
        }
        if let Some(from) = shared {
            let to = self.allocate();
            // A block that is itself still to be copied into has nothing to read yet.
            let pending = self.pending_copies.iter().find(|copy| copy.1 == from);
            let source = pending.map_or(from, |copy| copy.0);
            self.pending_copies.push((source, to));
            self.drop_reference(from);
            *sequence.blocks.last_mut().expect("has a last block") = to;
        }
        for _ in 0..new_blocks {
            let block = self.allocate();
            sequence.blocks.push(block);
        }
        sequence.len = len;
        Ok(())
    }

    /// Rolls a sequence back to its first `len` tokens; does nothing if it has no more than that.
    pub fn truncate(&mut self, sequence: &mut KvSequence, len: usize) {
        if len >= sequence.len {
            return;
        }
        sequence.len = len;
        for block in sequence.blocks.drain(len.div_ceil(self.layout.block_tokens)..) {
            self.drop_reference(block);
        }
    }

    /// A second sequence with the same tokens, sharing blocks until either writes. Tokens appended but not yet run must be run
    /// through `sequence` before the fork is extended.
    pub fn fork(&mut self, sequence: &KvSequence) -> KvSequence {
        for &block in &sequence.blocks {
            self.references[block as usize] += 1;
        }
        KvSequence { blocks: sequence.blocks.clone(), len: sequence.len }
    }

    /// Gives a sequence's blocks back.
    pub fn release(&mut self, sequence: KvSequence) {
        for block in sequence.blocks {
            self.drop_reference(block);
        }
    }

    /// Blocks not in use.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Blocks of the pool.
    pub fn blocks(&self) -> usize {
        self.references.len()
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.layout.block_tokens
    }

    /// How keys and values are laid out.
    pub(crate) fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Copies to run before the next tokens are written.
    pub(crate) fn pending_copies(&self) -> &[(u32, u32)] {
        &self.pending_copies
    }

    /// Forgets the pending copies, which have been run: their sources may be given to others again.
    pub(crate) fn finish_copies(&mut self) {
        while let Some((from, _)) = self.pending_copies.pop() {
            self.free_if_unused(from);
        }
    }

    fn allocate(&mut self) -> u32 {
        let block = self.free.pop().expect("enough blocks were counted");
        self.references[block as usize] = 1;
        block
    }

    fn drop_reference(&mut self, block: u32) {
        self.references[block as usize] -= 1;
        if self.references[block as usize] > 0 {
            return;
        }
        if let Some(index) = self.pending_copies.iter().position(|copy| copy.1 == block) {
            let (from, _) = self.pending_copies.swap_remove(index);
            self.free_if_unused(from);
        }
        self.free_if_unused(block);
    }

    /// Puts a block back unless a sequence owns it or a pending copy reads it.
    fn free_if_unused(&mut self, block: u32) {
        let awaited = self.pending_copies.iter().any(|copy| copy.0 == block);
        if self.references[block as usize] == 0 && !awaited {
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const BLOCK: usize = 4;

    fn pool(blocks: usize) -> KvPool {
        KvPool::new(KvLayout { block_tokens: BLOCK, layers: Vec::new() }, blocks)
    }

    fn sequence(pool: &mut KvPool, tokens: usize) -> KvSequence {
        let mut sequence = pool.sequence();
        pool.append(&mut sequence, tokens).unwrap();
        sequence
    }

    #[test]
    fn a_sequence_takes_whole_blocks() {
        let mut pool = pool(4);
        let mut a = sequence(&mut pool, 5);
        assert_eq!((a.len(), a.blocks().len(), pool.free_blocks()), (5, 2, 2));
        pool.append(&mut a, 3).unwrap();
        assert_eq!((a.len(), a.blocks().len(), pool.free_blocks()), (8, 2, 2));
        pool.truncate(&mut a, 4);
        assert_eq!((a.len(), a.blocks().len(), pool.free_blocks()), (4, 1, 3));
        pool.truncate(&mut a, 9);
        assert_eq!(a.len(), 4);
        pool.release(a);
        assert_eq!(pool.free_blocks(), 4);
    }

    #[test]
    fn too_few_blocks_change_nothing() {
        let mut pool = pool(2);
        let mut a = sequence(&mut pool, 3);
        let error = pool.append(&mut a, 6).unwrap_err().to_string();
        assert_eq!(
            error,
            "a sequence of 3 tokens needs 2 more KV blocks for 6 tokens, 1 of 2 are free (4 tokens each); \
             release sequences or load the model with more KV blocks"
        );
        assert_eq!((a.len(), a.blocks().len(), pool.free_blocks()), (3, 1, 1));
        assert!(pool.append(&mut a, usize::MAX).is_err());
        pool.release(a);
    }

    #[test]
    fn the_fork_that_writes_copies_and_the_other_need_not() {
        let mut pool = pool(8);
        let mut a = sequence(&mut pool, 6);
        let mut b = pool.fork(&a);
        assert_eq!((a.blocks(), pool.free_blocks()), (b.blocks(), 6));
        pool.append(&mut b, 1).unwrap();
        assert_eq!(pool.pending_copies(), [(a.blocks()[1], b.blocks()[1])]);
        assert_eq!(a.blocks()[0], b.blocks()[0]);
        assert_ne!(a.blocks()[1], b.blocks()[1]);
        pool.append(&mut a, 1).unwrap();
        assert_eq!(pool.pending_copies().len(), 1);
        pool.release(a);
        pool.release(b);
        assert_eq!(pool.free_blocks(), 8);
    }

    #[test]
    fn a_fork_at_a_block_border_copies_nothing() {
        let mut pool = pool(8);
        let a = sequence(&mut pool, 8);
        let mut b = pool.fork(&a);
        pool.append(&mut b, 1).unwrap();
        assert!(pool.pending_copies().is_empty());
        // Rolled back into a shared full block, it does.
        pool.truncate(&mut b, 7);
        pool.append(&mut b, 1).unwrap();
        assert_eq!(pool.pending_copies(), [(a.blocks()[1], b.blocks()[1])]);
        pool.release(a);
        pool.release(b);
    }

    #[test]
    fn a_block_is_not_given_away_before_it_is_copied() {
        let mut pool = pool(2);
        let a = sequence(&mut pool, 2);
        let mut b = pool.fork(&a);
        pool.append(&mut b, 1).unwrap();
        pool.release(a);
        let mut c = pool.sequence();
        assert!(pool.append(&mut c, 1).is_err());
        pool.finish_copies();
        pool.append(&mut c, 1).unwrap();
        pool.release(b);
        pool.release(c);
        assert_eq!(pool.free_blocks(), 2);
    }

    #[test]
    fn a_copy_of_a_copy_reads_the_original() {
        let mut pool = pool(3);
        let a = sequence(&mut pool, 2);
        let mut b = pool.fork(&a);
        pool.append(&mut b, 1).unwrap();
        pool.truncate(&mut b, 2);
        let mut c = pool.fork(&b);
        pool.append(&mut c, 1).unwrap();
        let source = a.blocks()[0];
        assert_eq!(pool.pending_copies(), [(source, b.blocks()[0]), (source, c.blocks()[0])]);
        pool.release(a);
        pool.release(b);
        assert_eq!(pool.pending_copies(), [(source, c.blocks()[0])]);
        pool.release(c);
        assert_eq!(pool.free_blocks(), 3);
    }

    #[derive(Debug, Clone)]
    enum Action {
        Start,
        Append(usize, usize),
        Truncate(usize, usize),
        Fork(usize),
        Release(usize),
        Forward,
    }

    fn action() -> impl Strategy<Value = Action> {
        let index = 0..8usize;
        prop_oneof![
            Just(Action::Start),
            (index.clone(), 0..11usize).prop_map(|(s, n)| Action::Append(s, n)),
            (index.clone(), 0..11usize).prop_map(|(s, n)| Action::Append(s, n)),
            (index.clone(), 0..20usize).prop_map(|(s, n)| Action::Truncate(s, n)),
            index.clone().prop_map(Action::Fork),
            index.prop_map(Action::Release),
            Just(Action::Forward),
        ]
    }

    /// A pool with a memory of tokens behind it, and what each sequence's tokens ought to be.
    struct Machine {
        pool: KvPool,
        memory: Vec<[u32; BLOCK]>,
        sequences: Vec<(KvSequence, Vec<u32>)>,
        next_token: u32,
    }

    impl Machine {
        fn new(blocks: usize) -> Self {
            Self { pool: pool(blocks), memory: vec![[0; BLOCK]; blocks], sequences: Vec::new(), next_token: 1 }
        }

        /// Runs the pending copies from last to first, to show that their order does not matter.
        fn forward(&mut self) {
            for &(from, to) in self.pool.pending_copies().iter().rev() {
                self.memory[to as usize] = self.memory[from as usize];
            }
            self.pool.finish_copies();
        }

        /// Appends as an engine does: room first, then a step that writes.
        fn append(&mut self, s: usize, tokens: usize) {
            let (sequence, expected) = &mut self.sequences[s];
            let (free, before) = (self.pool.free_blocks(), sequence.blocks().to_vec());
            if self.pool.append(sequence, tokens).is_err() {
                assert_eq!((free, &before[..]), (self.pool.free_blocks(), sequence.blocks()));
                return;
            }
            if tokens == 0 {
                return;
            }
            let start = expected.len();
            expected.extend((0..tokens as u32).map(|t| self.next_token + t));
            self.next_token += tokens as u32;
            self.forward();
            let (sequence, expected) = &self.sequences[s];
            for (p, &token) in expected.iter().enumerate().skip(start) {
                self.memory[sequence.blocks()[p / BLOCK] as usize][p % BLOCK] = token;
            }
        }

        /// Makes room and takes it back before any step: copies are recorded and may be cancelled.
        fn append_and_roll_back(&mut self, s: usize, tokens: usize) {
            let (sequence, expected) = &mut self.sequences[s];
            if self.pool.append(sequence, tokens).is_ok() {
                self.pool.truncate(sequence, expected.len());
            }
        }

        fn check(&self) {
            for (sequence, expected) in &self.sequences {
                assert_eq!(sequence.len(), expected.len());
                assert_eq!(sequence.blocks().len(), expected.len().div_ceil(BLOCK));
            }
            let tables = self.sequences.iter().flat_map(|(s, _)| s.blocks());
            let sources = self.pool.pending_copies().iter().map(|copy| &copy.0);
            let used: HashSet<u32> = tables.chain(sources).copied().collect();
            let free: HashSet<u32> = self.pool.free.iter().copied().collect();
            assert_eq!(free.len(), self.pool.free_blocks(), "a block is free twice");
            assert!(used.is_disjoint(&free));
            assert_eq!(used.len() + free.len(), self.pool.blocks(), "a block is lost");
        }

        fn check_contents(&mut self) {
            self.forward();
            for (sequence, expected) in &self.sequences {
                let cached = (0..sequence.len()).map(|p| self.memory[sequence.blocks()[p / BLOCK] as usize][p % BLOCK]);
                assert!(cached.eq(expected.iter().copied()), "{sequence:?} lost its tokens {expected:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn sequences_keep_their_tokens_and_no_block_leaks(actions in prop::collection::vec((action(), any::<bool>()), 1..80)) {
            let mut machine = Machine::new(12);
            for (action, roll_back) in actions {
                let count = machine.sequences.len();
                match action {
                    Action::Start if count < 8 => machine.sequences.push((machine.pool.sequence(), Vec::new())),
                    Action::Append(s, n) if s < count && roll_back => machine.append_and_roll_back(s, n),
                    Action::Append(s, n) if s < count => machine.append(s, n),
                    Action::Truncate(s, len) if s < count => {
                        let (sequence, expected) = &mut machine.sequences[s];
                        machine.pool.truncate(sequence, len);
                        expected.truncate(len);
                    }
                    Action::Fork(s) if s < count && count < 8 => {
                        let (sequence, expected) = &machine.sequences[s];
                        let fork = (machine.pool.fork(sequence), expected.clone());
                        machine.sequences.push(fork);
                    }
                    Action::Release(s) if s < count => {
                        let (sequence, _) = machine.sequences.swap_remove(s);
                        machine.pool.release(sequence);
                    }
                    Action::Forward => machine.check_contents(),
                    _ => {}
                }
                machine.check();
            }
            machine.check_contents();
            for (sequence, _) in machine.sequences.drain(..) {
                machine.pool.release(sequence);
            }
            prop_assert_eq!(machine.pool.free_blocks(), 12);
        }
    }
}
