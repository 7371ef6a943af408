//! Dialects that put reasoning and calls between markers.

use super::json::Scanner;
use super::{Dialect, Output, ParserOptions, Tool, calls, find_marker};

/// What is being read.
#[derive(Debug)]
enum State {
    Content,
    Reasoning,
    /// A call, behind the marker.
    Call(Body),
}

/// A call in progress.
#[derive(Debug)]
struct Body {
    /// What opened it, to be given back if it is none.
    marker: &'static str,
    kind: BodyKind,
    /// Bytes of the held text that were looked at.
    scanned: usize,
    scanner: Scanner,
    /// Where the JSON begins, once that is known.
    json: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BodyKind {
    /// A JSON object, then a closing marker.
    Object,
    /// Anything up to a closing marker.
    Closed,
    /// JSON objects, perhaps with `;` between them.
    Objects,
    /// The same without a marker before it, and a call only if it calls a tool that there is.
    Bare,
    /// A JSON list of objects.
    List,
    /// That, or names with objects behind `[ARGS]`.
    Mistral,
}

/// What came of looking at a call.
enum Look {
    /// More text is needed.
    Wait,
    /// So many bytes of the held text are done with, and what follows is read in this state.
    Done(usize, State),
    /// It is no call.
    None,
}

const CLOSE: &str = "</tool_call>";

/// The parser of these dialects.
#[derive(Debug)]
pub(super) struct Tagged {
    dialect: Dialect,
    tools: Vec<Tool>,
    state: State,
    /// Text that is not certain yet; behind the marker, in a call.
    held: String,
    /// What opens and closes reasoning.
    think: [&'static str; 2],
    /// What opens a call.
    opens: Option<&'static str>,
    /// Nothing was said yet, so that reasoning, or a call without a marker, may begin.
    is_start: bool,
}

impl Tagged {
    pub(super) fn new(dialect: Dialect, options: &ParserOptions<'_>) -> Self {
        let think = if dialect == Dialect::Mistral { ["[THINK]", "[/THINK]"] } else { ["<think>", "</think>"] };
        let opens = match dialect {
            Dialect::Hermes | Dialect::QwenXml | Dialect::Glm4 => Some("<tool_call>"),
            Dialect::Llama3 => Some("<|python_tag|>"),
            Dialect::Mistral => Some("[TOOL_CALLS]"),
            Dialect::Plain | Dialect::Harmony => None,
        };
        // A template that opens reasoning itself leaves it to the model to close it.
        let in_reasoning = options.prompt_ends.trim_end().ends_with(think[0]);
        Self {
            dialect,
            tools: options.tools.to_vec(),
            state: if in_reasoning { State::Reasoning } else { State::Content },
            held: String::new(),
            think,
            opens: opens.filter(|_| options.parse_tools),
            is_start: true,
        }
    }

    /// For an answer that is one object or a list of them, each a call, without any marker.
    pub(super) fn of_calls() -> Self {
        Self {
            dialect: Dialect::Plain,
            tools: Vec::new(),
            state: State::Call(Body::new("", BodyKind::List)),
            held: String::new(),
            think: ["<think>", "</think>"],
            opens: None,
            is_start: false,
        }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Output) {
        self.held.push_str(text);
        while self.advance(out) {}
    }

    pub(super) fn finish(&mut self, out: &mut Output) {
        let held = std::mem::take(&mut self.held);
        match &self.state {
            State::Content => out.content(&held),
            State::Reasoning => out.reasoning(&held),
            State::Call(body) => {
                let is_call = |call: &calls::Call| body.kind != BodyKind::Bare || self.is_known(&call.name);
                match self.cut_off_call(body, &held).filter(is_call) {
                    Some(call) => out.call(&call.name, &call.arguments),
                    None if body.kind == BodyKind::Bare => out.content(&held),
                    // What is cut off within a call is no text.
                    None => {}
                }
            }
        }
    }

    /// The call that the held text begins, with what is known of its arguments.
    fn cut_off_call(&self, body: &Body, held: &str) -> Option<calls::Call> {
        if body.kind == BodyKind::Closed {
            // A name is whole once something follows.
            let call = self.closed_call(held.trim_end_matches(calls::is_name_char))?;
            return Some(call.beginning());
        }
        let json = &held[body.json?..];
        if body.kind == BodyKind::Mistral {
            let (name, _) = calls::split_name(held.trim_start());
            return Some(calls::Call { name: name.to_owned(), arguments: json.to_owned() });
        }
        let whole = body.whole_object(held).and_then(calls::of_object);
        whole.or_else(|| calls::of_beginning(json))
    }

    fn closed_call<'a>(&self, text: &'a str) -> Option<calls::TaggedCall<'a>> {
        if self.dialect == Dialect::QwenXml {
            calls::of_xml(text, &self.tools)
        } else {
            calls::of_glm(text, &self.tools)
        }
    }

    fn is_known(&self, name: &str) -> bool {
        self.tools.iter().any(|tool| tool.name == name)
    }

