//! The engine on the fake model.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use marlin_checkpoint::Tokenizer;
use marlin_kernels::SampleRow;
use proptest::prelude::*;

use super::fake_layer::{FakeLayer, Watcher};
use super::fake_model::{FakeModel, Sizes, VOCABULARY, Wire, logits, next_token};
use super::tokenizers::byte_level;
use crate::{
    AnswerId, Drafter, Engine, EngineError, EngineOptions, Event, FinishReason, Grammar, GrammarCompiler, MtpDrafter,
    Request, RequestId, SamplingParams, StopConditions, TokenLogprobs,
};

pub(super) const ROOMY: Sizes =
    Sizes { context: 64, step_tokens: 16, logit_rows: 8, block_tokens: 4, blocks: 64, overlaps: false };

/// Ids 0..256 are bytes, then three pieces, then the end-of-sequence token.
pub(super) const EOS: u32 = 259;

pub(super) static TOKENIZER: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(byte_level(&[b"ab", b" b", b"\xF0\x9F"], &["<|end|>"])));

pub(super) fn engine(sizes: Sizes) -> (Engine, Arc<Mutex<Wire>>) {
    let (model, wire) = FakeModel::new(sizes);
    (Engine::new(Box::new(model), TOKENIZER.clone(), vec![EOS]), wire)
}

/// Guesses what the fake model says of itself, in some places something else, and wants to know of every end.
#[derive(Debug, Default)]
struct Guesser {
    /// In one of how many places it is wrong; never, if 0.
    wrong: usize,
}

impl Drafter for Guesser {
    fn draft(&mut self, _: AnswerId, tokens: &[u32], most: usize, draft: &mut Vec<u32>) -> Result<(), EngineError> {
        let mut history = tokens.to_vec();
        for _ in 0..most {
            let is_wrong = self.wrong > 0 && history.len().is_multiple_of(self.wrong);
            let token = (next_token(&history, &SampleRow::GREEDY, None) + u32::from(is_wrong)) % VOCABULARY as u32;
            history.push(token);
            draft.push(token);
        }
        Ok(())
    }

    fn forget(&mut self, _: AnswerId) {}
}

/// An engine that guesses wherever it can.
fn guessing_engine(sizes: Sizes, wrong: usize) -> (Engine, Arc<Mutex<Wire>>) {
    engine_with(sizes, Box::new(Guesser { wrong }))
}

fn engine_with(sizes: Sizes, drafter: Box<dyn Drafter>) -> (Engine, Arc<Mutex<Wire>>) {
    let (model, wire) = FakeModel::new(sizes);
    let options = EngineOptions { always_draft: true, ..EngineOptions::default() };
    let engine = Engine::with_options(Box::new(model), TOKENIZER.clone(), vec![EOS], &options);
    (engine.with_drafter(drafter), wire)
}

/// Who guesses in the random test.
#[derive(Debug, Clone, Copy)]
enum Guesses {
    Nobody,
    /// The fake model's own words, wrong in one of so many places.
    Known(usize),
    /// A layer, in steps of so many slots, with so many blocks.
    Layer(usize, usize),
    /// What is shown is looked at.
    Watched,
}

impl Guesses {
    fn any() -> impl Strategy<Value = Self> {
        prop_oneof![
            Just(Self::Nobody),
            (0..9usize).prop_map(Self::Known),
            (1..9usize, 1..60usize).prop_map(|(step, blocks)| Self::Layer(step, blocks)),
            Just(Self::Watched),
        ]
    }

    fn engine(self, sizes: Sizes) -> (Engine, Arc<Mutex<Wire>>) {
        match self {
            Self::Nobody => engine(sizes),
            Self::Known(wrong) => guessing_engine(sizes, wrong),
            Self::Layer(step_tokens, blocks) => {
                let layer = FakeLayer::new(sizes, step_tokens, blocks);
                engine_with(sizes, Box::new(MtpDrafter::new(Box::new(layer))))
            }
            Self::Watched => engine_with(sizes, Box::<Watcher>::default()),
        }
    }
}

pub(super) fn greedy(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        sampling: SamplingParams::greedy(),
        stop: StopConditions { max_tokens, ignore_eos: true, ..StopConditions::default() },
        ..Request::default()
    }
}

/// Everything that a request's events say.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Output {
    pub(super) tokens: Vec<u32>,
    text: String,
    logprobs: Vec<TokenLogprobs>,
    prompt_logprobs: Vec<TokenLogprobs>,
    pub(super) reason: Option<FinishReason>,
    /// Not compared: they depend on what was cached.
    pub(super) cached: Cached,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Cached(pub(super) usize);

