//! Packed matrices on the device.
//!
//! Rows keep the canonical order of their codes, padded to whole units of 32 columns: lanes that step along a row side by side
//! read it at memory speed, and a tile of rows is as easily loaded.

use std::borrow::Cow;
use std::sync::Arc;

use marlin_format::{ColumnOrder, Element, FormatError, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind};

use super::device::{Gpu, Storage};
use super::pipeline::{Binding, Kernel, Pipeline};
use crate::{KernelError, LinearPart};

/// Columns that are unpacked together.
const UNIT: usize = 32;

/// Matrices that share their input.
#[derive(Debug)]
pub struct GpuLinear {
    pub(super) parts: Vec<Part>,
    pub(super) cols: usize,
    /// Rows of each matrix.
    pub(super) rows: Vec<usize>,
}

/// Consecutive rows of one matrix, no more than the device can bind.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) shape: Shape,
    /// Which matrix.
    pub(super) matrix: usize,
    /// The first row, counted over all matrices.
    pub(super) first: usize,
    /// Codes, scales, zeros or biases, 2:4 index, row affine: those that its format has.
    pub(super) buffers: Vec<Storage>,
    pub(super) kernels: PartKernels,
}

/// The kernels of a part's format.
#[derive(Debug)]
pub(super) struct PartKernels {
    /// By [`ROW_BLOCKS`].
    pub(super) few_rows: [Arc<Pipeline>; ROW_BLOCKS.len()],
    pub(super) many_rows: Arc<Pipeline>,
    pub(super) embed: Arc<Pipeline>,
}

/// Rows of the input that a workgroup of the kernel for few rows takes; more rows go to the kernel for many.
pub(super) const ROW_BLOCKS: [usize; 3] = [1, 4, 8];

/// What kernels are told of a part; the order of `Shape` in `weights.wgsl`.
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
pub(super) struct Shape {
    pub(super) k: u32,
    row_words: u32,
    group_cols: u32,
    groups: u32,
    group_rows: u32,
    pub(super) rows: u32,
}

/// How a part is stored on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DeviceFormat {
    element: Element,
    is_sparse: bool,
    /// Of groups; what a whole row shares is a factor of its result.
    scale: ScaleKind,
    zero: ZeroKind,
}

