//! What was measured.

use std::time::Duration;

use marlin_kernels::cpu::SimdLevel;
use marlin_model::ModelInfo;
use marlin_quantize::Footprint;

use super::{Profile, Test};
use crate::machine::AppleChip;
use crate::stats::Spread;

/// What a token of a test read, at least.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BytesPerToken {
    /// A stream's share of all weights a decode step uses as they are stored, and of an embedding that is not the head one row.
    pub weights: f64,
    /// The visible part of the KV cache; the mean over the tokens of the test.
    pub kv: f64,
}

/// A test and how fast it was.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// The test.
    pub test: Test,
    /// Tokens a second of each repetition, of all streams together.
    pub samples: Vec<f64>,
    /// The same in three numbers.
    pub rate: Spread,
    /// Of a decode test.
    pub bytes: Option<BytesPerToken>,
    /// Kernels that a GPU ran for a decode step, or for a prompt.
    pub kernels: Option<f64>,
}

/// A model, a machine, and how fast the one ran on the other.
#[derive(Debug, Clone)]
pub struct Report {
    /// Folder or name of the model.
    pub model: String,
    /// Whether its weights are random.
    pub is_random: bool,
    /// Formats of the decoder's matrices, and of embedding and head.
    pub formats: [String; 2],
    /// Its size.
    pub footprint: Footprint,
    /// The model as loaded.
    pub info: ModelInfo,
    /// Bytes of its KV cache, which has room for the largest test.
    pub kv_cache: u64,
    /// Threads it ran on.
    pub threads: usize,
    /// Instructions it ran with.
    pub simd: SimdLevel,
    /// Time to bring its weights into the device's order.
    pub load: Duration,
    /// The most memory the process had from the beginning of the load, in bytes, if the system tells.
    pub peak_memory: Option<u64>,
    /// The chip of the GPU it ran on, if it is one whose speed can be predicted.
    pub chip: Option<AppleChip>,
    /// Whether the model's memory is the machine's, whose bandwidth is measured.
    pub shares_memory: bool,
    /// Bytes a second that as many threads read from memory, before and after the tests.
    pub read_bandwidth: Spread,
    /// Bytes they read it from.
    pub read_buffer: usize,
    /// Every test in the order it ran.
    pub measurements: Vec<Measurement>,
    /// What the kernels of each test took, if that was asked for.
    pub profiles: Vec<Profile>,
}

impl Measurement {
    /// Tokens a second that the chip should reach in a decode test, with its smallest and with its largest GPU. Of several streams
    /// it is not known: what they compute may take longer than what they read.
    pub fn prediction(&self, chip: &AppleChip) -> Option<[f64; 2]> {
        let bytes = self.bytes.filter(|_| self.test.streams() == 1)?;
        Some(chip.tokens_per_second(bytes.total(), self.kernels?))
    }

    /// Tokens a second of one stream, the median.
    pub fn rate_per_stream(&self) -> f64 {
        self.rate.median / self.test.streams() as f64
    }
}

impl BytesPerToken {
    /// Weights and KV cache.
    pub fn total(&self) -> f64 {
        self.weights + self.kv
    }
}
