//! The parsers on what models say, split everywhere.

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Goldens {
    tools: Vec<GoldenTool>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct GoldenTool {
    name: String,
    parameters: Option<Value>,
}

/// What a model says, and what that is.
#[derive(Deserialize)]
struct Case {
    dialect: String,
    name: String,
    text: String,
    content: Option<String>,
    reasoning: Option<String>,
    calls: Vec<GoldenCall>,
    #[serde(default)]
    prompt_ends: String,
    #[serde(default = "yes")]
    tools: bool,
    #[serde(default = "yes")]
    parallel: bool,
}

#[derive(Debug, PartialEq, Deserialize)]
struct GoldenCall {
    name: String,
    arguments: String,
}

fn yes() -> bool {
    true
}

/// A message, put together.
#[derive(Debug, Default, PartialEq)]
struct Said {
    content: Option<String>,
    reasoning: Option<String>,
    calls: Vec<GoldenCall>,
}

fn goldens() -> Goldens {
    serde_json::from_str(include_str!("goldens/outputs.json")).unwrap()
}

fn tools(goldens: &Goldens) -> Vec<Tool> {
    let tool = |tool: &GoldenTool| Tool { name: tool.name.clone(), parameters: tool.parameters.clone() };
    goldens.tools.iter().map(tool).collect()
}

fn parser(dialect: Dialect, tools: &[Tool]) -> OutputParser {
    let options = ParserOptions { tools, prompt_ends: "", parse_tools: true, parallel: true, seed: 7 };
    OutputParser::new(dialect, &options)
}

fn put_together(deltas: Vec<Delta>) -> Said {
    let mut said = Said::default();
    for delta in deltas {
        match delta {
            Delta::Content(text) => said.content.get_or_insert_default().push_str(&text),
            Delta::Reasoning(text) => said.reasoning.get_or_insert_default().push_str(&text),
            Delta::ToolCallStart { index, name, .. } => {
                assert_eq!(index, said.calls.len());
                said.calls.push(GoldenCall { name, arguments: String::new() });
            }
            Delta::ToolCallArguments { index, fragment } => said.calls[index].arguments.push_str(&fragment),
        }
    }
    said
}

/// What a parser makes of pieces of text; at every moment it has said nothing that it does not say in the end.
fn parse<'a>(mut parser: OutputParser, pieces: impl IntoIterator<Item = &'a str>) -> Said {
    let mut deltas = Vec::new();
    let mut lengths = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut deltas);
        lengths.push(
            deltas.iter().map(|delta| if let Delta::Content(text) = delta { text.len() } else { 0 }).sum::<usize>(),
        );
    }
    parser.finish(&mut deltas);
    assert!(lengths.is_sorted());
    put_together(deltas)
}

impl Case {
    fn parser(&self, tools: &[Tool]) -> OutputParser {
        let options = ParserOptions {
            tools,
            prompt_ends: &self.prompt_ends,
            parse_tools: self.tools,
            parallel: self.parallel,
            seed: 7,
        };
        OutputParser::new(self.dialect.parse().unwrap(), &options)
    }

    fn expected(&self) -> Said {
        let call = |call: &GoldenCall| GoldenCall { name: call.name.clone(), arguments: call.arguments.clone() };
        Said {
            content: self.content.clone(),
            reasoning: self.reasoning.clone(),
            calls: self.calls.iter().map(call).collect(),
        }
    }
}

