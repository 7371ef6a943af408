//! Weights in tile order: made once, at load, and streamed by the kernels.

use marlin_format::{ColumnOrder, Element, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind, bits};

use super::bytes::TileBytes;
use super::codes::{CHUNK, E2M1, E4M3, Int8};
use super::kernel::{Group, PanelKernel};
use crate::KernelError;
use crate::cpu::simd::Simd;
use crate::cpu::threads::Threads;
use crate::host::allocate;

/// A matrix `[N, K]` in tile order: panels of as many rows as the kernel's vectors have lanes, each a run of chunks of 32 columns. N and
/// K are padded with zeros. Under 2:4 sparsity chunks hold 16 codes a row, and where they stand.
#[derive(Debug)]
pub(super) struct Tiles {
    /// Output features, N.
    pub(super) rows: usize,
    /// Rows of a panel.
    lanes: usize,
    /// Chunks of a panel.
    pub(super) chunks: usize,
    /// Groups of a panel.
    pub(super) groups: usize,
    /// Columns of a group.
    pub(super) span: GroupSpan,
    /// What the kernel's sums are multiplied by in the end.
    pub(super) factor: f32,
    /// `[panels, chunks, bytes of a chunk]`.
    codes: TileBytes,
    scale_type: ScaleType,
    /// `[panels, groups, lanes]`, in the storage of the checkpoint.
    scales: TileBytes,
    /// What is subtracted from unpacked bytes, of a group without a zero point.
    offset: i32,
    /// The same for groups with one, `[panels, groups, lanes]`, i8; empty without.
    offsets: TileBytes,
}

/// How groups of columns lie over chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GroupSpan {
    /// So many chunks a group; the last may have fewer.
    Chunks(usize),
    /// Two groups a chunk.
    HalfChunk,
}

impl GroupSpan {
    /// Groups of so many chunks.
    fn groups(self, chunks: usize) -> usize {
        match self {
            Self::Chunks(span) => chunks.div_ceil(span),
            Self::HalfChunk => 2 * chunks,
        }
    }
}

/// Storage of a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ScaleType {
    One,
    F32,
    F16,
    Bf16,
    E8M0,
    E4M3,
}

impl ScaleType {
    fn bytes(self) -> usize {
        match self {
            Self::One => 0,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E8M0 | Self::E4M3 => 1,
        }
    }
}

/// Whether kernels read a matrix as it is. If not, [`to_dense`] gives one that they do.
pub(super) fn is_native(matrix: &PackedMatrix<'_>) -> bool {
    is_native_scheme(&matrix.scheme, matrix.cols)
        && !(matrix.scheme.element == Element::E4M3 && has_e4m3_nan(&matrix.codes))
}

/// [`is_native`], as far as it can be told without the codes.
pub(super) fn is_native_scheme(scheme: &Scheme, cols: usize) -> bool {
    scheme.order == ColumnOrder::Natural
        && matches!(scheme.zero, ZeroKind::None | ZeroKind::Integer)
        && scale_type(scheme.scale).is_some()
        && group_span(scheme.group_cols(cols), cols).is_some()
}

/// What [`Tiles::bytes`] will be for a native scheme; `None` if that cannot be addressed.
pub(super) fn tile_bytes(scheme: &Scheme, rows: usize, cols: usize, kernel: &dyn PanelKernel) -> Option<usize> {
    let sections = section_bytes(scheme, rows, cols, kernel)?;
    sections.into_iter().try_fold(0usize, usize::checked_add)
}

/// Bytes of codes, scales and offsets for a native scheme; `None` if they cannot be addressed.
fn section_bytes(scheme: &Scheme, rows: usize, cols: usize, kernel: &dyn PanelKernel) -> Option<[usize; 3]> {
    let span = group_span(scheme.group_cols(cols), cols)?;
    let (panels, chunks) = (rows.div_ceil(kernel.lanes()), cols.div_ceil(CHUNK));
    let groups = span.groups(chunks).checked_mul(kernel.lanes())?.checked_mul(panels)?;
    let codes = chunks.checked_mul(kernel.chunk_bytes())?.checked_mul(panels)?;
    let offset_bytes = if scheme.zero == ZeroKind::Integer { size_of::<i8>() } else { 0 };
    Some([codes, groups.checked_mul(scale_type(scheme.scale)?.bytes())?, groups.checked_mul(offset_bytes)?])
}

