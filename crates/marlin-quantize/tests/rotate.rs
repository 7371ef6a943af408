//! Rotated models: the same function before they are rounded, whatever the architecture, and the same on every device after.

#[path = "common/error.rs"]
mod error;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use error::error;
use marlin_checkpoint::{Checkpoint, CheckpointError, ExportLayout, MemoryTensor, Rotations};
use marlin_format::{Format, Grouping, ScaleSearch, Scheme};
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions};
use marlin_kernels::gpu::{GpuArithmetic, GpuBackend, GpuOptions};
use marlin_kernels::reference::ReferenceBackend;
use marlin_kernels::{Backend, KvType};
use marlin_model::{LoadOptions, LogitRows, Planner, RotationBlocks, RotationParts, StepBatch, load_model};
use marlin_quantize::{Calibration, QuantizeError, QuantizeOptions, Recipe, Report, Windows, quantize};

/// Relative error of rotated weights in f32: roundings of another order.
const F32_BOUND: f64 = 1e-4;
/// Relative error of one device from another in single precision.
const DEVICE_BOUND: f64 = 1e-5;
/// In half precision.
const HALF_BOUND: f64 = 2e-2;

/// A model of each way in which weights are stored, and what of it is rotated in which blocks: hidden states, values, MLPs.
const MODELS: [(&str, [usize; 3]); 25] = [
    ("llama-gqa2-llama3-tied", [64, 16, 96]),
    ("llama-gqa4-bias-sharded", [64, 0, 80]),
    ("llama-mha-untied", [40, 0, 0]),
    ("mistral-gqa2-wide-sharded", [40, 24, 0]),
    ("mistral-mha-yarn", [48, 16, 64]),
    ("qwen2-gqa2-yarn-sharded", [64, 16, 48]),
    ("qwen2-mha-window", [40, 0, 56]),
    ("qwen3-gqa2-tied", [64, 32, 96]),
    ("qwen3-gqa4-bias-sharded", [48, 16, 112]),
    ("phi3-gqa2-odd-rotary", [48, 24, 40]),
    ("phi3-gqa3-partial-sharded", [96, 16, 24]),
    ("gemma3-gqa2-linear-softcap-sharded", [0, 16, 64]),
    ("gemma3-mha-bias", [0, 16, 56]),
    ("glm4-gqa2-sharded", [0, 16, 40]),
    ("glm4-gqa4-bias", [0, 16, 72]),
    ("mixtral-top2", [32, 0, 0]),
    ("mixtral-window-fused-sharded", [40, 0, 0]),
    ("qwen3moe-top3-norm", [32, 16, 0]),
    ("qwen3moe-dense-layers-sharded", [32, 0, 40]),
    ("gptoss-bf16-sharded", [40, 0, 0]),
    ("gptoss-f32-plain-rope", [32, 16, 0]),
    ("glm4moe-fused-shared2", [32, 32, 24]),
    ("glm4moelite-shared-mtp", [32, 16, 48]),
    ("glm4moelite-yarn-bias-fused-sharded", [32, 0, 40]),
    ("deepseekv3-half-split-sharded", [40, 24, 0]),
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name)
}

fn cpu() -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(2), arithmetic: Arithmetic::Exact, simd: None }).unwrap()
}

fn rotated(linears: Scheme, rotate: RotationParts) -> Recipe {
    Recipe { rotate, ..Recipe::uniform(linears, None, ScaleSearch::Mse) }
}

fn run(source: &Checkpoint, out: &Path, recipe: &Recipe, calibration: Option<Calibration<'_>>) -> Report {
    quantize(source, out, recipe, QuantizeOptions { calibration, ..Default::default() }).unwrap()
}

