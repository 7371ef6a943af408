//! How far logits are from those that are wanted.

/// Norm of the difference relative to that of what is wanted.
pub(crate) fn error(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let square = |x: f64| x * x;
    let difference: f64 = found.iter().zip(wanted).map(|(&f, &w)| square(f64::from(f) - f64::from(w))).sum();
    (difference / wanted.iter().map(|&w| square(f64::from(w))).sum::<f64>()).sqrt()
}
