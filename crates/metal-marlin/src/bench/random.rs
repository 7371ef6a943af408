//! Models of random weights, made in memory in whatever format.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use marlin_checkpoint::{Checkpoint, MemoryTensor};
use marlin_format::{ColumnOrder, Element, FormatError, PackedMatrix, ScaleKind, Scheme, Sparsity, ZeroKind, bits};
use marlin_quantize::TensorRole;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::shape::TensorShape;
use super::{BenchError, Shape};

/// Every run measures the same weights.
const SEED: u64 = 0x6d61_726c_696e;

/// A model of this shape whose weights are random codes, with scales that keep activations near 1.
///
/// Matrices of one shape and format are one matrix in memory: a device copies them into its own order anyway, and a model
/// of many gigabytes is made in the time and memory of one layer.
///
/// # Errors
/// The schemes have no matrices of these sizes.
pub fn random_model(shape: &Shape, linears: &Scheme, embedding: &Scheme) -> Result<Checkpoint, BenchError> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut made: HashMap<(Scheme, [usize; 2]), Arc<PackedMatrix<'static>>> = HashMap::new();
    let mut tensors = Vec::new();
    for (name, tensor) in shape.tensors() {
        let tensor = match tensor {
            TensorShape::Norm(len) => MemoryTensor::vector(&vec![1.0; len]),
            TensorShape::Matrix(size @ [rows, cols]) => {
                let scheme = match TensorRole::of(&name, 2) {
                    TensorRole::DecoderLinear => linears,
                    TensorRole::Embedding | TensorRole::Head => embedding,
                    // Routers.
                    TensorRole::Vector | TensorRole::Unknown => &Scheme::BF16,
                };
                let matrix = match made.get(&(*scheme, size)) {
                    Some(matrix) => matrix.clone(),
                    None => {
                        let matrix = Arc::new(random_matrix(scheme, rows, cols, &mut rng)?);
                        made.insert((*scheme, size), matrix.clone());
                        matrix
                    }
                };
                MemoryTensor::matrix(matrix)
            }
        };
        tensors.push((name, tensor));
    }
    Ok(Checkpoint::from_parts(shape.name, shape.config(), tensors)?)
}

/// A matrix of random codes whose weights have a mean square of about 1 / `cols`, so that it keeps the size of what it is
/// multiplied with.
pub(crate) fn random_matrix(
    scheme: &Scheme,
    rows: usize,
    cols: usize,
    rng: &mut ChaCha8Rng,
) -> Result<PackedMatrix<'static>, FormatError> {
    let element = scheme.element;
    let root_mean_square = (1.0 / cols as f64).sqrt();
    let codes = scheme.codes_bytes(rows, cols)?;
    let codes = match element {
        Element::F32 => uniform(codes, root_mean_square, rng, f32::to_le_bytes),
        Element::F16 => uniform(codes, root_mean_square, rng, |value| f16::from_f32(value).to_le_bytes()),
        Element::Bf16 => uniform(codes, root_mean_square, rng, |value| bf16::from_f32(value).to_le_bytes()),
        Element::E4M3 => {
            let mut codes = random(codes, rng);
            // Without the highest bit of their exponents codes are below 2, and none of them is NaN.
            codes.iter_mut().for_each(|code| *code &= !E4M3_HIGH_EXPONENT);
            codes
        }
        _ => random(codes, rng),
    };
    // What codes are taken to be around.
    let middle = match scheme.zero {
        ZeroKind::None => 0.0,
        ZeroKind::Integer => f64::from(1u32 << (element.bits() - 1)),
        _ => element.values().iter().map(|value| f64::from(*value)).sum::<f64>() / element.values().len() as f64,
    };
    let scale = root_mean_square / code_root_mean_square(element, middle);
    let (scales, mut globals) = scales(scheme, rows, cols, scale)?;
    let zero_bytes = scheme.zeros_bytes(rows, cols)?;
    let zeros = zeros(scheme, cols, zero_bytes, -scale * middle);
    if let ZeroKind::TwoLevelMin { bits } = scheme.zero {
        let minimum = f16::from_f64(scale * middle / f64::from(inner(bits)));
        let count = scheme.globals_bytes(rows, cols)? - globals.len();
        globals.extend(minimum.to_le_bytes().repeat(count / 2));
    }
    let sparse = scheme.sparse_index_bytes(rows, cols)?;
    let matrix = PackedMatrix {
        rows,
        cols,
        scheme: *scheme,
        codes: Cow::Owned(codes),
        scales: Cow::Owned(scales),
        zeros: Cow::Owned(zeros),
        globals: Cow::Owned(globals),
        group_index: Cow::Owned(group_index(scheme, cols)),
        sparse_index: Cow::Owned(if scheme.sparsity == Sparsity::Dense { Vec::new() } else { pairs(sparse, rng) }),
    };
    Ok(matrix)
}

