//! Checkpoint folders in and out.
//!
//! [`Checkpoint`] opens a Hugging Face folder (config.json, safetensors by mmap, tokenizer, chat template, generation
//! settings), a folder quantised by this project or in the layout of another package ([`Layout`]), or a GGUF file, and
//! hands out matrices, without copying those that lie in canonical order. [`CheckpointWriter`] writes quantised folders:
//! crash-safe, resumable, one tensor in memory at a time; [`GgufWriter`] writes a file for llama.cpp. [`Gguf`] reads such
//! files as they are. `docs/formats.md` describes the layouts to the bit.

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
mod token_bytes;
mod tokenizer;
mod weights;
mod writer;

pub use checkpoint::{CONFIG_FILE, Checkpoint, SIDE_FILES, Storage, Tensor, TensorInfo};
pub use error::CheckpointError;
pub use generation_config::GenerationConfig;
pub use gguf::{Gguf, GgufArray, GgufTensor, GgufType, GgufValue, GgufValueType, GgufWriter};
pub use layouts::{ExportLayout, Layout, PackedTensor, packed_tensors};
pub use memory::MemoryTensor;
pub use quantization::{QuantizationConfig, QuantizedTensor, Rotations};
pub use safetensors::Dtype;
pub use stack::MatrixStack;
pub use tokenizer::{TOKENIZER_FILE, Tokenizer, is_panic_caught};
pub use weights::{INDEX_FILE, WEIGHTS_FILE, shards_of_index};
pub use writer::{CheckpointWriter, CompleteFolder, PlannedTensor, ShardWriter, Shards, WriterOptions};
