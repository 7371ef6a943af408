//! What a model takes of a device's memory, told from its headers before anything is loaded.
//!
//! The numbers are those that [`load_model`](crate::load_model) allocates: weights in the device's own order (what it converts counted as
//! converted), KV blocks, activations with scratch memory, logits. On top comes an allowance for the rest of the program. The mapped
//! checkpoint is not counted: its pages are the system's cache of the file, which it takes back when memory runs short.

use std::fmt;
use std::sync::OnceLock;

use marlin_checkpoint::{Checkpoint, Storage, TensorInfo};
use marlin_format::Scheme;
use marlin_kernels::{KernelError, KvLayout, KvType, MemoryUse};

use crate::decoder::{
    PredictionMemory, Sizes, angle_shapes, eh_proj_bytes, expert_bytes, expert_work_bytes, host_work_bytes, is_routed,
    is_shared, kv_b_bytes, kv_blocks, loaded_scheme, require_prediction, workspace_shapes,
};
use crate::spec::{AttentionSpec, DecoderSpec, layer_of};
use crate::{ExpertLayers, LoadOptions, ModelError, families};

/// Allowance for code, stacks, the allocator and what a request needs.
const PROGRAM_BYTES: u64 = 8 << 20;

/// A tokenizer in memory takes about so many times the bytes of its file.
const TOKENIZER_FACTOR: u64 = 12;

/// Tells what a checkpoint's model will take on a device, and on the host if experts are left to it.
#[derive(Clone)]
pub struct Planner<'a> {
    device: &'a dyn MemoryUse,
    /// What computes the experts of [`DecoderSpec::host_layers`].
    host: Option<&'a dyn MemoryUse>,
    checkpoint: &'a Checkpoint,
    architecture: String,
    spec: DecoderSpec,
    kv_layout: KvLayout,
    /// [`MemoryPlan::program`], once something is planned.
    program: OnceLock<u64>,
}

/// The sizes of a model, as config.json gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelShape {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Experts, in models that have any.
    pub experts: Option<ExpertShape>,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, as they are cached: one in latent attention.
    pub kv_heads: usize,
    /// Width of a key head, as it is cached.
    pub head_dim: usize,
    /// In latent attention, the width of the latent vector that keys and values are made of: the first values of a cached key.
    pub kv_rank: Option<usize>,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// The longest context, in tokens.
    pub context: usize,
    /// The output head is the embedding.
    pub tied: bool,
}

/// The sizes of a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertShape {
    /// Decoder layers that have them.
    pub layers: usize,
    /// Routed experts of a layer.
    pub routed: usize,
    /// Routed experts that a token goes to.
    pub top_k: usize,
    /// Width inside a routed expert.
    pub width: usize,
    /// Width inside all shared experts together; 0 if there are none.
    pub shared_width: usize,
}

/// Memory, in bytes, of a model loaded with certain [`LoadOptions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Longest sequence, in tokens.
    pub context: usize,
    /// The longest that the model allows.
    pub model_context: usize,
    /// Weights as the device holds them.
    pub weights: u64,
    /// All KV blocks.
    pub kv_cache: u64,
    /// Buffers of a step and the device's scratch memory.
    pub activations: u64,
    /// Logits of a step.
    pub logits: u64,
    /// Allowance for the rest of the program, the tokenizer above all.
    pub program: u64,
    /// Tokens of a KV block.
    pub block_tokens: usize,
    /// One KV block of all layers.
    pub block_bytes: u64,
    /// KV blocks that the device can have at most, however much memory there is.
    pub most_blocks: u64,
    /// What experts take of the host's memory, if they are left to it.
    pub host: Option<HostPlan>,
    /// The device's memory is the host's.
    pub shares_memory: bool,
}

/// Packed matrices of a scheme that are loaded as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conversion {
    /// How they are stored.
    pub from: Scheme,
    /// What they become.
    pub to: Scheme,
    /// How many they are.
    pub matrices: usize,
}

