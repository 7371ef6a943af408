//! Model families: how each one's config.json maps to the shared blocks.

mod base;
mod gemma3;
mod layer_type;
mod llama;
mod mistral;
mod phi3;
mod qwen;

use marlin_checkpoint::Checkpoint;
use serde_json::Value;

use crate::spec::DecoderSpec;
use crate::{ConfigError, ModelError};

/// What is found under `architectures` in config.json of a model that can be loaded.
pub const SUPPORTED_ARCHITECTURES: &[&str] = &[
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "Gemma3ForCausalLM",
];

/// The architecture a checkpoint names, and its decoder.
pub(crate) fn spec(checkpoint: &Checkpoint) -> Result<(String, DecoderSpec), ModelError> {
    let config = checkpoint.config();
    architecture(config)
        .and_then(|architecture| {
            let spec = match architecture {
                "LlamaForCausalLM" => llama::spec(config),
                "MistralForCausalLM" => mistral::spec(config),
                "Qwen2ForCausalLM" => qwen::qwen2(config),
                "Qwen3ForCausalLM" => qwen::qwen3(config),
                "Phi3ForCausalLM" => phi3::spec(config),
                "Gemma3ForCausalLM" => gemma3::spec(config),
                other => Err(unsupported(other)),
            };
            Ok((architecture.to_owned(), spec?))
        })
        .map_err(|source| ModelError::Config { model: checkpoint.name().to_owned(), source })
}

fn architecture(config: &Value) -> Result<&str, ConfigError> {
    let architectures = config.get("architectures").filter(|value| !value.is_null());
    let first = architectures.and_then(|value| value.get(0)).and_then(Value::as_str);
    first.ok_or_else(|| {
        let found = architectures.map_or("nothing".to_owned(), Value::to_string);
        let supported = SUPPORTED_ARCHITECTURES.join(", ");
        ConfigError::new("architectures", format!("must be a list of one of {supported}; found {found}"))
    })
}

fn unsupported(architecture: &str) -> ConfigError {
    let supported = SUPPORTED_ARCHITECTURES.join(", ");
    ConfigError::new("architectures", format!("{architecture} is not supported; supported are {supported}"))
}
