//! Linears taken back out of tile order.

use std::borrow::Cow;

use marlin_format::{FOREIGN, bits};

use super::*;
use crate::Backend;
use crate::cpu::{CpuBackend, CpuOptions};

/// The same matrix with 0 in bits at the end of rows that no code uses.
fn without_unused_bits(matrix: &PackedMatrix<'static>) -> PackedMatrix<'static> {
    let (scheme, cols) = (&matrix.scheme, matrix.cols);
    let repacked = |bytes: &[u8], count: usize, width: u32| -> Cow<'static, [u8]> {
        let row_bytes = (count * width as usize).div_ceil(8);
        let (mut codes, mut packed) = (vec![0; count], vec![0; bytes.len()]);
        for (bytes, packed) in bytes.chunks_exact(row_bytes).zip(packed.chunks_exact_mut(row_bytes)) {
            bits::unpack(bytes, width, &mut codes);
            bits::pack(&codes, width, packed);
        }
        packed.into()
    };
    let (stored, groups) = (scheme.stored_cols(cols), scheme.groups_per_row(cols));
    let mut clean = matrix.clone();
    if !scheme.element.is_dense() {
        clean.codes = repacked(&matrix.codes, stored, scheme.element.bits());
    }
    if let ScaleKind::TwoLevel { bits, .. } = scheme.scale {
        clean.scales = repacked(&matrix.scales, groups, bits.into());
    }
    match scheme.zero {
        ZeroKind::Integer => clean.zeros = repacked(&matrix.zeros, groups, scheme.element.bits()),
        ZeroKind::TwoLevelMin { bits } => clean.zeros = repacked(&matrix.zeros, groups, bits.into()),
        _ => {}
    }
    if scheme.sparsity == Sparsity::TwoOfFour {
        clean.sparse_index = repacked(&matrix.sparse_index, stored, 2);
    }
    clean.validate().unwrap();
    clean
}

/// Checks that every level and arithmetic gives a matrix back.
fn check(weight: &PackedMatrix<'static>, threads: &Threads) {
    let wanted = without_unused_bits(weight);
    for simd in SimdLevel::available() {
        for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
            let linear = TiledLinear::load(&[part(weight)], arithmetic, simd, threads).unwrap();
            let restored = linear.restore(threads).unwrap();
            let case = format!("{} [{}, {}] {simd} {arithmetic:?}", weight.scheme, weight.rows, weight.cols);
            assert_eq!(restored.len(), 1, "{case}");
            assert_same(&restored[0].weight, &wanted, &case);
            assert_eq!(restored[0].bias, None, "{case}");
        }
    }
}

/// What differs, rather than all bytes of a matrix.
fn assert_same(found: &PackedMatrix<'_>, wanted: &PackedMatrix<'_>, case: &str) {
    assert_eq!((found.scheme, found.rows, found.cols), (wanted.scheme, wanted.rows, wanted.cols), "{case}");
    let buffers = |matrix: &PackedMatrix<'_>| {
        let PackedMatrix { codes, scales, zeros, globals, group_index, sparse_index, .. } = matrix;
        [codes, scales, zeros, globals, group_index, sparse_index].map(|buffer| buffer.to_vec())
    };
    let names = ["codes", "scales", "zeros", "globals", "group index", "sparse index"];
    for ((found, wanted), name) in buffers(found).iter().zip(&buffers(wanted)).zip(names) {
        assert_eq!(found.len(), wanted.len(), "{case}: {name}");
        let differs = found.iter().zip(wanted).position(|(found, wanted)| found != wanted);
        assert_eq!(differs, None, "{case}: first byte of {name} that differs");
    }
}

/// N and K around the borders of panels of 4, 8 and 16 rows, of chunks and of groups.
fn check_shapes(scheme: Scheme, random: &mut Random) {
    let threads = [1, 3].map(|count| Threads::new(count).unwrap());
    for (i, n) in [1, 5, 8, 17, 35].into_iter().enumerate() {
        for (j, k) in [4, 31, 33, 68, 100, 256, 300, 548].into_iter().enumerate() {
            if scheme.sparsity == Sparsity::Dense || k % 4 == 0 {
                check(&random.matrix(scheme, n, k), &threads[(i + j) % 2]);
            }
        }
    }
}

