//! From a checkpoint to a decoder: every weight once, every buffer once.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use marlin_checkpoint::Checkpoint;
use marlin_format::PackedMatrix;
use marlin_kernels::cpu::CpuBackend;
use marlin_kernels::{Backend, HostRoutes, KernelError, KvLayout, LinearPart, PartHeader, RouterLoad, StepLimits};

use super::experts::loaded_scheme;
use super::prediction::load_prediction;
use super::{Attention, Decoder, FeedForward, HostWork, Layer, Rope, SharedInput, Workspace};
use crate::families;
use crate::spec::{AttentionSpec, DecoderSpec, LayerSpec};
use crate::{
    ExpertLayers, ExpertOffload, HostExpertsInfo, KvPool, LanguageModel, LayerRouting, LoadOptions, ModelError,
    ModelInfo,
};

pub(super) const EMBED_TOKENS: &str = "model.embed_tokens";
const LAST_NORM: &str = "model.norm";
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
    load_model_offloaded(backend, None, checkpoint, options)
}

/// Loads a checkpoint's model as [`load_model`] does, but for experts that are left to the host: its steps compute them there.
///
/// # Errors
/// As for [`load_model`], and if the model has no such layers or no experts there.
pub fn load_model_offloaded<B: Backend>(
    backend: &B,
    offload: Option<&ExpertOffload>,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
) -> Result<Box<dyn LanguageModel>, ModelError> {
    Ok(Box::new(load_decoder(backend, offload, checkpoint, options)?))
}

pub(super) fn load_decoder<B: Backend>(
    backend: &B,
    offload: Option<&ExpertOffload>,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
) -> Result<Decoder<B>, ModelError> {
    let (architecture, mut spec) = families::spec(checkpoint)?;
    if let Some(offload) = offload {
        spec.host_layers = offload.layers.resolve(&spec, checkpoint.name())?;
    }
    let sizes = Sizes::new(&spec, options, checkpoint.name())?;
    let kv_layout = spec.kv_layout();
    backend.check_kv_blocks(&kv_layout, options.kv_type, sizes.kv_blocks)?;

    // Weights come first: once they are there, the sizes that config.json claims are known to be real.
    let read = RefCell::default();
    let loader = Loader { backend, checkpoint, spec: &spec, read: &read, inputs: None };
    let host =
        offload.map(|offload| Loader { backend: &offload.host, checkpoint, spec: &spec, read: &read, inputs: None });
    let embed_tokens = Arc::new(loader.embedding()?);
    let host_of = |index| host.as_ref().filter(|_| spec.host_layers.contains(&index));
    let layer = |(index, layer)| loader.layer(index, layer, host_of(index));
    let layers = spec.layers.iter().enumerate().map(layer).collect::<Result<_, _>>()?;
    let (norm, lm_head) = loader.end()?;
    let lm_head = lm_head.map(Arc::new);
    let host_norm = loader.norm_weights(LAST_NORM, spec.hidden_size)?;
    let prediction = if options.prediction {
        let shared = [&embed_tokens, lm_head.as_ref().unwrap_or(&embed_tokens)].map(Arc::clone);
        Some(load_prediction(&loader, options, &sizes, shared)?)
    } else {
        None
    };
    loader.refuse_unread()?;
    checkpoint.release_all();

    let host_work = offload
        .zip(spec.host_experts())
        .map(|(offload, experts)| HostWork::new(&offload.host, &spec, &experts, options.step_tokens));
    let limits = sizes.step_limits(&spec, options.step_tokens);
    Ok(Decoder {
        rms_norm_eps: spec.rms_norm_eps,
        embedding_scale: spec.embedding_scale,
        rotation: spec.rotation,
        logit_cap: spec.logit_cap,
        ropes: load_ropes(backend, &spec)?,
        embed_tokens,
        layers,
        norm,
        host_norm,
        lm_head,
        prediction,
        kv_cache: backend.kv_cache(&kv_layout, options.kv_type, sizes.kv_blocks)?,
        pool: KvPool::new(kv_layout.clone(), sizes.kv_blocks),
        encoder: backend.encoder(&limits)?,
        workspace: Workspace::new(backend, &spec, options.step_tokens, sizes.logit_rows)?,
        host: host_work.transpose()?,
        step_tokens: 0,
        logit_rows: 0,
        sampled_rows: 0,
        routing: if options.measure_routing { unmeasured(&spec) } else { Vec::new() },
        routes: HostRoutes::default(),
        info: ModelInfo {
            architecture,
            vocabulary: spec.vocab_size,
            hidden_size: spec.hidden_size,
            context: sizes.context,
            step_tokens: options.step_tokens,
            logit_rows: sizes.logit_rows,
            layers: spec.layers.len(),
            kv_layout,
            kv_type: options.kv_type,
            weight_bytes: checkpoint.weight_bytes(),
            device: backend.info(),
            host_experts: offload.map(|offload| HostExpertsInfo {
                layers: ExpertLayers::of(&spec.host_layers),
                device: offload.host.info(),
            }),
            // A step with experts on the host is all but over when it has started.
            overlaps: B::OVERLAPS && offload.is_none(),
        },
        limits,
    })
}

