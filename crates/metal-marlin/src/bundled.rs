//! The model inside the binary.

use marlin_checkpoint::{Checkpoint, CheckpointError};

/// Its name in messages.
pub(crate) const NAME: &str = "tiny-qwen3 (bundled)";

/// `bytes` placed at an address that every element type of a safetensors file can be read from.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../model/model.safetensors"));

static FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../model/config.json")),
    ("generation_config.json", include_bytes!("../model/generation_config.json")),
    ("tokenizer.json", include_bytes!("../model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../model/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("../model/chat_template.jinja")),
    ("model.safetensors", &WEIGHTS.0),
];

/// Opens it.
pub(crate) fn open() -> Result<Checkpoint, CheckpointError> {
    Checkpoint::from_static(NAME, FILES)
}
