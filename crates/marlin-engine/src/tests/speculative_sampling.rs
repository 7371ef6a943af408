//! That guessing leaves the distribution of what is sampled as it is, on a small real model.
//!
//! Tokens are sampled many times behind guesses, and their frequencies held against probabilities that are computed without any engine, by a
//! χ² test. Seeds are fixed, so that the result is always the same; with other seeds a right engine would fail once in [`FALSE_ALARMS`].

use std::path::Path;

use marlin_checkpoint::Checkpoint;
use marlin_kernels::KvType;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions};
use marlin_model::{LanguageModel, LoadOptions, LogitRows, StepBatch, load_model};

use super::tokenizers::byte_level;
use crate::{DraftModel, Engine, EngineOptions, Request, SamplingParams, StopConditions};

/// The model's vocabulary.
const VOCABULARY: usize = 67;
const PROMPT: [u32; 3] = [5, 31, 60];
/// Tokens of an answer: the first is not guessed.
const TOKENS: usize = 3;
const ANSWERS: usize = 6_000;
/// At a time.
const TOGETHER: usize = 16;
/// The false-alarm rate of each test is one in so many: there are six.
const FALSE_ALARMS: f64 = 1e6;
/// The place that a normal variable exceeds once in [`FALSE_ALARMS`].
const DEVIATIONS: f64 = 4.753;
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

fn sampling(temperature: f64, top_k: u32) -> SamplingParams {
    SamplingParams { temperature, top_k, ..SamplingParams::greedy() }
}

/// Counts of second and third tokens, sampled with guesses, and how many guesses were right and wrong.
fn sampled(params: &SamplingParams) -> (Vec<[u32; 2]>, [u64; 2]) {
    let target = model();
    let drafter = DraftModel::new(model(), target.info());
    let options = EngineOptions { always_draft: true, max_running: Some(TOGETHER), ..EngineOptions::default() };
    let tokenizer = byte_level(&[], &[]).into();
    let mut engine = Engine::with_options(target, tokenizer, Vec::new(), &options).with_drafter(Box::new(drafter));
    let mut pairs = Vec::new();
    for wave in 0..ANSWERS / TOGETHER {
        let mut answers = std::collections::BTreeMap::new();
        for index in 0..TOGETHER {
            let seed = (wave * TOGETHER + index) as u64;
            let request = Request {
                prompt: PROMPT.to_vec(),
                sampling: SamplingParams { seed: Some(seed), ..params.clone() },
                stop: StopConditions { max_tokens: TOKENS, ..StopConditions::default() },
                ..Request::default()
            };
            answers.insert(engine.add(request).unwrap(), Vec::new());
        }
        let mut events = Vec::new();
        while !engine.is_idle() {
            engine.step(&mut events).unwrap();
        }
        for event in events {
            answers.get_mut(&event.request).unwrap().extend(event.token);
        }
        pairs.extend(answers.into_values().map(|tokens| [tokens[1], tokens[2]]));
    }
    let stats = engine.stats();
    (pairs, [stats.accepted_tokens, stats.drafted_tokens - stats.accepted_tokens])
}

