//! Bits where they save most.

/// A format that a matrix may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    /// What it takes.
    pub(super) bits: f64,
    /// What it costs.
    pub(super) kl: f64,
}

/// Of each matrix the choice, by its index, with which all together cost least while they take no more than `budget` bits.
/// `None` if even the smallest choices take more.
///
/// Only choices on the lower convex hull of bits and cost are made, so that the steps from each to the next save less and less for a
/// bit. Taking the best step of any matrix until none fits is then optimal but for what is left of the budget.
pub(super) fn allocate(matrices: &[Vec<Choice>], budget: f64) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = matrices.iter().map(|choices| hull(choices)).collect();
    let mut at = vec![0; matrices.len()];
    let mut left = budget - hulls.iter().zip(matrices).map(|(hull, choices)| choices[hull[0]].bits).sum::<f64>();
    // What is asked for may be what there is, but for rounding.
    if left < -1e-9 * budget {
        return None;
    }
    loop {
        let steps = hulls.iter().zip(matrices).zip(&at).enumerate().filter_map(|(index, ((hull, choices), &at))| {
            let (from, to) = (choices[hull[at]], choices[*hull.get(at + 1)?]);
            let bits = to.bits - from.bits;
            (bits <= left).then_some((index, bits, (from.kl - to.kl) / bits))
        });
        // Of equal steps the first, for `max_by` gives the last.
        let best = steps.collect::<Vec<_>>().into_iter().rev().max_by(|a, b| a.2.total_cmp(&b.2));
        let Some((index, bits, _)) = best else { break };
        at[index] += 1;
        left -= bits;
    }
    Some(hulls.iter().zip(at).map(|(hull, at)| hull[at]).collect())
}

/// The choices that no mix of two others beats, by their indices, from the smallest on.
fn hull(choices: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    let by_size = |&a: &usize, &b: &usize| {
        let (a, b) = (choices[a], choices[b]);
        a.bits.total_cmp(&b.bits).then(a.kl.total_cmp(&b.kl))
    };
    order.sort_by(by_size);
    let mut hull: Vec<usize> = Vec::new();
    let saved = |from: usize, to: usize| (choices[from].kl - choices[to].kl) / (choices[to].bits - choices[from].bits);
    for next in order {
        match hull.last() {
            // Not smaller, and no better.
            Some(&last) if choices[next].kl >= choices[last].kl || choices[next].bits == choices[last].bits => continue,
            _ => {}
        }
        while let [.., before, last] = hull[..]
            && saved(before, last) <= saved(last, next)
        {
            hull.pop();
        }
        hull.push(next);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(of: &[(f64, f64)]) -> Vec<Choice> {
        of.iter().map(|&(bits, kl)| Choice { bits, kl }).collect()
    }

    #[test]
    fn a_hull_leaves_out_what_others_beat() {
        let of = choices(&[(4.0, 1.0), (2.0, 9.0), (3.0, 8.0), (3.5, 10.0), (8.0, 0.9), (8.0, 0.1)]);
        assert_eq!(hull(&of), [1, 0, 5]);
        assert_eq!(hull(&choices(&[(3.0, 0.0)])), [0]);
    }

    /// The best of all mixes, found by trying them.
    fn best(matrices: &[Vec<Choice>], budget: f64) -> f64 {
        match matrices.split_first() {
            None => 0.0,
            Some((first, rest)) => {
                let of = |choice: &Choice| choice.kl + best(rest, budget - choice.bits);
                first.iter().filter(|choice| choice.bits <= budget).map(of).fold(f64::INFINITY, f64::min)
            }
        }
    }

    #[test]
    fn no_mix_on_the_hulls_costs_less() {
        // Costs that fall with the square of what a bit more resolves, with one outlier.
        let matrix = |size: f64, cost: f64| -> Vec<Choice> {
            let of = |bits: f64| Choice { bits: size * bits, kl: cost * 4f64.powf(-bits) };
            [2.0, 3.0, 4.0, 8.0].map(of).into()
        };
        let mut matrices = vec![matrix(1.0, 1.0), matrix(2.0, 5.0), matrix(1.0, 0.1), matrix(4.0, 3.0)];
        matrices[3][1].kl = 100.0;
        for budget in [16.0, 18.0, 20.0, 24.0, 33.0, 64.0, 100.0] {
            let chosen = allocate(&matrices, budget).unwrap();
            let of = |value: fn(&Choice) -> f64| {
                matrices.iter().zip(&chosen).map(|(choices, &index)| value(&choices[index])).sum::<f64>()
            };
            assert!(of(|choice| choice.bits) <= budget);
            // All that fits may be left is less than the largest step.
            let (kl, slack) = (of(|choice| choice.kl), best(&matrices, budget - 16.0));
            assert!(kl >= best(&matrices, budget) - 1e-12 && (budget < 32.0 || kl <= slack), "{budget}: {kl}");
        }
        assert_eq!(allocate(&matrices, 15.0), None);
        assert_eq!(allocate(&matrices, 16.0), Some(vec![0; 4]));
        assert_eq!(allocate(&matrices, 1000.0), Some(vec![3; 4]));
    }
}
