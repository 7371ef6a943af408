//! What a test has to do: bytes that it reads, and multiply-adds.

use marlin_kernels::KvLayer;
use marlin_model::{ModelInfo, ModelShape};

use super::Test;
use super::weights::StepWeights;

/// What a token of a test takes, at least: the mean over its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// A token's share of the bytes of weights, as they are stored, which each step reads once. The head is read, and
    /// multiplied with, where there are logits: by the last step of a prompt, and by each of decoding.
    pub weights: f64,
    /// Bytes of cached keys and values, of which a step reads what its tokens see once.
    pub kv: f64,
    /// Multiplications with an addition each: one for each weight that is stored and each row of input, and of attention
    /// two for each position that a query head sees and each value of a head.
    pub multiply_adds: f64,
}

impl Work {
    /// Of a test on a model of this shape. Tokens go to experts at random.
    pub(super) fn of(test: Test, weights: StepWeights, shape: &ModelShape, info: &ModelInfo) -> Self {
        let tokens = test.tokens() as f64;
        let (steps, logits) = match test {
            Test::Prefill(_) => (test.tokens().div_ceil(info.step_tokens) as f64 / tokens, 1.0 / tokens),
            Test::Decode { streams, .. } => (1.0 / streams as f64, 1.0),
        };
        // A step reads the head once, however many streams it has logits for.
        let heads_read = steps.min(logits);
        let (mut kv, mut attention) = (0.0, 0.0);
        for layer in &info.kv_layout.layers {
            let seen = positions_seen(layer, test);
            let read = match test {
                Test::Prefill(tokens) => positions_read(layer, tokens, info.step_tokens),
                Test::Decode { .. } => seen,
            };
            kv += layer.bytes_per_token(info.kv_type) as f64 * read;
            // In latent attention values are the first ones of keys.
            let value_dim = shape.kv_rank.unwrap_or(layer.value_dim);
            attention += (shape.heads * (layer.key_dim + value_dim)) as f64 * seen;
        }
        let chosen = shape.experts.map_or(0.0, |experts| experts.top_k as f64 / experts.routed as f64);
        let experts_read = experts_read(chosen, test, info.step_tokens);
        Self {
            weights: weights.decoder.bytes as f64 * steps
                + weights.experts.bytes as f64 * experts_read
                + weights.head.bytes as f64 * heads_read
                + weights.row as f64,
            kv,
            multiply_adds: weights.decoder.weights as f64
                + weights.experts.weights as f64 * chosen
                + weights.head.weights as f64 * logits
                + attention,
        }
    }

    /// Weights and KV cache.
    pub fn bytes(&self) -> f64 {
        self.weights + self.kv
    }

    /// Multiply-adds for each byte: the arithmetic intensity.
    pub fn intensity(&self) -> f64 {
        self.multiply_adds / self.bytes()
    }
}

/// The share of experts that a test's steps read, for each of its tokens, if each of them goes to a share of `chosen`.
fn experts_read(chosen: f64, test: Test, step_tokens: usize) -> f64 {
    let of_step = |tokens: usize| 1.0 - (1.0 - chosen).powi(i32::try_from(tokens).unwrap_or(i32::MAX));
    match test {
        Test::Decode { streams, .. } => of_step(streams) / streams as f64,
        Test::Prefill(tokens) => {
            let steps = (0..tokens).step_by(step_tokens).map(|start| of_step(step_tokens.min(tokens - start)));
            steps.sum::<f64>() / tokens as f64
        }
    }
}

/// Positions that a token sees, itself among them; the mean over the tokens of a test.
fn positions_seen(layer: &KvLayer, test: Test) -> f64 {
    let (depth, tokens) = (test.depth(), test.tokens());
    let seen = (depth + 1..=depth + tokens).map(|seen| seen.min(layer.window.unwrap_or(usize::MAX)) as f64);
    seen.sum::<f64>() / tokens as f64
}

/// Positions that the steps of a prompt see, each once a step, for each of its tokens.
fn positions_read(layer: &KvLayer, tokens: usize, step_tokens: usize) -> f64 {
    let of_step = |start: usize| {
        let first = layer.window.map_or(0, |window| (start + 1).saturating_sub(window));
        tokens.min(start + step_tokens) - first
    };
    (0..tokens).step_by(step_tokens).map(of_step).sum::<usize>() as f64 / tokens as f64
}

#[cfg(test)]
mod tests {
    use marlin_kernels::{DeviceInfo, KvLayout, KvType};
    use marlin_model::ExpertShape;

    use super::super::weights::Read;
    use super::*;

