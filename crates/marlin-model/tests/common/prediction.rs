//! Prediction layers against what `scripts/goldens/make_prediction_goldens.py` makes of decoder layers of `transformers`.

use std::path::Path;

use marlin_kernels::KvType;
use marlin_model::{KvSequence, LoadOptions, LogitRows, PredictionLayer, StepBatch};
use safetensors::SafeTensors;

use super::{Device, Model, golden, max_error, options, top_two};

/// The goldens that have such a layer: attention with grouped queries, and latent attention.
pub(crate) const PREDICTING: [&str; 2] = ["glm4moe-qknorm-mtp", "glm4moelite-shared-mtp"];

/// What a layer should say.
pub(crate) struct Predicted {
    pub(crate) input_ids: Vec<u32>,
    /// `[input_ids, hidden]`.
    pub(crate) hidden: Vec<f32>,
    /// `[input_ids - 1, vocabulary]`.
    pub(crate) logits: Vec<f32>,
    /// Tokens that follow, and the logits behind each.
    drafted: Vec<u32>,
    drafted_logits: Vec<f32>,
}

impl Predicted {
    pub(crate) fn read(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("prediction.safetensors")).expect("a golden of a prediction layer");
        let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let words = |name: &str| {
            let tensor = tensors.tensor(name).expect(name);
            tensor.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect::<Vec<_>>()
        };
        let integers = |name: &str| words(name).into_iter().map(u32::from_le_bytes).collect();
        let floats = |name: &str| words(name).into_iter().map(f32::from_le_bytes).collect();
        Self {
            input_ids: integers("input_ids"),
            hidden: floats("hidden"),
            logits: floats("logits"),
            drafted: integers("drafted"),
            drafted_logits: floats("drafted_logits"),
        }
    }
}

/// The options of tests, with the prediction layer.
pub(crate) fn predicting(kv_type: KvType) -> LoadOptions {
    LoadOptions { prediction: true, ..options(kv_type) }
}

/// A prediction layer and the step it runs.
pub(crate) struct Predictor {
    pub(crate) layer: Box<dyn PredictionLayer>,
    batch: StepBatch,
}

impl Predictor {
    pub(crate) fn of(model: &mut Model) -> Self {
        let layer = model.model.take_prediction_layer().expect("loaded with its prediction layer");
        assert!(model.model.take_prediction_layer().is_none(), "it is handed out once");
        Self { layer, batch: StepBatch::new() }
    }

    /// Appends slots to a sequence; gives the logits of the last.
    pub(crate) fn extend(&mut self, sequence: &mut KvSequence, tokens: &[u32], before: &[f32]) -> Vec<f32> {
        self.layer.kv().append(sequence, tokens.len()).unwrap();
        self.batch.clear();
        self.batch.push(sequence, tokens, LogitRows::Last);
        self.layer.forward(&self.batch, before).unwrap();
        let mut logits = Vec::new();
        self.layer.read_logits(&mut logits).unwrap();
        logits
    }
}

/// Loads each golden's layer on a device and holds it against the golden: slot by slot, in chunks, and guessing on, twice.
pub(crate) fn assert_predictions(device: Device, kv_type: KvType, bound: f32) {
    for name in PREDICTING {
        let folder = golden(name);
        let wanted = Predicted::read(&folder);
        let mut model = device.load(&folder, &predicting(kv_type)).unwrap();
        let mut predictor = Predictor::of(&mut model);
        let what = format!("{name} on {device:?}, {kv_type:?}");

        // It is shown what the model makes of the tokens here.
        let hidden = model.hidden_of(&wanted.input_ids, 17);
        let error = max_error(&hidden, &wanted.hidden);
        assert!(error <= bound, "{what}: hidden states differ by {error:e}");

        let width = predictor.layer.info().hidden_size;
        let vocabulary = predictor.layer.info().vocabulary;
        let tokens = &wanted.input_ids[1..];
        let states: Vec<_> = hidden.chunks(width).take(tokens.len()).collect();
        for chunk in [1, 7, tokens.len()] {
            let mut sequence = predictor.layer.kv().sequence();
            for (tokens, states) in tokens.chunks(chunk).zip(states.chunks(chunk)) {
                let logits = predictor.extend(&mut sequence, tokens, &states.concat());
                let last = sequence.len() - 1;
                let error = max_error(&logits, &wanted.logits[last * vocabulary..][..vocabulary]);
                assert!(error <= bound, "{what}: slot {last}, {chunk} at a time, differs by {error:e}");
            }
            assert_guesses(&what, &mut predictor, &mut sequence, &wanted, bound);
            predictor.layer.kv().release(sequence);
        }
    }
}

/// Guesses on behind the last slot, forgets the guesses and its last slot, and does so again.
fn assert_guesses(what: &str, predictor: &mut Predictor, sequence: &mut KvSequence, wanted: &Predicted, bound: f32) {
    let (slots, width) = (sequence.len(), predictor.layer.info().hidden_size);
    let (last_token, before) = (wanted.input_ids[slots], &wanted.hidden[(slots - 1) * width..][..width]);
    let vocabulary = predictor.layer.info().vocabulary;
    let mut state = Vec::new();
    for _ in 0..2 {
        predictor.layer.kv().truncate(sequence, slots - 1);
        let mut found = predictor.extend(sequence, &[last_token], before);
        let guesses = wanted.drafted.iter().zip(wanted.drafted_logits.chunks(vocabulary));
        for (place, (&token, logits)) in guesses.enumerate() {
            predictor.layer.read_hidden(&mut state).unwrap();
            let (likeliest, gap) = top_two(&found);
            assert_eq!(predictor.layer.most_likely().unwrap(), Some(likeliest as u32), "{what}: guess {place}");
            let largest = found.iter().fold(0f32, |most, logit| most.max(logit.abs()));
            assert!(likeliest as u32 == token || gap < 2.0 * bound * largest, "{what}: guess {place}, gap {gap}");
            found = predictor.extend(sequence, &[token], &state);
            let error = max_error(&found, logits);
            assert!(error <= bound, "{what}: behind guess {place} it differs by {error:e}");
        }
    }
}
