use marlin_format::{Format, Scheme};

use crate::conformance::{Rng, limits, poisoned, random, upload};
use crate::gpu::linear::step_height;
use crate::gpu::tests::open;
use crate::gpu::{GpuArithmetic, GpuBackend, GpuCaps, GpuLinear, GpuOptions, MatrixSize};
use crate::reference::ReferenceBackend;
use crate::{
    Activation, Backend, Encoder, HostRoutes, Input, LinearPart, MemoryUse, RouterScore, RouterWeights, Routing,
};

const ROUTING: Routing = Routing {
    experts: 8,
    top_k: 3,
    shared: 1,
    score: RouterScore::Softmax,
    groups: 1,
    top_groups: 1,
    normalize: true,
    scale: 1.0,
};
const HIDDEN: usize = 256;
const WIDTH: usize = 128;

fn imaginary(caps: GpuCaps, arithmetic: GpuArithmetic) -> GpuBackend {
    GpuBackend::imaginary(caps, GpuOptions { arithmetic, ..GpuOptions::default() }).expect("a device")
}

fn linear<B: Backend>(backend: &B, parts: usize, [rows, cols]: [usize; 2], scheme: Scheme, rng: &mut Rng) -> B::Linear {
    let mut part = || LinearPart { weight: random(scheme, rows, cols, rng), bias: None };
    backend.load_linear(&(0..parts).map(|_| part()).collect::<Vec<_>>()).expect("matrices that fit together")
}

fn group<B: Backend>(backend: &B, parts: usize, shape: [usize; 2], rng: &mut Rng) -> B::LinearGroup {
    let scheme = Format::Fp4.scheme(None).expect("its usual groups");
    let linears = (0..ROUTING.all_experts()).map(|_| linear(backend, parts, shape, scheme, rng)).collect();
    backend.group_linears(linears).expect("linears of one shape")
}

/// What a layer of experts makes of some rows, and the encoder that recorded it alone.
fn layer<B: Backend>(backend: &B, tokens: usize) -> (Vec<f32>, B::Encoder) {
    let mut rng = Rng(70);
    let (gate_up, down) = (group(backend, 2, [WIDTH, HIDDEN], &mut rng), group(backend, 1, [HIDDEN, WIDTH], &mut rng));
    let weight = rng.normals(ROUTING.experts * HIDDEN);
    let router = RouterWeights { routing: ROUTING, weight: &weight, bias: None, correction: None };
    let router = backend.load_router(&router).expect("a router");
    let norm = backend.load_vector(&[1.0; HIDDEN]).expect("a vector");
    let mut routes = backend.routes(&ROUTING, tokens, HIDDEN).expect("routes");
    let mut encoder = backend.encoder(&limits(tokens, HIDDEN)).expect("an encoder");
    let mut out = upload(backend, HIDDEN, &rng.normals(tokens * HIDDEN));
    let mut gated = poisoned(backend, tokens * ROUTING.slots(), WIDTH);
    let normed = || Input::Normed { x: &out, weight: &norm, eps: 1e-5 };
    encoder.route(normed(), &router, &mut routes);
    encoder.expert_gated(normed(), &mut routes, &gate_up, Activation::Silu, &mut gated);
    encoder.expert_combine(&gated, &mut routes, &down, &mut out);
    let mut values = vec![0.0; tokens * HIDDEN];
    encoder.read(&out, &mut values).expect("rows");
    let mut found = HostRoutes::default();
    encoder.read_routes(&mut routes, &mut found).expect("routes");
    (values, encoder)
}

#[test]
fn a_layer_takes_few_kernels() {
    let caps = |matrices: Vec<MatrixSize>| GpuCaps { matrices, ..GpuCaps::apple() };
    let devices = [
        (caps(vec![]), GpuArithmetic::Exact, [5, 7, 7]),
        (caps(vec![]), GpuArithmetic::Half, [3, 7, 8]),
        (caps(vec![MatrixSize::Sixteen]), GpuArithmetic::Half, [3, 7, 8]),
    ];
    for (caps, arithmetic, wanted) in devices {
        let backend = imaginary(caps, arithmetic);
        let found = [1, 3, 300].map(|tokens| layer(&backend, tokens).1.dispatches());
        assert_eq!(found, wanted, "{arithmetic:?}, {:?}", backend.caps().matrices);
    }
}

#[test]
fn tiles_hold_what_a_small_expert_has() {
    for size in [MatrixSize::Eight, MatrixSize::Sixteen] {
        let backend = imaginary(GpuCaps { matrices: vec![size], ..GpuCaps::apple() }, GpuArithmetic::Half);
        for tokens in 1..600 {
            for [slots, experts] in [[8, 128], [2, 8], [5, 61]] {
                let height = step_height(&backend.gpu, tokens, slots, experts);
                assert!(height >= tokens.min(32), "{height} rows a tile for {tokens} tokens");
            }
        }
    }
}

