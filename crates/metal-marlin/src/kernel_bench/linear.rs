//! Packed linears: format × matrix × rows of input.

use marlin_format::{FOREIGN, Format, Grouping, Scheme};
use marlin_kernels::{Encoder, Input, LinearPart, StepLimits};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::timer::Timed;
use super::{Bench, KernelBenchError, Measurement, Plans, Work, full_name};
use crate::bench::random_matrix;

/// Columns and rows of weights: those of models of 8, 70 and 4 billion parameters.
const SHAPES: [[usize; 2]; 3] = [[4096, 12_288], [8192, 28_672], [2560, 9728]];
const QUICK_SHAPES: [[usize; 2]; 1] = [[256, 512]];
/// Rows of input.
const ROWS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 512, 4096];
const QUICK_ROWS: [usize; 4] = [1, 8, 16, 64];
/// Outputs that independent runs take turns at, at most, so that hardly any waits for the one that wrote to its own before; and bytes that
/// those of many rows take together.
const OUTPUTS: usize = 512;
const OUTPUT_BYTES: usize = 512 << 20;

/// Linears of one format and size.
pub(super) struct LinearGroup {
    format: String,
    scheme: Scheme,
    cols: usize,
    outputs: usize,
    rows: &'static [usize],
}

/// What runs wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Each for the one before, whose output it overwrites, and each packs an input of its own, as in a model.
    Dependent,
    /// For nothing: they share an input and have an output each.
    Independent,
}

impl Order {
    const ALL: [Self; 2] = [Self::Dependent, Self::Independent];

    fn name(self) -> &'static str {
        match self {
            Self::Dependent => "dependent",
            Self::Independent => "independent",
        }
    }
}

impl LinearGroup {
    /// All groups.
    pub(super) fn all(quick: bool) -> Vec<Self> {
        let (shapes, rows): (&[_], &[_]) = if quick { (&QUICK_SHAPES, &QUICK_ROWS) } else { (&SHAPES, &ROWS) };
        let formats = formats();
        let of_shape = |&[cols, outputs]: &[usize; 2]| {
            let group = move |(format, scheme): &(String, Scheme)| Self {
                format: format.clone(),
                scheme: *scheme,
                cols,
                outputs,
                rows,
            };
            formats.iter().map(group).collect::<Vec<_>>()
        };
        shapes.iter().flat_map(of_shape).collect()
    }
}

/// Formats by name. Those of the same arithmetic differ in nothing but the bytes that they take.
fn formats() -> Vec<(String, Scheme)> {
    let mut formats = Vec::new();
    let mut add = |name: String, scheme: Result<Scheme, _>| formats.extend(scheme.ok().map(|scheme| (name, scheme)));
    add("fp4-g32".into(), Format::Fp4.scheme(Some(Grouping::Columns(32))));
    for format in Format::ALL {
        if format != Format::F32 {
            add(format.to_string(), format.scheme(None));
        }
    }
    for format in Format::SPARSE {
        add(format!("{format}-2of4"), format.sparse_24(None));
    }
    for (name, scheme) in FOREIGN {
        add(name.into(), Ok(scheme));
    }
    formats
}

impl<B: Timed> Plans<B> for LinearGroup {
    fn name(&self) -> String {
        format!("linear/{}/{}x{}", self.format, self.cols, self.outputs)
    }

    fn cases(&self) -> Vec<String> {
        let case = |m: usize| Order::ALL.map(|order| case(m, order));
        self.rows.iter().flat_map(|&m| case(m)).collect()
    }

    fn measure(&self, bench: &Bench<'_, B>, done: &mut dyn FnMut()) -> Result<Vec<Measurement>, KernelBenchError> {
        let (cols, outputs) = (self.cols, self.outputs);
        let group = Plans::<B>::name(self);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let weight = random_matrix(&self.scheme, outputs, cols, &mut rng)?;
        let bytes = bench.backend.linear_bytes(&self.scheme, outputs, cols)?;
        let copies = bench.rotated_bytes().div_ceil(bytes).max(2);
        let linears = bench.backend.copies(&[LinearPart { weight, bias: None }], copies)?;
        let mut measurements = Vec::new();
        for &m in self.rows {
            let names = Order::ALL.map(|order| (order, full_name(&group, &case(m, order))));
            if !names.iter().any(|(_, name)| bench.is_wanted(name)) {
                continue;
            }
            let limits = StepLimits { tokens: m, context: m, width: cols, vocabulary: 1, logit_rows: 0 };
            let mut encoder = bench.backend.encoder(&limits)?;
            let values: Vec<f32> = (0..m * cols).map(|_| rng.next_u32() as i32 as f32 * (-31f32).exp2()).collect();
            let mut inputs = Vec::new();
            for _ in 0..2 {
                let mut input = bench.backend.buffer(m, cols)?;
                bench.backend.upload(&mut input, m, &values)?;
                inputs.push(input);
            }
            let count = (OUTPUT_BYTES / (m * outputs * size_of::<f32>())).clamp(2, OUTPUTS);
            let buffers = (0..count).map(|_| bench.backend.buffer(m, outputs));
            let mut outs: Vec<_> = buffers.collect::<Result<_, _>>()?;
            for (order, name) in names.into_iter().filter(|(_, name)| bench.is_wanted(name)) {
                let seconds = bench.seconds(&mut encoder, |encoder, i| {
                    let [input, out] = if order == Order::Dependent { [i % 2, 0] } else { [0, i % count] };
                    encoder.linear(Input::Rows(&inputs[input]), &linears[i % copies], &mut outs[out]);
                })?;
                let operations = 2.0 * m as f64 * cols as f64 * outputs as f64;
                measurements.push(Measurement {
                    name,
                    seconds,
                    work: Some(Work { bytes: bytes as f64, operations }),
                    reads: None,
                });
                done();
            }
        }
        Ok(measurements)
    }
}

fn case(m: usize, order: Order) -> String {
    format!("m={m}/{}", order.name())
}
