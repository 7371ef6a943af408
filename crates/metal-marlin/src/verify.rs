//! Tries every kernel on a GPU: compiles all variants, runs the conformance table, and tells which rows held which kernel against the
//! reference. Also writes kernels as Metal gets them, which needs no GPU.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use marlin_format::{Format, Scheme};
use marlin_kernels::conformance::{self, ErrorFound, HEAD_DIMS, LATENT_DIMS, Outcome, Table, schemes};
use marlin_kernels::gpu::{self, GpuArithmetic, GpuBackend, GpuOptions, KernelVariant};
use marlin_kernels::{Backend, KernelError};
use rayon::prelude::*;
use serde_json::{Value, json};

/// Kernels that are compiled before progress is told.
const KERNELS_AT_ONCE: usize = 64;

const ARITHMETICS: [GpuArithmetic; 2] = [GpuArithmetic::Exact, GpuArithmetic::Half];

/// What is tried.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Every scheme of the conformance table, and kernels with bounds checks, too; otherwise our own formats in their usual groups.
    pub all: bool,
    /// Only rows, and kernels, whose name contains this.
    pub filter: Option<String>,
}

/// Why kernels cannot be tried.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The device does not open, or a kernel is not right.
    #[error(transparent)]
    Device(#[from] KernelError),
    /// A file cannot be written.
    #[error("cannot write {path}", path = .path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing is selected.
    #[error("no kernel and no row of the conformance table is called `{0}`")]
    Nothing(String),
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    device: String,
    kernels: Vec<KernelReport>,
    rows: Vec<RowReport>,
}

/// A kernel of the device.
#[derive(Debug)]
struct KernelReport {
    name: &'static str,
    formats: Vec<String>,
    variant: String,
    /// The device in one of its variants: `gpu-half`.
    label: String,
    /// How long it took to compile, or why it does not.
    compiled: Result<Duration, String>,
    /// The rows that ran it.
    rows: usize,
    /// Of them, the name of one that failed.
    failed_row: Option<String>,
    /// The error of a row that ran it, the one nearest to its bound.
    error: Option<ErrorFound>,
}

/// A row of the conformance table.
#[derive(Debug)]
struct RowReport {
    name: String,
    outcome: Outcome,
}

impl Selection {
    fn names(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter))
    }

    fn schemes(&self) -> Vec<(String, Scheme)> {
        let all = schemes();
        if self.all {
            return all;
        }
        let dense = Format::ALL.iter().map(ToString::to_string);
        let usual: BTreeSet<String> =
            dense.chain(Format::SPARSE.iter().map(|format| format!("{format}-2of4"))).collect();
        all.into_iter().filter(|(name, _)| usual.contains(name)).collect()
    }

    /// A row is not about a scheme that is not selected.
    fn has_row(&self, row: &str, schemes: &[(String, Scheme)], all: &[(String, Scheme)]) -> bool {
        let is_among = |schemes: &[(String, Scheme)], case: &str| schemes.iter().any(|(name, _)| name == case);
        let of_other = row.split('/').nth(1).is_some_and(|case| is_among(all, case) && !is_among(schemes, case));
        self.names(row) && !of_other
    }

    fn has_kernel(&self, kernel: &KernelVariant) -> bool {
        let named = |format: &String| self.names(&format!("{}/{format}", kernel.name()));
        self.names(kernel.name()) || kernel.formats().iter().any(named)
    }
}

