//! Which experts a token goes to.

use crate::KernelError;

/// What makes scores of a router's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouterScore {
    /// Softmax over all experts.
    Softmax,
    /// A sigmoid of each.
    Sigmoid,
}

/// How a token's experts are chosen and weighted.
///
/// Scores are made of logits; experts are chosen by score plus correction, in the order of falling values, the first one of equals, and weighted by score alone.
/// Shared experts, which every token goes to with weight 1, are numbered after the routed ones and follow them in a token's slots.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// Routed experts, E.
    pub experts: usize,
    /// Those of them that a token goes to.
    pub top_k: usize,
    /// Shared experts.
    pub shared: usize,
    /// Scores of logits.
    pub score: RouterScore,
    /// Consecutive groups of equal size that experts are in; 1 for no limit. A group's score is the sum of its two largest corrected scores.
    pub groups: usize,
    /// Groups of a token: experts of others are not chosen.
    pub top_groups: usize,
    /// Weights are divided by their sum.
    pub normalize: bool,
    /// Factor on weights of routed experts, after that.
    pub scale: f32,
}

impl Routing {
    /// Groups that kernels tell apart, at most.
    pub const MOST_GROUPS: usize = 32;

    /// Experts of a token: slots.
    pub fn slots(&self) -> usize {
        self.top_k + self.shared
    }

    /// Routed and shared experts.
    pub fn all_experts(&self) -> usize {
        self.experts + self.shared
    }

    /// Checks that every token finds as many different experts as it has slots.
    ///
    /// # Errors
    /// If it would not, with the number that is too large or does not divide.
    pub fn check(&self) -> Result<(), KernelError> {
        let fail = |problem: String| Err(KernelError::Device(problem));
        let Self { experts, top_k, groups, top_groups, .. } = *self;
        if groups == 0 || !experts.is_multiple_of(groups) {
            return fail(format!("{experts} experts do not make {groups} groups of equal size"));
        }
        if groups > Self::MOST_GROUPS {
            return fail(format!("experts are in {groups} groups; kernels are made for at most {}", Self::MOST_GROUPS));
        }
        if !(1..=groups).contains(&top_groups) {
            return fail(format!(
                "a token chooses from {top_groups} of {groups} groups of experts; it must be 1 to {groups}"
            ));
        }
        let choice = experts / groups * top_groups;
        if !(1..=choice).contains(&top_k) {
            return fail(format!("a token goes to {top_k} of {choice} experts; it must be 1 to {choice}"));
        }
        Ok(())
    }

    /// Whether logits choose experts, and not scores: those of a softmax come in the same order, but that some round to the same number.
    pub(crate) fn chooses_by_logits(&self, is_corrected: bool) -> bool {
        self.score == RouterScore::Softmax && !is_corrected && self.top_groups == self.groups
    }
}

/// The routes of a step, read back: what statistics of load are made of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostRoutes {
    /// The router's logits, `[T, E]`.
    pub logits: Vec<f32>,
    /// Experts of each token in the order of their slots, `[T, slots]`.
    pub experts: Vec<u32>,
    /// Their weights.
    pub weights: Vec<f32>,
    /// Tiles that the rows of each expert, shared ones included, are cut into: its weights are read once for each.
    pub tiles: Vec<u32>,
}

impl HostRoutes {
    /// One tile for each of `experts` experts that has rows: its weights are read once.
    pub(crate) fn one_tile_each(&mut self, experts: usize) {
        self.tiles.clear();
        self.tiles.resize(experts, 0);
        self.experts.iter().for_each(|&expert| self.tiles[expert as usize] = 1);
    }
}

/// How many tokens went to each expert, and how probable each was: what load balancing looks at.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RouterLoad {
    /// Tokens seen.
    pub tokens: u64,
    /// Tokens that went to each routed expert, `[E]`.
    pub counts: Vec<u64>,
    /// Sums over tokens of the softmax of logits, `[E]`.
    pub probabilities: Vec<f64>,
}

