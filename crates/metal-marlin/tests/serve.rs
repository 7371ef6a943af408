//! `metal-marlin serve` as clients meet it: answers, refusals, faults.
#![cfg(feature = "bundled-model")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A hang is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server of the bundled model in a process of its own.
struct Server {
    process: Child,
    address: SocketAddr,
    /// What it wrote to standard error.
    log: Arc<Mutex<String>>,
}

impl Server {
    fn start(options: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_metal-marlin"))
            .args(["serve", "--port", "0", "--device", "cpu"])
            .args(options)
            .env_remove("METAL_MARLIN_API_KEY")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap());
        let mut first = String::new();
        let address = loop {
            first.clear();
            assert!(lines.read_line(&mut first).unwrap() > 0, "the server ended");
            if let Some((_, rest)) = first.split_once("http://") {
                break rest.split_once('/').unwrap().0.parse().unwrap();
            }
        };
        let log = Arc::new(Mutex::new(String::new()));
        let kept = log.clone();
        thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                kept.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        Self { process, address, log }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request on a connection of its own.
    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses a body need not read it all.
        let _ = stream.write_all(body);
        stream
    }

    fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Response {
        Response::read(self.send(method, path, headers, body))
    }

    fn get(&self, path: &str) -> Response {
        self.request("GET", path, "", b"")
    }

    fn post(&self, path: &str, body: &Value) -> Response {
        self.request("POST", path, JSON, body.to_string().as_bytes())
    }

    /// An answer that must come.
    fn ask(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body);
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()
    }

    /// A number among the metrics.
    fn metric(&self, name: &str) -> f64 {
        let metrics = self.get("/metrics").body;
        let line = metrics.lines().find(|line| line.split([' ', '{']).next() == Some(name));
        line.unwrap_or_else(|| panic!("{name} in {metrics}")).rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    fn wait_for(&self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !is_so(self) {
            assert!(started.elapsed() < PATIENCE, "{what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// No answer is under way, and no block lost.
    fn assert_idle(&self) {
        self.wait_for("requests end", |server| {
            server.metric("metal_marlin_requests_running") + server.metric("metal_marlin_requests_waiting") == 0.0
        });
        assert_eq!(self.metric("metal_marlin_kv_blocks_used"), 0.0);
    }

    fn signal(&self, signal: &str) {
        let killed = Command::new("kill").args([signal, &self.process.id().to_string()]).status().unwrap();
        assert!(killed.success());
    }

    fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "the server goes on");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const JSON: &str = "Content-Type: application/json\r\n";

struct Response {
    status: u16,
    headers: String,
    body: String,
}

impl Response {
    fn read(stream: TcpStream) -> Self {
        let mut stream = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(stream.read_line(&mut head).unwrap() > 0, "no answer: {head}");
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let headers = head.to_lowercase();
        let mut body = Vec::new();
        if headers.contains("transfer-encoding: chunked") {
            loop {
                let mut size = String::new();
                stream.read_line(&mut size).unwrap();
                let size = usize::from_str_radix(size.trim(), 16).unwrap();
                let mut chunk = vec![0; size + 2];
                stream.read_exact(&mut chunk).unwrap();
                body.extend(&chunk[..size]);
                if size == 0 {
                    break;
                }
            }
        } else {
            stream.read_to_end(&mut body).unwrap();
        }
        Self { status, headers, body: String::from_utf8(body).unwrap() }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The message of an error, in OpenAI's shape.
    fn error(&self) -> String {
        let error = &self.json()["error"];
        for field in ["message", "type"] {
            assert!(error[field].is_string(), "{}", self.body);
        }
        error["message"].as_str().unwrap().to_owned()
    }

    /// The objects of a stream.
    fn events(&self) -> Vec<Value> {
        let lines: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(lines.last(), Some(&"[DONE]"), "{}", self.body);
        lines[..lines.len() - 1].iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(message: &str) -> Value {
    json!({ "model": "bundled", "messages": [{ "role": "user", "content": message }], "max_tokens": 12, "seed": 1 })
}

fn with(mut body: Value, fields: Value) -> Value {
    let (Value::Object(body_fields), Value::Object(fields)) = (&mut body, fields) else { panic!("objects") };
    body_fields.extend(fields);
    body
}

/// A text long enough to be in the middle of when something happens.
fn long() -> Value {
    json!({ "model": "bundled", "prompt": "Once", "max_tokens": 900, "ignore_eos": true, "stream": true })
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let server = Server::start(&[]);
    let body = with(chat("Tell me a story."), json!({ "logprobs": true, "top_logprobs": 2, "n": 2 }));
    let whole = server.ask(CHAT, &body);
    let options = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let response = server.post(CHAT, &with(body, options));
    assert!(response.headers.contains("text/event-stream"), "{}", response.headers);
    let events = response.events();
    for choice in whole["choices"].as_array().unwrap() {
        let pieces = || {
            let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
            choices.filter(|piece| piece["index"] == choice["index"])
        };
        let text: String = pieces().filter_map(|piece| piece["delta"]["content"].as_str()).collect();
        assert_eq!(choice["message"]["content"], text);
        let logprobs: Vec<&Value> =
            pieces().filter_map(|piece| piece["logprobs"]["content"].as_array()).flatten().collect();
        assert_eq!(choice["logprobs"]["content"].as_array().unwrap().iter().collect::<Vec<_>>(), logprobs);
        assert_eq!(pieces().next_back().unwrap()["finish_reason"], choice["finish_reason"]);
    }
    let tokens = |usage: &Value| ["prompt_tokens", "completion_tokens", "total_tokens"].map(|name| usage[name].clone());
    assert_eq!(tokens(&events.last().unwrap()["usage"]), tokens(&whole["usage"]));

    let body = json!({ "model": "bundled", "prompt": ["Once", "The"], "max_tokens": 9, "seed": 2, "logprobs": 1, "echo": true });
    let whole = server.ask(TEXT, &body);
    let events = server.post(TEXT, &with(body, json!({ "stream": true }))).events();
    for choice in whole["choices"].as_array().unwrap() {
        let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
        let pieces: Vec<&Value> = choices.filter(|piece| piece["index"] == choice["index"]).collect();
        let text: String = pieces.iter().map(|piece| piece["text"].as_str().unwrap()).collect();
        assert_eq!(choice["text"], text);
        let offsets = pieces.iter().flat_map(|piece| piece["logprobs"]["text_offset"].as_array().unwrap());
        assert_eq!(
            choice["logprobs"]["text_offset"].as_array().unwrap().iter().collect::<Vec<_>>(),
            offsets.collect::<Vec<_>>()
        );
        let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
        assert_eq!(tokens.iter().map(|token| token.as_str().unwrap()).collect::<String>(), text);
    }
    server.assert_idle();
}

#[test]
fn prompts_that_begin_alike_are_told() {
    let server = Server::start(&[]);
    let prompt = "There was an old house at the end of the lane. ".repeat(12);
    let cached = |usage: &Value| usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let body = json!({ "model": "bundled", "prompt": prompt, "max_tokens": 5, "seed": 1 });
    let (first, again) = (server.ask(TEXT, &body), server.ask(TEXT, &body));
    assert_eq!((cached(&first["usage"]), &first["choices"]), (0, &again["choices"]));
    assert!(cached(&again["usage"]) >= 64, "{}", again["usage"]);
    let salted = server.ask(TEXT, &with(body, json!({ "cache_salt": "other" })));
    assert_eq!(cached(&salted["usage"]), 0);
}

#[test]
fn tokens_and_perplexity_are_those_of_the_model() {
    let server = Server::start(&[]);
    let tokens = server.ask("/tokenize", &json!({ "prompt": "Once upon a time" }));
    let text = server.ask("/detokenize", &json!({ "tokens": tokens["tokens"] }));
    assert_eq!((text["prompt"].as_str(), tokens["count"].as_u64()), (Some("Once upon a time"), Some(4)));
    let judged =
        server.ask("/v1/perplexity", &json!({ "model": "bundled", "text": "Once upon a time", "logprobs": true }));
    let echo =
        json!({ "model": "bundled", "prompt": "Once upon a time", "max_tokens": 0, "echo": true, "logprobs": 0 });
    let echoed = server.ask(TEXT, &echo);
    let expected = echoed["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(judged["logprobs"].as_array().unwrap(), &expected[1..]);
    let mean = -expected[1..].iter().map(|logprob| logprob.as_f64().unwrap()).sum::<f64>() / 3.0;
    assert!((judged["perplexity"].as_f64().unwrap() - mean.exp()).abs() < 1e-3, "{judged}");
}

#[test]
fn what_is_wrong_is_said_in_the_shape_of_the_api() {
    let server = Server::start(&["--max-body", "100KiB"]);
    let long_line = "word ".repeat(6000);
    let cases: &[(u16, &str, Value, &str)] = &[
        (400, CHAT, with(chat("x"), json!({ "temperatur": 1 })), "temperatur is not supported"),
        (400, CHAT, with(chat("x"), json!({ "temperature": -1 })), "temperature must be a number from 0 up"),
        (400, CHAT, with(chat("x"), json!({ "top_logprobs": 1 })), "top_logprobs need logprobs"),
        (400, CHAT, with(chat("x"), json!({ "stream_options": {} })), "set stream to true"),
        (400, CHAT, with(chat("x"), json!({ "messages": [] })), "there are no messages"),
        (400, CHAT, with(chat("x"), json!({ "messages": [{ "role": "king", "content": "x" }] })), "messages[0].role"),
        (400, CHAT, with(chat("x"), json!({ "n": 0 })), "n must be between 1 and"),
        (400, CHAT, with(chat("x"), json!({ "logit_bias": { "99999999": 1 } })), "outside the vocabulary"),
        (400, CHAT, with(chat("x"), json!({ "stop_token_ids": [99_999_999] })), "outside the vocabulary"),
        (400, CHAT, with(chat("x"), json!({ "stop": "" })), "stop must be a text"),
        (400, CHAT, with(chat("x"), json!({ "tool_choice": "required" })), "there are no tools"),
        (400, CHAT, with(chat("x"), json!({ "max_completion_tokens": 3 })), "give one of them"),
        (400, TEXT, json!({ "model": "bundled", "prompt": long_line }), "the context of 1024 tokens must hold it"),
        (400, TEXT, json!({ "model": "bundled", "prompt": [] }), "between 1 and 128 prompts"),
        (404, TEXT, json!({ "model": "other", "prompt": "x" }), "this server has bundled"),
        (400, "/detokenize", json!({ "tokens": [99_999_999] }), "outside the vocabulary"),
        (400, "/v1/perplexity", json!({ "model": "bundled", "text": "x" }), "at least 2 tokens"),
        (413, TEXT, json!({ "model": "bundled", "prompt": "x".repeat(200_000) }), "--max-body"),
        (404, "/v1/embeddings", json!({}), "/openapi.json lists what there is"),
    ];
    for (status, path, body, message) in cases {
        let response = server.post(path, body);
        let error = response.error();
        assert_eq!((response.status, error.contains(message)), (*status, true), "{error}, wanted {message}");
    }
    let odd: &[(u16, &str, &str, Vec<u8>, &str)] = &[
        (405, "GET", "", Vec::new(), "does not take GET"),
        (415, "POST", "Content-Type: text/plain\r\n", b"{}".to_vec(), "Content-Type: application/json"),
        (400, "POST", JSON, b"{\"model\": \"\xff\"}".to_vec(), "invalid unicode"),
        (400, "POST", JSON, b"{\"model\": ".to_vec(), "EOF"),
        (400, "POST", JSON, ["[".repeat(50_000), "]".repeat(40_000)].concat().into_bytes(), ""),
    ];
    for (status, method, headers, body, message) in odd {
        let response = server.request(method, CHAT, headers, body);
        let error = response.error();
        assert_eq!((response.status, error.contains(message)), (*status, true), "{error}, wanted {message}");
    }
    server.assert_idle();
}

#[test]
fn answers_have_the_form_that_is_asked_for() {
    let server = Server::start(&[]);
    let content = |answer: &Value| answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let schema = json!({
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 12 }, "age": { "type": "integer", "minimum": 1, "maximum": 99 } },
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "person", "strict": true, "schema": schema } });
    for seed in 0..5 {
        let body = with(chat("Who are you?"), json!({ "response_format": format, "max_tokens": 200, "seed": seed }));
        let answer: Value = serde_json::from_str(&content(&server.ask(CHAT, &body))).unwrap();
        assert!(answer["name"].is_string() && (1..=99).contains(&answer["age"].as_i64().unwrap()), "{answer}");
    }
    let grammar = json!({ "type": "grammar", "syntax": "regex", "definition": "(yes|no), [0-9]{3}" });
    let text = content(&server.ask(CHAT, &with(chat("Well?"), json!({ "response_format": grammar }))));
    assert!((text.starts_with("yes, ") || text.starts_with("no, ")) && text.len() >= 7, "{text}");
    let grammar = json!({ "type": "grammar", "syntax": "lark", "definition": "start: \"a\" start \"b\" | \"c\"" });
    let body = json!({ "model": "bundled", "prompt": "x", "response_format": grammar, "max_tokens": 50, "seed": 3 });
    let text = server.ask(TEXT, &body)["choices"][0]["text"].as_str().unwrap().to_owned();
    let (before, after) = text.split_once('c').unwrap();
    assert!(
        before.len() == after.len() && before.bytes().all(|b| b == b'a') && after.bytes().all(|b| b == b'b'),
        "{text}"
    );

    let unknown =
        json!({ "type": "json_schema", "json_schema": { "schema": { "type": "string", "format": "moon-phase" } } });
    let refused = server.post(CHAT, &with(chat("x"), json!({ "response_format": unknown })));
    assert_eq!((refused.status, refused.error().contains("moon-phase")), (400, true), "{}", refused.body);
    server.assert_idle();
}

#[test]
fn a_call_that_is_demanded_is_made() {
    let server = Server::start(&[]);
    let tools = json!([
        { "type": "function", "function": { "name": "now", "description": "Tells the time." } },
        { "type": "function", "function": { "name": "weather", "parameters": {
            "type": "object",
            "properties": { "day": { "$ref": "#/$defs/Day" } },
            "required": ["day"],
            "additionalProperties": false,
            "$defs": { "Day": { "enum": ["today", "tomorrow"] } },
        } } },
    ]);
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    let body = with(chat("What is the weather?"), json!({ "tools": tools, "tool_choice": named, "max_tokens": 100 }));
    let answer = server.ask(CHAT, &body);
    let choice = &answer["choices"][0];
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&choice["finish_reason"], &call["function"]["name"]), (&json!("tool_calls"), &json!("weather")));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!([json!({ "day": "today" }), json!({ "day": "tomorrow" })].contains(&arguments), "{arguments}");
    assert_eq!(choice["message"]["content"], Value::Null);

    // The same as a stream.
    let events = server.post(CHAT, &with(body, json!({ "stream": true }))).events();
    let deltas = || events.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].as_array()).flatten();
    assert_eq!(deltas().next().unwrap()["function"]["name"], "weather");
    let streamed: String = deltas().map(|delta| delta["function"]["arguments"].as_str().unwrap()).collect();
    assert_eq!(serde_json::from_str::<Value>(&streamed).unwrap(), arguments);
    assert!(events.iter().all(|event| event["choices"][0]["delta"]["content"].as_str().is_none_or(str::is_empty)));

    let required = with(chat("Well?"), json!({ "tools": tools, "tool_choice": "required", "max_tokens": 100 }));
    let answer = server.ask(CHAT, &required);
    let name = answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"].as_str().unwrap();
    assert!(["now", "weather"].contains(&name), "{name}");
    let other = json!({ "type": "function", "function": { "name": "other" } });
    let refused = server.post(CHAT, &with(required, json!({ "tool_choice": other })));
    assert_eq!((refused.status, refused.error().contains("no tool \"other\"")), (400, true));
}