const E4M3_HIGH_EXPONENT: u8 = 0x40;

fn random(bytes: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut codes = vec![0; bytes];
    rng.fill_bytes(&mut codes);
    codes
}

/// Floats spread evenly around zero.
fn uniform<const N: usize>(
    bytes: usize,
    root_mean_square: f64,
    rng: &mut ChaCha8Rng,
    to_bytes: impl Fn(f32) -> [u8; N],
) -> Vec<u8> {
    let most = (3f64.sqrt() * root_mean_square) as f32;
    let unit = most / i32::MAX as f32;
    (0..bytes / N).flat_map(|_| to_bytes(rng.next_u32() as i32 as f32 * unit)).collect()
}

/// Over all codes that [`random_matrix`] makes, less the zero point.
fn code_root_mean_square(element: Element, zero: f64) -> f64 {
    if element.is_dense() {
        return 1.0;
    }
    let usable = |code: &usize| element != Element::E4M3 || code & usize::from(E4M3_HIGH_EXPONENT) == 0;
    let values = element.values().iter().enumerate().filter(|(code, _)| usable(code)).map(|(_, value)| value);
    let squares: Vec<f64> = values.map(|value| (f64::from(*value) - zero).powi(2)).collect();
    (squares.iter().sum::<f64>() / squares.len() as f64).sqrt()
}

/// The inner scale, or minimum, of two levels: the highest bit that a signed one has.
fn inner(bits: u8) -> u8 {
    1 << (bits - 2)
}

/// Rows of so many codes that are all the same, each row in whole bytes.
fn repeated(code: u8, bits: u8, row_codes: usize, bytes: usize) -> Vec<u8> {
    let mut row = vec![0; (row_codes * usize::from(bits)).div_ceil(8)];
    bits::pack(&vec![code; row_codes], bits.into(), &mut row);
    row.repeat(bytes / row.len())
}

/// The bytes of scales that are all `scale`, and of what multiplies them.
fn scales(scheme: &Scheme, rows: usize, cols: usize, scale: f64) -> Result<(Vec<u8>, Vec<u8>), FormatError> {
    const E4M3_ONE: u8 = 0x38;
    let value = scale as f32;
    let bytes = scheme.scales_bytes(rows, cols)?;
    Ok(match scheme.scale {
        ScaleKind::None => (Vec::new(), Vec::new()),
        ScaleKind::F32 => (value.to_le_bytes().repeat(bytes / 4), Vec::new()),
        ScaleKind::F16 => (f16::from_f32(value).to_le_bytes().repeat(bytes / 2), Vec::new()),
        ScaleKind::Bf16 => (bf16::from_f32(value).to_le_bytes().repeat(bytes / 2), Vec::new()),
        ScaleKind::E8M0 => (vec![(127.0 + scale.log2().round()).clamp(0.0, 254.0) as u8; bytes], Vec::new()),
        ScaleKind::E4M3Global => (vec![E4M3_ONE; bytes], value.to_le_bytes().to_vec()),
        ScaleKind::TwoLevel { bits, super_group, .. } => {
            let global = f16::from_f64(scale / f64::from(inner(bits)));
            let count = rows * cols.div_ceil(super_group as usize);
            let scales = repeated(inner(bits), bits, scheme.groups_per_row(cols), bytes);
            (scales, global.to_le_bytes().repeat(count))
        }
    })
}

