//! Published checkpoint layouts as values of `Scheme`: each test packs random codes bit by bit, and compares decoding
//! with the layout's own formula.

use crate::common::Random;
use half::{bf16, f16};
use marlin_format::{ColumnOrder, Element, Grouping, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind};

const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// A table of random numbers below `2^bits`.
fn random_codes(random: &mut Random, rows: usize, cols: usize, bits: u32) -> Vec<Vec<u32>> {
    (0..rows).map(|_| (0..cols).map(|_| random.bits() as u32 & ((1 << bits) - 1)).collect()).collect()
}

/// A table of random halves, both signs, none of them 0.
fn random_halves(random: &mut Random, rows: usize, cols: usize) -> Vec<Vec<f16>> {
    let half = |random: &mut Random| {
        f16::from_f64((random.uniform() + 0.1) * if random.bits() & 1 == 1 { 0.01 } else { -0.01 })
    };
    (0..rows).map(|_| (0..cols).map(|_| half(random)).collect()).collect()
}

/// Rows of codes as the canonical bit stream, one bit at a time.
fn pack(rows: &[Vec<u32>], bits: u32) -> Vec<u8> {
    let mut packed = Vec::new();
    for row in rows {
        let mut bytes = vec![0; (row.len() * bits as usize).div_ceil(8)];
        for (index, code) in row.iter().enumerate() {
            for bit in 0..bits as usize {
                let position = index * bits as usize + bit;
                bytes[position / 8] |= ((code >> bit & 1) as u8) << (position % 8);
            }
        }
        packed.extend(bytes);
    }
    packed
}

fn halves(rows: &[Vec<f16>]) -> Vec<u8> {
    rows.iter().flatten().flat_map(|value| value.to_le_bytes()).collect()
}

fn matrix(scheme: Scheme, rows: usize, cols: usize) -> PackedMatrix<'static> {
    let none = || std::borrow::Cow::Borrowed(&[][..]);
    PackedMatrix {
        rows,
        cols,
        scheme,
        codes: none(),
        scales: none(),
        zeros: none(),
        globals: none(),
        group_index: none(),
        sparse_index: none(),
    }
}

/// Decodes and compares every weight, to the bit, with `weight(row, col)`.
fn check(matrix: &PackedMatrix<'_>, weight: impl Fn(usize, usize) -> f32) {
    matrix.validate().unwrap();
    let decoded = matrix.decode();
    for row in 0..matrix.rows {
        for col in 0..matrix.cols {
            let (found, wanted) = (decoded[row * matrix.cols + col], weight(row, col));
            assert_eq!(found, wanted, "{} [{row}, {col}]", matrix.scheme);
        }
    }
}

/// w = s[g]·(q − z), columns in any order of groups.
#[test]
fn gptq() {
    for bits in [2, 3, 4, 8u8] {
        let mut random = Random(u64::from(bits));
        let (rows, cols, group) = (5, 75, 32);
        let width = u32::from(bits);
        let codes = random_codes(&mut random, rows, cols, width);
        let zeros = random_codes(&mut random, rows, 3, width);
        let scales = random_halves(&mut random, rows, 3);
        let group_index: Vec<u32> = (0..cols).map(|_| random.bits() as u32 % 3).collect();
        let scheme = Scheme {
            zero: ZeroKind::Integer,
            order: ColumnOrder::GroupIndex,
            ..Scheme::scaled(Element::Uint(bits), Grouping::Columns(group), ScaleKind::F16)
        };
        let packed = PackedMatrix {
            codes: pack(&codes, width).into(),
            scales: halves(&scales).into(),
            zeros: pack(&zeros, width).into(),
            group_index: group_index.iter().flat_map(|g| g.to_le_bytes()).collect::<Vec<_>>().into(),
            ..matrix(scheme, rows, cols)
        };
        check(&packed, |row, col| {
            let group = group_index[col] as usize;
            scales[row][group].to_f32() * (codes[row][col] as i32 - zeros[row][group] as i32) as f32
        });
        assert_eq!(packed.zero_at(4, 2), zeros[4][2] as i32);
        assert_eq!(packed.group_of(7), group_index[7] as usize);
    }
}

