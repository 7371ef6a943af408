//! Logarithms of probabilities, from logits.

use std::cmp::Ordering;

use crate::TokenLogprobs;

/// How likely `token` was, given its row of logits, and `alternatives` of the most likely tokens in its place.
pub(crate) fn token_logprobs(logits: &[f32], token: u32, alternatives: usize) -> TokenLogprobs {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - largest).exp())).sum();
    let normaliser = f64::from(largest) + sum.ln();
    let logprob = |id: u32| (f64::from(logits[id as usize]) - normaliser) as f32;
    let top = most_likely(logits, alternatives).into_iter().map(|id| (id, logprob(id))).collect();
    TokenLogprobs { token, logprob: logprob(token), top }
}

/// The ids of the largest logits, the largest first; the lower id of two equals.
fn most_likely(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let order = |a: &u32, b: &u32| {
        let (x, y) = (logits[*a as usize], logits[*b as usize]);
        y.partial_cmp(&x).unwrap_or(Ordering::Equal).then(a.cmp(b))
    };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.select_nth_unstable_by(count - 1, order);
    ids.truncate(count);
    ids.sort_unstable_by(order);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_to_one_and_the_likeliest_come_first() {
        let logits = [1.0, -2.0, 3.0, 3.0, f32::NEG_INFINITY, 1000.0_f32.ln()];
        let scored = token_logprobs(&logits, 1, 6);
        let order: Vec<u32> = scored.top.iter().map(|&(id, _)| id).collect();
        assert_eq!(order, [5, 2, 3, 0, 1, 4]);
        let sum: f32 = scored.top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        let expected = -2.0 - (1.0_f32.exp() + (-2.0_f32).exp() + 2.0 * 3.0_f32.exp() + 1000.0).ln();
        assert!((scored.logprob - expected).abs() < 1e-5, "{} {expected}", scored.logprob);
        assert_eq!(scored.top[5].1, f32::NEG_INFINITY);
        assert_eq!(token_logprobs(&logits, 0, 2).top, scored.top[..2]);
        assert_eq!(token_logprobs(&logits, 0, 0).top, []);
    }
}
