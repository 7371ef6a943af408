//! What a number format is on a device: how its codes, scales and zero points become numbers, as WGSL that stands before a kernel.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use half::f16;
use marlin_format::{ColumnOrder, Element, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind};

use super::Shape;
use super::layout::{QUAD, UNIT, planes, power_of_two};
use crate::gpu::GpuArithmetic;
use crate::gpu::pipeline::Binding;

/// How a matrix is stored on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct DeviceFormat {
    pub(super) arithmetic: GpuArithmetic,
    pub(super) element: Element,
    /// The device does not read the matrix's scheme, and has its weights one by one.
    pub(super) is_converted: bool,
    pub(super) is_sparse: bool,
    pub(super) scale: Scale,
    pub(super) offset: Offset,
    /// Columns of a group; `None` if a group is a whole row.
    group: Option<u32>,
}

/// Scales of groups. What a whole row shares is a factor of its sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Scale {
    None,
    /// In the device's arithmetic.
    Quads,
    /// Powers of two, a byte each.
    E8M0,
    /// Bytes of E4M3.
    E4M3,
}

/// What is subtracted from the codes of a group, or added to its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Offset {
    None,
    Zero,
    Bias,
}

impl DeviceFormat {
    pub(super) fn of(scheme: &Scheme, arithmetic: GpuArithmetic) -> Self {
        let dense = match arithmetic {
            GpuArithmetic::Exact => Element::F32,
            GpuArithmetic::Half => Element::F16,
        };
        if !is_native(scheme, arithmetic) {
            return Self::converted(dense, arithmetic);
        }
        let offset = match scheme.zero {
            ZeroKind::None => Offset::None,
            ZeroKind::Integer => Offset::Zero,
            _ => Offset::Bias,
        };
        let group = match scheme.grouping {
            Grouping::Tensor | Grouping::Row => None,
            Grouping::Columns(cols) | Grouping::Block { cols, .. } => Some(cols),
        };
        let scale = match (scheme.scale, scheme.element, arithmetic) {
            (ScaleKind::None, ..) => Scale::None,
            // Without zero points or biases a scale of a whole row can wait until the row is summed up.
            _ if group.is_none() && offset == Offset::None => Scale::None,
            (ScaleKind::E8M0, _, GpuArithmetic::Half) => Scale::E8M0,
            (ScaleKind::E4M3Global, Element::E2M1, GpuArithmetic::Half) => Scale::E4M3,
            _ => Scale::Quads,
        };
        Self {
            arithmetic,
            element: scheme.element,
            is_converted: false,
            is_sparse: scheme.sparsity == Sparsity::TwoOfFour,
            scale,
            offset,
            group,
        }
    }

    /// Weights one by one.
    fn converted(element: Element, arithmetic: GpuArithmetic) -> Self {
        let (scale, offset) = (Scale::None, Offset::None);
        Self { arithmetic, element, is_converted: true, is_sparse: false, scale, offset, group: None }
    }

    /// The format of a matrix, whose codes may rule out what its scheme allows.
    pub(super) fn of_matrix(matrix: &PackedMatrix<'_>, arithmetic: GpuArithmetic) -> Self {
        let is_nan = |code: &u8| code & 0x7f == 0x7f;
        if matrix.scheme.element == Element::E4M3 && matrix.codes.iter().any(is_nan) {
            return Self::of_nan(arithmetic);
        }
        Self::of(&matrix.scheme, arithmetic)
    }

    /// All that [`DeviceFormat::of_matrix`] may give for matrices of a scheme.
    pub(super) fn all_of(scheme: &Scheme, arithmetic: GpuArithmetic) -> impl Iterator<Item = Self> {
        let of_nan = (scheme.element == Element::E4M3).then(|| Self::of_nan(arithmetic));
        std::iter::once(Self::of(scheme, arithmetic)).chain(of_nan)
    }

    /// That of E4M3 codes with a NaN among them, which decoding by shifts takes for a number.
    fn of_nan(arithmetic: GpuArithmetic) -> Self {
        Self::converted(if arithmetic == GpuArithmetic::Exact { Element::F32 } else { Element::F16 }, arithmetic)
    }

