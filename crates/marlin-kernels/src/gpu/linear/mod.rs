//! Packed matrices on a device.

mod encode;
mod few_rows;
mod format;
mod group;
mod group_encode;
mod layout;
mod many_rows;
mod order;
mod pack;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use marlin_format::{ColumnOrder, Element, FormatError, Grouping, PackedMatrix, Scheme};

pub(super) use self::encode::LinearEncoder;
use self::few_rows::FewRows;
use self::format::DeviceFormat;
pub use self::group::GpuLinearGroup;
pub(super) use self::group::{compile as compile_groups, step_height};
use self::layout::{QUAD, Rows, UNIT};
use self::many_rows::ManyRows;
use self::order::Columns;
pub(super) use self::pack::{PACKED_OUTPUT, Packed, VECTOR, four_function, four_functions};
use self::pack::{Packing, Prepared};
use super::GpuArithmetic;
use super::device::{Gpu, Storage};
use super::experts::{ROUTE_CHOOSE, route_constants};
use super::pipeline::{Binding, Kernel, Pipeline};
use super::upload::{PIECE, Upload};
use crate::{KernelError, LinearPart};

/// Matrices that share their input.
#[derive(Debug)]
pub struct GpuLinear {
    pub(super) parts: Vec<Part>,
    pub(super) cols: usize,
    /// Rows of each matrix.
    pub(super) rows: Vec<usize>,
    /// The order of its columns, if it is not that of its input.
    columns: Option<Columns>,
}

/// Consecutive rows of one format, no more than the device can bind.
#[derive(Debug)]
pub(super) struct Part {
    format: DeviceFormat,
    pub(super) shape: Shape,
    /// The first matrix that it has rows of.
    pub(super) matrix: usize,
    /// The first row, counted over all matrices.
    pub(super) first: usize,
    /// Codes, scales, zero points or biases, 2:4 index, row affine: those that its format has.
    pub(super) buffers: Vec<Storage>,
    pub(super) kernels: Arc<PartKernels>,
}

/// The kernels of a part's format.
#[derive(Debug)]
pub(super) struct PartKernels {
    plain: LinearKernels,
    /// Of a part that is a gate and as large a matrix.
    gated: Option<LinearKernels>,
    pub(super) embed: Arc<Pipeline>,
}

/// Kernels by the rows of the input.
#[derive(Debug, Clone)]
struct LinearKernels {
    few_rows: FewRows,
    many_rows: ManyRows,
}

/// What kernels are told of a part; the order of `Shape` in `weights.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, bytemuck::NoUninit)]
#[repr(C)]
pub(super) struct Shape {
    pub(super) k: u32,
    pub(super) rows: u32,
    groups: u32,
}

/// A run of rows of one matrix.
struct Source<'a> {
    matrix: PackedMatrix<'a>,
    bias: Option<&'a [f32]>,
}

