//! Evaluation of models whose distributions are known.

use marlin_kernels::{DeviceInfo, KvLayer, KvLayout, KvType, SampleRow, SamplingId};
use marlin_model::{KvPool, LanguageModel, ModelError, ModelInfo, StepBatch};
use marlin_quantize::{ModelLogits, QuantizeError, RecordedLogits, Windows, evaluate};

const VOCABULARY: usize = 10;

/// A model whose logits are a function of a token and its position.
struct Fake<F> {
    info: ModelInfo,
    pool: KvPool,
    logits: F,
    rows: Vec<f32>,
    /// Tokens of each step.
    steps: Vec<usize>,
}

impl<F: Fn(u32, u32) -> [f32; VOCABULARY] + Send> Fake<F> {
    fn new(step_tokens: usize, logit_rows: usize, logits: F) -> Self {
        let layer = KvLayer { heads: 1, key_dim: 1, value_dim: 1, window: None };
        let kv_layout = KvLayout { block_tokens: 2, layers: vec![layer] };
        let info = ModelInfo {
            architecture: "Fake".into(),
            vocabulary: VOCABULARY,
            hidden_size: 1,
            context: 8,
            step_tokens,
            logit_rows,
            layers: 1,
            kv_layout: kv_layout.clone(),
            kv_type: KvType::F32,
            weight_bytes: 0,
            device: DeviceInfo { name: "fake".into(), detail: String::new() },
            host_experts: None,
            overlaps: false,
        };
        // Just enough for one window: blocks that are not given back are missed at once.
        Self { info, pool: KvPool::new(kv_layout, 4), logits, rows: Vec::new(), steps: Vec::new() }
    }
}

impl<F: Fn(u32, u32) -> [f32; VOCABULARY] + Send> LanguageModel for Fake<F> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn kv(&mut self) -> &mut KvPool {
        &mut self.pool
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<(), ModelError> {
        let step = batch.as_step();
        assert!(step.tokens.len() <= self.info.step_tokens && step.logit_rows.len() <= self.info.logit_rows);
        self.steps.push(step.tokens.len());
        let row = |&row: &u32| (self.logits)(step.tokens[row as usize], step.positions[row as usize]);
        self.rows = step.logit_rows.iter().flat_map(row).collect();
        Ok(())
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.clone_from(&self.rows);
        Ok(())
    }

    fn read_hidden(&mut self, _: &mut Vec<f32>) -> Result<(), ModelError> {
        unreachable!("an evaluation does not look at hidden states")
    }

    fn wait(&mut self) -> Result<(), ModelError> {
        Ok(())
    }

    fn sample(&mut self, _: &[SampleRow<'_>]) -> Result<SamplingId, ModelError> {
        unreachable!("an evaluation does not sample")
    }

    fn sampled(&mut self, _: SamplingId, _: &mut [u32]) -> Result<(), ModelError> {
        unreachable!("an evaluation does not sample")
    }

    fn read_kv_blocks(&mut self, _: &[u32], _: &mut [u8]) -> Result<(), ModelError> {
        unreachable!("an evaluation keeps no blocks")
    }

    fn write_kv_blocks(&mut self, _: &[u32], _: &[u8]) -> Result<(), ModelError> {
        unreachable!("an evaluation keeps no blocks")
    }
}

fn uniform(_: u32, _: u32) -> [f32; VOCABULARY] {
    [0.0; VOCABULARY]
}

/// Nine times as likely as all others together: the token that follows in 0, 1, …, 9, 0, …
fn counting(token: u32, _: u32) -> [f32; VOCABULARY] {
    let mut row = [0.0; VOCABULARY];
    row[(token as usize + 1) % VOCABULARY] = 81f32.ln();
    row
}

fn count(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|t| t % VOCABULARY as u32).collect()
}

#[test]
fn a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() {
    let windows = Windows::new(vec![3; 21], 8, None).unwrap();
    let mut model = Fake::new(8, 8, uniform);
    let quality = evaluate(&mut ModelLogits::new(&mut model), None, &windows, |_| {}).unwrap();
    assert!((quality.perplexity() - 10.0).abs() < 1e-12);
    assert_eq!((quality.tokens, quality.window_nll.len()), (18, 3));
    assert!(quality.divergence.is_none());
}

#[test]
fn each_window_starts_afresh_and_runs_in_chunks() {
    // The first token of a window is not predicted; position 0 is.
    let by_position = |_: u32, position: u32| {
        let mut row = [0.0; VOCABULARY];
        row[3] = position as f32;
        row
    };
    let windows = Windows::new(vec![3; 14], 8, None).unwrap();
    let mut model = Fake::new(5, 3, by_position);
    let mut progress = Vec::new();
    let quality = evaluate(&mut ModelLogits::new(&mut model), None, &windows, |done| progress.push(done)).unwrap();
    let nll = |position: i32| (9.0 + f64::from(position).exp()).ln() - f64::from(position);
    let expected = (0..7).chain(0..5).map(nll).sum::<f64>() / 12.0;
    assert!((quality.nll - expected).abs() < 1e-12, "{} {expected}", quality.nll);
    assert!((quality.window_nll[1] - (0..5).map(nll).sum::<f64>() / 5.0).abs() < 1e-12);
    assert_eq!(model.steps, [3, 3, 1, 3, 2]);
    assert_eq!(progress, [3, 6, 7, 10, 12]);
    assert_eq!(model.pool.free_blocks(), 4);
}

