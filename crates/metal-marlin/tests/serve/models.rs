//! Several models in one server.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::server::{JSON, PATIENCE, Response, Server};
use crate::{CHAT, TEXT, chat, has_gpu, long, with};

/// The bundled model's folder.
const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/model");

/// Copies of the bundled model in a folder, each of which says something else than the others.
struct Copies(TempDir);

impl Copies {
    /// Copies of these names. The later ones turn positions into other angles.
    fn new(names: &[&str]) -> Self {
        let copies = Self(TempDir::new().unwrap());
        for (place, name) in (0..).zip(names) {
            let theta = |config: &mut Value| {
                let theta = config["rope_theta"].as_f64().or(config["rope_parameters"]["rope_theta"].as_f64()).unwrap();
                let theta = theta * f64::powi(7.0, place);
                config["rope_theta"] = theta.into();
                if config["rope_parameters"].is_object() {
                    config["rope_parameters"]["rope_theta"] = theta.into();
                }
            };
            copies.add(name, theta);
        }
        copies
    }

    fn add(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let folder = self.0.path().join(name);
        fs::create_dir(&folder).unwrap();
        for file in fs::read_dir(BUNDLED).unwrap() {
            let file = file.unwrap();
            symlink(file.path(), folder.join(file.file_name())).unwrap();
        }
        let mut config = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        edit(&mut config);
        fs::remove_file(folder.join("config.json")).unwrap();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
    }

