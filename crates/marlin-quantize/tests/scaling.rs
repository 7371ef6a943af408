//! Channels scaled before they are rounded, on a small model of random weights.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{backend, divergence, golden, windows};
use marlin_checkpoint::{Checkpoint, ExportLayout, MemoryTensor};
use marlin_format::{PackedMatrix, ScaleSearch, Scheme};
use marlin_quantize::{Calibration, QuantizeOptions, Recipe, Windows, quantize, scheme_by_name};

/// An equal model, in which a few of the channels behind each norm are large and what they are multiplied with is small: what makes
/// rounding to nearest lose most.
fn with_outliers(source: &Checkpoint) -> Checkpoint {
    const LARGER: f32 = 64.0;
    let is_large = |channel: usize| channel % 16 == 5;
    let tensors = source.tensor_names().map(|name| {
        let shape = source.shape(name).unwrap();
        let reads_norm =
            ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"].iter().any(|module| name.contains(module));
        let tensor = match shape.as_slice() {
            &[len] => {
                let mut values = source.vector(name, len).unwrap();
                if name.contains("_layernorm") {
                    let large = values.iter_mut().enumerate().filter(|(channel, _)| is_large(*channel));
                    large.for_each(|(_, value)| *value *= LARGER);
                }
                MemoryTensor::vector(&values)
            }
            &[rows, cols] => {
                let mut values = source.matrix_any(name).unwrap().decode();
                if reads_norm {
                    let large = values.iter_mut().enumerate().filter(|(index, _)| is_large(index % cols));
                    large.for_each(|(_, value)| *value /= LARGER);
                }
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                MemoryTensor::matrix(Arc::new(PackedMatrix::from_dense_bytes(Scheme::F32, rows, cols, bytes).unwrap()))
            }
            other => panic!("{name} is {other:?}"),
        };
        (name.to_owned(), tensor)
    });
    Checkpoint::from_parts("outliers", source.config().clone(), tensors.collect()).unwrap()
}

fn recipe() -> Recipe {
    Recipe::uniform(scheme_by_name("int4:32").unwrap(), None, ScaleSearch::Mse)
}

fn write(source: &Checkpoint, out: &Path, text: Option<&Windows>, layout: ExportLayout) {
    let scaling = text.map(|text| Calibration::new(text, backend()));
    quantize(source, out, &recipe(), QuantizeOptions { scaling, layout, ..Default::default() }).unwrap();
}

#[test]
fn channels_that_matter_lose_less() {
    let text = windows(1, 32);
    let folder = tempfile::tempdir().unwrap();
    let source = with_outliers(&Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap());
    let kl = |name: &str, text: Option<&Windows>| {
        let out = folder.path().join(name);
        write(&source, &out, text, ExportLayout::MetalMarlin);
        divergence(&source, &out)
    };
    let (plain, scaled) = (kl("plain", None), kl("scaled", Some(&text)));
    assert!(scaled < 0.5 * plain, "{scaled} with channels scaled, {plain} without");
}

/// The scaled model is one like any other, in every layout, and the same each time.
#[test]
fn any_layout_holds_a_scaled_model() {
    let text = windows(1, 8);
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&golden("qwen3-gqa2-tied")).unwrap();
    for layout in [ExportLayout::MetalMarlin, ExportLayout::CompressedTensors] {
        let [first, second] = ["first", "second"].map(|name| folder.path().join(format!("{layout}-{name}")));
        write(&source, &first, Some(&text), layout);
        write(&source, &second, Some(&text), layout);
        let tensors = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
        assert!(tensors(&first) == tensors(&second), "{layout}");
        assert!(divergence(&source, &first) < 0.5, "{layout}");
    }
}
