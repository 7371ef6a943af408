//! tiny-qwen3 and tiny-glm4-moe, models with trained weights, against `transformers`; and a GPU against the reference.
//!
//! The environment variable `METAL_MARLIN_MODELS` names the folder that holds them; without it these tests are reported as ignored.

mod common;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use common::{Device, Golden, argmax, assert_parity, gpu_trials, top_two};
use libtest_mimic::{Arguments, Failed, Trial};
use marlin_checkpoint::Checkpoint;
use marlin_kernels::KvType;
use marlin_kernels::cpu::Arithmetic;
use marlin_kernels::gpu::{GpuArithmetic, GpuOptions};
use marlin_model::LoadOptions;
use serde_json::Value;

const OPTIONS: LoadOptions = LoadOptions {
    context: Some(128),
    step_tokens: 32,
    logit_rows: 32,
    kv_blocks: None,
    kv_type: KvType::F32,
    measure_routing: false,
    prediction: false,
};

/// Grouped queries and dense MLPs.
const DENSE: &str = "tiny-qwen3";
/// Latent attention and experts.
const SPARSE: &str = "tiny-glm4-moe";

/// What to run, on which device.
type Test = fn(&Path, Device);

/// A test of a model in the folder that holds them.
fn trial(model: &'static str, name: &str, test: Test, device: Device) -> Trial {
    let models = std::env::var_os("METAL_MARLIN_MODELS");
    let is_ignored = models.is_none();
    let run = move || {
        let models =
            models.ok_or_else(|| format!("METAL_MARLIN_MODELS is not set: it names the folder that holds {model}"))?;
        test(&PathBuf::from(models).join(model), device);
        Ok::<(), Failed>(())
    };
    Trial::test(format!("{}::{name}", model.replace('-', "_")), run).with_ignored_flag(is_ignored)
}

fn main() {
    let cpu = Device::cpu(Arithmetic::Exact, 2, None);
    // The reference is too slow to generate with the larger one.
    let mut trials = vec![
        trial(DENSE, "logits_on_the_reference", logits, Device::Reference),
        trial(DENSE, "logits_on_the_cpu", logits, cpu),
        trial(DENSE, "greedy_continuations_on_the_cpu", greedy, cpu),
        trial(SPARSE, "logits_on_the_reference", logits, Device::Reference),
        trial(SPARSE, "logits_on_the_cpu", logits, cpu),
        trial(SPARSE, "greedy_continuations_on_the_cpu", greedy, cpu),
    ];
    for arithmetic in [GpuArithmetic::Exact, GpuArithmetic::Half] {
        for checked in [false, true] {
            let options = GpuOptions { arithmetic, checked, ..GpuOptions::default() };
            trials.extend(gpu_trials(options, |gpu, label| {
                let device = Device::Gpu(gpu);
                let of_model = |&model: &&'static str| {
                    let mut trials = vec![trial(model, &format!("distributions/{label}"), distributions, device)];
                    // In half precision a token that is nearly as likely may be chosen, with which another text begins.
                    if arithmetic == GpuArithmetic::Exact {
                        trials.push(trial(model, &format!("logits/{label}"), logits, device));
                    }
                    if arithmetic == GpuArithmetic::Exact && !checked {
                        trials.push(trial(model, &format!("greedy_continuations/{label}"), greedy, device));
                    }
                    trials
                };
                [DENSE, SPARSE].iter().flat_map(of_model).collect()
            }));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// Tokens of the text that the reference, which is slow, reads.
const TOKENS: usize = 192;
/// Of them, how many are decoded one by one.
const DECODED: usize = 64;

/// The reference caches what GPUs cache: what f16 costs is not theirs, and sends one token of the mixture to another expert.
const DISTRIBUTIONS: LoadOptions = LoadOptions { context: Some(TOKENS), kv_type: KvType::F16, ..OPTIONS };

/// The reference's logits of a text, and its tokens, one more.
fn of_reference(folder: &Path) -> &'static (Golden, u32) {
    static REFERENCES: [OnceLock<(Golden, u32)>; 2] = [OnceLock::new(), OnceLock::new()];
    REFERENCES[usize::from(folder.ends_with(SPARSE))].get_or_init(|| {
        let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/text/validation.txt");
        let text: String = std::fs::read_to_string(text).unwrap().chars().take(4096).collect();
        let tokenizer = Checkpoint::open(folder).unwrap().tokenizer().unwrap();
        let mut input_ids = tokenizer.encode(&text, false).unwrap();
        let next = input_ids[TOKENS];
        input_ids.truncate(TOKENS);
        let logits = Device::Reference.load(folder, &DISTRIBUTIONS).unwrap().logits_of(&input_ids, 32);
        (Golden { input_ids, logits }, next)
    })
}

/// Teacher-forced, as a prompt and token by token, as GPUs run models: another token is preferred only where two are as good, the mean
/// divergence from the reference is below 1e-4 nats, and perplexity the same within 0.1 %.
fn distributions(folder: &Path, device: Device) {
    let (golden, next) = of_reference(folder);
    let mut model = device.load(folder, &DISTRIBUTIONS).unwrap();
    let mut sequence = model.sequence();
    let (prompt, decoded) = golden.input_ids.split_at(TOKENS - DECODED);
    let mut found: Vec<f32> = prompt.chunks(32).flat_map(|tokens| model.extend(&mut sequence, tokens)).collect();
    found.extend(decoded.chunks(1).flat_map(|token| model.extend(&mut sequence, token)));
    model.release(sequence);

    let targets: Vec<u32> = golden.input_ids[1..].iter().copied().chain([*next]).collect();
    let vocabulary = golden.vocabulary();
    let mut nll = [0.0; 2];
    for (what, rows) in [("prompt", 0..TOKENS - DECODED), ("decoded", TOKENS - DECODED..TOKENS)] {
        let values = rows.start * vocabulary..rows.end * vocabulary;
        let (found, wanted) = (&found[values.clone()], &golden.logits[values]);
        let error = found.iter().zip(wanted).map(|(f, w)| (f - w).abs()).fold(0.0, f32::max);
        let mut divergence = 0.0;
        for (row, (found, wanted)) in found.chunks(vocabulary).zip(wanted.chunks(vocabulary)).enumerate() {
            let (first, gap) = top_two(wanted);
            assert!(
                argmax(found) == first || gap < 2.0 * error,
                "{what} {row}: another token, gap {gap}, error {error}"
            );
            let [found, wanted] = [found, wanted].map(log_softmax);
            divergence += wanted.iter().zip(&found).map(|(w, f)| w.exp() * (w - f)).sum::<f64>();
            let target = targets[rows.start + row] as usize;
            nll[0] -= found[target];
            nll[1] -= wanted[target];
        }
        let divergence = divergence / rows.len() as f64;
        // Unlike with `<`, numbers that are none fail.
        assert!((-1e-9..1e-4).contains(&divergence), "{what}: mean KL {divergence:e}");
    }
    // Over all of them: of few tokens, those that become likelier do not make up for the others.
    let ratio = ((nll[0] - nll[1]) / TOKENS as f64).exp();
    assert!((0.999..1.001).contains(&ratio), "perplexity of {ratio} times the reference's");
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f64::NEG_INFINITY, |most, &logit| most.max(f64::from(logit)));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - largest - sum.ln()).collect()
}

/// The golden logits; the errors seen are near 1e-6.
fn logits(folder: &Path, device: Device) {
    let golden = Golden::read(folder);
    let logits = device.load(folder, &OPTIONS).unwrap().logits_of(&golden.input_ids, 32);
    assert_parity(&folder.display().to_string(), &logits, &golden, 1e-4);
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
