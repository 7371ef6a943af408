//! The program's commands, one file each: its arguments, with their help, and what it does.
//!
//! [`main`] is the program. A program of another kind has what a command finds out by [`report`], and an engine by [`open_engine`].

use std::ffi::OsString;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::panic;
use std::sync::{Arc, Once};

use anyhow::Context;
use clap::Parser;
use marlin_checkpoint::{Checkpoint, is_panic_caught};
use serde_json::Value;
use signal_hook::consts::SIGXFSZ;
use signal_hook::flag;

mod batch;
mod bench;
mod bench_kernels;
mod bench_serve;
mod cache;
mod calibration;
mod chat;
mod completions;
mod doctor;
mod draft;
mod embedded;
mod eval;
mod inspect;
mod interrupt;
mod loading;
mod man;
mod measure;
mod model;
mod models;
mod plan;
mod progress;
mod quality;
mod quantize;
mod recipe;
mod run;
mod sampling;
mod serve;
mod serving;
mod speculation;
mod template;
mod usage;
mod verify_kernels;

pub use self::embedded::{OpenedEngine, OpenedModel, open_engine};
pub use self::interrupt::{Interrupt, Interrupted};
pub use self::sampling::SamplingOptions;
pub use self::usage::UsageError;

/// Exit statuses; that of wrong usage is clap's.
const SUCCESS: u8 = 0;
const FAILURE: u8 = 1;

/// Quantised large-language-model inference on the machine you own
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
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

/// The commands of `metal-marlin`.
#[derive(Debug, clap::Subcommand)]
enum Command {
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
    /// Does what the command line asked for, and gives what `--json` would print.
    fn report(self) -> anyhow::Result<Value> {
        match self {
            Self::Quantize(args) => quantize::report(args),
            Self::Eval(args) => eval::report(args),
            Self::VerifyKernels(args) => verify_kernels::report(args),
            Self::Plan(args) => plan::report(args),
            Self::Inspect(args) => inspect::report(args),
            Self::Doctor(_) => Ok(crate::doctor::examine().to_json()),
            _ => Err(UsageError::new("this command has no report; run it as a program of its own").into()),
        }
    }

    /// Does what the command line asked for.
    fn execute(self) -> anyhow::Result<()> {
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

/// Runs the program: does what the command line `arguments` ask for, the first of which is the program's name, prints what comes of it, and
/// gives its exit status. Signals and panics are handled as suits a process that does nothing else.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    hide_caught_panics();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        // clap has messages of its own: usage errors exit with 2, --help and --version with 0.
        Err(message) => {
            // There is nowhere left to report that this cannot be written.
            let _ = message.print();
            return u8::try_from(message.exit_code()).unwrap_or(FAILURE);
        }
    };
    interrupt::begin_program();
    match outlive_file_limit().and_then(|()| cli.command.execute()) {
        Ok(()) => SUCCESS,
        // Whoever read our output has seen enough (`metal-marlin run … | head`).
        Err(error) if is_broken_pipe(&error) => SUCCESS,
        Err(error) => {
            print_error(&error);
            FAILURE
        }
    }
}

/// What a command found out, as its option `--json` prints it, of those that have a report: `quantize`, `eval`, `verify-kernels`, `plan`,
/// `inspect` and `doctor`. `arguments` are those of the command line behind the program's name. Where progress is told, `interrupt` ends the
/// work.
///
/// # Errors
/// [`UsageError`] if the arguments are wrong, [`Interrupted`], or whatever stands against the work. That kernels or the machine were found
/// broken is no error but part of the report.
pub fn report(arguments: impl IntoIterator<Item = OsString>, interrupt: &Interrupt) -> anyhow::Result<Value> {
    let cli = parse::<Cli>(arguments)?;
    interrupt::until(interrupt, || cli.command.report())
}

/// Reads arguments that somebody else than the command line's user gave.
fn parse<P: Parser>(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<P> {
    hide_caught_panics();
    let program = OsString::from(env!("CARGO_PKG_NAME"));
    Ok(P::try_parse_from(std::iter::once(program).chain(arguments)).map_err(|error| UsageError::of_clap(&error))?)
}

/// Panics that are caught and told as errors are not printed as well.
fn hide_caught_panics() {
    static HIDDEN: Once = Once::new();
    HIDDEN.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !is_panic_caught() {
                usual(panic);
            }
        }));
    });
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
fn print_error(error: &anyhow::Error) {
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

/// Says on standard error what a model folder asks for and is not followed.
fn print_notes(checkpoint: &Checkpoint) {
    for note in checkpoint.notes() {
        eprintln!("note: {}: {note}", checkpoint.name());
    }
}

/// Does `work` with rayon on this many threads, or on all cores.
fn in_pool<T: Send>(threads: Option<NonZeroUsize>, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    let threads = threads.map_or(0, NonZeroUsize::get);
    let interrupt = Interrupt::current();
    Ok(rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(|| interrupt.during(work)))
}
