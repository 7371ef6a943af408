//! How good a model is: perplexity, and divergence from a baseline.

mod score;
mod source;
mod windows;

pub use source::{LogitSource, ModelLogits, RecordedLogits};
pub use windows::Windows;

use rayon::prelude::*;
use score::{RowScore, score_row};

use crate::QuantizeError;

/// What an evaluation measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Quality {
    /// Predicted tokens: every token but the first of each window.
    pub tokens: usize,
    /// Mean negative log-likelihood of a predicted token, in nats.
    pub nll: f64,
    /// Mean negative log-likelihood of each window's predicted tokens, in nats; windows that predict nothing are left out.
    pub window_nll: Vec<f64>,
    /// How far the model is from the baseline, if there was one.
    pub divergence: Option<Divergence>,
}

/// How far a model's next-token distributions are from a baseline's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Divergence {
    /// Mean of KL(P_baseline ‖ P_model) over predicted tokens, in nats.
    pub mean_kl: f64,
    /// The smallest divergence that 99 % of the tokens do not exceed (nearest rank).
    pub p99_kl: f64,
    /// Share of tokens for which both models find the same token most likely.
    pub top1_agreement: f64,
}

impl Quality {
    /// exp of the mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        self.nll.exp()
    }

    fn of(windows: &[Vec<RowScore>]) -> Self {
        let rows = || windows.iter().flatten();
        let tokens = rows().count();
        let mean = |scores: &[RowScore]| scores.iter().map(|s| s.nll).sum::<f64>() / scores.len() as f64;
        Self {
            tokens,
            nll: rows().map(|s| s.nll).sum::<f64>() / tokens as f64,
            window_nll: windows.iter().filter(|w| !w.is_empty()).map(|w| mean(w)).collect(),
            divergence: rows().map(|s| s.agreement).collect::<Option<Vec<_>>>().map(Divergence::of),
        }
    }
}

impl Divergence {
    fn of(rows: Vec<score::Agreement>) -> Self {
        let count = rows.len();
        let mut kl: Vec<f64> = rows.iter().map(|r| r.kl).collect();
        let mean_kl = kl.iter().sum::<f64>() / count as f64;
        kl.sort_unstable_by(f64::total_cmp);
        let rank = (count * 99).div_ceil(100).max(1);
        let agreeing = rows.iter().filter(|r| r.same_top1).count();
        Self { mean_kl, p99_kl: kl[rank - 1], top1_agreement: agreeing as f64 / count as f64 }
    }
}

/// Runs a model over `windows`, and beside it the baseline if there is one.
///
/// Each window starts from an empty context. Log-softmax and divergence are computed in f64 and summed in the order of the
/// text, so the result does not depend on the number of threads. `progress` is told the predicted tokens done so far.
pub fn evaluate(
    model: &mut dyn LogitSource,
    mut baseline: Option<&mut dyn LogitSource>,
    windows: &Windows,
    mut progress: impl FnMut(usize),
) -> Result<Quality, QuantizeError> {
    let vocabulary = model.vocabulary();
    let mut chunk = model.max_tokens();
    if let Some(baseline) = &baseline {
        if baseline.vocabulary() != vocabulary {
            return Err(QuantizeError::Vocabularies { model: vocabulary, baseline: baseline.vocabulary() });
        }
        chunk = chunk.min(baseline.max_tokens());
    }

    let mut scores = Scores::default();
    let mut done = 0;
    let (mut logits, mut baseline_logits) = (Vec::new(), Vec::new());
    for (index, window) in windows.iter().enumerate() {
        let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
        scores.start();
        model.start(index)?;
        if let Some(baseline) = &mut baseline {
            baseline.start(index)?;
        }
        for (inputs, targets) in inputs.chunks(chunk).zip(targets.chunks(chunk)) {
            model.extend(inputs, &mut logits)?;
            let compared = match &mut baseline {
                Some(baseline) => {
                    baseline.extend(inputs, &mut baseline_logits)?;
                    Some(&baseline_logits[..])
                }
                None => None,
            };
            let scored = scores.add(&logits, targets, compared, vocabulary);
            scored.ok_or(QuantizeError::Logits { window: index })?;
            done += targets.len();
            progress(done);
        }
    }
    Ok(scores.quality())
}

/// Scores of predicted tokens, window by window.
#[derive(Default)]
pub(crate) struct Scores(Vec<Vec<RowScore>>);

impl Scores {
    /// Begins a window.
    pub(crate) fn start(&mut self) {
        self.0.push(Vec::new());
    }

    /// Scores the rows `[targets, vocabulary]` in parallel; `None` if one of them cannot be.
    ///
    /// # Panics
    /// No window was begun.
    pub(crate) fn add(
        &mut self,
        logits: &[f32],
        targets: &[u32],
        baseline: Option<&[f32]>,
        vocabulary: usize,
    ) -> Option<()> {
        let score = |(index, &target): (usize, &u32)| {
            let row = index * vocabulary..(index + 1) * vocabulary;
            score_row(&logits[row.clone()], target, baseline.map(|baseline| &baseline[row]))
        };
        let scores: Option<Vec<RowScore>> = targets.par_iter().enumerate().map(score).collect();
        self.0.last_mut().expect("a window was begun").extend(scores?);
        Some(())
    }

    pub(crate) fn quality(&self) -> Quality {
        Quality::of(&self.0)
    }
}

/// KL(P_baseline ‖ P_model) of each row of logits, in nats; `None` if a logit is not finite.
pub(crate) fn divergences(baseline: &[f32], model: &[f32], vocabulary: usize) -> Option<Vec<f64>> {
    let rows = baseline.par_chunks_exact(vocabulary).zip(model.par_chunks_exact(vocabulary));
    rows.map(|(baseline, model)| Some(score_row(model, 0, Some(baseline))?.agreement?.kl)).collect()
}
