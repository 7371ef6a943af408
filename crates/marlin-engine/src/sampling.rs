//! How a request chooses its tokens.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use marlin_checkpoint::GenerationConfig;
use marlin_kernels::{SampleRow, TokenCount};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::EngineError;

/// How to choose the next token; [`SampleRow`] says in which order its fields are applied. Numbers with bounds are f64, as they come: one that
/// is out of bounds by less than an f32 can tell is out of bounds.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits: below 1 the likely tokens become likelier. 0 always takes the most likely token (greedy).
    pub temperature: f64,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; in (0, 1], 1 keeps all.
    pub top_p: f64,
    /// Drop tokens less likely than this share of the most likely one; in [0, 1], 0 keeps all.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens that occurred, prompt included; 1 is neutral.
    pub repetition_penalty: f64,
    /// Subtracted from logits of tokens already generated; in [−2, 2], 0 is neutral.
    pub presence_penalty: f64,
    /// Subtracted from logits of tokens already generated, as often as they were; in [−2, 2], 0 is neutral.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed chooses the same tokens, whatever else runs at the same time; `None` takes a random one.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    /// Sampling that suits plain continuation by small models: temperature 0.7, top-k 40, top-p 0.95, repetition
    /// penalty 1.1.
    fn default() -> Self {
        Self { temperature: 0.7, top_k: 40, top_p: 0.95, repetition_penalty: 1.1, ..Self::greedy() }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }

    /// What a model's generation_config.json asks for; what it leaves open is as in [`SamplingParams::default`],
    /// or as in [`SamplingParams::greedy`] if it says `"do_sample": false`.
    pub fn from_generation_config(config: &GenerationConfig) -> Self {
        let greedy = config.do_sample == Some(false);
        let base = if greedy { Self::greedy() } else { Self::default() };
        Self {
            // transformers ignores the warpers of a greedy configuration, but not its penalty.
            temperature: config.temperature.filter(|_| !greedy).unwrap_or(base.temperature),
            top_k: config.top_k.unwrap_or(base.top_k),
            top_p: config.top_p.unwrap_or(base.top_p),
            min_p: config.min_p.unwrap_or(base.min_p),
            repetition_penalty: config.repetition_penalty.unwrap_or(base.repetition_penalty),
            ..base
        }
    }

    /// Checks every range. (That the tokens of `logit_bias` exist is checked by [`crate::Engine::add`].)
    pub fn validate(&self) -> Result<(), EngineError> {
        check("temperature", self.temperature, "a number from 0 up", |t| t >= 0.0)?;
        check("top_p", self.top_p, "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
        check("min_p", self.min_p, "between 0 and 1", |p| (0.0..=1.0).contains(&p))?;
        check("repetition_penalty", self.repetition_penalty, "a number above 0", |p| p > 0.0)?;
        check("presence_penalty", self.presence_penalty, "between -2 and 2", |p| p.abs() <= 2.0)?;
        check("frequency_penalty", self.frequency_penalty, "between -2 and 2", |p| p.abs() <= 2.0)?;
        self.logit_bias.iter().try_for_each(|&(_, bias)| check("logit_bias", bias.into(), "a number", |_| true))
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// What kernels take of these: numbers beyond an f32 become its largest or, where 0 means something else or nothing at all, its smallest.
    fn row(&self) -> SampleRow<'static> {
        let positive = |value: f64| (value as f32).clamp(f32::MIN_POSITIVE, f32::MAX);
        SampleRow {
            // Next to 0 it is what it tends to: greedy.
            temperature: (self.temperature as f32).min(f32::MAX),
            top_k: self.top_k,
            top_p: positive(self.top_p),
            min_p: self.min_p as f32,
            repetition_penalty: positive(self.repetition_penalty),
            presence_penalty: self.presence_penalty as f32,
            frequency_penalty: self.frequency_penalty as f32,
            ..SampleRow::GREEDY
        }
    }
}

fn check(name: &'static str, value: f64, wanted: &'static str, valid: fn(f64) -> bool) -> Result<(), EngineError> {
    if value.is_finite() && valid(value) {
        return Ok(());
    }
    // Large and small numbers are spelled with an exponent.
    let found = format!("{value:?}");
    Err(EngineError::Parameter { name, wanted, found: found.strip_suffix(".0").unwrap_or(&found).to_owned() })
}

/// A sequence's side of sampling: its parameters, its random numbers and what it has already said.
#[derive(Debug)]
pub(crate) struct Sampler {
    params: SamplingParams,
    /// The bias while the sequence must not end.
    early_bias: Vec<(u32, f32)>,
    seed: u64,
    random: ChaCha8Rng,
    counts: TokenCounts,
    /// Of the rows that were asked for last: their random numbers, and what was said before each but the first.
    uniforms: Vec<f32>,
    drafted: Vec<Vec<TokenCount>>,
}

