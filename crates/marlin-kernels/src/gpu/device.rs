//! A GPU and what it can do.

use std::collections::HashMap;
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::adapter::{self, GpuChoice};
use super::caps::{GpuCaps, MatrixSize};
use super::disk_cache::DiskCache;
use super::linear::LinearCache;
use super::memory::{Account, Taken};
use super::pipeline::{Kernel, Pipeline};
use super::profile::Profiler;
use super::registry::KernelVariant;
use crate::{BeyondBinding, KernelError};

/// Which GPU, and how its kernels are compiled.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GpuOptions {
    /// Which GPU of those that there are.
    pub adapter: GpuChoice,
    /// Compiles kernels with bounds checks: slower, for tests of the kernels.
    pub checked: bool,
    /// How linears compute.
    pub arithmetic: GpuArithmetic,
    /// A row's results are bitwise the same whatever else is in a step, and however many rows it has: one kernel for all of them. Steps of
    /// many rows are much slower.
    pub batch_invariant: bool,
    /// What multiplies the matrices of linears in half precision.
    pub matrices: GpuMatrices,
    /// The folder that keeps compiled kernels for the next time, where the device allows that; none are kept if `None`.
    pub pipeline_cache: Option<PathBuf>,
}

/// How linears compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GpuArithmetic {
    /// In single precision throughout.
    Exact,
    /// Activations are rounded to half precision, 32 of them or a row sharing a power of two, and so are weights. For few rows, products
    /// of 32 columns are summed in half precision; all other sums are in single. The mean squared error is about 1e-7 of the mean square.
    #[default]
    Half,
}

/// What multiplies the matrices of linears for more than a few rows of input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GpuMatrices {
    /// The device's matrix units, if it has any that [`MatrixSize`] knows.
    #[default]
    Device,
    /// The same kernels in plain arithmetic, as if the device had matrix units of this size: slower, for tests of the kernels.
    Emulated(MatrixSize),
}

/// An open device.
pub(super) struct Gpu {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) caps: GpuCaps,
    pub(super) arithmetic: GpuArithmetic,
    pub(super) batch_invariant: bool,
    /// What linears in half precision use.
    pub(super) matrices: Option<Matrices>,
    checked: bool,
    /// By source.
    pipelines: Mutex<HashMap<String, Slot>>,
    /// By format and shape.
    pub(super) linear_kernels: LinearCache,
    pub(super) disk_cache: Option<DiskCache>,
    /// Kernels that encoders recorded.
    pub(super) recorded: AtomicU64,
    pub(super) profiler: Profiler,
    /// Of buffers that kernels use.
    pub(super) account: Account,
    /// The first thing that went wrong since it was last asked for.
    failure: Arc<Mutex<Option<String>>>,
    /// Why the device is gone for good, if it is.
    loss: Arc<Mutex<Option<String>>>,
    next_id: AtomicU64,
}

/// A compiled kernel, or why there is none, once that is known.
type Slot = Arc<OnceLock<Result<Arc<Pipeline>, String>>>;

/// Matrix units that kernels are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Matrices {
    pub(super) size: MatrixSize,
    pub(super) is_emulated: bool,
}

impl Matrices {
    /// The module that multiplies them.
    pub(super) fn module(self) -> &'static str {
        match (self.is_emulated, self.size) {
            (true, _) => include_str!("shaders/mma_emulated.wgsl"),
            (false, MatrixSize::Eight) => include_str!("shaders/mma_8x8.wgsl"),
            (false, MatrixSize::Sixteen) => include_str!("shaders/mma_16x16.wgsl"),
        }
    }

    fn of(options: &GpuOptions, caps: &GpuCaps) -> Option<Self> {
        // Few rows never go to matrix units, and in this mode many rows are sums of the same order.
        let has_one_kernel = options.arithmetic == GpuArithmetic::Exact || options.batch_invariant;
        if has_one_kernel || caps.workgroup_memory < MATRICES_WORKGROUP_MEMORY {
            return None;
        }
        match options.matrices {
            GpuMatrices::Device => caps.matrices.first().map(|&size| Self { size, is_emulated: false }),
            GpuMatrices::Emulated(size) => Some(Self { size, is_emulated: true }),
        }
    }
}

