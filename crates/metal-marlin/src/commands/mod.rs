//! One file per command: its arguments, with their help, and what it does.

use std::num::NonZeroUsize;

use marlin_checkpoint::Checkpoint;

pub(crate) mod batch;
pub(crate) mod bench;
pub(crate) mod bench_kernels;
pub(crate) mod bench_serve;
pub(crate) mod cache;
mod calibration;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod inspect;
pub(crate) mod man;
mod measure;
mod model;
mod models;
pub(crate) mod plan;
pub(crate) mod quality;
pub(crate) mod quantize;
mod recipe;
pub(crate) mod run;
mod sampling;
pub(crate) mod serve;
mod serving;
mod speculation;
mod template;
pub(crate) mod verify_kernels;

/// The commands of `metal-marlin`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Run(run::Args),
    Chat(chat::Args),
    Serve(serve::Args),
    Batch(batch::Args),
    Quantize(quantize::Args),
    Plan(plan::Args),
    Inspect(inspect::Args),
    Eval(eval::Args),
    Quality(quality::Args),
    Bench(bench::Args),
    BenchKernels(bench_kernels::Args),
    BenchServe(bench_serve::Args),
    Cache(cache::Args),
    Doctor(doctor::Args),
    VerifyKernels(verify_kernels::Args),
    Completions(completions::Args),
    Man(man::Args),
}

impl Command {
    /// Does what the command line asked for.
    pub(crate) fn execute(self) -> anyhow::Result<()> {
        match self {
            Self::Run(args) => run::run(args),
            Self::Chat(args) => chat::run(args),
            Self::Serve(args) => serve::run(args),
            Self::Batch(args) => batch::run(args),
            Self::Quantize(args) => quantize::run(args),
            Self::Plan(args) => plan::run(args),
            Self::Inspect(args) => inspect::run(args),
            Self::Eval(args) => eval::run(args),
            Self::Quality(args) => quality::run(args),
            Self::Bench(args) => bench::run(args),
            Self::BenchKernels(args) => bench_kernels::run(args),
            Self::BenchServe(args) => bench_serve::run(args),
            Self::Cache(args) => cache::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::VerifyKernels(args) => verify_kernels::run(args),
            Self::Completions(args) => completions::run(args),
            Self::Man(args) => man::run(args),
        }
    }
}

/// Says on standard error what a model folder asks for and is not followed.
fn print_notes(checkpoint: &Checkpoint) {
    for note in checkpoint.notes() {
        eprintln!("note: {}: {note}", checkpoint.name());
    }
}

/// Does `work` with rayon on this many threads, or on all cores.
fn in_pool<T: Send>(threads: Option<NonZeroUsize>, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    let threads = threads.map_or(0, NonZeroUsize::get);
    Ok(rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(work))
}
