//! The threads that wait for the disk.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use marlin_model::BlockHash;

use super::StoreError;
use super::file::{BlockKey, Damage};
use super::index::{Index, LastUse, PARTIAL_EXTENSION, path_of};

/// What other processes wrote and removed is looked at so often, while blocks are written.
const RESCAN: Duration = Duration::from_secs(60);
/// What goes wrong is said so often at most.
const REPORTS: Duration = Duration::from_secs(60);

/// What the threads share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) folder: PathBuf,
    pub(super) max_bytes: u64,
    index: Mutex<Index>,
    /// Blocks that wait to be written.
    waiting: Mutex<HashSet<BlockHash>>,
    /// Bytes of blocks that wait to be written.
    pub(super) queued: AtomicU64,
    /// Sequences whose blocks are being read, or wait for that.
    pub(super) fetching: AtomicUsize,
    pub(super) dropped: AtomicU64,
    pub(super) damaged: AtomicU64,
    report: fn(&StoreError),
    reported: Mutex<Option<Instant>>,
}

/// For the thread that writes.
#[derive(Debug)]
pub(super) enum Job {
    /// Write a block.
    Save { key: BlockKey, used: LastUse, payload: Vec<u8> },
    /// Write down that a block was used.
    Touch { name: BlockHash, used: LastUse },
}

/// For the thread that reads: blocks, each of so many bytes of keys and values, and who gets them.
#[derive(Debug)]
pub(super) struct FetchJob {
    pub(super) keys: Vec<BlockKey>,
    pub(super) payload: usize,
    pub(super) blocks: SyncSender<Vec<u8>>,
    /// Memory of blocks that were taken, for those to come.
    pub(super) spare: Receiver<Vec<u8>>,
}

impl Shared {
    pub(super) fn new(folder: PathBuf, max_bytes: u64, index: Index, report: fn(&StoreError)) -> Self {
        Self {
            folder,
            max_bytes,
            index: Mutex::new(index),
            waiting: Mutex::default(),
            queued: AtomicU64::new(0),
            fetching: AtomicUsize::new(0),
            dropped: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            report,
            reported: Mutex::new(None),
        }
    }

    pub(super) fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn waiting(&self) -> MutexGuard<'_, HashSet<BlockHash>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what went wrong, unless something was said a moment ago.
    pub(super) fn report(&self, error: &StoreError) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.is_none_or(|last| last.elapsed() > REPORTS) {
            *reported = Some(Instant::now());
            (self.report)(error);
        }
    }

    /// Removes what was not used for the longest, until the rest is within bounds.
    pub(super) fn evict(&self) {
        let evicted = self.index().evict(self.max_bytes);
        for name in evicted {
            // Another process may have removed it, too.
            let _ = fs::remove_file(path_of(&self.folder, &name));
        }
    }

    /// Reads the blocks of one sequence after the other, as long as somebody asks.
    pub(super) fn read_all(&self, asked: &Receiver<FetchJob>) {
        for FetchJob { keys, payload, blocks, spare } in asked {
            for (index, key) in keys.iter().enumerate() {
                let mut block = spare.try_recv().unwrap_or_default();
                if !self.read(key, payload, &mut block) {
                    break;
                }
                self.touch_file(&key.name, LastUse::now(index));
                if blocks.send(block).is_err() {
                    // Nobody waits any more.
                    break;
                }
            }
            self.fetching.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Reads the keys and values of a block; tells whether its file is what it must be.
    fn read(&self, key: &BlockKey, payload: usize, bytes: &mut Vec<u8>) -> bool {
        let path = path_of(&self.folder, &key.name);
        match File::open(&path).and_then(|mut file| key.read(&mut file, payload, bytes)) {
            Ok(Ok(())) => return true,
            Ok(Err(damage)) => self.discard(&key.name, path, damage),
            Err(source) => {
                self.index().remove(&key.name);
                if source.kind() != io::ErrorKind::NotFound {
                    self.report(&StoreError::Read { path, source });
                }
            }
        }
        false
    }

    /// A file is not what its name says. What another program wrote is left alone.
    fn discard(&self, name: &BlockHash, path: PathBuf, damage: Damage) {
        self.damaged.fetch_add(1, Ordering::Relaxed);
        self.index().remove(name);
        let removed = damage == Damage::Broken && fs::remove_file(&path).is_ok();
        self.report(&StoreError::Damaged { path, removed });
    }

    /// Writes down that a block was used, for the next start; without it the block only seems older.
    fn touch_file(&self, name: &BlockHash, used: LastUse) {
        self.index().touch(name, used);
        let _ = File::open(path_of(&self.folder, name)).and_then(|file| file.set_modified(used.time()));
    }
}

/// Writes blocks.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    /// When the folder was looked through last.
    scanned: Instant,
    /// Tells unfinished files from those of other processes, past ones too.
    id: u128,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { shared, scanned: Instant::now(), id: started.as_nanos() }
    }

    /// Does one job after the other, as long as there may be more.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        for job in jobs {
            match job {
                Job::Touch { name, used } => self.shared.touch_file(&name, used),
                Job::Save { key, used, payload } => {
                    self.save(&key, used, &payload);
                    self.shared.waiting().remove(&key.name);
                    self.shared.queued.fetch_sub(payload.len() as u64, Ordering::AcqRel);
                }
            }
        }
    }

    fn save(&mut self, key: &BlockKey, used: LastUse, payload: &[u8]) {
        let path = path_of(&self.shared.folder, &key.name);
        if let Err(source) = self.write(&path, key, used, payload) {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return self.shared.report(&StoreError::Write { path, source });
        }
        if self.scanned.elapsed() > RESCAN {
            self.scanned = Instant::now();
            if let Ok(index) = Index::scan(&self.shared.folder) {
                *self.shared.index() = index;
            }
        }
        let bytes = BlockKey::file_bytes(key.tokens.len(), payload.len());
        self.shared.index().insert(key.name, bytes, used);
        self.shared.evict();
    }

    /// Writes a file that is there as a whole or not at all.
    fn write(&self, path: &Path, key: &BlockKey, used: LastUse, payload: &[u8]) -> io::Result<()> {
        if let Some(fan) = path.parent() {
            make_private_folder(fan)?;
        }
        let partial = format!("-{}-{}.{PARTIAL_EXTENSION}", std::process::id(), self.id);
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let partial = path.with_file_name(stem + &partial);
        let write = || {
            let mut file = create_private(&partial)?;
            key.write(payload, &mut file)?;
            file.set_modified(used.time())?;
            fs::rename(&partial, path)
        };
        write().inspect_err(|_| {
            // It may not even have been made.
            let _ = fs::remove_file(&partial);
        })
    }
}

/// Sees whether files can be written.
pub(super) fn try_to_write(folder: &Path) -> io::Result<()> {
    let probe = folder.join(format!("probe-{}.{PARTIAL_EXTENSION}", std::process::id()));
    // Of a process of this number that was killed.
    let _ = fs::remove_file(&probe);
    create_private(&probe)?.write_all(b"KV blocks")?;
    fs::remove_file(&probe)
}

/// Makes a folder that only its owner may read; one that is there stays as it is.
pub(super) fn make_private_folder(folder: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// Makes a file that only its owner may read.
fn create_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}
