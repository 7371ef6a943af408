//! Looks at the machine and tries the program on it: a report to paste when something is wrong.

use std::path::PathBuf;

use marlin_format::Format;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions, SimdLevel, default_threads};
use marlin_kernels::gpu::{GpuAdapter, GpuArithmetic, GpuBackend, GpuChoice, GpuOptions, adapters};
use marlin_kernels::reference::ReferenceBackend;
use marlin_kernels::{Backend, Encoder, Input, KernelError, LinearPart, Step, StepLimits};
use marlin_model::{LoadOptions, LogitRows, StepBatch};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::{Value, json};

use crate::bench::random_matrix;
use crate::hub::HubCache;
use crate::machine::{self, BandwidthProbe, Cache, Memory};
use crate::model_cache::ModelCache;
use crate::stats::Spread;
use crate::{DeviceOptions, LoadError, load};
use marlin_model::format_size;

/// What the machine is, and what worked on it.
#[derive(Debug)]
pub struct Report {
    operating_system: String,
    processor: Option<String>,
    cores: Option<usize>,
    /// As `--device` names them.
    devices: Vec<String>,
    threads: usize,
    simd: Vec<SimdLevel>,
    caches: Vec<Cache>,
    memory: Option<Memory>,
    /// Threads, and bytes a second that they read.
    read_bandwidth: Vec<(usize, Spread)>,
    caches_on_disk: Vec<CacheFolder>,
    checks: Vec<Check>,
}

/// What the program keeps on disk.
#[derive(Debug)]
struct CacheFolder {
    /// `models` or `kernels`.
    of: &'static str,
    /// Which of them.
    holds: &'static str,
    /// How many.
    entries: usize,
    /// What they take on disk.
    bytes: u64,
    path: PathBuf,
}

/// Something that was tried.
#[derive(Debug)]
struct Check {
    name: String,
    /// What came of it, or why it failed.
    result: Result<String, String>,
}

/// Looks and tries.
pub fn examine() -> Report {
    let threads = default_threads();
    let adapters = adapters();
    let mut checks = conformance(&adapters);
    checks.push(Check { name: "bundled model".to_owned(), result: bundled_model() });
    let mut read_bandwidth = Vec::new();
    for count in if threads > 1 { vec![1, threads] } else { vec![1] } {
        let mut probe = BandwidthProbe::new(count);
        match probe.run() {
            Ok(()) => read_bandwidth.extend(probe.rate().map(|rate| (count, rate))),
            Err(error) => {
                checks.push(Check { name: format!("{count} threads"), result: Err(error.to_string()) });
            }
        }
    }
    Report {
        operating_system: machine::operating_system(),
        processor: machine::processor(),
        cores: machine::cores(),
        devices: devices(&adapters),
        threads,
        simd: SimdLevel::available(),
        caches: machine::caches(),
        memory: machine::memory(),
        read_bandwidth,
        caches_on_disk: caches_on_disk(),
        checks,
    }
}

/// Loads the model of the binary and runs a few tokens.
fn bundled_model() -> Result<String, String> {
    let checkpoint = match load::open_checkpoint(None) {
        Err(LoadError::NoModel) => return Ok("not part of this build".to_owned()),
        opened => opened.map_err(|error| chain(&error))?,
    };
    let options = LoadOptions { context: Some(16), logit_rows: 1, ..LoadOptions::default() };
    let device = DeviceOptions::default().open().map_err(|error| chain(&error))?;
    let mut model = load::load_model(&checkpoint, &device, &options).map_err(|error| chain(&error))?;
    let mut sequence = model.kv().sequence();
    let tokens = [0, 1, 2, 3];
    let mut batch = StepBatch::new();
    let mut logits = Vec::new();
    model.kv().append(&mut sequence, tokens.len()).map_err(|error| chain(&error))?;
    batch.push(&sequence, &tokens, LogitRows::Last);
    model.forward(&batch).map_err(|error| chain(&error))?;
    model.read_logits(&mut logits).map_err(|error| chain(&error))?;
    model.kv().release(sequence);
    let broken = logits.iter().filter(|logit| !logit.is_finite()).count();
    if logits.is_empty() || broken > 0 {
        return Err(format!("{broken} of {} logits are not finite", logits.len()));
    }
    Ok(format!("loads on {}, {} finite logits", model.info().device.detail, logits.len()))
}