/// A text in tokens below 60, which all the models have.
fn tokens(seed: u32, count: usize) -> Vec<u32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) % 60
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Logits of a text, of which only every other row is wanted, in two steps.
fn logits<B: Backend>(backend: &B, checkpoint: &Checkpoint) -> Vec<f32> {
    let options = LoadOptions {
        context: Some(32),
        step_tokens: 16,
        logit_rows: 16,
        kv_type: KvType::F32,
        ..LoadOptions::default()
    };
    let mut model = load_model(backend, checkpoint, &options).unwrap();
    let mut sequence = model.kv().sequence();
    let (mut batch, mut logits, mut all) = (StepBatch::new(), Vec::new(), Vec::new());
    for (rows, step) in [LogitRows::All, LogitRows::Last].into_iter().zip(tokens(7, 32).chunks(16)) {
        batch.clear();
        model.kv().append(&mut sequence, step.len()).unwrap();
        batch.push(&sequence, step, rows);
        model.forward(&batch).unwrap();
        model.read_logits(&mut logits).unwrap();
        all.append(&mut logits);
    }
    all
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn every_architecture_computes_what_it_did() {
    let folder = tempfile::tempdir().unwrap();
    for (name, blocks) in MODELS {
        let source = Checkpoint::open(&golden(name)).unwrap();
        let wanted = logits(&cpu(), &source);
        let out = folder.path().join(name);
        let report = run(&source, &out, &rotated(Scheme::F32, RotationParts::ALL), None);
        let [hidden, values, mlp] = blocks.map(|block| (block > 0).then_some(block));
        assert_eq!(report.rotation, Some(RotationBlocks { hidden, values, mlp }), "{name}");
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_eq!(checkpoint.rotations(), Rotations { hidden, mlp }, "{name}");
        let error_of = |checkpoint: &Checkpoint| error(&logits(&cpu(), checkpoint), &wanted);
        let found = error_of(&checkpoint);
        assert!(found < F32_BOUND, "{name}: relative error {found:e}");

        // What the decoder is to rotate matters, and what is there is rotated.
        let changed = source.tensor_names().filter(|tensor| {
            let is_same =
                checkpoint.contains(tensor) && checkpoint.tensor(tensor).unwrap() == source.tensor(tensor).unwrap();
            !is_same && tensor.ends_with("proj.weight")
        });
        assert!(changed.count() > 1, "{name}");
        for without in [Rotations { hidden: None, mlp }, Rotations { hidden, mlp: None }] {
            if without != checkpoint.rotations() {
                let error = error_of(&Checkpoint::open(&out).unwrap().with_rotations(without));
                assert!(error > 0.01, "{name} with {without:?} alone: {error}");
            }
        }
        // It takes the same memory.
        let plain = folder.path().join(format!("{name}-plain"));
        run(&source, &plain, &rotated(Scheme::F32, RotationParts::default()), None);
        let backend = cpu();
        let options = LoadOptions { context: Some(32), ..LoadOptions::default() };
        let planned =
            |checkpoint: &Checkpoint| Planner::new(&backend, checkpoint).unwrap().plan(&options).unwrap().total();
        assert_eq!(planned(&checkpoint), planned(&Checkpoint::open(&plain).unwrap()), "{name}");
    }
}

#[test]
fn each_part_can_be_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let wanted = logits(&cpu(), &source);
    let none = RotationParts::default();
    for (parts, blocks) in [
        (RotationParts { hidden: true, ..none }, [Some(64), None, None]),
        (RotationParts { values: true, ..none }, [None, Some(32), None]),
        (RotationParts { mlp: true, ..none }, [None, None, Some(96)]),
    ] {
        let out = folder.path().join(format!("{blocks:?}"));
        let report = run(&source, &out, &rotated(Scheme::F32, parts), None);
        let [hidden, values, mlp] = blocks;
        assert_eq!(report.rotation, Some(RotationBlocks { hidden, values, mlp }));
        let error = error(&logits(&cpu(), &Checkpoint::open(&out).unwrap()), &wanted);
        assert!(error < F32_BOUND, "{parts:?}: {error:e}");
    }
}

#[test]
fn rounded_models_run_alike_on_all_devices() {
    let folder = tempfile::tempdir().unwrap();
    let text = Windows::new(tokens(1, 32 * 32), 32, None).unwrap();
    let gpu = |arithmetic| GpuBackend::new(GpuOptions { arithmetic, ..GpuOptions::default() });
    let [exact, half] = [GpuArithmetic::Exact, GpuArithmetic::Half].map(|arithmetic| match gpu(arithmetic) {
        Err(_) if std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none() => None,
        found => Some(found.unwrap()),
    });
    let int3 = Format::Int3.scheme(Some(Grouping::Columns(16))).unwrap();
    for name in
        ["qwen3-gqa2-tied", "gemma3-gqa2-linear-softcap-sharded", "gptoss-f32-plain-rope", "glm4moelite-shared-mtp"]
    {
        let source = Checkpoint::open(&golden(name)).unwrap();
        let original = logits(&cpu(), &source);
        let mut errors = Vec::new();
        for calibration in [None, Some(Calibration::new(&text, cpu()))] {
            let out = folder.path().join(format!("{name}-{}", calibration.is_some()));
            run(&source, &out, &rotated(int3, RotationParts::ALL), calibration.clone());
            let checkpoint = Checkpoint::open(&out).unwrap();
            let wanted = logits(&ReferenceBackend, &checkpoint);
            let found = error(&logits(&cpu(), &checkpoint), &wanted);
            assert!(found < DEVICE_BOUND, "{name} on the CPU: {found:e}");
            for (gpu, bound) in [(&exact, DEVICE_BOUND), (&half, HALF_BOUND)] {
                let Some(gpu) = gpu else { continue };
                let found = error(&logits(gpu, &checkpoint), &wanted);
                assert!(found < bound, "{name} on the GPU: {found:e}");
            }
            errors.push(error(&wanted, &original));

            // The same again, to the byte.
            let again = folder.path().join(format!("{name}-again"));
            let options = QuantizeOptions { force: true, calibration, ..Default::default() };
            quantize(&source, &again, &rotated(int3, RotationParts::ALL), options).unwrap();
            assert_eq!(contents(&out), contents(&again), "{name}");
        }
        assert!(errors[1] < errors[0] && errors[0] < 1.0, "{name}: {errors:?} by rounding and by calibration");
    }
}

