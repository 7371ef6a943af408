//! How fast memory is read.

use std::hint::black_box;
use std::time::Instant;

use rayon::{ThreadPoolBuildError, ThreadPoolBuilder};

use super::{caches, memory};
use crate::stats::Spread;

const MIB: usize = 1 << 20;
/// Times the buffer is read in one probe.
const PASSES: usize = 6;
/// The buffer is this much larger than all caches, so that next to nothing of it is found in them.
const CACHES: usize = 4;
const LEAST_BYTES: usize = 256 * MIB;

/// Measures how fast threads read memory.
#[derive(Debug)]
pub struct BandwidthProbe {
    threads: usize,
    bytes: usize,
    samples: Vec<f64>,
}

impl BandwidthProbe {
    /// A probe that reads with this many threads.
    pub fn new(threads: usize) -> Self {
        let cached: usize = caches().iter().filter(|cache| cache.level >= 2).map(|cache| cache.bytes).sum();
        let spare = memory().map_or(usize::MAX, |memory| usize::try_from(memory.available / 4).unwrap_or(usize::MAX));
        let bytes = cached.saturating_mul(CACHES).max(LEAST_BYTES).min(spare).max(MIB);
        Self { threads: threads.max(1), bytes, samples: Vec::new() }
    }

    /// Reads a buffer several times and keeps the rates. The buffer is gone when this returns.
    ///
    /// # Errors
    /// Threads cannot be started.
    pub fn run(&mut self) -> Result<(), ThreadPoolBuildError> {
        let pool = ThreadPoolBuilder::new().num_threads(self.threads).build()?;
        let words = self.bytes / size_of::<u64>();
        let mut buffer = vec![0u64; words];
        let share = words.div_ceil(self.threads);
        // Whoever reads a page has written it: memory that was never written has no pages of its own.
        pool.scope(|scope| {
            for part in buffer.chunks_mut(share) {
                scope.spawn(move |_| part.fill(0x5555_5555_5555_5555));
            }
        });
        let read = || {
            let started = Instant::now();
            pool.broadcast(|thread| {
                let part = buffer.chunks(share).nth(thread.index()).unwrap_or_default();
                black_box(sum(black_box(part)));
            });
            size_of_val(buffer.as_slice()) as f64 / started.elapsed().as_secs_f64()
        };
        read();
        self.samples.extend((0..PASSES).map(|_| read()));
        Ok(())
    }

    /// Threads that read.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Size of the buffer in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes a second over all runs so far; `None` before the first.
    pub fn rate(&self) -> Option<Spread> {
        Spread::of(&self.samples)
    }
}

/// Adds in as many independent sums as hide the latency of an addition.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    let (blocks, rest) = words.as_chunks::<16>();
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |total, word| total.wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_collects_rates() {
        let mut probe = BandwidthProbe { threads: 3, bytes: MIB + 8, samples: Vec::new() };
        assert!(probe.rate().is_none());
        probe.run().unwrap();
        probe.run().unwrap();
        let rate = probe.rate().unwrap();
        assert_eq!(probe.samples.len(), 2 * PASSES);
        assert!(rate.min > 0.0 && rate.min <= rate.median && rate.median <= rate.max && rate.max.is_finite());
        assert_eq!(sum(&[1; 37]), 37);
    }
}
