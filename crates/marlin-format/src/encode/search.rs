//! Finding the scale and zero point of a group.

use super::ScaleSearch;
use super::scale::{Scale, ScaleStore};
use crate::element::{E2M1, E4M3, IntegerRounding, Rounding};

/// What is stored of a group besides its codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    pub(super) scale: Scale,
    /// Code of the zero point; 0 without.
    pub(super) zero: u8,
}

/// The scales a search walks through, as factors on the scale that spans the range of the group: from `first`
/// downwards, each `ratio` of the one before, to `last` or until `patience` in a row have not helped.
#[derive(Debug, Clone, Copy)]
struct Walk {
    first: f32,
    ratio: f32,
    last: f32,
    patience: u32,
}

/// Least-squares fits of the scale to the codes chosen for the best one so far.
const REFITS: usize = 2;

impl Walk {
    /// The top values of E2M1 are far apart, which is why scales *above* the one that just spans the range may win:
    /// they put the largest weight at 4 or 3, not at 6.
    const E2M1: Self = Self { first: 1.6, ratio: 0.94, last: 0.1, patience: 6 };

    /// The spacing of E4M3 is proportional to the value, so that errors repeat with every octave of scales: one is
    /// walked.
    const E4M3: Self = Self { first: 2.0, ratio: 0.955, last: 0.95, patience: u32::MAX };

    /// The fewer the bits, the more clipping pays, and the coarser the steps may be.
    fn integer(bits: u8, first: f32) -> Self {
        let ratio = match bits {
            0..=2 => 0.90,
            3 => 0.92,
            4 => 0.94,
            5 => 0.96,
            _ => 0.98,
        };
        Self { first, ratio, last: 0.1, patience: 4 }
    }
}

/// The weights that share a scale.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group<'a> {
    pub(super) weights: &'a [f32],
    /// What the squared error of each is multiplied with; all count alike if there is none.
    pub(super) importance: Option<&'a [f32]>,
}

/// The scale of a group of E2M1 codes; `None` if its weights are too large for any.
pub(super) fn e2m1(group: Group<'_>, store: &ScaleStore, search: ScaleSearch) -> Option<Choice> {
    symmetric(group, E2M1, extreme(group.weights), E2M1.max, store, search, Walk::E2M1)
}

/// The scale of a group of E4M3 codes.
pub(super) fn e4m3(group: Group<'_>, store: &ScaleStore, search: ScaleSearch) -> Option<Choice> {
    symmetric(group, E4M3, extreme(group.weights), E4M3.max, store, search, Walk::E4M3)
}

/// The scale of a group of signed integers. Codes reach from −h to h − 1: the range is laid over [−h + ½, h − ½], so
/// that the extreme weight is off by half a step at most, whatever its sign.
pub(super) fn signed(group: Group<'_>, bits: u8, store: &ScaleStore, search: ScaleSearch) -> Option<Choice> {
    let half = (1u32 << (bits - 1)) as f32;
    let extreme = extreme(group.weights);
    // Where the extreme −h is a good part of all codes, a negative scale gives it to the side that needs it.
    let flip = bits <= 4 && extreme > 0.0 && store.has_sign();
    let first = (half - 0.5) / (half - 1.0);
    let walk = Walk::integer(bits, if flip { -first } else { first });
    symmetric(group, IntegerRounding::signed(bits), extreme, half - 0.5, store, search, walk)
}

/// Lays the `extreme` weight of a group at ±`reach`, and searches from there.
fn symmetric<R: Rounding>(
    group: Group<'_>,
    rounding: R,
    extreme: f32,
    reach: f32,
    store: &ScaleStore,
    search: ScaleSearch,
    walk: Walk,
) -> Option<Choice> {
    let largest = extreme.abs();
    if largest == 0.0 {
        return Some(Choice { scale: store.zero(), zero: 0 });
    }
    let scale = largest / reach;
    let start = if store.is_power_of_two() {
        // OCP Microscaling: the exponent of the largest weight less that of the largest value of the element.
        store.round(floor_power_of_two(largest) / floor_power_of_two(reach))?
    } else {
        store.round(scale)?
    };
    if search == ScaleSearch::AbsMax {
        return Some(Choice { scale: start, zero: 0 });
    }
    let best = Best::new(|scale| (squared_error(group, rounding, scale), 0), start);
    Some(best.walk(scale, walk, store).refit(store, |scale, _| least_squares(group, rounding, scale)).choice)
}

