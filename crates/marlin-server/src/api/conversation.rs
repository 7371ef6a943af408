//! Conversations and their answers, whatever API they come through.

use std::sync::Arc;

use marlin_engine::{ChatOptions, Event, Finish, FinishReason, Grammar, Message, Request, TokenLogprobs};
use serde_json::{Map, Value, json};

use super::answer::{self, finish_reason, gather};
use super::blocking;
use super::format::{Calls, compile, demanded};
use super::generation::Generation;
use crate::dialect::{Delta, Dialect, OutputParser, ParserOptions, Tool};
use crate::error::ApiError;
use crate::model::{ChatFormat, Served};
use crate::worker::Ticket;

/// A conversation to go on with.
#[derive(Debug)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Vec<Function>,
    pub(crate) tool_use: ToolUse,
    /// Several calls may be made at once.
    pub(crate) parallel: bool,
    /// What the answer must look like.
    pub(crate) grammar: Option<Grammar>,
    /// Variables of the chat template.
    pub(crate) variables: Map<String, Value>,
    pub(crate) generation: Generation,
    /// Tell how likely each token was, and so many alternatives.
    pub(crate) logprobs: Option<usize>,
}

/// A function that may be called.
#[derive(Debug, Clone)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    /// A JSON schema of its arguments.
    pub(crate) parameters: Option<Map<String, Value>>,
    pub(crate) strict: Option<bool>,
}

/// How tools are to be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToolUse {
    /// Not at all.
    None,
    /// As the model likes.
    Auto,
    /// At least one must be called.
    Required,
    /// This one must be called, once.
    Named(String),
}

impl ToolUse {
    /// Refuses what the tools do not allow.
    pub(crate) fn check(self, tools: &[Function]) -> Result<Self, ApiError> {
        match &self {
            Self::None => Ok(self),
            Self::Auto => Ok(if tools.is_empty() { Self::None } else { self }),
            _ if tools.is_empty() => {
                Err(ApiError::parameter("tool_choice", "tool_choice asks for a call, and there are no tools to call"))
            }
            Self::Named(name) if tools.iter().all(|tool| tool.name != *name) => {
                Err(ApiError::parameter("tool_choice", format!("there is no tool {name:?} among the tools")))
            }
            Self::Required | Self::Named(_) => Ok(self),
        }
    }
}

impl Function {
    /// As templates read it.
    fn to_value(&self) -> Value {
        let Self { name, description, parameters, strict } = self;
        let mut function = Map::new();
        function.insert("name".to_owned(), name.clone().into());
        let rest = [
            ("description", description.clone().map(Value::from)),
            ("parameters", parameters.clone().map(Value::from)),
            ("strict", strict.map(Value::from)),
        ];
        function.extend(rest.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        json!({ "type": "function", "function": function })
    }

    /// As parsers of answers read it.
    fn to_tool(&self) -> Tool {
        Tool { name: self.name.clone(), parameters: self.parameters.clone().map(Value::from) }
    }
}

/// A call as templates read it, which write arguments as JSON themselves.
pub(crate) fn call_value(id: Option<String>, name: String, arguments: Value) -> Value {
    json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
}

/// The same of a call whose arguments are a text, as clients and models write it.
pub(crate) fn call_of_text(id: Option<String>, name: String, arguments: &str) -> Value {
    call_value(id, name, serde_json::from_str(arguments).unwrap_or_else(|_| arguments.into()))
}

/// How one talks with the model.
pub(crate) fn chat_format(served: &Served) -> Result<&ChatFormat, ApiError> {
    served.model.chat.as_ref().ok_or_else(|| {
        ApiError::invalid(
            "this model has no chat template; continue texts at /v1/completions, or start the server with --chat-template FILE",
        )
    })
}

impl Conversation {
    /// Asks the engine for the answers.
    pub(crate) async fn submit(mut self, served: Arc<Served>) -> Result<Answers, ApiError> {
        let tools: Vec<Tool> = self.tools.iter().map(Function::to_tool).collect();
        let (form, prompt) = self.read(&served, &tools).await?;
        let format = chat_format(&served)?;
        let is_free = form.grammar.is_none();
        let mut request = Request {
            prompt: prompt.tokens,
            logprobs: self.logprobs,
            constraint: compile(&served, form.grammar, form.param).await?,
            special_tokens: is_free && format.has_markers(&served.tokenizer),
            ..self.generation.request(&served)?
        };
        if !request.stop.ignore_eos {
            request.stop.tokens.extend(served.model.end_tokens(&served.tokenizer));
        }
        let seed = request.sampling.seed.map_or_else(getrandom::u64, Ok).unwrap_or_default();
        let parser = |choice: u32| {
            let options = ParserOptions {
                tools: &tools,
                prompt_ends: if is_free { &prompt.end } else { "" },
                parse_tools: self.tool_use != ToolUse::None,
                parallel: self.parallel,
                // Each answer has names of its own for its calls.
                seed: seed.wrapping_add(u64::from(choice)),
            };
            match form.reading {
                Reading::Dialect => OutputParser::new(format.dialect, &options),
                Reading::Text => OutputParser::new(Dialect::Plain, &options),
                Reading::Calls => OutputParser::of_calls(format.dialect, &options),
            }
        };
        let parsers: Vec<OutputParser> = (0..request.choices).map(parser).collect();
        let prompt_tokens = request.prompt.len();
        let ticket = served.submit(request).await?;
        Ok(Answers { ticket, parsers, prompt_tokens })
    }