impl GpuLinear {
    pub(super) fn load(gpu: &Gpu, parts: &[LinearPart<'_>]) -> Result<Self, KernelError> {
        let cols = crate::backend::check_parts(parts)?;
        let mut linear = Self { parts: Vec::new(), cols, rows: Vec::new() };
        let mut first = 0;
        for (matrix, LinearPart { weight, bias }) in parts.iter().enumerate() {
            let weight = native(weight)?;
            let step = rows_of_binding(gpu, &weight);
            for start in (0..weight.rows).step_by(step) {
                let rows = start..weight.rows.min(start + step);
                let bias = bias.as_ref().map(|bias| &bias[rows.clone()]);
                let part = Part::load(gpu, &weight.slice_rows(rows)?, bias, matrix, first + start)?;
                linear.parts.push(part);
            }
            linear.rows.push(weight.rows);
            first += weight.rows;
        }
        Ok(linear)
    }

    /// All rows.
    pub(super) fn outputs(&self) -> usize {
        self.rows.iter().sum()
    }

    /// Bytes that [`GpuLinear::load`] takes of the device for a matrix without a bias.
    pub(super) fn bytes(scheme: &Scheme, rows: usize, cols: usize) -> Result<usize, KernelError> {
        scheme.packed_bytes(rows, cols)?;
        let scheme = if is_native(scheme) { *scheme } else { Scheme::F32 };
        let format = DeviceFormat::of(&scheme);
        let groups = if format.scale == ScaleKind::None { 0 } else { scheme.groups_per_row(cols) };
        let group_rows = rows.div_ceil(scheme.group_rows(rows));
        let each = |bits: usize| group_rows.checked_mul(groups)?.checked_mul(bits)?.div_ceil(32).checked_mul(4);
        let zero_bits = match format.zero {
            ZeroKind::None => 0,
            ZeroKind::Integer => 16,
            _ => 32,
        };
        let units = cols.div_ceil(UNIT);
        let bytes = || {
            let index_words = usize::from(format.is_sparse);
            let codes = rows.checked_mul(units)?.checked_mul((format.unit_words() + index_words) * 4)?;
            let groups = each(format.scale_bits())?.checked_add(each(zero_bits)?)?;
            codes.checked_add(groups)?.checked_add(rows.checked_mul(8)?)
        };
        Ok(bytes().ok_or(FormatError::TooLarge { rows, cols })?)
    }
}

/// Whether the device reads a scheme as it is.
fn is_native(scheme: &Scheme) -> bool {
    let whole_halves = |cols: u32| cols.is_multiple_of(UNIT as u32 / 2);
    let groups = match scheme.grouping {
        Grouping::Tensor | Grouping::Row => true,
        Grouping::Columns(cols) | Grouping::Block { cols, .. } => whole_halves(cols),
    };
    let is_sparse = scheme.sparsity == Sparsity::TwoOfFour;
    groups
        && scheme.order == ColumnOrder::Natural
        && !matches!(scheme.scale, ScaleKind::TwoLevel { .. })
        // The sixteen codes of a unit must be whole words.
        && (!is_sparse || scheme.element.bits().is_multiple_of(2))
}

/// The matrix itself, or in single precision if the device does not read its scheme.
fn native<'a>(matrix: &'a PackedMatrix<'a>) -> Result<PackedMatrix<'a>, KernelError> {
    if is_native(&matrix.scheme) {
        return Ok(matrix.borrowed());
    }
    let values: Vec<u8> = matrix.decode().iter().flat_map(|value| value.to_le_bytes()).collect();
    Ok(PackedMatrix::from_dense_bytes(Scheme::F32, matrix.rows, matrix.cols, values)?)
}

/// How many rows fit into one binding, in whole tiles.
fn rows_of_binding(gpu: &Gpu, matrix: &PackedMatrix<'_>) -> usize {
    let format = DeviceFormat::of(&matrix.scheme);
    let groups = matrix.scheme.groups_per_row(matrix.cols);
    let largest = if format.zero == ZeroKind::None { format.scale_bits() } else { 32 };
    let row_bytes = (matrix.cols.div_ceil(UNIT) * format.unit_words() * 4).max(groups * largest.div_ceil(8)).max(8);
    let rows = usize::try_from(gpu.caps.max_binding).unwrap_or(usize::MAX) / row_bytes;
    let tile = match matrix.scheme.grouping {
        Grouping::Block { rows, .. } => rows as usize,
        _ => 1,
    };
    (rows / tile * tile).max(tile)
}

impl DeviceFormat {
    fn of(scheme: &Scheme) -> Self {
        // Without zero points a scale of a whole row can wait until the row is summed up.
        let is_of_rows = matches!(scheme.grouping, Grouping::Tensor | Grouping::Row) && scheme.zero == ZeroKind::None;
        Self {
            element: scheme.element,
            is_sparse: scheme.sparsity == Sparsity::TwoOfFour,
            scale: if is_of_rows { ScaleKind::None } else { scheme.scale },
            zero: scheme.zero,
        }
    }

    /// Words of codes of a unit.
    fn unit_words(self) -> usize {
        let stored = if self.is_sparse { UNIT / 2 } else { UNIT };
        stored * self.element.bits() as usize / 32
    }

    fn scale_bits(self) -> usize {
        match self.scale {
            ScaleKind::None => 0,
            ScaleKind::F32 | ScaleKind::TwoLevel { .. } => 32,
            ScaleKind::F16 | ScaleKind::Bf16 => 16,
            ScaleKind::E8M0 | ScaleKind::E4M3Global => 8,
        }
    }

    fn bindings(self) -> Vec<Binding> {
        let mut bindings = vec![Binding::read("codes", "u32")];
        if self.scale != ScaleKind::None {
            bindings.push(Binding::read("scales", "u32"));
        }
        match self.zero {
            ZeroKind::None => {}
            ZeroKind::Integer => bindings.push(Binding::read("zeros", "u32")),
            _ => bindings.push(Binding::read("biases", "f32")),
        }
        if self.is_sparse {
            bindings.push(Binding::read("sparse_index", "u32"));
        }
        bindings.push(Binding::read("row_affine", "vec2<f32>"));
        bindings
    }

