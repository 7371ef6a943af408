//! GGUF files that llama.cpp's converter made of the tiny goldens give the logits of `transformers` as the goldens do; those that it
//! quantised, the logits of llama.cpp.

mod common;

use std::path::{Path, PathBuf};

use common::{Device, Golden, assert_parity, golden, l2_error, options};
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

/// llama.cpp rounds activations to 8 bits: 0.015 to 0.025 here, where weights are random.
const ROUNDED_BOUND: f64 = 0.04;

#[test]
fn logits_agree_with_llama_cpp() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/llama_cpp");
    for name in ["llama-q4_k_m", "qwen3-q4_0", "qwen3moe-q8_0", "glm4moelite-q8_0"] {
        let folder = root.join(name);
        let [decoded, rounded] =
            ["golden", "rounded"].map(|file| Golden::read_file(&folder.join(file).with_extension("safetensors")));
        for device in [Device::Reference, Device::cpu(Arithmetic::Exact, 1, None)] {
            let mut model = device.load(&folder, &options(KvType::F32)).unwrap();
            let logits = model.logits_of(&decoded.input_ids, decoded.input_ids.len());
            assert_parity(&format!("{name} on {device:?}"), &logits, &decoded, BOUND);
            let error = l2_error(&logits, &rounded.logits);
            assert!(error < ROUNDED_BOUND, "{name} on {device:?}: relative L2 error {error}");
        }
    }
}
