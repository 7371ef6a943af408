//! Single layers on rows of plain memory, as another framework has them: no decoder around, no buffers of ours.

use super::linear::{Activations, Epilogue};
use super::{CpuBackend, CpuLinear, CpuLinearGroup, CpuRoutes, NAME};
use crate::host::allocate;
use crate::{Activation, Backend, KernelError, RouterScore, Routing};

/// Scratch memory of rows that are multiplied together, about. A row's results do not depend on what else is in a step, so many rows
/// are as well multiplied some at a time.
const SCRATCH_BYTES: usize = 16 << 20;
/// Rows of a step at most: with more, weights are not read less often per row by any measure.
const MOST_ROWS: usize = 512;

/// Runs linears and experts of a [`CpuBackend`] one at a time. Its scratch memory grows to the widest layer met and is used by all.
#[derive(Debug)]
pub struct CpuLayers {
    backend: CpuBackend,
    activations: Activations,
    /// What the gated half of experts gives, `[tokens · slots, width]`.
    gated: Vec<f32>,
    routes: Option<RoutesRoom>,
}

/// Routes, and what they were made for.
#[derive(Debug)]
struct RoutesRoom {
    experts: usize,
    slots: usize,
    tokens: usize,
    width: usize,
    routes: CpuRoutes,
}

/// The experts of each token of a step and their weights, `[tokens, slots]`.
#[derive(Debug, Clone, Copy)]
pub struct Assigned<'a> {
    /// Numbers of experts.
    pub experts: &'a [u32],
    /// What each one's result is multiplied by.
    pub weights: &'a [f32],
    /// Experts of a token.
    pub slots: usize,
}

impl CpuLayers {
    /// Takes no memory until a layer is run.
    ///
    /// # Errors
    /// There is no memory at all.
    pub fn new(backend: &CpuBackend) -> Result<Self, KernelError> {
        Ok(Self { backend: backend.clone(), activations: Activations::new(0, 0)?, gated: Vec::new(), routes: None })
    }

    /// `out = x · Wᵀ + bias` for `x`, `[rows, K]`, and `out`, `[rows, N]`.
    ///
    /// # Errors
    /// `x` or `out` is no such matrix, or there is no memory.
    pub fn linear(&mut self, x: &[f32], linear: &CpuLinear, out: &mut [f32]) -> Result<(), KernelError> {
        let (cols, width) = (linear.0.cols(), linear.0.rows());
        let rows = check_rows(x, cols, out, width)?;
        let step = steps_of(rows, cols);
        self.reserve(step, cols)?;
        for (x, out) in x.chunks(step * cols).zip(out.chunks_mut(step * width)) {
            let rows = x.len() / cols;
            linear.0.apply(x, rows, out, Epilogue::Store, &mut self.activations, &self.backend.threads);
        }
        Ok(())
    }

    /// `out[t] = Σ weight · down(activation(gate(x[t])) ⊙ up(x[t]))` over the experts of each token, for `x` and `out` of
    /// `[tokens, hidden]`. `gate_up` has two parts for each expert, `down` one.
    ///
    /// # Errors
    /// Sizes do not fit, there is no such expert, or there is no memory.
    pub fn experts(
        &mut self,
        x: &[f32],
        assigned: Assigned<'_>,
        gate_up: &CpuLinearGroup,
        activation: Activation,
        down: &CpuLinearGroup,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        let (experts, slots) = (gate_up.0.len(), assigned.slots);
        let (hidden, width) = (gate_up.0.cols(), down.0.cols());
        let [gate, up] = *gate_up.0.part_rows() else { return Err(not_gated(gate_up.0.part_rows())) };
        if [gate, up] != [width; 2] || down.0.part_rows() != [hidden] || down.0.len() != experts {
            return Err(not_gated(gate_up.0.part_rows()));
        }
        let tokens = check_rows(x, hidden, out, hidden)?;
        for found in [assigned.experts.len(), assigned.weights.len()] {
            if tokens.checked_mul(slots) != Some(found) {
                let problem =
                    format!("{tokens} tokens with {slots} experts each, but {found} numbers or weights of experts");
                return Err(KernelError::Device(problem));
            }
        }
        out.fill(0.0);
        if tokens == 0 || slots == 0 {
            return Ok(());
        }
        let step = steps_of(tokens, hidden.max(width).saturating_mul(slots));
        self.reserve(step, hidden)?;
        self.reserve_routes(experts, slots, step, hidden.max(width))?;
        if self.gated.len() < step * slots * width {
            self.gated = allocate("the gated values of experts", &[step, slots, width], NAME)?;
        }
        let Self { backend, activations, gated, routes: Some(RoutesRoom { routes, .. }), .. } = self else {
            return Ok(());
        };
        let pairs = assigned.experts.chunks(step * slots).zip(assigned.weights.chunks(step * slots));
        for ((x, out), (experts, weights)) in x.chunks(step * hidden).zip(out.chunks_mut(step * hidden)).zip(pairs) {
            routes.assign(experts, weights)?;
            let sorted = routes.sorted_for(gate_up.0.len());
            let gated = &mut gated[..experts.len() * width];
            gate_up.0.gated(x, sorted, activation, gated, activations, &backend.threads);
            down.0.combine(gated, sorted, out, &mut routes.activations(), &backend.threads);
        }
        Ok(())
    }

