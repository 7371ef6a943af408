//! The channels of gpt-oss (OpenAI's harmony format).

use super::{Output, find_marker};

/// What begins, parts or ends a message.
const MARKERS: [&str; 5] = ["<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|message|>"];
/// Where functions that are called stand in a header.
const FUNCTIONS: &str = "functions.";

/// What is being read.
#[derive(Debug)]
enum State {
    /// Before `<|message|>`; the prompt ends within the first header.
    Header,
    Content,
    Reasoning,
    /// Arguments of the call at this place, if it is not left out.
    Arguments(Option<usize>),
}

/// The parser of this dialect.
#[derive(Debug)]
pub(super) struct Harmony {
    state: State,
    /// Text that is not certain yet; in a header, all of it.
    held: String,
    parse_tools: bool,
    messages: usize,
}

impl Harmony {
    pub(super) fn new(parse_tools: bool) -> Self {
        Self { state: State::Header, held: String::new(), parse_tools, messages: 0 }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Output) {
        self.held.push_str(text);
        while self.advance(out) {}
    }

    pub(super) fn finish(&mut self, out: &mut Output) {
        let held = std::mem::take(&mut self.held);
        // A header that is cut off says nothing.
        if !matches!(self.state, State::Header) {
            self.say(&held, out);
        }
    }

    fn advance(&mut self, out: &mut Output) -> bool {
        if matches!(self.state, State::Header) {
            return self.read_header(out);
        }
        match find_marker(&self.held, &MARKERS) {
            Ok((at, marker)) => {
                let text: String = self.held.drain(..at + marker.len()).collect();
                self.say(&text[..at], out);
                self.state = State::Header;
                true
            }
            Err(certain) => {
                let text: String = self.held.drain(..certain).collect();
                self.say(&text, out);
                false
            }
        }
    }

    fn read_header(&mut self, out: &mut Output) -> bool {
        // A model that has forgotten its format says text at once.
        let text = self.held.trim_start();
        let is_header = |text: &str| {
            ["<|", "to=", "assistant"].iter().any(|start| text.starts_with(start) || start.starts_with(text))
        };
        if self.messages == 0 && !is_header(text) {
            self.messages = 1;
            self.state = State::Content;
            return true;
        }
        let Ok((at, marker)) = find_marker(&self.held, &["<|message|>"]) else { return false };
        let header: String = self.held.drain(..at + marker.len()).collect();
        self.begin(&header[..at], out);
        true
    }

    /// A message begins, of which the header tells the channel and whom it is for.
    fn begin(&mut self, header: &str, out: &mut Output) {
        self.messages += 1;
        let word = |text: &str| {
            let end = text.find(|char: char| char.is_whitespace() || char == '<').unwrap_or(text.len());
            text[..end].to_owned()
        };
        let channel = header.split_once("<|channel|>").map(|(_, rest)| word(rest.trim_start()));
        let recipient = header.split_once("to=").map(|(_, rest)| word(rest));
        self.state = match (recipient, channel.as_deref()) {
            (Some(name), _) if self.parse_tools => {
                let name = name.strip_prefix(FUNCTIONS).unwrap_or(&name);
                State::Arguments(out.begin_call(name))
            }
            (None, Some("analysis")) => State::Reasoning,
            _ => {
                out.next_paragraph();
                State::Content
            }
        };
    }

    fn say(&mut self, text: &str, out: &mut Output) {
        match self.state {
            State::Header => {}
            State::Content => out.content(text),
            State::Reasoning => out.reasoning(text),
            State::Arguments(Some(index)) => out.arguments(index, text),
            State::Arguments(None) => {}
        }
    }
}
