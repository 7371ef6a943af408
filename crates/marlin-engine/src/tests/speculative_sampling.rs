//! That guessing leaves the distribution of what is sampled as it is, on a small real model.
//!
//! Tokens are sampled many times with guesses, some likely and some not, and their frequencies held against probabilities that are computed
//! from the model's logits without any engine, by a χ² test. Seeds are fixed, so that the result is always the same: with other seeds a right
//! engine would fail each of the [`TESTS`] of a setting with a probability of [`FALSE_ALARM`], so any of the twelve with one of 1.2 · 10⁻⁵. That
//! wrong ones are found out is tested as well.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use marlin_checkpoint::Checkpoint;
use marlin_kernels::KvType;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions};
use marlin_model::{LanguageModel, LoadOptions, LogitRows, StepBatch, load_model};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::chi_squared::p_value;
use super::tokenizers::byte_level;
use crate::{
    AnswerId, DraftModel, Drafter, Engine, EngineError, EngineOptions, Request, RequestId, SamplingParams,
    StopConditions,
};

/// The model's vocabulary.
const VOCABULARY: usize = 67;
const PROMPT: [u32; 3] = [5, 31, 60];
/// Tokens of an answer. The second is guessed: it is the guess, if that is right, or else replaces it. The first comes before, and the third
/// after it, in the same step if the guess was right.
const TOKENS: usize = 3;
const ANSWERS: usize = 6_000;
/// At a time.
const TOGETHER: usize = 16;
/// Of each test.
const FALSE_ALARM: f64 = 1e-6;
/// Pairs of tokens are counted in so many groups.
const GROUPS: usize = 53;

fn model() -> Box<dyn LanguageModel> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens/llama-mha-untied");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let options =
        LoadOptions { kv_blocks: Some(128), kv_type: KvType::F32, step_tokens: 128, ..LoadOptions::default() };
    let cpu = CpuOptions { threads: Some(1), arithmetic: Arithmetic::Exact, simd: None };
    load_model(&CpuBackend::new(cpu).unwrap(), &checkpoint, &options).unwrap()
}

fn sampling(temperature: f64, top_k: u32, top_p: f64) -> SamplingParams {
    SamplingParams { temperature, top_k, top_p, ..SamplingParams::greedy() }
}

/// Guesses the model's most likely token in every second answer, and any other one in the rest.
struct Moody {
    model: DraftModel,
    /// What was guessed, by answers.
    guesses: Arc<Mutex<BTreeMap<RequestId, u32>>>,
}

impl Moody {
    fn is_sensible(request: RequestId) -> bool {
        request.0.is_multiple_of(2)
    }
}

impl Drafter for Moody {
    fn draft(
        &mut self,
        answer: AnswerId,
        tokens: &[u32],
        most: usize,
        draft: &mut Vec<u32>,
    ) -> Result<(), EngineError> {
        self.model.draft(answer, tokens, most, draft)?;
        assert_eq!(draft.len(), 1, "only the second token can be guessed");
        if !Self::is_sensible(answer.request) {
            let others = VOCABULARY as u64 - 1;
            draft[0] = (draft[0] + 1 + (answer.request.0 / 2 % others) as u32) % VOCABULARY as u32;
        }
        let before = self.guesses.lock().unwrap().insert(answer.request, draft[0]);
        assert_eq!(before, None, "once");
        Ok(())
    }

    fn forget(&mut self, answer: AnswerId) {
        self.model.forget(answer);
    }
}

/// What was said, and what had been guessed in the place of the second token.
#[derive(Debug, Clone, Copy)]
struct Answer {
    tokens: [u32; TOKENS],
    guess: u32,
    /// The guess was the most likely token.
    is_sensible: bool,
}

