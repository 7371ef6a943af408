//! `metal-marlin doctor`: what the machine is and whether the program works on it.

use std::io::{Write, stdout};

use crate::cli::progress;
use crate::doctor;

const EXAMPLES: &str = "\
Examples:
  metal-marlin doctor
  metal-marlin doctor --json

Kernels are tried on one small matrix at every SIMD level, against the plain reference, and the
bundled model is run for a few tokens. Exits with 1 if something is broken.";

/// Report devices, memory, bandwidth and versions, and try the kernels
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let report = progress::spinner("Examining", doctor::examine);
    let text = if args.json { format!("{:#}\n", report.to_json()) } else { report.to_text() };
    stdout().write_all(text.as_bytes())?;
    let failures = report.failures();
    anyhow::ensure!(failures.is_empty(), "broken: {}; please report this with the lines above", failures.join(", "));
    Ok(())
}
