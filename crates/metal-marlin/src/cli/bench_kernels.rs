//! `metal-marlin bench-kernels`: how fast kernels run.

use std::io::{Write, stdout};
use std::num::NonZeroUsize;

use super::bench::repetitions;
use crate::DeviceOptions;
use crate::cli::progress::Bar;
use crate::kernel_bench::{self, Plan};

const EXAMPLES: &str = "\
Examples:
  metal-marlin bench-kernels --device gpu
  metal-marlin bench-kernels --device gpu --filter linear/fp4
  metal-marlin bench-kernels --device gpu:1 --filter 4096x12288/m=16 --json
  metal-marlin bench-kernels --device gpu --filter layer/fp4,attention/f16
  metal-marlin bench-kernels --device cpu --filter threads
  metal-marlin bench-kernels --device gpu --quick

Linears are measured by format, matrix (columns x rows of weights) and rows of input, one after the other
(dependent, each packing an input of its own, as in a model) and all at once (independent). GB/s counts packed
weights, of attention the keys and values that are seen. A layer is the linears of a decoder layer, each waiting for
the one before, with norms and gates as a model has them. Weights and caches rotate among copies that no cache
holds.

Fork-joins of a processor have a task for each thread, those of the pool that kernels run on beside rayon's: tasks
are empty, or wait for each other so that no thread is left out. The caller is busy before each for so long, in
which threads may fall asleep.

Before and after each group simple kernels read and copy memory, and a chain of multiply-adds tells the clock: a
group in which it moved should be measured again.";

/// Measure how fast kernels run, beside how fast the device reads memory
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, mut_arg("expert_device", |experts| experts.hide(true)))]
pub(crate) struct Args {
    #[command(flatten)]
    device: DeviceOptions,

    /// Only kernels whose name contains one of these
    #[arg(long = "filter", value_name = "TEXT,…", value_delimiter = ',')]
    filters: Vec<String>,

    /// Small matrices and short contexts, to see that it works
    #[arg(long)]
    quick: bool,

    /// How often each kernel is repeated
    #[arg(long, short, value_name = "N", default_value = "7", value_parser = repetitions)]
    repetitions: NonZeroUsize,

    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if args.device.expert_device.is_some() {
        anyhow::bail!("--expert-device places experts of a model, and bench-kernels loads none; choose a --device");
    }
    let device = args.device.open()?;
    let plan = Plan { filters: args.filters, repetitions: args.repetitions.get(), quick: args.quick };
    let report = {
        let mut bar = Bar::counting("Measuring", "kernels");
        kernel_bench::run(&device, &plan, &mut |done, total| bar.set(done as u64, total as u64))?
    };
    let text = if args.json { format!("{:#}\n", report.to_json()) } else { report.to_text() };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}
