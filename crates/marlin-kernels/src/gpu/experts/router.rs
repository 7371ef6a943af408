//! Routers: logits of tokens, the experts chosen by them, and tokens sorted by expert.

use std::sync::Arc;

use super::GpuRoutes;
use super::routes::combine_kernel;
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::linear::{VECTOR, four_function, four_functions, step_height};
use crate::gpu::pipeline::{Binding, Kernel, Pipeline};
use crate::gpu::recorder::Recorder;
use crate::gpu::upload::Upload;
use crate::gpu::{GpuBackend, GpuBuffer};
use crate::{Input, KernelError, RouterScore, RouterWeights, Routing};

/// Experts that kernels have room for, shared ones among them.
const MOST_EXPERTS: usize = 1024;

/// A router on the device.
#[derive(Debug)]
pub struct GpuRouter {
    routing: Routing,
    hidden: usize,
    /// `[E, hidden]`.
    weights: Storage,
    /// Added to logits, and to scores where experts are chosen, `[E]`.
    bias: Storage,
    /// Shared with the routes that are chosen by it.
    correction: Arc<Correction>,
    kernels: RouterKernels,
}

/// What is added to scores where experts are chosen; zeros if there is nothing.
#[derive(Debug)]
pub(in crate::gpu) struct Correction {
    pub(in crate::gpu) values: Storage,
    is_some: bool,
}

#[derive(Debug)]
struct RouterKernels {
    /// For few tokens and for many; of rows as they are, and of their norms.
    logits: [[Arc<Pipeline>; 2]; 2],
    /// Of more tokens than one.
    select: Arc<Pipeline>,
    sort: Arc<Pipeline>,
}

/// How a workgroup shares out logits: `route_logits.wgsl`.
#[derive(Debug, Clone, Copy)]
struct LogitsTile {
    lanes: usize,
    tokens: usize,
    experts: usize,
    steps: usize,
}

/// One token's logits are divided among many workgroups.
const FEW_TOKENS: LogitsTile = LogitsTile { lanes: 64, tokens: 1, experts: 1, steps: 8 };
/// Many tokens share weights, and experts tokens.
const MANY_TOKENS: LogitsTile = LogitsTile { lanes: 32, tokens: 8, experts: 2, steps: 1 };
/// So many tokens are few.
const MOST_FEW_TOKENS: usize = 16;

impl LogitsTile {
    const INVOCATIONS: usize = 128;

    /// Workgroups for so many experts and tokens.
    fn workgroups(self, experts: usize, tokens: usize) -> [usize; 3] {
        let of_workgroup = Self::INVOCATIONS / self.lanes * self.experts;
        [experts.div_ceil(of_workgroup), tokens.div_ceil(self.tokens), 1]
    }

    fn kernel(self, is_normed: bool, is_aligned: bool) -> Kernel {
        let Self { lanes, tokens, experts, steps } = self;
        let element = if is_aligned { "vec4<f32>" } else { "f32" };
        let mut bindings = vec![Binding::read("x", element)];
        bindings.extend(is_normed.then(|| Binding::read("norm_weight", element)));
        bindings.extend([
            Binding::read("router", element),
            Binding::read("bias", "f32"),
            Binding::write("logits", "f32"),
        ]);
        let prelude = format!(
            "const LANES = {lanes}u;\nconst TOKENS = {tokens}u;\nconst EXPERTS = {experts}u;\nconst STEPS = {steps}u;\n\
             const NORMED = {is_normed};\n{}{}",
            four_functions(is_normed, is_aligned, "k"),
            four_function("router", is_aligned, "k"),
        );
        let files = vec![include_str!("../shaders/norm.wgsl"), include_str!("../shaders/route_logits.wgsl")];
        Kernel { name: "route_logits", prelude, bindings, files }
    }
}

impl RouterKernels {
    fn new(gpu: &Gpu, is_aligned: bool) -> Result<Self, KernelError> {
        let logits = |tile: LogitsTile| {
            let kernel = |is_normed| gpu.pipeline(&tile.kernel(is_normed, is_aligned));
            Ok::<_, KernelError>([kernel(false)?, kernel(true)?])
        };
        Ok(Self {
            logits: [logits(FEW_TOKENS)?, logits(MANY_TOKENS)?],
            select: gpu.pipeline(&select_kernel(false))?,
            sort: gpu.pipeline(&sort_kernel())?,
        })
    }
}

/// The kernel that chooses experts; of one token, they are sorted at once, and have tiles.
pub(super) fn select_kernel(has_tiles: bool) -> Kernel {
    let (read, write) = (Binding::read, Binding::write);
    let mut bindings =
        vec![read("logits", "f32"), read("correction", "f32"), write("experts", "u32"), write("weights", "f32")];
    let mut prelude = format!("{}const TILES = {has_tiles};\n", route_constants(MOST_EXPERTS));
    if has_tiles {
        bindings.extend(SORTED);
        prelude += "fn put_tile(place: u32, slot: u32, expert: u32) {\n    pairs[place] = slot;\n    places[slot] = place;\n    \
                    tiles[place] = vec4<u32>(expert, place, place + 1u, 0u);\n}\n";
    } else {
        prelude += "fn put_tile(place: u32, slot: u32, expert: u32) {}\n";
    }
    let own = [include_str!("../shaders/reduce.wgsl"), include_str!("../shaders/route_select.wgsl")];
    Kernel { name: "route_select", prelude, bindings, files: ROUTE_CHOOSE.into_iter().chain(own).collect() }
}

