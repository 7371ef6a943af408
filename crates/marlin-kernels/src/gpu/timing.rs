//! How long the device takes.

use super::device::Gpu;
use crate::KernelError;

/// Passes that can be timed at once.
const MAX_PASSES: u32 = 64;

/// The device's clock at the beginning and the end of passes.
pub(super) struct Timing {
    queries: wgpu::QuerySet,
    passes: u32,
}

impl Timing {
    pub(super) fn new(gpu: &Gpu) -> Result<Self, KernelError> {
        if !gpu.caps.timestamps {
            return Err(KernelError::Device(format!("{} has no clock that kernels can be timed by", gpu.caps.name)));
        }
        let queries = gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: None,
            ty: wgpu::QueryType::Timestamp,
            count: 2 * MAX_PASSES,
        });
        Ok(Self { queries, passes: 0 })
    }

    /// Where the next pass writes the clock; `None` once there are too many.
    pub(super) fn next_pass(&mut self) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let first = 2 * self.passes;
        (self.passes < MAX_PASSES).then(|| {
            self.passes += 1;
            wgpu::ComputePassTimestampWrites {
                query_set: &self.queries,
                beginning_of_pass_write_index: Some(first),
                end_of_pass_write_index: Some(first + 1),
            }
        })
    }

    /// Seconds from the first beginning to the last end, after the passes were submitted.
    pub(super) fn seconds(self, gpu: &Gpu) -> Result<f64, KernelError> {
        if self.passes == 0 {
            return Ok(0.0);
        }
        let bytes = u64::from(2 * self.passes) * size_of::<u64>() as u64;
        let resolved = gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("timestamps"),
            size: bytes,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        let readback = gpu.readback("timestamps", bytes);
        let mut commands = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        commands.resolve_query_set(&self.queries, 0..2 * self.passes, &resolved, 0);
        commands.copy_buffer_to_buffer(&resolved, 0, &readback, 0, bytes);
        gpu.queue.submit([commands.finish()]);
        let mut stamps = vec![0u64; 2 * self.passes as usize];
        gpu.read_mapped(&readback, None, bytemuck::cast_slice_mut(&mut stamps))?;
        let ticks = stamps[stamps.len() - 1].saturating_sub(stamps[0]);
        Ok(ticks as f64 * f64::from(gpu.queue.get_timestamp_period()) * 1e-9)
    }
}
