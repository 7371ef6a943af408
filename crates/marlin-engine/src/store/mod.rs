//! KV blocks on disk: what was computed outlives the process.
//!
//! ```text
//! FOLDER/ab/abcd….block              a block; the file's name is the block's, its modification time the last use
//! FOLDER/ab/abcd…-PID-N.partial      the same, unfinished
//! ```
//!
//! The name of a block says all that its content depends on, so several processes, models and devices may share a folder: they find their own
//! blocks and no others. A file is believed if its checksum and every byte of its header are what they must be, and is there as a whole or not at all.
//!
//! Two threads do what waits for the disk. One writes blocks, from a queue of bounded size, and removes those that were not used for the
//! longest. The other reads blocks and verifies them.

mod file;
mod index;
mod pace;
mod threads;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use marlin_model::BlockHash;

pub(crate) use self::file::BlockKey;
use self::file::VERSION;
use self::index::Index;
pub(crate) use self::index::LastUse;
pub(crate) use self::pace::FetchPace;
use self::threads::{FetchJob, Job, Shared, Writer, make_private_folder, try_to_write};

/// Bytes of blocks that wait to be written, at most; one block may always wait.
const QUEUE_BYTES: u64 = 64 << 20;
/// Bytes of blocks that were read and not taken yet, at most; one block may always wait.
const READ_AHEAD_BYTES: usize = 32 << 20;
/// Sequences whose blocks are to be read, at most.
const MOST_FETCHES: usize = 256;
/// A disk that gives nothing for so long is not waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// What keeps blocks, and where.
#[derive(Debug, Clone)]
pub struct BlockStoreOptions {
    /// The folder; made if it is not there, readable by its owner only.
    pub folder: PathBuf,
    /// Bytes of all blocks together, at most.
    pub max_bytes: u64,
    /// All that keys and values depend on beside the tokens, and that the model does not tell itself: its weights, its tokenizer, what the
    /// device computes with, the version of the program.
    pub fingerprint: String,
    /// Told, now and then, what goes wrong while requests are served: blocks are then not saved, or computed again.
    pub report: fn(&StoreError),
}

/// Why blocks cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be used.
    #[error("cannot {action} {path}, where KV blocks are kept; name a folder on a disk that this user may write to", path = path.display())]
    Folder {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Not even one block fits.
    #[error(
        "the KV blocks on disk may take {max_bytes} bytes, but one block of this model takes {block_bytes}; allow more"
    )]
    TooSmall {
        /// The most that all may take.
        max_bytes: u64,
        /// A block's file.
        block_bytes: u64,
    },
    /// There is no thread to be had.
    #[error("cannot start a thread that keeps KV blocks")]
    Thread(#[source] io::Error),
    /// A block cannot be written.
    #[error("a KV block was not saved, {path} cannot be written", path = path.display())]
    Write {
        /// Its file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A block cannot be read.
    #[error("a KV block is computed again, {path} cannot be read", path = path.display())]
    Read {
        /// Its file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("a KV block is computed again, {path} is damaged{what}", path = path.display(), what = if *.removed { " and was removed" } else { ", or belongs to another program" })]
    Damaged {
        /// The file.
        path: PathBuf,
        /// It was ours to remove.
        removed: bool,
    },
    /// The disk does not answer.
    #[error("KV blocks are computed again: nothing came from {folder} for {seconds} s", folder = folder.display())]
    Stalled {
        /// Where they are kept.
        folder: PathBuf,
        /// For how long.
        seconds: u64,
    },
}

/// What a store holds and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes on disk, of all models that share the folder.
    pub bytes: u64,
    /// Blocks there.
    pub blocks: usize,
    /// Blocks that were not saved, because the disk was too slow or failed, since the store was opened.
    pub dropped: u64,
    /// Files that were not what their names say.
    pub damaged: u64,
}

/// Keeps KV blocks on disk, see the functions of [`crate::Engine`].
#[derive(Debug)]
pub struct BlockStore {
    shared: Arc<Shared>,
    fingerprint: String,
    /// `None` only while it is dropped.
    jobs: Option<Sender<Job>>,
    fetches: Option<SyncSender<FetchJob>>,
    threads: Vec<JoinHandle<()>>,
    /// Nothing came from the disk in time, and the reader has not come back since.
    is_stalled: bool,
}

/// Blocks that are on their way from the disk, in their order.
#[derive(Debug)]
pub(crate) struct Fetch {
    pub(crate) keys: Vec<BlockKey>,
    /// How many of them came.
    pub(crate) came: usize,
    blocks: Receiver<Vec<u8>>,
    /// Takes the memory of blocks back.
    spare: Sender<Vec<u8>>,
    /// When somebody began to wait for it, and when something came last.
    begun: Instant,
    last: Instant,
}

/// What comes from the disk.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// The keys and values of the next block.
    Block(Vec<u8>),
    /// Nothing at the moment.
    Nothing,
    /// No more.
    End,
    /// Nothing, and that for too long.
    Stalled,
}

