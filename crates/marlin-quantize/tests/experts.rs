//! Mixtures of experts in every layout: found, quantised expert by expert, replaced, and run.

use std::path::{Path, PathBuf};

use marlin_checkpoint::Checkpoint;
use marlin_format::{EncodeOptions, Format, ScaleSearch, Scheme};
use marlin_kernels::KvType;
use marlin_kernels::reference::ReferenceBackend;
use marlin_model::{LoadOptions, LogitRows, StepBatch, load_model};
use marlin_quantize::{
    ExpertMatrix, ExpertTensors, QuantizeError, QuantizeOptions, Recipe, Windows, cold_experts, expert_matrix,
    find_moe_layers, measure_routing, quantize, quantize_moe_experts, replace_moe_layers,
};

/// Checkpoints with a tensor for each matrix, with fused ones, and with those of gpt-oss.
const MODELS: [&str; 6] = [
    "qwen3moe-top3-norm",
    "mixtral-top2",
    "glm4moelite-shared-mtp",
    "qwen3moe-window-yarn-fused",
    "mixtral-window-fused-sharded",
    "gptoss-bf16-sharded",
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&golden(name)).unwrap()
}

fn scheme(format: Format) -> Scheme {
    format.scheme(None).unwrap()
}

fn encode() -> EncodeOptions {
    EncodeOptions { search: ScaleSearch::AbsMax, ..EncodeOptions::default() }
}

const TOKENS: [u32; 12] = [1, 5, 9, 2, 7, 3, 11, 4, 8, 6, 10, 12];

fn options(measure_routing: bool) -> LoadOptions {
    LoadOptions { context: Some(32), kv_type: KvType::F32, measure_routing, ..LoadOptions::default() }
}

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let mut model = load_model(&ReferenceBackend, checkpoint, &options(false)).unwrap();
    let mut sequence = model.kv().sequence();
    model.kv().append(&mut sequence, TOKENS.len()).unwrap();
    let mut batch = StepBatch::new();
    batch.push(&sequence, &TOKENS, LogitRows::All);
    model.forward(&batch).unwrap();
    let mut logits = Vec::new();
    model.read_logits(&mut logits).unwrap();
    model.kv().release(sequence);
    logits
}

fn relative_error(found: &[f32], wanted: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
    (square(&mut found.iter().zip(wanted).map(|(f, w)| f - w)) / square(&mut wanted.iter().copied())).sqrt()
}

#[test]
fn replaced_experts_have_their_schemes_and_run() {
    let folder = tempfile::tempdir().unwrap();
    for name in MODELS {
        let source = open(name);
        let layers = find_moe_layers(&source).unwrap();
        assert!(!layers.is_empty(), "{name}");
        // Formats take turns; INT8 is nearly exact, and BF16 is.
        let of_expert = |expert: usize| scheme([Format::Int8, Format::Bf16][expert % 2]);
        let out = folder.path().join(name);
        let report =
            replace_moe_layers(&source, &out, |_, expert| of_expert(expert), encode(), QuantizeOptions::default())
                .unwrap();
        let matrices: usize = layers.iter().map(|layer| layer.matrices()).sum();
        assert_eq!(report.matrices.len(), matrices, "{name}");

        let output = Checkpoint::open(&out).unwrap();
        for layer in &layers {
            let quantised = quantize_moe_experts(&source, layer, |expert, _| of_expert(expert), &encode()).unwrap();
            for (expert, matrices) in quantised.iter().enumerate() {
                for (matrix, wanted) in ExpertMatrix::ALL.into_iter().zip(matrices) {
                    let tensor = layer.expert_name(expert, matrix);
                    assert_eq!(output.matrix_any(&tensor).unwrap(), *wanted, "{name}: {tensor}");
                    let before = expert_matrix(&source, layer, expert, matrix).unwrap();
                    assert!(relative_error(&wanted.decode(), &before.decode()) < 0.01, "{name}: {tensor}");
                }
            }
            // What are no experts is as it was.
            let router = layer.router.as_deref().unwrap();
            assert_eq!(output.tensor(router).unwrap().bytes, source.tensor(router).unwrap().bytes, "{name}");
        }
        let again = find_moe_layers(&output).unwrap();
        assert!(again.iter().all(|layer| matches!(layer.experts, ExpertTensors::Each(_))), "{name}");
        let error = relative_error(&logits(&output), &logits(&source));
        assert!(error < 0.03, "{name}: logits are off by {error}");
    }
}

