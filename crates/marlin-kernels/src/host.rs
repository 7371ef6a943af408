//! Storage of devices whose memory is the host's: activations, KV blocks, the current step.

use std::ops::Range;

use bytemuck::Zeroable;
use half::f16;

use crate::kv_codes::KvCodes;
use crate::sampling::host::token_of;
use crate::{KernelError, KvLayout, KvType, Step};

/// Gives the memory of what was dropped back to the system, of which glibc keeps pieces of up to 32 MiB for itself: most matrices of a
/// model.
pub fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Activations `[rows, width]` in host memory, row-major.
#[derive(Debug, Clone)]
pub struct HostBuffer {
    values: Vec<f32>,
    capacity: usize,
    width: usize,
    rows: usize,
}

impl HostBuffer {
    /// A buffer of at most `capacity` rows, none of them filled yet.
    pub(crate) fn new(capacity: usize, width: usize, device: &str) -> Result<Self, KernelError> {
        let values = allocate("an activation buffer", &[capacity, width], device)?;
        Ok(Self { values, capacity, width, rows: 0 })
    }

    /// Rows it holds now.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The rows it holds now, `[rows, width]`.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.rows * self.width]
    }

    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.rows * self.width]
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values()[row * self.width..][..self.width]
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let width = self.width;
        &mut self.values_mut()[row * width..][..width]
    }

    /// The first `width` values of each row, as rows of their own.
    pub(crate) fn first_columns(&self, width: usize) -> Self {
        let values = self.values().chunks_exact(self.width.max(1)).flat_map(|row| &row[..width]).copied().collect();
        Self { values, capacity: self.rows, width, rows: self.rows }
    }

    /// Makes this the output of an operation: `rows` rows, which must be `width` wide. Their old values are still in place.
    pub(crate) fn output(&mut self, rows: usize, width: usize) -> &mut [f32] {
        assert_eq!(self.width, width, "an output buffer of this width");
        assert!(rows <= self.capacity, "{rows} rows for a buffer of {}", self.capacity);
        self.rows = rows;
        self.values_mut()
    }

    /// Makes it hold `rows` rows, `[rows, width]`, for the caller to fill.
    ///
    /// # Errors
    /// It has no room for as many.
    pub fn fill(&mut self, rows: usize) -> Result<&mut [f32], KernelError> {
        if rows > self.capacity {
            let Self { capacity, width, .. } = *self;
            return Err(KernelError::BufferShape { found: rows.saturating_mul(width), rows, width, capacity });
        }
        self.rows = rows;
        Ok(self.values_mut())
    }

    pub(crate) fn upload(&mut self, rows: usize, values: &[f32]) -> Result<(), KernelError> {
        let Self { capacity, width, .. } = *self;
        if rows.checked_mul(width) != Some(values.len()) {
            return Err(KernelError::BufferShape { found: values.len(), rows, width, capacity });
        }
        self.fill(rows)?.copy_from_slice(values);
        Ok(())
    }

    pub(crate) fn read(&self, out: &mut [f32]) -> Result<(), KernelError> {
        let (rows, width, capacity) = (self.rows, self.width, self.capacity);
        if out.len() != rows * width {
            return Err(KernelError::BufferShape { found: out.len(), rows, width, capacity });
        }
        out.copy_from_slice(self.values());
        Ok(())
    }
}

/// A pool of KV blocks in host memory.
#[derive(Debug)]
pub struct HostKvCache {
    pub(crate) block_tokens: usize,
    pub(crate) layers: Vec<HostKvLayer>,
}

/// Keys and values of one layer.
#[derive(Debug)]
pub(crate) struct HostKvLayer {
    pub(crate) keys: KvPlane,
    pub(crate) values: KvPlane,
}

/// `[heads, slots, dim]`: each head's slots (blocks × tokens of a block) lie together, so that heads can be written and read
/// independently.
#[derive(Debug)]
pub(crate) struct KvPlane {
    pub(crate) slots: usize,
    pub(crate) dim: usize,
    pub(crate) data: KvData,
}

/// Cached values in their number format.
#[derive(Debug)]
pub(crate) enum KvData {
    F16(Vec<f16>),
    F32(Vec<f32>),
    Codes(KvCodes),
}

impl HostKvCache {
    pub(crate) fn new(layout: &KvLayout, kv_type: KvType, blocks: usize, device: &str) -> Result<Self, KernelError> {
        layout.check()?;
        let slots = blocks.saturating_mul(layout.block_tokens);
        let plane = |heads, dim| KvPlane::new(kv_type, heads, slots, dim, device);
        let layers = layout.layers.iter().map(|layer| {
            Ok(HostKvLayer { keys: plane(layer.heads, layer.key_dim)?, values: plane(layer.heads, layer.value_dim)? })
        });
        let layers = layers.collect::<Result<_, KernelError>>()?;
        Ok(Self { block_tokens: layout.block_tokens, layers })
    }

