//! `quantize --shard`: one output, written by several processes at a time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// Options under which a tiny model has several weight files.
const OPTIONS: [&str; 6] = ["--format", "fp4", "--method", "mse", "--max-shard-size", "16KiB"];

/// `quantize MODEL OUT` with these options and more.
fn quantize(out: &Path, more: &[&str]) -> Command {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens/qwen3-gqa2-tied");
    let mut command = Command::new(env!("CARGO_BIN_EXE_metal-marlin"));
    command.arg("quantize").arg(model).arg(out).args(OPTIONS).args(more);
    command
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What a run that fails says.
fn failure(out: &Path, more: &[&str]) -> String {
    let output = quantize(out, more).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

/// The weight files as `--list-shards` has them.
fn shards(out: &Path) -> Vec<Value> {
    json(&quantize(out, &["--list-shards", "--json"]).output().unwrap())["shards"].as_array().unwrap().clone()
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn processes_write_weight_files_at_the_same_time() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    json(&quantize(&whole, &["--json"]).output().unwrap());
    let count = shards(&out).len();
    assert!(count > 2);
    assert!(!folder.path().join("out.partial").exists(), "listing writes nothing");

    // All but the last, the first one by two processes.
    let start = |shard: usize| -> Child {
        let shard = format!("{}/{count}", shard + 1);
        quantize(&out, &["--shard", &shard, "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let processes: Vec<_> = [0].into_iter().chain(0..count - 1).map(start).collect();
    for process in processes {
        json(&process.wait_with_output().unwrap());
    }
    let finished: Vec<bool> = shards(&out).iter().map(|shard| shard["finished"].as_bool().unwrap()).collect();
    assert_eq!(finished, (0..count).map(|shard| shard + 1 < count).collect::<Vec<_>>());
    let again = quantize(&out, &["--shard", &format!("1/{count}")]).output().unwrap();
    assert!(String::from_utf8_lossy(&again.stdout).contains("already"), "{again:?}");

    let report = json(&quantize(&out, &["--json"]).output().unwrap());
    assert!(report["resumed_tensors"].as_u64().unwrap() > 0);
    assert_eq!(contents(&out), contents(&whole));
    assert!(!folder.path().join("out.partial").exists());
}

#[test]
fn what_cannot_be_written_apart_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let count = shards(&out).len();
    for (more, wanted) in [
        (&["--shard", "1/2"][..], format!("{count} weight files")),
        (&["--list-shards", "--scale-channels"], "--scale-channels".to_owned()),
        (&["--shard", "1/3", "--text", "text.txt"], "metal-marlin eval".to_owned()),
        (&["--shard", "1/3", "--layout", "gguf"], "one file".to_owned()),
    ] {
        let said = failure(&out, more);
        assert!(said.contains(&wanted), "{said}");
    }
    let usual = quantize(&out, &["--shard", "1/3"]);
    let without_method = usual.get_args().filter(|argument| !["--method", "mse"].map(AsRef::as_ref).contains(argument));
    let calibrated = Command::new(usual.get_program()).args(without_method).output().unwrap();
    let said = String::from_utf8(calibrated.stderr).unwrap();
    assert!(said.contains("--method gptq (the default)") && said.contains("--method mse"), "{said}");
    assert!(!folder.path().join("out.partial").exists());
}
