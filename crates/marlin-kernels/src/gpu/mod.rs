//! GPUs through wgpu: Metal on Macs, Vulkan elsewhere.
//!
//! Kernels are WGSL, one file each in `shaders/`. What a number format is stands in a small module of constants and functions that
//! `linear` puts in front of a kernel, so no kernel is written twice. Operations are recorded and run by
//! [`Encoder::submit`](crate::Encoder::submit); bind groups are made once and found again.

mod adapter;
mod attention;
mod caps;
mod device;
mod disk_cache;
mod encoder;
mod experts;
mod kv;
mod kv_blocks;
mod linear;
mod memory;
mod msl;
mod pipeline;
mod probe;
mod profile;
mod recorder;
mod registry;
mod sampling;
#[cfg(test)]
mod spirv;
mod step;
#[cfg(test)]
mod tests;
mod timing;
mod unroll;
mod upload;
#[cfg(not(target_vendor = "apple"))]
mod vulkan;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use marlin_format::Scheme;

pub use adapter::{GpuAdapter, GpuChoice, adapters};
pub use caps::{GpuCaps, MatrixSize};
pub use device::{GpuArithmetic, GpuMatrices, GpuOptions};
pub use disk_cache::PIPELINE_CACHE_EXTENSION;
pub use encoder::GpuEncoder;
pub use experts::{GpuRouter, GpuRoutes};
pub use kv::GpuKvCache;
pub use linear::{GpuLinear, GpuLinearGroup};
pub use msl::{Msl, metal_kernels};
pub use probe::{GpuProbe, ProbeRates};
pub use profile::{GpuProfile, KernelTime};
pub use registry::{KernelVariant, kernels};

use self::device::{Gpu, Storage};
use self::upload::Upload;
use crate::{
    Backend, DeviceInfo, KernelError, KvLayout, KvType, LinearPart, MemoryUse, RouterWeights, Routing, StepLimits,
};

/// Workgroups along one axis, at most.
const MAX_WORKGROUPS: usize = 65535;

/// A GPU.
#[derive(Debug, Clone)]
pub struct GpuBackend {
    gpu: Arc<Gpu>,
}

/// Activations on the device.
#[derive(Debug)]
pub struct GpuBuffer {
    storage: Storage,
    rows: usize,
    width: usize,
    capacity: usize,
    /// How often it was written: whether what was made of it is still true.
    version: u64,
}

/// A vector on the device, and the host's copy of it.
#[derive(Debug)]
pub struct GpuVector {
    storage: Storage,
    values: Vec<f32>,
}

impl GpuBackend {
    /// Opens a device.
    ///
    /// # Errors
    /// If there is none, or it lacks what the kernels need.
    pub fn new(options: GpuOptions) -> Result<Self, KernelError> {
        Ok(Self { gpu: Arc::new(Gpu::open(options)?) })
    }

    /// A linear with the same weights in memory of its own.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn duplicate(&self, linear: &GpuLinear) -> Result<GpuLinear, KernelError> {
        linear.duplicate(&self.gpu)
    }

    /// Whether kernels for many rows multiply matrices, in the device's matrix units or emulated.
    pub(crate) fn multiplies_matrices(&self) -> bool {
        self.gpu.matrices.is_some()
    }

    /// What its results depend on beside the model, as far as the device tells: see [`CpuBackend::numerics`](crate::cpu::CpuBackend::numerics).
    pub fn numerics(&self) -> String {
        let GpuCaps { name, driver, subgroup, subgroups, workgroup_memory, .. } = &self.gpu.caps;
        let Gpu { arithmetic, batch_invariant, matrices, .. } = &*self.gpu;
        format!(
            "gpu {name}, {driver}, subgroups {subgroup:?} {subgroups}, {workgroup_memory} bytes of a workgroup, {arithmetic:?}, \
             matrices {matrices:?}, batch invariant {batch_invariant}"
        )
    }

    /// What the device can do.
    pub fn caps(&self) -> &GpuCaps {
        &self.gpu.caps
    }

    /// Bytes of its memory that buffers of weights, activations, caches and encoders take now; what drivers need besides is not known.
    pub fn memory_taken(&self) -> u64 {
        self.gpu.account.taken()
    }

    /// How many kernels its encoders recorded so far.
    pub fn kernels_recorded(&self) -> u64 {
        self.gpu.recorded.load(Ordering::Relaxed)
    }
}

impl MemoryUse for GpuBackend {
    fn linear_bytes(&self, scheme: &Scheme, rows: usize, cols: usize) -> Result<usize, KernelError> {
        GpuLinear::bytes(scheme, rows, cols, self.gpu.arithmetic)
    }

    fn conversion(&self, scheme: &Scheme, _cols: usize) -> Option<Scheme> {
        GpuLinear::conversion(scheme, self.gpu.arithmetic)
    }

