//! Quantising layer by layer by what linears are given, on small models of random weights.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use common::{backend, divergence, golden, windows};
use marlin_checkpoint::Checkpoint;
use marlin_format::{Format, Grouping, ScaleSearch, Scheme};
use marlin_quantize::{
    Calibration, QuantizeError, QuantizeOptions, Recipe, Report, TensorRole, Windows, layer_and_kind, quantize,
};

/// Dense models, mixtures of experts in each way they are stored, and latent attention.
const MODELS: [&str; 10] = [
    "qwen3-gqa2-tied",
    "gemma3-gqa2-linear-softcap-sharded",
    "phi3-gqa3-partial-sharded",
    "mixtral-top2",
    "mixtral-window-fused-sharded",
    "qwen3moe-top3-norm",
    "gptoss-bf16-sharded",
    "glm4moe-fused-shared2",
    "glm4moelite-shared-mtp",
    "deepseekv3-direct-shared3",
];

fn recipe(format: Format, group: u32) -> Recipe {
    Recipe::uniform(format.scheme(Some(Grouping::Columns(group))).unwrap(), None, ScaleSearch::Mse)
}

fn run(source: &Checkpoint, out: &Path, recipe: &Recipe, calibration: Option<Calibration<'_>>) -> Report {
    quantize(source, out, recipe, QuantizeOptions { calibration, ..Default::default() }).unwrap()
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn every_architecture_keeps_more_than_by_rounding_to_nearest() {
    let folder = tempfile::tempdir().unwrap();
    let text = windows(1, 64);
    for name in MODELS {
        let source = Checkpoint::open(&golden(name)).unwrap();
        let [nearest, calibrated] =
            ["nearest", "calibrated"].map(|method| folder.path().join(format!("{name}-{method}")));
        let recipe = recipe(Format::Int3, 16);
        let by_itself = run(&source, &nearest, &recipe, None);
        let report = run(&source, &calibrated, &recipe, Some(Calibration::new(&text, backend())));
        let (nearest, calibrated) = (divergence(&source, &nearest), divergence(&source, &calibrated));
        assert!(calibrated < 0.8 * nearest, "{name}: {calibrated} by calibration, {nearest} to nearest");

        // The same matrices, each further from its source: only on the whole is it nearer.
        assert_eq!(report.matrices.len(), by_itself.matrices.len(), "{name}");
        let further = report.matrices.iter().zip(&by_itself.matrices);
        // Layers for multi-token prediction do not run.
        let layers = source.config()["num_hidden_layers"].as_u64().unwrap();
        let runs = |name: &str| layer_and_kind(name).0.is_some_and(|layer| (layer as u64) < layers);
        let linears = further.filter(|(matrix, _)| matrix.role == TensorRole::DecoderLinear && runs(&matrix.name));
        for (matrix, other) in linears {
            assert_eq!((&matrix.name, matrix.scheme), (&other.name, other.scheme));
            assert!(matrix.error.noise > other.error.noise, "{name}: {} is as by rounding to nearest", matrix.name);
        }
    }
}

/// Experts learn from as many runs of a layer as memory asks for, and learn the same.
#[test]
fn memory_does_not_change_the_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let text = windows(1, 8);
    for name in ["mixtral-window-fused-sharded", "glm4moelite-shared-mtp"] {
        let source = Checkpoint::open(&golden(name)).unwrap();
        let calibration = Calibration::new(&text, backend());
        let outputs = [1, 3 * 2 * 48 * 48 * 4, calibration.memory].map(|memory| {
            let out = folder.path().join(format!("{name}-{memory}"));
            run(&source, &out, &recipe(Format::Int4, 16), Some(Calibration { memory, ..calibration.clone() }));
            contents(&out)
        });
        assert!(outputs[0] == outputs[2] && outputs[1] == outputs[2], "{name}");
    }
}

/// What a run says of the text that it held out is what the folder does on it, and costs nothing: the bytes are the same.
#[test]
fn what_is_said_to_be_kept_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (text, held_out) = (windows(1, 16), windows(99, 12));
    for name in ["qwen3-gqa2-tied", "gemma3-gqa2-linear-softcap-sharded", "glm4moelite-shared-mtp"] {
        let source = Checkpoint::open(&golden(name)).unwrap();
        let [plain, measured] = ["plain", "measured"].map(|run| folder.path().join(format!("{name}-{run}")));
        let recipe = recipe(Format::Int3, 16);
        let calibration = Calibration::new(&text, backend());
        assert_eq!(run(&source, &plain, &recipe, Some(calibration.clone())).kept_quality, None);
        let calibration = Calibration { held_out: Some(&held_out), ..calibration };
        let kept = run(&source, &measured, &recipe, Some(calibration)).kept_quality.unwrap();
        assert!(contents(&plain) == contents(&measured), "{name}");
        let (said, found) = (kept.quantized.divergence.unwrap().mean_kl, divergence(&source, &measured));
        assert!((said - found).abs() < 1e-3 * found, "{name}: {said} is said, {found} found");
        assert_eq!((kept.original.tokens, kept.quantized.tokens), (12 * 31, 12 * 31));
        assert!(kept.original.divergence.is_none() && kept.original.perplexity() > 1.0);
    }
}