/// AWQ is GPTQ in natural order; compressed-tensors stores signed codes and zero points with an offset, and scales as
/// bf16.
#[test]
fn awq_and_compressed_tensors() {
    let mut random = Random(20);
    let (rows, cols) = (3, 300);
    let codes = random_codes(&mut random, rows, cols, 4);
    let zeros = random_codes(&mut random, rows, 3, 4);
    let scales = random_halves(&mut random, rows, 3);
    let groups = Grouping::Columns(128);
    let zero = ZeroKind::Integer;
    let packed = PackedMatrix {
        codes: pack(&codes, 4).into(),
        scales: halves(&scales).into(),
        zeros: pack(&zeros, 4).into(),
        ..matrix(Scheme { zero, ..Scheme::scaled(Element::Uint(4), groups, ScaleKind::F16) }, rows, cols)
    };
    let formula =
        |row: usize, col: usize, scale: f32| scale * (codes[row][col] as i32 - zeros[row][col / 128] as i32) as f32;
    check(&packed, |row, col| formula(row, col, scales[row][col / 128].to_f32()));

    let bf16_scales: Vec<u8> = scales.iter().flatten().flat_map(|s| bf16::from_f32(s.to_f32()).to_le_bytes()).collect();
    let signed = PackedMatrix {
        scheme: Scheme { zero, ..Scheme::scaled(Element::Int(4), groups, ScaleKind::Bf16) },
        scales: bf16_scales.into(),
        ..packed
    };
    // The offset of 8 is on both sides of the difference.
    check(&signed, |row, col| formula(row, col, bf16::from_f32(scales[row][col / 128].to_f32()).to_f32()));
    assert_eq!(signed.zero_at(1, 1), zeros[1][1] as i32 - 8);
}

/// w = s·q + bias, with scales of either sign.
#[test]
fn mlx_affine() {
    for bits in [2, 3, 4, 5, 6, 8u8] {
        let mut random = Random(u64::from(bits) + 30);
        let (rows, cols) = (4, 192);
        let codes = random_codes(&mut random, rows, cols, u32::from(bits));
        let scales = random_halves(&mut random, rows, 3);
        let biases = random_halves(&mut random, rows, 3);
        let base = Scheme::scaled(Element::Uint(bits), Grouping::Columns(64), ScaleKind::F16);
        let packed = PackedMatrix {
            codes: pack(&codes, u32::from(bits)).into(),
            scales: halves(&scales).into(),
            zeros: halves(&biases).into(),
            ..matrix(Scheme { zero: ZeroKind::F16Bias, ..base }, rows, cols)
        };
        check(&packed, |row, col| {
            scales[row][col / 64].to_f32() * codes[row][col] as f32 + biases[row][col / 64].to_f32()
        });

        let wide: Vec<u8> = biases.iter().flatten().flat_map(|bias| bias.to_f32().to_le_bytes()).collect();
        let decoded = packed.decode();
        let packed = PackedMatrix { scheme: Scheme { zero: ZeroKind::F32Bias, ..base }, zeros: wide.into(), ..packed };
        assert_eq!(packed.decode(), decoded);
        let short: Vec<bf16> = biases.iter().flatten().map(|bias| bf16::from_f32(bias.to_f32())).collect();
        let packed = PackedMatrix {
            scheme: Scheme { zero: ZeroKind::Bf16Bias, ..base },
            zeros: short.iter().flat_map(|bias| bias.to_le_bytes()).collect::<Vec<_>>().into(),
            ..packed
        };
        check(&packed, |row, col| {
            scales[row][col / 64].to_f32() * codes[row][col] as f32 + short[row * 3 + col / 64].to_f32()
        });
    }
}