/// Tries the kernels of a GPU, the first one if `adapter` is `None`. `progress` hears how much of how much is done.
///
/// # Errors
/// The device does not open, or nothing is selected. What fails on the device is part of the report.
pub fn verify(
    adapter: Option<usize>,
    selection: &Selection,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report, VerifyError> {
    let (all, schemes) = (schemes(), selection.schemes());
    let mut devices = Vec::new();
    let mut name = String::new();
    for arithmetic in ARITHMETICS {
        for checked in if selection.all { &[false, true][..] } else { &[false] } {
            let mut table = Table::default();
            // The times of compiling are told, so that kernels are not taken from the cache.
            let options =
                GpuOptions { adapter: adapter.into(), checked: *checked, arithmetic, ..GpuOptions::default() };
            let label = conformance::gpu_label(&options);
            let backend = table.add_gpu(options)?;
            name = backend.info().detail;
            let kernels = gpu::kernels(backend.caps(), arithmetic, &schemes, &HEAD_DIMS, &LATENT_DIMS)?;
            let rows = table.into_rows().filter(|row| selection.has_row(row.name(), &schemes, &all));
            devices.push((label, backend, kernels, rows.collect::<Vec<_>>()));
        }
    }
    let selected = |kernels: &[KernelVariant]| kernels.iter().filter(|it| selection.has_kernel(it)).count();
    let total = devices.iter().map(|(_, _, kernels, rows)| selected(kernels) + rows.len()).sum();
    if total == 0 {
        return Err(VerifyError::Nothing(selection.filter.clone().unwrap_or_default()));
    }
    let mut done = 0;
    let mut advance = || {
        done += 1;
        progress(done, total);
    };
    let mut report = Report { device: name, kernels: Vec::new(), rows: Vec::new() };
    for (label, backend, kernels, rows) in devices {
        let chosen: Vec<_> = kernels.iter().filter(|kernel| selection.has_kernel(kernel)).collect();
        // Drivers compile on the thread that asks them to.
        for some in chosen.chunks(KERNELS_AT_ONCE) {
            // A failure is found again below.
            some.par_iter().for_each(|kernel| drop(backend.compile(kernel)));
            some.iter().for_each(|_| advance());
        }
        let mut rows_of: HashMap<String, Vec<usize>> = HashMap::new();
        backend.take_used();
        for row in rows {
            let name = row.name().to_owned();
            let outcome = row.run();
            backend
                .take_used()
                .into_iter()
                .for_each(|source| rows_of.entry(source).or_default().push(report.rows.len()));
            report.rows.push(RowReport { name, outcome });
            advance();
        }
        let used = |kernel: &KernelVariant| rows_of.get(kernel.source()).map_or(&[][..], Vec::as_slice);
        let tried = kernels.iter().filter(|kernel| selection.has_kernel(kernel) || !used(kernel).is_empty());
        let tried = tried.map(|kernel| {
            let rows: Vec<&RowReport> = used(kernel).iter().map(|&row| &report.rows[row]).collect();
            KernelReport::new(&backend, &label, kernel, &rows)
        });
        let tried: Vec<KernelReport> = tried.collect();
        report.kernels.extend(tried);
    }
    Ok(report)
}

impl KernelReport {
    fn new(backend: &GpuBackend, label: &str, kernel: &KernelVariant, rows: &[&RowReport]) -> Self {
        let failed = rows.iter().find(|row| row.outcome.result.is_err());
        let errors = rows.iter().filter_map(|row| row.outcome.error);
        Self {
            name: kernel.name(),
            formats: kernel.formats().to_vec(),
            variant: kernel.variant().to_owned(),
            label: label.to_owned(),
            compiled: backend.compile(kernel).map_err(|error| error.to_string()),
            rows: rows.len(),
            failed_row: failed.map(|row| row.name.clone()),
            error: errors.reduce(|a, b| if b.is_nearer_than(&a) { b } else { a }),
        }
    }

    /// Whether it compiles, and no row that ran it failed.
    fn is_sound(&self) -> bool {
        self.compiled.is_ok() && self.failed_row.is_none()
    }
}

impl Report {
    /// What failed, and how.
    pub fn failures(&self) -> Vec<String> {
        let kernel = |kernel: &KernelReport| {
            let reason = kernel.compiled.as_ref().err()?;
            Some(format!("{} {} on {}: {reason}", kernel.name, kernel.variant, kernel.label))
        };
        let row = |row: &RowReport| Some(format!("{}: {}", row.name, row.outcome.result.as_ref().err()?));
        self.kernels.iter().filter_map(kernel).chain(self.rows.iter().filter_map(row)).collect()
    }

    /// A table for people: a line for all variants of a kernel for the same formats.
    pub fn to_text(&self) -> String {
        let mut groups: BTreeMap<_, Vec<&KernelReport>> = BTreeMap::new();
        for kernel in &self.kernels {
            groups.entry((kernel.name, &kernel.label, &kernel.formats)).or_default().push(kernel);
        }
        let headings = ["KERNEL", "FORMAT", "DEVICE", "VARIANTS", "STATUS", "ERROR", "OF BOUND", "ROWS", "COMPILED IN"];
        let mut lines = vec![headings.map(str::to_owned)];
        lines.extend(groups.into_iter().map(|((name, label, formats), kernels)| {
            let failed = kernels.iter().filter(|kernel| !kernel.is_sound()).count();
            let not_run = kernels.iter().filter(|kernel| kernel.rows == 0).count();
            let status = match (failed, not_run) {
                (0, 0) => "ok".to_owned(),
                (0, not_run) => format!("ok, {not_run} not run"),
                (failed, _) => format!("{failed} FAILED"),
            };
            let error = kernels.iter().filter_map(|kernel| kernel.error);
            let error = error.reduce(|a, b| if b.is_nearer_than(&a) { b } else { a });
            let compiled: Duration = kernels.iter().filter_map(|kernel| kernel.compiled.as_ref().ok()).sum();
            [
                name.to_owned(),
                format_names(formats),
                label.clone(),
                kernels.len().to_string(),
                status,
                error.map_or_else(String::new, |error| format!("{:.1e}", error.nmse)),
                error.and_then(ErrorFound::share).map_or_else(String::new, |share| format!("{:.0} %", share * 100.0)),
                kernels.iter().map(|kernel| kernel.rows).max().unwrap_or(0).to_string(),
                format!("{:.2} s", compiled.as_secs_f64()),
            ]
        }));
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 9] = std::array::from_fn(width);
        let mut text = format!("{}\n\n", self.device);
        for line in &lines {
            let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
            text += cells.collect::<Vec<_>>().join("  ").trim_end();
            text.push('\n');
        }
        let failed = self.rows.iter().filter(|row| row.outcome.result.is_err()).count();
        let seconds: f64 = self.rows.iter().map(|row| row.outcome.duration.as_secs_f64()).sum();
        text += &format!(
            "\n{}; {} of the conformance table in {seconds:.1} s, {failed} failed\n",
            count(self.kernels.len(), "kernel"),
            count(self.rows.len(), "row"),
        );
        for failure in self.failures() {
            text += &format!("\nFAILED {failure}\n");
        }
        text
    }

    /// The report as one JSON object.
    pub fn to_json(&self) -> Value {
        let error = |error: Option<ErrorFound>| json!(error.map(|it| json!({ "nmse": it.nmse, "bound": it.bound })));
        let kernel = |kernel: &KernelReport| {
            json!({
                "kernel": kernel.name,
                "formats": kernel.formats,
                "variant": kernel.variant,
                "device": kernel.label,
                "ok": kernel.is_sound(),
                "compile_seconds": kernel.compiled.as_ref().ok().map(Duration::as_secs_f64),
                "compile_error": kernel.compiled.as_ref().err(),
                "rows": kernel.rows,
                "failed_row": kernel.failed_row,
                "error": error(kernel.error),
            })
        };
        let row = |row: &RowReport| {
            json!({
                "name": row.name,
                "ok": row.outcome.result.is_ok(),
                "failure": row.outcome.result.as_ref().err(),
                "error": error(row.outcome.error),
                "seconds": row.outcome.duration.as_secs_f64(),
            })
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "device": self.device,
            "kernels": self.kernels.iter().map(kernel).collect::<Vec<_>>(),
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "ok": self.failures().is_empty(),
        })
    }
}

