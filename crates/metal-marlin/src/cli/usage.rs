//! Arguments that are wrong.

use anyhow::anyhow;
use clap::error::ErrorKind;

/// Arguments are wrong: that is not the world's fault, but the caller's. It reads as the error that it holds.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct UsageError(#[from] anyhow::Error);

impl UsageError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self(anyhow!(message.into()))
    }

    /// What clap says, without what only helps on a command line.
    pub(super) fn of_clap(error: &clap::Error) -> Self {
        if let ErrorKind::DisplayHelp
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        | ErrorKind::DisplayVersion = error.kind()
        {
            return Self::new("name a command and its arguments; --help and --version are for the command line");
        }
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let end = ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|mark| text.find(mark)).min();
        Self::new(text[..end.unwrap_or(text.len())].trim_end())
    }
}

/// Marks what is wrong with options that clap took.
pub(super) trait OfArguments<T> {
    fn of_arguments(self) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> OfArguments<T> for Result<T, E> {
    fn of_arguments(self) -> anyhow::Result<T> {
        self.map_err(|error| UsageError(error.into()).into())
    }
}

#[cfg(test)]
mod tests {
    use crate::cli::{Interrupt, UsageError, report};

    fn refusal(arguments: &[&str]) -> String {
        let error = report(arguments.iter().map(Into::into), &Interrupt::default()).unwrap_err();
        assert!(error.is::<UsageError>(), "{error:?}");
        format!("{error:#}")
    }

    #[test]
    fn wrong_arguments_are_told_from_other_trouble_and_without_usage() {
        assert_eq!(
            refusal(&["plan", "x", "--memry", "1GiB"]),
            "unexpected argument '--memry' found\n\n  tip: a similar argument exists: '--memory'"
        );
        assert!(refusal(&["eval", "bundled"]).ends_with("required arguments were not provided:\n  --text <FILE>"));
        assert!(
            refusal(&["quantize", "x", "out", "--format", "int9"]).starts_with("invalid value 'int9' for '--format")
        );
        assert!(refusal(&["quantize", "x", "out", "--format", "int8", "--bits", "4"]).contains("--bits asks for 4"));
        assert!(refusal(&[]).contains("name a command"));
        assert!(refusal(&["--help"]).contains("name a command"));
        assert!(refusal(&["serve"]).contains("no report"));
        let error = report(["plan", "no/such/model"].map(Into::into), &Interrupt::default()).unwrap_err();
        assert!(!error.is::<UsageError>(), "{error:?}");
    }
}
