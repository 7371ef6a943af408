//! What an answer must look like.

use std::sync::Arc;

use marlin_engine::{Constraint, Grammar};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::blocking;
use crate::dialect::Tool;
use crate::error::ApiError;
use crate::model::Served;

/// What the answer must look like.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ResponseFormat {
    /// Any text.
    Text {},
    /// A JSON object.
    JsonObject {},
    /// An instance of a JSON schema.
    JsonSchema {
        /// The schema.
        json_schema: NamedSchema,
    },
    /// A text of a grammar.
    Grammar {
        /// How the grammar is written.
        syntax: Syntax,
        /// The grammar.
        definition: String,
    },
}

/// A JSON schema, and what it is called.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedSchema {
    #[expect(dead_code, reason = "it changes nothing")]
    name: Option<String>,
    #[expect(dead_code, reason = "it changes nothing")]
    description: Option<String>,
    /// The schema.
    schema: Map<String, Value>,
    /// Schemas are followed to the letter, whatever this says.
    #[expect(dead_code, reason = "it changes nothing")]
    strict: Option<bool>,
}

/// How a grammar is written.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Syntax {
    /// In the dialect of Lark that `llguidance` reads.
    Lark,
    /// As a regular expression, which matches the whole answer.
    Regex,
}

impl ResponseFormat {
    /// The grammar of the answer, if it has one.
    pub(crate) fn into_grammar(self) -> Option<Grammar> {
        match self {
            Self::Text {} => None,
            Self::JsonObject {} => Some(Grammar::JsonObject),
            Self::JsonSchema { json_schema } => Some(Grammar::JsonSchema(json_schema.schema.into())),
            Self::Grammar { syntax: Syntax::Lark, definition } => Some(Grammar::Lark(definition)),
            Self::Grammar { syntax: Syntax::Regex, definition } => Some(Grammar::Regex(definition)),
        }
    }
}

/// Compiles a grammar for the model's tokens.
pub(crate) async fn compile(
    served: &Arc<Served>,
    grammar: Option<Grammar>,
    param: &'static str,
) -> Result<Option<Constraint>, ApiError> {
    let Some(grammar) = grammar else { return Ok(None) };
    let served = served.clone();
    let compiled = blocking(move || match &served.grammars {
        Ok(compiler) => compiler.compile(&grammar).map_err(|error| error.to_string()),
        Err(reason) => Err(format!("this model\'s answers cannot be given a form: {reason}")),
    });
    compiled.await?.map(Some).map_err(|message| ApiError::parameter(param, message))
}

/// Names under which schemas keep their parts; references to them go from the root.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// How many calls an answer consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Calls {
    /// One, an object of its name and its arguments.
    One,
    /// One or more, a list of such objects.
    Several,
}

/// The grammar of an answer that calls these tools and says nothing else.
pub(crate) fn demanded(tools: &[&Tool], calls: Calls) -> Result<Grammar, ApiError> {
    let mut root = Map::new();
    let mut kinds = Vec::with_capacity(tools.len());
    for tool in tools {
        let mut arguments = tool.parameters.clone().unwrap_or_else(|| json!({ "type": "object" }));
        for name in DEFINITIONS {
            let Some(Value::Object(parts)) = arguments.as_object_mut().and_then(|schema| schema.remove(name)) else {
                continue;
            };
            let known = root.entry(name).or_insert_with(|| Value::Object(Map::new()));
            for (part, schema) in parts {
                match known.get(&part) {
                    Some(other) if *other != schema => {
                        let message =
                            format!("the schemas of the tools have different parts named {part:?}; rename one of them");
                        return Err(ApiError::parameter("tools", message));
                    }
                    _ => known[&part] = schema,
                }
            }
        }
        kinds.push(json!({
            "type": "object",
            "properties": { "name": { "const": tool.name }, "arguments": arguments },
            "required": ["name", "arguments"],
            "additionalProperties": false,
        }));
    }
    let call = json!({ "anyOf": kinds });
    let answer = match calls {
        Calls::One => call,
        Calls::Several => json!({ "type": "array", "items": call, "minItems": 1 }),
    };
    root.extend(answer.as_object().cloned().unwrap_or_default());
    Ok(Grammar::JsonSchema(root.into()))
}