/// Answers that are sampled with guesses.
fn sampled(params: &SamplingParams) -> Vec<Answer> {
    let target = model();
    let guesses = Arc::default();
    let drafter = Moody { model: DraftModel::new(model(), target.info()), guesses: Arc::clone(&guesses) };
    let options = EngineOptions { always_draft: true, max_running: Some(TOGETHER), ..EngineOptions::default() };
    let tokenizer = byte_level(&[], &[]).into();
    let mut engine = Engine::with_options(target, tokenizer, Vec::new(), &options).with_drafter(Box::new(drafter));
    let (mut said, mut events) = (BTreeMap::<RequestId, Vec<u32>>::new(), Vec::new());
    for wave in 0..ANSWERS / TOGETHER {
        for index in 0..TOGETHER {
            let seed = (wave * TOGETHER + index) as u64;
            let request = Request {
                prompt: PROMPT.to_vec(),
                sampling: SamplingParams { seed: Some(seed), ..params.clone() },
                stop: StopConditions { max_tokens: TOKENS, ..StopConditions::default() },
                ..Request::default()
            };
            engine.add(request).unwrap();
        }
        while !engine.is_idle() {
            engine.step(&mut events).unwrap();
        }
        for event in events.drain(..) {
            said.entry(event.request).or_default().extend(event.token);
        }
    }
    let guesses = guesses.lock().unwrap();
    let answer = |(request, tokens): (RequestId, Vec<u32>)| Answer {
        tokens: tokens.try_into().unwrap(),
        guess: guesses[&request],
        is_sensible: Moody::is_sensible(request),
    };
    let answers: Vec<Answer> = said.into_iter().map(answer).collect();
    let stats = engine.stats();
    let right = answers.iter().filter(|answer| answer.tokens[1] == answer.guess).count();
    assert_eq!((stats.drafted_tokens, stats.accepted_tokens), (ANSWERS as u64, right as u64));
    assert!((ANSWERS / 10..ANSWERS * 9 / 10).contains(&right), "{right} guesses were right");
    answers
}

/// Probabilities of what comes after each of several texts of the same length.
fn after(model: &mut dyn LanguageModel, texts: &[Vec<u32>], params: &SamplingParams) -> Vec<Vec<f64>> {
    let mut all = Vec::new();
    let mut batch = StepBatch::new();
    for texts in texts.chunks(TOGETHER) {
        batch.clear();
        let mut sequences = Vec::new();
        for text in texts {
            let mut sequence = model.kv().sequence();
            model.kv().append(&mut sequence, text.len()).unwrap();
            batch.push(&sequence, text, LogitRows::Last);
            sequences.push(sequence);
        }
        model.forward(&batch).unwrap();
        let mut logits = Vec::new();
        model.read_logits(&mut logits).unwrap();
        sequences.into_iter().for_each(|sequence| model.kv().release(sequence));
        all.extend(logits.chunks_exact(VOCABULARY).map(|logits| softmax(logits, params)));
    }
    all
}

/// The probabilities of tokens by these logits: those of the most likely ones that top-k and then top-p leave.
fn softmax(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let weight = |&token: &usize| (f64::from(logits[token] - logits[order[0]]) / params.temperature).exp();
    let of_top_k: f64 = order.iter().map(weight).sum();
    let (mut weights, mut kept) = (vec![0.0; logits.len()], 0.0);
    for token in &order {
        if kept >= params.top_p * of_top_k {
            break;
        }
        weights[*token] = weight(token);
        kept += weights[*token];
    }
    weights.into_iter().map(|weight| weight / kept).collect()
}

/// What the model makes of the prompt.
struct Truth {
    /// Probabilities of the second token after each first one.
    second: Vec<Vec<f64>>,
    /// Those of second and third tokens together.
    pairs: Vec<f64>,
}

impl Truth {
    fn new(params: &SamplingParams) -> Self {
        let mut model = model();
        let grow = |texts: &[Vec<u32>]| -> Vec<Vec<u32>> {
            let longer = |text: &Vec<u32>| (0..VOCABULARY as u32).map(|token| [&text[..], &[token]].concat()).collect();
            texts.iter().flat_map(|text| -> Vec<Vec<u32>> { longer(text) }).collect()
        };
        let texts = [vec![PROMPT.to_vec()], grow(&[PROMPT.to_vec()]), grow(&grow(&[PROMPT.to_vec()]))];
        let [first, second, third] = texts.map(|texts| after(model.as_mut(), &texts, params));
        let mut pairs = vec![0.0; VOCABULARY * VOCABULARY];
        for (one, p_one) in first[0].iter().enumerate() {
            for (two, p_two) in second[one].iter().enumerate() {
                for (three, p_three) in third[one * VOCABULARY + two].iter().enumerate() {
                    pairs[two * VOCABULARY + three] += p_one * p_two * p_three;
                }
            }
        }
        Self { second, pairs }
    }
}

