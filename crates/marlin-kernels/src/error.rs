//! What can go wrong on a device.

use std::io;
use std::path::PathBuf;

/// An error of a device.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Matrices fused into one linear disagree.
    #[error("a fused linear needs matrices of one width: part 0 has {first} columns, part {part} has {found}")]
    FusedWidth {
        /// Columns of the first part.
        first: usize,
        /// Index of the part that differs.
        part: usize,
        /// Its columns.
        found: usize,
    },
    /// A bias of the wrong length.
    #[error("a bias of {found} values for a matrix of {rows} rows")]
    BiasLength {
        /// Rows of the matrix.
        rows: usize,
        /// Values found.
        found: usize,
    },
    /// A linear of a group has columns in an order of its own.
    #[error(
        "a group prepares its input once for all of its linears: none can have columns with an index, decode such matrices"
    )]
    OrderedGroup,
    /// There is no Hadamard matrix of so many rows.
    #[error("Hadamard blocks are a power of two, or 12, 20, 28 or 36 times one; found {found}")]
    HadamardBlock {
        /// Values of a block.
        found: usize,
    },
    /// Values that do not fill a buffer's rows.
    #[error("{found} values for {rows} rows of {width} in a buffer of at most {capacity} rows")]
    BufferShape {
        /// Values found.
        found: usize,
        /// Rows they were to fill.
        rows: usize,
        /// Values of a row.
        width: usize,
        /// Most rows of the buffer.
        capacity: usize,
    },
    /// A matrix is malformed.
    #[error(transparent)]
    Format(#[from] marlin_format::FormatError),
    /// The device is out of memory.
    #[error(
        "{what} needs {}, which {device} cannot give; choose a smaller context or a smaller format",
        size_in_words(*bytes as u64)
    )]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Its size.
        bytes: usize,
        /// The device.
        device: String,
    },
    /// A kernel's buffer is larger than the device binds.
    #[error(transparent)]
    Binding(Box<BeyondBinding>),
    /// There is no GPU of the kind that is asked for.
    #[error("no GPU was found: it needs Metal, or Vulkan with its driver; use the CPU instead")]
    NoGpu,
    /// The file of a model's tiles ([`crate::cpu::TileFile`]) cannot be used.
    #[error("cannot {action} {path}", path = .path.display())]
    TileFile {
        /// What failed.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The device cannot be used as asked.
    #[error("{0}")]
    Device(String),
}

/// What kernels read as one, and a device cannot bind as one, however much memory it has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} needs {}, and {device} binds no more than {} at once; {advice}",
    size_in_words(*bytes as u64),
    size_in_words(*limit)
)]
pub struct BeyondBinding {
    /// What was to be allocated.
    pub what: String,
    /// Its size.
    pub bytes: usize,
    /// Bytes that the device binds at most.
    pub limit: u64,
    /// The device.
    pub device: String,
    /// What to do about it.
    pub advice: String,
}

/// `1.50 GiB`, or the number of bytes where that says more.
pub(crate) fn size_in_words(bytes: u64) -> String {
    const MIB: f64 = (1u64 << 20) as f64;
    match bytes as f64 / MIB {
        mib if mib >= 1024.0 => format!("{:.2} GiB", mib / 1024.0),
        mib if mib >= 1.0 => format!("{mib:.1} MiB"),
        _ => format!("{bytes} bytes"),
    }
}