/// `3 matrices of int4 g24 are converted to f32 …`.
impl fmt::Display for Conversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, matrices } = self;
        let (plural, are) = if *matrices == 1 { ("x", "is") } else { ("ces", "are") };
        write!(f, "{matrices} matri{plural} in {from} {are} converted to {to}: there is no kernel for them as they are")
    }
}

/// Memory of the host, in bytes, for experts that are left to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPlan {
    /// Their weights as the host holds them.
    pub weights: u64,
    /// Buffers of a step and scratch memory.
    pub activations: u64,
}

impl HostPlan {
    /// Everything.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.activations)
    }
}

impl MemoryPlan {
    /// Everything on the device; where its memory is the host's, with the experts that are left to the host.
    pub fn total(&self) -> u64 {
        self.without_kv().saturating_add(self.kv_cache)
    }

    /// The longest context of which `sequences` at once fit into `memory` bytes; at most the model's own. `None` if there is none.
    pub fn longest_context(&self, memory: u64, sequences: usize) -> Option<usize> {
        let blocks = self.usable_blocks(memory)? / sequences.max(1) as u64;
        let tokens = blocks.saturating_mul(self.block_tokens as u64).min(self.model_context as u64);
        (tokens > 0).then_some(tokens as usize)
    }

    /// How many sequences of the planned context fit into `memory` bytes at once. `None` if not one does.
    pub fn most_sequences(&self, memory: u64) -> Option<u64> {
        let blocks = self.context.div_ceil(self.block_tokens).max(1) as u64;
        Some(self.usable_blocks(memory)? / blocks).filter(|&sequences| sequences > 0)
    }

    /// What the experts that are left to the host take of memory that is not the device's.
    pub fn host_total(&self) -> u64 {
        self.host.filter(|_| !self.shares_memory).map_or(0, |host| host.total())
    }

    fn without_kv(&self) -> u64 {
        let of_host = self.host.filter(|_| self.shares_memory).map_or(0, |host| host.total());
        let parts = [self.activations, self.logits, self.program, of_host];
        parts.iter().fold(self.weights, |sum, &bytes| sum.saturating_add(bytes))
    }

    /// Blocks that `memory` has room for and the device can have, less the one to spare.
    fn usable_blocks(&self, memory: u64) -> Option<u64> {
        let room = memory.checked_sub(self.without_kv())?;
        room.checked_div(self.block_bytes)?.min(self.most_blocks).checked_sub(1)
    }
}

/// `9.10 GiB: weights 8.00 GiB, KV cache of 4096 tokens …`.
impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: weights {}, KV cache of {} tokens {}, activations {}, logits {}, program {}",
            format_size(self.total()),
            format_size(self.weights),
            self.context,
            format_size(self.kv_cache),
            format_size(self.activations),
            format_size(self.logits),
            format_size(self.program)
        )?;
        match self.host {
            None => Ok(()),
            Some(host) if self.shares_memory => write!(f, ", experts on the host {}", format_size(host.total())),
            Some(host) => write!(f, "; and {} of the host's memory for experts", format_size(host.total())),
        }
    }
}

/// Bytes for people: `9.10 GiB`, `812.0 MiB`.
pub fn format_size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes >= (1u64 << 30) as f64 => format!("{:.2} GiB", bytes / (1u64 << 30) as f64),
        _ if bytes >= (1u64 << 20) as f64 => format!("{:.1} MiB", bytes / (1u64 << 20) as f64),
        _ => format!("{:.1} KiB", bytes / 1024.0),
    }
}

impl<'a> Planner<'a> {
    /// Reads config.json.
    ///
    /// # Errors
    /// The architecture or a setting of it is not supported.
    pub fn new(device: &'a dyn MemoryUse, checkpoint: &'a Checkpoint) -> Result<Self, ModelError> {
        let (architecture, spec) = families::spec(checkpoint)?;
        let kv_layout = spec.kv_layout();
        Ok(Self { device, host: None, checkpoint, architecture, spec, kv_layout, program: OnceLock::new() })
    }

