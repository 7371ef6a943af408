//! What a person types, or what a pipe brings.

use std::io::{self, BufRead, stdin};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// Opens and closes a text of several lines.
const QUOTES: &str = "\"\"\"";

/// One line, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Line {
    Text(String),
    /// Ctrl-C.
    Interrupted,
    End,
}

/// Where lines come from.
pub(super) trait Lines {
    /// The next line, asked for with `prompt` where there is someone to ask.
    fn next(&mut self, prompt: &str) -> anyhow::Result<Line>;
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    /// A message, maybe of several lines.
    Message(String),
    /// `/name argument`.
    Command {
        name: String,
        argument: String,
    },
    /// Ctrl-C instead of a message.
    Interrupted,
    End,
}

/// Reads the next message or command; blank lines are passed over.
///
/// A line that ends with a backslash goes on in the next one. A text between triple quotes has as many lines as it
/// likes, and may begin with a slash.
pub(super) fn read(lines: &mut dyn Lines) -> anyhow::Result<Input> {
    loop {
        let line = match lines.next("> ")? {
            Line::Text(line) => line,
            Line::Interrupted => return Ok(Input::Interrupted),
            Line::End => return Ok(Input::End),
        };
        if let Some(first) = line.trim_start().strip_prefix(QUOTES) {
            return read_quoted(lines, first);
        }
        if line.trim().is_empty() {
            continue;
        }
        if let Some(command) = line.trim().strip_prefix('/') {
            let (name, argument) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
            return Ok(Input::Command { name: name.to_owned(), argument: argument.trim().to_owned() });
        }
        return read_continued(lines, line);
    }
}

/// The rest of a text of which `text` ended the first line with a backslash, if it did.
fn read_continued(lines: &mut dyn Lines, mut text: String) -> anyhow::Result<Input> {
    while text.ends_with('\\') {
        text.pop();
        match lines.next("… ")? {
            Line::Text(line) => text = text + "\n" + &line,
            Line::Interrupted => return Ok(Input::Interrupted),
            Line::End => break,
        }
    }
    Ok(Input::Message(text))
}

/// The rest of a text in quotes, whose first line is `first`.
fn read_quoted(lines: &mut dyn Lines, first: &str) -> anyhow::Result<Input> {
    let mut text = first.to_owned();
    loop {
        if let Some(whole) = text.trim_end().strip_suffix(QUOTES) {
            return Ok(Input::Message(whole.trim_matches('\n').to_owned()));
        }
        match lines.next("… ")? {
            Line::Text(line) => text = text + "\n" + &line,
            Line::Interrupted => return Ok(Input::Interrupted),
            Line::End => return Err(anyhow!("the input ends within a text begun by {QUOTES}; close it with {QUOTES}")),
        }
    }
}

/// Lines of standard input, as they are.
pub(super) struct Pipe;

impl Lines for Pipe {
    fn next(&mut self, _: &str) -> anyhow::Result<Line> {
        let mut line = String::new();
        if stdin().lock().read_line(&mut line).context("cannot read standard input")? == 0 {
            return Ok(Line::End);
        }
        let end = line.strip_suffix('\n').map_or(line.len(), |line| line.strip_suffix('\r').unwrap_or(line).len());
        line.truncate(end);
        Ok(Line::Text(line))
    }
}

/// Lines typed and edited on a terminal.
pub(super) struct Terminal {
    editor: DefaultEditor,
    history: Option<PathBuf>,
}

impl Terminal {
    /// An editor that remembers the lines of this session, and those of earlier ones if there is a file for them.
    pub(super) fn new(history: Option<&Path>) -> anyhow::Result<Self> {
        let mut editor = DefaultEditor::new().context("cannot edit lines on this terminal")?;
        if let Some(path) = history {
            match editor.load_history(path) {
                Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.with_context(|| format!("cannot read the history {}", path.display()))?,
            }
        }
        Ok(Self { editor, history: history.map(Path::to_owned) })
    }

    /// Keeps the lines for the next session, if that was asked for.
    pub(super) fn save_history(&mut self) -> anyhow::Result<()> {
        let Some(path) = &self.history else { return Ok(()) };
        self.editor.save_history(path).with_context(|| format!("cannot write the history {}", path.display()))
    }
}

impl Lines for Terminal {
    fn next(&mut self, prompt: &str) -> anyhow::Result<Line> {
        match self.editor.readline(prompt) {
            Ok(line) => {
                self.editor.add_history_entry(line.as_str())?;
                Ok(Line::Text(line))
            }
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
            Err(error) => Err(error).context("cannot read from the terminal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    impl Lines for VecDeque<Line> {
        fn next(&mut self, _: &str) -> anyhow::Result<Line> {
            Ok(self.pop_front().unwrap_or(Line::End))
        }
    }

    fn lines(text: &str) -> VecDeque<Line> {
        text.lines().map(|line| Line::Text(line.to_owned())).collect()
    }

    fn message(text: &str) -> Input {
        Input::Message(text.to_owned())
    }

    #[test]
    fn a_line_is_a_message_and_blank_ones_are_not() {
        let mut lines = lines("\n  \n two words \nnext");
        assert_eq!(read(&mut lines).unwrap(), message(" two words "));
        assert_eq!(read(&mut lines).unwrap(), message("next"));
        assert_eq!(read(&mut lines).unwrap(), Input::End);
    }

    #[test]
    fn a_backslash_goes_on_in_the_next_line() {
        let mut lines = lines("one\\\ntwo\\\n\nlast\\");
        assert_eq!(read(&mut lines).unwrap(), message("one\ntwo\n"));
        assert_eq!(read(&mut lines).unwrap(), message("last"));
    }

    #[test]
    fn quotes_hold_any_lines() {
        let mut lines = lines("\"\"\"\n/not a command\n\n\"x\"\\\n\"\"\"\n\"\"\"one line\"\"\"\n\"\"\"never closed");
        assert_eq!(read(&mut lines).unwrap(), message("/not a command\n\n\"x\"\\"));
        assert_eq!(read(&mut lines).unwrap(), message("one line"));
        assert!(read(&mut lines).unwrap_err().to_string().contains("close it"));
    }

    #[test]
    fn a_slash_begins_a_command() {
        let mut lines = lines("/reset\n /system  Be brief. \n/");
        let command = |name: &str, argument: &str| Input::Command { name: name.into(), argument: argument.into() };
        assert_eq!(read(&mut lines).unwrap(), command("reset", ""));
        assert_eq!(read(&mut lines).unwrap(), command("system", "Be brief."));
        assert_eq!(read(&mut lines).unwrap(), command("", ""));
    }

    #[test]
    fn an_interrupt_drops_what_was_begun() {
        let mut lines = VecDeque::from([Line::Text("one\\".into()), Line::Interrupted, Line::Text("two".into())]);
        assert_eq!(read(&mut lines).unwrap(), Input::Interrupted);
        assert_eq!(read(&mut lines).unwrap(), message("two"));
    }
}
