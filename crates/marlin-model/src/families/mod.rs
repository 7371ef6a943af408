//! Model families: how each one's config.json maps to the shared blocks.

mod base;
mod deepseek;
mod experts;
mod gemma3;
mod glm4;
mod gpt_oss;
mod latent;
mod layer_type;
mod llama;
mod mistral;
mod mixtral;
mod phi3;
mod qwen;
mod qwen3_moe;

use marlin_checkpoint::Checkpoint;
use serde_json::Value;

use crate::spec::DecoderSpec;
use crate::{ConfigError, ModelError};

/// Reads a family's config.json.
type ReadSpec = fn(&Value) -> Result<DecoderSpec, ConfigError>;

/// What is found under `architectures` in config.json of a model that can be loaded, and how its config is read.
const FAMILIES: [(&str, ReadSpec); 13] = [
    ("LlamaForCausalLM", llama::spec),
    ("MistralForCausalLM", mistral::spec),
    ("Qwen2ForCausalLM", qwen::qwen2),
    ("Qwen3ForCausalLM", qwen::qwen3),
    ("Phi3ForCausalLM", phi3::spec),
    ("Gemma3ForCausalLM", gemma3::spec),
    ("MixtralForCausalLM", mixtral::spec),
    ("Qwen3MoeForCausalLM", qwen3_moe::spec),
    ("Glm4ForCausalLM", glm4::dense),
    ("Glm4MoeForCausalLM", glm4::experts),
    ("Glm4MoeLiteForCausalLM", deepseek::glm4_moe_lite),
    ("DeepseekV3ForCausalLM", deepseek::deepseek_v3),
    ("GptOssForCausalLM", gpt_oss::spec),
];

/// Names of the architectures that can be loaded, as config.json gives them.
pub fn supported_architectures() -> impl Iterator<Item = &'static str> {
    FAMILIES.into_iter().map(|(architecture, _)| architecture)
}

/// The architecture a checkpoint names, and its decoder.
pub(crate) fn spec(checkpoint: &Checkpoint) -> Result<(String, DecoderSpec), ModelError> {
    let config = checkpoint.config();
    architecture(config)
        .and_then(|architecture| {
            let family = FAMILIES.into_iter().find(|(name, _)| *name == architecture);
            let (_, read) = family.ok_or_else(|| unsupported(architecture))?;
            Ok((architecture.to_owned(), read(config)?.rotated(checkpoint.rotations())?))
        })
        .map_err(|source| ModelError::Config { model: checkpoint.name().to_owned(), source })
}

fn architecture(config: &Value) -> Result<&str, ConfigError> {
    let architectures = config.get("architectures").filter(|value| !value.is_null());
    let first = architectures.and_then(|value| value.get(0)).and_then(Value::as_str);
    first.ok_or_else(|| {
        let found = architectures.map_or("nothing".to_owned(), Value::to_string);
        let supported = supported();
        ConfigError::new("architectures", format!("must be a list of one of {supported}; found {found}"))
    })
}

fn unsupported(architecture: &str) -> ConfigError {
    let supported = supported();
    ConfigError::new("architectures", format!("{architecture} is not supported; supported are {supported}"))
}

fn supported() -> String {
    supported_architectures().collect::<Vec<_>>().join(", ")
}
