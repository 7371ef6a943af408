//! The linears of a decoder layer as a model runs them: fused matrices, norms and gates, each waiting for the one before.

use marlin_format::{Format, Scheme};
use marlin_kernels::{Activation, Backend, Encoder, Input, LinearPart, StepLimits};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::timer::Timed;
use super::{Bench, KernelBenchError, Measurement, Plans, Work, full_name};
use crate::bench::random_matrix;

/// The sizes of a layer.
#[derive(Debug, Clone, Copy)]
struct Shape {
    name: &'static str,
    hidden: usize,
    /// Outputs of all query heads, and of all key heads, which are as many as those of values.
    heads: [usize; 2],
    intermediate: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "qwen3-4b", hidden: 2560, heads: [4096, 1024], intermediate: 9728 },
    Shape { name: "qwen3-8b", hidden: 4096, heads: [4096, 1024], intermediate: 12_288 },
];
const QUICK_SHAPES: [Shape; 1] = [Shape { name: "tiny", hidden: 256, heads: [256, 64], intermediate: 512 }];
/// Rows of input.
const ROWS: [usize; 6] = [1, 4, 8, 16, 32, 512];
const QUICK_ROWS: [usize; 2] = [1, 16];
const EPS: f32 = 1e-6;

/// The linears of layers of one shape and format.
pub(super) struct LayerGroup {
    shape: Shape,
    format: Format,
    scheme: Scheme,
    rows: &'static [usize],
}

/// What is measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Linears {
    /// Norm, queries, keys and values.
    Qkv,
    /// The projection of attention back into the residual stream.
    Output,
    /// Norm, gate and up, and down into the residual stream.
    Mlp,
    All,
}

impl Linears {
    const EACH: [Self; 4] = [Self::Qkv, Self::Output, Self::Mlp, Self::All];

    fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::Output => "output",
            Self::Mlp => "mlp",
            Self::All => "all",
        }
    }

    fn has(self, other: Self) -> bool {
        self == other || self == Self::All
    }
}

/// A layer's weights, several times so that no cache holds them, and what goes through them.
struct Layers<B: Backend> {
    qkv: Vec<B::Linear>,
    output: Vec<B::Linear>,
    gate_up: Vec<B::Linear>,
    down: Vec<B::Linear>,
    norm: B::Vector,
    residual: B::Buffer,
    heads: B::Buffer,
    attention: B::Buffer,
    gated: B::Buffer,
}

impl LayerGroup {
    /// All groups.
    pub(super) fn all(quick: bool) -> Vec<Self> {
        let (shapes, rows): (&[_], &'static [_]) = if quick { (&QUICK_SHAPES, &QUICK_ROWS) } else { (&SHAPES, &ROWS) };
        let group = |&shape: &Shape| {
            let of = move |format: Format| Some(Self { shape, format, scheme: format.scheme(None).ok()?, rows });
            [Format::Fp4, Format::Int4].into_iter().filter_map(of)
        };
        shapes.iter().flat_map(group).collect()
    }

    /// The matrices of [`Linears::Qkv`], [`Linears::Output`], and of both halves of [`Linears::Mlp`]: their rows, and columns.
    fn matrices(&self) -> [(Vec<usize>, usize); 4] {
        let Shape { hidden, heads: [queries, keys], intermediate, .. } = self.shape;
        [
            (vec![queries, keys, keys], hidden),
            (vec![hidden], queries),
            (vec![intermediate, intermediate], hidden),
            (vec![hidden], intermediate),
        ]
    }

    fn work(&self, linears: Linears, m: usize, bytes: [usize; 4]) -> Work {
        let parts = [Linears::Qkv, Linears::Output, Linears::Mlp, Linears::Mlp];
        let has = parts.map(|part| if linears.has(part) { 1.0 } else { 0.0 });
        let weights = self.matrices().map(|(rows, cols)| (rows.iter().sum::<usize>() * cols) as f64);
        let sum = |values: [f64; 4]| values.iter().zip(has).map(|(value, has)| value * has).sum::<f64>();
        Work { bytes: sum(bytes.map(|bytes| bytes as f64)), operations: 2.0 * m as f64 * sum(weights) }
    }

    fn load<B: Timed>(
        &self,
        bench: &Bench<'_, B>,
        most: usize,
        bytes: [usize; 4],
    ) -> Result<Layers<B>, KernelBenchError> {
        let backend = bench.backend;
        let copies = bench.rotated_bytes().div_ceil(bytes.iter().sum()).max(2);
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut linears = Vec::new();
        for (rows, cols) in self.matrices() {
            let part =
                |rows: usize| Ok(LinearPart { weight: random_matrix(&self.scheme, rows, cols, &mut rng)?, bias: None });
            let parts = rows.into_iter().map(part).collect::<Result<Vec<_>, KernelBenchError>>()?;
            linears.push(backend.copies(&parts, copies)?);
        }
        let [qkv, output, gate_up, down] = <[_; 4]>::try_from(linears).unwrap_or_else(|_| unreachable!("four"));
        let Shape { hidden, heads: [queries, keys], intermediate, .. } = self.shape;
        Ok(Layers {
            qkv,
            output,
            gate_up,
            down,
            norm: backend.load_vector(&vec![1.0; hidden])?,
            residual: backend.buffer(most, hidden)?,
            heads: backend.buffer(most, queries + 2 * keys)?,
            attention: backend.buffer(most, queries)?,
            gated: backend.buffer(most, intermediate)?,
        })
    }
}

impl<B: Backend> Layers<B> {
    /// Gives them so many rows of input.
    fn begin(&mut self, backend: &B, shape: Shape, m: usize) -> Result<(), KernelBenchError> {
        for (buffer, width) in [(&mut self.residual, shape.hidden), (&mut self.attention, shape.heads[0])] {
            backend.upload(buffer, m, &vec![1.0; m * width])?;
        }
        Ok(())
    }

