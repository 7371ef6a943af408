//! Layers that predict further tokens, on devices in host memory.

mod common;

use common::prediction::{PREDICTING, Predicted, Predictor, assert_predictions, predicting};
use common::{Device, golden, l2_error, options, packed, packed_in, same_bits, schemes};
use marlin_format::{Format, Scheme};
use marlin_kernels::KvType;
use marlin_kernels::cpu::Arithmetic;
use marlin_model::{LogitRows, ModelError, StepBatch};

/// Relative error allowed with keys and values in f32: a few times what the roundings of both sides come to.
const BOUND: f32 = 1e-5;
/// With keys and values rounded to f16, whose relative step is 2^-11.
const F16_KV_BOUND: f32 = 5e-3;

#[test]
fn predictions_agree_with_transformers() {
    for device in Device::exact() {
        for (kv_type, bound) in [(KvType::F32, BOUND), (KvType::F16, F16_KV_BOUND)] {
            assert_predictions(device, kv_type, bound);
        }
    }
}

/// The logits of all slots of a golden, whose weights are in `folder`.
fn logits(device: Device, folder: &std::path::Path, wanted: &Predicted) -> Vec<f32> {
    let mut model = device.load(folder, &predicting(KvType::F32)).unwrap();
    let mut predictor = Predictor::of(&mut model);
    let width = predictor.layer.info().hidden_size;
    let mut sequence = predictor.layer.kv().sequence();
    let slots = wanted.input_ids[1..].iter().zip(wanted.hidden.chunks(width));
    slots.flat_map(|(&token, before)| predictor.extend(&mut sequence, &[token], before)).collect()
}

/// Packed layers compute with what their codes decode to, all of `eh_proj` exactly; of latent attention keys are rounded to half precision.
#[test]
fn packed_layers_are_what_they_decode_to() {
    for (name, bound) in PREDICTING.into_iter().zip([0.0, 2e-3]) {
        let wanted = Predicted::read(&golden(name));
        for format in [Format::Int4, Format::Fp8, Format::Nvfp4] {
            let codes = packed(&golden(name), &schemes([format]));
            let decoded = packed(&packed_in(&codes), &[Scheme::F32]);
            let [found, exact] = [&codes, &decoded].map(|model| logits(Device::Reference, &packed_in(model), &wanted));
            let error = l2_error(&found, &exact);
            assert!(same_bits(&found, &exact) || error <= bound, "{name} in {format}: {error}");
            assert!(l2_error(&exact, &wanted.logits) > 1e-3, "{name} in {format}: packing changes it");
            let on_cpu = logits(Device::cpu(Arithmetic::Exact, 1, None), &packed_in(&codes), &wanted);
            assert!(l2_error(&on_cpu, &found) < 1e-4, "{name} in {format} on a CPU");
        }
    }
}

/// What a sequence's slots say depends on nothing behind them, and on how far apart they are, not on where they begin.
#[test]
fn slots_may_begin_anywhere() {
    let wanted = Predicted::read(&golden(PREDICTING[0]));
    let mut model = Device::Reference.load(&golden(PREDICTING[0]), &predicting(KvType::F32)).unwrap();
    let mut predictor = Predictor::of(&mut model);
    let width = predictor.layer.info().hidden_size;
    let mut late = predictor.layer.kv().sequence();
    let tokens = &wanted.input_ids[1..];
    let all = logits(Device::Reference, &golden(PREDICTING[0]), &wanted);
    // From slot 20 on the layer sees less, and says something else, but nothing that depends on what is shown elsewhere.
    let begun = predictor.extend(&mut late, &tokens[20..24], &wanted.hidden[20 * width..24 * width]);
    let whole = &all[23 * begun.len()..][..begun.len()];
    assert!(l2_error(&begun, whole) > 1e-3 && begun.iter().all(|logit| logit.is_finite()));
    let mut again = predictor.layer.kv().sequence();
    for slot in 20..24 {
        let before = &wanted.hidden[slot * width..][..width];
        let one_by_one = predictor.extend(&mut again, &tokens[slot..][..1], before);
        assert!(slot < 23 || l2_error(&one_by_one, &begun) < 1e-5);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut model = Device::Reference.load(&golden(PREDICTING[1]), &predicting(KvType::F32)).unwrap();
    let mut predictor = Predictor::of(&mut model);
    let info = predictor.layer.info().clone();
    assert!(info.slot_cost > 0.0 && info.slot_cost < info.guess_cost && info.guess_cost < 2.0, "{info:?}");
    let mut sequence = predictor.layer.kv().sequence();
    predictor.layer.kv().append(&mut sequence, 2).unwrap();
    let mut batch = StepBatch::new();
    assert!(matches!(predictor.layer.most_likely(), Err(ModelError::SampleRows { .. })), "nothing ran");
    batch.push(&sequence, &[1, 2], LogitRows::All);
    let states = vec![0.5; 2 * info.hidden_size];
    let error = predictor.layer.forward(&batch, &states).unwrap_err();
    assert!(matches!(error, ModelError::TooManyLogitRows { found: 2, limit: 1 }), "{error}");
    batch.clear();
    batch.push(&sequence, &[1, 2], LogitRows::Last);
    let error = predictor.layer.forward(&batch, &states[1..]).unwrap_err();
    assert!(matches!(error, ModelError::HiddenStates { tokens: 2, .. }), "{error}");
    batch.clear();
    batch.push(&sequence, &[1, info.vocabulary as u32], LogitRows::Last);
    assert!(matches!(predictor.layer.forward(&batch, &states), Err(ModelError::Step(_))));
    batch.clear();
    batch.push(&sequence, &[1, 2], LogitRows::Last);
    predictor.layer.forward(&batch, &states).unwrap();
    assert!(predictor.layer.most_likely().unwrap().is_some());
    assert!(matches!(predictor.layer.most_likely(), Err(ModelError::SampleRows { .. })), "they are consumed");
    // Without the option there is none.
    let mut model = Device::Reference.load(&golden(PREDICTING[1]), &options(KvType::F32)).unwrap();
    assert!(model.model.take_prediction_layer().is_none());
}