impl GpuLinear {
    pub(super) fn load(gpu: &Gpu, parts: &[LinearPart<'_>]) -> Result<Self, KernelError> {
        let cols = crate::backend::check_parts(parts)?;
        let rows: Vec<usize> = parts.iter().map(|part| part.weight.rows).collect();
        let (columns, ordered) = Columns::of(gpu, parts)?.unzip();
        let parts = ordered.as_deref().unwrap_or(parts);
        let mut linear = Self { parts: Vec::new(), cols, rows, columns };
        let (mut first, mut matrix) = (0, 0);
        while let Some(part) = parts.get(matrix) {
            let format = DeviceFormat::of_matrix(&part.weight, gpu.arithmetic);
            let most = rows_of_binding(gpu, &format, &part.weight);
            let together = parts_together(&parts[matrix..], &format, most, gpu.arithmetic);
            let total: usize = parts[matrix..matrix + together].iter().map(|part| part.weight.rows).sum();
            if together > 1 {
                let sources: Vec<_> = parts[matrix..matrix + together].iter().map(Source::whole).collect();
                linear.parts.push(Part::load(gpu, &format, &sources, matrix, first)?);
            } else {
                for start in (0..total).step_by(most) {
                    let source = Source::rows(part, start..total.min(start + most))?;
                    linear.parts.push(Part::load(gpu, &format, &[source], matrix, first + start)?);
                }
            }
            first += total;
            matrix += together;
        }
        Ok(linear)
    }

    /// The same in memory of its own.
    pub(super) fn duplicate(&self, gpu: &Gpu) -> Result<Self, KernelError> {
        let parts = self.parts.iter().map(|part| part.duplicate(gpu)).collect::<Result<_, _>>()?;
        let columns = self.columns.as_ref().map(|columns| columns.duplicate(gpu)).transpose()?;
        Ok(Self { parts, cols: self.cols, rows: self.rows.clone(), columns })
    }

    /// What a packed matrix becomes if the device has no kernel for its scheme.
    pub(super) fn conversion(scheme: &Scheme, arithmetic: GpuArithmetic) -> Option<Scheme> {
        let format = DeviceFormat::of(scheme, arithmetic);
        let dense = if format.element == Element::F32 { Scheme::F32 } else { Scheme::F16 };
        (format.is_converted && !scheme.is_dense()).then_some(dense)
    }

    /// All rows.
    pub(super) fn outputs(&self) -> usize {
        self.rows.iter().sum()
    }

    /// Bytes that [`GpuLinear::load`] takes of the device for a matrix without a bias.
    pub(super) fn bytes(
        scheme: &Scheme,
        rows: usize,
        cols: usize,
        arithmetic: GpuArithmetic,
    ) -> Result<usize, KernelError> {
        scheme.packed_bytes(rows, cols)?;
        let format = DeviceFormat::of(scheme, arithmetic);
        let bytes = || {
            let codes = rows.checked_mul(cols.div_ceil(UNIT))?.checked_mul(format.unit_bytes())?;
            let quads = rows.div_ceil(QUAD).checked_mul(scheme.groups_per_row(cols))?;
            let groups = quads.checked_mul(format.scale_quad_bytes() + format.offset_quad_bytes())?;
            codes
                .checked_add(groups)?
                .checked_add(Columns::bytes(scheme, cols))?
                .checked_add(rows.checked_mul(size_of::<[f32; 2]>())?)
        };
        Ok(bytes().ok_or(FormatError::TooLarge { rows, cols })?)
    }
}

/// How many of the first parts become one: their format is the same, and all but the last are whole quads.
fn parts_together(parts: &[LinearPart<'_>], format: &DeviceFormat, most: usize, arithmetic: GpuArithmetic) -> usize {
    let groups = |part: &LinearPart<'_>| part.weight.scheme.groups_per_row(part.weight.cols);
    let mut rows = parts[0].weight.rows;
    let more = parts.windows(2).take_while(|pair| {
        rows += pair[1].weight.rows;
        pair[0].weight.rows.is_multiple_of(QUAD)
            && rows <= most
            && groups(&pair[1]) == groups(&parts[0])
            && DeviceFormat::of_matrix(&pair[1].weight, arithmetic) == *format
    });
    1 + more.count()
}

/// How many rows fit into one binding, in whole quads and tiles of scales.
fn rows_of_binding(gpu: &Gpu, format: &DeviceFormat, matrix: &PackedMatrix<'_>) -> usize {
    let groups = matrix.scheme.groups_per_row(matrix.cols);
    let quad_bytes = groups * format.scale_quad_bytes().max(format.offset_quad_bytes());
    let row_bytes = (matrix.cols.div_ceil(UNIT) * format.unit_bytes()).max(quad_bytes.div_ceil(QUAD)).max(8);
    let rows = usize::try_from(gpu.caps.max_binding).unwrap_or(usize::MAX) / row_bytes;
    let tile = match matrix.scheme.grouping {
        Grouping::Block { rows, .. } => (rows as usize).next_multiple_of(QUAD),
        _ => QUAD,
    };
    (rows / tile * tile).max(tile)
}

impl<'a> Source<'a> {
    fn whole(part: &'a LinearPart<'_>) -> Self {
        Self { matrix: part.weight.borrowed(), bias: part.bias.as_deref() }
    }

    fn rows(part: &'a LinearPart<'_>, rows: std::ops::Range<usize>) -> Result<Self, KernelError> {
        let bias = part.bias.as_ref().map(|bias| &bias[rows.clone()]);
        Ok(Self { matrix: part.weight.slice_rows(rows)?, bias })
    }
}

impl Part {
    fn duplicate(&self, gpu: &Gpu) -> Result<Self, KernelError> {
        let buffers = self.buffers.iter().map(|buffer| gpu.duplicate(buffer)).collect::<Result<_, _>>()?;
        Ok(Self { buffers, kernels: self.kernels.clone(), ..*self })
    }

    fn load(
        gpu: &Gpu,
        format: &DeviceFormat,
        sources: &[Source<'_>],
        matrix: usize,
        first: usize,
    ) -> Result<Self, KernelError> {
        let of_first = &sources[0].matrix;
        let cols = of_first.cols;
        let rows: usize = sources.iter().map(|source| source.matrix.rows).sum();
        let shape = Shape { k: cols as u32, rows: rows as u32, groups: of_first.scheme.groups_per_row(cols) as u32 };
        let row_words = cols.div_ceil(UNIT) * format.unit_words();
        let sources: Vec<_> = sources.iter().map(|source| (Rows::new(format, &source.matrix), source)).collect();

        let mut codes = Upload::new(gpu, "weights", rows * row_words * 4)?;
        for (source, Source { matrix, .. }) in &sources {
            match source.as_they_are() {
                Some(bytes) => codes.write(bytes)?,
                None => codes.write_rows(matrix.rows, row_words, |row, words| source.codes(row, words))?,
            }
        }
        let mut buffers = vec![codes.finish()];
        let quads = |bytes: usize, what: &'static str, push: &dyn Fn(&Rows<'_>, usize, &mut Vec<u8>)| {
            let groups = shape.groups as usize * rows.div_ceil(QUAD);
            let mut upload = Upload::new(gpu, what, groups * bytes)?;
            for (source, Source { matrix, .. }) in &sources {
                let mut bytes = Vec::new();
                for row in (0..matrix.rows).step_by(QUAD) {
                    push(source, row, &mut bytes);
                    if bytes.len() >= PIECE {
                        upload.write(&bytes)?;
                        bytes.clear();
                    }
                }
                upload.write(&bytes)?;
            }
            Ok::<_, KernelError>(upload.finish())
        };
        if format.scale_quad_bytes() > 0 {
            buffers.push(quads(format.scale_quad_bytes(), "scales", &|rows, row, bytes| rows.scales(row, bytes))?);
        }
        if format.offset_quad_bytes() > 0 {
            buffers
                .push(quads(format.offset_quad_bytes(), "zero points", &|rows, row, bytes| rows.offsets(row, bytes))?);
        }
        if format.is_sparse {
            let units = cols.div_ceil(UNIT);
            let mut index = Upload::new(gpu, "2:4 index", rows * units * 4)?;
            for (source, Source { matrix, .. }) in &sources {
                index.write_rows(matrix.rows, units, |row, words| source.sparse_index(row, words))?;
            }
            buffers.push(index.finish());
        }
        let affine: Vec<[f32; 2]> = sources
            .iter()
            .flat_map(|(source, Source { matrix, bias })| {
                (0..matrix.rows).map(move |row| [source.factor(row), bias.map_or(0.0, |bias| bias[row])])
            })
            .collect();
        buffers.push(Upload::all(gpu, "row factors", &affine)?);
        let is_gated = matches!(&sources[..], [(_, gate), (_, up)] if gate.matrix.rows == up.matrix.rows);
        let kernels = gpu.linear_kernels.get(gpu, format, &shape, is_gated)?;
        Ok(Self { format: *format, shape, matrix, first, buffers, kernels })
    }
}

/// Compiles the kernels of linears of `[rows, cols]` in a scheme: of one matrix, and of two that go together.
pub(super) fn compile(gpu: &Gpu, scheme: &Scheme, rows: usize, cols: usize) -> Result<(), KernelError> {
    let groups = scheme.groups_per_row(cols) as u32;
    if scheme.order == ColumnOrder::GroupIndex {
        Columns::compile(gpu)?;
    }
    for format in DeviceFormat::all_of(scheme, gpu.arithmetic) {
        for (rows, is_gated) in [(rows, false), (2 * rows, true)] {
            PartKernels::new(gpu, &format, &Shape { k: cols as u32, rows: rows as u32, groups }, is_gated)?;
        }
    }
    Ok(())
}

/// The kernels of parts that were loaded: a model has many of few shapes, and putting their sources together takes longer than finding them here.
#[derive(Default)]
pub(super) struct LinearCache(Mutex<HashMap<(DeviceFormat, Shape, bool), Arc<PartKernels>>>);

impl LinearCache {
    fn get(
        &self,
        gpu: &Gpu,
        format: &DeviceFormat,
        shape: &Shape,
        is_gated: bool,
    ) -> Result<Arc<PartKernels>, KernelError> {
        let kernels = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (*format, *shape, is_gated);
        if let Some(found) = kernels().get(&key) {
            return Ok(found.clone());
        }
        let new = Arc::new(PartKernels::new(gpu, format, shape, is_gated)?);
        Ok(kernels().entry(key).or_insert(new).clone())
    }
}

impl PartKernels {
    fn new(gpu: &Gpu, format: &DeviceFormat, shape: &Shape, is_gated: bool) -> Result<Self, KernelError> {
        let (cols, rows) = (shape.k as usize, shape.rows as usize);
        // Drivers compile on the thread that asks them to.
        let plain = || LinearKernels::new(gpu, format, Place::Plain, cols, rows, false);
        let gated =
            || is_gated.then(|| LinearKernels::new(gpu, format, Place::Plain, cols, rows / 2, true)).transpose();
        let embed = || gpu.pipeline(&embed_kernel(format));
        let (plain, (gated, embed)) = rayon::join(plain, || rayon::join(gated, embed));
        Ok(Self { plain: plain?, gated: gated?, embed: embed? })
    }
}

impl LinearKernels {
    fn new(
        gpu: &Gpu,
        format: &DeviceFormat,
        place: Place,
        cols: usize,
        outputs: usize,
        is_gated: bool,
    ) -> Result<Self, KernelError> {
        Ok(Self {
            few_rows: FewRows::new(gpu, format, place, cols, outputs, is_gated)?,
            many_rows: ManyRows::new(gpu, format, place, outputs, is_gated)?,
        })
    }

    /// The kernel for `m` rows of input, and its workgroups.
    fn choose(&self, m: usize, prepared: Prepared) -> (&Arc<Pipeline>, [usize; 3]) {
        self.few_rows.choose(m, prepared).unwrap_or_else(|| self.many_rows.choose(m))
    }

    /// Whether the kernel for `m` rows packs its output.
    fn packs_output(&self, m: usize) -> bool {
        self.few_rows.packs_output(m)
    }
}

/// The files that make weights of codes.
fn weights(format: &DeviceFormat) -> Vec<&'static str> {
    let arithmetic = match format.arithmetic {
        GpuArithmetic::Exact => include_str!("../shaders/arithmetic_exact.wgsl"),
        GpuArithmetic::Half => include_str!("../shaders/arithmetic_half.wgsl"),
    };
    vec![arithmetic, include_str!("../shaders/elements.wgsl"), include_str!("../shaders/weights.wgsl")]
}

/// Where a kernel finds its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Those of the input in their order, of one matrix.
    Plain,
    /// Those of tiles of one of so many matrices each, or of a head.
    Group(usize),
    /// Those of one token, which chooses some of so many matrices by its logits.
    Routed(usize),
}