/// Low nibble first; scale 2^(e − 127).
#[test]
fn mxfp4_and_mxfp8() {
    let mut random = Random(40);
    let (rows, cols) = (3, 80);
    let exponents: Vec<u8> = vec![0, 1, 110, 127, 128, 140, 200, 2, 100];
    let codes = random_codes(&mut random, rows, cols, 4);
    let nibbles: Vec<u8> =
        codes.iter().flat_map(|row| row.chunks(2).map(|pair| (pair[0] | pair[1] << 4) as u8)).collect();
    let packed =
        PackedMatrix { codes: nibbles.into(), scales: exponents.clone().into(), ..matrix(Scheme::MXFP4, rows, cols) };
    let scale = |row: usize, col: usize| 2f64.powi(i32::from(exponents[row * 3 + col / 32]) - 127) as f32;
    check(&packed, |row, col| scale(row, col) * E2M1[codes[row][col] as usize]);

    // Without NaN codes, and magnitudes that 2^73 keeps finite.
    let codes: Vec<Vec<u32>> = random_codes(&mut random, rows, cols, 8)
        .into_iter()
        .map(|row| row.iter().map(|c| c & 0xbf).collect())
        .collect();
    let packed = PackedMatrix {
        codes: pack(&codes, 8).into(),
        scheme: Scheme::scaled(Element::E4M3, Grouping::Columns(32), ScaleKind::E8M0),
        ..packed
    };
    check(&packed, |row, col| scale(row, col) * e4m3(codes[row][col]));
}