    /// Copies blocks `(from, to)` of every layer, one pair after the other.
    pub(crate) fn copy_blocks(&mut self, pairs: &[(u32, u32)]) {
        let block_tokens = self.block_tokens;
        for plane in self.layers.iter_mut().flat_map(|layer| [&mut layer.keys, &mut layer.values]) {
            let (block, head) = (block_tokens * plane.dim, plane.slots * plane.dim);
            match &mut plane.data {
                KvData::F16(data) => copy_blocks(data, head, block, pairs),
                KvData::F32(data) => copy_blocks(data, head, block, pairs),
                KvData::Codes(codes) => codes.copy_blocks(plane.slots, block_tokens, pairs),
            }
        }
    }

    /// Reads blocks of all layers, see [`Encoder::read_kv_blocks`](crate::Encoder::read_kv_blocks).
    pub(crate) fn read_blocks(&self, blocks: &[u32], out: &mut [u8]) {
        let sections: Vec<Section<&[u8]>> = self.planes().flat_map(|plane| plane.sections(self.block_tokens)).collect();
        each_part(&sections, blocks, out.len(), |section, source, place| {
            out[place].copy_from_slice(&sections[section].bytes[source]);
        });
    }

    /// Writes blocks of all layers, see [`Encoder::write_kv_blocks`](crate::Encoder::write_kv_blocks).
    pub(crate) fn write_blocks(&mut self, blocks: &[u32], bytes: &[u8]) {
        let block_tokens = self.block_tokens;
        let planes = self.layers.iter_mut().flat_map(|layer| [&mut layer.keys, &mut layer.values]);
        let mut sections: Vec<Section<&mut [u8]>> = planes.flat_map(|plane| plane.sections_mut(block_tokens)).collect();
        let sizes: Vec<Section<()>> = sections.iter().map(Section::size).collect();
        each_part(&sizes, blocks, bytes.len(), |section, target, place| {
            sections[section].bytes[target].copy_from_slice(&bytes[place]);
        });
    }

    fn planes(&self) -> impl Iterator<Item = &KvPlane> {
        self.layers.iter().flat_map(|layer| [&layer.keys, &layer.values])
    }
}

/// Values or scales of a plane, as bytes: of each head the blocks, one after the other.
struct Section<T> {
    bytes: T,
    heads: usize,
    /// Blocks of a head.
    blocks: usize,
    /// Bytes of a block of one head.
    block: usize,
}

impl<T: AsRef<[u8]>> Section<T> {
    /// Of `slots` slots of each head, `slot` bytes of a head's slot.
    fn new(bytes: T, slots: usize, slot: usize, block_tokens: usize) -> Self {
        let heads = bytes.as_ref().len().checked_div(slots * slot).unwrap_or(0);
        Self { bytes, heads, blocks: slots / block_tokens, block: block_tokens * slot }
    }

    fn size(&self) -> Section<()> {
        Section { bytes: (), heads: self.heads, blocks: self.blocks, block: self.block }
    }
}

/// Calls `copy` with each part of each block: the section, the part's place in it, and its place among `bytes` bytes of blocks.
fn each_part<T>(
    sections: &[Section<T>],
    blocks: &[u32],
    bytes: usize,
    mut copy: impl FnMut(usize, Range<usize>, Range<usize>),
) {
    let block_bytes: usize = sections.iter().map(|section| section.heads * section.block).sum();
    assert_eq!(bytes, blocks.len() * block_bytes, "bytes of {} KV blocks", blocks.len());
    let mut place = 0;
    for &block in blocks {
        for (index, section) in sections.iter().enumerate() {
            assert!((block as usize) < section.blocks, "KV block {block} of {}", section.blocks);
            for head in 0..section.heads {
                let start = (head * section.blocks + block as usize) * section.block;
                copy(index, start..start + section.block, place..place + section.block);
                place += section.block;
            }
        }
    }
}

/// Copies `block` values from and to where a pair says, of each `head` values.
pub(crate) fn copy_blocks<T: Copy>(data: &mut [T], head: usize, block: usize, pairs: &[(u32, u32)]) {
    if head == 0 {
        return;
    }
    for head in data.chunks_exact_mut(head) {
        for &(from, to) in pairs {
            let from = from as usize * block;
            head.copy_within(from..from + block, to as usize * block);
        }
    }
}

impl KvPlane {
    fn new(kv_type: KvType, heads: usize, slots: usize, dim: usize, device: &str) -> Result<Self, KernelError> {
        let (what, sizes) = ("the KV cache", [heads, slots, dim]);
        let data = match kv_type.code() {
            None if kv_type == KvType::F32 => KvData::F32(allocate(what, &sizes, device)?),
            None => KvData::F16(allocate(what, &sizes, device)?),
            Some(code) => KvData::Codes(KvCodes::new(code, heads.saturating_mul(slots), dim, device)?),
        };
        Ok(Self { slots, dim, data })
    }

