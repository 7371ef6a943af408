//! A decoder that is run one layer at a time: for models larger than memory, and for those who look at what its linears are given.

use std::cell::RefCell;

use marlin_checkpoint::Checkpoint;
use marlin_kernels::{Backend, Encoder, Input, KvLayout, KvType};

use super::load::{EMBED_TOKENS, Loader, Sizes, load_ropes, weight};
use super::{FeedForward, Layer, Rope, Workspace};
use crate::families;
use crate::spec::DecoderSpec;
use crate::{KvPool, LoadOptions, LogitRows, ModelError, StepBatch};

/// Runs the layers of a model on hidden states that the caller keeps, one layer in memory at a time. Each sequence is run whole and by
/// itself, with keys and values in f32.
pub struct LayerRunner<'a, B: Backend> {
    backend: &'a B,
    /// Its name, for messages.
    model: String,
    spec: DecoderSpec,
    sizes: Sizes,
    ropes: Vec<Rope<B>>,
    encoder: B::Encoder,
    workspace: Workspace<B>,
    batch: StepBatch,
    /// Tokens that stand for those of any sequence: layers do not look at them.
    tokens: Vec<u32>,
}

/// A layer on a device, with room for the keys and values of one sequence.
pub struct LoadedLayer<B: Backend> {
    layer: Layer<B>,
    kv_cache: B::KvCache,
    pool: KvPool,
    inputs: Vec<SharedInput>,
}

/// The end of a model on a device: the last norm and the output head.
pub struct LoadedHead<B: Backend> {
    norm: B::Vector,
    lm_head: B::Linear,
    pool: KvPool,
    /// `[rows, hidden]`
    hidden: B::Buffer,
    /// `[rows, vocabulary]`
    logits: B::Buffer,
    rows: usize,
}

/// Matrices that are multiplied with the same input, since they are one linear or of one vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedInput {
    /// What the backend knows it by: the name of the linear, see [`Backend::load_named_linear`]. Of the latent vectors that make keys
    /// and values it is the module `kv_b_proj`; its heads' linears are named after it.
    pub name: String,
    /// The matrices, named as single matrices of experts are where they are part of a larger tensor.
    pub tensors: Vec<String>,
}

impl<'a, B: Backend> LayerRunner<'a, B> {
    /// A runner of sequences of at most `tokens` tokens. No weight is read.
    ///
    /// # Errors
    /// The architecture is not supported, the model has no such context, or the device lacks the memory.
    pub fn new(backend: &'a B, checkpoint: &Checkpoint, tokens: usize) -> Result<Self, ModelError> {
        let (_, spec) = families::spec(checkpoint)?;
        let options =
            LoadOptions { context: Some(tokens), step_tokens: tokens, logit_rows: 1, ..LoadOptions::default() };
        let sizes = Sizes::new(&spec, &options, checkpoint.name())?;
        Ok(Self {
            backend,
            model: checkpoint.name().to_owned(),
            ropes: load_ropes(backend, &spec)?,
            encoder: backend.encoder(&sizes.step_limits(&spec, tokens))?,
            workspace: Workspace::new(backend, &spec, tokens, 1)?,
            batch: StepBatch::new(),
            tokens: vec![0; tokens],
            spec,
            sizes,
        })
    }

    /// Decoder layers.
    pub fn layers(&self) -> usize {
        self.spec.layers.len()
    }

    /// Width of hidden states.
    pub fn hidden_size(&self) -> usize {
        self.spec.hidden_size
    }

    /// Refuses tokens that are not in the model's vocabulary.
    ///
    /// # Errors
    /// There is one, which is named.
    pub fn check_tokens(&self, tokens: &[u32]) -> Result<(), ModelError> {
        let vocabulary = self.spec.vocab_size;
        match tokens.iter().find(|&&token| token as usize >= vocabulary) {
            None => Ok(()),
            Some(&token) => {
                let (model, option) = (self.model.clone(), "a token of the text");
                let wanted = format!("below {vocabulary}, the size of the vocabulary");
                Err(ModelError::Option { model, option, found: token as usize, wanted })
            }
        }
    }

    /// Hidden states before the first layer, `[tokens, hidden]`.
    ///
    /// # Errors
    /// The embedding is missing or of another shape, or a token is not in its vocabulary.
    pub fn embed(&self, checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let (vocabulary, hidden) = (self.spec.vocab_size, self.spec.hidden_size);
        let table = checkpoint.matrix(&weight(EMBED_TOKENS), vocabulary, hidden)?;
        self.check_tokens(tokens)?;
        let mut states = vec![0.0; tokens.len() * hidden];
        for (&token, state) in tokens.iter().zip(states.chunks_exact_mut(hidden)) {
            table.decode_row(token as usize, state);
            state.iter_mut().for_each(|value| *value *= self.spec.embedding_scale);
            if let Some(rotation) = &self.spec.rotation {
                rotation.apply(state);
            }
        }
        Ok(states)
    }

