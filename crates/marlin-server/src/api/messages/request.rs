//! What a message in Anthropic's form asks for.

use std::num::NonZeroU32;

use marlin_engine::Message;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::api::conversation::{Function, ToolUse, call_value};
use crate::api::generation::{Generation, Texts};
use crate::error::ApiError;

/// A conversation to go on with.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::MessagesRequest)]
#[serde(deny_unknown_fields)]
pub(crate) struct MessagesRequest {
    /// The model, by a name that `GET /v1/models` gives.
    pub(crate) model: String,
    /// What was said so far; the last to speak is the user.
    #[schema(min_items = 1)]
    pub(crate) messages: Vec<Turn>,
    /// Generate at most this many tokens.
    #[schema(minimum = 1)]
    max_tokens: u32,
    /// What the model is told before all.
    pub(crate) system: Option<SystemPrompt>,
    /// Functions that the model may call.
    pub(crate) tools: Option<Vec<ToolDefinition>>,
    /// Whether it calls them.
    pub(crate) tool_choice: Option<ToolChoice>,
    /// Whether it thinks before it answers; it does not if nothing is said.
    pub(crate) thinking: Option<Thinking>,
    /// What the answer must look like, and how much to think.
    #[serde(default, deserialize_with = "crate::body::object")]
    pub(crate) output_config: Option<OutputConfig>,
    /// End before these texts.
    stop_sequences: Option<Vec<String>>,
    /// Divides the logits; 0 takes the most likely token.
    #[schema(minimum = 0)]
    temperature: Option<f64>,
    /// Keep the smallest set of most likely tokens whose probability reaches this.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// Keep this many of the most likely tokens; 0 and -1 keep all.
    #[schema(minimum = -1)]
    top_k: Option<i32>,
    /// Send the answer as it comes, as server-sent events.
    pub(crate) stream: Option<bool>,
    /// Prompts are cached always.
    #[expect(dead_code, reason = "it asks for what is done anyway")]
    cache_control: Option<CacheControl>,
    /// Who asks; it is not looked at.
    #[serde(default, deserialize_with = "crate::body::object")]
    #[expect(dead_code, reason = "clients may tell it")]
    metadata: Option<Metadata>,
}

/// A conversation to count.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::CountTokensRequest)]
#[serde(deny_unknown_fields)]
pub(crate) struct CountTokensRequest {
    /// The model, by a name that `GET /v1/models` gives.
    pub(crate) model: String,
    /// What was said so far; the last to speak is the user.
    #[schema(min_items = 1)]
    pub(crate) messages: Vec<Turn>,
    /// What the model is told before all.
    pub(crate) system: Option<SystemPrompt>,
    /// Functions that the model may call.
    pub(crate) tools: Option<Vec<ToolDefinition>>,
    /// Whether it calls them.
    pub(crate) tool_choice: Option<ToolChoice>,
    /// Whether it thinks before it answers; it does not if nothing is said.
    pub(crate) thinking: Option<Thinking>,
    /// What the answer must look like, and how much to think.
    #[serde(default, deserialize_with = "crate::body::object")]
    pub(crate) output_config: Option<OutputConfig>,
    /// Prompts are cached always.
    #[expect(dead_code, reason = "it asks for what is done anyway")]
    cache_control: Option<CacheControl>,
}

/// What the model is told before all.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::SystemPrompt)]
#[serde(untagged, expecting = "a text, or a list of blocks {\"type\": \"text\", \"text\": …}")]
pub(crate) enum SystemPrompt {
    Text(String),
    Blocks(#[serde(deserialize_with = "crate::body::by_type")] Vec<TextBlock>),
}

/// A turn of the conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::Turn)]
#[serde(deny_unknown_fields)]
pub(crate) struct Turn {
    role: Speaker,
    content: Content,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[schema(as = messages::Speaker)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Speaker {
    User,
    Assistant,
}

/// What is said: a text, or blocks.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::Content)]
#[serde(
    untagged,
    expecting = "a text, or a list of blocks of type text, thinking, tool_use or tool_result; images and documents are not supported"
)]
pub(crate) enum Content {
    Text(String),
    Blocks(#[serde(deserialize_with = "crate::body::by_type")] Vec<Block>),
}

/// A part of what is said.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::Block)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Block {
    /// A text.
    Text {
        /// The text.
        text: String,
        /// Prompts are cached always.
        #[expect(dead_code, reason = "it asks for what is done anyway")]
        cache_control: Option<CacheControl>,
    },
    /// What an earlier answer thought.
    Thinking {
        /// The thoughts.
        thinking: String,
        /// Of whom they are; nothing depends on it.
        #[expect(dead_code, reason = "the server signs nothing")]
        signature: Option<String>,
    },
    /// What an earlier answer called.
    ToolUse {
        /// The call's name.
        id: String,
        /// The tool's.
        name: String,
        /// Its arguments.
        input: Map<String, Value>,
        /// Prompts are cached always.
        #[expect(dead_code, reason = "it asks for what is done anyway")]
        cache_control: Option<CacheControl>,
    },
    /// What came of a call.
    ToolResult {
        /// The call's name.
        tool_use_id: String,
        /// What the tool says.
        content: Option<ResultContent>,
        /// It has failed: the model reads `Error:` before what the tool says.
        is_error: Option<bool>,
        /// Prompts are cached always.
        #[expect(dead_code, reason = "it asks for what is done anyway")]
        cache_control: Option<CacheControl>,
    },
}

/// What a tool says: a text, or texts.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::ResultContent)]
#[serde(untagged, expecting = "a text, or a list of blocks {\"type\": \"text\", \"text\": …}")]
pub(crate) enum ResultContent {
    Text(String),
    Blocks(#[serde(deserialize_with = "crate::body::by_type")] Vec<TextBlock>),
}

/// A text.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::TextBlock)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum TextBlock {
    /// A text.
    Text {
        /// The text.
        text: String,
        /// Prompts are cached always.
        #[expect(dead_code, reason = "it asks for what is done anyway")]
        cache_control: Option<CacheControl>,
    },
}

/// Where a prompt is to be cached.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::CacheControl)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum CacheControl {
    /// For a while.
    Ephemeral {
        /// For how long.
        #[expect(dead_code, reason = "what was used last stays longest")]
        ttl: Option<String>,
    },
}

