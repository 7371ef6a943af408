//! Opens devices of Vulkan as the kernels want them.

use std::ffi::c_void;

use ash::vk;
use wgpu::hal::api::Vulkan;

/// Opens a device without robust buffer access, which wgpu asks for wherever it is there: drivers then compare the place of every load with the end
/// of its buffer, and loads are no longer put together. `None` if the adapter is not one of Vulkan, or does not open that way.
///
/// # Safety
/// Kernels that run on the device index within their buffers, whether or not they were compiled with checks.
pub(super) unsafe fn open_without_checks(
    adapter: &wgpu::Adapter,
    descriptor: &wgpu::DeviceDescriptor<'_>,
) -> Option<(wgpu::Device, wgpu::Queue)> {
    // SAFETY: the handle is used for as long as the adapter lives, and nothing of it is destroyed.
    let hal = unsafe { adapter.as_hal::<Vulkan>() }?;
    let features = descriptor.required_features;
    let extensions = hal.required_device_extensions(features);
    let mut enabled = hal.physical_device_features(&extensions, features);
    let core = vk::PhysicalDeviceFeatures { robust_buffer_access: vk::FALSE, ..enabled.get_core() };
    // As wgpu itself does.
    let family_index = 0;
    let queues = [vk::DeviceQueueCreateInfo::default().queue_family_index(family_index).queue_priorities(&[1.0])];
    let names: Vec<_> = extensions.iter().map(|name| name.as_ptr()).collect();
    let info = vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&names);
    let info = enabled.add_to_device_create(info).enabled_features(&core);
    // SAFETY: the chain was made by `add_to_device_create` of structures that `enabled` owns and that nothing else refers to.
    unsafe { clear_robust_access(info.p_next) };
    let instance = hal.shared_instance().raw_instance();
    // SAFETY: the physical device is the instance's, and all that `info` points to is alive.
    let device = unsafe { instance.create_device(hal.raw_physical_device(), &info, None) }.ok()?;
    // SAFETY: the device was made from this adapter with these extensions and queues, and is given away. It has the adapter's features but
    // for robust access, which the caller does without.
    let open = unsafe {
        hal.device_from_raw(
            device,
            None,
            &extensions,
            features,
            &descriptor.required_limits,
            &descriptor.memory_hints,
            family_index,
            0,
        )
    };
    // SAFETY: the device was made from this adapter with the descriptor's features.
    unsafe { adapter.create_device_from_hal(open.ok()?, descriptor) }.ok()
}

/// Turns off robust access to buffers in a chain of features.
///
/// # Safety
/// The chain is of Vulkan's structures, which nothing else refers to.
unsafe fn clear_robust_access(mut next: *const c_void) {
    // SAFETY: every structure of a chain begins with its type and the pointer to the next.
    while let Some(structure) = unsafe { next.cast_mut().cast::<vk::BaseOutStructure<'_>>().as_mut() } {
        if structure.s_type == vk::StructureType::PHYSICAL_DEVICE_ROBUSTNESS_2_FEATURES_EXT {
            // SAFETY: the type says what it is.
            let robustness = unsafe { &mut *next.cast_mut().cast::<vk::PhysicalDeviceRobustness2FeaturesEXT<'_>>() };
            robustness.robust_buffer_access2 = vk::FALSE;
        }
        next = structure.p_next.cast();
    }
}
