//! A model without weights: its next token is a hash of the tokens it finds in the KV cache.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use marlin_kernels::{
    DeviceInfo, KernelError, KvLayer, KvLayout, KvType, SampleRow, SamplingId, Step, StepLimits, TokenCount,
};
use marlin_model::{KvPool, LanguageModel, ModelError, ModelInfo, StepBatch};

/// Its vocabulary: the bytes, a few pieces, one special token.
pub(super) const VOCABULARY: usize = 260;

/// Width of its hidden states.
pub(super) const HIDDEN: usize = 2;

/// The sizes that matter to a scheduler.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) context: usize,
    pub(super) step_tokens: usize,
    pub(super) logit_rows: usize,
    pub(super) block_tokens: usize,
    pub(super) blocks: usize,
    /// Let a step start before the tokens of the last one are read.
    pub(super) overlaps: bool,
}

/// What tests see and steer while the engine owns the model.
#[derive(Debug, Default)]
pub(super) struct Wire {
    /// `(tokens, sequences, logit rows)` of each step.
    pub(super) steps: Vec<(usize, usize, usize)>,
    /// Fail the next forward pass, after it has written to the cache.
    pub(super) fail_forward: bool,
    /// Give histories with this token logits that are not finite.
    pub(super) poison: Option<u32>,
    /// Fail the next time that tokens are read.
    pub(super) fail_sample: bool,
    /// Fail the next time that blocks are read or written.
    pub(super) fail_blocks: bool,
}

#[derive(Debug)]
pub(super) struct FakeModel {
    info: ModelInfo,
    sizes: Sizes,
    kv: KvPool,
    /// The cache: the token and the position last written to each slot.
    slots: HashMap<usize, (u32, u32)>,
    /// What the last step's logit rows have seen.
    histories: Vec<Vec<u32>>,
    /// Hidden states of its tokens.
    hidden: Vec<f32>,
    /// The tokens of all samplings.
    samplings: Vec<Vec<u32>>,
    wire: Arc<Mutex<Wire>>,
}

impl FakeModel {
    pub(super) fn new(sizes: Sizes) -> (Self, Arc<Mutex<Wire>>) {
        let wire = Arc::new(Mutex::new(Wire::default()));
        // 8 bytes a token: what a slot holds.
        let layer = KvLayer { heads: 1, key_dim: 2, value_dim: 2, window: None };
        let layout = KvLayout { block_tokens: sizes.block_tokens, layers: vec![layer] };
        let info = ModelInfo {
            architecture: "Fake".into(),
            vocabulary: VOCABULARY,
            hidden_size: HIDDEN,
            context: sizes.context,
            step_tokens: sizes.step_tokens,
            logit_rows: sizes.logit_rows,
            layers: 0,
            kv_layout: layout.clone(),
            kv_type: KvType::F16,
            weight_bytes: 0,
            device: DeviceInfo { name: "fake".into(), detail: String::new() },
            host_experts: None,
            overlaps: sizes.overlaps,
        };
        let kv = KvPool::new(layout, sizes.blocks);
        (
            Self {
                info,
                sizes,
                kv,
                slots: HashMap::new(),
                histories: Vec::new(),
                hidden: Vec::new(),
                samplings: Vec::new(),
                wire: wire.clone(),
            },
            wire,
        )
    }
}

impl FakeModel {
    fn slots_of(&self, block: u32) -> std::ops::Range<usize> {
        let block_tokens = self.sizes.block_tokens;
        block as usize * block_tokens..(block as usize + 1) * block_tokens
    }
}

/// The token that follows `history`, given the random number and the counts of a row, and the token of its `last_sampled`.
pub(super) fn next_token(history: &[u32], row: &SampleRow<'_>, last: Option<u32>) -> u32 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut mix = |value: u32| hash = (hash ^ u64::from(value)).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
    history.iter().for_each(|&token| mix(token));
    if row.temperature > 0.0 {
        mix(row.uniform.to_bits());
    }
    let unseen = last.filter(|&last| row.counts.iter().all(|count| count.token != last));
    let unseen = unseen.map(|token| TokenCount { token, generated: 0 });
    for count in row.counts.iter().chain(&unseen) {
        mix(count.token);
        mix(count.generated + u32::from(last == Some(count.token)));
    }
    let mut token = (hash >> 20) as u32 % VOCABULARY as u32;
    let is_allowed = |token: u32| row.allowed.is_none_or(|mask| mask[token as usize / 32] >> (token % 32) & 1 == 1);
    while row.bias.contains(&(token, f32::NEG_INFINITY)) || !is_allowed(token) {
        token = (token + 1) % VOCABULARY as u32;
    }
    token
}

/// The hidden state of a token at a position.
pub(super) fn hidden_state(token: u32, position: u32) -> [f32; HIDDEN] {
    [token as f32, position as f32]
}

/// What comes after a history: its greedy token first, then the others by a hash.
pub(super) fn logits(history: &[u32]) -> Vec<f32> {
    let likeliest = next_token(history, &SampleRow::GREEDY, None);
    let logit = |token: u32| if token == likeliest { 9.0 } else { ((token * 7919 + likeliest) % 1009) as f32 / 200.0 };
    (0..VOCABULARY as u32).map(logit).collect()
}

