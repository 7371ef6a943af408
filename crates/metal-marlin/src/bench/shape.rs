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
    experts: Option<Experts>,
}

/// A mixture of experts in place of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Experts {
    /// Routed ones of a layer.
    count: usize,
    top_k: usize,
    /// Shared ones.
    shared: usize,
    /// Width between.
    width: usize,
    /// First layers that have an MLP instead.
    dense_layers: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Qwen3,
    Qwen3Moe,
    /// GLM-4.7-Flash: heads are made of latent vectors, in the sizes of that model.
    Glm4MoeLite,
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
        experts: None,
    }
}

/// Hidden size, layers and vocabulary, query and key heads, experts, how many a token goes to, and their width.
const fn qwen3_moe(name: &'static str, sizes: [usize; 3], heads: [usize; 2], experts: [usize; 3]) -> Shape {
    let ([hidden, layers, vocabulary], [count, top_k, width]) = (sizes, experts);
    Shape {
        family: Family::Qwen3Moe,
        num_key_value_heads: heads[1],
        experts: Some(Experts { count, top_k, shared: 0, width, dense_layers: 0 }),
        ..qwen3(name, [hidden, layers, 3 * hidden, vocabulary], heads[0], false)
    }
}

const GLM_4_7_FLASH: Shape = Shape {
    family: Family::Glm4MoeLite,
    num_key_value_heads: 20,
    head_dim: 256,
    max_position_embeddings: 202_752,
    experts: Some(Experts { count: 64, top_k: 4, shared: 1, width: 1536, dense_layers: 1 }),
    ..qwen3("glm-4.7-flash", [2048, 47, 10_240, 154_880], 20, false)
};
/// Ranks of queries and of keys and values in GLM-4.7-Flash, and widths of a head's parts: not rotated, rotated, value.
const GLM_RANKS: [usize; 2] = [768, 512];
const GLM_HEAD: [usize; 3] = [192, 64, 256];

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
        experts: None,
    }
}

impl Shape {
    /// All known shapes. `tiny`, `tiny-moe` and `qwen3-moe-8l` are no real models: those are there to try things out, and to compare small ones.
    pub const ALL: [Shape; 14] = [
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
        Shape {
            head_dim: 16,
            max_position_embeddings: 1024,
            ..qwen3_moe("tiny-moe", [64, 2, 256], [4, 2], [8, 2, 32])
        },
        qwen3_moe("qwen3-moe-8l", [1024, 8, 151_936], [16, 8], [32, 4, 512]),
        qwen3_moe("qwen3-30b-a3b", [2048, 48, 151_936], [32, 4], [128, 8, 768]),
        GLM_4_7_FLASH,
    ];

