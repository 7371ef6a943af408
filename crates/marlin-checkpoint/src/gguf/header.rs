//! What stands before the bytes of the tensors of a GGUF file.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::cursor::Cursor;
use super::value::GgufValueType;
use super::{DAMAGED, GgufTensor, GgufType};

const MAGIC: &[u8] = b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;

/// As many dimensions as tensors of ggml have.
const MOST_DIMENSIONS: u32 = 4;

/// An empty key, the type of a value, a byte.
const LEAST_BYTES_OF_ENTRY: usize = 8 + 4 + 1;
/// An empty name, a number of dimensions, a type, an offset.
const LEAST_BYTES_OF_TENSOR: usize = 8 + 4 + 4 + 8;

/// The header: metadata and the tensors, all of whose bytes are in the file.
pub(super) struct Header {
    pub(super) version: u32,
    /// Bytes before those of the tensors.
    pub(super) bytes: usize,
    /// Where the value of each key begins.
    pub(super) metadata: BTreeMap<String, (GgufValueType, usize)>,
    /// In the order of the header.
    pub(super) tensors: Vec<GgufTensor>,
    pub(super) index: HashMap<String, usize>,
}

impl Header {
    /// Reads and checks the header of a file. Errors are sentences about the file.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut cursor = Cursor::new(bytes, 0);
        let version = version(&mut cursor)?;
        let tensor_count = cursor.count("the number of tensors", LEAST_BYTES_OF_TENSOR)?;
        let entry_count = cursor.count("the number of metadata entries", LEAST_BYTES_OF_ENTRY)?;
        let metadata = metadata(&mut cursor, entry_count)?;
        let alignment = alignment(bytes, &metadata)?;

        let mut tensors: Vec<GgufTensor> = Vec::new();
        let mut index = HashMap::new();
        for number in 0..tensor_count {
            let name = cursor.string(&format!("the name of tensor {number}"))?.to_owned();
            let tensor =
                tensor(&mut cursor, &name, alignment).map_err(|problem| format!("tensor `{name}`: {problem}"))?;
            if index.insert(name, number).is_some() {
                return Err(format!("tensor `{}` is there twice; {DAMAGED}", tensor.name));
            }
            tensors.push(tensor);
        }
        let start = cursor.at().checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
        locate(&mut tensors, start, bytes.len())?;
        Ok(Self { version, bytes: start.min(bytes.len()), metadata, tensors, index })
    }
}

fn version(cursor: &mut Cursor<'_>) -> Result<u32, String> {
    let magic = cursor.take(MAGIC.len() as u64, "the magic number")?;
    if magic != MAGIC {
        return Err(format!("it begins with \"{}\", wanted \"GGUF\"; this is no GGUF file", magic.escape_ascii()));
    }
    match cursor.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        swapped if swapped.swap_bytes() <= 3 && swapped != 0 => {
            Err("it is big endian, wanted little endian; take the file that was made for little-endian machines".into())
        }
        version => {
            Err(format!("it has version {version} of GGUF, wanted 2 or 3; take a file made by a current llama.cpp"))
        }
    }
}

fn metadata(cursor: &mut Cursor<'_>, count: usize) -> Result<BTreeMap<String, (GgufValueType, usize)>, String> {
    let mut metadata = BTreeMap::new();
    for number in 0..count {
        let key = cursor.string(&format!("the key of metadata entry {number}"))?;
        let in_entry = |problem: String| format!("metadata `{key}`: {problem}");
        let value_type = cursor.value_type("the type of its value").map_err(in_entry)?;
        let at = cursor.at();
        cursor.value(value_type).map_err(in_entry)?;
        if metadata.insert(key.to_owned(), (value_type, at)).is_some() {
            return Err(in_entry(format!("the key is there twice; {DAMAGED}")));
        }
    }
    Ok(metadata)
}

/// Of what the offsets of tensors are multiples.
fn alignment(bytes: &[u8], metadata: &BTreeMap<String, (GgufValueType, usize)>) -> Result<usize, String> {
    let Some(&(value_type, at)) = metadata.get(ALIGNMENT_KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    let wanted = format!("wanted a U32 that is a power of two; {DAMAGED}");
    if value_type != GgufValueType::U32 {
        return Err(format!("metadata `{ALIGNMENT_KEY}` at byte {at} is of type {value_type:?}, {wanted}"));
    }
    let alignment = Cursor::new(bytes, at).u32("its value")?;
    if !alignment.is_power_of_two() {
        return Err(format!("metadata `{ALIGNMENT_KEY}` at byte {at} is {alignment}, {wanted}"));
    }
    Ok(alignment as usize)
}

/// The description of a tensor but for its name. Its range is still relative to the bytes of the first one.
fn tensor(cursor: &mut Cursor<'_>, name: &str, alignment: usize) -> Result<GgufTensor, String> {
    let at = cursor.at();
    let dimensions = cursor.u32("the number of its dimensions")?;
    if dimensions > MOST_DIMENSIONS {
        return Err(format!(
            "the number of its dimensions at byte {at} is {dimensions}, wanted {MOST_DIMENSIONS} at most; {DAMAGED}"
        ));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        let size = cursor.u64("a dimension")?;
        let size = usize::try_from(size).map_err(|_| format!("a dimension of {size} is too large; {DAMAGED}"))?;
        // Files give the innermost one first.
        shape.insert(0, size);
    }
    let tensor_type = GgufType::from_id(cursor.u32("its type")?)?;
    let length = tensor_type.bytes(&shape)?;
    let at = cursor.at();
    let offset = cursor.u64("its offset")?;
    if !offset.is_multiple_of(alignment as u64) {
        return Err(format!("its offset at byte {at} is {offset}, wanted a multiple of {alignment}; {DAMAGED}"));
    }
    let range = usize::try_from(offset).ok().and_then(|from| Some(from..from.checked_add(length)?));
    let range = range.ok_or_else(|| format!("its offset at byte {at} is {offset}, beyond any file; {DAMAGED}"))?;
    Ok(GgufTensor { name: name.to_owned(), shape, tensor_type, file: 0, range })
}

/// Moves ranges to where the bytes of tensors begin, and checks that they are in the file and do not overlap.
fn locate(tensors: &mut [GgufTensor], start: usize, file: usize) -> Result<(), String> {
    for GgufTensor { name, range, .. } in tensors.iter_mut() {
        let moved = range.start.checked_add(start).zip(range.end.checked_add(start));
        match moved {
            Some((from, to)) if to <= file => *range = from..to,
            _ => {
                let Range { start: offset, end } = *range;
                return Err(format!(
                    "tensor `{name}` has bytes {offset} to {end} behind the header of {start} bytes, but the file holds \
                     {}; it is truncated: download or copy it again",
                    file.saturating_sub(start)
                ));
            }
        }
    }
    let mut ordered: Vec<&GgufTensor> = tensors.iter().filter(|tensor| !tensor.range.is_empty()).collect();
    ordered.sort_by_key(|tensor| tensor.range.start);
    match ordered.windows(2).find(|pair| pair[1].range.start < pair[0].range.end) {
        Some(pair) => {
            Err(format!("tensors `{}` and `{}` share bytes of the file; {DAMAGED}", pair[0].name, pair[1].name))
        }
        None => Ok(()),
    }
}