/// Probabilities of what comes after each of several texts of the same length.
fn probabilities(model: &mut dyn LanguageModel, texts: &[Vec<u32>], params: &SamplingParams) -> Vec<Vec<f64>> {
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

fn softmax(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let mut sorted = logits.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let least = if params.top_k == 0 { f32::NEG_INFINITY } else { sorted[params.top_k as usize - 1] };
    let weight = |&logit: &f32| {
        if logit < least { 0.0 } else { (f64::from(logit - sorted[0]) / params.temperature).exp() }
    };
    let weights: Vec<f64> = logits.iter().map(weight).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// How likely each pair of second and third token is.
fn pair_probabilities(params: &SamplingParams) -> Vec<f64> {
    let mut model = model();
    let grow = |texts: &[Vec<u32>]| -> Vec<Vec<u32>> {
        let longer = |text: &Vec<u32>| (0..VOCABULARY as u32).map(|token| [&text[..], &[token]].concat()).collect();
        texts.iter().flat_map(|text| -> Vec<Vec<u32>> { longer(text) }).collect()
    };
    let texts = [vec![PROMPT.to_vec()], grow(&[PROMPT.to_vec()]), grow(&grow(&[PROMPT.to_vec()]))];
    let [first, second, third] = texts.map(|texts| probabilities(model.as_mut(), &texts, params));
    let mut pairs = vec![0.0; VOCABULARY * VOCABULARY];
    for (one, p_one) in first[0].iter().enumerate() {
        for (two, p_two) in second[one].iter().enumerate() {
            for (three, p_three) in third[one * VOCABULARY + two].iter().enumerate() {
                pairs[two * VOCABULARY + three] += p_one * p_two * p_three;
            }
        }
    }
    pairs
}

/// Whether what was counted in cells may have these probabilities. Cells that are too rare for the test are taken together.
fn is_plausible(counts: &[f64], probabilities: &[f64]) -> bool {
    let total: f64 = counts.iter().sum();
    let (mut cells, mut statistic) = (0, 0.0);
    let mut add = |count: f64, expected: f64| {
        cells += 1;
        statistic += (count - expected).powi(2) / expected;
    };
    let (mut rare, mut rare_expected) = (0.0, 0.0);
    for (&count, &probability) in counts.iter().zip(probabilities) {
        let expected = total * probability;
        if expected >= 5.0 {
            add(count, expected);
        } else {
            (rare, rare_expected) = (rare + count, rare_expected + expected);
        }
    }
    if rare_expected >= 5.0 {
        add(rare, rare_expected);
    } else if rare > 5.0 + 10.0 * rare_expected {
        return false;
    }
    // Wilson and Hilferty's approximation of the quantile.
    let degrees = f64::from(cells - 1);
    let spread = 2.0 / (9.0 * degrees);
    statistic <= degrees * (1.0 - spread + DEVIATIONS * spread.sqrt()).powi(3)
}

/// Where a pair of tokens is counted.
type Cell = fn(usize, usize) -> usize;

/// The three tests of one setting: second tokens, third tokens, and both.
fn verdicts(pairs: &[[u32; 2]], probabilities: &[f64]) -> [bool; 3] {
    let cells: [(usize, Cell); 3] = [
        (VOCABULARY, |two, _| two),
        (VOCABULARY, |_, three| three),
        (GROUPS, |two, three| (31 * two + three) % GROUPS),
    ];
    cells.map(|(cells, cell)| {
        let (mut counts, mut wanted) = (vec![0.0; cells], vec![0.0; cells]);
        pairs.iter().for_each(|[two, three]| counts[cell(*two as usize, *three as usize)] += 1.0);
        for (pair, probability) in probabilities.iter().enumerate() {
            wanted[cell(pair / VOCABULARY, pair % VOCABULARY)] += probability;
        }
        is_plausible(&counts, &wanted)
    })
}

#[test]
fn guesses_leave_the_distribution_as_it_is() {
    assert!((FALSE_ALARMS - 1e6).abs() < 1.0, "the deviations are those of this rate");
    for (params, other) in [(sampling(0.5, 0), sampling(0.55, 0)), (sampling(0.4, 6), sampling(0.4, 7))] {
        let (pairs, [right, wrong]) = sampled(&params);
        let enough = ANSWERS as u64 / 10;
        assert!(right > enough && wrong > enough, "{right} guesses were right and {wrong} wrong");
        assert_eq!(verdicts(&pairs, &pair_probabilities(&params)), [true; 3], "{params:?}");
        // The test would notice a distribution that is a little different.
        assert!(verdicts(&pairs, &pair_probabilities(&other)).contains(&false), "{other:?}");
    }
}
