//! What a checkpoint's weights take.

use std::iter::Sum;

use marlin_checkpoint::Checkpoint;

use crate::TensorRole;

/// Numbers and bytes of weights, everything counted: scales, zero points, norms, biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// All weights.
    pub weights: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Weights of the decoder linears.
    pub linear_weights: u64,
    /// Their bytes.
    pub linear_bytes: u64,
}

impl Footprint {
    /// Sums up a checkpoint's tensors.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let of_tensor = |name: &str| {
            let info = checkpoint.info(name)?;
            let weights = info.shape.iter().map(|&n| n as u64).product();
            Some(Self::of_tensor(TensorRole::of(name, info.shape.len()), weights, info.bytes))
        };
        checkpoint.tensor_names().filter_map(of_tensor).sum()
    }

    /// That of one tensor.
    pub(crate) fn of_tensor(role: TensorRole, weights: u64, bytes: u64) -> Self {
        match role {
            TensorRole::DecoderLinear => Self { weights, bytes, linear_weights: weights, linear_bytes: bytes },
            _ => Self { weights, bytes, ..Self::default() },
        }
    }

    /// Bits a weight of the whole checkpoint takes.
    pub fn bits_per_weight(&self) -> f64 {
        bits_per_weight(self.bytes, self.weights)
    }

    /// Bits a weight of the decoder linears takes.
    pub fn linear_bits_per_weight(&self) -> f64 {
        bits_per_weight(self.linear_bytes, self.linear_weights)
    }
}

impl Sum for Footprint {
    fn sum<I: Iterator<Item = Self>>(footprints: I) -> Self {
        footprints.fold(Self::default(), |sum, other| Self {
            weights: sum.weights + other.weights,
            bytes: sum.bytes + other.bytes,
            linear_weights: sum.linear_weights + other.linear_weights,
            linear_bytes: sum.linear_bytes + other.linear_bytes,
        })
    }
}

/// 0 where there is nothing.
fn bits_per_weight(bytes: u64, weights: u64) -> f64 {
    bytes as f64 * 8.0 / weights.max(1) as f64
}