#[test]
fn who_leaves_takes_the_request_along() {
    let server = Server::start(&[]);
    // While it streams, and before the answer to one that does not.
    for body in [long(), with(long(), json!({ "stream": false }))] {
        let stream = server.send("POST", TEXT, JSON, body.to_string().as_bytes());
        server.wait_for("it runs", |server| server.metric("metal_marlin_requests_running") == 1.0);
        drop(stream);
        server.assert_idle();
    }
    assert!(server.metric("metal_marlin_generated_tokens_total") < 1700.0, "neither was finished");
}

#[test]
fn requests_beyond_the_queue_are_told_to_come_again() {
    let server = Server::start(&["--max-running", "1", "--max-waiting", "1"]);
    let running = server.send("POST", TEXT, JSON, long().to_string().as_bytes());
    server.wait_for("it runs", |server| server.metric("metal_marlin_requests_running") == 1.0);
    let waiting = server.send("POST", TEXT, JSON, long().to_string().as_bytes());
    server.wait_for("it waits", |server| server.metric("metal_marlin_requests_waiting") == 1.0);
    let refused = server.post(TEXT, &long());
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.headers.contains("retry-after: 1") && refused.error().contains("try again later"));
    drop((running, waiting));
    server.assert_idle();
}

#[test]
fn an_answer_that_takes_too_long_ends() {
    let server = Server::start(&["--timeout", "1", "--threads", "1"]);
    let prompts = vec!["Once"; 100];
    let body = json!({ "model": "bundled", "prompt": prompts, "max_tokens": 900, "ignore_eos": true });
    let response = server.post(TEXT, &body);
    assert_eq!((response.status, response.error().contains("--timeout")), (504, true), "{}", response.body);
    let streamed = server.post(TEXT, &with(body, json!({ "stream": true })));
    assert_eq!(streamed.status, 200);
    assert!(streamed.events().last().unwrap()["error"]["message"].as_str().unwrap().contains("--timeout"));
    server.assert_idle();
}