#[test]
fn an_interrupted_calibration_goes_on_and_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let text = windows(1, 8);
    for name in ["qwen3-gqa2-tied", "glm4moelite-shared-mtp"] {
        let source = Checkpoint::open(&golden(name)).unwrap();
        let recipe = recipe(Format::Fp4, 32);
        let out = |run: &str| folder.path().join(format!("{name}-{run}"));
        let calibration = || Some(Calibration::new(&text, backend()));
        let expected = run(&source, &out("whole"), &recipe, calibration());
        let tensors = source.tensor_names().count();
        for killed_after in (1..tensors).step_by(tensors / 5) {
            let resumed = out(&format!("resumed-{killed_after}"));
            let mut seen = 0;
            let mut dies = |_: marlin_quantize::Progress<'_>| {
                seen += 1;
                assert!(seen < killed_after, "killed");
            };
            let options = QuantizeOptions {
                sync_bytes: 1,
                progress: Some(&mut dies),
                calibration: calibration(),
                ..Default::default()
            };
            catch_unwind(AssertUnwindSafe(|| quantize(&source, &resumed, &recipe, options))).unwrap_err();
            assert!(!resumed.exists());
            let report = run(&source, &resumed, &recipe, calibration());
            assert_eq!(report.matrices, expected.matrices, "{name}, killed after {killed_after}");
            assert_eq!(contents(&resumed), contents(&out("whole")), "{name}, killed after {killed_after}");
        }
    }
}

#[test]
fn work_of_another_text_is_not_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let (out, recipe, texts) = (folder.path().join("out"), recipe(Format::Int4, 32), [windows(1, 4), windows(2, 4)]);
    let mut dies = |_: marlin_quantize::Progress<'_>| panic!("killed");
    let calibration = Some(Calibration::new(&texts[0], backend()));
    let options = QuantizeOptions { progress: Some(&mut dies), calibration, ..Default::default() };
    catch_unwind(AssertUnwindSafe(|| quantize(&source, &out, &recipe, options))).unwrap_err();
    let calibration = Some(Calibration::new(&texts[1], backend()));
    let options = QuantizeOptions { calibration, ..Default::default() };
    let error = quantize(&source, &out, &recipe, options).unwrap_err();
    assert!(matches!(error, QuantizeError::Checkpoint(_)) && error.to_string().contains("out.partial"), "{error}");
}

#[test]
fn a_text_that_does_not_suit_the_model_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let refused = |tokens: Vec<u32>, context| {
        let text = Windows::new(tokens, context, None).unwrap();
        let calibration = Some(Calibration::new(&text, backend()));
        let options = QuantizeOptions { calibration, ..Default::default() };
        quantize(&source, &folder.path().join("out"), &recipe(Format::Int4, 32), options).unwrap_err().to_string()
    };
    let error = refused(vec![1, 2, 1_000_000], 3);
    assert!(error.contains("1000000") && error.contains("vocabulary"), "{error}");
    let error = refused(vec![1; 100_000], 100_000);
    assert!(error.contains("context = 100000"), "{error}");
}

/// Schemes whose scales are chosen before, which are pruned, or which have zero points.
#[test]
fn every_kind_of_scheme_is_calibrated() {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&golden("llama-gqa4-bias-sharded")).unwrap();
    let text = windows(1, 64);
    let schemes: [Scheme; 7] = [
        Format::Int4.scheme(None).unwrap(),
        Format::Fp8.scheme(Some(Grouping::Block { rows: 128, cols: 128 })).unwrap(),
        Format::Int2.scheme(Some(Grouping::Columns(16))).unwrap(),
        Format::Fp4.scheme(Some(Grouping::Row)).unwrap(),
        Format::Mxfp4.scheme(None).unwrap(),
        Format::Nvfp4.scheme(None).unwrap(),
        Format::Fp4.sparse_24(None).unwrap(),
    ];
    for (index, scheme) in schemes.into_iter().enumerate() {
        let [nearest, calibrated] = [0, 1].map(|method| folder.path().join(format!("{index}-{method}")));
        let recipe = Recipe::uniform(scheme, None, ScaleSearch::Mse);
        run(&source, &nearest, &recipe, None);
        run(&source, &calibrated, &recipe, Some(Calibration::new(&text, backend())));
        let (nearest, calibrated) = (divergence(&source, &nearest), divergence(&source, &calibrated));
        assert!(calibrated < 0.9 * nearest, "{scheme}: {calibrated} by calibration, {nearest} to nearest");
    }
}
