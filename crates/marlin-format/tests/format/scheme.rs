//! Schemes: sizes, names, JSON, and what is refused.

use marlin_format::{ColumnOrder, Element, Format, FormatError, Grouping, ScaleKind, Scheme, Sparsity, ZeroKind};

fn grouped(element: Element, columns: u32) -> Scheme {
    Scheme::scaled(element, Grouping::Columns(columns), ScaleKind::F16)
}

fn q4_k() -> Scheme {
    Scheme {
        zero: ZeroKind::TwoLevelMin { bits: 6 },
        ..Scheme::scaled(
            Element::Uint(4),
            Grouping::Columns(32),
            ScaleKind::TwoLevel { bits: 6, signed: false, super_group: 256 },
        )
    }
}

#[test]
fn sizes_are_counted_by_hand() {
    // codes, scales, zeros, globals, group index, 2:4 metadata of [5, 100].
    let cases = [
        (Scheme::BF16, [5 * 200, 0, 0, 0, 0, 0]),
        (Scheme::F32, [5 * 400, 0, 0, 0, 0, 0]),
        (Format::Fp4.scheme(None).unwrap(), [5 * 50, 5 * 2, 0, 0, 0, 0]),
        (Format::Fp4.scheme(Some(Grouping::Columns(32))).unwrap(), [5 * 50, 5 * 4 * 2, 0, 0, 0, 0]),
        (Format::Fp4.scheme(Some(Grouping::Row)).unwrap(), [5 * 50, 5 * 2, 0, 0, 0, 0]),
        (Format::Int8.scheme(Some(Grouping::Row)).unwrap(), [500, 5 * 2, 0, 0, 0, 0]),
        (Format::Fp4.scheme(Some(Grouping::Tensor)).unwrap(), [5 * 50, 4, 0, 0, 0, 0]),
        // 100 · 3 bits are 37½ bytes; two groups of 3 bits take one byte of zero points.
        (Format::Int3.scheme(None).unwrap(), [5 * 38, 5 * 2 * 2, 5, 0, 0, 0]),
        // Four groups of 2 bits take one byte.
        (Format::Int2.scheme(None).unwrap(), [5 * 25, 5 * 4 * 2, 5, 0, 0, 0]),
        (Format::Fp8.scheme(None).unwrap(), [500, 5 * 4, 0, 0, 0, 0]),
        (Format::Fp8.scheme(Some(Grouping::Tensor)).unwrap(), [500, 4, 0, 0, 0, 0]),
        (Format::Fp8.scheme("2x64".parse().ok()).unwrap(), [500, 3 * 2 * 4, 0, 0, 0, 0]),
        (Scheme::MXFP4, [5 * 50, 5 * 4, 0, 0, 0, 0]),
        (Scheme::NVFP4, [5 * 50, 5 * 7, 0, 4, 0, 0]),
        // Four groups of 6 bits take three bytes; one super-group has two f16.
        (q4_k(), [5 * 50, 5 * 3, 5 * 3, 5 * 2 * 2, 0, 0]),
        (Scheme { order: ColumnOrder::GroupIndex, ..grouped(Element::Int(4), 128) }, [5 * 50, 5 * 2, 0, 0, 400, 0]),
        // 25 quadruples of four bits take 13 bytes a row.
        (Scheme { sparsity: Sparsity::TwoOfFour, ..Scheme::BF16 }, [5 * 100, 0, 0, 0, 0, 5 * 13]),
        (Scheme { zero: ZeroKind::F32Bias, ..grouped(Element::Uint(5), 64) }, [5 * 63, 5 * 2 * 2, 5 * 2 * 4, 0, 0, 0]),
    ];
    for (scheme, wanted) in cases {
        let found = [
            scheme.codes_bytes(5, 100),
            scheme.scales_bytes(5, 100),
            scheme.zeros_bytes(5, 100),
            scheme.globals_bytes(5, 100),
            scheme.group_index_bytes(5, 100),
            scheme.sparse_index_bytes(5, 100),
        ];
        assert_eq!(found.map(Result::unwrap), wanted, "{scheme}");
        let total: usize = wanted.iter().sum();
        assert_eq!(scheme.packed_bytes(5, 100).unwrap(), total);
        assert_eq!(scheme.bits_per_weight(5, 100), total as f64 * 8.0 / 500.0);
        assert_eq!(scheme.code_row_bytes(100).unwrap() * 5, wanted[0]);
    }
}

