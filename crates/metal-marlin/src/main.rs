//! The command line of Metal Marlin.

use std::io::{self, Write};
use std::panic;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use marlin_checkpoint::is_panic_caught;
use signal_hook::{consts::SIGXFSZ, flag};

mod commands;
mod interrupt;
mod progress;

/// Quantised large-language-model inference on the machine you own
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: commands::Command,
}

const EXAMPLES: &str = "\
Examples:
  metal-marlin run \"Once upon a time\"                     continue a text with the bundled model
  metal-marlin run path/to/model \"Once upon a time\"       the same with a model folder
  metal-marlin chat path/to/model                         talk with it
  metal-marlin chat Qwen/Qwen3-4B --format fp4            fetch, quantise and talk with a model of the Hub
  metal-marlin quantize path/to/model out --format fp4    write it in 4 bits
  metal-marlin eval out --text validation.txt             measure its perplexity

MODEL is a folder, or the id of a model on the Hugging Face Hub, such as Qwen/Qwen3-4B. It is fetched once;
HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE work as in the Hub's own tools. It runs as it is stored;
with --format it is quantised first, and the result is kept (`metal-marlin cache`).

`metal-marlin COMMAND --help` explains a command and shows more examples.";

fn main() -> ExitCode {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if !is_panic_caught() {
            usual(panic);
        }
    }));
    // clap prints its own messages: usage errors exit with 2, --help and --version with 0.
    let cli = Cli::parse();
    match outlive_file_limit().and_then(|()| cli.command.execute()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough (`metal-marlin run … | head`).
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

/// A file that grows beyond what the shell allows (`ulimit -f`) ends in an error instead of the program's death by a signal.
fn outlive_file_limit() -> anyhow::Result<()> {
    // That a write failed is told by its result; nobody looks at the flag.
    flag::register(SIGXFSZ, Arc::default()).context("cannot handle the signal SIGXFSZ")?;
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints an error and what caused it.
fn report(error: &anyhow::Error) {
    let mut said = error.to_string();
    let mut lines = format!("error: {said}\n");
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // Some errors end with what caused them.
        if !said.ends_with(&cause) {
            lines += &format!("  caused by: {cause}\n");
        }
        said = cause;
    }
    // There is nowhere left to report that this cannot be written.
    let _ = io::stderr().write_all(lines.as_bytes());
}
