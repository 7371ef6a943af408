//! `POST /v1/chat/completions`: conversations.

mod request;
mod response;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use marlin_engine::{ChatOptions, Event, Grammar, Message, Request, TokenLogprobs};

pub(crate) use self::request::ChatRequest;
use self::request::{ToolUse, tool_use, variables};
use self::response::{
    AssistantMessage, ChatChoice, ChatChunk, ChatLogprobs, ChatResponse, ChunkChoice, FunctionCall, MessageDelta,
    ToolCall, ToolCallDelta,
};
use super::answer::{self, Usage, data, done, finish_reason, gather, new_id, now};
use super::blocking;
use super::format::{Calls, ResponseFormat, compile, demanded};
use super::generation::{MOST_LOGPROBS, check_model};
use crate::body::Body;
use crate::dialect::{Delta, Dialect, OutputParser, ParserOptions, Tool};
use crate::error::{ApiError, ErrorResponse};
use crate::model::{ChatFormat, Served};
use crate::worker::Ticket;

/// Goes on with a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "OpenAI",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answers, whole or as a stream of server-sent events", content(
            (ChatResponse = "application/json"), (String = "text/event-stream"),
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorResponse),
        (status = "5XX", description = "The server cannot serve it", body = ErrorResponse),
    ),
)]
pub(crate) async fn chat_completions(
    State(served): State<Arc<Served>>,
    Body(mut body): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    check_model(&served, &body.model)?;
    let Some(format) = &served.model.chat else {
        return Err(ApiError::invalid(
            "this model has no chat template; continue texts at /v1/completions, or start the server with --chat-template FILE",
        ));
    };
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

    let definitions = body.tools.take().unwrap_or_default();
    let tools: Vec<Tool> = definitions.iter().map(request::ToolDefinition::to_tool).collect();
    let tool_use = tool_use(&definitions, body.tool_choice.take())?;
    let parallel = body.parallel_tool_calls.unwrap_or(true);
    let form = Form::new(&tools, &tool_use, parallel, body.response_format.take())?;
    let knows_tools = !matches!(tool_use, ToolUse::None);
    let messages = body.messages.into_iter().map(|message| message.into_message(format.knows_developer())).collect();
    let mut variables = variables(body.chat_template_kwargs, body.reasoning_effort);
    if form.grammar.is_some() {
        // An answer that has a form from its first token on cannot reason before it.
        variables.entry("enable_thinking").or_insert(false.into());
    }
    let options = ChatOptions {
        tools: if knows_tools {
            definitions.iter().map(request::ToolDefinition::to_value).collect()
        } else {
            Vec::new()
        },
        add_generation_prompt: true,
        variables,
    };
    let prompt = render(served.clone(), messages, options).await?;
    let is_free = form.grammar.is_none();

    let mut request = Request {
        prompt: prompt.tokens,
        logprobs,
        constraint: compile(&served, form.grammar, form.param).await?,
        special_tokens: is_free && format.has_markers(&served.tokenizer),
        ..generation.request(&served)?
    };
    if !request.stop.ignore_eos {
        request.stop.tokens.extend(served.model.end_tokens(&served.tokenizer));
    }
    let seed = request.sampling.seed.map_or_else(getrandom::u64, Ok).unwrap_or_default();
    let parser = |choice: u32| {
        let options = ParserOptions {
            tools: &tools,
            prompt_ends: if is_free { &prompt.end } else { "" },
            parse_tools: knows_tools,
            parallel,
            // Each answer has names of its own for its calls.
            seed: seed.wrapping_add(u64::from(choice)),
        };
        match form.reading {
            Reading::Dialect => OutputParser::new(format.dialect, &options),
            Reading::Text => OutputParser::new(Dialect::Plain, &options),
            Reading::Calls => OutputParser::of_calls(format.dialect, &options),
        }
    };
    let choices = request.choices;
    let parsers: Vec<OutputParser> = (0..choices).map(parser).collect();
    let ticket = served.worker.submit(request, served.deadline()).await?;
    let wants_logprobs = logprobs.is_some();
    let job = Job { id: new_id("chatcmpl"), created: now(), served, wants_logprobs };
    if is_stream { Ok(job.stream(ticket, parsers, include_usage)) } else { job.whole(ticket, parsers).await }
}