#[test]
fn every_format_comes_back_to_the_bit() {
    let mut random = Random(20);
    for format in Format::ALL {
        check_shapes(format.scheme(None).unwrap(), &mut random);
    }
    for format in Format::SPARSE {
        check_shapes(format.sparse_24(None).unwrap(), &mut random);
    }
}

#[test]
fn formats_of_other_programs_come_back_to_the_bit() {
    let mut random = Random(21);
    for (_, scheme) in FOREIGN {
        check_shapes(scheme, &mut random);
    }
}

#[test]
fn whatever_kernels_read_comes_back_to_the_bit() {
    let (mut random, threads) = (Random(22), Threads::new(2).unwrap());
    let sparse = |scheme| Scheme { sparsity: Sparsity::TwoOfFour, ..scheme };
    let native = unusual_native_schemes();
    for scheme in native.iter().copied().chain(affine_schemes()).chain(native.iter().copied().map(sparse)) {
        for (n, k) in [(1, 100), (17, 36), (9, 4), (35, 300)] {
            check(&random.matrix(scheme, n, k), &threads);
        }
    }
}

/// Among them codes of floats that compare with nothing, or as equal where bits differ.
#[test]
fn floats_keep_their_bits() {
    let (mut random, threads) = (Random(23), Threads::new(1).unwrap());
    for (scheme, bytes) in [(Scheme::F32, 4), (Scheme::F16, 2), (Scheme::BF16, 2)] {
        let codes = random.bytes(9 * 40 * bytes);
        check(&PackedMatrix::from_dense_bytes(scheme, 9, 40, codes).unwrap(), &threads);
    }
}

#[test]
fn the_scale_of_a_whole_matrix_comes_back_to_the_bit() {
    let (mut random, threads) = (Random(24), Threads::new(1).unwrap());
    let global = |element| Scheme::scaled(element, Grouping::Columns(16), ScaleKind::E4M3Global);
    for element in [Element::E2M1, Element::E4M3, Element::Int(4)] {
        let mut weight = random.matrix(global(element), 3, 40);
        let some = (0..50).map(|_| random.value() * 1e-3).collect::<Vec<_>>();
        for value in some.into_iter().chain([0.0, -0.0, 1e30, f32::MIN_POSITIVE, f32::from_bits(1), -3e-42]) {
            weight.globals = value.to_le_bytes().to_vec().into();
            check(&weight, &threads);
        }
    }
}

/// Where kernels would compute infinity, it cannot be told from which number.
#[test]
fn a_scale_beyond_what_kernels_multiply_is_an_error() {
    let threads = Threads::new(1).unwrap();
    let mut weight = Random(25).matrix(Scheme::NVFP4, 3, 40);
    weight.globals = f32::MAX.to_le_bytes().to_vec().into();
    let linear = TiledLinear::load(&[part(&weight)], Arithmetic::Exact, SimdLevel::detect(), &threads).unwrap();
    let found = linear.restore(&threads).unwrap_err().to_string();
    assert!(found.contains("matrix [3, 40] of nvfp4") && found.contains("globals value 0 is inf"), "{found}");
}

#[test]
fn what_is_converted_comes_back_in_f32() {
    let (mut random, threads) = (Random(26), Threads::new(2).unwrap());
    for scheme in converted_schemes() {
        for (n, k) in [(3, 100), (17, 256)] {
            let weight = random.matrix(scheme, n, k);
            for simd in SimdLevel::available() {
                let linear = TiledLinear::load(&[part(&weight)], Arithmetic::Int8, simd, &threads).unwrap();
                let restored = linear.restore(&threads).unwrap();
                assert_same(&restored[0].weight, &weight.to_f32().unwrap(), &format!("{scheme} [{n}, {k}] {simd}"));
            }
        }
    }
}

