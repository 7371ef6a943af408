//! One weight file: safetensors, unless another reader has made it.

use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::CheckpointError;
use crate::source::Bytes;

/// The limit the `safetensors` crate sets as well.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A weight file: a header, and the bytes of tensors.
#[derive(Clone)]
pub(crate) struct Shard {
    /// The file, in messages.
    pub(crate) label: String,
    pub(crate) bytes: Bytes,
    /// Bytes before those of the tensors.
    header_bytes: usize,
}

/// Where a tensor's bytes lie.
#[derive(Debug, Clone)]
pub(crate) struct Location {
    /// Index of the shard.
    pub(crate) shard: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// In the file.
    pub(crate) range: Range<usize>,
}

impl Shard {
    /// A file of another kind, whose header has been read.
    pub(crate) fn of_header(label: String, bytes: Bytes, header_bytes: usize) -> Self {
        Self { label, bytes, header_bytes }
    }

    /// Parses a safetensors file: an eight-byte length, a JSON header of that length, and the bytes of all tensors
    /// without holes. Returns the tensors in the order of their bytes, located in shard number `index`.
    ///
    /// `Metadata` checks that offsets follow each other without gap or overlap and agree with type and shape; that the
    /// file is exactly as long as they say is checked here.
    pub(crate) fn parse(
        label: String,
        bytes: Bytes,
        index: usize,
    ) -> Result<(Self, Vec<(String, Location)>), CheckpointError> {
        bytes.refuse_lfs_pointer(&label)?;
        let malformed = |problem: String| CheckpointError::malformed(&label, problem);
        let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(malformed(format!("{} bytes are too few for a safetensors file", bytes.len())));
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER_BYTES || length > rest.len() as u64 {
            return Err(malformed(format!(
                "its header claims {length} bytes, the file holds {} more; it is truncated or not a safetensors file",
                rest.len()
            )));
        }
        let (header, data) = rest.split_at(length as usize);
        let metadata: Metadata = serde_json::from_slice(header)
            .map_err(|e| malformed(format!("its safetensors header is invalid: {e}; download or copy it again")))?;
        let described = metadata.data_len();
        if described > data.len() {
            return Err(CheckpointError::Truncated { file: label, found: data.len(), wanted: described });
        }
        if described < data.len() {
            let extra = data.len() - described;
            return Err(malformed(format!(
                "{extra} bytes follow the last tensor that its header describes; download or copy it again"
            )));
        }

        let start = bytes.len() - data.len();
        let mut tensors: Vec<(String, Location)> = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let (from, to) = info.data_offsets;
                let range = start + from..start + to;
                (name, Location { shard: index, dtype: info.dtype, shape: info.shape.clone(), range })
            })
            .collect();
        tensors.sort_by(|(a_name, a), (b_name, b)| (a.range.start, a_name).cmp(&(b.range.start, b_name)));
        Ok((Self { label, bytes, header_bytes: start }, tensors))
    }

    pub(crate) fn tensor(&self, range: &Range<usize>) -> &[u8] {
        &self.bytes[range.clone()]
    }

    /// What stands before the bytes of the tensors.
    pub(crate) fn header(&self) -> &[u8] {
        &self.bytes[..self.header_bytes]
    }
}
