//! Experts: which of them a token goes to, and the order in which their rows are computed.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use super::NAME;
use super::disjoint::Disjoint;
use super::linear::Activations;
use super::simd::{MOST_LANES, Simd, SimdLevel, WithSimd};
use super::threads::Threads;
use super::vector::{load, sum};
use crate::host::allocate;
use crate::routing::{Dispatch, choose};
use crate::{HostRoutes, KernelError, RouterWeights, Routing};

/// A router's weights in f32, and how it chooses.
#[derive(Debug)]
pub struct CpuRouter {
    routing: Routing,
    hidden: usize,
    /// `[E, hidden]`.
    weight: Vec<f32>,
    /// `[E]`.
    bias: Vec<f32>,
    correction: Option<Vec<f32>>,
}

/// The experts of a step's tokens, and memory to compute with them.
#[derive(Debug)]
pub struct CpuRoutes {
    routing: Routing,
    /// Most tokens of a step.
    tokens: usize,
    routes: HostRoutes,
    /// Scores, and what experts are chosen by, `[threads, 2, E]`.
    scores: Vec<f32>,
    sorted: Sorted,
    /// Of the rows between the linears of experts.
    activations: Mutex<Activations>,
}

/// Pairs of token and expert in the order of experts and, of one expert, of tokens.
#[derive(Debug)]
pub(crate) struct Sorted {
    slots: usize,
    dispatch: Dispatch,
    /// The token of each pair.
    tokens: Vec<u32>,
    /// Its expert's weight.
    weights: Vec<f32>,
    /// Experts that have rows.
    busy: Vec<Busy>,
}

/// An expert that has rows.
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
struct Busy {
    expert: usize,
    /// The work of a panel of this expert and of all before it.
    work: usize,
}

/// What it takes to bring a panel from memory and to decode it, in rows that are multiplied with it.
const PANEL_WORK: usize = 4;

impl CpuRouter {
    pub(super) fn new(router: &RouterWeights<'_>) -> Result<Self, KernelError> {
        let hidden = router.check()?;
        Ok(Self {
            routing: router.routing,
            hidden,
            weight: router.weight.to_vec(),
            bias: router.bias.map_or_else(|| vec![0.0; router.routing.experts], <[f32]>::to_vec),
            correction: router.correction.map(<[f32]>::to_vec),
        })
    }

    /// Width of the rows that it routes.
    pub(super) fn hidden(&self) -> usize {
        self.hidden
    }

    /// Chooses the experts of each row of `x`, `[m, hidden]`.
    pub(super) fn route(&self, x: &[f32], m: usize, routes: &mut CpuRoutes, simd: SimdLevel, threads: &Threads) {
        let of = |routing: &Routing| [routing.experts, routing.top_k, routing.shared];
        assert_eq!(of(&self.routing), of(&routes.routing), "routes for as many experts, of a token and shared");
        assert!(m <= routes.tokens, "{m} tokens in routes for {}", routes.tokens);
        let (experts, slots) = (self.routing.experts, self.routing.slots());
        routes.routes.logits.resize(m * experts, 0.0);
        routes.routes.experts.resize(m * slots, 0);
        routes.routes.weights.resize(m * slots, 0.0);
        self.score(x, m, &mut routes.routes.logits, simd, threads);
        self.choose(m, routes, threads);
        routes.sorted.sort(&routes.routes);
    }

    fn score(&self, x: &[f32], m: usize, logits: &mut [f32], simd: SimdLevel, threads: &Threads) {
        let out = Disjoint::new(logits);
        let (row_blocks, expert_blocks) = (m.div_ceil(ROWS), self.routing.experts.div_ceil(EXPERTS));
        threads.run(row_blocks * expert_blocks, &|task| {
            let (row, expert) = (task / expert_blocks * ROWS, task % expert_blocks * EXPERTS);
            let rows = row..m.min(row + ROWS);
            let experts = expert..self.routing.experts.min(expert + EXPERTS);
            let logits = Logits { router: self, x, rows, experts, out: &out };
            simd.dispatch(logits).expect("the backend was made for a SIMD level of this processor");
        });
    }

