//! Rows of sampling: every parameter by itself, and all of them together. The same tokens must be chosen.

use marlin_kernels::{Backend, Encoder, SampleRow, StepLimits, TokenCount};

use crate::support::{Case, Rng, check, limits, upload};
use crate::{Device, Table};

/// The neutral settings, but for a temperature.
const PLAIN: SampleRow<'static> = SampleRow { temperature: 1.0, ..SampleRow::GREEDY };

const COUNTS: [TokenCount; 4] = [
    TokenCount { token: 0, generated: 0 },
    TokenCount { token: 3, generated: 1 },
    TokenCount { token: 5, generated: 7 },
    TokenCount { token: 6, generated: 2 },
];

pub(crate) fn add_rows<B: Backend>(table: &mut Table, device: &Device<B>) {
    let settings: [(&str, SampleRow<'static>); 18] = [
        ("greedy", SampleRow { temperature: 0.0, ..PLAIN }),
        ("temperature=1", PLAIN),
        ("temperature=0.3", SampleRow { temperature: 0.3, ..PLAIN }),
        ("temperature=5", SampleRow { temperature: 5.0, ..PLAIN }),
        ("top-k=1", SampleRow { top_k: 1, ..PLAIN }),
        ("top-k=40", SampleRow { top_k: 40, ..PLAIN }),
        ("top-k=1000000", SampleRow { top_k: 1_000_000, ..PLAIN }),
        ("top-p=0", SampleRow { top_p: 0.0, ..PLAIN }),
        ("top-p=0.9", SampleRow { top_p: 0.9, ..PLAIN }),
        ("top-p=0.999", SampleRow { top_p: 0.999, ..PLAIN }),
        ("min-p=0.05", SampleRow { min_p: 0.05, ..PLAIN }),
        ("min-p=2", SampleRow { min_p: 2.0, ..PLAIN }),
        ("repetition-penalty", SampleRow { repetition_penalty: 3.0, counts: &COUNTS, ..PLAIN }),
        ("presence-penalty", SampleRow { presence_penalty: 2.0, counts: &COUNTS, ..PLAIN }),
        ("frequency-penalty", SampleRow { frequency_penalty: 0.5, counts: &COUNTS, ..PLAIN }),
        ("bias", SampleRow { bias: &[(2, 6.0), (4, f32::NEG_INFINITY)], ..PLAIN }),
        ("infinite-bias", SampleRow { bias: &[(2, f32::INFINITY)], ..PLAIN }),
        (
            "everything",
            SampleRow {
                temperature: 0.8,
                top_k: 50,
                top_p: 0.95,
                min_p: 0.02,
                repetition_penalty: 1.1,
                presence_penalty: 0.5,
                frequency_penalty: 0.1,
                counts: &COUNTS,
                bias: &[(1, 2.0)],
                ..PLAIN
            },
        ),
    ];
    for (name, row) in settings {
        table.add(device, format!("sample/{name}"), move |device| sample(device, row));
    }
}

fn sample<B: Backend>(device: &Device<B>, row: SampleRow<'static>) -> Result<(), String> {
    for vocabulary in [7, 127, 129, 5000] {
        for (what, distort) in DISTORTIONS {
            let case = Sample { row, vocabulary, distort };
            check(&case, &device.backend, 0.0, &format!("{vocabulary} tokens, {what}"))?;
        }
    }
    Ok(())
}

/// Makes a logit of row, token and a random number.
type Distort = fn(usize, usize, f32) -> f32;

/// Kinds of logits; from the fourth last on with rows that allow no choice, alone and beside sound ones.
const DISTORTIONS: [(&str, Distort); 9] = [
    ("spread", |_, _, x| 3.0 * x),
    ("many ties", |_, _, x| x.round()),
    ("zeros of both signs", |_, i, _| if i % 2 == 0 { 0.0 } else { -0.0 }),
    ("−∞ among them", |_, i, x| if i % 5 == 2 { f32::NEG_INFINITY } else { x }),
    ("one certain", |_, i, x| if i == 6 { f32::MAX } else { x }),
    ("one NaN in every third row", |row, i, x| if row % 3 == 1 && i == 5 { f32::NAN } else { x }),
    ("one +∞ in every third row", |row, i, x| if row % 3 == 2 && i == 0 { f32::INFINITY } else { x }),
    ("NaN only", |_, _, _| f32::NAN),
    ("−∞ only in every other row", |row, _, x| if row % 2 == 0 { f32::NEG_INFINITY } else { x }),
];

/// Whether a row of logits allows a choice, in the words of [`SampleRow`].
fn allows_choice(logits: &[f32]) -> bool {
    !logits.iter().any(|&x| x.is_nan() || x == f32::INFINITY) && logits.iter().any(|&x| x != f32::NEG_INFINITY)
}

struct Sample {
    row: SampleRow<'static>,
    vocabulary: usize,
    distort: Distort,
}

impl Case for Sample {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let mut rng = Rng(30);
        let rows = 33;
        let distort = |i| (self.distort)(i / self.vocabulary, i % self.vocabulary, rng.normal());
        let values: Vec<f32> = (0..rows * self.vocabulary).map(distort).collect();
        let largest_below_one = 1.0 - f32::EPSILON / 2.0;
        let uniforms = [0.0, largest_below_one].into_iter().chain((2..rows).map(|_| rng.uniform()));
        let settings: Vec<SampleRow<'_>> = uniforms.map(|uniform| SampleRow { uniform, ..self.row }).collect();
        let limits = StepLimits { logit_rows: rows, ..limits(rows, self.vocabulary) };
        let mut encoder = backend.encoder(&limits).expect("an encoder");
        let mut logits = upload(backend, self.vocabulary, &values);
        let mut tokens = vec![SampleRow::NOT_FINITE - 1; rows];
        let sampling = encoder.sample(&mut logits, &settings);
        encoder.sampled(sampling, &mut tokens).expect("a choice");
        for (&token, logits) in tokens.iter().zip(values.chunks_exact(self.vocabulary)) {
            if allows_choice(logits) {
                assert!((token as usize) < self.vocabulary, "{token} is no token of the vocabulary");
            } else {
                assert_eq!(token, SampleRow::NOT_FINITE, "a token of logits that allow no choice");
            }
        }
        tokens.iter().map(|&token| token as f32).collect()
    }
}
