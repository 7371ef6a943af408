//! From a checkpoint to a decoder: every weight once, every buffer once.

use marlin_checkpoint::Checkpoint;
use marlin_kernels::{Backend, KvLayout, LinearPart, StepLimits};

use super::{Attention, Decoder, HeadNorms, Layer, Mlp, Workspace};
use crate::families;
use crate::spec::{AttentionSpec, DecoderSpec, MlpSpec};
use crate::{KvPool, LanguageModel, LoadOptions, ModelError, ModelInfo};

const EMBED_TOKENS: &str = "model.embed_tokens";
const LM_HEAD: &str = "lm_head";

/// Loads a checkpoint's model onto a device.
///
/// Fails if the architecture or a setting of config.json is not supported, if a tensor is missing or has another shape than
/// config.json says, if an option does not suit the model, or if the device lacks the memory.
pub fn load_model<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
) -> Result<Box<dyn LanguageModel>, ModelError> {
    let (architecture, spec) = families::spec(checkpoint)?;
    let sizes = Sizes::new(&spec, options, checkpoint.name())?;

    // Weights come first: once they are there, the sizes that config.json claims are known to be real.
    let loader = Loader { backend, checkpoint };
    let embed_tokens = loader.linear(&[(EMBED_TOKENS, spec.vocab_size)], spec.hidden_size, false)?;
    let layers = (0..spec.windows.len()).map(|index| loader.layer(&spec, index)).collect::<Result<_, _>>()?;
    let norm = loader.norm("model.norm", spec.hidden_size)?;
    let lm_head = loader.lm_head(&spec)?;

    let limits = sizes.step_limits(&spec, options.step_tokens);
    let kv_layout = spec.kv_layout();
    Ok(Box::new(Decoder::<B> {
        rms_norm_eps: spec.rms_norm_eps,
        inv_freq: backend.load_vector(&spec.rope.inv_freq)?,
        rope_scaling: spec.rope.scaling,
        embed_tokens,
        layers,
        norm,
        lm_head,
        kv_cache: backend.kv_cache(&kv_layout, options.kv_type, sizes.kv_blocks)?,
        pool: KvPool::new(kv_layout.clone(), sizes.kv_blocks),
        encoder: backend.encoder(&limits)?,
        workspace: workspace(backend, &spec, options.step_tokens, sizes.logit_rows)?,
        logit_rows: 0,
        info: ModelInfo {
            architecture,
            vocabulary: spec.vocab_size,
            context: sizes.context,
            step_tokens: options.step_tokens,
            logit_rows: sizes.logit_rows,
            layers: spec.windows.len(),
            kv_layout,
            kv_type: options.kv_type,
            weight_bytes: checkpoint.weight_bytes(),
            device: backend.info(),
        },
        limits,
    }))
}

/// Load options, checked against the model and filled in.
pub(crate) struct Sizes {
    pub(crate) context: usize,
    pub(crate) kv_blocks: usize,
    pub(crate) logit_rows: usize,
}

impl Sizes {
    pub(crate) fn new(spec: &DecoderSpec, options: &LoadOptions, model: &str) -> Result<Self, ModelError> {
        let within = |option, found: usize, most: usize| match found {
            found if (1..=most).contains(&found) => Ok(found),
            _ => {
                Err(ModelError::Option { model: model.to_owned(), option, found, wanted: format!("from 1 to {most}") })
            }
        };
        let longest = spec.max_position_embeddings;
        let context = within("context", options.context.unwrap_or(longest), longest)?;
        let step_tokens = within("step_tokens", options.step_tokens, u32::MAX as usize)?;
        let logit_rows = within("logit_rows", options.logit_rows, usize::MAX)?.min(step_tokens);
        let enough = kv_blocks(&spec.kv_layout(), context, 1);
        let kv_blocks = within("kv_blocks", options.kv_blocks.unwrap_or(enough), u32::MAX as usize)?;
        Ok(Self { context, kv_blocks, logit_rows })
    }

    /// The largest step of such a model.
    pub(crate) fn step_limits(&self, spec: &DecoderSpec, step_tokens: usize) -> StepLimits {
        StepLimits {
            tokens: step_tokens,
            context: self.context,
            width: spec.widest_input(),
            heads: spec.attention.heads,
            vocabulary: spec.vocab_size,
        }
    }
}

/// KV blocks for so many sequences of `context` tokens, and one to spare.
pub(crate) fn kv_blocks(layout: &KvLayout, context: usize, sequences: usize) -> usize {
    context.div_ceil(layout.block_tokens).saturating_mul(sequences).saturating_add(1)
}

/// Rows and width of each buffer of a [`Workspace`], in the order of its fields; the last is that of the logits.
pub(crate) fn workspace_shapes(spec: &DecoderSpec, step_tokens: usize, logit_rows: usize) -> [(usize, usize); 9] {
    let (hidden, attention) = (spec.hidden_size, &spec.attention);
    [
        (step_tokens, hidden),
        (step_tokens, hidden),
        (step_tokens, 2 * spec.rope.inv_freq.len()),
        (step_tokens, attention.q_width() + 2 * attention.kv_width()),
        (step_tokens, attention.q_width()),
        (step_tokens, spec.mlp.intermediate_size),
        (logit_rows, hidden),
        (logit_rows, hidden),
        (logit_rows, spec.vocab_size),
    ]
}