impl PartialEq for Cached {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// Steps until idle.
pub(super) fn finish(engine: &mut Engine) -> HashMap<RequestId, Output> {
    gather(&finish_events(engine))
}

pub(super) fn finish_events(engine: &mut Engine) -> Vec<Event> {
    let mut events = Vec::new();
    while !engine.is_idle() {
        engine.step(&mut events).unwrap();
    }
    events
}

/// The first answers.
pub(super) fn gather(events: &[Event]) -> HashMap<RequestId, Output> {
    let first = gather_choices(events).into_iter().filter(|((_, choice), _)| *choice == 0);
    first.map(|((request, _), output)| (request, output)).collect()
}

fn gather_choices(events: &[Event]) -> HashMap<(RequestId, u32), Output> {
    let mut outputs: HashMap<_, Output> = HashMap::new();
    for event in events {
        let output = outputs.entry((event.request, event.choice)).or_default();
        assert_eq!(output.reason, None, "an event after the last");
        output.tokens.extend(event.token);
        output.text += &event.text;
        output.logprobs.extend(event.logprobs.clone());
        output.prompt_logprobs.extend(event.prompt_logprobs.clone());
        if let Some(finish) = &event.finish {
            output.reason = Some(finish.reason.clone());
            output.cached.0 = finish.cached_tokens;
            assert_eq!(finish.generated_tokens, output.tokens.len());
        }
    }
    outputs
}

/// What the fake model makes of a greedy request without penalties.
pub(super) fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut history = prompt.to_vec();
    for _ in 0..count {
        history.push(next_token(&history, &SampleRow::GREEDY, None));
    }
    history.split_off(prompt.len())
}

#[test]
fn a_prompt_is_prefilled_in_chunks_beside_decoding_sequences() {
    let (mut engine, wire) = engine(ROOMY);
    let short = engine.add(greedy(&[1, 2, 3], 5)).unwrap();
    let mut events = Vec::new();
    engine.step(&mut events).unwrap();
    let long_prompt: Vec<u32> = (0..40).collect();
    let long = engine.add(greedy(&long_prompt, 3)).unwrap();
    while !engine.is_idle() {
        engine.step(&mut events).unwrap();
    }
    // (tokens, sequences, logit rows): 40 = 15 + 15 + 10 beside one decoding token each.
    assert_eq!(wire.lock().unwrap().steps, [(3, 1, 1), (16, 2, 1), (16, 2, 1), (11, 2, 2), (2, 2, 2), (1, 1, 1)]);
    let outputs = gather(&events);
    assert_eq!(outputs[&short].tokens, expected(&[1, 2, 3], 5));
    assert_eq!(outputs[&long].tokens, expected(&long_prompt, 3));
    assert_eq!(outputs[&long].reason, Some(FinishReason::Length));
    assert_eq!(engine.used_kv_blocks(), 0);
}

#[test]
fn a_device_that_overlaps_gets_the_next_step_before_the_last_one_is_read() {
    let (mut engine, wire) = engine(Sizes { overlaps: true, ..ROOMY });
    let steps = |wire: &Mutex<Wire>| wire.lock().unwrap().steps.len();
    let first = engine.add(greedy(&[1, 2, 3], 4)).unwrap();
    let mut events = Vec::new();
    for started in 1..=4 {
        engine.step(&mut events).unwrap();
        assert_eq!((steps(&wire), events.len()), (started, started - 1));
    }
    // Its last token is never fed back, so nothing is left to start.
    engine.step(&mut events).unwrap();
    assert_eq!((steps(&wire), events.len(), engine.is_idle()), (4, 4, true));
    assert_eq!(gather(&events)[&first].tokens, expected(&[1, 2, 3], 4));

    // A token that ends a request is read when the next step is under way.
    let tokens = expected(&[4, 5], 3);
    let mut request = greedy(&[4, 5], 9);
    request.stop.tokens = vec![tokens[2]];
    let second = engine.add(request).unwrap();
    let outputs = finish(&mut engine);
    assert_eq!(
        (&outputs[&second].tokens, &outputs[&second].reason),
        (&tokens, &Some(FinishReason::StopToken(tokens[2])))
    );
    assert_eq!((steps(&wire), engine.used_kv_blocks()), (4 + 4, 0));
}

#[test]
fn requests_wait_in_line_for_blocks() {
    // Each needs two of five blocks at once and no others later, so two run at a time.
    let (mut engine, wire) = engine(Sizes { blocks: 5, ..ROOMY });
    let ids: Vec<RequestId> = (0..5).map(|i| engine.add(greedy(&[i, 1, 2, 3, 4], 4)).unwrap()).collect();
    let mut finished = Vec::new();
    let mut events = Vec::new();
    while !engine.is_idle() {
        engine.step(&mut events).unwrap();
        finished.extend(events.drain(..).filter(|event| event.finish.is_some()).map(|event| event.request));
    }
    assert_eq!(finished, ids);
    assert!(wire.lock().unwrap().steps.iter().all(|&(_, sequences, _)| sequences <= 2));
    assert_eq!((engine.used_kv_blocks(), engine.stats().preemptions), (0, 0));
}

