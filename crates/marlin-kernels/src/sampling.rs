//! What sampling a row needs to know.

pub(crate) mod host;

use std::cmp::Ordering;

use crate::KernelError;

/// How to choose the next token of one sequence.
///
/// Order of operations: `bias` is added; penalties are applied (repetition, then presence and frequency); logits of tokens that
/// are not `allowed` become −∞, whatever was added to them; at temperature 0 the largest logit wins (the lowest id among
/// equals). Otherwise tokens are ordered by falling logit (ties by id) and get the weights
/// `exp((logit − largest) / temperature)`. Top-k, top-p and min-p then each shorten that list, top-p looking at the
/// probabilities among the top-k; the most likely token always stays. The first token at which the running share of the kept
/// weights exceeds `uniform` is chosen.
///
/// A model whose weights and arithmetic are sound gives finite logits, and −∞ to tokens that it rules out. A row that has NaN
/// or +∞ among its logits, before anything is added or ruled out, or has nothing but −∞, is a failure of the model: instead of
/// a token it gets [`SampleRow::NOT_FINITE`].
///
/// What bias and penalties make of finite logits need not be finite: NaN then counts as −∞, and when no finite logit is
/// largest (all −∞, or one of them +∞), the choice is greedy. A token that is not allowed is never chosen: among allowed tokens
/// that all have −∞ the lowest id wins.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// 0 means greedy.
    pub temperature: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 keeps all.
    pub min_p: f32,
    /// A random number in [0, 1).
    pub uniform: f32,
    /// Divides positive and multiplies negative logits of every token seen, prompt included; 1 is neutral (Keskar et al. 2019).
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens already generated (OpenAI API).
    pub presence_penalty: f32,
    /// Subtracted per occurrence from logits of tokens already generated (OpenAI API).
    pub frequency_penalty: f32,
    /// Tokens seen so far, each id once; ids are below the vocabulary.
    pub counts: &'a [TokenCount],
    /// A row of the sampling before, whose token was generated once more than `counts` says: the device may know it before the
    /// host does.
    pub last_sampled: Option<u32>,
    /// Added to the logits of these ids, each of which occurs once and is below the vocabulary.
    pub bias: &'a [(u32, f32)],
    /// Bits of the tokens that may be chosen, 32 tokens a word: token `t` is bit `t % 32` of word `t / 32` of
    /// `vocabulary.div_ceil(32)` words. At least one token is allowed; `None` allows all.
    pub allowed: Option<&'a [u32]>,
}

/// Names one call of [`Encoder::sample`](crate::Encoder::sample), to read its tokens by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplingId(pub u64);

/// Samplings are numbered, and the tokens of so many of them are kept: while one is read, the next may be under way.
pub(crate) const KEPT_SAMPLINGS: usize = 2;

/// Numbers samplings.
#[derive(Debug, Default)]
pub(crate) struct SamplingIds {
    next: u64,
}

impl SamplingIds {
    /// A new sampling, and the place of its tokens among those kept.
    pub(crate) fn next(&mut self) -> (SamplingId, usize) {
        let id = SamplingId(self.next);
        self.next += 1;
        (id, Self::place(id))
    }

    /// The place of a sampling's tokens, unless they are no longer kept.
    pub(crate) fn find(&self, id: SamplingId) -> Result<usize, KernelError> {
        if id.0 < self.next && self.next - id.0 <= KEPT_SAMPLINGS as u64 {
            return Ok(Self::place(id));
        }
        Err(KernelError::Device(format!(
            "the tokens of sampling {} are not kept: of {} samplings the last {KEPT_SAMPLINGS} are",
            id.0, self.next
        )))
    }

    fn place(id: SamplingId) -> usize {
        (id.0 % KEPT_SAMPLINGS as u64) as usize
    }
}

/// A token that has occurred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCount {
    /// Its id.
    pub token: u32,
    /// How often it was generated (0: it occurred in the prompt only).
    pub generated: u32,
}