    fn reserve(&mut self, rows: usize, cols: usize) -> Result<(), KernelError> {
        if self.activations.room(cols) < rows {
            self.activations = Activations::new(rows, cols)?;
        }
        Ok(())
    }

    fn reserve_routes(&mut self, experts: usize, slots: usize, tokens: usize, width: usize) -> Result<(), KernelError> {
        let is_enough = self.routes.as_ref().is_some_and(|room| {
            (room.experts, room.slots) == (experts, slots) && room.tokens >= tokens && room.width >= width
        });
        if !is_enough {
            // What chooses experts is of no account: they are given.
            let routing = Routing {
                experts,
                top_k: slots,
                shared: 0,
                score: RouterScore::Softmax,
                groups: 1,
                top_groups: 1,
                normalize: false,
                scale: 1.0,
            };
            self.routes = None;
            let routes = self.backend.routes(&routing, tokens, width)?;
            self.routes = Some(RoutesRoom { experts, slots, tokens, width, routes });
        }
        Ok(())
    }
}

/// Rows of a step, of so many values each.
fn steps_of(rows: usize, values: usize) -> usize {
    let row_bytes = Activations::bytes(1, values).max(1);
    rows.min(MOST_ROWS).min(SCRATCH_BYTES / row_bytes).max(1)
}

/// The rows of `x`, `[rows, cols]`, of which there are as many in `out`, `[rows, width]`.
fn check_rows(x: &[f32], cols: usize, out: &[f32], width: usize) -> Result<usize, KernelError> {
    let rows = x.len() / cols.max(1);
    if x.len() != rows * cols || out.len() != rows * width {
        let [x, out] = [x.len(), out.len()];
        let problem = format!("{x} values are not rows of {cols}, or {out} values not as many rows of {width}");
        return Err(KernelError::Device(problem));
    }
    Ok(rows)
}

fn not_gated(parts: &[usize]) -> KernelError {
    KernelError::Device(format!(
        "experts need a gate and an up of equal size, and a down that takes their output back; found parts of {parts:?} rows"
    ))
}

#[cfg(test)]
mod tests {
    use marlin_format::Format;

    use super::*;
    use crate::conformance::matrices;
    use crate::conformance::support::{Rng, limits};
    use crate::cpu::{Arithmetic, CpuOptions};
    use crate::{Encoder, Input, LinearPart};

    const COLS: usize = 72;
    const ROWS: usize = 40;

    fn backend(arithmetic: Arithmetic) -> CpuBackend {
        CpuBackend::new(CpuOptions { threads: Some(2), arithmetic, simd: None }).unwrap()
    }