    /// The config.json of such a model.
    pub fn config(&self) -> Value {
        let mut config = json!({
            "architectures": [match self.family {
                Family::Qwen3 => "Qwen3ForCausalLM",
                Family::Qwen3Moe => "Qwen3MoeForCausalLM",
                Family::Glm4MoeLite => "Glm4MoeLiteForCausalLM",
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
            Family::Qwen3 | Family::Qwen3Moe => {
                config["rms_norm_eps"] = json!(1e-6);
                config["rope_theta"] = json!(1e6);
            }
            Family::Glm4MoeLite => {
                let ([q_lora_rank, kv_lora_rank], [nope, rope, value]) = (GLM_RANKS, GLM_HEAD);
                config["rms_norm_eps"] = json!(1e-5);
                config["rope_theta"] = json!(1e6);
                config["q_lora_rank"] = json!(q_lora_rank);
                config["kv_lora_rank"] = json!(kv_lora_rank);
                config["qk_nope_head_dim"] = json!(nope);
                config["qk_rope_head_dim"] = json!(rope);
                config["v_head_dim"] = json!(value);
                config["routed_scaling_factor"] = json!(1.8);
                config["n_group"] = json!(1);
                config["topk_group"] = json!(1);
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
        if let Some(experts) = self.experts {
            let count = if self.family == Family::Qwen3Moe { "num_experts" } else { "n_routed_experts" };
            config[count] = json!(experts.count);
            config["num_experts_per_tok"] = json!(experts.top_k);
            config["moe_intermediate_size"] = json!(experts.width);
            config["norm_topk_prob"] = json!(true);
            if self.family == Family::Glm4MoeLite {
                config["n_shared_experts"] = json!(experts.shared);
                config["first_k_dense_replace"] = json!(experts.dense_layers);
            }
        }
        config
    }

    /// The tensors of such a model by their names.
    pub(super) fn tensors(&self) -> Vec<(String, TensorShape)> {
        let hidden = self.hidden_size;
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), matrix(self.vocab_size, hidden))];
        for layer in 0..self.num_hidden_layers {
            let mut modules = vec![
                ("input_layernorm".to_owned(), TensorShape::Norm(hidden)),
                ("post_attention_layernorm".to_owned(), TensorShape::Norm(hidden)),
            ];
            modules.extend(self.attention().into_iter().map(|(name, shape)| (format!("self_attn.{name}"), shape)));
            let experts = self.experts.filter(|experts| layer >= experts.dense_layers);
            modules.extend(experts.map_or_else(|| self.mlp("mlp", self.intermediate_size), |it| self.mixture(it)));
            tensors.extend(
                modules.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)),
            );
            if self.family == Family::Glm4MoeLite && experts.is_some() {
                let name = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
                tensors.push((name, TensorShape::Norm(self.experts.map_or(0, |experts| experts.count))));
            }
        }
        tensors.push(("model.norm.weight".to_owned(), TensorShape::Norm(hidden)));
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), matrix(self.vocab_size, hidden)));
        }
        tensors
    }

    /// Modules of attention.
    fn attention(&self) -> Vec<(&'static str, TensorShape)> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if self.family == Family::Glm4MoeLite {
            let ([q_rank, kv_rank], [nope, rope, value]) = (GLM_RANKS, GLM_HEAD);
            return vec![
                ("q_a_proj", matrix(q_rank, hidden)),
                ("q_a_layernorm", TensorShape::Norm(q_rank)),
                ("q_b_proj", matrix(heads * (nope + rope), q_rank)),
                ("kv_a_proj_with_mqa", matrix(kv_rank + rope, hidden)),
                ("kv_a_layernorm", TensorShape::Norm(kv_rank)),
                ("kv_b_proj", matrix(heads * (nope + value), kv_rank)),
                ("o_proj", matrix(hidden, heads * value)),
            ];
        }
        let (q, kv) = (heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let mut modules = vec![
            ("q_proj", matrix(q, hidden)),
            ("k_proj", matrix(kv, hidden)),
            ("v_proj", matrix(kv, hidden)),
            ("o_proj", matrix(hidden, q)),
        ];
        if matches!(self.family, Family::Qwen3 | Family::Qwen3Moe) {
            modules.push(("q_norm", TensorShape::Norm(self.head_dim)));
            modules.push(("k_norm", TensorShape::Norm(self.head_dim)));
        }
        modules
    }

    /// Modules of a gated MLP.
    fn mlp(&self, name: &str, width: usize) -> Vec<(String, TensorShape)> {
        let hidden = self.hidden_size;
        vec![
            (format!("{name}.gate_proj"), matrix(width, hidden)),
            (format!("{name}.up_proj"), matrix(width, hidden)),
            (format!("{name}.down_proj"), matrix(hidden, width)),
        ]
    }

    /// Modules of a mixture of experts.
    fn mixture(&self, experts: Experts) -> Vec<(String, TensorShape)> {
        let mut modules = vec![("mlp.gate".to_owned(), matrix(experts.count, self.hidden_size))];
        modules.extend((0..experts.count).flat_map(|e| self.mlp(&format!("mlp.experts.{e}"), experts.width)));
        if experts.shared > 0 {
            modules.extend(self.mlp("mlp.shared_experts", experts.shared * experts.width));
        }
        modules
    }
}

fn matrix(rows: usize, cols: usize) -> TensorShape {
    TensorShape::Matrix([rows, cols])
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
        for (name, weights) in [("qwen3-0.6b", 0.596e9), ("llama-3.2-1b", 1.236e9), ("qwen3-30b-a3b", 30.5e9)] {
            let footprint = Footprint::of(&made(name));
            let relative = footprint.weights as f64 / weights;
            assert!((0.99..1.01).contains(&relative), "{name}: {}", footprint.weights);
        }
        assert_eq!("qwen3-9b".parse::<Shape>().unwrap_err().to_string().matches("qwen3-8b").count(), 1);
    }
}
