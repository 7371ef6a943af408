//! tiny-qwen3, a model with trained weights, against `transformers`.
//!
//! The environment variable `METAL_MARLIN_MODELS` names the folder that holds `tiny-qwen3`; without it these tests are
//! reported as ignored.

mod common;

use std::path::{Path, PathBuf};

use common::{Device, Golden, argmax, assert_parity, top_two};
use libtest_mimic::{Arguments, Failed, Trial};
use marlin_kernels::KvType;
use marlin_kernels::cpu::Arithmetic;
use marlin_model::LoadOptions;
use serde_json::Value;

const OPTIONS: LoadOptions =
    LoadOptions { context: Some(128), step_tokens: 32, logit_rows: 32, kv_blocks: None, kv_type: KvType::F32 };

/// Name, what to run, on which device.
type Test = (&'static str, fn(&Path, Device), Device);

fn main() {
    let cpu = Device::cpu(Arithmetic::Exact, 2, None);
    // The reference is too slow to generate.
    let tests: [Test; 3] = [
        ("logits_on_the_reference", logits, Device::Reference),
        ("logits_on_the_cpu", logits, cpu),
        ("greedy_continuations_on_the_cpu", greedy, cpu),
    ];
    let folder = std::env::var_os("METAL_MARLIN_MODELS").map(|models| PathBuf::from(models).join("tiny-qwen3"));
    let trial = |(name, test, device): Test| {
        let folder = folder.clone();
        let is_ignored = folder.is_none();
        let run = move || {
            let folder = folder.ok_or("METAL_MARLIN_MODELS is not set: it names the folder that holds tiny-qwen3")?;
            test(&folder, device);
            Ok::<(), Failed>(())
        };
        Trial::test(format!("tiny_qwen3::{name}"), run).with_ignored_flag(is_ignored)
    };
    let trials = tests.into_iter().map(trial).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// The golden logits; the errors seen are near 1e-6.
fn logits(folder: &Path, device: Device) {
    let golden = Golden::read(folder);
    let logits = device.load(folder, &OPTIONS).unwrap().logits_of(&golden.input_ids, 32);
    assert_parity("tiny-qwen3", &logits, &golden, 1e-4);
}

/// The greedy continuations, up to a token that is as good as theirs.
fn greedy(folder: &Path, device: Device) {
    let reference: Value = serde_json::from_slice(&std::fs::read(folder.join("reference.json")).unwrap()).unwrap();
    let mut model = device.load(folder, &OPTIONS).unwrap();
    for continuation in reference["greedy"].as_array().expect("greedy continuations") {
        let ids = |key: &str| -> Vec<u32> {
            continuation[key].as_array().expect(key).iter().map(|id| id.as_u64().expect("an id") as u32).collect()
        };
        let smallest_gap = continuation["min_top2_logit_gap"].as_f64().expect("a gap") as f32;
        let mut sequence = model.sequence();
        let mut next = ids("prompt_ids");
        for wanted in ids("output_ids") {
            let logits = model.extend(&mut sequence, &next);
            let last = &logits[logits.len() - model.model.info().vocabulary..];
            let (found, gap) = (argmax(last), top_two(last).1);
            // Only where the reference itself came this close to another token may we choose it.
            assert!(found == wanted as usize || (smallest_gap < 1e-3 && gap < 2e-3), "{found} for {wanted}, gap {gap}");
            next = vec![wanted];
        }
        model.release(sequence);
    }
}
