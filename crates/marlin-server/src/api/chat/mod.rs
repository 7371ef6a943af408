//! `POST /v1/chat/completions`: conversations.

mod request;
mod response;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use marlin_engine::TokenLogprobs;

use self::request::tool_use;
pub(crate) use self::request::{ChatRequest, ReasoningEffort, ToolMode, variables};
use self::response::{
    AssistantMessage, ChatChoice, ChatChunk, ChatLogprobs, ChatResponse, ChunkChoice, FunctionCall, MessageDelta,
    ToolCall, ToolCallDelta,
};
pub(crate) use self::response::{ChatTokenLogprob, chat_logprobs};
use super::answer::{self, ServerSentEvent, Usage, data, done, new_id, now};
use super::conversation::{Answers, Conversation, Ending, Function, Piece, chat_format};
use super::format::ResponseFormat;
use super::generation::check_logprobs;
use crate::body::Body;
use crate::dialect::Delta;
use crate::error::{ApiError, ErrorResponse};
use crate::model::{Loaded, Served};
use crate::registry::Registry;

/// Goes on with a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "OpenAI",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answers, whole or as a stream of server-sent events", content(
            (ChatResponse = "application/json"), (ServerSentEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorResponse),
        (status = "5XX", description = "The server cannot serve it", body = ErrorResponse),
    ),
)]
pub(crate) async fn chat_completions(
    State(models): State<Registry<Loaded>>,
    Body(mut body): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let served = models.lease(Some(&body.model)).await?;
    let knows_developer = chat_format(&served)?.knows_developer();
    let mut generation = body.generation();
    generation.max_tokens = match (body.max_completion_tokens, generation.max_tokens) {
        (Some(newer), Some(older)) if newer != older => {
            let message = "max_tokens and max_completion_tokens mean the same, and differ: give one of them";
            return Err(ApiError::parameter("max_completion_tokens", message));
        }
        (newer, older) => newer.or(older),
    };
    let include_usage = generation.include_usage()?;
    let is_stream = generation.stream == Some(true);
    let logprobs = logprobs(body.logprobs, body.top_logprobs)?;

    let tools: Vec<Function> = body.tools.take().unwrap_or_default().into_iter().map(Into::into).collect();
    let conversation = Conversation {
        messages: body.messages.into_iter().map(|message| message.into_message(knows_developer)).collect(),
        tool_use: tool_use(body.tool_choice).check(&tools)?,
        tools,
        parallel: body.parallel_tool_calls.unwrap_or(true),
        grammar: body.response_format.and_then(ResponseFormat::into_grammar),
        variables: variables(body.chat_template_kwargs, body.reasoning_effort),
        generation,
        logprobs,
    };
    let answers = conversation.submit(served.clone()).await?;
    let job = Job { id: new_id("chatcmpl"), created: now(), served, wants_logprobs: logprobs.is_some() };
    if is_stream { Ok(job.stream(answers, include_usage)) } else { job.whole(answers).await }
}

fn logprobs(wanted: Option<bool>, top: Option<u32>) -> Result<Option<usize>, ApiError> {
    match (wanted.unwrap_or(false), top.map(|top| top as usize)) {
        (false, Some(_)) => Err(ApiError::parameter("top_logprobs", "top_logprobs need logprobs: set that to true")),
        (false, None) => Ok(None),
        (true, top) => check_logprobs("top_logprobs", top.unwrap_or(0)).map(Some),
    }
}

/// A request on its way.
struct Job {
    id: String,
    created: u64,
    served: Arc<Served>,
    wants_logprobs: bool,
}

impl Job {
    fn logprobs(&self, scored: &[TokenLogprobs]) -> Option<ChatLogprobs> {
        self.wants_logprobs.then(|| ChatLogprobs::new(&self.served, scored))
    }

    async fn whole(self, answers: Answers) -> Result<Response, ApiError> {
        let mut usage = Usage::default();
        let mut choices = Vec::new();
        for (index, answer) in (0..).zip(answers.whole().await?) {
            usage.count(index, &answer.end.finish);
            choices.push(ChatChoice {
                index,
                message: message(answer.deltas),
                logprobs: self.logprobs(&answer.logprobs),
                finish_reason: reason(&answer.end.ending),
            });
        }
        let Self { id, created, served, .. } = self;
        let model = served.name().to_owned();
        Ok(Json(ChatResponse { id, object: "chat.completion", created, model, choices, usage }).into_response())
    }