    /// The same for a model whose experts of some layers are left to the host, as by [`crate::load_model_offloaded`].
    ///
    /// # Errors
    /// The model has no such layers, or no experts there.
    pub fn with_offload(mut self, host: &'a dyn MemoryUse, layers: &ExpertLayers) -> Result<Self, ModelError> {
        self.spec.host_layers = layers.resolve(&self.spec, self.checkpoint.name())?;
        self.host = Some(host);
        Ok(self)
    }

    /// Layers whose experts are left to the host; `None` if there are none.
    pub fn host_layers(&self) -> Option<ExpertLayers> {
        self.host.map(|_| ExpertLayers::of(&self.spec.host_layers))
    }

    /// Indices of the layers with experts, in ascending order.
    pub fn expert_layers(&self) -> Vec<usize> {
        self.spec.expert_layers().collect()
    }

    /// The allowance for the program; the tokenizer of a GGUF file has to be made for that, so it is made once.
    fn program(&self) -> Result<u64, ModelError> {
        if let Some(program) = self.program.get() {
            return Ok(*program);
        }
        let tokenizer = self.checkpoint.file("tokenizer.json")?.map_or(0, |file| file.len() as u64);
        Ok(*self.program.get_or_init(|| PROGRAM_BYTES + TOKENIZER_FACTOR * tokenizer))
    }

    /// `architectures[0]` of config.json.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The checkpoint planned for.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// The model's sizes.
    pub fn shape(&self) -> ModelShape {
        let spec = &self.spec;
        let (heads, kv_rank) = match &spec.attention {
            AttentionSpec::Grouped(attention) => (attention.heads, None),
            AttentionSpec::Latent(attention) => (attention.heads, Some(attention.rank)),
        };
        let experts = spec.experts.as_ref().map(|experts| ExpertShape {
            layers: spec.expert_layers().count(),
            routed: experts.routing.experts,
            top_k: experts.routing.top_k,
            width: experts.width,
            shared_width: experts.beside.map_or(experts.routing.shared * experts.width, |mlp| mlp.intermediate_size),
        });
        let cached = &self.kv_layout.layers[0];
        ModelShape {
            layers: spec.layers.len(),
            hidden: spec.hidden_size,
            intermediate: spec.mlp.intermediate_size,
            experts,
            heads,
            kv_heads: cached.heads,
            head_dim: cached.key_dim,
            kv_rank,
            vocabulary: spec.vocab_size,
            context: spec.max_position_embeddings,
            tied: spec.tie_word_embeddings,
        }
    }

    /// Bytes that a token takes in the KV cache.
    pub fn kv_bytes_per_token(&self, kv_type: KvType) -> usize {
        self.kv_layout.bytes_per_token(kv_type)
    }

    /// KV blocks ([`LoadOptions::kv_blocks`]) for so many sequences of `context` tokens at once.
    pub fn kv_blocks(&self, context: usize, sequences: usize) -> usize {
        kv_blocks(&self.kv_layout, context, sequences)
    }

    /// How to load the model for so many sequences of `context` tokens at once, in all else as usual.
    pub fn load_options(&self, context: usize, sequences: usize) -> LoadOptions {
        let kv_blocks = Some(self.kv_blocks(context, sequences));
        LoadOptions { context: Some(context), kv_blocks, ..LoadOptions::default() }
    }

    /// The plan of loading the checkpoint as it is stored.
    ///
    /// # Errors
    /// An option does not suit the model (as in [`load_model`](crate::load_model)), or a tensor has an impossible shape.
    pub fn plan(&self, options: &LoadOptions) -> Result<MemoryPlan, ModelError> {
        self.plan_as(options, |_, _| None)
    }

