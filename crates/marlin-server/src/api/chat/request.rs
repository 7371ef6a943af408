//! What a chat asks for.

use marlin_engine::Message;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::api::conversation::{Function, ToolUse, call_of_text};
use crate::api::generation::generation_request;

generation_request! {
    /// A conversation to go on with.
    ChatRequest {
        /// What was said so far.
        #[schema(min_items = 1)]
        pub(crate) messages: Vec<ChatMessage>,
        /// `max_tokens` by its newer name.
        #[schema(minimum = 1)]
        pub(crate) max_completion_tokens: Option<u32>,
        /// Tell how likely each token was.
        pub(crate) logprobs: Option<bool>,
        /// And so many alternatives.
        #[schema(minimum = 0, maximum = 20)]
        pub(crate) top_logprobs: Option<u32>,
        /// Functions that the model may call.
        pub(crate) tools: Option<Vec<ToolDefinition>>,
        /// Whether it calls them: `none`, `auto`, `required`, or one by its name.
        pub(crate) tool_choice: Option<ToolChoice>,
        /// Whether it may call several at once.
        pub(crate) parallel_tool_calls: Option<bool>,
        /// How much a model that reasons should do so: the template's variable of this name; `none` sets `enable_thinking` to false.
        pub(crate) reasoning_effort: Option<ReasoningEffort>,
        /// Further variables of the chat template.
        pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    }
}

/// A turn of the conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChatMessage {
    role: Role,
    content: Option<Content>,
    /// Who speaks, or which function answers.
    name: Option<String>,
    /// What an earlier answer called.
    tool_calls: Option<Vec<CalledTool>>,
    /// What a message of a tool answers.
    tool_call_id: Option<String>,
    /// What an earlier answer reasoned.
    reasoning_content: Option<String>,
    /// Why an earlier answer was refused; clients send it back.
    refusal: Option<String>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// What is said: a text, or parts of one.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "a text, or a list of parts {\"type\": \"text\", \"text\": …}; images and sounds are not supported"
)]
pub(crate) enum Content {
    Text(String),
    Parts(#[serde(deserialize_with = "crate::body::by_type")] Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Part {
    /// A text.
    Text {
        /// The text.
        text: String,
    },
}

/// A call that an earlier answer made.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CalledTool {
    id: Option<String>,
    /// `function`.
    #[serde(rename = "type")]
    #[expect(dead_code, reason = "there is one kind")]
    kind: Option<FunctionKind>,
    function: CalledFunction,
    /// Its place in a stream; clients send it back.
    #[expect(dead_code, reason = "the order tells it")]
    index: Option<u32>,
}

/// The one kind of tool there is.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FunctionKind {
    Function,
}

/// The function that was called.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CalledFunction {
    name: String,
    /// A JSON object, as text.
    arguments: String,
}

/// A tool that may be called.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ToolDefinition {
    /// `function`.
    #[serde(rename = "type")]
    #[expect(dead_code, reason = "there is one kind")]
    kind: FunctionKind,
    function: FunctionDefinition,
}

/// A function that may be called.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct FunctionDefinition {
    name: String,
    description: Option<String>,
    /// A JSON schema of its arguments.
    parameters: Option<Map<String, Value>>,
    /// Calls must have arguments that the schema allows.
    strict: Option<bool>,
}

/// Whether tools are called.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": …}}")]
pub(crate) enum ToolChoice {
    /// The model decides, must not, or must.
    Mode(ToolMode),
    /// It must call this one.
    Named(NamedTool),
}

/// Whether the model calls tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToolMode {
    None,
    Auto,
    Required,
}

impl From<ToolMode> for ToolUse {
    fn from(mode: ToolMode) -> Self {
        match mode {
            ToolMode::None => Self::None,
            ToolMode::Auto => Self::Auto,
            ToolMode::Required => Self::Required,
        }
    }
}

/// A tool that must be called.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedTool {
    /// `function`.
    #[serde(rename = "type")]
    #[expect(dead_code, reason = "there is one kind")]
    kind: FunctionKind,
    function: NamedFunction,
}

/// Its name.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedFunction {
    name: String,
}

/// How much to reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ReasoningEffort {
    None,
    Minimal,
    Low,
    Medium,
    High,
}

impl ReasoningEffort {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

impl ChatMessage {
    /// As templates read it. A `developer` is a `system` to those that do not know the word.
    pub(crate) fn into_message(self, knows_developer: bool) -> Message {
        let role = match self.role {
            Role::Developer if knows_developer => "developer",
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        };
        let content = match self.content {
            // Some templates put texts together without asking whether there is one.
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                parts.into_iter().map(|Part::Text { text }| text).collect::<Vec<_>>().join("\n")
            }
        };
        let mut fields = Map::new();
        let texts = [
            ("name", self.name),
            ("tool_call_id", self.tool_call_id),
            ("reasoning_content", self.reasoning_content),
            ("refusal", self.refusal),
        ];
        fields.extend(texts.into_iter().filter_map(|(name, text)| Some((name.to_owned(), Value::from(text?)))));
        if let Some(calls) = self.tool_calls {
            fields.insert("tool_calls".to_owned(), calls.into_iter().map(CalledTool::into_value).collect());
        }
        Message { role: role.to_owned(), content: Some(content), fields }
    }
}

impl CalledTool {
    fn into_value(self) -> Value {
        let Self { id, kind: _, function: CalledFunction { name, arguments }, index: _ } = self;
        call_of_text(id, name, &arguments)
    }
}

impl From<ToolDefinition> for Function {
    fn from(tool: ToolDefinition) -> Self {
        let FunctionDefinition { name, description, parameters, strict } = tool.function;
        Self { name, description, parameters, strict }
    }
}

/// How tools are to be used.
pub(crate) fn tool_use(choice: Option<ToolChoice>) -> ToolUse {
    match choice {
        None => ToolUse::Auto,
        Some(ToolChoice::Mode(mode)) => mode.into(),
        Some(ToolChoice::Named(NamedTool { function: NamedFunction { name }, .. })) => ToolUse::Named(name),
    }
}

/// Variables of the template: those given, and what asks for more or less reasoning.
pub(crate) fn variables(given: Option<Map<String, Value>>, effort: Option<ReasoningEffort>) -> Map<String, Value> {
    let mut variables = Map::new();
    if let Some(effort) = effort {
        variables.insert("reasoning_effort".to_owned(), effort.name().into());
        if effort == ReasoningEffort::None {
            variables.insert("enable_thinking".to_owned(), false.into());
        }
    }
    variables.extend(given.unwrap_or_default());
    variables
}
