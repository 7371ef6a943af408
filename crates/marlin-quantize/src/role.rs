//! What a tensor is to its model.

/// What a tensor is to its model, as far as quantisation cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorRole {
    /// A matrix of a decoder block that activations are multiplied with.
    DecoderLinear,
    /// The token embedding, which is the head as well where the two are tied.
    Embedding,
    /// The output head.
    Head,
    /// A norm's weights, a bias: small, and sensitive.
    Vector,
    /// A matrix of no kind known here.
    Unknown,
}

/// Linears of a decoder block, by the last module of their names.
const DECODER_LINEARS: [&str; 9] =
    ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"];

impl TensorRole {
    /// Tells by the name that `transformers` gives the tensor, and its number of dimensions.
    pub fn of(name: &str, rank: usize) -> Self {
        match rank {
            0 | 1 => return Self::Vector,
            2 => {}
            _ => return Self::Unknown,
        }
        match (name.strip_prefix("model.layers.").and_then(|n| n.split_once('.')), name) {
            (_, "model.embed_tokens.weight") => Self::Embedding,
            (_, "lm_head.weight") => Self::Head,
            (Some((_layer, path)), _) => match path.strip_suffix(".weight").and_then(|p| p.rsplit_once('.')) {
                Some((_, module)) if DECODER_LINEARS.contains(&module) => Self::DecoderLinear,
                _ => Self::Unknown,
            },
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_of_a_llama_block() {
        for (name, rank, role) in [
            ("model.embed_tokens.weight", 2, TensorRole::Embedding),
            ("lm_head.weight", 2, TensorRole::Head),
            ("model.norm.weight", 1, TensorRole::Vector),
            ("model.layers.0.input_layernorm.weight", 1, TensorRole::Vector),
            ("model.layers.11.self_attn.q_proj.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.11.self_attn.q_proj.bias", 1, TensorRole::Vector),
            ("model.layers.0.self_attn.qkv_proj.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.0.mlp.gate_up_proj.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.11.mlp.down_proj.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.1.mlp.gate.weight", 2, TensorRole::Unknown),
            ("model.layers.1.conv.weight", 3, TensorRole::Unknown),
            ("model.layers.1.mlp.experts.down_proj.weight", 3, TensorRole::Unknown),
            ("visual.q_proj.weight", 2, TensorRole::Unknown),
            ("model.layers.q_proj.weight", 2, TensorRole::Unknown),
        ] {
            assert_eq!(TensorRole::of(name, rank), role, "{name}");
        }
    }
}
