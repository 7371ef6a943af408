//! Rows of mixtures of experts: the choice of experts, their linears, and linears of heads.

use marlin_format::{ColumnOrder, Format, Scheme};

use super::linear::{PRODUCT, with_bias};
use super::matrices::{has_columns, random, schemes};
use super::support::{Case, Rng, limits, mean_square, poisoned, read, upload};
use super::{Device, Table};
use crate::{Activation, Backend, Encoder, HostRoutes, Input, LinearPart, RouterScore, RouterWeights, Routing};

const PLAIN: Routing = Routing {
    experts: 6,
    top_k: 2,
    shared: 0,
    score: RouterScore::Softmax,
    groups: 1,
    top_groups: 1,
    normalize: true,
    scale: 1.0,
};
/// As in DeepSeek-V3 and GLM-4.7, small.
const GROUPED: Routing = Routing {
    experts: 12,
    top_k: 3,
    shared: 1,
    score: RouterScore::Sigmoid,
    groups: 4,
    top_groups: 2,
    normalize: true,
    scale: 1.8,
};

/// Tokens: one, fewer than experts, more than tiles for few rows take, and several tiles for an expert.
const TOKENS: [usize; 4] = [1, 3, 9, 70];
/// Width of the input and of experts: around the borders of units and tiles of 8 outputs.
const SIZES: [[usize; 2]; 4] = [[32, 9], [68, 32], [128, 64], [300, 17]];
/// Those that meet many tokens, one for each kind of inner loop.
const MANY_SCHEMES: [&str; 5] = ["fp4", "int4", "fp8", "bf16", "fp4-2of4"];

pub(crate) fn add_rows<B: Backend>(table: &mut Table, device: &Device<B>) {
    // A group prepares its input once for all of its linears, and so takes none with an order of columns of its own.
    for (name, scheme) in schemes().into_iter().filter(|(_, scheme)| scheme.order == ColumnOrder::Natural) {
        // Compilers of software devices take minutes for the kernels of all of them.
        let device = &device.for_scheme(&name, B::OVERLAPS);
        table.add(device, format!("expert-gated/{name}"), move |device| gated(device, &[scheme]));
        table.add(device, format!("expert-combine/{name}"), move |device| combine(device, &[scheme]));
        table.add(device, format!("head-linear/{name}"), move |device| head_linear(device, scheme));
    }
    let of = |format: Format| format.scheme(None).expect("its usual groups");
    let mixed = [of(Format::Fp4), of(Format::Int2), of(Format::Mxfp4), of(Format::Int3), Scheme::BF16];
    table.add(device, "expert-gated/mixed".into(), move |device| gated(device, &mixed));
    table.add(device, "expert-combine/mixed".into(), move |device| combine(device, &mixed));
    add_rows_of_many(table, device);
}

/// Rows of many tokens.
pub(crate) fn add_rows_of_many<B: Backend>(table: &mut Table, device: &Device<B>) {
    for (name, scheme) in schemes().into_iter().filter(|(name, _)| MANY_SCHEMES.contains(&name.as_str())) {
        let device = &device.with_heavy_rows(true);
        table.add(device, format!("experts-many/{name}"), move |device| many(device, scheme));
    }
    let fp4 = Format::Fp4.scheme(None).expect("its usual groups");
    let device = &device.with_heavy_rows(true);
    table.add(device, "experts-layer/fp4".into(), move |device| layer(device, fp4));
    table.add(device, "head-linear-many/fp4".into(), move |device| many_heads(device, fp4));
}

/// Rows of the router, in which arithmetics do not differ.
pub(crate) fn add_router_rows<B: Backend>(table: &mut Table, device: &Device<B>) {
    let softmax = Routing { normalize: false, ..PLAIN };
    let routings = [
        ("softmax", PLAIN),
        ("softmax-as-they-are", Routing { scale: 0.5, ..softmax }),
        ("mixtral", Routing { experts: 8, ..PLAIN }),
        ("qwen3", Routing { experts: 128, top_k: 8, ..PLAIN }),
        ("sigmoid", Routing { score: RouterScore::Sigmoid, ..PLAIN }),
        ("glm", Routing { experts: 64, top_k: 4, groups: 1, top_groups: 1, ..GROUPED }),
        ("grouped", GROUPED),
        ("deepseek", Routing { experts: 256, top_k: 8, groups: 8, top_groups: 4, scale: 2.5, ..GROUPED }),
        ("groups-of-one", Routing { experts: 4, groups: 4, top_groups: 3, top_k: 2, ..GROUPED }),
        ("all", Routing { experts: 5, top_k: 5, shared: 2, ..PLAIN }),
        ("odd", Routing { experts: 37, top_k: 6, ..PLAIN }),
        ("one", Routing { experts: 1, top_k: 1, ..PLAIN }),
    ];
    for (name, routing) in routings {
        table.add(device, format!("route/{name}"), move |device| route(device, routing));
    }
    table.add(device, "route/ties".into(), ties);
}

