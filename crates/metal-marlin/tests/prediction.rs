//! Guessing by a model's own layer (`--speculate mtp`): answers stay what they are, and who has no such layer is told.
#![cfg(feature = "bundled-model")]

use std::collections::BTreeMap;
use std::process::Command;

use marlin_checkpoint::Checkpoint;
use marlin_engine::{Engine, EngineOptions, Event, MtpDrafter, Request, RequestId, SamplingParams, StopConditions};
use marlin_model::LoadOptions;
use metal_marlin::DeviceOptions;
use metal_marlin::device::DeviceChoice;
use metal_marlin::load;
use serde_json::Value;

/// A tiny GLM-4.7-Flash with random weights, whose layer is hardly ever right.
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../marlin-model/tests/goldens/glm4moelite-shared-mtp");
const VOCABULARY: u32 = 67;

fn engine(predicts: bool, kv_blocks: usize, options: &EngineOptions) -> Engine {
    let checkpoint = Checkpoint::open(TINY.as_ref()).unwrap();
    let device = DeviceOptions { device: DeviceChoice::Cpu, ..DeviceOptions::default() }.open().unwrap();
    let load = LoadOptions {
        step_tokens: 40,
        logit_rows: 24,
        kv_blocks: Some(kv_blocks),
        prediction: predicts,
        ..LoadOptions::default()
    };
    let model = load::load_model(&checkpoint, &device, &load).unwrap();
    // The golden has no tokenizer; all others have its few tokens, too.
    let tokenizer = load::open_checkpoint(None).unwrap().tokenizer().unwrap();
    let mut engine = Engine::with_options(model, tokenizer.into(), Vec::new(), options);
    match engine.take_prediction_layer() {
        Some(layer) => engine.with_drafter(Box::new(MtpDrafter::new(layer))),
        None => engine,
    }
}

fn requests() -> Vec<Request> {
    let request = |index: u32| Request {
        // Some begin alike.
        prompt: (0..3 + 9 * (index % 5)).map(|place| (place * (1 + index % 3) + 5) % VOCABULARY).collect(),
        sampling: if index.is_multiple_of(2) {
            SamplingParams::greedy()
        } else {
            SamplingParams { seed: Some(u64::from(index)), ..SamplingParams::default() }
        },
        stop: StopConditions { max_tokens: 5 + 3 * index as usize % 23, ..StopConditions::default() },
        choices: 1 + u32::from(index % 5 == 3),
        ..Request::default()
    };
    (0..16).map(request).collect()
}

/// The tokens of each answer; a request comes with each step.
fn answers(engine: &mut Engine) -> BTreeMap<(RequestId, u32), Vec<u32>> {
    let (mut events, mut waiting): (Vec<Event>, _) = (Vec::new(), requests().into_iter());
    loop {
        let more = waiting.next().map(|request| engine.add(request).unwrap());
        engine.step(&mut events).unwrap();
        if more.is_none() && engine.is_idle() {
            break;
        }
    }
    assert_eq!(engine.used_kv_blocks(), 0, "every block is free again");
    let mut answers: BTreeMap<_, Vec<u32>> = BTreeMap::new();
    for event in events {
        answers.entry((event.request, event.choice)).or_default().extend(event.token);
    }
    answers
}

/// Always, and where it pays; with blocks for all, and for a few of them.
#[test]
fn guesses_change_nothing() {
    let always = EngineOptions { always_draft: true, ..EngineOptions::default() };
    let alone = answers(&mut engine(false, 64, &EngineOptions::default()));
    for (options, kv_blocks) in [(&always, 64), (&always, 5), (&EngineOptions::default(), 64)] {
        let mut guessing = engine(true, kv_blocks, options);
        assert_eq!(answers(&mut guessing), alone);
        let stats = guessing.stats();
        assert!(!options.always_draft || stats.drafted_tokens > 100, "{stats:?}");
        assert!(kv_blocks > 5 || stats.preemptions > 0, "blocks are short: {stats:?}");
    }
}

fn metal_marlin(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_model_without_such_a_layer_is_refused() {
    for args in [
        &["run", "bundled", "Once", "--speculate", "mtp", "-n", "3"][..],
        &["plan", "bundled", "--speculate", "mtp", "--memory", "1GiB"],
    ] {
        let (code, _, stderr) = metal_marlin(args);
        assert_eq!(code, Some(1), "{stderr}");
        let parts = ["no layer that predicts further tokens", "num_nextn_predict_layers", "--speculate lookup"];
        assert!(parts.iter().all(|part| stderr.contains(part)), "{stderr}");
    }
}

#[test]
fn a_plan_counts_the_layer() {
    let plan = |options: &[&str]| -> Value {
        let (code, stdout, stderr) = metal_marlin(&[&["plan", TINY, "--memory", "1GiB", "--json"], options].concat());
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        serde_json::from_str(&stdout).unwrap()
    };
    let number = |plan: &Value, key: &str| plan[key].as_u64().unwrap_or_else(|| panic!("{key} of {plan}"));
    let (without, with) = (plan(&[]), plan(&["--speculate", "mtp"]));
    assert_eq!(plan(&["--speculate", "off"]), without);
    // A third layer beside two.
    for key in ["kv_cache_bytes", "kv_bytes_per_token"] {
        assert_eq!(2 * number(&with, key), 3 * number(&without, key), "{key}");
    }
    for key in ["weight_bytes", "activation_bytes", "logit_bytes"] {
        assert!(number(&with, key) > number(&without, key), "{key}");
    }
}
