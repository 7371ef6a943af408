//! Malformed headers, and blocks of any bytes. Files of the package `gguf` are in tests/gguf.rs.

use super::cursor::Cursor;
use super::header::Header;
use super::{GgufType, GgufValueType};

const GOLDEN: &[u8] = include_bytes!("../../tests/goldens/gguf/types.gguf");

/// Reads all that an intact header describes.
fn read(header: &Header, bytes: &[u8]) {
    for (value_type, at) in header.metadata.values() {
        let value = Cursor::new(bytes, *at).value(*value_type).unwrap();
        if let Some(array) = value.as_array() {
            assert_eq!(array.iter().count(), array.len());
        }
    }
    for tensor in &header.tensors {
        let stored = &bytes[tensor.range.clone()];
        tensor.tensor_type.dequantize(stored, &mut vec![0.0; tensor.shape.iter().product()]);
        let cols = tensor.shape.last().copied().unwrap_or(1);
        let rows = tensor.shape.iter().rev().skip(1).product();
        // Scales of bytes that are no scales may be infinite.
        let _ = tensor.tensor_type.pack(stored, rows, cols);
    }
}

/// Whatever is changed, the header is refused with a sentence, or what it describes can be read.
fn parse_changed(bytes: &[u8], intact: &Header) {
    match Header::parse(bytes) {
        // What is the same has been read.
        Ok(header) if header.tensors == intact.tensors && header.metadata == intact.metadata => {}
        Ok(header) => read(&header, bytes),
        Err(problem) => assert!(problem.len() > 30, "{problem:?} says too little"),
    }
}

#[test]
fn a_file_that_ends_early_is_refused() {
    let intact = Header::parse(GOLDEN).unwrap();
    read(&intact, GOLDEN);
    let end = intact.tensors.iter().map(|tensor| tensor.range.end).max().unwrap();
    for length in 0..GOLDEN.len() {
        let result = Header::parse(&GOLDEN[..length]);
        assert_eq!(result.is_ok(), length >= end, "{length} of {} bytes", GOLDEN.len());
    }
}

#[test]
fn changed_bytes_are_refused_or_read() {
    let intact = Header::parse(GOLDEN).unwrap();
    let start = intact.tensors.iter().map(|tensor| tensor.range.start).min().unwrap();
    let mut bytes = GOLDEN.to_vec();
    for at in 0..start {
        for other in (0..8).step_by(2).map(|bit| GOLDEN[at] ^ 1 << bit).chain([0, 0xff]) {
            bytes[at] = other;
            parse_changed(&bytes, &intact);
        }
        bytes[at] = GOLDEN[at];
    }
    // Numbers of four and eight bytes that are large, or negative where they are taken as signed.
    let numbers = [0, 1 << 31, u64::from(u32::MAX), 1 << 63, u64::MAX - 7];
    for at in 0..start - 8 {
        for number in numbers {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            parse_changed(&bytes, &intact);
            bytes[at + 4..at + 8].copy_from_slice(&GOLDEN[at + 4..at + 8]);
            parse_changed(&bytes, &intact);
        }
        bytes[at..at + 8].copy_from_slice(&GOLDEN[at..at + 8]);
    }
}

/// A file made by hand: little-endian numbers and strings with their length.
#[derive(Clone, Default)]
struct Made(Vec<u8>);

impl Made {
    /// The beginning of a file of version 3.
    fn header(tensors: u64, entries: u64) -> Self {
        Self(b"GGUF\x03\0\0\0".to_vec()).u64(tensors).u64(entries)
    }

    fn u32(mut self, number: u32) -> Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    fn u64(mut self, number: u64) -> Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn tensor(self, name: &str, dimensions: &[u64], id: u32, offset: u64) -> Self {
        let made = self.string(name).u32(dimensions.len() as u32);
        dimensions.iter().fold(made, |made, size| made.u64(*size)).u32(id).u64(offset)
    }

    /// Fills up to the alignment and adds the bytes of tensors.
    fn data(mut self, length: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + length, 0);
        self
    }

    #[track_caller]
    fn says(&self, words: &[&str]) {
        let Err(problem) = Header::parse(&self.0) else { panic!("it is read, but should say {words:?}") };
        words.iter().for_each(|word| assert!(problem.contains(word), "{problem:?} does not say {word:?}"));
    }
}

/// A file with one entry of metadata, whose type and value are still to come.
fn entry() -> Made {
    Made::header(0, 1).string("k")
}

const STRING: u32 = 8;
const ARRAY: u32 = 9;

#[test]
fn the_beginning_of_a_file() {
    let text = |bytes: &[u8]| Made(bytes.to_vec());
    text(b"").says(&["the magic number", "takes 4 bytes", "holds 0"]);
    text(b"GGML\x03\0\0\0").says(&["\"GGML\"", "wanted \"GGUF\""]);
    text(b"GGUF\x03").says(&["the version at byte 4", "takes 4 bytes", "holds 1"]);
    text(b"GGUF\x01\0\0\0").says(&["version 1", "wanted 2 or 3"]);
    text(b"GGUF\x04\0\0\0").says(&["version 4", "wanted 2 or 3"]);
    text(b"GGUF\0\0\0\0").says(&["version 0"]);
    text(b"GGUF\0\0\0\x03").says(&["big endian"]);
    Made::header(0, 1 << 60).says(&["number of metadata entries at byte 16", "1152921504606846976", "room for 0"]);
    Made::header(u64::MAX, 0).says(&["number of tensors at byte 8", "18446744073709551615", "download"]);
    let empty = Header::parse(&Made::header(0, 0).0).unwrap();
    assert!(empty.tensors.is_empty() && empty.metadata.is_empty());
}