    /// The module that stands before a kernel: constants, and what a code, a scale and a zero point mean.
    fn module(self) -> String {
        let bits = self.element.bits();
        let decode = match self.element {
            Element::F32 => "f32_value",
            Element::F16 => "f16_value",
            Element::Bf16 => "bf16_value",
            Element::E2M1 => "e2m1_value",
            Element::E4M3 => "e4m3_value",
            Element::Uint(_) => "uint_value",
            Element::Int(_) => "int_value",
            Element::Iq4Nl => "iq4_nl_value",
        };
        let scale = match self.scale {
            ScaleKind::None => "1.0".into(),
            ScaleKind::F32 | ScaleKind::TwoLevel { .. } => "f32_value(scales[index])".into(),
            ScaleKind::F16 => of_halves("f16_value"),
            ScaleKind::Bf16 => of_halves("bf16_value"),
            ScaleKind::E8M0 => of_bytes("e8m0_value"),
            ScaleKind::E4M3Global => of_bytes("e4m3_value"),
        };
        let (zero, bias) = match self.zero {
            ZeroKind::None => ("0.0", "0.0"),
            ZeroKind::Integer => ("f32(zeros[index / 2u] >> (16u * (index % 2u)) & 0xffffu) - 256.0", "0.0"),
            _ => ("0.0", "biases[index]"),
        };
        let pairs = if self.is_sparse { "sparse_index[unit]" } else { "0u" };
        let mask = if bits == 32 { u32::MAX } else { (1 << bits) - 1 };
        format!(
            "const BITS = {bits}u;\nconst MASK = {mask}u;\nconst WORDS = {}u;\nconst SPARSE = {};\nconst SCALED = {};\n\
             fn decode(code: u32) -> f32 {{ return {decode}(code); }}\n\
             fn stored_scale(index: u32) -> f32 {{ return {scale}; }}\n\
             fn stored_zero(index: u32) -> f32 {{ return {zero}; }}\n\
             fn stored_bias(index: u32) -> f32 {{ return {bias}; }}\n\
             fn sparse_pairs(unit: u32) -> u32 {{ return {pairs}; }}\n",
            self.unit_words(),
            self.is_sparse,
            self.scale != ScaleKind::None,
        )
    }

