//! Which blocks a folder holds, and which of them go first.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use marlin_model::BlockHash;

/// Files of blocks end in it.
const EXTENSION: &str = "block";
/// Files that are being written end in it.
pub(super) const PARTIAL_EXTENSION: &str = "partial";
/// What is unfinished for so long will not be finished.
const ABANDONED: Duration = Duration::from_secs(3600);

/// When a block was used last, in microseconds since 1970. Of blocks that are used together the later ones count as used a little earlier: without
/// those before them they are of no use, and so go first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LastUse(u64);

impl LastUse {
    /// At this moment, for block `index` of a sequence.
    pub(crate) fn now(index: usize) -> Self {
        Self::of(SystemTime::now()).earlier(index)
    }

    fn of(time: SystemTime) -> Self {
        Self(time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64))
    }

    fn earlier(self, index: usize) -> Self {
        Self(self.0.saturating_sub(index as u64))
    }

    pub(super) fn time(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_micros(self.0)
    }

    /// Whether it is later by more than a minute: times are not written to disk more often.
    fn is_news_after(self, before: Self) -> bool {
        self.0 > before.0 + 60_000_000
    }
}

/// A block of the folder.
#[derive(Debug, Clone, Copy)]
struct Entry {
    bytes: u64,
    used: LastUse,
}

/// The blocks of a folder.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: HashMap<BlockHash, Entry>,
    by_use: BTreeSet<(LastUse, [u8; 32])>,
    bytes: u64,
}

impl Index {
    /// Reads a folder. Files that are no blocks are left alone, but for what a process that was killed left unfinished long ago.
    pub(super) fn scan(folder: &Path) -> io::Result<Self> {
        let mut index = Self::default();
        for fan in fs::read_dir(folder)? {
            let fan = fan?.path();
            if !is_fan(&fan) {
                continue;
            }
            let files = match fs::read_dir(&fan) {
                Ok(files) => files,
                // Another process may have its reasons; what cannot be read is not there.
                Err(_) => continue,
            };
            for file in files.flatten() {
                index.take(&file);
            }
        }
        Ok(index)
    }

    fn take(&mut self, file: &DirEntry) {
        let path = file.path();
        let Ok(found) = file.metadata() else { return };
        if !found.is_file() {
            return;
        }
        let changed = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        if path.extension().is_some_and(|extension| extension == PARTIAL_EXTENSION) {
            if is_partial(&path) && changed.elapsed().is_ok_and(|age| age > ABANDONED) {
                // Another process may have done so, too.
                let _ = fs::remove_file(&path);
            }
        } else if let Some(name) = name_of(&path) {
            self.insert(name, found.len(), LastUse::of(changed));
        }
    }

    pub(super) fn contains(&self, name: &BlockHash) -> bool {
        self.entries.contains_key(name)
    }

    pub(super) fn insert(&mut self, name: BlockHash, bytes: u64, used: LastUse) {
        self.remove(&name);
        self.entries.insert(name, Entry { bytes, used });
        self.by_use.insert((used, name.0));
        self.bytes += bytes;
    }

    pub(super) fn remove(&mut self, name: &BlockHash) {
        if let Some(entry) = self.entries.remove(name) {
            self.by_use.remove(&(entry.used, name.0));
            self.bytes -= entry.bytes;
        }
    }

    /// A block is used again. Tells whether that is worth writing down.
    pub(super) fn touch(&mut self, name: &BlockHash, used: LastUse) -> bool {
        let Some(&entry) = self.entries.get(name) else { return false };
        let is_news = used.is_news_after(entry.used);
        if is_news {
            self.insert(*name, entry.bytes, used);
        }
        is_news
    }

