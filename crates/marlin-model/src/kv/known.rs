//! Blocks whose content is known, so that a sequence of the same tokens can take them over instead of computing them.

use std::collections::{BTreeMap, HashMap};

/// Names the content of a full block: a hash of its tokens, of all tokens before them, and of whatever else keys and values depend on.
/// Who gives the same name to different content gets wrong answers, so it is a cryptographic hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 32]);

/// Which blocks are known by which hash, and which of those belong to nobody: the longer so, the sooner they are given to others.
#[derive(Debug)]
pub(super) struct KnownBlocks {
    /// Of each block.
    hashes: Vec<Option<BlockHash>>,
    blocks: HashMap<BlockHash, u32>,
    /// Known blocks that belong to nobody, by when they were given back.
    idle: BTreeMap<u64, u32>,
    /// When each block was given back last.
    idle_since: Vec<u64>,
    clock: u64,
}

impl KnownBlocks {
    pub(super) fn new(blocks: usize) -> Self {
        Self {
            hashes: vec![None; blocks],
            blocks: HashMap::new(),
            idle: BTreeMap::new(),
            idle_since: vec![0; blocks],
            clock: 0,
        }
    }

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

    /// Names a block, unless it has a name or another one goes by it: of two blocks with the same content one is enough.
    pub(super) fn name(&mut self, block: u32, hash: BlockHash) {
        let own = &mut self.hashes[block as usize];
        if own.is_none() && !self.blocks.contains_key(&hash) {
            *own = Some(hash);
            self.blocks.insert(hash, block);
        }
    }

    /// The block's content is about to change.
    pub(super) fn forget(&mut self, block: u32) {
        if let Some(hash) = self.hashes[block as usize].take() {
            self.blocks.remove(&hash);
        }
    }

    /// A block belongs to nobody any more. Tells whether it is kept because it is known.
    pub(super) fn park(&mut self, block: u32) -> bool {
        if self.hashes[block as usize].is_none() {
            return false;
        }
        self.clock += 1;
        self.idle_since[block as usize] = self.clock;
        self.idle.insert(self.clock, block);
        true
    }

    /// A block that belonged to nobody has an owner again.
    pub(super) fn unpark(&mut self, block: u32) {
        self.idle.remove(&self.idle_since[block as usize]);
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
        self.hashes.fill(None);
        std::mem::take(&mut self.idle).into_values()
    }
}
