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
    location: Location,
    /// Another stored tensor that is part of it, and how that is stored.
    other: Option<(GgufType, Location)>,
    arrangement: Arrangement,
}

/// What is done to what is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrangement {
    /// Nothing.
    Same,
    /// The rows of so many heads are put into the order of Hugging Face ([`in_halves`]).
    InHalves { heads: usize },
    /// One is subtracted.
    LessOne,
    /// Values take turns with those of the other tensor.
    InTurn,
    /// Of each head the rows, transposed, and then the rows of the other tensor, all of them `rank` wide.
    KeysAndValues { heads: usize, rank: usize },
}

/// The entry of a tensor of this shape, whose bytes in the file are these. Plain floats that are stored as Hugging Face
/// has them are entries like others.
pub(super) fn entry(tensor: &GgufTensor, arrangement: Arrangement) -> Entry {
    let GgufTensor { shape, tensor_type: stored_as, file, range, .. } = tensor;
    let (dtype, plain) = match layouts::dense_dtype(&stored_as.scheme()) {
        Some(dtype) => (dtype, arrangement == Arrangement::Same),
        None => (Dtype::U8, false),
    };
    let location = Location { shard: *file, dtype, shape: shape.clone(), range: range.clone() };
    if plain {
        return Entry::Plain(location);
    }
    Entry::Gguf(GgufEntry { shape: shape.clone(), stored_as: *stored_as, location, other: None, arrangement })
}

/// The entry of a tensor of this shape that two stored ones make.
pub(super) fn joined(shape: Vec<usize>, first: &GgufTensor, second: &GgufTensor, arrangement: Arrangement) -> Entry {
    let location = |tensor: &GgufTensor| Location {
        shard: tensor.file,
        dtype: Dtype::U8,
        shape: tensor.shape.clone(),
        range: tensor.range.clone(),
    };
    let other = Some((second.tensor_type, location(second)));
    Entry::Gguf(GgufEntry { shape, stored_as: first.tensor_type, location: location(first), other, arrangement })
}

impl GgufEntry {
    pub(crate) fn info(&self) -> TensorInfo {
        let scheme = self.made_as().scheme();
        let parts = self.locations().map(|location| location.range.len() as u64);
        TensorInfo {
            shape: self.shape.clone(),
            storage: layouts::dense_dtype(&scheme).map_or(Storage::Packed(scheme), Storage::Plain),
            bytes: parts.sum(),
        }
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Where its parts lie.
    pub(crate) fn locations(&self) -> impl Iterator<Item = &Location> {
        [&self.location].into_iter().chain(self.other.iter().map(|(_, location)| location))
    }

    /// As what it is handed out: as it is stored, unless parts are stored in unlike ways or its values are not those
    /// that are stored.
    fn made_as(&self) -> GgufType {
        match (self.arrangement, &self.other) {
            (Arrangement::LessOne, _) => GgufType::F32,
            (_, Some((other, _))) if *other != self.stored_as || self.stored_as.block_weights() != 1 => GgufType::F32,
            _ => self.stored_as,
        }
    }

    /// Blocks, or plain floats as [`GgufEntry::info`] tells.
    pub(crate) fn bytes<'s>(&self, shards: &'s [Shard]) -> Cow<'s, [u8]> {
        let made_as = self.made_as();
        let stored = |stored_as: GgufType, location: &Location| {
            let bytes = shards[location.shard].tensor(&location.range);
            if stored_as == made_as { Cow::Borrowed(bytes) } else { floats(stored_as.values(bytes)) }
        };
        let first = stored(self.stored_as, &self.location);
        let second = self.other.as_ref().map(|(stored_as, location)| stored(*stored_as, location)).unwrap_or_default();
        match self.arrangement {
            Arrangement::Same => first,
            Arrangement::InHalves { heads } => Cow::Owned(in_halves(&first, self.shape[0], heads)),
            Arrangement::LessOne => floats(made_as.values(&first).into_iter().map(|value| value - 1.0)),
            Arrangement::InTurn => {
                let size = made_as.block_bytes();
                let pairs = first.chunks_exact(size).zip(second.chunks_exact(size));
                Cow::Owned(pairs.flat_map(|(first, second)| [first, second].concat()).collect())
            }
            Arrangement::KeysAndValues { heads, rank } => {
                Cow::Owned(keys_and_values(&first, &second, heads, rank, made_as.block_bytes()))
            }
        }
    }

    /// The matrix, packed without loss; `None` if it is none.
    pub(crate) fn matrix<'s>(&self, shards: &'s [Shard]) -> Option<Result<PackedMatrix<'s>, FormatError>> {
        let &[rows, cols] = self.shape.as_slice() else { return None };
        Some(match self.bytes(shards) {
            Cow::Borrowed(bytes) => self.made_as().pack(bytes, rows, cols),
            Cow::Owned(bytes) => self.made_as().pack(&bytes, rows, cols).map(PackedMatrix::into_owned),
        })
    }
}

/// Little-endian f32.
fn floats(values: impl IntoIterator<Item = f32>) -> Cow<'static, [u8]> {
    Cow::Owned(values.into_iter().flat_map(f32::to_le_bytes).collect())
}

/// Of each head the key rows, which are stored as `[rank, width]`, and then the value rows, which are stored as
/// `[width, rank]`. Elements have `size` bytes.
fn keys_and_values(keys: &[u8], values: &[u8], heads: usize, rank: usize, size: usize) -> Vec<u8> {
    let mut joined = Vec::with_capacity(keys.len() + values.len());
    for (keys, values) in keys.chunks_exact(keys.len() / heads).zip(values.chunks_exact(values.len() / heads)) {
        let width = keys.len() / rank;
        for at in (0..width).step_by(size) {
            keys.chunks_exact(width).for_each(|row| joined.extend_from_slice(&row[at..at + size]));
        }
        joined.extend_from_slice(values);
    }
    joined
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