#[test]
fn a_recipe_quantises_experts_and_keeps_routers() {
    let folder = tempfile::tempdir().unwrap();
    for name in MODELS {
        let source = open(name);
        let recipe = Recipe::uniform(scheme(Format::Int8), None, ScaleSearch::AbsMax);
        let out = folder.path().join(name);
        let report = quantize(&source, &out, &recipe, QuantizeOptions::default()).unwrap();
        let layers = find_moe_layers(&source).unwrap();
        let experts = report.matrices.iter().filter(|matrix| matrix.name.contains(".experts.")).count();
        assert_eq!(experts, layers.iter().map(|layer| layer.matrices()).sum::<usize>(), "{name}");
        let routers: Vec<_> = layers.iter().filter_map(|layer| layer.router.as_deref()).collect();
        assert!(
            routers.iter().all(|router| report.kept.iter().any(|kept| kept == router)),
            "{name}: {:?}",
            report.kept
        );
        // A token of a small random model that changes an expert moves far: half of them must not.
        let (found, wanted) = (logits(&Checkpoint::open(&out).unwrap()), logits(&source));
        let row = wanted.len() / TOKENS.len();
        let rows = found.chunks(row).zip(wanted.chunks(row));
        let mut errors: Vec<f64> = rows.map(|(found, wanted)| relative_error(found, wanted)).collect();
        errors.sort_by(f64::total_cmp);
        assert!(errors[TOKENS.len() / 2] < 0.15, "{name}: logits are off by {errors:?}");
    }
}

#[test]
fn routing_is_measured_over_a_text() {
    let source = open("qwen3moe-top3-norm");
    let mut model = load_model(&ReferenceBackend, &source, &options(true)).unwrap();
    let text: Vec<u32> = (0..5).flat_map(|_| TOKENS).collect();
    let windows = Windows::new(text.clone(), 24, None).unwrap();
    let mut seen = 0;
    let routing = measure_routing(&mut *model, &windows, |done| seen = done).unwrap();
    assert_eq!(seen, text.len());
    let layers = find_moe_layers(&source).unwrap();
    assert_eq!(routing.len(), layers.len());
    for (measured, layer) in routing.iter().zip(&layers) {
        assert_eq!((measured.layer, measured.load.tokens), (layer.layer, text.len() as u64));
        // Three experts a token.
        assert_eq!(measured.load.counts.iter().sum::<u64>(), 3 * text.len() as u64);
        assert!((measured.load.probabilities.iter().sum::<f64>() - text.len() as f64).abs() < 1e-6);
        let cold = cold_experts(&measured.load, 0.5);
        assert_eq!(cold.cold.len(), layer.experts().div_ceil(2));
        let hottest = cold.cold.iter().map(|&expert| measured.load.counts[expert]).max();
        let others = (0..layer.experts()).filter(|expert| !cold.cold.contains(expert));
        assert!(others.map(|expert| measured.load.counts[expert]).min() >= hottest);
    }
}

#[test]
fn what_has_no_experts_or_lacks_one_is_an_error() {
    let dense = open("qwen3-gqa2-tied");
    assert!(find_moe_layers(&dense).unwrap().is_empty());
    let mut model = load_model(&ReferenceBackend, &dense, &options(true)).unwrap();
    let windows = Windows::new(TOKENS.to_vec(), 6, None).unwrap();
    let error = measure_routing(&mut *model, &windows, |_| ()).unwrap_err();
    assert!(matches!(error, QuantizeError::NoExperts { .. }), "{error}");
    assert!(error.to_string().contains("Qwen3ForCausalLM"), "{error}");

    let source = open("mixtral-top2");
    let layer = &find_moe_layers(&source).unwrap()[0];
    let sparse = scheme(Format::Fp4);
    let packed = tempfile::tempdir().unwrap();
    let out = packed.path().join("packed");
    replace_moe_layers(&source, &out, |_, _| sparse, encode(), QuantizeOptions::default()).unwrap();
    let packed = Checkpoint::open(&out).unwrap();
    let error = quantize_moe_experts(&packed, layer, |_, _| sparse, &encode()).unwrap_err();
    assert!(matches!(error, QuantizeError::AlreadyQuantized { .. }), "{error}");
}
