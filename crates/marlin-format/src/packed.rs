//! A packed matrix in canonical order.

use std::borrow::Cow;
use std::ops::Range;

use crate::size::{Sizes, sparse_row_bytes};
use crate::{ColumnOrder, FormatError, Grouping, ScaleKind, Scheme, Sparsity, ZeroKind, bits, decode};

/// A matrix `[rows, cols]` in the storage its [`Scheme`] describes, borrowed (from a mapped file) or owned.
///
/// All multi-byte values are little endian. `G` is the number of groups of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMatrix<'a> {
    /// Output features, N.
    pub rows: usize,
    /// Input features, K.
    pub cols: usize,
    /// The storage of everything below.
    pub scheme: Scheme,
    /// Codes, `[rows, ceil(stored columns · bits / 8)]` bytes, least-significant bit first along K.
    pub codes: Cow<'a, [u8]>,
    /// Scales, one per group: `[rows, G]` for column groups, `[rows]`, `[1]`, or `[row tiles, column tiles]`.
    /// Two-level scales: inner scales packed along G, each row starting on a byte border.
    pub scales: Cow<'a, [u8]>,
    /// Zero points (packed along G, each row starting on a byte border) or biases (as scales); empty without.
    pub zeros: Cow<'a, [u8]>,
    /// Second-level values. NVFP4: one f32. Two-level scales: f16 `[rows, super-groups]`, followed by the same for
    /// minima if there are any. Empty otherwise.
    pub globals: Cow<'a, [u8]>,
    /// Group of each column (u32 `[cols]`) under [`crate::ColumnOrder::GroupIndex`]; empty otherwise.
    pub group_index: Cow<'a, [u8]>,
    /// 2:4 metadata, `[rows, cols / 4 · 4 bits]` (`cols` is a multiple of 4), each row starting on a byte border; empty when dense.
    pub sparse_index: Cow<'a, [u8]>,
}

impl<'a> PackedMatrix<'a> {
    /// A matrix of plain floats: `bytes` are its little-endian values, row by row.
    ///
    /// # Errors
    /// The scheme is not dense, or `bytes` has the wrong length.
    pub fn from_dense_bytes(
        scheme: Scheme,
        rows: usize,
        cols: usize,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self, FormatError> {
        if !scheme.is_dense() {
            return Err(FormatError::InvalidScheme(format!("{scheme} is no dense format")));
        }
        let matrix = Self { codes: bytes.into(), ..Self::empty(scheme, rows, cols) };
        matrix.validate()?;
        Ok(matrix)
    }

    /// A matrix all of whose buffers are still to be filled in: the base of a literal that names only what its scheme has.
    pub fn empty(scheme: Scheme, rows: usize, cols: usize) -> Self {
        let none = Cow::Borrowed(&[][..]);
        Self {
            rows,
            cols,
            scheme,
            codes: none.clone(),
            scales: none.clone(),
            zeros: none.clone(),
            globals: none.clone(),
            group_index: none.clone(),
            sparse_index: none,
        }
    }

    /// The same matrix with buffers of its own.
    pub fn into_owned(self) -> PackedMatrix<'static> {
        let own = |bytes: Cow<'_, [u8]>| Cow::Owned(bytes.into_owned());
        PackedMatrix {
            rows: self.rows,
            cols: self.cols,
            scheme: self.scheme,
            codes: own(self.codes),
            scales: own(self.scales),
            zeros: own(self.zeros),
            globals: own(self.globals),
            group_index: own(self.group_index),
            sparse_index: own(self.sparse_index),
        }
    }