/// A function that may be called.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::ToolDefinition)]
#[serde(deny_unknown_fields)]
pub(crate) struct ToolDefinition {
    /// `custom`.
    #[serde(rename = "type")]
    #[expect(dead_code, reason = "there is one kind")]
    kind: Option<ToolKind>,
    name: String,
    description: Option<String>,
    /// A JSON schema of its arguments.
    input_schema: Map<String, Value>,
    /// Calls must have arguments that the schema allows.
    strict: Option<bool>,
    /// Prompts are cached always.
    #[expect(dead_code, reason = "it asks for what is done anyway")]
    cache_control: Option<CacheControl>,
}

/// The one kind of tool there is.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = messages::ToolKind)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToolKind {
    Custom,
}

/// Whether tools are called.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::ToolChoice)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ToolChoice {
    /// As the model likes.
    Auto {
        /// Once at most.
        disable_parallel_tool_use: Option<bool>,
    },
    /// At least one.
    Any {
        /// Once at most.
        disable_parallel_tool_use: Option<bool>,
    },
    /// This one, once.
    Tool {
        /// Its name.
        name: String,
        /// It is called once in any case.
        #[expect(dead_code, reason = "it is called once")]
        disable_parallel_tool_use: Option<bool>,
    },
    /// None.
    None {},
}

/// Whether the model thinks before it answers.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::Thinking)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Thinking {
    /// It does.
    Enabled {
        /// The template's variable `thinking_budget`: so many tokens, if the model heeds it.
        #[schema(value_type = Option<u32>, minimum = 1)]
        budget_tokens: Option<NonZeroU32>,
        /// Whether the thoughts are told.
        display: Option<Display>,
    },
    /// It does if it finds that worth while.
    Adaptive {
        /// Whether the thoughts are told.
        display: Option<Display>,
    },
    /// It does not, if it can be told so.
    Disabled {},
}

/// Whether thoughts are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[schema(as = messages::Display)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Display {
    /// As they are: nothing sums them up.
    Summarized,
    /// They are not.
    Omitted,
}

impl Thinking {
    /// Whether thoughts are told.
    pub(crate) fn is_told(&self) -> bool {
        let (Self::Enabled { display, .. } | Self::Adaptive { display }) = self else { return true };
        *display != Some(Display::Omitted)
    }
}

/// What the answer must look like, and how much to think.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::OutputConfig)]
#[serde(deny_unknown_fields)]
pub(crate) struct OutputConfig {
    /// The template's variable `reasoning_effort`.
    pub(crate) effort: Option<Effort>,
    /// What the answer must look like.
    pub(crate) format: Option<OutputFormat>,
}

/// How much to think.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[schema(as = messages::Effort)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Effort {
    Low,
    Medium,
    High,
    Xhigh,
    Max,
}

/// What the answer must look like.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::OutputFormat)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum OutputFormat {
    /// An instance of a JSON schema.
    JsonSchema {
        /// The schema.
        schema: Map<String, Value>,
    },
}

/// Who asks.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = messages::Metadata)]
#[serde(deny_unknown_fields)]
pub(crate) struct Metadata {
    #[expect(dead_code, reason = "clients may tell it")]
    user_id: Option<String>,
}

impl MessagesRequest {
    /// What is asked of the engine.
    pub(crate) fn generation(&mut self) -> Generation {
        Generation {
            max_tokens: Some(self.max_tokens),
            stop: self.stop_sequences.take().map(Texts::Many),
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            ..Generation::default()
        }
    }
}

