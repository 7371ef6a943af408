//! What each kernel of a step takes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::GpuBackend;
use super::device::Gpu;
use super::pipeline::Kernel;
use super::timing::Timing;
use crate::KernelError;

/// Times each kernel that encoders of a device record while it exists, in a pass of its own.
///
/// Passes cost a little, and kernels that could overlap do not: the sum is what a step takes at most.
///
/// ```no_run
/// # fn main() -> Result<(), marlin_kernels::KernelError> {
/// # let backend = marlin_kernels::gpu::GpuBackend::new(Default::default())?;
/// let mut profile = backend.profile()?;
/// // A step of a model on this device.
/// profile.end_step();
/// for time in profile.finish()?.concat() {
///     println!("{}: {:.1} µs", time.kernel, (time.end - time.begin) * 1e6);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GpuProfile<'a> {
    gpu: &'a Gpu,
    /// How many kernels came before the end of each step.
    ends: Vec<usize>,
}

/// When a kernel ran.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelTime {
    /// Its name, that of its file.
    pub kernel: &'static str,
    /// Rows and columns of the packed matrix that it reads, if it reads one.
    pub matrix: Option<[usize; 2]>,
    /// Seconds on the device's clock after the first kernel's beginning.
    pub begin: f64,
    /// The same of its end.
    pub end: f64,
}

/// The profile of a device, if one is being made.
#[derive(Default)]
pub(super) struct Profiler {
    /// Asked for each kernel: a look at this costs nothing.
    is_on: AtomicBool,
    profiled: Mutex<Option<Profiled>>,
}

/// Kernels in the order in which they were recorded.
struct Profiled {
    timing: Timing,
    kernels: Vec<(&'static str, Option<[usize; 2]>)>,
}

impl GpuBackend {
    /// Begins a profile, the only one at a time.
    ///
    /// # Errors
    /// The device has no clock (see [`GpuCaps::timestamps`](super::GpuCaps::timestamps)), or is being profiled.
    pub fn profile(&self) -> Result<GpuProfile<'_>, KernelError> {
        let gpu = &*self.gpu;
        let timing = Timing::new(gpu)?;
        let mut profiled = gpu.profiler.profiled();
        if profiled.is_some() {
            return Err(KernelError::Device(format!("{} is being profiled already", gpu.caps.name)));
        }
        *profiled = Some(Profiled { timing, kernels: Vec::new() });
        gpu.profiler.is_on.store(true, Ordering::Relaxed);
        Ok(GpuProfile { gpu, ends: Vec::new() })
    }
}

impl GpuProfile<'_> {
    /// Ends a step: its kernels are those that were recorded since the step before.
    pub fn end_step(&mut self) {
        self.ends.push(self.gpu.profiler.profiled().as_ref().map_or(0, |profiled| profiled.timing.passes()));
    }

    /// Waits for the kernels, all of which must have been started, and tells when those of each step ran.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish(self) -> Result<Vec<Vec<KernelTime>>, KernelError> {
        let Some(Profiled { timing, kernels }) = self.gpu.profiler.end() else { return Ok(Vec::new()) };
        let seconds = timing.seconds(self.gpu)?;
        let mut times = kernels.into_iter().zip(seconds).map(|((kernel, matrix), [begin, end])| KernelTime {
            kernel,
            matrix,
            begin,
            end,
        });
        let mut before = 0;
        let step = |&end: &usize| times.by_ref().take(end - std::mem::replace(&mut before, end)).collect();
        Ok(self.ends.iter().map(step).collect())
    }
}

impl Drop for GpuProfile<'_> {
    fn drop(&mut self) {
        self.gpu.profiler.end();
    }
}

impl Profiler {
    /// Where a pass of this kernel alone writes the clock, which `begin` is given; nothing if no profile is being made.
    pub(super) fn time<T>(
        &self,
        gpu: &Gpu,
        kernel: &Kernel,
        parameters: &[u32],
        begin: impl FnOnce(wgpu::ComputePassTimestampWrites<'_>) -> T,
    ) -> Option<T> {
        if !self.is_on.load(Ordering::Relaxed) {
            return None;
        }
        let mut profiled = self.profiled();
        let Profiled { timing, kernels } = profiled.as_mut()?;
        kernels.push((kernel.name, kernel.matrix(parameters)));
        Some(begin(timing.next_pass(gpu)))
    }

    fn end(&self) -> Option<Profiled> {
        self.is_on.store(false, Ordering::Relaxed);
        self.profiled().take()
    }

    fn profiled(&self) -> MutexGuard<'_, Option<Profiled>> {
        self.profiled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
