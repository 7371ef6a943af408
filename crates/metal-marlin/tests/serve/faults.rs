//! Requests that are wrong, clients that are slow or leave, and an end in the middle.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::server::{JSON, Response, Server};
use crate::{CHAT, TEXT, chat, long, with};

#[test]
fn what_is_wrong_is_said_in_the_shape_of_the_api() {
    let server = Server::start(&["--max-body", "150KiB"]);
    let long_line = "word ".repeat(20_000);
    let cases: &[(u16, &str, Value, &str)] = &[
        (400, CHAT, with(chat("x"), json!({ "temperatur": 1 })), "temperatur is not supported"),
        (400, CHAT, with(chat("x"), json!({ "temperature": -1 })), "temperature must be a number from 0 up"),
        (400, CHAT, with(chat("x"), json!({ "top_logprobs": 1 })), "top_logprobs need logprobs"),
        (400, CHAT, with(chat("x"), json!({ "stream_options": {} })), "set stream to true"),
        (400, CHAT, with(chat("x"), json!({ "messages": [] })), "there are no messages"),
        (400, CHAT, with(chat("x"), json!({ "messages": [{ "role": "king", "content": "x" }] })), "messages[0].role"),
        (400, CHAT, with(chat("x"), json!({ "n": 0 })), "n must be between 1 and"),
        (
            400,
            CHAT,
            json!({ "model": "bundled", "messages": [{ "role": "user", "content": [{ "type": 0, "text": "x" }] }] }),
            "content",
        ),
        (
            400,
            "/v1/responses",
            json!({ "model": "bundled", "input": [{ "type": 0, "role": "user", "content": "x" }] }),
            "input",
        ),
        (400, CHAT, with(chat("x"), json!({ "logit_bias": { "99999999": 1 } })), "outside the vocabulary"),
        (400, CHAT, with(chat("x"), json!({ "stop_token_ids": [99_999_999] })), "outside the vocabulary"),
        (400, CHAT, with(chat("x"), json!({ "stop": "" })), "stop must be a text"),
        (400, CHAT, with(chat("x"), json!({ "tool_choice": "required" })), "there are no tools"),
        (400, CHAT, with(chat("x"), json!({ "max_completion_tokens": 3 })), "give one of them"),
        (400, TEXT, json!({ "model": "bundled", "prompt": long_line }), "the context of 1024 tokens must hold it"),
        (400, CHAT, chat(&"x".repeat(100_000)), "the context of 1024 tokens must hold it"),
        (400, TEXT, json!({ "model": "bundled", "prompt": [] }), "between 1 and 128 texts"),
        (404, TEXT, json!({ "model": "other", "prompt": "x" }), "this server has bundled"),
        (400, "/detokenize", json!({ "tokens": [99_999_999] }), "outside the vocabulary"),
        (400, "/v1/perplexity", json!({ "model": "bundled", "text": "x" }), "at least 2 tokens"),
        (413, TEXT, json!({ "model": "bundled", "prompt": "x".repeat(200_000) }), "--max-body"),
        (400, "/v1/embeddings", json!({ "model": "bundled", "input": [] }), "between 1 and 2048 texts"),
        (400, "/v1/embeddings", json!({ "model": "bundled", "input": [[5], []] }), "text 1 of the input is empty"),
        (400, "/v1/embeddings", json!({ "model": "bundled", "input": "x", "dimensions": 513 }), "512 values"),
        (404, "/v1/rerank", json!({}), "/openapi.json lists what there is"),
    ];
    for (status, path, body, message) in cases {
        let response = server.post(path, body);
        let error = response.error();
        assert_eq!((response.status, error.contains(message)), (*status, true), "{error}, wanted {message}");
    }
    // Out of bounds by less than an f32 can tell.
    let text = json!({ "model": "bundled", "prompt": "x" });
    let input = json!({ "model": "bundled", "input": "x" });
    let turns = json!({ "model": "bundled", "max_tokens": 1, "messages": [{ "role": "user", "content": "x" }] });
    let slight = [
        (CHAT, chat("x"), "temperature", -1e-60),
        (CHAT, chat("x"), "frequency_penalty", 2.000_000_000_000_001),
        (CHAT, chat("x"), "presence_penalty", -2.000_000_000_000_001),
        (TEXT, text.clone(), "min_p", 1.000_000_000_000_001),
        (TEXT, text.clone(), "top_p", 1.000_000_000_000_001),
        ("/v1/responses", input, "top_p", 1.000_000_000_000_001),
        ("/v1/messages", turns, "top_p", 1.000_000_000_000_001),
    ];
    for (path, body, name, number) in slight {
        let response = server.post(path, &with(body, json!({ name: number })));
        let begins = format!("{name} must be ");
        assert!(response.status == 400 && response.error().starts_with(&begins), "{path} {name}: {}", response.body);
    }
    let bias = server.post(TEXT, &with(text.clone(), json!({ "logit_bias": { "1": 100.000_000_1 } })));
    assert!(bias.error().contains("a bias must be between -100 and 100, found 100.0000001"), "{}", bias.body);
    let extremes = json!({ "repetition_penalty": 1e-60, "temperature": 1e300, "top_p": 1e-60, "max_tokens": 4 });
    assert_eq!(server.ask(TEXT, &with(text, extremes))["choices"].as_array().unwrap().len(), 1);
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
    let tokens = server.ask("/tokenize", &json!({ "prompt": "x".repeat(100_000) }));
    assert!(tokens["count"].as_u64().unwrap() > 1000, "a long word is no fault");
    server.assert_idle();
}

