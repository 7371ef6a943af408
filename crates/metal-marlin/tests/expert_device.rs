//! `--expert-device`: a mixture of experts over a GPU and the processor, through the program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

/// What the program wrote and how it ended.
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn metal_marlin(args: &[&str]) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn success(args: &[&str]) -> Run {
    let run = metal_marlin(args);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    run
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&success(args).stdout).unwrap()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} of {value}"))
}

/// A tiny random mixture (2 layers, the first one dense in some, 67 tokens, a context of 64) with a tokenizer of some letters.
struct Mixture(TempDir);

impl Mixture {
    fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name);
        for file in ["config.json", "model.safetensors"] {
            fs::copy(source.join(file), folder.path().join(file)).unwrap();
        }
        let tokenizer = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": null, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "x": 66}, "merges": []}}"#;
        fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
        Self(folder)
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn has_gpu() -> bool {
    let has_gpu = marlin_kernels::gpu::adapters().iter().any(|gpu| gpu.missing.is_none());
    assert!(has_gpu || std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none(), "a GPU is required");
    has_gpu
}

const ON_GPU: [&str; 5] = ["--device", "gpu", "--exact", "--threads", "1"];

#[test]
fn run_and_eval_give_the_same_wherever_experts_are() {
    if !has_gpu() {
        return;
    }
    for (name, layers) in [("mixtral-top2", "cpu:1"), ("glm4moelite-shared-mtp", "cpu:0-1")] {
        let model = Mixture::new(name);
        let text = model.file("text.txt");
        fs::write(&text, "abcdeedcbaabbccddeeaebdc".repeat(12)).unwrap();
        let generate = |more: &[&str]| {
            let args = ["run", model.path(), "abcde", "-n", "12", "--temperature", "0", "--kv", "f32", "--json"];
            json(&[&args[..], &ON_GPU, more].concat())["tokens"].clone()
        };
        let evaluate = |more: &[&str]| {
            let args = ["eval", model.path(), "--text", text.to_str().unwrap(), "--context", "32", "--json"];
            json(&[&args[..], &ON_GPU, more].concat())["nll"].as_f64().unwrap()
        };
        let (tokens, nll) = (generate(&[]), evaluate(&[]));
        for experts in ["cpu", layers] {
            assert_eq!(generate(&["--expert-device", experts]), tokens, "{name}, {experts}");
            let found = evaluate(&["--expert-device", experts]);
            assert!((found / nll - 1.0).abs() < 1e-4, "{name}, {experts}: {found}, all on the GPU {nll}");
        }
        let args = ["run", model.path(), "abcde", "-n", "2", "--verbose", "--expert-device", "cpu:1-"];
        let told = success(&[&args[..], &ON_GPU].concat()).stderr;
        assert!(told.contains("experts  of layers 1: cpu ("), "{told}");
    }
}

#[test]
fn bench_says_where_experts_are() {
    if !has_gpu() {
        return;
    }
    let args = ["bench", "--shape", "tiny-moe", "--device", "gpu", "--prefill", "7", "--decode", "2", "--depths", "0"];
    let bench = |more: &[&str]| success(&[&args[..], &["--repetitions", "1", "--threads", "1"], more].concat()).stdout;
    let report: Value = serde_json::from_str(&bench(&["--expert-device", "cpu", "--output", "json"])).unwrap();
    assert_eq!((&report["host_experts"]["name"], &report["host_experts"]["layers"]), (&"cpu".into(), &"0-1".into()));
    assert!(number(&report, "host_bytes") > 0, "{report}");
    let report: Value = serde_json::from_str(&bench(&["--output", "json"])).unwrap();
    assert!(report["host_experts"].is_null() && report["host_bytes"].is_null(), "{report}");
    let text = bench(&["--expert-device", "cpu:1"]);
    assert!(text.contains("\nexperts of layers 1 on cpu: ") && text.contains(" MB of the host's memory\n"), "{text}");
    let csv = bench(&["--expert-device", "cpu:1", "--output", "csv"]);
    assert!(csv.contains(",host_experts,host_bytes,") && csv.contains(",\"1 on cpu: "), "{csv}");
}