    /// Bytes of each of the buffers that a matrix has, in the order of [`DeviceFormat::bindings`].
    pub(super) fn buffer_bytes(&self, shape: &Shape) -> Vec<usize> {
        let (rows, units) = (shape.rows as usize, (shape.k as usize).div_ceil(UNIT));
        let quads = shape.groups as usize * rows.div_ceil(QUAD);
        let mut bytes = vec![rows * units * self.unit_words() * size_of::<u32>()];
        bytes.extend(
            [self.scale_quad_bytes(), self.offset_quad_bytes()]
                .into_iter()
                .filter(|&of_quad| of_quad > 0)
                .map(|of_quad| quads * of_quad),
        );
        bytes.extend(self.is_sparse.then(|| rows * units * size_of::<u32>()));
        bytes.push(rows * size_of::<[f32; 2]>());
        bytes
    }

    /// Words of the codes of a unit.
    pub(super) fn unit_words(&self) -> usize {
        let stored = if self.is_sparse { UNIT / 2 } else { UNIT };
        stored * self.element.bits() as usize / 32
    }

    /// Bytes of a unit: its codes and its 2:4 index.
    pub(super) fn unit_bytes(&self) -> usize {
        (self.unit_words() + usize::from(self.is_sparse)) * size_of::<u32>()
    }

    /// Bytes of a group's scales in a quad of rows.
    pub(super) fn scale_quad_bytes(&self) -> usize {
        match self.scale {
            Scale::None => 0,
            Scale::Quads => QUAD * self.number_bytes(),
            Scale::E8M0 | Scale::E4M3 => QUAD,
        }
    }

    /// Bytes of a group's zero points or biases in a quad of rows.
    pub(super) fn offset_quad_bytes(&self) -> usize {
        if self.offset == Offset::None { 0 } else { QUAD * self.number_bytes() }
    }

    fn number_bytes(&self) -> usize {
        match self.arithmetic {
            GpuArithmetic::Exact => 4,
            GpuArithmetic::Half => 2,
        }
    }

    /// Appends a number of the device's arithmetic.
    pub(super) fn push(&self, bytes: &mut Vec<u8>, value: f32) {
        match self.arithmetic {
            GpuArithmetic::Exact => bytes.extend(value.to_le_bytes()),
            GpuArithmetic::Half => bytes.extend(f16::from_f32(value).to_le_bytes()),
        }
    }

    /// What decoding leaves out: a code's value is this times what the kernel makes of it.
    pub(super) fn element_factor(&self) -> f32 {
        match self.element {
            // The smallest exponents of both, taken for those of half precision.
            Element::E2M1 => 16384.0,
            Element::E4M3 => 256.0,
            _ => 1.0,
        }
    }

    /// The factor of rows with E4M3 scales, whose kernel multiplies them by 64.
    pub(super) fn e4m3_factor(&self) -> f32 {
        self.element_factor() / 64.0
    }

    /// No code's value is larger.
    pub(super) fn largest_value(&self) -> f32 {
        match self.element {
            Element::E2M1 => 6.0,
            Element::E4M3 => 448.0,
            Element::Iq4Nl => 127.0,
            // With zero points of the other end.
            Element::Uint(bits) | Element::Int(bits) => (1u32 << bits) as f32,
            Element::F16 | Element::Bf16 | Element::F32 => 1.0,
        }
    }

    /// The factor of a row of converted weights.
    pub(super) fn dense_factor(&self, weights: &[f32]) -> f32 {
        match self.arithmetic {
            GpuArithmetic::Exact => 1.0,
            GpuArithmetic::Half => power_of_two(weights.iter().fold(0.0, |largest, weight| weight.abs().max(largest))),
        }
    }

    /// The code of a converted weight.
    pub(super) fn dense_code(&self, weight: f32) -> u32 {
        match self.arithmetic {
            GpuArithmetic::Exact => weight.to_bits(),
            GpuArithmetic::Half => u32::from(f16::from_f32(weight).to_bits()),
        }
    }