fn route<B: Backend>(device: &Device<B>, routing: Routing) -> Result<(), String> {
    let mut rng = Rng(30);
    for (i, hidden) in [4, 33, 128, 576, 2048].into_iter().enumerate() {
        for tokens in [1, 7, [2, 65, 130][i % 3]] {
            for is_normed in [false, true] {
                let router = Router::new(routing, hidden, &mut rng);
                let norm = is_normed.then(|| (0..hidden).map(|_| 0.5 + rng.uniform()).collect());
                let x = rng.normals(tokens * hidden);
                for reads in [Reads::Logits, Reads::Experts, Reads::Weights] {
                    let case = Route { router: &router, x: x.clone(), norm: norm.clone(), reads };
                    let bound = if reads == Reads::Experts { 0.0 } else { 1e-10 };
                    device.check(
                        &case,
                        bound,
                        &format!("{tokens} tokens of {hidden}, {reads:?}, normed={is_normed}"),
                    )?;
                }
            }
        }
    }
    Ok(())
}

/// Equal logits, of which the first ones are chosen.
fn ties<B: Backend>(device: &Device<B>) -> Result<(), String> {
    for routing in [PLAIN, GROUPED, Routing { experts: 128, top_k: 8, ..PLAIN }] {
        let router = Router { routing, weight: vec![0.5; routing.experts * 32], bias: None, correction: None };
        let case = Route { router: &router, x: Rng(31).normals(5 * 32), norm: None, reads: Reads::Experts };
        device.check(&case, 0.0, &format!("{} experts", routing.experts))?;
    }
    Ok(())
}

/// A router that owns its values.
struct Router {
    routing: Routing,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    correction: Option<Vec<f32>>,
}

impl Router {
    /// With a bias or a correction, as families have either.
    fn new(routing: Routing, hidden: usize, rng: &mut Rng) -> Self {
        let experts = routing.experts;
        // Logits of about ± 2.
        let spread = 2.0 / (hidden as f32).sqrt();
        let weight = rng.normals(experts * hidden).iter().map(|x| x * spread).collect();
        let (bias, correction) = match routing.score {
            RouterScore::Softmax => (Some(rng.normals(experts)), None),
            RouterScore::Sigmoid => (None, Some(rng.normals(experts).iter().map(|x| 0.3 * x).collect())),
        };
        Self { routing, weight, bias, correction }
    }

    fn load<B: Backend>(&self, backend: &B) -> B::Router {
        let Self { routing, weight, bias, correction } = self;
        let (bias, correction) = (bias.as_deref(), correction.as_deref());
        backend.load_router(&RouterWeights { routing: *routing, weight, bias, correction }).expect("a router")
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Reads {
    Logits,
    Experts,
    Weights,
}

struct Route<'a> {
    router: &'a Router,
    /// `[T, hidden]`.
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    reads: Reads,
}

impl Case for Route<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let routing = &self.router.routing;
        let hidden = self.router.weight.len() / routing.experts;
        let tokens = self.x.len() / hidden;
        let router = self.router.load(backend);
        let mut encoder = backend.encoder(&limits(tokens, hidden)).expect("an encoder");
        // Room for more tokens than there are.
        let mut routes = backend.routes(routing, tokens + 3, hidden).expect("routes");
        let norm = self.norm.as_ref().map(|norm| backend.load_vector(norm).expect("a vector"));
        for x in [&vec![f32::NAN; self.x.len()], &self.x] {
            let x = upload(backend, hidden, x);
            encoder.route(input(&x, norm.as_ref()), &router, &mut routes);
            encoder.submit().expect("a submission");
        }
        let mut found = HostRoutes::default();
        encoder.read_routes(&mut routes, &mut found).expect("routes");
        match self.reads {
            Reads::Logits => found.logits,
            Reads::Experts => found.experts.iter().map(|&expert| expert as f32).collect(),
            Reads::Weights => found.weights,
        }
    }
}