    fn record(&mut self, encoder: &mut B::Encoder, linears: Linears, i: usize) {
        let Self { qkv, output, gate_up, down, norm, residual, heads, attention, gated } = self;
        let i = i % qkv.len();
        if linears.has(Linears::Qkv) {
            encoder.linear(Input::Normed { x: residual, weight: norm, eps: EPS }, &qkv[i], heads);
        }
        if linears.has(Linears::Output) {
            encoder.linear_add(attention, &output[i], residual);
        }
        if linears.has(Linears::Mlp) {
            let input = Input::Normed { x: residual, weight: norm, eps: EPS };
            encoder.linear_gated(input, &gate_up[i], Activation::Silu, gated);
            encoder.linear_add(gated, &down[i], residual);
        }
    }
}

impl<B: Timed> Plans<B> for LayerGroup {
    fn name(&self) -> String {
        format!("layer/{}/{}", self.format, self.shape.name)
    }

    fn cases(&self) -> Vec<String> {
        self.rows.iter().flat_map(|&m| Linears::EACH.map(|linears| case(m, linears))).collect()
    }

    fn measure(&self, bench: &Bench<'_, B>, done: &mut dyn FnMut()) -> Result<Vec<Measurement>, KernelBenchError> {
        let group = Plans::<B>::name(self);
        let mut bytes = [0; 4];
        for (bytes, (rows, cols)) in bytes.iter_mut().zip(self.matrices()) {
            *bytes = bench.backend.linear_bytes(&self.scheme, rows.iter().sum(), cols)?;
        }
        let most = self.rows.iter().copied().max().unwrap_or(1);
        let mut layers = self.load(bench, most, bytes)?;
        let mut measurements = Vec::new();
        for &m in self.rows {
            let names = Linears::EACH.map(|linears| (linears, full_name(&group, &case(m, linears))));
            let wanted: Vec<_> = names.into_iter().filter(|(_, name)| bench.is_wanted(name)).collect();
            if wanted.is_empty() {
                continue;
            }
            let Shape { hidden, heads: [queries, keys], intermediate, .. } = self.shape;
            let width = hidden.max(queries + 2 * keys).max(intermediate);
            let limits = StepLimits { tokens: m, context: m, width, vocabulary: 1, logit_rows: 0 };
            let mut encoder = bench.backend.encoder(&limits)?;
            layers.begin(bench.backend, self.shape, m)?;
            for (linears, name) in wanted {
                let seconds = bench.seconds(&mut encoder, |encoder, i| layers.record(encoder, linears, i))?;
                measurements.push(Measurement { name, seconds, work: Some(self.work(linears, m, bytes)), reads: None });
                done();
            }
        }
        Ok(measurements)
    }
}

fn case(m: usize, linears: Linears) -> String {
    format!("m={m}/{}", linears.name())
}
