//! Random answers within grammars, and grammars that are refused.

use std::sync::LazyLock;
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::TextStream;
use crate::tests::tokenizers::{byte_level, sentence_piece};

/// A hang is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

const END: &str = "<|end|>";

static TOKENIZERS: LazyLock<[(Tokenizer, GrammarCompiler); 2]> = LazyLock::new(|| {
    let pieces: [&[u8]; 10] = [b"{\"", b"\":", b"\", \"", b"tr", b"ue", b" the", b"\xF0\x9F", b"\"}", b"]}", b"12"];
    [byte_level(&pieces, &[END]), sentence_piece(&["\u{2581}the", "{\"", "\":", "ab", "1"], &[END])].map(|tokenizer| {
        let end = tokenizer.token_id(END).unwrap();
        // The model's vocabulary is padded.
        let compiler = GrammarCompiler::new(&tokenizer, tokenizer.vocabulary_size() + 13, &[end]).unwrap();
        (tokenizer, compiler)
    })
});

fn is_allowed(constraint: &Constraint, token: u32) -> bool {
    constraint.allowed()[token as usize / 32] >> (token % 32) & 1 == 1
}

/// Chooses among the allowed tokens by random numbers, after `patience` tokens the end as soon as it is allowed, and before that what
/// leads there. `None` if it does not end.
fn walk(
    tokenizer: &Tokenizer,
    compiler: &GrammarCompiler,
    grammar: &Grammar,
    seed: u64,
    patience: usize,
) -> Option<String> {
    let end = tokenizer.token_id(END).unwrap();
    let mut constraint = compiler.compile(grammar).unwrap();
    let mut text = TextStream::new(tokenizer, &[], Vec::new()).unwrap();
    let (mut state, mut said) = (seed, String::new());
    for step in 0..3000 {
        constraint.compute().unwrap();
        let allowed: Vec<u32> =
            (0..compiler.vocabulary as u32).filter(|&token| is_allowed(&constraint, token)).collect();
        assert!(allowed.iter().all(|&token| (token as usize) < tokenizer.vocabulary_size()), "a padded token");
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let closing = allowed.iter().find(|&&token| {
            token == end
                || tokenizer
                    .decode(&[token], false)
                    .is_ok_and(|text| ["\"", "}", "]", "\"}", "]}"].contains(&text.as_str()))
        });
        let token = match closing {
            Some(&closing) if step >= patience => closing,
            _ => allowed[(state >> 33) as usize % allowed.len()],
        };
        if token == end {
            break;
        }
        constraint.accept(token).unwrap();
        text.push(tokenizer, token, &mut said).unwrap();
        if constraint.is_finished() {
            break;
        }
        if step == 2999 {
            return None;
        }
    }
    text.finish(tokenizer, &mut said).unwrap();
    Some(said)
}

/// A check, by other means than a schema.
type Check = fn(&Value) -> bool;

/// Schemas of every kind, and what checks them.
fn schemas() -> Vec<(Value, Check)> {
    vec![
        (
            json!({ "type": "object", "properties": { "a": { "type": "integer", "minimum": 3, "maximum": 40 } }, "required": ["a"], "additionalProperties": false }),
            |v| v.as_object().is_some_and(|o| o.len() == 1) && v["a"].as_i64().is_some_and(|a| (3..=40).contains(&a)),
        ),
        (json!({ "enum": ["red", "grün", 7, null] }), |v| {
            [json!("red"), json!("grün"), json!(7), Value::Null].contains(v)
        }),
        (json!({ "type": "array", "items": { "type": "boolean" }, "minItems": 2, "maxItems": 4 }), |v| {
            v.as_array().is_some_and(|a| (2..=4).contains(&a.len()) && a.iter().all(Value::is_boolean))
        }),
        (json!({ "type": "string", "pattern": "^[a-c]{2,5}-[0-9]+$" }), |v| {
            let Some((letters, digits)) = v.as_str().and_then(|text| text.split_once('-')) else { return false };
            (2..=5).contains(&letters.len())
                && letters.chars().all(|c| ('a'..='c').contains(&c))
                && !digits.is_empty()
                && digits.chars().all(|c| c.is_ascii_digit())
        }),
        (json!({ "type": "string", "maxLength": 6 }), |v| v.as_str().is_some_and(|text| text.chars().count() <= 6)),
        (json!({ "type": "string", "format": "date" }), |v| {
            v.as_str().is_some_and(|text| text.len() == 10 && text.as_bytes()[4] == b'-')
        }),
        (
            json!({ "anyOf": [{ "type": "integer" }, { "type": "object", "properties": { "x": { "const": 1 } }, "required": ["x"], "additionalProperties": false }] }),
            |v| v.is_i64() || v.is_u64() || v.is_f64() || *v == json!({ "x": 1 }),
        ),
        (
            json!({ "$defs": { "node": { "type": "object", "properties": { "next": { "anyOf": [{ "$ref": "#/$defs/node" }, { "type": "null" }] } }, "required": ["next"], "additionalProperties": false } }, "$ref": "#/$defs/node" }),
            |v| {
                let mut node = v;
                while let Some(next) = node.get("next") {
                    node = next;
                }
                v.is_object() && node.is_null()
            },
        ),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_chosen_is_an_instance_of_the_schema(seed in any::<u64>(), patience in 0..60usize) {
        for (tokenizer, compiler) in &*TOKENIZERS {
            for (schema, is_instance) in schemas() {
                let text = walk(tokenizer, compiler, &Grammar::JsonSchema(schema.clone()), seed, patience);
                let Some(text) = text else { continue };
                let value: Value = serde_json::from_str(&text).map_err(|error| TestCaseError::fail(format!("{error}: {text:?} of {schema}")))?;
                prop_assert!(is_instance(&value), "{} of {}", text, schema);
            }
            let text = walk(tokenizer, compiler, &Grammar::JsonObject, seed, patience);
            let Some(text) = text else { continue };
            // A number may be larger, and lists deeper, than this reader takes; they are JSON all the same.
            match serde_json::from_str::<Value>(&text) {
                Ok(value) => prop_assert!(value.is_object(), "{}", text),
                Err(error) => {
                    let error = error.to_string();
                    prop_assert!(error.contains("out of range") || error.contains("recursion"), "{}: {}", error, text);
                }
            }
        }
    }

    #[test]
    fn whatever_is_chosen_matches(seed in any::<u64>()) {
        for (tokenizer, compiler) in &*TOKENIZERS {
            let text = walk(tokenizer, compiler, &Grammar::Regex("(ab|the )+[0-9]{2,3}".into()), seed, 200).unwrap();
            let digits = text.trim_start_matches("ab").len();
            prop_assert!(text.ends_with(|c: char| c.is_ascii_digit()) && digits <= text.len(), "{}", text);
            let lark = "start: greeting name\ngreeting: \"hi \" | \"yo \"\nname: /[a-z]{1,4}/".to_owned();
            let text = walk(tokenizer, compiler, &Grammar::Lark(lark), seed, 200).unwrap();
            let name = text.strip_prefix("hi ").or(text.strip_prefix("yo ")).unwrap();
            prop_assert!((1..=4).contains(&name.len()) && name.chars().all(|c| c.is_ascii_lowercase()), "{}", text);
        }
    }
}

/// What compiling says, if it comes to an end.
fn compile(grammar: Grammar) -> Result<(), String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let result = TOKENIZERS[0].1.compile(&grammar).and_then(|mut constraint| constraint.compute());
        sender.send(result.map_err(|error| error.to_string())).unwrap();
    });
    receiver.recv_timeout(PATIENCE).expect("it ends")
}