#[test]
fn divergence_of_known_distributions() {
    let windows = Windows::new(count(13), 8, None).unwrap();
    let (mut model, mut baseline) = (Fake::new(4, 4, uniform), Fake::new(8, 3, counting));
    let (mut model, mut baseline) = (ModelLogits::new(&mut model), ModelLogits::new(&mut baseline));
    let quality = evaluate(&mut model, Some(&mut baseline), &windows, |_| {}).unwrap();
    // P_baseline is 0.9 once and 0.1 / 9 nine times; P_model is 0.1.
    let kl = 0.9 * 9f64.ln() + 0.1 * (1.0f64 / 9.0).ln();
    let divergence = quality.divergence.unwrap();
    assert!((divergence.mean_kl - kl).abs() < 1e-6 && (divergence.p99_kl - kl).abs() < 1e-6, "{divergence:?} {kl}");
    // A uniform row's first largest logit is token 0, which follows one of the tokens 0 … 9 that predict: 9.
    assert_eq!(divergence.top1_agreement, 1.0 / 11.0);

    let quality = evaluate(&mut baseline, None, &windows, |_| {}).unwrap();
    assert!((quality.perplexity() - 1.0 / 0.9).abs() < 1e-6);
}

#[test]
fn the_99th_percentile_is_the_nearest_rank() {
    // 200 predicted tokens, of which three diverge: the rank of 99 % is 198, the smallest of the three.
    let windows = Windows::new([3; 2].repeat(200), 2, None).unwrap();
    let step = std::sync::atomic::AtomicU32::new(0);
    let odd = |_: u32, _: u32| {
        let mut row = [0.0; VOCABULARY];
        row[0] = match step.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            17 => 3.0,
            50 => 1.0,
            180 => 2.0,
            _ => 0.0,
        };
        row
    };
    let (mut model, mut baseline) = (Fake::new(8, 8, odd), Fake::new(8, 8, uniform));
    let (mut model, mut baseline) = (ModelLogits::new(&mut model), ModelLogits::new(&mut baseline));
    let divergence = evaluate(&mut model, Some(&mut baseline), &windows, |_| {}).unwrap().divergence.unwrap();
    let kl = |logit: f64| (logit.exp() / 10.0 + 0.9).ln() - logit / 10.0;
    assert!((divergence.p99_kl - kl(1.0)).abs() < 1e-12);
    assert!((divergence.mean_kl - (kl(1.0) + kl(2.0) + kl(3.0)) / 200.0).abs() < 1e-12);
    assert_eq!(divergence.top1_agreement, 1.0);
}

#[test]
fn a_model_does_not_diverge_from_itself_or_its_recording() {
    let noisy =
        |token: u32, position: u32| std::array::from_fn(|i| ((token + 3 * position + i as u32) as f32).sin() * 9.0);
    let windows = Windows::new(count(30), 7, None).unwrap();
    let (mut model, mut other) = (Fake::new(8, 8, noisy), Fake::new(3, 3, noisy));
    let (mut model, mut other) = (ModelLogits::new(&mut model), ModelLogits::new(&mut other));
    let beside = evaluate(&mut model, Some(&mut other), &windows, |_| {}).unwrap();
    let mut recorded = RecordedLogits::record(&mut other, &windows, |_| {}).unwrap();
    for _ in 0..2 {
        let quality = evaluate(&mut model, Some(&mut recorded), &windows, |_| {}).unwrap();
        let divergence = quality.divergence.unwrap();
        assert_eq!((divergence.mean_kl, divergence.p99_kl, divergence.top1_agreement), (0.0, 0.0, 1.0));
        assert_eq!(quality, beside);
    }
    assert_eq!(evaluate(&mut recorded, None, &windows, |_| {}).unwrap().nll, beside.nll);

    let others = Windows::new(count(31)[1..].to_vec(), 7, None).unwrap();
    let error = evaluate(&mut model, Some(&mut recorded), &others, |_| {}).unwrap_err();
    assert!(matches!(error, QuantizeError::NotRecorded), "{error}");
}

#[test]
fn logits_that_are_not_finite_name_their_window() {
    let windows = Windows::new(count(16), 8, None).unwrap();
    let broken = |token: u32, _: u32| [if token == 9 { f32::NAN } else { 0.0 }; VOCABULARY];
    let mut model = Fake::new(8, 8, broken);
    let error = evaluate(&mut ModelLogits::new(&mut model), None, &windows, |_| {}).unwrap_err();
    assert!(matches!(error, QuantizeError::Logits { window: 1 }), "{error}");
}
