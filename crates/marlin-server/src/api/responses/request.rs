//! What a response is asked for.

use marlin_engine::{Grammar, Message};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::api::chat::ToolMode;
use crate::api::conversation::{Function, ToolUse, call_of_text};
use crate::api::generation::{Generation, check_logprobs};
use crate::error::ApiError;

/// A conversation to go on with.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::ResponseRequest)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResponseRequest {
    /// The model, by a name that `GET /v1/models` gives.
    pub(crate) model: String,
    /// What is said, or what was said so far.
    pub(crate) input: Input,
    /// What the model is told before all.
    pub(crate) instructions: Option<String>,
    /// A stored response that this conversation goes on from.
    pub(crate) previous_response_id: Option<String>,
    /// Keep the response, to be had again and gone on from; that is done if nothing is said.
    pub(crate) store: Option<bool>,
    /// Send the answer as it comes, as server-sent events.
    pub(crate) stream: Option<bool>,
    /// Generate at most this many tokens; as many as the context has room for if nothing is said.
    #[schema(minimum = 1)]
    pub(crate) max_output_tokens: Option<u32>,
    /// Divides the logits; 0 takes the most likely token.
    #[schema(minimum = 0)]
    pub(crate) temperature: Option<f64>,
    /// Keep the smallest set of most likely tokens whose probability reaches this.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub(crate) top_p: Option<f64>,
    /// How likely each token and so many alternatives were, if `include` asks for that.
    #[schema(minimum = 0, maximum = 20)]
    pub(crate) top_logprobs: Option<u32>,
    /// What to tell besides: `message.output_text.logprobs`.
    pub(crate) include: Option<Vec<Include>>,
    /// Functions that the model may call.
    pub(crate) tools: Option<Vec<ToolDefinition>>,
    /// Whether it calls them: `none`, `auto`, `required`, or one by its name.
    pub(crate) tool_choice: Option<ToolChoice>,
    /// Whether it may call several at once.
    pub(crate) parallel_tool_calls: Option<bool>,
    /// What the answer must look like.
    #[serde(default, deserialize_with = "crate::body::object")]
    pub(crate) text: Option<TextOptions>,
    /// How much to reason.
    #[serde(default, deserialize_with = "crate::body::object")]
    pub(crate) reasoning: Option<ReasoningOptions>,
    /// `disabled`: a conversation that is too long is refused.
    #[expect(dead_code, reason = "there is one way")]
    pub(crate) truncation: Option<Truncation>,
    /// Kept with the response.
    pub(crate) metadata: Option<Map<String, Value>>,
    /// Who asks; it is not looked at.
    #[expect(dead_code, reason = "clients may tell it")]
    pub(crate) user: Option<String>,
    /// The same.
    #[expect(dead_code, reason = "clients may tell it")]
    pub(crate) safety_identifier: Option<String>,
    /// Prompts are cached always.
    #[expect(dead_code, reason = "it asks for what is done anyway")]
    pub(crate) prompt_cache_key: Option<String>,
}

/// What is said, or what was said so far.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::Input)]
#[serde(untagged, expecting = "a text, or a list of messages, function_call, function_call_output and reasoning")]
pub(crate) enum Input {
    Text(String),
    Items(#[serde(deserialize_with = "crate::body::by_type")] Vec<Item>),
}

/// A part of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::Item)]
#[serde(untagged, expecting = "a message, function_call, function_call_output or reasoning")]
pub(crate) enum Item {
    Typed(TypedItem),
    /// A message that does not say that it is one.
    Message(PlainMessage),
}

/// A part of a conversation that says what it is.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::TypedItem)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum TypedItem {
    /// Something said.
    Message {
        role: Role,
        content: Content,
        #[expect(dead_code, reason = "clients send it back")]
        id: Option<String>,
        #[expect(dead_code, reason = "clients send it back")]
        status: Option<Status>,
    },
    /// A call that an earlier answer made.
    FunctionCall {
        call_id: String,
        name: String,
        /// A JSON object, as text.
        arguments: String,
        #[expect(dead_code, reason = "clients send it back")]
        id: Option<String>,
        #[expect(dead_code, reason = "clients send it back")]
        status: Option<Status>,
    },
    /// What came of it.
    FunctionCallOutput {
        call_id: String,
        output: Content,
        #[expect(dead_code, reason = "clients send it back")]
        id: Option<String>,
        #[expect(dead_code, reason = "clients send it back")]
        status: Option<Status>,
    },
    /// What an earlier answer reasoned.
    Reasoning {
        #[serde(default)]
        content: Vec<ReasoningPart>,
        #[serde(default)]
        #[expect(dead_code, reason = "the server makes none")]
        summary: Vec<Value>,
        #[expect(dead_code, reason = "clients send it back")]
        id: Option<String>,
        #[expect(dead_code, reason = "clients send it back")]
        status: Option<Status>,
    },
}