#[test]
fn keys_and_origins_are_checked_if_asked() {
    let server = Server::start(&["--api-key", "secret", "--api-key", "other", "--cors-origin", "https://example.org"]);
    assert_eq!(server.get("/health").status, 200);
    for (header, status) in [
        ("", 401),
        ("Authorization: Bearer wrong\r\n", 401),
        ("Authorization: secret\r\n", 401),
        ("Authorization: Bearer secret\r\n", 200),
        ("authorization: bearer other\r\n", 200),
    ] {
        let response = server.request("GET", "/v1/models", header, b"");
        assert_eq!(response.status, status, "{header}");
        if status == 401 {
            assert!(!response.error().contains("secret"));
        }
    }
    let origin = |server: &Server, origin: &str| {
        let header = format!("Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n");
        server
            .request("OPTIONS", CHAT, &header, b"")
            .headers
            .contains("access-control-allow-origin: https://example.org")
    };
    assert!(origin(&server, "https://example.org") && !origin(&server, "https://example.com"));
    assert!(!origin(&Server::start(&[]), "https://example.org"));
}

#[test]
fn a_signal_lets_streams_end() {
    let mut server = Server::start(&[]);
    let body = with(long(), json!({ "max_tokens": 300 }));
    let stream = server.send("POST", TEXT, JSON, body.to_string().as_bytes());
    server.wait_for("it runs", |server| server.metric("metal_marlin_requests_running") == 1.0);
    server.signal("-TERM");
    let response = Response::read(stream);
    assert_eq!(response.events().last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(server.wait().code(), Some(0));

    // Who does not want to wait says so twice.
    let mut server = Server::start(&[]);
    let _stream = server.send("POST", TEXT, JSON, long().to_string().as_bytes());
    server.wait_for("it runs", |server| server.metric("metal_marlin_requests_running") == 1.0);
    server.signal("-TERM");
    server.wait_for("it drains", |server| server.log.lock().unwrap().contains("draining"));
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(143));
}

