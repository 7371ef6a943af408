//! Models that the packages of others quantised, against the weights that these packages decode them to, and the logits that
//! `transformers` computes from those or from the folders themselves.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Device, Golden, assert_parity, options, same_bits};
use marlin_kernels::KvType;
use marlin_kernels::cpu::Arithmetic;
use serde_json::Value;

/// As for the goldens that are not quantised.
const BOUND: f32 = 1e-5;

/// The models that `scripts/goldens` had packages quantise.
fn quantised() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-checkpoint/tests/goldens");
    let mut folders = Vec::new();
    for layout in ["gptq", "awq", "fp8", "modelopt", "llmcompressor"] {
        let of_layout = fs::read_dir(root.join(layout)).unwrap().map(|entry| entry.unwrap().path());
        folders.extend(of_layout.filter(|folder| folder.join("golden.safetensors").exists()));
    }
    folders.sort();
    folders
}

#[test]
fn goldens_cover_all_shapes() {
    let folders = quantised();
    for layout in ["gptq", "awq", "fp8", "modelopt", "llmcompressor"] {
        for shape in ["llama", "qwen3", "qwen3moe", "glm4moelite"] {
            let is_of = |folder: &PathBuf| {
                let name = folder.file_name().unwrap().to_str().unwrap();
                folder.parent().unwrap().ends_with(layout) && name.rsplit('-').next() == Some(shape)
            };
            assert!(folders.iter().any(is_of), "{layout}, {shape}");
        }
    }
}

#[test]
fn logits_are_those_of_the_decoded_weights() {
    for folder in quantised() {
        let name = folder.display();
        let decoded = tempfile::tempdir().unwrap();
        fs::copy(folder.join("expected.safetensors"), decoded.path().join("model.safetensors")).unwrap();
        let mut config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        config.as_object_mut().unwrap().remove("quantization_config");
        fs::write(decoded.path().join("config.json"), config.to_string()).unwrap();

        let input_ids = Golden::read(&folder).input_ids;
        let [found, wanted] = [folder.as_path(), decoded.path()]
            .map(|folder| Device::Reference.load(folder, &options(KvType::F32)).unwrap().logits_of(&input_ids, 12));
        assert!(same_bits(&found, &wanted), "{name}");
    }
}

#[test]
fn logits_are_those_of_transformers() {
    for folder in quantised() {
        let golden = Golden::read(&folder);
        for device in [Device::Reference, Device::cpu(Arithmetic::Exact, 1, None)] {
            let mut model = device.load(&folder, &options(KvType::F32)).unwrap();
            let logits = model.logits_of(&golden.input_ids, golden.input_ids.len());
            assert_parity(&format!("{} on {device:?}", folder.display()), &logits, &golden, BOUND);
        }
    }
}
