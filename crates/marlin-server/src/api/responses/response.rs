//! What is answered: items, and the events of a stream by which they come to be.

use std::sync::Arc;

use marlin_engine::{Finish, Message, TokenLogprobs};
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::request::add_call;
use crate::api::answer::new_id;
use crate::api::chat::{ChatTokenLogprob, chat_logprobs};
use crate::api::conversation::{Ending, Piece, call_of_text};
use crate::dialect::Delta;
use crate::model::Served;

/// A response.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = responses::ResponseObject)]
pub(crate) struct ResponseObject {
    pub(crate) id: String,
    /// `response`.
    pub(crate) object: &'static str,
    pub(crate) created_at: u64,
    pub(crate) model: String,
    /// `in_progress`, `completed` or `incomplete`.
    pub(crate) status: &'static str,
    /// Why it is incomplete.
    pub(crate) incomplete_details: Option<IncompleteDetails>,
    /// Always `null`: what fails is an error.
    pub(crate) error: Option<String>,
    pub(crate) output: Vec<OutputItem>,
    pub(crate) usage: Option<ResponseUsage>,
    /// What was asked, as it was understood.
    #[serde(flatten)]
    pub(crate) asked: Asked,
}

/// What was asked.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = responses::Asked)]
pub(crate) struct Asked {
    pub(crate) instructions: Option<String>,
    pub(crate) previous_response_id: Option<String>,
    pub(crate) store: bool,
    pub(crate) max_output_tokens: Option<u32>,
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) tools: Vec<Value>,
    pub(crate) tool_choice: Value,
    pub(crate) parallel_tool_calls: bool,
    /// `disabled`.
    pub(crate) truncation: &'static str,
    pub(crate) metadata: Map<String, Value>,
}

/// Why a response is incomplete.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[schema(as = responses::IncompleteDetails)]
pub(crate) struct IncompleteDetails {
    /// `max_output_tokens`.
    pub(crate) reason: &'static str,
}

/// Numbers of tokens.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[schema(as = responses::ResponseUsage)]
pub(crate) struct ResponseUsage {
    input_tokens: usize,
    input_tokens_details: InputDetails,
    output_tokens: usize,
    output_tokens_details: OutputDetails,
    total_tokens: usize,
}

/// Which tokens of the prompt were not computed.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[schema(as = responses::InputDetails)]
pub(crate) struct InputDetails {
    cached_tokens: usize,
}

/// What tokens of the answer are.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[schema(as = responses::OutputDetails)]
pub(crate) struct OutputDetails {
    reasoning_tokens: usize,
}

/// A part of a response.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = responses::OutputItem)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum OutputItem {
    /// What the model says.
    Message {
        id: String,
        /// `in_progress`, `completed` or `incomplete`.
        status: &'static str,
        /// `assistant`.
        role: &'static str,
        content: Vec<OutputPart>,
    },
    /// What it thought before.
    Reasoning {
        id: String,
        /// `in_progress`, `completed` or `incomplete`.
        status: &'static str,
        /// Empty: thoughts are told as they are.
        summary: Vec<Value>,
        content: Vec<OutputPart>,
    },
    /// A function to call.
    FunctionCall {
        id: String,
        /// `in_progress`, `completed` or `incomplete`.
        status: &'static str,
        /// By which its output is known.
        call_id: String,
        name: String,
        /// A JSON object, as text.
        arguments: String,
    },
}

/// A part of an item.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = responses::OutputPart)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum OutputPart {
    /// Of a message.
    OutputText {
        text: String,
        /// Always empty.
        annotations: Vec<Value>,
        /// How likely its tokens were, if that was asked for.
        logprobs: Vec<ChatTokenLogprob>,
    },
    /// Of a reasoning.
    ReasoningText { text: String },
}

/// What an item is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Message,
    Reasoning,
    FunctionCall,
}

impl OutputItem {
    fn new(kind: Kind, call_id: String, name: String) -> Self {
        let status = "in_progress";
        match kind {
            Kind::Message => Self::Message { id: new_id("msg"), status, role: "assistant", content: Vec::new() },
            Kind::Reasoning => Self::Reasoning { id: new_id("rs"), status, summary: Vec::new(), content: Vec::new() },
            Kind::FunctionCall => {
                Self::FunctionCall { id: new_id("fc"), status, call_id, name, arguments: String::new() }
            }
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Message { .. } => Kind::Message,
            Self::Reasoning { .. } => Kind::Reasoning,
            Self::FunctionCall { .. } => Kind::FunctionCall,
        }
    }

    fn id(&self) -> &str {
        match self {
            Self::Message { id, .. } | Self::Reasoning { id, .. } | Self::FunctionCall { id, .. } => id,
        }
    }

