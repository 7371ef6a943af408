//! How much memory there is, and whether a model fits into it.

use std::fs;
use std::process::Command;

use marlin_format::{Format, ScaleSearch};
use marlin_model::{LoadOptions, MemoryPlan, ModelError, Planner, format_size};
use marlin_quantize::{Recipe, embedding_scheme};
use serde_json::{Value, json};

use crate::device::Device;
use crate::hub::HubId;

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
    /// The memory given, or else what is available to the device: what it has of its own, or of the machine's memory what the system has
    /// left and the device's driver recommends. `None` if neither tells.
    pub fn budget(&self, device: &Device) -> Option<u64> {
        let of_machine = || if device.shares_memory() { available() } else { None };
        self.memory.or_else(|| [of_machine(), device.memory()].into_iter().flatten().min())
    }
}

/// A model that takes more memory than there is.
#[derive(Debug, thiserror::Error)]
#[error(
    "{model} needs {plan}; {} are available (--memory says otherwise); {advice}",
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

/// What a load with these options takes, refused with the numbers and advice if that is more than `memory`, or if the device cannot
/// have such a KV cache.
///
/// # Errors
/// [`DoesNotFit`], or what [`Planner::plan`] and [`Planner::check_kv_cache`] fail with.
pub fn require_fit(planner: &Planner<'_>, options: &LoadOptions, memory: u64) -> Result<MemoryPlan, crate::LoadError> {
    let plan = planner.plan(options).map_err(crate::LoadError::Model)?;
    if plan.total() <= memory {
        planner.check_kv_cache(options).map_err(crate::LoadError::Model)?;
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
fn format_advice(planner: &Planner<'_>, options: &LoadOptions, memory: u64) -> Result<String, ModelError> {
    let name = planner.checkpoint().name();
    let original = match (planner.checkpoint().layout(), name.split_once('@')) {
        (Some(_), _) => "the model it was quantised from".to_owned(),
        (None, Some((id, revision))) if HubId::parse(id).is_some() => format!("{id} --revision {revision}"),
        (None, _) => name.to_owned(),
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
pub fn plan_in(planner: &Planner<'_>, options: &LoadOptions, format: Format) -> Result<MemoryPlan, ModelError> {
    let linears = format.scheme(None).expect("every format has its usual groups");
    let embedding = embedding_scheme(Format::Int8, None).expect("int8 has the embedding's groups");
    // How scales are chosen does not change their size.
    Recipe::uniform(linears, Some(embedding), ScaleSearch::Mse).plan(planner, options)
}

/// A plan beside the memory that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// What the model takes.
    pub plan: MemoryPlan,
    /// Memory there is, in bytes.
    pub memory: u64,
    /// Sequences at once.
    pub sequences: usize,
    /// Bytes of a token in the KV cache.
    pub kv_bytes_per_token: usize,
}

impl Account {
    /// Line by line, for people. `stored_as` says in which formats the weights are.
    pub fn to_text(&self, stored_as: &str) -> String {
        let (plan, total) = (&self.plan, self.plan.total());
        let line = |name: &str, bytes, note: &str| {
            format!("{name:<12} {:>12}  {note}", format_size(bytes)).trim_end().to_owned() + "\n"
        };
        let token = format_size(self.kv_bytes_per_token as u64);
        let verdict = match self.memory.checked_sub(total) {
            Some(left) => format!("fits, {} are left", format_size(left)),
            None => format!("does not fit, {} are missing", format_size(total - self.memory)),
        };
        [
            line("weights", plan.weights, stored_as),
            line("KV cache", plan.kv_cache, &format!("{} x {} tokens of {token} each", self.sequences, plan.context)),
            line("activations", plan.activations, ""),
            line("logits", plan.logits, ""),
            line("program", plan.program, "code, tokenizer (estimated)"),
            line("total", total, ""),
            line("memory", self.memory, &verdict),
        ]
        .concat()
    }

    /// For programs: a JSON object.
    pub fn to_json(&self) -> Value {
        let plan = &self.plan;
        json!({
            "memory_bytes": self.memory,
            "context": plan.context,
            "concurrency": self.sequences,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "weight_bytes": plan.weights,
            "kv_cache_bytes": plan.kv_cache,
            "activation_bytes": plan.activations,
            "logit_bytes": plan.logits,
            "program_bytes": plan.program,
            "total_bytes": plan.total(),
            "fits": plan.total() <= self.memory,
        })
    }
}

/// The context to plan for where none is asked for: one that most uses do with, or what the model allows.
pub fn usual_context(planner: &Planner<'_>) -> usize {
    const USUAL: usize = 4096;
    planner.shape().context.min(USUAL)
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
    }

    #[test]
    fn linux_tells_what_is_available() {
        assert_eq!(meminfo_available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(meminfo_available("MemTotal: 9 kB\n"), None);
        assert!(!cfg!(target_os = "linux") || available().is_some());
    }
}
