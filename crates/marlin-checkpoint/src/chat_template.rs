//! The chat template of a model, and the special tokens it may name.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::CheckpointError;
use crate::source::Source;
use crate::tokenizer::{SpecialToken, TOKENIZER_CONFIG};

pub(crate) const TEMPLATE_FILE: &str = "chat_template.jinja";

#[derive(Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    chat_template: Option<ChatTemplate>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a template or a list of {name, template}")]
enum ChatTemplate {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// chat_template.jinja, or else what tokenizer_config.json holds: one template, or several of which `default` is taken.
pub(crate) fn read(source: &Source) -> Result<Option<String>, CheckpointError> {
    if let Some(bytes) = source.read(TEMPLATE_FILE)? {
        return match String::from_utf8(bytes.into_owned()) {
            Ok(template) => Ok(Some(template)),
            Err(e) => Err(CheckpointError::malformed(&source.label(TEMPLATE_FILE), e.to_string())),
        };
    }
    let config: Option<TokenizerConfig> = source.json(TOKENIZER_CONFIG)?;
    match config.and_then(|config| config.chat_template) {
        None => Ok(None),
        Some(ChatTemplate::One(template)) => Ok(Some(template)),
        Some(ChatTemplate::Named(templates)) => {
            let names: Vec<String> = templates.iter().map(|t| t.name.clone()).collect();
            templates.into_iter().find(|t| t.name == "default").map(|t| Some(t.template)).ok_or_else(|| {
                let problem = format!("chat_template has none named `default`, only {names:?}");
                CheckpointError::malformed(&source.label(TOKENIZER_CONFIG), problem)
            })
        }
    }
}

/// The special tokens of tokenizer_config.json under their names there.
pub(crate) fn special_tokens(source: &Source) -> Result<BTreeMap<String, String>, CheckpointError> {
    let config: BTreeMap<String, Value> = source.json(TOKENIZER_CONFIG)?.unwrap_or_default();
    // Settings end in `_token` as well: `add_bos_token`. A token that is null is none.
    let named = config.into_iter().filter(|(name, _)| name.ends_with("_token"));
    Ok(named
        .filter_map(|(name, value)| SpecialToken::deserialize(value).ok().map(|token| (name, token.into_text())))
        .collect())
}
