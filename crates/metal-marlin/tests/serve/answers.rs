//! What is answered, and to whom.

use serde_json::{Value, json};

use crate::server::Server;
use crate::{CHAT, TEXT, chat, with};

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

    let body = json!({
        "model": "bundled", "prompt": ["Once", "The"], "max_tokens": 9, "seed": 2, "n": 2, "logprobs": 1, "echo": true,
    });
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
fn what_deployments_watch_is_measured() {
    let server = Server::start(&[]);
    server.ask(CHAT, &chat("Hello"));
    let metrics = server.get("/metrics").body;
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy");
    let mut watched = 0;
    for file in ["grafana/metal-marlin.json", "kubernetes/metal-marlin.yaml"] {
        let text = std::fs::read_to_string(format!("{root}/{file}")).unwrap();
        for rest in text.split("metal_marlin_").skip(1) {
            let end = rest.find(|char: char| !char.is_ascii_alphanumeric() && char != '_').unwrap();
            let name = format!("metal_marlin_{}", &rest[..end]);
            let is_measured = |line: &str| line.strip_prefix(&name).is_some_and(|rest| rest.starts_with(['{', ' ']));
            assert!(metrics.lines().any(is_measured), "{file} watches {name}");
            watched += 1;
        }
    }
    assert!(watched > 20);
    server.assert_idle();
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
fn texts_become_vectors() {
    const EMBEDDINGS: &str = "/v1/embeddings";
    let vector = |value: &Value| -> Vec<f64> {
        value["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let texts = ["The cat sat by the fire and purred.", "A cat lay purring near the fire.", "She signed the contract."];
    let long = "A house stood at the end of the lane. ".repeat(40);
    for pooling in ["last", "mean"] {
        let server = Server::start(&["--pooling", pooling]);
        let ask = |input: Value| server.ask(EMBEDDINGS, &json!({ "model": "bundled", "input": input }));
        let answer = ask(json!([texts[0], texts[1], texts[2], long]));
        let data = answer["data"].as_array().unwrap();
        let vectors: Vec<Vec<f64>> = data.iter().map(vector).collect();
        assert!(vectors.iter().all(|x| x.len() == 512 && (dot(x, x) - 1.0).abs() < 1e-5));
        let [alike, other] = [1, 2].map(|index| dot(&vectors[0], &vectors[index]));
        assert!(alike > other, "{pooling}: {alike} and {other}");
        // Each text by itself, and as tokens.
        for (text, together) in texts.iter().zip(&vectors) {
            assert_eq!(&vector(&ask(json!(text))["data"][0]), together);
            let tokens = server.ask("/tokenize", &json!({ "prompt": text }))["tokens"].clone();
            assert_eq!(&vector(&ask(tokens)["data"][0]), together);
        }
        let body = json!({ "model": "bundled", "input": texts[0], "dimensions": 64 });
        let short = vector(&server.ask(EMBEDDINGS, &body)["data"][0]);
        assert!(short.len() == 64 && (dot(&short, &short) - 1.0).abs() < 1e-5);
        let base64 = with(body, json!({ "encoding_format": "base64" }));
        let coded = server.ask(EMBEDDINGS, &base64);
        assert_eq!(coded["data"][0]["embedding"].as_str().unwrap().len(), (64 * 4usize).div_ceil(3) * 4);
        assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 400);
        server.assert_idle();
    }
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
    let calls = |answer: &Value| {
        let calls = answer["choices"][0]["message"]["tool_calls"].as_array().unwrap();
        calls.iter().map(|call| call["function"]["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let several = calls(&answer);
    assert!(
        !several.is_empty() && several.iter().all(|name| ["now", "weather"].contains(&name.as_str())),
        "{several:?}"
    );
    let one = server.ask(CHAT, &with(required.clone(), json!({ "parallel_tool_calls": false })));
    assert_eq!(calls(&one).len(), 1, "{one}");
    let other = json!({ "type": "function", "function": { "name": "other" } });
    let refused = server.post(CHAT, &with(required, json!({ "tool_choice": other })));
    assert_eq!((refused.status, refused.error().contains("no tool \"other\"")), (400, true));
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
fn nothing_that_was_said_is_logged_unless_asked() {
    for (options, is_logged) in [(&[][..], false), (&["--log-prompts"][..], true)] {
        let server = Server::start(options);
        server.ask(CHAT, &chat("Aardvark"));
        server.wait_for("a line of the log", |server| server.log.lock().unwrap().contains(CHAT));
        assert_eq!(server.log.lock().unwrap().contains("Aardvark"), is_logged);
    }
}
