//! `metal-marlin verify-kernels`: whether a GPU's kernels compute what they should.

use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::ensure;
use serde_json::{Value, json};

use crate::cli::progress::{self, Bar};
use crate::device::DeviceChoice;
use crate::verify::{self, MslFile, Selection};

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
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let findings = args.find()?;
    let text = if args.json { format!("{:#}\n", findings.to_json()) } else { findings.to_text() };
    stdout().write_all(text.as_bytes())?;
    findings.check()
}

/// What `--json` prints.
pub(super) fn report(args: Args) -> anyhow::Result<Value> {
    Ok(args.find()?.to_json())
}

/// What there is to say of kernels.
enum Findings {
    /// Those that were tried on a GPU.
    Tried(verify::Report),
    /// Those that were written into a folder.
    Written(PathBuf, Vec<MslFile>),
}

/// The index of a GPU, or the first.
#[derive(Debug, Clone, Copy)]
struct Adapter(Option<usize>);

impl Args {
    fn find(&self) -> anyhow::Result<Findings> {
        let selection = Selection { all: self.all, filter: self.filter.clone() };
        if let Some(folder) = &self.msl {
            let files = progress::spinner("Translating", || verify::write_msl(folder, &selection))?;
            return Ok(Findings::Written(folder.clone(), files));
        }
        let mut bar = Bar::counting("Verifying", "kernels and rows");
        let report = verify::verify(self.device.0, &selection, &mut |done, total| bar.set(done as u64, total as u64))?;
        Ok(Findings::Tried(report))
    }
}

impl Findings {
    fn to_json(&self) -> Value {
        match self {
            Self::Tried(report) => report.to_json(),
            Self::Written(_, files) => {
                let file = |file: &MslFile| json!({ "path": file.path, "faults": file.faults });
                json!({ "files": files.iter().map(file).collect::<Vec<_>>() })
            }
        }
    }

    fn to_text(&self) -> String {
        match self {
            Self::Tried(report) => report.to_text(),
            Self::Written(folder, files) => {
                let line = |file: &MslFile| format!("{}: {}\n", file.path.display(), file.faults.join("; "));
                let faulty: String = faulty(files).map(line).collect();
                format!("{faulty}{} kernels written to {}\n", files.len(), folder.display())
            }
        }
    }

    /// Whether all is well.
    fn check(&self) -> anyhow::Result<()> {
        match self {
            Self::Tried(report) => {
                let failures = report.failures().len();
                ensure!(failures == 0, "{failures} kernels or rows failed; please report this with the lines above");
            }
            Self::Written(_, files) => {
                let faulty = faulty(files).count();
                ensure!(faulty == 0, "{faulty} kernels would be slow or wrong on Metal");
            }
        }
        Ok(())
    }
}

fn faulty(files: &[MslFile]) -> impl Iterator<Item = &MslFile> {
    files.iter().filter(|file| !file.faults.is_empty())
}

/// A GPU, as `--device` names it.
fn parse_gpu(text: &str) -> Result<Adapter, String> {
    match text.parse() {
        Ok(DeviceChoice::Gpu(index)) => Ok(Adapter(index)),
        _ => Err("kernels of GPUs are verified: gpu or gpu:N".into()),
    }
}
