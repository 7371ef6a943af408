//! `POST /tokenize` and `POST /detokenize`: between texts and tokens.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::blocking;
use crate::body::Body;
use crate::error::{ApiError, ErrorResponse};
use crate::model::Loaded;
use crate::registry::Registry;

/// A text to take apart.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TokenizeRequest {
    /// The model, by a name that `GET /v1/models` gives; the first one if nothing is said.
    model: Option<String>,
    /// The text.
    prompt: String,
    /// Add the tokens that a text of the model begins with.
    add_special_tokens: Option<bool>,
    /// Tell how each token is spelled, too.
    return_token_strs: Option<bool>,
}

/// Its tokens.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenizeResponse {
    tokens: Vec<u32>,
    /// How many.
    count: usize,
    /// Most tokens of prompt and answer together.
    max_model_len: usize,
    /// As text, if that was asked for.
    token_strs: Option<Vec<String>>,
}

/// Tokens to put together.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DetokenizeRequest {
    /// The model, by a name that `GET /v1/models` gives; the first one if nothing is said.
    model: Option<String>,
    /// The tokens.
    tokens: Vec<u32>,
}

/// Their text, special tokens spelled out.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DetokenizeResponse {
    prompt: String,
}

/// Takes a text apart.
#[utoipa::path(
    post, path = "/tokenize", tag = "Tokens", request_body = TokenizeRequest,
    responses(
        (status = 200, body = TokenizeResponse),
        (status = "4XX", body = ErrorResponse),
        (status = "5XX", body = ErrorResponse),
    ),
)]
pub(crate) async fn tokenize(
    State(models): State<Registry<Loaded>>,
    Body(body): Body<TokenizeRequest>,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let served = models.lease(body.model.as_deref()).await?;
    let max_model_len = served.context;
    let (tokens, token_strs) = blocking(move || {
        let tokens = served.tokenizer.encode(&body.prompt, body.add_special_tokens.unwrap_or(true))?;
        let spell = |&token: &u32| served.token_text(token);
        let spelled = body.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(spell).collect());
        Ok::<_, marlin_checkpoint::CheckpointError>((tokens, spelled))
    })
    .await?
    .map_err(|error| ApiError::server(error.to_string()))?;
    Ok(Json(TokenizeResponse { count: tokens.len(), tokens, max_model_len, token_strs }))
}

/// Puts tokens together.
#[utoipa::path(
    post, path = "/detokenize", tag = "Tokens", request_body = DetokenizeRequest,
    responses(
        (status = 200, body = DetokenizeResponse),
        (status = "4XX", body = ErrorResponse),
        (status = "5XX", body = ErrorResponse),
    ),
)]
pub(crate) async fn detokenize(
    State(models): State<Registry<Loaded>>,
    Body(body): Body<DetokenizeRequest>,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let served = models.lease(body.model.as_deref()).await?;
    let vocabulary = served.tokenizer.vocabulary_size();
    if let Some(token) = body.tokens.iter().find(|&&token| token as usize >= vocabulary) {
        let message = format!("token {token} is outside the vocabulary of {vocabulary} tokens");
        return Err(ApiError::parameter("tokens", message));
    }
    let prompt = blocking(move || served.tokenizer.decode(&body.tokens, false))
        .await?
        .map_err(|error| ApiError::server(error.to_string()))?;
    Ok(Json(DetokenizeResponse { prompt }))
}
