//! A quantised model keeps its layer that predicts further tokens, and guesses with it.

#[path = "common/error.rs"]
mod error;

use std::path::{Path, PathBuf};

use error::error;
use marlin_checkpoint::{Checkpoint, Storage};
use marlin_format::{Format, ScaleSearch, Scheme};
use marlin_kernels::KvType;
use marlin_kernels::reference::ReferenceBackend;
use marlin_model::{LoadOptions, LogitRows, Planner, RotationParts, StepBatch, load_model};
use marlin_quantize::{QuantizeOptions, Recipe, quantize};
use safetensors::SafeTensors;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name)
}

/// The tokens of a golden, and the logits of its layer's slots by `transformers`, `[slots, vocabulary]`.
fn wanted(folder: &Path) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(folder.join("prediction.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| {
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect::<Vec<_>>()
    };
    let tokens = words("input_ids").into_iter().map(u32::from_le_bytes).collect();
    (tokens, words("logits").into_iter().map(f32::from_le_bytes).collect())
}

/// The logits of all slots, by the hidden states of the quantised model itself.
fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    let options = LoadOptions { kv_type: KvType::F32, prediction: true, ..LoadOptions::default() };
    let mut model = load_model(&ReferenceBackend, checkpoint, &options).unwrap();
    let mut layer = model.take_prediction_layer().unwrap();
    let (mut batch, mut hidden, mut logits, mut all) = (StepBatch::new(), Vec::new(), Vec::new(), Vec::new());
    let mut sequence = model.kv().sequence();
    model.kv().append(&mut sequence, tokens.len()).unwrap();
    batch.push(&sequence, tokens, LogitRows::None);
    model.forward(&batch).unwrap();
    model.read_hidden(&mut hidden).unwrap();
    let mut slots = layer.kv().sequence();
    for (token, before) in tokens[1..].iter().zip(hidden.chunks(layer.info().hidden_size)) {
        layer.kv().append(&mut slots, 1).unwrap();
        batch.clear();
        batch.push(&slots, &[*token], LogitRows::Last);
        layer.forward(&batch, before).unwrap();
        layer.read_logits(&mut logits).unwrap();
        all.append(&mut logits);
    }
    all
}

/// In 8 bits nearly; rotated in single precision exactly: the decoder turns its hidden states back, and the layer stays as it is.
#[test]
fn a_quantised_model_guesses_as_it_did() {
    let int8 = (Format::Int8.scheme(None).unwrap(), RotationParts::default(), 1e-4..0.1);
    let rotated = (Scheme::F32, RotationParts::ALL, 1e-9..1e-4);
    for name in ["glm4moe-qknorm-mtp", "glm4moelite-shared-mtp"] {
        let (tokens, wanted) = wanted(&golden(name));
        for (scheme, rotate, range) in [int8.clone(), rotated.clone()] {
            let recipe = Recipe { rotate, ..Recipe::uniform(scheme, None, ScaleSearch::Mse) };
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("quantised");
            let source = Checkpoint::open(&golden(name)).unwrap();
            quantize(&source, &out, &recipe, QuantizeOptions::default()).unwrap();
            let checkpoint = Checkpoint::open(&out).unwrap();
            assert!(Planner::new(&ReferenceBackend, &checkpoint).unwrap().has_prediction_layer());
            let is_packed = |tensor: &str| {
                let info = checkpoint.info(&format!("model.layers.2.{tensor}.weight")).unwrap();
                matches!(info.storage, Storage::Packed(_))
            };
            for tensor in ["self_attn.o_proj", "mlp.experts.3.up_proj"] {
                assert_eq!(is_packed(tensor), !scheme.is_dense(), "{name}: {tensor}");
            }
            assert_eq!(checkpoint.rotations().hidden.is_some(), rotate.hidden);
            assert!(!is_packed("eh_proj") && !is_packed("enorm"), "{name}: as they were");
            let error = error(&logits(&checkpoint, &tokens), &wanted);
            assert!(range.contains(&error), "{name} in {scheme}, {rotate:?}: {error}");
        }
    }
}
