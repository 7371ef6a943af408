//! Encoding weights one by one.

use std::borrow::Cow;

use super::scale::ScaleStore;
use super::search::{Choice, Group};
use super::{Encoder, scheme_of_kept};
use crate::element::{E2M1, E4M3, IntegerRounding, Rounding};
use crate::size::sparse_row_bytes;
use crate::{Element, FormatError, PackedMatrix, Sparsity, ZeroKind, bits};

/// Encodes the weights of one matrix in any order, for methods that choose the code of each in the light of what others
/// were rounded to (GPTQ): a scale for each group, then codes, and in the end a packed matrix of them.
///
/// Groups are those of the scheme: along the columns of a row, or tiles. Under 2:4 sparsity a group has the weights of its
/// columns that are kept.
#[derive(Debug, Clone)]
pub struct GroupEncoder {
    encoder: Encoder,
    store: ScaleStore,
}

/// What is stored of a group besides its codes: a scale, and perhaps a zero point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupScale(Choice);

impl Encoder {
    /// Encodes weights one by one. `abs_max` is the largest magnitude of the whole matrix.
    ///
    /// # Errors
    /// The scheme has no scales.
    pub fn by_groups(&self, abs_max: f32) -> Result<GroupEncoder, FormatError> {
        if self.scheme.element.is_dense() {
            let reason = "there are no groups of weights to encode";
            return Err(FormatError::Unsupported { scheme: Box::new(self.scheme), reason });
        }
        let store = ScaleStore::new(&self.scheme, abs_max, self.options.power_of_two_global);
        Ok(GroupEncoder { encoder: self.clone(), store })
    }
}

impl GroupEncoder {
    /// Chooses the scale (and zero point) of a group by the search of [`crate::EncodeOptions`]: the squared error of each weight counts as much
    /// as its `importance` says, all alike if there is none.
    ///
    /// # Errors
    /// The weights are too large for the format. The group begins at `row` and `col` and is `group_cols` wide; weights are its
    /// rows one after the other.
    ///
    /// # Panics
    /// There are not as many values of importance as weights.
    pub fn choose(
        &self,
        weights: &[f32],
        importance: Option<&[f32]>,
        [row, col, group_cols]: [usize; 3],
    ) -> Result<GroupScale, FormatError> {
        assert!(importance.is_none_or(|importance| importance.len() == weights.len()), "one importance a weight");
        let choice = self.encoder.choose(Group { weights, importance }, &self.store);
        choice.map(GroupScale).ok_or_else(|| self.encoder.weight_range(row, col, weights, group_cols))
    }

    /// A scale that is `factor` times another one, with its zero point; `None` if it is not stored otherwise than that one, or not at all.
    pub fn scaled(&self, GroupScale(choice): GroupScale, factor: f32) -> Option<GroupScale> {
        let scale = self.store.round(choice.scale.value * factor)?;
        (scale != choice.scale).then_some(GroupScale(Choice { scale, ..choice }))
    }

    /// The code of a weight in its group, and the value that it stands for.
    pub fn code(&self, GroupScale(choice): GroupScale, weight: f32) -> (u8, f32) {
        match self.encoder.scheme.element {
            Element::E2M1 => code(weight, choice, E2M1),
            Element::E4M3 => code(weight, choice, E4M3),
            Element::Int(bits) => code(weight, choice, IntegerRounding::signed(bits)),
            Element::Uint(bits) => code(weight, choice, IntegerRounding::unsigned(bits, choice.zero)),
            element => unreachable!("{element} is not encoded in groups"),
        }
    }