const NORM_EPS: f32 = 1e-6;

fn input<'a, B: Backend>(x: &'a B::Buffer, norm: Option<&'a B::Vector>) -> Input<'a, B> {
    match norm {
        None => Input::Rows(x),
        Some(weight) => Input::Normed { x, weight, eps: NORM_EPS },
    }
}

/// Sizes of matrices of these schemes.
fn sizes(schemes: &[Scheme]) -> impl Iterator<Item = [usize; 2]> {
    SIZES.into_iter().filter(move |[k, _]| schemes.iter().all(|scheme| has_columns(scheme, *k)))
}

/// Experts of `parts` matrices `[n, k]` with biases, whose schemes take turns.
fn experts(schemes: &[Scheme], count: usize, parts: usize, n: usize, k: usize, rng: &mut Rng) -> Group {
    let scheme = |expert: usize| schemes[expert % schemes.len()];
    (0..count).map(|e| (0..parts).map(|_| with_bias(random(scheme(e), n, k, rng), rng)).collect()).collect()
}

type Group = Vec<Vec<LinearPart<'static>>>;

fn load_group<B: Backend>(backend: &B, group: &Group) -> B::LinearGroup {
    let linears = group.iter().map(|parts| backend.load_linear(parts).expect("matrices that fit together")).collect();
    backend.group_linears(linears).expect("linears of one shape")
}

fn gated<B: Backend>(device: &Device<B>, schemes: &[Scheme]) -> Result<(), String> {
    let mut rng = Rng(32);
    for (i, [k, n]) in sizes(schemes).enumerate() {
        let routing = [PLAIN, GROUPED][i % 2];
        let activation = Activation::ALL[i % Activation::ALL.len()];
        let group = experts(schemes, routing.all_experts(), 2, n, k, &mut rng);
        for tokens in [TOKENS[i % TOKENS.len()], TOKENS[(i + 1) % TOKENS.len()]] {
            let router = Router::new(routing, k, &mut rng);
            let scale = input_scale(&group);
            let norm = (i % 2 == 1).then(|| (0..k).map(|_| scale * (0.5 + rng.uniform())).collect());
            let x = rng.normals(tokens * k).iter().map(|x| scale * x).collect();
            let case = Gated { router, group: &group, x, norm, activation };
            let bound = 4.0 * PRODUCT * device.bounds.linear * (1.0 + 10.0 / (tokens * n) as f64);
            device.check(&case, bound, &format!("{tokens} tokens, n={n},k={k},{activation:?}"))?;
        }
    }
    Ok(())
}

/// What makes sums about as large as where activations bend and clamp: far beyond, a gate's error decides between all and nothing.
fn input_scale(group: &Group) -> f32 {
    let parts = group.iter().flatten();
    let square = parts.map(|part| mean_square(part.weight.decode().into_iter().map(f64::from)));
    let largest = square.fold(0.0, f64::max) * group[0][0].weight.cols as f64;
    (4.0 / largest.sqrt()) as f32
}

/// The rows of all pairs of token and expert.
struct Gated<'a> {
    router: Router,
    group: &'a Group,
    /// `[T, k]`.
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    activation: Activation,
}

impl Case for Gated<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let routing = &self.router.routing;
        let weight = &self.group[0][0].weight;
        let (n, k) = (weight.rows, weight.cols);
        let tokens = self.x.len() / k;
        let (router, group) = (self.router.load(backend), load_group(backend, self.group));
        let mut encoder = backend.encoder(&limits(tokens, k.max(n))).expect("an encoder");
        let mut routes = backend.routes(routing, tokens, k.max(n)).expect("routes");
        let norm = self.norm.as_ref().map(|norm| backend.load_vector(norm).expect("a vector"));
        let rows = tokens * routing.slots();
        let mut out = poisoned(backend, rows, n);
        for x in [&vec![f32::NAN; self.x.len()], &self.x] {
            let x = upload(backend, k, x);
            encoder.route(input(&x, norm.as_ref()), &router, &mut routes);
            encoder.expert_gated(input(&x, norm.as_ref()), &mut routes, &group, self.activation, &mut out);
            encoder.submit().expect("a submission");
        }
        read::<B>(&mut encoder, &out, rows * n)
    }
}

