//! How much memory there is, and whether a model fits into it.

use std::fmt;
use std::fs;
use std::process::Command;

use marlin_checkpoint::Checkpoint;
use marlin_format::{Format, ScaleSearch};
use marlin_kernels::cpu::CpuBackend;
use marlin_model::{ExpertLayers, LoadOptions, MemoryPlan, ModelError, Planner, format_size};
use marlin_quantize::{Recipe, embedding_scheme};
use serde_json::{Value, json};

use crate::LoadError;
use crate::device::{Device, ExpertDevice};
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
    pub fn budget(&self, device: &Device) -> Option<MemoryBudget> {
        let of_machine = || if device.shares_memory() { available() } else { None };
        let of_device = self.memory.or_else(|| [of_machine(), device.memory()].into_iter().flatten().min());
        let host = if device.shares_memory() { None } else { available() };
        of_device.map(|device| MemoryBudget { device, host })
    }
}

/// Memory that a model may take, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBudget {
    /// Of the device.
    pub device: u64,
    /// Of the host, for experts that are left to it; `None` if it is the device's, or not known.
    pub host: Option<u64>,
}

impl MemoryBudget {
    /// Whether there is as much.
    pub fn fits(&self, plan: &MemoryPlan) -> bool {
        plan.total() <= self.device && self.host.is_none_or(|host| plan.host_total() <= host)
    }

    /// What another model leaves.
    pub fn without(&self, other: &MemoryPlan) -> Self {
        Self {
            device: self.device.saturating_sub(other.total()),
            host: self.host.map(|host| host.saturating_sub(other.host_total())),
        }
    }

    /// `8.00 GiB are available`, and what the host has if the plan is for it, too.
    pub(crate) fn in_words(&self, plan: &MemoryPlan) -> String {
        let device = format!("{} are available", format_size(self.device));
        match self.host.filter(|_| plan.host_total() > 0) {
            Some(host) => format!("{device}, and {} of the host's memory", format_size(host)),
            None => device,
        }
    }
}

/// A model that takes more memory than there is.
#[derive(Debug, thiserror::Error)]
#[error("{model} needs {plan}; {} (--memory says otherwise); {}{advice}", budget.in_words(plan), or_else(offload))]
pub struct DoesNotFit {
    /// The model.
    pub model: String,
    /// What it takes.
    pub plan: Box<MemoryPlan>,
    /// Memory there is.
    pub budget: MemoryBudget,
    /// Experts to leave to the processor, if that helps.
    pub offload: Option<Box<FittingOffload>>,
    /// What else to do about it.
    pub advice: String,
}

/// What a load onto the device with these options takes, refused with the numbers and advice if that is more than the budget, or if the
/// device cannot have such a KV cache.
///
/// # Errors
/// [`DoesNotFit`], or what [`Device::planner`], [`Planner::plan`] and [`Planner::check_kv_cache`] fail with.
pub fn require_fit(
    device: &Device,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    budget: &MemoryBudget,
) -> Result<MemoryPlan, LoadError> {
    let planner = device.planner(checkpoint).map_err(LoadError::Model)?;
    let plan = planner.plan(options).map_err(LoadError::Model)?;
    if budget.fits(&plan) {
        planner.check_kv_cache(options).map_err(LoadError::Model)?;
        return Ok(plan);
    }
    let offload = fitting_offload(device, &planner, budget, |planner| planner.plan(options))?;
    let advice = match plan.longest_context(budget.device, 1) {
        Some(context) if context < plan.context => format!("--context {context} fits"),
        _ => format_advice(&planner, options, budget).map_err(LoadError::Model)?,
    };
    let (model, plan, offload) = (checkpoint.name().to_owned(), Box::new(plan), offload.map(Box::new));
    Err(LoadError::DoesNotFit(DoesNotFit { model, plan, budget: *budget, offload, advice }))
}

/// Experts which, left to the processor, let a model fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FittingOffload {
    /// What to give for `--expert-device`.
    pub experts: ExpertDevice,
    /// How many layers that are.
    pub layers: usize,
    /// What the model then takes.
    pub plan: MemoryPlan,
}

/// `--expert-device cpu:20- fits, which leaves the experts of 27 layers to the CPU, 7.89 GiB of the host's memory`.
impl fmt::Display for FittingOffload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { experts, layers, plan } = self;
        let (plural, memory) = (if *layers == 1 { "" } else { "s" }, format_size(plan.host_total()));
        write!(
            f,
            "--expert-device {experts} fits, which leaves the experts of {layers} layer{plural} to the CPU, {memory} of the \
             host's memory"
        )
    }
}