    /// The same matrix, borrowed.
    pub fn borrowed(&self) -> PackedMatrix<'_> {
        PackedMatrix {
            rows: self.rows,
            cols: self.cols,
            scheme: self.scheme,
            codes: Cow::Borrowed(&self.codes),
            scales: Cow::Borrowed(&self.scales),
            zeros: Cow::Borrowed(&self.zeros),
            globals: Cow::Borrowed(&self.globals),
            group_index: Cow::Borrowed(&self.group_index),
            sparse_index: Cow::Borrowed(&self.sparse_index),
        }
    }

    /// Joins matrices of consecutive rows into one, as [`crate::Encoder::encode_rows`] makes them.
    ///
    /// # Errors
    /// The parts differ in scheme, columns or whole-matrix values, or a part other than the last ends within a tile.
    pub fn concat_rows(parts: &[PackedMatrix<'_>]) -> Result<PackedMatrix<'static>, FormatError> {
        let Some(first) = parts.first() else {
            return Err(FormatError::Empty { rows: 0, cols: 0 });
        };
        let scheme = first.scheme;
        let apart = |reason: String| Err(FormatError::RowSlice { scheme: Box::new(scheme), reason });
        for (index, part) in parts.iter().enumerate() {
            if part.scheme != scheme || part.cols != first.cols {
                return apart(format!(
                    "part {index} is [_, {}] of {}, not [_, {}]",
                    part.cols, part.scheme, first.cols
                ));
            }
            if scheme.scale == ScaleKind::E4M3Global && part.globals != first.globals {
                return apart(format!("part {index} has a global scale of its own"));
            }
            if part.group_index != first.group_index {
                return apart(format!("part {index} has a group index of its own"));
            }
            let (is_last, tile) = (index + 1 == parts.len(), scheme.group_rows(usize::MAX));
            if parts.len() > 1 && scheme.scale != ScaleKind::None && !is_last && part.rows % tile != 0 {
                return apart(format!("part {index} of {} rows ends within a tile of {tile}", part.rows));
            }
        }
        let joined = PackedMatrix {
            rows: parts.iter().map(|part| part.rows).sum(),
            codes: join(parts.iter().map(|part| &part.codes[..])),
            scales: join(parts.iter().map(|part| &part.scales[..])),
            zeros: join(parts.iter().map(|part| &part.zeros[..])),
            globals: join_globals(parts),
            group_index: Cow::Owned(first.group_index.to_vec()),
            sparse_index: join(parts.iter().map(|part| &part.sparse_index[..])),
            ..PackedMatrix::empty(scheme, 0, first.cols)
        };
        joined.validate()?;
        Ok(joined)
    }

    /// Consecutive rows as a matrix of their own, borrowed but for two-level minima: one half of a tensor that holds two
    /// matrices.
    ///
    /// # Errors
    /// The range is empty or reaches beyond the matrix, it begins within a tile of rows that share their scales, or a
    /// buffer has the wrong length.
    pub fn slice_rows(&self, range: Range<usize>) -> Result<PackedMatrix<'_>, FormatError> {
        let sizes = self.scheme.sizes(self.rows, self.cols)?;
        self.check_lengths(&sizes)?;
        let refuse = |reason: String| Err(FormatError::RowSlice { scheme: Box::new(self.scheme), reason });
        let Range { start, end } = range;
        if start >= end || end > self.rows {
            return refuse(format!("rows {start}..{end} of {}", self.rows));
        }
        // A scale of the whole matrix is that of each slice too.
        let tile = self.scheme.group_rows(usize::MAX);
        if self.scheme.grouping != Grouping::Tensor && !start.is_multiple_of(tile) {
            return refuse(format!("row {start} lies within a tile of {tile}"));
        }
        let slice = |bytes, total: usize, range: &Range<usize>| {
            let bytes: &[u8] = bytes;
            let each = bytes.len() / total;
            Cow::Borrowed(&bytes[range.start * each..range.end * each])
        };
        let (rows, tiles) = (start..end, start / tile..end.div_ceil(tile));
        Ok(PackedMatrix {
            rows: end - start,
            codes: slice(&self.codes, self.rows, &rows),
            scales: slice(&self.scales, sizes.group_rows, &tiles),
            zeros: slice(&self.zeros, sizes.group_rows, &tiles),
            globals: self.slice_globals(&rows),
            group_index: Cow::Borrowed(&self.group_index),
            sparse_index: slice(&self.sparse_index, self.rows, &rows),
            ..PackedMatrix::empty(self.scheme, 0, self.cols)
        })
    }

    /// Under a group index, the columns in the order of their groups, those of a group in their own order. Each group then has the place
    /// that it would have in natural order, so that a matrix with columns in this order needs no index.
    ///
    /// `None` in natural order, and if a group has more or fewer columns than in natural order.
    pub fn group_order(&self) -> Option<Vec<u32>> {
        if self.scheme.order != ColumnOrder::GroupIndex {
            return None;
        }
        let group_cols = self.scheme.group_cols(self.cols);
        let mut order = vec![None; self.cols];
        let mut found = vec![0; self.scheme.groups_per_row(self.cols)];
        for (column, group) in (0..self.cols as u32).map(|column| (column, self.group_of(column as usize))) {
            let place = *found.get(group)?;
            found[group] += 1;
            if place >= group_cols {
                return None;
            }
            *order.get_mut(group * group_cols + place)? = Some(column);
        }
        // As many places as columns, and no two columns in one.
        order.into_iter().collect()
    }

    /// The matrix with its columns in another order: that of [`PackedMatrix::group_order`], after which it needs no index, or any order of
    /// columns of plain floats.
    ///
    /// # Errors
    /// It is neither, or a buffer has the wrong length.
    pub fn with_columns(&self, order: &[u32]) -> Result<PackedMatrix<'static>, FormatError> {
        self.check_lengths(&self.scheme.sizes(self.rows, self.cols)?)?;
        let scheme = Scheme { order: ColumnOrder::Natural, ..self.scheme };
        let is_order_of_groups = || self.group_order().is_some_and(|own| own == order);
        let is_of_columns = order.len() == self.cols && order.iter().all(|&column| (column as usize) < self.cols);
        if !is_of_columns || scheme.sparsity != Sparsity::Dense || !(scheme.is_dense() || is_order_of_groups()) {
            return Err(FormatError::InvalidScheme(format!(
                "columns of {} cannot be put into this order",
                self.scheme
            )));
        }
        let mut codes = vec![0; self.codes.len()];
        let row_bytes = codes.len() / self.rows;
        if scheme.is_dense() {
            let size = scheme.element.bits() as usize / 8;
            for (row, codes) in codes.chunks_exact_mut(row_bytes).enumerate() {
                for (code, &column) in codes.chunks_exact_mut(size).zip(order) {
                    code.copy_from_slice(&self.code_row(row)[column as usize * size..][..size]);
                }
            }
        } else {
            let (mut own, mut ordered) = (vec![0; self.cols], vec![0; self.cols]);
            for (row, codes) in codes.chunks_exact_mut(row_bytes).enumerate() {
                self.unpack_codes_row(row, &mut own);
                ordered.iter_mut().zip(order).for_each(|(code, &column)| *code = own[column as usize]);
                bits::pack(&ordered, scheme.element.bits(), codes);
            }
        }
        let matrix = PackedMatrix { scheme, codes: codes.into(), group_index: Cow::Borrowed(&[]), ..self.borrowed() };
        Ok(matrix.into_owned())
    }

    /// The same weights in single precision.
    ///
    /// # Errors
    /// A buffer has the wrong length.
    pub fn to_f32(&self) -> Result<PackedMatrix<'static>, FormatError> {
        self.check_lengths(&self.scheme.sizes(self.rows, self.cols)?)?;
        let mut weights = vec![0.0; self.cols];
        let mut codes = Vec::with_capacity(self.rows * self.cols * size_of::<f32>());
        for row in 0..self.rows {
            self.decode_row(row, &mut weights);
            codes.extend(weights.iter().flat_map(|weight| weight.to_le_bytes()));
        }
        PackedMatrix::from_dense_bytes(Scheme::F32, self.rows, self.cols, codes)
    }

    /// The transposed matrix of some columns of a matrix of plain floats: `first`, `first + step` and so on.
    ///
    /// # Errors
    /// The scheme is not dense, there is no such column, or the codes have the wrong length.
    pub fn transposed_columns(&self, first: usize, step: usize) -> Result<PackedMatrix<'static>, FormatError> {
        let columns = || (first..self.cols).step_by(step);
        let size = self.scheme.element.bits() as usize / 8;
        let mut bytes = Vec::with_capacity(columns().len() * self.rows * size);
        if self.scheme.is_dense() {
            self.check_lengths(&self.scheme.sizes(self.rows, self.cols)?)?;
            for col in columns() {
                for row in 0..self.rows {
                    bytes.extend_from_slice(&self.codes[(row * self.cols + col) * size..][..size]);
                }
            }
        }
        PackedMatrix::from_dense_bytes(self.scheme, columns().len(), self.rows, bytes)
    }

    /// Second-level values of some rows: minima stand behind all scales.
    fn slice_globals(&self, rows: &Range<usize>) -> Cow<'_, [u8]> {
        if !matches!(self.scheme.scale, ScaleKind::TwoLevel { .. }) {
            return Cow::Borrowed(&self.globals);
        }
        let levels = if matches!(self.scheme.zero, ZeroKind::TwoLevelMin { .. }) { 2 } else { 1 };
        let (level, row) = (self.globals.len() / levels, self.globals.len() / levels / self.rows);
        let of_level = |index: usize| &self.globals[index * level..][rows.start * row..rows.end * row];
        if levels == 1 { Cow::Borrowed(of_level(0)) } else { join([of_level(0), of_level(1)].into_iter()) }
    }

    /// Checks everything that decoding relies on: the length of each buffer, groups in range, 2:4 metadata that names
    /// two ascending columns, and finite scales and biases. Codes are not looked at, so a NaN code of E4M3 passes.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), FormatError> {
        let sizes = self.scheme.sizes(self.rows, self.cols)?;
        self.check_lengths(&sizes)?;
        self.check_indices(&sizes)?;
        self.check_scales(&sizes)
    }

    fn check_lengths(&self, sizes: &Sizes) -> Result<(), FormatError> {
        let fields = [
            ("codes", &self.codes, sizes.codes),
            ("scales", &self.scales, sizes.scales),
            ("zeros", &self.zeros, sizes.zeros),
            ("globals", &self.globals, sizes.globals),
            ("group_index", &self.group_index, sizes.group_index),
            ("sparse_index", &self.sparse_index, sizes.sparse_index),
        ];
        for (field, bytes, wanted) in fields {
            if bytes.len() != wanted {
                return Err(FormatError::BufferLength {
                    field,
                    found: bytes.len(),
                    wanted,
                    rows: self.rows,
                    cols: self.cols,
                    scheme: Box::new(self.scheme),
                });
            }
        }
        Ok(())
    }

    fn check_indices(&self, sizes: &Sizes) -> Result<(), FormatError> {
        if self.scheme.order == ColumnOrder::GroupIndex {
            let groups = sizes.groups;
            for col in 0..self.cols {
                let found = decode::read_u32(&self.group_index, col);
                if found as usize >= groups {
                    return Err(FormatError::GroupIndex { col, found, groups });
                }
            }
        }
        if self.scheme.sparsity == Sparsity::TwoOfFour {
            for (row, bytes) in self.sparse_index.chunks_exact(sparse_row_bytes(self.cols)).enumerate() {
                for quad in 0..self.cols / 4 {
                    let found = bits::get(bytes, quad, 4);
                    if found & 3 >= found >> 2 {
                        return Err(FormatError::SparseIndex { row, col: quad * 4, found });
                    }
                }
            }
        }
        Ok(())
    }

    fn check_scales(&self, sizes: &Sizes) -> Result<(), FormatError> {
        let count = sizes.group_rows * sizes.groups;
        let check = |field, count, value: &dyn Fn(usize) -> f32| {
            let bad = (0..count).map(|index| (index, value(index))).find(|(_, value)| !value.is_finite());
            bad.map_or(Ok(()), |(index, value)| Err(FormatError::NonFiniteScale { field, index, value }))
        };
        if let Some(read) = decode::scale_reader(self.scheme.scale) {
            check("scales", count, &|index| read(&self.scales, index))?;
        }
        if let Some(read) = decode::bias_reader(self.scheme.zero) {
            check("zeros", count, &|index| read(&self.zeros, index))?;
        }
        match self.scheme.scale {
            ScaleKind::E4M3Global => check("globals", 1, &|index| decode::read_f32(&self.globals, index)),
            ScaleKind::TwoLevel { .. } => {
                check("globals", self.globals.len() / 2, &|index| decode::read_f16(&self.globals, index))
            }
            _ => Ok(()),
        }
    }
}

/// Whole-matrix values stand once; of second-level values, those of all scales come before those of all minima.
fn join_globals(parts: &[PackedMatrix<'_>]) -> Cow<'static, [u8]> {
    let scheme = parts[0].scheme;
    if !matches!(scheme.scale, ScaleKind::TwoLevel { .. }) {
        return Cow::Owned(parts[0].globals.to_vec());
    }
    let has_minima = matches!(scheme.zero, ZeroKind::TwoLevelMin { .. });
    let split = |part: &PackedMatrix<'_>| part.globals.len() / if has_minima { 2 } else { 1 };
    let scales = parts.iter().map(|part| &part.globals[..split(part)]);
    let minima = parts.iter().map(|part| &part.globals[split(part)..]);
    join(scales.chain(minima))
}

fn join<'p>(buffers: impl Iterator<Item = &'p [u8]> + Clone) -> Cow<'static, [u8]> {
    let mut joined = Vec::with_capacity(buffers.clone().map(<[u8]>::len).sum());
    buffers.for_each(|buffer| joined.extend_from_slice(buffer));
    Cow::Owned(joined)
}
