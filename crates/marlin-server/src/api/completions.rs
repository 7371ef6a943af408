//! `POST /v1/completions`: texts continued.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{StreamExt, select_all};
use marlin_engine::{Event, Request, TokenLogprobs};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::answer::{self, ServerSentEvent, Usage, data, done, finish_reason, gather, new_id, now};
use super::format::{ResponseFormat, compile};
use super::generation::{check_logprobs, generation_request};
use crate::body::Body;
use crate::error::{ApiError, ErrorResponse};
use crate::model::{Loaded, Served};
use crate::registry::Registry;
use crate::worker::Ticket;

/// Most prompts of one request.
const MOST_PROMPTS: usize = 128;

generation_request! {
    /// Texts to continue.
    CompletionRequest {
        /// What to continue: a text, tokens, or a list of either.
        pub(crate) prompt: Prompts,
        /// Repeat the prompt before each answer; with `logprobs`, tell of its tokens, too.
        pub(crate) echo: Option<bool>,
        /// Tell how likely each token was, and so many alternatives.
        #[schema(minimum = 0, maximum = 20)]
        pub(crate) logprobs: Option<u32>,
    }
}

/// Prompts of a completion.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "a text, a list of texts, a list of token ids, or a list of such lists")]
pub(crate) enum Prompts {
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// The tokens of a text.
    Tokens(Vec<u32>),
    /// Those of several.
    TokenLists(Vec<Vec<u32>>),
}

/// A prompt, as text and as tokens.
pub(crate) struct Prompt {
    text: String,
    pub(crate) tokens: Vec<u32>,
}

/// Continued texts.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionResponse {
    id: String,
    /// `text_completion`.
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<CompletionChoice>,
    /// At the end of a stream, if it was asked for, and in whole answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

/// One of them, or a piece of one.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    index: u32,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`, at the end.
    finish_reason: Option<&'static str>,
}

/// How likely the tokens of a text were.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    tokens: Vec<String>,
    /// `null` for the first token of a prompt.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<HashMap<String, f32>>>,
    /// Where each token begins in the text of prompt and answer, in characters.
    text_offset: Vec<usize>,
}

/// Continues texts.
#[utoipa::path(
    post, path = "/v1/completions", tag = "OpenAI",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The texts, whole or as a stream of server-sent events", content(
            (CompletionResponse = "application/json"), (ServerSentEvent = "text/event-stream"),
        )),
        (status = "4XX", description = "The request cannot be served", body = ErrorResponse),
        (status = "5XX", description = "The server cannot serve it", body = ErrorResponse),
    ),
)]
pub(crate) async fn completions(
    State(models): State<Registry<Loaded>>,
    Body(mut body): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let served = models.lease(Some(&body.model)).await?;
    let generation = body.generation();
    let include_usage = generation.include_usage()?;
    let is_stream = generation.stream == Some(true);
    let echo = body.echo.unwrap_or(false);
    let logprobs = body.logprobs.map(|n| check_logprobs("logprobs", n as usize)).transpose()?;
    let mut request = Request { logprobs, ..generation.request(&served)? };
    if echo {
        // A prompt that is repeated without anything behind it still goes through the engine.
        let is_scored_only = request.stop.max_tokens == 0;
        request.prompt_logprobs = logprobs.or(is_scored_only.then_some(0));
    }
    let grammar = body.response_format.take().and_then(ResponseFormat::into_grammar);
    request.constraint = compile(&served, grammar, "response_format").await?;
    let prompts = prompts(served.clone(), body.prompt, "prompt", MOST_PROMPTS).await?;
    let mut tickets = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        let request = Request { prompt: prompt.tokens.clone(), ..request.clone() };
        tickets.push(served.submit(request).await?);
    }
    let job = Job {
        id: new_id("cmpl"),
        created: now(),
        served,
        prompts,
        choices: request.choices,
        echo,
        wants_logprobs: logprobs.is_some(),
    };
    if is_stream { Ok(job.stream(tickets, include_usage)) } else { job.whole(tickets).await }
}

/// The prompts as tokens; `name` is that of the parameter.
pub(crate) async fn prompts(
    served: Arc<Served>,
    prompts: Prompts,
    name: &'static str,
    most: usize,
) -> Result<Vec<Prompt>, ApiError> {
    let count = match &prompts {
        Prompts::Text(_) | Prompts::Tokens(_) => 1,
        Prompts::Texts(texts) => texts.len(),
        Prompts::TokenLists(lists) => lists.len(),
    };
    if count == 0 || count > most {
        let message = format!("a request has between 1 and {most} texts as its {name}, found {count}");
        return Err(ApiError::parameter(name, message));
    }
    super::blocking(move || {
        let of_text = |text: String| {
            let mut tokens = served.tokenizer.encode(&text, true)?;
            if tokens.is_empty() {
                tokens.extend(served.model.generation.bos_token_id);
            }
            Ok(Prompt { text, tokens })
        };
        let of_tokens = |tokens: Vec<u32>| Ok(Prompt { text: served.tokenizer.decode(&tokens, true)?, tokens });
        match prompts {
            Prompts::Text(text) => Ok(vec![of_text(text)?]),
            Prompts::Texts(texts) => texts.into_iter().map(of_text).collect(),
            Prompts::Tokens(tokens) => Ok(vec![of_tokens(tokens)?]),
            Prompts::TokenLists(lists) => lists.into_iter().map(of_tokens).collect(),
        }
    })
    .await?
    .map_err(|error: marlin_checkpoint::CheckpointError| ApiError::server(error.to_string()))
}