    fn set_status(&mut self, new: &'static str) {
        match self {
            Self::Message { status, .. } | Self::Reasoning { status, .. } | Self::FunctionCall { status, .. } => {
                *status = new;
            }
        }
    }

    /// The one part of a text, which is there from the beginning.
    fn part(&mut self) -> Option<&mut OutputPart> {
        match self {
            Self::Message { content, .. } | Self::Reasoning { content, .. } => content.first_mut(),
            Self::FunctionCall { .. } => None,
        }
    }

    fn begin_part(&mut self) -> Option<&OutputPart> {
        let (content, part) = match self {
            Self::Message { content, .. } => {
                (content, OutputPart::OutputText { text: String::new(), annotations: Vec::new(), logprobs: Vec::new() })
            }
            Self::Reasoning { content, .. } => (content, OutputPart::ReasoningText { text: String::new() }),
            Self::FunctionCall { .. } => return None,
        };
        content.push(part);
        content.first()
    }
}

/// An event of a stream.
#[derive(Debug)]
pub(crate) struct StreamEvent {
    pub(crate) name: &'static str,
    pub(crate) data: Value,
}

/// Puts a response together, and tells how it comes to be.
#[derive(Debug)]
pub(crate) struct Builder {
    served: Arc<Served>,
    pub(crate) response: ResponseObject,
    /// Events so far.
    sequence: u64,
    events: Vec<StreamEvent>,
    /// The last item goes on.
    is_open: bool,
    /// Of tokens whose text is held back.
    logprobs: Vec<TokenLogprobs>,
    reasoning_tokens: usize,
}

impl Builder {
    /// Begins an answer.
    pub(crate) fn new(served: Arc<Served>, response: ResponseObject) -> Self {
        let mut builder = Self {
            served,
            response,
            sequence: 0,
            events: Vec::new(),
            is_open: false,
            logprobs: Vec::new(),
            reasoning_tokens: 0,
        };
        for name in ["response.created", "response.in_progress"] {
            builder.tell_response(name);
        }
        builder
    }

    /// The events since the last call.
    pub(crate) fn events(&mut self) -> Vec<StreamEvent> {
        std::mem::take(&mut self.events)
    }

    fn tell(&mut self, name: &'static str, fields: Value) {
        let mut data = json!({ "type": name, "sequence_number": self.sequence });
        if let (Value::Object(data), Value::Object(fields)) = (&mut data, fields) {
            data.extend(fields);
        }
        self.sequence += 1;
        self.events.push(StreamEvent { name, data });
    }

    fn tell_response(&mut self, name: &'static str) {
        let fields = json!({ "response": self.response });
        self.tell(name, fields);
    }

    /// Takes what is added to the answer.
    pub(crate) fn add(&mut self, piece: Piece) {
        self.logprobs.extend(piece.logprobs);
        for delta in piece.deltas {
            match delta {
                Delta::Content(text) => self.add_text(Kind::Message, text),
                Delta::Reasoning(text) => self.add_text(Kind::Reasoning, text),
                Delta::ToolCallStart { id, name, .. } => self.begin(OutputItem::new(Kind::FunctionCall, id, name)),
                Delta::ToolCallArguments { fragment, .. } => self.add_arguments(&fragment),
            }
        }
        // A token belongs to what it adds to.
        let is_reasoning =
            self.is_open && self.response.output.last().is_some_and(|item| item.kind() == Kind::Reasoning);
        self.reasoning_tokens += usize::from(is_reasoning);
        if let Some(end) = piece.end {
            self.finish(&end.ending, &end.finish);
        }
    }

    fn index(&self) -> usize {
        self.response.output.len().saturating_sub(1)
    }

    fn begin(&mut self, item: OutputItem) {
        self.end("completed");
        self.response.output.push(item);
        self.is_open = true;
        let index = self.index();
        let added = json!({ "output_index": index, "item": self.response.output[index] });
        self.tell("response.output_item.added", added);
        let item = &mut self.response.output[index];
        let id = item.id().to_owned();
        if let Some(part) = item.begin_part() {
            let part = json!({ "item_id": id, "output_index": index, "content_index": 0, "part": part });
            self.tell("response.content_part.added", part);
        }
    }

