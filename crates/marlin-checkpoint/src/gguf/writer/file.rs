//! The header of a file.

use super::GgufType;

/// Tensors begin at multiples of it.
const ALIGNMENT: u64 = 32;
const VERSION: u32 = 3;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    I32s(Vec<i32>),
}

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) name: String,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
    pub(super) tensor_type: GgufType,
    pub(super) bytes: u64,
}

/// A header, and where tensors begin.
pub(super) struct Header {
    pub(super) bytes: Vec<u8>,
    /// From the start of the file.
    pub(super) offsets: Vec<u64>,
    /// Of the whole file.
    pub(super) file_bytes: u64,
}

/// Lays a file out.
pub(super) fn header(metadata: &[(String, Value)], tensors: &[Stored]) -> Result<Header, String> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        string(&mut bytes, key);
        value.write(&mut bytes);
    }
    let mut relative = Vec::with_capacity(tensors.len());
    let mut end = 0u64;
    for tensor in tensors {
        string(&mut bytes, &tensor.name);
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|size| bytes.extend((*size as u64).to_le_bytes()));
        bytes.extend(tensor.tensor_type.id().to_le_bytes());
        bytes.extend(end.to_le_bytes());
        relative.push(end);
        let next = end.checked_add(tensor.bytes).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
        end = next.ok_or("the model is too large")?;
    }
    let start = (bytes.len() as u64).next_multiple_of(ALIGNMENT);
    bytes.resize(start as usize, 0);
    let file_bytes = start.checked_add(end).ok_or("the model is too large")?;
    Ok(Header { bytes, offsets: relative.into_iter().map(|offset| start + offset).collect(), file_bytes })
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

impl Value {
    /// Its type, and what follows; numbers of types are those of ggml.
    fn write(&self, bytes: &mut Vec<u8>) {
        const I32: u32 = 5;
        const STRING: u32 = 8;
        const ARRAY: u32 = 9;
        let mut kind = |kind: u32| bytes.extend(kind.to_le_bytes());
        match self {
            Self::U32(_) => kind(4),
            Self::F32(_) => kind(6),
            Self::Bool(_) => kind(7),
            Self::String(_) => kind(STRING),
            Self::Strings(_) => [ARRAY, STRING].into_iter().for_each(kind),
            Self::I32s(_) => [ARRAY, I32].into_iter().for_each(kind),
        }
        match self {
            Self::U32(value) => bytes.extend(value.to_le_bytes()),
            Self::F32(value) => bytes.extend(value.to_le_bytes()),
            Self::Bool(value) => bytes.push(u8::from(*value)),
            Self::String(text) => string(bytes, text),
            Self::Strings(texts) => {
                bytes.extend((texts.len() as u64).to_le_bytes());
                texts.iter().for_each(|text| string(bytes, text));
            }
            Self::I32s(values) => {
                bytes.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
            }
        }
    }
}
