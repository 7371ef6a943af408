//! Rows of sampling: every parameter by itself, and all of them together. The same tokens must be chosen, but for shares of probabilities
//! that are borderline.

use crate::reference::ReferenceBackend;
use crate::sampling::by_falling_logit;
use crate::sampling::host::token_of;
use crate::{Backend, Encoder, SampleRow, StepLimits, TokenCount};

use super::support::{Rng, limits, upload};
use super::{Device, Table};

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
        table.add(device, format!("sample/{name}"), move |device| sample(device, row, false));
        if !row.counts.is_empty() {
            table.add(device, format!("sample/{name}-after-another"), move |device| sample(device, row, true));
        }
    }
}

fn sample<B: Backend>(device: &Device<B>, row: SampleRow<'static>, follows: bool) -> Result<(), String> {
    for vocabulary in [7, 127, 129, 5000] {
        for (what, distort) in DISTORTIONS {
            let case = Sample::new(row, follows, vocabulary, distort);
            case.check(device).map_err(|error| format!("{vocabulary} tokens, {what}: {error}"))?;
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

/// Rows of a sampling.
const ROWS: usize = 33;

/// A sampling, and perhaps one before it that it follows on.
struct Sample {
    vocabulary: usize,
    logits: Vec<f32>,
    rows: Vec<SampleRow<'static>>,
    follows: bool,
}

impl Sample {
    fn new(row: SampleRow<'static>, follows: bool, vocabulary: usize, distort: Distort) -> Self {
        let mut rng = Rng(30);
        let distort = |i| distort(i / vocabulary, i % vocabulary, rng.normal());
        let logits = (0..ROWS * vocabulary).map(distort).collect();
        let largest_below_one = 1.0 - f32::EPSILON / 2.0;
        let uniforms = [0.0, largest_below_one].into_iter().chain((2..ROWS).map(|_| rng.uniform()));
        // Each row after the first takes account of its neighbour's token.
        let last_sampled = |index: usize| index.checked_sub(1).filter(|_| follows).map(|neighbour| neighbour as u32);
        let row = |(index, uniform)| SampleRow { uniform, last_sampled: last_sampled(index), ..row };
        Self { vocabulary, logits, rows: uniforms.enumerate().map(row).collect(), follows }
    }

    /// The tokens that a device chooses: of the sampling before, and of this one.
    fn run<B: Backend>(&self, backend: &B, rows: &[SampleRow<'_>]) -> [Vec<u32>; 2] {
        let limits = StepLimits { logit_rows: ROWS, ..limits(ROWS, self.vocabulary) };
        let mut encoder = backend.encoder(&limits).expect("an encoder");
        let mut logits = upload(backend, self.vocabulary, &self.logits);
        let before = self.follows.then(|| {
            let sampling = encoder.sample(&mut logits, &[SampleRow::GREEDY; ROWS]);
            encoder.start().expect("a start");
            backend.upload(&mut logits, ROWS, &self.logits).expect("values that fill it");
            sampling
        });
        let sampling = encoder.sample(&mut logits, rows);
        let mut tokens = [vec![SampleRow::NOT_FINITE - 1; ROWS], vec![SampleRow::NOT_FINITE - 1; ROWS]];
        if let Some(before) = before {
            encoder.sampled(before, &mut tokens[0]).expect("tokens of the sampling before");
        }
        encoder.sampled(sampling, &mut tokens[1]).expect("a choice");
        tokens
    }

    /// In the order of tokens, what the device chooses lies between what the reference chooses by slightly smaller and by slightly larger
    /// shares.
    fn check<B: Backend>(&self, device: &Device<B>) -> Result<(), String> {
        let [before, found] = self.run(&*device.backend, &self.rows);
        if !device.compares {
            return Ok(());
        }
        let share = device.bounds.share;
        let choose = |change: f32| {
            let row = |row: &SampleRow<'static>| SampleRow {
                uniform: (row.uniform + change).clamp(0.0, 1.0 - f32::EPSILON / 2.0),
                top_p: row.top_p + change,
                min_p: row.min_p * (1.0 - change),
                ..*row
            };
            self.run(&ReferenceBackend, &self.rows.iter().map(row).collect::<Vec<_>>())
        };
        let [[expected_before, first], [_, last]] = [choose(-share), choose(share)];
        if self.follows && before != expected_before {
            return Err(format!("the sampling before chose {before:?}, expected {expected_before:?}"));
        }
        for (index, row) in self.rows.iter().enumerate() {
            let mut logits = self.logits[index * self.vocabulary..][..self.vocabulary].to_vec();
            let (found, range) = (found[index], first[index]..=last[index]);
            let is_right = if allows_choice(&logits) && (found as usize) < self.vocabulary {
                row.adjust(&mut logits, token_of(&before, row.last_sampled));
                let order = by_falling_logit(&logits);
                order(range.start(), &found).is_le() && order(&found, range.end()).is_le()
            } else {
                !allows_choice(&logits) && found == SampleRow::NOT_FINITE
            };
            if !is_right {
                return Err(format!("row {index} gets token {found}, expected one of those from {range:?}: {row:?}"));
            }
        }
        Ok(())
    }
}
