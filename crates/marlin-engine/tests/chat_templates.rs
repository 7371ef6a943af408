//! Chat templates: what `transformers` renders, and what hostile ones may not do.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use marlin_engine::{ChatOptions, ChatTemplate, Message};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// scripts/goldens/make_chat_goldens.py writes these.
#[derive(Deserialize)]
struct Goldens {
    special_tokens: BTreeMap<String, String>,
    goldens: Vec<Golden>,
}

#[derive(Deserialize)]
struct Golden {
    template: String,
    messages: Vec<Message>,
    tools: Vec<Value>,
    variables: Map<String, Value>,
    add_generation_prompt: bool,
    rendered: Option<String>,
    refused: Option<String>,
}

#[test]
fn templates_mean_what_they_mean_to_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat_templates");
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let Goldens { special_tokens, goldens } = serde_json::from_str(&read("goldens.json")).unwrap();
    assert!(goldens.len() > 70 && goldens.iter().any(|golden| golden.refused.is_some()));
    for golden in goldens {
        let Golden { template: name, messages, tools, variables, add_generation_prompt, rendered, refused } = golden;
        let template = ChatTemplate::new(&read(&name), special_tokens.clone()).unwrap();
        let options = ChatOptions { tools, add_generation_prompt, variables };
        match (template.render(&messages, &options), rendered, refused) {
            (Ok(found), Some(expected), None) => assert_eq!(found, expected, "{name}: {messages:?}"),
            (Err(found), None, Some(expected)) => assert!(found.to_string().contains(&expected), "{name}: {found}"),
            (found, rendered, refused) => panic!("{name}: {found:?}, expected {rendered:?} or {refused:?}"),
        }
    }
}

fn render(source: &str) -> Result<String, String> {
    let messages = [Message::new("user", "Hello")];
    let template = ChatTemplate::new(source, BTreeMap::new()).map_err(|error| error.to_string())?;
    template.render(&messages, &ChatOptions::default()).map_err(|error| error.to_string())
}

#[test]
fn errors_say_what_and_where() {
    let refused = render("\n\n{{ raise_exception('Only tools may speak.') }}").unwrap_err();
    assert_eq!(refused, "the chat template fails: Only tools may speak. (line 3 of the template)");
    for (source, what) in [
        ("{% for x in messages %}", "syntax error"),
        ("a\n{{ messages[0].role.nothing.here }}", "line 2"),
        ("{{ messages | nothing }}", "nothing"),
        ("{{ messages | tojson(colour=1) }}", "colour"),
        ("{{ messages | tojson(separators=['x']) }}", "pair"),
        ("{{ raise_exception | tojson }}", "no JSON"),
        ("{{ strftime_now('%!') }}", "strftime_now"),
        ("{% include 'other' %}", "include"),
    ] {
        let error = render(source).unwrap_err();
        assert!(error.starts_with("the chat template fails: ") && error.contains(what), "{source}: {error}");
    }
}

#[test]
fn the_clock_is_the_local_one() {
    let year: u32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!((2025..3000).contains(&year), "{year}");
    let date = render("{{ strftime_now('%d %b %Y, %H:%M') }}").unwrap();
    assert_eq!(date.len(), "05 Mar 2025, 12:00".len(), "{date}");
}