#[test]
fn when_blocks_run_out_the_last_in_line_waits_again_and_goes_on() {
    for overlaps in [false, true] {
        let (mut engine, _) = engine(Sizes { blocks: 6, overlaps, ..ROOMY });
        let prompts: Vec<Vec<u32>> = (0..3).map(|i| vec![i, 1, 2]).collect();
        let ids: Vec<RequestId> = prompts.iter().map(|prompt| engine.add(greedy(prompt, 14)).unwrap()).collect();
        let events = finish_events(&mut engine);
        let finished = events.iter().filter(|event| event.finish.is_some()).map(|event| event.request);
        assert_eq!(finished.collect::<Vec<_>>(), ids, "who came first ends first");
        let outputs = gather(&events);
        for (prompt, id) in prompts.iter().zip(&ids) {
            assert_eq!(outputs[id].tokens, expected(prompt, 14));
        }
        assert!(engine.stats().preemptions > 0);
        assert_eq!(engine.used_kv_blocks(), 0);
    }
}

#[test]
fn a_lower_priority_is_served_first() {
    let (mut engine, _) = engine(Sizes { logit_rows: 1, ..ROOMY });
    let with_priority = |priority| Request { priority, ..greedy(&[1, 2], 2) };
    let ids: Vec<RequestId> = [0, 5, -1, 0].map(|p| engine.add(with_priority(p)).unwrap()).into();
    let events = finish_events(&mut engine);
    let finished: Vec<_> = events.iter().filter(|event| event.finish.is_some()).map(|event| event.request).collect();
    assert_eq!(finished, [ids[2], ids[0], ids[3], ids[1]]);
}

#[test]
fn prompts_that_begin_alike_are_computed_once() {
    let (mut engine, wire) = engine(ROOMY);
    let prompt: Vec<u32> = (0..16).collect();
    let first = engine.add(greedy(&prompt, 6)).unwrap();
    let output = finish(&mut engine).remove(&first).unwrap();
    assert_eq!((output.tokens.clone(), output.cached.0), (expected(&prompt, 6), 0));

    // The last token has to be computed: its logits are wanted. The block it is in is copied.
    wire.lock().unwrap().steps.clear();
    let again = engine.add(greedy(&prompt, 6)).unwrap();
    let output = finish(&mut engine).remove(&again).unwrap();
    assert_eq!((output.tokens, output.cached.0), (expected(&prompt, 6), 15));
    assert_eq!(wire.lock().unwrap().steps[0], (1, 1, 1));

    // A conversation that goes on finds its answers, too: of 16 + 6 tokens 20 fill blocks.
    let mut longer = [prompt.clone(), expected(&prompt, 6), vec![99; 5]].concat();
    let continued = engine.add(greedy(&longer, 2)).unwrap();
    let output = finish(&mut engine).remove(&continued).unwrap();
    assert_eq!((output.tokens, output.cached.0), (expected(&longer, 2), 20));

    // Another beginning, another salt, or a prompt that is scored: nothing is found.
    longer[0] = 77;
    let strangers = [
        greedy(&longer, 2),
        Request { cache_salt: "mine".into(), ..greedy(&prompt, 2) },
        Request { prompt_logprobs: Some(0), ..greedy(&prompt, 2) },
    ];
    for stranger in strangers {
        let id = engine.add(stranger.clone()).unwrap();
        let output = finish(&mut engine).remove(&id).unwrap();
        assert_eq!((output.tokens, output.cached.0), (expected(&stranger.prompt, 2), 0));
    }
    let stats = engine.stats();
    assert_eq!((stats.used_kv_blocks, stats.prefix_hits), (0, 35));
    assert!(stats.cached_kv_blocks > 0);

    let (model, _) = FakeModel::new(ROOMY);
    let options = EngineOptions { prefix_cache: false, ..EngineOptions::default() };
    let mut engine = Engine::with_options(Box::new(model), TOKENIZER.clone(), vec![EOS], &options);
    for _ in 0..2 {
        let id = engine.add(greedy(&prompt, 6)).unwrap();
        assert_eq!(finish(&mut engine)[&id].cached.0, 0);
    }
}

#[test]
fn long_prompts_leave_room_for_answers_under_way() {
    let (model, wire) = FakeModel::new(ROOMY);
    let options = EngineOptions { prefill_tokens: Some(5), ..EngineOptions::default() };
    let mut engine = Engine::with_options(Box::new(model), TOKENIZER.clone(), vec![EOS], &options);
    engine.add(greedy(&[1, 2, 3], 3)).unwrap();
    engine.step(&mut Vec::new()).unwrap();
    engine.add(greedy(&[4; 30], 1)).unwrap();
    finish_events(&mut engine);
    let steps: Vec<usize> = wire.lock().unwrap().steps.iter().map(|step| step.0).collect();
    assert_eq!(steps, [3, 6, 6, 16, 4]);
}

