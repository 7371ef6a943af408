//! The driver on whole checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use marlin_checkpoint::{Checkpoint, CheckpointWriter, Dtype, PlannedTensor, Storage, WriterOptions};
use marlin_format::{EncodeOptions, Format, Grouping, ScaleSearch, Scheme};
use marlin_quantize::{QuantizeError, QuantizeOptions, Recipe, TensorRole, embedding_scheme, quantize};
use serde_json::json;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name)
}

fn recipe(linears: Scheme, search: ScaleSearch) -> Recipe {
    Recipe::uniform(linears, Some(embedding_scheme(Format::Int8, None).unwrap()), search)
}

fn fp4() -> Recipe {
    recipe(Format::Fp4.scheme(None).unwrap(), ScaleSearch::AbsMax)
}

/// Every file of a folder.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

/// A checkpoint of F32 tensors `(name, shape, values)`.
fn write_checkpoint(folder: &Path, tensors: &[(&str, &[usize], Vec<f32>)]) {
    let planned = tensors.iter().map(|(n, shape, _)| PlannedTensor::raw(*n, Dtype::F32, shape.to_vec())).collect();
    let options = WriterOptions::default();
    let mut writer =
        CheckpointWriter::create(folder, planned, json!({"model_type": "test"}), Vec::new(), &options).unwrap();
    for (name, shape, values) in tensors {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write_raw(name, Dtype::F32, shape, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn ramp(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect()
}

#[test]
fn every_format_stores_what_encoding_the_source_gives() {
    let mut schemes: Vec<Scheme> = Format::ALL.iter().map(|format| format.scheme(None).unwrap()).collect();
    schemes.push(Format::Fp4.scheme(Some(Grouping::Row)).unwrap());
    schemes.push(Format::Fp8.scheme(Some(Grouping::Block { rows: 128, cols: 128 })).unwrap());
    schemes.push(Format::Int8.scheme(Some(Grouping::Tensor)).unwrap());
    schemes.extend(Format::SPARSE.map(|format| format.sparse_24(None).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    for (name, search) in [("qwen3-gqa2-tied", ScaleSearch::Mse), ("llama-gqa4-bias-sharded", ScaleSearch::AbsMax)] {
        let source = Checkpoint::open(&golden(name)).unwrap();
        for (index, &scheme) in schemes.iter().enumerate() {
            let out = folder.path().join(format!("{name}-{index}"));
            let recipe = recipe(scheme, search);
            let report = quantize(&source, &out, &recipe, QuantizeOptions::default()).unwrap();
            let output = Checkpoint::open(&out).unwrap();
            check_output(&source, &output, &recipe);
            let linears = report.matrices.iter().filter(|m| m.role == TensorRole::DecoderLinear);
            assert_eq!(linears.count() as u64, 7 * source.config()["num_hidden_layers"].as_u64().unwrap());
            assert!(report.kept.is_empty() && report.resumed == 0);
            assert_eq!(report.before.weights, report.after.weights);
            assert_eq!(report.after.bytes, output.weight_bytes());
        }
    }
}

/// Quantised matrices are the encoded source, everything else is the source.
fn check_output(source: &Checkpoint, output: &Checkpoint, recipe: &Recipe) {
    assert!(output.tensor_names().count() == source.tensor_names().count());
    for name in source.tensor_names() {
        let shape = source.shape(name).unwrap();
        let Some(scheme) = recipe.scheme(name, shape.len()) else {
            assert_eq!(source.tensor(name).unwrap(), output.tensor(name).unwrap(), "{name}");
            continue;
        };
        let matrix = source.matrix_any(name).unwrap();
        let options = EncodeOptions { search: recipe.search, ..Default::default() };
        let wanted = marlin_format::encode(&matrix.decode(), matrix.rows, matrix.cols, &scheme, &options).unwrap();
        assert_eq!(output.matrix(name, shape[0], shape[1]).unwrap(), wanted, "{name} as {scheme}");
    }
}

#[test]
fn an_interrupted_run_goes_on_and_gives_the_same_bytes() {
    for recipe in [fp4(), recipe(Format::Int4.sparse_24(None).unwrap(), ScaleSearch::Mse)] {
        interrupt_and_resume(&recipe);
    }
}

fn interrupt_and_resume(recipe: &Recipe) {
    let folder = tempfile::tempdir().unwrap();
    let (whole, resumed) = (folder.path().join("whole"), folder.path().join("resumed"));
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let expected = quantize(&source, &whole, recipe, QuantizeOptions::default()).unwrap();

    // The process dies after the ninth tensor.
    let mut seen = 0;
    let mut dies = |_: marlin_quantize::Progress<'_>| {
        seen += 1;
        assert!(seen < 9, "killed");
    };
    let options = QuantizeOptions { sync_bytes: 1, progress: Some(&mut dies), ..Default::default() };
    catch_unwind(AssertUnwindSafe(|| quantize(&source, &resumed, recipe, options))).unwrap_err();
    assert!(!resumed.exists());

    let report = quantize(&source, &resumed, recipe, QuantizeOptions::default()).unwrap();
    assert_eq!(report.resumed, 9);
    assert_eq!(report.matrices, expected.matrices);
    assert_eq!(contents(&resumed), contents(&whole));
}

#[test]
fn unfinished_work_of_other_settings_is_not_mixed_in() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let mut dies = |progress: marlin_quantize::Progress<'_>| assert!(progress.done == 0, "killed");
    let options = QuantizeOptions { sync_bytes: 1, progress: Some(&mut dies), ..Default::default() };
    catch_unwind(AssertUnwindSafe(|| quantize(&source, &out, &fp4(), options))).unwrap_err();

    // Of one matrix only, and of the same size.
    let mut mixed = fp4();
    let int4 = Format::Int4Sym.scheme(None).unwrap();
    mixed.exceptions.insert("model.layers.1.mlp.down_proj.weight".to_owned(), int4);
    let other = Recipe { search: ScaleSearch::Mse, ..fp4() };
    for other in [&mixed, &other] {
        let refused = quantize(&source, &out, other, QuantizeOptions::default()).unwrap_err().to_string();
        assert!(refused.contains("--force"), "{refused}");
    }
    let report = quantize(&source, &out, &other, QuantizeOptions { force: true, ..Default::default() }).unwrap();
    assert_eq!(report.resumed, 0);
    check_output(&source, &Checkpoint::open(&out).unwrap(), &other);
}

#[test]
fn threads_do_not_change_a_byte() {
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let recipe = recipe(Format::Nvfp4.scheme(None).unwrap(), ScaleSearch::Mse);
    let run = |threads: usize| {
        let out = folder.path().join(threads.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let report = pool.install(|| quantize(&source, &out, &recipe, QuantizeOptions::default())).unwrap();
        (report, contents(&out))
    };
    assert_eq!(run(1), run(4));
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (index, bad) in ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"].into_iter().enumerate() {
        let (model, out) = (folder.path().join(index.to_string()), folder.path().join("out"));
        let mut tensors = vec![
            ("model.layers.0.self_attn.q_proj.weight", &[4, 8][..], ramp(32)),
            ("model.norm.weight", &[8][..], ramp(8)),
        ];
        let tensor = tensors.iter_mut().find(|t| t.0 == bad).unwrap();
        tensor.2[5] = f32::NAN;
        write_checkpoint(&model, &tensors);
        let error = quantize(&Checkpoint::open(&model).unwrap(), &out, &fp4(), QuantizeOptions::default()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(bad) && error.contains("NaN") && error.contains(model.to_str().unwrap()), "{error}");
        assert!(!out.exists());
        // Nothing stands in the way of another format.
        assert!(!folder.path().join("out.partial").exists());
    }
}

#[test]
fn matrices_of_unknown_kind_are_kept_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    write_checkpoint(
        &model,
        &[
            ("model.layers.0.mlp.up_proj.weight", &[4, 8], ramp(32)),
            ("model.layers.0.mlp.gate.weight", &[4, 8], ramp(32)),
            ("model.layers.0.conv.weight", &[4, 1, 2], ramp(8)),
        ],
    );
    let source = Checkpoint::open(&model).unwrap();
    let report = quantize(&source, &out, &fp4(), QuantizeOptions::default()).unwrap();
    assert_eq!(report.kept, ["model.layers.0.mlp.gate.weight", "model.layers.0.conv.weight"]);
    let output = Checkpoint::open(&out).unwrap();
    for name in &report.kept {
        assert_eq!(output.tensor(name).unwrap(), source.tensor(name).unwrap());
    }
    // 32 codes of 4 bits and one f16 a row; 40 kept f32.
    assert_eq!(report.after.linear_bits_per_weight(), 4.0 + 16.0 / 8.0);
    assert_eq!(report.after.bytes, 16 + 4 * 2 + 40 * 4);
    assert!(matches!(output.info("model.layers.0.mlp.up_proj.weight").unwrap().storage, Storage::Packed(_)));
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    quantize(&source, &out, &fp4(), QuantizeOptions::default()).unwrap();

    let quantized = Checkpoint::open(&out).unwrap();
    let again = quantize(&quantized, &folder.path().join("again"), &fp4(), QuantizeOptions::default()).unwrap_err();
    assert!(matches!(again, QuantizeError::AlreadyQuantized { .. }), "{again}");
    assert!(!folder.path().join("again.partial").exists());

    let model = folder.path().join("unknown");
    write_checkpoint(&model, &[("transformer.h.0.attn.weight", &[4, 8], ramp(32))]);
    let unknown = quantize(&Checkpoint::open(&model).unwrap(), &out, &fp4(), QuantizeOptions::default()).unwrap_err();
    assert!(matches!(unknown, QuantizeError::NothingToQuantize { tensors: 1, .. }), "{unknown}");
}

#[test]
fn the_output_is_neither_overwritten_unasked_nor_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    write_checkpoint(&model, &[("model.layers.0.mlp.up_proj.weight", &[4, 8], ramp(32))]);
    let source = Checkpoint::open(&model).unwrap();
    let force = || QuantizeOptions { force: true, ..Default::default() };

    let itself = quantize(&source, &folder.path().join("./model"), &fp4(), force()).unwrap_err();
    assert!(matches!(itself, QuantizeError::OutputIsSource { .. }), "{itself}");

    quantize(&source, &out, &fp4(), QuantizeOptions::default()).unwrap();
    let exists = quantize(&source, &out, &fp4(), QuantizeOptions::default()).unwrap_err().to_string();
    assert!(exists.contains("exists") && exists.contains("--force"), "{exists}");
    let before = contents(&out);
    quantize(&source, &out, &fp4(), force()).unwrap();
    assert_eq!(contents(&out), before);
}

/// Experts and both halves of latent attention are packed; routers, their corrections and what predicts further tokens are kept.
#[test]
fn experts_are_packed_and_routers_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let source = Checkpoint::open(&golden("glm4moelite-shared-mtp")).unwrap();
    quantize(&source, &out, &fp4(), QuantizeOptions::default()).unwrap();
    let output = Checkpoint::open(&out).unwrap();
    let names = |model: &Checkpoint| model.tensor_names().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(names(&source), names(&output));
    let is_packed = |name: &str| matches!(output.info(name).unwrap().storage, Storage::Packed(_));
    for layer in [1, 2] {
        for name in [
            "mlp.experts.7.gate_proj.weight",
            "mlp.experts.0.down_proj.weight",
            "mlp.shared_experts.up_proj.weight",
            "self_attn.q_a_proj.weight",
            "self_attn.kv_a_proj_with_mqa.weight",
            "self_attn.kv_b_proj.weight",
        ] {
            assert!(is_packed(&format!("model.layers.{layer}.{name}")), "{name}");
        }
        for name in ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"] {
            let name = format!("model.layers.{layer}.{name}");
            assert_eq!(source.tensor(&name).unwrap(), output.tensor(&name).unwrap());
        }
    }
    for name in ["eh_proj.weight", "enorm.weight", "shared_head.head.weight"] {
        let name = format!("model.layers.2.{name}");
        assert_eq!(source.tensor(&name).unwrap(), output.tensor(&name).unwrap());
    }
}