    fn choose(&self, m: usize, routes: &mut CpuRoutes, threads: &Threads) {
        let (experts, slots) = (self.routing.experts, self.routing.slots());
        let HostRoutes { logits, experts: chosen, weights, .. } = &mut routes.routes;
        let (scratch, chosen, weights) =
            (Disjoint::new(&mut routes.scores), Disjoint::new(chosen), Disjoint::new(weights));
        let lanes = threads.count().min(m.div_ceil(CHOICES));
        threads.run(lanes, &|lane| {
            // SAFETY: each lane has scratch memory of its own.
            let (scores, choice) = unsafe { scratch.slice(lane * 2 * experts, 2 * experts) }.split_at_mut(experts);
            for row in m * lane / lanes..m * (lane + 1) / lanes {
                // SAFETY: each row belongs to one lane.
                let (chosen, weights) =
                    unsafe { (chosen.slice(row * slots, slots), weights.slice(row * slots, slots)) };
                let (logits, correction) = (&logits[row * experts..][..experts], self.correction.as_deref());
                choose(&self.routing, logits, correction, [scores, choice], chosen, weights);
            }
        });
    }
}

/// Tokens of a task of logits, over which it reads weights once.
const ROWS: usize = 16;
/// Experts of it: one token's are many tasks.
const EXPERTS: usize = 4;
/// Tokens whose experts are chosen before it is worth waking another thread.
const CHOICES: usize = 4;

/// The logits of some tokens for some experts.
struct Logits<'a> {
    router: &'a CpuRouter,
    x: &'a [f32],
    rows: Range<usize>,
    experts: Range<usize>,
    out: &'a Disjoint<'a, f32>,
}

impl WithSimd for Logits<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (mut row, end) = (self.rows.start, self.rows.end);
        // Weights serve several tokens: as many as there are registers for.
        while S::REGISTERS >= 32 && row + 4 <= end {
            self.write::<S, 4>(simd, row);
            row += 4;
        }
        while row + 2 <= end {
            self.write::<S, 2>(simd, row);
            row += 2;
        }
        if row < end {
            self.write::<S, 1>(simd, row);
        }
    }
}

impl Logits<'_> {
    /// The logits of `T` tokens from `row` on.
    #[inline(always)]
    fn write<S: Simd, const T: usize>(&self, simd: S, row: usize) {
        let Self { router, x, experts, out, .. } = self;
        let width = router.hidden;
        // Where there are fewer experts than a tile has, the last one again.
        let mut weights = [&router.weight[..0]; EXPERTS];
        for (i, weight) in weights.iter_mut().enumerate() {
            *weight = &router.weight[(experts.start + i).min(experts.end - 1) * width..][..width];
        }
        let mut rows = [&x[..0]; T];
        for (i, x_row) in rows.iter_mut().enumerate() {
            *x_row = &x[(row + i) * width..][..width];
        }
        let sums = products::<S, T>(simd, weights, rows);
        for (i, sums) in sums.into_iter().enumerate() {
            // SAFETY: a token's logit for an expert belongs to one task.
            let out = unsafe { out.slice((row + i) * router.routing.experts + experts.start, experts.len()) };
            for ((out, lanes), bias) in out.iter_mut().zip(sums).zip(&router.bias[experts.clone()]) {
                *out = sum(simd.lanes(lanes)) + bias;
            }
        }
    }
}

/// Products of each of `T` rows with each of some weights, of which the lanes are still to be summed up. Each is the same to the bit as if
/// computed alone.
#[inline(always)]
fn products<S: Simd, const T: usize>(simd: S, weights: [&[f32]; EXPERTS], x: [&[f32]; T]) -> [[S::F32; EXPERTS]; T] {
    let pieces = x[0].len() / MOST_LANES;
    let mut weight_pieces = [&weights[0].as_chunks::<MOST_LANES>().0[..pieces]; EXPERTS];
    for e in 0..EXPERTS {
        weight_pieces[e] = &weights[e].as_chunks().0[..pieces];
    }
    let mut x_pieces = [&x[0].as_chunks::<MOST_LANES>().0[..pieces]; T];
    for t in 0..T {
        x_pieces[t] = &x[t].as_chunks().0[..pieces];
    }
    let mut sums = [[simd.splat(0.0); EXPERTS]; T];
    for i in 0..pieces {
        let mut at = 0;
        while at < MOST_LANES {
            let mut values = [simd.splat(0.0); T];
            for t in 0..T {
                values[t] = simd.load(&x_pieces[t][i][at..]);
            }
            for e in 0..EXPERTS {
                let weight = simd.load(&weight_pieces[e][i][at..]);
                for t in 0..T {
                    sums[t][e] = simd.mul_add(weight, values[t], sums[t][e]);
                }
            }
            at += S::LANES;
        }
    }
    let mut start = pieces * MOST_LANES;
    while start < x[0].len() {
        for e in 0..EXPERTS {
            let weight = load(simd, weights[e], start);
            for t in 0..T {
                sums[t][e] = simd.mul_add(weight, load(simd, x[t], start), sums[t][e]);
            }
        }
        start += S::LANES;
    }
    sums
}