#[test]
fn what_models_say_is_told_apart_wherever_it_is_split() {
    let goldens = goldens();
    let tools = tools(&goldens);
    let mut wrong = Vec::new();
    for case in &goldens.cases {
        let expected = case.expected();
        let what = format!("{}: {}", case.dialect, case.name);
        let whole = parse(case.parser(&tools), [case.text.as_str()]);
        if whole != expected {
            wrong.push(format!("{what}\n  found    {whole:?}\n  expected {expected:?}"));
            continue;
        }
        let places: Vec<usize> = case.text.char_indices().map(|(place, _)| place).collect();
        for &place in &places {
            let (before, after) = case.text.split_at(place);
            assert_eq!(parse(case.parser(&tools), [before, after]), expected, "{what}, split at {place}");
        }
        let ends = places.iter().skip(1).copied().chain([case.text.len()]);
        let characters = places.iter().zip(ends).map(|(&start, end)| &case.text[start..end]);
        assert_eq!(parse(case.parser(&tools), characters), expected, "{what}, character by character");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_dialect_has_recorded_outputs() {
    let goldens = goldens();
    for (name, _) in NAMES {
        let count = goldens.cases.iter().filter(|case| case.dialect == name).count();
        assert!(count >= 4, "{name} has {count}");
    }
}

#[test]
fn complete_calls_have_arguments_that_are_json() {
    let goldens = goldens();
    for case in goldens.cases.iter().filter(|case| !case.name.contains("cut off")) {
        for call in parse(case.parser(&tools(&goldens)), [case.text.as_str()]).calls {
            let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
            assert!(arguments.is_object(), "{}: {}", case.dialect, case.name);
        }
    }
}

#[test]
fn calls_have_names_of_their_own() {
    let twice = "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>".repeat(2);
    let ids = |dialect: Dialect, text: &str| -> Vec<String> {
        let mut deltas = Vec::new();
        let mut parser = parser(dialect, &[]);
        parser.push(text, &mut deltas);
        let id = |delta| if let Delta::ToolCallStart { id, .. } = delta { Some(id) } else { None };
        deltas.into_iter().filter_map(id).collect()
    };
    let hermes = ids(Dialect::Hermes, &twice);
    assert!(hermes.len() == 2 && hermes[0] != hermes[1]);
    assert!(hermes.iter().all(|id| id.starts_with("call_") && id.len() == 29));
    assert_eq!(hermes, ids(Dialect::Hermes, &twice), "the seed decides");
    let mistral = ids(Dialect::Mistral, "[TOOL_CALLS]now[ARGS]{}");
    assert!(mistral[0].len() == 9 && mistral[0].chars().all(|char| char.is_ascii_alphanumeric()));
}

#[test]
fn calls_that_are_demanded_need_no_markers() {
    let said = |text: &str| {
        let options = ParserOptions { tools: &[], prompt_ends: "", parse_tools: true, parallel: true, seed: 7 };
        let pieces = text.char_indices().map(|(place, char)| &text[place..place + char.len_utf8()]);
        let said = parse(OutputParser::of_calls(Dialect::Hermes, &options), pieces);
        assert_eq!(said.content, None, "{text}");
        said.calls.into_iter().map(|call| (call.name, call.arguments)).collect::<Vec<_>>()
    };
    let call = |name: &str, arguments: &str| (name.to_owned(), arguments.to_owned());
    assert_eq!(said(r#"{"name": "now", "arguments": {}}"#), [call("now", "{}")]);
    let two = r#"[{"name": "now", "arguments": {}}, {"name": "x", "arguments": {"a": "],"}}]"#;
    assert_eq!(said(two), [call("now", "{}"), call("x", r#"{"a": "],"}"#)]);
    assert_eq!(said(&two[..two.len() - 5]), [call("now", "{}"), call("x", r#"{"a": "]"#)]);
    assert_eq!(said("[{\"na"), []);
}

#[test]
fn templates_tell_their_dialects() {
    let detected = [
        ("{% if tools %}<tool_call>{\"name\": …}</tool_call>{% endif %}", Dialect::Hermes),
        ("<tool_call><function=…></function></tool_call>", Dialect::QwenXml),
        ("<tool_call>{{ name }}<arg_key>{{ key }}</arg_key>", Dialect::Glm4),
        ("{{ '[TOOL_CALLS]' }}", Dialect::Mistral),
        ("<|start_header_id|>ipython<|python_tag|>", Dialect::Llama3),
        ("<|start|>assistant<|channel|>final<|message|>", Dialect::Harmony),
        ("<|im_start|>{{ message.role }}", Dialect::Plain),
    ];
    for (template, dialect) in detected {
        assert_eq!(Dialect::detect(template), dialect, "{template}");
        assert_eq!(dialect.to_string().parse(), Ok(dialect));
    }
    assert!("x".parse::<Dialect>().unwrap_err().contains("qwen-xml"));
}

#[test]
fn a_long_text_in_small_pieces_takes_time_in_proportion() {
    // Were text scanned again with each piece, these would be 10^12 steps.
    let long = "a < b ".repeat(200_000);
    let call = format!(
        "<tool_call>{{\"name\": \"now\", \"arguments\": {{\"x\": \"{}\"}}}}</tool_call>",
        "y".repeat(1_000_000)
    );
    let closed =
        format!("<tool_call>now<arg_key>x</arg_key><arg_value>{}</arg_value></tool_call>", "z".repeat(1_000_000));
    for (dialect, text) in [(Dialect::Hermes, &long), (Dialect::Hermes, &call), (Dialect::Glm4, &closed)] {
        let said =
            parse(parser(dialect, &[]), text.as_bytes().chunks(3).map(|chunk| std::str::from_utf8(chunk).unwrap()));
        assert!(said.content.is_some() != (said.calls.len() == 1));
    }
}

/// Pieces that markup is made of, and others.
const FRAGMENTS: [&str; 30] = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "{",
    "}",
    "\"name\": \"now\"",
    "\"arguments\": {}",
    ",",
    "<function=now>",
    "</function>",
    "<parameter=x>",
    "</parameter>",
    "now",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[",
    "]",
    "<|channel|>",
    "final",
    "<|message|>",
    "<|end|>",
    "<|start|>assistant",
    " \n",
    "é🌧<",
];

proptest! {
    #[test]
    fn splitting_changes_nothing_whatever_is_said(
        dialect in 0..NAMES.len(),
        fragments in prop::collection::vec(prop::sample::select(FRAGMENTS.to_vec()), 0..24),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let tools = tools(&goldens());
        let dialect = NAMES[dialect].1;
        let text = fragments.concat();
        let whole = parse(parser(dialect, &tools), [text.as_str()]);
        let places: Vec<usize> = text.char_indices().map(|(place, _)| place).chain([text.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| places[cut.index(places.len())]).chain([0, text.len()]).collect();
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]);
        prop_assert_eq!(parse(parser(dialect, &tools), pieces), whole);
    }
}