fn combine<B: Backend>(device: &Device<B>, schemes: &[Scheme]) -> Result<(), String> {
    let mut rng = Rng(33);
    for (i, [k, n]) in sizes(schemes).enumerate() {
        let routing = [GROUPED, PLAIN][i % 2];
        let group = experts(schemes, routing.all_experts(), 1, n, k, &mut rng);
        for tokens in [TOKENS[i % TOKENS.len()], TOKENS[(i + 2) % TOKENS.len()]] {
            let case = Combine {
                router: Router::new(routing, n, &mut rng),
                group: &group,
                x: rng.normals(tokens * routing.slots() * k),
                residual: rng.normals(tokens * n),
            };
            let bound = 4.0 * device.bounds.linear * (1.0 + 10.0 / (tokens * n) as f64);
            device.check(&case, bound, &format!("{tokens} tokens, n={n},k={k}"))?;
        }
    }
    Ok(())
}

/// The weighted sums of experts, added to the rows that chose them.
struct Combine<'a> {
    router: Router,
    group: &'a Group,
    /// `[T · slots, k]`.
    x: Vec<f32>,
    /// `[T, n]`.
    residual: Vec<f32>,
}

impl Case for Combine<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let routing = &self.router.routing;
        let weight = &self.group[0][0].weight;
        let (n, k) = (weight.rows, weight.cols);
        let tokens = self.residual.len() / n;
        let (router, group) = (self.router.load(backend), load_group(backend, self.group));
        let mut encoder = backend.encoder(&limits(tokens * routing.slots(), k.max(n))).expect("an encoder");
        let mut routes = backend.routes(routing, tokens, k.max(n)).expect("routes");
        let mut out = upload(backend, n, &self.residual);
        for (x, residual) in [(&vec![f32::NAN; self.x.len()], false), (&self.x, true)] {
            let x = upload(backend, k, x);
            if residual {
                backend.upload(&mut out, tokens, &self.residual).expect("as many values");
            }
            encoder.route(Input::Rows(&out), &router, &mut routes);
            encoder.expert_combine(&x, &mut routes, &group, &mut out);
            encoder.submit().expect("a submission");
        }
        read::<B>(&mut encoder, &out, tokens * n)
    }
}

/// Many tokens for each expert: tiles of 64 rows and more.
fn many<B: Backend>(device: &Device<B>, scheme: Scheme) -> Result<(), String> {
    let mut rng = Rng(34);
    let routing = Routing { experts: 3, ..PLAIN };
    for (k, n, tokens) in [(68, 36, 150), (128, 66, 40)] {
        let group = experts(&[scheme], routing.all_experts(), 2, n, k, &mut rng);
        let router = Router::new(routing, k, &mut rng);
        let x = rng.normals(tokens * k);
        let case = Gated { router, group: &group, x, norm: None, activation: Activation::Silu };
        let bound = 4.0 * PRODUCT * device.bounds.linear;
        device.check(&case, bound, &format!("gated, {tokens} tokens, n={n},k={k}"))?;
        let group = experts(&[scheme], routing.all_experts(), 1, n, k, &mut rng);
        let case = Combine {
            router: Router::new(routing, n, &mut rng),
            group: &group,
            x: rng.normals(tokens * routing.slots() * k),
            residual: rng.normals(tokens * n),
        };
        device.check(&case, 4.0 * device.bounds.linear, &format!("combined, {tokens} tokens, n={n},k={k}"))?;
    }
    Ok(())
}

/// A layer's feed-forward block: what one operation leaves is what the next one reads.
fn layer<B: Backend>(device: &Device<B>, scheme: Scheme) -> Result<(), String> {
    let mut rng = Rng(35);
    for (routing, hidden, width) in [(PLAIN, 64, 96), (GROUPED, 128, 64), (GROUPED, 96, 36)] {
        for tokens in [1, 2, 5, 33] {
            let case = Layer {
                router: Router::new(routing, hidden, &mut rng),
                gate_up: experts(&[scheme], routing.all_experts(), 2, width, hidden, &mut rng),
                down: experts(&[scheme], routing.all_experts(), 1, hidden, width, &mut rng),
                x: rng.normals(tokens * hidden),
            };
            let bound = 16.0 * PRODUCT * device.bounds.linear;
            device.check(&case, bound, &format!("{tokens} tokens of {hidden}, experts of {width}"))?;
        }
    }
    Ok(())
}

