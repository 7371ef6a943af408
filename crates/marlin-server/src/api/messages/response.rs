//! What is answered to a message in Anthropic's form.

use marlin_engine::Finish;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::api::conversation::Ending;
use crate::dialect::Delta;

/// A whole answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = messages::MessageResponse)]
pub(crate) struct MessageResponse {
    pub(crate) id: String,
    /// `message`.
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    /// `assistant`.
    pub(crate) role: &'static str,
    pub(crate) model: String,
    pub(crate) content: Vec<ContentBlock>,
    /// `end_turn`, `max_tokens`, `stop_sequence` or `tool_use`.
    pub(crate) stop_reason: Option<&'static str>,
    /// The text before which it ended, if it ended because of one.
    pub(crate) stop_sequence: Option<String>,
    pub(crate) usage: MessageUsage,
}

/// A part of it.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = messages::ContentBlock)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum ContentBlock {
    /// Text of the answer.
    Text {
        /// The text.
        text: String,
    },
    /// What the model thought before it.
    Thinking {
        /// The thoughts.
        thinking: String,
        /// Empty: the server signs nothing.
        signature: &'static str,
    },
    /// A function to call.
    ToolUse {
        /// A name for the call.
        id: String,
        /// The function's.
        name: String,
        /// Its arguments; none if the answer was cut off within them.
        input: Map<String, Value>,
    },
}

/// Numbers of tokens.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
#[schema(as = messages::MessageUsage)]
pub(crate) struct MessageUsage {
    /// Of the prompt, those that the KV cache did not hold.
    pub(crate) input_tokens: usize,
    /// Those that it held.
    pub(crate) cache_read_input_tokens: usize,
    /// 0: keeping a prompt costs nothing.
    pub(crate) cache_creation_input_tokens: usize,
    /// Of the answer.
    pub(crate) output_tokens: usize,
}

impl From<&Finish> for MessageUsage {
    fn from(finish: &Finish) -> Self {
        Self {
            input_tokens: finish.prompt_tokens - finish.cached_tokens,
            cache_read_input_tokens: finish.cached_tokens,
            cache_creation_input_tokens: 0,
            output_tokens: finish.generated_tokens,
        }
    }
}

/// How many tokens a conversation has.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = messages::TokenCount)]
pub(crate) struct TokenCount {
    pub(crate) input_tokens: usize,
}

/// Why an answer ended, and the text that ended it.
pub(crate) fn stop_reason(ending: Ending) -> (&'static str, Option<String>) {
    match ending {
        Ending::Complete => ("end_turn", None),
        Ending::Calls => ("tool_use", None),
        Ending::StopString(text) => ("stop_sequence", Some(text)),
        Ending::Length => ("max_tokens", None),
    }
}

/// An event of a stream.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = messages::StreamEvent)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum StreamEvent {
    MessageStart { message: MessageResponse },
    ContentBlockStart { index: usize, content_block: ContentBlock },
    ContentBlockDelta { index: usize, delta: BlockDelta },
    ContentBlockStop { index: usize },
    MessageDelta { delta: MessageEnd, usage: MessageUsage },
    MessageStop {},
}

/// What is added to a block.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = messages::BlockDelta)]
#[serde(tag = "type")]
pub(crate) enum BlockDelta {
    #[serde(rename = "text_delta")]
    Text { text: String },
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: String },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: String },
}

/// How a message ended.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = messages::MessageEnd)]
pub(crate) struct MessageEnd {
    pub(crate) stop_reason: &'static str,
    pub(crate) stop_sequence: Option<String>,
}

impl StreamEvent {
    /// Its name, which stands before its data.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop {} => "message_stop",
        }
    }
}

/// Makes blocks of what is added to an answer.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    /// Those begun so far.
    count: usize,
    /// What the last of them holds, if it goes on.
    open: Option<BlockKind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlockKind {
    Text,
    Thinking,
    ToolUse,
}

impl Blocks {
    /// Appends the events of a change.
    pub(crate) fn add(&mut self, delta: Delta, events: &mut Vec<StreamEvent>) {
        let (kind, delta) = match delta {
            Delta::Content(text) => (BlockKind::Text, BlockDelta::Text { text }),
            Delta::Reasoning(thinking) => (BlockKind::Thinking, BlockDelta::Thinking { thinking }),
            Delta::ToolCallStart { id, name, .. } => {
                self.begin(BlockKind::ToolUse, ContentBlock::ToolUse { id, name, input: Map::new() }, events);
                return;
            }
            Delta::ToolCallArguments { fragment, .. } => {
                (BlockKind::ToolUse, BlockDelta::InputJson { partial_json: fragment })
            }
        };
        if self.open != Some(kind) {
            let block = match kind {
                BlockKind::Thinking => ContentBlock::Thinking { thinking: String::new(), signature: "" },
                _ => ContentBlock::Text { text: String::new() },
            };
            self.begin(kind, block, events);
        }
        events.push(StreamEvent::ContentBlockDelta { index: self.count - 1, delta });
    }

    fn begin(&mut self, kind: BlockKind, content_block: ContentBlock, events: &mut Vec<StreamEvent>) {
        self.end(events);
        events.push(StreamEvent::ContentBlockStart { index: self.count, content_block });
        (self.count, self.open) = (self.count + 1, Some(kind));
    }

    /// Ends the block that goes on, if one does.
    pub(crate) fn end(&mut self, events: &mut Vec<StreamEvent>) {
        if self.open.take().is_some() {
            events.push(StreamEvent::ContentBlockStop { index: self.count - 1 });
        }
    }
}

/// The blocks of a whole answer.
pub(crate) fn blocks(deltas: Vec<Delta>) -> Vec<ContentBlock> {
    let mut content: Vec<ContentBlock> = Vec::new();
    let mut arguments: Vec<String> = Vec::new();
    for delta in deltas {
        match (delta, content.last_mut()) {
            (Delta::Content(more), Some(ContentBlock::Text { text })) => text.push_str(&more),
            (Delta::Content(text), _) => content.push(ContentBlock::Text { text }),
            (Delta::Reasoning(more), Some(ContentBlock::Thinking { thinking, .. })) => thinking.push_str(&more),
            (Delta::Reasoning(thinking), _) => content.push(ContentBlock::Thinking { thinking, signature: "" }),
            (Delta::ToolCallStart { id, name, .. }, _) => {
                content.push(ContentBlock::ToolUse { id, name, input: Map::new() });
                arguments.push(String::new());
            }
            (Delta::ToolCallArguments { index, fragment }, _) => arguments[index].push_str(&fragment),
        }
    }
    let calls = content.iter_mut().filter_map(|block| match block {
        ContentBlock::ToolUse { input, .. } => Some(input),
        _ => None,
    });
    for (input, arguments) in calls.zip(arguments) {
        *input = serde_json::from_str(&arguments).unwrap_or_default();
    }
    content
}
