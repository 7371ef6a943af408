//! Models that the packages of others quantised, against the weights that these packages decode them to.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Device, options};
use marlin_kernels::KvType;
use serde_json::Value;

/// Where `scripts/goldens` puts what packages quantised.
fn quantised(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-checkpoint/tests/goldens").join(name)
}

#[test]
fn logits_are_those_of_the_decoded_weights() {
    let input_ids: Vec<u32> = (0..12).map(|i| i * 29 % 64).collect();
    for name in
        ["gptq/v1", "gptq/v2", "awq/qwen3", "awq/qwen3moe", "fp8/tiles", "fp8/rows", "modelopt/nvfp4", "modelopt/fp8"]
    {
        let folder = quantised(name);
        let decoded = tempfile::tempdir().unwrap();
        fs::copy(folder.join("expected.safetensors"), decoded.path().join("model.safetensors")).unwrap();
        let mut config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        config.as_object_mut().unwrap().remove("quantization_config");
        fs::write(decoded.path().join("config.json"), config.to_string()).unwrap();

        let logits = |folder: &Path| {
            let mut model = Device::Reference.load(folder, &options(KvType::F32)).unwrap();
            model.logits_of(&input_ids, input_ids.len())
        };
        let (found, wanted) = (logits(&folder), logits(decoded.path()));
        assert!(wanted.iter().any(|logit| logit.abs() > 0.1), "{name}: these weights say nothing");
        assert_eq!(found, wanted, "{name}");
    }
}