fn logprobs(wanted: Option<bool>, top: Option<u32>) -> Result<Option<usize>, ApiError> {
    match (wanted.unwrap_or(false), top.map(|top| top as usize)) {
        (false, Some(_)) => Err(ApiError::parameter("top_logprobs", "top_logprobs need logprobs: set that to true")),
        (true, Some(top)) if top > MOST_LOGPROBS => {
            let message = format!("top_logprobs can be at most {MOST_LOGPROBS}, found {top}");
            Err(ApiError::parameter("top_logprobs", message))
        }
        (false, None) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

/// The form that an answer must have, if any, and how what has it is read.
struct Form {
    grammar: Option<Grammar>,
    /// The parameter that asks for it.
    param: &'static str,
    reading: Reading,
}

/// How an answer is read.
#[derive(Debug, Clone, Copy)]
enum Reading {
    /// In the model's dialect.
    Dialect,
    /// As it is.
    Text,
    /// As calls and nothing else.
    Calls,
}

impl Form {
    fn new(
        tools: &[Tool],
        tool_use: &ToolUse,
        parallel: bool,
        format: Option<ResponseFormat>,
    ) -> Result<Self, ApiError> {
        let grammar = format.and_then(ResponseFormat::into_grammar);
        let (called, calls): (Vec<&Tool>, _) = match tool_use {
            ToolUse::None | ToolUse::Auto => {
                let reading = if grammar.is_some() { Reading::Text } else { Reading::Dialect };
                return Ok(Self { grammar, param: "response_format", reading });
            }
            ToolUse::Required if parallel => (tools.iter().collect(), Calls::Several),
            ToolUse::Required => (tools.iter().collect(), Calls::One),
            ToolUse::Named(name) => (tools.iter().filter(|tool| tool.name == *name).collect(), Calls::One),
        };
        if grammar.is_some() {
            let message = "tool_choice asks for a call, and response_format for another form: give one of them";
            return Err(ApiError::parameter("tool_choice", message));
        }
        // Calls that are demanded are JSON and nothing else, whatever the model's way of marking them.
        Ok(Self { grammar: Some(demanded(&called, calls)?), param: "tools", reading: Reading::Calls })
    }
}

/// A conversation as the model reads it.
struct Prompt {
    tokens: Vec<u32>,
    /// The end of its text, which tells whether the answer begins with reasoning.
    end: String,
}

/// Characters that [`Prompt::end`] has at most.
const END: usize = 64;

async fn render(served: Arc<Served>, messages: Vec<Message>, options: ChatOptions) -> Result<Prompt, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::parameter("messages", "there are no messages; give at least one"));
    }
    let work = move || {
        let ChatFormat { template, .. } = served.model.chat.as_ref().expect("a model that chats");
        let text = template.render(&messages, &options)?;
        if served.log_prompts {
            tracing::info!(prompt = text);
        }
        let tokens = served.tokenizer.encode(&text, false).map_err(|error| ApiError::server(error.to_string()))?;
        let start = text.char_indices().rev().nth(END - 1).map_or(0, |(start, _)| start);
        Ok::<_, ApiError>(Prompt { tokens, end: text[start..].to_owned() })
    };
    blocking(work).await?
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

    async fn whole(self, mut ticket: Ticket, parsers: Vec<OutputParser>) -> Result<Response, ApiError> {
        let answers = gather(&mut ticket, parsers.len() as u32).await?;
        let mut usage = Usage::default();
        let mut choices = Vec::with_capacity(answers.len());
        for ((index, answer), mut parser) in (0..).zip(answers).zip(parsers) {
            usage.count(index, &answer.finish);
            let mut deltas = Vec::new();
            parser.push(&answer.text, &mut deltas);
            parser.finish(&mut deltas);
            choices.push(ChatChoice {
                index,
                message: message(deltas),
                logprobs: self.logprobs(&answer.logprobs),
                finish_reason: reason(finish_reason(&answer.finish.reason)?, &parser),
            });
        }
        let Self { id, created, served, .. } = self;
        let model = served.model.name().to_owned();
        Ok(Json(ChatResponse { id, object: "chat.completion", created, model, choices, usage }).into_response())
    }

    fn stream(self, mut ticket: Ticket, mut parsers: Vec<OutputParser>, include_usage: bool) -> Response {
        answer::sse(async_stream::stream! {
            let mut usage = Usage::default();
            for index in 0..parsers.len() as u32 {
                let delta =
                    MessageDelta { role: Some("assistant"), content: Some(String::new()), ..MessageDelta::default() };
                yield data(&self.chunk(ChunkChoice { index, delta, logprobs: None, finish_reason: None }));
            }
            while let Some(event) = answer::next(&mut ticket).await {
                let choices = event.and_then(|event| {
                    if let Some(finish) = &event.finish {
                        usage.count(event.choice, finish);
                    }
                    self.choices(event, &mut parsers)
                });
                match choices {
                    Ok(choices) => {
                        for choice in choices {
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

    /// What an event adds to its answer: a piece for each change, and one for the end.
    fn choices(&self, event: Event, parsers: &mut [OutputParser]) -> Result<Vec<ChunkChoice>, ApiError> {
        let parser = &mut parsers[event.choice as usize];
        let mut deltas = Vec::new();
        parser.push(&event.text, &mut deltas);
        if event.finish.is_some() {
            parser.finish(&mut deltas);
        }
        let choice = |delta| ChunkChoice { index: event.choice, delta, logprobs: None, finish_reason: None };
        let mut choices: Vec<ChunkChoice> = deltas.into_iter().map(|delta| choice(delta_of(delta))).collect();
        if let Some(scored) = &event.logprobs {
            // They come with the first piece, or with one of nothing while text is held back.
            if choices.is_empty() {
                choices.push(choice(MessageDelta::default()));
            }
            choices[0].logprobs = self.logprobs(std::slice::from_ref(scored));
        }
        if let Some(finish) = &event.finish {
            let reason = reason(finish_reason(&finish.reason)?, parser);
            choices.push(ChunkChoice { finish_reason: Some(reason), ..choice(MessageDelta::default()) });
        }
        Ok(choices)
    }

    fn chunk(&self, choice: ChunkChoice) -> ChatChunk {
        ChatChunk { choices: vec![choice], ..self.empty_chunk() }
    }

    fn empty_chunk(&self) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.served.model.name().to_owned(),
            choices: Vec::new(),
            usage: None,
        }
    }
}

/// An answer that ends of itself with calls says so.
fn reason(reason: &'static str, parser: &OutputParser) -> &'static str {
    if reason == "stop" && parser.tool_calls() > 0 { "tool_calls" } else { reason }
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
