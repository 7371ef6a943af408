//! What a chat answers.

use marlin_engine::TokenLogprobs;
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::answer::Usage;
use crate::api::completions::finite;
use crate::model::Served;

/// Whole answers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatResponse {
    pub(crate) id: String,
    /// `chat.completion`.
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) usage: Usage,
}

/// One of them.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    pub(crate) index: u32,
    pub(crate) message: AssistantMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    pub(crate) finish_reason: &'static str,
}

/// What the model says.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct AssistantMessage {
    /// `assistant`.
    pub(crate) role: &'static str,
    /// The answer; `null` if there are only calls.
    pub(crate) content: Option<String>,
    /// Always `null`.
    pub(crate) refusal: Option<String>,
    /// What it thought before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    /// Functions to call.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCall>,
}

/// A function to call.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ToolCall {
    pub(crate) id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    pub(crate) function: FunctionCall,
}

/// Its name and its arguments.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct FunctionCall {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) name: String,
    /// A JSON object, as text; in a stream, a piece of it.
    pub(crate) arguments: String,
}

/// A piece of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk {
    pub(crate) id: String,
    /// `chat.completion.chunk`.
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Usage>,
}

/// A piece of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChunkChoice {
    pub(crate) index: u32,
    pub(crate) delta: MessageDelta,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

/// What is added to the message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct MessageDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCallDelta>,
}

/// What is added to a call.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ToolCallDelta {
    pub(crate) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    pub(crate) function: FunctionCall,
}

/// How likely tokens were.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    /// Of all that the model said.
    content: Vec<ChatTokenLogprob>,
    /// Always `null`.
    refusal: Option<Vec<ChatTokenLogprob>>,
}

/// How likely a token was.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ChatTokenLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<TopLogprob>,
}

/// An alternative.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(crate) fn new(served: &Served, scored: &[TokenLogprobs]) -> Self {
        Self { content: chat_logprobs(served, scored), refusal: None }
    }
}

/// How likely tokens were.
pub(crate) fn chat_logprobs(served: &Served, scored: &[TokenLogprobs]) -> Vec<ChatTokenLogprob> {
    let token = |scored: &TokenLogprobs| {
        let top = |&(id, logprob): &(u32, f32)| TopLogprob {
            token: served.token_text(id),
            bytes: served.token_bytes(id),
            logprob: finite(logprob),
        };
        ChatTokenLogprob {
            token: served.token_text(scored.token),
            bytes: served.token_bytes(scored.token),
            logprob: finite(scored.logprob),
            top_logprobs: scored.top.iter().map(top).collect(),
        }
    };
    scored.iter().map(token).collect()
}
