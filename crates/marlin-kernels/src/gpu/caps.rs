//! What a GPU is and can do.

use super::memory;
use crate::error::size_in_words;

/// What the kernels need of a device.
pub(super) const NEEDED: wgpu::Features = wgpu::Features::SHADER_F16.union(wgpu::Features::IMMEDIATES);

// What they use where it is there.
const SUBGROUPS: wgpu::Features = wgpu::Features::SUBGROUP;
const MATRICES: wgpu::Features = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
// Passes are timed, not kernels within a pass, which Apple's GPUs cannot.
const TIMESTAMPS: wgpu::Features = wgpu::Features::TIMESTAMP_QUERY;
const PIPELINE_CACHE: wgpu::Features = wgpu::Features::PIPELINE_CACHE;
const MAPPABLE: wgpu::Features = wgpu::Features::MAPPABLE_PRIMARY_BUFFERS;

/// Bytes of a binding, at most: kernels count words and values in 32 bits.
const MAX_BINDING: u64 = (1 << 31) - 4;

/// What the device is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuCaps {
    /// Name of the device.
    pub name: String,
    /// Metal or Vulkan, and the driver.
    pub driver: String,
    /// Invocations of a subgroup, the least and the most.
    pub subgroup: [u32; 2],
    /// Its memory is the machine's.
    pub shares_memory: bool,
    /// The host writes into memory that kernels read, so that weights need no staging memory on their way: only where that memory is the
    /// machine's, since others' is slow to reach or slow for kernels.
    pub mappable: bool,
    /// Bytes of one storage binding; larger matrices are split.
    pub max_binding: u64,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Kernels may use operations of subgroups.
    pub subgroups: bool,
    /// The sizes of matrices in half precision that its matrix units multiply and sum in single precision, largest first.
    pub matrices: Vec<MatrixSize>,
    /// It tells the time between passes of kernels.
    pub timestamps: bool,
    /// Compiled kernels can be kept on disk.
    pub pipeline_cache: bool,
    /// Bytes of its memory that a program should take at most, as of when it was opened: what other programs left of a Vulkan device's own
    /// memory, what Metal recommends as a working set. `None` if it does not tell.
    pub memory: Option<u64>,
}

impl GpuCaps {
    /// What every GPU of Apple silicon can do (M1 and later), for kernels that are looked at without one: Metal's feature set tables,
    /// families Apple7 and later.
    pub fn apple() -> Self {
        Self {
            name: "Apple GPU".into(),
            driver: "Metal".into(),
            subgroup: [32, 32],
            shares_memory: true,
            mappable: true,
            max_binding: MAX_BINDING,
            workgroup_memory: 32 << 10,
            subgroups: true,
            matrices: vec![MatrixSize::Eight],
            timestamps: true,
            pipeline_cache: false,
            memory: None,
        }
    }

    pub(super) fn of(adapter: &wgpu::Adapter) -> Self {
        let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
        let shares_memory = matches!(info.device_type, wgpu::DeviceType::IntegratedGpu | wgpu::DeviceType::Cpu);
        Self {
            driver: format!("{} {} {}", info.backend, info.driver, info.driver_info),
            shares_memory,
            mappable: shares_memory && features.contains(MAPPABLE),
            // Those of Apple's GPUs are 32, though wgpu cannot ask.
            subgroup: match info.backend {
                wgpu::Backend::Metal if info.name.starts_with("Apple") => [32, 32],
                _ => [info.subgroup_min_size, info.subgroup_max_size],
            },
            name: info.name,
            max_binding: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(MAX_BINDING),
            workgroup_memory: limits.max_compute_workgroup_storage_size,
            subgroups: features.contains(SUBGROUPS),
            matrices: matrices(adapter, features),
            timestamps: features.contains(TIMESTAMPS),
            pipeline_cache: features.contains(PIPELINE_CACHE),
            memory: memory::budget(adapter),
        }
    }

    /// Its name, how much memory it had to give, and how much of that is taken.
    pub(super) fn in_words(&self, taken: u64) -> String {
        let taken = format!("{} taken", size_in_words(taken));
        let memory = self.memory.map(|bytes| format!("{} free when it was opened, ", size_in_words(bytes)));
        format!("{} (with {}{taken})", self.name, memory.unwrap_or_default())
    }

    /// The features of a device of these capabilities that kernels use.
    pub(super) fn features(&self) -> wgpu::Features {
        let wanted = [
            (self.subgroups, SUBGROUPS),
            (!self.matrices.is_empty(), MATRICES),
            (self.timestamps, TIMESTAMPS),
            (self.pipeline_cache, PIPELINE_CACHE),
            (self.mappable, MAPPABLE),
        ];
        wanted.iter().filter(|(has, _)| *has).fold(NEEDED, |features, (_, feature)| features | *feature)
    }
}

/// The rows and columns of matrices that matrix units multiply at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MatrixSize {
    /// 8 × 8, Metal's simdgroup matrices.
    Eight,
    /// 16 × 16, the cooperative matrices of NVIDIA's and others' Vulkan drivers.
    Sixteen,
}

impl MatrixSize {
    /// Rows and columns.
    pub fn rows(self) -> usize {
        match self {
            Self::Eight => 8,
            Self::Sixteen => 16,
        }
    }
}

fn matrices(adapter: &wgpu::Adapter, features: wgpu::Features) -> Vec<MatrixSize> {
    use wgpu::CooperativeScalarType::{F16, F32};
    let info = adapter.get_info();
    // Kernels count on 32 invocations that share a matrix. Metal's do, though wgpu cannot ask.
    let subgroups_of_32 =
        info.backend == wgpu::Backend::Metal || (info.subgroup_min_size, info.subgroup_max_size) == (32, 32);
    if !features.contains(MATRICES) || !subgroups_of_32 {
        return Vec::new();
    }
    let properties = adapter.cooperative_matrix_properties();
    let has = |rows: u32| {
        properties.iter().any(|it| {
            (it.ab_type, it.cr_type) == (F16, F32) && [it.m_size, it.n_size, it.k_size].iter().all(|&size| size == rows)
        })
    };
    [MatrixSize::Sixteen, MatrixSize::Eight].into_iter().filter(|size| has(size.rows() as u32)).collect()
}