/// What helps, before what else does.
pub(crate) fn or_else(offload: &Option<Box<FittingOffload>>) -> String {
    offload.as_ref().map_or_else(String::new, |offload| format!("{offload}; or else "))
}

/// The fewest last layers whose experts a GPU with memory of its own must leave to the processor for a model to fit; `None` if that
/// does not help. `plan` is how the model is planned.
///
/// # Errors
/// The processor cannot be used, or what `plan` fails with.
pub fn fitting_offload(
    device: &Device,
    planner: &Planner<'_>,
    budget: &MemoryBudget,
    plan: impl Fn(&Planner<'_>) -> Result<MemoryPlan, ModelError>,
) -> Result<Option<FittingOffload>, LoadError> {
    let Device::Gpu { host, .. } = device else { return Ok(None) };
    let layers = planner.expert_layers();
    if device.shares_memory() || layers.is_empty() {
        return Ok(None);
    }
    let host = CpuBackend::new(*host).map_err(LoadError::Device)?;
    let of_last = |count: usize| {
        let first = layers.len() - count;
        let experts = if first == 0 { ExpertLayers::All } else { ExpertLayers::from_layer(layers[first]) };
        let planner = planner.clone().with_offload(&host, &experts)?;
        Ok(FittingOffload { experts: ExpertDevice(experts), layers: count, plan: plan(&planner)? })
    };
    // The more of them, the less is left on the device: those between are halved until one is left.
    let mut best = of_last(layers.len()).map_err(LoadError::Model)?;
    let mut too_few = 0;
    while best.layers - too_few > 1 {
        let between = of_last((too_few + best.layers) / 2).map_err(LoadError::Model)?;
        if between.plan.total() <= budget.device {
            best = between;
        } else {
            too_few = between.layers;
        }
    }
    Ok(Some(best).filter(|best| budget.fits(&best.plan)))
}

/// The best format in which the model would fit.
fn format_advice(planner: &Planner<'_>, options: &LoadOptions, budget: &MemoryBudget) -> Result<String, ModelError> {
    let name = planner.checkpoint().name();
    let original = match (planner.checkpoint().is_quantized(), name.split_once('@')) {
        (true, _) => "the model it was quantised from".to_owned(),
        (false, Some((id, revision))) if HubId::parse(id).is_some() => format!("{id} --revision {revision}"),
        (false, _) => name.to_owned(),
    };
    for format in ADVISED {
        let plan = plan_in(planner, options, format)?;
        if budget.fits(&plan) {
            let size = format_size(plan.total());
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
    /// Memory there is.
    pub budget: MemoryBudget,
    /// Sequences at once.
    pub sequences: usize,
    /// Bytes of a token in the KV cache.
    pub kv_bytes_per_token: usize,
}

impl Account {
    /// Line by line, for people. `stored_as` says in which formats the weights are.
    pub fn to_text(&self, stored_as: &str) -> String {
        let plan = &self.plan;
        let line = |name: &str, bytes, note: &str| {
            format!("{name:<12} {:>12}  {note}", format_size(bytes)).trim_end().to_owned() + "\n"
        };
        let token = format_size(self.kv_bytes_per_token as u64);
        let verdict = |memory: u64, total: u64| match memory.checked_sub(total) {
            Some(left) => format!("fits, {} are left", format_size(left)),
            None => format!("does not fit, {} are missing", format_size(total - memory)),
        };
        let mut text = [
            line("weights", plan.weights, stored_as),
            line("KV cache", plan.kv_cache, &format!("{} x {} tokens of {token} each", self.sequences, plan.context)),
            line("activations", plan.activations, ""),
            line("logits", plan.logits, ""),
            line("program", plan.program, "code, tokenizer (estimated)"),
        ]
        .concat();
        if let Some(host) = plan.host.filter(|_| plan.shares_memory) {
            text += &line("host experts", host.total(), "in the same memory");
        }
        text += &line("total", plan.total(), "");
        text += &line("memory", self.budget.device, &verdict(self.budget.device, plan.total()));
        if let Some(host) = plan.host.filter(|_| !plan.shares_memory) {
            text += &line("host experts", host.total(), "");
            if let Some(memory) = self.budget.host {
                text += &line("host memory", memory, &verdict(memory, host.total()));
            }
        }
        text
    }

    /// For programs: a JSON object.
    pub fn to_json(&self) -> Value {
        let plan = &self.plan;
        json!({
            "memory_bytes": self.budget.device,
            "host_memory_bytes": self.budget.host,
            "context": plan.context,
            "concurrency": self.sequences,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "weight_bytes": plan.weights,
            "kv_cache_bytes": plan.kv_cache,
            "activation_bytes": plan.activations,
            "logit_bytes": plan.logits,
            "program_bytes": plan.program,
            "total_bytes": plan.total(),
            "host_weight_bytes": plan.host.map(|host| host.weights),
            "host_activation_bytes": plan.host.map(|host| host.activations),
            "host_bytes": plan.host.map(|host| host.total()),
            "shares_memory": plan.shares_memory,
            "fits": self.budget.fits(plan),
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
    use marlin_kernels::cpu::CpuOptions;
    use marlin_kernels::gpu::{GpuBackend, GpuCaps, GpuOptions};
    use marlin_model::ExpertOffload;

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

    /// A GPU with memory of its own, and a tiny mixture of two layers with experts.
    fn gpu_and_mixture() -> (Device, Checkpoint) {
        let caps = GpuCaps { shares_memory: false, ..GpuCaps::apple() };
        let backend = GpuBackend::imaginary(caps, GpuOptions::default()).unwrap();
        let host = CpuOptions { threads: Some(1), ..CpuOptions::default() };
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../marlin-model/tests/goldens/mixtral-top2");
        (Device::Gpu { backend, host, offload: None }, Checkpoint::open(golden.as_ref()).unwrap())
    }

    #[test]
    fn as_few_experts_as_must_are_advised_to_be_left_to_the_host() {
        let (device, mixture) = gpu_and_mixture();
        let (planner, options) = (device.planner(&mixture).unwrap(), LoadOptions::default());
        let host = CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
        let plan = |layers: &str| {
            let layers = layers.parse().unwrap();
            planner.clone().with_offload(&host, &layers).unwrap().plan(&options).unwrap()
        };
        let (whole, last, none) = (planner.plan(&options).unwrap(), plan("1"), plan("0-1"));
        assert!(none.total() < last.total() && last.total() < whole.total());
        assert!(0 < last.host_total() && last.host_total() < none.host_total());
        let advised = |device_bytes: u64, host_bytes: Option<u64>| {
            let budget = MemoryBudget { device: device_bytes, host: host_bytes };
            let found = fitting_offload(&device, &planner, &budget, |planner| planner.plan(&options)).unwrap();
            found.map(|found| (found.experts.to_string(), found.layers, found.plan.total()))
        };
        assert_eq!(advised(whole.total() - 1, None), Some(("cpu:1-".to_owned(), 1, last.total())));
        assert_eq!(advised(last.total(), Some(last.host_total())), Some(("cpu:1-".to_owned(), 1, last.total())));
        assert_eq!(advised(last.total() - 1, None), Some(("cpu".to_owned(), 2, none.total())));
        assert_eq!(advised(none.total() - 1, None), None);
        assert_eq!(advised(none.total(), Some(none.host_total() - 1)), None);

        let budget = MemoryBudget { device: last.total(), host: Some(1 << 30) };
        let error = require_fit(&device, &mixture, &options, &budget).unwrap_err().to_string();
        for wanted in
            ["mixtral-top2 needs ", "are available (--memory", "; --expert-device cpu:1- fits", " 1 layer to the CPU"]
        {
            assert!(error.contains(wanted), "{wanted}: {error}");
        }
        assert_eq!(
            require_fit(&device, &mixture, &options, &MemoryBudget { device: whole.total(), ..budget }).unwrap(),
            whole
        );
    }

    #[test]
    fn the_host_must_have_memory_for_the_experts_left_to_it() {
        let (device, mixture) = gpu_and_mixture();
        let Device::Gpu { backend, host, .. } = device else { unreachable!("it is a GPU") };
        let offload = ExpertOffload { host: CpuBackend::new(host).unwrap(), layers: ExpertLayers::All };
        let device = Device::Gpu { backend, host, offload: Some(offload) };
        let options = LoadOptions::default();
        let plan = device.planner(&mixture).unwrap().plan(&options).unwrap();
        let budget = MemoryBudget { device: plan.total(), host: Some(plan.host_total()) };
        assert_eq!(require_fit(&device, &mixture, &options, &budget).unwrap(), plan);
        assert_eq!(budget.without(&plan), MemoryBudget { device: 0, host: Some(0) });
        let budget = MemoryBudget { host: Some(plan.host_total() - 1), ..budget };
        let error = require_fit(&device, &mixture, &options, &budget).unwrap_err().to_string();
        assert!(error.contains("of the host's memory for experts;") && error.contains("available, and "), "{error}");
    }

    #[test]
    fn linux_tells_what_is_available() {
        assert_eq!(meminfo_available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(meminfo_available("MemTotal: 9 kB\n"), None);
        assert!(!cfg!(target_os = "linux") || available().is_some());
    }
}
