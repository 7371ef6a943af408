//! Well-known models by their sizes.

use std::str::FromStr;

use serde_json::{Value, json};

use super::BenchError;

/// The sizes of a known model, as its config.json gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The name users give it.
    pub name: &'static str,
    family: Family,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    intermediate_size: usize,
    vocab_size: usize,
    tie_word_embeddings: bool,
    max_position_embeddings: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Qwen3,
    /// Llama 3.1 and 3.2, which stretch their rotary embedding by this factor.
    Llama3(u32),
}

/// A tensor that a shape consists of.
#[derive(Debug, Clone, Copy)]
pub(super) enum TensorShape {
    Matrix([usize; 2]),
    Norm(usize),
}

const fn qwen3(name: &'static str, sizes: [usize; 4], heads: usize, tie_word_embeddings: bool) -> Shape {
    let [hidden_size, num_hidden_layers, intermediate_size, vocab_size] = sizes;
    Shape {
        name,
        family: Family::Qwen3,
        hidden_size,
        num_hidden_layers,
        num_attention_heads: heads,
        num_key_value_heads: 8,
        head_dim: 128,
        intermediate_size,
        vocab_size,
        tie_word_embeddings,
        max_position_embeddings: 40_960,
    }
}

const fn llama3(name: &'static str, sizes: [usize; 3], heads: usize, rope_factor: u32) -> Shape {
    let [hidden_size, num_hidden_layers, intermediate_size] = sizes;
    Shape {
        name,
        family: Family::Llama3(rope_factor),
        hidden_size,
        num_hidden_layers,
        num_attention_heads: heads,
        num_key_value_heads: 8,
        head_dim: hidden_size / heads,
        intermediate_size,
        vocab_size: 128_256,
        // Those of Llama 3.2 are tied, which is also the release with the larger factor.
        tie_word_embeddings: rope_factor == 32,
        max_position_embeddings: 131_072,
    }
}

impl Shape {
    /// All known shapes. `tiny` is no real model: it is there to try things out.
    pub const ALL: [Shape; 10] = [
        Shape {
            num_key_value_heads: 2,
            head_dim: 16,
            max_position_embeddings: 1024,
            ..qwen3("tiny", [64, 2, 128, 256], 4, true)
        },
        qwen3("qwen3-0.6b", [1024, 28, 3072, 151_936], 16, true),
        qwen3("qwen3-1.7b", [2048, 28, 6144, 151_936], 16, true),
        qwen3("qwen3-4b", [2560, 36, 9728, 151_936], 32, true),
        qwen3("qwen3-8b", [4096, 36, 12_288, 151_936], 32, false),
        qwen3("qwen3-14b", [5120, 40, 17_408, 151_936], 40, false),
        qwen3("qwen3-32b", [5120, 64, 25_600, 151_936], 64, false),
        llama3("llama-3.2-1b", [2048, 16, 8192], 32, 32),
        llama3("llama-3.2-3b", [3072, 28, 8192], 24, 32),
        llama3("llama-3.1-8b", [4096, 32, 14_336], 32, 8),
    ];

    /// The config.json of such a model.
    pub fn config(&self) -> Value {
        let mut config = json!({
            "architectures": [match self.family {
                Family::Qwen3 => "Qwen3ForCausalLM",
                Family::Llama3(_) => "LlamaForCausalLM",
            }],
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": "silu",
        });
        match self.family {
            Family::Qwen3 => {
                config["rms_norm_eps"] = json!(1e-6);
                config["rope_theta"] = json!(1e6);
            }
            Family::Llama3(factor) => {
                config["rms_norm_eps"] = json!(1e-5);
                config["rope_theta"] = json!(5e5);
                config["rope_scaling"] = json!({
                    "rope_type": "llama3",
                    "factor": f64::from(factor),
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                });
            }
        }
        config
    }

    /// The tensors of such a model by their names.
    pub(super) fn tensors(&self) -> Vec<(String, TensorShape)> {
        let (hidden, width) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let matrix = |rows, cols| TensorShape::Matrix([rows, cols]);
        let mut block = vec![
            ("input_layernorm", TensorShape::Norm(hidden)),
            ("self_attn.q_proj", matrix(q, hidden)),
            ("self_attn.k_proj", matrix(kv, hidden)),
            ("self_attn.v_proj", matrix(kv, hidden)),
            ("self_attn.o_proj", matrix(hidden, q)),
            ("post_attention_layernorm", TensorShape::Norm(hidden)),
            ("mlp.gate_proj", matrix(width, hidden)),
            ("mlp.up_proj", matrix(width, hidden)),
            ("mlp.down_proj", matrix(hidden, width)),
        ];
        if self.family == Family::Qwen3 {
            block.push(("self_attn.q_norm", TensorShape::Norm(self.head_dim)));
            block.push(("self_attn.k_norm", TensorShape::Norm(self.head_dim)));
        }

        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), matrix(self.vocab_size, hidden))];
        for layer in 0..self.num_hidden_layers {
            let named = block.iter().map(|(module, shape)| (format!("model.layers.{layer}.{module}.weight"), *shape));
            tensors.extend(named);
        }
        tensors.push(("model.norm.weight".to_owned(), TensorShape::Norm(hidden)));
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), matrix(self.vocab_size, hidden)));
        }
        tensors
    }
}

impl FromStr for Shape {
    type Err = BenchError;

    fn from_str(name: &str) -> Result<Self, BenchError> {
        Self::ALL.into_iter().find(|shape| shape.name == name).ok_or_else(|| BenchError::UnknownShape {
            found: name.to_owned(),
            known: Self::ALL.map(|shape| shape.name).join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use marlin_quantize::Footprint;

    use super::super::random::made;
    use super::*;

    #[test]
    fn a_shape_has_the_weights_of_its_model() {
        // The numbers of parameters that the models' pages state.
        for (name, weights) in [("qwen3-0.6b", 0.596e9), ("llama-3.2-1b", 1.236e9)] {
            let footprint = Footprint::of(&made(name));
            let relative = footprint.weights as f64 / weights;
            assert!((0.99..1.01).contains(&relative), "{name}: {}", footprint.weights);
        }
        assert_eq!("qwen3-9b".parse::<Shape>().unwrap_err().to_string().matches("qwen3-8b").count(), 1);
    }
}
