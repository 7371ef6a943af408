//! `POST /v1/messages` and `POST /v1/messages/count_tokens`: conversations in Anthropic's form.

mod request;
mod response;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use marlin_engine::Grammar;
use serde::Serialize;
use utoipa::ToSchema;

use self::request::{
    CountTokensRequest, MessagesRequest, OutputConfig, OutputFormat, SystemPrompt, Thinking, ToolChoice,
    ToolDefinition, Turn, messages as messages_of, tool_use, variables,
};
use self::response::{Blocks, MessageEnd, MessageResponse, MessageUsage, StreamEvent, TokenCount, blocks, stop_reason};
use super::answer::{ServerSentEvent, named, new_id, sse};
use super::conversation::{Answers, Conversation, End, Function};
use super::generation::Generation;
use crate::body::Body;
use crate::dialect::Delta;
use crate::error::{ApiError, ErrorBody};
use crate::model::Loaded;
use crate::registry::Registry;

/// An error in Anthropic's shape.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = messages::MessageErrorResponse)]
pub(crate) struct MessageErrorResponse {
    /// `error`.
    #[serde(rename = "type")]
    kind: &'static str,
    error: MessageError,
}

/// What is wrong.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = messages::MessageError)]
pub(crate) struct MessageError {
    /// `invalid_request_error`, `authentication_error`, `not_found_error`, `request_too_large`, `rate_limit_error`, `timeout_error`,
    /// `overloaded_error` or `api_error`.
    #[serde(rename = "type")]
    kind: &'static str,
    message: String,
}

impl MessageErrorResponse {
    fn new(status: StatusCode, body: ErrorBody) -> Self {
        let kind = match status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::GATEWAY_TIMEOUT => "timeout_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "api_error",
        };
        Self { kind: "error", error: MessageError { kind, message: body.into_message() } }
    }
}

/// Gives the errors of these endpoints Anthropic's shape, whatever found them.
pub(crate) async fn reshape_errors(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let Some(body) = response.extensions_mut().remove::<ErrorBody>() else { return response };
    let status = response.status();
    let mut reshaped = (status, Json(MessageErrorResponse::new(status, body))).into_response();
    if let Some(seconds) = response.headers_mut().remove(axum::http::header::RETRY_AFTER) {
        reshaped.headers_mut().insert(axum::http::header::RETRY_AFTER, seconds);
    }
    reshaped
}

/// Goes on with a conversation, in Anthropic's form.
#[utoipa::path(
    post, path = "/v1/messages", tag = "Anthropic",
    request_body = MessagesRequest,
    responses(
        (status = 200, description = "The answer, whole or as a stream of server-sent events", content(
            (MessageResponse = "application/json"), (ServerSentEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request cannot be served", body = MessageErrorResponse),
        (status = "5XX", description = "The server cannot serve it", body = MessageErrorResponse),
    ),
)]
pub(crate) async fn messages(
    State(models): State<Registry<Loaded>>,
    Body(mut body): Body<MessagesRequest>,
) -> Result<Response, ApiError> {
    let served = models.lease(Some(&body.model)).await?;
    let generation = body.generation();
    let is_stream = body.stream == Some(true);
    let tells_thoughts = body.thinking.as_ref().is_none_or(Thinking::is_told);
    let asked = Asked {
        system: body.system,
        turns: body.messages,
        tools: body.tools,
        tool_choice: body.tool_choice,
        thinking: body.thinking,
        output_config: body.output_config,
    };
    let answers = asked.conversation(generation)?.submit(served.clone()).await?;
    let message = MessageResponse {
        id: new_id("msg"),
        kind: "message",
        role: "assistant",
        model: served.name().to_owned(),
        content: Vec::new(),
        stop_reason: None,
        stop_sequence: None,
        usage: MessageUsage { input_tokens: answers.prompt_tokens(), ..MessageUsage::default() },
    };
    let job = Job { answers, message, tells_thoughts };
    if is_stream { Ok(job.stream()) } else { job.whole().await }
}

/// Counts the tokens of a conversation.
#[utoipa::path(
    post, path = "/v1/messages/count_tokens", tag = "Anthropic",
    request_body = CountTokensRequest,
    responses(
        (status = 200, description = "Their number", body = TokenCount),
        (status = "4XX", description = "The request cannot be served", body = MessageErrorResponse),
        (status = "5XX", description = "The server cannot serve it", body = MessageErrorResponse),
    ),
)]
pub(crate) async fn count_tokens(
    State(models): State<Registry<Loaded>>,
    Body(body): Body<CountTokensRequest>,
) -> Result<Json<TokenCount>, ApiError> {
    let served = models.lease(Some(&body.model)).await?;
    let asked = Asked {
        system: body.system,
        turns: body.messages,
        tools: body.tools,
        tool_choice: body.tool_choice,
        thinking: body.thinking,
        output_config: body.output_config,
    };
    let input_tokens = asked.conversation(Generation::default())?.count_tokens(served).await?;
    Ok(Json(TokenCount { input_tokens }))
}