#[test]
fn several_answers_share_a_prompt() {
    for (overlaps, logit_rows) in [(false, 8), (true, 8), (false, 2)] {
        let (mut engine, wire) = engine(Sizes { overlaps, logit_rows, ..ROOMY });
        let prompt: Vec<u32> = (0..10).collect();
        let sampling = SamplingParams { seed: Some(3), ..SamplingParams::default() };
        let request = Request { choices: 4, sampling, ..greedy(&prompt, 5) };
        let id = engine.add(request.clone()).unwrap();
        let outputs = gather_choices(&finish_events(&mut engine));
        assert_eq!(outputs.len(), 4);
        // The prompt but for its last token is computed once.
        if logit_rows == 8 {
            assert_eq!(wire.lock().unwrap().steps[..2], [(9, 1, 0), (4, 4, 4)]);
        }
        // The first is the answer to a request for one, and the others differ.
        let alone = engine.add(Request { choices: 1, ..request }).unwrap();
        assert_eq!(finish(&mut engine)[&alone], outputs[&(id, 0)]);
        assert!((1..4).all(|choice| outputs[&(id, choice)].tokens != outputs[&(id, 0)].tokens));
        assert_eq!(engine.used_kv_blocks(), 0);
    }
}

#[test]
fn tokens_come_with_their_probabilities() {
    for overlaps in [false, true] {
        let (mut engine, _) = engine(Sizes { overlaps, ..ROOMY });
        let prompt: Vec<u32> = (0..20).collect();
        let request = Request { logprobs: Some(3), prompt_logprobs: Some(1), ..greedy(&prompt, 4) };
        let (id, _other) = (engine.add(request).unwrap(), engine.add(greedy(&[5, 6], 6)).unwrap());
        let output = finish(&mut engine).remove(&id).unwrap();
        assert_eq!(output.tokens, expected(&prompt, 4));
        let all = [prompt.clone(), output.tokens.clone()].concat();
        let scored = |place: usize, top| crate::logprobs::token_logprobs(&logits(&all[..place]), all[place], top);
        assert_eq!(output.prompt_logprobs, (1..20).map(|place| scored(place, 1)).collect::<Vec<_>>());
        assert_eq!(output.logprobs, (20..24).map(|place| scored(place, 3)).collect::<Vec<_>>());
        assert_eq!((output.logprobs[0].top.len(), output.logprobs[0].top[0].0), (3, output.tokens[0]));
    }
}

#[test]
fn a_prompt_can_be_scored_without_an_answer() {
    // It may fill the context.
    let (mut engine, _) = engine(ROOMY);
    let prompt: Vec<u32> = (0..64).collect();
    let request = Request { prompt_logprobs: Some(0), ..greedy(&prompt, 0) };
    let id = engine.add(request).unwrap();
    let output = finish(&mut engine).remove(&id).unwrap();
    assert_eq!((output.tokens.len(), output.prompt_logprobs.len()), (0, 63));
    assert_eq!(output.reason, Some(FinishReason::Length));
    assert_eq!(engine.used_kv_blocks(), 0);
}

#[test]
fn an_answer_has_its_least_length() {
    let prompt = (0..200).map(|i| [i]).find(|prompt| expected(prompt, 9).contains(&EOS)).unwrap();
    let (mut engine, _) = engine(ROOMY);
    let mut request = greedy(&prompt, 20);
    (request.stop.ignore_eos, request.stop.min_tokens) = (false, 12);
    // No string ends it before that, either.
    request.stop.strings = vec![engine.tokenizer().decode(&expected(&prompt, 1), true).unwrap()];
    let id = engine.add(request).unwrap();
    let output = finish(&mut engine).remove(&id).unwrap();
    assert!(output.tokens.len() >= 12 && !output.tokens[..12].contains(&EOS), "{:?}", output.tokens);
    let text = engine.tokenizer().decode(&output.tokens[..12], true).unwrap();
    assert!(output.text.starts_with(text.trim_end_matches(char::REPLACEMENT_CHARACTER)));
}

