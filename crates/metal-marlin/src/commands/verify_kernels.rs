//! `metal-marlin verify-kernels`: whether a GPU's kernels compute what they should.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use metal_marlin::device::DeviceChoice;
use metal_marlin::verify::{self, Selection};
use serde_json::json;

use crate::progress::{self, Bar};

const EXAMPLES: &str = "\
Examples:
  metal-marlin verify-kernels
  metal-marlin verify-kernels --device gpu:1 --all
  metal-marlin verify-kernels --filter linear/fp4 --json
  metal-marlin verify-kernels --msl kernels

Each kernel is compiled for the GPU, and the conformance table is run on it: operations on random data, held
against a plain reference within bounds of the mean squared error. A line of the table is a kernel for
one format, in all its variants; its error is the one nearest to its bound among the rows that ran it.

--msl needs no GPU: it writes what Metal's compiler gets on a Mac, for every kernel, and says what in it
would be slow or wrong there.

Exits with 1 if a kernel or a row fails.";

/// Compile every GPU kernel and hold it against the reference
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The GPU: gpu for the first, gpu:1 for the second one, as `doctor` counts them
    #[arg(long, value_name = "DEVICE", default_value = "gpu", value_parser = parse_gpu)]
    device: Adapter,

    /// Try every number format and grouping, those of other programs, too, and kernels with bounds checks
    #[arg(long)]
    all: bool,

    /// Only kernels and rows of the table whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,

    /// Write kernels in Metal's language into this folder, instead of running them
    #[arg(long, value_name = "DIR", conflicts_with = "device")]
    msl: Option<PathBuf>,

    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let selection = Selection { all: args.all, filter: args.filter };
    match &args.msl {
        Some(folder) => write_msl(folder, &selection, args.json),
        None => try_kernels(args.device.0, &selection, args.json),
    }
}

/// The index of a GPU, or the first.
#[derive(Debug, Clone, Copy)]
struct Adapter(Option<usize>);

fn try_kernels(adapter: Option<usize>, selection: &Selection, as_json: bool) -> anyhow::Result<()> {
    let report = {
        let mut bar = Bar::counting("Verifying", "kernels and rows");
        verify::verify(adapter, selection, &mut |done, total| bar.set(done as u64, total as u64))?
    };
    let text = if as_json { format!("{:#}\n", report.to_json()) } else { report.to_text() };
    stdout().write_all(text.as_bytes())?;
    let failures = report.failures().len();
    anyhow::ensure!(failures == 0, "{failures} kernels or rows failed; please report this with the lines above");
    Ok(())
}

fn write_msl(folder: &Path, selection: &Selection, as_json: bool) -> anyhow::Result<()> {
    let files = progress::spinner("Translating", || verify::write_msl(folder, selection))?;
    let faulty = files.iter().filter(|file| !file.faults.is_empty());
    if as_json {
        let file = |file: &verify::MslFile| json!({ "path": file.path, "faults": file.faults });
        writeln!(stdout(), "{:#}", json!({ "files": files.iter().map(file).collect::<Vec<_>>() }))?;
    } else {
        for file in faulty.clone() {
            writeln!(stdout(), "{}: {}", file.path.display(), file.faults.join("; "))?;
        }
        writeln!(stdout(), "{} kernels written to {}", files.len(), folder.display())?;
    }
    let faulty = faulty.count();
    anyhow::ensure!(faulty == 0, "{faulty} kernels would be slow or wrong on Metal");
    Ok(())
}

/// A GPU, as `--device` names it.
fn parse_gpu(text: &str) -> Result<Adapter, String> {
    match text.parse() {
        Ok(DeviceChoice::Gpu(index)) => Ok(Adapter(index)),
        _ => Err("kernels of GPUs are verified: gpu or gpu:N".into()),
    }
}