impl RouterLoad {
    /// No token yet.
    pub fn new(routing: &Routing) -> Self {
        Self { tokens: 0, counts: vec![0; routing.experts], probabilities: vec![0.0; routing.experts] }
    }

    /// Counts the tokens of a step.
    pub fn add(&mut self, routes: &HostRoutes) {
        let experts = self.counts.len();
        for logits in routes.logits.chunks_exact(experts) {
            self.tokens += 1;
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exponentials = || logits.iter().map(|logit| f64::from(logit - largest).exp());
            let sum: f64 = exponentials().sum();
            self.probabilities.iter_mut().zip(exponentials()).for_each(|(total, e)| *total += e / sum);
        }
        for &expert in &routes.experts {
            if let Some(count) = self.counts.get_mut(expert as usize) {
                *count += 1;
            }
        }
    }

    /// The auxiliary loss of load balancing (Fedus et al. 2021, equation 4), which is 1 where load is even: `E · Σ share of choices · mean
    /// probability`. 0 before the first token.
    pub fn balancing_loss(&self) -> f64 {
        let choices: u64 = self.counts.iter().sum();
        if choices == 0 {
            return 0.0;
        }
        let pairs = self.counts.iter().zip(&self.probabilities);
        let sum: f64 = pairs.map(|(&count, probability)| count as f64 / choices as f64 * probability).sum();
        self.counts.len() as f64 * sum / self.tokens as f64
    }
}

/// Experts and weights of one token by its logits, `[E]`; `correction` is added to scores where experts are chosen. `scores` and `choice` are scratch memory
/// of E values each. What is not a number is chosen last and makes every weight that it enters so, too.
pub(crate) fn choose(
    routing: &Routing,
    logits: &[f32],
    correction: Option<&[f32]>,
    [scores, choice]: [&mut [f32]; 2],
    experts: &mut [u32],
    weights: &mut [f32],
) {
    match routing.score {
        RouterScore::Sigmoid => {
            scores.iter_mut().zip(logits).for_each(|(score, &logit)| *score = 1.0 / (1.0 + (-logit).exp()));
        }
        RouterScore::Softmax => {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.iter_mut().zip(logits).for_each(|(score, &logit)| *score = (logit - largest).exp());
            let sum: f32 = scores.iter().sum();
            scores.iter_mut().for_each(|score| *score /= sum);
        }
    }
    choice.copy_from_slice(if routing.chooses_by_logits(correction.is_some()) { logits } else { scores });
    if let Some(correction) = correction {
        choice.iter_mut().zip(correction).for_each(|(choice, correction)| *choice += correction);
    }
    drop_other_groups(routing, choice);

    let (routed, shared) = experts.split_at_mut(routing.top_k);
    for i in 0..routed.len() {
        let (chosen, rest) = routed.split_at_mut(i);
        rest[0] = first_largest(choice.iter().copied(), |e| chosen.contains(&(e as u32))) as u32;
    }
    for (expert, shared) in (routing.experts as u32..).zip(shared) {
        *shared = expert;
    }
    let (of_routed, of_shared) = weights.split_at_mut(routing.top_k);
    of_routed.iter_mut().zip(&*routed).for_each(|(weight, &expert)| *weight = scores[expert as usize]);
    if routing.normalize {
        let sum = of_routed.iter().sum::<f32>() + 1e-20;
        of_routed.iter_mut().for_each(|weight| *weight /= sum);
    }
    of_routed.iter_mut().for_each(|weight| *weight *= routing.scale);
    of_shared.fill(1.0);
}

/// Makes the corrected scores of experts in other groups than a token's −∞.
fn drop_other_groups(routing: &Routing, choice: &mut [f32]) {
    if routing.top_groups == routing.groups {
        return;
    }
    let size = routing.experts / routing.groups;
    let score = |group: &[f32]| {
        let first = first_largest(group.iter().copied(), |_| false);
        if size == 1 {
            return group[first];
        }
        group[first] + group[first_largest(group.iter().copied(), |e| e == first)]
    };
    // A bit a group.
    let mut kept = 0u32;
    for _ in 0..routing.top_groups {
        let scores = choice.chunks_exact(size).map(score);
        kept |= 1 << first_largest(scores, |group| kept >> group & 1 == 1);
    }
    for (group, choice) in choice.chunks_exact_mut(size).enumerate() {
        if kept >> group & 1 == 0 {
            choice.fill(f32::NEG_INFINITY);
        }
    }
}

