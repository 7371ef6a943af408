//! Number formats of weight matrices: what a packed matrix means, to the bit.
//!
//! A [`Scheme`] describes how a matrix is stored and a [`PackedMatrix`] holds one. [`PackedMatrix::decode_row`] is the
//! reference meaning of every scheme, and [`encode`] (or an [`Encoder`], slice by slice) makes the schemes this project
//! writes, which users know as [`Format`]s. Nothing here knows a device or a file.
//!
//! Matrices are `[rows, cols]` = `[output features N, input features K]`; codes are packed least-significant bit first
//! along K, and every row starts on a byte border. A weight is `scale · (value(code) − zero) + bias`.
//!
//! ```
//! use marlin_format::{EncodeOptions, Format, ScaleSearch, encode};
//!
//! let weights: Vec<f32> = (0..4 * 256).map(|i| (i as f32 * 0.1).sin()).collect();
//! let scheme = Format::Fp4.scheme(None)?;
//! let packed = encode(&weights, 4, 256, &scheme, &EncodeOptions { search: ScaleSearch::Mse, ..Default::default() })?;
//! assert_eq!(packed.scheme.to_string(), "fp4 g128");
//! assert_eq!(packed.bits_per_weight(), 4.125);
//!
//! let mut row = vec![0.0; 256];
//! packed.decode_row(3, &mut row);
//! assert!(row.iter().zip(&weights[3 * 256..]).all(|(found, wanted)| (found - wanted).abs() < 0.17));
//! # Ok::<(), marlin_format::FormatError>(())
//! ```

pub mod bits;
mod decode;
mod element;
mod encode;
mod error;
mod foreign;
mod packed;
mod preset;
mod scheme;
mod size;

pub use element::Element;
pub use encode::{EncodeOptions, Encoder, GroupEncoder, GroupScale, ScaleSearch, abs_max, encode};
pub use error::FormatError;
pub use foreign::FOREIGN;
pub use packed::PackedMatrix;
pub use preset::Format;
pub use scheme::{ColumnOrder, Grouping, ScaleKind, Scheme, Sparsity, ZeroKind};
