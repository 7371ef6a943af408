//! What belongs to groups of weights: scales, zero points, biases, and what super-groups multiply them with, in tile order.

use marlin_format::{ColumnOrder, Element, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind, bits};

use super::codes::{CHUNK, E2M1, Int8};
use super::kernel::PanelKernel;
use super::tiles::Tiles;

/// How the groups of a matrix are stored in tile order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GroupFormat {
    pub(super) span: GroupSpan,
    pub(super) scale: ScaleType,
    pub(super) zero: ZeroType,
    /// Groups that share an f16 for their scales, and one for their minima if they have any; as many as there are if none do.
    pub(super) super_group: usize,
}

/// How groups of columns lie over chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GroupSpan {
    /// So many chunks a group; the last may have fewer.
    Chunks(usize),
    /// Two groups a chunk.
    HalfChunk,
}

/// Storage of a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScaleType {
    One,
    F32,
    F16,
    Bf16,
    E8M0,
    E4M3,
    /// An i8, to be multiplied by the f16 of its super-group.
    TwoLevel,
}

/// Storage of what is subtracted from the codes of a group, or added to its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ZeroType {
    None,
    /// What is subtracted from unpacked bytes, an i8.
    Offset,
    F32Bias,
    F16Bias,
    Bf16Bias,
    /// An i8, to be multiplied by the second f16 of its super-group and subtracted after scaling.
    Minimum,
}

impl GroupSpan {
    fn of(group_cols: usize, cols: usize) -> Option<Self> {
        if group_cols >= cols {
            Some(Self::Chunks(cols.div_ceil(CHUNK)))
        } else if group_cols.is_multiple_of(CHUNK) {
            Some(Self::Chunks(group_cols / CHUNK))
        } else if group_cols.is_multiple_of(CHUNK / 2) {
            Some(Self::HalfChunk)
        } else {
            None
        }
    }

    /// Groups of so many chunks.
    pub(super) fn groups(self, chunks: usize) -> usize {
        match self {
            Self::Chunks(span) => chunks.div_ceil(span),
            Self::HalfChunk => 2 * chunks,
        }
    }

    /// Columns of a group.
    fn cols(self) -> usize {
        match self {
            Self::Chunks(span) => span * CHUNK,
            Self::HalfChunk => CHUNK / 2,
        }
    }
}

impl ScaleType {
    fn of(kind: ScaleKind) -> Option<Self> {
        match kind {
            ScaleKind::None => Some(Self::One),
            ScaleKind::F32 => Some(Self::F32),
            ScaleKind::F16 => Some(Self::F16),
            ScaleKind::Bf16 => Some(Self::Bf16),
            ScaleKind::E8M0 => Some(Self::E8M0),
            ScaleKind::E4M3Global => Some(Self::E4M3),
            ScaleKind::TwoLevel { bits, signed, .. } => (signed || bits < 8).then_some(Self::TwoLevel),
        }
    }

    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::One => 0,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E8M0 | Self::E4M3 | Self::TwoLevel => 1,
        }
    }
}

impl ZeroType {
    fn of(scheme: &Scheme) -> Option<Self> {
        let found = match scheme.zero {
            ZeroKind::None => Self::None,
            ZeroKind::Integer => Self::Offset,
            ZeroKind::F32Bias => Self::F32Bias,
            ZeroKind::F16Bias => Self::F16Bias,
            ZeroKind::Bf16Bias => Self::Bf16Bias,
            // Minima go with codes that have no offset.
            ZeroKind::TwoLevelMin { bits } => (bits < 8 && offset(scheme.element, 0) == 0).then_some(Self::Minimum)?,
        };
        // Biases would reach pruned weights, and are not to be multiplied by the factor of the whole matrix.
        let takes_bias = scheme.sparsity == Sparsity::Dense
            && matches!(scheme.element, Element::Uint(_) | Element::Int(_) | Element::Iq4Nl)
            && scheme.scale != ScaleKind::E4M3Global;
        (takes_bias || !found.is_bias()).then_some(found)
    }

    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::None => 0,
            Self::F32Bias => 4,
            Self::F16Bias | Self::Bf16Bias => 2,
            Self::Offset | Self::Minimum => 1,
        }
    }

    /// Whether something is added to weights after scaling.
    pub(super) const fn is_bias(self) -> bool {
        matches!(self, Self::F32Bias | Self::F16Bias | Self::Bf16Bias | Self::Minimum)
    }
}

