//! Many requests at a time on the bundled model: each gets, to the bit, what it gets alone.
#![cfg(feature = "bundled-model")]

use std::collections::HashMap;

use marlin_engine::{
    DraftModel, Engine, EngineOptions, Event, FinishReason, PromptLookup, Request, SamplingParams, StopConditions,
    TokenLogprobs,
};
use marlin_model::{LanguageModel, LoadOptions};
use metal_marlin::DeviceOptions;
use metal_marlin::device::DeviceChoice;
use metal_marlin::load;

/// An engine of its own on the CPU, with so many KV blocks.
fn engine(kv_blocks: usize) -> Engine {
    engine_with(kv_blocks, &EngineOptions::default())
}

fn engine_with(kv_blocks: usize, engine_options: &EngineOptions) -> Engine {
    let checkpoint = load::open_checkpoint(None).unwrap();
    let options = DeviceOptions { device: DeviceChoice::Cpu, ..DeviceOptions::default() };
    let load = LoadOptions {
        context: Some(256),
        step_tokens: 64,
        logit_rows: 24,
        kv_blocks: Some(kv_blocks),
        ..LoadOptions::default()
    };
    let model = load::load_model(&checkpoint, &options.open().unwrap(), &load).unwrap();
    let eos = checkpoint.generation_config().unwrap().eos_token_id;
    Engine::with_options(model, checkpoint.tokenizer().unwrap().into(), eos, engine_options)
}

/// Requests of every kind, many of which begin alike.
fn requests(engine: &Engine) -> Vec<Request> {
    let story =
        "Once upon a time there was a little girl who lived at the edge of a forest with her old dog. ".repeat(4);
    let encode = |text: &str| engine.tokenizer().encode(text, true).unwrap();
    let request = |index: usize| {
        let prompt = match index % 3 {
            0 => encode(&format!("{story} On day {index}")),
            1 => encode(&story[..story.len() / (1 + index % 4)]),
            _ => encode(&format!("Number {index} said:")),
        };
        let base = if index.is_multiple_of(2) { SamplingParams::greedy() } else { SamplingParams::default() };
        let repetition_penalty = if index.is_multiple_of(4) { 1.1 } else { 1.0 };
        let sampling = SamplingParams { seed: Some(index as u64), repetition_penalty, ..base };
        let stop = StopConditions {
            max_tokens: 8 + 7 * (index % 6),
            min_tokens: index % 5,
            strings: if index % 4 == 1 { vec!["the".to_owned()] } else { Vec::new() },
            ignore_eos: index.is_multiple_of(2),
            ..StopConditions::default()
        };
        Request {
            prompt,
            sampling,
            stop,
            choices: 1 + u32::from(index % 5 == 3),
            logprobs: (index % 3 == 1).then_some(3),
            prompt_logprobs: (index % 7 == 2).then_some(1),
            ..Request::default()
        }
    };
    (0..24).map(request).collect()
}

/// What was said, and how likely it was.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    prompt_logprobs: Vec<TokenLogprobs>,
    reason: Option<FinishReason>,
}

/// Runs requests to their end; new ones come while others are answered. The answers, in the order of requests and choices.
fn answers(engine: &mut Engine, requests: &[Request]) -> Vec<Answer> {
    let mut events: Vec<Event> = Vec::new();
    let mut waiting = requests.iter();
    let mut ids = Vec::new();
    while ids.len() < requests.len() || !engine.is_idle() {
        ids.extend(waiting.next().map(|request| engine.add(request.clone()).unwrap()));
        engine.step(&mut events).unwrap();
    }
    let mut answers: HashMap<_, Answer> = HashMap::new();
    for event in events {
        let answer = answers.entry((event.request, event.choice)).or_default();
        answer.text += &event.text;
        answer.tokens.extend(event.token);
        answer.logprobs.extend(event.logprobs);
        answer.prompt_logprobs.extend(event.prompt_logprobs);
        answer.reason = event.finish.map(|finish| finish.reason);
    }
    assert_eq!(engine.used_kv_blocks(), 0, "every block is free again");
    let mut answers: Vec<_> = answers.into_iter().collect();
    answers.sort_by_key(|(id, _)| *id);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

/// In a pool that is too small for all, so that some give way, and with a cache of what was computed before.
#[test]
fn company_changes_nothing() {
    let mut together = engine(7);
    let requests = requests(&together);
    let first = answers(&mut together, &requests);
    assert!(together.stats().preemptions > 0, "blocks are short");
    assert!(together.stats().prefix_hits > 0, "prompts begin alike");

    let mut alone = engine(40);
    let alone: Vec<Answer> =
        requests.iter().flat_map(|request| answers(&mut alone, std::slice::from_ref(request))).collect();
    assert_eq!(first, alone);
    assert_eq!(answers(&mut together, &requests), alone, "once more, from the cache");
}

/// Whoever guesses, and whether it pays or not.
#[test]
fn guessing_changes_nothing() {
    let mut plain = engine(40);
    let requests = requests(&plain);
    let alone: Vec<Answer> =
        requests.iter().flat_map(|request| answers(&mut plain, std::slice::from_ref(request))).collect();
    let always = EngineOptions { always_draft: true, ..EngineOptions::default() };
    for (options, kv_blocks) in [(&always, 12), (&always, 40), (&EngineOptions::default(), 40)] {
        let mut guessing = engine_with(kv_blocks, options).with_drafter(Box::new(PromptLookup::default()));
        assert_eq!(answers(&mut guessing, &requests), alone);
        let stats = guessing.stats();
        assert!(!options.always_draft || stats.accepted_tokens > 0, "{stats:?}");
    }
    let by_itself = || {
        let engine = engine_with(40, &always);
        let drafter = DraftModel::new(draft_model(), engine.info());
        engine.with_drafter(Box::new(drafter))
    };
    assert_eq!(answers(&mut by_itself(), &requests), alone);
    // The model itself is always right where the most likely token is taken.
    let greedy = Request {
        sampling: SamplingParams::greedy(),
        stop: StopConditions { max_tokens: 65, ignore_eos: true, ..StopConditions::default() },
        ..requests[0].clone()
    };
    let mut guessing = by_itself();
    answers(&mut guessing, &[greedy]);
    let stats = guessing.stats();
    assert_eq!((stats.generated_tokens, stats.accepted_tokens, stats.drafted_tokens), (65, 60, 60), "{stats:?}");
}

/// The bundled model, to guess for itself, with a KV cache of its own.
fn draft_model() -> Box<dyn LanguageModel> {
    let checkpoint = load::open_checkpoint(None).unwrap();
    let options = DeviceOptions { device: DeviceChoice::Cpu, ..DeviceOptions::default() };
    let load = LoadOptions { context: Some(256), kv_blocks: Some(60), logit_rows: 1, ..LoadOptions::default() };
    load::load_model(&checkpoint, &options.open().unwrap(), &load).unwrap()
}