impl CpuRoutes {
    /// Room for `tokens` tokens, whose experts read and write at most `width` values a row.
    pub(super) fn new(routing: &Routing, tokens: usize, width: usize, threads: &Threads) -> Result<Self, KernelError> {
        routing.check()?;
        let (experts, slots) = (routing.experts, routing.slots());
        let pairs = tokens.saturating_mul(slots);
        let what = "the routes of tokens";
        Ok(Self {
            routing: *routing,
            tokens,
            routes: HostRoutes {
                logits: allocate(what, &[tokens, experts], NAME)?,
                experts: allocate(what, &[pairs], NAME)?,
                weights: allocate(what, &[pairs], NAME)?,
                tiles: Vec::new(),
            },
            scores: allocate(what, &[threads.count(), 2, experts], NAME)?,
            sorted: Sorted {
                slots,
                dispatch: Dispatch::new(routing.all_experts(), pairs, NAME)?,
                tokens: allocate(what, &[pairs], NAME)?,
                weights: allocate(what, &[pairs], NAME)?,
                busy: allocate(what, &[routing.all_experts()], NAME)?,
            },
            activations: Mutex::new(Activations::new(pairs, width)?),
        })
    }

    /// Memory that [`CpuRoutes::new`] takes.
    pub(super) fn bytes(routing: &Routing, tokens: usize, width: usize, threads: &Threads) -> usize {
        let pairs = tokens.saturating_mul(routing.slots());
        // Logits, and scores and what experts are chosen by.
        let scores = tokens.saturating_add(2 * threads.count()).saturating_mul(routing.experts);
        // Experts and weights as they are read back, pairs and places of the sorting, tokens and weights as they are sorted.
        let values = pairs.saturating_mul(6).saturating_add(scores).saturating_add(routing.all_experts() + 1);
        let busy = routing.all_experts().saturating_mul(size_of::<Busy>());
        let activations = Activations::bytes(pairs, width);
        values.saturating_mul(size_of::<u32>()).saturating_add(busy).saturating_add(activations)
    }

    /// Routes the tokens of a step as given, instead of as a router chooses: `experts` and their `weights` are `[T, slots]`. Shared experts
    /// ([`Routing::shared`]) are given like all others. There are no logits to read back.
    ///
    /// # Errors
    /// They do not fill rows of slots, are of more tokens than there is room for, or name an expert that there is not, or that a token
    /// goes to already; routes then stay what they were.
    pub fn assign(&mut self, experts: &[u32], weights: &[f32]) -> Result<(), KernelError> {
        let (slots, all_experts) = (self.routing.slots(), self.routing.all_experts());
        let fail = |problem: String| Err(KernelError::Device(problem));
        if experts.len() != weights.len() || !experts.len().is_multiple_of(slots) {
            let (experts, weights) = (experts.len(), weights.len());
            return fail(format!(
                "routes need {slots} experts and weights a token, found {experts} and {weights} in all"
            ));
        }
        let tokens = experts.len() / slots;
        if tokens > self.tokens {
            let most = self.tokens;
            return fail(format!(
                "{tokens} tokens in routes for at most {most}; make routes for as many, or fewer a step"
            ));
        }
        for (token, experts) in experts.chunks_exact(slots).enumerate() {
            for (slot, expert) in experts.iter().enumerate() {
                if *expert as usize >= all_experts {
                    let last = all_experts - 1;
                    return fail(format!(
                        "token {token} goes to expert {expert} in slot {slot}; experts are 0 to {last}"
                    ));
                }
                if experts[..slot].contains(expert) {
                    return fail(format!("token {token} goes to expert {expert} twice; its experts must differ"));
                }
            }
        }
        let HostRoutes { logits, experts: of_tokens, weights: their_weights, .. } = &mut self.routes;
        logits.clear();
        experts.clone_into(of_tokens);
        weights.clone_into(their_weights);
        self.sorted.sort(&self.routes);
        Ok(())
    }

