//! How many kernels a GPU runs for a step.

use std::path::Path;

use marlin_checkpoint::{Checkpoint, CheckpointWriter, PlannedTensor, WriterOptions};
use marlin_kernels::gpu::{GpuBackend, GpuMatrices, GpuOptions, MatrixSize};
use serde_json::json;
use tempfile::TempDir;

use super::load::load_decoder;
use super::*;
use crate::{LoadOptions, LogitRows};

/// Tokens of a sequence, at most: more positions than attention leaves to one workgroup.
const CONTEXT: usize = 160;
/// Tokens that no device multiplies by matrices.
const FEW: usize = 4;

/// A copy of a tiny Qwen3 that has only its first layers.
fn with_layers(layers: usize) -> TempDir {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/qwen3-gqa2-tied");
    let source = Checkpoint::open(&source).unwrap();
    let mut config = source.config().clone();
    config["num_hidden_layers"] = json!(layers);
    config["max_position_embeddings"] = json!(CONTEXT);
    config["layer_types"] = json!(vec!["full_attention"; layers]);
    let is_kept = |name: &&str| {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
        layer.is_none_or(|layer| layer.parse::<usize>().unwrap() < layers)
    };
    let names: Vec<&str> = source.tensor_names().filter(is_kept).collect();
    let planned =
        |name: &&str| PlannedTensor::raw(*name, source.tensor(name).unwrap().dtype, source.shape(name).unwrap());
    let target = tempfile::tempdir().unwrap();
    let (plan, options) = (names.iter().map(planned).collect(), WriterOptions::default());
    let mut writer =
        CheckpointWriter::create(&target.path().join("model"), plan, config, Vec::new(), &options).unwrap();
    for name in names {
        let tensor = source.tensor(name).unwrap();
        writer.write_raw(name, tensor.dtype, tensor.shape, &tensor.bytes).unwrap();
    }
    writer.finish().unwrap();
    target
}

/// Kernels of a step that brings so many tokens of one sequence, after others.
fn kernels(backend: &GpuBackend, layers: usize, before: usize, tokens: usize) -> u64 {
    let folder = with_layers(layers);
    let checkpoint = Checkpoint::open(&folder.path().join("model")).unwrap();
    let mut model = load_decoder(backend, None, &checkpoint, &LoadOptions::default()).unwrap();
    let mut batch = StepBatch::new();
    let mut sequence = model.kv().sequence();
    let mut recorded = 0;
    // A few at a time: emulated matrices would take long.
    let steps = std::iter::repeat_n(FEW, before / FEW).chain([tokens]);
    for tokens in steps {
        recorded = model.encoder.dispatches();
        model.kv().append(&mut sequence, tokens).unwrap();
        batch.clear();
        batch.push(&sequence, &vec![1; tokens], LogitRows::Last);
        model.forward(&batch).unwrap();
    }
    model.kv().release(sequence);
    model.encoder.dispatches() - recorded
}

#[test]
fn a_dense_layer_takes_few_kernels() {
    for matrices in [GpuMatrices::Device, GpuMatrices::Emulated(MatrixSize::Sixteen)] {
        let backend = match GpuBackend::new(GpuOptions { matrices, ..GpuOptions::default() }) {
            Err(error) if std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_some() => {
                panic!("a GPU is required: {error}")
            }
            Err(_) => return,
            Ok(backend) => backend,
        };
        let of_layer = |before, tokens| kernels(&backend, 2, before, tokens) - kernels(&backend, 1, before, tokens);
        // Of Q, K and V, attention, which rotates them, its output, gate and up, down.
        assert_eq!(of_layer(8, 1), 5);
        // Attention over many positions is split, and put together by another one.
        assert_eq!(of_layer(140, 1), 6);
        // Tokens that see each other are rotated first. Norms of several rows are not worth repeating in each workgroup.
        assert_eq!(of_layer(8, FEW), 8);
    }
}
