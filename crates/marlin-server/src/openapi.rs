//! What the server says of itself at `/openapi.json`.

use utoipa::OpenApi;
use utoipa::openapi::{OpenApi as Document, RefOr, Schema};

use crate::api::{chat, completions, messages, models, perplexity, responses, status, tokens};

/// The description.
#[derive(OpenApi)]
#[openapi(
    info(title = "Metal Marlin", description = "The OpenAI API on your own machine"),
    paths(
        models::list,
        models::retrieve,
        chat::chat_completions,
        completions::completions,
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
pub(crate) fn document(models: &[String]) -> Document {
    let mut document = Api::openapi();
    let schemas = document.components.iter_mut().flat_map(|components| components.schemas.values_mut());
    for schema in schemas {
        let RefOr::T(Schema::Object(object)) = schema else { continue };
        let may_be_null = !object.required.iter().any(|name| name == "model");
        if let Some(RefOr::T(Schema::Object(model))) = object.properties.get_mut("model")
            && model.description.as_deref().is_some_and(|description| description.contains("/v1/models"))
        {
            let null = may_be_null.then_some(serde_json::Value::Null);
            model.enum_values = Some(models.iter().map(|name| name.as_str().into()).chain(null).collect());
        }
    }
    document
}
