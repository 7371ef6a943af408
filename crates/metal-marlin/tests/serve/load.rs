//! Many clients at a time: whatever the others do, each gets what it gets alone.

use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{JSON, Response, Server};
use crate::{CHAT, chat, has_gpu, with};

/// A request, by its number: of every kind, many beginning alike.
fn body(index: usize, tokens: usize) -> Value {
    let message = format!("Number {}: what do you see? {}", index % 7, "Tell me more. ".repeat(index % 5 * 4));
    let form = match index % 10 {
        2 => json!({ "type": "json_object" }),
        5 => json!({ "type": "json_schema", "json_schema": { "name": "seen", "schema": {
            "type": "object",
            "properties": { "what": { "type": "string", "maxLength": 10 }, "times": { "type": "integer", "maximum": 9 } },
            "required": ["what", "times"],
            "additionalProperties": false,
        } } }),
        8 => json!({ "type": "grammar", "syntax": "regex", "definition": "(yes|no)(, [a-z]{2,9}){3}" }),
        _ => json!({ "type": "text" }),
    };
    let fields = json!({
        "seed": index,
        "max_tokens": (5 + index * 7 % 60).min(tokens),
        "temperature": (index % 3) as f64 / 2.0,
        "stop": if index.is_multiple_of(4) { json!([" the", "see"]) } else { json!(null) },
        "n": 1 + index % 2,
        "logprobs": index % 3 == 1,
        "stream": index % 4 > 1,
        "response_format": form,
    });
    with(chat(&message), fields)
}

/// Everything that an answer says, whether it came as a stream or not.
fn said(response: &Response, choices: usize) -> Vec<Value> {
    assert_eq!(response.status, 200, "{}", response.body);
    let is_stream = response.headers.contains("text/event-stream");
    let objects = if is_stream { response.events() } else { vec![response.json()] };
    let mut said = vec![(String::new(), Vec::new(), Value::Null); choices];
    for choice in objects.iter().flat_map(|object| object["choices"].as_array().unwrap()) {
        let (text, logprobs, reason) = &mut said[choice["index"].as_u64().unwrap() as usize];
        let message = if is_stream { &choice["delta"] } else { &choice["message"] };
        text.push_str(message["content"].as_str().unwrap_or_default());
        logprobs.extend(choice["logprobs"]["content"].as_array().into_iter().flatten().cloned());
        if !choice["finish_reason"].is_null() {
            *reason = choice["finish_reason"].clone();
        }
    }
    said.into_iter().map(|(text, logprobs, reason)| json!([text, logprobs, reason])).collect()
}

fn ask(server: &Server, index: usize, tokens: usize) -> Vec<Value> {
    let body = body(index, tokens);
    said(&server.post(CHAT, &body), body["n"].as_u64().unwrap() as usize)
}

/// Asks and leaves before the answer is complete.
fn leave(server: &Server, index: usize, tokens: usize, after: usize) {
    let mut stream = server.send("POST", CHAT, JSON, body(index, tokens).to_string().as_bytes());
    // It may have ended already.
    let _ = stream.read_exact(&mut vec![0; after]);
}

/// What there is to do.
struct Load {
    clients: usize,
    /// How many different ones.
    requests: usize,
    /// How many each client sends, if it need not go on for longer.
    each: usize,
    time: Duration,
    /// Tokens of an answer, at most.
    tokens: usize,
}

/// Serves each request alone, then all clients at a time, each of which compares what it gets. Gives the number of answers.
fn run(server: &Server, load: &Load) -> usize {
    let alone: Vec<Vec<Value>> = (0..load.requests).map(|index| ask(server, index, load.tokens)).collect();
    let (started, answers) = (Instant::now(), AtomicUsize::new(0));
    thread::scope(|scope| {
        for client in 0..load.clients {
            let (alone, answers) = (&alone, &answers);
            scope.spawn(move || {
                // Numerical Recipes' generator: every client in an order of its own.
                let mut state = client as u32;
                let mut random = move || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as usize
                };
                let mut sent = 0;
                while sent < load.each || started.elapsed() < load.time {
                    let index = random() % load.requests;
                    if random().is_multiple_of(6) {
                        leave(server, index, load.tokens, random() % 1500);
                    }
                    assert_eq!(ask(server, index, load.tokens), alone[index], "client {client}, request {index}");
                    answers.fetch_add(1, Ordering::Relaxed);
                    sent += 1;
                }
            });
        }
    });
    server.assert_idle();
    answers.into_inner()
}

#[test]
fn many_clients_get_what_each_gets_alone() {
    let server = Server::start(&["--kv-tokens", "512", "--max-running", "8"]);
    run(&server, &Load { clients: 8, requests: 24, each: 24, time: Duration::ZERO, tokens: 60 });
    assert!(server.metric("metal_marlin_preemptions_total") > 0.0, "the KV cache is too small for all");
}

#[test]
fn on_a_gpu_as_well() {
    if !has_gpu() {
        return;
    }
    let server = Server::on("gpu", &["--batch-invariant", "--kv-tokens", "1024", "--max-running", "4"]);
    run(&server, &Load { clients: 4, requests: 6, each: 3, time: Duration::ZERO, tokens: 8 });
}

/// For minutes: besides the answers, the memory of the process stays what it is.
fn run_for_minutes(server: &Server, requests: usize) {
    const MINUTES: Duration = Duration::from_secs(300);
    let load = Load { clients: 64, requests, each: 1, time: MINUTES, tokens: 60 };
    let (answers, memory) = thread::scope(|scope| {
        let run = scope.spawn(|| run(server, &load));
        let mut memory = Vec::new();
        while !run.is_finished() {
            thread::sleep(Duration::from_secs(1));
            memory.extend(server.resident_memory());
        }
        (run.join().unwrap(), memory)
    });
    let metric = |name: &str| server.metric(&format!("metal_marlin_{name}"));
    println!(
        "{answers} answers as alone, {} tokens, {} preemptions",
        metric("generated_tokens_total"),
        metric("preemptions_total")
    );
    // By then every kind of request has been served by many at a time.
    let mebibytes = |at: usize| memory.get(at).map_or(0, |bytes| bytes >> 20);
    let (early, late) = (mebibytes(memory.len() / 3), mebibytes(memory.len().saturating_sub(1)));
    println!("resident memory: {early} MiB after a third of the time, {late} MiB at the end");
    assert!(late <= early + early / 20, "memory grows: {early} MiB, then {late} MiB");
}

#[test]
#[ignore = "five minutes; scripts/test --full"]
fn sixty_four_clients_for_minutes() {
    run_for_minutes(&Server::start(&["--kv-tokens", "8192", "--max-running", "64"]), 120);
}

#[test]
#[ignore = "five minutes and a GPU; scripts/test --full"]
fn sixty_four_clients_for_minutes_on_a_gpu() {
    if has_gpu() {
        run_for_minutes(&Server::on("gpu", &["--batch-invariant", "--kv-tokens", "8192", "--max-running", "64"]), 60);
    }
}