#[test]
fn published_bits_per_weight() {
    let q6_k = Scheme::scaled(
        Element::Int(6),
        Grouping::Columns(16),
        ScaleKind::TwoLevel { bits: 8, signed: true, super_group: 256 },
    );
    for (scheme, bits) in [(q4_k(), 4.5), (q6_k, 6.5625), (grouped(Element::Int(8), 32), 8.5), (Scheme::MXFP4, 4.25)] {
        assert_eq!(scheme.bits_per_weight(4096, 4096), bits, "{scheme}");
    }
    assert!(Scheme::BF16.bits_per_weight(0, 5).is_nan());
}

#[test]
fn names_are_short() {
    let name = |format: Format, grouping: Option<&str>| {
        format.scheme(grouping.map(|text| text.parse().unwrap())).unwrap().to_string()
    };
    assert_eq!(name(Format::Bf16, None), "bf16");
    assert_eq!(name(Format::Fp4, None), "fp4 g128");
    assert_eq!(name(Format::Fp4, Some("row")), "fp4 row");
    assert_eq!(name(Format::Int4, None), "int4 g128");
    assert_eq!(name(Format::Int4Sym, Some("32")), "int4-sym g32");
    assert_eq!(name(Format::Int8, None), "int8 g128");
    assert_eq!(name(Format::Fp8, None), "fp8 row");
    assert_eq!(name(Format::Fp8, Some("128x128")), "fp8 128x128");
    assert_eq!(name(Format::Int3, None), "int3 g64");
    assert_eq!(name(Format::Int2, None), "int2 g32");
    assert_eq!(name(Format::Mxfp4, None), "mxfp4");
    assert_eq!(name(Format::Nvfp4, Some("16")), "nvfp4");
    let fine = Scheme { scale: ScaleKind::F32, ..Format::Fp4.scheme(Some(Grouping::Row)).unwrap() };
    assert_eq!(fine.to_string(), "fp4 row f32 scales");
    assert_eq!(q4_k().to_string(), "u4 g32 6-bit scales per 256 - 6-bit minima");
    let mlx = Scheme { scale: ScaleKind::Bf16, zero: ZeroKind::Bf16Bias, ..grouped(Element::Uint(4), 64) };
    assert_eq!(mlx.to_string(), "u4 g64 bf16 scales + bf16 bias");
    let sparse =
        Scheme { sparsity: Sparsity::TwoOfFour, order: ColumnOrder::GroupIndex, ..grouped(Element::Int(4), 128) };
    assert_eq!(sparse.to_string(), "int4-sym g128, group index, 2:4");
}

#[test]
fn formats_and_groupings_read_what_they_write() {
    for format in Format::ALL {
        assert_eq!(format.to_string().parse(), Ok(format));
        format.scheme(None).unwrap().validate().unwrap();
        assert_eq!(format.is_dense(), format.scheme(None).unwrap().is_dense());
    }
    for text in ["32", "row", "tensor", "128x128", "1x4096"] {
        assert_eq!(text.parse::<Grouping>().unwrap().to_string(), text);
    }
    for text in ["", "0", "-1", "128x", "x128", "0x8", "8x0", "rows", "1.5", "99999999999"] {
        assert_eq!(text.parse::<Grouping>(), Err(FormatError::UnknownGrouping(text.into())));
    }
    let error = "fp5".parse::<Format>().unwrap_err().to_string();
    assert!(error.starts_with("unknown format 'fp5'; known are fp4, int4, int4-sym"), "{error}");
    let error = Format::Mxfp4.scheme(Some(Grouping::Columns(64))).unwrap_err();
    assert_eq!(error.to_string(), "mxfp4 has no group size '64'; it can have 32 only");
    assert!(Format::Bf16.scheme(Some(Grouping::Tensor)).is_err());
    assert!(Format::Fp4.scheme(Some(Grouping::Columns(0))).is_err());
}

