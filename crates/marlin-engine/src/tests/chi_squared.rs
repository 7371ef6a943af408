//! Pearson's χ² test: whether what was counted may come from given probabilities.

use std::f64::consts::PI;

/// Cells in which fewer are expected are taken together with others: χ² only approximates how such counts spread.
const LEAST_EXPECTED: f64 = 5.0;

/// How likely it is to count something that is at least as odd as `counts`, in cells of these probabilities. What cannot be must not occur.
pub(super) fn p_value(counts: &[f64], probabilities: &[f64]) -> f64 {
    let total: f64 = counts.iter().sum();
    let mut cells: Vec<(f64, f64)> =
        probabilities.iter().map(|share| total * share).zip(counts.iter().copied()).collect();
    if cells.iter().any(|&(expected, count)| expected == 0.0 && count > 0.0) {
        return 0.0;
    }
    cells.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    let mut bins: Vec<(f64, f64)> = Vec::new();
    for (expected, count) in cells {
        match bins.last_mut() {
            Some(bin) if bin.0 < LEAST_EXPECTED => *bin = (bin.0 + expected, bin.1 + count),
            _ => bins.push((expected, count)),
        }
    }
    assert!(bins.len() > 1 && bins.iter().all(|bin| bin.0 >= LEAST_EXPECTED), "too little was counted: {bins:?}");
    let statistic = bins.iter().map(|(expected, count)| (count - expected).powi(2) / expected).sum();
    tail(statistic, bins.len() - 1)
}

/// The probability that a χ² variable of so many degrees of freedom exceeds `value`: one less the series of the incomplete gamma function, whose
/// terms are yᵃ e⁻ʸ / Γ(a + 1) for half of the value, y, and for half of the degrees and what lies whole numbers above it, a.
fn tail(value: f64, degrees: usize) -> f64 {
    let (half, first) = (value / 2.0, degrees as f64 / 2.0);
    // Logarithms of the terms, from the smallest a that Γ is known of on.
    let (mut place, mut term) =
        if degrees.is_multiple_of(2) { (0.0, -half) } else { (0.5, 0.5 * half.ln() - half - (PI.sqrt() / 2.0).ln()) };
    let mut below = 0.0;
    while place < first || place < half || term > -40.0 {
        if place >= first {
            below += term.exp();
        }
        place += 1.0;
        term += (half / place).ln();
    }
    1.0 - below
}

#[test]
fn tails_are_those_of_tables() {
    for (value, degrees, wanted) in
        [(3.841, 1, 0.05), (5.991, 2, 0.05), (29.588, 10, 0.001), (124.342, 100, 0.05), (23.928, 1, 1e-6)]
    {
        let tail = tail(value, degrees);
        assert!((tail / wanted - 1.0).abs() < 0.001, "{tail} beyond {value} of {degrees} degrees, not {wanted}");
    }
    assert_eq!(tail(0.0, 7), 1.0);
    assert!(tail(10_000.0, 50).abs() < 1e-9);
}

#[test]
fn mendels_peas_are_plausible() {
    let shares = [9.0, 3.0, 3.0, 1.0].map(|share| share / 16.0);
    assert!((p_value(&[315.0, 108.0, 101.0, 32.0], &shares) - 0.925).abs() < 0.001);
    // Others would not be.
    assert!(p_value(&[250.0, 140.0, 134.0, 32.0], &shares) < 1e-6);
    // Rare cells count together: these are two bins of 6 and 94.
    let rare = [0.02, 0.02, 0.02, 0.94];
    assert!((p_value(&[6.0, 0.0, 0.0, 94.0], &rare) - 1.0).abs() < 1e-6);
    assert_eq!(p_value(&[50.0, 49.0, 1.0], &[0.5, 0.5, 0.0]), 0.0);
}