    /// Two layers with 2 heads of 4 keys and 4 values, 32 bytes a token: one that sees everything, one of a window of 3.
    fn info(step_tokens: usize) -> ModelInfo {
        let layer = KvLayer { heads: 2, key_dim: 4, value_dim: 4, window: None };
        let layers = vec![layer, KvLayer { window: Some(3), ..layer }];
        ModelInfo {
            architecture: String::new(),
            vocabulary: 1,
            hidden_size: 1,
            context: 16,
            step_tokens,
            logit_rows: 1,
            layers: 2,
            kv_layout: KvLayout { block_tokens: 4, layers },
            kv_type: KvType::F16,
            weight_bytes: 0,
            device: DeviceInfo { name: String::new(), detail: String::new() },
            host_experts: None,
            overlaps: false,
        }
    }

    const WEIGHTS: StepWeights = StepWeights {
        decoder: Read { bytes: 1000, weights: 2000 },
        experts: Read { bytes: 0, weights: 0 },
        head: Read { bytes: 300, weights: 300 },
        row: 6,
    };

    const SHAPE: ModelShape = ModelShape {
        layers: 2,
        hidden: 4,
        intermediate: 4,
        experts: None,
        heads: 4,
        kv_heads: 2,
        head_dim: 4,
        kv_rank: None,
        vocabulary: 1,
        context: 16,
        tied: false,
    };

    #[test]
    fn a_step_reads_the_experts_that_its_tokens_go_to() {
        let experts = ExpertShape { layers: 2, routed: 8, top_k: 2, width: 4, shared_width: 0 };
        let shape = ModelShape { experts: Some(experts), ..SHAPE };
        let weights = StepWeights { experts: Read { bytes: 800, weights: 1600 }, ..WEIGHTS };
        let work = |test| Work::of(test, weights, &shape, &info(4));
        let one = work(Test::Decode { tokens: 1, depth: 0, streams: 1 });
        assert_eq!(one.weights, 1306.0 + 200.0);
        assert_eq!(one.multiply_adds, 2300.0 + 400.0 + 4.0 * 8.0 * 2.0);
        // Two tokens miss an expert each with a probability of 3/4.
        let two = work(Test::Decode { tokens: 1, depth: 0, streams: 2 });
        assert_eq!(two.weights, 1300.0 / 2.0 + 6.0 + 800.0 * (1.0 - 0.5625) / 2.0);
        let prompt = work(Test::Prefill(5));
        let read = (1.0 - 0.75f64.powi(4)) + 0.25;
        assert!((prompt.weights - ((2.0 * 1000.0 + 300.0) / 5.0 + 6.0 + 800.0 * read / 5.0)).abs() < 1e-9);
    }

    #[test]
    fn a_decoded_token_sees_its_past_and_itself_within_the_window() {
        // 11 and 12 tokens are seen in the first layer, 3 in the second; 4 query heads.
        let test = Test::Decode { tokens: 2, depth: 10, streams: 1 };
        let work = Work::of(test, WEIGHTS, &SHAPE, &info(8));
        assert_eq!((work.weights, work.kv), (1000.0 + 300.0 + 6.0, 32.0 * (11.5 + 3.0)));
        assert_eq!(work.multiply_adds, 2000.0 + 300.0 + 4.0 * 8.0 * (11.5 + 3.0));
        assert_eq!(work.intensity(), work.multiply_adds / (1306.0 + 464.0));
        let first = Work::of(Test::Decode { tokens: 1, depth: 0, streams: 1 }, WEIGHTS, &SHAPE, &info(8));
        assert_eq!(first.kv, 64.0);
    }

    #[test]
    fn streams_share_the_weights_of_a_step() {
        let test = |streams| Test::Decode { tokens: 2, depth: 10, streams };
        let [one, four] = [1, 4].map(|streams| Work::of(test(streams), WEIGHTS, &SHAPE, &info(8)));
        assert_eq!(four.weights, 1300.0 / 4.0 + 6.0);
        assert_eq!((four.kv, four.multiply_adds), (one.kv, one.multiply_adds));
    }

    #[test]
    fn a_prompt_reads_weights_once_a_step_and_the_head_once() {
        let work = Work::of(Test::Prefill(10), WEIGHTS, &SHAPE, &info(4));
        // Steps of 4, 4 and 2 tokens; in the second layer, the first token of a step sees two before it.
        let read = (4.0 + 8.0 + 10.0) + (4.0 + 6.0 + 4.0);
        assert_eq!((work.weights, work.kv), ((3.0 * 1000.0 + 300.0) / 10.0 + 6.0, 32.0 * read / 10.0));
        let seen = (1..=10).sum::<usize>() + (1 + 2 + 3 * 8);
        assert_eq!(work.multiply_adds, 2000.0 + 30.0 + 4.0 * 8.0 * seen as f64 / 10.0);
    }
}
