//! A conversation as the text that a model was trained to read.
//!
//! Templates are written in Jinja for Hugging Face's `apply_chat_template`, and mean here what they mean there. They
//! come with models from anywhere, so what they do is limited: every instruction, item and byte is paid for from a budget,
//! which bounds time and memory; the length of the source and the depth of the stack have limits of their own.
//!
//! One gap is left, which the template engine (minijinja 3.1) offers no way to close: a value may be larger than what it
//! cost to make. A list that holds another one twice, over and over, or `[0] * 999999999`, or a namespace that holds itself
//! is walked through unpaid by `~`, comparisons, `in` and filters that take it for text, and while constants are folded.
//! Such a template can take all memory or stack and end the process. A service that renders templates of people it does
//! not trust should do so in a process with limits.
//!
//! Python's `%` on strings is not known here; `|format` and `.format` are.

mod json;

use std::collections::BTreeMap;
use std::thread;

use jiff::ZonedDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::EngineError;

/// Work one rendering may do: 1 for an instruction or 64 bytes of text. A conversation of 100,000 words takes a small part
/// of it; a template that never ends is stopped after a fraction of a second.
const FUEL: u64 = 2_000_000;

/// Stack of a rendering. A template can nest a list as deep as its fuel allows, and printing or dropping it takes a
/// frame for each level. Only what is touched takes memory.
const STACK_BYTES: usize = 512 << 20;

/// Longest template, in bytes: published ones have a tenth. The parser takes stack for each operator of an expression.
const MOST_SOURCE: usize = 128 << 10;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else a template knows.
    pub role: String,
    /// What is said; none beside tool calls, for instance.
    #[serde(default)]
    pub content: Option<String>,
    /// Other fields that a template may read, such as `tool_calls` or `reasoning_content`.
    #[serde(flatten)]
    pub fields: Map<String, serde_json::Value>,
}

impl Message {
    /// A message of nothing but text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), fields: Map::new() }
    }
}

/// What a template is told besides the messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatOptions {
    /// Functions that the model may call, as JSON schemas; the variable `tools`, which is none if there are none.
    pub tools: Vec<serde_json::Value>,
    /// End with what introduces an answer.
    pub add_generation_prompt: bool,
    /// Further variables, such as `enable_thinking`; they hide the others of the same name.
    pub variables: Map<String, serde_json::Value>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are variables of it (`bos_token`, `eos_token`), as the tokenizer's
    /// configuration names them.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, EngineError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the standard delimiters differ from each other"));
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.set_formatter(format);
        if source.len() > MOST_SOURCE {
            let problem = format!("it has {} bytes, more than {MOST_SOURCE}", source.len());
            return Err(EngineError::ChatTemplate { problem });
        }
        with_stack(|| environment.add_template_owned(NAME, without_generation_tags(source)))?;
        Ok(Self { environment, special_tokens })
    }

    /// The conversation as text. Special tokens are spelled out in it: encode it without adding any.
    ///
    /// Fails if the template refuses the conversation, has an error, or takes too much work.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String, EngineError> {
        with_stack(|| self.render_here(messages, options))
    }

    fn render_here(&self, messages: &[Message], options: &ChatOptions) -> Result<String, Error> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        context.extend(self.special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))));
        context.insert("messages", Value::from(Serde(messages)));
        let tools = if options.tools.is_empty() { Value::from(()) } else { Value::from(Serde(&options.tools)) };
        context.insert("tools", tools);
        context.insert("documents", Value::from(()));
        context.insert("add_generation_prompt", Value::from(options.add_generation_prompt));
        context.extend(options.variables.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value)))));
        self.environment.get_template(NAME)?.render(Value::from(context))
    }
}

/// Does `work`, and drops what it leaves, on a thread with enough stack.
fn with_stack<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, EngineError> {
    let result = thread::scope(|scope| {
        let work = || work().map_err(|error| describe(&error));
        match thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work) {
            Ok(working) => working.join().unwrap_or_else(|_| Err("the template engine panicked".to_owned())),
            Err(error) => Err(format!("no thread to work on: {error}")),
        }
    });
    result.map_err(|problem| EngineError::ChatTemplate { problem })
}

/// `{{ value }}`. The engine pays for collections after it has written them, which is too late for one that holds
/// itself many times over.
fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    pay_for(state, value)?;
    minijinja::escape_formatter(out, state, value)
}

/// Consumes fuel for every part of a value.
fn pay_for(state: &State, value: &Value) -> Result<(), Error> {
    state.consume_fuel(1)?;
    match value.kind() {
        ValueKind::Map => value.try_iter()?.try_for_each(|key| pay_for(state, &value.get_item(&key)?)),
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.try_for_each(|item| pay_for(state, &item)),
        _ => Ok(()),
    }
}

/// `raise_exception(message)`: the template cannot express this conversation.
fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// `strftime_now(format)`: the local time as Python's `strftime` writes it.
fn strftime_now(state: &State, format: &str) -> Result<String, Error> {
    // Each directive may become a long name.
    state.consume_fuel(format.len() as u64)?;
    jiff::fmt::strtime::format(format, &ZonedDateTime::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}")))
}

/// What went wrong and in which line.
fn describe(error: &Error) -> String {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "it takes too much time or memory".to_owned(),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

/// `{% generation %}` … `{% endgeneration %}` marks, for training, what the model says; it changes nothing of the text.
/// Replaced by a condition that always holds, which keeps what the tags do to the white space around them.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inside = &tag[..end];
        let replacement = match inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => inside.replace("generation", "if true"),
            "endgeneration" => inside.replace("endgeneration", "endif"),
            _ => continue,
        };
        out.push_str(&replacement);
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}
