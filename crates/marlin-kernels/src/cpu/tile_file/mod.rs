//! Tiles of a model in a file, so that it is put into tile order once, and mapped from then on.

mod format;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use marlin_format::Scheme;
use memmap2::Mmap;

use self::format::{HEADER_BYTES, Matrix, MatrixName, Section, Table};
use super::CpuBackend;
use super::linear::{SECTIONS, TileBytes};
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

impl TileFileOptions {
    /// What a file must have been made for.
    fn key(&self, backend: &CpuBackend) -> Result<String, KernelError> {
        Ok(format!("{}, tiles {}", self.fingerprint, backend.tile_layout()?))
    }
}

/// The linears of one model in tile order, in a file ([`CpuBackend::with_tiles`]).
///
/// If the file is there, linears are mapped from it: they are not put into order again, the weights they come from are not read, and
/// processes that use the same file share its memory. If it is not, linears are put into order in memory as ever, and
/// [`TileFile::finish`] writes them to the file from there, while the model runs.
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
    /// None once it is being written.
    unwritten: Option<Unwritten>,
    writing: Option<JoinHandle<()>>,
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
pub(super) struct Kept {
    /// The tiles are of the weights in f32.
    pub(super) converted: bool,
    /// What the kernel's sums are multiplied by in the end.
    pub(super) factor: f32,
    /// Codes, scales, zero points or biases, what super-groups share.
    pub(super) sections: [TileBytes; SECTIONS],
}

impl TileFile {
    /// Opens the file; `None` if it is not there, or was made for something else.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn open_stored(backend: &CpuBackend, options: &TileFileOptions) -> Result<Option<Self>, KernelError> {
        let role = stored(&options.path, &options.key(backend)?)?;
        Ok(role.map(|role| Self { role, report: options.report }))
    }

    /// Opens the file, or begins to make it for what `backend` will load; `None` if another process makes it at this moment.
    ///
    /// # Errors
    /// The file cannot be read, or its folder or lock cannot be written.
    pub fn open(backend: &CpuBackend, options: TileFileOptions) -> Result<Option<Self>, KernelError> {
        if let Some(file) = Self::open_stored(backend, &options)? {
            return Ok(Some(file));
        }
        let key = options.key(backend)?;
        let TileFileOptions { path, lock, model, report, .. } = options;
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
        let table = Table { key, model, matrices: Vec::new() };
        let unwritten = Unwritten { path, table, sections: Vec::new(), end: HEADER_BYTES, _lock: lock_file };
        let making = Making { unwritten: Some(unwritten), writing: None };
        Ok(Some(Self { role: Role::Making(Mutex::new(making)), report }))
    }

    /// Whether linears come from the file.
    pub fn is_stored(&self) -> bool {
        matches!(self.role, Role::Stored { .. })
    }

    /// Writes a file that is being made, when all linears are loaded. That takes as long as the disk needs, and happens while the model runs;
    /// whoever drops the file or the last of its linears waits for it.
    pub fn finish(&self) {
        let Role::Making(making) = &self.role else { return };
        let mut making = lock(making);
        let Some(unwritten) = making.unwritten.take() else { return };
        let report = self.report;
        let work = move || unwritten.write().unwrap_or_else(|error| report(&error));
        match thread::Builder::new().name("marlin-tiles".into()).spawn(work) {
            Ok(writing) => making.writing = Some(writing),
            Err(source) => report(&KernelError::Device(format!("cannot start a thread to write tiles: {source}"))),
        }
    }

    /// The model that a tile file is of; `None` if the file is none, of another version, or damaged.
    pub fn model_of(path: &Path) -> Option<String> {
        Some(format::read(&File::open(path).ok()?).ok()??.model)
    }

    /// What is kept of a matrix.
    pub(super) fn find(&self, key: &Key<'_>) -> Option<Kept> {
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

    /// Keeps a matrix if the file is being made.
    pub(super) fn keep(&self, key: &Key<'_>, kept: Kept) {
        if let Role::Making(making) = &self.role
            && let Some(unwritten) = &mut lock(making).unwritten
        {
            unwritten.add(key, kept);
        }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if let Some(writing) = self.writing.take() {
            // A panic was reported by the thread itself.
            let _ = writing.join();
        }
    }
}

/// What is to be written.
#[derive(Debug)]
struct Unwritten {
    path: PathBuf,
    table: Table,
    /// Shared with linears, and where they begin.
    sections: Vec<(u64, TileBytes)>,
    /// Where the next section begins.
    end: u64,
    /// Held until the file is in its place.
    _lock: File,
}

impl Unwritten {
    fn add(&mut self, key: &Key<'_>, Kept { converted, factor, sections }: Kept) {
        let sections = sections.map(|bytes| {
            let section = Section { start: self.end, bytes: bytes.bytes().len() as u64 };
            self.end = (section.start + section.bytes).next_multiple_of(TileBytes::ALIGNMENT as u64);
            self.sections.push((section.start, bytes));
            section
        });
        let (name, scheme, factor) = (key.name(), describe(key.scheme), factor.to_bits());
        let matrix = Matrix { name, scheme, rows: key.rows, cols: key.cols, converted, factor, sections };
        self.table.matrices.push(matrix);
    }

    /// Writes the file beside its place and renames it.
    fn write(mut self) -> Result<(), KernelError> {
        let partial = self.path.with_extension(PARTIAL_EXTENSION);
        let sections = std::mem::take(&mut self.sections);
        let written = File::create(&partial).and_then(|mut file| {
            for (start, bytes) in sections {
                file.seek(SeekFrom::Start(start))?;
                file.write_all(bytes.bytes())?;
            }
            format::complete(&file, self.end, &self.table)
        });
        written
            .map_err(error("write", &partial))
            .and_then(|()| fs::rename(&partial, &self.path).map_err(error("write", &self.path)))
            .inspect_err(|_| {
                // What cannot be removed is overwritten by the next that is made.
                let _ = fs::remove_file(&partial);
            })
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
    // or truncates the file while it is mapped. This project never does: files are written under another name, where no file is mapped,
    // and renamed. Of others it is asked in `TileFile`.
    let map = unsafe { Mmap::map(&file) }.map_err(error("map", path))?;
    let matrices = table.matrices.into_iter().map(|matrix| (matrix.name.clone(), matrix)).collect();
    Ok(Some(Role::Stored { map: Arc::new(map), matrices }))
}

/// All of a scheme.
fn describe(scheme: &Scheme) -> String {
    format!("{scheme:?}")
}

fn lock(making: &Mutex<Making>) -> MutexGuard<'_, Making> {
    // What a panic leaves is a file without a matrix, which is then packed at every start.
    making.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KernelError {
    let path = path.to_path_buf();
    move |source| KernelError::TileFile { action, path, source }
}
