//! What the rows of the table share: random data, ragged steps, the comparison.

use std::ops::Range;

use super::{Device, ErrorFound};
use crate::reference::ReferenceBackend;
use crate::{Backend, Encoder, KvLayout, KvType, Step, StepLimits};

/// One computation, which every backend can run.
pub(crate) trait Case {
    /// Runs it with poisoned outputs and scratch, and reads what it wrote.
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32>;

    /// The mean square that errors are measured against: that of the expected values, unless their own size says little
    /// (a single output may be small by cancellation).
    fn energy(&self, expected: &[f32]) -> f64 {
        mean_square(expected.iter().map(|&y| f64::from(y)))
    }
}

impl<B: Backend> Device<B> {
    /// Runs a case on the device and on the reference, and compares: the mean squared error, normalised, is at most `bound`.
    pub(crate) fn check(&self, case: &impl Case, bound: f64, what: &str) -> Result<(), String> {
        let found = case.run(&*self.backend);
        if !self.compares {
            return Ok(());
        }
        let expected = case.run(&ReferenceBackend);
        if expected.len() != found.len() {
            return Err(format!("{what}: {} values, expected {}", found.len(), expected.len()));
        }
        if let Some(i) = expected.iter().position(|y| !y.is_finite()) {
            return Err(format!("{what}: the reference gives {} at {i}, which compares with nothing", expected[i]));
        }
        if let Some(i) = found.iter().position(|y| y.is_nan()) {
            return Err(format!(
                "{what}: value {i} of {} is not a number: not written, or made from poison",
                found.len()
            ));
        }
        let error = mean_square(expected.iter().zip(&found).map(|(&e, &f)| f64::from(f) - f64::from(e)));
        let nmse = if error == 0.0 { 0.0 } else { error / case.energy(&expected) };
        self.note(ErrorFound { nmse, bound });
        if nmse <= bound {
            return Ok(());
        }
        let worst = (0..found.len()).max_by(|&a, &b| {
            let error = |i: usize| (found[i] - expected[i]).abs();
            error(a).total_cmp(&error(b))
        });
        let worst = worst.map_or(String::new(), |i| format!("; value {i} is {}, expected {}", found[i], expected[i]));
        Err(format!("{what}: NMSE {nmse:.2e} exceeds {bound:.0e}{worst}"))
    }
}

pub(crate) fn mean_square(values: impl Iterator<Item = f64>) -> f64 {
    let (count, sum) = values.fold((0usize, 0.0), |(count, sum), value| (count + 1, sum + value * value));
    sum / count.max(1) as f64
}

/// SplitMix64 (Steele, Lea & Flood 2014).
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In [0, 1).
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// About normal: mean 0, variance 1.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    pub(crate) fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// Limits that just fit. No sequence of the table is longer: what encoders keep for attention grows with the context.
pub(crate) fn limits(tokens: usize, width: usize) -> StepLimits {
    StepLimits { tokens, context: 512, width, vocabulary: 1 << 20, logit_rows: 0 }
}

/// A buffer with these rows.
pub(crate) fn upload<B: Backend>(backend: &B, width: usize, values: &[f32]) -> B::Buffer {
    let rows = values.len() / width;
    let mut buffer = backend.buffer(rows, width).expect("a buffer");
    backend.upload(&mut buffer, rows, values).expect("values that fill it");
    buffer
}

/// A buffer full of NaN.
pub(crate) fn poisoned<B: Backend>(backend: &B, rows: usize, width: usize) -> B::Buffer {
    upload(backend, width, &vec![f32::NAN; rows * width])
}

/// Waits for all operations and reads a buffer of `count` values.
pub(crate) fn read<B: Backend>(encoder: &mut B::Encoder, buffer: &B::Buffer, count: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; count];
    encoder.submit().expect("a submission");
    encoder.read(buffer, &mut values).expect("a buffer of as many values");
    values
}

