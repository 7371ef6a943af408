//! How long the device takes.

use super::device::Gpu;
use crate::KernelError;

/// Passes whose times a set of queries holds: as many as one can.
const PASSES_OF_SET: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;

/// The device's clock at the beginning and the end of passes.
pub(super) struct Timing {
    sets: Vec<wgpu::QuerySet>,
    passes: usize,
}

impl Timing {
    /// # Errors
    /// The device has no clock.
    pub(super) fn new(gpu: &Gpu) -> Result<Self, KernelError> {
        if !gpu.caps.timestamps {
            return Err(KernelError::Device(format!("{} has no clock that kernels can be timed by", gpu.caps.name)));
        }
        Ok(Self { sets: Vec::new(), passes: 0 })
    }

    /// How many passes were timed so far.
    pub(super) fn passes(&self) -> usize {
        self.passes
    }

    /// Where the next pass writes the clock.
    pub(super) fn next_pass(&mut self, gpu: &Gpu) -> wgpu::ComputePassTimestampWrites<'_> {
        let (set, pass) = (self.passes / PASSES_OF_SET, self.passes % PASSES_OF_SET);
        if set == self.sets.len() {
            self.sets.push(gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count: 2 * PASSES_OF_SET as u32,
            }));
        }
        self.passes += 1;
        let first = 2 * pass as u32;
        wgpu::ComputePassTimestampWrites {
            query_set: &self.sets[set],
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        }
    }

    /// When each pass began and ended, in seconds from the beginning of the first, after all were submitted.
    pub(super) fn seconds(self, gpu: &Gpu) -> Result<Vec<[f64; 2]>, KernelError> {
        let mut stamps: Vec<[u64; 2]> = vec![[0; 2]; self.passes];
        for (set, stamps) in self.sets.iter().zip(stamps.chunks_mut(PASSES_OF_SET)) {
            let bytes = size_of_val(stamps) as u64;
            let resolved = gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("timestamps"),
                size: bytes,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            let readback = gpu.readback("timestamps", bytes);
            let mut commands = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            commands.resolve_query_set(set, 0..2 * stamps.len() as u32, &resolved, 0);
            commands.copy_buffer_to_buffer(&resolved, 0, &readback, 0, bytes);
            gpu.queue.submit([commands.finish()]);
            gpu.read_mapped(&readback, None, bytemuck::cast_slice_mut(stamps))?;
        }
        let first = stamps.first().map_or(0, |[begin, _]| *begin);
        let period = f64::from(gpu.queue.get_timestamp_period()) * 1e-9;
        let seconds = |stamp: u64| stamp.saturating_sub(first) as f64 * period;
        Ok(stamps.into_iter().map(|pass| pass.map(seconds)).collect())
    }
}