#[test]
fn an_answer_keeps_to_its_grammar_in_any_company() {
    let compiler = GrammarCompiler::new(&TOKENIZER, VOCABULARY, &[EOS]).unwrap();
    for overlaps in [false, true] {
        let (mut engine, wire) = engine(Sizes { overlaps, ..ROOMY });
        let free = engine.add(greedy(&[7, 8], 30)).unwrap();
        engine.step(&mut Vec::new()).unwrap();
        let constraint = compiler.compile(&Grammar::Regex("[ab]{3}(cd)*".into())).unwrap();
        let mut request = Request { constraint: Some(constraint), choices: 2, ..greedy(&[1, 2], 9) };
        assert!(engine.add(request.clone()).unwrap_err().to_string().contains("ignore_eos"));
        request.stop.ignore_eos = false;
        let open = engine.add(request.clone()).unwrap();
        let closed = compiler.compile(&Grammar::Regex("[ab]{5}".into())).unwrap();
        let closed = engine.add(Request { constraint: Some(closed), ..request }).unwrap();
        let mut events = finish_events(&mut engine);
        assert!(wire.lock().unwrap().steps.len() <= 32, "everybody has a token in each step");
        events.retain(|event| event.request != free);
        let outputs = gather_choices(&events);
        for choice in 0..2 {
            let Output { text, reason, .. } = &outputs[&(open, choice)];
            let (letters, rest) = text.split_at(3);
            assert!(letters.chars().all(|c| "ab".contains(c)), "{text}");
            match reason {
                Some(FinishReason::StopToken(EOS)) => assert_eq!(rest.replace("cd", ""), ""),
                Some(FinishReason::Length) => assert_eq!(outputs[&(open, choice)].tokens.len(), 9),
                other => panic!("{other:?}"),
            }
            let Output { text, reason, .. } = &outputs[&(closed, choice)];
            assert_eq!((text.len(), reason), (5, &Some(FinishReason::Complete)), "{text}");
        }
        assert_eq!(engine.used_kv_blocks(), 0);
    }
}

#[test]
fn special_tokens_are_spelled_out_if_asked() {
    let prompt = (0..200).map(|i| [i]).find(|prompt| expected(prompt, 9).contains(&EOS)).unwrap();
    let (mut engine, _) = engine(ROOMY);
    let spelled = engine.add(Request { special_tokens: true, ..greedy(&prompt, 9) }).unwrap();
    let left_out = engine.add(greedy(&prompt, 9)).unwrap();
    let outputs = finish(&mut engine);
    assert!(outputs[&spelled].text.contains("<|end|>"));
    assert_eq!(outputs[&spelled].text.replace("<|end|>", ""), outputs[&left_out].text);
}

#[test]
fn a_request_that_can_never_fit_is_refused_with_the_numbers() {
    let (mut engine, _) = engine(Sizes { blocks: 5, ..ROOMY });
    let refusal = |engine: &mut Engine, request| engine.add(request).unwrap_err().to_string();
    let too_long = refusal(&mut engine, greedy(&[0; 64], 1));
    assert!(too_long.contains("64 tokens, but the context of 64 tokens"), "{too_long}");
    let too_big = refusal(&mut engine, greedy(&[0; 10], 12));
    assert!(too_big.contains("needs 6 KV blocks of 4 tokens, and the cache has 5"), "{too_big}");
    engine.add(greedy(&[0; 10], 11)).expect("5 blocks are enough for 20 tokens");
    // Who does not say how much is given what there is.
    let open = engine.add(greedy(&[0; 18], usize::MAX)).unwrap();
    assert!(engine.add(greedy(&[0; 21], usize::MAX)).unwrap_err().to_string().contains("context of 21 tokens"));
    let output = finish(&mut engine).remove(&open).unwrap();
    assert_eq!((output.tokens.len(), output.reason), (3, Some(FinishReason::Context)));

    assert!(matches!(engine.add(greedy(&[], 1)), Err(EngineError::EmptyPrompt)));
    assert!(matches!(engine.add(greedy(&[1, 260], 1)), Err(EngineError::Token { token: 260, .. })));
    let mut biased = greedy(&[1], 1);
    biased.sampling.logit_bias = vec![(259, 1.0), (300, 1.0)];
    assert!(matches!(engine.add(biased), Err(EngineError::Token { place: "logit_bias", token: 300, .. })));
    assert!(matches!(engine.add(greedy(&[1], 0)), Err(EngineError::Parameter { name: "max_tokens", .. })));
    let none = Request { choices: 0, ..greedy(&[1], 1) };
    assert!(matches!(engine.add(none), Err(EngineError::Parameter { name: "n", .. })));
    let mut endless = greedy(&[1], 4);
    endless.stop.min_tokens = 5;
    assert!(matches!(engine.add(endless), Err(EngineError::Parameter { name: "min_tokens", .. })));
    let mut nameless = greedy(&[1], 1);
    nameless.stop.strings.push(String::new());
    assert!(matches!(engine.add(nameless), Err(EngineError::Parameter { name: "stop", .. })));
}

#[test]
fn the_context_ends_a_request() {
    let (mut engine, _) = engine(ROOMY);
    let id = engine.add(greedy(&[7; 60], 100)).unwrap();
    let output = &finish(&mut engine)[&id];
    assert_eq!((output.tokens.len(), &output.reason), (4, &Some(FinishReason::Context)));
}