impl Place {
    /// That of the norm of one row: of a group, the linear that chooses has it.
    fn of_norms(self) -> Self {
        match self {
            Self::Group(matrices) => Self::Routed(matrices),
            other => other,
        }
    }

    /// The modules that say so.
    fn files(self) -> Vec<&'static str> {
        let group = [MATRIX_OF_GROUP, include_str!("../shaders/place_group.wgsl")];
        let own = match self {
            Self::Plain => return vec![MATRIX_OF_ONE, include_str!("../shaders/place_plain.wgsl")],
            Self::Group(_) => {
                vec![include_str!("../shaders/tiles_sorted.wgsl"), include_str!("../shaders/routing.wgsl")]
            }
            Self::Routed(_) => [include_str!("../shaders/tiles_chosen.wgsl")].into_iter().chain(ROUTE_CHOOSE).collect(),
        };
        group.into_iter().chain(own).collect()
    }

    /// What they take as constants.
    fn constants(self) -> String {
        match self {
            Self::Plain | Self::Group(_) => String::new(),
            Self::Routed(most_experts) => route_constants(most_experts),
        }
    }

    /// What they read.
    fn bindings(self) -> &'static [Binding] {
        const GROUP: [Binding; 3] =
            [Binding::read("tiles", "vec4<u32>"), Binding::read("pairs", "u32"), Binding::read("matrices", "u32")];
        const ROUTED: [Binding; 5] = [
            Binding::read("logits", "f32"),
            Binding::read("correction", "f32"),
            Binding::write("experts", "u32"),
            Binding::write("weights", "f32"),
            Binding::read("matrices", "u32"),
        ];
        match self {
            Self::Plain => &[],
            Self::Group(_) => &GROUP,
            Self::Routed(_) => &ROUTED,
        }
    }

    /// The name of a kernel's variant for it.
    fn name(self, plain: &'static str, of_group: &'static str) -> &'static str {
        match self {
            Self::Plain => plain,
            Self::Group(_) | Self::Routed(_) => of_group,
        }
    }
}

