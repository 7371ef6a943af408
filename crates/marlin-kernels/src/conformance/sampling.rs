//! Rows of sampling: every parameter by itself, and all of them together, over all tokens and over some. The same tokens must be chosen, but
//! for shares of probabilities that are borderline.

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
        table.add(device, format!("sample/{name}"), move |device| sample(device, row, None, false));
        if !row.counts.is_empty() {
            table.add(device, format!("sample/{name}-after-another"), move |device| sample(device, row, None, true));
        }
        if !WITH_MASKS.contains(&name) {
            continue;
        }
        for (mask, allows) in MASKS {
            let follows = !row.counts.is_empty();
            let name = format!("sample/{name}-allowed-{mask}");
            table.add(device, name, move |device| sample(device, row, Some(allows), follows));
        }
    }
}

fn sample<B: Backend>(
    device: &Device<B>,
    row: SampleRow<'static>,
    allows: Option<Allows>,
    follows: bool,
) -> Result<(), String> {
    // What masks add is seen in fewer cases: ties, −∞ and what allows no choice among them.
    let (vocabularies, distortions): (&[usize], &[_]) =
        if allows.is_some() { (&[129, 5000], &DISTORTIONS[1..6]) } else { (&[7, 127, 129, 5000], &DISTORTIONS) };
    for &vocabulary in vocabularies {
        for &(what, distort) in distortions {
            let case = Sample::new(row, follows, vocabulary, distort).allowing(allows);
            case.check(device).map_err(|error| format!("{vocabulary} tokens, {what}: {error}"))?;
        }
    }
    Ok(())
}

/// Whether a row allows a token, of whose vocabulary another is the most likely one.
type Allows = fn(RowOf, u32) -> bool;

/// What a mask is made for.
#[derive(Clone, Copy)]
struct RowOf {
    row: u32,
    vocabulary: u32,
    most_likely: u32,
}

/// Masks; the last allows nothing but what "−∞ among them" rules out.
const MASKS: [(&str, Allows); 5] = [
    ("one", |of, token| token == (of.row * 37 + 2) % of.vocabulary),
    ("every-third", |_, token| token % 3 == 1),
    ("all-but-the-most-likely", |of, token| token != of.most_likely),
    ("all", |_, _| true),
    ("ruled-out", |_, token| token % 5 == 2),
];

/// Settings that are also checked with masks.
const WITH_MASKS: [&str; 4] = ["greedy", "top-p=0.9", "infinite-bias", "everything"];

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
    /// The mask of each row that has one; no masks at all if it is empty.
    masks: Vec<Option<Vec<u32>>>,
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
        Self { vocabulary, logits, rows: uniforms.enumerate().map(row).collect(), masks: Vec::new(), follows }
    }

    /// With masks for all rows but every fourth.
    fn allowing(mut self, allows: Option<Allows>) -> Self {
        let Some(allows) = allows else { return self };
        let mask = |(row, logits): (usize, &[f32])| {
            let most_likely = SampleRow::GREEDY.most_likely(logits).0;
            let of = RowOf { row: row as u32, vocabulary: self.vocabulary as u32, most_likely };
            let mut mask = vec![0; self.vocabulary.div_ceil(32)];
            (0..of.vocabulary).filter(|&token| allows(of, token)).for_each(|t| mask[t as usize / 32] |= 1 << (t % 32));
            (row % 4 != 3).then_some(mask)
        };
        self.masks = self.logits.chunks(self.vocabulary).enumerate().map(mask).collect();
        self
    }

    /// The mask of a row.
    fn allowed(&self, row: usize) -> Option<&[u32]> {
        self.masks.get(row)?.as_deref()
    }

    /// The tokens that a device chooses: of the sampling before, and of this one.
    fn run<B: Backend>(&self, backend: &B, rows: &[SampleRow<'static>]) -> [Vec<u32>; 2] {
        let limits = StepLimits { logit_rows: ROWS, ..limits(ROWS, self.vocabulary) };
        let mut encoder = backend.encoder(&limits).expect("an encoder");
        let mut logits = upload(backend, self.vocabulary, &self.logits);
        let before = self.follows.then(|| {
            let sampling = encoder.sample(&mut logits, &[SampleRow::GREEDY; ROWS]);
            encoder.start().expect("a start");
            backend.upload(&mut logits, ROWS, &self.logits).expect("values that fill it");
            sampling
        });
        let masked = |(index, row): (usize, &SampleRow<'static>)| SampleRow { allowed: self.allowed(index), ..*row };
        let sampling = encoder.sample(&mut logits, &rows.iter().enumerate().map(masked).collect::<Vec<_>>());
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
                let row = SampleRow { allowed: self.allowed(index), ..*row };
                row.adjust(&mut logits, token_of(&before, row.last_sampled));
                let order = by_falling_logit(&logits);
                let is_allowed = row.allowed.is_none_or(|mask| mask[found as usize / 32] >> (found % 32) & 1 == 1);
                is_allowed && order(range.start(), &found).is_le() && order(&found, range.end()).is_le()
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
