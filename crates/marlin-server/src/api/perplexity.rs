//! `POST /v1/perplexity`: how well the model knows a text.

use axum::Json;
use axum::extract::State;
use marlin_engine::{Request, SamplingParams, StopConditions};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::answer::gather;
use super::blocking;
use super::completions::finite;
use crate::body::Body;
use crate::error::{ApiError, ErrorResponse};
use crate::model::Loaded;
use crate::registry::Registry;

/// A text to judge.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PerplexityRequest {
    /// The model, by a name that `GET /v1/models` gives; the first one if nothing is said.
    model: Option<String>,
    /// The text; at least two tokens, and no more than the context holds.
    text: String,
    /// Tell how likely each token was, too.
    logprobs: Option<bool>,
}

/// What the model makes of it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PerplexityResponse {
    /// `perplexity`.
    object: &'static str,
    model: String,
    /// Tokens of the text, the first of which is not judged.
    tokens: usize,
    /// Mean of the negative logarithms of the tokens' probabilities, each given those before it.
    mean_negative_log_likelihood: f64,
    /// e to the power of that.
    perplexity: f64,
    /// Of each token but the first, if they were asked for.
    logprobs: Option<Vec<f32>>,
}

/// Judges a text.
#[utoipa::path(
    post, path = "/v1/perplexity", tag = "Metal Marlin", request_body = PerplexityRequest,
    responses(
        (status = 200, body = PerplexityResponse),
        (status = "4XX", body = ErrorResponse),
        (status = "5XX", body = ErrorResponse),
    ),
)]
pub(crate) async fn perplexity(
    State(models): State<Registry<Loaded>>,
    Body(body): Body<PerplexityRequest>,
) -> Result<Json<PerplexityResponse>, ApiError> {
    let served = models.lease(body.model.as_deref()).await?;
    let prompt = {
        let served = served.clone();
        blocking(move || served.tokenizer.encode(&body.text, true))
            .await?
            .map_err(|error| ApiError::server(error.to_string()))?
    };
    let tokens = prompt.len();
    if tokens < 2 {
        return Err(ApiError::parameter("text", format!("the text must have at least 2 tokens, found {tokens}")));
    }
    let request = Request {
        prompt,
        sampling: SamplingParams::greedy(),
        stop: StopConditions { max_tokens: 0, ..StopConditions::default() },
        prompt_logprobs: Some(0),
        ..Request::default()
    };
    let mut ticket = served.submit(request).await?;
    let answers = gather(&mut ticket, 1).await?;
    let logprobs: Vec<f32> = answers[0].prompt_logprobs.iter().map(|scored| finite(scored.logprob)).collect();
    let mean = -logprobs.iter().map(|&logprob| f64::from(logprob)).sum::<f64>() / logprobs.len() as f64;
    Ok(Json(PerplexityResponse {
        object: "perplexity",
        model: served.name().to_owned(),
        tokens,
        mean_negative_log_likelihood: mean,
        // JSON has no infinity.
        perplexity: mean.exp().min(f64::MAX),
        logprobs: body.logprobs.unwrap_or(false).then_some(logprobs),
    }))
}