const MATRIX_OF_ONE: &str = include_str!("../shaders/matrix_of_one.wgsl");
const MATRIX_OF_GROUP: &str = include_str!("../shaders/matrix_of_group.wgsl");

/// A kernel of a linear.
fn linear(
    format: &DeviceFormat,
    name: &'static str,
    place: Place,
    packing: Packing,
    constants: String,
    of_kernel: &[&'static str],
) -> Kernel {
    let mut bindings = format.bindings();
    bindings.extend(packing.bindings());
    bindings.push(Binding::write("out", "f32"));
    bindings.extend(place.bindings());
    let mut files = weights(format);
    files.extend(place.files());
    files.extend([packing.file(), include_str!("../shaders/epilogue.wgsl")]);
    files.extend(of_kernel);
    Kernel { name, prelude: format.module() + &constants + &place.constants(), bindings, files }
}

/// The kernel that looks up rows of a table.
fn embed_kernel(format: &DeviceFormat) -> Kernel {
    let mut bindings = format.bindings();
    bindings.extend([Binding::read("tokens", "u32"), Binding::read("sampled", "u32"), Binding::write("out", "f32")]);
    let mut files = weights(format);
    files.extend([MATRIX_OF_ONE, include_str!("../shaders/embed.wgsl")]);
    Kernel { name: "embed", prelude: format.module(), bindings, files }
}
