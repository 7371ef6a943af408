//! `POST /v1/embeddings`: texts as vectors.

use axum::Json;
use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use marlin_engine::{Request, SamplingParams, StopConditions};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::answer::gather;
use super::completions::{Prompts, prompts};
use crate::body::Body;
use crate::error::{ApiError, ErrorResponse};
use crate::model::Loaded;
use crate::registry::Registry;

/// Most texts of one request, as many as OpenAI's.
const MOST_INPUTS: usize = 2048;

/// Texts that become vectors.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct EmbeddingRequest {
    /// The model, by a name that `GET /v1/models` gives.
    model: String,
    /// A text, tokens, or a list of either.
    input: Prompts,
    /// How numbers are written: `float`, or `base64` of floats of four bytes, little endian.
    encoding_format: Option<EncodingFormat>,
    /// Keep so many of the first values, and make the vector of length 1 again: for models that are trained for it (Matryoshka).
    #[schema(minimum = 1)]
    dimensions: Option<u32>,
    /// Who asks. Nothing is done with it.
    #[allow(dead_code)]
    user: Option<String>,
}

/// How the numbers of a vector are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EncodingFormat {
    /// As a list of numbers.
    #[default]
    Float,
    /// As the base64 of their bytes, four each, little endian.
    Base64,
}

/// The vectors.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EmbeddingResponse {
    /// `list`.
    object: &'static str,
    /// In the order of the texts.
    data: Vec<Embedding>,
    model: String,
    usage: EmbeddingUsage,
}

/// The vector of a text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Embedding {
    /// `embedding`.
    object: &'static str,
    /// Which text.
    index: usize,
    embedding: Vector,
}

/// A vector of length 1.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Vector {
    /// As numbers.
    Float(Vec<f32>),
    /// As base64.
    Base64(String),
}

/// Numbers of tokens.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct EmbeddingUsage {
    /// Of the texts.
    prompt_tokens: usize,
    /// The same.
    total_tokens: usize,
}

/// Makes vectors of texts.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "OpenAI", request_body = EmbeddingRequest,
    responses(
        (status = 200, body = EmbeddingResponse),
        (status = "4XX", body = ErrorResponse),
        (status = "5XX", body = ErrorResponse),
    ),
)]
pub(crate) async fn embeddings(
    State(models): State<Registry<Loaded>>,
    Body(body): Body<EmbeddingRequest>,
) -> Result<Json<EmbeddingResponse>, ApiError> {
    let served = models.lease(Some(&body.model)).await?;
    let size = served.hidden_size;
    let dimensions = body.dimensions.map_or(size, |dimensions| dimensions as usize);
    if !(1..=size).contains(&dimensions) {
        let message =
            format!("the model's vectors have {size} values: ask for 1 to {size} of them, found {dimensions}");
        return Err(ApiError::parameter("dimensions", message));
    }
    let inputs = prompts(served.clone(), body.input, "input", MOST_INPUTS).await?;
    if let Some(place) = inputs.iter().position(|input| input.tokens.is_empty()) {
        return Err(ApiError::parameter("input", format!("text {place} of the input is empty; it has no vector")));
    }
    let (format, pooling) = (body.encoding_format.unwrap_or_default(), served.model.pooling);
    let embed = |(index, tokens): (usize, Vec<u32>)| {
        let request = Request {
            prompt: tokens,
            sampling: SamplingParams::greedy(),
            stop: StopConditions { max_tokens: 0, ..StopConditions::default() },
            pooling: Some(pooling),
            ..Request::default()
        };
        let served = served.clone();
        async move {
            let mut ticket = served.submit(request).await?;
            let answer = gather(&mut ticket, 1).await?.remove(0);
            let embedding = format.write(shorten(answer.embedding, dimensions)?);
            let embedding = Embedding { object: "embedding", index, embedding };
            Ok::<_, ApiError>((embedding, answer.finish.prompt_tokens))
        }
    };
    // No more at a time than are computed together: a long list shall not keep others out.
    let inputs: Vec<_> = inputs.into_iter().map(|input| input.tokens).enumerate().collect();
    let together = served.most_choices as usize;
    let done: Vec<(Embedding, usize)> = stream::iter(inputs).map(embed).buffered(together).try_collect().await?;
    let prompt_tokens = done.iter().map(|(_, tokens)| tokens).sum();
    Ok(Json(EmbeddingResponse {
        object: "list",
        data: done.into_iter().map(|(embedding, _)| embedding).collect(),
        model: served.name().to_owned(),
        usage: EmbeddingUsage { prompt_tokens, total_tokens: prompt_tokens },
    }))
}

/// The first values of a vector, of length 1.
fn shorten(mut embedding: Vec<f32>, dimensions: usize) -> Result<Vec<f32>, ApiError> {
    if dimensions < embedding.len() {
        embedding.truncate(dimensions);
        let length = embedding.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        if length == 0.0 {
            let message = format!("the first {dimensions} values of a vector are 0; ask for more of them");
            return Err(ApiError::parameter("dimensions", message));
        }
        embedding.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    Ok(embedding)
}

impl EncodingFormat {
    fn write(self, embedding: Vec<f32>) -> Vector {
        match self {
            Self::Float => Vector::Float(embedding),
            Self::Base64 => {
                let bytes: Vec<u8> = embedding.iter().flat_map(|x| x.to_le_bytes()).collect();
                Vector::Base64(STANDARD.encode(bytes))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_vectors_have_length_1() {
        assert_eq!(shorten(vec![0.6, 0.8, 0.0], 3).unwrap(), [0.6, 0.8, 0.0]);
        assert_eq!(shorten(vec![0.3, -0.4, 0.866], 2).unwrap(), [0.6, -0.8]);
        assert!(shorten(vec![0.0, 1.0], 1).is_err());
    }

    #[test]
    fn base64_is_that_of_floats_of_four_bytes() {
        let Vector::Base64(text) = EncodingFormat::Base64.write(vec![1.0, -2.0]) else { panic!("no base64") };
        assert_eq!(text, "AACAPwAAAMA=");
    }
}