/// One linear on every device, on processors at every SIMD level in both arithmetics, against the reference.
fn conformance(adapters: &[GpuAdapter]) -> Vec<Check> {
    let check = |name: String, bound: f64, error: Result<f64, KernelError>| {
        let result = error.map_err(|error| chain(&error)).and_then(|error| {
            let text = format!("differs from the reference by {error:.1e} (at most {bound:.0e})");
            // NaN is no less than anything.
            if error <= bound { Ok(text) } else { Err(text) }
        });
        Check { name, result }
    };
    let mut checks = Vec::new();
    for simd in SimdLevel::available() {
        // The bounds of the conformance table, as mean squared error over mean square.
        for (arithmetic, activations, bound) in [(Arithmetic::Exact, "f32", 1e-12), (Arithmetic::Int8, "int8", 1e-4)] {
            let options = CpuOptions { threads: None, arithmetic, simd: Some(simd) };
            let error = CpuBackend::new(options).and_then(|backend| linear_error(&backend));
            checks.push(check(format!("{simd} kernels, {activations} activations"), bound, error));
        }
    }
    for (index, _) in adapters.iter().enumerate().filter(|(_, adapter)| adapter.missing.is_none()) {
        for (arithmetic, name, bound) in [(GpuArithmetic::Exact, "f32", 1e-12), (GpuArithmetic::Half, "f16", 5e-6)] {
            let options = GpuOptions { adapter: GpuChoice::Index(index), arithmetic, ..GpuOptions::default() };
            let error = GpuBackend::new(options).and_then(|backend| linear_error(&backend));
            checks.push(check(format!("gpu:{index} kernels, {name} activations"), bound, error));
        }
    }
    checks
}

const ROWS: usize = 48;
const COLS: usize = 256;
const TOKENS: usize = 5;

/// Normalised mean squared error of an FP4 linear.
fn linear_error<B: Backend>(backend: &B) -> Result<f64, KernelError> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let matrix = random_matrix(&Format::Fp4.scheme(None)?, ROWS, COLS, &mut rng)?;
    let input: Vec<f32> = (0..TOKENS * COLS).map(|_| rng.next_u32() as i32 as f32 / i32::MAX as f32).collect();
    let part = [LinearPart { weight: matrix, bias: None }];
    let wanted = linear(&ReferenceBackend, &part, &input)?;
    let found = linear(backend, &part, &input)?;
    let sum = |squares: &mut dyn Iterator<Item = f32>| squares.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let error = sum(&mut found.iter().zip(&wanted).map(|(found, wanted)| found - wanted));
    Ok(error / sum(&mut wanted.iter().copied()))
}

