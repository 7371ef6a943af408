//! Where the files of a checkpoint come from.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use memmap2::Mmap;
use serde::de::DeserializeOwned;

use crate::{CheckpointError, Gguf};

/// A folder, files embedded in the program, one file that holds everything, or none at all.
pub(crate) enum Source {
    Folder(PathBuf),
    Static {
        name: String,
        files: &'static [(&'static str, &'static [u8])],
    },
    /// What other models have in small files is in the metadata of this one.
    Gguf {
        path: PathBuf,
        gguf: Box<Gguf>,
    },
    /// A model made in memory has no files.
    Memory {
        name: String,
    },
}

/// The bytes of a weight file.
#[derive(Clone)]
pub(crate) enum Bytes {
    Mapped {
        map: Arc<Mmap>,
        /// When the file was changed last, as far as the system tells.
        changed: Option<SystemTime>,
    },
    Static(&'static [u8]),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped { map, .. } => map,
            Self::Static(bytes) => bytes,
        }
    }
}

impl Bytes {
    /// Maps a file; `None` if there is none.
    pub(crate) fn map(path: &Path) -> Result<Option<Self>, CheckpointError> {
        let opened = match File::open(path) {
            Ok(opened) => opened,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(CheckpointError::io("open", path)(e)),
        };
        let metadata = opened.metadata().map_err(CheckpointError::io("look at", path))?;
        if !metadata.is_file() {
            let label = path.display().to_string();
            return Err(CheckpointError::malformed(&label, "this is no file; put the weights in its place"));
        }
        // SAFETY: the map is read-only and only ever seen as bytes, for which every bit pattern is valid. What is left
        // is that nobody changes or truncates the file while it is mapped. This project never does: the writer replaces
        // whole folders by renaming, which leaves a mapped file intact. Of others it is asked in `Checkpoint::open` and
        // `Gguf::open`.
        let map = unsafe { Mmap::map(&opened) }.map_err(CheckpointError::io("map", path))?;
        Ok(Some(Self::Mapped { map: Arc::new(map), changed: metadata.modified().ok() }))
    }

    /// Refuses what Git leaves in the place of a weight file that it has not fetched.
    pub(crate) fn refuse_lfs_pointer(&self, label: &str) -> Result<(), CheckpointError> {
        if self.starts_with(b"version https://git-lfs") {
            let problem = "this is a Git LFS pointer, not the weights; run `git lfs pull` in the folder";
            return Err(CheckpointError::malformed(label, problem));
        }
        Ok(())
    }

    /// When the file was changed last, as far as that is known.
    pub(crate) fn changed(&self) -> Option<SystemTime> {
        match self {
            Self::Mapped { changed, .. } => *changed,
            Self::Static(_) => None,
        }
    }

    /// Gives back the memory of the pages that these bytes lie on. They are read from the file again if they are wanted again.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if let (Self::Mapped { map, .. }, false) = (self, range.is_empty()) {
            // SAFETY: the pages are those of a file, mapped shared and read-only, so none of them can differ from the file:
            // whoever still borrows bytes of them reads the same ones after the system has read the page anew.
            let advised =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
            // Where the system will not, they stay until it runs short of memory.
            let _ = advised;
        }
    }
}

impl Source {
    /// The model, in messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Folder(folder) => folder.display().to_string(),
            Self::Static { name, .. } | Self::Memory { name } => name.clone(),
            Self::Gguf { gguf, .. } => gguf.label().to_owned(),
        }
    }

    /// A file of the model, in messages.
    pub(crate) fn label(&self, file: &str) -> String {
        match self {
            Self::Folder(folder) => folder.join(file).display().to_string(),
            Self::Static { name, .. } | Self::Memory { name } => format!("{name}/{file}"),
            Self::Gguf { gguf, .. } => format!("{} (as {file})", gguf.label()),
        }
    }

    /// The whole of a small file; `None` if there is none.
    pub(crate) fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        match self {
            Self::Folder(folder) => {
                let path = folder.join(file);
                match fs::read(&path) {
                    Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(CheckpointError::io("read", &path)(e)),
                }
            }
            Self::Static { .. } | Self::Memory { .. } => Ok(self.embedded(file).map(Cow::Borrowed)),
            Self::Gguf { gguf, .. } => Ok(gguf.small_file(file)?.map(Cow::Owned)),
        }
    }

    /// A small JSON file; `None` if there is none.
    pub(crate) fn json<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>, CheckpointError> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(source) => Err(CheckpointError::Json { file: self.label(file), source }),
        }
    }

    /// A weight file, mapped rather than read; `None` if there is none.
    pub(crate) fn map(&self, file: &str) -> Result<Option<Bytes>, CheckpointError> {
        match self {
            Self::Folder(folder) => Bytes::map(&folder.join(file)),
            Self::Static { .. } | Self::Memory { .. } | Self::Gguf { .. } => Ok(self.embedded(file).map(Bytes::Static)),
        }
    }

    fn embedded(&self, file: &str) -> Option<&'static [u8]> {
        let Self::Static { files, .. } = self else { return None };
        files.iter().find(|(name, _)| *name == file).map(|(_, bytes)| *bytes)
    }
}
