//! How much of a device's memory a program can have, and how much it has.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a device's memory that are taken.
#[derive(Debug, Default)]
pub(super) struct Account(Arc<AtomicU64>);

/// Bytes that count as taken while it exists.
#[derive(Debug)]
pub(super) struct Taken {
    account: Arc<AtomicU64>,
    bytes: u64,
}

impl Account {
    pub(super) fn take(&self, bytes: u64) -> Taken {
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Taken { account: self.0.clone(), bytes }
    }

    pub(super) fn taken(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.account.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Bytes that a new program should take of the device's memory, at most; `None` if the device does not tell. Of the memory that is free
/// or recommended, a little stays for the driver itself.
pub(super) fn budget(adapter: &wgpu::Adapter) -> Option<u64> {
    // A processor that plays a GPU has all of the machine's memory, whatever its driver says.
    let is_software = adapter.get_info().device_type == wgpu::DeviceType::Cpu;
    free(adapter).filter(|_| !is_software).map(|bytes| bytes / 100 * USABLE_PERCENT)
}

/// Beyond this share of what the driver says is free, a buffer is an error and not a slow machine.
pub(super) const USABLE_PERCENT: u64 = 97;

/// The largest heap of the device's own memory, less what other programs have of it where the driver tells (VK_EXT_memory_budget).
#[cfg(not(target_vendor = "apple"))]
fn free(adapter: &wgpu::Adapter) -> Option<u64> {
    use ash::{ext, vk};

    // SAFETY: the adapter is only asked for properties, and outlives the guard.
    let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = adapter.shared_instance();
    if instance.instance_api_version() < vk::API_VERSION_1_1 {
        return None;
    }
    let tells_budget = adapter.physical_device_capabilities().supports_extension(ext::memory_budget::NAME);
    let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
    let mut properties = vk::PhysicalDeviceMemoryProperties2::default();
    if tells_budget {
        properties = properties.push_next(&mut budget);
    }
    // SAFETY: the physical device is the instance's, whose version has the function; the structures are Vulkan's own, the extension's
    // only where the device has it.
    unsafe {
        let (instance, device) = (instance.raw_instance(), adapter.raw_physical_device());
        instance.get_physical_device_memory_properties2(device, &mut properties);
    }
    let heaps = properties.memory_properties;
    let is_own = |heap: &vk::MemoryHeap| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL);
    let heaps = heaps.memory_heaps.iter().take(heaps.memory_heap_count as usize).enumerate();
    let free = heaps.filter(|(_, heap)| is_own(heap)).map(|(index, heap)| {
        if tells_budget { budget.heap_budget[index].saturating_sub(budget.heap_usage[index]) } else { heap.size }
    });
    free.max()
}

/// What Metal recommends as a working set: beyond it, memory that is in use may be swapped.
#[cfg(target_vendor = "apple")]
fn free(adapter: &wgpu::Adapter) -> Option<u64> {
    use objc2_metal::MTLDevice;

    // SAFETY: the adapter is only asked for a property, and outlives the guard.
    let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Metal>() }?;
    Some(adapter.raw_device().recommendedMaxWorkingSetSize())
}

#[cfg(test)]
mod tests {
    use crate::gpu::adapter::{enumerate, instance};

    #[test]
    fn devices_tell_their_memory() {
        for adapter in enumerate(&instance()) {
            let free = super::free(&adapter).expect("Vulkan and Metal tell");
            assert!((64 << 20..1 << 50).contains(&free), "{free} bytes of {}", adapter.get_info().name);
        }
    }
}