fn linear<B: Backend>(backend: &B, parts: &[LinearPart<'_>], input: &[f32]) -> Result<Vec<f32>, KernelError> {
    let linear = backend.load_linear(parts)?;
    let (mut x, mut out) = (backend.buffer(TOKENS, COLS)?, backend.buffer(TOKENS, ROWS)?);
    backend.upload(&mut x, TOKENS, input)?;
    // What is not written stays NaN.
    backend.upload(&mut out, TOKENS, &[f32::NAN; TOKENS * ROWS])?;
    let limits = StepLimits { tokens: TOKENS, context: TOKENS, width: COLS, vocabulary: 1, logit_rows: TOKENS };
    let mut encoder = backend.encoder(&limits)?;
    let positions: [u32; TOKENS] = std::array::from_fn(|position| position as u32);
    encoder.begin(&Step {
        tokens: &[0; TOKENS],
        positions: &positions,
        sequence_offsets: &[0, TOKENS as u32],
        block_tables: &[],
        table_offsets: &[0, 0],
        logit_rows: &[],
    });
    encoder.linear(Input::Rows(&x), &linear, &mut out);
    encoder.submit()?;
    let mut values = vec![0.0; TOKENS * ROWS];
    encoder.read(&out, &mut values)?;
    Ok(values)
}

/// The caches that exist.
fn caches_on_disk() -> Vec<CacheFolder> {
    let hub = HubCache::from_env().ok().map(|cache| CacheFolder {
        of: "models",
        holds: "fetched from the Hub",
        entries: cache.models().map_or(0, |models| models.len()),
        bytes: cache.bytes(),
        path: cache.folder().to_owned(),
    });
    let own = ModelCache::from_env().ok();
    let quantized = own.as_ref().map(|cache| CacheFolder {
        of: "models",
        holds: "quantised on the fly",
        entries: cache.models().map_or(0, |models| models.len()),
        bytes: cache.bytes(),
        path: cache.folder().to_owned(),
    });
    let kernels = own.as_ref().map(|cache| {
        let files = cache.kernels().unwrap_or_default();
        CacheFolder {
            of: "kernels",
            holds: "compiled for GPUs",
            entries: files.len(),
            bytes: files.iter().map(|file| file.bytes).sum(),
            path: cache.kernels_folder(),
        }
    });
    let tiles = own.as_ref().map(|cache| {
        let files = cache.tiles().unwrap_or_default();
        CacheFolder {
            of: "models",
            holds: "in the CPU's order",
            entries: files.len(),
            bytes: files.iter().map(|file| file.bytes).sum(),
            path: cache.tiles_folder(),
        }
    });
    [hub, quantized, kernels, tiles].into_iter().flatten().filter(|folder| folder.path.is_dir()).collect()
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

const KIB: usize = 1 << 10;
const GIB: f64 = (1 << 30) as f64;

impl Report {
    /// Names of the checks that failed.
    pub fn failures(&self) -> Vec<&str> {
        self.checks.iter().filter(|check| check.result.is_err()).map(|check| check.name.as_str()).collect()
    }

    /// The report in lines.
    pub fn to_text(&self) -> String {
        let unknown = || "unknown".to_owned();
        let simd: Vec<String> = self.simd.iter().map(ToString::to_string).collect();
        let mut lines = vec![
            ("program", format!("metal-marlin {}, {}", env!("CARGO_PKG_VERSION"), target())),
            ("compiler", env!("METAL_MARLIN_RUSTC").to_owned()),
            ("system", self.operating_system.clone()),
            ("processor", self.processor.clone().unwrap_or_else(unknown)),
            (
                "cores",
                format!("{}, {} threads by default", self.cores.map_or_else(unknown, |n| n.to_string()), self.threads),
            ),
            ("SIMD", format!("{}, available: {}", SimdLevel::detect(), simd.join(", "))),
        ];
        for cache in &self.caches {
            let size = cache.bytes / KIB;
            lines.push(("cache", format!("L{} {}: {size} KiB, CPU {}", cache.level, cache.kind, cache.shared_by)));
        }
        let memory = |memory: Memory| {
            let gib = |bytes| bytes as f64 / GIB;
            format!("{:.1} GiB, {:.1} GiB available", gib(memory.total), gib(memory.available))
        };
        lines.push(("memory", self.memory.map_or_else(unknown, memory)));
        for (threads, rate) in &self.read_bandwidth {
            let [median, min, max] = [rate.median, rate.min, rate.max].map(|rate| rate / 1e9);
            let plural = if *threads == 1 { "" } else { "s" };
            lines.push((
                "bandwidth",
                format!("{median:.1} GB/s read by {threads} thread{plural} ({min:.1} to {max:.1})"),
            ));
        }
        for device in &self.devices {
            lines.push(("device", device.clone()));
        }
        for CacheFolder { of, holds, entries, bytes, path } in &self.caches_on_disk {
            lines.push((of, format!("{entries} {holds}, {} in {}", format_size(*bytes), path.display())));
        }
        let mut text: String = lines.iter().map(|(name, value)| format!("{name:<10} {value}\n")).collect();
        text.push('\n');
        for check in &self.checks {
            let (mark, detail) = match &check.result {
                Ok(detail) => ("ok", detail),
                Err(detail) => ("BROKEN", detail),
            };
            text += &format!("{mark:<10} {}: {detail}\n", check.name);
        }
        text
    }

    /// The report as one JSON object.
    pub fn to_json(&self) -> Value {
        let cache = |c: &Cache| json!({"level": c.level, "kind": c.kind, "bytes": c.bytes, "shared_by": c.shared_by});
        let check = |check: &Check| {
            let detail = check.result.as_ref().unwrap_or_else(|error| error);
            json!({ "name": check.name, "ok": check.result.is_ok(), "detail": detail })
        };
        let folders = |wanted: &str| -> Vec<Value> {
            let folders = self.caches_on_disk.iter().filter(|folder| folder.of == wanted);
            let folder = |CacheFolder { of, holds, entries, bytes, path }: &CacheFolder| json!({"holds": holds, *of: entries, "bytes": bytes, "path": path});
            folders.map(folder).collect()
        };
        let bandwidth =
            |(threads, rate): &(usize, Spread)| json!({ "threads": threads, "bytes_per_second": rate.to_json() });
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "target": target(),
            "compiler": env!("METAL_MARLIN_RUSTC"),
            "system": self.operating_system,
            "processor": self.processor,
            "cores": self.cores,
            "threads": self.threads,
            "simd": SimdLevel::detect().to_string(),
            "simd_available": self.simd.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "caches": self.caches.iter().map(cache).collect::<Vec<_>>(),
            "memory_bytes": self.memory.map(|memory| memory.total),
            "memory_available_bytes": self.memory.map(|memory| memory.available),
            "read_bandwidth": self.read_bandwidth.iter().map(bandwidth).collect::<Vec<_>>(),
            "devices": self.devices,
            "model_folders": folders("models"),
            "kernel_folders": folders("kernels"),
            "checks": self.checks.iter().map(check).collect::<Vec<_>>(),
            "ok": self.failures().is_empty(),
        })
    }
}