/// Sequences in a paged cache, whose blocks lie in no particular order.
pub(crate) struct Pages {
    block_tokens: usize,
    tables: Vec<Vec<u32>>,
    /// How many blocks sequences are spread over; one of them belongs to none.
    pub(crate) blocks: usize,
}

impl Pages {
    /// Room for sequences of these lengths.
    pub(crate) fn new(block_tokens: usize, lengths: &[usize], rng: &mut Rng) -> Self {
        let blocks = lengths.iter().map(|length| length.div_ceil(block_tokens)).sum::<usize>() + 1;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, rng.below(i + 1));
        }
        let tables = lengths.iter().map(|length| free.split_off(free.len() - length.div_ceil(block_tokens))).collect();
        Self { block_tokens, tables, blocks }
    }

    /// The same sequences in the next `blocks` blocks of a larger pool, and the copies that move them there.
    pub(crate) fn moved(&self) -> (Self, Vec<(u32, u32)>) {
        let shift = self.blocks as u32;
        let tables = self.tables.iter().map(|table| table.iter().map(|block| block + shift).collect()).collect();
        let pairs = self.tables.iter().flatten().map(|&block| (block, block + shift)).collect();
        (Self { tables, ..*self }, pairs)
    }

    /// A step that brings these positions of each sequence.
    pub(crate) fn step(&self, positions: &[Range<usize>]) -> Ragged {
        Ragged::new(&self.tables, positions)
    }

    /// A step that writes every slot of these blocks.
    pub(crate) fn all_slots(&self) -> Ragged {
        let slots = 0..self.blocks * self.block_tokens;
        Ragged::new(&[(0..self.blocks as u32).collect()], std::slice::from_ref(&slots))
    }
}

/// How blocks of a cache come to lie elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moves {
    /// They are copied.
    OnDevice,
    /// They are read by the host and written elsewhere.
    ThroughHost,
    /// They were computed and read on the reference, and are written here: their order is the same on all devices.
    FromReference,
}

/// The bytes of blocks.
pub(crate) fn read_blocks<B: Backend>(
    encoder: &mut B::Encoder,
    kv: &B::KvCache,
    layout: &KvLayout,
    kv_type: KvType,
    blocks: &[u32],
) -> Vec<u8> {
    let mut bytes = vec![0xa5; layout.pool_bytes(kv_type, blocks.len())];
    encoder.read_kv_blocks(kv, blocks, &mut bytes).expect("blocks that can be read");
    bytes
}

/// A step that owns its arrays.
pub(crate) struct Ragged {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    sequence_offsets: Vec<u32>,
    block_tables: Vec<u32>,
    table_offsets: Vec<u32>,
    pub(crate) logit_rows: Vec<u32>,
}

impl Ragged {
    fn new(tables: &[Vec<u32>], positions: &[Range<usize>]) -> Self {
        let offsets = |lengths: &mut dyn Iterator<Item = usize>| {
            let mut end = 0;
            let ends = lengths.map(|length| {
                end += length as u32;
                end
            });
            std::iter::once(0).chain(ends).collect()
        };
        let tokens = positions.iter().map(Range::len).sum();
        Self {
            tokens: vec![0; tokens],
            positions: positions.iter().flat_map(|range| range.clone().map(|p| p as u32)).collect(),
            sequence_offsets: offsets(&mut positions.iter().map(Range::len)),
            block_tables: tables.concat(),
            table_offsets: offsets(&mut tables.iter().map(Vec::len)),
            logit_rows: Vec::new(),
        }
    }

    /// One sequence that brings these tokens; it uses no cache.
    pub(crate) fn of_tokens(tokens: Vec<u32>, first_position: usize) -> Self {
        let positions = first_position..first_position + tokens.len();
        Self { tokens, ..Self::new(&[Vec::new()], &[positions]) }
    }

    pub(crate) fn rows(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn step(&self) -> Step<'_> {
        Step {
            tokens: &self.tokens,
            positions: &self.positions,
            sequence_offsets: &self.sequence_offsets,
            block_tables: &self.block_tables,
            table_offsets: &self.table_offsets,
            logit_rows: &self.logit_rows,
        }
    }
}
