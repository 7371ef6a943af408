//! The first GPU against `transformers` and against the reference, over tiny random checkpoints of every family; its kernels compiled with
//! and without bounds checks.

mod common;

use std::path::PathBuf;
use std::process::ExitCode;

use common::prediction::{PREDICTING, assert_predictions};
use common::{
    Device, Golden, assert_hidden_parity, assert_parity, assert_parity_of_most, each_packed_model, golden, goldens,
    gpu_trials, has_experts, host, options, packed, packed_in, same_bits, schemes, sparse_schemes, top_two,
};
use libtest_mimic::{Arguments, Trial};
use marlin_checkpoint::Checkpoint;
use marlin_format::Format;
use marlin_kernels::KvType;
use marlin_kernels::cpu::Arithmetic;
use marlin_kernels::gpu::{GpuArithmetic, GpuBackend, GpuOptions};
use marlin_model::{ExpertLayers, ExpertOffload, LoadOptions, Planner, load_model_offloaded};

/// Relative error allowed in single precision with keys and values in f32: a few times what the roundings of both sides come to.
const EXACT_BOUND: f32 = 1e-5;
/// With keys, values, activations, scales and, of few rows, sums of 32 products rounded to half precision: the largest error seen is 6.5e-3.
const HALF_BOUND: f32 = 1e-2;
/// Of prediction layers, which begin with what the model has computed like this: the largest error seen is 1.2e-2.
const HALF_PREDICTION_BOUND: f32 = 2e-2;
/// Their heads have 10 dimensions, like those of no trained model.
const ODD_HEADS: [&str; 2] = ["llama-mha-untied", "mixtral-window-fused-sharded"];

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for checked in [false, true] {
        let options = |arithmetic| GpuOptions { arithmetic, checked, ..GpuOptions::default() };
        trials.extend(trials_of(
            options(GpuArithmetic::Exact),
            &[
                ("logits_agree_with_transformers", |gpu| logits(gpu, KvType::F32, EXACT_BOUND)),
                ("packed_models_agree_with_the_reference", |gpu| packed_models(gpu, EXACT_BOUND)),
                ("logits_agree_with_experts_on_the_host", |gpu| host_experts(gpu, KvType::F32, EXACT_BOUND)),
                ("predictions_agree_with_transformers", |gpu| {
                    assert_predictions(Device::Gpu(gpu), KvType::F32, EXACT_BOUND);
                }),
            ],
        ));
        trials.extend(trials_of(
            options(GpuArithmetic::Half),
            &[
                ("logits_agree_with_transformers", |gpu| logits(gpu, KvType::F16, HALF_BOUND)),
                ("packed_models_agree_with_the_reference", |gpu| packed_models(gpu, HALF_BOUND)),
                ("logits_agree_with_experts_on_the_host", |gpu| host_experts(gpu, KvType::F16, HALF_BOUND)),
                ("the_most_likely_token_is_sampled", sampling),
                ("predictions_agree_with_transformers", |gpu| {
                    assert_predictions(Device::Gpu(gpu), KvType::F16, HALF_PREDICTION_BOUND);
                }),
            ],
        ));
        // On a device of its own: the others take memory meanwhile.
        trials.extend(trials_of(options(GpuArithmetic::Half), &[("plans_are_what_loading_takes", plans)]));
    }
    let invariant = GpuOptions { batch_invariant: true, ..GpuOptions::default() };
    trials.extend(trials_of(invariant, &[("any_batch_gives_the_same_bits", invariance)]));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Name, and what to run on the GPU.
type Test = (&'static str, fn(&'static GpuBackend));

fn trials_of(options: GpuOptions, tests: &[Test]) -> Vec<Trial> {
    gpu_trials(options, |gpu, label| {
        let trial = |&(name, test): &Test| {
            Trial::test(format!("{name}/{label}"), move || {
                test(gpu);
                Ok(())
            })
        };
        tests.iter().map(trial).collect()
    })
}

fn logits(gpu: &'static GpuBackend, kv_type: KvType, bound: f32) {
    for folder in goldens() {
        let loaded = Device::Gpu(gpu).load(&folder, &options(kv_type));
        if ODD_HEADS.iter().any(|name| folder.ends_with(name)) {
            let error = loaded.map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("multiples of 8, found 10"), "{error}");
            continue;
        }
        let golden = Golden::read(&folder);
        let mut model = loaded.unwrap();
        // As a prompt, and as tokens that are decoded.
        for chunk in [golden.input_ids.len(), 1] {
            let logits = model.logits_of(&golden.input_ids, chunk);
            let what = format!("{}, {chunk} at a time", folder.display());
            if has_experts(&folder) {
                assert_experts_agree(&what, &logits, &golden, bound);
            } else {
                assert_parity(&what, &logits, &golden, bound);
            }
        }
        if bound == EXACT_BOUND {
            let hidden = model.hidden_of(&golden.input_ids, 17);
            assert_hidden_parity(&format!("hidden states of {}", folder.display()), &folder, &hidden, &golden, bound);
        }
    }
}

/// In half precision a token between two experts may go to the other one, which those after it see.
fn assert_experts_agree(what: &str, logits: &[f32], golden: &Golden, bound: f32) {
    if bound == HALF_BOUND {
        assert_parity_of_most(what, logits, golden, bound);
    } else {
        assert_parity(what, logits, golden, bound);
    }
}