fn devices(adapters: &[GpuAdapter]) -> Vec<String> {
    let gpu = |(index, adapter): (usize, &GpuAdapter)| {
        let software = if adapter.is_software { " (software)" } else { "" };
        let missing = adapter
            .missing
            .as_ref()
            .map_or_else(String::new, |missing| format!(", cannot be used: it lacks {missing}"));
        format!("gpu:{index}, {}{software}{missing}", adapter.name)
    };
    std::iter::once("cpu".to_owned()).chain(adapters.iter().enumerate().map(gpu)).collect()
}

fn target() -> String {
    format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_is_a_failure() {
        let check = |name: &str, result| Check { name: name.to_owned(), result };
        let report = Report {
            operating_system: "system".to_owned(),
            processor: None,
            cores: None,
            devices: vec!["cpu".into()],
            threads: 1,
            simd: SimdLevel::available(),
            caches: Vec::new(),
            memory: None,
            read_bandwidth: Vec::new(),
            caches_on_disk: Vec::new(),
            checks: vec![check("good", Ok("fine".to_owned())), check("bad", Err("off".to_owned()))],
        };
        assert_eq!(report.failures(), ["bad"]);
        assert!(report.to_text().contains("\nBROKEN     bad: off\n"), "{}", report.to_text());
        assert_eq!((&report.to_json()["ok"], &report.to_json()["checks"][0]["ok"]), (&json!(false), &json!(true)));
    }
}
