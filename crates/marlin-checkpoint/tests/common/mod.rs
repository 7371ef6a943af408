//! Folders made by hand.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use marlin_checkpoint::{Checkpoint, Storage};
use safetensors::{Dtype, tensor::TensorView};

/// A tensor to put into a file.
pub(crate) type Raw<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

/// Writes a safetensors file with the reference implementation.
pub(crate) fn safetensors(path: &Path, tensors: &[Raw]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Writes a safetensors file with any header.
pub(crate) fn safetensors_by_hand(path: &Path, header: &str, data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length, header.as_bytes(), data].concat()).unwrap();
}

/// A folder with config.json and one weight file.
pub(crate) fn folder(config: &str, tensors: &[Raw]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config).unwrap();
    safetensors(&folder.path().join("model.safetensors"), tensors);
    folder
}

/// An error as the program shows it: the chain of messages.
pub(crate) fn message(error: impl Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Asserts that a message holds each of the words.
#[track_caller]
pub(crate) fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

/// A folder of `tests/goldens`.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// What the package that made a golden decodes it to in f32.
pub(crate) fn expected(golden: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(golden.join("expected.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    tensors.iter().map(|(name, view)| (name.to_owned(), floats(view.data()))).collect()
}

/// Opens a golden, all of whose tensors must be what the package decodes them to. (Zeros may have either sign.)
#[track_caller]
pub(crate) fn open_golden(name: &str) -> Checkpoint {
    open_golden_within(name, 0.0)
}

/// Opens a golden, all of whose values may differ by so much of themselves from what the package decodes.
#[track_caller]
pub(crate) fn open_golden_within(name: &str, bound: f32) -> Checkpoint {
    let (checkpoint, expected) = (Checkpoint::open(&golden(name)).unwrap(), expected(&golden(name)));
    let mut names: Vec<&str> = checkpoint.tensor_names().collect();
    names.sort_unstable();
    assert_eq!(names, expected.keys().map(String::as_str).collect::<Vec<_>>());
    for (name, wanted) in &expected {
        let found = match *checkpoint.shape(name).unwrap() {
            [len] => checkpoint.vector(name, len).unwrap(),
            _ => checkpoint.matrix_any(name).unwrap().decode(),
        };
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() * bound;
        assert_eq!(found.len(), wanted.len(), "{name}");
        for pair in found.iter().zip(wanted) {
            assert!(close(pair), "{name}: {pair:?}");
        }
    }
    checkpoint
}

/// Asserts how a matrix is packed.
#[track_caller]
pub(crate) fn assert_scheme(checkpoint: &Checkpoint, name: &str, scheme: &str) {
    let Storage::Packed(found) = checkpoint.info(name).unwrap().storage else { panic!("{name} is not packed") };
    assert_eq!(found.to_string(), scheme, "{name}");
}