    fn folder(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// A server of all of them.
    fn start(&self, options: &[&str]) -> Server {
        Server::start(&[&["--models-dir", self.folder(), "--no-cache", "--threads", "1"], options].concat())
    }
}

/// Bytes for `models` and a half copies of the bundled model with a small KV cache.
fn memory_for(models: usize) -> String {
    let command = ["plan", BUNDLED, "--device", "cpu", "--context", "256", "--json", "--memory", "16GiB"];
    let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(command).output().unwrap();
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    (plan["total_bytes"].as_u64().unwrap() * (2 * models as u64 + 1) / 2).to_string()
}

/// Options under which each copy takes what [`memory_for`] counts.
const SMALL: [&str; 4] = ["--context", "256", "--kv-tokens", "256"];

fn of(model: &str, body: Value) -> Value {
    with(body, json!({ "model": model }))
}

/// What a model says to a message.
fn said(server: &Server, model: &str, message: &str) -> String {
    let answer = server.ask(CHAT, &of(model, chat(message)));
    assert_eq!(answer["model"], model);
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// The names of the models, and of those that are loaded.
fn listed(server: &Server) -> (Vec<String>, Vec<String>) {
    let list = server.get("/v1/models").json();
    let models = list["data"].as_array().unwrap();
    let name = |model: &Value| model["id"].as_str().unwrap().to_owned();
    for model in models {
        assert_eq!(model["max_model_len"].is_u64(), model["status"] == "loaded", "{model}");
        assert_eq!(server.get(&format!("/v1/models/{}", name(model))).json()["id"], model["id"]);
    }
    let loaded = models.iter().filter(|model| model["status"] == "loaded");
    (models.iter().map(name).collect(), loaded.map(name).collect())
}

fn loaded(server: &Server) -> Vec<String> {
    listed(server).1
}

#[test]
fn models_answer_as_each_does_alone() {
    let copies = Copies::new(&["alpha", "beta"]);
    let [alone_a, alone_b] = ["alpha", "beta"].map(|name| {
        let server = Server::start(&[&copies.path(name), "--no-cache", "--threads", "1"]);
        (0..3).map(|n| said(&server, name, &format!("Number {n}?"))).collect::<Vec<_>>()
    });
    assert_ne!(alone_a, alone_b, "they can be told apart");

    let server = copies.start(&[]);
    assert_eq!(listed(&server), (vec!["alpha".to_owned(), "beta".to_owned()], Vec::new()));
    assert_eq!(server.get("/health").status, 200);
    thread::scope(|scope| {
        for n in 0..3 {
            let (server, alone_a, alone_b) = (&server, &alone_a, &alone_b);
            scope.spawn(move || assert_eq!(said(server, "alpha", &format!("Number {n}?")), alone_a[n]));
            scope.spawn(move || assert_eq!(said(server, "beta", &format!("Number {n}?")), alone_b[n]));
        }
    });
    assert_eq!(loaded(&server), ["alpha", "beta"]);
    assert_eq!(server.metric("metal_marlin_models_loaded"), 2.0);
    // Metrics are those of the last step, which may be told after its tokens.
    server.assert_idle();
    let metrics = server.get("/metrics").body;
    for line in [
        "metal_marlin_model_loads_total{model=\"alpha\",result=\"loaded\"} 1",
        "metal_marlin_answers_total{model=\"beta\",reason=\"length\"} 3",
        "metal_marlin_requests_running{model=\"alpha\"} 0",
        "metal_marlin_time_to_first_token_seconds_count{model=\"beta\"} 3",
    ] {
        assert!(metrics.lines().any(|other| other == line), "{line} in {metrics}");
    }

    // Where a request may be silent, it is for the first one; elsewhere the model must be one of them.
    let tokens = server.ask("/tokenize", &json!({ "prompt": "Once upon a time" }));
    assert_eq!(tokens, server.ask("/tokenize", &json!({ "prompt": "Once upon a time", "model": "beta" })));
    let scored = |body: Value| server.ask("/v1/perplexity", &with(body, json!({ "text": "Once upon a time" })));
    assert_eq!(scored(json!({})), scored(json!({ "model": "alpha" })));
    assert_ne!(scored(json!({}))["perplexity"], scored(json!({ "model": "beta" }))["perplexity"]);
    let unknown = server.post(CHAT, &of("gamma", chat("x")));
    assert_eq!((unknown.status, unknown.error().contains("this server has alpha, beta")), (404, true));
    assert_eq!(unknown.json()["error"]["code"], "model_not_found");
    assert_eq!(server.get("/v1/models/gamma").status, 404);
    let schemas = &server.get("/openapi.json").json()["components"]["schemas"];
    assert_eq!(schemas["ChatRequest"]["properties"]["model"]["enum"], json!(["alpha", "beta"]));

    // A conversation goes on with another model.
    let first = server.ask("/v1/responses", &json!({ "model": "alpha", "input": "Hello", "max_output_tokens": 4 }));
    let body = json!({ "model": "beta", "input": "And?", "max_output_tokens": 4, "previous_response_id": first["id"] });
    let second = server.ask("/v1/responses", &body);
    assert_eq!((&second["model"], &second["previous_response_id"]), (&json!("beta"), &first["id"]));
    assert_eq!(server.get(&format!("/v1/responses/{}", first["id"].as_str().unwrap())).json()["model"], "alpha");
    server.assert_idle();
}

#[test]
fn the_first_model_is_loaded_at_once_and_others_are_when_they_are_named() {
    let copies = Copies::new(&["alpha", "beta"]);
    let beta = format!("b={}", copies.path("beta"));
    let server = Server::start(&["bundled", &beta, "--served-name", "one", "--served-name", "two", "--no-cache"]);
    let all = ["one", "two", "b"].map(str::to_owned).to_vec();
    assert_eq!(listed(&server), (all, vec!["one".to_owned(), "two".to_owned()]));
    said(&server, "b", "Hello");
    assert_eq!(loaded(&server), ["one", "two", "b"]);
    let answer = server.ask(CHAT, &of("two", chat("Hello")));
    assert_eq!(answer["model"], "one", "the first name is its own");
}

#[test]
fn the_least_recently_used_makes_room() {
    let copies = Copies::new(&["alpha", "beta", "gamma"]);
    let memory = memory_for(2);
    let server = copies.start(&[&SMALL[..], &["--memory", &memory]].concat());
    let first = said(&server, "alpha", "Hello");
    said(&server, "beta", "Hello");
    said(&server, "alpha", "Hello");
    said(&server, "gamma", "Hello");
    assert_eq!(loaded(&server), ["alpha", "gamma"]);
    // Counters go on where they were.
    let beta = |server: &Server| {
        let metrics = server.get("/metrics").body;
        let line =
            metrics.lines().find_map(|line| line.strip_prefix("metal_marlin_generated_tokens_total{model=\"beta\"} "));
        line.unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(beta(&server), 12);
    said(&server, "beta", "Hello");
    assert_eq!(loaded(&server), ["beta", "gamma"]);
    server.wait_for("counters go on", |server| beta(server) == 24);
    assert_eq!(said(&server, "alpha", "Hello"), first);
    assert!(server.get("/metrics").body.contains("model_unloads_total{model=\"beta\",reason=\"memory\"} 1"));
    server.assert_idle();
}

#[test]
fn who_finds_no_room_waits_for_a_model_in_use() {
    let copies = Copies::new(&["alpha", "beta"]);
    let memory = memory_for(1);
    let server = copies.start(&[&SMALL[..], &["--memory", &memory]].concat());
    let body = of("alpha", with(long(), json!({ "max_tokens": 60 })));
    let stream = server.send("POST", TEXT, JSON, body.to_string().as_bytes());
    server.wait_for("it runs", |server| server.metric("metal_marlin_requests_running") > 0.0);
    said(&server, "beta", "Hello");
    assert_eq!(loaded(&server), ["beta"]);
    let events = Response::read(stream).events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn what_fits_in_no_case_unloads_nothing() {
    let Some(models) = std::env::var_os("METAL_MARLIN_MODELS") else { return };
    let large = format!("large={}", Path::new(&models).join("tiny-qwen3").display());
    let memory = memory_for(1);
    let server = Server::start(&[&["bundled", &large, "--no-cache", "--memory", &memory], &SMALL[..]].concat());
    let refused = server.post(CHAT, &of("large", chat("Hello")));
    let error = refused.error();
    assert!(refused.status == 503 && refused.headers.contains("retry-after: 1"), "{}: {error}", refused.status);
    assert!(error.contains(" needs ") && error.contains("are available"), "{error}");
    assert_eq!(loaded(&server), ["bundled"]);
    assert!(server.get("/metrics").body.contains("model_loads_total{model=\"large\",result=\"failed\"} 1"));
}

#[test]
fn a_model_that_is_broken_is_tried_again() {
    let copies = Copies::new(&["alpha", "beta"]);
    let weights = copies.0.path().join("beta/model.safetensors");
    fs::remove_file(&weights).unwrap();
    fs::write(&weights, b"no weights").unwrap();
    let server = copies.start(&[]);
    let refused = server.post(CHAT, &of("beta", chat("Hello")));
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (500, &json!("model_not_loaded")));
    assert!(refused.error().contains("model.safetensors"), "{}", refused.body);
    let anthropic = json!({ "model": "beta", "max_tokens": 4, "messages": [{ "role": "user", "content": "Hello" }] });
    assert_eq!(server.post("/v1/messages", &anthropic).json()["error"]["type"], "api_error");
    said(&server, "alpha", "Hello");
    fs::remove_file(&weights).unwrap();
    symlink(Path::new(BUNDLED).join("model.safetensors"), &weights).unwrap();
    said(&server, "beta", "Hello");
}

#[test]
fn idle_models_are_unloaded() {
    let server = Server::start(&["--idle-unload", "1s", "--threads", "1"]);
    let first = said(&server, "bundled", "Hello");
    // One in use is not idle.
    let body = with(long(), json!({ "prompt": vec!["Once"; 4], "max_tokens": 60 }));
    let stream = server.send("POST", TEXT, JSON, body.to_string().as_bytes());
    let events = Response::read(stream).events();
    assert_eq!(events.iter().filter(|event| event["choices"][0]["finish_reason"] == "length").count(), 4);
    let before = server.resident_memory();
    server.wait_for("it is unloaded", |server| server.metric("metal_marlin_models_loaded") == 0.0);
    assert_eq!((loaded(&server).len(), server.get("/health").status), (0, 200));
    if let Some(before) = before {
        server.wait_for("its memory goes back", |server| {
            server.resident_memory().is_some_and(|after| after + (10 << 20) < before)
        });
    }
    assert_eq!(said(&server, "bundled", "Hello"), first);
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("metal_marlin_model_unloads_total{model=\"bundled\",reason=\"idle\"} 1"), "{metrics}");
}

/// Clients that switch between four models where there is room for two, some of which leave early, while idle models are unloaded, too.
#[test]
fn many_clients_switch_models() {
    let names = ["alpha", "beta", "gamma", "delta"];
    let copies = Copies::new(&names);
    let messages = 3;
    let alone: Vec<Vec<String>> = {
        let server = copies.start(&SMALL);
        let of_model = |name: &&str| (0..messages).map(|n| said(&server, name, &format!("Number {n}?"))).collect();
        names.iter().map(of_model).collect()
    };
    let memory = memory_for(2);
    let server = copies.start(&[&SMALL[..], &["--memory", &memory, "--idle-unload", "1s"]].concat());
    let answers = AtomicUsize::new(0);
    thread::scope(|scope| {
        for client in 0..6_u32 {
            let (server, alone, answers) = (&server, &alone, &answers);
            scope.spawn(move || {
                // Numerical Recipes' generator.
                let mut state = client;
                let mut random = move || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as usize
                };
                for _ in 0..8 {
                    let (model, message) = (random() % names.len(), random() % messages);
                    let text = format!("Number {message}?");
                    if random().is_multiple_of(4) {
                        let body = of(names[random() % names.len()], chat(&text));
                        drop(server.send("POST", CHAT, JSON, body.to_string().as_bytes()));
                    }
                    assert_eq!(said(server, names[model], &text), alone[model][message], "{} {message}", names[model]);
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(answers.into_inner(), 48);
    let metrics = server.get("/metrics").body;
    let unloads = metrics.lines().filter(|line| line.contains("model_unloads_total{") && line.contains("memory"));
    let unloads: u64 = unloads.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).sum();
    assert!(unloads >= 2, "{unloads} models made room");
    println!("{unloads} models made room for others");
    server.wait_for("all are idle", |server| server.metric("metal_marlin_models_loaded") == 0.0);
}

#[test]
fn an_end_does_not_wait_for_a_load() {
    let copies = Copies::new(&["alpha", "stuck"]);
    // Who reads a pipe waits for somebody who writes.
    let tokenizer = copies.0.path().join("stuck/tokenizer.json");
    fs::remove_file(&tokenizer).unwrap();
    assert!(Command::new("mkfifo").arg(&tokenizer).status().unwrap().success());
    let mut server = copies.start(&["--drain", "1"]);
    let stream = server.send("POST", CHAT, JSON, of("stuck", chat("Hello")).to_string().as_bytes());
    let is_loading = |server: &Server| server.get("/v1/models/stuck").json()["status"] == "loading";
    server.wait_for("it is loading", is_loading);
    // It waits for the load, as only one is done at a time.
    let leaves = server.send("POST", CHAT, JSON, of("alpha", chat("Hello")).to_string().as_bytes());
    drop(leaves);
    server.signal("-TERM");
    let started = Instant::now();
    let response = Response::read(stream);
    assert_eq!((response.status, response.error().contains("shutting down")), (503, true), "{}", response.body);
    assert_eq!(server.wait().code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(10) && started.elapsed() < PATIENCE);
}

/// A server whose model guesses for itself has less room for keys and values.
#[test]
fn a_draft_model_takes_its_share_of_the_memory() {
    let memory = memory_for(2);
    let options = ["bundled", "--no-cache", "--threads", "1", "--memory", &memory];
    let alone = Server::start(&options);
    let together = Server::start(&[&options[..], &["--draft-model", "bundled"]].concat());
    let [alone, together] = [alone, together].map(|server| {
        let prompt = json!({ "prompt": "Once upon a time", "max_tokens": 8 });
        assert_eq!(server.ask(TEXT, &of("bundled", prompt))["model"], "bundled");
        server.metric("metal_marlin_kv_blocks")
    });
    assert!(2.0 <= together && together < alone, "{together} blocks beside the draft model, {alone} without");
}

#[test]
fn models_share_a_gpu() {
    if !has_gpu() {
        return;
    }
    let copies = Copies::new(&["alpha", "beta"]);
    let options = ["--models-dir", copies.folder(), "--no-cache", "--context", "128", "--kv-tokens", "256"];
    let server = Server::on("gpu", &[&options[..], &["--idle-unload", "2s", "--batch-invariant"]].concat());
    let mut before: Vec<String> = Vec::new();
    for _ in 0..2 {
        let answers = thread::scope(|scope| {
            let ask = |name: &'static str| {
                let server = &server;
                scope.spawn(move || said(server, name, "Tell me a story about a dog."))
            };
            ["alpha", "beta"].map(ask).map(|answer| answer.join().unwrap())
        });
        assert_ne!(answers[0], answers[1]);
        assert!(before.is_empty() || before == answers, "{before:?}, then {answers:?}");
        before = answers.to_vec();
        server.wait_for("both are unloaded", |server| server.metric("metal_marlin_models_loaded") == 0.0);
    }
}

#[test]
fn models_that_cannot_be_served_are_told_at_the_start() {
    let copies = Copies::new(&["alpha"]);
    let refused = |options: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).arg("serve").args(options).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let (alpha, folder) = (copies.path("alpha"), copies.folder());
    let cases: &[(&[&str], &str)] = &[
        (&["bundled", &alpha, "--served-name", "alpha"], "two models have the name alpha"),
        (&["--models-dir", "no/such/folder"], "cannot read the folder of models no/such/folder"),
        (&["--models-dir", &alpha], "there is no model in"),
        (&["--models-dir", folder, "--served-name", "x"], "--served-name is about one model"),
        (&["--models-dir", folder, "--draft-model", "bundled"], "--draft-model is about one model"),
        (&["bundled", &alpha, "--format", "fp4", "--no-cache"], "--no-cache quantises one model"),
        (&["x=no/such/model"], "no/such/model"),
        (&["--idle-unload", "10"], "10m"),
    ];
    for (options, problem) in cases {
        let error = refused(options);
        assert!(error.contains(problem), "{problem}: {error}");
    }
}
