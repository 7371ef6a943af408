//! `metal-marlin batch`: files of requests and of answers.
#![cfg(feature = "bundled-model")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A hang is a failure.
const PATIENCE: Duration = Duration::from_secs(120);

struct Batch {
    folder: TempDir,
}

impl Batch {
    fn new(requests: &[Value]) -> Self {
        let folder = TempDir::new().unwrap();
        let text: String = requests.iter().map(|request| format!("{request}\n")).collect();
        fs::write(folder.path().join("in.jsonl"), text).unwrap();
        Self { folder }
    }

    fn answers(&self) -> PathBuf {
        self.folder.path().join("out.jsonl")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_metal-marlin"));
        command.arg("batch").arg(self.folder.path().join("in.jsonl")).arg(self.answers()).args(["--device", "cpu"]);
        command
    }

    fn run(&self) -> Output {
        self.command().output().unwrap()
    }
}

fn chat(id: usize, max_tokens: usize) -> Value {
    let messages = json!([{ "role": "user", "content": format!("Number {id}?") }]);
    let body = json!({ "messages": messages, "max_tokens": max_tokens, "seed": id });
    json!({ "custom_id": format!("chat-{id}"), "method": "POST", "url": "/v1/chat/completions", "body": body })
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What each request was answered, by its name, without what differs from run to run.
fn said(path: &Path) -> Vec<(String, Value)> {
    let mut said: Vec<_> = lines(path)
        .iter()
        .map(|line| {
            (line["custom_id"].as_str().unwrap().to_owned(), line["response"]["body"]["choices"][0]["message"].clone())
        })
        .collect();
    said.sort_by(|(a, _), (b, _)| a.cmp(b));
    said
}

#[test]
fn every_endpoint_answers_and_what_is_wrong_is_told() {
    let request =
        |id: &str, url: &str, body: Value| json!({ "custom_id": id, "method": "POST", "url": url, "body": body });
    let batch = Batch::new(&[
        chat(1, 5),
        request("text", "/v1/completions", json!({ "model": "bundled", "prompt": "Once", "max_tokens": 5 })),
        request("response", "/v1/responses", json!({ "input": "Hello", "max_output_tokens": 5 })),
        request(
            "message",
            "/v1/messages",
            json!({ "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 5 }),
        ),
        request("score", "/v1/perplexity", json!({ "text": "Once upon a time" })),
        request("wrong", "/v1/completions", json!({ "prompt": "Once", "temperature": -1 })),
    ]);
    let output = batch.run();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("1 of 6 requests were refused"), "{error}");
    let lines = lines(&batch.answers());
    let of = |id: &str| &lines.iter().find(|line| line["custom_id"] == id).unwrap()["response"];
    assert!(of("chat-1")["body"]["choices"][0]["message"]["content"].is_string());
    assert!(of("text")["body"]["choices"][0]["text"].is_string());
    assert_eq!(of("response")["body"]["object"], "response");
    assert_eq!(of("message")["body"]["type"], "message");
    assert!(of("score")["body"]["perplexity"].is_number());
    assert_eq!(of("wrong")["status_code"], 400);
    assert_eq!(of("wrong")["body"]["error"]["param"], "temperature");
}

#[test]
fn a_run_that_is_killed_goes_on() {
    let requests: Vec<Value> = (0..40).map(|id| chat(id, 30)).collect();
    let whole = Batch::new(&requests);
    assert!(whole.run().status.success());
    let batch = Batch::new(&requests);
    let mut process = batch.command().args(["--max-running", "2"]).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while fs::read(batch.answers()).unwrap_or_default().iter().filter(|&&byte| byte == b'\n').count() < 5 {
        assert!(started.elapsed() < PATIENCE, "nothing is answered");
        thread::sleep(Duration::from_millis(5));
    }
    // No signal is harder than this one.
    process.kill().unwrap();
    process.wait().unwrap();
    let before = lines(&batch.answers()).len();
    assert!((5..40).contains(&before), "{before}");
    let output = batch.run();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && told.contains(&format!("40 requests, {before} of them from before")), "{told}");
    assert_eq!(said(&batch.answers()), said(&whole.answers()));

    // Nothing is left to do, so nothing is loaded.
    let output = batch.command().arg("--chat-template").arg("no such file").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(lines(&batch.answers()).len(), 40);
}

#[test]
fn nothing_is_sent_before_all_is_looked_at() {
    let batch = Batch::new(&[chat(1, 5), json!({ "custom_id": "x" })]);
    let output = batch.run();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("line 2"), "{error}");
    assert!(!batch.answers().exists());
}

#[test]
fn lines_name_different_models() {
    let model = |id: usize, model: &str| {
        let mut line = chat(id, 5);
        line["body"]["model"] = model.into();
        line
    };
    let batch = Batch::new(&[model(1, "two"), chat(2, 5), model(3, "two"), model(4, "one"), model(5, "three")]);
    let output = batch.command().args(["one=bundled", "two=bundled"]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("1 of 5 requests were refused"), "{error}");
    let lines = lines(&batch.answers());
    let mut answered: Vec<_> = lines
        .iter()
        .map(|line| {
            let (id, body) = (line["custom_id"].as_str().unwrap(), &line["response"]["body"]);
            (id, body["model"].as_str().or(body["error"]["code"].as_str()).unwrap())
        })
        .collect();
    answered.sort_unstable();
    let expected =
        [("chat-1", "two"), ("chat-2", "one"), ("chat-3", "two"), ("chat-4", "one"), ("chat-5", "model_not_found")];
    assert_eq!(answered, expected);
}

#[test]
fn blocks_on_disk_are_found_by_the_next_batch() {
    let prompt = "There was an old house at the end of the lane, and nobody lived in it. ".repeat(8);
    let body = json!({ "prompt": prompt, "max_tokens": 4, "seed": 1 });
    let request = json!({ "custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body });
    let kept = TempDir::new().unwrap();
    let answer = || {
        let batch = Batch::new(std::slice::from_ref(&request));
        let output = batch.command().arg("--kv-cache-dir").arg(kept.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let body = lines(&batch.answers()).remove(0)["response"]["body"].clone();
        let cached = body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        (body["choices"][0]["text"].clone(), cached)
    };
    let (first, again) = (answer(), answer());
    assert_eq!((&first.0, first.1), (&again.0, 0));
    assert!(again.1 >= 64, "{} tokens", again.1);
}