#[test]
fn a_plan_counts_both_devices() {
    if !has_gpu() {
        return;
    }
    let model = Mixture::new("mixtral-top2");
    let args = ["plan", model.path(), "--device", "gpu", "--memory", "1GiB"];
    let plan = |more: &[&str]| json(&[&args[..], &["--json"], more].concat());
    let (whole, split) = (plan(&[]), plan(&["--expert-device", "cpu"]));
    assert!(whole["host_bytes"].is_null() && whole["host_device"].is_null(), "{whole}");
    assert_eq!((&split["host_layers"], &split["host_device"]["name"]), (&"0-1".into(), &"cpu".into()));
    assert_eq!((&split["device"]["name"], &split["device"]), (&"gpu".into(), &whole["device"]));
    assert_eq!(
        number(&split, "host_bytes"),
        number(&split, "host_weight_bytes") + number(&split, "host_activation_bytes")
    );
    assert!(number(&split, "weight_bytes") < number(&whole, "weight_bytes"), "{split}");
    let parts = ["weight_bytes", "kv_cache_bytes", "activation_bytes", "logit_bytes", "program_bytes"];
    let on_device: u64 = parts.iter().map(|key| number(&split, key)).sum();
    let in_the_same = if split["shares_memory"] == true { number(&split, "host_bytes") } else { 0 };
    assert_eq!(number(&split, "total_bytes"), on_device + in_the_same);
    let one = plan(&["--expert-device", "cpu:1"]);
    assert!(number(&one, "host_weight_bytes") < number(&split, "host_weight_bytes"));

    let text = success(&[&args[..], &["--expert-device", "cpu:0-"]].concat()).stdout;
    assert!(text.contains("\non gpu: ") && text.contains("\nexperts of layers 0-1 on cpu: "), "{text}");
    assert!(text.contains("\nhost experts "), "{text}");
}

#[test]
fn what_cannot_be_left_to_the_cpu_is_refused() {
    let model = Mixture::new("glm4moelite-shared-mtp");
    for list in ["gpu", "cpu:", "cpu:3-1", "cpu:x", "cpu:-2"] {
        let run = metal_marlin(&["run", model.path(), "abc", "--expert-device", list]);
        assert!(run.code == Some(2) && run.stderr.contains("0-11,20,40-"), "{list}: {}", run.stderr);
    }
    let kernels = metal_marlin(&["bench-kernels", "--expert-device", "cpu"]);
    assert!(kernels.code == Some(1) && kernels.stderr.contains("bench-kernels loads none"), "{}", kernels.stderr);
    if !has_gpu() {
        return;
    }
    let dense = Mixture::new("qwen3-gqa2-tied");
    for (model, list, problem) in [
        (&model, "cpu:0", "layer 0 has no experts; layers 1 have"),
        (&model, "cpu:1,2", "there is no layer 2, the last one is 1"),
        (&dense, "cpu", "the model has no experts"),
    ] {
        for args in [&["run", model.path(), "abc"][..], &["plan", model.path(), "--memory", "1GiB"]] {
            let run = metal_marlin(&[args, &["--device", "gpu", "--expert-device", list]].concat());
            assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""), "{}", run.stderr);
            assert!(run.stderr.contains(problem) && run.stderr.contains("--expert-device"), "{}", run.stderr);
        }
    }
}

/// All of the model is there anyway.
#[test]
fn nothing_changes_on_the_cpu() {
    let model = Mixture::new("mixtral-top2");
    let args = ["run", model.path(), "abcde", "-n", "8", "--temperature", "0", "--device", "cpu"];
    let (alone, told) = (success(&args), success(&[&args[..], &["--expert-device", "cpu:1"]].concat()));
    assert_eq!(told.stdout, alone.stdout);
    assert!(
        told.stderr.contains("note: ") && told.stderr.contains("--expert-device cpu:1 changes nothing"),
        "{}",
        told.stderr
    );
    assert_eq!(alone.stderr, "");
}
