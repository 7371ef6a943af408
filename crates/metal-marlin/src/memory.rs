//! How much memory there is, and whether a model fits into it.

use std::fs;
use std::process::Command;

use marlin_checkpoint::TensorInfo;
use marlin_format::{Format, Grouping, ScaleSearch, Scheme};
use marlin_kernels::Backend;
use marlin_model::{LoadOptions, MemoryPlan, ModelError, Planner};
use marlin_quantize::{Recipe, TensorRole};

/// Formats from the one that keeps most of a model's quality to the one that keeps least, each smaller than the one before.
const ADVISED: [Format; 5] = [Format::Int8, Format::Int4, Format::Fp4, Format::Int3, Format::Int2];

/// How much memory a command may use.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct MemoryOptions {
    /// Memory that may be used, for example 16GiB, 16GB or 800MiB [default: what the machine has available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Device")]
    pub memory: Option<u64>,
}

impl MemoryOptions {
    /// The memory given, or else what is available; `None` if the system does not tell.
    pub fn budget(&self) -> Option<u64> {
        self.memory.or_else(available)
    }
}

/// A model that takes more memory than there is.
#[derive(Debug, thiserror::Error)]
#[error(
    "{model} needs {}: weights {}, KV cache of {} tokens {}, activations {}, logits {}, program {}; \
     {} are available (--memory says otherwise); {advice}",
    format_size(plan.total()),
    format_size(plan.weights),
    plan.context,
    format_size(plan.kv_cache),
    format_size(plan.activations),
    format_size(plan.logits),
    format_size(plan.program),
    format_size(*memory)
)]
pub struct DoesNotFit {
    /// The model.
    pub model: String,
    /// What it takes.
    pub plan: Box<MemoryPlan>,
    /// Memory there is, in bytes.
    pub memory: u64,
    /// What to do about it.
    pub advice: String,
}

/// What a load with these options takes, refused with the numbers and advice if that is more than `memory`.
///
/// # Errors
/// [`DoesNotFit`], or what [`Planner::plan`] fails with.
pub fn require_fit<B: Backend>(
    planner: &Planner<'_, B>,
    options: &LoadOptions,
    memory: u64,
) -> Result<MemoryPlan, crate::LoadError> {
    let plan = planner.plan(options).map_err(crate::LoadError::Model)?;
    if plan.total() <= memory {
        return Ok(plan);
    }
    let advice = match plan.longest_context(memory, 1) {
        Some(context) if context < plan.context => format!("--context {context} fits"),
        _ => format_advice(planner, options, memory).map_err(crate::LoadError::Model)?,
    };
    let model = planner.checkpoint().name().to_owned();
    Err(crate::LoadError::DoesNotFit(DoesNotFit { model, plan: Box::new(plan), memory, advice }))
}

/// The best format in which the model would fit.
fn format_advice<B: Backend>(
    planner: &Planner<'_, B>,
    options: &LoadOptions,
    memory: u64,
) -> Result<String, ModelError> {
    let original = match planner.checkpoint().quantization() {
        Some(_) => "the model it was quantised from",
        None => planner.checkpoint().name(),
    };
    for format in ADVISED {
        let total = plan_in(planner, options, format)?.total();
        if total <= memory {
            let size = format_size(total);
            return Ok(format!("in {format} it takes {size}: metal-marlin quantize {original} OUT --format {format}"));
        }
    }
    Ok(format!("it fits in no format, even {} is too large; choose a smaller model", ADVISED[ADVISED.len() - 1]))
}

/// The plan of the model as `quantize --format` would write it.
///
/// # Errors
/// As for [`Planner::plan`].
pub fn plan_in<B: Backend>(
    planner: &Planner<'_, B>,
    options: &LoadOptions,
    format: Format,
) -> Result<MemoryPlan, ModelError> {
    let usual = |format: Format, grouping| format.scheme(grouping).expect("every format has its usual groups");
    let recipe = Recipe {
        linears: usual(format, None),
        embedding: Some(usual(Format::Int8, Some(Grouping::Columns(32)))),
        search: ScaleSearch::Mse,
    };
    let scheme =
        |name: &str, info: &TensorInfo| -> Option<Scheme> { recipe.scheme(TensorRole::of(name, info.shape.len())) };
    planner.plan_as(options, scheme)
}

/// A size such as `16GiB`, `16GB`, `800MiB`, `1.5G` or a number of bytes; without `i` the units are powers of 1000.
///
/// # Errors
/// What is wanted, if it is no such size or 0.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wanted = || format!("`{text}` is no size; wanted a number above 0 with a unit, such as 16GiB, 16GB or 800MiB");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "ki" | "kib" => 1u64 << 10,
        "mi" | "mib" => 1 << 20,
        "gi" | "gib" => 1 << 30,
        "ti" | "tib" => 1 << 40,
        _ => return Err(wanted()),
    };
    let bytes = number.parse::<f64>().map_err(|_| wanted())? * unit as f64;
    if (1.0..u64::MAX as f64).contains(&bytes) { Ok(bytes as u64) } else { Err(wanted()) }
}

/// Bytes for people: `9.10 GiB`, `812.0 MiB`.
pub fn format_size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes >= (1u64 << 30) as f64 => format!("{:.2} GiB", bytes / (1u64 << 30) as f64),
        _ if bytes >= (1u64 << 20) as f64 => format!("{:.1} MiB", bytes / (1u64 << 20) as f64),
        _ => format!("{:.1} KiB", bytes / 1024.0),
    }
}

/// Memory that a new program can have: what Linux calls available, within the limit of the control group; on a Mac what is built
/// in. `None` if the system does not tell.
pub fn available() -> Option<u64> {
    if cfg!(target_os = "macos") {
        let output = Command::new("/usr/sbin/sysctl").args(["-n", "hw.memsize"]).output().ok()?;
        return String::from_utf8(output.stdout).ok()?.trim().parse().ok();
    }
    let machine = meminfo_available(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let number = |file: &str| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
    Some(limit.map_or(machine, |(max, current)| machine.min(max.saturating_sub(current))))
}

/// `MemAvailable` of /proc/meminfo, which counts in KiB.
fn meminfo_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("16GiB", 16 << 30),
            ("16GB", 16_000_000_000),
            ("800MiB", 800 << 20),
            ("1.5 gib", 3 << 29),
            ("7k", 7000),
            ("512", 512),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "16 pigs", "-1GB", "0", "1e3", "99999999999TB", "1.2.3M"] {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains("16GiB"), "{text}: {error}");
        }
        assert_eq!(format_size(9 << 29), "4.50 GiB");
        assert_eq!(format_size(1 << 20), "1.0 MiB");
    }

    #[test]
    fn linux_tells_what_is_available() {
        assert_eq!(meminfo_available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(meminfo_available("MemTotal: 9 kB\n"), None);
        assert!(!cfg!(target_os = "linux") || available().is_some());
    }
}
