//! A layer's mixture of experts as a model runs it: router, gate and up, down, each waiting for the one before.

use marlin_format::{Format, Scheme};
use marlin_kernels::{
    Activation, Backend, Encoder, HostRoutes, Input, LinearPart, RouterScore, RouterWeights, Routing, StepLimits,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::timer::Timed;
use super::{Bench, KernelBenchError, Measurement, Plans, Work, full_name};
use crate::bench::random_matrix;

/// The sizes of a layer.
#[derive(Debug, Clone, Copy)]
struct Shape {
    name: &'static str,
    hidden: usize,
    width: usize,
    routing: Routing,
}

const SOFTMAX: Routing = Routing {
    experts: 128,
    top_k: 8,
    shared: 0,
    score: RouterScore::Softmax,
    groups: 1,
    top_groups: 1,
    normalize: true,
    scale: 1.0,
};
const SIGMOID: Routing =
    Routing { experts: 64, top_k: 4, shared: 1, score: RouterScore::Sigmoid, scale: 1.8, ..SOFTMAX };
const SHAPES: [Shape; 2] = [
    Shape { name: "qwen3-30b-a3b", hidden: 2048, width: 768, routing: SOFTMAX },
    Shape { name: "glm-4.7-flash", hidden: 2048, width: 1536, routing: SIGMOID },
];
const QUICK_SHAPES: [Shape; 1] =
    [Shape { name: "tiny", hidden: 64, width: 32, routing: Routing { experts: 8, top_k: 2, ..SIGMOID } }];
/// Tokens.
const TOKENS: [usize; 4] = [1, 4, 32, 512];
const QUICK_TOKENS: [usize; 2] = [1, 16];
/// Inputs that take turns, so that experts do.
const INPUTS: usize = 16;
/// Copies of a layer's weights that take turns. One is more than caches hold, but not its experts of a few tokens.
const COPIES: usize = 2;
/// More tokens go to nearly all experts anyway.
const MOST_ROUTED: usize = 32;
const EPS: f32 = 1e-6;

/// Mixtures of one shape and format.
pub(super) struct ExpertsGroup {
    shape: Shape,
    format: Format,
    scheme: Scheme,
    tokens: &'static [usize],
}

/// What is measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Norm and router.
    Route,
    /// Gate and up of a token's experts.
    Gated,
    /// Their down, weighted and added up.
    Combine,
    All,
}

impl Part {
    const EACH: [Self; 4] = [Self::Route, Self::Gated, Self::Combine, Self::All];

    fn name(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Gated => "gated",
            Self::Combine => "combine",
            Self::All => "all",
        }
    }

    fn has(self, other: Self) -> bool {
        self == other || self == Self::All
    }
}

/// Weights of layers and what goes through them.
struct Layers<B: Backend> {
    norm: B::Vector,
    router: B::Router,
    gate_up: Vec<B::LinearGroup>,
    down: Vec<B::LinearGroup>,
}

/// Buffers of a number of tokens.
struct Activations<B: Backend> {
    inputs: Vec<B::Buffer>,
    /// Of inputs in turn: of few tokens for each of them, so that experts take turns where they alone are measured, too.
    routes: Vec<B::Routes>,
    gated: B::Buffer,
    out: B::Buffer,
}

