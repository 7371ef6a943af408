//! Models from tiles that were kept in a file.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{Golden, Model, golden, goldens, options, packed, packed_in, schemes, sparse_schemes};
use marlin_checkpoint::Checkpoint;
use marlin_format::Format;
use marlin_kernels::KvType;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions, TileFile, TileFileOptions};
use marlin_kernels::reference::ReferenceBackend;
use marlin_model::{ExpertLayers, ExpertOffload, load_model, load_model_offloaded};
use tempfile::TempDir;

fn backend(arithmetic: Arithmetic) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(2), arithmetic, simd: None }).unwrap()
}

/// Where the tiles of a model are.
fn tile_file(folder: &Path, checkpoint: &Checkpoint) -> TileFileOptions {
    TileFileOptions {
        path: folder.join("model.tiles"),
        lock: folder.join("lock"),
        fingerprint: "the same".to_owned(),
        model: checkpoint.name().to_owned(),
        report: |error| panic!("{error}"),
    }
}

/// Logits of the model in a folder; with a place for tiles, also whether they came from there.
fn logits(model: &Path, tiles: Option<&Path>, arithmetic: Arithmetic, input_ids: &[u32]) -> (Vec<f32>, bool) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let backend = backend(arithmetic);
    let file = tiles.map(|folder| Arc::new(TileFile::open(&backend, tile_file(folder, &checkpoint)).unwrap().unwrap()));
    let backend = file.as_ref().map_or(backend.clone(), |file| backend.with_tiles(Arc::clone(file)));
    let loaded = load_model(&backend, &checkpoint, &options(KvType::F32)).unwrap();
    if let Some(file) = &file {
        file.finish();
    }
    let is_stored = file.is_some_and(|file| file.is_stored());
    (Model::of(loaded).logits_of(input_ids, 40), is_stored)
}

fn check(name: &str, model: &Path, input_ids: &[u32]) {
    for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
        let tiles = TempDir::new().unwrap();
        let (wanted, _) = logits(model, None, arithmetic, input_ids);
        for is_stored in [false, true, true] {
            let found = logits(model, Some(tiles.path()), arithmetic, input_ids);
            assert!(found == (wanted.clone(), is_stored), "{name} {arithmetic:?}, stored: {is_stored}");
        }
    }
}

/// Every family, with its fused matrices, biases and heads.
#[test]
fn logits_are_the_same_to_the_bit() {
    for model in goldens() {
        check(&model.display().to_string(), &model, &Golden::read(&model).input_ids);
    }
}

#[test]
fn logits_of_packed_models_are_the_same_to_the_bit() {
    let mut all = schemes(Format::ALL);
    all.extend(sparse_schemes());
    for schemes in all.iter().map(|&scheme| vec![scheme]).chain([all.clone()]) {
        for name in ["llama-gqa4-bias-sharded", "phi3-mha-window"] {
            let model = packed(&golden(name), &schemes);
            check(&format!("{name} {schemes:?}"), &packed_in(&model), &Golden::read(&golden(name)).input_ids);
        }
    }
}

/// A copy of a tiny model.
fn copy(original: &Path) -> TempDir {
    let model = TempDir::new().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(original.join(name), model.path().join(name)).unwrap();
    }
    model
}

/// Makes matrices of these names all zeros.
fn remove_matrices(model: &Path, is_removed: impl Fn(&str) -> bool) {
    let weights = model.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header_bytes = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    for (name, tensor) in header.as_object().unwrap() {
        if tensor["shape"].as_array().is_some_and(|shape| shape.len() == 2) && is_removed(name) {
            let offset = |i: usize| 8 + header_bytes + tensor["data_offsets"][i].as_u64().unwrap() as usize;
            bytes[offset(0)..offset(1)].fill(0);
        }
    }
    fs::remove_file(&weights).unwrap();
    fs::write(&weights, bytes).unwrap();
}

/// Experts that are left to the host come from the tiles of the whole model.
#[test]
fn kept_experts_are_not_read() {
    for name in ["mixtral-top2", "glm4moelite-shared-mtp"] {
        let (model, tiles) = (copy(&golden(name)), TempDir::new().unwrap());
        let input_ids = Golden::read(&golden(name)).input_ids;
        logits(model.path(), Some(tiles.path()), Arithmetic::Int8, &input_ids);

        let offloaded = |tiles: Option<&Path>| {
            let checkpoint = Checkpoint::open(model.path()).unwrap();
            let mut host = backend(Arithmetic::Int8);
            if let Some(folder) = tiles {
                let file = TileFile::open_stored(&host, &tile_file(folder, &checkpoint)).unwrap().unwrap();
                host = host.with_tiles(Arc::new(file));
            }
            let offload = ExpertOffload { host, layers: ExpertLayers::All };
            let options = options(KvType::F32);
            let loaded = load_model_offloaded(&ReferenceBackend, Some(&offload), &checkpoint, &options).unwrap();
            Model::of(loaded).logits_of(&input_ids, 40)
        };
        let wanted = offloaded(None);
        remove_matrices(model.path(), |name| name.contains(".experts."));
        assert!(offloaded(None) != wanted && offloaded(Some(tiles.path())) == wanted, "{name}");
    }
}

/// A checkpoint whose matrices are gone, headers aside, is loaded from its tiles all the same.
#[test]
fn kept_weights_are_not_read() {
    let original = golden("qwen3-gqa2-tied");
    let (model, tiles) = (copy(&original), TempDir::new().unwrap());
    let input_ids = Golden::read(&original).input_ids;
    let (wanted, _) = logits(model.path(), Some(tiles.path()), Arithmetic::Int8, &input_ids);

    remove_matrices(model.path(), |_| true);
    assert!(logits(model.path(), None, Arithmetic::Int8, &input_ids).0 != wanted);
    assert!(logits(model.path(), Some(tiles.path()), Arithmetic::Int8, &input_ids) == (wanted, true));
}