pub(super) fn load_ropes<B: Backend>(backend: &B, spec: &DecoderSpec) -> Result<Vec<Rope<B>>, ModelError> {
    let rope =
        |rope: &crate::rope::Rope| Ok(Rope { inv_freq: backend.load_vector(&rope.inv_freq)?, scaling: rope.scaling });
    spec.ropes.iter().map(rope).collect()
}

/// The layers with experts, before the first token.
fn unmeasured(spec: &DecoderSpec) -> Vec<LayerRouting> {
    let Some(experts) = &spec.experts else { return Vec::new() };
    let load = || RouterLoad::new(&experts.routing);
    spec.expert_layers().map(|layer| LayerRouting { layer, load: load() }).collect()
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
            vocabulary: spec.vocab_size,
            logit_rows: self.logit_rows,
        }
    }
}

/// KV blocks for so many sequences of `context` tokens, and one to spare.
pub(crate) fn kv_blocks(layout: &KvLayout, context: usize, sequences: usize) -> usize {
    context.div_ceil(layout.block_tokens).saturating_mul(sequences).saturating_add(1)
}

/// Brings tensors from a checkpoint to a device. What blocks are made of stands beside them.
pub(super) struct Loader<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) spec: &'a DecoderSpec,
    /// Names of the tensors that were asked for.
    pub(super) read: &'a RefCell<HashSet<String>>,
    /// Where it is noted which matrices share their input, if someone wants to know.
    pub(super) inputs: Option<&'a RefCell<Vec<SharedInput>>>,
}