impl Sampler {
    /// For the first answer to `prompt`; `end_tokens` end it.
    pub(crate) fn new(mut params: SamplingParams, prompt: &[u32], end_tokens: &[u32]) -> Result<Self, EngineError> {
        let seed = params.seed.map_or_else(getrandom::u64, Ok)?;
        let mut counts = TokenCounts::default();
        if params.has_penalties() {
            for &token in prompt {
                counts.saw(token);
            }
        }
        let never = end_tokens.iter().map(|&token| (token, f32::NEG_INFINITY));
        let early_bias = summed(params.logit_bias.iter().copied().chain(never));
        params.logit_bias = summed(params.logit_bias.iter().copied());
        Ok(Self {
            params,
            early_bias,
            seed,
            random: random(seed, 0),
            counts,
            uniforms: Vec::new(),
            drafted: Vec::new(),
        })
    }

    /// For another answer to the same prompt: with the same seed it has random numbers of its own.
    pub(crate) fn fork(&self, choice: u32) -> Self {
        Self {
            params: self.params.clone(),
            early_bias: self.early_bias.clone(),
            seed: self.seed,
            random: random(self.seed, choice),
            counts: self.counts.clone(),
            uniforms: Vec::new(),
            drafted: Vec::new(),
        }
    }

    /// How to choose the token after `generated` others, the last of which may be known as a row of the last sampling only, and then each
    /// after one more token of `draft`; of the first `min_tokens` of an answer, none that ends it. `allowed` are the tokens that may be
    /// chosen, if not all may.
    pub(crate) fn rows<'a>(
        &'a mut self,
        generated: usize,
        draft: &[u32],
        last_sampled: Option<u32>,
        min_tokens: usize,
        allowed: Option<&'a [u32]>,
    ) -> impl Iterator<Item = SampleRow<'a>> {
        self.uniforms.clear();
        self.drafted.clear();
        for place in generated..=generated + draft.len() {
            self.uniforms.push(uniform(&mut self.random, place));
        }
        let has_penalties = self.params.has_penalties();
        for &token in draft.iter().filter(|_| has_penalties) {
            let before = self.drafted.last().unwrap_or(&self.counts.counts);
            self.drafted.push(self.counts.and(before, token));
        }
        let this = &*self;
        let chosen_by = this.params.row();
        (generated..).zip(&this.uniforms).enumerate().map(move |(row, (place, &uniform))| SampleRow {
            uniform,
            counts: row.checked_sub(1).and_then(|row| this.drafted.get(row)).unwrap_or(&this.counts.counts),
            last_sampled: last_sampled.filter(|_| has_penalties),
            bias: if place < min_tokens { &this.early_bias } else { &this.params.logit_bias },
            allowed,
            ..chosen_by
        })
    }

    /// Takes note of a generated token.
    pub(crate) fn accept(&mut self, token: u32) {
        if self.params.has_penalties() {
            self.counts.saw(token).generated += 1;
        }
    }
}

