//! `bench-kernels` as a person meets it.

use std::process::{Command, Output};

use serde_json::Value;

fn bench_kernels(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_metal-marlin")).arg("bench-kernels").args(args).output().unwrap()
}

fn success(args: &[&str]) -> String {
    let output = bench_kernels(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Measures small kernels and checks what is told of them. A processor tells no clock.
fn quick(device: &str, has_clock: bool) {
    let measure = |filter| {
        let args = ["--quick", "--repetitions", "2", "--device", device, "--filter", filter, "--json"];
        serde_json::from_str::<Value>(&success(&args)).unwrap()
    };
    let positive = |value: &Value| value.as_f64().is_some_and(|value| value > 0.0);
    for (filter, names) in [
        ("linear/fp4/256x512/m=16", &["m=16/dependent", "m=16/independent"][..]),
        ("attention/f16/decode", &["decode/128"]),
    ] {
        let report = measure(filter);
        let [group] = &report["groups"].as_array().unwrap()[..] else { panic!("one group: {report:#}") };
        assert!(positive(&group["before"]["read_bytes_per_second"]), "{group}");
        assert!(positive(&group["after"]["read_bytes_per_second"]), "{group}");
        assert_eq!(group["is_clock_steady"].is_boolean(), has_clock, "{group}");
        let results = group["results"].as_array().unwrap();
        assert_eq!(results.len(), names.len(), "{group:#}");
        for (result, name) in results.iter().zip(names) {
            assert!(result["name"].as_str().unwrap().ends_with(name), "{result}");
            let seconds = &result["seconds"];
            assert!(positive(&seconds["min"]) && positive(&result["bytes_per_second"]), "{result}");
            assert!(seconds["min"].as_f64() <= seconds["median"].as_f64(), "{result}");
            let rate = result["operations"].as_f64().unwrap() / seconds["median"].as_f64().unwrap();
            let told = result["operations_per_second"].as_f64().unwrap();
            assert!((told / rate - 1.0).abs() < 1e-9, "{result}");
        }
    }
}

#[test]
fn kernels_of_the_cpu_are_measured() {
    quick("cpu", false);
}

#[test]
fn kernels_of_a_gpu_are_measured() {
    let found = marlin_kernels::gpu::adapters().iter().any(|gpu| gpu.missing.is_none());
    assert!(found || std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none(), "a GPU is required");
    if found {
        quick("gpu", true);
    }
}

#[test]
fn fork_joins_of_the_cpu_are_measured() {
    let args = ["--quick", "--repetitions", "1", "--device", "cpu", "--threads", "2", "--filter", "threads/", "--json"];
    let report = serde_json::from_str::<Value>(&success(&args)).unwrap();
    let results = report["groups"][0]["results"].as_array().unwrap();
    for name in ["pool/empty/busy=0us", "rayon/empty/busy=0us", "pool/meeting/busy=200us", "rayon/meeting/busy=20us"] {
        let name = format!("threads/fork-join/{name}");
        let result = results.iter().find(|result| result["name"] == *name).unwrap_or_else(|| panic!("{report:#}"));
        assert!(result["seconds"]["min"].as_f64().unwrap() > 0.0, "{result}");
        // They read and compute nothing.
        assert!(result["bytes_per_second"].is_null() && result["operations_per_second"].is_null(), "{result}");
    }
}

#[test]
fn tables_have_a_line_for_each_kernel() {
    let text = success(&["--quick", "--repetitions", "1", "--filter", "linear/int8/256x512/m=1/"]);
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("linear/int8/256x512/m=1/")).collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(text.contains("linear/int8/256x512: memory read at "), "{text}");
}

#[test]
fn a_filter_that_leaves_nothing_is_an_error() {
    let output = bench_kernels(&["--quick", "--filter", "no-such-kernel"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && error.contains("`no-such-kernel`; names are like linear/"), "{error}");
}