/// The kernels know no NaN of E4M3.
fn has_e4m3_nan(codes: &[u8]) -> bool {
    // Without leaving a run early, so that the search is vectorised.
    codes.chunks(4096).any(|run| run.iter().fold(false, |found, code| found | (code & 0x7f == 0x7f)))
}

/// The same weights in single precision.
pub(super) fn to_dense(matrix: &PackedMatrix<'_>, threads: &Threads) -> Result<PackedMatrix<'static>, KernelError> {
    let row_bytes = matrix.cols * size_of::<f32>();
    let mut codes: Vec<u8> = allocate("weights converted to f32", &[matrix.rows, row_bytes], "cpu")?;
    threads.for_each_chunk(&mut codes, row_bytes, |row, bytes| {
        let mut weights = vec![0.0; matrix.cols];
        matrix.decode_row(row, &mut weights);
        for (bytes, weight) in bytes.as_chunks_mut().0.iter_mut().zip(weights) {
            *bytes = weight.to_le_bytes();
        }
    });
    Ok(PackedMatrix::from_dense_bytes(Scheme::F32, matrix.rows, matrix.cols, codes)?)
}

fn scale_type(kind: ScaleKind) -> Option<ScaleType> {
    match kind {
        ScaleKind::None => Some(ScaleType::One),
        ScaleKind::F32 => Some(ScaleType::F32),
        ScaleKind::F16 => Some(ScaleType::F16),
        ScaleKind::Bf16 => Some(ScaleType::Bf16),
        ScaleKind::E8M0 => Some(ScaleType::E8M0),
        ScaleKind::E4M3Global => Some(ScaleType::E4M3),
        ScaleKind::TwoLevel { .. } => None,
    }
}

fn group_span(group_cols: usize, cols: usize) -> Option<GroupSpan> {
    if group_cols >= cols {
        Some(GroupSpan::Chunks(cols.div_ceil(CHUNK)))
    } else if group_cols.is_multiple_of(CHUNK) {
        Some(GroupSpan::Chunks(group_cols / CHUNK))
    } else if group_cols.is_multiple_of(CHUNK / 2) {
        Some(GroupSpan::HalfChunk)
    } else {
        None
    }
}

/// What is subtracted from unpacked bytes of a group with this zero point.
fn offset(element: Element, zero: i32) -> i32 {
    let stored = |bits| if bits > 4 { Int8::OFFSET } else { 0 };
    match element {
        Element::E2M1 => E2M1::OFFSET,
        Element::Uint(bits) => stored(bits) + zero,
        Element::Int(bits) => stored(bits) + (1 << (bits - 1)) + zero,
        Element::Iq4Nl | Element::E4M3 | Element::F16 | Element::Bf16 | Element::F32 => 0,
    }
}

impl Tiles {
    /// Repacks a matrix that [`is_native`] for `kernel`.
    pub(super) fn pack(
        matrix: &PackedMatrix<'_>,
        kernel: &dyn PanelKernel,
        threads: &Threads,
    ) -> Result<Self, KernelError> {
        let (scheme, lanes) = (&matrix.scheme, kernel.lanes());
        let (panels, chunks) = (matrix.rows.div_ceil(lanes), matrix.cols.div_ceil(CHUNK));
        let panel_bytes = chunks * kernel.chunk_bytes();
        let mut codes = TileBytes::zeroed("weights", panels, panel_bytes)?;
        threads.for_each_chunk(codes.bytes_mut(), panel_bytes, |panel, tiles| {
            kernel.pack(&PanelCodes::of(matrix, panel, lanes, chunks * CHUNK, kernel.code_bytes()), tiles);
        });

        let not_native = || KernelError::Device(format!("the CPU has no kernel for {scheme}"));
        let scale_bytes = scale_type(scheme.scale).ok_or_else(not_native)?.bytes();
        let span = group_span(scheme.group_cols(matrix.cols), matrix.cols).ok_or_else(not_native)?;
        let groups = Groups { matrix, span, lanes, count: span.groups(chunks) };
        let panel_scales = groups.count * lanes * scale_bytes;
        let mut scales = TileBytes::zeroed("scales", panels, panel_scales)?;
        if panel_scales > 0 {
            threads.for_each_chunk(scales.bytes_mut(), panel_scales, |panel, scales| {
                groups.copy_scales(panel, scale_bytes, scales);
            });
        }
        let panel_offsets = if scheme.zero == ZeroKind::Integer { groups.count * lanes } else { 0 };
        let mut offsets = TileBytes::zeroed("zero points", panels, panel_offsets)?;
        if panel_offsets > 0 {
            threads.for_each_chunk(offsets.bytes_mut(), panel_offsets, |panel, offsets| {
                groups.fill_offsets(panel, offsets);
            });
        }
        let element_factor = match scheme.element {
            Element::E2M1 => E2M1::FACTOR,
            Element::E4M3 => E4M3::FACTOR,
            _ => 1.0,
        };
        let scale_factor = if scale_type(scheme.scale) == Some(ScaleType::E4M3) { E4M3::FACTOR } else { 1.0 };
        let global = match scheme.scale {
            ScaleKind::E4M3Global => f32::from_le_bytes(*matrix.globals.first_chunk().expect("a global scale")),
            _ => 1.0,
        };
        let sections = [codes, scales, offsets];
        Self::from_sections(scheme, matrix.rows, matrix.cols, kernel, element_factor * scale_factor * global, sections)
            .ok_or_else(not_native)
    }

    /// Tiles whose bytes are there: codes, scales and offsets of a matrix in a native scheme. `None` if they are not as long as they must
    /// be.
    pub(super) fn from_sections(
        scheme: &Scheme,
        rows: usize,
        cols: usize,
        kernel: &dyn PanelKernel,
        factor: f32,
        sections: [TileBytes; 3],
    ) -> Option<Self> {
        if sections.each_ref().map(|section| section.bytes().len()) != section_bytes(scheme, rows, cols, kernel)? {
            return None;
        }
        let [codes, scales, offsets] = sections;
        let offset = offset(scheme.element, 0);
        let (scale_type, span) = (scale_type(scheme.scale)?, group_span(scheme.group_cols(cols), cols)?);
        let chunks = cols.div_ceil(CHUNK);
        let groups = span.groups(chunks);
        let lanes = kernel.lanes();
        Some(Self { rows, lanes, chunks, groups, span, factor, codes, scale_type, scales, offset, offsets })
    }

    /// The bytes of codes, scales and offsets.
    pub(super) fn sections(&self) -> [&TileBytes; 3] {
        [&self.codes, &self.scales, &self.offsets]
    }

    /// How many panels there are.
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(self.lanes)
    }

    /// Memory held.
    pub(super) fn bytes(&self) -> usize {
        self.sections().map(|section| section.bytes().len()).iter().sum()
    }

    /// The chunks of a panel.
    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        let codes = self.codes.bytes();
        let bytes = codes.len() / self.panels();
        &codes[panel * bytes..][..bytes]
    }

    /// Scales and offsets of group `g` of a panel.
    #[inline(always)]
    pub(super) fn group<S: Simd>(&self, simd: S, panel: usize, g: usize) -> Group<S> {
        let index = (panel * self.groups + g) * S::LANES;
        let scales = &self.scales.bytes()[self.scale_type.bytes() * index..];
        let scale = match self.scale_type {
            ScaleType::One => simd.splat(1.0),
            ScaleType::F32 => simd.load_le_f32(scales),
            ScaleType::F16 => simd.load_le_f16(scales),
            ScaleType::Bf16 => simd.load_le_bf16(scales),
            ScaleType::E8M0 => simd.load_e8m0(scales),
            ScaleType::E4M3 => simd.load_e4m3_over_256(scales),
        };
        let offset = match self.offsets.bytes() {
            [] => simd.splat_i32(self.offset),
            offsets => simd.widen_i8(bytemuck::cast_slice(&offsets[index..])),
        };
        Group { scale, offset, offset_pairs: simd.repeat_half(offset), offset_f32: simd.to_f32(offset) }
    }
}

