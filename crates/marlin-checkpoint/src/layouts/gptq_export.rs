//! Writing the layout of GPTQ, which `transformers`, GPTQModel and vLLM read.
//!
//! The linear `X` is stored as `X.qweight`, `X.qzeros`, `X.scales` and `X.g_idx`, the first three transposed: codes are
//! packed along K into 32-bit words `[K · b / 32, N]`, zero points along N into `[G, N · b / 32]`. Symmetric weights
//! have the zero point 2^(b − 1). Its first version, which every reader knows, stores zero points less one, so that
//! there is no place for a zero point of 0; asymmetric weights are therefore written in its second version, which
//! stores them as they are.

use std::borrow::Cow;

use marlin_format::{Element, Grouping, PackedMatrix, ScaleKind, Scheme, ZeroKind, bits};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::gptq::METHOD;
use super::{Content, Part};
use crate::CheckpointError;

/// What is written.
const KNOWN: &str = "int4, int4-sym and int8 in groups of columns or rows";
/// Bits of a word.
const WORD_BITS: usize = 32;
const WORD: usize = 4;

/// A stored tensor of a linear that is made from its buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transposed {
    /// Words of codes.
    Codes,
    Scales,
    /// Words of zero points.
    Zeros,
}

/// What is stored of a scheme, if the layout has a place for it.
pub(super) fn written_scheme(scheme: Scheme) -> Result<Scheme, CheckpointError> {
    let Scheme { element, grouping, .. } = scheme;
    let zero = match element {
        Element::Uint(4 | 8) => Some(ZeroKind::Integer),
        Element::Int(4 | 8) => Some(ZeroKind::None),
        _ => None,
    };
    let float = matches!(scheme.scale, ScaleKind::F32 | ScaleKind::F16 | ScaleKind::Bf16);
    let written = zero.map(|zero| Scheme { zero, ..Scheme::scaled(element, grouping, ScaleKind::F16) });
    match written {
        Some(written)
            if float
                && matches!(grouping, Grouping::Row | Grouping::Columns(_))
                && (Scheme { scale: scheme.scale, ..written }) == scheme =>
        {
            Ok(written)
        }
        _ => Err(CheckpointError::NoPlace { layout: METHOD, known: KNOWN, scheme: Box::new(scheme) }),
    }
}

/// The tensors that hold the packed matrix `name`, codes first.
pub(super) fn written_parts(name: &str, scheme: &Scheme, rows: usize, cols: usize) -> Result<Vec<Part>, String> {
    let module = name
        .strip_suffix(".weight")
        .ok_or_else(|| format!("tensor `{name}` is no `….weight`, which {METHOD} could pack"))?;
    if !matches!(written_scheme(*scheme), Ok(written) if written == *scheme) {
        return Err(format!("tensor `{name}`: {METHOD} has no place for {scheme}"));
    }
    // Proves every size below addressable.
    scheme.packed_bytes(rows, cols).map_err(|e| format!("tensor `{name}`: {e}"))?;
    let per_word = WORD_BITS / scheme.element.bits() as usize;
    let group = scheme.group_cols(cols);
    if !cols.is_multiple_of(group) {
        return Err(format!("tensor `{name}`: {cols} columns are no multiple of the group of {group}"));
    }
    if !rows.is_multiple_of(per_word) || !cols.is_multiple_of(per_word) {
        return Err(format!(
            "tensor `{name}`: of {rows} rows and {cols} columns {METHOD} cannot make words of {per_word} codes"
        ));
    }
    let groups = cols / group;
    // A group index has 32 bits.
    let index = (0..cols).map(|col| i32::try_from(col / group).map(i32::to_le_bytes)).collect::<Result<Vec<_>, _>>();
    let index = index.map_err(|_| format!("tensor `{name}`: {groups} groups are too many"))?.concat();
    let part = |suffix: &str, dtype, shape, content| Part { name: format!("{module}.{suffix}"), dtype, shape, content };
    let from = Content::Transposed;
    Ok(vec![
        part("qweight", Dtype::I32, vec![cols / per_word, rows], from(Transposed::Codes)),
        part("qzeros", Dtype::I32, vec![groups, rows / per_word], from(Transposed::Zeros)),
        part("scales", Dtype::F16, vec![groups, rows], from(Transposed::Scales)),
        part("g_idx", Dtype::I32, vec![cols], Content::Fixed(index)),
    ])
}