/// The experts of all layers, or of the last one, are the host's.
fn host_experts(gpu: &'static GpuBackend, kv_type: KvType, bound: f32) {
    let is_possible = |folder: &PathBuf| has_experts(folder) && !ODD_HEADS.iter().any(|name| folder.ends_with(name));
    let host = host(Arithmetic::Exact);
    for folder in goldens().into_iter().filter(is_possible) {
        let golden = Golden::read(&folder);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let last = *Planner::new(gpu, &checkpoint).unwrap().expert_layers().last().unwrap();
        for layers in [ExpertLayers::All, ExpertLayers::from_layer(last)] {
            let mut model = Device::Gpu(gpu).load_offloaded(&folder, &options(kv_type), &host, &layers).unwrap();
            for chunk in [golden.input_ids.len(), 1] {
                let logits = model.logits_of(&golden.input_ids, chunk);
                let what = format!("{}, layers {layers}, {chunk} at a time", folder.display());
                assert_experts_agree(&what, &logits, &golden, bound);
            }
        }
    }
}

fn packed_models(gpu: &'static GpuBackend, bound: f32) {
    each_packed_model(|what, wanted, logits| assert_parity(what, &logits(Device::Gpu(gpu)), wanted, bound));
}

fn sampling(gpu: &'static GpuBackend) {
    let folder = golden("qwen3-gqa2-tied");
    let golden = Golden::read(&folder);
    let mut model = Device::Gpu(gpu).load(&folder, &options(KvType::F32)).unwrap();
    let mut sequence = model.sequence();
    for (row, &token) in golden.input_ids.iter().enumerate() {
        let next = model.greedy(&mut sequence, &[token]).unwrap();
        let (wanted, gap) = top_two(&golden.logits[row * golden.vocabulary()..][..golden.vocabulary()]);
        assert!(next as usize == wanted || gap < 0.02, "row {row}");
    }
    model.release(sequence);
}

/// Bytes by which memory may differ from its plan: biases of a model that should have none, ends of buffers.
const SLACK: u64 = 4 << 10;

/// The memory that the device's buffers take is what was planned before.
fn plans(gpu: &'static GpuBackend) {
    let wide = LoadOptions { step_tokens: 300, logit_rows: 200, ..LoadOptions::default() };
    let many = LoadOptions { context: Some(40), kv_blocks: Some(900), kv_type: KvType::Fp8, ..LoadOptions::default() };
    let mut mixed = schemes([Format::Int4, Format::Int8, Format::Fp4, Format::Int3, Format::Bf16]);
    mixed.extend(sparse_schemes());
    let folders = ["llama-gqa4-bias-sharded", "qwen3-gqa2-tied", "gemma3-gqa2-linear-softcap-sharded"].map(golden);
    let packed: Vec<_> = folders.iter().map(|folder| packed(folder, &mixed)).collect();
    // What is left of a mixture whose experts are the host's.
    let mixtures = ["glm4moelite-shared-mtp", "glm4moe-fused-shared2", "gptoss-mxfp4"].map(golden);
    let offload = ExpertOffload { host: host(Arithmetic::Int8), layers: ExpertLayers::All };
    let whole = folders.into_iter().chain(packed.iter().map(packed_in)).map(|folder| (folder, None));
    let predicts = PREDICTING.map(|name| (golden(name), None));
    for (folder, offload) in whole.chain(mixtures.map(|folder| (folder, Some(&offload)))).chain(predicts) {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let prediction = Planner::new(gpu, &checkpoint).unwrap().has_prediction_layer();
        for options in [LoadOptions::default(), wide, many].map(|options| LoadOptions { prediction, ..options }) {
            let mut planner = Planner::new(gpu, &checkpoint).unwrap();
            if let Some(offload) = offload {
                planner = planner.with_offload(&offload.host, &offload.layers).unwrap();
            }
            let plan = planner.plan(&options).unwrap();
            let before = gpu.memory_taken();
            let model = load_model_offloaded(gpu, offload, &checkpoint, &options).unwrap();
            let taken = gpu.memory_taken() - before;
            // Where the host reads logits is memory, too, but not of a kernel.
            let readback = (options.logit_rows * model.info().vocabulary * size_of::<f32>()) as u64;
            let of_host = plan.host.map_or(0, |host| host.total());
            let planned = plan.total() - plan.program - readback - if plan.shares_memory { of_host } else { 0 };
            assert!(planned.abs_diff(taken) <= SLACK, "{}: {taken} bytes taken, {plan:?}", folder.display());
            drop(model);
            assert_eq!(gpu.memory_taken(), before, "all is given back");
        }
    }
}

fn invariance(gpu: &'static GpuBackend) {
    for name in ["qwen3-gqa2-tied", "gemma3-gqa4-tied"] {
        let target = packed(&golden(name), &schemes([Format::Fp4, Format::Int4]));
        let mut model = Device::Gpu(gpu).load(&packed_in(&target), &options(KvType::F16)).unwrap();
        let tokens: Vec<u32> = (0..64).map(|i| i * 7 % 50).collect();
        let all = model.logits_of(&tokens, 64);
        // As decoding, and as a draft that is verified, beside sequences of other lengths.
        for chunk in [1, 7] {
            assert!(same_bits(&model.logits_of(&tokens, chunk), &all), "{name}: {chunk} tokens at a time");
        }
        let [mut first, mut second] = [model.sequence(), model.sequence()];
        let beside = model.step(&mut [(&mut first, &tokens[..33]), (&mut second, &tokens[..31])]);
        for logits in beside {
            assert!(same_bits(&logits, &all[..logits.len()]), "{name}: beside another sequence");
        }
        model.release(first);
        model.release(second);
    }
}
