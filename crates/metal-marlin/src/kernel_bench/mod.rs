//! Measures kernels one by one, beside what the device reaches with the simplest ones.
//!
//! A linear of few rows is bound by reading its weights, one of many rows by arithmetic; attention by reading the KV cache or by
//! arithmetic. Weights and caches rotate among copies that no cache holds. Before and after each group of kernels a probe tells how fast
//! memory is read, and whether the clock has changed in between.

mod attention;
mod experts;
mod layer;
mod linear;
mod output;
mod threads;
mod timer;

use marlin_format::FormatError;
use marlin_kernels::{Backend, DeviceInfo, KernelError};

use crate::device::Device;
use crate::stats::Spread;

use self::attention::AttentionGroup;
use self::experts::ExpertsGroup;
use self::layer::LayerGroup;
use self::linear::LinearGroup;
use self::threads::ThreadsGroup;
use self::timer::{Rates, Timed};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Only kernels whose name contains one of these; all if there are none.
    pub filters: Vec<String>,
    /// How often each is repeated, at least once.
    pub repetitions: usize,
    /// Small matrices and short contexts: whether it works, not how fast.
    pub quick: bool,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum KernelBenchError {
    /// The filter leaves nothing.
    #[error("no kernel's name contains `{filter}`; names are like {example}")]
    Nothing {
        /// The filter.
        filter: String,
        /// A name.
        example: String,
    },
    /// A format has no random matrices.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The device failed, or has too little memory.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Memory bandwidth, or rayon's fork-joins, cannot be measured.
    #[error("cannot start threads to measure with")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// Kernels that were measured.
#[derive(Debug, Clone)]
pub struct Report {
    device: DeviceInfo,
    repetitions: usize,
    groups: Vec<Group>,
}

/// Kernels of one format and size, between two probes.
#[derive(Debug, Clone)]
struct Group {
    name: String,
    before: Rates,
    after: Rates,
    measurements: Vec<Measurement>,
}

/// A kernel, or what a model asks for by one call.
#[derive(Debug, Clone)]
struct Measurement {
    name: String,
    /// Seconds that one run takes.
    seconds: Spread,
    /// Of kernels.
    work: Option<Work>,
    /// Of experts, how often weights that must be read are read.
    reads: Option<f64>,
}

/// What one run must do, at least.
#[derive(Debug, Clone, Copy)]
struct Work {
    /// Bytes of packed weights or of cached keys and values.
    bytes: f64,
    /// Multiplications and additions.
    operations: f64,
}

/// A group before it is measured.
trait Plans<B: Timed> {
    /// What its cases' names begin with.
    fn name(&self) -> String;

    /// The names of its cases, after the group's.
    fn cases(&self) -> Vec<String>;

    /// Measures those cases that `is_wanted`; each calls `done`.
    fn measure(&self, bench: &Bench<'_, B>, done: &mut dyn FnMut()) -> Result<Vec<Measurement>, KernelBenchError>;
}

/// What all groups share.
struct Bench<'a, B> {
    backend: &'a B,
    plan: &'a Plan,
}

impl<B: Backend> Bench<'_, B> {
    fn is_wanted(&self, name: &str) -> bool {
        self.plan.filters.is_empty() || self.plan.filters.iter().any(|filter| name.contains(filter))
    }

    /// Bytes that rotating weights and caches take together, so that no cache holds them.
    fn rotated_bytes(&self) -> usize {
        if self.plan.quick { 4 << 20 } else { 256 << 20 }
    }
}

/// Measures the kernels of a device. `progress` hears how many of how many are done.
///
/// # Errors
/// The filter leaves nothing, or the device fails or has too little memory.
pub fn run(device: &Device, plan: &Plan, progress: &mut dyn FnMut(usize, usize)) -> Result<Report, KernelBenchError> {
    match device {
        Device::Cpu(backend) => run_on(backend, plan, progress),
        Device::Gpu { backend, .. } => run_on(backend, plan, progress),
    }
}

fn run_on<B: Timed>(
    backend: &B,
    plan: &Plan,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report, KernelBenchError> {
    let bench = Bench { backend, plan };
    let all = groups(backend, plan);
    let cases = |group: &dyn Plans<B>| group.cases().into_iter().map(|case| full_name(&group.name(), &case)).collect();
    let names: Vec<Vec<String>> = all.iter().map(|group| cases(&**group)).collect();
    let total = names.iter().flatten().filter(|name| bench.is_wanted(name)).count();
    if total == 0 {
        let filter = plan.filters.join(",");
        let example = names.iter().flatten().next().cloned().unwrap_or_default();
        return Err(KernelBenchError::Nothing { filter, example });
    }
    let mut done = 0;
    let mut probe = backend.probe(plan.quick)?;
    let mut groups = Vec::new();
    for (group, names) in all.iter().zip(&names) {
        if !names.iter().any(|name| bench.is_wanted(name)) {
            continue;
        }
        let before = backend.rates(&mut probe)?;
        let measurements = group.measure(&bench, &mut || {
            done += 1;
            progress(done, total);
        })?;
        groups.push(Group { name: group.name(), before, after: backend.rates(&mut probe)?, measurements });
    }
    Ok(Report { device: backend.info(), repetitions: plan.repetitions, groups })
}

fn groups<B: Timed>(backend: &B, plan: &Plan) -> Vec<Box<dyn Plans<B>>> {
    let linears = LinearGroup::all(plan.quick).into_iter().map(|group| Box::new(group) as Box<dyn Plans<B>>);
    let attention = AttentionGroup::all(plan.quick).into_iter().map(|group| Box::new(group) as Box<dyn Plans<B>>);
    let layers = LayerGroup::all(plan.quick).into_iter().map(|group| Box::new(group) as Box<dyn Plans<B>>);
    let experts = ExpertsGroup::all(plan.quick).into_iter().map(|group| Box::new(group) as Box<dyn Plans<B>>);
    let threads = backend.threads().map(|threads| Box::new(ThreadsGroup(threads.clone())) as Box<dyn Plans<B>>);
    linears.chain(layers).chain(experts).chain(attention).chain(threads).collect()
}

fn full_name(group: &str, case: &str) -> String {
    format!("{group}/{case}")
}
