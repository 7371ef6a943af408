//! `metal-marlin completions`: tab completion for shells.

use std::io::{Write, stdout};

use clap::CommandFactory;

const EXAMPLES: &str = "\
Examples:
  metal-marlin completions bash > ~/.local/share/bash-completion/completions/metal-marlin
  metal-marlin completions zsh > ~/.zfunc/_metal-marlin
  metal-marlin completions fish > ~/.config/fish/completions/metal-marlin.fish";

/// Write a script for a shell that completes commands and options
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The shell
    shell: clap_complete::Shell,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    // Into memory first: clap_complete panics where nobody reads on.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), env!("CARGO_PKG_NAME"), &mut script);
    stdout().write_all(&script)?;
    Ok(())
}