#[test]
fn stop_tokens_end_a_request_and_have_no_text() {
    let (mut engine, _) = engine(ROOMY);
    let tokens = expected(&[1, 2], 10);
    let at = |token| tokens.iter().position(|&t| t == token).unwrap() + 1;
    let mut request = greedy(&[1, 2], 10);
    request.stop.tokens = vec![tokens[4]];
    let id = engine.add(request).unwrap();
    let output = &finish(&mut engine)[&id];
    assert_eq!(output.tokens, tokens[..at(tokens[4])]);
    assert_eq!(output.reason, Some(FinishReason::StopToken(tokens[4])));
    assert_eq!(output.text, engine.tokenizer().decode(&tokens[..at(tokens[4]) - 1], true).unwrap());
}

#[test]
fn the_end_of_sequence_token_is_heeded_or_ignored() {
    // The first prompt after which the model says EOS within 20 tokens.
    let prompt = (0..200).map(|i| [i]).find(|prompt| expected(prompt, 20).contains(&EOS)).unwrap();
    let tokens = expected(&prompt, 20);
    let (mut engine, _) = engine(ROOMY);
    let ignoring = engine.add(greedy(&prompt, 20)).unwrap();
    let mut request = greedy(&prompt, 20);
    request.stop.ignore_eos = false;
    let heeding = engine.add(request).unwrap();
    let outputs = finish(&mut engine);
    assert_eq!((&outputs[&ignoring].tokens, &outputs[&ignoring].reason), (&tokens, &Some(FinishReason::Length)));
    assert_eq!(outputs[&heeding].tokens.last(), Some(&EOS));
    assert_eq!(outputs[&heeding].reason, Some(FinishReason::StopToken(EOS)));
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let (mut engine, _) = engine(ROOMY);
    let whole = engine.tokenizer().decode(&expected(&[5], 30), true).unwrap();
    let stop: String = whole.chars().filter(|&char| char != char::REPLACEMENT_CHARACTER).nth(3).unwrap().into();
    let mut request = greedy(&[5], 30);
    request.stop.strings = vec![stop.clone()];
    let id = engine.add(request).unwrap();
    let output = &finish(&mut engine)[&id];
    assert_eq!(output.text, whole[..whole.find(&stop).unwrap()]);
    assert_eq!(output.reason, Some(FinishReason::StopString(stop)));
}

#[test]
fn cancelling_frees_blocks_at_once() {
    let (mut engine, _) = engine(Sizes { blocks: 5, ..ROOMY });
    let running = engine.add(greedy(&[1; 12], 6)).unwrap();
    let waiting = engine.add(greedy(&[2; 8], 10)).unwrap();
    let last = engine.add(greedy(&[3; 8], 10)).unwrap();
    let mut events = Vec::new();
    engine.step(&mut events).unwrap();
    assert_eq!(engine.used_kv_blocks(), 3);
    assert!(engine.cancel(running) && engine.cancel(waiting));
    assert!(!engine.cancel(running), "it is already gone");
    assert_eq!(engine.used_kv_blocks(), 0);
    let outputs = finish(&mut engine);
    assert_eq!(outputs.keys().collect::<Vec<_>>(), [&last]);
    assert_eq!(outputs[&last].tokens, expected(&[3; 8], 10));
}

#[test]
fn after_a_failure_the_same_step_can_be_run_again() {
    [false, true].into_iter().for_each(run_through_failures);
}

fn run_through_failures(overlaps: bool) {
    let (mut engine, wire) = engine(Sizes { overlaps, ..ROOMY });
    let prompt: Vec<u32> = (0..20).collect();
    let id = engine.add(greedy(&prompt, 6)).unwrap();
    let mut events = Vec::new();
    // Where steps overlap, the call after a failure delivers nothing yet.
    let calls: &[bool] = if overlaps { &[false, false, true] } else { &[false, true] };
    for &failing in calls.iter().cycle() {
        if engine.is_idle() {
            break;
        }
        if failing {
            let mut wire = wire.lock().unwrap();
            wire.fail_forward = events.len() % 2 == 0;
            wire.fail_sample = !wire.fail_forward;
        }
        let before = events.len();
        // A chunk of a prompt has nothing to sample, so its sampling cannot fail.
        if engine.step(&mut events).is_err() {
            assert!(failing && events.len() == before);
        }
    }
    assert_eq!(gather(&events)[&id].tokens, expected(&prompt, 6));
    assert_eq!(engine.used_kv_blocks(), 0);
}

