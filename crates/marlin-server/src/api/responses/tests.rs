//! What becomes of conversations.

use serde_json::{Map, Value, json};

use super::request::{Input, add_input};
use super::response::{Asked, ResponseObject};

/// A response of nothing.
pub(crate) fn response(id: &str) -> ResponseObject {
    let asked = Asked {
        instructions: None,
        previous_response_id: None,
        store: true,
        max_output_tokens: None,
        temperature: None,
        top_p: None,
        tools: Vec::new(),
        tool_choice: Value::Null,
        parallel_tool_calls: true,
        truncation: "disabled",
        metadata: Map::new(),
    };
    ResponseObject {
        id: id.to_owned(),
        object: "response",
        created_at: 0,
        model: "bundled".to_owned(),
        status: "completed",
        incomplete_details: None,
        error: None,
        output: Vec::new(),
        usage: None,
        asked,
    }
}

#[test]
fn items_of_an_answer_are_one_message() {
    let input: Input = serde_json::from_value(json!([
        { "role": "developer", "content": "Be brief." },
        { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "Rain?" }] },
        { "type": "reasoning", "id": "rs", "summary": [], "content": [{ "type": "reasoning_text", "text": "Look it up." }] },
        { "type": "message", "id": "msg", "status": "completed", "role": "assistant",
          "content": [{ "type": "output_text", "text": "One moment.", "annotations": [], "logprobs": [] }] },
        { "type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{\"day\": \"today\"}" },
        { "type": "function_call", "call_id": "c2", "name": "now", "arguments": "{}" },
        { "type": "function_call_output", "call_id": "c1", "output": "wet" },
        { "type": "function_call_output", "call_id": "c2", "output": [{ "type": "input_text", "text": "noon" }] },
    ]))
    .unwrap();
    let mut messages = Vec::new();
    add_input(&mut messages, input, false);
    let call = |id: &str, name: &str, arguments: Value| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
    let expected = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": "Rain?" },
        { "role": "assistant", "content": "One moment.", "reasoning_content": "Look it up.",
          "tool_calls": [call("c1", "weather", json!({ "day": "today" })), call("c2", "now", json!({}))] },
        { "role": "tool", "content": "wet", "tool_call_id": "c1" },
        { "role": "tool", "content": "noon", "tool_call_id": "c2" },
    ]);
    assert_eq!(serde_json::to_value(&messages).unwrap(), expected);
}