impl SampleRow<'_> {
    /// The most likely token, without bias or penalties.
    pub const GREEDY: SampleRow<'static> = SampleRow {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        uniform: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        counts: &[],
        last_sampled: None,
        bias: &[],
        allowed: None,
    };

    /// Stands for a token where the logits allow no choice; no vocabulary reaches this id.
    pub const NOT_FINITE: u32 = u32::MAX;

    /// Adds the bias, applies the penalties, replaces NaN by −∞ and rules out what is not allowed: the part of sampling that is
    /// plain f32 arithmetic and therefore the same on every device in host memory. `last` is the token of `last_sampled`, if it
    /// is one.
    pub(crate) fn adjust(&self, logits: &mut [f32], last: Option<u32>) {
        for &(token, bias) in self.bias {
            logits[token as usize] += bias;
        }
        let unseen = last.filter(|&last| self.counts.iter().all(|seen| seen.token != last));
        let unseen = unseen.map(|token| TokenCount { token, generated: 0 });
        for seen in self.counts.iter().chain(&unseen) {
            let generated = seen.generated + u32::from(last == Some(seen.token));
            let logit = &mut logits[seen.token as usize];
            *logit = if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
            if generated > 0 {
                *logit -= self.presence_penalty + self.frequency_penalty * generated as f32;
            }
        }
        for logit in logits.iter_mut().filter(|logit| logit.is_nan()) {
            *logit = f32::NEG_INFINITY;
        }
        if let Some(allowed) = self.allowed {
            assert_eq!(allowed.len(), logits.len().div_ceil(32), "a bit for each token");
            for (logits, &word) in logits.chunks_mut(32).zip(allowed).filter(|(_, word)| **word != u32::MAX) {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                }
            }
        }
    }

    /// The token that is chosen when all that are allowed have −∞.
    pub(crate) fn lowest_allowed(&self) -> u32 {
        let Some(allowed) = self.allowed else { return 0 };
        let words = || allowed.iter().zip(0..);
        let lowest = words().find(|(word, _)| **word != 0).map(|(word, index)| 32 * index + word.trailing_zeros());
        lowest.expect("at least one token is allowed")
    }

    /// The largest logit of those that [`SampleRow::adjust`] leaves, and its lowest id.
    pub(crate) fn most_likely(&self, logits: &[f32]) -> (u32, f32) {
        let first = (self.lowest_allowed(), f32::NEG_INFINITY);
        let larger =
            |best: (u32, f32), (id, &logit): (usize, &f32)| if logit > best.1 { (id as u32, logit) } else { best };
        logits.iter().enumerate().fold(first, larger)
    }

    /// The weight of a token before normalisation.
    pub(crate) fn weight(&self, logit: f32, largest: f32) -> f64 {
        f64::from(((logit - largest) / self.temperature).exp())
    }

    /// Whether the largest logit is simply taken.
    pub(crate) fn is_greedy(&self, largest: f32) -> bool {
        self.temperature <= 0.0 || self.temperature.is_nan() || !largest.is_finite()
    }

    /// How many tokens top-k keeps of a vocabulary.
    pub(crate) fn kept_by_top_k(&self, vocabulary: usize) -> usize {
        if self.top_k == 0 { vocabulary } else { vocabulary.min(self.top_k as usize) }
    }
}

/// Whether logits as the model gave them allow a choice; if not, the row gets [`SampleRow::NOT_FINITE`].
pub(crate) fn allow_choice(logits: &[f32]) -> bool {
    // Without leaving early, so that the search is vectorised. NaN compares as false.
    let seen = logits.iter().fold((true, false), |(sound, any), &logit| {
        (sound & (logit < f32::INFINITY), any | (logit > f32::NEG_INFINITY))
    });
    seen == (true, true)
}

/// The order in which tokens are considered: falling logit, ties by id.
pub(crate) fn by_falling_logit(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering {
    // Not `total_cmp`, which would put 0 before −0.
    |&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap_or(Ordering::Equal).then(a.cmp(&b))
}