    /// Its values, and the scales of codes.
    fn sections(&self, block_tokens: usize) -> Vec<Section<&[u8]>> {
        let section = |bytes, slot| Section::new(bytes, self.slots, slot, block_tokens);
        match &self.data {
            KvData::F16(data) => vec![section(bytemuck::cast_slice(data), self.dim * size_of::<f16>())],
            KvData::F32(data) => vec![section(bytemuck::cast_slice(data), self.dim * size_of::<f32>())],
            KvData::Codes(codes) => codes.bytes().into_iter().map(|(bytes, row)| section(bytes, row)).collect(),
        }
    }

    /// The same, to be written.
    fn sections_mut(&mut self, block_tokens: usize) -> Vec<Section<&mut [u8]>> {
        let Self { slots, dim, data } = self;
        let section = |bytes, slot| Section::new(bytes, *slots, slot, block_tokens);
        match data {
            KvData::F16(data) => vec![section(bytemuck::cast_slice_mut(data), *dim * size_of::<f16>())],
            KvData::F32(data) => vec![section(bytemuck::cast_slice_mut(data), *dim * size_of::<f32>())],
            KvData::Codes(codes) => codes.bytes_mut().into_iter().map(|(bytes, row)| section(bytes, row)).collect(),
        }
    }

    /// Where the `dim` values of a head's slot lie.
    pub(crate) fn range(&self, head: usize, slot: usize) -> Range<usize> {
        let start = self.row(head, slot) * self.dim;
        start..start + self.dim
    }

    /// Index of a head's slot among those of all heads.
    pub(crate) fn row(&self, head: usize, slot: usize) -> usize {
        assert!(slot < self.slots, "KV slot {slot} of {}", self.slots);
        head * self.slots + slot
    }
}

/// The host's copy of a step.
#[derive(Debug, Default)]
pub(crate) struct HostStep {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) logit_rows: Vec<u32>,
    sequence_offsets: Vec<u32>,
    block_tables: Vec<u32>,
    table_offsets: Vec<u32>,
}

impl HostStep {
    /// Takes over a step, reusing the memory of the one before; `sampled` are the tokens of the last sampling.
    pub(crate) fn begin(&mut self, step: &Step<'_>, sampled: &[u32]) {
        let copy = |to: &mut Vec<u32>, from: &[u32]| {
            to.clear();
            to.extend_from_slice(from);
        };
        copy(&mut self.tokens, step.tokens);
        for token in self.tokens.iter_mut().filter(|token| **token >= Step::SAMPLED) {
            let row = *token - Step::SAMPLED;
            // Where there was no choice, any token will do.
            *token = token_of(sampled, Some(row)).unwrap_or(0);
        }
        copy(&mut self.positions, step.positions);
        copy(&mut self.logit_rows, step.logit_rows);
        copy(&mut self.sequence_offsets, step.sequence_offsets);
        copy(&mut self.block_tables, step.block_tables);
        copy(&mut self.table_offsets, step.table_offsets);
    }

    /// Number of tokens, T.
    pub(crate) fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Number of sequences, S.
    pub(crate) fn sequences(&self) -> usize {
        self.sequence_offsets.len().saturating_sub(1)
    }

    /// Rows of a sequence.
    pub(crate) fn rows_of(&self, sequence: usize) -> Range<usize> {
        self.sequence_offsets[sequence] as usize..self.sequence_offsets[sequence + 1] as usize
    }

    /// Every row, with the sequence it belongs to.
    pub(crate) fn sequence_rows(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.sequences()).flat_map(|sequence| self.rows_of(sequence).map(move |row| (sequence, row)))
    }

    /// The cache slot of a position of a sequence.
    pub(crate) fn slot(&self, sequence: usize, position: usize, block_tokens: usize) -> usize {
        let table = self.table_offsets[sequence] as usize..self.table_offsets[sequence + 1] as usize;
        let block = self.block_tables[table][position / block_tokens] as usize;
        block * block_tokens + position % block_tokens
    }
}

/// The positions that a query at `position` sees: itself and what lies before, within the window.
pub(crate) fn visible(position: usize, window: Option<usize>) -> Range<usize> {
    let end = position + 1;
    end.saturating_sub(window.unwrap_or(end))..end
}

/// Zeroed memory of the product of `sizes` values, or an error that says how much was wanted.
pub(crate) fn allocate<T: Zeroable>(what: &str, sizes: &[usize], device: &str) -> Result<Vec<T>, KernelError> {
    let count = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    let error = || KernelError::OutOfMemory {
        what: what.to_owned(),
        bytes: count.unwrap_or(usize::MAX).saturating_mul(size_of::<T>()),
        device: device.to_owned(),
    };
    count.and_then(|count| bytemuck::allocation::try_zeroed_vec(count).ok()).ok_or_else(error)
}