/// A test: its name, which answers it counts, in how many cells, and where it counts a second and a third token.
type Test = (&'static str, fn(&Answer) -> bool, usize, fn(usize, usize) -> usize);

const TESTS: [Test; 4] = [
    ("where a likely token was guessed", |answer| answer.is_sensible, VOCABULARY, |two, _| two),
    ("where another token was guessed", |answer| !answer.is_sensible, VOCABULARY, |two, _| two),
    ("after a guess", |_| true, VOCABULARY, |_, three| three),
    ("both together", |_| true, GROUPS, |two, three| (31 * two + three) % GROUPS),
];

/// Those of the [`TESTS`] that find answers implausible.
fn alarms(answers: &[Answer], truth: &Truth) -> Vec<&'static str> {
    let is_alarmed = |(_, is_counted, cells, cell): &Test| {
        let (mut counts, mut wanted) = (vec![0.0; *cells], vec![0.0; *cells]);
        for Answer { tokens: [_, two, three], .. } in answers.iter().filter(|answer| is_counted(answer)) {
            counts[cell(*two as usize, *three as usize)] += 1.0;
        }
        for (pair, probability) in truth.pairs.iter().enumerate() {
            wanted[cell(pair / VOCABULARY, pair % VOCABULARY)] += probability;
        }
        p_value(&counts, &wanted) < FALSE_ALARM
    };
    TESTS.iter().filter(|test| is_alarmed(test)).map(|(name, ..)| *name).collect()
}

/// What a sampler that does it wrong makes of a right answer, given a random number.
type Wrong = fn(Answer, &Truth, f64) -> u32;

/// Second tokens as wrong samplers would say them.
const WRONG: [(&str, Wrong); 3] = [
    ("takes every guess", |answer, _, _| answer.guess),
    ("takes one of ten wrong guesses", |answer, _, random| if random < 0.1 { answer.guess } else { answer.tokens[1] }),
    ("replaces a wrong guess by what may be the guess again", |answer, truth, random| {
        if answer.tokens[1] == answer.guess {
            return answer.guess;
        }
        let mut left = random;
        let probabilities = &truth.second[answer.tokens[0] as usize];
        let place = probabilities.iter().position(|probability| {
            left -= probability;
            left < 0.0
        });
        place.map_or(answer.tokens[1], |token| token as u32)
    }),
];

#[test]
fn guesses_leave_the_distribution_as_it_is() {
    let settings = [
        (sampling(0.5, 0, 1.0), sampling(0.55, 0, 1.0)),
        (sampling(0.4, 6, 1.0), sampling(0.4, 7, 1.0)),
        (sampling(0.6, 20, 0.8), sampling(0.6, 20, 0.75)),
    ];
    for (params, other) in settings {
        let (answers, truth) = (sampled(&params), Truth::new(&params));
        assert!(alarms(&answers, &truth).is_empty(), "{params:?}: {:?}", alarms(&answers, &truth));
        // A distribution that is a little different is found out,
        assert!(!alarms(&answers, &Truth::new(&other)).is_empty(), "{other:?}");
        // and so are samplers that do not do what rejection sampling does.
        for (name, wrong) in WRONG {
            let mut random = ChaCha8Rng::seed_from_u64(1);
            let say = |answer: &Answer| {
                let number = f64::from(random.next_u32()) / (u32::MAX as f64 + 1.0);
                let [first, _, third] = answer.tokens;
                Answer { tokens: [first, wrong(*answer, &truth, number), third], ..*answer }
            };
            let biased: Vec<Answer> = answers.iter().map(say).collect();
            assert!(!alarms(&biased, &truth).is_empty(), "a sampler that {name} is not found out: {params:?}");
        }
    }
}
