//! What can be wrong with a scheme, a matrix or the values to encode.

use crate::{Grouping, Scheme};

/// An error of this crate. Tensors have no names here; messages are written to follow "tensor NAME: ".
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FormatError {
    /// A scheme that describes no storage.
    #[error("invalid scheme: {0}")]
    InvalidScheme(String),
    /// A matrix without weights.
    #[error("shape [{rows}, {cols}] holds no weights")]
    Empty {
        /// Output features, N.
        rows: usize,
        /// Input features, K.
        cols: usize,
    },
    /// A matrix whose size in bytes does not fit in memory.
    #[error("shape [{rows}, {cols}] is too large to address")]
    TooLarge {
        /// Output features, N.
        rows: usize,
        /// Input features, K.
        cols: usize,
    },
    /// 2:4 sparsity needs whole quadruples of columns.
    #[error("2:4 sparsity needs a multiple of 4 columns, found {cols}")]
    SparseColumns {
        /// Input features, K.
        cols: usize,
    },
    /// A buffer of the wrong length.
    #[error("{field} has {found} bytes; {wanted} are wanted for [{rows}, {cols}] stored as {scheme}")]
    BufferLength {
        /// Field of [`crate::PackedMatrix`].
        field: &'static str,
        /// Bytes found.
        found: usize,
        /// Bytes wanted.
        wanted: usize,
        /// Output features, N.
        rows: usize,
        /// Input features, K.
        cols: usize,
        /// The storage.
        scheme: Box<Scheme>,
    },
    /// The number of values to encode disagrees with the shape.
    #[error("{found} values for the shape [{rows}, {cols}]")]
    ValueCount {
        /// Values found.
        found: usize,
        /// Output features, N.
        rows: usize,
        /// Input features, K.
        cols: usize,
    },
    /// A column assigned to a group that does not exist.
    #[error("group_index puts column {col} in group {found}, but a row has {groups} groups")]
    GroupIndex {
        /// The column.
        col: usize,
        /// Its group.
        found: u32,
        /// Groups of a row.
        groups: usize,
    },
    /// 2:4 metadata that does not name two columns in ascending order.
    #[error("sparse_index of row {row}, columns {col}–{}: {found:#06b} does not name two ascending columns", col + 3)]
    SparseIndex {
        /// The row.
        row: usize,
        /// First of the four columns.
        col: usize,
        /// The four bits.
        found: u8,
    },
    /// A scale, bias or second-level value that is NaN or infinite.
    #[error("{field} value {index} is {value}, not a finite number")]
    NonFiniteScale {
        /// Field of [`crate::PackedMatrix`].
        field: &'static str,
        /// Index into the field, in values.
        index: usize,
        /// What it decodes to.
        value: f32,
    },
    /// A weight that is NaN or infinite.
    #[error("the weight at row {row}, column {col} is {value}; only finite weights can be encoded")]
    NonFinite {
        /// The row.
        row: usize,
        /// The column.
        col: usize,
        /// The weight.
        value: f32,
    },
    /// A weight too large for the storage.
    #[error(
        "the weight {value:e} at row {row}, column {col} is too large for {scheme}; use a format with a wider range"
    )]
    WeightRange {
        /// The row.
        row: usize,
        /// The column.
        col: usize,
        /// The weight.
        value: f32,
        /// The storage.
        scheme: Box<Scheme>,
    },
    /// Something this crate can store but not encode.
    #[error("encoding {scheme} is not supported: {reason}")]
    Unsupported {
        /// The storage.
        scheme: Box<Scheme>,
        /// Why not.
        reason: &'static str,
    },
    /// A slice of rows that cannot be encoded or joined by itself.
    #[error("rows of {scheme} cannot be handled apart: {reason}")]
    RowSlice {
        /// The storage.
        scheme: Box<Scheme>,
        /// Why not.
        reason: String,
    },
    /// A format name that does not exist.
    #[error("unknown format '{found}'; known are {known}")]
    UnknownFormat {
        /// The name given.
        found: String,
        /// All names.
        known: String,
    },
    /// A group size that cannot be read.
    #[error(
        "unknown group size '{0}'; give a number of columns such as 128, 'row', 'tensor', or a tile such as 128x128"
    )]
    UnknownGrouping(String),
    /// A group size that a format does not have.
    #[error("{format} has no group size '{found}'; it can have {allowed}")]
    FormatGrouping {
        /// Name of the format.
        format: &'static str,
        /// The group size asked for.
        found: Grouping,
        /// Those it can have.
        allowed: &'static str,
    },
    /// A format that has no 2:4 variant.
    #[error("{format} has no variant with 2:4 sparsity; {known} have one")]
    FormatSparsity {
        /// Name of the format.
        format: &'static str,
        /// Those that have one.
        known: String,
    },
}