    /// The plan of loading it with other formats: `scheme` says how a matrix is stored, `None` leaves it as it is.
    ///
    /// # Errors
    /// As for [`Planner::plan`].
    pub fn plan_as(
        &self,
        options: &LoadOptions,
        scheme: impl Fn(&str, &TensorInfo) -> Option<Scheme>,
    ) -> Result<MemoryPlan, ModelError> {
        let sizes = Sizes::new(&self.spec, options, self.checkpoint.name())?;
        let buffer = |(rows, width): (usize, usize)| (rows as u64).saturating_mul(width as u64).saturating_mul(4);
        let [buffers @ .., logits] = workspace_shapes(&self.spec, options.step_tokens, sizes.logit_rows);
        let scratch = self.device.encoder_bytes(&sizes.step_limits(&self.spec, options.step_tokens)) as u64;
        let (hidden, tokens) = (self.spec.hidden_size, options.step_tokens);
        let experts = self.spec.device_experts();
        let experts = experts.map_or(0, |experts| expert_work_bytes(self.device, hidden, &experts, tokens));
        let (mut weights, host_weights) = self.weights(&scheme, |name| self.is_loaded(name))?;
        let host = self.host.zip(self.spec.host_experts()).map(|(host, experts)| HostPlan {
            weights: host_weights,
            activations: host_work_bytes(host, &self.spec, &experts, tokens),
        });
        let mut activations = buffers
            .into_iter()
            .chain(angle_shapes(&self.spec, options.step_tokens))
            .map(buffer)
            .fold(scratch.saturating_add(experts), u64::saturating_add);
        let mut logits = buffer(logits);
        let [mut kv_cache, mut block_bytes] =
            [sizes.kv_blocks, 1].map(|blocks| self.kv_layout.pool_bytes(options.kv_type, blocks) as u64);
        if options.prediction {
            // It has as many KV blocks as the model.
            let (index, spec) = require_prediction(&self.spec, self.checkpoint)?;
            let memory = PredictionMemory::new(&spec, options, &sizes);
            let [own_activations, own_logits] = memory.work_bytes(self.device, &spec);
            let (own_weights, _) = self.weights(&scheme, |name| layer_of(name) == Some(index) && !is_shared(name))?;
            let own_kv = [sizes.kv_blocks, 1].map(|blocks| memory.kv_bytes(options.kv_type, blocks));
            for (sum, own) in [&mut activations, &mut logits, &mut weights, &mut kv_cache, &mut block_bytes]
                .into_iter()
                .zip([own_activations, own_logits, own_weights, own_kv[0], own_kv[1]])
            {
                *sum = sum.saturating_add(own);
            }
        }
        Ok(MemoryPlan {
            context: sizes.context,
            model_context: self.spec.max_position_embeddings,
            weights,
            kv_cache,
            activations,
            logits,
            program: self.program()?,
            block_tokens: self.kv_layout.block_tokens,
            block_bytes,
            most_blocks: self.device.most_kv_blocks(&self.kv_layout, options.kv_type) as u64,
            host,
            shares_memory: self.device.shares_memory(),
        })
    }

    /// Refuses a KV cache that the device cannot have, however much memory there is, as loading the model would.
    ///
    /// # Errors
    /// The cache is beyond what the device can bind, or an option does not suit the model.
    pub fn check_kv_cache(&self, options: &LoadOptions) -> Result<(), ModelError> {
        let sizes = Sizes::new(&self.spec, options, self.checkpoint.name())?;
        Ok(self.device.check_kv_blocks(&self.kv_layout, options.kv_type, sizes.kv_blocks)?)
    }

    /// Bytes that the device holds of a matrix in this storage.
    ///
    /// # Errors
    /// The scheme has no such shape.
    pub fn matrix_bytes(&self, name: &str, rows: usize, cols: usize, scheme: &Scheme) -> Result<u64, ModelError> {
        let (device, _) = self.device_of(name);
        let scheme = &loaded_scheme(&self.spec, name, scheme);
        let bytes = match &self.spec.attention {
            AttentionSpec::Latent(attention) if name.ends_with(".self_attn.kv_b_proj.weight") => {
                kv_b_bytes(device, scheme, attention)
            }
            _ => device.linear_bytes(scheme, rows, cols),
        };
        bytes.map(|bytes| bytes as u64).map_err(|source| self.weight_error(name, source))
    }

