//! DeepSeek-V3 and GLM-4.7-Flash (`Glm4MoeLite`): latent attention, and experts chosen by corrected sigmoid scores beside a shared one.

use serde_json::Value;

use super::base::BaseConfig;
use super::experts::{SigmoidConfig, SigmoidDefaults};
use super::latent;
use crate::ConfigError;
use crate::spec::{AttentionSpec, DecoderSpec};

/// Defaults of `DeepseekV3Config`.
const DEEPSEEK_V3: SigmoidDefaults =
    SigmoidDefaults { groups: 8, top_groups: 4, scale: 2.5, dense_layers: 3, prediction_layers: 1 };

/// Defaults of `Glm4MoeLiteConfig`.
const GLM4_MOE_LITE: SigmoidDefaults =
    SigmoidDefaults { groups: 1, top_groups: 1, scale: 1.8, dense_layers: 1, prediction_layers: 0 };

pub(super) fn deepseek_v3(config: &Value) -> Result<DecoderSpec, ConfigError> {
    spec(config, &DEEPSEEK_V3)
}

pub(super) fn glm4_moe_lite(config: &Value) -> Result<DecoderSpec, ConfigError> {
    spec(config, &GLM4_MOE_LITE)
}

fn spec(config: &Value, defaults: &SigmoidDefaults) -> Result<DecoderSpec, ConfigError> {
    let base = BaseConfig::parse(config)?;
    let own = SigmoidConfig::parse(config)?;
    let (attention, rope) = latent::attention(config, &base)?;
    let layers = own.layers(&base, defaults)?;
    Ok(DecoderSpec {
        experts: Some(own.experts(&base, defaults)?),
        prediction_layers: own.prediction_layers(defaults),
        ..base.decoder(AttentionSpec::Latent(attention), vec![rope], layers)
    })
}

#[cfg(test)]
mod tests {
    use marlin_kernels::{KvType, RopeLayout, Values};
    use serde_json::json;

    use super::*;

    /// GLM-4.7-Flash, by the defaults of its config class.
    fn glm_4_7_flash() -> Value {
        json!({
            "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
            "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "n_shared_experts": 1,
            "n_routed_experts": 64, "num_experts_per_tok": 4, "q_lora_rank": 768, "kv_lora_rank": 512,
            "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "partial_rotary_factor": 1.0, "num_nextn_predict_layers": 1,
        })
    }

    #[test]
    fn a_published_config_gives_its_sizes() {
        let spec = glm4_moe_lite(&glm_4_7_flash()).unwrap();
        assert_eq!(spec.kv_layout().bytes_per_token(KvType::F16), 2 * (512 + 64) * 47);
        let experts = spec.experts.unwrap();
        assert_eq!((experts.routing.shared, experts.routing.slots(), experts.routing.scale), (1, 5, 1.8));
        assert!(experts.beside.is_none());
        assert!(!spec.layers[0].has_experts && spec.layers[1..].iter().all(|layer| layer.has_experts));
        let AttentionSpec::Latent(attention) = spec.attention else { panic!("{:?}", spec.attention) };
        let shape = attention.shape(None);
        assert_eq!((shape.kv_heads, shape.head_dim, shape.values), (1, 576, Values::OfKeys(512)));
        assert_eq!((shape.scale, shape.rope), (1.0 / 16.0, RopeLayout::Interleaved));
        for (tensor, is_of_prediction) in [
            ("model.layers.46.mlp.gate.weight", false),
            ("model.layers.47.eh_proj.weight", true),
            ("model.layers.48.eh_proj.weight", false),
            ("model.norm.weight", false),
        ] {
            assert_eq!(spec.is_of_prediction(tensor), is_of_prediction, "{tensor}");
        }
    }

    #[test]
    fn yarn_sharpens_scores_by_the_square_of_its_scale() {
        let mut config = glm_4_7_flash();
        let yarn = |all_dim: f64| json!({"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": all_dim});
        let mut scale = |all_dim: f64| {
            config["rope_scaling"] = yarn(all_dim);
            let spec = glm4_moe_lite(&config).unwrap();
            let AttentionSpec::Latent(attention) = spec.attention else { panic!("{:?}", spec.attention) };
            (f64::from(attention.scale) * 16.0, f64::from(spec.ropes[0].scaling))
        };
        let magnitude = 0.1 * 40f64.ln() + 1.0;
        let (scores, angles) = scale(1.0);
        assert!((scores - magnitude * magnitude).abs() < 1e-6 && (angles - 1.0).abs() < 1e-6, "{scores} {angles}");
        // 0 is none.
        let (scores, angles) = scale(0.0);
        assert!((scores - 1.0).abs() < 1e-6 && (angles - magnitude).abs() < 1e-6, "{scores} {angles}");
    }
}
