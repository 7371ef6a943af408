//! Blocks whose content is known, so that a sequence of the same tokens can take them over instead of computing them.

use std::collections::{BTreeMap, HashMap};

/// Names the content of a full block: a hash of its tokens, of all tokens before them, and of whatever else keys and values depend on.
/// Who gives the same name to different content gets wrong answers, so it is a cryptographic hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 32]);

/// What a block holds.
#[derive(Debug)]
struct Known {
    hash: BlockHash,
    /// Of the block before it, or of what is before the first.
    parent: BlockHash,
    tokens: Box<[u32]>,
    /// When the block was given back last.
    idle_since: u64,
}

/// Which blocks are known by which hash, and which of those belong to nobody: the longer so, the sooner they are given to others.
#[derive(Debug, Default)]
pub(super) struct KnownBlocks {
    known: HashMap<u32, Known>,
    blocks: HashMap<BlockHash, u32>,
    /// The blocks that come after one.
    next: HashMap<BlockHash, Vec<u32>>,
    /// Known blocks that belong to nobody, by when they were given back.
    idle: BTreeMap<u64, u32>,
    clock: u64,
}

impl KnownBlocks {
    /// Known blocks that belong to nobody.
    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    #[cfg(test)]
    pub(super) fn idle_blocks(&self) -> impl Iterator<Item = u32> {
        self.idle.values().copied()
    }

    pub(super) fn find(&self, hash: &BlockHash) -> Option<u32> {
        self.blocks.get(hash).copied()
    }

    /// The block after `parent` that begins with the most of these tokens, and with how many; `None` if none begins with any.
    pub(super) fn longest_beginning(&self, parent: &BlockHash, tokens: &[u32]) -> Option<(u32, usize)> {
        let alike = |&block: &u32| {
            let known = self.known.get(&block)?;
            let count = known.tokens.iter().zip(tokens).take_while(|(own, wanted)| own == wanted).count();
            Some((block, count)).filter(|_| count > 0)
        };
        self.next.get(parent)?.iter().filter_map(alike).max_by_key(|(_, count)| *count)
    }

    /// Whether a block has a name.
    pub(super) fn is_named(&self, block: u32) -> bool {
        self.known.contains_key(&block)
    }

    /// Names a block, unless it has a name or another one goes by it: of two blocks with the same content one is enough.
    pub(super) fn name(&mut self, block: u32, hash: BlockHash, parent: BlockHash, tokens: &[u32]) {
        if !self.is_named(block) && !self.blocks.contains_key(&hash) {
            self.known.insert(block, Known { hash, parent, tokens: tokens.into(), idle_since: 0 });
            self.blocks.insert(hash, block);
            self.next.entry(parent).or_default().push(block);
        }
    }

    /// The block's content is about to change.
    pub(super) fn forget(&mut self, block: u32) {
        let Some(Known { hash, parent, .. }) = self.known.remove(&block) else { return };
        self.blocks.remove(&hash);
        if let Some(siblings) = self.next.get_mut(&parent) {
            siblings.retain(|&sibling| sibling != block);
            if siblings.is_empty() {
                self.next.remove(&parent);
            }
        }
    }

    /// A block belongs to nobody any more. Tells whether it is kept because it is known.
    pub(super) fn park(&mut self, block: u32) -> bool {
        let Some(known) = self.known.get_mut(&block) else { return false };
        self.clock += 1;
        known.idle_since = self.clock;
        self.idle.insert(self.clock, block);
        true
    }

    /// A block that belonged to nobody has an owner again.
    pub(super) fn unpark(&mut self, block: u32) {
        if let Some(known) = self.known.get(&block) {
            self.idle.remove(&known.idle_since);
        }
    }

    /// Forgets the block that has belonged to nobody for the longest.
    pub(super) fn evict(&mut self) -> Option<u32> {
        let (_, block) = self.idle.pop_first()?;
        self.forget(block);
        Some(block)
    }

    /// Forgets all names, and gives the blocks that belonged to nobody.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = u32> {
        self.blocks.clear();
        self.next.clear();
        self.known.clear();
        std::mem::take(&mut self.idle).into_values()
    }
}
