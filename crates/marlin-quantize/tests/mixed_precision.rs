//! What matrices cost, and mixes of formats made of it, on small models of random weights.

mod common;

use std::collections::BTreeMap;

use common::{backend, divergence, golden, windows};
use marlin_checkpoint::Checkpoint;
use marlin_format::{ScaleSearch, Scheme};
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions};
use marlin_quantize::{
    BitPlan, Calibration, QuantizeOptions, Recipe, TensorRole, Windows, measure_sensitivity, quantize, scheme_by_name,
};

/// Dense, a mixture whose experts are one tensor, and latent attention with a shared expert and a layer that does not run.
const MODELS: [&str; 3] = ["qwen3-gqa2-tied", "mixtral-window-fused-sharded", "glm4moelite-shared-mtp"];

fn measured(source: &Checkpoint, text: &Windows) -> BitPlan {
    measure_sensitivity(source, &Calibration::new(text, backend()), &mut |_, _| {}).unwrap()
}

fn write(source: &Checkpoint, recipe: &Recipe, text: &Windows) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let calibration = Some(Calibration::new(text, backend()));
    quantize(source, &out, recipe, QuantizeOptions { calibration, ..Default::default() }).unwrap();
    divergence(source, &out)
}

#[test]
fn plans_are_of_every_matrix_and_keep_to_their_bits() {
    let text = windows(1, 32);
    for name in MODELS {
        let source = Checkpoint::open(&golden(name)).unwrap();
        let mut plan = measured(&source, &text);
        let of_experts = plan.matrices.iter().filter(|matrix| matrix.name.contains(".experts.*.")).count();
        assert_eq!(of_experts > 0, name != "qwen3-gqa2-tied", "{name}");
        let layers = source.config()["num_hidden_layers"].as_u64().unwrap();
        for matrix in &plan.matrices {
            let layer: u64 = matrix.name.split('.').nth(2).unwrap().parse().unwrap();
            // Layers for multi-token prediction are not measured.
            assert_eq!(matrix.kl.len(), if layer < layers { 9 } else { 0 }, "{name}: {}", matrix.name);
            let costs: Vec<f64> = ["int2:64", "int3:128", "int4:64", "int8:128"]
                .map(|format| matrix.kl.get(format).copied().unwrap_or(0.0))
                .into();
            assert!(costs.is_sorted_by(|a, b| a >= b), "{name}: {}: {costs:?}", matrix.name);
        }
        for target in [3.4, 3.9, 4.8] {
            plan.allocate(target).unwrap();
            assert!(
                plan.bits_per_weight <= target && plan.bits_per_weight > target - 0.4,
                "{name}: {target}, {plan:?}"
            );
            let recipe = plan.recipe(&source, None, ScaleSearch::Mse).unwrap();
            let linears = recipe.exceptions.keys().filter(|name| TensorRole::of(name, 2) == TensorRole::DecoderLinear);
            let planned: usize = plan.matrices.iter().map(|matrix| matrix.experts).sum();
            assert_eq!(linears.count(), planned, "{name}");
        }
        // Read back it gives the same recipe.
        let read = BitPlan::from_json(&plan.to_json()).unwrap();
        assert_eq!(read, plan, "{name}");
    }
}

#[test]
fn what_a_matrix_costs_is_what_it_costs_alone() {
    let text = windows(1, 64);
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let plan = measured(&source, &text);
    let kept: BTreeMap<String, Scheme> =
        plan.matrices.iter().map(|matrix| (matrix.name.clone(), Scheme::F32)).collect();
    let mut ratios = Vec::new();
    for matrix in &plan.matrices {
        let mut recipe = Recipe::uniform(Scheme::F32, None, ScaleSearch::Mse);
        recipe.exceptions = kept.clone();
        recipe.exceptions.insert(matrix.name.clone(), scheme_by_name("int3:64").unwrap());
        ratios.push(write(&source, &recipe, &text) / matrix.kl["int3:64"]);
    }
    // The text is another one, and all costs are in the proportion in which they add up.
    ratios.sort_unstable_by(f64::total_cmp);
    let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
    assert!(least > 0.4 && most < 2.5, "{ratios:?}");
}

#[test]
fn plans_do_not_depend_on_the_number_of_threads() {
    let source = Checkpoint::open(&golden("glm4moelite-shared-mtp")).unwrap();
    let text = windows(1, 8);
    let plan = |threads: usize| {
        let options = CpuOptions { threads: Some(threads), arithmetic: Arithmetic::Exact, simd: None };
        let calibration = Calibration::new(&text, CpuBackend::new(options).unwrap());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| measure_sensitivity(&source, &calibration, &mut |_, _| {}).unwrap())
    };
    assert_eq!(plan(1), plan(3));
}

#[test]
fn plans_of_other_models_are_refused() {
    let text = windows(1, 4);
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    let plan = measured(&source, &text);
    let error = |plan: &BitPlan| plan.recipe(&source, None, ScaleSearch::Mse).unwrap_err().to_string();
    let mut less = plan.clone();
    let missing = less.matrices.remove(1).name;
    assert!(error(&less).contains(&format!("it lacks {missing}")), "{}", error(&less));
    let mut more = plan.clone();
    more.matrices[0].name = "model.layers.99.mlp.up_proj.weight".into();
    more.matrices.push(plan.matrices[0].clone());
    assert!(error(&more).contains("model.layers.99.mlp.up_proj.weight is no matrix of"), "{}", error(&more));
}