/// Something said.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::PlainMessage)]
#[serde(deny_unknown_fields)]
pub(crate) struct PlainMessage {
    role: Role,
    content: Content,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[schema(as = responses::Role)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    System,
    Developer,
    User,
    Assistant,
}

/// Whether something is complete.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = responses::Status)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    InProgress,
    Completed,
    Incomplete,
}

/// A text, or parts of one.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::Content)]
#[serde(
    untagged,
    expecting = "a text, or a list of parts input_text or output_text; images and files are not supported"
)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a text.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::Part)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Part {
    /// Of what was asked.
    InputText { text: String },
    /// Of what was answered.
    OutputText {
        text: String,
        #[serde(default)]
        #[expect(dead_code, reason = "the server makes none")]
        annotations: Vec<Value>,
        #[serde(default)]
        #[expect(dead_code, reason = "clients send them back")]
        logprobs: Option<Vec<Value>>,
    },
}

/// A part of what was reasoned.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::ReasoningPart)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ReasoningPart {
    ReasoningText { text: String },
}

/// What to tell besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[schema(as = responses::Include)]
pub(crate) enum Include {
    /// How likely each token was.
    #[serde(rename = "message.output_text.logprobs")]
    Logprobs,
}

/// A function that may be called.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::ToolDefinition)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ToolDefinition {
    Function {
        name: String,
        description: Option<String>,
        /// A JSON schema of its arguments.
        parameters: Option<Map<String, Value>>,
        /// Calls must have arguments that the schema allows.
        strict: Option<bool>,
    },
}

/// Whether tools are called.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::ToolChoice)]
#[serde(untagged, expecting = "none, auto, required, or {\"type\": \"function\", \"name\": …}")]
pub(crate) enum ToolChoice {
    /// The model decides, must not, or must.
    Mode(ToolMode),
    /// It must call this one.
    Named(#[serde(deserialize_with = "crate::body::by_type")] NamedTool),
}

/// A tool that must be called.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::NamedTool)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum NamedTool {
    Function { name: String },
}

/// What the answer must look like.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::TextOptions)]
#[serde(deny_unknown_fields)]
pub(crate) struct TextOptions {
    pub(crate) format: Option<TextFormat>,
}

/// What the answer must look like.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::TextFormat)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum TextFormat {
    /// Any text.
    Text {},
    /// A JSON object.
    JsonObject {},
    /// An instance of a JSON schema.
    JsonSchema {
        #[expect(dead_code, reason = "it changes nothing")]
        name: Option<String>,
        #[expect(dead_code, reason = "it changes nothing")]
        description: Option<String>,
        /// The schema.
        schema: Map<String, Value>,
        /// Schemas are followed to the letter, whatever this says.
        #[expect(dead_code, reason = "it changes nothing")]
        strict: Option<bool>,
    },
}

/// How much to reason.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = responses::ReasoningOptions)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReasoningOptions {
    /// The template's variable `reasoning_effort`; `none` sets `enable_thinking` to false.
    pub(crate) effort: Option<crate::api::chat::ReasoningEffort>,
}

/// What becomes of a conversation that is too long.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = responses::Truncation)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Truncation {
    /// It is refused.
    Disabled,
}

impl ResponseRequest {
    /// What is asked of the engine.
    pub(crate) fn generation(&self) -> Generation {
        Generation {
            max_tokens: self.max_output_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            ..Generation::default()
        }
    }

