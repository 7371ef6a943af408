//! Which tensors of an unfinished model are safely on disk.
//!
//! One JSON value a line: `{"fingerprint": …}`, then the name of each finished tensor. A line is appended only after
//! the tensor's bytes are synced, so a kill or power cut loses at most the last tensors, never makes a lost one look
//! finished.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Head {
    fingerprint: String,
}

/// What a journal found on disk says.
pub(super) struct Record {
    pub(super) fingerprint: String,
    pub(super) finished: Vec<String>,
    /// Bytes up to the end of the last whole line.
    whole: u64,
}

/// A journal being written.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
}

impl Record {
    /// `None` if there is no journal, or none whose first line was finished.
    pub(super) fn read(path: &Path) -> io::Result<Option<Self>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        // What follows the last newline was cut off in the middle.
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |last| last + 1);
        let mut lines = bytes[..whole].split_inclusive(|b| *b == b'\n');
        let Some(head) = lines.next() else { return Ok(None) };
        let Head { fingerprint } = serde_json::from_slice(head)?;
        let finished = lines.map(serde_json::from_slice).collect::<Result<_, _>>()?;
        Ok(Some(Self { fingerprint, finished, whole: whole as u64 }))
    }
}

impl Journal {
    pub(super) fn create(path: &Path, fingerprint: &str) -> io::Result<Self> {
        let mut file = File::create(path)?;
        let mut line = serde_json::to_string(&Head { fingerprint: fingerprint.to_owned() })?;
        line.push('\n');
        file.write_all(line.as_bytes())?;
        file.sync_all()?;
        Ok(Self { file })
    }

    pub(super) fn resume(path: &Path, record: &Record) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).open(path)?;
        file.set_len(record.whole)?;
        Ok(Self { file })
    }

    pub(super) fn append<'a>(&mut self, names: impl Iterator<Item = &'a str>) -> io::Result<()> {
        let mut lines = String::new();
        for name in names {
            lines.push_str(&serde_json::to_string(name)?);
            lines.push('\n');
        }
        self.file.write_all(lines.as_bytes())
    }
}
