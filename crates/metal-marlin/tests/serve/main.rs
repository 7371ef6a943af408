//! `metal-marlin serve` as clients meet it.
#![cfg(feature = "bundled-model")]

mod answers;
mod faults;
mod load;
mod models;
mod restart;
mod server;

use serde_json::{Value, json};

/// Whether there is a GPU; a failure if one is required.
pub(crate) fn has_gpu() -> bool {
    let has_gpu = marlin_kernels::gpu::adapters().iter().any(|gpu| gpu.missing.is_none());
    assert!(has_gpu || std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none(), "a GPU is required");
    has_gpu
}

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const TEXT: &str = "/v1/completions";

pub(crate) fn chat(message: &str) -> Value {
    json!({ "model": "bundled", "messages": [{ "role": "user", "content": message }], "max_tokens": 12, "seed": 1 })
}

pub(crate) fn with(mut body: Value, fields: Value) -> Value {
    let (Value::Object(body_fields), Value::Object(fields)) = (&mut body, fields) else { panic!("objects") };
    body_fields.extend(fields);
    body
}

/// A text long enough to be in the middle of when something happens.
pub(crate) fn long() -> Value {
    json!({ "model": "bundled", "prompt": "Once", "max_tokens": 900, "ignore_eos": true, "stream": true })
}
