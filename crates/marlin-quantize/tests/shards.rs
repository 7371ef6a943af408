//! Checkpoints that are quantised in parts.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use marlin_checkpoint::{Checkpoint, ExportLayout};
use marlin_format::{Format, ScaleSearch};
use marlin_kernels::cpu::{CpuBackend, CpuOptions};
use marlin_model::RotationParts;
use marlin_quantize::{
    Calibration, QuantizeError, QuantizeOptions, Recipe, Report, Windows, embedding_scheme, plan_shards, quantize,
    quantize_shard,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name)
}

/// Small enough for several weight files of a tiny model.
const MAX_SHARD_BYTES: u64 = 16 << 10;

fn recipe(format: Format, search: ScaleSearch) -> Recipe {
    let embedding = embedding_scheme(Format::Int8, None).unwrap();
    Recipe::uniform(format.scheme(None).unwrap(), Some(embedding), search)
}

fn options<'a>() -> QuantizeOptions<'a> {
    QuantizeOptions { max_shard_bytes: MAX_SHARD_BYTES, card: Some(&card), ..Default::default() }
}

/// Says all that is reported of the errors, so that a difference is one of bytes.
fn card(report: &Report) -> String {
    format!("{:?}", report.matrices)
}

/// Every file of a folder.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn whoever_writes_which_part_the_bytes_are_the_same() {
    let rotated = Recipe { rotate: RotationParts::USUAL, ..recipe(Format::Fp4, ScaleSearch::AbsMax) };
    let cases = [
        ("qwen3-gqa2-tied", recipe(Format::Fp4, ScaleSearch::Mse), ExportLayout::MetalMarlin),
        ("qwen3-gqa2-tied", rotated, ExportLayout::MetalMarlin),
        ("glm4moelite-shared-mtp", recipe(Format::Int4, ScaleSearch::AbsMax), ExportLayout::MetalMarlin),
        ("llama-gqa4-bias-sharded", recipe(Format::Nvfp4, ScaleSearch::AbsMax), ExportLayout::CompressedTensors),
    ];
    for (model, mut recipe, layout) in cases {
        if !layout.packs_embeddings() {
            recipe.embedding = None;
        }
        let options = || QuantizeOptions { layout, ..options() };
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let source = Checkpoint::open(&golden(model)).unwrap();
        let expected = quantize(&source, &path("whole"), &recipe, options()).unwrap();
        let count = plan_shards(&source, &path("out"), &recipe, &options()).unwrap().len();
        assert!(count > 2, "{model} has {count} weight files");
        // All, backwards; all but every third; one alone.
        for shards in [(0..count).rev().collect(), (0..count).filter(|i| i % 3 != 1).collect(), vec![count / 2]] {
            for &shard in &shards {
                // Whoever writes opens the model anew, as another process does.
                let source = Checkpoint::open(&golden(model)).unwrap();
                assert!(quantize_shard(&source, &path("out"), &recipe, shard, options()).unwrap());
                assert!(
                    !quantize_shard(&source, &path("out"), &recipe, shard, options()).unwrap(),
                    "it is there already"
                );
            }
            let planned = plan_shards(&source, &path("out"), &recipe, &options()).unwrap();
            for (shard, planned) in planned.iter().enumerate() {
                assert_eq!(planned.finished, shards.contains(&shard), "{planned:?}");
                let written = contents(&path("whole"))[&planned.file].len() as u64;
                assert_eq!(planned.bytes, written);
            }
            let report = quantize(&source, &path("out"), &recipe, options()).unwrap();
            let finished: usize = shards.iter().map(|shard| planned[*shard].tensors).sum();
            assert_eq!(report.resumed, finished);
            assert_eq!(report.matrices, expected.matrices, "{model}");
            assert_eq!(contents(&path("out")), contents(&path("whole")), "{model}");
            fs::remove_dir_all(path("out")).unwrap();
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");
        }
    }
}

#[test]
fn a_process_that_dies_leaves_nothing_that_counts() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let recipe = recipe(Format::Fp4, ScaleSearch::AbsMax);
    quantize(&source, &path("whole"), &recipe, options()).unwrap();
    let mut dies = |progress: marlin_quantize::Progress<'_>| assert!(progress.done < progress.total / 2, "killed");
    let dying = QuantizeOptions { progress: Some(&mut dies), ..options() };
    let died = catch_unwind(AssertUnwindSafe(|| quantize_shard(&source, &path("out"), &recipe, 1, dying)));
    died.unwrap_err();
    let is_finished = || plan_shards(&source, &path("out"), &recipe, &options()).unwrap()[1].finished;
    assert!(!is_finished());
    assert!(quantize_shard(&source, &path("out"), &recipe, 1, options()).unwrap());
    assert!(is_finished());
    quantize(&source, &path("out"), &recipe, options()).unwrap();
    assert_eq!(contents(&path("out")), contents(&path("whole")));
}

#[test]
fn what_cannot_be_written_in_parts_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let fp4 = recipe(Format::Fp4, ScaleSearch::AbsMax);
    let count = plan_shards(&source, &out, &fp4, &options()).unwrap().len();
    let none = quantize_shard(&source, &out, &fp4, count, options()).unwrap_err();
    assert!(matches!(none, QuantizeError::NoShard { shard, count } if shard == count + 1), "{none}");
    let gguf = QuantizeOptions { layout: ExportLayout::Gguf, ..options() };
    let gguf = quantize_shard(&source, &out, &fp4, 0, gguf).unwrap_err();
    assert!(matches!(gguf, QuantizeError::NotSharded { .. }), "{gguf}");
    let windows = Windows::new((0..32).collect(), 32, None).unwrap();
    let backend = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let calibration = || Some(Calibration::new(&windows, backend.clone()));
    for runs_model in [
        QuantizeOptions { calibration: calibration(), ..options() },
        QuantizeOptions { scaling: calibration(), ..options() },
    ] {
        let refused = quantize_shard(&source, &out, &fp4, 0, runs_model).unwrap_err().to_string();
        assert!(refused.contains("--method mse"), "{refused}");
    }

    // Another format in between is not mixed in.
    quantize_shard(&source, &out, &fp4, 0, options()).unwrap();
    let int4 = recipe(Format::Int4, ScaleSearch::AbsMax);
    for refused in [
        quantize_shard(&source, &out, &int4, 0, options()).unwrap_err(),
        quantize(&source, &out, &int4, options()).unwrap_err(),
    ] {
        assert!(refused.to_string().contains("--force"), "{refused}");
    }
}