/// What both endpoints are asked.
struct Asked {
    system: Option<SystemPrompt>,
    turns: Vec<Turn>,
    tools: Option<Vec<ToolDefinition>>,
    tool_choice: Option<ToolChoice>,
    thinking: Option<Thinking>,
    output_config: Option<OutputConfig>,
}

impl Asked {
    fn conversation(self, generation: Generation) -> Result<Conversation, ApiError> {
        let (effort, format) = self.output_config.map_or((None, None), |config| (config.effort, config.format));
        let tools: Vec<Function> = self.tools.into_iter().flatten().map(Into::into).collect();
        let (tool_use, parallel) = tool_use(self.tool_choice);
        Ok(Conversation {
            messages: messages_of(self.system, self.turns)?,
            tool_use: tool_use.check(&tools)?,
            tools,
            parallel,
            grammar: format.map(|OutputFormat::JsonSchema { schema }| Grammar::JsonSchema(schema.into())),
            variables: variables(self.thinking.as_ref(), effort),
            generation,
            logprobs: None,
        })
    }
}

/// A message on its way.
struct Job {
    answers: Answers,
    message: MessageResponse,
    tells_thoughts: bool,
}

impl Job {
    async fn whole(self) -> Result<Response, ApiError> {
        let Self { answers, message, tells_thoughts } = self;
        let mut answers = answers.whole().await?;
        let Some(mut answer) = answers.pop() else { return Err(ApiError::server("there is no answer")) };
        answer.deltas.retain(|delta| is_told(tells_thoughts, delta));
        let usage = (&answer.end.finish).into();
        let (reason, stop_sequence) = stop_reason(answer.end.ending);
        let content = blocks(answer.deltas);
        let stop_reason = Some(reason);
        Ok(Json(MessageResponse { content, stop_reason, stop_sequence, usage, ..message }).into_response())
    }

    fn stream(self) -> Response {
        let Self { mut answers, message, tells_thoughts } = self;
        sse(async_stream::stream! {
            let mut blocks = Blocks::default();
            let mut events = vec![StreamEvent::MessageStart { message }];
            loop {
                for event in events.drain(..) {
                    yield named(event.name(), &event);
                }
                let Some(piece) = answers.next().await else { break };
                let piece = match piece {
                    Ok(piece) => piece,
                    Err(error) => {
                        let (status, body) = error.into_parts();
                        yield named("error", &MessageErrorResponse::new(status, body));
                        return;
                    }
                };
                for delta in piece.deltas.into_iter().filter(|delta| is_told(tells_thoughts, delta)) {
                    blocks.add(delta, &mut events);
                }
                if let Some(End { ending, finish }) = piece.end {
                    blocks.end(&mut events);
                    let (stop_reason, stop_sequence) = stop_reason(ending);
                    let delta = MessageEnd { stop_reason, stop_sequence };
                    events.push(StreamEvent::MessageDelta { delta, usage: (&finish).into() });
                    events.push(StreamEvent::MessageStop {});
                }
            }
        })
    }
}

/// Whether a change is told, where thoughts are not always.
fn is_told(tells_thoughts: bool, delta: &Delta) -> bool {
    tells_thoughts || !matches!(delta, Delta::Reasoning(_))
}
