//! How far a quantised matrix is from its source.

use serde::{Deserialize, Serialize};

/// Sums over the weights of a matrix; those of row blocks add up with [`ErrorStats::merge`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ErrorStats {
    /// Σ w².
    pub signal: f64,
    /// Σ (ŵ − w)².
    pub noise: f64,
    /// The largest |ŵ − w|.
    pub max_abs: f32,
}

impl ErrorStats {
    /// Compares decoded weights with their source.
    pub fn of(source: &[f32], decoded: &[f32]) -> Self {
        let mut stats = Self::default();
        for (&w, &d) in source.iter().zip(decoded) {
            let error = f64::from(d) - f64::from(w);
            stats.signal += f64::from(w) * f64::from(w);
            stats.noise += error * error;
            stats.max_abs = stats.max_abs.max(error.abs() as f32);
        }
        stats
    }

    /// Adds the sums of other weights.
    pub fn merge(self, other: Self) -> Self {
        Self {
            signal: self.signal + other.signal,
            noise: self.noise + other.noise,
            max_abs: self.max_abs.max(other.max_abs),
        }
    }

    /// Root mean square error relative to the root mean square weight; 0 for an exact copy, infinite where zeros became
    /// something else.
    pub fn relative_rms(&self) -> f64 {
        if self.noise == 0.0 { 0.0 } else { (self.noise / self.signal).sqrt() }
    }

    /// Signal to quantisation noise ratio in dB; infinite for an exact copy.
    pub fn sqnr_db(&self) -> f64 {
        -20.0 * self.relative_rms().log10()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_errors() {
        let stats = ErrorStats::of(&[3.0, -4.0], &[3.0, -4.5]);
        assert_eq!(stats, ErrorStats { signal: 25.0, noise: 0.25, max_abs: 0.5 });
        assert_eq!(stats.relative_rms(), 0.1);
        assert_eq!(stats.sqnr_db(), 20.0);
    }

    #[test]
    fn exact_copies_and_zeros() {
        assert_eq!(ErrorStats::of(&[1.0, 2.0], &[1.0, 2.0]).sqnr_db(), f64::INFINITY);
        assert_eq!(ErrorStats::of(&[0.0], &[0.0]).relative_rms(), 0.0);
        assert_eq!(ErrorStats::of(&[0.0], &[1.0]).relative_rms(), f64::INFINITY);
    }

    #[test]
    fn blocks_add_up() {
        let (source, decoded) = ([1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 2.0, 4.0]);
        let halves = ErrorStats::of(&source[..2], &decoded[..2]).merge(ErrorStats::of(&source[2..], &decoded[2..]));
        assert_eq!(halves, ErrorStats::of(&source, &decoded));
    }
}
