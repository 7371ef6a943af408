//! Activations of a step.

use marlin_kernels::{Backend, MemoryUse};

use crate::ModelError;
use crate::spec::{AttentionSpec, DecoderSpec, ExpertsSpec};

/// Buffers that the blocks of all layers share; those that a model's blocks do not need have no rows.
pub(super) struct Workspace<B: Backend> {
    /// The residual stream, `[T, hidden]`.
    pub(super) hidden: B::Buffer,
    /// The output of a block before its norm, `[T, hidden]`.
    pub(super) block_output: B::Buffer,
    /// Cosines and sines of each rope, `[T, rotated dimensions]`.
    pub(super) angles: Vec<B::Buffer>,
    /// What attention reads: `[T, q heads | k heads | v heads]`, or `[T, heads, latent | rotated part]`.
    pub(super) queries: B::Buffer,
    /// What attention gives: `[T, heads, values]`.
    pub(super) attention: B::Buffer,
    /// Of latent attention.
    pub(super) latent: LatentWork<B>,
    /// `[T, intermediate]`.
    pub(super) gated: B::Buffer,
    /// Of shared experts that are an MLP by themselves, `[T, their width]`.
    pub(super) shared: B::Buffer,
    /// Of experts that the device computes, if there are any.
    pub(super) experts: Option<ExpertWork<B>>,
    /// Rows of the residual stream whose logits are wanted, `[L, hidden]`.
    pub(super) last_hidden: B::Buffer,
    /// `[L, vocabulary]`.
    pub(super) logits: B::Buffer,
}

/// What comes before and after attention in the space of latent vectors.
pub(super) struct LatentWork<B: Backend> {
    /// `[T, heads, nope | rope]`.
    pub(super) q: B::Buffer,
    /// `[T, latent vectors of queries, if they have any | latent | rotated part]`.
    pub(super) kv: B::Buffer,
    /// `[T, heads, v_head_dim]`.
    pub(super) values: B::Buffer,
}

/// Where tokens go, and what becomes of them there.
pub(super) struct ExpertWork<B: Backend> {
    pub(super) routes: B::Routes,
    /// `[T · slots, width of an expert]`.
    pub(super) gated: B::Buffer,
}

/// Rows and width of each buffer of a [`Workspace`], in the order of its fields, without the angles and what experts take; the last is
/// that of the logits.
pub(crate) fn workspace_shapes(spec: &DecoderSpec, step_tokens: usize, logit_rows: usize) -> [(usize, usize); 11] {
    let hidden = spec.hidden_size;
    let rows = |is_needed: bool| if is_needed { step_tokens } else { 0 };
    let none = (0, hidden);
    let (queries, attention, latent) = match spec.attention {
        AttentionSpec::Grouped(spec) => {
            ((step_tokens, spec.q_width() + 2 * spec.kv_width()), (step_tokens, spec.q_width()), [none; 3])
        }
        AttentionSpec::Latent(spec) => (
            (step_tokens, spec.latent_q_width()),
            (step_tokens, spec.heads * spec.rank),
            [
                (step_tokens, spec.q_width()),
                (step_tokens, spec.q_rank.unwrap_or(0) + spec.latent_shape().key_dim()),
                (step_tokens, spec.v_width()),
            ],
        ),
    };
    let [q, kv, values] = latent;
    [
        (step_tokens, hidden),
        (rows(spec.norms.outputs.is_some()), hidden),
        queries,
        attention,
        q,
        kv,
        values,
        (rows(spec.has_mlps()), spec.mlp.intermediate_size),
        spec.shared_mlp().map_or(none, |mlp| (step_tokens, mlp.intermediate_size)),
        (logit_rows, hidden),
        (logit_rows, spec.vocab_size),
    ]
}

/// Rows and width of the angles of each kind of rotary embedding.
pub(crate) fn angle_shapes(spec: &DecoderSpec, step_tokens: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
    spec.ropes.iter().map(move |rope| (step_tokens, 2 * rope.inv_freq.len()))
}

/// The bytes of an [`ExpertWork`].
pub(crate) fn expert_work_bytes(device: &dyn MemoryUse, hidden: usize, experts: &ExpertsSpec, tokens: usize) -> u64 {
    let (rows, width) = gated_shape(experts, tokens);
    let gated = rows.saturating_mul(width).saturating_mul(size_of::<f32>());
    let routes = device.routes_bytes(&experts.routing, tokens, hidden.max(experts.width));
    routes.saturating_add(gated) as u64
}

/// Rows and width of what experts make between their linears.
fn gated_shape(experts: &ExpertsSpec, tokens: usize) -> (usize, usize) {
    (tokens.saturating_mul(experts.routing.slots()), experts.width)
}

impl<B: Backend> ExpertWork<B> {
    /// For experts of rows `hidden` wide.
    pub(super) fn new(backend: &B, hidden: usize, experts: &ExpertsSpec, tokens: usize) -> Result<Self, ModelError> {
        let (rows, width) = gated_shape(experts, tokens);
        Ok(Self {
            routes: backend.routes(&experts.routing, tokens, hidden.max(experts.width))?,
            gated: backend.buffer(rows, width)?,
        })
    }
}

impl<B: Backend> Workspace<B> {
    pub(super) fn new(
        backend: &B,
        spec: &DecoderSpec,
        step_tokens: usize,
        logit_rows: usize,
    ) -> Result<Self, ModelError> {
        let shapes = workspace_shapes(spec, step_tokens, logit_rows);
        let [hidden, block_output, queries, attention, q, kv, values, gated, shared, last_hidden, logits] =
            shapes.map(|(rows, width)| backend.buffer(rows, width));
        let experts = spec.device_experts();
        let experts = experts.map(|experts| ExpertWork::new(backend, spec.hidden_size, &experts, step_tokens));
        Ok(Self {
            hidden: hidden?,
            block_output: block_output?,
            angles: angle_shapes(spec, step_tokens)
                .map(|(rows, width)| backend.buffer(rows, width))
                .collect::<Result<_, _>>()?,
            queries: queries?,
            attention: attention?,
            latent: LatentWork { q: q?, kv: kv?, values: values? },
            gated: gated?,
            shared: shared?,
            experts: experts.transpose()?,
            last_hidden: last_hidden?,
            logits: logits?,
        })
    }
}