/// The codes of a panel's rows, padded with zeros to whole chunks.
pub(super) struct PanelCodes {
    /// `[lanes, stored codes]`, one in as many bytes as the kernel wants.
    pub(super) codes: Vec<u8>,
    /// Under 2:4 the position of each code among its four columns, one a byte; empty for dense matrices.
    pub(super) positions: Vec<u8>,
}

impl PanelCodes {
    fn of(matrix: &PackedMatrix<'_>, panel: usize, lanes: usize, padded_cols: usize, code_bytes: usize) -> Self {
        let (stored, padded) = (matrix.scheme.stored_cols(matrix.cols), matrix.scheme.stored_cols(padded_cols));
        let is_sparse = matrix.scheme.sparsity == Sparsity::TwoOfFour;
        let mut codes = vec![0; lanes * padded * code_bytes];
        let mut positions = vec![0; if is_sparse { lanes * padded } else { 0 }];
        let rows = panel * lanes..matrix.rows.min((panel + 1) * lanes);
        for (lane, row) in rows.enumerate() {
            let codes = &mut codes[lane * padded * code_bytes..][..stored * code_bytes];
            if matrix.scheme.element.is_dense() {
                codes.copy_from_slice(matrix.code_row(row));
            } else {
                matrix.unpack_codes_row(row, codes);
            }
            if is_sparse {
                // Two bits each, the lower column of four first: as the metadata is packed.
                let row_bytes = matrix.sparse_index.len() / matrix.rows;
                bits::unpack(&matrix.sparse_index[row * row_bytes..], 2, &mut positions[lane * padded..][..stored]);
            }
        }
        Self { codes, positions }
    }
}

