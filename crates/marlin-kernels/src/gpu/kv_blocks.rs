//! KV blocks between the device and the host, as bytes.

use half::f16;

use super::device::{Gpu, Storage};
use super::recorder::Recorder;
use super::{GpuKvCache, kv::GpuKvPlane};
use crate::KernelError;

/// One head's share of a storage: its blocks lie one after the other.
struct Span<'a> {
    storage: &'a Storage,
    /// Where its first block begins.
    start: u64,
    /// Bytes of a block.
    block: usize,
}

impl GpuKvCache {
    /// All of a block, in the order of [`Encoder::read_kv_blocks`](crate::Encoder::read_kv_blocks).
    fn spans(&self) -> Result<Vec<Span<'_>>, KernelError> {
        let mut spans = Vec::new();
        for layer in &self.layers {
            for plane in [&layer.keys, &layer.values] {
                for (storage, slot) in self.storages(plane) {
                    let block = self.block_tokens * slot;
                    if !block.is_multiple_of(size_of::<u32>()) {
                        return Err(KernelError::Device(format!(
                            "a GPU moves KV blocks in whole words, and {} tokens of {slot} bytes are none; \
                             use blocks of an even number of tokens",
                            self.block_tokens
                        )));
                    }
                    let head = self.slots() * slot;
                    spans.extend((0..layer.heads).map(|h| Span { storage, start: (h * head) as u64, block }));
                }
            }
        }
        Ok(spans)
    }

    /// What a plane stores, and bytes of one head's slot of it.
    fn storages<'a>(&self, plane: &'a GpuKvPlane) -> impl Iterator<Item = (&'a Storage, usize)> {
        let values = (&plane.storage, plane.words(self.kv_type) * size_of::<u32>());
        let scale_bytes = plane.scales_of_head(self.kv_type) * size_of::<f16>();
        let scales = plane.scales.as_ref().map(|scales| (scales, scale_bytes));
        // There is memory for a plane of no width, too, but nothing in it.
        [Some(values), scales].into_iter().flatten().filter(|(_, slot)| *slot > 0)
    }
}

/// What is moved: the spans of the cache, each with its place in a block, and the runs of blocks that lie side by side.
struct Move<'a> {
    spans: Vec<Span<'a>>,
    /// First block of a run, and blocks.
    runs: Vec<(u32, usize)>,
    blocks: usize,
    block_bytes: usize,
}

impl<'a> Move<'a> {
    fn new(kv: &'a GpuKvCache, blocks: &[u32], bytes: usize) -> Result<Self, KernelError> {
        let spans = kv.spans()?;
        let block_bytes = spans.iter().map(|span| span.block).sum();
        assert_eq!(bytes, blocks.len() * block_bytes, "bytes of {} KV blocks", blocks.len());
        assert!(blocks.iter().all(|&block| (block as usize) < kv.blocks), "blocks of the cache");
        let runs = blocks.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0], run.len())).collect();
        Ok(Self { spans, runs, blocks: blocks.len(), block_bytes })
    }

    /// The copies between the cache and a staging buffer, in which all blocks of a span lie together: storage, place there, place in the staging buffer, bytes.
    fn copies(&self) -> impl Iterator<Item = (&'a Storage, u64, u64, u64)> {
        let mut place = 0;
        let pairs = self.spans.iter().flat_map(|span| self.runs.iter().map(move |run| (span, run)));
        pairs.map(move |(span, &(first, count))| {
            let bytes = (count * span.block) as u64;
            place += bytes;
            (span.storage, span.start + u64::from(first) * span.block as u64, place - bytes, bytes)
        })
    }

    /// Tells for each part of each block its place in the staging buffer, its place among whole blocks, and its bytes.
    fn each_part(&self, mut copy: impl FnMut(usize, usize, usize)) {
        let (mut staged, mut in_block) = (0, 0);
        for span in &self.spans {
            for block in 0..self.blocks {
                copy(staged, block * self.block_bytes + in_block, span.block);
                staged += span.block;
            }
            in_block += span.block;
        }
    }
}

/// Reads blocks, after what is recorded.
pub(super) fn read(
    gpu: &Gpu,
    recorder: &mut Recorder,
    kv: &GpuKvCache,
    blocks: &[u32],
    out: &mut [u8],
) -> Result<(), KernelError> {
    let moved = Move::new(kv, blocks, out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    let readback = gpu.readback("KV blocks", out.len() as u64);
    let submission = recorder.flush_and(|commands| {
        for (storage, from, to, bytes) in moved.copies() {
            commands.copy_buffer_to_buffer(&storage.buffer, from, &readback, to, bytes);
        }
    });
    let mut staged = vec![0; out.len()];
    gpu.read_mapped(&readback, Some(submission), &mut staged)?;
    moved.each_part(|from, to, bytes| out[to..to + bytes].copy_from_slice(&staged[from..from + bytes]));
    Ok(())
}

/// Writes blocks, after what is recorded and before what follows.
pub(super) fn write(
    gpu: &Gpu,
    recorder: &mut Recorder,
    kv: &GpuKvCache,
    blocks: &[u32],
    bytes: &[u8],
) -> Result<(), KernelError> {
    let moved = Move::new(kv, blocks, bytes.len())?;
    if bytes.is_empty() {
        return Ok(());
    }
    let mut staged = vec![0; bytes.len()];
    moved.each_part(|to, from, count| staged[to..to + count].copy_from_slice(&bytes[from..from + count]));
    let staging = gpu.staging("KV blocks", &staged)?;
    recorder.flush_and(|commands| {
        for (storage, to, from, count) in moved.copies() {
            commands.copy_buffer_to_buffer(&staging, from, &storage.buffer, to, count);
        }
    });
    gpu.check()
}