impl BlockStore {
    /// Opens a folder, makes it if need be, and sees what it holds; if that is too much, blocks go.
    ///
    /// # Errors
    /// The folder cannot be made, read or written.
    pub fn open(options: BlockStoreOptions) -> Result<Self, StoreError> {
        let BlockStoreOptions { folder, max_bytes, fingerprint, report } = options;
        make_private_folder(&folder).map_err(folder_error("make", &folder))?;
        try_to_write(&folder).map_err(folder_error("write to", &folder))?;
        let index = Index::scan(&folder).map_err(folder_error("read", &folder))?;
        let shared = Arc::new(Shared::new(folder, max_bytes, index, report));
        shared.evict();
        let (jobs, queue) = mpsc::channel();
        let (fetches, asked) = mpsc::sync_channel(MOST_FETCHES);
        let (writer, reader) = (Writer::new(shared.clone()), shared.clone());
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            thread::Builder::new().name(name.into()).spawn(run).map_err(StoreError::Thread)
        };
        let threads = vec![
            spawn("kv-writer", Box::new(move || writer.run(&queue)))?,
            spawn("kv-reader", Box::new(move || reader.read_all(&asked)))?,
        ];
        Ok(Self { shared, fingerprint, jobs: Some(jobs), fetches: Some(fetches), threads, is_stalled: false })
    }

    /// What blocks depend on beside tokens, for their names.
    pub(crate) fn fingerprint(&self) -> String {
        format!("store {VERSION} {}", self.fingerprint)
    }

    /// Refuses blocks that never fit.
    pub(crate) fn require_room(&self, block_tokens: usize, payload: usize) -> Result<(), StoreError> {
        let (max_bytes, block_bytes) = (self.shared.max_bytes, BlockKey::file_bytes(block_tokens, payload));
        if block_bytes > max_bytes { Err(StoreError::TooSmall { max_bytes, block_bytes }) } else { Ok(()) }
    }

    /// What it holds and has done.
    pub fn stats(&self) -> StoreStats {
        let index = self.shared.index();
        StoreStats {
            bytes: index.bytes(),
            blocks: index.blocks(),
            dropped: self.shared.dropped.load(Ordering::Relaxed),
            damaged: self.shared.damaged.load(Ordering::Relaxed),
        }
    }

    /// Whether a block is on disk or about to be, as far as is known.
    pub(crate) fn has(&self, name: &BlockHash) -> bool {
        self.contains(name) || self.shared.waiting().contains(name)
    }

    /// Whether a block is on disk, as far as is known.
    pub(crate) fn contains(&self, name: &BlockHash) -> bool {
        self.shared.index().contains(name)
    }

    /// A block is used once more.
    pub(crate) fn touch(&self, name: BlockHash, used: LastUse) {
        if self.shared.index().touch(&name, used) {
            self.send(Job::Touch { name, used });
        }
    }

    /// How many blocks of so many bytes of keys and values may be saved now.
    pub(crate) fn room(&self, payload: usize) -> usize {
        let queued = self.shared.queued.load(Ordering::Acquire);
        let room = QUEUE_BYTES.saturating_sub(queued) / payload.max(1) as u64;
        room.max(u64::from(queued == 0)) as usize
    }

    /// Whether all blocks that were handed over are on disk, or never will be.
    pub(crate) fn is_written(&self) -> bool {
        self.shared.queued.load(Ordering::Acquire) == 0
    }

    /// Writes a block, in a while.
    pub(crate) fn save(&self, key: BlockKey, used: LastUse, payload: Vec<u8>) {
        self.shared.queued.fetch_add(payload.len() as u64, Ordering::AcqRel);
        self.shared.waiting().insert(key.name);
        self.send(Job::Save { key, used, payload });
    }

    /// Blocks were not saved.
    pub(crate) fn note_dropped(&self, blocks: usize) {
        self.shared.dropped.fetch_add(blocks as u64, Ordering::Relaxed);
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The thread ends after this sender.
            let _ = jobs.send(job);
        }
    }

    /// Begins to read blocks of so many bytes of keys and values; `None` if the disk is not to be waited for.
    pub(crate) fn fetch(&mut self, keys: Vec<BlockKey>, payload: usize) -> Option<Fetch> {
        if self.is_stalled && self.shared.fetching.load(Ordering::Acquire) > 0 {
            return None;
        }
        self.is_stalled = false;
        let (sender, blocks) = mpsc::sync_channel((READ_AHEAD_BYTES / payload.max(1)).max(1));
        self.shared.fetching.fetch_add(1, Ordering::AcqRel);
        let (spare, taken) = mpsc::channel();
        let job = FetchJob { keys: keys.clone(), payload, blocks: sender, spare: taken };
        if self.fetches.as_ref()?.try_send(job).is_err() {
            self.shared.fetching.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        let now = Instant::now();
        Some(Fetch { keys, came: 0, blocks, spare, begun: now, last: now })
    }

    /// A fetch was given up because nothing came.
    pub(crate) fn note_stalled(&mut self) {
        self.is_stalled = true;
        let folder = self.shared.folder.clone();
        self.shared.report(&StoreError::Stalled { folder, seconds: PATIENCE.as_secs() });
    }
}