    /// The routes as they were chosen.
    pub(super) fn host(&self) -> &HostRoutes {
        &self.routes
    }

    /// All experts, shared ones included.
    pub(super) fn experts(&self) -> usize {
        self.routing.all_experts()
    }

    /// The pairs of token and expert, of so many experts.
    pub(super) fn sorted_for(&self, experts: usize) -> &Sorted {
        assert_eq!(experts, self.routing.all_experts(), "a linear for each expert, shared ones included");
        &self.sorted
    }

    /// Scratch memory for a row of each pair.
    pub(super) fn activations(&self) -> MutexGuard<'_, Activations> {
        self.activations.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Sorted {
    fn sort(&mut self, routes: &HostRoutes) {
        self.dispatch.sort(&routes.experts);
        self.tokens.clear();
        self.weights.clear();
        for &pair in &self.dispatch.pairs {
            self.tokens.push(pair / self.slots as u32);
            self.weights.push(routes.weights[pair as usize]);
        }
        self.busy.clear();
        let mut work = 0;
        for expert in 0..self.dispatch.offsets.len() - 1 {
            let rows = self.dispatch.of(expert).len();
            if rows > 0 {
                work += PANEL_WORK + rows;
                self.busy.push(Busy { expert, work });
            }
        }
    }

    /// Tokens of the step.
    pub(super) fn token_count(&self) -> usize {
        self.tokens.len() / self.slots
    }

    /// The token of each pair.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The weight of each pair.
    pub(super) fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Experts that have rows, rising.
    pub(super) fn busy(&self) -> impl ExactSizeIterator<Item = usize> {
        self.busy.iter().map(|busy| busy.expert)
    }

    /// The rows of an expert.
    pub(super) fn of(&self, expert: usize) -> Range<usize> {
        self.dispatch.of(expert)
    }

    /// What a task does of the work of all experts, cut into equal pieces: experts, each with some of its `panels`.
    pub(super) fn share(
        &self,
        panels: usize,
        task: usize,
        tasks: usize,
    ) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (start, end) = (self.cut(panels, task, tasks), self.cut(panels, task + 1, tasks));
        (start.0..self.busy.len().min(end.0 + 1)).map(move |i| {
            let first = if i == start.0 { start.1 } else { 0 };
            let last = if i == end.0 { end.1 } else { panels };
            (self.busy[i].expert, first..last)
        })
    }

