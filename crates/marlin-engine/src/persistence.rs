//! Between the KV cache and the blocks on disk.
//!
//! Blocks to save are remembered by their names only: when their turn comes, the pool has them still, whoever they belong to, or they are not saved.
//! Blocks that come from disk get names in the pool and belong to nobody, until the answer that wanted them begins with them.

use std::collections::{HashSet, VecDeque};
use std::thread;
use std::time::{Duration, Instant};

use marlin_model::{BlockHash, KvPool, LanguageModel, ModelError};

use crate::scheduler::Scheduler;
use crate::sequence::{Rank, Sequence};
use crate::store::{Arrival, BlockKey, Fetch, FetchPace, LastUse, PATIENCE};
use crate::{BlockStore, EngineError, StoreStats};

/// Bytes that go to disk, or come from there, between two steps beside answers under way, at least a block: so that these do not stop.
const STEP_BYTES: usize = 16 << 20;
/// The same where no answer is under way.
const IDLE_BYTES: usize = 64 << 20;
/// How long a step that has nothing to compute waits for the disk, before it looks for other requests.
const PAUSE: Duration = Duration::from_millis(1);

/// Saves blocks and brings them back.
#[derive(Debug)]
pub(crate) struct Persistence {
    store: BlockStore,
    block_tokens: usize,
    /// Bytes of keys and values of a block.
    payload: usize,
    /// Blocks to save, and their names.
    to_save: VecDeque<(BlockKey, LastUse)>,
    names: HashSet<BlockHash>,
    /// Blocks were handed over, and may not be written yet.
    is_writing: bool,
    /// Since when nothing was done but to wait for the disk.
    waiting_since: Option<Instant>,
    /// What is on its way from the disk, in the order in which it was asked for, and for whom.
    fetches: VecDeque<(Rank, Fetch)>,
    pace: FetchPace,
    /// Tokens that came.
    hits: u64,
}

impl Persistence {
    /// Between a model and a store.
    pub(crate) fn new(store: BlockStore, model: &mut dyn LanguageModel) -> Result<Self, EngineError> {
        let (block_tokens, payload) = (model.kv().block_tokens(), model.info().kv_block_bytes());
        store.require_room(block_tokens, payload)?;
        if model.kv().blocks() > 0 {
            // What cannot be done is said before anybody relies on it.
            model.read_kv_blocks(&[0], &mut vec![0; payload])?;
        }
        Ok(Self {
            store,
            block_tokens,
            payload,
            to_save: VecDeque::new(),
            names: HashSet::new(),
            is_writing: false,
            waiting_since: None,
            fetches: VecDeque::new(),
            pace: FetchPace::default(),
            hits: 0,
        })
    }

    /// Tokens that came from disk.
    pub(crate) fn hits(&self) -> u64 {
        self.hits
    }

    pub(crate) fn stats(&self) -> StoreStats {
        self.store.stats()
    }

    /// Whether nothing is left to save, and what was saved is known. (Those who wait for blocks know themselves.)
    pub(crate) fn is_idle(&self) -> bool {
        self.to_save.is_empty() && !self.is_writing
    }

    /// These blocks, with their places in a sequence, shall be saved, those that are on disk counted as used.
    pub(crate) fn offer(&mut self, blocks: Vec<(usize, BlockKey)>) {
        for (index, key) in blocks {
            let used = LastUse::now(index);
            if self.store.has(&key.name) {
                self.store.touch(key.name, used);
            } else if self.names.insert(key.name) {
                self.to_save.push_back((key, used));
            }
        }
    }

    /// Hands blocks over to be written, as many as there is time and room for.
    pub(crate) fn save(&mut self, model: &mut dyn LanguageModel, is_busy: bool) -> Result<(), EngineError> {
        let room = self.store.room(self.payload);
        let is_written = self.store.is_written();
        if self.to_save.is_empty() && (!self.is_writing || is_written) {
            (self.is_writing, self.waiting_since) = (false, None);
            return Ok(());
        }
        if self.to_save.is_empty() || room == 0 {
            self.wait(is_busy);
            return Ok(());
        }
        (self.is_writing, self.waiting_since) = (true, None);
        let most = room.min((budget(is_busy) / self.payload.max(1)).max(1));
        let (mut blocks, mut keys) = (Vec::new(), Vec::new());
        while blocks.len() < most
            && let Some((key, used)) = self.to_save.pop_front()
        {
            self.names.remove(&key.name);
            match model.kv().find(&key.name) {
                Some(block) => {
                    blocks.push(block);
                    keys.push((key, used));
                }
                // Others took its place first.
                None => self.store.note_dropped(1),
            }
        }
        let mut bytes = vec![0; blocks.len() * self.payload];
        model.read_kv_blocks(&blocks, &mut bytes)?;
        for ((key, used), payload) in keys.into_iter().zip(bytes.chunks_exact(self.payload.max(1))) {
            self.store.save(key, used, payload.to_vec());
        }
        Ok(())
    }