/// The stream of random numbers of one answer.
fn random(seed: u64, choice: u32) -> ChaCha8Rng {
    // The key is spelt out, so that a seed means the same in every version of rand_chacha.
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..12].copy_from_slice(&choice.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Biases with each token once.
fn summed(biases: impl Iterator<Item = (u32, f32)>) -> Vec<(u32, f32)> {
    let mut sums: Vec<(u32, f32)> = Vec::new();
    let mut places: HashMap<u32, usize> = HashMap::new();
    for (token, bias) in biases {
        match places.entry(token) {
            Entry::Occupied(place) => sums[*place.get()].1 += bias,
            Entry::Vacant(place) => {
                place.insert(sums.len());
                sums.push((token, bias));
            }
        }
    }
    sums
}

/// The random number of the `index`-th generated token, in [0, 1): a function of seed and index alone, so that neither
/// batching nor a rolled-back draft changes it.
fn uniform(random: &mut ChaCha8Rng, index: usize) -> f32 {
    random.set_word_pos(index as u128);
    // 24 bits are what an f32 holds exactly; more could round up to 1.
    (random.next_u32() >> 8) as f32 / (1 << 24) as f32
}

/// Tokens seen, each id once, with its number of occurrences.
#[derive(Debug, Clone, Default)]
struct TokenCounts {
    counts: Vec<TokenCount>,
    places: HashMap<u32, usize>,
}

impl TokenCounts {
    fn saw(&mut self, token: u32) -> &mut TokenCount {
        let place = *self.places.entry(token).or_insert_with(|| {
            self.counts.push(TokenCount { token, generated: 0 });
            self.counts.len() - 1
        });
        &mut self.counts[place]
    }

    /// Counts that began as these, with one more generated token.
    fn and(&self, counts: &[TokenCount], token: u32) -> Vec<TokenCount> {
        let mut counts = counts.to_vec();
        let added = || counts[self.counts.len()..].iter().position(|count| count.token == token);
        match self.places.get(&token).copied().or_else(|| added().map(|place| self.counts.len() + place)) {
            Some(place) => counts[place].generated += 1,
            None => counts.push(TokenCount { token, generated: 1 }),
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        type Break = fn(&mut SamplingParams);
        let broken: &[(&str, Break)] = &[
            ("temperature must be a number from 0 up, found -1", |p| p.temperature = -1.0),
            ("temperature must be a number from 0 up, found NaN", |p| p.temperature = f64::NAN),
            ("temperature must be a number from 0 up, found inf", |p| p.temperature = f64::INFINITY),
            ("top_p must be above 0 and at most 1, found 0", |p| p.top_p = 0.0),
            ("top_p must be above 0 and at most 1, found 1.5", |p| p.top_p = 1.5),
            ("min_p must be between 0 and 1, found -0.1", |p| p.min_p = -0.1),
            ("repetition_penalty must be a number above 0, found 0", |p| p.repetition_penalty = 0.0),
            ("presence_penalty must be between -2 and 2, found 2.5", |p| p.presence_penalty = 2.5),
            ("frequency_penalty must be between -2 and 2, found NaN", |p| p.frequency_penalty = f64::NAN),
            // An f32 cannot tell these from what is allowed.
            ("temperature must be a number from 0 up, found -1e-60", |p| p.temperature = -1e-60),
            ("top_p must be above 0 and at most 1, found 1.0000000000000002", |p| p.top_p = 1.0 + f64::EPSILON),
            ("min_p must be between 0 and 1, found 1.00000000001", |p| p.min_p = 1.000_000_000_01),
            ("presence_penalty must be between -2 and 2, found -2.000000000000001", |p| {
                p.presence_penalty = -2.000_000_000_000_001;
            }),
            ("frequency_penalty must be between -2 and 2, found 2.000000000000001", |p| {
                p.frequency_penalty = 2.000_000_000_000_001;
            }),
            ("frequency_penalty must be between -2 and 2, found 1e300", |p| p.frequency_penalty = 1e300),
            ("logit_bias must be a number, found -inf", |p| p.logit_bias = vec![(0, f32::NEG_INFINITY)]),
        ];
        for (message, break_it) in broken {
            let mut params = SamplingParams::default();
            params.validate().expect("the defaults are valid");
            break_it(&mut params);
            assert_eq!(params.validate().unwrap_err().to_string(), *message);
        }
    }

    #[test]
    fn numbers_beyond_an_f32_are_taken_as_far_as_it_goes() {
        let extremes = |number: f64| SamplingParams {
            temperature: number,
            repetition_penalty: number,
            ..SamplingParams::greedy()
        };
        let small = SamplingParams { top_p: 1e-60, min_p: 1e-60, ..extremes(1e-60) };
        let large = extremes(1e60);
        small.validate().unwrap();
        large.validate().unwrap();
        let (small, large) = (small.row(), large.row());
        assert_eq!((small.temperature, small.min_p), (0.0, 0.0));
        assert!(small.top_p > 0.0 && small.repetition_penalty > 0.0, "{small:?}");
        assert!(large.temperature.is_finite() && large.repetition_penalty.is_finite(), "{large:?}");
        let ordinary =
            SamplingParams { presence_penalty: -0.3, frequency_penalty: 0.1, min_p: 0.05, ..SamplingParams::default() }
                .row();
        assert_eq!((ordinary.temperature, ordinary.top_k, ordinary.top_p, ordinary.min_p), (0.7, 40, 0.95, 0.05));
        let penalties = (ordinary.repetition_penalty, ordinary.presence_penalty, ordinary.frequency_penalty);
        assert_eq!(penalties, (1.1, -0.3, 0.1));
    }

    #[test]
    fn the_generation_config_comes_before_the_defaults() {
        let preset = GenerationConfig { temperature: Some(0.2), top_k: Some(7), ..GenerationConfig::default() };
        let params = SamplingParams::from_generation_config(&preset);
        assert_eq!((params.temperature, params.top_k), (0.2, 7));
        assert_eq!((params.top_p, params.repetition_penalty), (0.95, 1.1));

        let greedy = GenerationConfig { do_sample: Some(false), ..preset };
        let params = SamplingParams::from_generation_config(&greedy);
        assert_eq!((params.temperature, params.repetition_penalty), (0.0, 1.0));
    }

    /// How to choose one token.
    fn row(sampler: &mut Sampler, generated: usize, min_tokens: usize) -> SampleRow<'_> {
        sampler.rows(generated, &[], None, min_tokens, None).next().unwrap()
    }

    #[test]
    fn random_numbers_depend_on_seed_and_index_only() {
        let seeded = |seed| SamplingParams { seed: Some(seed), ..SamplingParams::default() };
        let mut first = Sampler::new(seeded(1), &[], &[]).unwrap();
        let mut again = Sampler::new(seeded(1), &[5], &[]).unwrap();
        let forwards: Vec<f32> = (0..100).map(|i| row(&mut first, i, 0).uniform).collect();
        let backwards: Vec<f32> = (0..100).rev().map(|i| row(&mut again, i, 0).uniform).collect();
        assert!(forwards.iter().eq(backwards.iter().rev()));
        let at_once: Vec<f32> = again.rows(10, &[1, 2, 3, 4], None, 0, None).map(|row| row.uniform).collect();
        assert_eq!(at_once, forwards[10..15]);
        assert!(forwards.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = forwards.iter().sum::<f32>() / 100.0;
        assert!((mean - 0.5).abs() < 0.15, "{mean}");

        let mut other = Sampler::new(seeded(2), &[], &[]).unwrap();
        assert_ne!(row(&mut other, 0, 0).uniform, forwards[0]);
    }

    #[test]
    fn a_seed_means_the_same_in_every_version() {
        // Key stream of ChaCha8 for the all-zero key and nonce (Strombergson's test vectors, TC1): 3e00ef2f 895f40d6 …
        let mut sampler =
            Sampler::new(SamplingParams { seed: Some(0), ..SamplingParams::default() }, &[], &[]).unwrap();
        assert_eq!(row(&mut sampler, 0, 0).uniform, (0x2fef_003e >> 8) as f32 / 16_777_216.0);
        assert_eq!(row(&mut sampler, 1, 0).uniform, (0xd640_5f89_u32 >> 8) as f32 / 16_777_216.0);
    }

    #[test]
    fn answers_to_one_prompt_have_random_numbers_of_their_own() {
        let params = SamplingParams { seed: Some(1), ..SamplingParams::default() };
        let mut first = Sampler::new(params, &[], &[]).unwrap();
        let uniforms = |sampler: &mut Sampler| (0..10).map(|i| row(sampler, i, 0).uniform).collect::<Vec<_>>();
        let (mut same, mut other) = (first.fork(0), first.fork(1));
        assert_eq!(uniforms(&mut same), uniforms(&mut first));
        assert_ne!(uniforms(&mut other), uniforms(&mut first));
    }

    #[test]
    fn early_on_no_token_ends_the_answer() {
        let logit_bias = vec![(7, 1.0), (3, 0.5)];
        let params = SamplingParams { logit_bias, ..SamplingParams::default() };
        let mut sampler = Sampler::new(params, &[], &[9, 7]).unwrap();
        let never = f32::NEG_INFINITY;
        assert_eq!(row(&mut sampler, 0, 1).bias, [(7, never), (3, 0.5), (9, never)]);
        assert_eq!(row(&mut sampler, 0, 0).bias, [(7, 1.0), (3, 0.5)]);
    }

    #[test]
    fn biases_of_one_token_add_up() {
        let logit_bias = vec![(7, 1.0), (3, 0.5), (7, -4.0)];
        let mut sampler = Sampler::new(SamplingParams { logit_bias, ..SamplingParams::default() }, &[], &[]).unwrap();
        assert_eq!(row(&mut sampler, 0, 0).bias, [(7, -3.0), (3, 0.5)]);
    }

    #[test]
    fn counts_tell_prompt_from_generated() {
        let mut sampler = Sampler::new(SamplingParams::default(), &[3, 4, 3], &[]).unwrap();
        sampler.accept(4);
        sampler.accept(9);
        sampler.accept(9);
        let count = |token, generated| TokenCount { token, generated };
        assert_eq!(row(&mut sampler, 3, 0).counts, [count(3, 0), count(4, 1), count(9, 2)]);
        // Behind guesses it is as if they had been accepted.
        let draft = [7, 4, 7];
        let guessed: Vec<Vec<TokenCount>> =
            sampler.rows(3, &draft, None, 0, None).map(|row| row.counts.to_vec()).collect();
        for (row, counts) in guessed.into_iter().enumerate() {
            assert_eq!(self::row(&mut sampler, 3 + row, 0).counts, counts);
            draft.get(row).into_iter().for_each(|&token| sampler.accept(token));
        }
    }
}