    fn add_text(&mut self, kind: Kind, more: String) {
        if !self.is_open || self.response.output.last().is_none_or(|item| item.kind() != kind) {
            self.begin(OutputItem::new(kind, String::new(), String::new()));
        }
        let scored = chat_logprobs(&self.served, &std::mem::take(&mut self.logprobs));
        let index = self.index();
        let item = &mut self.response.output[index];
        let id = item.id().to_owned();
        match item.part() {
            Some(OutputPart::OutputText { text, logprobs, .. }) => {
                text.push_str(&more);
                let delta = json!({
                    "item_id": id, "output_index": index, "content_index": 0, "delta": more, "logprobs": scored,
                });
                logprobs.extend(scored);
                self.tell("response.output_text.delta", delta);
            }
            Some(OutputPart::ReasoningText { text }) => {
                text.push_str(&more);
                let delta = json!({ "item_id": id, "output_index": index, "content_index": 0, "delta": more });
                self.tell("response.reasoning_text.delta", delta);
            }
            None => {}
        }
    }

    fn add_arguments(&mut self, fragment: &str) {
        self.logprobs.clear();
        let index = self.index();
        if let Some(OutputItem::FunctionCall { id, arguments, .. }) = self.response.output.last_mut() {
            arguments.push_str(fragment);
            let delta = json!({ "item_id": id, "output_index": index, "delta": fragment });
            self.tell("response.function_call_arguments.delta", delta);
        }
    }

    /// Ends the item that goes on, if one does.
    fn end(&mut self, status: &'static str) {
        if !std::mem::take(&mut self.is_open) {
            return;
        }
        let index = self.index();
        let item = &mut self.response.output[index];
        item.set_status(status);
        let id = item.id().to_owned();
        let place = json!({ "item_id": id, "output_index": index, "content_index": 0 });
        let with = |fields: Value| {
            let mut place = place.clone();
            if let (Value::Object(place), Value::Object(fields)) = (&mut place, fields) {
                place.extend(fields);
            }
            place
        };
        let item = item.clone();
        match &item {
            OutputItem::FunctionCall { name, arguments, .. } => {
                let done = json!({ "item_id": id, "output_index": index, "name": name, "arguments": arguments });
                self.tell("response.function_call_arguments.done", done);
            }
            OutputItem::Message { content, .. } | OutputItem::Reasoning { content, .. } => {
                for part in content {
                    match part {
                        OutputPart::OutputText { text, logprobs, .. } => {
                            self.tell("response.output_text.done", with(json!({ "text": text, "logprobs": logprobs })));
                        }
                        OutputPart::ReasoningText { text } => {
                            self.tell("response.reasoning_text.done", with(json!({ "text": text })));
                        }
                    }
                    self.tell("response.content_part.done", with(json!({ "part": part })));
                }
            }
        }
        self.tell("response.output_item.done", json!({ "output_index": index, "item": item }));
    }

    fn finish(&mut self, ending: &Ending, finish: &Finish) {
        let is_cut_off = *ending == Ending::Length;
        let status = if is_cut_off { "incomplete" } else { "completed" };
        self.end(status);
        self.response.status = status;
        self.response.incomplete_details = is_cut_off.then_some(IncompleteDetails { reason: "max_output_tokens" });
        self.response.usage = Some(ResponseUsage {
            input_tokens: finish.prompt_tokens,
            input_tokens_details: InputDetails { cached_tokens: finish.cached_tokens },
            output_tokens: finish.generated_tokens,
            output_tokens_details: OutputDetails {
                reasoning_tokens: self.reasoning_tokens.min(finish.generated_tokens),
            },
            total_tokens: finish.prompt_tokens + finish.generated_tokens,
        });
        self.tell_response(if is_cut_off { "response.incomplete" } else { "response.completed" });
    }

    /// The event that ends a stream in which something goes wrong.
    pub(crate) fn error(&mut self, error: &crate::error::ErrorBody) -> StreamEvent {
        let mut fields = json!(error);
        if let Value::Object(fields) = &mut fields {
            fields.remove("type");
        }
        self.tell("error", fields);
        self.events.pop().unwrap_or(StreamEvent { name: "error", data: Value::Null })
    }
}

impl ResponseObject {
    /// The answer as templates read it.
    pub(crate) fn to_message(&self) -> Message {
        let mut message = Message::new("assistant", "");
        for item in &self.output {
            match item {
                OutputItem::Message { content, .. } => {
                    for part in content {
                        if let OutputPart::OutputText { text, .. } = part {
                            message.content.get_or_insert_default().push_str(text);
                        }
                    }
                }
                OutputItem::Reasoning { content, .. } => {
                    for part in content {
                        if let OutputPart::ReasoningText { text } = part {
                            message.fields.insert("reasoning_content".to_owned(), text.clone().into());
                        }
                    }
                }
                OutputItem::FunctionCall { call_id, name, arguments, .. } => {
                    add_call(&mut message, call_of_text(Some(call_id.clone()), name.clone(), arguments));
                }
            }
        }
        message
    }
}
