//! Mixes of formats against budgets, on whole checkpoints.

use std::path::{Path, PathBuf};

use marlin_checkpoint::Checkpoint;
use marlin_format::{Format, ScaleSearch, Scheme};
use marlin_kernels::cpu::{CpuBackend, CpuOptions};
use marlin_model::{Planner, load_model};
use marlin_quantize::{
    Budget, Fit, QuantizeError, QuantizeOptions, Recipe, TensorRole, embedding_scheme, fit, quantize,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name)
}

fn backend() -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap()
}

fn embedding() -> Option<Scheme> {
    Some(embedding_scheme(Format::Int8, None).unwrap())
}

/// What a model takes with all its linears in the best and in the smallest format.
fn range(planner: &Planner<'_>, budget: &Budget) -> [u64; 2] {
    let options = planner.load_options(budget.context, budget.sequences);
    ["int2 g32", "int8 g32"].map(|wanted| {
        let (name, columns) = wanted.split_once(" g").unwrap();
        let grouping = columns.parse().unwrap();
        let linears = name.parse::<Format>().unwrap().scheme(Some(grouping)).unwrap();
        Recipe::uniform(linears, embedding(), ScaleSearch::Mse).plan(planner, &options).unwrap().total()
    })
}

/// Families that store Q, K and V apart and as one matrix.
const MODELS: [&str; 2] = ["qwen3-gqa2-tied", "phi3-gqa3-partial-sharded"];

#[test]
fn mixes_use_what_they_are_given() {
    let backend = backend();
    for name in MODELS {
        let source = Checkpoint::open(&golden(name)).unwrap();
        let planner = Planner::new(&backend, &source).unwrap();
        let budget = Budget { memory: 0, context: 16, sequences: 2 };
        let [least, most] = range(&planner, &budget);
        let mut weights = 0;
        for step in 0..=40 {
            let memory = least + (most - least) * step / 40;
            let Fit { recipe, plan } =
                fit(&planner, &Budget { memory, ..budget }, embedding(), ScaleSearch::Mse).unwrap();
            assert!(plan.total() <= memory, "{name}: {} of {memory}", plan.total());
            // More memory is never answered with a smaller model, and nearly all of it is used.
            assert!(plan.weights >= weights, "{name}: {} after {weights}", plan.weights);
            assert!(memory - plan.total() <= (most - least) / 5, "{name}: {} left of {memory}", memory - plan.total());
            assert_eq!(plan, recipe.plan(&planner, &planner.load_options(16, 2)).unwrap());
            weights = plan.weights;
        }
        let all = fit(&planner, &Budget { memory: most, ..budget }, embedding(), ScaleSearch::Mse).unwrap();
        assert_eq!((all.recipe.linears.to_string().as_str(), all.recipe.exceptions.len()), ("int8 g32", 0));
        assert_eq!(all.plan.total(), most);
    }
}

#[test]
fn a_mix_is_written_as_planned_and_loads() {
    let folder = tempfile::tempdir().unwrap();
    let backend = backend();
    for name in MODELS {
        let source = Checkpoint::open(&golden(name)).unwrap();
        let planner = Planner::new(&backend, &source).unwrap();
        let budget = Budget { memory: 0, context: 16, sequences: 1 };
        let [least, most] = range(&planner, &budget);
        let budget = Budget { memory: least + (most - least) / 3, ..budget };
        let Fit { recipe, plan } = fit(&planner, &budget, embedding(), ScaleSearch::Mse).unwrap();
        assert!(!recipe.exceptions.is_empty());

        let out = folder.path().join(name);
        let report = quantize(&source, &out, &recipe, QuantizeOptions::default()).unwrap();
        for matrix in report.matrices.iter().filter(|matrix| matrix.role == TensorRole::DecoderLinear) {
            let wanted = recipe.exceptions.get(&matrix.name).unwrap_or(&recipe.linears);
            assert_eq!(matrix.scheme, *wanted, "{}", matrix.name);
        }
        let written = Checkpoint::open(&out).unwrap();
        let options = planner.load_options(budget.context, budget.sequences);
        assert_eq!(Planner::new(&backend, &written).unwrap().plan(&options).unwrap(), plan);
        load_model(&backend, &written, &options).unwrap();
    }
}

#[test]
fn what_cannot_fit_is_refused_with_numbers() {
    let backend = backend();
    let source = Checkpoint::open(&golden(MODELS[0])).unwrap();
    let planner = Planner::new(&backend, &source).unwrap();
    let budget = Budget { memory: 0, context: 32, sequences: 3 };
    let [least, _] = range(&planner, &budget);
    let refused = |memory| fit(&planner, &Budget { memory, ..budget }, embedding(), ScaleSearch::Mse).unwrap_err();

    let error = refused(least - 1);
    assert!(matches!(error, QuantizeError::DoesNotFit { sequences: 3, .. }), "{error}");
    let error = error.to_string();
    for wanted in ["int2 g32", "3 x 32 tokens", "KV cache", "2 x 32 tokens fit"] {
        assert!(error.contains(wanted), "{wanted}: {error}");
    }
    let error = refused(1000).to_string();
    assert!(error.contains("1.0 KiB") && error.contains("without a KV cache"), "{error}");
    let error = fit(&planner, &Budget { context: 1 << 20, ..budget }, None, ScaleSearch::Mse).unwrap_err();
    assert!(error.to_string().contains("context"), "{error}");
}

#[test]
fn a_quantised_model_is_not_mixed_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let source = Checkpoint::open(&golden(MODELS[0])).unwrap();
    let recipe = Recipe::uniform(Format::Fp4.scheme(None).unwrap(), None, ScaleSearch::AbsMax);
    quantize(&source, &out, &recipe, QuantizeOptions::default()).unwrap();
    let quantized = Checkpoint::open(&out).unwrap();
    let backend = backend();
    let planner = Planner::new(&backend, &quantized).unwrap();
    let budget = Budget { memory: 1 << 30, context: 16, sequences: 1 };
    let error = fit(&planner, &budget, None, ScaleSearch::Mse).unwrap_err();
    assert!(matches!(error, QuantizeError::AlreadyQuantized { .. }), "{error}");
}