impl LanguageModel for FakeModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn kv(&mut self) -> &mut KvPool {
        &mut self.kv
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<(), ModelError> {
        let step = batch.as_step();
        let Sizes { context, step_tokens, logit_rows, block_tokens, blocks, .. } = self.sizes;
        let limits = StepLimits { tokens: step_tokens, context, width: 1, vocabulary: VOCABULARY, logit_rows };
        let last_sampled = self.samplings.last().map_or(&[][..], |tokens| tokens);
        step.validate(&limits, &self.info.kv_layout, blocks, last_sampled.len())?;
        assert!(!step.tokens.is_empty(), "an empty step");
        assert!(step.logit_rows.len() <= logit_rows, "more logits than there is room for");

        for &(from, to) in self.kv.pending_copies() {
            for place in 0..block_tokens {
                let slot = |block: u32| block as usize * block_tokens + place;
                if let Some(&held) = self.slots.get(&slot(from)) {
                    self.slots.insert(slot(to), held);
                }
            }
        }
        self.kv.finish_copies();
        let slot = |s: usize, position: u32| {
            step.table(s)[position as usize / block_tokens] as usize * block_tokens + position as usize % block_tokens
        };
        self.hidden.clear();
        for s in 0..step.sequences() {
            for row in step.rows(s) {
                let token = match step.tokens[row].checked_sub(Step::SAMPLED) {
                    Some(row) => last_sampled[row as usize],
                    None => step.tokens[row],
                };
                self.slots.insert(slot(s, step.positions[row]), (token, step.positions[row]));
                self.hidden.extend(hidden_state(token, step.positions[row]));
            }
        }
        self.histories.clear();
        for &row in step.logit_rows {
            let s = (0..step.sequences()).find(|&s| step.rows(s).contains(&(row as usize))).unwrap();
            let history = (0..=step.positions[row as usize]).map(|position| {
                let &(token, written) = self.slots.get(&slot(s, position)).expect("a slot was never written");
                assert_eq!(written, position, "a slot holds another position");
                token
            });
            self.histories.push(history.collect());
        }
        let mut wire = self.wire.lock().unwrap();
        wire.steps.push((step.tokens.len(), step.sequences(), step.logit_rows.len()));
        fail(&mut wire.fail_forward)
    }

    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.clear();
        self.histories.iter().for_each(|history| out.extend(logits(history)));
        Ok(())
    }

    fn read_hidden(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.clone_from(&self.hidden);
        Ok(())
    }

    fn wait(&mut self) -> Result<(), ModelError> {
        Ok(())
    }

    fn sample(&mut self, rows: &[SampleRow<'_>]) -> Result<SamplingId, ModelError> {
        assert_eq!(rows.len(), self.histories.len());
        let poison = self.wire.lock().unwrap().poison;
        let last_sampled = self.samplings.last();
        let choose = |(history, row): (&Vec<u32>, &SampleRow<'_>)| {
            let last = row.last_sampled.map(|row| last_sampled.unwrap()[row as usize]);
            let is_poisoned = poison.is_some_and(|poison| history.contains(&poison));
            if is_poisoned { SampleRow::NOT_FINITE } else { next_token(history, row, last) }
        };
        let tokens = self.histories.iter().zip(rows).map(choose).collect();
        self.samplings.push(tokens);
        Ok(SamplingId(self.samplings.len() as u64 - 1))
    }

    fn sampled(&mut self, sampling: SamplingId, tokens: &mut [u32]) -> Result<(), ModelError> {
        assert!(self.samplings.len() as u64 - sampling.0 <= 2, "a device keeps two samplings");
        tokens.copy_from_slice(&self.samplings[sampling.0 as usize]);
        fail(&mut self.wire.lock().unwrap().fail_sample)
    }

    fn read_kv_blocks(&mut self, blocks: &[u32], out: &mut [u8]) -> Result<(), ModelError> {
        let slots = blocks.iter().flat_map(|&block| self.slots_of(block));
        for (slot, out) in slots.zip(out.chunks_exact_mut(8)) {
            let &(token, position) = self.slots.get(&slot).unwrap_or(&(u32::MAX, u32::MAX));
            out[..4].copy_from_slice(&token.to_le_bytes());
            out[4..].copy_from_slice(&position.to_le_bytes());
        }
        fail(&mut self.wire.lock().unwrap().fail_blocks)
    }

    fn write_kv_blocks(&mut self, blocks: &[u32], bytes: &[u8]) -> Result<(), ModelError> {
        assert_eq!(bytes.len(), blocks.len() * self.info.kv_block_bytes());
        let slots: Vec<usize> = blocks.iter().flat_map(|&block| self.slots_of(block)).collect();
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        for (slot, bytes) in slots.into_iter().zip(bytes.chunks_exact(8)) {
            self.slots.insert(slot, (number(&bytes[..4]), number(&bytes[4..])));
        }
        fail(&mut self.wire.lock().unwrap().fail_blocks)
    }
}

fn fail(flag: &mut bool) -> Result<(), ModelError> {
    if std::mem::take(flag) {
        return Err(KernelError::Device("the device fell over".into()).into());
    }
    Ok(())
}