    /// Loads a layer of a checkpoint, which need not hold any other.
    ///
    /// # Errors
    /// A tensor is missing or has another shape than the model's, or the device lacks the memory.
    pub fn load(&self, checkpoint: &Checkpoint, index: usize) -> Result<LoadedLayer<B>, ModelError> {
        let (read, inputs) = (RefCell::default(), RefCell::default());
        let loader = Loader { backend: self.backend, checkpoint, spec: &self.spec, read: &read, inputs: Some(&inputs) };
        let layer = loader.layer(index, &self.spec.layers[index], None)?;
        let KvLayout { block_tokens, layers } = self.spec.kv_layout();
        let layout = KvLayout { block_tokens, layers: vec![layers[index]] };
        let blocks = self.sizes.kv_blocks;
        Ok(LoadedLayer {
            layer,
            kv_cache: self.backend.kv_cache(&layout, KvType::F32, blocks)?,
            pool: KvPool::new(layout, blocks),
            inputs: inputs.into_inner(),
        })
    }

    /// Runs a layer on the hidden states of one whole sequence, `[tokens, hidden]`, which become those after it.
    ///
    /// # Errors
    /// The sequence is longer than the runner was made for, or the device failed.
    pub fn run(&mut self, layer: &mut LoadedLayer<B>, states: &mut [f32]) -> Result<(), ModelError> {
        let (tokens, most) = (states.len() / self.spec.hidden_size, self.tokens.len());
        if tokens > most {
            let (model, option) = (self.model.clone(), "tokens of a sequence");
            return Err(ModelError::Option { model, option, found: tokens, wanted: format!("at most {most}") });
        }
        let mut sequence = layer.pool.sequence();
        layer.pool.append(&mut sequence, tokens)?;
        self.batch.clear();
        self.batch.push(&sequence, &self.tokens[..tokens], LogitRows::None);
        let Self { encoder, workspace: work, spec, .. } = self;
        let eps = spec.rms_norm_eps;
        encoder.begin(&self.batch.as_step());
        for (rope, angles) in self.ropes.iter().zip(&mut work.angles) {
            encoder.rope_angles(&rope.inv_freq, rope.scaling, angles);
        }
        encoder.write(&mut work.hidden, tokens, states)?;
        layer.layer.encode_attention(encoder, work, &mut layer.kv_cache, 0, eps);
        match &layer.layer.feed_forward {
            FeedForward::Mlp(mlp) => mlp.encode(encoder, work, &layer.layer.mlp_norm, eps),
            FeedForward::Experts(experts) => experts.encode(encoder, work, &layer.layer.mlp_norm, eps),
            FeedForward::HostExperts(_) => unreachable!("layers are loaded without a host"),
        }
        encoder.read(&work.hidden, states)?;
        layer.pool.release(sequence);
        Ok(())
    }

    /// Loads the end of the model, to be given at most so many hidden states at once.
    ///
    /// # Errors
    /// A tensor is missing or has another shape than the model's, or the device lacks the memory.
    pub fn load_head(&self, checkpoint: &Checkpoint, rows: usize) -> Result<LoadedHead<B>, ModelError> {
        let read = RefCell::default();
        let loader = Loader { backend: self.backend, checkpoint, spec: &self.spec, read: &read, inputs: None };
        let rows = rows.min(self.tokens.len());
        let (norm, lm_head) = loader.end()?;
        let layout = KvLayout { layers: Vec::new(), ..self.spec.kv_layout() };
        Ok(LoadedHead {
            norm,
            lm_head: lm_head.map_or_else(|| loader.embedding(), Ok)?,
            pool: KvPool::new(layout, self.sizes.kv_blocks),
            hidden: self.backend.buffer(rows, self.spec.hidden_size)?,
            logits: self.backend.buffer(rows, self.spec.vocab_size)?,
            rows,
        })
    }

    /// Logits, `[rows, vocabulary]`, of hidden states after the last layer, `[rows, hidden]`.
    ///
    /// # Errors
    /// They are more than the head was loaded for, or the device failed.
    pub fn logits(
        &mut self,
        head: &mut LoadedHead<B>,
        states: &[f32],
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let Self { encoder, spec, batch, .. } = self;
        let rows = states.len() / spec.hidden_size;
        if rows > head.rows {
            let (model, option) = (self.model.clone(), "rows of logits");
            return Err(ModelError::Option { model, option, found: rows, wanted: format!("at most {}", head.rows) });
        }
        let mut sequence = head.pool.sequence();
        head.pool.append(&mut sequence, rows)?;
        batch.clear();
        batch.push(&sequence, &self.tokens[..rows], LogitRows::None);
        encoder.begin(&batch.as_step());
        encoder.write(&mut head.hidden, rows, states)?;
        if let Some(rotation) = &spec.rotation {
            encoder.hadamard(&mut head.hidden, rotation);
        }
        let normed = Input::Normed { x: &head.hidden, weight: &head.norm, eps: spec.rms_norm_eps };
        encoder.linear(normed, &head.lm_head, &mut head.logits);
        if let Some(cap) = spec.logit_cap {
            encoder.soft_cap(&mut head.logits, cap);
        }
        logits.resize(rows * spec.vocab_size, 0.0);
        encoder.read(&head.logits, logits)?;
        head.pool.release(sequence);
        Ok(())
    }

    /// Tokens of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.spec.vocab_size
    }
}

impl<B: Backend> LoadedLayer<B> {
    /// Which matrices share their input.
    pub fn inputs(&self) -> &[SharedInput] {
        &self.inputs
    }
}