    fn shares_memory(&self) -> bool {
        self.gpu.caps.shares_memory
    }

    fn routes_bytes(&self, routing: &Routing, tokens: usize, width: usize) -> usize {
        GpuRoutes::bytes(&self.gpu, routing, tokens, width)
    }

    fn encoder_bytes(&self, limits: &StepLimits) -> usize {
        GpuEncoder::bytes(&self.gpu, limits)
    }

    fn most_kv_blocks(&self, layout: &KvLayout, kv_type: KvType) -> usize {
        GpuKvCache::most_blocks(&self.gpu, layout, kv_type)
    }

    fn check_kv_blocks(&self, layout: &KvLayout, kv_type: KvType, blocks: usize) -> Result<(), KernelError> {
        GpuKvCache::check_blocks(&self.gpu, layout, kv_type, blocks)
    }
}

impl Backend for GpuBackend {
    type Buffer = GpuBuffer;
    type Linear = GpuLinear;
    type LinearGroup = GpuLinearGroup;
    type Router = GpuRouter;
    type Routes = GpuRoutes;
    type Vector = GpuVector;
    type KvCache = GpuKvCache;
    type Encoder = GpuEncoder;

    const OVERLAPS: bool = true;

    fn info(&self) -> DeviceInfo {
        let GpuCaps { name, driver, subgroup: [least, most], .. } = &self.gpu.caps;
        let arithmetic = match self.gpu.arithmetic {
            GpuArithmetic::Exact => "f32",
            GpuArithmetic::Half => "f16",
        };
        let detail = format!("{name}, {driver}, subgroups of {least} to {most}, {arithmetic} activations");
        DeviceInfo { name: "gpu".into(), detail }
    }

    fn load_linear(&self, parts: &[LinearPart<'_>]) -> Result<GpuLinear, KernelError> {
        GpuLinear::load(&self.gpu, parts)
    }

    fn group_linears(&self, linears: Vec<GpuLinear>) -> Result<GpuLinearGroup, KernelError> {
        GpuLinearGroup::new(&self.gpu, &linears)
    }

    fn load_router(&self, weights: &RouterWeights<'_>) -> Result<GpuRouter, KernelError> {
        GpuRouter::load(&self.gpu, weights)
    }

    fn routes(&self, routing: &Routing, tokens: usize, width: usize) -> Result<GpuRoutes, KernelError> {
        GpuRoutes::new(&self.gpu, routing, tokens, width)
    }

    fn load_vector(&self, values: &[f32]) -> Result<GpuVector, KernelError> {
        Ok(GpuVector { storage: Upload::all(&self.gpu, "a vector", values)?, values: values.to_vec() })
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<GpuBuffer, KernelError> {
        let bytes = rows.saturating_mul(width).saturating_mul(size_of::<f32>());
        Ok(GpuBuffer {
            storage: self.gpu.storage("an activation buffer", bytes)?,
            rows: 0,
            width,
            capacity: rows,
            version: 0,
        })
    }

    fn upload(&self, buffer: &mut GpuBuffer, rows: usize, values: &[f32]) -> Result<(), KernelError> {
        buffer.upload(&self.gpu, rows, values)
    }

    fn kv_cache(&self, layout: &KvLayout, kv_type: KvType, blocks: usize) -> Result<GpuKvCache, KernelError> {
        GpuKvCache::new(&self.gpu, layout, kv_type, blocks)
    }

    fn encoder(&self, limits: &StepLimits) -> Result<GpuEncoder, KernelError> {
        let encoder = GpuEncoder::new(self.gpu.clone(), limits)?;
        // Matrices have been loaded by now, as a rule.
        self.gpu.save_kernels();
        Ok(encoder)
    }
}

impl GpuBuffer {
    /// Makes this the output of an operation: `rows` rows, which must be `width` wide.
    fn output(&mut self, rows: usize, width: usize) {
        assert_eq!(self.width, width, "an output buffer of this width");
        assert!(rows <= self.capacity, "{rows} rows for a buffer of {}", self.capacity);
        self.rows = rows;
        self.written();
    }

    /// Writes rows before anything that is submitted later.
    fn upload(&mut self, gpu: &Gpu, rows: usize, values: &[f32]) -> Result<(), KernelError> {
        let Self { width, capacity, .. } = *self;
        if rows > capacity || rows.checked_mul(width) != Some(values.len()) {
            return Err(KernelError::BufferShape { found: values.len(), rows, width, capacity });
        }
        self.output(rows, width);
        gpu.write(&self.storage, 0, bytemuck::cast_slice(values));
        gpu.check()
    }

    /// Its values change.
    fn written(&mut self) {
        self.version += 1;
    }
}