    /// Bindings in the order of a part's buffers.
    pub(super) fn bindings(&self) -> Vec<Binding> {
        let quads = match self.arithmetic {
            GpuArithmetic::Exact => "vec4<f32>",
            GpuArithmetic::Half => "vec2<u32>",
        };
        let mut bindings = vec![Binding::read("codes", self.vector().0)];
        match self.scale {
            Scale::None => {}
            Scale::Quads => bindings.push(Binding::read("scales", quads)),
            Scale::E8M0 | Scale::E4M3 => bindings.push(Binding::read("scales", "u32")),
        }
        if self.offset != Offset::None {
            bindings.push(Binding::read("offsets", quads));
        }
        if self.is_sparse {
            bindings.push(Binding::read("sparse_index", "u32"));
        }
        bindings.push(Binding::read("row_affine", "vec2<f32>"));
        bindings
    }

    /// The widest vector that units of codes are made of, and its words.
    fn vector(&self) -> (&'static str, usize) {
        match self.unit_words() {
            words if words.is_multiple_of(4) => ("vec4<u32>", 4),
            words if words.is_multiple_of(2) => ("vec2<u32>", 2),
            _ => ("u32", 1),
        }
    }

    /// The module that stands before a kernel. Fetching stands apart from decoding, so that a kernel can do other work in between.
    pub(super) fn module(&self) -> String {
        // Selected, not indexed: compilers make branches of a vector's component that they do not know.
        let quads = match self.arithmetic {
            GpuArithmetic::Exact => {
                ("vec4<f32>", "select(select(quad.x, quad.y, i == 1u), select(quad.z, quad.w, i == 3u), i >= 2u)")
            }
            GpuArithmetic::Half => {
                ("vec2<u32>", "unpack2x16float(select(quad.x, quad.y, i >= 2u) >> (16u * (i & 1u))).x")
            }
        };
        let (scales, scale) = match self.scale {
            Scale::None => ("u32", "1.0"),
            Scale::Quads => quads,
            Scale::E8M0 => ("u32", "e8m0_scale((quad >> (8u * i)) & 255u)"),
            Scale::E4M3 => ("u32", "e4m3_scale((quad >> (8u * i)) & 255u)"),
        };
        let (offsets, offset) = if self.offset == Offset::None { ("u32", "0.0") } else { quads };
        let fetch = |buffer: &str, exists: bool| if exists { format!("{buffer}[index]") } else { "0u".into() };
        format!(
            "const WORDS = {}u;\nconst SCALED = {};\nconst ZEROED = {};\nconst BIASED = {};\nconst GROUP = {}u;\nconst HALVED = {};\n\
             alias Scales = {scales};\nalias Offsets = {offsets};\n\
             fn fetch_scales(index: u32) -> Scales {{ return {}; }}\n\
             fn decode_scale(quad: Scales, i: u32) -> f32 {{ return {scale}; }}\n\
             fn fetch_offsets(index: u32) -> Offsets {{ return {}; }}\n\
             fn decode_offset(quad: Offsets, i: u32) -> f32 {{ return {offset}; }}\n\
             {}{}",
            self.unit_words(),
            self.scale != Scale::None,
            self.offset == Offset::Zero,
            self.offset == Offset::Bias,
            self.group.unwrap_or(u32::MAX),
            self.group.is_some_and(|cols| !cols.is_multiple_of(UNIT as u32)),
            fetch("scales", self.scale != Scale::None),
            fetch("offsets", self.offset != Offset::None),
            self.fetch_codes(),
            self.decode_codes(),
        )
    }

    /// A unit's codes as they are stored, and the function that fetches them.
    fn fetch_codes(&self) -> String {
        let (vector, width) = self.vector();
        let vectors = self.unit_words() / width;
        let mut members: Vec<_> = (0..vectors).map(|i| format!("v{i}: {vector}")).collect();
        let mut values: Vec<_> = (0..vectors).map(|i| format!("codes[{vectors}u * index + {i}u]")).collect();
        if self.is_sparse {
            members.push("kept: u32".into());
            values.push("sparse_index[index]".into());
        }
        format!(
            "struct Codes {{ {} }}\n\
             fn fetch_codes(shape: Shape, row: u32, unit: u32) -> Codes {{\n\
             let index = (first_row(shape) + row) * units_of(shape) + unit;\nreturn Codes({});\n}}\n",
            members.join(", "),
            values.join(", "),
        )
    }

