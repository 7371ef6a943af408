//! How fast the processor multiplies.

use marlin_kernels::cpu::CpuBackend;

use crate::stats::Spread;

/// Measurements of one run.
const PASSES: usize = 6;

/// Measures how fast a processor multiplies and adds what lies in registers.
#[derive(Debug, Default)]
pub struct ComputeProbe {
    samples: Vec<f64>,
}

impl ComputeProbe {
    /// Multiplies several times and keeps the rates.
    pub fn run(&mut self, cpu: &CpuBackend) {
        // The first time wakes threads, and the units of wide vectors.
        cpu.multiply_adds_per_second();
        self.samples.extend((0..PASSES).map(|_| cpu.multiply_adds_per_second()));
    }

    /// Multiply-adds a second over all runs so far; `None` before the first.
    pub fn rate(&self) -> Option<Spread> {
        Spread::of(&self.samples)
    }
}

#[cfg(test)]
mod tests {
    use marlin_kernels::cpu::CpuOptions;

    use super::*;

    #[test]
    fn a_probe_collects_rates() {
        let cpu = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
        let mut probe = ComputeProbe::default();
        assert!(probe.rate().is_none());
        probe.run(&cpu);
        probe.run(&cpu);
        let rate = probe.rate().unwrap();
        assert_eq!(probe.samples.len(), 2 * PASSES);
        assert!(rate.min > 0.0 && rate.min <= rate.median && rate.median <= rate.max && rate.max.is_finite());
    }
}
