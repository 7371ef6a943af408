//! A tensor of a GGUF file as Hugging Face has it.

use std::borrow::Cow;

use marlin_format::{FormatError, PackedMatrix};
use safetensors::Dtype;

use super::{GgufTensor, GgufType};
use crate::layouts::{self, Entry};
use crate::shard::{Location, Shard};
use crate::{Storage, TensorInfo};

/// A tensor that is stored in blocks, or in another arrangement than that of Hugging Face.
pub(crate) struct GgufEntry {
    shape: Vec<usize>,
    stored_as: GgufType,
    /// Where its blocks lie.
    pub(crate) location: Location,
    arrangement: Arrangement,
}

/// What is done to what is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrangement {
    /// Nothing.
    Same,
    /// The rows of so many heads are put into the order of Hugging Face ([`in_halves`]).
    InHalves { heads: usize },
}

/// The entry of a tensor of this shape, whose bytes in the file are these. Plain floats that are stored as Hugging Face
/// has them are entries like others.
pub(super) fn entry(tensor: &GgufTensor, arrangement: Arrangement) -> Entry {
    let GgufTensor { shape, tensor_type: stored_as, range, .. } = tensor;
    let (dtype, plain) = match layouts::dense_dtype(&stored_as.scheme()) {
        Some(dtype) => (dtype, arrangement == Arrangement::Same),
        None => (Dtype::U8, false),
    };
    let location = Location { shard: 0, dtype, shape: shape.clone(), range: range.clone() };
    if plain {
        return Entry::Plain(location);
    }
    Entry::Gguf(GgufEntry { shape: shape.clone(), stored_as: *stored_as, location, arrangement })
}

impl GgufEntry {
    pub(crate) fn info(&self) -> TensorInfo {
        let scheme = self.stored_as.scheme();
        TensorInfo {
            shape: self.shape.clone(),
            storage: layouts::dense_dtype(&scheme).map_or(Storage::Packed(scheme), Storage::Plain),
            bytes: self.location.range.len() as u64,
        }
    }

    /// Whether it is a packed matrix.
    pub(crate) fn is_packed(&self) -> bool {
        !self.stored_as.scheme().is_dense()
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Blocks, or plain floats as [`GgufEntry::info`] tells.
    pub(crate) fn bytes<'s>(&self, shards: &'s [Shard]) -> Cow<'s, [u8]> {
        let stored = shards[self.location.shard].tensor(&self.location.range);
        match self.arrangement {
            Arrangement::Same => Cow::Borrowed(stored),
            Arrangement::InHalves { heads } => Cow::Owned(in_halves(stored, self.shape[0], heads)),
        }
    }

    /// The matrix, packed without loss; `None` if it is none.
    pub(crate) fn matrix<'s>(&self, shards: &'s [Shard]) -> Option<Result<PackedMatrix<'s>, FormatError>> {
        let &[rows, cols] = self.shape.as_slice() else { return None };
        Some(match self.bytes(shards) {
            Cow::Borrowed(bytes) => self.stored_as.pack(bytes, rows, cols),
            Cow::Owned(bytes) => self.stored_as.pack(&bytes, rows, cols).map(PackedMatrix::into_owned),
        })
    }
}

/// Rows of queries or keys in the order of Hugging Face.
///
/// Rotary embedding turns pairs of rows of a head. llama.cpp's kind for Llama has those of a pair side by side,
/// `transformers` has all first ones in the first half of the head and all second ones in the other (`permute` of
/// llama.cpp's converter, undone).
fn in_halves(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row_bytes, head_dim) = (bytes.len() / rows, rows / heads);
    let pairs = head_dim / 2;
    let mut ordered = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, within) = (row / head_dim, row % head_dim);
        let from = head * head_dim + within % pairs * 2 + within / pairs;
        ordered.extend_from_slice(&bytes[from * row_bytes..][..row_bytes]);
    }
    ordered
}
