//! The GPUs of this machine.

use super::caps::NEEDED;
use super::memory;
use crate::KernelError;

/// Bytes of workgroup memory that the largest kernel takes of those that every device runs.
const WORKGROUP_MEMORY: u32 = super::sampling::WORKGROUP_MEMORY;

/// Which GPU to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GpuChoice {
    /// The first of the fastest kind, which is the processor where that is all that plays one.
    #[default]
    First,
    /// The first that is hardware and has what the kernels need; [`KernelError::NoGpu`] if there is none.
    FirstHardware,
    /// The one of this index into [`adapters`].
    Index(usize),
}

impl From<Option<usize>> for GpuChoice {
    /// By its index, or else the first.
    fn from(index: Option<usize>) -> Self {
        index.map_or(Self::First, Self::Index)
    }
}

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuAdapter {
    /// Its name.
    pub name: String,
    /// It is the processor that plays a GPU.
    pub is_software: bool,
    /// What the kernels need and it lacks; `None` if it can be used.
    pub missing: Option<String>,
}

/// The GPUs, as [`GpuChoice::Index`] counts them.
pub fn adapters() -> Vec<GpuAdapter> {
    let adapter = |adapter: &wgpu::Adapter| GpuAdapter {
        name: adapter.get_info().name,
        is_software: is_software(adapter),
        missing: missing(adapter),
    };
    enumerate(&instance()).iter().map(adapter).collect()
}

pub(super) fn instance() -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::METAL | wgpu::Backends::VULKAN,
        memory_budget_thresholds: wgpu::MemoryBudgetThresholds {
            for_resource_creation: Some(memory::USABLE_PERCENT as u8),
            for_device_loss: None,
        },
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    })
}

/// Discrete GPUs first, software last.
pub(super) fn enumerate(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// The adapter that is asked for, which has what the kernels need.
pub(super) fn find(choice: GpuChoice) -> Result<wgpu::Adapter, KernelError> {
    let mut adapters = enumerate(&instance());
    let found = adapters.len();
    let is_fit = |adapter: &wgpu::Adapter| !is_software(adapter) && missing(adapter).is_none();
    let index = match choice {
        _ if found == 0 => return Err(KernelError::NoGpu),
        GpuChoice::First => 0,
        GpuChoice::FirstHardware => adapters.iter().position(is_fit).ok_or(KernelError::NoGpu)?,
        GpuChoice::Index(index) if index < found => index,
        GpuChoice::Index(index) => {
            return Err(KernelError::Device(format!("there is no GPU {index}: {found} were found, counted from 0")));
        }
    };
    let adapter = adapters.swap_remove(index);
    match missing(&adapter) {
        None => Ok(adapter),
        Some(missing) => Err(KernelError::Device(format!(
            "{} lacks {missing}, which the kernels need; use the CPU instead",
            adapter.get_info().name
        ))),
    }
}

fn is_software(adapter: &wgpu::Adapter) -> bool {
    adapter.get_info().device_type == wgpu::DeviceType::Cpu
}

/// What an adapter lacks; `None` if it can be used.
fn missing(adapter: &wgpu::Adapter) -> Option<String> {
    let features = NEEDED - adapter.features();
    if !features.is_empty() {
        return Some(features.to_string());
    }
    let memory = adapter.limits().max_compute_workgroup_storage_size;
    (memory < WORKGROUP_MEMORY).then(|| format!("workgroup memory ({memory} bytes, of {WORKGROUP_MEMORY} wanted)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_finds_the_gpu_that_it_means() {
        let adapters = adapters();
        let name = |choice| find(choice).map(|adapter| adapter.get_info().name);
        let fit = adapters.iter().find(|adapter| !adapter.is_software && adapter.missing.is_none());
        match (fit, name(GpuChoice::FirstHardware)) {
            (Some(fit), found) => assert_eq!(found.unwrap(), fit.name),
            (None, found) => assert!(matches!(found, Err(KernelError::NoGpu)), "{found:?}"),
        }
        for (index, adapter) in adapters.iter().enumerate() {
            assert_eq!(name(GpuChoice::Index(index)).ok(), adapter.missing.is_none().then(|| adapter.name.clone()));
        }
        assert_eq!(name(GpuChoice::First).ok(), name(GpuChoice::Index(0)).ok());
        let beyond = name(GpuChoice::Index(adapters.len())).unwrap_err().to_string();
        let wanted = if adapters.is_empty() { "no GPU was found" } else { "counted from 0" };
        assert!(beyond.contains(wanted), "{beyond}");
    }
}