    /// The function that decodes a unit. Written out pair by pair, so that compilers keep its results in registers.
    fn decode_codes(&self) -> String {
        let mut code = String::from("fn decode_codes(codes: Codes, zeros: vec2<f32>) -> array<pair, 16> {\n");
        let (_, width) = self.vector();
        for word in 0..self.unit_words() {
            let component = if width == 1 { String::new() } else { format!("[{}]", word % width) };
            // Writing to a string does not fail.
            let _ = writeln!(code, "let w{word} = codes.v{}{component};", word / width);
        }
        if matches!(self.element, Element::Uint(_) | Element::Int(_)) {
            self.write_integer_starts(&mut code);
        }
        let pairs: Vec<String> = if self.is_sparse {
            self.write_sparse(&mut code);
            (0..16).map(|pair| format!("d{pair}")).collect()
        } else {
            (0..16).map(|pair| self.pair(pair, pair < 8)).collect()
        };
        let _ = writeln!(code, "return array<pair, 16>({});\n}}", pairs.join(", "));
        code
    }

    /// Spreads the 8 stored pairs of a 2:4 sparse unit over its 16 pairs.
    fn write_sparse(&self, code: &mut String) {
        for octet in 0..4 {
            let _ = writeln!(code, "let a{octet} = {};", self.pair(2 * octet, octet < 2));
            let _ = writeln!(code, "let b{octet} = {};", self.pair(2 * octet + 1, octet < 2));
            let _ = writeln!(
                code,
                "let k{octet} = (vec2<u32>(codes.kept) >> vec2<u32>({}u, {}u)) & vec2<u32>(15u);",
                8 * octet,
                8 * octet + 4
            );
            for i in 0..4 {
                let _ = writeln!(
                    code,
                    "let d{} = select(select(pair(), b{octet}, (k{octet} >> vec2<u32>(2u)) == vec2<u32>({i}u)), a{octet}, \
                     (k{octet} & vec2<u32>(3u)) == vec2<u32>({i}u));",
                    4 * octet + i
                );
            }
        }
    }

    /// The expression for a stored pair; `low` if it lies in the first half of its unit.
    fn pair(&self, pair: usize, low: bool) -> String {
        let bits = self.element.bits();
        match self.element {
            Element::F32 => format!("pair(vec2<f32>(bitcast<f32>(w{}), bitcast<f32>(w{})))", 2 * pair, 2 * pair + 1),
            Element::Bf16 => {
                format!("pair(vec2<f32>(bitcast<f32>(w{pair} << 16u), bitcast<f32>(w{pair} & 0xffff0000u)))")
            }
            Element::F16 => format!("to_pair(w{pair})"),
            Element::E2M1 => format!("to_pair(e2m1_halves(w{}, {}u))", pair / 4, pair % 4),
            Element::E4M3 => format!("to_pair(e4m3_halves({}))", self.codes_of_pair(pair, bits)),
            Element::Iq4Nl => format!("iq4_nl_pair({})", self.codes_of_pair(pair, bits)),
            Element::Uint(_) | Element::Int(_) => {
                let half = if low { "low" } else { "high" };
                match integer_place(pair, bits) {
                    Some((source, 0)) => format!("to_pair(({source} & {:#x}u) | 0x64006400u) - {half}_0", ones(bits)),
                    Some((source, bit)) => format!(
                        "fma(to_pair(({source} & {:#x}u) | 0x64006400u), pair(num({:?})), -{half}_{bit})",
                        ones(bits) << bit,
                        1.0 / f32::from(1u16 << bit)
                    ),
                    None => format!("to_pair({} | 0x64006400u) - {half}_0", self.codes_of_pair(pair, bits)),
                }
            }
        }
    }

