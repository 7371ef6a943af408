//! Weights in tile order: made once, at load, and streamed by the kernels.

use std::borrow::Cow;

use half::f16;
use marlin_format::{ColumnOrder, Element, FormatError, PackedMatrix, ScaleKind, Scheme, Sparsity, bits};

use super::bytes::TileBytes;
use super::codes::{CHUNK, E2M1, E4M3};
use super::groups::{GroupFormat, GroupSpan, Groups, ScaleType, ZeroType, offset};
use super::kernel::PanelKernel;
use crate::KernelError;
use crate::cpu::simd::Simd;
use crate::cpu::threads::Threads;
use crate::host::allocate;

/// A matrix `[N, K]` in tile order: panels of as many rows as the kernel's vectors have lanes, each a run of chunks of 32 columns. N and
/// K are padded with zeros. Under 2:4 sparsity chunks hold 16 codes a row, and where they stand.
#[derive(Debug)]
pub(super) struct Tiles {
    /// How the matrix was stored.
    pub(super) scheme: Scheme,
    /// Output features, N.
    pub(super) rows: usize,
    /// Input features, K.
    pub(super) cols: usize,
    /// Rows of a panel.
    pub(super) lanes: usize,
    /// Chunks of a panel.
    pub(super) chunks: usize,
    /// Groups of a panel.
    pub(super) groups: usize,
    /// How groups are stored.
    pub(super) format: GroupFormat,
    /// What the kernel's sums are multiplied by in the end.
    pub(super) factor: f32,
    /// `[panels, chunks, bytes of a chunk]`.
    codes: TileBytes,
    /// `[panels, groups, lanes]`; inner scales of two groups a chunk are `[panels, chunks, lanes, 2]`.
    scales: TileBytes,
    /// What is subtracted from unpacked bytes, of groups without a zero point.
    offset: i32,
    /// Zero points, biases or inner minima, in the order of scales; empty without.
    zeros: TileBytes,
    /// What super-groups share, f16 `[panels, super-groups, levels, lanes]`; empty without.
    supers: TileBytes,
    /// The columns of the matrix in the order that tiles have them in, u32 `[K]`; empty if it is their own.
    columns: TileBytes,
}

/// Scale, offset and bias of a group, one a lane.
pub(super) struct Group<S: Simd> {
    pub(super) scale: S::F32,
    pub(super) offset: Offset<S>,
    /// What is added to weights after scaling.
    pub(super) bias: S::F32,
}

/// What is subtracted from unpacked bytes, one a lane.
pub(super) struct Offset<S: Simd> {
    pub(super) integers: S::I32,
    /// The same, as an i16 in each half of a lane.
    pub(super) pairs: S::I32,
    pub(super) floats: S::F32,
}

impl<S: Simd> Offset<S> {
    #[inline(always)]
    fn new(simd: S, integers: S::I32) -> Self {
        Self { integers, pairs: simd.pair(integers, integers), floats: simd.to_f32(integers) }
    }
}

/// Codes, scales, zero points or biases, what super-groups share, and the order of columns.
pub(crate) const SECTIONS: usize = 5;

/// Whether kernels read a matrix as it is, with columns in this order. If not, [`to_dense`] gives one that they do.
pub(super) fn is_native(matrix: &PackedMatrix<'_>, columns: &[u32]) -> bool {
    is_native_scheme(&matrix.scheme, matrix.cols)
        && match matrix.scheme.order {
            ColumnOrder::Natural => columns.is_empty(),
            ColumnOrder::GroupIndex => matrix.group_order().is_some_and(|order| order == columns),
        }
        && !(matrix.scheme.element == Element::E4M3 && has_e4m3_nan(&matrix.codes))
}

/// [`is_native`], as far as it can be told without the codes and the group index.
pub(super) fn is_native_scheme(scheme: &Scheme, cols: usize) -> bool {
    GroupFormat::of(scheme, cols).is_some()
}

/// What [`Tiles::bytes`] will be for a native scheme; `None` if that cannot be addressed.
pub(super) fn tile_bytes(scheme: &Scheme, rows: usize, cols: usize, kernel: &dyn PanelKernel) -> Option<usize> {
    let sections = section_bytes(scheme, rows, cols, kernel)?;
    sections.into_iter().try_fold(0usize, usize::checked_add)
}