/// A request on its way.
struct Job {
    id: String,
    created: u64,
    served: Arc<Served>,
    prompts: Vec<Prompt>,
    choices: u32,
    echo: bool,
    wants_logprobs: bool,
}

impl Job {
    fn response(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> CompletionResponse {
        let (id, model) = (self.id.clone(), self.served.name().to_owned());
        CompletionResponse { id, object: "text_completion", created: self.created, model, choices, usage }
    }

    async fn whole(self, tickets: Vec<Ticket>) -> Result<Response, ApiError> {
        let mut usage = Usage::default();
        let mut choices = Vec::new();
        for (place, mut ticket) in tickets.into_iter().enumerate() {
            let answers = gather(&mut ticket, self.choices).await?;
            let scored = answers[0].prompt_logprobs.clone();
            for (choice, answer) in (0..).zip(answers) {
                usage.count(choice, &answer.finish);
                let mut pieces = Pieces::default();
                let mut text = String::new();
                if self.echo {
                    text.push_str(&self.prompts[place].text);
                    pieces.add_prompt(&self.served, &self.prompts[place], &scored);
                } else {
                    pieces.offset = self.prompts[place].text.chars().count();
                }
                pieces.add(&self.served, &answer.logprobs);
                text.push_str(&answer.text);
                choices.push(CompletionChoice {
                    index: place as u32 * self.choices + choice,
                    text,
                    logprobs: self.wants_logprobs.then_some(pieces.logprobs),
                    finish_reason: Some(finish_reason(&answer.finish.reason)?),
                });
            }
        }
        Ok(Json(self.response(choices, Some(usage))).into_response())
    }

    fn stream(self, tickets: Vec<Ticket>, include_usage: bool) -> Response {
        let events = tickets.into_iter().enumerate().map(|(place, ticket)| {
            futures_util::stream::unfold(ticket, move |mut ticket| async move {
                let event = answer::next(&mut ticket).await?;
                Some(((place, event), ticket))
            })
            .boxed()
        });
        let mut events = select_all(events);
        answer::sse(async_stream::stream! {
            let mut usage = Usage::default();
            let mut states: Vec<Pieces> = Vec::new();
            states.resize_with(self.prompts.len() * self.choices as usize, Pieces::default);
            // They come with the first answer, before any other.
            let mut prompt_logprobs = vec![Vec::new(); self.prompts.len()];
            while let Some((place, event)) = events.next().await {
                let chunk = event.and_then(|mut event| {
                    if !event.prompt_logprobs.is_empty() {
                        prompt_logprobs[place] = std::mem::take(&mut event.prompt_logprobs);
                    }
                    if let Some(finish) = &event.finish {
                        usage.count(event.choice, finish);
                    }
                    let index = place * self.choices as usize + event.choice as usize;
                    self.chunk(index, event, &mut states[index], &prompt_logprobs[place])
                });
                match chunk {
                    Ok(chunk) => yield data(&chunk),
                    Err(error) => {
                        yield data(&error.into_body());
                        yield done();
                        return;
                    }
                }
            }
            if include_usage {
                yield data(&self.response(Vec::new(), Some(usage)));
            }
            yield done();
        })
    }

    fn chunk(
        &self,
        index: usize,
        event: Event,
        state: &mut Pieces,
        prompt_logprobs: &[TokenLogprobs],
    ) -> Result<CompletionResponse, ApiError> {
        let mut text = String::new();
        if !std::mem::replace(&mut state.has_begun, true) {
            let prompt = &self.prompts[index / self.choices as usize];
            if self.echo {
                text.push_str(&prompt.text);
                state.add_prompt(&self.served, prompt, prompt_logprobs);
            } else {
                state.offset = prompt.text.chars().count();
            }
        }
        state.add(&self.served, event.logprobs.as_slice());
        text.push_str(&event.text);
        let choice = CompletionChoice {
            index: index as u32,
            text,
            logprobs: self.wants_logprobs.then(|| std::mem::take(&mut state.logprobs)),
            finish_reason: event.finish.map(|finish| finish_reason(&finish.reason)).transpose()?,
        };
        Ok(self.response(vec![choice], None))
    }
}

/// Tokens of an answer and how likely they were, so far or since they were sent last.
#[derive(Default)]
struct Pieces {
    has_begun: bool,
    /// Characters before the next token.
    offset: usize,
    logprobs: CompletionLogprobs,
}

impl Pieces {
    fn add_prompt(&mut self, served: &Served, prompt: &Prompt, scored: &[TokenLogprobs]) {
        if let Some(&first) = prompt.tokens.first() {
            self.push(served.token_text(first), None, None);
        }
        self.add(served, scored);
    }

    fn add(&mut self, served: &Served, scored: &[TokenLogprobs]) {
        for scored in scored {
            let top = scored.top.iter().map(|&(token, logprob)| (served.token_text(token), logprob)).collect();
            self.push(served.token_text(scored.token), Some(scored.logprob), Some(top));
        }
    }

    fn push(&mut self, token: String, logprob: Option<f32>, top: Option<HashMap<String, f32>>) {
        self.logprobs.text_offset.push(self.offset);
        self.offset += token.chars().count();
        self.logprobs.tokens.push(token);
        // JSON has no infinity; this is as unlikely as can be.
        self.logprobs.token_logprobs.push(logprob.map(finite));
        self.logprobs.top_logprobs.push(top.map(|top| top.into_iter().map(|(token, p)| (token, finite(p))).collect()));
    }
}

/// A logarithm of a probability that JSON can say: −9999 for what is impossible, as OpenAI's API has it.
pub(crate) fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}