    /// The blocks that must go for the others to take at most `max_bytes`, those that were used last the latest.
    pub(super) fn evict(&mut self, max_bytes: u64) -> Vec<BlockHash> {
        let mut evicted = Vec::new();
        while self.bytes > max_bytes
            && let Some(&(_, name)) = self.by_use.first()
        {
            self.remove(&BlockHash(name));
            evicted.push(BlockHash(name));
        }
        evicted
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn blocks(&self) -> usize {
        self.entries.len()
    }
}

/// Where a block's file is.
pub(super) fn path_of(folder: &Path, name: &BlockHash) -> PathBuf {
    let hex: String = name.0.iter().map(|byte| format!("{byte:02x}")).collect();
    folder.join(&hex[..2]).join(format!("{hex}.{EXTENSION}"))
}

/// Whether a folder is one of those that blocks are spread over.
fn is_fan(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.len() == 2 && name.bytes().all(is_hex_digit))
}

fn is_partial(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    stem.and_then(|stem| stem.split('-').next()).is_some_and(|hex| parse(hex).is_some())
}

fn name_of(path: &Path) -> Option<BlockHash> {
    let hex = path.file_name()?.to_str()?.strip_suffix(EXTENSION)?.strip_suffix('.')?;
    let name = parse(hex)?;
    (path.parent()?.file_name()?.to_str()? == &hex[..2]).then_some(name)
}

fn parse(hex: &str) -> Option<BlockHash> {
    let mut name = [0; 32];
    if hex.len() != 64 || !hex.bytes().all(is_hex_digit) {
        return None;
    }
    for (byte, digits) in name.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(BlockHash(name))
}

fn is_hex_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(byte: u8) -> BlockHash {
        BlockHash([byte; 32])
    }

    #[test]
    fn what_was_used_last_stays_and_later_blocks_go_before_those_they_need() {
        let mut index = Index::default();
        for i in 0..4 {
            index.insert(name(i), 10, LastUse(1_000_000_000).earlier(i.into()));
        }
        index.insert(name(9), 10, LastUse(1_000));
        assert_eq!((index.bytes(), index.blocks()), (50, 5));
        assert_eq!(index.evict(30), [name(9), name(3)]);
        assert!(!index.touch(&name(2), LastUse(1_030_000_000)), "half a minute is no news");
        assert!(index.touch(&name(2), LastUse(1_100_000_000)));
        assert!(!index.touch(&name(3), LastUse(1_100_000_000)), "what has gone is not used");
        assert_eq!(index.evict(10), [name(1), name(0)]);
        assert_eq!(index.evict(9), [name(2)]);
        assert_eq!((index.bytes(), index.blocks(), index.evict(0).len()), (0, 0, 0));
    }

    #[test]
    fn a_folder_is_read_and_strange_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = path_of(folder.path(), &name(0xab));
        let fan = path.parent().unwrap();
        fs::create_dir(fan).unwrap();
        fs::write(&path, "0123456789").unwrap();
        let old = SystemTime::now() - 2 * ABANDONED;
        let hex = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let write_old = |path: &Path| {
            fs::write(path, "x").unwrap();
            fs::File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
        };
        let strange = ["notes.txt", "ab.block", "x.partial"].map(|name| fan.join(name));
        strange.iter().for_each(|path| write_old(path));
        let (abandoned, under_way) = (fan.join(format!("{hex}-1-1.partial")), fan.join(format!("{hex}-2-1.partial")));
        write_old(&abandoned);
        fs::write(&under_way, "x").unwrap();
        fs::create_dir(folder.path().join("abc")).unwrap();
        fs::write(folder.path().join("README"), "x").unwrap();
        // A block in another's folder would not be found.
        fs::create_dir(folder.path().join("cd")).unwrap();
        fs::copy(&path, folder.path().join("cd").join(path.file_name().unwrap())).unwrap();

        let index = Index::scan(folder.path()).unwrap();
        assert_eq!((index.blocks(), index.bytes(), index.contains(&name(0xab))), (1, 10, true));
        assert!(strange.iter().all(|path| path.exists()) && under_way.exists() && !abandoned.exists());
    }
}
