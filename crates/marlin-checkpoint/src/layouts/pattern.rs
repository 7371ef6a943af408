//! Regular expressions over names of modules, which config.json may hold.

use fancy_regex::{Regex, RegexBuilder};

/// Memory and time that a pattern may take; those in use take a hundredth.
const BYTES: usize = 1 << 20;
const STEPS: usize = 100_000;

/// A regular expression that looks at the beginning of a name, as Python's `re.match` does.
#[derive(Debug)]
pub(super) struct Pattern(Regex);

impl Pattern {
    /// Compiles it; the error says why it cannot be.
    pub(super) fn new(expression: &str) -> Result<Self, String> {
        RegexBuilder::new(&format!("^(?:{expression})"))
            .delegate_size_limit(BYTES)
            .backtrack_limit(STEPS)
            .build()
            .map(Self)
            .map_err(|e| format!("`{expression}` is no regular expression: {e}"))
    }

    /// Whether a name begins with a match. A pattern that backtracks without end counts as one that does not match.
    pub(super) fn matches(&self, name: &str) -> bool {
        self.0.is_match(name).unwrap_or(false)
    }
}