/// The conversation as templates read it.
pub(crate) fn messages(system: Option<SystemPrompt>, turns: Vec<Turn>) -> Result<Vec<Message>, ApiError> {
    if turns.last().is_some_and(|turn| turn.role == Speaker::Assistant) {
        let message = "the last message is the assistant's, and answers that begin with given words are not supported: end with the user's";
        return Err(ApiError::parameter("messages", message));
    }
    let system = system.map(|system| match system {
        SystemPrompt::Text(text) => text,
        SystemPrompt::Blocks(blocks) => joined(blocks),
    });
    let mut messages: Vec<Message> = system.into_iter().map(|text| Message::new("system", text)).collect();
    for turn in turns {
        turn.add_to(&mut messages)?;
    }
    Ok(messages)
}

fn joined(blocks: Vec<TextBlock>) -> String {
    blocks.into_iter().map(|TextBlock::Text { text, .. }| text).collect::<Vec<_>>().join("\n")
}

impl Turn {
    /// Results of calls become messages of their own, before what else the user says.
    fn add_to(self, messages: &mut Vec<Message>) -> Result<(), ApiError> {
        let role = match self.role {
            Speaker::User => "user",
            Speaker::Assistant => "assistant",
        };
        let blocks = match self.content {
            Content::Text(text) => {
                messages.push(Message::new(role, text));
                return Ok(());
            }
            Content::Blocks(blocks) => blocks,
        };
        let mut message = Message::new(role, "");
        let (mut texts, mut calls) = (Vec::new(), Vec::new());
        let mut is_answer = false;
        for block in blocks {
            match (self.role, block) {
                (_, Block::Text { text, .. }) => texts.push(text),
                (Speaker::Assistant, Block::Thinking { thinking, .. }) => {
                    message.fields.insert("reasoning_content".to_owned(), thinking.into());
                }
                (Speaker::Assistant, Block::ToolUse { id, name, input, .. }) => {
                    calls.push(call_value(Some(id), name, input.into()));
                }
                (Speaker::User, Block::ToolResult { tool_use_id, content, is_error, .. }) => {
                    let text = match content {
                        None => String::new(),
                        Some(ResultContent::Text(text)) => text,
                        Some(ResultContent::Blocks(blocks)) => joined(blocks),
                    };
                    let text = if is_error == Some(true) { format!("Error: {text}") } else { text };
                    let mut result = Message::new("tool", text);
                    result.fields.insert("tool_call_id".to_owned(), tool_use_id.into());
                    messages.push(result);
                    is_answer = true;
                }
                (Speaker::User, Block::Thinking { .. } | Block::ToolUse { .. }) => {
                    let message =
                        "thinking and tool_use are the assistant's: they cannot stand in a message of the user";
                    return Err(ApiError::parameter("messages", message));
                }
                (Speaker::Assistant, Block::ToolResult { .. }) => {
                    let message = "tool_result is the user's: it cannot stand in a message of the assistant";
                    return Err(ApiError::parameter("messages", message));
                }
            }
        }
        if is_answer && texts.is_empty() {
            return Ok(());
        }
        message.content = Some(texts.join("\n"));
        if !calls.is_empty() {
            message.fields.insert("tool_calls".to_owned(), calls.into());
        }
        messages.push(message);
        Ok(())
    }
}

impl From<ToolDefinition> for Function {
    fn from(tool: ToolDefinition) -> Self {
        let ToolDefinition { name, description, input_schema, strict, .. } = tool;
        Self { name, description, parameters: Some(input_schema), strict }
    }
}

/// How tools are to be used, and whether several at once.
pub(crate) fn tool_use(choice: Option<ToolChoice>) -> (ToolUse, bool) {
    let is_parallel = |disabled: Option<bool>| !disabled.unwrap_or(false);
    match choice {
        None => (ToolUse::Auto, true),
        Some(ToolChoice::Auto { disable_parallel_tool_use }) => (ToolUse::Auto, is_parallel(disable_parallel_tool_use)),
        Some(ToolChoice::Any { disable_parallel_tool_use }) => {
            (ToolUse::Required, is_parallel(disable_parallel_tool_use))
        }
        Some(ToolChoice::Tool { name, .. }) => (ToolUse::Named(name), false),
        Some(ToolChoice::None {}) => (ToolUse::None, true),
    }
}

/// Variables of the template by which models are told whether and how much to think.
pub(crate) fn variables(thinking: Option<&Thinking>, effort: Option<Effort>) -> Map<String, Value> {
    let mut variables = Map::new();
    let thinks = matches!(thinking, Some(Thinking::Enabled { .. } | Thinking::Adaptive { .. }));
    variables.insert("enable_thinking".to_owned(), thinks.into());
    if let Some(Thinking::Enabled { budget_tokens: Some(budget), .. }) = thinking {
        variables.insert("thinking_budget".to_owned(), budget.get().into());
    }
    if let Some(effort) = effort {
        let name = match effort {
            Effort::Low => "low",
            Effort::Medium => "medium",
            Effort::High => "high",
            Effort::Xhigh => "xhigh",
            Effort::Max => "max",
        };
        variables.insert("reasoning_effort".to_owned(), name.into());
    }
    variables
}
