//! What the server says of itself at `/openapi.json`.

use serde_json::Value;
use utoipa::OpenApi;

use crate::api::{chat, completions, embeddings, messages, models, perplexity, responses, status, tokens};

/// The description.
#[derive(OpenApi)]
#[openapi(
    info(title = "Metal Marlin", description = "The OpenAI API on your own machine"),
    paths(
        models::list,
        models::retrieve,
        chat::chat_completions,
        completions::completions,
        embeddings::embeddings,
        responses::create,
        responses::retrieve,
        responses::delete,
        messages::messages,
        messages::count_tokens,
        perplexity::perplexity,
        tokens::tokenize,
        tokens::detokenize,
        status::health,
        status::metrics,
    )
)]
struct Api;

/// The description of all endpoints of a server that has models of these names.
pub(crate) fn document(models: &[String]) -> Value {
    let mut document = serde_json::to_value(Api::openapi()).unwrap_or_default();
    complete(&mut document, models);
    document
}

/// Says of all that is described within what utoipa cannot: which models there are, and how large numbers may be that have no sign.
fn complete(value: &mut Value, models: &[String]) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| complete(item, models)),
        Value::Object(object) => {
            let is_unsigned = object.get("minimum").and_then(Value::as_f64).is_some_and(|least| least >= 0.0);
            if is_unsigned && object.get("format").is_some_and(|format| format == "int32") {
                object.insert("format".to_owned(), "int64".into());
                object.entry("maximum").or_insert(u32::MAX.into());
            }
            let description = object.get("description").and_then(Value::as_str).unwrap_or_default();
            if description.contains("a name that `GET /v1/models` gives") && object.contains_key("type") {
                let may_be_null = object.get("type").is_some_and(Value::is_array);
                let null = may_be_null.then_some(Value::Null);
                let names = models.iter().map(|name| name.as_str().into()).chain(null).collect();
                object.insert("enum".to_owned(), Value::Array(names));
            }
            object.values_mut().for_each(|inside| complete(inside, models));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn models_and_ranges_are_described() {
        let document = document(&["one".to_owned(), "two".to_owned()]);
        let properties = |name: &str| &document["components"]["schemas"][name]["properties"];
        assert_eq!(properties("ChatRequest")["model"]["enum"], json!(["one", "two"]));
        assert_eq!(properties("TokenizeRequest")["model"]["enum"], json!(["one", "two", null]));
        assert_eq!(properties("ChatRequest")["max_tokens"]["maximum"], json!(u32::MAX));
        assert_eq!(properties("ChatRequest")["top_k"]["format"], "int32", "it has a sign");
    }
}
