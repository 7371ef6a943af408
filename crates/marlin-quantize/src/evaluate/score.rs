//! The arithmetic of one predicted token.

/// What one row of logits says about its token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RowScore {
    /// Negative log-likelihood of the token that came, in nats.
    pub(super) nll: f64,
    /// Against the baseline, if there is one.
    pub(super) agreement: Option<Agreement>,
}

/// A row of logits against the baseline's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Agreement {
    /// KL(P_baseline ‖ P_model) in nats.
    pub(super) kl: f64,
    /// Both find the same token most likely (the lowest id among equals).
    pub(super) same_top1: bool,
}

/// Scores one row; `None` if a logit is not finite or the target is outside the vocabulary.
pub(super) fn score_row(logits: &[f32], target: u32, baseline: Option<&[f32]>) -> Option<RowScore> {
    let model = LogNormalizer::of(logits)?;
    let nll = model.log_sum - f64::from(*logits.get(target as usize)?);
    let agreement = match baseline {
        None => None,
        Some(baseline) => Some(compare(baseline, logits, &model)?),
    };
    Some(RowScore { nll, agreement })
}

/// ln Σ exp(l) of a row, and where its largest logit is.
struct LogNormalizer {
    log_sum: f64,
    top1: usize,
}

impl LogNormalizer {
    fn of(logits: &[f32]) -> Option<Self> {
        let (top1, max) = largest(logits)?;
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
        Some(Self { log_sum: max + sum.ln(), top1 })
    }
}

/// KL(P_b ‖ P_m) = Σ p_b (b − m) − ln Σ exp(b) + ln Σ exp(m). Equal rows give exactly 0.
fn compare(baseline: &[f32], logits: &[f32], model: &LogNormalizer) -> Option<Agreement> {
    let (top1, max) = largest(baseline)?;
    let (mut sum, mut weighted) = (0.0, 0.0);
    for (&b, &m) in baseline.iter().zip(logits) {
        let b = f64::from(b);
        let e = (b - max).exp();
        sum += e;
        weighted += e * (b - f64::from(m));
    }
    let kl = weighted / sum + (model.log_sum - (max + sum.ln()));
    // Rounding may leave a tiny negative number where the divergence is 0.
    Some(Agreement { kl: kl.max(0.0), same_top1: top1 == model.top1 })
}

/// Position and value of the first largest logit; `None` for an empty row or one that is not finite.
fn largest(logits: &[f32]) -> Option<(usize, f64)> {
    if !logits.iter().all(|l| l.is_finite()) {
        return None;
    }
    let (index, max) =
        logits.iter().copied().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best })?;
    Some((index, f64::from(max)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_row_costs_the_logarithm_of_the_vocabulary() {
        let row = score_row(&[7.5; 10], 3, None).unwrap();
        assert!((row.nll - 10f64.ln()).abs() < 1e-14);
        assert_eq!(row.agreement, None);
    }

    #[test]
    fn a_row_of_known_probabilities() {
        // Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8; the baseline's are 1/4, 1/4, 1/2.
        let model = [0.0, 2f32.ln(), 5f32.ln()];
        let baseline = [1.0, 1.0, 1.0 + 2f32.ln()];
        let row = score_row(&model, 1, Some(&baseline)).unwrap();
        assert!((row.nll - 4f64.ln()).abs() < 1e-6);
        let kl = 0.25 * (0.25f64 / 0.125).ln() + 0.25 * (0.25f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.625).ln();
        let agreement = row.agreement.unwrap();
        assert!((agreement.kl - kl).abs() < 1e-6, "{} {kl}", agreement.kl);
        assert!(agreement.same_top1);
    }

    #[test]
    fn equal_rows_diverge_by_exactly_nothing() {
        let row: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 20.0).collect();
        let agreement = score_row(&row, 0, Some(&row)).unwrap().agreement.unwrap();
        assert_eq!(agreement, Agreement { kl: 0.0, same_top1: true });
    }

    #[test]
    fn extreme_logits_neither_overflow_nor_vanish() {
        let row = score_row(&[1e4, -1e4, 0.0], 1, None).unwrap();
        assert_eq!(row.nll, 2e4);
    }

    #[test]
    fn the_lowest_id_wins_among_equals() {
        let row = score_row(&[1.0, 1.0, 0.0], 0, Some(&[0.0, 1.0, 1.0])).unwrap();
        assert!(!row.agreement.unwrap().same_top1);
    }

    #[test]
    fn rows_that_are_not_finite_are_refused() {
        assert_eq!(score_row(&[0.0, f32::NAN], 0, None), None);
        assert_eq!(score_row(&[0.0, 1.0], 0, Some(&[0.0, f32::INFINITY])), None);
        assert_eq!(score_row(&[0.0, 1.0], 2, None), None);
    }
}
