//! What was computed outlives the server, on disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::server::Server;
use crate::{TEXT, has_gpu};

const SENTENCE: &str = "There was an old house at the end of the lane, and nobody had lived in it for a long time. ";

/// About 190 tokens.
fn prompt() -> String {
    SENTENCE.repeat(9)
}

fn body(prompt: &str) -> Value {
    json!({ "model": "bundled", "prompt": prompt, "max_tokens": 4, "seed": 1, "logprobs": 3, "ignore_eos": true })
}

fn start(device: &str, folder: &Path, options: &[&str]) -> Server {
    let folder = folder.to_str().unwrap();
    Server::on(device, &[&["--kv-cache-dir", folder, "--context", "512"], options].concat())
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// Waits until as many blocks are on disk, then pulls the plug.
fn kill_with_blocks(mut server: Server, blocks: f64) {
    server.wait_for("blocks are saved", |server| server.metric("metal_marlin_kv_store_blocks") >= blocks);
    assert!(server.metric("metal_marlin_kv_store_bytes") > 0.0);
    server.signal("-KILL");
    assert!(!server.wait().success());
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let fans = fs::read_dir(folder).unwrap().map(|fan| fan.unwrap().path()).filter(|fan| fan.is_dir());
    fans.flat_map(|fan| fs::read_dir(fan).unwrap()).map(|file| file.unwrap().path()).collect()
}

#[test]
fn prompts_outlive_a_server_that_is_killed() {
    survives("cpu", &prompt());
}

/// On whichever there is; a processor that plays one takes its time for long prompts.
#[test]
fn prompts_outlive_a_server_on_a_gpu() {
    if has_gpu() {
        survives("gpu", &SENTENCE.repeat(4));
    }
}

fn survives(device: &str, prompt: &str) {
    let folder = tempfile::tempdir().unwrap();
    let first = start(device, folder.path(), &[]);
    let fresh = first.ask(TEXT, &body(prompt));
    let tokens = fresh["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(cached(&fresh), 0);
    let blocks = (tokens + 3) / 32;
    kill_with_blocks(first, blocks as f64);

    let second = start(device, folder.path(), &["--threads", "1"]);
    let again = second.ask(TEXT, &body(prompt));
    let whole = (tokens - 1) / 32 * 32;
    assert_eq!((cached(&again), second.metric("metal_marlin_kv_store_hits_total") as u64), (whole, whole));
    if device == "cpu" {
        assert_eq!(again["choices"], fresh["choices"], "to the bit, with logprobs");
    } else {
        assert_eq!(again["choices"][0]["text"], fresh["choices"][0]["text"]);
    }
    second.assert_idle();

    // A changing first line: everything after it depends on it, and nothing is used.
    let changed = second.ask(TEXT, &body(&format!("It is 12:01. {prompt}")));
    assert!(cached(&changed) < 32, "{}", changed["usage"]);
    // Instead, what changes comes last.
    let ended = second.ask(TEXT, &body(&format!("{prompt}It is 12:01.")));
    assert!(cached(&ended) >= whole, "{}", ended["usage"]);
}

#[test]
fn other_models_other_formats_and_other_salts_find_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let first = start("cpu", folder.path(), &[]);
    let fresh = first.ask(TEXT, &body(&prompt()));
    kill_with_blocks(first, 5.0);
    let model = tempfile::tempdir().unwrap();
    let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/model"));
    for file in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    {
        fs::copy(source.join(file), model.path().join(file)).unwrap();
    }
    let other_model = [model.path().to_str().unwrap(), "--served-name", "bundled"];
    for options in [&["--kv", "int8"][..], &["--kv", "f32"], &["--exact"], &other_model] {
        let server = start("cpu", folder.path(), options);
        let answer = server.ask(TEXT, &body(&prompt()));
        assert_eq!((cached(&answer), server.metric("metal_marlin_kv_store_hits_total")), (0, 0.0), "{options:?}");
    }
    let server = start("cpu", folder.path(), &[]);
    let mut salted = body(&prompt());
    salted["cache_salt"] = "tenant".into();
    assert_eq!(cached(&server.ask(TEXT, &salted)), 0);
    let again = server.ask(TEXT, &body(&prompt()));
    assert!(cached(&again) > 0 && again["choices"] == fresh["choices"]);
}

#[test]
fn damaged_files_are_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    let first = start("cpu", folder.path(), &[]);
    let fresh = first.ask(TEXT, &body(&prompt()));
    kill_with_blocks(first, 5.0);
    for (index, path) in files(folder.path()).into_iter().enumerate() {
        let mut bytes = fs::read(&path).unwrap();
        let place = (index * 977 + 100) % bytes.len();
        if index % 2 == 0 {
            bytes.truncate(place)
        } else {
            bytes[place] ^= 0x10
        }
        fs::write(&path, bytes).unwrap();
    }
    let second = start("cpu", folder.path(), &[]);
    let again = second.ask(TEXT, &body(&prompt()));
    assert_eq!((cached(&again), &again["choices"]), (0, &fresh["choices"]));
    assert!(second.metric("metal_marlin_kv_store_damaged_blocks_total") >= 1.0);
    assert!(second.log.lock().unwrap().contains("is damaged"), "the log says so");
    // Told to end, it saves what it has first.
    let mut second = second;
    second.signal("-TERM");
    assert!(second.wait().success());
    let third = start("cpu", folder.path(), &[]);
    let again = third.ask(TEXT, &body(&prompt()));
    assert!(cached(&again) > 0 && again["choices"] == fresh["choices"]);
}

#[test]
fn a_folder_that_cannot_be_used_is_an_error_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let (file, good) = (file.to_str().unwrap(), folder.path().to_str().unwrap());
    let cases: [(&[&str], &str); 3] = [
        (&["--kv-cache-dir", file], "may write to"),
        (
            &["--kv-cache-dir", good, "--kv-cache-size", "1KiB"],
            "may take 1024 bytes, but one block of this model takes",
        ),
        (&["--kv-cache-size", "1GiB"], "--kv-cache-dir <DIR>"),
    ];
    for (options, wanted) in cases {
        let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin"))
            .args(["serve", "--port", "0", "--device", "cpu"])
            .args(options)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(wanted), "{options:?}: {said}");
    }
}
