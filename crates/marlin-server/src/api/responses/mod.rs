//! `/v1/responses`: conversations that the server may remember.

mod request;
mod response;
mod store;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use marlin_engine::Message;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use self::request::{ResponseRequest, add_input, tool_use};
use self::response::{Asked, Builder, ResponseObject};
pub(crate) use self::store::ResponseStore;
use self::store::Stored;
use super::answer::{ServerSentEvent, named, new_id, now, sse};
use super::chat::variables;
use super::conversation::{Answers, Conversation, Function, ToolUse, chat_format};
use crate::body::Body;
use crate::error::{ApiError, ErrorResponse};
use crate::model::Loaded;
use crate::registry::Registry;

/// Goes on with a conversation.
#[utoipa::path(
    post, path = "/v1/responses", tag = "OpenAI",
    request_body = ResponseRequest,
    responses(
        (status = 200, description = "The response, whole or as a stream of server-sent events", content(
            (ResponseObject = "application/json"), (ServerSentEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorResponse),
        (status = "5XX", description = "The server cannot serve it", body = ErrorResponse),
    ),
)]
pub(crate) async fn create(
    State(models): State<Registry<Loaded>>,
    State(responses): State<Arc<ResponseStore>>,
    Body(mut body): Body<ResponseRequest>,
) -> Result<Response, ApiError> {
    let served = models.lease(Some(&body.model)).await?;
    let knows_developer = chat_format(&served)?.knows_developer();
    let (generation, logprobs, is_stream) = (body.generation(), body.logprobs()?, body.stream == Some(true));
    let mut said = match &body.previous_response_id {
        Some(id) => find(&responses, id)?.messages.clone(),
        None => Vec::new(),
    };
    add_input(&mut said, body.input, knows_developer);
    let instructions = body.instructions.iter().map(|text| Message::new("system", text));
    let messages = instructions.chain(said.iter().cloned()).collect();

    let tools: Vec<Function> = body.tools.take().unwrap_or_default().into_iter().map(Into::into).collect();
    let tool_use = tool_use(body.tool_choice).check(&tools)?;
    let parallel = body.parallel_tool_calls.unwrap_or(true);
    let asked = Asked {
        instructions: body.instructions,
        previous_response_id: body.previous_response_id,
        store: body.store.unwrap_or(true),
        max_output_tokens: body.max_output_tokens,
        temperature: body.temperature,
        top_p: body.top_p,
        tools: tools.iter().map(tool_value).collect(),
        tool_choice: tool_choice_value(&tool_use),
        parallel_tool_calls: parallel,
        truncation: "disabled",
        metadata: body.metadata.unwrap_or_default(),
    };
    let format = body.text.and_then(|text| text.format);
    let conversation = Conversation {
        messages,
        tools,
        tool_use,
        parallel,
        grammar: format.and_then(request::TextFormat::into_grammar),
        variables: variables(None, body.reasoning.and_then(|reasoning| reasoning.effort)),
        generation,
        logprobs,
    };
    let answers = conversation.submit(served.clone()).await?;
    let response = ResponseObject {
        id: new_id("resp"),
        object: "response",
        created_at: now(),
        model: served.name().to_owned(),
        status: "in_progress",
        incomplete_details: None,
        error: None,
        output: Vec::new(),
        usage: None,
        asked,
    };
    let job = Job { builder: Builder::new(served, response), responses, said };
    if is_stream { Ok(job.stream(answers)) } else { job.whole(answers).await }
}

/// Gives a response that was kept.
#[utoipa::path(
    get, path = "/v1/responses/{response_id}", tag = "OpenAI",
    params(("response_id" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The response", body = ResponseObject),
        (status = "4XX", description = "There is none of that name", body = ErrorResponse),
    ),
)]
pub(crate) async fn retrieve(
    State(responses): State<Arc<ResponseStore>>,
    Path(id): Path<String>,
) -> Result<Json<ResponseObject>, ApiError> {
    Ok(Json(find(&responses, &id)?.response.clone()))
}

/// What was forgotten.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = responses::DeletedResponse)]
pub(crate) struct DeletedResponse {
    id: String,
    /// `response.deleted`.
    object: &'static str,
    deleted: bool,
}

/// Forgets a response that was kept.
#[utoipa::path(
    delete, path = "/v1/responses/{response_id}", tag = "OpenAI",
    params(("response_id" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "It is forgotten", body = DeletedResponse),
        (status = "4XX", description = "There is none of that name", body = ErrorResponse),
    ),
)]
pub(crate) async fn delete(
    State(responses): State<Arc<ResponseStore>>,
    Path(id): Path<String>,
) -> Result<Json<DeletedResponse>, ApiError> {
    if !responses.remove(&id) {
        return Err(unknown(&id));
    }
    Ok(Json(DeletedResponse { id, object: "response.deleted", deleted: true }))
}

fn find(responses: &ResponseStore, id: &str) -> Result<Arc<Stored>, ApiError> {
    responses.get(id).ok_or_else(|| unknown(id))
}

fn unknown(id: &str) -> ApiError {
    ApiError::not_found(format!(
        "there is no response {id:?}: it was not stored, was deleted, or is forgotten (they are kept in memory, the newest 64 MiB)"
    ))
    .with_param("previous_response_id")
}

fn tool_value(Function { name, description, parameters, strict }: &Function) -> Value {
    json!({ "type": "function", "name": name, "description": description, "parameters": parameters, "strict": strict })
}

fn tool_choice_value(tool_use: &ToolUse) -> Value {
    match tool_use {
        ToolUse::None => json!("none"),
        ToolUse::Auto => json!("auto"),
        ToolUse::Required => json!("required"),
        ToolUse::Named(name) => json!({ "type": "function", "name": name }),
    }
}

/// A response on its way.
struct Job {
    responses: Arc<ResponseStore>,
    builder: Builder,
    /// What was said before, without instructions.
    said: Vec<Message>,
}

impl Job {
    async fn whole(mut self, mut answers: Answers) -> Result<Response, ApiError> {
        while let Some(piece) = answers.next().await {
            self.builder.add(piece?);
            // Nobody watches.
            self.builder.events();
        }
        let response = self.builder.response.clone();
        self.keep();
        Ok(Json(response).into_response())
    }

    fn stream(mut self, mut answers: Answers) -> Response {
        sse(async_stream::stream! {
            loop {
                for event in self.builder.events() {
                    yield named(event.name, &event.data);
                }
                match answers.next().await {
                    Some(Ok(piece)) => self.builder.add(piece),
                    Some(Err(error)) => {
                        let event = self.builder.error(&error.into_body().error);
                        yield named(event.name, &event.data);
                        return;
                    }
                    None => break,
                }
            }
            self.keep();
        })
    }

    fn keep(self) {
        let Self { responses, builder, mut said } = self;
        let response = builder.response;
        if response.asked.store {
            said.push(response.to_message());
            responses.insert(Stored { response, messages: said });
        }
    }
}
