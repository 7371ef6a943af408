//! Which kernels a decoder asks a GPU for.

mod common;

use std::collections::HashSet;

use common::{golden, options, packed, packed_in, schemes, sparse_schemes};
use marlin_checkpoint::Checkpoint;
use marlin_format::{Format, Scheme};
use marlin_kernels::KvType;
use marlin_kernels::gpu::{self, GpuArithmetic, GpuBackend, GpuCaps, GpuOptions, KernelVariant};
use marlin_model::{LogitRows, StepBatch, load_model};

/// Prefill and decode of models in every format, on an Apple GPU that computes nothing.
#[test]
fn every_kernel_of_a_step_is_in_the_registry() {
    let mut all = schemes(Format::ALL);
    all.extend(sparse_schemes());
    let named: Vec<(String, Scheme)> = all.iter().map(|scheme| (scheme.to_string(), *scheme)).collect();
    for arithmetic in [GpuArithmetic::Exact, GpuArithmetic::Half] {
        let backend = GpuBackend::imaginary(GpuCaps::apple(), GpuOptions { arithmetic, ..GpuOptions::default() });
        let backend = backend.expect("a device");
        for schemes in all.iter().map(|&scheme| vec![scheme]).chain([all.clone()]) {
            for name in ["llama-gqa4-bias-sharded", "qwen3-gqa2-tied", "gemma3-gqa2-linear-softcap-sharded"] {
                let target = packed(&golden(name), &schemes);
                let checkpoint = Checkpoint::open(&packed_in(&target)).expect("a checkpoint");
                for kv_type in [KvType::F16, KvType::F32] {
                    let mut model = load_model(&backend, &checkpoint, &options(kv_type)).expect("a model");
                    let mut sequence = model.kv().sequence();
                    for tokens in [40, 1, 4] {
                        let mut batch = StepBatch::new();
                        model.kv().append(&mut sequence, tokens).expect("blocks");
                        batch.push(&sequence, &vec![1; tokens], LogitRows::All);
                        model.forward(&batch).expect("a step");
                        model.read_logits(&mut Vec::new()).expect("logits");
                    }
                    model.kv().release(sequence);
                }
            }
        }
        let listed = gpu::kernels(&GpuCaps::apple(), arithmetic, &named).expect("kernels that compile");
        let listed: HashSet<&str> = listed.iter().map(KernelVariant::source).collect();
        let compiled = backend.compiled();
        for name in ["linear_rows", "linear_tile", "attention", "rms_norm"] {
            assert!(compiled.iter().any(|kernel| kernel.name() == name), "no {name} was compiled");
        }
        for kernel in compiled {
            assert!(listed.contains(kernel.source()), "{} is not listed:\n{}", kernel.name(), kernel.source());
        }
    }
}