    /// Where a task begins: a place among busy experts, and a panel.
    fn cut(&self, panels: usize, task: usize, tasks: usize) -> (usize, usize) {
        let total = self.busy.last().map_or(0, |busy| busy.work);
        let at = total * panels * task / tasks;
        let i = self.busy.partition_point(|busy| busy.work * panels <= at);
        let before = if i == 0 { 0 } else { self.busy[i - 1].work };
        let panel = self.busy.get(i).map_or(0, |busy| (at - before * panels) / (busy.work - before));
        (i, panel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::matrices;
    use crate::conformance::support::{Rng, limits};
    use crate::cpu::{CpuBackend, CpuLinearGroup, CpuOptions};
    use crate::{Activation, Backend, Encoder, HostBuffer, Input, LinearPart, RouterScore};

    const ROUTING: Routing = Routing {
        experts: 6,
        top_k: 2,
        shared: 1,
        score: RouterScore::Softmax,
        groups: 1,
        top_groups: 1,
        normalize: true,
        scale: 1.0,
    };

    fn sorted(experts: &[u32]) -> Sorted {
        let threads = Threads::new(1).unwrap();
        let mut routes = CpuRoutes::new(&ROUTING, experts.len() / 3, 40, &threads).unwrap();
        let weights = (0..experts.len()).map(|pair| pair as f32).collect();
        routes.sorted.sort(&HostRoutes { experts: experts.to_vec(), weights, ..HostRoutes::default() });
        routes.sorted
    }

    #[test]
    fn pairs_keep_their_tokens_and_weights() {
        let sorted = sorted(&[2, 0, 6, 5, 2, 6]);
        assert_eq!(sorted.tokens(), [0, 0, 1, 1, 0, 1]);
        assert_eq!(sorted.weights(), [1.0, 0.0, 4.0, 3.0, 2.0, 5.0]);
        assert_eq!(sorted.busy().collect::<Vec<_>>(), [0, 2, 5, 6]);
        assert_eq!((sorted.token_count(), sorted.of(6)), (2, 4..6));
    }

    #[test]
    fn tasks_share_every_panel_once_and_evenly() {
        // One expert has most of the rows.
        let experts: Vec<u32> = (0..40).flat_map(|token| [3, if token < 37 { 4 } else { token % 3 }, 6]).collect();
        for experts in [&experts[..3], &experts] {
            let sorted = sorted(experts);
            let work = |expert: usize| PANEL_WORK + sorted.of(expert).len();
            for (panels, tasks) in [(1, 1), (7, 3), (48, 16), (5, 15)] {
                let mut seen: Vec<(usize, usize)> = Vec::new();
                let total: usize = sorted.busy().map(|expert| work(expert) * panels).sum();
                for task in 0..tasks {
                    let share: Vec<_> = sorted.share(panels, task, tasks).collect();
                    let own: usize = share.iter().map(|(expert, panels)| work(*expert) * panels.len()).sum();
                    assert!(own <= total / tasks + work(3) + 1, "task {task} of {tasks}: {own} of {total}");
                    seen.extend(share.into_iter().flat_map(|(e, panels)| panels.map(move |panel| (e, panel))));
                }
                let all = sorted.busy().flat_map(|e| (0..panels).map(move |panel| (e, panel)));
                assert_eq!(seen, all.collect::<Vec<_>>(), "{panels} panels, {tasks} tasks");
            }
        }
    }

    const HIDDEN: usize = 40;
    const WIDTH: usize = 24;

    /// A layer of experts for [`ROUTING`], and rows that go through it.
    struct Layer {
        backend: CpuBackend,
        gate_up: CpuLinearGroup,
        down: CpuLinearGroup,
        x: HostBuffer,
    }

    impl Layer {
        fn new(tokens: usize, rng: &mut Rng) -> Self {
            let backend = CpuBackend::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
            let scheme = marlin_format::Format::Fp4.scheme(None).unwrap();
            let mut group = |parts: usize, n: usize, k: usize| {
                let mut part =
                    || LinearPart { weight: matrices::random(scheme, n, k, rng), bias: Some(rng.normals(n)) };
                let mut linear = || backend.load_linear(&(0..parts).map(|_| part()).collect::<Vec<_>>()).unwrap();
                backend.group_linears((0..ROUTING.all_experts()).map(|_| linear()).collect()).unwrap()
            };
            let (gate_up, down) = (group(2, WIDTH, HIDDEN), group(1, HIDDEN, WIDTH));
            let mut x = backend.buffer(tokens, HIDDEN).unwrap();
            backend.upload(&mut x, tokens, &rng.normals(tokens * HIDDEN)).unwrap();
            Self { backend, gate_up, down, x }
        }

        fn routes(&self, tokens: usize) -> CpuRoutes {
            self.backend.routes(&ROUTING, tokens, HIDDEN).unwrap()
        }

        /// What experts make of the rows, `[T, hidden]`.
        fn run(&self, routes: &mut CpuRoutes) -> Vec<f32> {
            let (tokens, pairs) = (self.x.rows(), self.x.rows() * ROUTING.slots());
            let mut encoder = self.backend.encoder(&limits(pairs, HIDDEN)).unwrap();
            let mut gated = self.backend.buffer(pairs, WIDTH).unwrap();
            let mut out = self.backend.buffer(tokens, HIDDEN).unwrap();
            self.backend.upload(&mut out, tokens, &vec![0.0; tokens * HIDDEN]).unwrap();
            encoder.expert_gated(Input::Rows(&self.x), routes, &self.gate_up, Activation::Silu, &mut gated);
            encoder.expert_combine(&gated, routes, &self.down, &mut out);
            out.values().to_vec()
        }
    }

    #[test]
    fn assigned_routes_do_what_those_of_a_router_do() {
        let mut rng = Rng(41);
        for tokens in [1, 2, 9, 70] {
            let layer = Layer::new(tokens, &mut rng);
            let weight = rng.normals(ROUTING.experts * HIDDEN);
            let router = RouterWeights { routing: ROUTING, weight: &weight, bias: None, correction: None };
            let router = layer.backend.load_router(&router).unwrap();
            let mut encoder = layer.backend.encoder(&limits(tokens, HIDDEN)).unwrap();
            let mut routes = layer.routes(tokens);
            encoder.route(Input::Rows(&layer.x), &router, &mut routes);
            let wanted = layer.run(&mut routes);
            let mut chosen = HostRoutes::default();
            encoder.read_routes(&mut routes, &mut chosen).unwrap();

            // Others before, and room for more tokens.
            let mut assigned = layer.routes(tokens + 2);
            assigned.assign(&[0, 1, 2, 3, 4, 5], &[1.0; 6]).unwrap();
            assigned.assign(&chosen.experts, &chosen.weights).unwrap();
            assert_eq!(layer.run(&mut assigned), wanted, "{tokens} tokens");
            let mut found = HostRoutes::default();
            encoder.read_routes(&mut assigned, &mut found).unwrap();
            assert_eq!(found, HostRoutes { logits: Vec::new(), ..chosen });
            // A router then chooses again.
            encoder.route(Input::Rows(&layer.x), &router, &mut assigned);
            assert_eq!(layer.run(&mut assigned), wanted, "{tokens} tokens, routed");
        }
    }

    #[test]
    fn no_tokens_can_be_assigned() {
        let mut routes = CpuRoutes::new(&ROUTING, 2, 40, &Threads::new(1).unwrap()).unwrap();
        routes.assign(&[0, 1, 6], &[1.0; 3]).unwrap();
        routes.assign(&[], &[]).unwrap();
        assert_eq!((routes.sorted.token_count(), routes.sorted.busy().len()), (0, 0));
    }

    #[test]
    fn routes_that_do_not_fit_are_refused_and_change_nothing() {
        let mut routes = CpuRoutes::new(&ROUTING, 2, 40, &Threads::new(1).unwrap()).unwrap();
        let right = ([0, 5, 6], [0.5, 0.25, 1.0]);
        routes.assign(&right.0, &right.1).unwrap();
        let cases: [(&[u32], usize, &str); 6] = [
            (&[0, 1], 2, "3 experts and weights a token, found 2 and 2 in all"),
            (&[0, 1, 2], 6, "found 3 and 6 in all"),
            (&[0; 9], 9, "3 tokens in routes for at most 2"),
            (&[0, 1, 6, 2, 7, 6], 6, "token 1 goes to expert 7 in slot 1; experts are 0 to 6"),
            (&[0, 1, 6, 2, 6, 2], 6, "token 1 goes to expert 2 twice"),
            (&[u32::MAX, 0, 0], 3, "token 0 goes to expert 4294967295 in slot 0"),
        ];
        for (experts, weights, problem) in cases {
            let found = routes.assign(experts, &vec![1.0; weights]).unwrap_err().to_string();
            assert!(found.contains(problem), "{found}");
            assert_eq!((&routes.routes.experts[..], &routes.routes.weights[..]), (&right.0[..], &right.1[..]));
            assert_eq!(routes.sorted.busy().collect::<Vec<_>>(), [0, 5, 6]);
        }
    }

    #[test]
    fn memory_is_told_before_it_is_taken() {
        let threads = Threads::new(3).unwrap();
        for (tokens, width) in [(1, 1), (5, 40), (64, 96)] {
            let routes = CpuRoutes::new(&ROUTING, tokens, width, &threads).unwrap();
            let HostRoutes { logits, experts, weights, .. } = &routes.routes;
            let Sorted { dispatch, tokens: of_pairs, weights: sorted, busy, .. } = &routes.sorted;
            let floats = [logits, weights, &routes.scores, sorted].map(Vec::capacity);
            let indices = [experts, &dispatch.offsets, &dispatch.pairs, &dispatch.places, of_pairs].map(Vec::capacity);
            let values = floats.iter().chain(&indices).sum::<usize>() * size_of::<u32>();
            let busy = busy.capacity() * size_of::<Busy>();
            let found = values + busy + Activations::bytes(tokens * ROUTING.slots(), width);
            assert_eq!(CpuRoutes::bytes(&ROUTING, tokens, width, &threads), found);
        }
        assert_eq!(CpuRoutes::bytes(&ROUTING, usize::MAX, 64, &threads), usize::MAX);
    }
}
