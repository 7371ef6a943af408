//! The experts of a step's tokens.

use std::sync::Arc;

use super::router::{Correction, select_kernel, select_parameters};
use crate::gpu::GpuArithmetic;
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::linear::Packed;
use crate::gpu::pipeline::{Binding, Kernel, Pipeline};
use crate::gpu::recorder::Recorder;
use crate::{KernelError, Routing};

/// The experts of a step's tokens, the pairs of token and expert sorted by expert, and memory for what experts make of them.
#[derive(Debug)]
pub struct GpuRoutes {
    pub(in crate::gpu) routing: Routing,
    capacity: usize,
    /// Of rows that experts read and write, at most.
    pub(in crate::gpu) width: usize,
    /// `[T, E]`.
    pub(in crate::gpu) logits: Storage,
    /// `[T, slots]`, and so are weights.
    pub(in crate::gpu) experts: Storage,
    pub(in crate::gpu) weights: Storage,
    /// The pair (token · slots + slot) at each place, and the place of each pair.
    pub(in crate::gpu) sorted: Storage,
    pub(in crate::gpu) places: Storage,
    /// Expert, first place and end of each tile; those that are left over are empty.
    pub(in crate::gpu) tiles: Storage,
    /// Rows of sorted pairs, as linears in half precision read them.
    pub(in crate::gpu) packed: Option<Packed>,
    /// What experts make of sorted pairs, `[T · slots, width]`.
    pub(in crate::gpu) products: Storage,
    /// Sums up products.
    pub(in crate::gpu) combine: Arc<Pipeline>,
    /// Chooses the experts of one token.
    select: Arc<Pipeline>,
    /// Of the router that routed last.
    pub(in crate::gpu) correction: Option<Arc<Correction>>,
    /// Experts are chosen, and not only their logits known.
    pub(in crate::gpu) is_chosen: bool,
    /// Of the last step that was routed.
    pub(in crate::gpu) tokens: usize,
    /// Rows of a tile, in that step.
    pub(in crate::gpu) height: usize,
}

/// Tiles along one axis of workgroups, at most; each has a pair, unless it is left over.
const MOST_PAIRS: usize = 65535;

/// Words of each buffer: logits, experts, weights, sorted pairs, places, tiles, products.
fn sizes(routing: &Routing, tokens: usize, width: usize) -> [usize; 7] {
    let pairs = tokens.saturating_mul(routing.slots());
    let logits = tokens.saturating_mul(routing.experts);
    [logits, pairs, pairs, pairs, pairs, pairs.saturating_mul(4), pairs.saturating_mul(width)]
}

impl GpuRoutes {
    /// As [`MemoryUse::routes_bytes`](crate::MemoryUse::routes_bytes).
    pub(in crate::gpu) fn bytes(gpu: &Gpu, routing: &Routing, tokens: usize, width: usize) -> usize {
        let packed = match gpu.arithmetic {
            GpuArithmetic::Exact => 0,
            GpuArithmetic::Half => Packed::bytes(tokens.saturating_mul(routing.slots()), width),
        };
        let words = sizes(routing, tokens, width).into_iter().fold(0, usize::saturating_add);
        words.saturating_mul(size_of::<u32>()).saturating_add(packed)
    }

    pub(in crate::gpu) fn new(gpu: &Gpu, routing: &Routing, tokens: usize, width: usize) -> Result<Self, KernelError> {
        routing.check()?;
        let pairs = tokens.saturating_mul(routing.slots());
        if pairs > MOST_PAIRS {
            return Err(KernelError::Device(format!(
                "a GPU routes at most {MOST_PAIRS} pairs of token and expert in a step, found {tokens} tokens of {} experts each; \
                 compute fewer tokens at once",
                routing.slots()
            )));
        }
        let make = |what, words: usize| gpu.storage(what, words.saturating_mul(size_of::<u32>()));
        let [logits, experts, weights, sorted, places, tiles, products] = sizes(routing, tokens, width);
        let is_packed = gpu.arithmetic == GpuArithmetic::Half;
        Ok(Self {
            routing: *routing,
            capacity: tokens,
            width,
            logits: make("the logits of experts", logits)?,
            experts: make("the experts of tokens", experts)?,
            weights: make("the weights of experts", weights)?,
            sorted: make("the tokens of experts", sorted)?,
            places: make("the tokens of experts", places)?,
            tiles: make("the tiles of experts", tiles)?,
            packed: is_packed.then(|| Packed::new(gpu, pairs, width)).transpose()?,
            products: make("what experts make of tokens", products)?,
            combine: gpu.pipeline(&combine_kernel())?,
            select: gpu.pipeline(&select_kernel(true))?,
            correction: None,
            is_chosen: true,
            tokens: 0,
            height: 1,
        })
    }

    /// Becomes the routes of so many tokens.
    pub(super) fn begin(&mut self, routing: &Routing, tokens: usize, height: usize) {
        assert_eq!(self.routing, *routing, "routes of this router");
        assert!(tokens <= self.capacity, "{tokens} tokens for routes of {}", self.capacity);
        (self.tokens, self.height) = (tokens, height);
    }

    /// Chooses the experts of one token, unless they are chosen.
    pub(in crate::gpu) fn choose(&mut self, recorder: &mut Recorder) {
        let Some(correction) = self.correction.as_ref().filter(|_| !self.is_chosen) else { return };
        let chosen = [&self.logits, &correction.values, &self.experts, &self.weights];
        let buffers = chosen.into_iter().chain([&self.sorted, &self.places, &self.tiles]);
        recorder.dispatch(&self.select, buffers, &select_parameters(&self.routing, correction), [1, 1, 1]);
        self.is_chosen = true;
    }

    /// Holds what computes with them against them: an expert for each number, and a row for each token.
    pub(in crate::gpu) fn check(&self, experts: usize, rows: usize) {
        assert_eq!(experts, self.routing.all_experts(), "a linear for each expert");
        assert_eq!(rows, self.tokens, "a row for each token");
    }

    /// Pairs of token and expert.
    pub(in crate::gpu) fn pairs(&self) -> usize {
        self.tokens * self.routing.slots()
    }

    /// How many tiles there are at most: an expert's last one need not be full.
    pub(in crate::gpu) fn tile_count(&self) -> usize {
        let pairs = self.pairs();
        pairs.min(pairs / self.height + self.routing.all_experts().min(pairs))
    }
}

/// The kernel that sums up what experts made of a token.
pub(super) fn combine_kernel() -> Kernel {
    let (read, write) = (Binding::read, Binding::write);
    Kernel {
        name: "expert_combine",
        prelude: String::new(),
        bindings: vec![read("x", "f32"), read("places", "u32"), read("weights", "f32"), write("out", "f32")],
        files: vec![include_str!("../shaders/expert_combine.wgsl")],
    }
}
