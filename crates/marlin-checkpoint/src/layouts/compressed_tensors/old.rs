//! What older releases of the package write, and it still reads: words that leave bits over, columns in another order,
//! 2:4 sparsity.

use marlin_format::{ColumnOrder, Element, Grouping, ScaleKind, Scheme, Sparsity, ZeroKind};
use safetensors::Dtype;

use super::config::{Config, Format, Weights};
use super::{METHOD, parts, scheme, sizes};
use crate::CheckpointError;
use crate::layouts::reorder::Reorder;
use crate::layouts::sparse::Marlin24;
use crate::layouts::{Buffer, Content, Form, PackedEntry, Part, Stored, dense_scheme};

/// Older releases (0.10 among them) put as many whole codes into a word as it has room for. Where the stored codes have
/// the shape that this gives, and not the one of dense packing, codes and zero points are read so.
pub(super) fn pad(parts: &mut [Part], scheme: &Scheme, [rows, cols]: [usize; 2], stored: &Stored<'_>) {
    let bits = scheme.element.bits();
    let words = |count: usize| count.div_ceil(32 / bits as usize);
    let padded = [rows, words(cols)];
    if parts[0].shape == padded || stored.tensors.get(&parts[0].name).is_none_or(|codes| codes.shape != padded) {
        return;
    }
    for part in parts {
        match part.content {
            Content::Buffer(Buffer::Codes, _) => {
                let form = Form::Reordered(Reorder::PaddedWords { cols, bits });
                (part.shape, part.content) = (padded.to_vec(), Content::Buffer(Buffer::Codes, form));
            }
            Content::Buffer(Buffer::Zeros, _) => {
                let groups = scheme.groups_per_row(cols);
                let form = Form::Reordered(Reorder::PaddedDownRows { rows, groups, bits });
                (part.shape, part.content) = (vec![words(rows), groups], Content::Buffer(Buffer::Zeros, form));
            }
            _ => {}
        }
    }
}

/// The index of a linear whose columns are in another order, if it has one. An index with a −1 in it was never set.
pub(super) fn group_index(
    module: &str,
    scheme: &mut Scheme,
    cols: usize,
    stored: &mut Stored<'_>,
) -> Result<Option<Part>, CheckpointError> {
    let name = format!("{module}.weight_g_idx");
    let is_unset = |location| stored.bytes(location).as_chunks().0.contains(&(-1i32).to_le_bytes());
    if stored.tensors.get(&name).is_some_and(|index| index.dtype == Dtype::I32 && is_unset(index)) {
        stored.tensors.remove(&name);
    }
    scheme.order = stored.column_order(&name, cols, scheme)?;
    let content = Content::Buffer(Buffer::GroupIndex, Form::Same);
    let part = Part { name, dtype: Dtype::I32, shape: vec![cols], content };
    Ok((scheme.order == ColumnOrder::GroupIndex).then_some(part))
}

