//! What a tensor is to its model.

use std::borrow::Cow;

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

/// Linears of a decoder block, by the last module of their names. A router (`gate`, `router`) is none of them: it is small, and a token
/// that goes to other experts is computed otherwise.
pub(crate) const DECODER_LINEARS: [&str; 16] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
];

impl TensorRole {
    /// Tells by the name that `transformers` gives the tensor, and its number of dimensions.
    pub fn of(name: &str, rank: usize) -> Self {
        match rank {
            0 | 1 => return Self::Vector,
            2 => {}
            _ => return Self::Unknown,
        }
        match (in_layer(name), name) {
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

/// Layer and name within it of a tensor of a decoder layer.
fn in_layer(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
}

/// The layer of a tensor, and what the same tensors of all layers have in common: `model.layers.3.mlp.up_proj.weight` is
/// `mlp.up_proj` of layer 3.
pub fn layer_and_kind(name: &str) -> (Option<usize>, &str) {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    match in_layer(name).and_then(|(layer, kind)| Some((layer.parse().ok()?, kind))) {
        Some((layer, kind)) => (Some(layer), kind),
        None => (None, name),
    }
}

/// What the same tensors of all layers, and of all routed experts, have in common: `mlp.experts.N.up_proj`.
pub fn kind_of(name: &str) -> Cow<'_, str> {
    let (_, kind) = layer_and_kind(name);
    let of_experts = kind.split_once(".experts.").and_then(|(block, rest)| {
        let (expert, rest) = rest.split_once('.')?;
        expert.parse::<usize>().is_ok().then(|| format!("{block}.experts.N.{rest}"))
    });
    of_experts.map_or(Cow::Borrowed(kind), Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_names_without_their_layer() {
        assert_eq!(layer_and_kind("model.layers.12.mlp.up_proj.weight"), (Some(12), "mlp.up_proj"));
        assert_eq!(layer_and_kind("model.layers.0.self_attn.q_proj.bias"), (Some(0), "self_attn.q_proj.bias"));
        assert_eq!(layer_and_kind("model.embed_tokens.weight"), (None, "model.embed_tokens"));
        assert_eq!(layer_and_kind("model.layers.x.weight"), (None, "model.layers.x"));
        assert_eq!(kind_of("model.layers.3.mlp.experts.17.up_proj.weight"), "mlp.experts.N.up_proj");
        assert_eq!(kind_of("model.layers.3.mlp.experts.up_proj.weight"), "mlp.experts.up_proj");
        assert_eq!(kind_of("model.norm.weight"), "model.norm");
    }

    #[test]
    fn roles_of_a_block() {
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
            ("model.layers.1.mlp.gate.e_score_correction_bias", 1, TensorRole::Vector),
            ("model.layers.1.mlp.router.weight", 2, TensorRole::Unknown),
            ("model.layers.1.mlp.experts.12.up_proj.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.1.mlp.experts.gate_up_proj_bias", 2, TensorRole::Unknown),
            ("model.layers.1.mlp.shared_experts.gate_proj.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.1.block_sparse_moe.gate.weight", 2, TensorRole::Unknown),
            ("model.layers.1.block_sparse_moe.experts.0.w2.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.1.self_attn.q_a_proj.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.1.self_attn.kv_b_proj.weight", 2, TensorRole::DecoderLinear),
            ("model.layers.2.eh_proj.weight", 2, TensorRole::Unknown),
            ("model.layers.1.conv.weight", 3, TensorRole::Unknown),
            ("model.layers.1.mlp.experts.down_proj.weight", 3, TensorRole::Unknown),
            ("visual.q_proj.weight", 2, TensorRole::Unknown),
            ("model.layers.q_proj.weight", 2, TensorRole::Unknown),
        ] {
            assert_eq!(TensorRole::of(name, rank), role, "{name}");
        }
    }
}