    /// Integers become bits of the mantissa of 1024 in half precision: at bit `b` they add their product with 2^b, so that this sum over 2^b, less
    /// 1024 over 2^b and the zero point, is their value, to the bit. Writes what is subtracted in each half of the unit, and words shifted for
    /// all codes that lie too high.
    fn write_integer_starts(&self, code: &mut String) {
        let bits = self.element.bits();
        let center = if matches!(self.element, Element::Int(_)) { 1u32 << (bits - 1) } else { 0 };
        let pairs = if self.is_sparse { 8 } else { 16 };
        let places: Vec<_> = (0..pairs).filter_map(|pair| integer_place(pair, bits)).collect();
        let places_bits: BTreeSet<u32> = places.iter().map(|(_, bit)| *bit).chain([0]).collect();
        // Writing to a string does not fail.
        for bit in places_bits {
            let start = (1024 >> bit) + center;
            let _ = writeln!(code, "let low_{bit} = pair(num({start}.0 + zeros.x));");
            let _ = writeln!(code, "let high_{bit} = pair(num({start}.0 + zeros.y));");
        }
        if !places.is_empty() {
            (0..self.unit_words()).for_each(|word| {
                let _ = writeln!(code, "let upper{word} = w{word} >> 8u;");
            });
        }
    }

    /// The expression for the codes of a pair, in the last bits of the halves of a word.
    fn codes_of_pair(&self, pair: usize, bits: u32) -> String {
        let pairs = if self.is_sparse { 8 } else { 16 };
        let (mut first_word, mut shift) = (0, 0);
        let mut terms = Vec::new();
        for width in planes(bits) {
            let pairs_of_word = 16 / width as usize;
            let word = first_word + pair / pairs_of_word;
            let plane = format!("((w{word} >> {}u) & {:#x}u)", width as usize * (pair % pairs_of_word), ones(width));
            terms.push(if shift == 0 { plane } else { format!("({plane} << {shift}u)") });
            first_word += pairs / pairs_of_word;
            shift += width;
        }
        terms.join(" | ")
    }
}

/// Ones in the last bits of both halves of a word.
fn ones(bits: u32) -> u32 {
    ((1 << bits) - 1) * 0x0001_0001
}

/// Where a pair of integer codes lies within the 10 bits of a mantissa: the word, or the word shifted by 8, and its first bit. Not for codes of
/// several planes, nor for those of 8 bits.
fn integer_place(pair: usize, bits: u32) -> Option<(String, u32)> {
    if !matches!(bits, 2 | 4) {
        return None;
    }
    let pairs_of_word = 16 / bits as usize;
    let (word, bit) = (pair / pairs_of_word, bits * (pair % pairs_of_word) as u32);
    Some(if bit + bits <= 10 { (format!("w{word}"), bit) } else { (format!("upper{word}"), bit - 8) })
}

/// Whether the device reads a scheme as it is.
fn is_native(scheme: &Scheme, arithmetic: GpuArithmetic) -> bool {
    let whole_halves = |cols: u32| cols.is_multiple_of(UNIT as u32 / 2);
    let groups = match scheme.grouping {
        Grouping::Tensor | Grouping::Row => true,
        Grouping::Columns(cols) | Grouping::Block { cols, .. } => whole_halves(cols),
    };
    let is_sparse = scheme.sparsity == Sparsity::TwoOfFour;
    // Biases would reach pruned weights, and planes of single bits would not be whole words.
    let sparsity = !is_sparse
        || matches!(scheme.zero, ZeroKind::None | ZeroKind::Integer) && scheme.element.bits().is_multiple_of(2);
    // Half precision has no room for the exponents of the others, which get a power of two for each row.
    let element = arithmetic == GpuArithmetic::Exact || !scheme.element.is_dense();
    // Columns with an index are put into the order of their groups; under 2:4 they would leave their fours.
    let order = scheme.order == ColumnOrder::Natural || !is_sparse;
    groups && sparsity && element && order
}