    /// Does what can be done with the held text; tells whether there is more to do.
    fn advance(&mut self, out: &mut Output) -> bool {
        match &self.state {
            State::Content => self.read_content(out),
            State::Reasoning => self.read_reasoning(out),
            State::Call(_) => self.read_call(out),
        }
    }

    fn read_content(&mut self, out: &mut Output) -> bool {
        if self.is_start {
            let text = self.held.trim_start();
            if text.is_empty() {
                return false;
            }
            if self.dialect == Dialect::Llama3 && self.opens.is_some() && text.starts_with('{') {
                self.state = State::Call(Body::new("", BodyKind::Bare));
                return true;
            }
        }
        let mut markers: Vec<&'static str> = self.opens.into_iter().collect();
        if self.is_start {
            markers.push(self.think[0]);
        }
        match find_marker(&self.held, &markers) {
            Ok((at, marker)) if marker == self.think[0] => {
                if !self.held[..at].trim().is_empty() {
                    // In the middle of a text the marker is only mentioned.
                    self.is_start = false;
                    return true;
                }
                self.held.drain(..at + marker.len());
                self.is_start = false;
                self.state = State::Reasoning;
                true
            }
            Ok((at, marker)) => {
                let text: String = self.held.drain(..at + marker.len()).collect();
                out.content(&text[..at]);
                self.is_start = false;
                self.state = State::Call(Body::new(marker, self.body_kind()));
                true
            }
            Err(certain) => {
                let text: String = self.held.drain(..certain).collect();
                self.is_start &= text.trim().is_empty();
                out.content(&text);
                false
            }
        }
    }

    fn read_reasoning(&mut self, out: &mut Output) -> bool {
        match find_marker(&self.held, &[self.think[1]]) {
            Ok((at, marker)) => {
                let text: String = self.held.drain(..at + marker.len()).collect();
                out.reasoning(&text[..at]);
                out.break_content();
                self.state = State::Content;
                // An answer may be a call without a marker, and does not reason again.
                self.is_start = self.dialect == Dialect::Llama3;
                true
            }
            Err(certain) => {
                let text: String = self.held.drain(..certain).collect();
                out.reasoning(&text);
                false
            }
        }
    }

    fn body_kind(&self) -> BodyKind {
        match self.dialect {
            Dialect::QwenXml | Dialect::Glm4 => BodyKind::Closed,
            Dialect::Llama3 => BodyKind::Objects,
            Dialect::Mistral => BodyKind::Mistral,
            Dialect::Hermes | Dialect::Plain | Dialect::Harmony => BodyKind::Object,
        }
    }

    fn read_call(&mut self, out: &mut Output) -> bool {
        let State::Call(mut body) = std::mem::replace(&mut self.state, State::Content) else { return false };
        let look = match body.kind {
            BodyKind::Object => self.look_at_object(&mut body, out),
            BodyKind::Closed => self.look_at_closed(&mut body, out),
            BodyKind::Objects | BodyKind::Bare => self.look_at_objects(&mut body, out),
            BodyKind::List => self.look_at_list(&mut body, out),
            BodyKind::Mistral => self.look_at_mistral(&mut body, out),
        };
        match look {
            Look::Wait => {
                self.state = State::Call(body);
                false
            }
            Look::Done(bytes, state) => {
                self.held.drain(..bytes);
                self.state = state;
                true
            }
            Look::None => {
                // The marker is text, and what follows is read as such: it may hold other markers.
                out.content(body.marker);
                self.is_start = false;
                true
            }
        }
    }

    /// `{…}` and the closing marker, which may be missing.
    fn look_at_object(&self, body: &mut Body, out: &mut Output) -> Look {
        let Some(end) = (match body.object_end(&self.held, 0) {
            Ok(end) => end,
            Err(look) => return look,
        }) else {
            return Look::Wait;
        };
        let rest = self.held[end..].trim_start();
        if !rest.starts_with(CLOSE) && CLOSE.starts_with(rest) {
            return Look::Wait;
        }
        let start = body.json.unwrap_or(0);
        let Some(call) = calls::of_object(&self.held[start..end]) else { return Look::None };
        out.call(&call.name, &call.arguments);
        let closed = rest.strip_prefix(CLOSE).map_or(end, |after| self.held.len() - after.len());
        Look::Done(closed, State::Content)
    }

    /// Everything up to the closing marker.
    fn look_at_closed(&self, body: &mut Body, out: &mut Output) -> Look {
        if !self.may_be_closed_call() {
            return Look::None;
        }
        let from = body.scanned.saturating_sub(CLOSE.len());
        let from = (0..=from).rev().find(|&at| self.held.is_char_boundary(at)).unwrap_or(0);
        let Some(at) = self.held[from..].find(CLOSE) else {
            body.scanned = self.held.len();
            return Look::Wait;
        };
        let inside = &self.held[..from + at];
        let close = if self.dialect == Dialect::QwenXml { "</function>" } else { "" };
        let Some(call) = self.closed_call(inside).and_then(|call| call.whole(close)) else { return Look::None };
        out.call(&call.name, &call.arguments);
        Look::Done(from + at + CLOSE.len(), State::Content)
    }

