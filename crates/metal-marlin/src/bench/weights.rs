//! The weights of a model: their formats, and how much of them a decode step reads.

use marlin_checkpoint::{Checkpoint, Storage};
use marlin_quantize::TensorRole;

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

/// Bytes of the weights that a decode step reads, as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StepWeights {
    /// Read once, however many streams there are.
    shared: u64,
    /// Read by each stream: a row of an embedding that is not the head.
    of_stream: u64,
}

impl StepWeights {
    pub(super) fn of(checkpoint: &Checkpoint) -> Self {
        let tensors = || checkpoint.tensor_names().filter_map(|name| Some((name, checkpoint.info(name)?)));
        let has_head = tensors().any(|(name, info)| TensorRole::of(name, info.shape.len()) == TensorRole::Head);
        let mut weights = Self { shared: 0, of_stream: 0 };
        for (name, info) in tensors() {
            match TensorRole::of(name, info.shape.len()) {
                TensorRole::Embedding if has_head => weights.of_stream += info.bytes / (info.shape[0].max(1) as u64),
                _ => weights.shared += info.bytes,
            }
        }
        weights
    }

    pub(super) fn per_token(self, streams: usize) -> f64 {
        self.shared as f64 / streams as f64 + self.of_stream as f64
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
        assert_eq!(StepWeights::of(&tied), StepWeights { shared: tied.weight_bytes(), of_stream: 0 });
        assert_eq!(formats(&tied), ["fp4 g128", "int8 g128"]);

        let bytes = vec![0; 8 * 16 * 2];
        let matrix = PackedMatrix::from_dense_bytes(Scheme::BF16, 8, 16, bytes).unwrap();
        let matrix = MemoryTensor::matrix(Arc::new(matrix));
        let tensors = ["model.embed_tokens.weight", "lm_head.weight"].map(|name| (name.to_owned(), matrix.clone()));
        let untied = Checkpoint::from_parts("untied", serde_json::json!({}), tensors.into()).unwrap();
        let weights = StepWeights::of(&untied);
        assert_eq!(weights, StepWeights { shared: 8 * 16 * 2, of_stream: 16 * 2 });
        assert_eq!([1, 4].map(|streams| weights.per_token(streams)), [256.0 + 32.0, 64.0 + 32.0]);
    }
}
