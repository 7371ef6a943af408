//! Checkpoint folders in and out.
//!
//! [`Checkpoint`] opens a Hugging Face folder (config.json, safetensors by mmap, tokenizer, chat template, generation
//! settings), a folder quantised by this project or one in the layout of `compressed-tensors`, or a GGUF file, and hands
//! out matrices without copying them. [`CheckpointWriter`] writes quantised folders in either layout of folders:
//! crash-safe, resumable, one tensor in memory at a time. [`Gguf`] reads the files of llama.cpp as they are.
//! `docs/formats.md` describes the layouts to the bit.

mod chat_template;
mod checkpoint;
mod error;
mod fingerprint;
mod generation_config;
mod gguf;
mod layouts;
mod memory;
mod quantization;
mod shard;
mod source;
mod stack;
mod tokenizer;
mod weights;
mod writer;

pub use checkpoint::{CONFIG_FILE, Checkpoint, SIDE_FILES, Storage, Tensor, TensorInfo};
pub use error::CheckpointError;
pub use generation_config::GenerationConfig;
pub use gguf::{Gguf, GgufArray, GgufTensor, GgufType, GgufValue, GgufValueType};
pub use layouts::{ExportLayout, Layout};
pub use memory::MemoryTensor;
pub use quantization::{QuantizationConfig, QuantizedTensor};
pub use safetensors::Dtype;
pub use stack::MatrixStack;
pub use tokenizer::{TOKENIZER_FILE, Tokenizer, is_panic_caught};
pub use weights::{INDEX_FILE, WEIGHTS_FILE, shards_of_index};
pub use writer::{CheckpointWriter, PlannedTensor, WriterOptions};
