//! A GGUF file alone is a model: to look at, to run, to talk to, to measure and to quantise.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// One layer of Qwen3 with random weights in Q8_0, a vocabulary and a chat template.
fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-checkpoint/tests/goldens/gguf/chat.gguf")
}

fn metal_marlin(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_metal-marlin"))
        .args(args)
        .args(["--device", "cpu"].iter().filter(|_| !matches!(args[0], "inspect" | "quantize")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Commands that read nothing may have ended.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

#[track_caller]
fn succeeds(args: &[&str], input: &str) -> String {
    let output = metal_marlin(args, input);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn fails(args: &[&str], words: &[&str]) {
    let output = metal_marlin(args, "");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
    words.iter().for_each(|word| assert!(error.contains(word), "{error:?} does not say {word:?}"));
}

const GREEDY: [&str; 4] = ["--temperature", "0", "--max-tokens", "8"];

#[test]
fn inspect_and_plan() {
    let model = model();
    let inspected: Value =
        serde_json::from_str(&succeeds(&["inspect", model.to_str().unwrap(), "--json"], "")).unwrap();
    assert_eq!((&inspected["layout"], &inspected["architecture"]), (&"gguf".into(), &"Qwen3ForCausalLM".into()));
    let text = succeeds(&["plan", model.to_str().unwrap()], "");
    assert!(text.contains("as stored"), "{text}");
}

#[test]
fn run_and_chat() {
    let model = model();
    let model = model.to_str().unwrap();
    let text = succeeds(&[&["run", model, "Hello world"], &GREEDY[..]].concat(), "");
    assert!(!text.trim().is_empty());
    let talked = succeeds(&[&["chat", model], &GREEDY[..]].concat(), "Hello\n");
    let answered = succeeds(&[&["run", model, "--chat", "Hello"], &GREEDY[..]].concat(), "");
    assert!(!answered.trim().is_empty());
    assert_eq!(talked, answered);
    // By the folder that holds nothing else.
    let folder = tempfile::tempdir().unwrap();
    fs::copy(model, folder.path().join("model.gguf")).unwrap();
    let folder = folder.path().to_str().unwrap();
    assert_eq!(succeeds(&[&["run", folder, "Hello world"], &GREEDY[..]].concat(), ""), text);
}

#[test]
fn what_is_no_such_file_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none.gguf");
    fails(&["inspect", path.to_str().unwrap()], &["GGUF file at", "none.gguf"]);
    // Not taken for the name of a model on the Hub.
    fails(&["inspect", "models/none.gguf"], &["GGUF file at models/none.gguf"]);
    fs::write(&path, "text").unwrap();
    fails(&["run", path.to_str().unwrap(), "Hello"], &["none.gguf", "begins with \"text\"", "wanted \"GGUF\""]);
    let (model, out) = (model(), folder.path().join("out"));
    let args = ["quantize", model.to_str().unwrap(), out.to_str().unwrap(), "--method", "mse", "--format", "int4"];
    fails(&args, &["quantised already", "int8 g32"]);
}
