//! Guesses from what was said before.

use super::{AnswerId, Drafter};
use crate::EngineError;

/// Looks for the last place where the end of the text stood before, and guesses that what followed there follows again
/// (Saxena 2023, "prompt lookup decoding"): texts that quote, rewrite or go on with their prompt, code above all, do so most of the time.
#[derive(Debug, Clone, Copy)]
pub struct PromptLookup {
    /// The longest end of the text that is looked for.
    longest: usize,
    /// The shortest: below it, places are alike by chance.
    shortest: usize,
    /// How far back, in tokens.
    reach: usize,
}

impl Default for PromptLookup {
    fn default() -> Self {
        Self { longest: 8, shortest: 2, reach: 8192 }
    }
}

impl Drafter for PromptLookup {
    fn draft(&mut self, _: AnswerId, tokens: &[u32], most: usize, draft: &mut Vec<u32>) -> Result<(), EngineError> {
        if let Some(next) = self.find(tokens) {
            // What is guessed beyond the end of the text is what repeats there.
            draft.extend(tokens[next..].iter().cycle().take(most));
        }
        Ok(())
    }

    fn forget(&mut self, _: AnswerId) {}
}

impl PromptLookup {
    /// Where the text goes on after the place most like its end: the longest match wins, and of equally long ones the last.
    fn find(&self, tokens: &[u32]) -> Option<usize> {
        let (&last, before) = tokens.split_last()?;
        let first = before.len().saturating_sub(self.reach);
        let mut best = (self.shortest - 1, None);
        for place in (first..before.len()).rev().filter(|&place| before[place] == last) {
            let ends = before[..place].iter().rev().zip(before.iter().rev()).take(self.longest - 1);
            let alike = 1 + ends.take_while(|(then, now)| then == now).count();
            if alike > best.0 {
                best = (alike, Some(place + 1));
                if alike == self.longest {
                    break;
                }
            }
        }
        best.1
    }
}