impl Transposed {
    /// The bytes to store for a matrix that [`written_parts`] has taken.
    pub(super) fn bytes<'m>(self, matrix: &PackedMatrix<'_>) -> Cow<'m, [u8]> {
        let (rows, bits) = (matrix.rows, matrix.scheme.element.bits());
        let groups = matrix.scheme.groups_per_row(matrix.cols);
        let bytes = match self {
            Self::Codes => transpose(&matrix.codes, rows, WORD),
            Self::Scales => transpose(&matrix.scales, rows, 2),
            Self::Zeros if matrix.scheme.zero == ZeroKind::None => {
                // 2^(b − 1) less one, in all places.
                let all = if bits == 4 { 0x77 } else { 0x7f };
                vec![all; groups * rows * bits as usize / 8]
            }
            Self::Zeros => {
                let mut zeros = vec![0; rows * groups];
                let row_bytes = matrix.zeros.len() / rows;
                for (zeros, packed) in zeros.chunks_exact_mut(groups).zip(matrix.zeros.chunks_exact(row_bytes)) {
                    bits::unpack(packed, bits, zeros);
                }
                let transposed = transpose(&zeros, rows, 1);
                let mut stored = vec![0; groups * rows * bits as usize / 8];
                bits::pack(&transposed, bits, &mut stored);
                stored
            }
        };
        Cow::Owned(bytes)
    }
}

/// The transposed matrix of elements of so many bytes.
fn transpose(bytes: &[u8], rows: usize, element: usize) -> Vec<u8> {
    let row = bytes.len() / rows;
    let columns = (0..row / element).map(|col| col * element);
    columns.flat_map(|at| (0..rows).flat_map(move |r| &bytes[r * row + at..][..element])).copied().collect()
}

/// The `quantization_config` of a folder with these packed and these plain matrices.
///
/// # Errors
/// The matrices are packed in several ways.
pub(super) fn written_config(packed: &[(&str, Scheme, [usize; 2])], plain: &[&str]) -> Result<Value, String> {
    let &[(first, scheme, _), ..] = packed else { return Err("nothing is packed".to_owned()) };
    if let Some((name, other, _)) = packed.iter().find(|(_, other, _)| *other != scheme) {
        return Err(format!(
            "{METHOD} packs all matrices alike, but `{first}` is to be {scheme} and `{name}` {other}; choose one format"
        ));
    }
    let symmetric = scheme.zero == ZeroKind::None;
    let mut config = json!({
        "quant_method": METHOD,
        "bits": scheme.element.bits(),
        "group_size": match scheme.grouping { Grouping::Columns(size) => i64::from(size), _ => -1 },
        "sym": symmetric,
        "desc_act": false,
        "checkpoint_format": if symmetric { "gptq" } else { "gptq_v2" },
        "lm_head": false,
    });
    // Linears of layers that stay as they are, such as routers.
    let rule = |module: &str| (format!("-:^{}$", module.replace('.', "\\.")), json!({}));
    let modules = plain.iter().filter(|name| name.starts_with("model.layers."));
    let kept: Map<String, Value> = modules.filter_map(|name| name.strip_suffix(".weight").map(rule)).collect();
    if !kept.is_empty() {
        config["dynamic"] = Value::Object(kept);
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_scales_and_zeros_are_transposed() {
        // Eight rows of 8 columns in groups of 4: row r has codes r, scales r and 16 + r, zero points r and 15 − r.
        let asymmetric = Scheme {
            zero: ZeroKind::Integer,
            ..Scheme::scaled(Element::Uint(4), Grouping::Columns(4), ScaleKind::F16)
        };
        let matrix = PackedMatrix {
            codes: (0..8u8).flat_map(|row| [row * 0x11; 4]).collect(),
            scales: (0..8u8).flat_map(|row| [row, 0, 16 + row, 0]).collect(),
            zeros: (0..8u8).map(|row| row | (15 - row) << 4).collect(),
            ..PackedMatrix::empty(asymmetric, 8, 8)
        };
        matrix.validate().unwrap();
        let words: Vec<u8> = (0..8u8).flat_map(|row| [row * 0x11; 4]).collect();
        assert_eq!(*Transposed::Codes.bytes(&matrix), words);
        let scales: Vec<u8> = (0..8).chain(16..24).flat_map(|scale| [scale, 0]).collect();
        assert_eq!(*Transposed::Scales.bytes(&matrix), scales);
        assert_eq!(*Transposed::Zeros.bytes(&matrix), [0x10, 0x32, 0x54, 0x76, 0xef, 0xcd, 0xab, 0x89]);
        let symmetric = PackedMatrix {
            scheme: Scheme::scaled(Element::Int(4), Grouping::Columns(4), ScaleKind::F16),
            zeros: (&[][..]).into(),
            ..matrix
        };
        assert_eq!(*Transposed::Zeros.bytes(&symmetric), [0x77; 8]);
    }
}
