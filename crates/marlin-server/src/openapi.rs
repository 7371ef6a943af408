//! What the server says of itself at `/openapi.json`.

use utoipa::OpenApi;
use utoipa::openapi::OpenApi as Document;

use crate::api::{chat, completions, models, perplexity, status, tokens};

/// The description.
#[derive(OpenApi)]
#[openapi(
    info(title = "Metal Marlin", description = "The OpenAI API on your own machine"),
    paths(
        models::list,
        models::retrieve,
        chat::chat_completions,
        completions::completions,
        perplexity::perplexity,
        tokens::tokenize,
        tokens::detokenize,
        status::health,
        status::metrics,
    )
)]
struct Api;

/// The description of all endpoints.
pub(crate) fn document() -> Document {
    Api::openapi()
}
