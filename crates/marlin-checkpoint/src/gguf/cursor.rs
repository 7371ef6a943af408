//! Reading the bytes of a header one after the other. Nothing that they claim is believed.

use std::str;

use super::DAMAGED;
use super::value::{GgufArray, GgufValue, GgufValueType};

/// How deep arrays of arrays may be: enough for any real file, and too little for the stack to overflow.
const DEEPEST: usize = 4;

/// A place in the bytes of a file. Errors are sentences about the file.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    /// Bytes from the beginning of the file.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The next bytes.
    pub(super) fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8], String> {
        let left = &self.bytes[self.at..];
        match usize::try_from(count).ok().and_then(|count| left.get(..count)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(format!(
                "{what} at byte {} takes {count} bytes, but the file holds {} from there; {DAMAGED}",
                self.at,
                left.len()
            )),
        }
    }

    fn array<const BYTES: usize>(&mut self, what: &str) -> Result<[u8; BYTES], String> {
        let mut array = [0; BYTES];
        array.copy_from_slice(self.take(BYTES as u64, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// How many things follow, each of which takes at least so many bytes: no more than there is room for.
    pub(super) fn count(&mut self, what: &str, least_bytes: usize) -> Result<usize, String> {
        let at = self.at;
        let count = self.u64(what)?;
        let room = (self.bytes.len() - self.at) / least_bytes;
        match usize::try_from(count) {
            Ok(count) if count <= room => Ok(count),
            _ => Err(format!("{what} at byte {at} is {count}, but the file has room for {room} at most; {DAMAGED}")),
        }
    }

    /// A length and as many bytes of UTF-8.
    pub(super) fn string(&mut self, what: &str) -> Result<&'a str, String> {
        let length = self.u64(what)?;
        let at = self.at;
        str::from_utf8(self.take(length, what)?)
            .map_err(|e| format!("{what} at byte {at} is not UTF-8 from its byte {} on; {DAMAGED}", e.valid_up_to()))
    }

    pub(super) fn value_type(&mut self, what: &str) -> Result<GgufValueType, String> {
        let at = self.at;
        let id = self.u32(what)?;
        GgufValueType::from_id(id).ok_or_else(|| format!("{what} at byte {at} is {id}, wanted 0 to 12; {DAMAGED}"))
    }

    /// A value of metadata, with all that an array holds.
    pub(super) fn value(&mut self, value_type: GgufValueType) -> Result<GgufValue<'a>, String> {
        self.nested_value(value_type, 0)
    }

    fn nested_value(&mut self, value_type: GgufValueType, depth: usize) -> Result<GgufValue<'a>, String> {
        const WHAT: &str = "its value";
        Ok(match value_type {
            GgufValueType::U8 => GgufValue::U8(u8::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::I8 => GgufValue::I8(i8::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::U16 => GgufValue::U16(u16::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::I16 => GgufValue::I16(i16::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::U32 => GgufValue::U32(u32::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::I32 => GgufValue::I32(i32::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::U64 => GgufValue::U64(u64::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::I64 => GgufValue::I64(i64::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::F32 => GgufValue::F32(f32::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::F64 => GgufValue::F64(f64::from_le_bytes(self.array(WHAT)?)),
            GgufValueType::Bool => GgufValue::Bool(self.bool(WHAT)?),
            GgufValueType::String => GgufValue::String(self.string(WHAT)?),
            GgufValueType::Array => GgufValue::Array(self.values(depth)?),
        })
    }

    fn bool(&mut self, what: &str) -> Result<bool, String> {
        let at = self.at;
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(format!("{what} at byte {at} is {other}, wanted 0 or 1 for a bool; {DAMAGED}")),
        }
    }

    fn values(&mut self, depth: usize) -> Result<GgufArray<'a>, String> {
        if depth == DEEPEST {
            return Err(format!("at byte {} arrays are nested more than {DEEPEST} deep; {DAMAGED}", self.at));
        }
        let element = self.value_type("the type of its elements")?;
        let len = self.count("the number of its elements", element.least_bytes())?;
        let start = self.at;
        match element {
            GgufValueType::String | GgufValueType::Array | GgufValueType::Bool => {
                for _ in 0..len {
                    self.nested_value(element, depth + 1)?;
                }
            }
            // There is room for them, as was counted, and every bit pattern is a number.
            number => self.at += len * number.least_bytes(),
        }
        Ok(GgufArray::new(element, len, &self.bytes[start..self.at]))
    }
}
