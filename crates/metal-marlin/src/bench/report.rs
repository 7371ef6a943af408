//! What was measured.

use std::time::Duration;

use marlin_kernels::cpu::SimdLevel;
use marlin_model::ModelInfo;
use marlin_quantize::Footprint;

use super::{Profile, Test, Work};
use crate::machine::AppleChip;
use crate::stats::Spread;

/// A test and how fast it was.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// The test.
    pub test: Test,
    /// Tokens a second of each repetition, of all streams together.
    pub samples: Vec<f64>,
    /// The same in three numbers.
    pub rate: Spread,
    /// What each token takes.
    pub work: Work,
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
    /// Bytes of the host's memory for experts that are left to it.
    pub host_bytes: Option<u64>,
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
    /// How fast a CPU multiplies at most; of a GPU it is not known.
    pub peak: Option<Peak>,
    /// Every test in the order it ran.
    pub measurements: Vec<Measurement>,
    /// What the kernels of each test took, if that was asked for.
    pub profiles: Vec<Profile>,
}

/// The rate at which a processor multiplies what lies in registers, measured before and after the tests.
#[derive(Debug, Clone, Copy)]
pub struct Peak {
    /// Multiply-adds a second.
    pub rate: Spread,
    /// What is multiplied: `int8`, or `f32`.
    pub numbers: &'static str,
}

impl Measurement {
    /// Tokens a second that the chip should reach in a decode test, with its smallest and with its largest GPU. Of several streams
    /// it is not known: what they compute may take longer than what they read.
    pub fn prediction(&self, chip: &AppleChip) -> Option<[f64; 2]> {
        match self.test {
            Test::Decode { streams: 1, .. } => Some(chip.tokens_per_second(self.work.bytes(), self.kernels?)),
            _ => None,
        }
    }

    /// Tokens a second of one stream, the median.
    pub fn rate_per_stream(&self) -> f64 {
        self.rate.median / self.test.streams() as f64
    }

    /// Bytes a second, the median.
    pub fn bytes_per_second(&self) -> f64 {
        self.rate.median * self.work.bytes()
    }

    /// Multiply-adds a second, the median.
    pub fn multiply_adds_per_second(&self) -> f64 {
        self.rate.median * self.work.multiply_adds
    }
}

impl Report {
    /// A test's share of the rate at which memory is read, if the model lies in the memory that was measured.
    pub fn share_of_memory(&self, measurement: &Measurement) -> Option<f64> {
        self.shares_memory.then(|| measurement.bytes_per_second() / self.read_bandwidth.median)
    }

    /// Multiply-adds a second that a test could reach at most: what memory feeds at its bytes, or the peak if that is less. `None` if
    /// either is not known.
    pub fn roof(&self, measurement: &Measurement) -> Option<f64> {
        let fed = self.shares_memory.then(|| measurement.work.intensity() * self.read_bandwidth.median)?;
        Some(fed.min(self.peak?.rate.median))
    }

    /// A test's share of its roof.
    pub fn share_of_roof(&self, measurement: &Measurement) -> Option<f64> {
        Some(measurement.multiply_adds_per_second() / self.roof(measurement)?)
    }

    /// A test's share of the peak.
    pub fn share_of_peak(&self, measurement: &Measurement) -> Option<f64> {
        Some(measurement.multiply_adds_per_second() / self.peak?.rate.median)
    }
}