impl ExpertsGroup {
    /// All groups.
    pub(super) fn all(quick: bool) -> Vec<Self> {
        let (shapes, tokens): (&[_], &'static [_]) =
            if quick { (&QUICK_SHAPES, &QUICK_TOKENS) } else { (&SHAPES, &TOKENS) };
        let group = |&shape: &Shape| {
            let of = move |format: Format| Some(Self { shape, format, scheme: format.scheme(None).ok()?, tokens });
            [Format::Fp4, Format::Int4].into_iter().filter_map(of)
        };
        shapes.iter().flat_map(group).collect()
    }

    fn load<B: Timed>(&self, bench: &Bench<'_, B>) -> Result<Layers<B>, KernelBenchError> {
        let Shape { hidden, width, routing, .. } = self.shape;
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut groups = |parts: usize, rows: usize, cols: usize| {
            let part = |_| Ok(LinearPart { weight: random_matrix(&self.scheme, rows, cols, &mut rng)?, bias: None });
            let parts = (0..parts).map(part).collect::<Result<Vec<_>, KernelBenchError>>()?;
            let group = |_| {
                let linears = bench.backend.copies(&parts, routing.all_experts())?;
                Ok(bench.backend.group_linears(linears)?)
            };
            (0..COPIES).map(group).collect::<Result<Vec<_>, KernelBenchError>>()
        };
        let (gate_up, down) = (groups(2, width, hidden)?, groups(1, hidden, width)?);
        let weight = uniform(routing.experts * hidden, &mut rng);
        Ok(Layers {
            norm: bench.backend.load_vector(&vec![1.0; hidden])?,
            router: bench.backend.load_router(&RouterWeights {
                routing,
                weight: &weight,
                bias: None,
                correction: None,
            })?,
            gate_up,
            down,
        })
    }

    fn activations<B: Timed>(&self, bench: &Bench<'_, B>, tokens: usize) -> Result<Activations<B>, KernelBenchError> {
        let Shape { hidden, width, routing, .. } = self.shape;
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let input = |_| {
            let mut buffer = bench.backend.buffer(tokens, hidden)?;
            bench.backend.upload(&mut buffer, tokens, &uniform(tokens * hidden, &mut rng))?;
            Ok(buffer)
        };
        let mut out = bench.backend.buffer(tokens, hidden)?;
        bench.backend.upload(&mut out, tokens, &vec![0.0; tokens * hidden])?;
        let rows = tokens * routing.slots();
        let mut gated = bench.backend.buffer(rows, width)?;
        bench.backend.upload(&mut gated, rows, &vec![1.0; rows * width])?;
        Ok(Activations {
            inputs: (0..INPUTS).map(input).collect::<Result<_, KernelBenchError>>()?,
            routes: (0..if tokens <= MOST_ROUTED { INPUTS } else { 1 })
                .map(|_| bench.backend.routes(&routing, tokens, hidden.max(width)))
                .collect::<Result<_, _>>()?,
            gated,
            out,
        })
    }

    /// The work of a part, of which each expert that is chosen is read once; the mean over all inputs.
    fn work<B: Timed>(
        &self,
        bench: &Bench<'_, B>,
        part: Part,
        tokens: usize,
        chosen: f64,
    ) -> Result<Work, KernelBenchError> {
        let Shape { hidden, width, routing, .. } = self.shape;
        let bytes =
            |rows, cols| Ok::<_, KernelBenchError>(bench.backend.linear_bytes(&self.scheme, rows, cols)? as f64);
        let pairs = (tokens * routing.slots()) as f64;
        let mut work = Work { bytes: 0.0, operations: 0.0 };
        let mut add = |bytes: f64, operations: f64| {
            work.bytes += bytes;
            work.operations += 2.0 * operations;
        };
        if part.has(Part::Route) {
            let weights = (routing.experts * hidden) as f64;
            add(4.0 * weights, tokens as f64 * weights);
        }
        if part.has(Part::Gated) {
            add(chosen * bytes(2 * width, hidden)?, pairs * (2 * width * hidden) as f64);
        }
        if part.has(Part::Combine) {
            add(chosen * bytes(hidden, width)?, pairs * (width * hidden) as f64);
        }
        Ok(work)
    }
}

/// Values spread evenly around zero, with a variance of 1.
fn uniform(count: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let unit = 3f32.sqrt() / i32::MAX as f32;
    (0..count).map(|_| rng.next_u32() as i32 as f32 * unit).collect()
}

impl<B: Backend> Layers<B> {
    fn record(&self, encoder: &mut B::Encoder, buffers: &mut Activations<B>, part: Part, i: usize) {
        let Activations { inputs, routes, gated, out } = buffers;
        let input = || Input::Normed { x: &inputs[i % INPUTS], weight: &self.norm, eps: EPS };
        let of_input = i % routes.len();
        let (routes, i) = (&mut routes[of_input], i % COPIES);
        if part.has(Part::Route) {
            encoder.route(input(), &self.router, routes);
        }
        if part.has(Part::Gated) {
            encoder.expert_gated(input(), routes, &self.gate_up[i], Activation::Silu, gated);
        }
        if part.has(Part::Combine) {
            encoder.expert_combine(gated, routes, &self.down[i], out);
        }
    }

    /// Experts that each input's tokens choose, on average, and how many tiles of rows each of those has: its weights are read for each.
    fn chosen(&self, encoder: &mut B::Encoder, buffers: &mut Activations<B>) -> Result<[f64; 2], KernelBenchError> {
        let (mut routes, mut chosen, mut tiles) = (HostRoutes::default(), 0, 0);
        for i in 0..INPUTS {
            self.record(encoder, buffers, Part::Route, i);
            let of_input = i % buffers.routes.len();
            encoder.read_routes(&mut buffers.routes[of_input], &mut routes)?;
            chosen += routes.tiles.iter().filter(|tiles| **tiles > 0).count();
            tiles += routes.tiles.iter().sum::<u32>();
        }
        Ok([chosen as f64 / INPUTS as f64, f64::from(tiles) / chosen as f64])
    }
}

impl<B: Timed> Plans<B> for ExpertsGroup {
    fn name(&self) -> String {
        format!("experts/{}/{}", self.format, self.shape.name)
    }

    fn cases(&self) -> Vec<String> {
        self.tokens.iter().flat_map(|&tokens| Part::EACH.map(|part| case(tokens, part))).collect()
    }

    fn measure(&self, bench: &Bench<'_, B>, done: &mut dyn FnMut()) -> Result<Vec<Measurement>, KernelBenchError> {
        let group = Plans::<B>::name(self);
        let layers = self.load(bench)?;
        let mut measurements = Vec::new();
        for &tokens in self.tokens {
            let names = Part::EACH.map(|part| (part, full_name(&group, &case(tokens, part))));
            let wanted: Vec<_> = names.into_iter().filter(|(_, name)| bench.is_wanted(name)).collect();
            if wanted.is_empty() {
                continue;
            }
            let Shape { hidden, width, routing, .. } = self.shape;
            let rows = tokens * routing.slots();
            let width = hidden.max(width);
            let limits = StepLimits { tokens: rows, context: rows, width, vocabulary: 1, logit_rows: 0 };
            let mut encoder = bench.backend.encoder(&limits)?;
            let mut buffers = self.activations(bench, tokens)?;
            let [chosen, reads] = layers.chosen(&mut encoder, &mut buffers)?;
            for (part, name) in wanted {
                let seconds =
                    bench.seconds(&mut encoder, |encoder, i| layers.record(encoder, &mut buffers, part, i))?;
                let work = Some(self.work(bench, part, tokens, chosen)?);
                let reads = (part != Part::Route).then_some(reads);
                measurements.push(Measurement { name, seconds, work, reads });
                done();
            }
        }
        Ok(measurements)
    }
}

fn case(tokens: usize, part: Part) -> String {
    format!("m={tokens}/{}", part.name())
}
