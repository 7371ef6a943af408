//! Plans against what loading really allocates.

mod common;

use std::alloc::System;
use std::path::{Path, PathBuf};

use common::prediction::PREDICTING;
use common::{golden, goldens, packed, packed_in, schemes, sparse_schemes};
use marlin_checkpoint::Checkpoint;
use marlin_format::Format;
use marlin_kernels::KvType;
use marlin_kernels::cpu::{CpuBackend, CpuOptions};
use marlin_kernels::reference::ReferenceBackend;
use marlin_model::{
    ExpertLayers, ExpertOffload, ExpertShape, LanguageModel, LoadOptions, MemoryPlan, ModelError, Planner, load_model,
    load_model_offloaded,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// What is allocated beyond the plan: names and vectors of layers, biases padded to whole panels, and for each linear up to one panel
/// that aligns it.
const SLACK: u64 = 400 << 10;

fn backend() -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap()
}

// One test, for the allocator counts what all threads do.
#[test]
fn plans_are_what_loading_allocates() {
    let backend = backend();
    each_load(&backend, goldens());
    each_offloaded_load(&backend);
    each_predicting_load(&backend);
    answers_agree_with_plans(&backend);
    unsuitable_options_are_refused(&backend);
}

/// Loads models, as they are and packed, and finds what they allocate in a range about what was planned.
fn each_load(backend: &CpuBackend, stored: Vec<PathBuf>) {
    let wide = LoadOptions { step_tokens: 2048, logit_rows: 512, ..LoadOptions::default() };
    let many = LoadOptions { context: Some(40), kv_blocks: Some(9000), kv_type: KvType::F32, ..LoadOptions::default() };
    let mut mixed = schemes([Format::Int4, Format::Int8, Format::Fp4, Format::Int3, Format::Bf16]);
    mixed.extend(sparse_schemes());
    let packed: Vec<_> = stored.iter().map(|folder| packed(folder, &mixed)).collect();
    let folders = stored.into_iter().chain(packed.iter().map(|folder| folder.path().join("packed")));
    for folder in folders {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        for options in [LoadOptions::default(), wide, many] {
            let plan = Planner::new(backend, &checkpoint).unwrap().plan(&options).unwrap();
            assert_allocates(&plan, &folder, || load_model(backend, &checkpoint, &options).unwrap());
        }
    }
}

