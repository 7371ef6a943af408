//! `plan`, and what `run` and `eval` refuse because of it.
#![cfg(feature = "bundled-model")]

use std::process::Command;

use serde_json::Value;

fn metal_marlin(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn plan(args: &[&str]) -> Value {
    let (code, stdout, stderr) = metal_marlin(&[&["plan", "--json"], args].concat());
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    serde_json::from_str(&stdout).unwrap()
}

fn number(plan: &Value, key: &str) -> u64 {
    plan[key].as_u64().unwrap_or_else(|| panic!("{key} of {plan}"))
}

/// A tiny checkpoint that is not quantised.
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../marlin-model/tests/goldens/qwen3-gqa2-tied");

#[test]
fn a_plan_adds_up_and_says_what_fits() {
    let whole = plan(&["bundled", "--memory", "1GiB"]);
    let parts = ["weight_bytes", "kv_cache_bytes", "activation_bytes", "logit_bytes", "program_bytes"];
    let sum: u64 = parts.iter().map(|key| number(&whole, key)).sum();
    assert_eq!(sum, number(&whole, "total_bytes"));
    assert_eq!((&whole["fits"], number(&whole, "longest_context")), (&Value::Bool(true), 1024));
    assert!(whole["formats"].as_array().unwrap().is_empty(), "a quantised model is not quantised again");

    let four = plan(&["bundled", "--memory", "1GiB", "--concurrency", "4", "--kv", "f32"]);
    assert_eq!(number(&four, "kv_bytes_per_token"), 2 * number(&whole, "kv_bytes_per_token"));
    assert!(number(&four, "kv_cache_bytes") > 7 * number(&whole, "kv_cache_bytes"));
    let most = number(&whole, "most_sequences").to_string();
    let filled = plan(&["bundled", "--memory", "1GiB", "--concurrency", &most]);
    assert!(filled["fits"].as_bool().unwrap() && number(&filled, "most_sequences").to_string() == most);

    let tight = plan(&["bundled", "--memory", "1MB"]);
    assert!(!tight["fits"].as_bool().unwrap() && tight["longest_context"].is_null(), "{tight}");
    let (_, text, _) = metal_marlin(&["plan", "bundled", "--memory", "1MB"]);
    assert!(text.contains("does not fit") && text.contains("no context fits"), "{text}");
}

#[test]
fn formats_are_planned_as_quantize_writes_them() {
    let folder = tempfile::tempdir().unwrap();
    let stored = plan(&[TINY, "--memory", "1GiB"]);
    for format in stored["formats"].as_array().unwrap() {
        let name = format["format"].as_str().unwrap();
        let planned = plan(&[TINY, "--memory", "1GiB", "--format", name]);
        assert_eq!(format["total_bytes"], planned["total_bytes"], "{name}");
        let out = folder.path().join(name);
        let (code, _, stderr) =
            metal_marlin(&["quantize", TINY, out.to_str().unwrap(), "--method", "mse", "--format", name]);
        assert_eq!(code, Some(0), "{stderr}");
        let written = plan(&[out.to_str().unwrap(), "--memory", "1GiB"]);
        assert_eq!(written["total_bytes"], planned["total_bytes"], "{name}");
    }
}

#[test]
fn too_little_memory_is_refused_with_the_numbers() {
    let (code, stdout, stderr) = metal_marlin(&["run", "Once", "--memory", "10MiB"]);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    for wanted in ["needs ", "weights ", "KV cache of 2", "10.0 MiB are available", "--memory"] {
        assert!(stderr.contains(wanted), "{wanted}: {stderr}");
    }
    // Short of a few blocks: a context that is asked for is not shortened, but the one that fits is named.
    let whole = plan(&["bundled", "--memory", "1GiB", "--context", "1024"]);
    let memory = (number(&whole, "total_bytes") - number(&whole, "logit_bytes") - (4 << 20)).to_string();
    let (code, _, stderr) = metal_marlin(&["run", "Once", "--context", "1024", "--memory", &memory]);
    assert!(code == Some(1) && stderr.contains("--context ") && stderr.contains(" fits"), "{stderr}");
    let (code, _, stderr) = metal_marlin(&["run", "Once", "-n", "1000", "--ignore-eos", "--json", "--memory", &memory]);
    assert_eq!(code, Some(0), "{stderr}");

    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/text/validation.txt");
    let (code, _, stderr) = metal_marlin(&["eval", "bundled", "--text", text, "--memory", "10MiB"]);
    assert!(code == Some(1) && stderr.contains("weights "), "{stderr}");
    let (code, _, stderr) = metal_marlin(&["run", "Once", "--memory", "16 pigs"]);
    assert!(code == Some(2) && stderr.contains("16GiB"), "{stderr}");
}

/// However much memory there is.
#[test]
fn a_kv_cache_beyond_what_a_gpu_binds_is_refused() {
    let has_gpu = marlin_kernels::gpu::adapters().iter().any(|gpu| gpu.missing.is_none());
    assert!(has_gpu || std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none(), "a GPU is required");
    if !has_gpu {
        return;
    }
    let args = ["plan", "bundled", "--memory", "1000TiB", "--device", "gpu", "--concurrency"];
    // Some 500 GiB of keys a layer.
    let (code, stdout, stderr) = metal_marlin(&[&args[..], &["1000000"]].concat());
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    for wanted in ["one layer of the KV cache (keys of ", " GiB, and ", "binds no more than ", "--concurrency", "CPU"] {
        assert!(stderr.contains(wanted), "{wanted}: {stderr}");
    }
    // As many as the plan says can be planned for, one more cannot.
    let (_, stdout, _) = metal_marlin(&[&args[..], &["1", "--json"]].concat());
    let most = number(&serde_json::from_str(&stdout).unwrap(), "most_sequences");
    let code_of = |sequences: u64| metal_marlin(&[&args[..], &[&sequences.to_string()]].concat()).0;
    assert_eq!((code_of(most), code_of(most + 1)), (Some(0), Some(1)), "{most}");
}

/// Memory of its own that `run` takes stays within the plan, and the plan within half as much again.
#[cfg(target_os = "linux")]
#[test]
fn run_takes_what_is_planned() {
    use std::process::Stdio;
    // Fills a step and most of the context.
    let prompt = "Once upon a time there was a fish. ".repeat(80);
    let args = ["run", &prompt, "-n", "300", "--context", "1024", "--ignore-eos"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_metal-marlin"));
    let mut child = child.args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        // The process may end in between.
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let own = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix("kB")?.trim().parse().ok());
        peak = peak.max(own.unwrap_or(0u64) * 1024);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let planned = number(&plan(&["bundled", "--memory", "1GiB"]), "total_bytes");
    assert!(peak <= planned && planned <= peak * 3 / 2, "{peak} bytes at the peak, {planned} planned");
}
