//! Tiles of a model in a file, so that it is put into tile order once, and mapped from then on.

mod format;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use marlin_format::Scheme;
use memmap2::{Mmap, MmapOptions};

use self::format::{HEADER_BYTES, Matrix, MatrixName, Section, Table};
use super::CpuBackend;
use super::linear::TileBytes;
use crate::KernelError;

/// A file being made, beside its place.
const PARTIAL_EXTENSION: &str = "partial";

/// Where the tiles of a model are kept.
#[derive(Debug, Clone)]
pub struct TileFileOptions {
    /// The file. What is there is replaced if it was made for another key or by another version, or is damaged; its folder is made.
    pub path: PathBuf,
    /// A file that is locked while [`TileFileOptions::path`] is made, and never removed.
    pub lock: PathBuf,
    /// What tells the weights from others that may have the same path.
    pub fingerprint: String,
    /// The model, for people.
    pub model: String,
    /// Hears why the file cannot be written; the model is loaded without it.
    pub report: fn(&KernelError),
}

/// The linears of one model in tile order, in a file ([`CpuBackend::with_tiles`]).
///
/// If the file is there, linears are mapped from it: they are not put into order again, the weights they come from are not read, and
/// processes that use the same file share its memory. If it is not, each linear is written to it and then mapped, so that no more than
/// one matrix is in memory twice; [`TileFile::finish`] puts the file in its place.
///
/// Nobody may change or truncate the file while it is mapped. To remove or to replace it is allowed.
#[derive(Debug)]
pub struct TileFile {
    role: Role,
    report: fn(&KernelError),
}

#[derive(Debug)]
enum Role {
    Stored { map: Arc<Mmap>, matrices: HashMap<MatrixName, Matrix> },
    Making(Mutex<Making>),
}

#[derive(Debug)]
struct Making {
    /// None once it is being finished, or cannot be written.
    unfinished: Option<Unfinished>,
    finishing: Option<JoinHandle<()>>,
}

/// A matrix to keep or to find.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key<'a> {
    /// The name of its linear.
    pub(super) linear: &'a str,
    /// Its place there.
    pub(super) part: usize,
    pub(super) scheme: &'a Scheme,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Key<'_> {
    fn name(&self) -> MatrixName {
        MatrixName { linear: self.linear.to_owned(), part: self.part }
    }
}

/// A matrix in tile order.
#[derive(Debug)]
pub(super) struct Kept<B> {
    /// The tiles are of the weights in f32.
    pub(super) converted: bool,
    /// What the kernel's sums are multiplied by in the end.
    pub(super) factor: f32,
    /// Codes, scales, offsets.
    pub(super) sections: [B; 3],
}

impl TileFile {
    /// Opens the file, or begins to make it for what `backend` will load; `None` if another process makes it at this moment.
    ///
    /// # Errors
    /// The file cannot be read, or its folder or lock cannot be written.
    pub fn open(backend: &CpuBackend, options: TileFileOptions) -> Result<Option<Self>, KernelError> {
        let TileFileOptions { path, lock, fingerprint, model, report } = options;
        let key = format!("{fingerprint}, tiles {}", backend.tile_layout()?);
        if let Some(role) = stored(&path, &key)? {
            return Ok(Some(Self { role, report }));
        }
        for folder in [&path, &lock].into_iter().filter_map(|path| path.parent()) {
            fs::create_dir_all(folder).map_err(error("create", folder))?;
        }
        let lock_file = File::create(&lock).map_err(error("create", &lock))?;
        match lock_file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(source)) => return Err(error("lock", &lock)(source)),
        }
        // Another process may have made it meanwhile.
        if let Some(role) = stored(&path, &key)? {
            return Ok(Some(Self { role, report }));
        }
        let unfinished = Unfinished::begin(path, lock_file, Table { key, model, matrices: Vec::new() })?;
        let making = Making { unfinished: Some(unfinished), finishing: None };
        Ok(Some(Self { role: Role::Making(Mutex::new(making)), report }))
    }

    /// Whether linears come from the file.
    pub fn is_stored(&self) -> bool {
        matches!(self.role, Role::Stored { .. })
    }

    /// Puts a file that was made in its place, when all linears are loaded. That takes as long as the disk needs to write it, and happens
    /// while the model runs; whoever drops the file or the last of its linears waits for it.
    pub fn finish(&self) {
        let Role::Making(making) = &self.role else { return };
        let mut making = lock(making);
        let Some(unfinished) = making.unfinished.take() else { return };
        let report = self.report;
        let work = move || unfinished.finish().unwrap_or_else(|error| report(&error));
        match thread::Builder::new().name("marlin-tiles".into()).spawn(work) {
            Ok(finishing) => making.finishing = Some(finishing),
            Err(source) => report(&KernelError::Device(format!("cannot start a thread to write tiles: {source}"))),
        }
    }

    /// The model that a tile file is of; `None` if the file is none, of another version, or damaged.
    pub fn model_of(path: &Path) -> Option<String> {
        Some(format::read(&File::open(path).ok()?).ok()??.model)
    }

    /// What is kept of a matrix.
    pub(super) fn find(&self, key: &Key<'_>) -> Option<Kept<TileBytes>> {
        let Role::Stored { map, matrices } = &self.role else { return None };
        let matrix = matrices.get(&key.name())?;
        if (matrix.rows, matrix.cols) != (key.rows, key.cols) || matrix.scheme != describe(key.scheme) {
            return None;
        }
        let mapped = |section: Section| TileBytes::mapped(map, section.start as usize, section.bytes as usize);
        Some(Kept {
            converted: matrix.converted,
            factor: f32::from_bits(matrix.factor),
            sections: matrix.sections.map(mapped),
        })
    }

    /// Keeps a matrix if the file is being made; the bytes are then those of the file.
    pub(super) fn keep(&self, key: &Key<'_>, kept: &Kept<&[u8]>) -> Option<[TileBytes; 3]> {
        let Role::Making(making) = &self.role else { return None };
        let mut making = lock(making);
        match making.unfinished.as_mut()?.keep(key, kept) {
            Ok(sections) => Some(sections),
            Err(error) => {
                making.unfinished = None;
                (self.report)(&error);
                None
            }
        }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if let Some(finishing) = self.finishing.take() {
            // A panic was reported by the thread itself.
            let _ = finishing.join();
        }
    }
}