/// The index of the largest value, the first one of equals, among those that are not `taken`; what is not a number is less than all others.
fn first_largest(values: impl Iterator<Item = f32>, taken: impl Fn(usize) -> bool) -> usize {
    let mut best: Option<(usize, f32)> = None;
    for (index, value) in values.enumerate() {
        // Few are larger than all before them: whether they are taken is asked last.
        let is_larger = best.is_none_or(|(_, largest)| value > largest || largest.is_nan() && !value.is_nan());
        if is_larger && !taken(index) {
            best = Some((index, value));
        }
    }
    best.map_or(0, |(index, _)| index)
}

/// A step's pairs of token and expert, sorted by expert and, of one expert, by token: a counting sort.
#[derive(Debug, Default)]
pub(crate) struct Dispatch {
    /// Where each expert's pairs begin, `[experts + 1]`.
    pub(crate) offsets: Vec<u32>,
    /// The pair (token · slots + slot) at each place.
    pub(crate) pairs: Vec<u32>,
    /// The place of each pair: the inverse.
    pub(crate) places: Vec<u32>,
}

impl Dispatch {
    /// Room for so many experts and pairs.
    pub(crate) fn new(experts: usize, pairs: usize, device: &str) -> Result<Self, KernelError> {
        let vector = |count| crate::host::allocate("routes", &[count], device);
        Ok(Self { offsets: vector(experts + 1)?, pairs: vector(pairs)?, places: vector(pairs)? })
    }

    /// Sorts pairs by their experts.
    pub(crate) fn sort(&mut self, experts: &[u32]) {
        self.pairs.resize(experts.len(), 0);
        self.places.resize(experts.len(), 0);
        self.offsets.fill(0);
        for &expert in experts {
            self.offsets[expert as usize + 1] += 1;
        }
        for e in 1..self.offsets.len() {
            self.offsets[e] += self.offsets[e - 1];
        }
        // An expert's offset runs to its end, which is the next one's beginning.
        for (pair, &expert) in (0..).zip(experts) {
            let place = &mut self.offsets[expert as usize];
            self.pairs[*place as usize] = pair;
            self.places[pair as usize] = *place;
            *place += 1;
        }
        self.offsets.rotate_right(1);
        self.offsets[0] = 0;
    }

    /// The places of an expert's pairs.
    pub(crate) fn of(&self, expert: usize) -> std::ops::Range<usize> {
        self.offsets[expert] as usize..self.offsets[expert + 1] as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTING: Routing = Routing {
        experts: 4,
        top_k: 2,
        shared: 1,
        score: RouterScore::Sigmoid,
        groups: 1,
        top_groups: 1,
        normalize: true,
        scale: 1.5,
    };

    fn chosen(routing: &Routing, logits: &[f32], correction: Option<&[f32]>) -> (Vec<u32>, Vec<f32>) {
        let mut scratch = [vec![0.0; routing.experts], vec![0.0; routing.experts]];
        let (mut experts, mut weights) = (vec![9; routing.slots()], vec![f32::NAN; routing.slots()]);
        let [scores, choice] = &mut scratch;
        choose(routing, logits, correction, [scores, choice], &mut experts, &mut weights);
        (experts, weights)
    }

    fn assert_close(found: &[f32], wanted: &[f32]) {
        assert!(
            found.len() == wanted.len() && found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 1e-6),
            "{found:?}"
        );
    }

