//! `metal-marlin man`: manual pages.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;

const EXAMPLES: &str = "\
Examples:
  metal-marlin man ~/.local/share/man/man1
  metal-marlin man /tmp/pages && man -l /tmp/pages/metal-marlin-run.1";

/// Write the manual, one page for each command
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder for metal-marlin.1, metal-marlin-run.1 and so on; it is made if need be
    dir: PathBuf,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    fs::create_dir_all(&args.dir)
        .and_then(|()| clap_mangen::generate_to(super::Cli::command(), &args.dir))
        .with_context(|| format!("cannot write the manual to {}", args.dir.display()))
}