#[test]
fn slow_and_silent_clients_hold_nobody_up() {
    let server = Server::start(&[]);
    // One reads a byte now and then, one sends half of its headers, one half of its body, one nothing.
    let mut slow = server.send("POST", TEXT, JSON, long().to_string().as_bytes());
    let mut half_head = server.connect();
    half_head.write_all(b"POST /v1/completions HTTP/1.1\r\nHost:").unwrap();
    let mut half_body = server.connect();
    half_body
        .write_all(format!("POST {TEXT} HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: 100\r\n\r\n{{").as_bytes())
        .unwrap();
    let _silent: Vec<TcpStream> = (0..50).map(|_| server.connect()).collect();
    for _ in 0..3 {
        slow.read_exact(&mut [0]).unwrap();
        assert_eq!(server.post(CHAT, &chat("Hello")).status, 200);
    }
    // The slow reader's answer is computed all the same, and waits for it.
    server.assert_idle();
}

#[test]
fn nothing_that_was_said_is_logged_unless_asked() {
    for (options, is_logged) in [(&[][..], false), (&["--log-prompts"][..], true)] {
        let server = Server::start(options);
        server.ask(CHAT, &chat("Aardvark"));
        server.wait_for("a line of the log", |server| server.log.lock().unwrap().contains(CHAT));
        assert_eq!(server.log.lock().unwrap().contains("Aardvark"), is_logged);
    }
}