/// Zero points in the middle of the codes, or biases.
fn zeros(scheme: &Scheme, cols: usize, bytes: usize, bias: f64) -> Vec<u8> {
    let groups = scheme.groups_per_row(cols);
    match scheme.zero {
        ZeroKind::None => Vec::new(),
        ZeroKind::Integer => {
            let bits = scheme.element.bits() as u8;
            repeated(1 << (bits - 1), bits, groups, bytes)
        }
        ZeroKind::F32Bias => (bias as f32).to_le_bytes().repeat(bytes / 4),
        ZeroKind::F16Bias => f16::from_f64(bias).to_le_bytes().repeat(bytes / 2),
        ZeroKind::Bf16Bias => bf16::from_f64(bias).to_le_bytes().repeat(bytes / 2),
        ZeroKind::TwoLevelMin { bits } => repeated(inner(bits), bits, groups, bytes),
    }
}

/// Columns in a random order, which all matrices of so many have, as those that share their input do.
fn group_index(scheme: &Scheme, cols: usize) -> Vec<u8> {
    if scheme.order == ColumnOrder::Natural {
        return Vec::new();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(cols as u64);
    let mut groups: Vec<u32> = (0..cols).map(|column| (column / scheme.group_cols(cols)) as u32).collect();
    (1..cols).for_each(|last| groups.swap(last, rng.next_u32() as usize % (last + 1)));
    groups.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// 2:4 metadata: each half byte names two columns of four, the lower one first.
fn pairs(bytes: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    const PAIRS: [u8; 6] = [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110];
    let mut pair = || PAIRS[rng.next_u32() as usize % PAIRS.len()];
    (0..bytes).map(|_| pair() | pair() << 4).collect()
}

/// A model of this shape in FP4, its embedding in INT8.
#[cfg(test)]
pub(super) fn made(shape: &str) -> Checkpoint {
    let shape: Shape = shape.parse().unwrap();
    random_model(
        &shape,
        &marlin_format::Format::Fp4.scheme(None).unwrap(),
        &marlin_format::Format::Int8.scheme(None).unwrap(),
    )
    .unwrap()
}

#[cfg(test)]
mod tests {
    use marlin_format::{FOREIGN, Format, Grouping};
    use marlin_model::LoadOptions;

    use super::*;
    use crate::DeviceOptions;
    use crate::load;

    #[test]
    fn random_weights_keep_logits_finite() {
        let options = LoadOptions { context: Some(8), ..LoadOptions::default() };
        let mut model = load::load_model(&made("tiny"), &DeviceOptions::default().open().unwrap(), &options).unwrap();
        let mut sequence = model.kv().sequence();
        model.kv().append(&mut sequence, 3).unwrap();
        let mut batch = marlin_model::StepBatch::new();
        batch.push(&sequence, &[1, 2, 3], marlin_model::LogitRows::Last);
        model.forward(&batch).unwrap();
        let mut logits = Vec::new();
        model.read_logits(&mut logits).unwrap();
        model.kv().release(sequence);
        let largest = logits.iter().fold(0f32, |largest, logit| largest.max(logit.abs()));
        assert!(logits.iter().all(|logit| logit.is_finite()) && (0.1..100.0).contains(&largest), "{largest}");
    }

    #[test]
    fn weights_of_every_format_are_valid_and_of_the_size_that_is_wanted() {
        let groupings = [None, Some(Grouping::Row), Some(Grouping::Columns(32)), Some(Grouping::Tensor)];
        let schemes = Format::ALL.into_iter().flat_map(|format| groupings.map(|g| format.scheme(g))).flatten();
        let sparse = Scheme { sparsity: Sparsity::TwoOfFour, ..Format::Fp4.scheme(None).unwrap() };
        for scheme in schemes.chain([sparse]).chain(FOREIGN.map(|(_, scheme)| scheme)) {
            let (rows, cols) = (24, 320);
            let matrix = random_matrix(&scheme, rows, cols, &mut ChaCha8Rng::seed_from_u64(1)).unwrap();
            matrix.validate().unwrap();
            let squares: f64 = matrix.decode().iter().map(|value| f64::from(*value).powi(2)).sum();
            // Power-of-two scales are at most a factor of √2 off, 2:4 leaves out half of the squares.
            let relative = squares / rows as f64;
            assert!((0.4..2.2).contains(&relative), "{scheme}: {relative}");
        }
    }
}