/// A buffer of the device. Its id is part of the key of prebuilt bind groups.
#[derive(Debug)]
pub(super) struct Storage {
    pub(super) id: u64,
    pub(super) buffer: wgpu::Buffer,
    _taken: Taken,
}

/// Bytes of kernel parameters, at most.
const IMMEDIATE_BYTES: u32 = 128;

/// Bytes of workgroup memory that all tiles of matrices can do with.
pub(super) const MATRICES_WORKGROUP_MEMORY: u32 = 32 << 10;

impl Gpu {
    pub(super) fn open(options: GpuOptions) -> Result<Self, KernelError> {
        Self::open_limited(options, |_| ())
    }

    /// The same, as if it were no more than `limit` leaves of it.
    pub(super) fn open_limited(options: GpuOptions, limit: impl FnOnce(&mut GpuCaps)) -> Result<Self, KernelError> {
        let adapter = adapter::find(options.adapter)?;
        let mut caps = GpuCaps::of(&adapter);
        limit(&mut caps);
        Self::of_adapter(&adapter, caps, options)
    }

    /// A device that has these capabilities and runs nothing: kernels are put together and checked as for a device that does, memory is
    /// the host's, and operations leave it as it is.
    pub(super) fn imaginary(caps: GpuCaps, options: GpuOptions) -> Result<Self, KernelError> {
        let noop = wgpu::NoopBackendOptions {
            enable: true,
            features: Some(caps.features()),
            subgroup_min_size: Some(caps.subgroup[0]),
            subgroup_max_size: Some(caps.subgroup[1]),
            ..wgpu::NoopBackendOptions::default()
        };
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends: wgpu::Backends::NOOP,
            backend_options: wgpu::BackendOptions { noop, ..wgpu::BackendOptions::default() },
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        let adapter = adapter::enumerate(&instance).into_iter().next();
        let adapter =
            adapter.ok_or_else(|| KernelError::Device("wgpu was built without its imaginary device".into()))?;
        Self::of_adapter(&adapter, caps, options)
    }

    fn of_adapter(adapter: &wgpu::Adapter, caps: GpuCaps, options: GpuOptions) -> Result<Self, KernelError> {
        // SAFETY: of the experimental features only cooperative matrices are used, by kernels that the conformance table holds
        // against the reference on each device it runs on.
        let experimental_features = unsafe { wgpu::ExperimentalFeatures::enabled() };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("metal-marlin"),
            required_features: caps.features(),
            required_limits: adapter.limits(),
            experimental_features,
            ..wgpu::DeviceDescriptor::default()
        };
        #[cfg(target_vendor = "apple")]
        let unchecked = None;
        #[cfg(not(target_vendor = "apple"))]
        // SAFETY: kernels are this crate's own, and index within what their parameters describe. The conformance table runs them with
        // checks, too.
        let unchecked =
            (!options.checked).then(|| unsafe { super::vulkan::open_without_checks(adapter, &descriptor) }).flatten();
        let (device, queue) = match unchecked {
            Some(open) => open,
            None => pollster::block_on(adapter.request_device(&descriptor))
                .map_err(|error| KernelError::Device(format!("{} does not open: {error}", caps.name)))?,
        };

