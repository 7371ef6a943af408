//! The weights of a model: their formats, and how much of them a step reads.

use marlin_checkpoint::{Checkpoint, Storage, TensorInfo};
use marlin_quantize::{TensorRole, expert_of};

/// Formats of the decoder's matrices, and of embedding and head, each once.
pub(super) fn formats(checkpoint: &Checkpoint) -> [String; 2] {
    let mut found = [Vec::new(), Vec::new()];
    for name in checkpoint.tensor_names() {
        let Some(info) = checkpoint.info(name) else { continue };
        let kind = match TensorRole::of(name, info.shape.len()) {
            TensorRole::DecoderLinear => 0,
            TensorRole::Embedding | TensorRole::Head => 1,
            TensorRole::Vector | TensorRole::Unknown => continue,
        };
        let format = match info.storage {
            Storage::Packed(scheme) => scheme.to_string(),
            Storage::Plain(dtype) => dtype.to_string().to_lowercase(),
        };
        if !found[kind].contains(&format) {
            found[kind].push(format);
        }
    }
    found.map(|formats| formats.join(" + "))
}

/// Weights that a step reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StepWeights {
    /// Read by every step once.
    pub(super) decoder: Read,
    /// Routed experts of all layers, of which a step reads those that its tokens go to.
    pub(super) experts: Read,
    /// Read by every step with logits once.
    pub(super) head: Read,
    /// Bytes of a row of an embedding that is not the head, which every token reads.
    pub(super) row: u64,
}

/// Tensors that are read from their beginning to their end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Read {
    /// Their bytes, as stored.
    pub(super) bytes: u64,
    /// The weights of their matrices that are stored: all, or half of them under 2:4. A row of input is multiplied with each.
    pub(super) weights: u64,
}

impl StepWeights {
    pub(super) fn of(checkpoint: &Checkpoint) -> Self {
        let tensors = || checkpoint.tensor_names().filter_map(|name| Some((name, checkpoint.info(name)?)));
        let has_head = tensors().any(|(name, info)| TensorRole::of(name, info.shape.len()) == TensorRole::Head);
        let mut weights = Self { decoder: Read::default(), experts: Read::default(), head: Read::default(), row: 0 };
        for (name, info) in tensors() {
            match TensorRole::of(name, info.shape.len()) {
                TensorRole::Embedding if has_head => weights.row += info.bytes / (info.shape[0].max(1) as u64),
                TensorRole::Embedding | TensorRole::Head => weights.head.add(&info),
                TensorRole::DecoderLinear if expert_of(name).is_some() => weights.experts.add(&info),
                TensorRole::DecoderLinear | TensorRole::Vector | TensorRole::Unknown => weights.decoder.add(&info),
            }
        }
        weights
    }
}

impl Read {
    fn add(&mut self, tensor: &TensorInfo) {
        self.bytes += tensor.bytes;
        if let [rows, cols] = tensor.shape[..] {
            let stored = tensor.scheme().map_or(cols, |scheme| scheme.stored_cols(cols));
            self.weights += rows as u64 * stored as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use marlin_checkpoint::MemoryTensor;
    use marlin_format::{PackedMatrix, Scheme};

    use super::super::random::made;
    use super::*;

    #[test]
    fn a_token_reads_one_row_of_an_embedding_that_is_not_the_head() {
        let tied = made("tiny");
        let weights = StepWeights::of(&tied);
        assert_eq!((weights.decoder.bytes + weights.head.bytes, weights.row), (tied.weight_bytes(), 0));
        // Two layers with 4 heads of queries and 2 of keys and values, of 16 each; norms are no matrices.
        assert_eq!(weights.decoder.weights, 2 * 64 * (2 * 64 + 2 * 32 + 3 * 128));
        assert_eq!(weights.head.weights, 256 * 64);
        assert_eq!(formats(&tied), ["fp4 g128", "int8 g128"]);

        let mixture = StepWeights::of(&made("tiny-moe"));
        // Two layers of 8 experts; the router is read by every token.
        assert_eq!(mixture.experts.weights, 2 * 8 * 3 * 64 * 32);
        assert_eq!(mixture.decoder.weights, 2 * 64 * (2 * 64 + 2 * 32 + 8));

        let bytes = vec![0; 8 * 16 * 2];
        let matrix = PackedMatrix::from_dense_bytes(Scheme::BF16, 8, 16, bytes).unwrap();
        let matrix = MemoryTensor::matrix(Arc::new(matrix));
        let tensors = ["model.embed_tokens.weight", "lm_head.weight"].map(|name| (name.to_owned(), matrix.clone()));
        let untied = Checkpoint::from_parts("untied", serde_json::json!({}), tensors.into()).unwrap();
        let head = Read { bytes: 8 * 16 * 2, weights: 8 * 16 };
        assert_eq!(
            StepWeights::of(&untied),
            StepWeights { decoder: Read::default(), experts: Read::default(), head, row: 16 * 2 }
        );
    }
}