    /// Whether a call can begin as the held text does.
    fn may_be_closed_call(&self) -> bool {
        let text = self.held.trim_start();
        if self.dialect == Dialect::QwenXml {
            const FUNCTION: &str = "<function=";
            return text.starts_with(FUNCTION) || FUNCTION.starts_with(text);
        }
        let rest = text.trim_start_matches(calls::is_name_char);
        rest.is_empty() || (rest.len() < text.len() && (rest.starts_with('<') || rest.starts_with(char::is_whitespace)))
    }

    /// Objects to the end of the text.
    fn look_at_objects(&self, body: &mut Body, out: &mut Output) -> Look {
        let Some(end) = (match body.object_end(&self.held, 0) {
            Ok(end) => end,
            Err(look) => return look,
        }) else {
            return Look::Wait;
        };
        let start = body.json.unwrap_or(0);
        let call = calls::of_object(&self.held[start..end]);
        let call = call.filter(|call| body.kind != BodyKind::Bare || self.is_known(&call.name));
        let Some(call) = call else { return Look::None };
        out.call(&call.name, &call.arguments);
        // Nothing but further calls can follow; what follows otherwise is text.
        let next = if body.kind == BodyKind::List { BodyKind::List } else { BodyKind::Objects };
        Look::Done(end, State::Call(Body::new("", next)))
    }

    /// Objects up to the end of the list.
    fn look_at_list(&self, body: &mut Body, out: &mut Output) -> Look {
        let rest = self.held.trim_start_matches(|char| body.kind.is_between(char));
        if body.json.is_none() && rest.starts_with(']') {
            return Look::Done(self.held.len() - rest.len() + 1, State::Content);
        }
        self.look_at_objects(body, out)
    }

    /// `[{…}, …]`, or `NAME[ARGS]{…}` with `[CALL_ID]ID` before the arguments or not.
    fn look_at_mistral(&self, body: &mut Body, out: &mut Output) -> Look {
        let text = self.held.trim_start();
        if text.is_empty() {
            return Look::Wait;
        }
        let start = self.held.len() - text.len();
        if text.starts_with('[') {
            body.kind = BodyKind::List;
            return self.look_at_list(body, out);
        }
        // The name, then perhaps markers, then the arguments.
        let head = &text[..text.find('{').unwrap_or(text.len())];
        let (name, markers) = calls::split_name(head);
        if name.is_empty() || !(markers.is_empty() || markers.starts_with('[')) {
            return Look::None;
        }
        if head.len() == text.len() {
            return Look::Wait;
        }
        if !(markers.is_empty() || markers.trim_end().ends_with("[ARGS]")) {
            return Look::None;
        }
        let json = start + head.len();
        let Some(end) = (match body.object_end(&self.held, json) {
            Ok(end) => end,
            Err(look) => return look,
        }) else {
            return Look::Wait;
        };
        let arguments = &self.held[body.json.unwrap_or(json)..end];
        if serde_json::from_str::<serde::de::IgnoredAny>(arguments).is_err() {
            return Look::None;
        }
        out.call(name, arguments);
        Look::Done(end, State::Content)
    }
}

impl BodyKind {
    /// What may stand before and between objects.
    fn is_between(self, char: char) -> bool {
        match self {
            Self::Objects => char.is_whitespace() || char == ';',
            Self::List => char.is_whitespace() || matches!(char, '[' | ','),
            _ => char.is_whitespace(),
        }
    }
}

impl Body {
    fn new(marker: &'static str, kind: BodyKind) -> Self {
        Self { marker, kind, scanned: 0, scanner: Scanner::default(), json: None }
    }

    /// The object, if its end was found.
    fn whole_object<'a>(&self, held: &'a str) -> Option<&'a str> {
        let start = self.json.filter(|_| self.scanned == usize::MAX)?;
        let end = Scanner::default().scan(&held[start..])?;
        Some(&held[start..start + end])
    }

    /// The end of the object that follows on what may stand between objects after `from`, if it is there; what to do if none follows.
    fn object_end(&mut self, held: &str, from: usize) -> Result<Option<usize>, Look> {
        let start = match self.json {
            Some(start) => start,
            None => {
                let text = held[from..].trim_start_matches(|char| self.kind.is_between(char));
                match text.bytes().next() {
                    None => return Err(Look::Wait),
                    Some(b'{') => {}
                    Some(_) => return Err(Look::None),
                }
                let start = held.len() - text.len();
                self.json = Some(start);
                start
            }
        };
        Ok(self.scan(held, start))
    }

    /// Scans what was not scanned of the value at `start`; gives its end.
    fn scan(&mut self, held: &str, start: usize) -> Option<usize> {
        // Once the end was found, it is found again.
        if self.scanned == usize::MAX {
            return Scanner::default().scan(&held[start..]).map(|end| start + end);
        }
        let from = self.scanned.max(start);
        let end = self.scanner.scan(&held[from..]);
        self.scanned = if end.is_some() { usize::MAX } else { held.len() };
        end.map(|end| from + end)
    }
}