    /// Packs whole rows of codes, one a byte, with the scales of their groups: `[rows of groups, groups of a row]`. Under 2:4 sparsity
    /// `codes` has all columns, of which `kept` says which two of four count.
    ///
    /// # Panics
    /// There are not as many codes or scales as the scheme has for so many rows.
    pub fn pack(&self, rows: usize, codes: &[u8], kept: &[bool], scales: &[GroupScale]) -> PackedMatrix<'static> {
        let Encoder { scheme, cols, .. } = self.encoder;
        let is_sparse = scheme.sparsity == Sparsity::TwoOfFour;
        assert_eq!(
            (codes.len(), kept.len()),
            (rows * cols, if is_sparse { rows * cols } else { 0 }),
            "one code a weight"
        );
        let (codes, sparse_index) =
            if is_sparse { keep(codes, kept, cols) } else { (Cow::Borrowed(codes), Vec::new()) };
        let stored_scheme = if is_sparse { scheme_of_kept(&scheme) } else { scheme };
        let stored_cols = scheme.stored_cols(cols);
        let sizes = stored_scheme.sizes(rows, stored_cols).expect("the shape was checked with the scheme");
        assert_eq!(scales.len(), sizes.groups * sizes.group_rows, "one scale a group");

        let bits_of_code = scheme.element.bits();
        let (row_bytes, zero_bytes) = (sizes.codes / rows, sizes.zeros / sizes.group_rows);
        let mut packed_codes = vec![0; sizes.codes];
        for (codes, packed) in codes.chunks_exact(stored_cols).zip(packed_codes.chunks_exact_mut(row_bytes)) {
            bits::pack(codes, bits_of_code, packed);
        }
        let mut packed_scales = Vec::with_capacity(sizes.scales);
        scales.iter().for_each(|GroupScale(choice)| self.store.push(choice.scale, &mut packed_scales));
        let mut packed_zeros = vec![0; sizes.zeros];
        if scheme.zero == ZeroKind::Integer {
            let zeros: Vec<u8> = scales.iter().map(|GroupScale(choice)| choice.zero).collect();
            for (zeros, packed) in zeros.chunks_exact(sizes.groups).zip(packed_zeros.chunks_exact_mut(zero_bytes)) {
                bits::pack(zeros, bits_of_code, packed);
            }
        }
        PackedMatrix {
            codes: packed_codes.into(),
            scales: packed_scales.into(),
            zeros: packed_zeros.into(),
            globals: self.store.globals().into(),
            sparse_index: sparse_index.into(),
            ..PackedMatrix::empty(scheme, rows, cols)
        }
    }
}

fn code<R: Rounding>(weight: f32, choice: Choice, rounding: R) -> (u8, f32) {
    let scale = choice.scale.value;
    // A group of zeros has no scale.
    let quotient = if scale == 0.0 { 0.0 } else { weight / scale };
    (rounding.code(quotient), scale * rounding.round(quotient))
}

/// The codes that are kept, and [`PackedMatrix::sparse_index`].
fn keep<'a>(codes: &[u8], kept: &[bool], cols: usize) -> (Cow<'a, [u8]>, Vec<u8>) {
    let rows = codes.len() / cols;
    let mut stored = Vec::with_capacity(codes.len() / 2);
    let mut sparse_index = vec![0; rows * sparse_row_bytes(cols)];
    let mut pairs = vec![0; cols / 4];
    let of_rows = codes.chunks_exact(cols).zip(kept.chunks_exact(cols));
    for ((codes, kept), index) in of_rows.zip(sparse_index.chunks_exact_mut(sparse_row_bytes(cols))) {
        for ((codes, kept), pair) in codes.as_chunks::<4>().0.iter().zip(kept.as_chunks::<4>().0).zip(&mut pairs) {
            let mut positions = (0..4).filter(|&position| kept[position]);
            let (Some(low), Some(high), None) = (positions.next(), positions.next(), positions.next()) else {
                panic!("two of four weights are kept, found {kept:?}");
            };
            stored.extend([codes[low], codes[high]]);
            *pair = (low | high << 2) as u8;
        }
        bits::pack(&pairs, 4, index);
    }
    (Cow::Owned(stored), sparse_index)
}