    /// How many alternatives to tell, if it is told at all how likely tokens were.
    pub(crate) fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        let is_asked = self.include.as_ref().is_some_and(|include| include.contains(&Include::Logprobs));
        match self.top_logprobs.map(|top| top as usize) {
            Some(_) if !is_asked => {
                let message = "top_logprobs need logprobs: include \"message.output_text.logprobs\"";
                Err(ApiError::parameter("top_logprobs", message))
            }
            None if !is_asked => Ok(None),
            top => check_logprobs("top_logprobs", top.unwrap_or(0)).map(Some),
        }
    }
}

impl TextFormat {
    /// The grammar of the answer, if it has one.
    pub(crate) fn into_grammar(self) -> Option<Grammar> {
        match self {
            Self::Text {} => None,
            Self::JsonObject {} => Some(Grammar::JsonObject),
            Self::JsonSchema { schema, .. } => Some(Grammar::JsonSchema(schema.into())),
        }
    }
}

impl From<ToolDefinition> for Function {
    fn from(ToolDefinition::Function { name, description, parameters, strict }: ToolDefinition) -> Self {
        Self { name, description, parameters, strict }
    }
}

/// How tools are to be used.
pub(crate) fn tool_use(choice: Option<ToolChoice>) -> ToolUse {
    match choice {
        None => ToolUse::Auto,
        Some(ToolChoice::Mode(mode)) => mode.into(),
        Some(ToolChoice::Named(NamedTool::Function { name })) => ToolUse::Named(name),
    }
}

impl Content {
    fn into_text(self) -> String {
        let text = |part| match part {
            Part::InputText { text } | Part::OutputText { text, .. } => text,
        };
        match self {
            Self::Text(text) => text,
            Self::Parts(parts) => parts.into_iter().map(text).collect::<Vec<_>>().join("\n"),
        }
    }
}

/// Appends what is said to the conversation, as templates read it.
pub(crate) fn add_input(messages: &mut Vec<Message>, input: Input, knows_developer: bool) {
    let items = match input {
        Input::Text(text) => return messages.push(Message::new("user", text)),
        Input::Items(items) => items,
    };
    // Items of one answer are one message to a template.
    let mut is_open = false;
    for item in items {
        let item = match item {
            Item::Typed(item) => item,
            Item::Message(PlainMessage { role, content }) => {
                TypedItem::Message { role, content, id: None, status: None }
            }
        };
        let is_answer = match &item {
            TypedItem::Message { role, .. } => *role == Role::Assistant,
            TypedItem::FunctionCall { .. } | TypedItem::Reasoning { .. } => true,
            TypedItem::FunctionCallOutput { .. } => false,
        };
        if is_answer && !is_open {
            messages.push(Message::new("assistant", ""));
        }
        is_open = is_answer;
        match (item, messages.last_mut()) {
            (TypedItem::Message { role: Role::Assistant, content, .. }, Some(answer)) => {
                let text = answer.content.get_or_insert_default();
                if !text.is_empty() {
                    text.push('\n');
                }
                text.push_str(&content.into_text());
            }
            (TypedItem::Message { role, content, .. }, _) => {
                let role = match role {
                    Role::Developer if knows_developer => "developer",
                    Role::System | Role::Developer => "system",
                    _ => "user",
                };
                messages.push(Message::new(role, content.into_text()));
            }
            (TypedItem::FunctionCall { call_id, name, arguments, .. }, Some(answer)) => {
                add_call(answer, call_of_text(Some(call_id), name, &arguments));
            }
            (TypedItem::Reasoning { content, .. }, Some(answer)) => {
                let texts: Vec<String> =
                    content.into_iter().map(|ReasoningPart::ReasoningText { text }| text).collect();
                answer.fields.insert("reasoning_content".to_owned(), texts.join("\n").into());
            }
            (TypedItem::FunctionCallOutput { call_id, output, .. }, _) => {
                let mut result = Message::new("tool", output.into_text());
                result.fields.insert("tool_call_id".to_owned(), call_id.into());
                messages.push(result);
            }
            (TypedItem::FunctionCall { .. } | TypedItem::Reasoning { .. }, None) => {}
        }
    }
}

/// Adds a call to a message.
pub(crate) fn add_call(message: &mut Message, call: Value) {
    let calls = message.fields.entry("tool_calls").or_insert_with(|| Value::Array(Vec::new()));
    if let Value::Array(calls) = calls {
        calls.push(call);
    }
}
