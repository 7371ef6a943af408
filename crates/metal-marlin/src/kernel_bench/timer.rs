//! How long a device takes.

use std::time::{Duration, Instant};

use marlin_kernels::cpu::{CpuBackend, Threads, default_threads};
use marlin_kernels::gpu::{GpuBackend, GpuEncoder, GpuProbe};
use marlin_kernels::{Backend, Encoder, KernelError, LinearPart, StepLimits};

use super::{Bench, KernelBenchError};
use crate::machine::BandwidthProbe;
use crate::stats::Spread;

/// What a device reaches with the simplest kernels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rates {
    /// Bytes a second that are read.
    pub(super) read: f64,
    /// Bytes a second that are copied, read and written ones; `None` of processors.
    pub(super) copy: Option<f64>,
    /// Multiply-adds a second that wait for each other, a measure of the clock; `None` of processors.
    pub(super) clock: Option<f64>,
}

/// A device whose kernels can be timed.
pub(super) trait Timed: Backend {
    /// Measures what the device reaches.
    type Probe;

    /// Makes a probe, a small one if it is only tried out.
    fn probe(&self, quick: bool) -> Result<Self::Probe, KernelBenchError>;

    /// Runs it, after the device has had work for a while: clocks fall when there is none.
    fn rates(&self, probe: &mut Self::Probe) -> Result<Rates, KernelBenchError>;

    /// The time for what is recorded.
    fn timed(
        &self,
        encoder: &mut Self::Encoder,
        record: impl FnOnce(&mut Self::Encoder),
    ) -> Result<Duration, KernelError>;

    /// So many linears of the same weights, each in memory of its own.
    fn copies(&self, parts: &[LinearPart<'_>], count: usize) -> Result<Vec<Self::Linear>, KernelError>;

    /// The processor's threads that kernels run on, of a device that has them.
    fn threads(&self) -> Option<&Threads> {
        None
    }
}

/// A probe of a GPU, and for how long it runs before it counts.
pub(super) struct WarmProbe {
    probe: GpuProbe,
    encoder: GpuEncoder,
    warm_up: Duration,
}

impl Timed for GpuBackend {
    type Probe = WarmProbe;

    fn probe(&self, quick: bool) -> Result<WarmProbe, KernelBenchError> {
        let (bytes, warm_up) = if quick { (8 << 20, Duration::ZERO) } else { (1 << 30, Duration::from_millis(500)) };
        let bytes = bytes.min(usize::try_from(self.caps().max_binding).unwrap_or(usize::MAX));
        let encoder = self.encoder(&StepLimits { tokens: 1, context: 1, width: 1, vocabulary: 1, logit_rows: 0 })?;
        Ok(WarmProbe { probe: GpuProbe::new(self, bytes)?, encoder, warm_up })
    }

    fn rates(&self, WarmProbe { probe, encoder, warm_up }: &mut WarmProbe) -> Result<Rates, KernelBenchError> {
        let start = Instant::now();
        while start.elapsed() < *warm_up {
            probe.rates(encoder)?;
        }
        let rates = probe.rates(encoder)?;
        Ok(Rates { read: rates.read, copy: Some(rates.copy), clock: Some(rates.clock) })
    }

    fn timed(&self, encoder: &mut GpuEncoder, record: impl FnOnce(&mut GpuEncoder)) -> Result<Duration, KernelError> {
        encoder.timed_or_waited(record)
    }

    fn copies(&self, parts: &[LinearPart<'_>], count: usize) -> Result<Vec<Self::Linear>, KernelError> {
        let first = self.load_linear(parts)?;
        let mut copies: Vec<_> = (1..count).map(|_| self.duplicate(&first)).collect::<Result<_, _>>()?;
        copies.push(first);
        Ok(copies)
    }
}

impl Timed for CpuBackend {
    type Probe = ();

    fn probe(&self, _quick: bool) -> Result<(), KernelBenchError> {
        Ok(())
    }

    fn rates(&self, _probe: &mut ()) -> Result<Rates, KernelBenchError> {
        let mut probe = BandwidthProbe::new(default_threads());
        probe.run()?;
        Ok(Rates { read: probe.rate().map_or(0.0, |rate| rate.median), copy: None, clock: None })
    }

    fn timed(
        &self,
        encoder: &mut Self::Encoder,
        record: impl FnOnce(&mut Self::Encoder),
    ) -> Result<Duration, KernelError> {
        let start = Instant::now();
        record(encoder);
        encoder.submit()?;
        Ok(start.elapsed())
    }

    fn copies(&self, parts: &[LinearPart<'_>], count: usize) -> Result<Vec<Self::Linear>, KernelError> {
        (0..count).map(|_| self.load_linear(parts)).collect()
    }

    fn threads(&self) -> Option<&Threads> {
        Some(self.threads())
    }
}

/// Runs in a sample, at most: each is recorded before the first runs.
const MOST_RUNS: usize = 1024;
/// For how long a kernel runs before it counts, at least and at most: while the host prepares it, a GPU's clock falls to a quarter, and it
/// has risen when nothing gets faster any more.
const WARM_UP: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(2000)];

impl<B: Timed> Bench<'_, B> {
    /// Seconds of one run. `run` records the i-th; a sample is as many as take long enough to be told apart.
    pub(super) fn seconds(
        &self,
        encoder: &mut B::Encoder,
        mut run: impl FnMut(&mut B::Encoder, usize),
    ) -> Result<Spread, KernelError> {
        let mut index = 0;
        let mut sample = |runs: usize| {
            let time = self.backend.timed(encoder, |encoder| {
                for _ in 0..runs {
                    run(encoder, index);
                    index += 1;
                }
            })?;
            Ok::<_, KernelError>(time.as_secs_f64() / runs as f64)
        };
        let (trial, least, [warm_up, patience]) =
            if self.plan.quick { (1, 1e-3, [Duration::ZERO; 2]) } else { (8, 4e-3, WARM_UP) };
        let start = Instant::now();
        let mut fastest = (sample(trial)?, start);
        loop {
            let (time, now) = (sample(trial)?, Instant::now());
            if time < 0.98 * fastest.0 {
                fastest = (time, now);
            }
            if now - fastest.1 >= warm_up || now - start >= patience {
                break;
            }
        }
        let runs = ((least / sample(trial)?.max(1e-9)) as usize).clamp(1, MOST_RUNS);
        let samples = (0..self.plan.repetitions.max(1)).map(|_| sample(runs)).collect::<Result<Vec<_>, _>>()?;
        // There is at least one.
        Ok(Spread::of(&samples).unwrap_or(Spread { median: 0.0, min: 0.0, max: 0.0 }))
    }
}