impl<B: Backend> Loader<'_, B> {
    /// The layer that has this index in the checkpoint, its experts on the host if there is one.
    pub(super) fn layer(
        &self,
        index: usize,
        layer: &LayerSpec,
        host: Option<&Loader<'_, CpuBackend>>,
    ) -> Result<Layer<B>, ModelError> {
        let (spec, block) = (self.spec, format!("model.layers.{index}"));
        let (self_attn, mlp) = (format!("{block}.self_attn"), format!("{block}.mlp"));
        let norm = |name: &str| self.norm(&format!("{block}.{name}"), spec.hidden_size);
        let [attn_out_norm, mlp_out_norm] = match spec.norms.outputs {
            None => [None, None],
            Some([attention, mlp]) => [Some(norm(attention)?), Some(norm(mlp)?)],
        };
        Ok(Layer {
            attn_norm: norm("input_layernorm")?,
            self_attn: match &spec.attention {
                AttentionSpec::Grouped(spec) => {
                    Attention::Grouped(self.grouped_attention(&self_attn, spec, layer, attn_out_norm)?)
                }
                AttentionSpec::Latent(spec) => {
                    Attention::Latent(self.latent_attention(&self_attn, spec, layer, attn_out_norm)?)
                }
            },
            mlp_norm: norm(spec.norms.mlp)?,
            feed_forward: match (&spec.experts, host) {
                (Some(experts), Some(host)) => {
                    let norm = format!("{block}.{}", spec.norms.mlp);
                    FeedForward::HostExperts(Box::new(self.host_experts(host, &block, &norm, experts)?))
                }
                (Some(experts), None) if layer.has_experts => FeedForward::Experts(self.experts(&block, experts)?),
                _ => FeedForward::Mlp(self.mlp(&mlp, &spec.mlp, mlp_out_norm)?),
            },
        })
    }

    pub(super) fn embedding(&self) -> Result<B::Linear, ModelError> {
        self.table(EMBED_TOKENS, self.spec.vocab_size, self.spec.hidden_size)
    }

    /// What follows the layers: a norm and a head, unless that is the embedding.
    pub(super) fn end(&self) -> Result<(B::Vector, Option<B::Linear>), ModelError> {
        Ok((self.norm(LAST_NORM, self.spec.hidden_size)?, self.lm_head()?))
    }

    /// The head's own matrix. A tied model has none; if its checkpoint holds one nevertheless, it is used where it differs from
    /// the embedding, as `transformers` does.
    fn lm_head(&self) -> Result<Option<B::Linear>, ModelError> {
        let (rows, cols) = (self.spec.vocab_size, self.spec.hidden_size);
        if self.spec.tie_word_embeddings {
            let is_separate = self.checkpoint.contains(&weight(LM_HEAD))
                && self.matrix(&weight(LM_HEAD), rows, cols)? != self.matrix(&weight(EMBED_TOKENS), rows, cols)?;
            [LM_HEAD, EMBED_TOKENS].iter().for_each(|module| self.checkpoint.release(&weight(module)));
            if !is_separate {
                return Ok(None);
            }
        }
        self.table(LM_HEAD, rows, cols).map(Some)
    }

    /// Embedding or head: a matrix by itself, without a bias.
    fn table(&self, module: &str, rows: usize, cols: usize) -> Result<B::Linear, ModelError> {
        self.load(&[Module { name: module.to_owned(), rows, bias: None }], cols, 1)
    }

    /// One linear of a block's modules `(name, rows)` of `cols` columns each; all of them have a bias or none has.
    pub(super) fn linear(
        &self,
        block: &str,
        modules: &[(&str, usize)],
        cols: usize,
        bias: bool,
    ) -> Result<B::Linear, ModelError> {
        let module = |&(name, rows): &(&str, usize)| self.module(format!("{block}.{name}"), rows, bias);
        self.load(&modules.iter().map(module).collect::<Result<Vec<_>, _>>()?, cols, 1)
    }

    /// One linear of the two halves of a module, `rows` rows each.
    pub(super) fn halves(&self, module: &str, rows: usize, cols: usize, bias: bool) -> Result<B::Linear, ModelError> {
        self.load(&[self.module(module.to_owned(), 2 * rows, bias)?], cols, 2)
    }

    fn module(&self, name: String, rows: usize, bias: bool) -> Result<Module, ModelError> {
        let bias = bias.then(|| self.vector(&format!("{name}.bias"), rows)).transpose()?;
        Ok(Module { name, rows, bias })
    }

    /// A linear of these modules, each of them `cut` parts of equal rows: the device's own, if it kept one, or else from the weights.
    pub(super) fn load(&self, modules: &[Module], cols: usize, cut: usize) -> Result<B::Linear, ModelError> {
        let first = &modules[0].name;
        self.note_input(first, || modules.iter().map(|module| weight(&module.name)).collect());
        let headers: Option<Vec<Vec<PartHeader>>> =
            modules.iter().map(|module| self.headers(module, cols, cut)).collect();
        if let Some(headers) = headers
            && let Some(linear) = self.backend.find_linear(first, &headers.concat())
        {
            modules.iter().for_each(|module| self.mark_read(&weight(&module.name)));
            return Ok(linear);
        }
        let read = |module: &Module| {
            let name = weight(&module.name);
            let matrix = self.matrix(&name, module.rows, cols)?;
            if loaded_scheme(self.spec, &name, &matrix.scheme) == matrix.scheme {
                return Ok(matrix);
            }
            matrix.to_f32().map_err(|source| self.weight_error(&name, source.into()))
        };
        let matrices = modules.iter().map(read).collect::<Result<Vec<_>, ModelError>>()?;
        let mut parts = Vec::with_capacity(cut * modules.len());
        for (module, matrix) in modules.iter().zip(&matrices) {
            for rows in module.parts(cut) {
                let bias = module.bias.as_ref().map(|bias| bias[rows.clone()].to_vec());
                let sliced = if cut == 1 { Ok(matrix.borrowed()) } else { matrix.slice_rows(rows) };
                let weight = sliced.map_err(|source| self.weight_error(&weight(&module.name), source.into()))?;
                parts.push(LinearPart { weight, bias });
            }
        }
        let linear = self.backend.load_named_linear(first, &parts);
        modules.iter().for_each(|module| self.checkpoint.release(&weight(&module.name)));
        linear.map_err(|source| self.weight_error(&weight(first), source))
    }

    /// A module's parts without its weights; `None` if the checkpoint has no such matrix, which reading it then says.
    fn headers(&self, module: &Module, cols: usize, cut: usize) -> Option<Vec<PartHeader>> {
        let info = self.checkpoint.info(&weight(&module.name)).filter(|info| info.shape == [module.rows, cols])?;
        let scheme = loaded_scheme(self.spec, &weight(&module.name), &info.scheme()?);
        let header = |rows: Range<usize>| {
            let bias = module.bias.as_ref().map(|bias| bias[rows.clone()].to_vec());
            PartHeader { scheme, rows: rows.len(), cols, bias }
        };
        Some(module.parts(cut).map(header).collect())
    }

    pub(super) fn weight_error(&self, tensor: &str, source: KernelError) -> ModelError {
        ModelError::Weight { model: self.checkpoint.name().to_owned(), tensor: tensor.to_owned(), source }
    }

    pub(super) fn norm(&self, module: &str, len: usize) -> Result<B::Vector, ModelError> {
        Ok(self.backend.load_vector(&self.norm_weights(module, len)?)?)
    }

    /// What a norm multiplies by.
    pub(super) fn norm_weights(&self, module: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let mut weights = self.vector(&weight(module), len)?;
        weights.iter_mut().for_each(|weight| *weight += self.spec.norm_offset);
        Ok(weights)
    }

    pub(super) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<PackedMatrix<'_>, ModelError> {
        self.mark_read(name);
        Ok(self.checkpoint.matrix(name, rows, cols)?)
    }

    pub(super) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        self.mark_read(name);
        Ok(self.checkpoint.vector(name, len)?)
    }

    /// Notes that these tensors are multiplied with the input of the linear `name`.
    pub(super) fn note_input(&self, name: &str, tensors: impl FnOnce() -> Vec<String>) {
        if let Some(inputs) = self.inputs {
            inputs.borrow_mut().push(SharedInput { name: name.to_owned(), tensors: tensors() });
        }
    }

    pub(super) fn mark_read(&self, name: &str) {
        self.read.borrow_mut().insert(name.to_owned());
    }

    /// A tensor of the decoder that nobody asked for means that config.json describes another model: a layer too few, a bias
    /// switched off. It would run and write nonsense. (Old checkpoints hold rotary frequencies, which follow from config.json.)
    fn refuse_unread(&self) -> Result<(), ModelError> {
        let read = self.read.borrow();
        let is_unread = |name: &&str| {
            !read.contains(*name) && !name.ends_with(".rotary_emb.inv_freq") && !self.spec.is_of_prediction(name)
        };
        let unread: Vec<&str> =
            self.checkpoint.tensor_names().filter(|name| name.starts_with("model.")).filter(is_unread).collect();
        match unread.first() {
            None => Ok(()),
            Some(&first) => Err(ModelError::UnusedTensors {
                model: self.checkpoint.name().to_owned(),
                count: unread.len(),
                first: first.to_owned(),
            }),
        }
    }
}

/// A matrix of a linear, and its bias.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) rows: usize,
    pub(super) bias: Option<Vec<f32>>,
}

impl Module {
    /// The rows of each of `cut` equal parts.
    fn parts(&self, cut: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.rows / cut;
        (0..cut).map(move |part| part * rows..(part + 1) * rows)
    }
}

pub(super) fn weight(module: &str) -> String {
    format!("{module}.weight")
}
