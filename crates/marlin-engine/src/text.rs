//! From tokens to text, as they come.

use marlin_checkpoint::{CheckpointError, Tokenizer};

/// A UTF-8 character has at most this many bytes, so at most this many tokens.
const CHARACTER_TOKENS: usize = 4;

/// The replacement character: what decoders make of bytes that are no UTF-8, or not yet.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Turns one sequence's tokens into text, a piece for each token.
///
/// The pieces together are the decoded sequence, cut before the first stop string to be completed. Text is held back
/// while it may still change: an incomplete character, and whatever could be the beginning of a stop string.
#[derive(Debug, Clone)]
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: StopStrings,
}

impl TextStream {
    /// A stream that continues `prompt` and ends before any of `stops`; special tokens are left out.
    pub fn new(tokenizer: &Tokenizer, prompt: &[u32], stops: Vec<String>) -> Result<Self, CheckpointError> {
        Ok(Self { detokenizer: Detokenizer::new(tokenizer, prompt, true)?, stops: StopStrings::new(stops) })
    }

    /// The same, with special tokens as they are spelled.
    pub fn with_special(tokenizer: &Tokenizer, prompt: &[u32], stops: Vec<String>) -> Result<Self, CheckpointError> {
        Ok(Self { detokenizer: Detokenizer::new(tokenizer, prompt, false)?, stops: StopStrings::new(stops) })
    }

    /// Takes the next token and appends what is certain by now to `out`. Returns the stop string that was reached, if
    /// any; nothing may be pushed after that.
    pub fn push(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
        out: &mut String,
    ) -> Result<Option<&str>, CheckpointError> {
        self.detokenizer.push(tokenizer, token, &mut self.stops.held)?;
        Ok(self.stops.release(out))
    }

    /// Takes a token whose text no stop string ends, nor together with what comes later.
    pub(crate) fn push_unstopped(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
        out: &mut String,
    ) -> Result<(), CheckpointError> {
        self.detokenizer.push(tokenizer, token, &mut self.stops.held)?;
        out.push_str(&self.stops.held);
        self.stops.held.clear();
        Ok(())
    }

    /// Appends what was held back: no more tokens will come. Returns the stop string that this completed, if any.
    pub fn finish(&mut self, tokenizer: &Tokenizer, out: &mut String) -> Result<Option<&str>, CheckpointError> {
        self.detokenizer.finish(tokenizer, &mut self.stops.held)?;
        let stopped = self.stops.release(out).is_some();
        if !stopped {
            out.push_str(&self.stops.held);
            self.stops.held.clear();
        }
        Ok(self.stops.reached())
    }

    /// Tokens that are decoded again with each push.
    #[cfg(test)]
    pub(crate) fn window_tokens(&self) -> usize {
        self.detokenizer.window.len()
    }
}

/// Decodes a sliding window of tokens: the last piece already delivered, since how a token decodes can depend on what
/// stands before it (SentencePiece drops the space of a first token), and what has come since.
#[derive(Debug, Clone)]
struct Detokenizer {
    /// Special tokens are left out.
    skip_special: bool,
    window: Vec<u32>,
    /// Tokens of `window` that came since it was last cut.
    pending: usize,
    /// Bytes of the decoded window that have been delivered.
    delivered: usize,
}

impl Detokenizer {
    fn new(tokenizer: &Tokenizer, prompt: &[u32], skip_special: bool) -> Result<Self, CheckpointError> {
        let is_shown = |token: &u32| !(skip_special && tokenizer.is_special(*token));
        let mut window: Vec<u32> = prompt.iter().rev().copied().filter(is_shown).take(CHARACTER_TOKENS).collect();
        window.reverse();
        let delivered = tokenizer.decode(&window, skip_special)?.len();
        Ok(Self { skip_special, window, pending: 0, delivered })
    }

    fn push(&mut self, tokenizer: &Tokenizer, token: u32, out: &mut String) -> Result<(), CheckpointError> {
        // Special tokens have no text and are as if they were not there.
        if self.skip_special && tokenizer.is_special(token) {
            return Ok(());
        }
        self.window.push(token);
        self.pending += 1;
        let text = tokenizer.decode(&self.window, self.skip_special)?;
        let whole = text.trim_end_matches(REPLACEMENT).len();
        if whole == text.len() {
            if self.deliver(&text, whole, out) {
                self.cut(tokenizer, self.pending)?;
            } else if self.pending > CHARACTER_TOKENS {
                // Ids without text must not let the window grow.
                self.window.pop();
                self.pending -= 1;
            }
        } else if self.pending <= CHARACTER_TOKENS {
            self.deliver(&text, whole, out);
        } else {
            // These bytes will never be UTF-8; at most the last replacement stands for a character to come.
            self.deliver(&text, text.len() - REPLACEMENT.len_utf8(), out);
            self.cut(tokenizer, CHARACTER_TOKENS)?;
            self.delivered = self.delivered.saturating_sub(REPLACEMENT.len_utf8());
        }
        Ok(())
    }

    fn finish(&mut self, tokenizer: &Tokenizer, out: &mut String) -> Result<(), CheckpointError> {
        let text = tokenizer.decode(&self.window, self.skip_special)?;
        self.deliver(&text, text.len(), out);
        Ok(())
    }

    /// Delivers `text` up to byte `end`; tells whether that was anything.
    fn deliver(&mut self, text: &str, end: usize, out: &mut String) -> bool {
        // A decoder that tidies up across tokens may take back what was delivered; then there is nothing to add.
        let Some(piece) = text.get(self.delivered..end).filter(|piece| !piece.is_empty()) else { return false };
        out.push_str(piece);
        self.delivered = end;
        true
    }

    /// Forgets all but the last `keep` tokens, all of whose text counts as delivered.
    fn cut(&mut self, tokenizer: &Tokenizer, keep: usize) -> Result<(), CheckpointError> {
        self.window.drain(..self.window.len() - keep);
        self.pending = 0;
        self.delivered = tokenizer.decode(&self.window, self.skip_special)?.len();
        Ok(())
    }
}

/// Holds text back until it cannot be the beginning of a stop string.
#[derive(Debug, Clone)]
struct StopStrings {
    stops: Vec<String>,
    held: String,
    reached: Option<usize>,
}

impl StopStrings {
    fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), reached: None }
    }

    fn reached(&self) -> Option<&str> {
        self.reached.map(|stop| self.stops[stop].as_str())
    }

    /// Moves from `held` to `out` what comes before a stop string, or what cannot be part of one.
    fn release(&mut self, out: &mut String) -> Option<&str> {
        // The one completed first wins and, of two completed at once, the longer: both do not depend on where tokens
        // end.
        let found = (self.stops.iter().enumerate())
            .filter_map(|(stop, text)| self.held.find(text).map(|start| (start + text.len(), start, stop)))
            .min();
        let end = match found {
            Some((_, start, _)) => start,
            None => self.held.len() - self.longest_beginning(),
        };
        out.push_str(&self.held[..end]);
        self.held.drain(..end);
        self.reached = found.map(|(_, _, stop)| stop);
        if self.reached.is_some() {
            self.held.clear();
        }
        self.reached()
    }

    /// Bytes at the end of `held` that begin some stop string.
    fn longest_beginning(&self) -> usize {
        let held = self.held.as_bytes();
        let beginning = |stop: &String| {
            let longest = held.len().min(stop.len() - 1);
            (1..=longest).rev().find(|&n| held.ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
        };
        self.stops.iter().map(beginning).max().unwrap_or(0)
    }
}
