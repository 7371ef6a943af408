//! Sampling without sorting the vocabulary, and the tokens of devices whose memory is the host's.

use crate::sampling::{KEPT_SAMPLINGS, SamplingIds, allow_choice, by_falling_logit};
use crate::{KernelError, SampleRow, SamplingId};

/// The tokens of the last samplings, in host memory.
#[derive(Debug, Default)]
pub(crate) struct HostSamplings {
    ids: SamplingIds,
    tokens: [Vec<u32>; KEPT_SAMPLINGS],
    last: usize,
}

impl HostSamplings {
    /// Begins a sampling of `rows` rows: its id, the tokens of the sampling before, and where its own go.
    pub(crate) fn begin(&mut self, rows: usize) -> (SamplingId, &[u32], &mut [u32]) {
        let (id, place) = self.ids.next();
        let [first, second] = &mut self.tokens;
        let (tokens, before) = if place == 0 { (first, second) } else { (second, first) };
        tokens.clear();
        tokens.resize(rows, SampleRow::NOT_FINITE);
        self.last = place;
        (id, before, tokens)
    }

    /// The tokens of the last sampling.
    pub(crate) fn last(&self) -> &[u32] {
        &self.tokens[self.last]
    }

    /// Copies the tokens of a sampling.
    pub(crate) fn read(&self, id: SamplingId, out: &mut [u32]) -> Result<(), KernelError> {
        let tokens = &self.tokens[self.ids.find(id)?];
        assert_eq!(tokens.len(), out.len(), "a token for each row of the sampling");
        out.copy_from_slice(tokens);
        Ok(())
    }
}

/// The token of row `row` of a sampling, if it is one.
pub(crate) fn token_of(tokens: &[u32], row: Option<u32>) -> Option<u32> {
    row.map(|row| tokens[row as usize]).filter(|&token| token != SampleRow::NOT_FINITE)
}

/// Tokens sorted at first; each further stretch is as long as all before it.
const FIRST_STRETCH: usize = 128;

/// Chooses a token of one row of logits; `last` is the token of `last_sampled`, `ids` scratch of at least as many entries as there are
/// logits.
pub(crate) fn sample(row: &SampleRow<'_>, logits: &mut [f32], last: Option<u32>, ids: &mut [u32]) -> u32 {
    if !allow_choice(logits) {
        return SampleRow::NOT_FINITE;
    }
    row.adjust(logits, last);
    let (most_likely, largest) = row.most_likely(logits);
    if row.is_greedy(largest) {
        return most_likely;
    }
    let weight = |id: u32| row.weight(logits[id as usize], largest);

    let ids = &mut ids[..logits.len()];
    ids.iter_mut().zip(0..).for_each(|(id, i)| *id = i);
    let mut order = LazyOrder { logits, ids, sorted: 0 };
    let order_len = row.kept_by_top_k(logits.len());
    if order_len < logits.len() {
        order.sort_first(order_len);
    }
    let top_k_total: f64 = order.ids[..order_len].iter().map(|&id| weight(id)).sum();

    let enough = if row.top_p < 1.0 { f64::from(row.top_p) * top_k_total } else { f64::INFINITY };
    let keeps_all = enough.is_infinite() && row.min_p <= 0.0;
    let (mut kept, mut total) = (order_len, top_k_total);
    if !keeps_all {
        (kept, total) = (1, weight(order.id(0)));
        while kept < order_len && total < enough {
            let next = weight(order.id(kept));
            if next < f64::from(row.min_p) {
                break;
            }
            (kept, total) = (kept + 1, total + next);
        }
    }

    let target = f64::from(row.uniform) * total;
    let mut sum = 0.0;
    for i in 0..kept {
        let id = order.id(i);
        sum += weight(id);
        if sum > target {
            return id;
        }
    }
    most_likely
}

/// Token ids by falling logit, sorted only as far as they are looked at.
struct LazyOrder<'a> {
    logits: &'a [f32],
    ids: &'a mut [u32],
    sorted: usize,
}

impl LazyOrder<'_> {
    fn id(&mut self, index: usize) -> u32 {
        if index >= self.sorted {
            self.sort_first((index + 1).max(2 * self.sorted).max(FIRST_STRETCH));
        }
        self.ids[index]
    }

    /// Brings the first `count` ids into their final places.
    fn sort_first(&mut self, count: usize) {
        let count = count.min(self.ids.len());
        let rest = &mut self.ids[self.sorted..];
        let stretch = count - self.sorted;
        if stretch < rest.len() {
            rest.select_nth_unstable_by(stretch, by_falling_logit(self.logits));
        }
        rest[..stretch].sort_unstable_by(by_falling_logit(self.logits));
        self.sorted = count;
    }
}