/// Parts of uneven heights, of which some have biases, and schemes that have nothing in common.
#[test]
fn parts_come_back_with_their_biases() {
    let mut random = Random(27);
    let schemes = [Format::Fp4, Format::Bf16, Format::Nvfp4, Format::Int3].map(|format| format.scheme(None).unwrap());
    let sparse = Format::Fp4.sparse_24(None).unwrap();
    let parts: Vec<_> = schemes
        .into_iter()
        .chain([sparse])
        .zip([17, 3, 24, 16, 40])
        .enumerate()
        .map(|(index, (scheme, n))| {
            let bias = (index % 3 != 1).then(|| (0..n).map(|_| random.value()).collect());
            LinearPart { weight: without_unused_bits(&random.matrix(scheme, n, 100)), bias }
        })
        .collect();
    for simd in SimdLevel::available() {
        for threads in [1, 3].map(|count| Threads::new(count).unwrap()) {
            let linear = TiledLinear::load(&parts, Arithmetic::Int8, simd, &threads).unwrap();
            let restored = linear.restore(&threads).unwrap();
            assert_eq!(restored.len(), parts.len());
            for (index, (found, wanted)) in restored.iter().zip(&parts).enumerate() {
                assert_same(&found.weight, &wanted.weight, &format!("part {index} {simd}"));
                assert_eq!(found.bias, wanted.bias, "part {index} {simd}");
            }
        }
    }
}

/// The part whose order all follow has its index back. Others, which were put into that order in f32, have their own order back.
#[test]
fn columns_come_back_to_their_own_order() {
    let (mut random, threads) = (Random(28), Threads::new(2).unwrap());
    let natural = Scheme::scaled(Element::Uint(4), Grouping::Columns(32), ScaleKind::F16);
    let by_index = Scheme { order: ColumnOrder::GroupIndex, zero: ZeroKind::Integer, ..natural };
    let sparse = Scheme { sparsity: Sparsity::TwoOfFour, ..natural };
    let matrices = [by_index, by_index, natural, Scheme::BF16, sparse].map(|scheme| random.matrix(scheme, 9, 100));
    for simd in SimdLevel::available() {
        let parts = matrices.each_ref().map(part);
        let linear = TiledLinear::load(&parts, Arithmetic::Exact, simd, &threads).unwrap();
        let restored = linear.restore(&threads).unwrap();
        assert_same(&restored[0].weight, &without_unused_bits(&matrices[0]), "the first part");
        for (index, (found, matrix)) in restored.iter().zip(&matrices).enumerate().skip(1) {
            assert_same(&found.weight, &matrix.to_f32().unwrap(), &format!("part {index} {simd}"));
        }
    }
}

/// Through the backend: linears, and groups of them whose schemes differ.
#[test]
fn linears_of_groups_come_back_one_by_one() {
    let mut random = Random(29);
    let (rows, cols) = ([24, 9], 68);
    let formats = [Format::Fp4, Format::Int2, Format::Mxfp4, Format::F16, Format::Int8];
    let mut linear = |format: Format| {
        let scheme = format.scheme(None).unwrap();
        rows.map(|n| {
            let bias = (0..n).map(|_| random.value()).collect();
            LinearPart { weight: without_unused_bits(&random.matrix(scheme, n, cols)), bias: Some(bias) }
        })
    };
    let linears: Vec<_> = formats.into_iter().map(&mut linear).collect();
    let backend = CpuBackend::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
    let check = |found: &[LinearPart<'static>], wanted: &[LinearPart<'static>]| {
        assert_eq!(found.len(), wanted.len());
        for (found, wanted) in found.iter().zip(wanted) {
            assert_same(&found.weight, &wanted.weight, &wanted.weight.scheme.to_string());
            assert_eq!(found.bias, wanted.bias);
        }
    };
    let loaded: Vec<_> = linears.iter().map(|parts| backend.load_linear(parts).unwrap()).collect();
    for (linear, parts) in loaded.iter().zip(&linears) {
        assert_eq!((linear.part_rows(), linear.cols()), (&rows[..], cols));
        check(&backend.unpack_linear(linear).unwrap(), parts);
    }
    let bytes: usize = loaded.iter().map(|linear| linear.bytes()).sum();
    let group = backend.group_linears(loaded).unwrap();
    assert_eq!((group.count(), group.part_rows(), group.cols()), (linears.len(), &rows[..], cols));
    assert_eq!(group.bytes(), bytes);
    let unpacked = backend.unpack_group(&group);
    assert_eq!(unpacked.len(), linears.len());
    for (found, parts) in unpacked.zip(&linears) {
        check(&found.unwrap(), parts);
    }
}