#[test]
fn what_cannot_be_honoured_is_refused_with_the_reason() {
    let schema = |schema| Grammar::JsonSchema(schema);
    let cases = [
        (schema(json!({ "type": "strin" })), "strin"),
        (schema(json!({ "type": "object", "unevaluatedProperties": false })), "unevaluatedProperties"),
        (schema(json!({ "type": "string", "format": "moon-phase" })), "moon-phase"),
        (schema(json!({ "$ref": "#/nowhere" })), "nowhere"),
        (schema(json!({ "type": "integer", "minimum": 5, "maximum": 3 })), ""),
        (schema(json!({ "x-guidance": { "lenient": true }, "type": "string", "format": "moon-phase" })), "moon-phase"),
        (schema(json!(7)), ""),
        (Grammar::Regex("(unclosed".into()), ""),
        (Grammar::Lark("start: missing".into()), "missing"),
        (Grammar::Lark(String::new()), ""),
        (Grammar::Regex("a".repeat(2 << 20)), "more than 1048576"),
    ];
    for (grammar, reason) in cases {
        let error = compile(grammar.clone()).expect_err(&format!("{grammar:?}").chars().take(99).collect::<String>());
        assert!(error.contains(reason), "{error}, wanted {reason}");
    }
}

#[test]
fn grammars_made_to_be_large_come_to_an_end() {
    let nested =
        (0..90).fold(json!({ "type": "null" }), |inner, _| json!({ "type": "array", "items": inner, "maxItems": 9 }));
    let doubling: serde_json::Map<String, Value> = (0..60)
        .map(|n| (format!("d{n}"), json!({ "anyOf": [{ "$ref": format!("#/$defs/d{}", n + 1) }, { "type": "array", "items": { "$ref": format!("#/$defs/d{}", n + 1) } }] })))
        .chain([("d60".to_owned(), json!({ "type": "null" }))])
        .collect();
    let wide: Vec<String> = (0..20_000).map(|n| format!("value number {n}")).collect();
    let bombs = [
        Grammar::JsonSchema(nested),
        Grammar::JsonSchema(json!({ "$defs": doubling, "$ref": "#/$defs/d0" })),
        Grammar::JsonSchema(
            json!({ "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" }),
        ),
        Grammar::JsonSchema(json!({ "enum": wide })),
        Grammar::JsonSchema(json!({ "type": "string", "maxLength": 2_000_000_000 })),
        Grammar::JsonSchema(json!({ "type": "array", "minItems": 1_000_000, "items": { "type": "integer" } })),
        Grammar::JsonSchema(json!({ "type": "string", "pattern": "^(((a{1,99}){1,99}){1,99}){1,99}$" })),
        Grammar::Regex("(.*a){1,40}.{900}".into()),
        Grammar::Regex(format!("{}a{}", "(".repeat(5_000), ")".repeat(5_000))),
        Grammar::Lark(format!("start: {}\"a\"{}", "(".repeat(5_000), ")".repeat(5_000))),
    ];
    for bomb in bombs {
        // Whether it is refused or not.
        let _ = compile(bomb);
    }
}

#[test]
fn special_tokens_are_no_text() {
    let (tokenizer, compiler) = &TOKENIZERS[0];
    let end = tokenizer.token_id(END).unwrap();
    let mut constraint = compiler.compile(&Grammar::Regex("<\\|end\\|>x".into())).unwrap();
    constraint.compute().unwrap();
    assert!(!is_allowed(&constraint, end), "the grammar is not at its end");
    assert!(is_allowed(&constraint, u32::from(b'<')));
}