/// Loads models whose experts are left to a host: both devices together are as planned, which here have one memory.
fn each_offloaded_load(device: &CpuBackend) {
    let host = CpuBackend::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
    for name in ["mixtral-top2", "glm4moelite-shared-mtp", "glm4moe-fused-shared2", "gptoss-mxfp4"] {
        let folder = golden(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let planner = Planner::new(device, &checkpoint).unwrap();
        let options = LoadOptions { step_tokens: 300, ..LoadOptions::default() };
        let whole = planner.plan(&options).unwrap();
        for layers in [ExpertLayers::All, ExpertLayers::from_layer(1)] {
            let plan = planner.clone().with_offload(&host, &layers).unwrap().plan(&options).unwrap();
            let of_host = plan.host.unwrap();
            assert_eq!(
                plan.total() - plan.kv_cache,
                plan.weights + plan.activations + plan.logits + plan.program + of_host.total()
            );
            // The device keeps what is not of routed experts.
            let norms = of_host.weights - (whole.weights - plan.weights);
            assert!(of_host.weights > norms && norms <= 2 * 64 * 4, "{name}, layers {layers}: {plan:?}, {whole:?}");
            let offload = ExpertOffload { host: host.clone(), layers };
            assert_allocates(&plan, &folder, || {
                load_model_offloaded(device, Some(&offload), &checkpoint, &options).unwrap()
            });
        }
    }
}

/// Loads models with the layer that predicts further tokens, as they are and packed.
fn each_predicting_load(backend: &CpuBackend) {
    let formats = schemes([Format::Int4, Format::Fp8, Format::Bf16]);
    let packed: Vec<_> = PREDICTING.iter().map(|name| packed(&golden(name), &formats)).collect();
    for folder in PREDICTING.map(golden).into_iter().chain(packed.iter().map(packed_in)) {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let planner = Planner::new(backend, &checkpoint).unwrap();
        assert!(planner.has_prediction_layer());
        for (step_tokens, kv_blocks, kv_type) in [(512, None, KvType::F16), (2048, Some(9000), KvType::F32)] {
            let options = LoadOptions { step_tokens, kv_blocks, kv_type, ..LoadOptions::default() };
            let without = planner.plan(&options).unwrap();
            let options = LoadOptions { prediction: true, ..options };
            let plan = planner.plan(&options).unwrap();
            // A third layer beside two.
            assert_eq!(2 * plan.block_bytes, 3 * without.block_bytes);
            assert!(plan.weights > without.weights && plan.activations > without.activations);
            assert_allocates(&plan, &folder, || load_model(backend, &checkpoint, &options).unwrap());
        }
    }
}

/// Holds what a load allocates against its plan.
fn assert_allocates(plan: &MemoryPlan, folder: &Path, load: impl FnOnce() -> Box<dyn LanguageModel>) {
    let planned = plan.total() - plan.program;
    let region = Region::new(ALLOCATOR);
    let model = load();
    let change = region.change();
    let allocated = (change.bytes_allocated - change.bytes_deallocated) as u64;
    drop(model);
    let (name, range) = (folder.display(), planned..planned + SLACK);
    assert!(range.contains(&allocated), "{name}: {allocated} allocated, {planned} planned: {plan:?}");
}

/// The longest context and the most sequences fit; one more does not.
fn answers_agree_with_plans(backend: &CpuBackend) {
    let checkpoint = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let planner = Planner::new(backend, &checkpoint).unwrap();
    let total = |context, sequences| {
        let kv_blocks = Some(planner.kv_blocks(context, sequences));
        planner.plan(&LoadOptions { context: Some(context), kv_blocks, ..LoadOptions::default() }).unwrap().total()
    };
    let model_context = planner.shape().context;
    let plan = planner.plan(&LoadOptions { context: Some(1), ..LoadOptions::default() }).unwrap();
    for memory in (0..60).map(|i| plan.total() + i * plan.block_bytes / 3) {
        for sequences in [1, 2, 3] {
            match plan.longest_context(memory, sequences) {
                Some(context) => {
                    assert!(total(context, sequences) <= memory);
                    assert!(context == model_context || total(context + 1, sequences) > memory);
                }
                None => assert!(total(1, sequences) > memory),
            }
        }
        let most = plan.most_sequences(memory).unwrap() as usize;
        assert!(total(1, most) <= memory && total(1, most + 1) > memory);
    }
    assert_eq!(plan.longest_context(plan.total() - 1, 1), None);
    assert_eq!(plan.most_sequences(0), None);
}

fn unsuitable_options_are_refused(backend: &CpuBackend) {
    let checkpoint = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let planner = Planner::new(backend, &checkpoint).unwrap();
    let context = Some(planner.shape().context + 1);
    let error = planner.plan(&LoadOptions { context, ..LoadOptions::default() }).unwrap_err();
    assert!(matches!(error, ModelError::Option { option: "context", .. }), "{error}");
}

/// The sizes of GLM-4.7-Flash: of each token, a latent vector and a rotated part are cached, once a layer.
#[test]
fn a_latent_cache_is_small() {
    let checkpoint = Checkpoint::open(&golden("glm4moelite-shared-mtp")).unwrap();
    let planner = Planner::new(&ReferenceBackend, &checkpoint).unwrap();
    let shape = planner.shape();
    assert_eq!((shape.heads, shape.kv_heads, shape.head_dim, shape.kv_rank), (4, 1, 32 + 8, Some(32)));
    assert_eq!(shape.experts, Some(ExpertShape { layers: 1, routed: 8, top_k: 3, width: 16, shared_width: 16 }));
    assert_eq!(planner.kv_bytes_per_token(KvType::F16), 2 * 2 * (32 + 8));
    let of_prediction = "model.layers.2.mlp.experts.0.up_proj.weight";
    assert!(checkpoint.contains(of_prediction) && !planner.is_loaded(of_prediction));
    assert!(planner.is_loaded("model.layers.1.mlp.experts.0.up_proj.weight"));
}
