//! Small models, texts for them, and how far a quantised one is from its source.

use std::path::{Path, PathBuf};

use marlin_checkpoint::Checkpoint;
use marlin_kernels::KvType;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions};
use marlin_model::{LoadOptions, load_model};
use marlin_quantize::{ModelLogits, RecordedLogits, Windows, evaluate};

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name)
}

pub(crate) fn backend() -> CpuBackend {
    let options = CpuOptions { threads: Some(2), arithmetic: Arithmetic::Exact, simd: None };
    CpuBackend::new(options).unwrap()
}

/// A text in tokens below 60, which all the models have, each of which depends on the one before.
pub(crate) fn windows(seed: u32, count: usize) -> Windows {
    let (mut state, mut token) = (seed, 0);
    let tokens = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        token = (token * 3 + (state >> 24) % 7) % 60;
        token
    });
    Windows::new(tokens.take(32 * count).collect(), 32, None).unwrap()
}

/// Mean divergence of the model in a folder from its source, on a text that it was not calibrated on.
pub(crate) fn divergence(source: &Checkpoint, folder: &Path) -> f64 {
    let windows = windows(99, 12);
    let options = LoadOptions { context: Some(32), kv_type: KvType::F32, ..LoadOptions::default() };
    let load = |checkpoint: &Checkpoint| load_model(&backend(), checkpoint, &options).unwrap();
    let mut original = load(source);
    let mut original = RecordedLogits::record(&mut ModelLogits::new(original.as_mut()), &windows, |_| {}).unwrap();
    let mut model = load(&Checkpoint::open(folder).unwrap());
    let quality = evaluate(&mut ModelLogits::new(model.as_mut()), Some(&mut original), &windows, |_| {}).unwrap();
    quality.divergence.unwrap().mean_kl
}
