//! Encoding weights: a scale (and zero point) for every group, then for every weight the code of the nearest value.
//!
//! Scales are rounded to their storage type first and codes are chosen for the rounded scale, so what is minimised is
//! the error of the matrix as stored. Under 2:4 sparsity the smaller two of four weights are dropped first, and a scale is
//! that of the weights that are left.

mod groups;
mod prune;
mod scale;
mod search;

use std::borrow::Cow;

use half::{bf16, f16};

use crate::element::{E2M1, E4M3, IntegerRounding, Rounding};
use crate::{ColumnOrder, Element, FormatError, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind, bits};
pub use groups::{GroupEncoder, GroupScale};
use prune::Pruned;
use scale::ScaleStore;
use search::{Choice, Group};

/// How weights are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncodeOptions {
    /// How the scale of a group is found.
    pub search: ScaleSearch,
    /// Whether the f32 of a matrix with E4M3 scales (NVFP4) is rounded up to a power of two, whose inverse is exact: for
    /// layouts that store the inverse. It costs at most one of the fifteen binades of E4M3.
    pub power_of_two_global: bool,
}

/// How the scale (and zero point) of a group is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScaleSearch {
    /// From the extremes of the group, which then just fit: round-to-nearest (RTN) quantisation. E8M0 scales follow OCP
    /// Microscaling v1.0 (section 6.3), under which the largest weights may saturate.
    #[default]
    AbsMax,
    /// The one of least squared error among many candidates, those of [`ScaleSearch::AbsMax`] included.
    Mse,
}

/// Encodes a whole matrix, `values` row by row. [`Encoder`] does the same in slices of rows.
///
/// # Errors
/// As [`Encoder::new`] and [`Encoder::encode_rows`].
pub fn encode(
    values: &[f32],
    rows: usize,
    cols: usize,
    scheme: &Scheme,
    options: &EncodeOptions,
) -> Result<PackedMatrix<'static>, FormatError> {
    if rows.checked_mul(cols) != Some(values.len()) {
        return Err(FormatError::ValueCount { found: values.len(), rows, cols });
    }
    Encoder::new(scheme, rows, cols, options)?.encode_rows(0, values)
}

/// The largest magnitude among whole rows of weights.
///
/// # Errors
/// A weight is not finite; rows are counted from `first_row`.
pub fn abs_max(values: &[f32], first_row: usize, cols: usize) -> Result<f32, FormatError> {
    // Magnitudes order like the integers of their bits, with infinity and NaN on top.
    let bits = values.iter().fold(0, |max, value| max.max(value.abs().to_bits()));
    if f32::from_bits(bits).is_finite() {
        return Ok(f32::from_bits(bits));
    }
    let index = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
    Err(FormatError::NonFinite { row: first_row + index / cols, col: index % cols, value: values[index] })
}

/// Encodes the rows of one matrix, slice by slice and in any order, so that callers can spread slices over threads and
/// need not hold the whole matrix in f32. [`PackedMatrix::concat_rows`] joins the results.
#[derive(Debug, Clone)]
pub struct Encoder {
    scheme: Scheme,
    rows: usize,
    cols: usize,
    options: EncodeOptions,
    /// Largest magnitude of the whole matrix.
    abs_max: Option<f32>,
}

impl Encoder {
    /// An encoder of a matrix of `rows` × `cols` weights.
    ///
    /// # Errors
    /// The scheme is invalid, or is one that this crate decodes only.
    pub fn new(scheme: &Scheme, rows: usize, cols: usize, options: &EncodeOptions) -> Result<Self, FormatError> {
        scheme.packed_bytes(rows, cols)?;
        if let Some(reason) = unsupported(scheme) {
            return Err(FormatError::Unsupported { scheme: Box::new(*scheme), reason });
        }
        Ok(Self { scheme: *scheme, rows, cols, options: *options, abs_max: None })
    }

    /// Whether slices need to know the largest magnitude of the whole matrix (see [`Encoder::with_abs_max`]).
    pub fn needs_abs_max(&self) -> bool {
        self.scheme.scale == ScaleKind::E4M3Global
    }

