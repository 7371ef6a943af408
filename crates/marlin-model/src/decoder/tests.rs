//! How many kernels a GPU runs for a step.

use std::path::Path;

use marlin_checkpoint::{Checkpoint, CheckpointWriter, PlannedTensor, WriterOptions};
use marlin_kernels::gpu::{GpuBackend, GpuMatrices, GpuOptions, MatrixSize};
use serde_json::json;
use tempfile::TempDir;

use super::load::load_decoder;
use super::*;
use crate::{LoadOptions, LogitRows};

/// A copy of a tiny Qwen3 that has only its first layers.
fn with_layers(layers: usize) -> TempDir {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/qwen3-gqa2-tied");
    let source = Checkpoint::open(&source).unwrap();
    let mut config = source.config().clone();
    config["num_hidden_layers"] = json!(layers);
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
        writer.write_raw(name, tensor.dtype, tensor.shape, tensor.bytes).unwrap();
    }
    writer.finish().unwrap();
    target
}

/// Kernels of a step that brings so many tokens of one sequence.
fn kernels(backend: &GpuBackend, layers: usize, tokens: usize) -> u64 {
    let folder = with_layers(layers);
    let checkpoint = Checkpoint::open(&folder.path().join("model")).unwrap();
    let mut model = load_decoder(backend, &checkpoint, &LoadOptions::default()).unwrap();
    let mut batch = StepBatch::new();
    let mut sequence = model.kv().sequence();
    model.kv().append(&mut sequence, tokens).unwrap();
    batch.push(&sequence, &vec![1; tokens], LogitRows::Last);
    model.forward(&batch).unwrap();
    model.kv().release(sequence);
    model.encoder.dispatches()
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
        let of_layer = |tokens| kernels(&backend, 2, tokens) - kernels(&backend, 1, tokens);
        // Of Q, K and V, rotation, attention, its output, gate and up, down. Attention over more positions takes a second one.
        assert_eq!(of_layer(1), 6);
        // Norms of several rows are not worth repeating in each workgroup.
        assert_eq!(of_layer(4), 8);
    }
}