    /// The disk is slower than the model. What it does not take in a while is not saved.
    fn wait(&mut self, is_busy: bool) {
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        if since.elapsed() > PATIENCE {
            self.store.note_dropped(self.to_save.len());
            self.to_save.clear();
            self.names.clear();
            (self.is_writing, self.waiting_since) = (false, None);
        } else if !is_busy {
            thread::sleep(PAUSE);
        }
    }

    /// A step has computed so many tokens, of prompts for the most part.
    pub(crate) fn note_computed(&mut self, tokens: usize, seconds: f64) {
        self.pace.note_computed(tokens, seconds);
    }

    /// Begins to read what an answer may begin with and the pool does not have; tells whether there is any that comes sooner than it is computed.
    pub(crate) fn look_up(&mut self, sequence: &mut Sequence, kv: &KvPool) -> bool {
        let mut keys = sequence.missing_blocks(kv);
        let stored = keys.iter().take_while(|key| self.store.contains(&key.name)).count();
        keys.truncate(stored);
        if keys.is_empty() || !self.pace.is_worth_it() {
            return false;
        }
        let fetch = self.store.fetch(keys, self.payload);
        fetch.map(|fetch| self.fetches.push_back((sequence.rank, fetch))).is_some()
    }

    /// Takes blocks that came from disk; the scheduler hears whose are all there.
    pub(crate) fn restore(
        &mut self,
        model: &mut dyn LanguageModel,
        is_busy: bool,
        scheduler: &mut Scheduler,
    ) -> Result<(), EngineError> {
        let wait = if is_busy { Duration::ZERO } else { PAUSE };
        let mut left = budget(is_busy);
        while left > 0
            && let Some((rank, fetch)) = self.fetches.front_mut()
        {
            let rank = *rank;
            match fetch.next(wait) {
                Arrival::Nothing => break,
                Arrival::Block(payload) => {
                    left = left.saturating_sub(payload.len().max(1));
                    let adopted = adopt(model, &fetch.keys[fetch.came - 1], &payload);
                    fetch.give_back(payload);
                    if matches!(adopted, Ok(true)) {
                        self.hits += self.block_tokens as u64;
                    } else {
                        // There is no room, or the device failed: it begins with what it has.
                        self.end_fetch();
                        scheduler.end_lookups(|other| other == rank);
                        adopted?;
                    }
                }
                Arrival::End => {
                    self.pace.note_fetched(fetch.came * self.block_tokens, fetch.seconds());
                    self.end_fetch();
                    scheduler.end_lookups(|other| other == rank);
                }
                Arrival::Stalled => {
                    self.store.note_stalled();
                    // Those behind it wait for the same disk.
                    self.fetches.clear();
                    scheduler.end_lookups(|_| true);
                }
            }
        }
        Ok(())
    }

    fn end_fetch(&mut self) {
        self.fetches.pop_front();
        if let Some((_, next)) = self.fetches.front_mut() {
            next.begin_to_wait();
        }
    }

    /// Nobody waits for what these answers begin with.
    pub(crate) fn cancel(&mut self, is_cancelled: impl Fn(Rank) -> bool) {
        let first = self.fetches.front().map(|(rank, _)| *rank);
        self.fetches.retain(|(rank, _)| !is_cancelled(*rank));
        if let Some((_, next)) = self.fetches.front_mut().filter(|(rank, _)| Some(*rank) != first) {
            next.begin_to_wait();
        }
    }
}

fn budget(is_busy: bool) -> usize {
    if is_busy { STEP_BYTES } else { IDLE_BYTES }
}

/// Puts a block into the pool, where it belongs to nobody; tells whether there was room.
fn adopt(model: &mut dyn LanguageModel, key: &BlockKey, payload: &[u8]) -> Result<bool, ModelError> {
    let kv = model.kv();
    if kv.find(&key.name).is_some() {
        // Another answer computed it meanwhile.
        return Ok(true);
    }
    if kv.free_blocks() == 0 {
        return Ok(false);
    }
    let mut block = kv.sequence();
    kv.append(&mut block, key.tokens.len())?;
    let written = model.write_kv_blocks(block.blocks(), payload);
    let kv = model.kv();
    if written.is_ok() {
        kv.remember(&block, 0, key.name, key.parent, &key.tokens);
    }
    kv.release(block);
    written.map(|()| true)
}
