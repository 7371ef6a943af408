//! `verify-kernels` as a person meets it.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

fn verify_kernels(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_metal-marlin")).arg("verify-kernels").args(args).output().unwrap()
}

fn success(args: &[&str]) -> String {
    let output = verify_kernels(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn failure(args: &[&str], code: i32) -> String {
    let output = verify_kernels(args);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(code), 0));
    String::from_utf8(output.stderr).unwrap()
}

/// Whether there is a GPU; there must be one where that is asked for.
fn has_gpu() -> bool {
    let found = marlin_kernels::gpu::adapters().iter().any(|gpu| gpu.missing.is_none());
    assert!(found || std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none(), "a GPU is required");
    found
}

#[test]
fn kernels_are_held_against_the_reference() {
    if !has_gpu() {
        return;
    }
    let report: Value = serde_json::from_str(&success(&["--filter", "rms-norm", "--json"])).unwrap();
    assert_eq!(report["ok"], true);
    let rows = report["rows"].as_array().unwrap();
    assert!(
        rows.len() >= 20 && rows.iter().all(|row| row["name"].as_str().unwrap().contains("rms-norm")),
        "{report:#}"
    );
    let kernels = report["kernels"].as_array().unwrap();
    let [first, second] = &kernels[..] else { panic!("the two variants of one kernel: {kernels:#?}") };
    for kernel in [first, second] {
        assert_eq!((&kernel["kernel"], &kernel["ok"]), (&"rms_norm".into(), &true.into()));
        let (error, bound) = (&kernel["error"]["nmse"], &kernel["error"]["bound"]);
        assert!(error.as_f64().unwrap() <= bound.as_f64().unwrap(), "{kernel}");
        assert!(
            kernel["rows"].as_u64().unwrap() >= 10 && kernel["compile_seconds"].as_f64().unwrap() > 0.0,
            "{kernel}"
        );
    }
    assert_ne!(first["variant"], second["variant"]);

    let text = success(&["--filter", "soft-cap"]);
    let line = text.lines().find(|line| line.starts_with("soft_cap ")).expect("a line of the kernel");
    assert!(line.contains(" ok "), "{text}");
    assert!(
        text.contains("\n1 kernel; 3 rows of the conformance table in ") && text.ends_with(" s, 0 failed\n"),
        "{text}"
    );
}

#[test]
fn kernels_are_written_as_metal_gets_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("kernels");
    let path = folder.to_str().unwrap();
    let report: Value =
        serde_json::from_str(&success(&["--msl", path, "--filter", "linear_rows/int4", "--json"])).unwrap();
    let files = report["files"].as_array().unwrap();
    assert!(files.len() > 1, "{report:#}");
    for file in files {
        let source = fs::read_to_string(file["path"].as_str().unwrap()).unwrap();
        assert!(source.starts_with("// linear_rows ") && source.contains("kernel void "), "{source}");
        assert_eq!(file["faults"].as_array().unwrap().len(), 0, "{file}");
    }
    let on_disk = fs::read_dir(&folder).unwrap().count();
    assert_eq!(on_disk, files.len(), "a file for each kernel");
}

#[test]
fn what_cannot_be_verified_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let error = failure(&["--msl", path, "--filter", "no such kernel"], 1);
    assert!(error.contains("`no such kernel`"), "{error}");
    let error = failure(&["--device", "cpu"], 2);
    assert!(error.contains("gpu:N"), "{error}");
    let error = failure(&["--msl", path, "--device", "gpu"], 2);
    assert!(error.contains("cannot be used with"), "{error}");
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = failure(&["--msl", file.to_str().unwrap(), "--filter", "rms_norm"], 1);
    assert!(error.contains(file.to_str().unwrap()), "{error}");
}