    /// Packed matrices that are not loaded as they are stored, because the device has no kernel for them: how many become what.
    pub fn conversions(&self) -> Vec<Conversion> {
        let mut conversions: Vec<Conversion> = Vec::new();
        for name in self.checkpoint.tensor_names().filter(|name| self.is_loaded(name)) {
            let Some(TensorInfo { shape, storage: Storage::Packed(from), .. }) = self.checkpoint.info(name) else {
                continue;
            };
            let &[_, cols] = shape.as_slice() else { continue };
            let loaded = loaded_scheme(&self.spec, name, &from);
            let (device, _) = self.device_of(name);
            let converted = device.conversion(&loaded, cols).or((loaded != from).then_some(loaded));
            let Some(to) = converted else { continue };
            match conversions.iter_mut().find(|known| (known.from, known.to) == (from, to)) {
                Some(known) => known.matrices += 1,
                None => conversions.push(Conversion { from, to, matrices: 1 }),
            }
        }
        conversions
    }

    fn weight_error(&self, name: &str, source: KernelError) -> ModelError {
        ModelError::Weight { model: self.checkpoint.name().to_owned(), tensor: name.to_owned(), source }
    }

    /// Whether the model has a layer that predicts further tokens ([`LoadOptions::prediction`]).
    pub fn has_prediction_layer(&self) -> bool {
        require_prediction(&self.spec, self.checkpoint).is_ok()
    }

    /// Whether the model is made of this tensor: a checkpoint may hold towers and prediction layers besides. A tied model's own head
    /// counts, since only its values tell whether it is loaded.
    pub fn is_loaded(&self, name: &str) -> bool {
        match layer_of(name) {
            Some(layer) => layer < self.spec.layers.len(),
            None => {
                let is_decoder = name.starts_with("model.") && !name.starts_with("model.layers.");
                is_decoder || name.starts_with("lm_head.")
            }
        }
    }

    /// What a tensor is loaded to, and whether that is the host.
    fn device_of(&self, name: &str) -> (&'a dyn MemoryUse, bool) {
        let is_on_host =
            || is_routed(name) && layer_of(name).is_some_and(|layer| self.spec.host_layers.contains(&layer));
        match self.host {
            Some(host) if is_on_host() => (host, true),
            _ => (self.device, false),
        }
    }

    /// Bytes on the device and on the host of the tensors of which `is_counted` is true.
    fn weights(
        &self,
        scheme: impl Fn(&str, &TensorInfo) -> Option<Scheme>,
        is_counted: impl Fn(&str) -> bool,
    ) -> Result<(u64, u64), ModelError> {
        // The host has a copy of the norm before its experts.
        let norms = (self.spec.host_layers.len() * self.spec.hidden_size * size_of::<f32>()) as u64;
        let (mut of_device, mut of_host) = (0u64, norms);
        for name in self.checkpoint.tensor_names().filter(|name| is_counted(name)) {
            let Some(info) = self.checkpoint.info(name) else { continue };
            let (device, is_host) = self.device_of(name);
            let of_experts = expert_bytes(device, &self.spec, name, &info);
            let bytes = match (of_experts, info.shape.as_slice(), scheme(name, &info).or(info.scheme())) {
                (Some(bytes), ..) => bytes.map_err(|source| self.weight_error(name, source))? as u64,
                (_, _, Some(scheme)) if name.ends_with(".eh_proj.weight") => {
                    let bytes = eh_proj_bytes(device, &info, &scheme);
                    bytes.map_err(|source| self.weight_error(name, source))? as u64
                }
                (_, &[rows, cols], Some(scheme)) => self.matrix_bytes(name, rows, cols, &scheme)?,
                // Vectors become f32.
                (_, &[len], _) => (len as u64).saturating_mul(4),
                _ => info.bytes,
            };
            let sum = if is_host { &mut of_host } else { &mut of_device };
            *sum = sum.saturating_add(bytes);
        }
        Ok((of_device, of_host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(format_size(9 << 29), "4.50 GiB");
        assert_eq!(format_size(1 << 20), "1.0 MiB");
        assert_eq!(format_size(512), "0.5 KiB");
    }
}