/// Maps groups of tiles to groups of the matrix.
struct Groups<'a> {
    matrix: &'a PackedMatrix<'a>,
    span: GroupSpan,
    lanes: usize,
    count: usize,
}

impl Groups<'_> {
    /// The row and the group of the matrix behind each group and lane of a panel; none for padding.
    fn sources(&self, panel: usize) -> impl Iterator<Item = Option<(usize, usize)>> {
        let tile_cols = match self.span {
            GroupSpan::Chunks(span) => span * CHUNK,
            GroupSpan::HalfChunk => CHUNK / 2,
        };
        (0..self.count * self.lanes).map(move |i| {
            let (row, col) = (panel * self.lanes + i % self.lanes, i / self.lanes * tile_cols);
            (row < self.matrix.rows && col < self.matrix.cols).then(|| (row, self.matrix.group_of(col)))
        })
    }

    fn copy_scales(&self, panel: usize, bytes: usize, scales: &mut [u8]) {
        let scheme = &self.matrix.scheme;
        let (groups, group_rows) = (scheme.groups_per_row(self.matrix.cols), scheme.group_rows(self.matrix.rows));
        for (scale, source) in scales.chunks_exact_mut(bytes).zip(self.sources(panel)) {
            if let Some((row, group)) = source {
                let index = row / group_rows * groups + group;
                scale.copy_from_slice(&self.matrix.scales[index * bytes..][..bytes]);
            }
        }
    }

    fn fill_offsets(&self, panel: usize, offsets: &mut [u8]) {
        for (to, source) in offsets.iter_mut().zip(self.sources(panel)) {
            if let Some((row, group)) = source {
                // Fits: an offset is a code, less 128 where codes have more than four bits.
                *to = offset(self.matrix.scheme.element, self.matrix.zero_at(row, group)) as i8 as u8;
            }
        }
    }
}