#[test]
fn json_round_trips() {
    let mut schemes: Vec<Scheme> = Format::ALL.map(|format| format.scheme(None).unwrap()).to_vec();
    schemes.extend([
        q4_k(),
        Scheme { order: ColumnOrder::GroupIndex, sparsity: Sparsity::TwoOfFour, ..grouped(Element::Int(4), 128) },
        Scheme { zero: ZeroKind::Bf16Bias, scale: ScaleKind::Bf16, ..grouped(Element::Uint(6), 64) },
        Format::Fp8.scheme("128x128".parse().ok()).unwrap(),
        Scheme::scaled(Element::Iq4Nl, Grouping::Row, ScaleKind::F32),
    ]);
    for scheme in schemes {
        let json = serde_json::to_string(&scheme).unwrap();
        assert_eq!(serde_json::from_str::<Scheme>(&json).unwrap(), scheme, "{json}");
    }
    assert_eq!(serde_json::to_string(&Scheme::BF16).unwrap(), r#"{"element":"bf16"}"#);
    assert_eq!(
        serde_json::to_string(&Format::Int4.scheme(None).unwrap()).unwrap(),
        r#"{"element":{"uint":4},"grouping":{"columns":128},"scale":"f16","zero":"integer"}"#
    );
    assert!(serde_json::from_str::<Scheme>(r#"{"element":"bf16","group":32}"#).is_err());
    assert!(serde_json::from_str::<Scheme>(r#"{"element":"e3m0"}"#).is_err());
}

#[test]
fn contradictions_are_refused() {
    let tensor = |element, scale| Scheme::scaled(element, Grouping::Tensor, scale);
    let two_level = |bits, super_group| ScaleKind::TwoLevel { bits, signed: false, super_group };
    let cases = [
        (grouped(Element::Uint(1), 32), "integers have 2 to 8 bits, found 1"),
        (grouped(Element::Int(9), 32), "integers have 2 to 8 bits, found 9"),
        (grouped(Element::E2M1, 0), "a group of 0 columns"),
        (tensor(Element::Bf16, ScaleKind::F32), "bf16 weights have no scale"),
        (Scheme { grouping: Grouping::Block { rows: 0, cols: 8 }, ..grouped(Element::E4M3, 1) }, "a tile of 0 × 8"),
        (Scheme { scale: ScaleKind::None, ..grouped(Element::E4M3, 32) }, "groups (32) without scales"),
        (Scheme { zero: ZeroKind::Integer, ..tensor(Element::Uint(4), ScaleKind::None) }, "zero points without scales"),
        (Scheme { zero: ZeroKind::Integer, ..grouped(Element::E2M1, 32) }, "integer zero points for fp4 codes"),
        (
            Scheme { zero: ZeroKind::TwoLevelMin { bits: 6 }, ..grouped(Element::Uint(4), 32) },
            "two-level minima without",
        ),
        (
            Scheme { order: ColumnOrder::GroupIndex, ..tensor(Element::Int(4), ScaleKind::F32) },
            "a group index needs groups",
        ),
        (tensor(Element::Uint(4), two_level(6, 256)), "two-level scales need groups along columns"),
        (Scheme { scale: two_level(6, 100), ..grouped(Element::Uint(4), 32) }, "no multiple of the group of 32"),
        (Scheme { scale: two_level(6, 0), ..grouped(Element::Uint(4), 32) }, "no multiple of the group of 32"),
        (Scheme { scale: two_level(9, 256), ..grouped(Element::Uint(4), 32) }, "2 to 8 bits, found 9"),
        (Scheme { zero: ZeroKind::TwoLevelMin { bits: 0 }, ..q4_k() }, "minima have 2 to 8 bits, found 0"),
    ];
    for (scheme, message) in cases {
        let error = scheme.validate().unwrap_err().to_string();
        assert!(error.starts_with("invalid scheme: ") && error.contains(message), "{error}");
        assert!(scheme.packed_bytes(4, 64).is_err());
    }
}

#[test]
fn impossible_shapes_are_refused() {
    let sparse = Scheme { sparsity: Sparsity::TwoOfFour, ..Scheme::BF16 };
    assert_eq!(sparse.packed_bytes(4, 10), Err(FormatError::SparseColumns { cols: 10 }));
    assert_eq!(Scheme::BF16.packed_bytes(0, 10), Err(FormatError::Empty { rows: 0, cols: 10 }));
    for format in Format::ALL {
        let scheme = format.scheme(None).unwrap();
        for (rows, cols) in [(usize::MAX, usize::MAX), (1, usize::MAX), (usize::MAX, 1), (1 << 40, 1 << 40)] {
            assert_eq!(scheme.packed_bytes(rows, cols), Err(FormatError::TooLarge { rows, cols }), "{scheme}");
        }
    }
    assert_eq!(grouped(Element::E2M1, 0).groups_per_row(8), 0);
}