fn count(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// One or two names, and how many more.
fn format_names(formats: &[String]) -> String {
    match formats {
        [] => "-".into(),
        [first] => first.clone(),
        [first, second] => format!("{first}, {second}"),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    }
}

/// A kernel that was written as Metal gets it.
#[derive(Debug, Clone)]
pub struct MslFile {
    /// Where.
    pub path: PathBuf,
    /// What would make it slow or wrong.
    pub faults: Vec<String>,
}

/// Writes every selected kernel of an Apple GPU into files of this folder, which is made.
///
/// # Errors
/// A kernel has no translation, a file cannot be written, or nothing is selected.
pub fn write_msl(folder: &Path, selection: &Selection) -> Result<Vec<MslFile>, VerifyError> {
    let write_error = |path: &Path| {
        let path = path.to_owned();
        move |source| VerifyError::Write { path, source }
    };
    fs::create_dir_all(folder).map_err(write_error(folder))?;
    let mut files = Vec::new();
    for arithmetic in ARITHMETICS {
        let label = conformance::gpu_label(&GpuOptions { arithmetic, ..GpuOptions::default() });
        let kernels = gpu::metal_kernels(arithmetic, &selection.schemes(), &HEAD_DIMS, &LATENT_DIMS)?.into_iter();
        for (kernel, msl) in kernels.filter(|(kernel, _)| selection.has_kernel(kernel)) {
            let words = [kernel.name(), &format_names(kernel.formats()), &label, kernel.variant()].join(" ");
            let words: Vec<&str> =
                words.split(|c: char| !c.is_ascii_alphanumeric()).filter(|it| !it.is_empty()).collect();
            let path = folder.join(format!("{}.metal", words.join("_")));
            let header = format!(
                "// {} of metal-marlin {}\n// formats: {}\n// {}\n",
                kernel.name(),
                env!("CARGO_PKG_VERSION"),
                kernel.formats().join(", "),
                kernel.variant(),
            );
            fs::write(&path, header + &msl.source).map_err(write_error(&path))?;
            files.push(MslFile { path, faults: msl.faults });
        }
    }
    if files.is_empty() {
        return Err(VerifyError::Nothing(selection.filter.clone().unwrap_or_default()));
    }
    Ok(files)
}
