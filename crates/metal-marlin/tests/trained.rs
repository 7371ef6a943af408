//! tiny-qwen3, a model with trained weights, through the program: what its perplexity is known to be, and what quantisation
//! does to it.
//!
//! The environment variable `METAL_MARLIN_MODELS` names the folder that holds `tiny-qwen3`. Without it, or without
//! optimisation (these tests run the model over 50,000 tokens), they are reported as ignored.

use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

/// Perplexity that `transformers` measures in f32, on the bf16 weights.
const REFERENCE_PERPLEXITY: f64 = 28.8024;

/// A test of the model in a folder.
type Test = fn(&Path);

fn main() {
    let model = std::env::var_os("METAL_MARLIN_MODELS").map(|models| PathBuf::from(models).join("tiny-qwen3"));
    let tests: [(&str, Test); 5] = [
        ("perplexity", perplexity),
        ("the_bundled_model_is_close_to_it", the_bundled_model_is_close_to_it),
        ("the_bundled_model_is_what_quantize_makes_of_it", the_bundled_model_is_what_quantize_makes_of_it),
        ("a_mix_is_better_than_its_bytes", a_mix_is_better_than_its_bytes),
        ("rounded_activations_cost_nothing", rounded_activations_cost_nothing),
    ];
    let trial = |(name, test): (&str, Test)| {
        let model = model.clone();
        let is_ignored = model.is_none() || cfg!(debug_assertions);
        let run = move || {
            test(&model.ok_or("METAL_MARLIN_MODELS is not set: it names the folder that holds tiny-qwen3")?);
            Ok::<(), Failed>(())
        };
        Trial::test(format!("tiny_qwen3::{name}"), run).with_ignored_flag(is_ignored)
    };
    let trials = tests.into_iter().map(trial).collect();
    // One after the other: each uses all cores.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials).exit();
}

fn eval(model: &Path, options: &[&str]) -> Value {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/text/validation.txt");
    let mut command = Command::new(env!("CARGO_BIN_EXE_metal-marlin"));
    let output = command.arg("eval").arg(model).arg("--text").arg(text).arg("--json").args(options).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"))
}

fn perplexity(model: &Path) {
    let result = eval(model, &["--exact"]);
    assert_eq!((&result["tokens"], &result["windows"]), (&50771.into(), &50.into()));
    let perplexity = number(&result, "perplexity");
    assert!((perplexity / REFERENCE_PERPLEXITY - 1.0).abs() < 1e-3, "{perplexity}");

    let reference: Value = serde_json::from_slice(&std::fs::read(model.join("reference.json")).unwrap()).unwrap();
    let windows = |value: &Value| -> Vec<f64> {
        value["window_nll"].as_array().unwrap().iter().map(|nll| nll.as_f64().unwrap()).collect()
    };
    for (window, (found, expected)) in windows(&result).iter().zip(windows(&reference)).enumerate() {
        assert!((found - expected).abs() < 1e-3, "window {window}: {found}, expected {expected}");
    }
}

fn the_bundled_model_is_close_to_it(model: &Path) {
    let options = ["--baseline", model.to_str().unwrap(), "--windows", "8"];
    let result = eval(Path::new("bundled"), &options);
    // Other implementations of FP4 in groups of 128 lose 0.10 nats over the whole text when scales are searched, and 0.047 with
    // error feedback, which this recipe has not.
    assert!((0.05..0.11).contains(&number(&result, "mean_kl")), "{result}");
    assert!(number(&result, "top1_agreement") > 0.77, "{result}");
}

/// The JSON that a command prints.
fn json(args: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(args).arg("--json").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Half way in memory between two formats, `--fit` comes more than half way in KL.
fn a_mix_is_better_than_its_bytes(model: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let model = model.to_str().unwrap();
    let measure = |name: &str, options: &[&str]| {
        let out = folder.path().join(name);
        let out = out.to_str().unwrap();
        json(&[&["quantize", model, out, "--method", "mse"], options].concat());
        let total = number(&json(&["plan", out, "--memory", "1GiB", "--context", "1024"]), "total_bytes");
        let kl = eval(Path::new(out), &["--baseline", model, "--context", "256", "--windows", "4"]);
        (total, number(&kl, "mean_kl"))
    };
    let (small, worse) = measure("int3", &["--format", "int3"]);
    let (large, better) = measure("int4-sym", &["--format", "int4-sym"]);
    let memory = (small + large) / 2.0;
    let (total, kl) = measure("mix", &["--fit", &format!("{memory:.0}"), "--context", "1024"]);
    assert!(total <= memory + 0.5, "{total} of {memory}");
    assert!(better < kl && kl < (better + worse) / 2.0, "{kl} between {better} and {worse}");
}

/// The CPU rounds activations to int8: in no format does that move the perplexity by 0.3 %.
fn rounded_activations_cost_nothing(model: &Path) {
    let folder = tempfile::tempdir().unwrap();
    for format in ["fp4", "int4", "int4-sym", "int8", "fp8", "int3", "int2", "mxfp4", "nvfp4", "fp4 --sparse-24"] {
        let out = folder.path().join(format);
        let mut args = vec!["quantize", model.to_str().unwrap(), out.to_str().unwrap(), "--method", "mse", "--format"];
        args.extend(format.split(' '));
        json(&args);
        let of = |exact: &[&str]| {
            number(&eval(&out, &[&["--device", "cpu", "--windows", "4"], exact].concat()), "perplexity")
        };
        let (rounded, exact) = (of(&[]), of(&["--exact"]));
        assert!((rounded / exact - 1.0).abs() < 3e-3, "{format}: {rounded}, {exact} without rounding");
    }
}

fn the_bundled_model_is_what_quantize_makes_of_it(model: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    let mut command = Command::new(env!("CARGO_BIN_EXE_metal-marlin"));
    let output =
        command.arg("quantize").arg(model).arg(&out).args(["--method", "mse", "--format", "fp4"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for file in std::fs::read_dir(&out).unwrap() {
        let file = file.unwrap().path();
        // The bundled model has a page of its own instead of a card.
        if file.file_name().unwrap() == "README.md" {
            continue;
        }
        let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("model").join(file.file_name().unwrap());
        assert!(std::fs::read(&file).unwrap() == std::fs::read(&bundled).unwrap(), "{} differs", bundled.display());
    }
}
