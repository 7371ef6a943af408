//! What the engine says of a request, gathered or as it comes.

use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use marlin_engine::{Event, Finish, FinishReason, TokenLogprobs};
use serde::Serialize;
use std::convert::Infallible;
use utoipa::ToSchema;

use crate::error::ApiError;
use crate::worker::{Ticket, Update};

/// Why an answer ended, in OpenAI's words.
pub(crate) fn finish_reason(reason: &FinishReason) -> Result<&'static str, ApiError> {
    match reason {
        FinishReason::StopToken(_) | FinishReason::StopString(_) | FinishReason::Complete => Ok("stop"),
        FinishReason::Length | FinishReason::Context => Ok("length"),
        FinishReason::NotFinite | FinishReason::Grammar(_) | FinishReason::Failed(_) => {
            Err(reason.error().map_or_else(|| ApiError::server("the answer failed"), Into::into))
        }
    }
}

/// The next event of a request.
pub(crate) async fn next(ticket: &mut Ticket) -> Option<Result<Event, ApiError>> {
    Some(match ticket.next().await? {
        Update::Event(event) => Ok(event),
        Update::Late => Err(ApiError::timeout(
            "the answer was not finished in time (--timeout of the server); ask for fewer tokens, or try again",
        )),
        Update::Failed(reason) => Err(ApiError::server(reason)),
    })
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    pub(crate) embedding: Vec<f32>,
    pub(crate) finish: Finish,
}

/// Waits for all answers to a request.
pub(crate) async fn gather(ticket: &mut Ticket, choices: u32) -> Result<Vec<Answer>, ApiError> {
    let mut answers: Vec<_> = (0..choices).map(|_| (PartialAnswer::default(), None)).collect();
    while let Some(event) = next(ticket).await {
        let event = event?;
        let (answer, finish) = &mut answers[event.choice as usize];
        answer.text.push_str(&event.text);
        answer.logprobs.extend(event.logprobs);
        answer.prompt_logprobs.extend(event.prompt_logprobs);
        answer.embedding.extend(event.embedding);
        *finish = event.finish;
    }
    let whole = |(answer, finish): (PartialAnswer, Option<Finish>)| {
        let finish = finish.ok_or_else(|| ApiError::server("the answer has no end"))?;
        if let Some(error) = finish.reason.error() {
            return Err(error.into());
        }
        let PartialAnswer { text, logprobs, prompt_logprobs, embedding } = answer;
        Ok(Answer { text, logprobs, prompt_logprobs, embedding, finish })
    };
    answers.into_iter().map(whole).collect()
}

/// An answer that has not ended.
#[derive(Default)]
struct PartialAnswer {
    text: String,
    logprobs: Vec<TokenLogprobs>,
    prompt_logprobs: Vec<TokenLogprobs>,
    embedding: Vec<f32>,
}

/// Numbers of tokens.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct Usage {
    /// Of the prompts.
    pub(crate) prompt_tokens: usize,
    /// Of all answers.
    pub(crate) completion_tokens: usize,
    /// Of both.
    pub(crate) total_tokens: usize,
    /// More of the prompts.
    pub(crate) prompt_tokens_details: PromptDetails,
}

/// Which tokens of prompts were not computed.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct PromptDetails {
    /// Those that the KV cache held already.
    pub(crate) cached_tokens: usize,
}

impl Usage {
    /// Counts an answer; the prompt is counted with the first of its answers.
    pub(crate) fn count(&mut self, choice: u32, finish: &Finish) {
        if choice == 0 {
            self.prompt_tokens += finish.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += finish.cached_tokens;
        }
        self.completion_tokens += finish.generated_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// What a stream consists of, as HTML's standard has it.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it describes what axum writes")]
pub(crate) struct ServerSentEvent {
    /// What kind of event it is, in APIs that have several.
    event: Option<String>,
    /// A JSON object, or `[DONE]`.
    data: String,
}

/// An object of a stream.
pub(crate) fn data(value: &impl Serialize) -> SseEvent {
    // What the server says of itself always becomes JSON.
    SseEvent::default().json_data(value).unwrap_or_default()
}

/// The same, with the name of what kind of event it is.
pub(crate) fn named(name: &'static str, value: &impl Serialize) -> SseEvent {
    SseEvent::default().event(name).json_data(value).unwrap_or_default()
}

/// The end of a stream.
pub(crate) fn done() -> SseEvent {
    SseEvent::default().data("[DONE]")
}

/// A stream as a response; comments keep it alive while a long prompt is computed.
pub(crate) fn sse(stream: impl Stream<Item = SseEvent> + Send + 'static) -> Response {
    use futures_util::StreamExt;
    Sse::new(stream.map(Ok::<_, Infallible>)).keep_alive(KeepAlive::default()).into_response()
}

/// A name for an answer.
pub(crate) fn new_id(prefix: &str) -> String {
    // Names need not be secret, only different.
    let number = getrandom::u64().unwrap_or_default();
    format!("{prefix}-{number:016x}")
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