    fn kernels(self, gpu: &Gpu) -> Result<PartKernels, KernelError> {
        let (elements, weights) = (include_str!("shaders/elements.wgsl"), include_str!("shaders/weights.wgsl"));
        let linear = |name, file, constants: String| {
            let mut bindings = self.bindings();
            bindings.extend([Binding::read("x", "f32"), Binding::write("out", "f32")]);
            let files = vec![elements, weights, include_str!("shaders/epilogue.wgsl"), file];
            gpu.pipeline(&Kernel { name, prelude: self.module() + &constants, bindings, files })
        };
        let few_rows = |rows: usize| {
            let constants = format!("const MB = {rows}u;\nconst ROWS = 4u;\n");
            linear("linear_rows", include_str!("shaders/linear_rows.wgsl"), constants)
        };
        let [one, four, eight] = ROW_BLOCKS;
        let mut bindings = self.bindings();
        bindings.extend([Binding::read("tokens", "u32"), Binding::write("out", "f32")]);
        let files = vec![elements, weights, include_str!("shaders/embed.wgsl")];
        let embed = Kernel { name: "embed", prelude: self.module(), bindings, files };
        Ok(PartKernels {
            few_rows: [few_rows(one)?, few_rows(four)?, few_rows(eight)?],
            many_rows: linear("linear_tile", include_str!("shaders/linear_tile.wgsl"), String::new())?,
            embed: gpu.pipeline(&embed)?,
        })
    }
}

/// The expression for a 16-bit scale.
fn of_halves(value: &str) -> String {
    format!("{value}(scales[index / 2u] >> (16u * (index % 2u)) & 0xffffu)")
}

/// The expression for an 8-bit scale.
fn of_bytes(value: &str) -> String {
    format!("{value}(scales[index / 4u] >> (8u * (index % 4u)) & 0xffu)")
}

impl Part {
    fn load(
        gpu: &Gpu,
        matrix: &PackedMatrix<'_>,
        bias: Option<&[f32]>,
        of: usize,
        first: usize,
    ) -> Result<Self, KernelError> {
        let format = DeviceFormat::of(&matrix.scheme);
        let units = matrix.cols.div_ceil(UNIT);
        let groups = matrix.scheme.groups_per_row(matrix.cols);
        let shape = Shape {
            k: matrix.cols as u32,
            row_words: (units * format.unit_words()) as u32,
            group_cols: matrix.scheme.group_cols(matrix.cols) as u32,
            groups: groups as u32,
            group_rows: matrix.scheme.group_rows(matrix.rows) as u32,
            rows: matrix.rows as u32,
        };
        let mut buffers =
            vec![upload_rows(gpu, "weights", matrix.rows, units * format.unit_words() * 4, &matrix.codes)?];
        if format.scale != ScaleKind::None {
            buffers.push(gpu.storage_of("scales", &padded(&matrix.scales))?);
        }
        let (rows, group_rows) = (matrix.rows, matrix.scheme.group_rows(matrix.rows));
        let each_group = || (0..rows).step_by(group_rows).flat_map(|row| (0..groups).map(move |group| (row, group)));
        match format.zero {
            ZeroKind::None => {}
            ZeroKind::Integer => {
                // Zero points are values of at most 8 bits, signed or not; 256 more makes them positive.
                let zeros =
                    each_group().flat_map(|(row, group)| ((matrix.zero_at(row, group) + 256) as u16).to_le_bytes());
                buffers.push(gpu.storage_of("zero points", &padded(&zeros.collect::<Vec<u8>>()))?);
            }
            _ => {
                let biases: Vec<f32> = each_group().map(|(row, group)| matrix.bias_at(row, group)).collect();
                buffers.push(gpu.storage_of("biases", &biases)?);
            }
        }
        if format.is_sparse {
            buffers.push(upload_rows(gpu, "2:4 index", rows, units * 4, &matrix.sparse_index)?);
        }
        let global = matrix.globals.first_chunk().map_or(1.0, |bytes| f32::from_le_bytes(*bytes));
        let affine: Vec<[f32; 2]> = (0..rows)
            .map(|row| {
                let factor = match (format.scale, matrix.scheme.scale) {
                    (ScaleKind::None, ScaleKind::None) => 1.0,
                    (ScaleKind::None, _) => matrix.scale_at(row, 0),
                    (ScaleKind::E4M3Global, _) => global,
                    _ => 1.0,
                };
                [factor, bias.map_or(0.0, |bias| bias[row])]
            })
            .collect();
        buffers.push(gpu.storage_of("row factors", &affine)?);
        Ok(Self { shape, matrix: of, first, buffers, kernels: format.kernels(gpu)? })
    }
}

/// Bytes in whole words.
fn padded(bytes: &[u8]) -> Cow<'_, [u8]> {
    if bytes.len().is_multiple_of(4) {
        return Cow::Borrowed(bytes);
    }
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(4), 0);
    Cow::Owned(padded)
}

/// Bytes that go to the device in one piece of staging memory.
const STAGING: usize = 16 << 20;

/// Uploads rows of equal length, each padded with zeros to `stride` bytes.
fn upload_rows(gpu: &Gpu, what: &str, rows: usize, stride: usize, bytes: &[u8]) -> Result<Storage, KernelError> {
    let storage = gpu.storage(what, rows * stride)?;
    let row = bytes.len() / rows;
    let step = (STAGING / stride).max(1);
    let mut staging = Vec::new();
    for start in (0..rows).step_by(step) {
        let count = step.min(rows - start);
        let piece = &bytes[start * row..(start + count) * row];
        let offset = (start * stride) as u64;
        if row == stride {
            gpu.write(&storage, offset, piece);
        } else {
            staging.clear();
            staging.resize(count * stride, 0u8);
            staging
                .chunks_exact_mut(stride)
                .zip(piece.chunks_exact(row))
                .for_each(|(to, from)| to[..row].copy_from_slice(from));
            gpu.write(&storage, offset, &staging);
        }
        // Staging memory is given back when its copy has run.
        gpu.queue.submit([]);
        if start + count < rows {
            gpu.wait()?;
        }
    }
    Ok(storage)
}
