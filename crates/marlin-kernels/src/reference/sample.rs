//! Sampling by sorting the whole vocabulary.

use crate::SampleRow;
use crate::sampling::{allow_choice, by_falling_logit};

/// Chooses a token of one row of logits; `last` is the token of `last_sampled`.
pub(super) fn sample(row: &SampleRow<'_>, logits: &mut [f32], last: Option<u32>) -> u32 {
    if !allow_choice(logits) {
        return SampleRow::NOT_FINITE;
    }
    row.adjust(logits, last);
    let (most_likely, largest) = row.most_likely(logits);
    if row.is_greedy(largest) {
        return most_likely;
    }

    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(by_falling_logit(logits));
    let mut kept: Vec<(u32, f64)> = order.iter().map(|&id| (id, row.weight(logits[id as usize], largest))).collect();

    kept.truncate(row.kept_by_top_k(kept.len()));
    let total: f64 = kept.iter().map(|&(_, weight)| weight).sum();
    if row.top_p < 1.0 {
        let reached = kept.iter().scan(0.0, |sum, &(_, weight)| {
            *sum += weight;
            Some(*sum)
        });
        let before = reached.take_while(|sum| *sum < f64::from(row.top_p) * total).count();
        kept.truncate(before + 1);
    }
    let likely = kept.iter().take_while(|&&(_, weight)| weight >= f64::from(row.min_p)).count();
    kept.truncate(likely.max(1));

    let target = f64::from(row.uniform) * kept.iter().map(|&(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    for &(id, weight) in &kept {
        sum += weight;
        if sum > target {
            return id;
        }
    }
    most_likely
}
