//! Folders made by hand.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::error::Error;
use std::fs;
use std::path::Path;

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