/// Bytes of a number that super-groups share.
const SUPER_BYTES: usize = 2;

impl GroupFormat {
    /// That of matrices of so many columns, put into the order of their groups if they have an index; `None` if kernels do not read their
    /// groups.
    pub(super) fn of(scheme: &Scheme, cols: usize) -> Option<Self> {
        // Two columns of every four would no longer be neighbours.
        if scheme.order == ColumnOrder::GroupIndex && scheme.sparsity == Sparsity::TwoOfFour {
            return None;
        }
        let span = GroupSpan::of(scheme.group_cols(cols), cols)?;
        let (scale, zero) = (ScaleType::of(scheme.scale)?, ZeroType::of(scheme)?);
        let super_group = match scheme.scale {
            ScaleKind::TwoLevel { super_group, .. } => Self::super_group(scheme, span, zero, super_group as usize)?,
            _ => usize::MAX,
        };
        Some(Self { span, scale, zero, super_group })
    }

    /// Groups of a super-group of so many columns; `None` if kernels do not read such scales. They know those of K-quants: of integers in
    /// all columns, with minima or without, in super-groups of whole chunks.
    fn super_group(scheme: &Scheme, span: GroupSpan, zero: ZeroType, cols: usize) -> Option<usize> {
        let is_integer = matches!(scheme.element, Element::Uint(_) | Element::Int(_) | Element::Iq4Nl);
        let is_known = scheme.sparsity == Sparsity::Dense
            && is_integer
            && matches!(zero, ZeroType::None | ZeroType::Minimum)
            && (span != GroupSpan::HalfChunk || cols.is_multiple_of(CHUNK));
        is_known.then_some((cols / span.cols()).max(1))
    }

    /// Numbers that a lane has of each super-group: for scales, and for minima.
    pub(super) const fn levels(&self) -> usize {
        (matches!(self.scale, ScaleType::TwoLevel)) as usize + (matches!(self.zero, ZeroType::Minimum)) as usize
    }

    /// Super-groups of so many groups.
    pub(super) fn super_groups(&self, groups: usize) -> usize {
        groups.div_ceil(self.super_group)
    }

    /// Where a lane's inner scale or minimum of a group stands among those of a panel.
    fn inner_place(&self, group: usize, lane: usize, lanes: usize) -> usize {
        match self.span {
            GroupSpan::Chunks(_) => group * lanes + lane,
            GroupSpan::HalfChunk => (group / 2 * lanes + lane) * 2 + group % 2,
        }
    }

    /// Bytes of scales, of zero points or biases, and of what super-groups share, for a panel; `None` if they cannot be addressed.
    pub(super) fn panel_bytes(&self, chunks: usize, kernel: &dyn PanelKernel) -> Option<[usize; 3]> {
        let (groups, lanes) = (self.span.groups(chunks), kernel.lanes());
        let each = groups.checked_mul(lanes)?;
        let shared = self.super_groups(groups).checked_mul(lanes)?.checked_mul(SUPER_BYTES * self.levels())?;
        Some([each.checked_mul(self.scale.bytes())?, each.checked_mul(self.zero.bytes())?, shared])
    }
}

/// What is subtracted from unpacked bytes of a group with this zero point.
pub(super) fn offset(element: Element, zero: i32) -> i32 {
    let stored = |bits| if bits > 6 { Int8::OFFSET } else { 0 };
    match element {
        Element::E2M1 => E2M1::OFFSET,
        Element::Uint(bits) => stored(bits) + zero,
        Element::Int(bits) => stored(bits) + (1 << (bits - 1)) + zero,
        Element::Iq4Nl | Element::E4M3 | Element::F16 | Element::Bf16 | Element::F32 => 0,
    }
}

