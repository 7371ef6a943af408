//! The file of a block.
//!
//! ```text
//! magic     8 bytes
//! version   u32
//! tokens    u32, how many
//! payload   u64, bytes
//! name      32 bytes
//! parent    32 bytes, the name of the block before
//! token ids u32 each
//! payload
//! checksum  16 bytes, XXH3-128 of everything before
//! ```
//!
//! Numbers are little endian. The checksum tells what a disk or a power cut does to a file; who may write to the folder can write any block with
//! its checksum, whatever the hash.

use std::io::{self, Read, Write};

use marlin_model::BlockHash;
use xxhash_rust::xxh3::Xxh3;

const MAGIC: &[u8; 8] = b"MarlinKV";
/// Of this format; whatever else a payload depends on is in the names of blocks.
pub(super) const VERSION: u32 = 1;
const HASH_BYTES: usize = 32;
const CHECKSUM_BYTES: usize = 16;
/// What comes before the token ids.
const HEADER_BYTES: usize = MAGIC.len() + 4 + 4 + 8 + 2 * HASH_BYTES;

/// What a block must be to be the one that is meant.
#[derive(Debug, Clone)]
pub(crate) struct BlockKey {
    /// By which it is known: a hash of all that its content depends on.
    pub(crate) name: BlockHash,
    /// The name of the block before it.
    pub(crate) parent: BlockHash,
    /// Its own tokens.
    pub(crate) tokens: Box<[u32]>,
}

/// Why the bytes of a file are not the block that its name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Damage {
    /// They are no block of this version; whose they are is unknown.
    Foreign,
    /// They are a block that was cut, changed, or put under another's name.
    Broken,
}

impl BlockKey {
    /// Bytes of the file of a block with so many bytes of keys and values.
    pub(crate) fn file_bytes(tokens: usize, payload: usize) -> u64 {
        (Self::payload_start(tokens) + payload + CHECKSUM_BYTES) as u64
    }

    fn payload_start(tokens: usize) -> usize {
        HEADER_BYTES + size_of::<u32>() * tokens
    }

    /// What stands before the payload.
    fn header(&self, payload: usize) -> Vec<u8> {
        let mut header = Vec::with_capacity(Self::payload_start(self.tokens.len()));
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(self.tokens.len() as u32).to_le_bytes());
        header.extend_from_slice(&(payload as u64).to_le_bytes());
        header.extend_from_slice(&self.name.0);
        header.extend_from_slice(&self.parent.0);
        self.tokens.iter().for_each(|token| header.extend_from_slice(&token.to_le_bytes()));
        header
    }

    /// Writes the file of this block.
    pub(super) fn write(&self, payload: &[u8], file: &mut impl Write) -> io::Result<()> {
        let header = self.header(payload.len());
        let checksum = checksum(&[&header, payload]);
        file.write_all(&header)?;
        file.write_all(payload)?;
        file.write_all(&checksum)
    }

    /// Reads the `payload` bytes of keys and values of this block into `bytes`, and checks that every byte of the file is what it must be.
    ///
    /// # Errors
    /// The file cannot be read, or is not this block; what is in `bytes` is then of no use.
    pub(super) fn read(
        &self,
        file: &mut impl Read,
        payload: usize,
        bytes: &mut Vec<u8>,
    ) -> io::Result<Result<(), Damage>> {
        let known = MAGIC.len() + size_of_val(&VERSION);
        let ours = self.header(payload);
        let mut header = Vec::with_capacity(ours.len());
        file.by_ref().take(ours.len() as u64).read_to_end(&mut header)?;
        if header.get(..known) != Some(&ours[..known]) {
            return Ok(Err(Damage::Foreign));
        }
        // The header is that of the block that is meant, so no length in it is believed. A file that is larger is read no further than to see that.
        if header != ours {
            return Ok(Err(Damage::Broken));
        }
        let rest = payload + CHECKSUM_BYTES;
        bytes.clear();
        bytes.reserve(rest + 1);
        file.by_ref().take(rest as u64 + 1).read_to_end(bytes)?;
        if bytes.len() != rest || bytes[payload..] != checksum(&[&ours, &bytes[..payload]]) {
            return Ok(Err(Damage::Broken));
        }
        bytes.truncate(payload);
        Ok(Ok(()))
    }
}

/// The checksum of pieces that follow each other.
fn checksum(pieces: &[&[u8]]) -> [u8; CHECKSUM_BYTES] {
    let mut hash = Xxh3::new();
    pieces.iter().for_each(|piece| hash.update(piece));
    hash.digest128().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> BlockKey {
        BlockKey { name: BlockHash([7; 32]), parent: BlockHash([9; 32]), tokens: (0..32).collect() }
    }

    fn file(payload: &[u8]) -> Vec<u8> {
        let mut file = Vec::new();
        key().write(payload, &mut file).unwrap();
        file
    }

    /// Reads a block into memory that held another one.
    fn read(key: &BlockKey, file: &[u8], payload: usize) -> Result<Vec<u8>, Damage> {
        let mut bytes = vec![0xA5; 300];
        key.read(&mut &file[..], payload, &mut bytes).unwrap().map(|()| bytes)
    }

    #[test]
    fn what_was_written_is_read() {
        for payload in [&b""[..], &b"keys and values"[..]] {
            let file = file(payload);
            assert_eq!(file.len() as u64, BlockKey::file_bytes(32, payload.len()));
            assert_eq!(read(&key(), &file, payload.len()), Ok(payload.to_vec()));
        }
    }

    #[test]
    fn another_block_is_not_taken_for_this_one() {
        let payload = [3; 100];
        let others = [
            BlockKey { name: BlockHash([8; 32]), ..key() },
            BlockKey { parent: BlockHash([8; 32]), ..key() },
            BlockKey { tokens: (1..33).collect(), ..key() },
            BlockKey { tokens: (0..31).collect(), ..key() },
        ];
        for other in others {
            assert_eq!(read(&other, &file(&payload), payload.len()), Err(Damage::Broken), "{other:?}");
        }
        assert_eq!(read(&key(), &file(&payload), 99), Err(Damage::Broken), "other sizes of keys and values");
        assert_eq!(read(&key(), b"not ours", 100), Err(Damage::Foreign));
        let mut newer = file(&payload);
        newer[8] += 1;
        assert_eq!(read(&key(), &newer, 100), Err(Damage::Foreign), "another version");
    }

    #[test]
    fn every_bit_and_every_length_counts() {
        let payload: Vec<u8> = (0..200).map(|i| (i * 31) as u8).collect();
        let whole = file(&payload);
        for bit in 0..8 * whole.len() {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&key(), &flipped, payload.len()).is_err(), "bit {bit}");
        }
        for len in 0..whole.len() {
            assert!(read(&key(), &whole[..len], payload.len()).is_err(), "cut to {len}");
        }
        assert!(read(&key(), &[&whole[..], b"x"].concat(), payload.len()).is_err(), "a byte more");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(read(&key(), &bytes, 100).is_err());
        }
    }
}
