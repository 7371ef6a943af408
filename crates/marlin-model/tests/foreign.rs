//! Models that the packages of others quantised, against the weights that these packages decode them to, and the logits that
//! `transformers` computes from those or from the folders themselves.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Device, Golden, assert_parity, options};
use marlin_kernels::KvType;
use marlin_kernels::cpu::Arithmetic;
use serde_json::Value;

const LAYOUTS: [&str; 5] = ["gptq", "awq", "fp8", "modelopt", "llmcompressor"];
const SHAPES: [&str; 4] = ["llama", "qwen3", "qwen3moe", "glm4moelite"];

/// As for the goldens that are not quantised.
const BOUND: f32 = 1e-5;
/// Key rows of a packed `kv_b_proj` are rounded to half precision when a model is loaded.
const LATENT_BOUND: f32 = 2e-3;
/// In NVFP4, where the inverse of an f32 is rounded.
const INEXACT: &str = "llmcompressor/qwen3moe";

/// Where `scripts/goldens` puts what packages quantised.
fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-checkpoint/tests/goldens")
}

/// The models there, as `layout/shape` or `layout/format-shape`.
fn quantised() -> Vec<String> {
    let mut names = Vec::new();
    for layout in LAYOUTS {
        for entry in fs::read_dir(goldens().join(layout)).unwrap() {
            let name = format!("{layout}/{}", entry.unwrap().file_name().to_str().unwrap());
            if goldens().join(&name).join("golden.safetensors").exists() {
                names.push(name);
            }
        }
    }
    names
}

#[test]
fn goldens_cover_all_shapes() {
    let names = quantised();
    for layout in LAYOUTS {
        for shape in SHAPES {
            let is_of = |name: &String| name.starts_with(layout) && name.rsplit(['/', '-']).next() == Some(shape);
            assert!(names.iter().any(is_of), "{layout}, {shape}");
        }
    }
}

#[test]
fn logits_are_those_of_the_decoded_weights_and_of_transformers() {
    for name in quantised() {
        let folder = goldens().join(&name);
        let golden = Golden::read(&folder);
        let mut config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        config.as_object_mut().unwrap().remove("quantization_config");
        let decoded = tempfile::tempdir().unwrap();
        fs::copy(folder.join("expected.safetensors"), decoded.path().join("model.safetensors")).unwrap();
        fs::write(decoded.path().join("config.json"), config.to_string()).unwrap();

        let logits = |device: Device, folder: &Path| {
            let mut model = device.load(folder, &options(KvType::F32)).unwrap();
            model.logits_of(&golden.input_ids, golden.input_ids.len())
        };
        let wanted = logits(Device::Reference, decoded.path());
        assert_parity(&format!("{name}, decoded"), &wanted, &golden, BOUND);

        let is_latent = name.ends_with("glm4moelite");
        let bound = if is_latent { LATENT_BOUND } else { BOUND };
        let found = logits(Device::Reference, &folder);
        assert_parity(&name, &found, &golden, bound);
        if !is_latent && name != INEXACT {
            assert_eq!(found, wanted, "{name}");
        }
        let found = logits(Device::cpu(Arithmetic::Exact, 1, None), &folder);
        assert_parity(&format!("{name} on a CPU"), &found, &golden, bound);
    }
}
