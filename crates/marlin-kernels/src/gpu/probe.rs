//! What a GPU reaches with the simplest kernels: what others are measured by.

use std::sync::Arc;
use std::time::Duration;

use super::device::Storage;
use super::pipeline::{Binding, Kernel, Pipeline};
use super::{GpuBackend, GpuEncoder};
use crate::KernelError;

/// Kernels that read, copy, and compute, and the memory that they do it with.
#[derive(Debug)]
pub struct GpuProbe {
    read: Arc<Pipeline>,
    copy: Arc<Pipeline>,
    clock: Arc<Pipeline>,
    memory: Storage,
    out: Storage,
    bytes: usize,
}

/// What the probe found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProbeRates {
    /// Bytes a second that a kernel reads.
    pub read: f64,
    /// Bytes a second that a kernel reads and writes, both counted.
    pub copy: f64,
    /// Multiply-adds a second of one invocation, each of which waits for the one before: a measure of the clock.
    pub clock: f64,
}

/// Workgroups that share the memory.
const WORKGROUPS: usize = 2048;
/// Invocations of a workgroup.
const WORKGROUP: usize = 256;
/// Bytes that an invocation loads at once.
const VECTOR: usize = 16;
/// Multiply-adds that stand in a round of the chain.
const CHAIN: usize = 16;
/// Rounds of the chain: a quarter of a millisecond and more at 2 GHz and 4 cycles each.
const ROUNDS: usize = 8192;
/// How often each is measured; the fastest counts.
const REPEATS: usize = 3;

impl GpuProbe {
    /// A probe over so many bytes, which should be more than caches hold.
    ///
    /// # Errors
    /// There is not enough memory for them and as many more.
    pub fn new(backend: &GpuBackend, bytes: usize) -> Result<Self, KernelError> {
        let gpu = &backend.gpu;
        let bytes = bytes.next_multiple_of(VECTOR).max(WORKGROUPS * WORKGROUP * VECTOR);
        let (memory, out) = (Binding::read("memory", "vec4<u32>"), Binding::write("out", "vec4<u32>"));
        let kernel = |name, bindings: &[Binding], file| {
            gpu.pipeline(&Kernel { name, prelude: String::new(), bindings: bindings.to_vec(), files: vec![file] })
        };
        Ok(Self {
            read: kernel("probe_read", &[memory, out], include_str!("shaders/probe_read.wgsl"))?,
            copy: kernel("probe_copy", &[memory, out], include_str!("shaders/probe_copy.wgsl"))?,
            clock: kernel("probe_clock", &[Binding::write("out", "f32")], include_str!("shaders/probe_clock.wgsl"))?,
            memory: gpu.storage("the memory of the probe", bytes)?,
            out: gpu.storage("the memory of the probe", bytes)?,
            bytes,
        })
    }

    /// Measures.
    ///
    /// # Errors
    /// The device failed.
    pub fn rates(&self, encoder: &mut GpuEncoder) -> Result<ProbeRates, KernelError> {
        let vectors = (self.bytes / VECTOR) as u32;
        let buffers = [&self.memory, &self.out];
        let read = self.seconds(encoder, &self.read, &buffers, vectors, WORKGROUPS)?;
        let copy = self.seconds(encoder, &self.copy, &buffers, vectors, WORKGROUPS)?;
        let clock = self.seconds(encoder, &self.clock, &[&self.out], ROUNDS as u32, 1)?;
        let bytes = self.bytes as f64;
        Ok(ProbeRates { read: bytes / read, copy: 2.0 * bytes / copy, clock: (CHAIN * ROUNDS) as f64 / clock })
    }

    fn seconds(
        &self,
        encoder: &mut GpuEncoder,
        kernel: &Arc<Pipeline>,
        buffers: &[&Storage],
        parameter: u32,
        workgroups: usize,
    ) -> Result<f64, KernelError> {
        let mut least = f64::INFINITY;
        for _ in 0..REPEATS {
            let time: Duration = encoder.timed_or_waited(|encoder| {
                encoder.recorder().dispatch(kernel, buffers.iter().copied(), &[parameter], [workgroups, 1, 1]);
            })?;
            least = least.min(time.as_secs_f64());
        }
        Ok(least.max(f64::MIN_POSITIVE))
    }
}
