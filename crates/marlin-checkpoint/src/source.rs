//! Where the files of a checkpoint come from.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::path::PathBuf;

use memmap2::Mmap;
use serde::de::DeserializeOwned;

use crate::CheckpointError;

/// A folder, files embedded in the program, or none at all.
pub(crate) enum Source {
    Folder(PathBuf),
    Static {
        name: String,
        files: &'static [(&'static str, &'static [u8])],
    },
    /// A model made in memory has no files.
    Memory {
        name: String,
    },
}

/// The bytes of a weight file.
pub(crate) enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

impl Source {
    /// The model, in messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Folder(folder) => folder.display().to_string(),
            Self::Static { name, .. } | Self::Memory { name } => name.clone(),
        }
    }

    /// A file of the model, in messages.
    pub(crate) fn label(&self, file: &str) -> String {
        match self {
            Self::Folder(folder) => folder.join(file).display().to_string(),
            Self::Static { name, .. } | Self::Memory { name } => format!("{name}/{file}"),
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
        let Self::Folder(folder) = self else { return Ok(self.embedded(file).map(Bytes::Static)) };
        let path = folder.join(file);
        let opened = match File::open(&path) {
            Ok(opened) => opened,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(CheckpointError::io("open", &path)(e)),
        };
        if !opened.metadata().map_err(CheckpointError::io("look at", &path))?.is_file() {
            return Err(CheckpointError::malformed(&self.label(file), "this is no file; put the weights in its place"));
        }
        // SAFETY: the map is read-only and only ever seen as bytes, for which every bit pattern is valid. What is left
        // is that nobody changes or truncates the file while it is mapped. This project never does: the writer replaces
        // whole folders by renaming, which leaves a mapped file intact. Of others it is asked in `Checkpoint::open`.
        let map = unsafe { Mmap::map(&opened) }.map_err(CheckpointError::io("map", &path))?;
        Ok(Some(Bytes::Mapped(map)))
    }

    fn embedded(&self, file: &str) -> Option<&'static [u8]> {
        let Self::Static { files, .. } = self else { return None };
        files.iter().find(|(name, _)| *name == file).map(|(_, bytes)| *bytes)
    }
}
