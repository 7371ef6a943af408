//! Measures how fast a model runs, beside how fast the machine reads memory and multiplies.
//!
//! A decode step reads every weight once and the whole KV cache of each of its sequences, so the rate at which memory can be read
//! bounds the rate of decoding; that of a prompt is bounded by the rate at which a processor multiplies. How near tests come to these is
//! measured in the same run.

mod error;
mod measure;
mod output;
mod plan;
mod profile;
mod random;
mod report;
mod requirements;
mod roofline;
mod shape;
mod weights;
mod work;

use std::time::Instant;

use marlin_checkpoint::Checkpoint;
use marlin_kernels::cpu::{Arithmetic, SimdLevel, default_threads};
use marlin_kernels::gpu::GpuBackend;
use marlin_quantize::Footprint;

use self::weights::{StepWeights, formats};
use crate::device::DeviceOptions;
use crate::machine::{self, AppleChip, BandwidthProbe, ComputeProbe};
use crate::memory::MemoryOptions;
use crate::{LoadError, load, tile_cache};

pub use error::BenchError;
pub use output::{OutputFormat, render};
pub use plan::{Plan, Test, usual_depths};
pub use profile::{KernelShare, Profile};
pub(crate) use random::random_matrix;
pub use random::random_model;
pub use report::{Measurement, Peak, Report};
pub use roofline::roofline;
pub use shape::Shape;
pub use work::Work;

/// Loads a checkpoint's model and runs the plan. The checkpoint is given back before the tests run, so that only the loaded
/// model is in memory. `progress` hears how many of how many repetitions are done.
///
/// # Errors
/// The plan does not fit the model or the memory, or the model cannot be loaded or run.
pub fn run(
    checkpoint: Checkpoint,
    is_random: bool,
    plan: &Plan,
    device: &DeviceOptions,
    memory: &MemoryOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report, BenchError> {
    let tests = plan.tests();
    let context = requirements::context(&checkpoint, &tests)?;
    let opened = device.open().map_err(LoadError::Device)?;
    let profiled = plan.profile.then(|| profile::device(&opened)).transpose()?;
    if let (true, Some(gpu)) = (plan.roofline, opened.gpu()) {
        return Err(BenchError::NoRoofline { device: gpu.caps().name.clone() });
    }
    let threads = device.threads.map_or_else(default_threads, usize::from);
    let mut probe = BandwidthProbe::new(threads);
    let mut peak = ComputeProbe::default();
    let mut run_probes = || {
        opened.cpu().into_iter().for_each(|cpu| peak.run(cpu));
        probe.run()
    };
    run_probes()?;
    // The probe's buffer is not the model's.
    let counts_peak = machine::reset_peak_memory();

    let (model, footprint, formats) = (checkpoint.name().to_owned(), Footprint::of(&checkpoint), formats(&checkpoint));
    let weights = StepWeights::of(&checkpoint);
    let shape = opened.planner(&checkpoint).map_err(LoadError::Model)?.shape();
    let started = Instant::now();
    let (options, memory_plan) =
        requirements::load_options(&checkpoint, &tests, context, plan.kv_type, &opened, memory)?;
    let load_model = if plan.keep { tile_cache::load_model_kept } else { load::load_model };
    let mut loaded = load_model(&checkpoint, &opened, &options)?;
    let load = started.elapsed();
    drop(checkpoint);

    let recorded = || opened.gpu().map(GpuBackend::kernels_recorded);
    let repetitions = plan.repetitions.max(1);
    let measurements = measure::run(loaded.as_mut(), &tests, repetitions, weights, &shape, &recorded, progress)?;
    let profiles = match profiled {
        Some(gpu) => profile::run(loaded.as_mut(), gpu, &tests, repetitions)?,
        None => Vec::new(),
    };
    let peak_memory = machine::peak_memory().filter(|_| counts_peak);
    let info = loaded.info().clone();
    drop(loaded);
    run_probes()?;
    Ok(Report {
        model,
        is_random,
        formats,
        footprint,
        info,
        kv_cache: memory_plan.kv_cache,
        host_bytes: memory_plan.host.map(|host| host.total()),
        threads,
        simd: SimdLevel::detect(),
        load,
        peak_memory,
        // Experts on the processor are not what its GPU reads.
        chip: opened.gpu().filter(|_| opened.offload().is_none()).and_then(|gpu| AppleChip::of_gpu(&gpu.caps().name)),
        shares_memory: opened.shares_memory(),
        read_bandwidth: probe.rate().ok_or(BenchError::Nothing)?,
        read_buffer: probe.bytes(),
        peak: peak.rate().zip(opened.cpu()).map(|(rate, cpu)| Peak { rate, numbers: numbers(cpu.arithmetic()) }),
        measurements,
        profiles,
    })
}

/// What a processor's linears multiply.
fn numbers(arithmetic: Arithmetic) -> &'static str {
    match arithmetic {
        Arithmetic::Exact => "f32",
        Arithmetic::Int8 => "int8",
    }
}