fn workspace<B: Backend>(
    backend: &B,
    spec: &DecoderSpec,
    step_tokens: usize,
    logit_rows: usize,
) -> Result<Workspace<B>, ModelError> {
    let shapes = workspace_shapes(spec, step_tokens, logit_rows);
    let [hidden, normed, angles, qkv, attention, gated, last_hidden, last_normed, logits] =
        shapes.map(|(rows, width)| backend.buffer(rows, width));
    Ok(Workspace {
        hidden: hidden?,
        normed: normed?,
        angles: angles?,
        qkv: qkv?,
        attention: attention?,
        gated: gated?,
        last_hidden: last_hidden?,
        last_normed: last_normed?,
        logits: logits?,
    })
}

/// Brings tensors from a checkpoint to a device.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
}

impl<B: Backend> Loader<'_, B> {
    fn layer(&self, spec: &DecoderSpec, index: usize) -> Result<Layer<B>, ModelError> {
        let name = |block: &str| format!("model.layers.{index}.{block}");
        let norm = |block: &str| self.norm(&name(block), spec.hidden_size);
        Ok(Layer {
            input_layernorm: norm("input_layernorm")?,
            self_attn: self.attention(&name("self_attn"), &spec.attention, spec.windows[index], spec.hidden_size)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: self.mlp(&name("mlp"), &spec.mlp, spec.hidden_size)?,
        })
    }

    fn attention(
        &self,
        block: &str,
        spec: &AttentionSpec,
        window: Option<usize>,
        hidden: usize,
    ) -> Result<Attention<B>, ModelError> {
        let [q, k, v, o] = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| format!("{block}.{name}"));
        let norm = |name: &str| self.norm(&format!("{block}.{name}"), spec.head_dim);
        let head_norms = || Ok::<_, ModelError>(HeadNorms { q_norm: norm("q_norm")?, k_norm: norm("k_norm")? });
        let qkv = [(q.as_str(), spec.q_width()), (&k, spec.kv_width()), (&v, spec.kv_width())];
        Ok(Attention {
            shape: spec.shape(window),
            qkv_proj: self.linear(&qkv, hidden, spec.bias)?,
            qk_norm: spec.qk_norm.then(head_norms).transpose()?,
            o_proj: self.linear(&[(&o, hidden)], spec.q_width(), spec.bias)?,
        })
    }

    fn mlp(&self, block: &str, spec: &MlpSpec, hidden: usize) -> Result<Mlp<B>, ModelError> {
        let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"].map(|name| format!("{block}.{name}"));
        let width = spec.intermediate_size;
        Ok(Mlp {
            gate_up_proj: self.linear(&[(&gate, width), (&up, width)], hidden, spec.bias)?,
            activation: spec.activation,
            down_proj: self.linear(&[(&down, hidden)], width, spec.bias)?,
        })
    }

    /// The head's own matrix. A tied model has none; if its checkpoint holds one nevertheless, it is used where it differs from
    /// the embedding, as `transformers` does.
    fn lm_head(&self, spec: &DecoderSpec) -> Result<Option<B::Linear>, ModelError> {
        let (rows, cols) = (spec.vocab_size, spec.hidden_size);
        if spec.tie_word_embeddings {
            let is_separate = self.checkpoint.contains(&weight(LM_HEAD))
                && self.checkpoint.matrix(&weight(LM_HEAD), rows, cols)?
                    != self.checkpoint.matrix(&weight(EMBED_TOKENS), rows, cols)?;
            if !is_separate {
                return Ok(None);
            }
        }
        self.linear(&[(LM_HEAD, rows)], cols, false).map(Some)
    }

    /// One linear of the modules `(name, rows)` of `cols` columns each; all of them have a bias or none has.
    fn linear(&self, modules: &[(&str, usize)], cols: usize, bias: bool) -> Result<B::Linear, ModelError> {
        let part = |&(module, rows): &(&str, usize)| {
            let bias = bias.then(|| self.checkpoint.vector(&format!("{module}.bias"), rows)).transpose()?;
            Ok(LinearPart { weight: self.checkpoint.matrix(&weight(module), rows, cols)?, bias })
        };
        let parts = modules.iter().map(part).collect::<Result<Vec<_>, ModelError>>()?;
        self.backend.load_linear(&parts).map_err(|source| ModelError::Weight {
            model: self.checkpoint.name().to_owned(),
            tensor: weight(modules[0].0),
            source,
        })
    }

    fn norm(&self, module: &str, len: usize) -> Result<B::Vector, ModelError> {
        Ok(self.backend.load_vector(&self.checkpoint.vector(&weight(module), len)?)?)
    }
}

fn weight(module: &str) -> String {
    format!("{module}.weight")
}
