//! Which kernels a decoder asks a GPU for.

mod common;

use std::collections::HashSet;

use common::{golden, options, packed, packed_in, schemes, sparse_schemes};
use marlin_checkpoint::Checkpoint;
use marlin_format::{Format, Scheme};
use marlin_kernels::gpu::{self, GpuArithmetic, GpuBackend, GpuCaps, GpuOptions, KernelVariant};
use marlin_kernels::{KvType, SampleRow};
use marlin_model::{LogitRows, StepBatch, load_model};
use tempfile::TempDir;

/// Models with their widths of a head.
const MODELS: [&str; 3] = ["llama-gqa4-bias-sharded", "qwen3-gqa2-tied", "gemma3-gqa2-linear-softcap-sharded"];
const HEAD_DIMS: [usize; 3] = [8, 32, 16];

/// Prefill and decode of models in every format, on an Apple GPU that computes nothing.
#[test]
fn every_kernel_of_a_step_is_in_the_registry() {
    let mut all = schemes(Format::ALL);
    all.extend(sparse_schemes());
    let named: Vec<(String, Scheme)> = all.iter().map(|scheme| (scheme.to_string(), *scheme)).collect();
    // Each format in one model, and all of them mixed in every model, with every format of KV.
    let each = all.iter().map(|&scheme| packed(&golden(MODELS[0]), &[scheme]));
    let models: Vec<TempDir> = each.chain(MODELS.map(|name| packed(&golden(name), &all))).collect();
    for arithmetic in [GpuArithmetic::Exact, GpuArithmetic::Half] {
        let backend = GpuBackend::imaginary(GpuCaps::apple(), GpuOptions { arithmetic, ..GpuOptions::default() });
        let backend = backend.expect("a device");
        for (index, model) in models.iter().enumerate() {
            let checkpoint = Checkpoint::open(&packed_in(model)).expect("a checkpoint");
            let kv_types = if index < all.len() { &[KvType::F16][..] } else { &KvType::ALL };
            for &kv_type in kv_types {
                let mut model = load_model(&backend, &checkpoint, &options(kv_type)).expect("a model");
                let mut sequence = model.kv().sequence();
                for tokens in [40, 1, 4] {
                    let mut batch = StepBatch::new();
                    model.kv().append(&mut sequence, tokens).expect("blocks");
                    batch.push(&sequence, &vec![1; tokens], LogitRows::All);
                    model.forward(&batch).expect("a step");
                    model.read_logits(&mut Vec::new()).expect("logits");
                    model.sample(&vec![SampleRow::GREEDY; tokens]).expect("a sampling");
                }
                model.kv().release(sequence);
            }
        }
        let listed =
            gpu::kernels(&GpuCaps::apple(), arithmetic, &named, &HEAD_DIMS, &[]).expect("kernels that compile");
        let listed: HashSet<&str> = listed.iter().map(KernelVariant::source).collect();
        let compiled = backend.compiled();
        let tile = match arithmetic {
            GpuArithmetic::Exact => "linear_tile_plain",
            GpuArithmetic::Half => "linear_tile",
        };
        for name in ["linear_rows", tile, "attention_split", "rms_norm", "sample_take"] {
            assert!(compiled.iter().any(|kernel| kernel.name() == name), "no {name} was compiled");
        }
        for kernel in compiled {
            assert!(listed.contains(kernel.source()), "{} is not listed:\n{}", kernel.name(), kernel.source());
        }
    }
}
