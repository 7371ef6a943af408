//! What a checkpoint's weights take.

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
        let mut sum = Self::default();
        for name in checkpoint.tensor_names() {
            let Some(info) = checkpoint.info(name) else { continue };
            let weights = info.shape.iter().map(|&n| n as u64).product::<u64>();
            sum.weights += weights;
            sum.bytes += info.bytes;
            if TensorRole::of(name, info.shape.len()) == TensorRole::DecoderLinear {
                sum.linear_weights += weights;
                sum.linear_bytes += info.bytes;
            }
        }
        sum
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

/// 0 where there is nothing.
fn bits_per_weight(bytes: u64, weights: u64) -> f64 {
    bytes as f64 * 8.0 / weights.max(1) as f64
}