#[test]
fn malformed_metadata() {
    entry().u32(13).u64(0).says(&["metadata `k`", "the type of its value at byte 33 is 13", "wanted 0 to 12"]);
    entry().u32(7).bytes(&[2]).says(&["metadata `k`", "its value at byte 37 is 2", "0 or 1"]);
    entry().u32(STRING).u64(9).bytes(b"short").says(&["`k`", "takes 9 bytes", "holds 5"]);
    entry().u32(STRING).u64(u64::MAX).says(&["`k`", "takes 18446744073709551615 bytes"]);
    entry().u32(STRING).u64(2).bytes(b"a\xff").says(&["`k`", "not UTF-8 from its byte 1"]);
    entry().u32(ARRAY).u32(99).u64(0).says(&["`k`", "type of its elements", "99"]);
    entry().u32(ARRAY).u32(4).u64(2).u32(1).says(&["`k`", "number of its elements", "is 2", "room for 1"]);
    entry().u32(ARRAY).u32(STRING).u64(1).u64(7).says(&["`k`", "takes 7 bytes"]);
    entry().u32(ARRAY).u32(7).u64(2).bytes(&[1, 9]).says(&["`k`", "is 9", "0 or 1"]);
    let nested = |depth| (0..depth).fold(entry().u32(ARRAY), |made, _| made.u32(ARRAY).u64(1));
    nested(100_000).says(&["`k`", "nested more than 4 deep"]);
    assert!(Header::parse(&nested(3).u32(0).u64(1).bytes(&[5]).0).is_ok());
    Made::header(0, 2).string("k").u32(0).bytes(&[1]).string("k").u32(0).bytes(&[1]).says(&["`k`", "twice"]);

    let alignment = || Made::header(0, 1).string("general.alignment");
    alignment().u32(10).u64(32).says(&["general.alignment", "type U64", "wanted a U32"]);
    alignment().u32(4).u32(0).says(&["general.alignment", "is 0", "power of two"]);
    alignment().u32(4).u32(48).says(&["general.alignment", "is 48", "power of two"]);
}

#[test]
fn malformed_tensors() {
    let one = |dimensions: &[u64], id, offset| Made::header(1, 0).tensor("t", dimensions, id, offset).data(64);
    let q4_0 = 2;
    assert!(Header::parse(&one(&[32, 3], q4_0, 0).0).is_ok());
    assert!(Header::parse(&one(&[], 0, 32).0).is_ok());
    one(&[1; 5], 0, 0).says(&["tensor `t`", "number of its dimensions at byte 33 is 5", "4 at most"]);
    one(&[1, 1], 77, 0).says(&["tensor `t`", "type 77", "unknown", "Q4_K"]);
    one(&[256], 21, 0).says(&["tensor `t`", "IQ3_S (type 21)", "not read yet", "Q4_K"]);
    one(&[33, 2], q4_0, 0).says(&["tensor `t`", "rows of 33", "Q4_0, which have 32"]);
    one(&[], q4_0, 0).says(&["tensor `t`", "rows of 1"]);
    one(&[32, 4], q4_0, 0).says(&["tensor `t`", "0 to 72", "holds 64", "truncated"]);
    one(&[1], 0, 33).says(&["tensor `t`", "offset at byte", "is 33", "multiple of 32"]);
    one(&[1], 0, 64).says(&["tensor `t`", "64 to 68", "holds 64"]);
    one(&[1], 0, 1 << 62).says(&["tensor `t`", "4611686018427387904"]);
    one(&[4], 0, u64::MAX - 31).says(&["tensor `t`", "18446744073709551584"]);
    for shape in [&[1 << 63, 2][..], &[1 << 32, 1 << 32], &[u64::MAX - 31], &[1 << 62]] {
        one(shape, 0, 0).says(&["tensor `t`", "download"]);
    }
    let two = |other, offset| Made::header(2, 0).tensor("t", &[9], 0, 0).tensor(other, &[1], 0, offset).data(96);
    assert!(Header::parse(&two("u", 64).0).is_ok());
    two("t", 64).says(&["tensor `t`", "twice"]);
    two("u", 32).says(&["`t` and `u`", "share bytes"]);
}

#[test]
fn numbers_of_the_files() {
    for (id, wanted) in [(0, Some(GgufValueType::U8)), (9, Some(GgufValueType::Array)), (12, Some(GgufValueType::F64))]
    {
        assert_eq!(GgufValueType::from_id(id), wanted);
    }
    for known in GgufType::ALL {
        assert_eq!(known.block_weights() % known.scheme().group_cols(1), 0, "{known}");
        known.scheme().validate().unwrap();
    }
}

/// Bytes without end that look random.
fn noise() -> impl Iterator<Item = u8> {
    let mut state = 1u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

/// Any bytes are blocks. What is packed decodes to the values of ggml but for signs of zeros; what is not has a scale
/// that is not finite.
#[test]
fn blocks_of_any_bytes() {
    let mut noise = noise();
    for stored_as in GgufType::ALL {
        let mut packed = 0;
        for _ in 0..200 {
            let bytes: Vec<u8> = noise.by_ref().take(stored_as.block_bytes()).collect();
            let mut values = vec![0.0; stored_as.block_weights()];
            stored_as.dequantize(&bytes, &mut values);
            match stored_as.pack(&bytes, 1, values.len()) {
                Ok(matrix) => {
                    packed += 1;
                    let decoded = matrix.decode();
                    let same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
                    assert!(decoded.iter().zip(&values).all(same), "{stored_as}: {bytes:?}");
                }
                Err(error) => assert!(error.to_string().contains("not a finite number"), "{stored_as}: {error}"),
            }
        }
        assert!(packed > 150, "{stored_as}: {packed} of 200 blocks were packed");
    }
}
