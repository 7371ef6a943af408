//! Whether blocks come sooner from the disk than they are computed.

/// Weight of what was measured last.
const NEWS: f64 = 0.25;
/// Steps of fewer tokens do not tell how long the tokens of a prompt take: those of many take less each.
const LEAST_TOKENS: usize = 64;
/// Where computing is faster, one prompt in so many is fetched all the same: the disk may have become faster, or the device busier.
const RETRIED: u32 = 32;

/// Seconds that a token takes, from the disk and computed; `None` before anything is known.
#[derive(Debug, Default)]
pub(crate) struct FetchPace {
    fetched: Option<f64>,
    computed: Option<f64>,
    /// Prompts in a row that were not fetched.
    skipped: u32,
}

impl FetchPace {
    /// So many tokens came from the disk.
    pub(crate) fn note_fetched(&mut self, tokens: usize, seconds: f64) {
        if tokens > 0 {
            learn(&mut self.fetched, seconds / tokens as f64);
        }
    }

    /// A step has computed so many tokens.
    pub(crate) fn note_computed(&mut self, tokens: usize, seconds: f64) {
        if tokens >= LEAST_TOKENS {
            learn(&mut self.computed, seconds / tokens as f64);
        }
    }

    /// Whether the next prompt is to be fetched.
    pub(crate) fn is_worth_it(&mut self) -> bool {
        let is_slower = self.fetched.zip(self.computed).is_some_and(|(fetched, computed)| fetched > computed);
        self.skipped = if is_slower { (self.skipped + 1) % RETRIED } else { 0 };
        self.skipped == 0
    }
}

fn learn(known: &mut Option<f64>, found: f64) {
    *known = Some(known.map_or(found, |known| known + NEWS * (found - known)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_faster_way_is_taken() {
        let mut pace = FetchPace::default();
        assert!(pace.is_worth_it(), "nothing is known");
        pace.note_fetched(1000, 0.1);
        pace.note_computed(8, 0.0001);
        assert!(pace.is_worth_it(), "a small step tells nothing");
        pace.note_computed(512, 5.0);
        assert!(pace.is_worth_it());
        (0..50).for_each(|_| pace.note_computed(512, 0.01));
        let tried = (0..2 * RETRIED).filter(|_| pace.is_worth_it()).count();
        assert_eq!(tried, 2, "now and then");
        (0..50).for_each(|_| pace.note_fetched(1000, 0.001));
        assert!((0..5).all(|_| pace.is_worth_it()), "the disk became faster");
    }
}