/// Puts the groups of a matrix into tile order.
pub(super) struct Groups<'a> {
    matrix: &'a PackedMatrix<'a>,
    format: GroupFormat,
    lanes: usize,
    /// Groups of a panel.
    count: usize,
}

impl<'a> Groups<'a> {
    pub(super) fn new(matrix: &'a PackedMatrix<'a>, format: GroupFormat, chunks: usize, lanes: usize) -> Self {
        Self { matrix, format, lanes, count: format.span.groups(chunks) }
    }

    /// The row and the group of the matrix behind every `step`-th group and each lane of a panel; none for padding.
    fn sources(&self, panel: usize, step: usize) -> impl Iterator<Item = Option<(usize, usize)>> {
        let (rows, cols) = (self.matrix.rows, self.matrix.cols);
        let (tile_cols, group_cols) = (self.format.span.cols(), self.matrix.scheme.group_cols(cols));
        let lanes = panel * self.lanes..(panel + 1) * self.lanes;
        (0..self.count).step_by(step).flat_map(move |group| {
            let col = group * tile_cols;
            lanes.clone().map(move |row| (row < rows && col < cols).then_some((row, col / group_cols)))
        })
    }

    /// `[groups, lanes]`; inner scales of two groups a chunk are `[chunks, lanes, 2]`.
    pub(super) fn fill_scales(&self, panel: usize, scales: &mut [u8]) {
        let scheme = &self.matrix.scheme;
        let (groups, group_rows) = (scheme.groups_per_row(self.matrix.cols), scheme.group_rows(self.matrix.rows));
        let bytes = self.format.scale.bytes();
        for (place, source) in self.sources(panel, 1).enumerate() {
            let Some((row, group)) = source else { continue };
            if let ScaleKind::TwoLevel { bits, signed, .. } = scheme.scale {
                scales[self.inner_place(place)] = self.inner(&self.matrix.scales, bits, signed, row, group);
            } else {
                let index = row / group_rows * groups + group;
                scales[place * bytes..][..bytes].copy_from_slice(&self.matrix.scales[index * bytes..][..bytes]);
            }
        }
    }

    /// `[groups, lanes]`, inner minima as [`Groups::fill_scales`] puts inner scales.
    pub(super) fn fill_zeros(&self, panel: usize, zeros: &mut [u8]) {
        let scheme = &self.matrix.scheme;
        let (groups, group_rows) = (scheme.groups_per_row(self.matrix.cols), scheme.group_rows(self.matrix.rows));
        let bytes = self.format.zero.bytes();
        for (place, source) in self.sources(panel, 1).enumerate() {
            let Some((row, group)) = source else { continue };
            match scheme.zero {
                // Fits: an offset is a code, less 128 where codes have more than six bits.
                ZeroKind::Integer => {
                    zeros[place] = offset(scheme.element, self.matrix.zero_at(row, group)) as i8 as u8;
                }
                ZeroKind::TwoLevelMin { bits } => {
                    zeros[self.inner_place(place)] = self.inner(&self.matrix.zeros, bits, false, row, group);
                }
                _ => {
                    let index = row / group_rows * groups + group;
                    zeros[place * bytes..][..bytes].copy_from_slice(&self.matrix.zeros[index * bytes..][..bytes]);
                }
            }
        }
    }

    /// `[super-groups, levels, lanes]`.
    pub(super) fn fill_supers(&self, panel: usize, supers: &mut [u8]) {
        let levels = self.format.levels();
        let level_bytes = self.matrix.globals.len() / levels;
        let shared = level_bytes / SUPER_BYTES / self.matrix.rows;
        for (index, source) in self.sources(panel, self.format.super_group).enumerate() {
            let Some((row, _)) = source else { continue };
            let (super_group, lane) = (index / self.lanes, index % self.lanes);
            for level in 0..levels {
                let from = level * level_bytes + (row * shared + super_group) * SUPER_BYTES;
                let to = ((super_group * levels + level) * self.lanes + lane) * SUPER_BYTES;
                supers[to..][..SUPER_BYTES].copy_from_slice(&self.matrix.globals[from..][..SUPER_BYTES]);
            }
        }
    }