        let folder = options.pipeline_cache.as_ref();
        let disk_cache = folder.and_then(|folder| DiskCache::open(&device, &adapter.get_info(), folder));
        let failure = Arc::new(Mutex::new(None));
        let first = failure.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| remember(&first, error.to_string())));
        let loss = Arc::new(Mutex::new(None));
        let lost = loss.clone();
        device.set_device_lost_callback(move |reason, message| {
            remember(&lost, format!("the device was lost ({reason:?}): {message}"));
        });
        Ok(Self {
            device,
            queue,
            arithmetic: options.arithmetic,
            batch_invariant: options.batch_invariant,
            matrices: Matrices::of(&options, &caps),
            caps,
            checked: options.checked,
            pipelines: Mutex::default(),
            linear_kernels: LinearCache::default(),
            disk_cache,
            recorded: AtomicU64::new(0),
            profiler: Profiler::default(),
            account: Account::default(),
            failure,
            loss,
            next_id: AtomicU64::new(0),
        })
    }

    /// The compiled kernel; each is compiled once, several at a time by several threads.
    pub(super) fn pipeline(&self, kernel: &Kernel) -> Result<Arc<Pipeline>, KernelError> {
        let source = kernel.source();
        let slot = self.pipelines().entry(source.clone()).or_default().clone();
        let compile = || {
            let cache = self.disk_cache.as_ref();
            let compiled = Pipeline::compile(&self.device, kernel, &source, self.checked, IMMEDIATE_BYTES, cache);
            compiled.map(Arc::new)
        };
        slot.get_or_init(compile).clone().map_err(|reason| {
            KernelError::Device(format!("{} cannot compile the kernel {}: {reason}", self.caps.name, kernel.name))
        })
    }

    /// Keeps the kernels compiled so far for the next time, where that is wanted.
    pub(super) fn save_kernels(&self) {
        if let Some(cache) = &self.disk_cache {
            cache.save();
        }
    }

    /// The kernels compiled so far.
    pub(super) fn kernels(&self) -> Vec<KernelVariant> {
        let compiled = |(source, slot): (&String, &Slot)| {
            let pipeline = slot.get()?.as_ref().ok()?;
            Some(KernelVariant::of(source.clone(), pipeline.kernel.clone()))
        };
        self.pipelines().iter().filter_map(compiled).collect()
    }

    /// The sources of the kernels that an encoder recorded for the first time since the last call.
    pub(super) fn take_recorded(&self) -> Vec<String> {
        let was_recorded = |slot: &Slot| {
            slot.get().and_then(|compiled| compiled.as_ref().ok()).is_some_and(|pipeline| pipeline.take_recorded())
        };
        let pipelines = self.pipelines();
        pipelines.iter().filter(|(_, slot)| was_recorded(slot)).map(|(source, _)| source.clone()).collect()
    }

    fn pipelines(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.pipelines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name, and what is known of its memory: for errors.
    fn in_words(&self) -> String {
        self.caps.in_words(self.account.taken())
    }

    /// The error that something is larger than a binding.
    pub(super) fn beyond_binding(&self, what: &str, bytes: usize, advice: &str) -> KernelError {
        KernelError::Binding(Box::new(BeyondBinding {
            what: what.into(),
            bytes,
            limit: self.caps.max_binding,
            device: self.caps.name.clone(),
            advice: advice.into(),
        }))
    }

    /// Memory on the device, zeroed.
    pub(super) fn storage(&self, what: &str, bytes: usize) -> Result<Storage, KernelError> {
        self.buffer(what, bytes, wgpu::BufferUsages::empty(), false)
    }

    /// Memory on the device for what it keeps, zeroed: of the kind that the host can write, where there is that kind, and mapped for it to
    /// do so at once.
    pub(super) fn weight_storage(&self, what: &str, bytes: usize, is_mapped: bool) -> Result<Storage, KernelError> {
        let usage = if self.caps.mappable { wgpu::BufferUsages::MAP_WRITE } else { wgpu::BufferUsages::empty() };
        self.buffer(what, bytes, usage, is_mapped)
    }

    fn buffer(
        &self,
        what: &str,
        bytes: usize,
        usage: wgpu::BufferUsages,
        mapped_at_creation: bool,
    ) -> Result<Storage, KernelError> {
        // An empty buffer cannot be bound; kernels see vectors of 16 bytes.
        let size = (bytes.max(16) as u64).checked_next_multiple_of(16).filter(|size| *size <= self.caps.max_binding);
        let size = size.ok_or_else(|| {
            self.beyond_binding(what, bytes, "compute fewer tokens or sequences at once, or use the CPU instead")
        })?;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size,
            usage: usage | wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation,
        });
        match pollster::block_on(scope.pop()) {
            None => {
                let id = self.next_id.fetch_add(1, Ordering::Relaxed);
                Ok(Storage { id, buffer, _taken: self.account.take(size) })
            }
            Some(_) => Err(KernelError::OutOfMemory { what: what.into(), bytes, device: self.in_words() }),
        }
    }

    /// Memory with the same contents as another.
    pub(super) fn duplicate(&self, storage: &Storage) -> Result<Storage, KernelError> {
        let size = storage.buffer.size();
        let copy = self.weight_storage("a copy", size as usize, false)?;
        let mut commands = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        commands.copy_buffer_to_buffer(&storage.buffer, 0, &copy.buffer, 0, size);
        self.queue.submit([commands.finish()]);
        Ok(copy)
    }

    /// Writes at once, before anything that is submitted later. Bytes are a multiple of 4.
    pub(super) fn write(&self, storage: &Storage, offset: u64, bytes: &[u8]) {
        self.queue.write_buffer(&storage.buffer, offset, bytes);
    }

    /// Makes the next [`Gpu::check`] fail, for operations that cannot.
    pub(super) fn fail(&self, error: &KernelError) {
        remember(&self.failure, error.to_string());
    }

    /// The error that happened since the last call, if any; that the device was lost is said each time.
    pub(super) fn check(&self) -> Result<(), KernelError> {
        let loss = self.loss.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let failure = loss.or_else(|| self.failure.lock().unwrap_or_else(PoisonError::into_inner).take());
        failure.map_or(Ok(()), |failure| Err(KernelError::Device(format!("{}: {failure}", self.in_words()))))
    }

    /// Memory that kernels' results are copied to and the host can read, see [`Gpu::read_mapped`].
    pub(super) fn readback(&self, what: &str, bytes: u64) -> wgpu::Buffer {
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size: bytes,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    }

    /// Memory with these contents that commands can copy from.
    pub(super) fn staging(&self, what: &str, bytes: &[u8]) -> Result<wgpu::Buffer, KernelError> {
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size: bytes.len() as u64,
            usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        });
        let mapped = buffer.get_mapped_range_mut(..);
        let mut mapped =
            mapped.map_err(|error| KernelError::Device(format!("cannot write {what} to the device: {error}")))?;
        mapped.slice(..).copy_from_slice(bytes);
        drop(mapped);
        buffer.unmap();
        Ok(buffer)
    }

    /// Waits for a submission, or for all, and reads the beginning of a buffer that can be mapped.
    pub(super) fn read_mapped(
        &self,
        readback: &wgpu::Buffer,
        submission: Option<wgpu::SubmissionIndex>,
        out: &mut [u8],
    ) -> Result<(), KernelError> {
        let bytes = out.len() as u64;
        // If it cannot be mapped, `get_mapped_range` fails.
        readback.map_async(wgpu::MapMode::Read, ..bytes, |_| ());
        if let Err(error) = self.wait_for(submission) {
            readback.unmap();
            return Err(error);
        }
        let mapped = readback.get_mapped_range(..bytes);
        let mapped = mapped.map_err(|error| KernelError::Device(format!("cannot read from the device: {error}")))?;
        out.copy_from_slice(&mapped);
        drop(mapped);
        readback.unmap();
        Ok(())
    }

    /// Waits for everything that was submitted.
    pub(super) fn wait(&self) -> Result<(), KernelError> {
        self.wait_for(None)
    }

    /// Waits for a submission and what came before it; for all if it is `None`.
    fn wait_for(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<(), KernelError> {
        // wgpu panics if the device fails while it is waited for.
        let poll_type = wgpu::PollType::Wait { submission_index: submission, timeout: None };
        let poll = AssertUnwindSafe(|| self.device.poll(poll_type));
        let waited = panic::catch_unwind(poll).map_err(|_| {
            remember(&self.loss, "the device failed".into());
            KernelError::Device(format!("{} failed; use the CPU instead", self.in_words()))
        })?;
        waited.map_err(|error| KernelError::Device(format!("{} does not finish: {error}", self.in_words())))?;
        self.check()
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.save_kernels();
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("caps", &self.caps).finish_non_exhaustive()
    }
}

fn remember(first: &Mutex<Option<String>>, message: String) {
    first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(message);
}