#[test]
fn a_request_whose_logits_are_not_finite_fails_alone() {
    let (mut engine, wire) = engine(ROOMY);
    let doomed = engine.add(greedy(&[1, 2, 3], 9)).unwrap();
    let sound = engine.add(greedy(&[4, 5, 6], 9)).unwrap();
    let mut events = Vec::new();
    for _ in 0..4 {
        engine.step(&mut events).unwrap();
    }
    wire.lock().unwrap().poison = Some(1);
    let used = engine.used_kv_blocks();
    engine.step(&mut events).unwrap();
    let failure = events.iter().find(|event| event.token.is_none()).unwrap();
    assert_eq!(failure.request, doomed);
    let finish = failure.finish.as_ref().unwrap();
    assert_eq!((finish.prompt_tokens, finish.generated_tokens), (3, 4));
    let error = finish.reason.error().unwrap().to_string();
    assert!(error.starts_with("the model's logits are not finite"), "{error}");
    assert!(engine.used_kv_blocks() < used, "its blocks are free");
    while !engine.is_idle() {
        engine.step(&mut events).unwrap();
    }
    let outputs = gather(&events);
    let text = |tokens: &[u32]| engine.tokenizer().decode(tokens, true).unwrap();
    assert_eq!(outputs[&doomed].tokens, expected(&[1, 2, 3], 4));
    assert_eq!(outputs[&doomed].text, text(&outputs[&doomed].tokens), "nothing is held back");
    assert_eq!(outputs[&sound].tokens, expected(&[4, 5, 6], 9));
    assert_eq!(outputs[&sound].reason, Some(FinishReason::Length));
    assert_eq!(engine.used_kv_blocks(), 0);
}

#[test]
fn what_is_guessed_right_comes_at_once() {
    for (wrong, most_steps) in [(0, 8), (5, 24), (1, 45)] {
        let (mut engine, wire) = guessing_engine(ROOMY, wrong);
        let id = engine.add(Request { logprobs: Some(2), ..greedy(&[1, 2, 3], 40) }).unwrap();
        let output = finish(&mut engine).remove(&id).unwrap();
        assert_eq!(output.tokens, expected(&[1, 2, 3], 40));
        let (mut plain, _) = self::engine(ROOMY);
        let id = plain.add(Request { logprobs: Some(2), ..greedy(&[1, 2, 3], 40) }).unwrap();
        assert_eq!(output, finish(&mut plain)[&id]);
        let steps = &wire.lock().unwrap().steps;
        assert!(steps.len() <= most_steps, "{wrong}: {steps:?}");
        let stats = engine.stats();
        assert_eq!((stats.generated_tokens, stats.accepted_tokens > 0), (40, wrong != 1));
        assert_eq!(engine.used_kv_blocks(), 0);
    }
}

/// A layer of the model that has seen all of a text guesses as the fake model does, so that answers come in a few steps: after a prompt in
/// chunks, of two answers at once, and on a device that works by itself.
#[test]
fn what_the_models_own_layer_guesses_comes_at_once() {
    for overlaps in [false, true] {
        let sizes = Sizes { step_tokens: 20, logit_rows: 20, overlaps, ..ROOMY };
        let (mut engine, wire) = Guesses::Layer(5, 60).engine(sizes);
        let prompts = [(0..23).collect::<Vec<u32>>(), vec![7, 8]];
        let ids = prompts.each_ref().map(|prompt| engine.add(greedy(prompt, 40)).unwrap());
        let outputs = finish(&mut engine);
        for (prompt, id) in prompts.iter().zip(&ids) {
            assert_eq!(outputs[id].tokens, expected(prompt, 40));
        }
        let (steps, stats) = (wire.lock().unwrap().steps.len(), engine.stats());
        assert!(steps < 20 && stats.accepted_tokens > 60, "{steps} steps, {stats:?}");
        assert_eq!(stats.drafted_tokens, stats.accepted_tokens, "all are right");
        // Where the cache has the beginning, the layer sees the rest only, and guesses what is not so.
        let again = [&prompts[0][..], &[99, 98]].concat();
        let id = engine.add(greedy(&again, 20)).unwrap();
        let output = finish(&mut engine).remove(&id).unwrap();
        assert!(output.cached.0 > 0);
        assert_eq!(output.tokens, expected(&again, 20));
        assert!(engine.stats().drafted_tokens > stats.drafted_tokens, "it guesses nevertheless");
    }
}

/// Of a long prompt the layer reads the end, and goes on from there.
#[test]
fn a_layer_begins_near_the_end_of_a_long_prompt() {
    let sizes = Sizes { context: 1024, step_tokens: 300, blocks: 300, ..ROOMY };
    let (mut engine, _) = Guesses::Layer(50, 100).engine(sizes);
    let prompt: Vec<u32> = (0..700).map(|i| i % 251).collect();
    let id = engine.add(greedy(&prompt, 30)).unwrap();
    let output = finish(&mut engine).remove(&id).unwrap();
    assert_eq!(output.tokens, expected(&prompt, 30));
    assert!(engine.stats().drafted_tokens > 0);
}