fn e4m3(code: u32) -> f32 {
    let (exponent, mantissa) = (code as i32 >> 3 & 15, (code & 7) as f32);
    let magnitude = if exponent == 0 { mantissa * 2f32.powi(-9) } else { (8.0 + mantissa) * 2f32.powi(exponent - 10) };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// w = fp4 · scale · global. (Where a checkpoint divides, its global scale is inverted when it is read.)
#[test]
fn nvfp4() {
    let mut random = Random(41);
    let (rows, cols) = (3, 40);
    let codes = random_codes(&mut random, rows, cols, 4);
    let scales = random_codes(&mut random, rows, 3, 6);
    let global = 1.0f32 / 448.0;
    let packed = PackedMatrix {
        codes: pack(&codes, 4).into(),
        scales: pack(&scales, 8).into(),
        globals: global.to_le_bytes().to_vec().into(),
        ..matrix(Scheme::NVFP4, rows, cols)
    };
    check(&packed, |row, col| e4m3(scales[row][col / 16]) * global * E2M1[codes[row][col] as usize]);
}

/// FP8 per tensor, per channel, and in blocks of which the last ones are partial.
#[test]
fn fp8() {
    let mut random = Random(42);
    let (rows, cols) = (9, 11);
    let codes: Vec<Vec<u32>> = random_codes(&mut random, rows, cols, 8)
        .into_iter()
        .map(|row| row.iter().map(|c| c & 0xf7).collect())
        .collect();
    let scales: Vec<f32> = (0..9).map(|_| random.uniform() as f32).collect();
    let bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
    let build = |grouping, count: usize| PackedMatrix {
        codes: pack(&codes, 8).into(),
        scales: bytes[..count * 4].to_vec().into(),
        ..matrix(Scheme::scaled(Element::E4M3, grouping, ScaleKind::F32), rows, cols)
    };
    check(&build(Grouping::Tensor, 1), |row, col| scales[0] * e4m3(codes[row][col]));
    check(&build(Grouping::Row, 9), |row, col| scales[row] * e4m3(codes[row][col]));
    let block = build(Grouping::Block { rows: 4, cols: 4 }, 9);
    check(&block, |row, col| scales[row / 4 * 3 + col / 4] * e4m3(codes[row][col]));

    let unscaled = Scheme::scaled(Element::E4M3, Grouping::Tensor, ScaleKind::None);
    let mut codes = pack(&codes, 8);
    codes[5] = 0x7f;
    let packed = PackedMatrix { codes: codes.into(), ..matrix(unscaled, rows, cols) };
    packed.validate().unwrap();
    assert!(packed.decode()[5].is_nan());
    assert_eq!(packed.decode()[6], e4m3(packed.code(0, 6)));
}

/// Symmetric integers in blocks of tiles with 2 bits of zero point: tiles × every other part.
#[test]
fn integer_blocks_with_zero_points() {
    let mut random = Random(43);
    let (rows, cols) = (5, 13);
    let codes = random_codes(&mut random, rows, cols, 3);
    let zeros = random_codes(&mut random, 3, 4, 3);
    let scales = random_halves(&mut random, 3, 4);
    let scheme = Scheme {
        zero: ZeroKind::Integer,
        ..Scheme::scaled(Element::Uint(3), Grouping::Block { rows: 2, cols: 4 }, ScaleKind::F16)
    };
    let packed = PackedMatrix {
        codes: pack(&codes, 3).into(),
        scales: halves(&scales).into(),
        zeros: pack(&zeros, 3).into(),
        ..matrix(scheme, rows, cols)
    };
    check(&packed, |row, col| {
        scales[row / 2][col / 4].to_f32() * (codes[row][col] as f32 - zeros[row / 2][col / 4] as f32)
    });
}

/// GGUF Q4_0 and Q8_0 (w = d·(q − 8), w = d·q) and IQ4_NL (w = d·table[q]).
#[test]
fn gguf_one_level() {
    let mut random = Random(44);
    let (rows, cols) = (2, 96);
    let scales = random_halves(&mut random, rows, 3);
    let groups = Grouping::Columns(32);
    let build = |element: Element, codes: &[Vec<u32>]| PackedMatrix {
        codes: pack(codes, element.bits()).into(),
        scales: halves(&scales).into(),
        ..matrix(Scheme::scaled(element, groups, ScaleKind::F16), rows, cols)
    };
    let codes = random_codes(&mut random, rows, cols, 4);
    let d = |row: usize, col: usize| scales[row][col / 32].to_f32();
    check(&build(Element::Int(4), &codes), |row, col| d(row, col) * (codes[row][col] as f32 - 8.0));
    let table = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
    check(&build(Element::Iq4Nl, &codes), |row, col| d(row, col) * table[codes[row][col] as usize] as f32);
    let bytes = random_codes(&mut random, rows, cols, 8);
    // Q8_0 stores two's complement, the canonical code has an offset of 128.
    let offset: Vec<Vec<u32>> = bytes.iter().map(|row| row.iter().map(|byte| byte ^ 0x80).collect()).collect();
    check(&build(Element::Int(8), &offset), |row, col| d(row, col) * f32::from(bytes[row][col] as u8 as i8));
}

/// GGUF Q4_K: w = d·sc·q − dmin·m, six-bit sc and m for 32 weights, d and dmin for 256.
#[test]
fn gguf_q4_k() {
    let mut random = Random(45);
    let (rows, cols) = (3, 512);
    let codes = random_codes(&mut random, rows, cols, 4);
    let inner_scales = random_codes(&mut random, rows, 16, 6);
    let inner_minima = random_codes(&mut random, rows, 16, 6);
    let d = random_halves(&mut random, rows, 2);
    let d_min = random_halves(&mut random, rows, 2);
    let scheme = Scheme {
        zero: ZeroKind::TwoLevelMin { bits: 6 },
        ..Scheme::scaled(
            Element::Uint(4),
            Grouping::Columns(32),
            ScaleKind::TwoLevel { bits: 6, signed: false, super_group: 256 },
        )
    };
    let packed = PackedMatrix {
        codes: pack(&codes, 4).into(),
        scales: pack(&inner_scales, 6).into(),
        zeros: pack(&inner_minima, 6).into(),
        globals: [halves(&d), halves(&d_min)].concat().into(),
        ..matrix(scheme, rows, cols)
    };
    check(&packed, |row, col| {
        let scale = d[row][col / 256].to_f32() * inner_scales[row][col / 32] as f32;
        let minimum = d_min[row][col / 256].to_f32() * inner_minima[row][col / 32] as f32;
        scale * codes[row][col] as f32 - minimum
    });

    // Rows joined from parts: scales of all rows stand before minima of all rows.
    let part = |rows: std::ops::Range<usize>| PackedMatrix {
        codes: pack(&codes[rows.clone()], 4).into(),
        scales: pack(&inner_scales[rows.clone()], 6).into(),
        zeros: pack(&inner_minima[rows.clone()], 6).into(),
        globals: [halves(&d[rows.clone()]), halves(&d_min[rows.clone()])].concat().into(),
        ..matrix(scheme, rows.len(), cols)
    };
    assert_eq!(PackedMatrix::concat_rows(&[part(0..2), part(2..3)]).unwrap(), packed);
}

/// GGUF Q6_K: w = d·sc·(q − 32), eight-bit signed sc for 16 weights, d for 256.
#[test]
fn gguf_q6_k() {
    let mut random = Random(46);
    let (rows, cols) = (2, 512);
    let codes = random_codes(&mut random, rows, cols, 6);
    let inner = random_codes(&mut random, rows, 32, 8);
    let d = random_halves(&mut random, rows, 2);
    let scale = ScaleKind::TwoLevel { bits: 8, signed: true, super_group: 256 };
    let packed = PackedMatrix {
        codes: pack(&codes, 6).into(),
        scales: pack(&inner, 8).into(),
        globals: halves(&d).into(),
        ..matrix(Scheme::scaled(Element::Int(6), Grouping::Columns(16), scale), rows, cols)
    };
    check(&packed, |row, col| {
        let scale = d[row][col / 256].to_f32() * f32::from(inner[row][col / 16] as u8 as i8);
        scale * (codes[row][col] as f32 - 32.0)
    });
}

/// Two of four columns stored, the others 0 whatever the zero point.
#[test]
fn two_of_four() {
    let mut random = Random(47);
    let (rows, cols) = (4, 36);
    let pairs = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3u32]];
    let kept: Vec<Vec<[u32; 2]>> =
        (0..rows).map(|_| (0..cols / 4).map(|_| pairs[random.bits() as usize % 6]).collect()).collect();
    let metadata: Vec<Vec<u32>> =
        kept.iter().map(|row| row.iter().map(|pair| pair[0] | pair[1] << 2).collect()).collect();
    let stored = |row: usize, col: usize| {
        let position = kept[row][col / 4].iter().position(|&column| column as usize == col % 4)?;
        Some(col / 4 * 2 + position)
    };

    let codes = random_codes(&mut random, rows, cols / 2, 4);
    let scales = random_halves(&mut random, rows, 3);
    let zeros = random_codes(&mut random, rows, 3, 4);
    let scheme = Scheme {
        zero: ZeroKind::Integer,
        sparsity: Sparsity::TwoOfFour,
        ..Scheme::scaled(Element::Uint(4), Grouping::Columns(16), ScaleKind::F16)
    };
    let packed = PackedMatrix {
        codes: pack(&codes, 4).into(),
        scales: halves(&scales).into(),
        zeros: pack(&zeros, 4).into(),
        sparse_index: pack(&metadata, 4).into(),
        ..matrix(scheme, rows, cols)
    };
    check(&packed, |row, col| {
        let weight = |at: usize| (codes[row][at] as i32 - zeros[row][col / 16] as i32) as f32;
        stored(row, col).map_or(0.0, |at| scales[row][col / 16].to_f32() * weight(at))
    });

    let values = random_halves(&mut random, rows, cols / 2);
    let dense = PackedMatrix {
        codes: halves(&values).into(),
        sparse_index: pack(&metadata, 4).into(),
        ..matrix(Scheme { sparsity: Sparsity::TwoOfFour, ..Scheme::F16 }, rows, cols)
    };
    check(&dense, |row, col| stored(row, col).map_or(0.0, |at| values[row][at].to_f32()));
}
