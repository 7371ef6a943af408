//! The pool alone, and as a machine with memory behind it.

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

/// A sequence of the first blocks of `tokens`, computed and named.
fn named(pool: &mut KvPool, tokens: &[u32]) -> KvSequence {
    let sequence = sequence(pool, tokens.len());
    (0..tokens.len() / BLOCK).for_each(|n| remember(pool, &sequence, n, tokens));
    sequence
}

fn remember(pool: &mut KvPool, sequence: &KvSequence, block: usize, tokens: &[u32]) {
    let (start, end) = (block * BLOCK, (block + 1) * BLOCK);
    pool.remember(sequence, block, hash(&tokens[..end]), hash(&tokens[..start]), &tokens[start..end]);
}

/// What is known of these tokens.
fn cached(pool: &mut KvPool, tokens: &[u32]) -> KvSequence {
    let hashes: Vec<BlockHash> = (1..=tokens.len() / BLOCK).map(|n| hash(&tokens[..n * BLOCK])).collect();
    pool.cached_prefix(hash(&[]), &hashes, tokens)
}

#[test]
fn a_prefix_outlives_its_sequence_until_its_blocks_are_needed() {
    let mut pool = pool(4);
    let tokens: Vec<u32> = (0..10).collect();
    let a = named(&mut pool, &tokens);
    let blocks = a.blocks()[..2].to_vec();
    // It is shared while its owner lives, and kept afterwards. The third block was not full.
    let b = cached(&mut pool, &tokens);
    assert_eq!((b.blocks(), b.len(), pool.free_blocks()), (&blocks[..], 8, 1));
    pool.release(a);
    pool.release(b);
    assert_eq!((pool.free_blocks(), pool.cached_blocks()), (4, 2));
    let b = cached(&mut pool, &tokens);
    assert_eq!((b.blocks(), pool.free_blocks(), pool.cached_blocks()), (&blocks[..], 2, 0));
    pool.release(b);

    // Blocks of no use go first, then the end of the prefix, then its beginning.
    let c = sequence(&mut pool, 3 * BLOCK);
    let b = cached(&mut pool, &tokens);
    assert_eq!((b.blocks(), pool.free_blocks()), (&blocks[..1], 0));
    pool.release(b);
    let d = sequence(&mut pool, 1);
    assert!(cached(&mut pool, &tokens).is_empty());
    pool.release(c);
    pool.release(d);
    assert_eq!((pool.free_blocks(), pool.cached_blocks()), (4, 0));
}

#[test]
fn a_prefix_that_ends_within_a_block_is_copied_when_it_goes_on() {
    let mut pool = pool(4);
    let tokens: Vec<u32> = (0..8).collect();
    let a = named(&mut pool, &tokens);
    let blocks = a.blocks().to_vec();
    pool.release(a);
    let mut b = cached(&mut pool, &[0, 1, 2, 3, 4, 5, 99, 7, 8]);
    assert_eq!((b.blocks(), b.len(), pool.needed_blocks(&b, 1)), (&blocks[..], 6, 1));
    assert_eq!(pool.room(&b, 1), 2);
    pool.append(&mut b, 1).unwrap();
    assert_eq!(pool.pending_copies(), [(blocks[1], b.blocks()[1])]);
    pool.finish_copies();
    // The block itself is as it was.
    let c = cached(&mut pool, &tokens);
    assert_eq!((c.blocks(), c.len()), (&blocks[..], 8));
    assert!(cached(&mut pool, &[7, 1, 2]).is_empty());
    [b, c].into_iter().for_each(|sequence| pool.release(sequence));
    assert_eq!(pool.free_blocks(), 4);
}

#[test]
fn what_is_written_without_room_for_a_copy_has_another_name() {
    let mut pool = pool(1);
    let tokens: Vec<u32> = (0..4).collect();
    let mut a = named(&mut pool, &tokens);
    pool.truncate(&mut a, 3);
    assert_eq!((pool.needed_blocks(&a, 1), pool.room(&a, 0)), (0, 1));
    pool.append(&mut a, 1).unwrap();
    assert!(cached(&mut pool, &tokens).is_empty());
    pool.release(a);
    assert_eq!((pool.free_blocks(), pool.cached_blocks()), (1, 0));
}

#[derive(Debug, Clone)]
enum Action {
    Start,
    Append(usize, usize),
    Truncate(usize, usize),
    Fork(usize),
    Release(usize),
    /// A sequence like an earlier one, or like the first so many tokens of it.
    Again(usize, usize),
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
        index.clone().prop_map(Action::Release),
        (index, 0..20usize).prop_map(|(s, n)| Action::Again(s, n)),
        Just(Action::Forward),
    ]
}

/// A pool with a memory of tokens behind it, and what each sequence's tokens ought to be.
struct Machine {
    pool: KvPool,
    memory: Vec<[u32; BLOCK]>,
    sequences: Vec<(KvSequence, Vec<u32>)>,
    /// Tokens of released sequences.
    past: Vec<Vec<u32>>,
    next_token: u32,
}

/// A name for the block that these tokens end with.
fn hash(tokens: &[u32]) -> BlockHash {
    let mut hash = [0_u8; 32];
    for (place, byte) in tokens.iter().flat_map(|token| token.to_le_bytes()).enumerate() {
        hash[place % 32] = byte.wrapping_add(hash[(place + 1) % 32].rotate_left(3)).wrapping_mul(31);
    }
    BlockHash(hash)
}

impl Machine {
    fn new(blocks: usize) -> Self {
        Self {
            pool: pool(blocks),
            memory: vec![[0; BLOCK]; blocks],
            sequences: Vec::new(),
            past: Vec::new(),
            next_token: 1,
        }
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
        for block in 0..expected.len() / BLOCK {
            remember(&mut self.pool, sequence, block, expected);
        }
    }

    /// Begins with what is left of an earlier sequence.
    fn again(&mut self, past: usize, tokens: usize) {
        let Some(expected) = self.past.get(past % self.past.len().max(1)) else { return };
        let expected = &expected[..expected.len().min(tokens)];
        let sequence = cached(&mut self.pool, expected);
        let expected = expected[..sequence.len()].to_vec();
        self.sequences.push((sequence, expected));
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
        let free: HashSet<u32> = self.pool.free.iter().copied().chain(self.pool.known.idle_blocks()).collect();
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
                    let (sequence, tokens) = machine.sequences.swap_remove(s);
                    machine.pool.release(sequence);
                    machine.past.push(tokens);
                }
                Action::Again(past, tokens) if count < 8 => machine.again(past, tokens),
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
        machine.pool.forget_prefixes();
        prop_assert_eq!((machine.pool.free_blocks(), machine.pool.cached_blocks()), (12, 0));
    }
}