    fn stream(self, mut answers: Answers, include_usage: bool) -> Response {
        answer::sse(async_stream::stream! {
            let mut usage = Usage::default();
            for index in 0..answers.count() {
                let delta =
                    MessageDelta { role: Some("assistant"), content: Some(String::new()), ..MessageDelta::default() };
                yield data(&self.chunk(ChunkChoice { index, delta, logprobs: None, finish_reason: None }));
            }
            while let Some(piece) = answers.next().await {
                match piece {
                    Ok(piece) => {
                        if let Some(end) = &piece.end {
                            usage.count(piece.choice, &end.finish);
                        }
                        for choice in self.choices(piece) {
                            yield data(&self.chunk(choice));
                        }
                    }
                    Err(error) => {
                        yield data(&error.into_body());
                        yield done();
                        return;
                    }
                }
            }
            if include_usage {
                yield data(&ChatChunk { choices: Vec::new(), usage: Some(usage), ..self.empty_chunk() });
            }
            yield done();
        })
    }

    /// A chunk for each change of an answer, and one for its end.
    fn choices(&self, piece: Piece) -> Vec<ChunkChoice> {
        let choice = |delta| ChunkChoice { index: piece.choice, delta, logprobs: None, finish_reason: None };
        let mut choices: Vec<ChunkChoice> = piece.deltas.into_iter().map(|delta| choice(delta_of(delta))).collect();
        if let Some(scored) = &piece.logprobs {
            // They come with the first change, or with one of nothing while text is held back.
            if choices.is_empty() {
                choices.push(choice(MessageDelta::default()));
            }
            choices[0].logprobs = self.logprobs(std::slice::from_ref(scored));
        }
        if let Some(end) = &piece.end {
            choices.push(ChunkChoice { finish_reason: Some(reason(&end.ending)), ..choice(MessageDelta::default()) });
        }
        choices
    }

    fn chunk(&self, choice: ChunkChoice) -> ChatChunk {
        ChatChunk { choices: vec![choice], ..self.empty_chunk() }
    }

    fn empty_chunk(&self) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.served.name().to_owned(),
            choices: Vec::new(),
            usage: None,
        }
    }
}

/// Why an answer ended, in OpenAI's words.
fn reason(ending: &Ending) -> &'static str {
    match ending {
        Ending::Complete | Ending::StopString(_) => "stop",
        Ending::Calls => "tool_calls",
        Ending::Length => "length",
    }
}

/// The whole message.
fn message(deltas: Vec<Delta>) -> AssistantMessage {
    let mut message = AssistantMessage { role: "assistant", ..AssistantMessage::default() };
    for delta in deltas {
        match delta {
            Delta::Content(text) => message.content.get_or_insert_default().push_str(&text),
            Delta::Reasoning(text) => message.reasoning_content.get_or_insert_default().push_str(&text),
            Delta::ToolCallStart { id, name, .. } => {
                let function = FunctionCall { name, arguments: String::new() };
                message.tool_calls.push(ToolCall { id, kind: "function", function });
            }
            Delta::ToolCallArguments { index, fragment } => {
                message.tool_calls[index].function.arguments.push_str(&fragment);
            }
        }
    }
    if message.tool_calls.is_empty() {
        message.content.get_or_insert_default();
    }
    message
}

fn delta_of(delta: Delta) -> MessageDelta {
    let mut message = MessageDelta::default();
    match delta {
        Delta::Content(text) => message.content = Some(text),
        Delta::Reasoning(text) => message.reasoning_content = Some(text),
        Delta::ToolCallStart { index, id, name } => {
            let function = FunctionCall { name, arguments: String::new() };
            message.tool_calls.push(ToolCallDelta { index, id: Some(id), kind: Some("function"), function });
        }
        Delta::ToolCallArguments { index, fragment } => {
            let function = FunctionCall { name: String::new(), arguments: fragment };
            message.tool_calls.push(ToolCallDelta { index, id: None, kind: None, function });
        }
    }
    message
}