/// Bytes of each section for a native scheme; `None` if they cannot be addressed.
fn section_bytes(scheme: &Scheme, rows: usize, cols: usize, kernel: &dyn PanelKernel) -> Option<[usize; SECTIONS]> {
    let (panels, chunks) = (rows.div_ceil(kernel.lanes()), cols.div_ceil(CHUNK));
    let codes = chunks.checked_mul(kernel.chunk_bytes())?;
    let [scales, zeros, supers] = GroupFormat::of(scheme, cols)?.panel_bytes(chunks, kernel)?;
    let columns = if scheme.order == ColumnOrder::GroupIndex { cols.checked_mul(size_of::<u32>())? } else { 0 };
    let of_panels = |bytes: usize| bytes.checked_mul(panels);
    Some([of_panels(codes)?, of_panels(scales)?, of_panels(zeros)?, of_panels(supers)?, columns])
}

/// What kernels leave out of the codes and scales of a scheme: a power of two.
fn constant_factor(scheme: &Scheme) -> f32 {
    let of_codes = match scheme.element {
        Element::E2M1 => E2M1::FACTOR,
        Element::E4M3 => E4M3::FACTOR,
        _ => 1.0,
    };
    let of_scales = if scheme.scale == ScaleKind::E4M3Global { E4M3::FACTOR } else { 1.0 };
    of_codes * of_scales
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

impl Tiles {
    /// Repacks a matrix that [`is_native`] for `kernel`, with columns in this order; in their own if there is none.
    pub(super) fn pack(
        matrix: &PackedMatrix<'_>,
        columns: &[u32],
        kernel: &dyn PanelKernel,
        threads: &Threads,
    ) -> Result<Self, KernelError> {
        let (scheme, lanes) = (&matrix.scheme, kernel.lanes());
        let (panels, chunks) = (matrix.rows.div_ceil(lanes), matrix.cols.div_ceil(CHUNK));
        let panel_bytes = chunks * kernel.chunk_bytes();
        let mut codes = TileBytes::zeroed("weights", panels, panel_bytes)?;
        threads.for_each_chunk(codes.bytes_mut(), panel_bytes, |panel, tiles| {
            kernel.pack(&PanelCodes::of(matrix, columns, panel, lanes, chunks * CHUNK, kernel.code_bytes()), tiles);
        });

        let not_native = || KernelError::Device(format!("the CPU has no kernel for {scheme}"));
        let format = GroupFormat::of(scheme, matrix.cols).ok_or_else(not_native)?;
        let bytes = format.panel_bytes(chunks, kernel).ok_or_else(not_native)?;
        let groups = Groups::new(matrix, format, chunks, lanes);
        let section = |name: &str, panel_bytes: usize, fill: &(dyn Fn(usize, &mut [u8]) + Sync)| {
            let mut section = TileBytes::zeroed(name, panels, panel_bytes)?;
            if panel_bytes > 0 {
                threads.for_each_chunk(section.bytes_mut(), panel_bytes, fill);
            }
            Ok::<_, KernelError>(section)
        };
        let scales = section("scales", bytes[0], &|panel, scales| groups.fill_scales(panel, scales))?;
        let zeros = section("zero points", bytes[1], &|panel, zeros| groups.fill_zeros(panel, zeros))?;
        let supers = section("scales of scales", bytes[2], &|panel, supers| groups.fill_supers(panel, supers))?;
        let mut order = TileBytes::zeroed("the order of columns", 1, size_of_val(columns))?;
        order.bytes_mut().copy_from_slice(bytemuck::cast_slice(columns));
        let global = match scheme.scale {
            ScaleKind::E4M3Global => f32::from_le_bytes(*matrix.globals.first_chunk().expect("a global scale")),
            _ => 1.0,
        };
        let sections = [codes, scales, zeros, supers, order];
        let factor = constant_factor(scheme) * global;
        Self::from_sections(scheme, matrix.rows, matrix.cols, kernel, factor, sections).ok_or_else(not_native)
    }

    /// The matrix that was packed, to the bit; bits at the end of a row that no code uses are 0.
    pub(super) fn restore(
        &self,
        kernel: &dyn PanelKernel,
        threads: &Threads,
    ) -> Result<PackedMatrix<'static>, KernelError> {
        let Self { scheme, rows, cols, lanes, .. } = *self;
        type Fill<'a> = &'a (dyn Fn(usize, &mut [u8]) + Sync);
        // So many rows, of which each call fills `some`.
        let buffer = |bytes: Result<usize, FormatError>, rows: usize, some: usize, fill: Fill<'_>| {
            let mut buffer: Vec<u8> = allocate("a matrix taken out of tile order", &[bytes?], "cpu")?;
            if !buffer.is_empty() {
                let row_bytes = buffer.len() / rows;
                threads.for_each_chunk(&mut buffer, some * row_bytes, fill);
            }
            Ok::<_, KernelError>(Cow::Owned(buffer))
        };
        // Rows of the matrix in a row of its groups.
        let shared = scheme.group_rows(rows);
        let (group_rows, levels) = (rows.div_ceil(shared), self.format.levels());
        let matrix = PackedMatrix {
            codes: buffer(scheme.codes_bytes(rows, cols), rows, lanes, &|panel, codes| {
                self.restore_codes(kernel, panel, codes);
            })?,
            scales: buffer(scheme.scales_bytes(rows, cols), group_rows, 1, &|row, scales| {
                self.restore_scales(row * shared, scales);
            })?,
            zeros: buffer(scheme.zeros_bytes(rows, cols), group_rows, 1, &|row, zeros| {
                self.restore_zeros(row * shared, zeros);
            })?,
            globals: match scheme.scale {
                ScaleKind::E4M3Global => Cow::Owned((self.factor / constant_factor(&scheme)).to_le_bytes().to_vec()),
                _ => buffer(scheme.globals_bytes(rows, cols), levels * rows, 1, &|row, supers| {
                    self.restore_supers(row / rows, row % rows, supers);
                })?,
            },
            group_index: Cow::Owned(self.restore_group_index()),
            sparse_index: buffer(scheme.sparse_index_bytes(rows, cols), rows, lanes, &|panel, index| {
                self.restore_sparse_index(kernel, panel, index);
            })?,
            ..PackedMatrix::empty(scheme, rows, cols)
        };
        // What sections of a mapped file hold was not checked before.
        matrix.validate().map_err(|error| {
            KernelError::Device(format!(
                "the tiles of a matrix [{rows}, {cols}] of {scheme} hold none: {error}; if they come from a file, remove it"
            ))
        })?;
        Ok(matrix)
    }

    /// The codes of a panel's rows, packed: the inverse of [`PanelCodes::of`].
    fn restore_codes(&self, kernel: &dyn PanelKernel, panel: usize, packed: &mut [u8]) {
        let (element, size) = (self.scheme.element, kernel.code_bytes());
        let stored = self.scheme.stored_cols(self.cols) * size;
        let padded = self.scheme.stored_cols(self.chunks * CHUNK) * size;
        let mut codes = vec![0; self.lanes * padded];
        kernel.restore_codes(self.panel(panel), &mut codes);
        let mut natural = vec![0; stored];
        let packed_bytes = packed.len() / self.panel_rows(panel);
        for (codes, packed) in codes.chunks_exact(padded).zip(packed.chunks_exact_mut(packed_bytes)) {
            let mut codes = &codes[..stored];
            if !self.columns().is_empty() {
                for (code, &column) in codes.chunks_exact(size).zip(self.columns()) {
                    natural[column as usize * size..][..size].copy_from_slice(code);
                }
                codes = &natural;
            }
            if element.is_dense() {
                packed.copy_from_slice(codes);
            } else {
                bits::pack(codes, element.bits(), packed);
            }
        }
    }

    /// Where the codes of a panel's rows stand under 2:4, packed.
    fn restore_sparse_index(&self, kernel: &dyn PanelKernel, panel: usize, packed: &mut [u8]) {
        let (stored, padded) = (self.scheme.stored_cols(self.cols), self.scheme.stored_cols(self.chunks * CHUNK));
        let mut positions = vec![0; self.lanes * padded];
        kernel.restore_positions(self.panel(panel), &mut positions);
        let packed_bytes = packed.len() / self.panel_rows(panel);
        for (positions, packed) in positions.chunks_exact(padded).zip(packed.chunks_exact_mut(packed_bytes)) {
            bits::pack(&positions[..stored], 2, packed);
        }
    }

    /// The group of each column: columns stand in the order of their groups.
    fn restore_group_index(&self) -> Vec<u8> {
        if self.scheme.order == ColumnOrder::Natural {
            return Vec::new();
        }
        let group_cols = self.scheme.group_cols(self.cols);
        let mut index = vec![0; self.cols];
        for (place, &column) in self.columns().iter().enumerate() {
            index[column as usize] = (place / group_cols) as u32;
        }
        index.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// Tiles whose bytes are there: the sections of a matrix in a native scheme. `None` if they are not as long as they must
    /// be, or name columns that there are not.
    pub(super) fn from_sections(
        scheme: &Scheme,
        rows: usize,
        cols: usize,
        kernel: &dyn PanelKernel,
        factor: f32,
        sections: [TileBytes; SECTIONS],
    ) -> Option<Self> {
        let mut wanted = section_bytes(scheme, rows, cols, kernel)?;
        let found = sections.each_ref().map(|section| section.bytes().len());
        // What is converted may follow the order of another matrix of its linear.
        if found[SECTIONS - 1] == cols.checked_mul(size_of::<u32>())? {
            wanted[SECTIONS - 1] = found[SECTIONS - 1];
        }
        // A damaged file is not to be followed out of the inputs.
        let columns: &[u32] = bytemuck::try_cast_slice(sections[SECTIONS - 1].bytes()).ok()?;
        if found != wanted || columns.iter().any(|&column| column as usize >= cols) {
            return None;
        }
        let [codes, scales, zeros, supers, columns] = sections;
        let (offset, format) = (offset(scheme.element, 0), GroupFormat::of(scheme, cols)?);
        let chunks = cols.div_ceil(CHUNK);
        let (groups, lanes) = (format.span.groups(chunks), kernel.lanes());
        let scheme = *scheme;
        Some(Self {
            scheme,
            rows,
            cols,
            lanes,
            chunks,
            groups,
            format,
            factor,
            codes,
            scales,
            offset,
            zeros,
            supers,
            columns,
        })
    }

    /// The bytes of each section.
    pub(super) fn sections(&self) -> [&TileBytes; SECTIONS] {
        [&self.codes, &self.scales, &self.zeros, &self.supers, &self.columns]
    }

    /// The columns of the matrix in the order that inputs are to have; empty if it is their own.
    #[inline(always)]
    pub(super) fn columns(&self) -> &[u32] {
        // They begin on a cache line, and are whole.
        bytemuck::cast_slice(self.columns.bytes())
    }

    /// How many panels there are.
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(self.lanes)
    }

    /// Rows of the matrix in a panel.
    pub(super) fn panel_rows(&self, panel: usize) -> usize {
        self.lanes.min(self.rows - panel * self.lanes)
    }

    /// Memory held.
    pub(super) fn bytes(&self) -> usize {
        self.sections().map(|section| section.bytes().len()).iter().sum()
    }

    /// The chunks of a panel.
    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        self.of_panel(&self.codes, panel)
    }

    /// The scales of a panel.
    #[inline(always)]
    pub(super) fn panel_scales(&self, panel: usize) -> &[u8] {
        self.of_panel(&self.scales, panel)
    }

    /// The zero points, biases or inner minima of a panel.
    #[inline(always)]
    pub(super) fn panel_zeros(&self, panel: usize) -> &[u8] {
        self.of_panel(&self.zeros, panel)
    }

    /// The inner scales of a panel.
    #[inline(always)]
    pub(super) fn inner_scales(&self, panel: usize) -> &[i8] {
        bytemuck::cast_slice(self.panel_scales(panel))
    }

    /// The inner minima of a panel.
    #[inline(always)]
    pub(super) fn inner_minima(&self, panel: usize) -> &[i8] {
        bytemuck::cast_slice(self.panel_zeros(panel))
    }

    /// What a panel has of a section.
    #[inline(always)]
    fn of_panel<'a>(&self, section: &'a TileBytes, panel: usize) -> &'a [u8] {
        let section = section.bytes();
        let bytes = section.len() / self.panels();
        &section[panel * bytes..][..bytes]
    }

    /// What is subtracted from unpacked bytes where groups have no zero points.
    #[inline(always)]
    pub(super) fn offset<S: Simd>(&self, simd: S) -> Offset<S> {
        Offset::new(simd, simd.splat_i32(self.offset))
    }

    /// What the inner scales and then the minima of a panel are multiplied by, f16 `[super-groups, levels, lanes]`.
    #[inline(always)]
    pub(super) fn supers(&self, panel: usize) -> &[u8] {
        self.of_panel(&self.supers, panel)
    }

    /// Scales and zero points of group `g` of a panel.
    #[inline(always)]
    pub(super) fn group<S: Simd>(&self, simd: S, panel: usize, g: usize) -> Group<S> {
        let index = (panel * self.groups + g) * S::LANES;
        let scales = &self.scales.bytes()[self.format.scale.bytes() * index..];
        let scale = match self.format.scale {
            ScaleType::One => simd.splat(1.0),
            ScaleType::F32 => simd.load_le_f32(scales),
            ScaleType::F16 => simd.load_le_f16(scales),
            ScaleType::Bf16 => simd.load_le_bf16(scales),
            ScaleType::E8M0 => simd.load_e8m0(scales),
            ScaleType::E4M3 => simd.load_e4m3_over_256(scales),
            ScaleType::TwoLevel => self.two_level(simd, panel, g, 0),
        };
        let zeros = &self.zeros.bytes()[self.format.zero.bytes() * index..];
        let (mut offset, mut bias) = (simd.splat_i32(self.offset), simd.splat(0.0));
        match self.format.zero {
            ZeroType::None => {}
            ZeroType::Offset => offset = simd.widen_i8(bytemuck::cast_slice(zeros)),
            ZeroType::F32Bias => bias = simd.load_le_f32(zeros),
            ZeroType::F16Bias => bias = simd.load_le_f16(zeros),
            ZeroType::Bf16Bias => bias = simd.load_le_bf16(zeros),
            ZeroType::Minimum => bias = simd.sub(bias, self.two_level(simd, panel, g, 1)),
        }
        Group { scale, offset: Offset::new(simd, offset), bias }
    }

    /// Inner scales or minima of group `g`, times what their super-group has on this level.
    #[inline(always)]
    fn two_level<S: Simd>(&self, simd: S, panel: usize, g: usize, level: usize) -> S::F32 {
        let inner = if level == 0 { self.inner_scales(panel) } else { self.inner_minima(panel) };
        let inner = match self.format.span {
            GroupSpan::Chunks(_) => simd.widen_i8(&inner[g * S::LANES..]),
            GroupSpan::HalfChunk => half(simd, simd.widen_pairs(&inner[g / 2 * 2 * S::LANES..]), g % 2),
        };
        let shared = g / self.format.super_group * self.format.levels() + level;
        let shared = simd.load_le_f16(&self.supers(panel)[shared * size_of::<f16>() * S::LANES..]);
        simd.mul(shared, simd.to_f32(inner))
    }
}

/// The first or second of the i16 in the halves of lanes.
#[inline(always)]
pub(super) fn half<S: Simd>(simd: S, pairs: S::I32, half: usize) -> S::I32 {
    simd.dot_pairs(pairs, simd.splat_pair(&[[1, 0], [0, 1]][half]))
}

/// The codes of a panel's rows, padded with zeros to whole chunks.
pub(super) struct PanelCodes {
    /// `[lanes, stored codes]`, one in as many bytes as the kernel wants.
    pub(super) codes: Vec<u8>,
    /// Under 2:4 the position of each code among its four columns, one a byte; empty for dense matrices.
    pub(super) positions: Vec<u8>,
}

impl PanelCodes {
    fn of(
        matrix: &PackedMatrix<'_>,
        columns: &[u32],
        panel: usize,
        lanes: usize,
        padded_cols: usize,
        code_bytes: usize,
    ) -> Self {
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
            if !columns.is_empty() {
                let natural = codes.to_vec();
                for (code, &column) in codes.chunks_exact_mut(code_bytes).zip(columns) {
                    code.copy_from_slice(&natural[column as usize * code_bytes..][..code_bytes]);
                }
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
