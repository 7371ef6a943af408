//! What a packed matrix means: the reference decoding of every scheme.
//!
//! A weight is `scale · (value − zero) + bias`, each operation rounded to f32. A two-level scale is the f32 product of
//! its two levels, and so is a two-level minimum, whose negative is the bias.

use half::{bf16, f16};

use crate::size::sparse_row_bytes;
use crate::{ColumnOrder, Element, PackedMatrix, ScaleKind, Sparsity, ZeroKind, bits};

/// Codes unpacked at a time; a multiple of 8, so that every run starts on a byte border at any width.
const RUN: usize = 256;

/// All of these expect a matrix that [`PackedMatrix::validate`] accepts, and panic where one is not, or where an index
/// is out of range.
impl PackedMatrix<'_> {
    /// The code in position `stored_col` of a row. Under 2:4, positions count stored codes only.
    pub fn code(&self, row: usize, stored_col: usize) -> u32 {
        let codes = self.code_row(row);
        match self.scheme.element {
            Element::F32 => read_u32(codes, stored_col),
            Element::F16 | Element::Bf16 => u32::from(read_u16(codes, stored_col)),
            element => u32::from(bits::get(codes, stored_col, element.bits())),
        }
    }

    /// The packed codes of a row.
    pub fn code_row(&self, row: usize) -> &[u8] {
        let bytes = self.codes.len() / self.rows;
        &self.codes[row * bytes..][..bytes]
    }

    /// Unpacks the codes of a row of a quantised element, one a byte; `codes` has [`crate::Scheme::stored_cols`]
    /// elements.
    pub fn unpack_codes_row(&self, row: usize, codes: &mut [u8]) {
        assert!(!self.scheme.element.is_dense(), "codes of {} are wider than a byte", self.scheme.element);
        assert_eq!(codes.len(), self.scheme.stored_cols(self.cols), "one code a stored column");
        bits::unpack(self.code_row(row), self.scheme.element.bits(), codes);
    }

    /// The group of a column: an index for [`PackedMatrix::scale_at`], [`PackedMatrix::zero_at`] and
    /// [`PackedMatrix::bias_at`].
    pub fn group_of(&self, col: usize) -> usize {
        match self.scheme.order {
            ColumnOrder::Natural => col / self.scheme.group_cols(self.cols),
            ColumnOrder::GroupIndex => read_u32(&self.group_index, col) as usize,
        }
    }

    /// The scale of a group of a row, all levels multiplied; 1 without scales.
    pub fn scale_at(&self, row: usize, group: usize) -> f32 {
        let groups = self.scheme.groups_per_row(self.cols);
        assert!(group < groups, "group {group} of {groups}");
        match self.scheme.scale {
            ScaleKind::None => 1.0,
            ScaleKind::TwoLevel { bits, signed, .. } => {
                let code = packed_row(&self.scales, row, groups, u32::from(bits), group);
                let offset = if signed && code >> (bits - 1) == 1 { 1 << bits } else { 0 };
                read_f16(&self.globals, self.super_group_index(row, group)) * (i32::from(code) - offset) as f32
            }
            kind => {
                let read = scale_reader(kind).expect("one-level scales have a reader");
                let scale = read(&self.scales, self.group_row(row) * groups + group);
                if kind == ScaleKind::E4M3Global { scale * read_f32(&self.globals, 0) } else { scale }
            }
        }
    }

    /// The integer zero point of a group of a row; 0 without.
    pub fn zero_at(&self, row: usize, group: usize) -> i32 {
        if self.scheme.zero != ZeroKind::Integer {
            return 0;
        }
        let (element, groups) = (self.scheme.element, self.scheme.groups_per_row(self.cols));
        let code = packed_row(&self.zeros, self.group_row(row), groups, element.bits(), group);
        element.value(u32::from(code)) as i32
    }

    /// What is added to the weights of a group of a row after scaling; 0 without biases.
    pub fn bias_at(&self, row: usize, group: usize) -> f32 {
        let groups = self.scheme.groups_per_row(self.cols);
        if let ZeroKind::TwoLevelMin { bits } = self.scheme.zero {
            let code = packed_row(&self.zeros, row, groups, u32::from(bits), group);
            let minima = self.globals.len() / 4;
            return -(read_f16(&self.globals, minima + self.super_group_index(row, group)) * f32::from(code));
        }
        let read = bias_reader(self.scheme.zero);
        read.map_or(0.0, |read| read(&self.zeros, self.group_row(row) * groups + group))
    }

    /// Decodes one row; `weights` has `cols` elements.
    pub fn decode_row(&self, row: usize, weights: &mut [f32]) {
        assert_eq!(weights.len(), self.cols, "one weight a column");
        let stored = self.scheme.stored_cols(self.cols);
        self.decode_values(row, &mut weights[..stored]);
        if self.scheme.sparsity == Sparsity::TwoOfFour {
            self.expand_two_of_four(row, weights);
        }
        if self.scheme.scale != ScaleKind::None {
            self.scale_row(row, weights);
        }
        if self.scheme.sparsity == Sparsity::TwoOfFour && self.scheme.zero != ZeroKind::None {
            self.clear_pruned(row, weights);
        }
    }

    /// Decodes the whole matrix, row by row.
    pub fn decode(&self) -> Vec<f32> {
        let mut weights = vec![0.0; self.rows * self.cols];
        for (row, weights) in weights.chunks_exact_mut(self.cols).enumerate() {
            self.decode_row(row, weights);
        }
        weights
    }

    /// The values of the stored codes of a row, before scales.
    fn decode_values(&self, row: usize, values: &mut [f32]) {
        let codes = self.code_row(row);
        match self.scheme.element {
            Element::F32 => fill(values, codes, f32::from_le_bytes),
            Element::F16 => fill(values, codes, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Element::Bf16 => fill(values, codes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            element => {
                let (table, width) = (element.values(), element.bits());
                let mut run = [0; RUN];
                for (values, bytes) in values.chunks_mut(RUN).zip(codes.chunks(RUN * width as usize / 8)) {
                    let run = &mut run[..values.len()];
                    bits::unpack(bytes, width, run);
                    for (value, &code) in values.iter_mut().zip(&*run) {
                        *value = table[usize::from(code)];
                    }
                }
            }
        }
    }

    /// Spreads the stored values in the first half of `weights` over all of it. From the end, so that nothing is
    /// overwritten before it is read.
    fn expand_two_of_four(&self, row: usize, weights: &mut [f32]) {
        for quad in (0..self.cols / 4).rev() {
            let pair = [weights[quad * 2], weights[quad * 2 + 1]];
            let kept = self.kept_columns(row, quad);
            let columns = &mut weights[quad * 4..][..4];
            columns.fill(0.0);
            columns[kept[0]] = pair[0];
            columns[kept[1]] = pair[1];
        }
    }

    /// A pruned weight is 0 whatever its group's zero point and bias.
    fn clear_pruned(&self, row: usize, weights: &mut [f32]) {
        for (quad, columns) in weights.chunks_exact_mut(4).enumerate() {
            let kept = self.kept_columns(row, quad);
            for (position, weight) in columns.iter_mut().enumerate() {
                if !kept.contains(&position) {
                    *weight = 0.0;
                }
            }
        }
    }

    /// Which two of four columns are stored.
    fn kept_columns(&self, row: usize, quad: usize) -> [usize; 2] {
        let bytes = sparse_row_bytes(self.cols);
        let index = usize::from(bits::get(&self.sparse_index[row * bytes..][..bytes], quad, 4));
        [index & 3, index >> 2]
    }

    fn scale_row(&self, row: usize, weights: &mut [f32]) {
        match self.scheme.order {
            ColumnOrder::Natural => {
                for (group, weights) in weights.chunks_mut(self.scheme.group_cols(self.cols)).enumerate() {
                    let scaling = self.scaling_at(row, group);
                    weights.iter_mut().for_each(|weight| *weight = scaling.apply(*weight));
                }
            }
            ColumnOrder::GroupIndex => {
                let groups = self.scheme.groups_per_row(self.cols);
                let scaling: Vec<Scaling> = (0..groups).map(|group| self.scaling_at(row, group)).collect();
                for (col, weight) in weights.iter_mut().enumerate() {
                    *weight = scaling[self.group_of(col)].apply(*weight);
                }
            }
        }
    }

    fn scaling_at(&self, row: usize, group: usize) -> Scaling {
        let scale = self.scale_at(row, group);
        Scaling { scale, zero: self.zero_at(row, group) as f32, bias: self.bias_at(row, group) }
    }

    /// Row of the grid of groups.
    fn group_row(&self, row: usize) -> usize {
        row / self.scheme.group_rows(self.rows)
    }

    /// Index of a group's second-level scale.
    fn super_group_index(&self, row: usize, group: usize) -> usize {
        let ScaleKind::TwoLevel { super_group, .. } = self.scheme.scale else {
            unreachable!("only two-level scales have super-groups");
        };
        let super_group = super_group as usize;
        row * self.cols.div_ceil(super_group) + group * self.scheme.group_cols(self.cols) / super_group
    }
}

/// How the values of a group become weights.
#[derive(Clone, Copy)]
struct Scaling {
    scale: f32,
    zero: f32,
    bias: f32,
}

impl Scaling {
    #[inline(always)]
    fn apply(self, value: f32) -> f32 {
        self.scale * (value - self.zero) + self.bias
    }
}

/// Reads one value of a buffer of them.
type Reader = fn(&[u8], usize) -> f32;

/// How one-level scales are read; for [`ScaleKind::E4M3Global`], before the global scale.
pub(crate) fn scale_reader(kind: ScaleKind) -> Option<Reader> {
    match kind {
        ScaleKind::F32 => Some(read_f32),
        ScaleKind::F16 => Some(read_f16),
        ScaleKind::Bf16 => Some(read_bf16),
        ScaleKind::E8M0 => Some(|bytes, index| e8m0(bytes[index])),
        ScaleKind::E4M3Global => Some(|bytes, index| Element::E4M3.value(u32::from(bytes[index]))),
        ScaleKind::None | ScaleKind::TwoLevel { .. } => None,
    }
}

/// How float biases are read.
pub(crate) fn bias_reader(kind: ZeroKind) -> Option<Reader> {
    match kind {
        ZeroKind::F32Bias => Some(read_f32),
        ZeroKind::F16Bias => Some(read_f16),
        ZeroKind::Bf16Bias => Some(read_bf16),
        ZeroKind::None | ZeroKind::Integer | ZeroKind::TwoLevelMin { .. } => None,
    }
}

/// 2^(code − 127), NaN for 255 (OCP Microscaling v1.0). 2^−127 is subnormal in f32.
pub(crate) fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// Entry `index` of a row of `count` packed codes.
fn packed_row(bytes: &[u8], row: usize, count: usize, width: u32, index: usize) -> u8 {
    let row_bytes = (count * width as usize).div_ceil(8);
    bits::get(&bytes[row * row_bytes..][..row_bytes], index, width)
}

fn fill<const BYTES: usize>(values: &mut [f32], bytes: &[u8], read: impl Fn([u8; BYTES]) -> f32) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *value = read(*bytes);
    }
}

fn read_u16(bytes: &[u8], index: usize) -> u16 {
    u16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]])
}

pub(crate) fn read_u32(bytes: &[u8], index: usize) -> u32 {
    u32::from(read_u16(bytes, index * 2)) | u32::from(read_u16(bytes, index * 2 + 1)) << 16
}

pub(crate) fn read_f32(bytes: &[u8], index: usize) -> f32 {
    f32::from_bits(read_u32(bytes, index))
}

pub(crate) fn read_f16(bytes: &[u8], index: usize) -> f32 {
    f16::from_bits(read_u16(bytes, index)).to_f32()
}

pub(crate) fn read_bf16(bytes: &[u8], index: usize) -> f32 {
    bf16::from_bits(read_u16(bytes, index)).to_f32()
}
