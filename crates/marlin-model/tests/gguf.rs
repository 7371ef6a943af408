//! GGUF files that llama.cpp's converter made of the tiny goldens give the logits of `transformers` as the goldens do.

mod common;

use std::path::{Path, PathBuf};

use common::{Device, Golden, assert_parity, golden, options};
use marlin_kernels::KvType;
use marlin_kernels::cpu::Arithmetic;

/// As for the goldens in safetensors.
const BOUND: f32 = 1e-5;

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gguf");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn logits_agree_with_transformers() {
    let files = files();
    for file in &files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let golden = Golden::read(&golden(name));
        for device in [Device::Reference, Device::cpu(Arithmetic::Exact, 1, None)] {
            let mut model = device.load(file, &options(KvType::F32)).unwrap();
            let logits = model.logits_of(&golden.input_ids, golden.input_ids.len());
            assert_parity(&format!("{name} on {device:?}"), &logits, &golden, BOUND);
        }
    }
    assert_eq!(files.len(), 10);
}