#[test]
fn a_schema_bomb_stops_nobody() {
    let server = Server::start(&[]);
    let doubling = |level: usize| {
        let next = json!({ "$ref": format!("#/$defs/d{}", level + 1) });
        (
            format!("d{level}"),
            json!({ "type": "object", "properties": { "a": next, "b": next }, "required": ["a", "b"] }),
        )
    };
    let mut levels: serde_json::Map<String, Value> = (0..40).map(doubling).collect();
    levels.insert("d40".to_owned(), json!({ "type": "null" }));
    let wide: Vec<String> = (0..20_000).map(|n| format!("value number {n}")).collect();
    let bombs = [
        json!({ "$defs": levels, "$ref": "#/$defs/d0" }),
        json!({ "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" }),
        json!({ "enum": wide }),
        json!({ "type": "array", "minItems": 1_000_000, "items": { "type": "integer" } }),
        json!({ "type": "string", "pattern": "^(((a{1,99}){1,99}){1,99}){1,99}$" }),
        json!({ "type": "string", "pattern": "^(.*a){1,40}.{900}$" }),
    ];
    thread::scope(|scope| {
        for schema in &bombs {
            let server = &server;
            scope.spawn(move || {
                let format = json!({ "type": "json_schema", "json_schema": { "name": "bomb", "schema": schema } });
                let response = server.post(CHAT, &with(chat("x"), json!({ "response_format": format })));
                // Some are followed for as long as the answer may be.
                assert!([200, 400].contains(&response.status), "{}: {}", response.status, response.body);
            });
        }
        for _ in 0..10 {
            server.ask(CHAT, &chat("Hello"));
        }
    });
    server.assert_idle();
}

#[test]
fn a_stop_string_is_not_said_wherever_its_tokens_part() {
    let server = Server::start(&[]);
    let body = json!({ "model": "bundled", "prompt": "Once upon a time", "max_tokens": 40, "seed": 4, "logprobs": 0 });
    let answer = server.ask(TEXT, &body);
    let text = answer["choices"][0]["text"].as_str().unwrap();
    let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    let tokens: Vec<&str> = tokens.iter().map(|token| token.as_str().unwrap()).collect();
    let mut tried = 0;
    for pair in tokens.windows(2) {
        // The end of one token and the beginning of the next.
        let [end, start] = [pair[0].chars().next_back().unwrap(), pair[1].chars().next().unwrap()];
        let stop = format!("{end}{start}");
        let before = text.split(&stop).next().unwrap();
        for options in [json!({}), json!({ "stream": true })] {
            let body = with(with(body.clone(), json!({ "stop": stop, "logprobs": null })), options);
            let response = server.post(TEXT, &body);
            let is_stream = body["stream"] == true;
            let events = if is_stream { response.events() } else { vec![response.json()] };
            let said: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
            assert_eq!(said, before, "{stop:?} in {text:?}");
            assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "stop");
            tried += 1;
        }
    }
    assert!(tried > 10, "{text:?}");
    server.assert_idle();
}

#[test]
fn characters_of_several_tokens_come_whole() {
    let server = Server::start(&[]);
    let wanted = "😀🎉 é漢";
    let form = json!({ "type": "grammar", "syntax": "regex", "definition": wanted });
    let fields = json!({ "response_format": form, "max_tokens": 60, "stream": true, "logprobs": true });
    let events = server.post(CHAT, &with(chat("Smile!"), fields)).events();
    let choices = || events.iter().map(|event| &event["choices"][0]);
    let pieces: Vec<&str> = choices().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
    assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
    assert_eq!(pieces.concat(), wanted);
    let scored: Vec<&Value> =
        choices().filter_map(|choice| choice["logprobs"]["content"].as_array()).flatten().collect();
    assert!(scored.len() > wanted.chars().count(), "the emoji are of several tokens");
    let bytes = scored.iter().flat_map(|token| token["bytes"].as_array().unwrap());
    let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().unwrap() as u8).collect();
    assert!(bytes.starts_with(wanted.as_bytes()), "{bytes:?}");
}

#[test]
fn answers_wait_for_each_other_where_the_cache_is_too_small_for_all() {
    let server = Server::start(&["--context", "256", "--kv-tokens", "320"]);
    let body = |seed: u64| json!({ "model": "bundled", "prompt": "Once", "max_tokens": 200, "ignore_eos": true, "seed": seed });
    let alone: Vec<Value> = (0..6).map(|seed| server.ask(TEXT, &body(seed))["choices"].clone()).collect();
    thread::scope(|scope| {
        for (seed, alone) in (0..).zip(&alone) {
            let server = &server;
            scope.spawn(move || assert_eq!(server.ask(TEXT, &body(seed))["choices"], *alone));
        }
    });
    assert!(server.metric("metal_marlin_preemptions_total") > 0.0);
    server.assert_idle();
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
    let mut read = [0; 3];
    for byte in &mut read {
        thread::sleep(Duration::from_secs(1));
        slow.read_exact(std::slice::from_mut(byte)).unwrap();
        assert_eq!(server.post(CHAT, &chat("Hello")).status, 200);
    }
    // The slow reader's answer is computed all the same, and waits for it.
    server.assert_idle();
    let mut rest = String::new();
    slow.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("[DONE]"), "{rest}");

    // Slow writers are understood as well.
    let body = chat("Hello").to_string();
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{JSON}Content-Length: {}\r\n\r\n", body.len());
    let mut slow = server.connect();
    for byte in (head + &body).into_bytes() {
        slow.write_all(&[byte]).unwrap();
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(Response::read(slow).status, 200);
}