#[test]
fn unfinished_work_of_other_parts_is_not_gone_on_with() {
    let recipes = [RotationParts::default(), RotationParts { mlp: true, ..Default::default() }, RotationParts::ALL];
    let fingerprint = |rotate| rotated(Scheme::F32, rotate).fingerprint(ExportLayout::MetalMarlin);
    assert_ne!(fingerprint(recipes[0]), fingerprint(recipes[1]));
    assert_ne!(fingerprint(recipes[1]), fingerprint(recipes[2]));
}

#[test]
fn what_cannot_be_rotated_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let int4 = Format::Int4.scheme(Some(Grouping::Columns(32))).unwrap();
    let all = rotated(int4, RotationParts::ALL);
    for layout in ExportLayout::ALL.into_iter().filter(|layout| *layout != ExportLayout::MetalMarlin) {
        let options = QuantizeOptions { layout, ..Default::default() };
        let error = quantize(&source, &out, &all, options).unwrap_err();
        assert!(error.to_string().contains(layout.name()), "{error}");
    }
    // Of experts whose heads are narrow only the stream can be rotated.
    let narrow = Checkpoint::open(&golden("mixtral-top2")).unwrap();
    let parts = RotationParts { hidden: false, ..RotationParts::ALL };
    let error = quantize(&narrow, &out, &rotated(int4, parts), QuantizeOptions::default()).unwrap_err();
    assert!(matches!(error, QuantizeError::NothingToRotate { .. }), "{error}");
    assert!(!out.exists());

    run(&source, &out, &rotated(Scheme::F32, RotationParts::ALL), None);
    let twice =
        quantize(&Checkpoint::open(&out).unwrap(), &folder.path().join("twice"), &all, QuantizeOptions::default());
    assert!(matches!(twice, Err(QuantizeError::AlreadyRotated { .. })), "{twice:?}");
}

/// Weights that are not what config.json says.
#[test]
fn other_shapes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let original = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let tensors: Vec<_> = original
        .tensor_names()
        .map(|name| {
            let tensor = match *original.shape(name).unwrap() {
                [len] => MemoryTensor::vector(&original.vector(name, len).unwrap()),
                _ => MemoryTensor::matrix(Arc::new(original.matrix_any(name).unwrap().into_owned())),
            };
            (name.to_owned(), tensor)
        })
        .collect();
    for (field, size, tensor) in [
        ("hidden_size", 96, "model.layers.0."),
        ("head_dim", 96, "model.layers.0.self_attn."),
        ("intermediate_size", 80, "model.layers.0.mlp.down_proj.weight"),
    ] {
        let mut config = original.config().clone();
        config[field] = size.into();
        let source = Checkpoint::from_parts("memory", config, tensors.clone()).unwrap();
        let recipe = rotated(Scheme::F32, RotationParts::ALL);
        let error = quantize(&source, &folder.path().join(field), &recipe, QuantizeOptions::default()).unwrap_err();
        assert!(matches!(error, QuantizeError::Checkpoint(CheckpointError::Shape { .. })), "{field}: {error}");
        assert!(error.to_string().contains("memory") && error.to_string().contains(tensor), "{field}: {error}");
    }
}

/// A weight that is not finite is named by its own place.
#[test]
fn damaged_weights_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(golden("qwen3-gqa2-tied")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let file = copy.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    // The header ends where the first tensor begins; the tensor's place is in it.
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    let tensor = &header["model.layers.1.mlp.down_proj.weight"];
    let start = 8 + header_bytes + tensor["data_offsets"][0].as_u64().unwrap() as usize;
    let cols = tensor["shape"][1].as_u64().unwrap() as usize;
    let width = if tensor["dtype"] == "F32" { 4 } else { 2 };
    let end = start + (5 * cols + 3 + 1) * width;
    bytes[end - 2..end].copy_from_slice(&[0xff, 0x7f]);
    fs::write(&file, bytes).unwrap();
    let source = Checkpoint::open(&copy).unwrap();
    let recipe = rotated(Format::Int8.scheme(None).unwrap(), RotationParts::ALL);
    let error = quantize(&source, &folder.path().join("out"), &recipe, QuantizeOptions::default()).unwrap_err();
    let QuantizeError::Encode { tensor, source, .. } = &error else { panic!("{error}") };
    assert_eq!(tensor, "model.layers.1.mlp.down_proj.weight");
    assert!(source.to_string().contains('5') && source.to_string().contains('3'), "{source}");
}