/// What chooses experts in any kernel …
pub(in crate::gpu) const ROUTE_CHOOSE: [&str; 2] =
    [include_str!("../shaders/routing.wgsl"), include_str!("../shaders/route_choose.wgsl")];

/// … of no more than so many experts, shared ones among them.
pub(in crate::gpu) fn route_constants(most_experts: usize) -> String {
    // Most models share the kernels of groups. Eight are read at once.
    let most_experts = most_experts.next_multiple_of(128);
    format!("const MOST_EXPERTS = {most_experts}u;\nconst MOST_GROUPS = {}u;\n", Routing::MOST_GROUPS)
}

fn sort_kernel() -> Kernel {
    let bindings = std::iter::once(Binding::read("experts", "u32")).chain(SORTED).collect();
    Kernel {
        name: "route_sort",
        prelude: format!("const MOST_EXPERTS = {MOST_EXPERTS}u;\n"),
        bindings,
        files: vec![include_str!("../shaders/route_sort.wgsl")],
    }
}

/// Where sorted pairs go.
const SORTED: [Binding; 3] =
    [Binding::write("pairs", "u32"), Binding::write("places", "u32"), Binding::write("tiles", "vec4<u32>")];

impl GpuRouter {
    pub(in crate::gpu) fn load(gpu: &Gpu, router: &RouterWeights<'_>) -> Result<Self, KernelError> {
        let hidden = router.check()?;
        let routing = router.routing;
        if routing.all_experts() > MOST_EXPERTS {
            return Err(KernelError::Device(format!(
                "a GPU routes to at most {MOST_EXPERTS} experts, found {}; use the CPU instead",
                routing.all_experts()
            )));
        }
        let zeros = vec![0.0; routing.experts];
        let of_experts = |what: &str, values: Option<&[f32]>| Upload::all(gpu, what, values.unwrap_or(&zeros));
        Ok(Self {
            routing,
            hidden,
            weights: Upload::all(gpu, "a router", router.weight)?,
            bias: of_experts("a router's biases", router.bias)?,
            correction: Arc::new(Correction {
                values: of_experts("a router's corrections", router.correction)?,
                is_some: router.correction.is_some(),
            }),
            kernels: RouterKernels::new(gpu, hidden.is_multiple_of(VECTOR))?,
        })
    }

    /// As [`Encoder::route`](crate::Encoder::route).
    pub(in crate::gpu) fn route(
        &self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        input: &Input<'_, GpuBackend>,
        routes: &mut GpuRoutes,
    ) {
        let (Input::Rows(x) | Input::Normed { x, .. }) = *input;
        let &GpuBuffer { rows: tokens, width, ref storage, .. } = x;
        let routing = &self.routing;
        assert_eq!(width, self.hidden, "an input of the router's columns");
        routes.begin(routing, tokens, step_height(gpu, tokens, routing.slots(), routing.all_experts()));
        let (norm, eps) = match input {
            Input::Rows(_) => (None, 0.0),
            Input::Normed { weight, eps, .. } => {
                assert_eq!(weight.values.len(), width, "a weight for each value of a row");
                (Some(&weight.storage), *eps)
            }
        };
        let is_many = tokens > MOST_FEW_TOKENS && !gpu.batch_invariant;
        let tile = if is_many { MANY_TOKENS } else { FEW_TOKENS };
        let kernel = &self.kernels.logits[usize::from(is_many)][usize::from(norm.is_some())];
        let buffers = [storage].into_iter().chain(norm).chain([&self.weights, &self.bias, &routes.logits]);
        let parameters = [width as u32, eps.to_bits(), tokens as u32, routing.experts as u32];
        recorder.dispatch(kernel, buffers, &parameters, tile.workgroups(routing.experts, tokens));

        routes.correction = Some(self.correction.clone());
        if tokens == 1 {
            // What multiplies with the experts may choose them.
            routes.is_chosen = false;
            return;
        }
        routes.is_chosen = true;
        let chosen = [&routes.logits, &self.correction.values, &routes.experts, &routes.weights];
        let parameters = select_parameters(routing, &self.correction);
        recorder.dispatch(&self.kernels.select, chosen, &parameters, [tokens, 1, 1]);
        let (experts, tiles) = (routing.all_experts(), routes.tile_count());
        let parameters = [routes.pairs(), experts, routes.height, tiles].map(|count| count as u32);
        let buffers = [&routes.experts, &routes.sorted, &routes.places, &routes.tiles];
        recorder.dispatch(&self.kernels.sort, buffers, &parameters, [if tokens > 0 { experts } else { 0 }, 1, 1]);
    }
}

/// In the order of `routing.wgsl`.
pub(in crate::gpu) fn select_parameters(routing: &Routing, correction: &Correction) -> [u32; 9] {
    let &Routing { experts, top_k, shared, score, groups, top_groups, normalize, scale } = routing;
    [
        experts as u32,
        top_k as u32,
        shared as u32,
        u32::from(score == RouterScore::Softmax),
        groups as u32,
        top_groups as u32,
        u32::from(normalize),
        scale.to_bits(),
        u32::from(routing.chooses_by_logits(correction.is_some)),
    ]
}

/// Compiles the kernels of all routers.
pub(in crate::gpu) fn compile(gpu: &Gpu) -> Result<(), KernelError> {
    for is_aligned in [false, true] {
        RouterKernels::new(gpu, is_aligned)?;
    }
    gpu.pipeline(&select_kernel(true))?;
    gpu.pipeline(&combine_kernel()).map(drop)
}