    fn linear(backend: &CpuBackend, shapes: &[[usize; 2]], rng: &mut Rng) -> CpuLinear {
        let scheme = Format::Int8.scheme(None).unwrap();
        let part = |&[rows, cols]: &[usize; 2], rng: &mut Rng| LinearPart {
            weight: matrices::random(scheme, rows, cols, rng),
            bias: Some(rng.normals(rows)),
        };
        backend.load_linear(&shapes.iter().map(|shape| part(shape, rng)).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn linears_are_those_of_an_encoder() {
        for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
            let (backend, mut rng) = (backend(arithmetic), Rng(3));
            let mut layers = CpuLayers::new(&backend).unwrap();
            let linear = linear(&backend, &[[ROWS, COLS]], &mut rng);
            // More rows than a step has, then fewer.
            for m in [1, 3, MOST_ROWS + 5, 2, 0] {
                let x = rng.normals(m * COLS);
                let mut out = vec![f32::NAN; m * ROWS];
                layers.linear(&x, &linear, &mut out).unwrap();
                let mut encoder = backend.encoder(&limits(m, COLS)).unwrap();
                let (mut rows, mut wanted) = (backend.buffer(m, COLS).unwrap(), backend.buffer(m, ROWS).unwrap());
                backend.upload(&mut rows, m, &x).unwrap();
                encoder.linear(Input::Rows(&rows), &linear, &mut wanted);
                assert!(out == wanted.values(), "{m} rows, {arithmetic:?}");
            }
        }
    }

    #[test]
    fn experts_are_sums_of_gated_linears() {
        const EXPERTS: usize = 5;
        const SLOTS: usize = 2;
        let (backend, mut rng) = (backend(Arithmetic::Exact), Rng(4));
        let mut linears =
            |shapes: &[[usize; 2]]| (0..EXPERTS).map(|_| linear(&backend, shapes, &mut rng)).collect::<Vec<_>>();
        let (gate_up, down) = (linears(&[[ROWS, COLS]; 2]), linears(&[[COLS, ROWS]]));
        let mut layers = CpuLayers::new(&backend).unwrap();
        for tokens in [1, MOST_ROWS + 3, 7] {
            let x = rng.normals(tokens * COLS);
            let experts: Vec<u32> = (0..tokens as u32).flat_map(|t| [t % 5, (t + 1 + t % 3) % 5]).collect();
            let weights = rng.normals(tokens * SLOTS);
            // What each expert makes of its tokens, token by token.
            let mut wanted = vec![0.0; tokens * COLS];
            for (pair, (&expert, weight)) in experts.iter().zip(&weights).enumerate() {
                let token = pair / SLOTS;
                let mut both = vec![0.0; 2 * ROWS];
                layers.linear(&x[token * COLS..][..COLS], &gate_up[expert as usize], &mut both).unwrap();
                let (gate, up) = both.split_at(ROWS);
                let gated: Vec<f32> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                let mut out = vec![0.0; COLS];
                layers.linear(&gated, &down[expert as usize], &mut out).unwrap();
                wanted[token * COLS..].iter_mut().zip(&out).for_each(|(sum, value)| *sum += weight * value);
            }
            let groups = [&gate_up, &down].map(|linears| {
                let parts = linears.iter().map(|linear| backend.unpack_linear(linear).unwrap());
                let again = parts.map(|parts| backend.load_linear(&parts).unwrap()).collect();
                backend.group_linears(again).unwrap()
            });
            let assigned = Assigned { experts: &experts, weights: &weights, slots: SLOTS };
            let mut out = vec![f32::NAN; tokens * COLS];
            layers.experts(&x, assigned, &groups[0], Activation::Silu, &groups[1], &mut out).unwrap();
            let largest = wanted.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            for (found, wanted) in out.iter().zip(&wanted) {
                assert!((found - wanted).abs() <= 1e-5 * largest, "{tokens} tokens: {found}, not {wanted}");
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let (backend, mut rng) = (backend(Arithmetic::Exact), Rng(5));
        let mut layers = CpuLayers::new(&backend).unwrap();
        let single = linear(&backend, &[[ROWS, COLS]], &mut rng);
        for (x, out) in [(COLS + 1, ROWS), (COLS, ROWS - 1), (COLS, 2 * ROWS)] {
            assert!(layers.linear(&vec![0.0; x], &single, &mut vec![0.0; out]).is_err(), "{x} to {out}");
        }
        let group = |linear| backend.group_linears(vec![linear]).unwrap();
        let gate_up = group(linear(&backend, &[[ROWS, COLS]; 2], &mut rng));
        let (down, other) = (group(linear(&backend, &[[COLS, ROWS]], &mut rng)), group(single));
        let (x, mut out) = (vec![0.0; COLS], vec![0.0; COLS]);
        let one = Assigned { experts: &[0], weights: &[1.0], slots: 1 };
        let silu = Activation::Silu;
        assert!(layers.experts(&x, one, &gate_up, silu, &down, &mut out).is_ok());
        assert!(layers.experts(&x, Assigned { experts: &[1], ..one }, &gate_up, silu, &down, &mut out).is_err());
        assert!(layers.experts(&x, Assigned { weights: &[], ..one }, &gate_up, silu, &down, &mut out).is_err());
        assert!(layers.experts(&x, Assigned { slots: 2, ..one }, &gate_up, silu, &down, &mut out).is_err());
        assert!(layers.experts(&x, one, &gate_up, silu, &other, &mut out).is_err());
        assert!(layers.experts(&x, one, &down, silu, &gate_up, &mut out).is_err());
    }
}
