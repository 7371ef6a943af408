//! Compiled kernels on disk, so that a device compiles each only once.
//!
//! ```text
//! FOLDER/NAME.pipelines    NAME is wgpu's for adapters that share compiled kernels
//!   "marlin-pipelines-1\n" the length of what follows, its checksum, the driver's name and version, a zero, and
//!                          what the driver made
//! ```
//!
//! A file that is not whole, or was made by another driver, counts as none. It only saves time, so that nothing fails for its sake.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

const MAGIC: &[u8] = b"marlin-pipelines-1\n";

/// What files of compiled kernels end with.
pub const PIPELINE_CACHE_EXTENSION: &str = "pipelines";

/// The compiled kernels of a device.
pub(super) struct DiskCache {
    pub(super) cache: wgpu::PipelineCache,
    path: PathBuf,
    driver: String,
    /// Kernels compiled since it was read or written.
    unsaved: AtomicUsize,
}

impl DiskCache {
    /// What the folder holds for the device, or an empty cache; `None` if such a device's kernels cannot be kept.
    pub(super) fn open(device: &wgpu::Device, adapter: &wgpu::AdapterInfo, folder: &Path) -> Option<Self> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let name = wgpu::util::pipeline_cache_key(adapter)?;
        let path = folder.join(name).with_extension(PIPELINE_CACHE_EXTENSION);
        let driver = format!("{} {}", adapter.driver, adapter.driver_info);
        let content = fs::read(&path).unwrap_or_default();
        let data = unwrap(&content, &driver);
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("kernels on disk"), data, fallback: true };
        // SAFETY: the data are what this driver gave, whole, as the checksum and the driver's name say; wgpu and the driver compare
        // their own headers, too.
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Some(Self { cache, path, driver, unsaved: AtomicUsize::new(0) })
    }

    /// Counts a kernel that was compiled with it.
    pub(super) fn note_compiled(&self) {
        self.unsaved.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes the file if kernels were compiled since the last time. That it cannot be written costs the next start some time, no more.
    pub(super) fn save(&self) {
        if self.unsaved.swap(0, Ordering::Relaxed) > 0 {
            let data = self.cache.get_data();
            let _ = data.map_or(Ok(()), |data| replace(&self.path, &wrap(&data, &self.driver)));
        }
    }
}

fn wrap(data: &[u8], driver: &str) -> Vec<u8> {
    let payload = [driver.as_bytes(), &[0], data].concat();
    [MAGIC, &(payload.len() as u64).to_le_bytes(), &checksum(&payload).to_le_bytes(), &payload].concat()
}

/// What the driver made, if the file is whole and the driver the same.
fn unwrap<'a>(content: &'a [u8], driver: &str) -> Option<&'a [u8]> {
    let (length, rest) = content.strip_prefix(MAGIC)?.split_first_chunk()?;
    let (sum, payload) = rest.split_first_chunk()?;
    let is_whole = u64::from_le_bytes(*length) == payload.len() as u64 && u64::from_le_bytes(*sum) == checksum(payload);
    payload.strip_prefix(driver.as_bytes())?.strip_prefix(&[0]).filter(|_| is_whole)
}

/// FNV-1a (Fowler, Noll and Vo): against accidents, not against people, who could as well replace the program.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Writes a file beside its place and renames it, so that another process sees the old one or the new one.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let written = File::create(&beside).and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()));
    written.and_then(|()| fs::rename(&beside, path)).inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{GpuBackend, GpuOptions};
    use crate::{Backend, StepLimits};

    const LIMITS: StepLimits = StepLimits { tokens: 1, context: 1, width: 1, vocabulary: 1, logit_rows: 1 };

    #[test]
    fn only_whole_files_of_the_same_driver_are_used() {
        let whole = wrap(b"compiled", "driver 1");
        assert_eq!(unwrap(&whole, "driver 1"), Some(&b"compiled"[..]));
        assert_eq!(unwrap(&whole, "driver 2"), None);
        assert_eq!(unwrap(&whole, "driver"), None);
        for end in 0..whole.len() {
            assert_eq!(unwrap(&whole[..end], "driver 1"), None, "{end} bytes of it");
        }
        for i in 0..whole.len() {
            let mut spoilt = whole.clone();
            spoilt[i] ^= 1;
            assert_eq!(unwrap(&spoilt, "driver 1"), None, "byte {i}");
        }
    }

    #[test]
    fn kernels_are_found_again_and_spoilt_files_replaced() {
        let folder = std::env::temp_dir().join(format!("marlin-kernels-{}", std::process::id()));
        let open = || GpuBackend::new(GpuOptions { pipeline_cache: Some(folder.clone()), ..GpuOptions::default() });
        let Ok(backend) = open() else { return };
        if !backend.caps().pipeline_cache {
            return;
        }
        let file = || {
            let files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
            let [file] = &files[..] else { panic!("one file: {files:?}") };
            file.clone()
        };
        backend.encoder(&LIMITS).unwrap();
        let content = fs::read(file()).unwrap();
        let driver = backend.gpu.disk_cache.as_ref().unwrap().driver.clone();
        assert!(unwrap(&content, &driver).is_some_and(|data| !data.is_empty()));
        drop(backend);

        fs::write(file(), &content[..content.len() / 2]).unwrap();
        open().unwrap().encoder(&LIMITS).unwrap();
        assert!(unwrap(&fs::read(file()).unwrap(), &driver).is_some());
        fs::remove_dir_all(&folder).unwrap();
    }
}