    /// Tokens that the model reads before it answers.
    pub(crate) async fn count_tokens(mut self, served: Arc<Served>) -> Result<usize, ApiError> {
        let tools: Vec<Tool> = self.tools.iter().map(Function::to_tool).collect();
        Ok(self.read(&served, &tools).await?.1.tokens.len())
    }

    /// The form of the answer, and the conversation as the model reads it.
    async fn read(&mut self, served: &Arc<Served>, tools: &[Tool]) -> Result<(Form, Prompt), ApiError> {
        chat_format(served)?;
        if self.messages.is_empty() {
            return Err(ApiError::parameter("messages", "there are no messages; give at least one"));
        }
        let form = Form::new(tools, &self.tool_use, self.parallel, self.grammar.take())?;
        if form.grammar.is_some() {
            // An answer that has a form from its first token on cannot reason before it.
            self.variables.entry("enable_thinking").or_insert(false.into());
        }
        let shown = if self.tool_use == ToolUse::None { &[][..] } else { &self.tools };
        let options = ChatOptions {
            tools: shown.iter().map(Function::to_value).collect(),
            add_generation_prompt: true,
            variables: std::mem::take(&mut self.variables),
        };
        let prompt = render(served.clone(), std::mem::take(&mut self.messages), options).await?;
        Ok((form, prompt))
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
    fn new(tools: &[Tool], tool_use: &ToolUse, parallel: bool, grammar: Option<Grammar>) -> Result<Self, ApiError> {
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
    let work = move || {
        let text = chat_format(&served)?.template.render(&messages, &options)?;
        if served.log_prompts {
            tracing::info!(prompt = text);
        }
        let tokens = served.tokenizer.encode(&text, false).map_err(|error| ApiError::server(error.to_string()))?;
        let start = text.char_indices().rev().nth(END - 1).map_or(0, |(start, _)| start);
        Ok::<_, ApiError>(Prompt { tokens, end: text[start..].to_owned() })
    };
    blocking(work).await?
}

/// The answers to a conversation, on their way.
pub(crate) struct Answers {
    ticket: Ticket,
    parsers: Vec<OutputParser>,
    prompt_tokens: usize,
}

/// What is added to one of them.
pub(crate) struct Piece {
    pub(crate) choice: u32,
    pub(crate) deltas: Vec<Delta>,
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// With the last piece.
    pub(crate) end: Option<End>,
}

/// How an answer ended.
pub(crate) struct End {
    pub(crate) ending: Ending,
    pub(crate) finish: Finish,
}

/// Why it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The model has said what it had to say.
    Complete,
    /// It has called tools.
    Calls,
    /// It was about to say this text.
    StopString(String),
    /// It became too long.
    Length,
}

impl End {
    fn new(finish: Finish, parser: &OutputParser) -> Result<Self, ApiError> {
        // What has failed is an error.
        finish_reason(&finish.reason)?;
        let ending = match &finish.reason {
            FinishReason::Length | FinishReason::Context => Ending::Length,
            _ if parser.tool_calls() > 0 => Ending::Calls,
            FinishReason::StopString(text) => Ending::StopString(text.clone()),
            _ => Ending::Complete,
        };
        Ok(Self { ending, finish })
    }
}

/// A whole answer.
pub(crate) struct Answer {
    pub(crate) deltas: Vec<Delta>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) end: End,
}

impl Answers {
    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        self.parsers.len() as u32
    }

    /// Tokens of the prompt.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// What comes next; `None` after the end of the last.
    pub(crate) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        let event = answer::next(&mut self.ticket).await?;
        Some(event.and_then(|event| self.read(event)))
    }

    fn read(&mut self, event: Event) -> Result<Piece, ApiError> {
        let parser = &mut self.parsers[event.choice as usize];
        let mut deltas = Vec::new();
        parser.push(&event.text, &mut deltas);
        if event.finish.is_some() {
            parser.finish(&mut deltas);
        }
        let end = event.finish.map(|finish| End::new(finish, parser)).transpose()?;
        Ok(Piece { choice: event.choice, deltas, logprobs: event.logprobs, end })
    }

    /// All that comes.
    pub(crate) async fn whole(mut self) -> Result<Vec<Answer>, ApiError> {
        let answers = gather(&mut self.ticket, self.parsers.len() as u32).await?;
        let read = |(answer, mut parser): (answer::Answer, OutputParser)| {
            let mut deltas = Vec::new();
            parser.push(&answer.text, &mut deltas);
            parser.finish(&mut deltas);
            let end = End::new(answer.finish, &parser)?;
            Ok(Answer { deltas, logprobs: answer.logprobs, end })
        };
        answers.into_iter().zip(self.parsers).map(read).collect()
    }
}
