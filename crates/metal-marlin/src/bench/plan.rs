//! What is to be measured: tests, in their order and with their names.

use std::num::NonZeroUsize;

use marlin_checkpoint::Checkpoint;
use marlin_kernels::KvType;

use crate::load;

const USUAL_DEPTHS: [usize; 3] = [0, 1024, 4096];

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Lengths of prompts to prefill.
    pub prefill: Vec<usize>,
    /// Tokens that each stream decodes, one after the other, at each depth; 0 decodes nothing.
    pub decode: usize,
    /// Tokens that are already in the KV cache when decoding begins.
    pub depths: Vec<usize>,
    /// Numbers of sequences that decode side by side, each number tested at each depth.
    pub streams: Vec<NonZeroUsize>,
    /// How often each test is repeated, at least once.
    pub repetitions: usize,
    /// Number format of the KV cache.
    pub kv_type: KvType,
    /// Whether each kernel of a step is timed, too, after the tests.
    pub profile: bool,
    /// Whether a CPU's order of the weights of a model folder is kept for the next time ([`crate::tile_cache`]).
    pub keep: bool,
    /// Whether the report is for a [`roofline`](super::roofline), which needs a device with a known peak.
    pub roofline: bool,
}

/// A test: what is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// A prompt of so many tokens in an empty context, with the logits of its last token.
    Prefill(usize),
    /// Tokens one after the other, each with its logits, of one sequence or of several in one step.
    Decode {
        /// How many of each sequence.
        tokens: usize,
        /// Tokens of each sequence in the KV cache before the first.
        depth: usize,
        /// Sequences that decode side by side.
        streams: usize,
    },
}

impl Plan {
    /// The tests in their order.
    pub fn tests(&self) -> Vec<Test> {
        let prefill = self.prefill.iter().filter(|tokens| **tokens > 0).map(|tokens| Test::Prefill(*tokens));
        let mut depths = self.depths.clone();
        // The KV cache of one depth is the beginning of the next one's.
        depths.sort_unstable();
        depths.dedup();
        let mut streams: Vec<usize> = self.streams.iter().map(|streams| streams.get()).collect();
        streams.sort_unstable();
        streams.dedup();
        let at = |depth| streams.iter().map(move |&streams| Test::Decode { tokens: self.decode, depth, streams });
        let decode = depths.into_iter().flat_map(at);
        prefill.chain(decode.filter(|_| self.decode > 0)).collect()
    }
}

impl Test {
    /// Tokens of each sequence that are timed.
    pub fn tokens(self) -> usize {
        match self {
            Self::Prefill(tokens) | Self::Decode { tokens, .. } => tokens,
        }
    }

    /// Tokens of each sequence in the KV cache before those that are timed.
    pub fn depth(self) -> usize {
        match self {
            Self::Prefill(_) => 0,
            Self::Decode { depth, .. } => depth,
        }
    }

    /// Sequences that run side by side.
    pub fn streams(self) -> usize {
        match self {
            Self::Prefill(_) => 1,
            Self::Decode { streams, .. } => streams,
        }
    }

    /// The context that each of its sequences needs.
    pub(super) fn context(self) -> usize {
        self.depth().saturating_add(self.tokens())
    }
}

impl std::fmt::Display for Test {
    /// The names of llama-bench, with the number of streams if there are several: `pp512`, `tg64`, `tg64 @ d1024`,
    /// `tg64 x32 @ d1024`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Prefill(tokens) => write!(f, "pp{tokens}")?,
            Self::Decode { tokens, .. } => write!(f, "tg{tokens}")?,
        }
        if self.streams() > 1 {
            write!(f, " x{}", self.streams())?;
        }
        if self.depth() > 0 {
            write!(f, " @ d{}", self.depth())?;
        }
        Ok(())
    }
}

/// Depths to measure where none are asked for: 0, 1024 and 4096, as far as the model's context allows.
pub fn usual_depths(checkpoint: &Checkpoint, decode: usize) -> Vec<usize> {
    let context = load::allowed_context(checkpoint).unwrap_or(0);
    USUAL_DEPTHS.into_iter().filter(|&depth| depth == 0 || depth.saturating_add(decode) <= context).collect()
}

#[cfg(test)]
mod tests {
    use super::super::random::made;
    use super::*;

    #[test]
    fn tests_are_named_as_in_llama_bench_and_ordered_by_depth() {
        let plan = Plan {
            prefill: vec![128, 0, 64],
            decode: 8,
            depths: vec![1024, 0, 1024],
            streams: [32, 1, 32].map(|streams| NonZeroUsize::new(streams).unwrap()).to_vec(),
            repetitions: 1,
            kv_type: KvType::F16,
            profile: false,
            keep: false,
            roofline: false,
        };
        let names: Vec<String> = plan.tests().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["pp128", "pp64", "tg8", "tg8 x32", "tg8 @ d1024", "tg8 x32 @ d1024"]);
        assert_eq!(Plan { decode: 0, prefill: vec![0], ..plan }.tests(), []);
    }

    #[test]
    fn usual_depths_are_within_the_context() {
        assert_eq!(usual_depths(&made("tiny"), 1), [0]);
        assert_eq!(usual_depths(&made("qwen3-0.6b"), 64), USUAL_DEPTHS);
    }
}
