//! What a tile file holds.
//!
//! ```text
//! 0            header, 64 bytes
//! …            the sections of each matrix (codes, scales and so on), each from a multiple of 64 bytes on
//! table_start  the table: JSON, table_bytes long, to the end of the file
//! ```
//!
//! Nothing of a file is used unless its header, its length, the table's checksum, the key and the bounds of every section are right. What
//! sections hold is not checked, since that would take as long as making it anew.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Seek, SeekFrom, Write};

use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};

use crate::cpu::linear::{SECTIONS, TileBytes};

const MAGIC: [u8; 8] = *b"MARLTILE";
/// Of the file. The order of tiles is told apart by what it makes of matrices ([`crate::cpu::CpuBackend::tile_layout`]).
const VERSION: u64 = 2;
/// Much more than the table of any model takes.
const MOST_TABLE_BYTES: u64 = 64 << 20;
pub(super) const HEADER_BYTES: u64 = size_of::<Header>() as u64;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Header {
    magic: [u8; 8],
    version: u64,
    table_start: u64,
    table_bytes: u64,
    /// Of the table and of where it lies.
    checksum: u64,
    unused: [u64; 3],
}

impl Header {
    fn new(table_start: u64, table: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        (VERSION, table_start, table).hash(&mut hasher);
        let (table_bytes, checksum) = (table.len() as u64, hasher.finish());
        Self { magic: MAGIC, version: VERSION, table_start, table_bytes, checksum, unused: [0; 3] }
    }
}

/// The table.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Table {
    /// What everything was made from and for.
    pub(super) key: String,
    /// The model, for people.
    pub(super) model: String,
    pub(super) matrices: Vec<Matrix>,
}

/// A matrix in tile order.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Matrix {
    pub(super) name: MatrixName,
    /// Its scheme in the checkpoint.
    pub(super) scheme: String,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// No kernel reads this scheme; tiles are of the weights in f32.
    pub(super) converted: bool,
    /// The bits of the factor on the kernel's sums.
    pub(super) factor: u32,
    /// Codes, scales, zero points or biases, what super-groups share.
    pub(super) sections: [Section; SECTIONS],
}

/// Which matrix of the model it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct MatrixName {
    /// Of its linear.
    pub(super) linear: String,
    /// Its place there.
    pub(super) part: usize,
}

/// Bytes of the file.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Section {
    pub(super) start: u64,
    pub(super) bytes: u64,
}

impl Section {
    fn is_within(self, end: u64) -> bool {
        self.start.is_multiple_of(TileBytes::ALIGNMENT as u64)
            && self.start >= HEADER_BYTES
            && self.start.checked_add(self.bytes).is_some_and(|section_end| section_end <= end)
    }
}

/// Reads the table of a whole file; `None` if the file is something else, of another version, or damaged.
pub(super) fn read(mut file: &File) -> io::Result<Option<Table>> {
    let len = file.metadata()?.len();
    if len < HEADER_BYTES {
        return Ok(None);
    }
    let mut header = Header::zeroed();
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(bytemuck::bytes_of_mut(&mut header))?;
    let is_whole = header.magic == MAGIC
        && header.version == VERSION
        && header.table_start >= HEADER_BYTES
        && header.table_bytes <= MOST_TABLE_BYTES
        && header.table_start.checked_add(header.table_bytes) == Some(len);
    if !is_whole {
        return Ok(None);
    }
    let mut bytes = vec![0; header.table_bytes as usize];
    file.seek(SeekFrom::Start(header.table_start))?;
    file.read_exact(&mut bytes)?;
    if bytemuck::bytes_of(&Header::new(header.table_start, &bytes)) != bytemuck::bytes_of(&header) {
        return Ok(None);
    }
    let table: Option<Table> = serde_json::from_slice(&bytes).ok();
    let is_within = |matrix: &Matrix| matrix.sections.iter().all(|section| section.is_within(header.table_start));
    Ok(table.filter(|table| table.matrices.iter().all(is_within)))
}

/// Completes a file whose sections end at `end`: the table, then the header, without which it is none.
pub(super) fn complete(mut file: &File, end: u64, table: &Table) -> io::Result<()> {
    let table = serde_json::to_vec(table)?;
    file.seek(SeekFrom::Start(end))?;
    file.write_all(&table)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(bytemuck::bytes_of(&Header::new(end, &table)))?;
    file.sync_all()
}