/// The scale and zero point of a group of unsigned integers. The range always includes 0, which stays exact.
pub(super) fn unsigned(group: Group<'_>, bits: u8, store: &ScaleStore, search: ScaleSearch) -> Option<Choice> {
    let (low, high) = range(group.weights);
    if low == high {
        return Some(Choice { scale: store.zero(), zero: 0 });
    }
    let largest = ((1u32 << bits) - 1) as f32;
    let scale = high / largest - low / largest;
    let start = store.round(scale)?;
    let zero_code = |zero: f32| zero.round_ties_even().clamp(0.0, largest) as u8;
    let keep_low = |scale: f32| zero_code(-low / scale);
    if search == ScaleSearch::AbsMax {
        return Some(Choice { scale: start, zero: keep_low(start.value) });
    }
    let evaluate = |scale: f32| {
        let zeros =
            [keep_low(scale), zero_code((largest - (high + low) / scale) / 2.0), zero_code(largest - high / scale)];
        let mut best = (f64::INFINITY, zeros[0]);
        for (index, &zero) in zeros.iter().enumerate() {
            if index > 0 && zeros[..index].contains(&zero) {
                continue;
            }
            let error = squared_error(group, IntegerRounding::unsigned(bits, zero), scale);
            if error < best.0 {
                best = (error, zero);
            }
        }
        best
    };
    let best = Best::new(evaluate, start).walk(scale, Walk::integer(bits, 1.1), store);
    let refit = |scale, zero| least_squares(group, IntegerRounding::unsigned(bits, zero), scale);
    Some(best.refit(store, refit).choice)
}

/// The best scale so far of a group.
struct Best<E> {
    /// Squared error and zero point of a scale.
    evaluate: E,
    choice: Choice,
    error: f64,
}

impl<E: FnMut(f32) -> (f64, u8)> Best<E> {
    fn new(mut evaluate: E, start: Scale) -> Self {
        let (error, zero) = evaluate(start.value);
        Self { evaluate, choice: Choice { scale: start, zero }, error }
    }

    fn try_scale(&mut self, scale: Scale) -> bool {
        let (error, zero) = (self.evaluate)(scale.value);
        let better = error < self.error;
        if better {
            (self.choice, self.error) = (Choice { scale, zero }, error);
        }
        better
    }

    /// Tries the scales of a walk, then the neighbours of the best of them.
    fn walk(mut self, scale: f32, walk: Walk, store: &ScaleStore) -> Self {
        let mut last = self.choice.scale;
        let mut misses = 0;
        let mut factor = walk.first;
        let mut best_factor = None;
        while misses < walk.patience && factor.abs() > walk.last {
            // Coarse storage rounds many candidates to one scale.
            if let Some(candidate) = store.round(scale * factor).filter(|&candidate| candidate != last) {
                last = candidate;
                if self.try_scale(candidate) {
                    misses = 0;
                    best_factor = Some(factor);
                } else {
                    misses += 1;
                }
            }
            factor *= walk.ratio;
        }
        if let Some(factor) = best_factor {
            let third = walk.ratio.cbrt();
            for fine in [factor / third, factor * third] {
                if let Some(candidate) = store.round(scale * fine).filter(|&candidate| candidate != self.choice.scale) {
                    self.try_scale(candidate);
                }
            }
        }
        self
    }