    /// Tells the encoder the largest magnitude of the whole matrix: the largest [`abs_max`] of its slices.
    pub fn with_abs_max(self, abs_max: f32) -> Self {
        Self { abs_max: Some(abs_max), ..self }
    }

    /// Slices begin at a multiple of this many rows and end at another, or at the end of the matrix.
    pub fn slice_rows(&self) -> usize {
        if self.scheme.scale == ScaleKind::None { 1 } else { self.scheme.group_rows(self.rows) }
    }

    /// Encodes the whole rows `values`, of which the first is row `first_row` of the matrix.
    ///
    /// # Errors
    /// A weight is not finite or too large for the format, the slice cuts through a tile, or the largest magnitude of
    /// the matrix is needed and not known.
    pub fn encode_rows(&self, first_row: usize, values: &[f32]) -> Result<PackedMatrix<'static>, FormatError> {
        let rows = self.check_slice(first_row, values)?;
        match self.scheme.sparsity {
            Sparsity::Dense => self.encode_all(first_row, rows, values),
            Sparsity::TwoOfFour => self.encode_two_of_four(first_row, rows, values),
        }
    }

    /// Encodes the weights that pruning leaves as a matrix of half as many columns.
    fn encode_two_of_four(
        &self,
        first_row: usize,
        rows: usize,
        values: &[f32],
    ) -> Result<PackedMatrix<'static>, FormatError> {
        // Pruning presumes finite weights.
        abs_max(values, first_row, self.cols)?;
        let Pruned { kept, sparse_index } = prune::two_of_four(values, self.cols);
        let dense = Self { scheme: scheme_of_kept(&self.scheme), cols: self.cols / 2, ..self.clone() };
        let encoded = dense.encode_all(first_row, rows, &kept).map_err(|error| match error {
            // The weight that is too large is the largest of its row, so the first that is as large.
            FormatError::WeightRange { row, value, .. } => {
                let weights = &values[(row - first_row) * self.cols..][..self.cols];
                let col = weights.iter().position(|&weight| weight == value).unwrap_or(0);
                FormatError::WeightRange { row, col, value, scheme: Box::new(self.scheme) }
            }
            other => other,
        })?;
        Ok(PackedMatrix { cols: self.cols, scheme: self.scheme, sparse_index: sparse_index.into(), ..encoded })
    }

    /// Encodes every weight of `rows` rows.
    fn encode_all(&self, first_row: usize, rows: usize, values: &[f32]) -> Result<PackedMatrix<'static>, FormatError> {
        let slice_max = abs_max(values, first_row, self.cols)?;
        let empty = PackedMatrix::empty(self.scheme, rows, self.cols);
        if self.scheme.element.is_dense() {
            let codes = Cow::Owned(self.encode_dense(first_row, values, slice_max)?);
            return Ok(PackedMatrix { codes, ..empty });
        }
        let whole_max = match self.abs_max {
            None if self.needs_abs_max() && rows < self.rows => {
                return Err(self.not_apart("the largest magnitude of the whole matrix is not known".into()));
            }
            known => known.unwrap_or(slice_max),
        };
        let store = ScaleStore::new(&self.scheme, whole_max, self.options.power_of_two_global);

        let bits = self.scheme.element.bits();
        let sizes = self.scheme.sizes(rows, self.cols)?;
        let tile_rows = self.slice_rows().min(rows);
        let row_bytes = sizes.codes / rows;
        let zero_bytes = sizes.zeros / sizes.group_rows;
        let mut packed_codes = vec![0; sizes.codes];
        let mut packed_zeros = vec![0; sizes.zeros];
        let mut tile = TileRow {
            codes: vec![0; self.cols * tile_rows],
            scales: Vec::with_capacity(sizes.scales),
            zeros: Vec::with_capacity(sizes.groups),
            gathered: Vec::new(),
        };
        for (index, weights) in values.chunks(self.cols * tile_rows).enumerate() {
            self.encode_tile_row(first_row + index * tile_rows, weights, &store, &mut tile)?;
            let packed = packed_codes[index * tile_rows * row_bytes..].chunks_exact_mut(row_bytes);
            for (codes, packed) in tile.codes[..weights.len()].chunks_exact(self.cols).zip(packed) {
                bits::pack(codes, bits, packed);
            }
            if self.scheme.zero == ZeroKind::Integer {
                bits::pack(&tile.zeros, bits, &mut packed_zeros[index * zero_bytes..][..zero_bytes]);
            }
        }
        Ok(PackedMatrix {
            codes: packed_codes.into(),
            scales: tile.scales.into(),
            zeros: packed_zeros.into(),
            globals: store.globals().into(),
            ..empty
        })
    }

    /// Encodes the rows of one row of tiles (of one row of the matrix, where groups lie along columns).
    fn encode_tile_row(
        &self,
        row: usize,
        weights: &[f32],
        store: &ScaleStore,
        tile: &mut TileRow,
    ) -> Result<(), FormatError> {
        let TileRow { codes, scales, zeros, gathered } = tile;
        let tile_cols = self.scheme.group_cols(self.cols);
        zeros.clear();
        for start in (0..self.cols).step_by(tile_cols) {
            let columns = start..self.cols.min(start.saturating_add(tile_cols));
            let rows = weights.chunks_exact(self.cols).map(|row| &row[columns.clone()]);
            let group = if weights.len() == self.cols {
                &weights[columns.clone()]
            } else {
                gathered.clear();
                rows.clone().for_each(|run| gathered.extend_from_slice(run));
                gathered.as_slice()
            };
            let weights = Group { weights: group, importance: None };
            let choice =
                self.choose(weights, store).ok_or_else(|| self.weight_range(row, start, group, columns.len()))?;
            for (run, codes) in rows.zip(codes.chunks_exact_mut(self.cols)) {
                self.round_run(run, choice, &mut codes[columns.clone()]);
            }
            store.push(choice.scale, scales);
            zeros.push(choice.zero);
        }
        Ok(())
    }

    /// The scale and zero point of a group; `None` if its weights are too large.
    fn choose(&self, group: Group<'_>, store: &ScaleStore) -> Option<Choice> {
        match self.scheme.element {
            Element::E2M1 => search::e2m1(group, store, self.options.search),
            Element::E4M3 => search::e4m3(group, store, self.options.search),
            Element::Int(bits) => search::signed(group, bits, store, self.options.search),
            Element::Uint(bits) => search::unsigned(group, bits, store, self.options.search),
            element => unreachable!("{element} is not encoded in groups"),
        }
    }

    fn round_run(&self, weights: &[f32], choice: Choice, codes: &mut [u8]) {
        match self.scheme.element {
            Element::E2M1 => round_run(weights, choice, E2M1, codes),
            Element::E4M3 => round_run(weights, choice, E4M3, codes),
            Element::Int(bits) => round_run(weights, choice, IntegerRounding::signed(bits), codes),
            Element::Uint(bits) => round_run(weights, choice, IntegerRounding::unsigned(bits, choice.zero), codes),
            element => unreachable!("{element} is not encoded in groups"),
        }
    }

    fn encode_dense(&self, first_row: usize, values: &[f32], abs_max: f32) -> Result<Vec<u8>, FormatError> {
        let element = self.scheme.element;
        let overflows = |value: f32| !element.value(element.encode_nearest(value)).is_finite();
        if overflows(abs_max) {
            let index = values.iter().position(|&value| overflows(value)).unwrap_or(0);
            return Err(self.weight_range(first_row + index / self.cols, index % self.cols, &values[index..=index], 1));
        }
        Ok(match element {
            Element::F32 => le_bytes(values, f32::to_le_bytes),
            Element::F16 => le_bytes(values, |value| f16::from_f32(value).to_le_bytes()),
            _ => le_bytes(values, |value| bf16::from_f32(value).to_le_bytes()),
        })
    }

    /// Checks that `values` are whole rows that share scales with no others, and counts them.
    fn check_slice(&self, first_row: usize, values: &[f32]) -> Result<usize, FormatError> {
        let rows = values.len() / self.cols;
        let end = first_row.saturating_add(rows);
        if rows == 0 || rows * self.cols != values.len() || end > self.rows {
            return Err(FormatError::ValueCount { found: values.len(), rows: self.rows, cols: self.cols });
        }
        let tile = self.slice_rows();
        if !first_row.is_multiple_of(tile) || !(end.is_multiple_of(tile) || end == self.rows) {
            return Err(self.not_apart(format!("rows {first_row} to {end} cut through a tile of {tile} rows")));
        }
        Ok(rows)
    }

    fn not_apart(&self, reason: String) -> FormatError {
        FormatError::RowSlice { scheme: Box::new(self.scheme), reason }
    }

    /// The error for a group that begins at `row`, `col` and is `group_cols` wide: it names the largest weight.
    fn weight_range(&self, row: usize, col: usize, group: &[f32], group_cols: usize) -> FormatError {
        let largest = (0..group.len()).max_by(|&a, &b| group[a].abs().total_cmp(&group[b].abs())).unwrap_or(0);
        FormatError::WeightRange {
            row: row + largest / group_cols,
            col: col + largest % group_cols,
            value: group[largest],
            scheme: Box::new(self.scheme),
        }
    }
}