/// A linear in `sparse-24-bitmask`: plain floats, or FP8 or INT8 with scales, of which two of four are stored.
pub(super) fn bitmask(config: &Config, module: &str, stored: &mut Stored<'_>) -> Result<PackedEntry, CheckpointError> {
    let name = format!("{module}.weight");
    let (codes, location) = stored.require(module, "compressed")?;
    let dtype = location.dtype;
    let [rows, cols] = sizes(module, "shape", stored)?;
    let is_scaled = stored.tensors.contains_key(&format!("{module}.weight_scale"));
    let (dense, mut parts) = if is_scaled {
        let group = config.group(module).map_err(|problem| stored.malformed(problem))?;
        if group.format != Format::Bytes || group.weights.asymmetric {
            let layout =
                format!("{METHOD}, sparse-24-bitmask of other weights than FP8 and symmetric INT8 (`{module}`)");
            return Err(CheckpointError::ForeignLayout { file: stored.file.to_owned(), layout });
        }
        let scheme = scheme(module, group.format, &group.weights, stored)?;
        let parts = parts(module, group.format, &scheme, rows, cols)
            .map_err(|problem| stored.malformed(format!("tensor `{name}`: {problem}")))?;
        (scheme, parts)
    } else {
        let scheme = dense_scheme(dtype).ok_or_else(|| stored.wrong_part(&codes, location, "BF16, F16 or F32"))?;
        let content = Content::Buffer(Buffer::Codes, Form::Same);
        (scheme, vec![Part { name: codes.clone(), dtype, shape: Vec::new(), content }])
    };
    let scheme = Scheme { sparsity: Sparsity::TwoOfFour, ..dense };
    // Proves the shape valid and every size below addressable.
    scheme.packed_bytes(rows, cols).map_err(|source| stored.format_error(&name, source))?;
    (parts[0].name, parts[0].shape) = (codes, vec![rows, cols / 2]);
    let part = |suffix: &str, dtype, shape, content| Part { name: format!("{module}.{suffix}"), dtype, shape, content };
    let index = Content::Buffer(Buffer::SparseIndex, Form::Reordered(Reorder::Bitmask { cols }));
    parts.push(part("bitmask", Dtype::U8, vec![rows, cols.div_ceil(8)], index));
    parts.push(part("shape", Dtype::I64, vec![2], Content::Fixed(Vec::new())));
    stored.take(&name, scheme, [rows, cols], parts)
}

/// A linear in `marlin-24`: symmetric integers of which two of four are stored, in the order of a kernel for GPUs.
pub(super) fn marlin24(
    weights: &Weights,
    module: &str,
    stored: &mut Stored<'_>,
) -> Result<PackedEntry, CheckpointError> {
    let name = format!("{module}.weight");
    let (packed, location) = stored.require(module, "weight_packed")?;
    let (Element::Int(bits), &[tiles, words]) = (weights.element, location.shape.as_slice()) else {
        return Err(stored.wrong_part(&packed, location, "a matrix of I32"));
    };
    // A word of a row of tiles of 16 × 16 holds so many of its codes.
    let in_word = 32 / usize::from(bits);
    let shape = tiles.checked_mul(32).zip(words.checked_mul(in_word)).map(|(cols, codes)| [codes / 16, cols]);
    let [rows, cols] = shape
        .filter(|[rows, _]| rows % 64 == 0)
        .ok_or_else(|| stored.wrong_part(&packed, location, "I32 [K / 32, N · bits / 2] with N a multiple of 64"))?;
    let scheme = Scheme {
        element: weights.element,
        grouping: weights.grouping,
        scale: ScaleKind::F16,
        zero: ZeroKind::None,
        order: ColumnOrder::Natural,
        sparsity: Sparsity::TwoOfFour,
    };
    // Proves the shape valid and every size below addressable.
    scheme.packed_bytes(rows, cols).map_err(|source| stored.format_error(&name, source))?;

    let layout = Marlin24 { rows, cols, bits: bits.into() };
    let groups = scheme.groups_per_row(cols);
    // Scales are permuted where a group has fewer columns than are stored of a row.
    let is_permuted = matches!(weights.grouping, Grouping::Columns(group) if (group as usize) < cols / 2);
    let scales = if is_permuted {
        Reorder::Marlin24Scales { columns: rows, row_bytes: groups * 2 }
    } else {
        Reorder::Transposed { columns: rows, size: 2, row_bytes: groups * 2 }
    };
    let part = |suffix: &str, dtype, shape, buffer, order| Part {
        name: format!("{module}.{suffix}"),
        dtype,
        shape,
        content: Content::Buffer(buffer, Form::Reordered(order)),
    };
    let parts = vec![
        part("weight_packed", Dtype::I32, vec![tiles, words], Buffer::Codes, Reorder::Marlin24Codes(layout)),
        part("scale_packed", Dtype::F16, vec![groups, rows], Buffer::Scales, scales),
        part("meta", Dtype::I16, vec![tiles, rows * 2], Buffer::SparseIndex, Reorder::Marlin24Index(layout)),
    ];
    stored.take(&name, scheme, [rows, cols], parts)
}
