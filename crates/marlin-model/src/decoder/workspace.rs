//! Activations of a step.

use marlin_kernels::Backend;

use crate::ModelError;
use crate::spec::{AttentionSpec, DecoderSpec};

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
    /// Of experts, if the model has any.
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
    /// Of shared experts that are wider than the others, `[T, their width]`.
    pub(super) beside: B::Buffer,
}

/// Rows and width of each buffer of a [`Workspace`], in the order of its fields, without the angles; the last is that of the
/// logits.
pub(crate) fn workspace_shapes(spec: &DecoderSpec, step_tokens: usize, logit_rows: usize) -> [(usize, usize); 12] {
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
    let has_mlps = spec.layers.iter().any(|layer| !layer.has_experts);
    let expert_rows = |slots: usize| step_tokens.saturating_mul(slots);
    let beside = spec.experts.and_then(|experts| experts.beside);
    [
        (step_tokens, hidden),
        (rows(spec.norms.outputs.is_some()), hidden),
        queries,
        attention,
        q,
        kv,
        values,
        (rows(has_mlps), spec.mlp.intermediate_size),
        spec.experts.map_or(none, |experts| (expert_rows(experts.routing.slots()), experts.width)),
        beside.map_or(none, |mlp| (step_tokens, mlp.intermediate_size)),
        (logit_rows, hidden),
        (logit_rows, spec.vocab_size),
    ]
}

/// Rows and width of the angles of each kind of rotary embedding.
pub(crate) fn angle_shapes(spec: &DecoderSpec, step_tokens: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
    spec.ropes.iter().map(move |rope| (step_tokens, 2 * rope.inv_freq.len()))
}

/// The widest rows that experts read or write.
pub(crate) fn expert_row_width(hidden: usize, width: usize) -> usize {
    hidden.max(width)
}

impl<B: Backend> Workspace<B> {
    pub(super) fn new(
        backend: &B,
        spec: &DecoderSpec,
        step_tokens: usize,
        logit_rows: usize,
    ) -> Result<Self, ModelError> {
        let shapes = workspace_shapes(spec, step_tokens, logit_rows);
        let [hidden, block_output, queries, attention, q, kv, values, gated, of_experts, beside, last_hidden, logits] =
            shapes.map(|(rows, width)| backend.buffer(rows, width));
        let experts = match &spec.experts {
            None => None,
            Some(experts) => {
                let width = expert_row_width(spec.hidden_size, experts.width);
                let routes = backend.routes(&experts.routing, step_tokens, width)?;
                Some(ExpertWork { routes, gated: of_experts?, beside: beside? })
            }
        };
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
            experts,
            last_hidden: last_hidden?,
            logits: logits?,
        })
    }
}