/// What encoding a row of tiles leaves behind, and scratch memory that rows of tiles share.
struct TileRow {
    /// Codes of its rows, one a byte.
    codes: Vec<u8>,
    /// Stored scales of this and all earlier rows of tiles.
    scales: Vec<u8>,
    /// Codes of its zero points, one a byte.
    zeros: Vec<u8>,
    /// The weights of a tile that spans several rows.
    gathered: Vec<f32>,
}

/// Why a valid scheme cannot be encoded, if it cannot.
fn unsupported(scheme: &Scheme) -> Option<&'static str> {
    let float_scales = matches!(scheme.scale, ScaleKind::F32 | ScaleKind::F16 | ScaleKind::Bf16);
    if let (Sparsity::TwoOfFour, Grouping::Columns(cols) | Grouping::Block { cols, .. }) =
        (scheme.sparsity, scheme.grouping)
        && !cols.is_multiple_of(4)
    {
        return Some("under 2:4 sparsity groups have a multiple of 4 columns");
    }
    if scheme.order != ColumnOrder::Natural {
        return Some("columns are encoded in natural order only");
    }
    if scheme.element.is_dense() {
        return None;
    }
    if scheme.scale == ScaleKind::None {
        return Some("quantised weights need scales");
    }
    if matches!(scheme.scale, ScaleKind::TwoLevel { .. }) {
        return Some("two-level scales are decoded only");
    }
    match (scheme.element, scheme.zero) {
        (Element::Iq4Nl, _) => Some("the codebook of IQ4_NL is decoded only"),
        (Element::Uint(_), ZeroKind::Integer) if float_scales => None,
        (Element::Uint(_), ZeroKind::Integer) => Some("integer zero points need f32, f16 or bf16 scales"),
        (Element::Uint(_), _) => Some("unsigned integers need integer zero points"),
        (_, ZeroKind::None) => None,
        _ => Some("only unsigned integers are encoded with zero points"),
    }
}

/// The dense scheme of the weights that a 2:4 matrix keeps, half of each group.
fn scheme_of_kept(scheme: &Scheme) -> Scheme {
    let grouping = match scheme.grouping {
        Grouping::Columns(cols) => Grouping::Columns(cols / 2),
        Grouping::Block { rows, cols } => Grouping::Block { rows, cols: cols / 2 },
        whole @ (Grouping::Row | Grouping::Tensor) => whole,
    };
    Scheme { grouping, sparsity: Sparsity::Dense, ..*scheme }
}

fn round_run<R: Rounding>(weights: &[f32], choice: Choice, rounding: R, codes: &mut [u8]) {
    let scale = choice.scale.value;
    if scale == 0.0 {
        return codes.fill(rounding.code(0.0));
    }
    for (code, weight) in codes.iter_mut().zip(weights) {
        *code = rounding.code(weight / scale);
    }
}

fn le_bytes<const BYTES: usize>(values: &[f32], to_bytes: impl Fn(f32) -> [u8; BYTES]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * BYTES];
    for (bytes, &value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = to_bytes(value);
    }
    bytes
}
