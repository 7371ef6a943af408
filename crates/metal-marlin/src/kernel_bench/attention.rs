//! Attention over the paged cache: a prompt, and one token after many.

use marlin_kernels::{AttentionShape, Encoder, KvLayer, KvLayout, KvType, RopeLayout, Step, StepLimits, Values};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::timer::Timed;
use super::{Bench, KernelBenchError, Measurement, Plans, Work, full_name};

/// The heads of Qwen3-4B and -8B and of Llama 3.1 8B.
const SHAPE: AttentionShape = AttentionShape {
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    scale: 0.088_388_35,
    window: None,
    values: Values::Cached,
    rope: RopeLayout::HalfSplit,
};
/// Tokens of a block of the cache.
const BLOCK: usize = 16;

/// Attention over caches of one type.
pub(super) struct AttentionGroup {
    kv_type: KvType,
    cases: &'static [Case],
}

#[derive(Debug, Clone, Copy)]
enum Case {
    /// One token that sees so many.
    Decode(usize),
    /// A prompt of so many tokens.
    Prefill(usize),
}

const CASES: [Case; 5] =
    [Case::Decode(1024), Case::Decode(8192), Case::Decode(32_768), Case::Prefill(512), Case::Prefill(4096)];
const QUICK_CASES: [Case; 2] = [Case::Decode(128), Case::Prefill(32)];

impl AttentionGroup {
    /// All groups.
    pub(super) fn all(quick: bool) -> Vec<Self> {
        let cases: &[Case] = if quick { &QUICK_CASES } else { &CASES };
        // Nobody runs f32 for its speed.
        let kv_types = KvType::ALL.into_iter().filter(|kv_type| *kv_type != KvType::F32);
        kv_types.map(|kv_type| Self { kv_type, cases }).collect()
    }
}

impl Case {
    fn name(self) -> String {
        match self {
            Self::Decode(tokens) => format!("decode/{tokens}"),
            Self::Prefill(tokens) => format!("prefill/{tokens}"),
        }
    }

    /// Tokens in the cache, and how many of them, the last ones, are in the step.
    fn tokens(self) -> [usize; 2] {
        match self {
            Self::Decode(tokens) => [tokens, 1],
            Self::Prefill(tokens) => [tokens, tokens],
        }
    }

    fn work(self, bytes_per_token: usize) -> Work {
        let [seen, rows] = self.tokens();
        let pairs: usize = (seen - rows + 1..=seen).sum();
        // A score and a value for each pair, a multiplication and an addition for each dimension of both.
        let operations = 4.0 * pairs as f64 * (SHAPE.heads * SHAPE.head_dim) as f64;
        Work { bytes: (seen * bytes_per_token) as f64, operations }
    }
}

impl<B: Timed> Plans<B> for AttentionGroup {
    fn name(&self) -> String {
        format!("attention/{}", self.kv_type.name())
    }

    fn cases(&self) -> Vec<String> {
        self.cases.iter().map(|case| case.name()).collect()
    }

    fn measure(&self, bench: &Bench<'_, B>, done: &mut dyn FnMut()) -> Result<Vec<Measurement>, KernelBenchError> {
        let group = Plans::<B>::name(self);
        let mut measurements = Vec::new();
        for case in self.cases {
            let name = full_name(&group, &case.name());
            if bench.is_wanted(&name) {
                measurements.push(self.measure_case(bench, *case, name)?);
                done();
            }
        }
        Ok(measurements)
    }
}

impl AttentionGroup {
    fn measure_case<B: Timed>(
        &self,
        bench: &Bench<'_, B>,
        case: Case,
        name: String,
    ) -> Result<Measurement, KernelBenchError> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = SHAPE;
        let [seen, rows] = case.tokens();
        let layer = KvLayer { heads: kv_heads, key_dim: head_dim, value_dim: head_dim, window: None };
        let bytes_per_token = KvLayout { block_tokens: BLOCK, layers: vec![layer] }.bytes_per_token(self.kv_type);
        let layers = bench.rotated_bytes().div_ceil(seen * bytes_per_token).clamp(1, 64);
        let layout = KvLayout { block_tokens: BLOCK, layers: vec![layer; layers] };
        let blocks = seen.div_ceil(BLOCK);
        let kv = bench.backend.kv_cache(&layout, self.kv_type, blocks)?;

        let width = (heads + 2 * kv_heads) * head_dim;
        let limits = StepLimits { tokens: rows, context: seen, width, vocabulary: 1, logit_rows: 0 };
        let mut encoder = bench.backend.encoder(&limits)?;
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let values: Vec<f32> = (0..rows * width).map(|_| rng.next_u32() as i32 as f32 * (-31f32).exp2()).collect();
        let mut qkv = bench.backend.buffer(rows, width)?;
        bench.backend.upload(&mut qkv, rows, &values)?;
        let mut out = bench.backend.buffer(rows, heads * head_dim)?;
        let positions: Vec<u32> = (seen - rows..seen).map(|position| position as u32).collect();
        let tables: Vec<u32> = (0..blocks as u32).collect();
        encoder.begin(&Step {
            tokens: &vec![0; rows],
            positions: &positions,
            sequence_offsets: &[0, rows as u32],
            block_tables: &tables,
            table_offsets: &[0, blocks as u32],
            logit_rows: &[],
        });
        let seconds = bench
            .seconds(&mut encoder, |encoder, i| encoder.attention(&qkv, &SHAPE, None, &kv, i % layers, &mut out))?;
        Ok(Measurement { name, seconds, work: Some(case.work(bytes_per_token)), reads: None })
    }
}