/// A file that lacks matrices, table and header. It is removed when dropped.
#[derive(Debug)]
struct Unfinished {
    file: File,
    path: PathBuf,
    /// Where it is made.
    partial: PathBuf,
    /// Where the next section begins.
    end: u64,
    table: Table,
    /// Held until nothing is left at `partial`.
    _lock: File,
}

impl Unfinished {
    fn begin(path: PathBuf, lock: File, table: Table) -> Result<Self, KernelError> {
        let partial = path.with_extension(PARTIAL_EXTENSION);
        // What a killed process left is removed and not overwritten: it may be mapped.
        match fs::remove_file(&partial) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error("remove", &partial)(source)),
            _ => {}
        }
        let opened = OpenOptions::new().read(true).write(true).create_new(true).open(&partial);
        let file = opened.map_err(error("create", &partial))?;
        Ok(Self { file, path, partial, end: HEADER_BYTES, table, _lock: lock })
    }

    fn keep(&mut self, key: &Key<'_>, kept: &Kept<&[u8]>) -> Result<[TileBytes; 3], KernelError> {
        let begin = self.end;
        let mut sections = [Section::default(); 3];
        for (section, bytes) in sections.iter_mut().zip(kept.sections) {
            *section = Section { start: self.end, bytes: bytes.len() as u64 };
            let written = self.file.seek(SeekFrom::Start(self.end)).and_then(|_| self.file.write_all(bytes));
            written.map_err(error("write", &self.partial))?;
            self.end = (self.end + section.bytes).next_multiple_of(TileBytes::ALIGNMENT as u64);
        }
        // Up to the last byte that was written.
        let len = sections.iter().map(|section| section.start + section.bytes).max().unwrap_or(begin) - begin;
        // SAFETY: as in `stored`; what follows is written behind the map.
        let map = unsafe { MmapOptions::new().offset(begin).len(len as usize).map(&self.file) };
        let map = Arc::new(map.map_err(error("map", &self.partial))?);
        self.table.matrices.push(Matrix {
            name: key.name(),
            scheme: describe(key.scheme),
            rows: key.rows,
            cols: key.cols,
            converted: kept.converted,
            factor: kept.factor.to_bits(),
            sections,
        });
        Ok(sections.map(|section| TileBytes::mapped(&map, (section.start - begin) as usize, section.bytes as usize)))
    }

    fn finish(self) -> Result<(), KernelError> {
        format::complete(&self.file, self.end, &self.table).map_err(error("write", &self.partial))?;
        fs::rename(&self.partial, &self.path).map_err(error("write", &self.path))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // There is none any more if it is in its place.
        let _ = fs::remove_file(&self.partial);
    }
}

/// Maps the file at `path`, if it is whole and has this key.
fn stored(path: &Path, key: &str) -> Result<Option<Role>, KernelError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(error("open", path)(source)),
    };
    let Some(table) = format::read(&file).map_err(error("read", path))?.filter(|table| table.key == key) else {
        return Ok(None);
    };
    // SAFETY: the map is read-only and only ever seen as bytes, for which every bit pattern is valid. What is left is that nobody changes
    // or truncates the file while it is mapped. This project never does: files are written under another name, each a new one, and
    // renamed. Of others it is asked in `TileFile`.
    let map = unsafe { Mmap::map(&file) }.map_err(error("map", path))?;
    let matrices = table.matrices.into_iter().map(|matrix| (matrix.name.clone(), matrix)).collect();
    Ok(Some(Role::Stored { map: Arc::new(map), matrices }))
}

/// All of a scheme.
fn describe(scheme: &Scheme) -> String {
    format!("{scheme:?}")
}

fn lock(making: &Mutex<Making>) -> MutexGuard<'_, Making> {
    // What a panic leaves is a file without the matrix at hand; it is not found later, and packed again.
    making.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KernelError {
    let path = path.to_path_buf();
    move |source| KernelError::TileFile { action, path, source }
}