/// `out += experts(norm(x))`, twice.
struct Layer {
    router: Router,
    gate_up: Group,
    down: Group,
    /// `[T, hidden]`.
    x: Vec<f32>,
}

impl Case for Layer {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let routing = &self.router.routing;
        let weight = &self.gate_up[0][0].weight;
        let (width, hidden) = (weight.rows, weight.cols);
        let tokens = self.x.len() / hidden;
        let router = self.router.load(backend);
        let (gate_up, down) = (load_group(backend, &self.gate_up), load_group(backend, &self.down));
        let norm = backend.load_vector(&vec![1.0; hidden]).expect("a vector");
        let mut encoder = backend.encoder(&limits(tokens * routing.slots(), hidden.max(width))).expect("an encoder");
        let mut routes = backend.routes(routing, tokens, hidden.max(width)).expect("routes");
        let mut gated = poisoned(backend, tokens * routing.slots(), width);
        let mut out = upload(backend, hidden, &vec![0.0; self.x.len()]);
        let x = upload(backend, hidden, &self.x);
        for _ in 0..2 {
            encoder.route(input(&x, Some(&norm)), &router, &mut routes);
            encoder.expert_gated(input(&x, Some(&norm)), &mut routes, &gate_up, Activation::Silu, &mut gated);
            encoder.expert_combine(&gated, &mut routes, &down, &mut out);
        }
        read::<B>(&mut encoder, &out, self.x.len())
    }
}

fn head_linear<B: Backend>(device: &Device<B>, scheme: Scheme) -> Result<(), String> {
    let mut rng = Rng(36);
    for (heads, k, n, beyond) in
        [(3, 32, 17, [0, 0]), (5, 64, 32, [8, 24]), (2, 128, 9, [64, 0]), (20, 192, 40, [64, 64])]
    {
        check_heads(device, scheme, heads, [k, n], beyond, &[1, 9, [4, 33][heads % 2]], &mut rng)?;
    }
    Ok(())
}

/// Tokens that fill tiles of 32 rows and more.
fn many_heads<B: Backend>(device: &Device<B>, scheme: Scheme) -> Result<(), String> {
    let mut rng = Rng(37);
    check_heads(device, scheme, 3, [68, 36], [4, 0], &[17, 40, 130], &mut rng)
}

/// Checks heads of `[n, k]`, in stretches of input and output that are so much wider.
fn check_heads<B: Backend>(
    device: &Device<B>,
    scheme: Scheme,
    heads: usize,
    [k, n]: [usize; 2],
    [beyond_k, beyond_n]: [usize; 2],
    tokens: &[usize],
    rng: &mut Rng,
) -> Result<(), String> {
    let group: Group = (0..heads).map(|_| vec![LinearPart { weight: random(scheme, n, k, rng), bias: None }]).collect();
    for &tokens in tokens {
        let x = rng.normals(tokens * heads * (k + beyond_k));
        let kept = rng.normals(tokens * heads * (n + beyond_n));
        let case = Heads { group: &group, tokens, x, kept };
        let bound = 2.0 * device.bounds.linear * (1.0 + 10.0 / (tokens * heads * n) as f64);
        let what = format!("{heads} heads, {tokens} tokens, n={n}+{beyond_n},k={k}+{beyond_k}");
        device.check(&case, bound, &what)?;
    }
    Ok(())
}

struct Heads<'a> {
    group: &'a Group,
    tokens: usize,
    /// `[T, heads · (K and more)]`.
    x: Vec<f32>,
    /// What the output holds before, `[T, heads · (N and more)]`.
    kept: Vec<f32>,
}

impl Case for Heads<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let (heads, tokens) = (self.group.len(), self.tokens);
        let (width, out_width) = (self.x.len() / tokens, self.kept.len() / tokens);
        let group = load_group(backend, self.group);
        let mut encoder = backend.encoder(&limits(tokens * heads, width.max(out_width))).expect("an encoder");
        let mut out = upload(backend, out_width, &self.kept);
        for x in [&vec![f32::NAN; self.x.len()], &self.x] {
            let x = upload(backend, width, x);
            encoder.head_linear(&x, &group, &mut out);
            encoder.submit().expect("a submission");
        }
        read::<B>(&mut encoder, &out, self.kept.len())
    }
}