#[test]
fn groups_beyond_a_binding_are_split() {
    for arithmetic in [GpuArithmetic::Exact, GpuArithmetic::Half] {
        // Less than all experts.
        let max_binding = 128 << 10;
        let Some(backend) = open(arithmetic, |caps| caps.max_binding = max_binding) else { return };
        let gate_up = group(&backend, 2, [WIDTH, HIDDEN], &mut Rng(70));
        assert!(gate_up.part_sizes().len() > 1 && gate_up.part_sizes().iter().all(|size| *size <= max_binding));
        for tokens in [1, 5, 13] {
            let (found, _) = layer(&backend, tokens);
            let (expected, _) = layer(&ReferenceBackend, tokens);
            let square =
                |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
            let error = square(&mut found.iter().zip(&expected).map(|(f, e)| f - e));
            let bound = if arithmetic == GpuArithmetic::Exact { 1e-11 } else { 1e-4 };
            assert!(error <= bound * square(&mut expected.iter().copied()), "{tokens} tokens: {error:e}");
        }
    }
}

#[test]
fn groups_and_routes_take_the_memory_they_are_planned_for() {
    for arithmetic in [GpuArithmetic::Exact, GpuArithmetic::Half] {
        let backend = imaginary(GpuCaps::apple(), arithmetic);
        let scheme = Format::Fp4.scheme(None).expect("its usual groups");
        let group = group(&backend, 1, [HIDDEN, WIDTH], &mut Rng(71));
        let planned = ROUTING.all_experts() * backend.linear_bytes(&scheme, HIDDEN, WIDTH).expect("a matrix");
        let taken = backend.memory_taken() as usize;
        // And the table of places.
        assert!((planned..planned + 256).contains(&taken), "{taken} bytes, planned {planned}");
        drop(group);
        assert_eq!(backend.memory_taken(), 0);

        let routes = backend.routes(&ROUTING, 100, HIDDEN).expect("routes");
        let (planned, taken) = (backend.routes_bytes(&ROUTING, 100, HIDDEN), backend.memory_taken() as usize);
        assert!((planned..planned + 256).contains(&taken), "{taken} bytes, planned {planned}");
        drop(routes);
    }
}

#[test]
fn what_makes_no_group_or_router_is_an_error() {
    let backend = imaginary(GpuCaps::apple(), GpuArithmetic::Half);
    let scheme = Format::Int4.scheme(None).expect("its usual groups");
    let of = |shape| linear(&backend, 1, shape, scheme, &mut Rng(72));
    let error = |linears: Vec<GpuLinear>| backend.group_linears(linears).unwrap_err().to_string();
    assert!(error(vec![]).contains("at least one linear"));
    let found = error(vec![of([8, 64]), of([8, 96])]);
    assert!(found.contains("number 1") && found.contains("64 columns") && found.contains("96 columns"), "{found}");

    let routing = Routing { experts: 2000, ..ROUTING };
    let router = RouterWeights { routing, weight: &vec![0.0; 8000], bias: None, correction: None };
    let found = backend.load_router(&router).unwrap_err().to_string();
    assert!(found.contains("at most 1024 experts, found 2001"), "{found}");
    let found = backend.routes(&ROUTING, 20_000, 64).unwrap_err().to_string();
    assert!(found.contains("20000 tokens of 4 experts each"), "{found}");
}

#[test]
fn one_token_chooses_among_more_experts_than_invocations() {
    const HIDDEN: usize = 2048;
    const WIDTH: usize = 32;
    fn gated<B: Backend>(backend: &B) -> Vec<f32> {
        let routing = Routing { experts: 160, top_k: 16, shared: 0, ..ROUTING };
        let mut rng = Rng(73);
        let scheme = Format::Fp4.scheme(None).expect("its usual groups");
        let mut of_shape = |parts, shape| {
            let linears = (0..routing.experts).map(|_| linear(backend, parts, shape, scheme, &mut rng)).collect();
            backend.group_linears(linears).expect("linears of one shape")
        };
        let (gate_up, down) = (of_shape(2, [WIDTH, HIDDEN]), of_shape(1, [HIDDEN, WIDTH]));
        let weight: Vec<f32> = rng.normals(routing.experts * HIDDEN).iter().map(|x| 0.01 * x).collect();
        let router = RouterWeights { routing, weight: &weight, bias: None, correction: None };
        let router = backend.load_router(&router).expect("a router");
        let norm = backend.load_vector(&[1.0; HIDDEN]).expect("a vector");
        let mut routes = backend.routes(&routing, 1, HIDDEN).expect("routes");
        let mut encoder = backend.encoder(&limits(1, HIDDEN)).expect("an encoder");
        let mut out = upload(backend, HIDDEN, &rng.normals(HIDDEN));
        let mut gated = poisoned(backend, routing.slots(), WIDTH);
        let normed = || Input::Normed { x: &out, weight: &norm, eps: 1e-5 };
        encoder.route(normed(), &router, &mut routes);
        encoder.expert_gated(normed(), &mut routes, &gate_up, Activation::Silu, &mut gated);
        encoder.expert_combine(&gated, &mut routes, &down, &mut out);
        let mut found = HostRoutes::default();
        encoder.read_routes(&mut routes, &mut found).expect("routes");
        found.weights
    }
    let Some(backend) = open(GpuArithmetic::Half, |_| ()) else { return };
    let (found, expected) = (gated(&backend), gated(&ReferenceBackend));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= 1e-4 * expected, "{found}, expected {expected}");
    }
}
