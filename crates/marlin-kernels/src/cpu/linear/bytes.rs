//! Memory that tiles lie in: their own, or that of a file.

use std::sync::Arc;

use memmap2::Mmap;

use crate::KernelError;
use crate::host::allocate;

/// Bytes of tiles. They begin on a cache line, so that no vector of a tile straddles two. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct TileBytes {
    memory: Memory,
    start: usize,
    len: usize,
}

#[derive(Debug, Clone)]
enum Memory {
    Owned(Arc<Vec<u8>>),
    /// Of a file that nobody changes (see [`crate::cpu::TileFile`]), so that processes share it.
    Mapped(Arc<Mmap>),
}

impl TileBytes {
    pub(crate) const ALIGNMENT: usize = 64;

    /// So many zeros of its own; `what` they are for is for the error.
    pub(super) fn zeroed(what: &str, panels: usize, panel_bytes: usize) -> Result<Self, KernelError> {
        let len = panels.saturating_mul(panel_bytes);
        let memory: Vec<u8> = allocate(what, &[len.saturating_add(Self::ALIGNMENT)], "cpu")?;
        // An address has an offset to any power of two; the minimum is for the compiler.
        let start = memory.as_ptr().align_offset(Self::ALIGNMENT).min(Self::ALIGNMENT);
        Ok(Self { memory: Memory::Owned(Arc::new(memory)), start, len })
    }

    /// `len` bytes of a mapped file from `start` on, which are within it.
    pub(crate) fn mapped(map: &Arc<Mmap>, start: usize, len: usize) -> Self {
        assert!(start <= map.len() && len <= map.len() - start, "a section within the file");
        Self { memory: Memory::Mapped(Arc::clone(map)), start, len }
    }

    #[inline(always)]
    pub(crate) fn bytes(&self) -> &[u8] {
        let memory: &[u8] = match &self.memory {
            Memory::Owned(memory) => memory,
            Memory::Mapped(map) => map,
        };
        &memory[self.start..][..self.len]
    }

    /// The bytes, to fill them in.
    ///
    /// # Panics
    /// They are a file's, or shared.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let memory = match &mut self.memory {
            Memory::Owned(memory) => Arc::get_mut(memory),
            Memory::Mapped(_) => None,
        };
        &mut memory.expect("bytes of one's own")[self.start..][..self.len]
    }
}