impl Drop for BlockStore {
    /// Waits for what is queued, unless the disk does not answer.
    fn drop(&mut self) {
        (self.jobs, self.fetches) = (None, None);
        let started = Instant::now();
        while self.threads.iter().any(|thread| !thread.is_finished()) && started.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Fetch {
    /// From now on somebody waits for what comes.
    pub(crate) fn begin_to_wait(&mut self) {
        self.begun = Instant::now();
        self.last = self.begun;
    }

    /// For how long somebody has waited for it.
    pub(crate) fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    /// The memory of a block that came is needed no more: blocks to come are read into it.
    pub(crate) fn give_back(&self, block: Vec<u8>) {
        // If all are read, it is freed here.
        let _ = self.spare.send(block);
    }

    /// What has come, waiting no longer than `wait`.
    pub(crate) fn next(&mut self, wait: Duration) -> Arrival {
        let arrived = if wait.is_zero() {
            self.blocks.try_recv().map_err(|error| error == TryRecvError::Disconnected)
        } else {
            self.blocks.recv_timeout(wait).map_err(|error| error == RecvTimeoutError::Disconnected)
        };
        match arrived {
            Ok(payload) => {
                (self.last, self.came) = (Instant::now(), self.came + 1);
                Arrival::Block(payload)
            }
            Err(true) => Arrival::End,
            Err(false) if self.last.elapsed() > PATIENCE => Arrival::Stalled,
            Err(false) => Arrival::Nothing,
        }
    }
}

fn folder_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Folder { action, path, source }
}