/// Each would take for ever, or all of the memory or stack.
#[test]
fn hostile_templates_end_in_errors() {
    let forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{{ c }}{% endfor %}\
                   {% endfor %}{% endfor %}";
    let doubling = |start: &str, step: &str, end: &str| {
        format!(
            "{{% set ns = namespace(x={start}) %}}{{% for i in range(70) %}}{{% set ns.x = {step} %}}{{% endfor %}}{end}"
        )
    };
    let deep = |step: &str, end: &str| {
        format!(
            "{{% set ns = namespace(x=[]) %}}{{% for i in range(99999) %}}{{% for i in range(99999) %}}\
             {{% set ns.x = {step} %}}{{% if loop.index0 == 99998 %}}{end}{{% endif %}}{{% endfor %}}{{% endfor %}}"
        )
    };
    let hostile = [
        forever.to_owned(),
        "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}".to_owned(),
        "{% macro f(x) %}{{ f(x) ~ f(x) }}{% endmacro %}{{ f(0) }}".to_owned(),
        "{% for m in [[[]]] recursive %}{{ loop([[m]]) }}{% endfor %}".to_owned(),
        "{{ 'x' * 10 ** 9 }}".to_owned(),
        "{% set x = 'x' * 9999999 %}{{ x * 99999 }}".to_owned(),
        "{% for i in range(99999) %}{% set x = 'x' * 9999999 %}{% endfor %}".to_owned(),
        doubling("'x'", "ns.x ~ ns.x", ""),
        doubling("'x'", "ns.x + ns.x", "{{ ns.x }}"),
        doubling("['x']", "[ns.x, ns.x]", "{{ ns.x | tojson }}"),
        doubling("['x']", "[ns.x, ns.x]", "{{ ns.x }}"),
        doubling("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x | tojson(indent=1000000000000) }}"),
        deep("[ns.x]", ""),
        deep("[ns.x]", "{{ ns.x }}"),
        deep("[ns.x]", "{{ ns.x | tojson }}"),
        deep("{'x': ns.x}", "{{ ns.x | string }}"),
        "{{ [[1]] | tojson(indent=100000000000) }}".to_owned(),
        "{{ strftime_now('%A%c' * 600000) }}".to_owned(),
        "{# #}".repeat(100_000),
        format!("{{{{ {}1{} }}}}", "(".repeat(60_000), ")".repeat(60_000)),
        format!("{{{{ {}{} }}}}", "[".repeat(60_000), "]".repeat(60_000)),
        "{% if x %}".repeat(5_000) + &"{% endif %}".repeat(5_000),
        "{% generation".repeat(9_000),
    ];
    for source in hostile {
        let beginning: String = source.chars().take(200).collect();
        let started = Instant::now();
        let error = render(&source).expect_err(&beginning);
        let took = started.elapsed();
        println!("{took:.1?} {} <- {beginning}", error.chars().take(150).collect::<String>());
        assert!(took < Duration::from_secs(60), "{took:?}: {beginning}");
    }
}

/// Whether they render is no matter, but they may not overflow the stack.
#[test]
fn long_expressions_have_the_stack_they_need() {
    for source in [
        format!("{{{{ {}1 }}}}", "not ".repeat(30_000)),
        format!("{{{{ {}1 }}}}", "-".repeat(130_000)),
        format!("{{{{ x{} }}}}", "|e".repeat(60_000)),
        format!("{{{{ 1{} }}}}", "+1".repeat(60_000)) + "{{ x.y.z }}",
    ] {
        let _ = render(&source);
    }
    let error = render(&"{# #}".repeat(30_000)).unwrap_err();
    assert_eq!(error, "the chat template fails: it has 150000 bytes, more than 131072");
}

#[test]
fn an_ordinary_long_conversation_is_no_attack() {
    let text = "word ".repeat(1000);
    let messages: Vec<Message> =
        (0..400).map(|turn| Message::new(["user", "assistant"][turn % 2], text.clone())).collect();
    for name in ["tools.jinja", "reasoning.jinja", "brackets.jinja"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat_templates").join(name);
        let tokens = BTreeMap::from([("bos_token".to_owned(), String::new()), ("eos_token".to_owned(), String::new())]);
        let template = ChatTemplate::new(&fs::read_to_string(path).unwrap(), tokens).unwrap();
        let rendered = template.render(&messages, &ChatOptions::default()).unwrap();
        assert!(rendered.len() > messages.len() * (text.len() - 1), "{name}");
    }
}

#[test]
fn messages_keep_their_other_fields() {
    let saved = json!({"role": "assistant", "content": null, "tool_calls": [{"id": 1}]});
    let message: Message = serde_json::from_value(saved.clone()).unwrap();
    assert_eq!(message.content, None);
    assert_eq!(serde_json::to_value(message).unwrap(), saved);
}