#[test]
fn many_clients_get_what_each_gets_alone() {
    let server = Server::start(&["--kv-tokens", "1024", "--max-running", "8"]);
    let body = |index: usize| {
        let message = format!("Number {}: what do you see? {}", index % 7, "Tell me more. ".repeat(index % 5 * 4));
        let fields = json!({
            "seed": index, "max_tokens": 5 + index * 7 % 60, "temperature": (index % 3) as f64 / 2.0, "stop": if index.is_multiple_of(4) { json!(" the") } else { json!(null) },
            "n": 1 + index % 2,
            "response_format": if index % 5 == 2 { json!({ "type": "json_object" }) } else { json!({ "type": "text" }) },
        });
        with(chat(&message), fields)
    };
    let ask = |server: &Server, index: usize| server.ask(CHAT, &body(index))["choices"].clone();
    let alone: Vec<Value> = (0..24).map(|index| ask(&server, index)).collect();
    thread::scope(|scope| {
        for client in 0..8_usize {
            let (server, alone) = (&server, &alone);
            scope.spawn(move || {
                for index in (0..24).map(|index| (index * 5 + client * 3) % 24) {
                    if (index + client).is_multiple_of(6) {
                        // Somebody leaves in the middle.
                        let body = with(body(index), json!({ "stream": true }));
                        let mut stream = server.send("POST", CHAT, JSON, body.to_string().as_bytes());
                        stream.read_exact(&mut [0; 20]).unwrap();
                    }
                    assert_eq!(ask(server, index), alone[index], "client {client}, request {index}");
                }
            });
        }
    });
    server.assert_idle();
}