    #[test]
    fn scores_choose_corrections_choose_and_scores_weigh() {
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let (experts, weights) = chosen(&ROUTING, &[1.0, 0.0, 2.0, -1.0], None);
        assert_eq!(experts, [2, 0, 4]);
        let sum = sigmoid(2.0) + sigmoid(1.0);
        assert_close(&weights, &[1.5 * sigmoid(2.0) / sum, 1.5 * sigmoid(1.0) / sum, 1.0]);

        let (experts, weights) = chosen(&ROUTING, &[1.0, 0.0, 2.0, -1.0], Some(&[0.0, 0.0, 0.0, 9.0]));
        assert_eq!(experts, [3, 2, 4]);
        let sum = sigmoid(2.0) + sigmoid(-1.0);
        assert_close(&weights, &[1.5 * sigmoid(-1.0) / sum, 1.5 * sigmoid(2.0) / sum, 1.0]);

        let softmax = Routing { score: RouterScore::Softmax, normalize: false, scale: 1.0, shared: 0, ..ROUTING };
        let (experts, weights) = chosen(&softmax, &[0.0, 2.0f32.ln(), 0.0, 4.0f32.ln()], None);
        assert_eq!(experts, [3, 1]);
        assert_close(&weights, &[0.5, 0.25]);
    }

    #[test]
    fn the_first_of_equals_is_chosen_and_what_is_no_number_last() {
        assert_eq!(chosen(&ROUTING, &[0.5; 4], None).0, [0, 1, 4]);
        assert_eq!(chosen(&ROUTING, &[f32::NAN, 0.0, f32::NAN, -1.0], None).0, [1, 3, 4]);
        let (experts, weights) = chosen(&ROUTING, &[f32::NAN; 4], None);
        assert_eq!(experts, [0, 1, 4]);
        assert!(weights[..2].iter().all(|weight| weight.is_nan()));
    }

    #[test]
    fn only_experts_of_the_best_groups_are_chosen() {
        let routing = Routing { groups: 2, top_groups: 1, ..ROUTING };
        // The second group has the larger sum, the first one the largest score.
        assert_eq!(chosen(&routing, &[3.0, -5.0, 1.0, 2.0], None).0, [3, 2, 4]);
    }

    #[test]
    fn impossible_routings_are_refused() {
        assert!(ROUTING.check().is_ok());
        for (routing, problem) in [
            (Routing { top_k: 5, ..ROUTING }, "a token goes to 5 of 4 experts"),
            (Routing { top_k: 0, ..ROUTING }, "a token goes to 0 of 4 experts"),
            (Routing { top_k: 3, groups: 2, ..ROUTING }, "a token goes to 3 of 2 experts"),
            (Routing { groups: 3, ..ROUTING }, "4 experts do not make 3 groups"),
            (Routing { groups: 0, ..ROUTING }, "4 experts do not make 0 groups"),
            (Routing { top_groups: 2, ..ROUTING }, "from 2 of 1 groups"),
        ] {
            let found = routing.check().unwrap_err().to_string();
            assert!(found.contains(problem), "{found}");
        }
    }

    #[test]
    fn pairs_are_sorted_by_expert_then_token() {
        let mut dispatch = Dispatch::new(4, 6, "test").unwrap();
        dispatch.sort(&[2, 0, 3, 2, 0, 2]);
        assert_eq!(dispatch.offsets, [0, 2, 2, 5, 6]);
        assert_eq!(dispatch.pairs, [1, 4, 0, 3, 5, 2]);
        assert_eq!(dispatch.places, [2, 0, 5, 3, 1, 4]);
        assert_eq!((dispatch.of(1), dispatch.of(2)), (2..2, 2..5));
    }

    #[test]
    fn even_load_has_a_loss_of_one() {
        let routing = Routing { shared: 0, ..ROUTING };
        let mut load = RouterLoad::new(&routing);
        assert_eq!(load.balancing_loss(), 0.0);
        let routes = |experts: &[u32]| HostRoutes {
            logits: vec![0.0; 8],
            experts: experts.to_vec(),
            weights: vec![0.5; 4],
            tiles: Vec::new(),
        };
        load.add(&routes(&[0, 1, 2, 3]));
        assert_eq!((load.tokens, &load.counts[..]), (2, &[1, 1, 1, 1][..]));
        assert!((load.balancing_loss() - 1.0).abs() < 1e-12);
    }
}