    /// Fits the scale to the codes that the best one chose, as long as that helps.
    fn refit(mut self, store: &ScaleStore, fit: impl Fn(f32, u8) -> f32) -> Self {
        for _ in 0..REFITS {
            let fitted = fit(self.choice.scale.value, self.choice.zero);
            let usable = fitted != 0.0 && fitted.is_finite() && (fitted > 0.0 || store.has_sign());
            let candidate = if usable { store.round(fitted) } else { None };
            match candidate {
                Some(scale) if scale != self.choice.scale && self.try_scale(scale) => {}
                _ => break,
            }
        }
        self
    }
}

/// The weight of largest magnitude, with its sign.
fn extreme(group: &[f32]) -> f32 {
    let (low, high) = range(group);
    if -low > high { low } else { high }
}

/// The smallest and the largest weight, 0 included.
fn range(group: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([0.0f32; LANES], [0.0f32; LANES]);
    let mut widen = |weights: &[f32]| {
        for ((low, high), &weight) in low.iter_mut().zip(&mut high).zip(weights) {
            *low = if weight < *low { weight } else { *low };
            *high = if weight > *high { weight } else { *high };
        }
    };
    let (blocks, tail) = group.as_chunks::<LANES>();
    blocks.iter().for_each(|block| widen(block));
    widen(tail);
    (low.into_iter().fold(0.0, f32::min), high.into_iter().fold(0.0, f32::max))
}

/// The largest power of two that is not larger; exact down to the smallest subnormal.
fn floor_power_of_two(x: f32) -> f32 {
    if x.is_normal() {
        return f32::from_bits(x.to_bits() & 0x7f80_0000);
    }
    f32::from_bits(1 << x.to_bits().max(1).ilog2())
}

const LANES: usize = 8;
/// Weights whose errors are summed in f32 before they go into an f64.
const RUN: usize = 16 * LANES;

/// Sums `term` over the weights, each times its importance.
#[inline(always)]
fn sum<const N: usize>(group: Group<'_>, term: impl Fn(f32) -> [f32; N]) -> [f64; N] {
    let Group { weights, importance } = group;
    match importance {
        None => sum_pairs(weights, weights, |weight, _| term(weight)),
        Some(importance) => {
            sum_pairs(weights, importance, |weight, importance| term(weight).map(|term| importance * term))
        }
    }
}

/// Sums `term` in f32 lanes that vectorise and are emptied often.
#[inline(always)]
fn sum_pairs<const N: usize>(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> [f32; N]) -> [f64; N] {
    let mut total = [0.0; N];
    for (a, b) in a.chunks(RUN).zip(b.chunks(RUN)) {
        let mut lanes = [[0.0f32; LANES]; N];
        let ((a_blocks, a_tail), (b_blocks, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        let mut add = |lane: usize, a: f32, b: f32| {
            let terms = term(a, b);
            for n in 0..N {
                lanes[n][lane] += terms[n];
            }
        };
        for (a, b) in a_blocks.iter().zip(b_blocks) {
            for lane in 0..LANES {
                add(lane, a[lane], b[lane]);
            }
        }
        for (lane, (&a, &b)) in a_tail.iter().zip(b_tail).enumerate() {
            add(lane, a, b);
        }
        for n in 0..N {
            total[n] += lanes[n].iter().map(|&lane| f64::from(lane)).sum::<f64>();
        }
    }
    total
}

/// Squared error of a group as it would be stored.
fn squared_error<R: Rounding>(group: Group<'_>, rounding: R, scale: f32) -> f64 {
    let [error] = sum(group, |weight| {
        let error = weight - scale * rounding.round(weight / scale);
        [error * error]
    });
    error
}

/// The scale that fits best the codes which `scale` chooses: Σ w·q / Σ q².
fn least_squares<R: Rounding>(group: Group<'_>, rounding: R, scale: f32) -> f32 {
    let [product, square] = sum(group, |weight| {
        let value = rounding.round(weight / scale);
        [weight * value, value * value]
    });
    (product / square) as f32
}
