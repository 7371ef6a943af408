//! The host's side of the paged KV cache: which blocks a sequence owns, and which are kept for others to come.

mod known;

use marlin_kernels::KvLayout;

pub use self::known::BlockHash;
use self::known::KnownBlocks;
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
/// A full block may be given a name, the hash of what it holds ([`KvPool::remember`]). A sequence that begins with the same tokens then
/// shares it ([`KvPool::cached_prefix`]), even when nobody else owns it any more: a block with a name that is given back keeps its content
/// until the pool has no other block to give, and of those the one that was given back first goes first. It counts as free.
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
    /// Blocks that belong to nobody and hold nothing of use.
    free: Vec<u32>,
    known: KnownBlocks,
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
        Self { layout, references: vec![0; blocks], free, known: KnownBlocks::default(), pending_copies: Vec::new() }
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
        let needed = self.needed_blocks(sequence, tokens);
        if needed > self.free_blocks() {
            return Err(ModelError::OutOfBlocks {
                len: sequence.len,
                tokens,
                needed,
                free: self.free_blocks(),
                blocks: self.references.len(),
                block_tokens,
            });
        }
        let new_blocks = len.div_ceil(block_tokens) - sequence.blocks.len();
        if let Some(from) = self.shared_and_written(sequence) {
            let to = self.allocate();
            // A block that is itself still to be copied into has nothing to read yet.
            let pending = self.pending_copies.iter().find(|copy| copy.1 == from);
            let source = pending.map_or(from, |copy| copy.0);
            self.pending_copies.push((source, to));
            self.drop_reference(from);
            *sequence.blocks.last_mut().expect("has a last block") = to;
        }
        if let Some(last) = self.partly_filled(sequence) {
            // With no room for a copy, the sequence writes where it is, and what it writes is not what the block's name says.
            self.known.forget(last);
        }
        for _ in 0..new_blocks {
            let block = self.allocate();
            sequence.blocks.push(block);
        }
        sequence.len = len;
        Ok(())
    }

    /// Blocks that a sequence takes from the pool for `tokens` more tokens.
    pub fn needed_blocks(&self, sequence: &KvSequence, tokens: usize) -> usize {
        if tokens == 0 {
            return 0;
        }
        let blocks = sequence.len.saturating_add(tokens).div_ceil(self.layout.block_tokens);
        blocks - sequence.blocks.len() + usize::from(self.shared_and_written(sequence).is_some())
    }

    /// Tokens that a sequence can grow by with so many blocks of the pool.
    pub fn room(&self, sequence: &KvSequence, blocks: usize) -> usize {
        let block_tokens = self.layout.block_tokens;
        let in_last = sequence.blocks.len() * block_tokens - sequence.len;
        match self.shared_and_written(sequence) {
            Some(_) if blocks == 0 => 0,
            Some(_) => in_last + (blocks - 1) * block_tokens,
            None => in_last + blocks * block_tokens,
        }
    }

    /// The last block, if there is room in it for tokens.
    fn partly_filled(&self, sequence: &KvSequence) -> Option<u32> {
        sequence.blocks.last().copied().filter(|_| !sequence.len.is_multiple_of(self.layout.block_tokens))
    }

    /// The block that has to be copied before the sequence is extended: only the last can be partly filled, so it alone can be written while
    /// somebody else reads it, or may find it by its name.
    fn shared_and_written(&self, sequence: &KvSequence) -> Option<u32> {
        self.partly_filled(sequence)
            .filter(|&last| self.references[last as usize] > 1 || (self.known.is_named(last) && self.free_blocks() > 0))
    }

    /// Names block `index` of a sequence, which is full and has been computed. `parent` is the name of the block before it (of the first,
    /// whatever tells sequences apart that have the same tokens), and `tokens` are its own.
    pub fn remember(
        &mut self,
        sequence: &KvSequence,
        index: usize,
        hash: BlockHash,
        parent: BlockHash,
        tokens: &[u32],
    ) {
        debug_assert_eq!(tokens.len(), self.layout.block_tokens, "the block is full");
        self.known.name(sequence.blocks[index], hash, parent, tokens);
    }

    /// The block that goes by a name, whether it belongs to somebody or not.
    pub fn find(&self, name: &BlockHash) -> Option<u32> {
        self.known.find(name)
    }

    /// A sequence of as many of `tokens`, from the first on, as are known: whole blocks by their names `hashes`, and of the block after them
    /// as much as agrees. (That block is copied when the sequence goes on.) `root` is what stands before the first.
    pub fn cached_prefix(&mut self, root: BlockHash, hashes: &[BlockHash], tokens: &[u32]) -> KvSequence {
        let mut sequence = self.sequence();
        let mut last = root;
        for &hash in hashes {
            let Some(block) = self.known.find(&hash) else { break };
            self.share(block);
            sequence.blocks.push(block);
            last = hash;
        }
        sequence.len = sequence.blocks.len() * self.layout.block_tokens;
        if let Some((block, count)) = self.known.longest_beginning(&last, &tokens[sequence.len..]) {
            self.share(block);
            sequence.blocks.push(block);
            sequence.len += count;
        }
        sequence
    }

    /// One more sequence owns a block.
    fn share(&mut self, block: u32) {
        self.references[block as usize] += 1;
        if self.references[block as usize] == 1 {
            self.known.unpark(block);
        }
    }

    /// Forgets all names.
    pub fn forget_prefixes(&mut self) {
        self.free.extend(self.known.clear());
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
        // The later a block, the fewer begin with it: it shall be given to others before those that it needs.
        for block in sequence.blocks.into_iter().rev() {
            self.drop_reference(block);
        }
    }

    /// Blocks that belong to nobody.
    pub fn free_blocks(&self) -> usize {
        self.free.len() + self.known.idle()
    }

    /// Those of them that keep their content for sequences that begin with it.
    pub fn cached_blocks(&self) -> usize {
        self.known.idle()
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
    pub fn pending_copies(&self) -> &[(u32, u32)] {
        &self.pending_copies
    }

    /// Forgets the pending copies, which have been run: their sources may be given to others again.
    pub fn finish_copies(&mut self) {
        while let Some((from, _)) = self.pending_copies.pop() {
            self.free_if_unused(from);
        }
    }

    fn allocate(&mut self) -> u32 {
        let block = self.free.pop().or_else(|| self.known.evict()).expect("enough blocks were counted");
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
        if self.references[block as usize] == 0 && !awaited && !self.known.park(block) {
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests;
