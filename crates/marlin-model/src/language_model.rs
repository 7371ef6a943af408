//! A loaded model, whatever its family and device.

use marlin_kernels::{DeviceInfo, KvLayout, KvType, RouterLoad, SampleRow, SamplingId};

use crate::{ExpertLayers, KvPool, ModelError, PredictionLayer, StepBatch};

/// A decoder ready to run: what an engine, an evaluation or a quantiser needs of it.
///
/// One call of [`LanguageModel::forward`] serves prefill, chunked prefill, decode, verification and perplexity. The caller owns its
/// sequences ([`crate::KvSequence`]) and grows, truncates and forks them through [`LanguageModel::kv`].
pub trait LanguageModel: Send {
    /// Sizes and names.
    fn info(&self) -> &ModelInfo;

    /// The blocks of the KV cache.
    fn kv(&mut self) -> &mut KvPool;

    /// Starts a step, which leaves logits of its logit rows on the device. Pending block copies of the pool run first.
    /// A batch that does not fit [`ModelInfo`] is refused before anything runs. One of no tokens does nothing.
    ///
    /// A device that works by itself may still be at it when this returns: what reads waits for it, and what starts queues behind it.
    fn forward(&mut self, batch: &StepBatch) -> Result<(), ModelError>;

    /// Reads the logits of the last step, `[L, vocabulary]` row-major, into `out` (resized to fit).
    fn read_logits(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError>;

    /// Reads what the model makes of each token of the last step, `[T, hidden]` row-major, into `out` (resized to fit): hidden states
    /// after the last norm, of which the head makes logits. They are there until the next step starts.
    fn read_hidden(&mut self, out: &mut Vec<f32>) -> Result<(), ModelError>;

    /// Waits for the steps that were started.
    fn wait(&mut self) -> Result<(), ModelError>;

    /// Starts the choice of a token for each logit row of the last step; consumes its logits, so that there are none to read
    /// afterwards. The next step may take the tokens before they are read, see [`marlin_kernels::Step::SAMPLED`].
    fn sample(&mut self, rows: &[SampleRow<'_>]) -> Result<SamplingId, ModelError>;

    /// Waits for one of the last two samplings and reads its tokens, one for each of its rows.
    fn sampled(&mut self, sampling: SamplingId, tokens: &mut [u32]) -> Result<(), ModelError>;

    /// Reads KV blocks of all layers into `out`, one after the other, each of [`ModelInfo::kv_block_bytes`]; how such bytes are laid out is the
    /// same on all devices (see [`marlin_kernels::Encoder::read_kv_blocks`]). Waits for the steps that were started, and so sees what they wrote.
    ///
    /// # Errors
    /// The device failed, or cannot take its blocks apart.
    fn read_kv_blocks(&mut self, blocks: &[u32], out: &mut [u8]) -> Result<(), ModelError>;

    /// Writes KV blocks of all layers, of the bytes that [`LanguageModel::read_kv_blocks`] gave: after the steps that were started, and before
    /// the next.
    ///
    /// # Errors
    /// The device failed, or cannot take its blocks apart.
    fn write_kv_blocks(&mut self, blocks: &[u32], bytes: &[u8]) -> Result<(), ModelError>;

    /// Where tokens went in each layer with experts since the model was loaded with [`LoadOptions::measure_routing`]; empty otherwise.
    fn routing(&self) -> &[LayerRouting] {
        &[]
    }

    /// Hands out the layer that predicts further tokens, if the model was loaded with [`LoadOptions::prediction`] and nobody has taken it.
    fn take_prediction_layer(&mut self) -> Option<Box<dyn PredictionLayer>> {
        None
    }
}

/// The load of a layer's experts.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRouting {
    /// Index of the layer.
    pub layer: usize,
    /// What its router did.
    pub load: RouterLoad,
}

/// Sizes and names of a loaded model.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// `architectures[0]` of config.json, for example `Qwen3ForCausalLM`.
    pub architecture: String,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Width of hidden states.
    pub hidden_size: usize,
    /// Longest sequence this instance was loaded for (at most the model's own context).
    pub context: usize,
    /// Most tokens of a step.
    pub step_tokens: usize,
    /// Most rows of logits of a step.
    pub logit_rows: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Layout of the KV cache.
    pub kv_layout: KvLayout,
    /// Number format of the KV cache.
    pub kv_type: KvType,
    /// Bytes of all weights as stored in the checkpoint (scales and zero points counted).
    pub weight_bytes: u64,
    /// The device it runs on.
    pub device: DeviceInfo,
    /// The experts that the host computes beside that device, if there are any.
    pub host_experts: Option<HostExpertsInfo>,
    /// The device works while the host goes on, so that it pays to start a step before the tokens of the last one are read.
    pub overlaps: bool,
}

impl ModelInfo {
    /// Bytes of a block of the KV cache over all layers.
    pub fn kv_block_bytes(&self) -> usize {
        self.kv_layout.pool_bytes(self.kv_type, 1)
    }
}

/// Routed experts that the host computes.
#[derive(Debug, Clone)]
pub struct HostExpertsInfo {
    /// Their layers.
    pub layers: ExpertLayers,
    /// What computes them.
    pub device: DeviceInfo,
}

/// How much room to make when a model is loaded.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Longest sequence; `None` is the model's own context.
    pub context: Option<usize>,
    /// Most tokens of a step (a longer prompt is prefilled in chunks).
    pub step_tokens: usize,
    /// Most rows of logits of a step, at most `step_tokens`: each takes 4 bytes · vocabulary on the device.
    pub logit_rows: usize,
    /// KV blocks of the pool; `None` makes enough for one sequence of `context` tokens and one block to spare.
    pub kv_blocks: Option<usize>,
    /// Number format of the KV cache.
    pub kv_type: KvType,
    /// Read where tokens go after each layer with experts ([`LanguageModel::routing`]), for which a device that works by itself waits.
    pub measure_routing: bool,
    /// Load the layer that predicts further tokens as well ([`LanguageModel::take_prediction_layer`]), with a KV cache for as many tokens.
    pub prediction: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            context: None,
            step_tokens: 512,
            logit_rows: 64,
            kv_blocks: None,
            kv_type: KvType::F16,
            measure_routing: false,
            prediction: false,
        }
    }
}
