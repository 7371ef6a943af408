//! Experts that a text hardly uses.

use marlin_kernels::RouterLoad;

/// Tokens that every expert is taken to have seen before the first one is counted: the load of an expert that a text hardly reaches stays near the mean
/// that a router is trained for, and no short text makes it extreme.
const PRIOR_TOKENS: f64 = 32.0;

/// The experts of one layer by how much a text used them.
#[derive(Debug, Clone, PartialEq)]
pub struct ColdExperts {
    /// Those that are cold, in ascending order.
    pub cold: Vec<usize>,
    /// Load of each expert over the mean, with the prior.
    pub load: Vec<f64>,
}

/// Chooses the coldest `fraction` of a layer's experts, the first ones of equals; rounded to the nearest number of experts.
pub fn cold_experts(load: &RouterLoad, fraction: f64) -> ColdExperts {
    let experts = load.counts.len();
    let mean = load.counts.iter().sum::<u64>() as f64 / experts.max(1) as f64;
    let load: Vec<f64> =
        load.counts.iter().map(|&count| (count as f64 + PRIOR_TOKENS) / (mean + PRIOR_TOKENS)).collect();
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by(|&a, &b| load[a].total_cmp(&load[b]));
    let count = (fraction.clamp(0.0, 1.0) * experts as f64).round() as usize;
    let mut cold = order[..count.min(experts)].to_vec();
    cold.sort_unstable();
    ColdExperts { cold, load }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(counts: &[u64]) -> RouterLoad {
        RouterLoad { tokens: counts.iter().sum(), counts: counts.to_vec(), probabilities: vec![0.0; counts.len()] }
    }

    #[test]
    fn the_least_used_are_cold() {
        let found = cold_experts(&load(&[900, 10, 500, 10]), 0.5);
        assert_eq!(found.cold, [1, 3]);
        assert_eq!(cold_experts(&load(&[7, 7, 7, 7]), 0.3).cold, [0]);
        assert_eq!(cold_experts(&load(&[1, 2, 3, 4]), 0.0).cold, [0usize; 0]);
        assert_eq!(cold_experts(&load(&[1, 2, 3, 4]), 1.0).cold, [0, 1, 2, 3]);
    }

    #[test]
    fn a_short_text_leaves_loads_near_the_mean() {
        let short = cold_experts(&load(&[4, 0, 0, 0]), 0.25);
        assert!(short.load.iter().all(|load| (0.9..1.2).contains(load)), "{short:?}");
        let long = cold_experts(&load(&[40_000, 0, 0, 0]), 0.25);
        assert!(long.load[0] > 3.9 && long.load[1] < 0.01, "{long:?}");
    }
}
