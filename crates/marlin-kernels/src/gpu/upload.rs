//! Brings weights to the device.

use rayon::prelude::*;

use super::device::{Gpu, Storage};
use crate::KernelError;

/// Bytes that go to the device at once.
pub(super) const PIECE: usize = 16 << 20;

/// Device memory that is filled once, from its beginning to its end: by the host in place, where it can be
/// ([`GpuCaps::mappable`](super::GpuCaps::mappable)), or else through staging memory of a bounded size.
pub(super) struct Upload<'a> {
    gpu: &'a Gpu,
    storage: Storage,
    /// The memory as the host has it, unless it goes through staging memory.
    mapped: Option<wgpu::BufferViewMut>,
    filled: usize,
}

impl<'a> Upload<'a> {
    /// Memory of so many bytes; `what` it holds is said where there is not enough.
    pub(super) fn new(gpu: &'a Gpu, what: &str, bytes: usize) -> Result<Self, KernelError> {
        let storage = gpu.weight_storage(what, bytes, gpu.caps.mappable)?;
        let mapped = gpu.caps.mappable.then(|| storage.buffer.get_mapped_range_mut(..)).transpose();
        let mapped = mapped.map_err(|error| {
            KernelError::Device(format!("{} does not let {what} be written: {error}", gpu.caps.name))
        })?;
        Ok(Self { gpu, storage, mapped, filled: 0 })
    }

    /// Memory with these contents.
    pub(super) fn all<T: bytemuck::NoUninit>(gpu: &'a Gpu, what: &str, values: &[T]) -> Result<Storage, KernelError> {
        let mut upload = Self::new(gpu, what, size_of_val(values))?;
        upload.write(bytemuck::cast_slice(values))?;
        Ok(upload.finish())
    }

    /// Appends bytes, whole words.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), KernelError> {
        for piece in bytes.chunks(PIECE) {
            let place = self.filled..self.filled + piece.len();
            self.filled = place.end;
            if let Some(mapped) = &mut self.mapped {
                mapped.slice(place).copy_from_slice(piece);
                continue;
            }
            self.gpu.write(&self.storage, place.start as u64, piece);
            // Staging memory is given back when its copy has run.
            self.gpu.queue.submit([]);
            if piece.len() == PIECE { self.gpu.wait()? } else { self.gpu.check()? }
        }
        Ok(())
    }

    /// Appends rows of so many words each, which `fill` makes.
    pub(super) fn write_rows(
        &mut self,
        rows: usize,
        row_words: usize,
        fill: impl Fn(usize, &mut [u32]) + Sync,
    ) -> Result<(), KernelError> {
        // Not in place, even where the memory is mapped: it may be slow to read, and is written best from its beginning to its end.
        let step = (PIECE / (row_words * 4)).clamp(1, rows);
        let mut words = vec![0; step * row_words];
        for start in (0..rows).step_by(step) {
            let words = &mut words[..step.min(rows - start) * row_words];
            let each = words.par_chunks_exact_mut(row_words).enumerate();
            each.for_each(|(row, words)| fill(start + row, words));
            self.write(bytemuck::cast_slice(words))?;
        }
        Ok(())
    }

    /// The memory, for kernels to read.
    pub(super) fn finish(self) -> Storage {
        // Views end before the mapping does.
        if let Some(mapped) = self.mapped {
            drop(mapped);
            self.storage.buffer.unmap();
        }
        self.storage
    }
}
