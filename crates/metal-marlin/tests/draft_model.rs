//! What a draft model takes of the memory, in every command that takes one: here the bundled model guesses for itself.
#![cfg(feature = "bundled-model")]

use std::fs;
use std::process::Command;

use serde_json::Value;

fn metal_marlin(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// What the bundled model takes with its whole context.
fn plan() -> Value {
    let (code, stdout, stderr) = metal_marlin(&["plan", "bundled", "--device", "cpu", "--memory", "1GiB", "--json"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    serde_json::from_str(&stdout).unwrap()
}

#[test]
fn two_models_that_do_not_fit_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let requests = folder.path().join("requests.jsonl");
    let line = "{\"custom_id\": \"1\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": \"Once\"}}\n";
    fs::write(&requests, line).unwrap();
    let [requests, answers] = [requests, folder.path().join("answers.jsonl")].map(|path| path.display().to_string());
    // There is room for one with all that it wants.
    let memory = (plan()["total_bytes"].as_u64().unwrap() + (1 << 20)).to_string();
    let commands: [&[&str]; 4] = [
        &["run", "bundled", "Once upon a time", "-n", "8"],
        &["chat", "bundled"],
        &["serve", "bundled"],
        &["batch", &requests, &answers, "bundled"],
    ];
    for command in commands {
        let options = ["--device", "cpu", "--memory", &memory, "--draft-model", "bundled"];
        let (code, _, stderr) = metal_marlin(&[command, &options].concat());
        assert_eq!(code, Some(1), "{command:?}: {stderr}");
        for wanted in [
            " needs ",
            "its draft model tiny-qwen3 (bundled) needs ",
            " together, and ",
            "are available (--memory says otherwise)",
            "without --draft-model, it fits",
        ] {
            assert!(stderr.contains(wanted), "{wanted}: {command:?}: {stderr}");
        }
    }
}

#[test]
fn a_context_leaves_room_for_the_draft_model() {
    let plan = plan();
    let [weights, total] = ["weight_bytes", "total_bytes"].map(|key| plan[key].as_u64().unwrap());
    // Two with the whole context would take a little more, although one tokenizer is enough for both.
    let memory = (2 * total - weights).to_string();
    let run = |options: &[&str]| {
        let all = ["run", "bundled", "Once upon a time", "-n", "1020", "--stop", "dog", "--seed", "3", "--verbose"];
        let (code, stdout, stderr) =
            metal_marlin(&[&all, &["--device", "cpu", "--memory", &memory][..], options].concat());
        let context = stderr.lines().find_map(|line| line.strip_prefix("context  ")?.strip_suffix(" tokens"));
        let context: Option<usize> = context.map(|context| context.parse().unwrap());
        (code, stdout, context, stderr)
    };
    let (code, text, context, stderr) = run(&[]);
    assert_eq!((code, context), (Some(0), Some(1024)), "{stderr}");

    let (code, same, context, stderr) = run(&["--draft-model", "bundled"]);
    assert_eq!((code, same), (Some(0), text), "{stderr}");
    let fits = context.unwrap();
    assert!((64..1024).contains(&fits), "{stderr}");

    // A longer one is refused, and told is the longest that is not.
    let (code, _, _, stderr) = run(&["--draft-model", "bundled", "--context", "1024"]);
    let advice = format!("; --context {fits} fits; without --draft-model, it fits");
    assert!(code == Some(1) && stderr.contains(&advice), "{advice}: {stderr}");
    let (code, _, context, stderr) = run(&["--draft-model", "bundled", "--context", &fits.to_string()]);
    assert_eq!((code, context), (Some(0), Some(fits)), "{stderr}");
}

#[test]
fn a_chat_takes_no_more_than_there_is() {
    let (code, _, stderr) = metal_marlin(&["chat", "bundled", "--device", "cpu", "--memory", "1MB"]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains(" needs ") && stderr.contains("976.6 KiB are available (--memory"), "{stderr}");
}
