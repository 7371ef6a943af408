//! Names of KV blocks by what they hold.

use marlin_model::BlockHash;
use sha2::{Digest, Sha256};

use crate::store::BlockKey;

/// Names the blocks of one sequence, one after the other: the hash of a block is that of its tokens and of the hash before it, the first of
/// which tells the model and what else keys and values depend on.
#[derive(Debug, Clone)]
pub(crate) struct BlockNames {
    /// What stands before the first block.
    root: BlockHash,
    /// The names so far.
    names: Vec<BlockHash>,
    block_tokens: usize,
}

impl BlockNames {
    /// For sequences of the model `fingerprint` that may share blocks with others of the same salt.
    pub(crate) fn new(fingerprint: &str, salt: &str, block_tokens: usize) -> Self {
        let mut hash = Sha256::new();
        for part in [fingerprint, salt] {
            // With its length before it, no part can pass for the end of another.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self { root: BlockHash(hash.finalize().into()), names: Vec::new(), block_tokens }
    }

    /// The names of the full blocks of `tokens`, of which those named before must be the beginning.
    pub(crate) fn of(&mut self, tokens: &[u32]) -> &[BlockHash] {
        let full = tokens.len() / self.block_tokens;
        for block in tokens.chunks_exact(self.block_tokens).take(full).skip(self.names.len()) {
            let mut hash = Sha256::new();
            hash.update(self.before(self.names.len()).0);
            block.iter().for_each(|token| hash.update(token.to_le_bytes()));
            self.names.push(BlockHash(hash.finalize().into()));
        }
        &self.names[..full]
    }

    /// What block `index` of `tokens`, which is named, must be.
    pub(crate) fn key(&self, index: usize, tokens: &[u32]) -> BlockKey {
        let tokens = tokens[index * self.block_tokens..(index + 1) * self.block_tokens].into();
        BlockKey { name: self.names[index], parent: self.before(index), tokens }
    }

    /// The name of what stands before a block whose predecessors are named.
    pub(crate) fn before(&self, index: usize) -> BlockHash {
        index.checked_sub(1).map_or(self.root, |before| self.names[before])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_everything_before_it() {
        let names = |model: &str, salt: &str, tokens: &[u32]| BlockNames::new(model, salt, 2).of(tokens).to_vec();
        let base = names("model", "", &[1, 2, 3, 4, 5]);
        assert_eq!(base.len(), 2);
        assert_eq!(names("model", "", &[1, 2, 3, 4]), base);
        let others = [
            names("other", "", &[1, 2, 3, 4]),
            names("model", "salt", &[1, 2, 3, 4]),
            names("mode", "l", &[1, 2, 3, 4]),
            names("model", "", &[1, 7, 3, 4]),
        ];
        for other in others {
            assert!(other.iter().all(|name| !base.contains(name)));
        }
        assert_eq!(names("model", "", &[1, 2, 4, 3])[0], base[0]);
        assert_ne!(names("model", "", &[1, 2, 4, 3])[1], base[1]);
    }

    #[test]
    fn names_grow_with_the_sequence() {
        let mut growing = BlockNames::new("model", "", 2);
        let tokens = [9, 8, 7, 6, 5, 4];
        for len in 0..=tokens.len() {
            let whole = BlockNames::new("model", "", 2).of(&tokens[..len]).to_vec();
            assert_eq!(growing.of(&tokens[..len]), whole);
        }
        // Asked again for fewer, it has not forgotten the others.
        assert_eq!(growing.of(&tokens[..3]).len(), 1);
        assert_eq!(growing.of(&tokens), BlockNames::new("model", "", 2).of(&tokens));
    }
}