    /// Where an inner scale or minimum of a panel stands, of which there are so many before it in `[groups, lanes]`.
    fn inner_place(&self, place: usize) -> usize {
        self.format.inner_place(place / self.lanes, place % self.lanes, self.lanes)
    }

    /// An inner scale or minimum as an i8, which it fits ([`ScaleType::of`], [`ZeroType::of`]).
    fn inner(&self, packed: &[u8], width: u8, signed: bool, row: usize, group: usize) -> u8 {
        let row_bytes = packed.len() / self.matrix.rows;
        let code = bits::get(&packed[row * row_bytes..], group, width.into());
        if signed && code >> (width - 1) == 1 { code.wrapping_sub(((1u16) << width) as u8) } else { code }
    }
}

/// The inverse of [`Groups`]. Where rows of the matrix share what their groups have, it is taken from one of them.
impl Tiles {
    /// The scales of a row's groups, packed as in [`PackedMatrix::scales`].
    pub(super) fn restore_scales(&self, row: usize, scales: &mut [u8]) {
        let tiled = self.panel_scales(row / self.lanes);
        match self.scheme.scale {
            ScaleKind::TwoLevel { bits, .. } => self.restore_inner(tiled, row, bits, scales),
            _ => self.restore_numbers(tiled, row, self.format.scale.bytes(), scales),
        }
    }

    /// Their zero points, biases or inner minima, as in [`PackedMatrix::zeros`].
    pub(super) fn restore_zeros(&self, row: usize, zeros: &mut [u8]) {
        let tiled = self.panel_zeros(row / self.lanes);
        match self.scheme.zero {
            ZeroKind::Integer => {
                let (element, lane) = (self.scheme.element, row % self.lanes);
                let of_first_code = offset(element, element.value(0) as i32);
                let code = |group| i32::from(tiled[group * self.lanes + lane] as i8) - of_first_code;
                let codes: Vec<u8> = self.tile_groups().map(|group| code(group) as u8).collect();
                bits::pack(&codes, element.bits(), zeros);
            }
            ZeroKind::TwoLevelMin { bits } => self.restore_inner(tiled, row, bits, zeros),
            _ => self.restore_numbers(tiled, row, self.format.zero.bytes(), zeros),
        }
    }

    /// What super-groups of a row share on one level.
    pub(super) fn restore_supers(&self, level: usize, row: usize, supers: &mut [u8]) {
        let (tiled, lane) = (self.supers(row / self.lanes), row % self.lanes);
        for (super_group, shared) in supers.chunks_exact_mut(SUPER_BYTES).enumerate() {
            let from = ((super_group * self.format.levels() + level) * self.lanes + lane) * SUPER_BYTES;
            shared.copy_from_slice(&tiled[from..][..SUPER_BYTES]);
        }
    }

    /// The group of tiles, or the first of several, for each of a row's groups.
    fn tile_groups(&self) -> impl Iterator<Item = usize> {
        let (groups, group_cols) = (self.scheme.groups_per_row(self.cols), self.scheme.group_cols(self.cols));
        let tile_cols = self.format.span.cols();
        (0..groups).map(move |group| group * group_cols / tile_cols)
    }

    /// Scales or biases of so many bytes.
    fn restore_numbers(&self, tiled: &[u8], row: usize, size: usize, numbers: &mut [u8]) {
        for (number, group) in numbers.chunks_exact_mut(size).zip(self.tile_groups()) {
            number.copy_from_slice(&tiled[(group * self.lanes + row % self.lanes) * size..][..size]);
        }
    }

    /// Inner scales or minima, of which an i8 has the bits at its lower end.
    fn restore_inner(&self, tiled: &[u8], row: usize, width: u8, packed: &mut [u8]) {
        let place = |group| self.format.inner_place(group, row % self.lanes, self.lanes);
        let inner: Vec<u8> = self.tile_groups().map(|group| tiled[place(group)] & (0xff >> (8 - width))).collect();
        bits::pack(&inner, width.into(), packed);
    }
}