/// A request of the random test, and when it comes and goes.
#[derive(Debug, Clone)]
struct Visit {
    request: Request,
    arrival: usize,
    /// Cancelled this many steps later.
    patience: Option<usize>,
}

fn visit() -> impl Strategy<Value = Visit> {
    // Few different tokens, so that prompts begin alike.
    let prompt = prop_oneof![
        prop::collection::vec(0..VOCABULARY as u32, 1..30),
        (0..3usize, 1..30usize).prop_map(|(kind, len)| (0..len as u32).map(|i| i * kind as u32 % 7).collect()),
    ];
    let sampling =
        (any::<bool>(), any::<u64>(), prop::sample::select(vec![0.0, 0.5])).prop_map(|(greedy, seed, penalty)| {
            let base = if greedy { SamplingParams::greedy() } else { SamplingParams::default() };
            let repetition_penalty = 1.0 + penalty / 5.0;
            SamplingParams { seed: Some(seed), frequency_penalty: penalty, repetition_penalty, ..base }
        });
    let stop = (
        1..50usize,
        0..8usize,
        prop::collection::vec("[a-d]", 0..2),
        prop::collection::vec(0..256u32, 0..3),
        any::<bool>(),
    )
        .prop_map(|(max_tokens, min_tokens, strings, tokens, ignore_eos)| StopConditions {
            max_tokens,
            min_tokens: min_tokens.min(max_tokens),
            strings,
            tokens,
            ignore_eos,
        });
    let extras =
        (1..4u32, prop::option::of(0..4usize), prop::option::weighted(0.2, 0..2usize), any::<bool>(), -1..2i32);
    let patience = prop::option::weighted(0.2, 0..20usize);
    (prompt, sampling, stop, extras, 0..40usize, patience).prop_map(
        |(
            prompt,
            sampling,
            stop,
            (choices, logprobs, prompt_logprobs, special_tokens, priority),
            arrival,
            patience,
        )| {
            let request = Request {
                prompt,
                sampling,
                stop,
                choices,
                logprobs,
                prompt_logprobs,
                special_tokens,
                priority,
                ..Request::default()
            };
            Visit { request, arrival, patience }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn company_changes_nothing(
        visits in prop::collection::vec(visit(), 1..20),
        step_tokens in 1..24usize,
        logit_rows in 1..8usize,
        block_tokens in 1..9usize,
        spare_blocks in 0..40usize,
        overlaps in any::<bool>(),
        guesses in Guesses::any(),
        is_kept in any::<bool>(),
    ) {
        // The smallest pool that any of the requests can run in, or a larger one.
        let context = 48;
        let blocks = usize::div_ceil(context - 1, block_tokens) + spare_blocks;
        let sizes = Sizes { context, step_tokens, logit_rows, block_tokens, blocks, overlaps };
        let (mut together, _) = guesses.engine(sizes);
        if is_kept {
            // Of all cases with blocks of one size.
            together = super::store::kept(together, KEPT.path(), "");
        }
        let mut ids: Vec<Option<RequestId>> = vec![None; visits.len()];
        let mut cancelled = vec![false; visits.len()];
        let mut events = Vec::new();
        for now in 0.. {
            for (i, visit) in visits.iter().enumerate() {
                if visit.arrival == now {
                    ids[i] = Some(together.add(visit.request.clone()).unwrap());
                }
                if let (Some(id), Some(patience)) = (ids[i], visit.patience) && now == visit.arrival + patience {
                    cancelled[i] = together.cancel(id);
                }
            }
            together.step(&mut events).unwrap();
            if together.is_idle() && now > 60 {
                break;
            }
        }
        prop_assert_eq!(together.used_kv_blocks(), 0);

        let outputs = gather_choices(&events);
        for ((visit, id), cancelled) in visits.iter().zip(ids).zip(cancelled) {
            let (mut alone, _) = engine(ROOMY_ALONE);
            let own = alone.add(visit.request.clone()).unwrap();
            let mut alone = gather_choices(&finish_events(&mut alone));
            for choice in 0..visit.request.choices {
                let alone = alone.remove(&(own, choice)).unwrap();
                let output = outputs.get(&(id.unwrap(), choice)).cloned().unwrap_or_default();
                if cancelled {
                    prop_assert!(alone.tokens.starts_with(&output.tokens) && alone.text.starts_with(&output.text));
                } else {
                    prop_assert_eq!(output, alone);
                }
            }
        }
    }
}

/// Where blocks are kept.
static KEPT: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

const ROOMY_ALONE: Sizes =
    Sizes { context: 48, step_tokens: 1000, logit_rows: 100, block_tokens: 1000, blocks: 4, overlaps: false };
