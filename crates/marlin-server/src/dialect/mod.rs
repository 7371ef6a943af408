//! How models write what they think and what they call, and what of that is the answer.
//!
//! A [`Dialect`] is the way of a family of models; [`OutputParser`] takes what such a model says, in pieces split anywhere, and gives what
//! OpenAI's API tells apart: content, reasoning and calls of tools. A call is held until it is complete, so that no piece of one is
//! ever taken for text; what turns out to be none is delivered as it was written.

mod calls;
mod harmony;
mod json;
mod tagged;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

use self::harmony::Harmony;
use self::tagged::Tagged;

/// How a family of models writes reasoning and calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Text, perhaps with `<think>…</think>` before it.
    Plain,
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen 2.5, Qwen 3.
    Hermes,
    /// `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`: Qwen 3 Coder.
    QwenXml,
    /// `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`: GLM 4.5 and later.
    Glm4,
    /// `<|python_tag|>{"name": …, "parameters": {…}}`, or that object alone: Llama 3.
    Llama3,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}]` or `[TOOL_CALLS]NAME[ARGS]{…}`: Mistral.
    Mistral,
    /// Channels: gpt-oss.
    Harmony,
}

/// Dialects by their names.
const NAMES: [(&str, Dialect); 7] = [
    ("plain", Dialect::Plain),
    ("hermes", Dialect::Hermes),
    ("qwen-xml", Dialect::QwenXml),
    ("glm4", Dialect::Glm4),
    ("llama3", Dialect::Llama3),
    ("mistral", Dialect::Mistral),
    ("harmony", Dialect::Harmony),
];

impl FromStr for Dialect {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
        let found = NAMES.iter().find(|(name, _)| *name == text).map(|(_, dialect)| *dialect);
        found.ok_or_else(|| format!("dialects are {}", names.join(", ")))
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, dialect)| dialect == self).map_or("plain", |(name, _)| *name);
        f.write_str(name)
    }
}

impl Dialect {
    /// The dialect whose markers a chat template spells out.
    pub fn detect(chat_template: &str) -> Self {
        let says = |marker: &str| chat_template.contains(marker);
        if says("<|channel|>") {
            Self::Harmony
        } else if says("<arg_key>") {
            Self::Glm4
        } else if says("<function=") {
            Self::QwenXml
        } else if says("<tool_call>") {
            Self::Hermes
        } else if says("[TOOL_CALLS]") {
            Self::Mistral
        } else if says("<|python_tag|>") || (says("<|start_header_id|>") && says("tools")) {
            Self::Llama3
        } else {
            Self::Plain
        }
    }

    /// Tokens that end an answer, besides those that end every text of the model.
    pub fn end_tokens(self) -> &'static [&'static str] {
        match self {
            Self::Harmony => &["<|call|>", "<|return|>"],
            Self::Llama3 => &["<|eom_id|>", "<|eot_id|>"],
            _ => &[],
        }
    }
}

/// A function that may be called.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// A JSON schema of its arguments.
    pub(crate) parameters: Option<Value>,
}

/// What there is to know before an answer begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ParserOptions<'a> {
    pub(crate) tools: &'a [Tool],
    /// The end of the prompt: whether the answer begins inside of reasoning.
    pub(crate) prompt_ends: &'a str,
    /// Look for calls.
    pub(crate) parse_tools: bool,
    /// Several calls may be made; otherwise those after the first are left out.
    pub(crate) parallel: bool,
    /// Of the names that calls are given.
    pub(crate) seed: u64,
}

/// What is added to an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Delta {
    /// Text of the answer.
    Content(String),
    /// Text of what comes before it.
    Reasoning(String),
    /// A call begins.
    ToolCallStart {
        /// Its place among the calls.
        index: usize,
        id: String,
        name: String,
    },
    /// Its arguments go on.
    ToolCallArguments { index: usize, fragment: String },
}

/// Tells apart what one answer consists of.
#[derive(Debug)]
pub(crate) struct OutputParser {
    grammar: Grammar,
    out: Output,
}

#[derive(Debug)]
enum Grammar {
    Tagged(Tagged),
    Harmony(Harmony),
}

impl OutputParser {
    pub(crate) fn new(dialect: Dialect, options: &ParserOptions<'_>) -> Self {
        let grammar = match dialect {
            Dialect::Harmony => Grammar::Harmony(Harmony::new(options.parse_tools)),
            dialect => Grammar::Tagged(Tagged::new(dialect, options)),
        };
        let short_ids = dialect == Dialect::Mistral;
        Self { grammar, out: Output::new(options, short_ids) }
    }

    /// For an answer that was made to be calls: one object `{"name": …, "arguments": {…}}`, or a list of them, whatever the model's dialect;
    /// but their ids are as its template wants them.
    pub(crate) fn of_calls(dialect: Dialect, options: &ParserOptions<'_>) -> Self {
        let short_ids = dialect == Dialect::Mistral;
        Self { grammar: Grammar::Tagged(Tagged::of_calls()), out: Output::new(options, short_ids) }
    }

    /// Takes a piece of text, and appends what is certain by now.
    pub(crate) fn push(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        match &mut self.grammar {
            Grammar::Tagged(tagged) => tagged.push(text, &mut self.out),
            Grammar::Harmony(harmony) => harmony.push(text, &mut self.out),
        }
        self.out.deliver(deltas);
    }

    /// No more text comes. Of a call that is cut off, what is known is delivered, and its arguments are no whole JSON.
    pub(crate) fn finish(&mut self, deltas: &mut Vec<Delta>) {
        match &mut self.grammar {
            Grammar::Tagged(tagged) => tagged.finish(&mut self.out),
            Grammar::Harmony(harmony) => harmony.finish(&mut self.out),
        }
        self.out.finish();
        self.out.deliver(deltas);
    }

    /// Calls begun so far.
    pub(crate) fn tool_calls(&self) -> usize {
        self.out.calls
    }
}

/// What has been told apart, and the white space around it.
#[derive(Debug)]
struct Output {
    deltas: Vec<Delta>,
    calls: usize,
    /// Calls that may be made.
    most_calls: usize,
    /// White space of the content that is part of it only if something follows.
    space: String,
    /// White space at the beginning is not part of the content.
    trim: bool,
    has_content: bool,
    reasoning_space: String,
    has_reasoning: bool,
    random: u64,
    short_ids: bool,
}

impl Output {
    fn new(options: &ParserOptions<'_>, short_ids: bool) -> Self {
        Self {
            deltas: Vec::new(),
            calls: 0,
            most_calls: if options.parallel { usize::MAX } else { 1 },
            space: String::new(),
            trim: false,
            has_content: false,
            reasoning_space: String::new(),
            has_reasoning: false,
            random: options.seed,
            short_ids,
        }
    }

    /// Hands out what is there, adjacent texts put together.
    fn deliver(&mut self, deltas: &mut Vec<Delta>) {
        for delta in self.deltas.drain(..) {
            match (deltas.last_mut(), delta) {
                (Some(Delta::Content(before)), Delta::Content(text)) => before.push_str(&text),
                (Some(Delta::Reasoning(before)), Delta::Reasoning(text)) => before.push_str(&text),
                (_, delta) => deltas.push(delta),
            }
        }
    }

    fn content(&mut self, text: &str) {
        let text = if self.trim { text.trim_start() } else { text };
        let end = text.trim_end().len();
        if end > 0 {
            let mut content = std::mem::take(&mut self.space);
            content.push_str(&text[..end]);
            self.deltas.push(Delta::Content(content));
            (self.trim, self.has_content) = (false, true);
        }
        self.space.push_str(&text[end..]);
    }

    /// White space around reasoning is not part of it.
    fn reasoning(&mut self, text: &str) {
        let text = if self.has_reasoning { text } else { text.trim_start() };
        let end = text.trim_end().len();
        if end > 0 {
            let mut reasoning = std::mem::take(&mut self.reasoning_space);
            reasoning.push_str(&text[..end]);
            self.deltas.push(Delta::Reasoning(reasoning));
            self.has_reasoning = true;
        }
        self.reasoning_space.push_str(&text[end..]);
    }

    /// What comes next is content, apart from what there is already.
    fn next_paragraph(&mut self) {
        if self.has_content {
            "\n\n".clone_into(&mut self.space);
        }
    }

    /// What comes next does not belong to the content before.
    fn break_content(&mut self) {
        self.space.clear();
        self.trim = true;
    }

    fn begin_call(&mut self, name: &str) -> Option<usize> {
        self.break_content();
        if self.calls == self.most_calls {
            return None;
        }
        let (index, id) = (self.calls, self.new_id());
        self.calls += 1;
        self.deltas.push(Delta::ToolCallStart { index, id, name: name.to_owned() });
        Some(index)
    }

    fn arguments(&mut self, index: usize, fragment: &str) {
        if !fragment.is_empty() {
            self.deltas.push(Delta::ToolCallArguments { index, fragment: fragment.to_owned() });
        }
    }

    fn call(&mut self, name: &str, arguments: &str) {
        if let Some(index) = self.begin_call(name) {
            self.arguments(index, arguments);
        }
    }

    /// White space at the end belongs to an answer that is nothing but text.
    fn finish(&mut self) {
        let space = std::mem::take(&mut self.space);
        if self.calls == 0 && self.has_content && !space.is_empty() {
            self.deltas.push(Delta::Content(space));
        }
    }

    /// A name for a call: `call_` and 24 letters and digits; for Mistral, whose templates want that, 9 of them.
    fn new_id(&mut self) -> String {
        const LETTERS: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
        let (prefix, len) = if self.short_ids { ("", 9) } else { ("call_", 24) };
        let mut letter = || LETTERS[(split_mix(&mut self.random) % LETTERS.len() as u64) as usize] as char;
        let name: String = (0..len).map(|_| letter()).collect();
        format!("{prefix}{name}")
    }
}

/// The next number of SplitMix64 (Steele, Lea and Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Where the first of some markers is in a text, and which one; or else how much of the text cannot be the beginning of any.
fn find_marker(text: &str, markers: &[&'static str]) -> Result<(usize, &'static str), usize> {
    let found = markers.iter().filter_map(|marker| Some((text.find(marker)?, *marker)));
    // Of two at one place the longer.
    if let Some(found) = found.min_by_key(|(at, marker)| (*at, usize::MAX - marker.len())) {
        return Ok(found);
    }
    let bytes = text.as_bytes();
    let beginning = |marker: &&str| {
        let longest = bytes.len().min(marker.len() - 1);
        (1..=longest).rev().find(|&n| bytes.ends_with(&marker.as_bytes()[..n])).unwrap_or(0)
    };
    Err(text.len() - markers.iter().map(beginning).max().unwrap_or(0))
}
