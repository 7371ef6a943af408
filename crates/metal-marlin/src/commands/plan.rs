//! `metal-marlin plan`: what a model takes of memory, and what fits.

use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Context;
use marlin_format::Format;
use marlin_kernels::cpu::CpuBackend;
use marlin_model::{LoadOptions, MemoryPlan, Planner};
use metal_marlin::memory::{MemoryOptions, format_size, plan_in};
use metal_marlin::{DeviceOptions, LoadError};
use serde_json::{Value, json};

use super::model::{self, HubOptions};
use super::recipe;
use super::run::KvFormat;

const EXAMPLES: &str = "\
Examples:
  metal-marlin plan path/to/model --memory 16GiB
  metal-marlin plan path/to/model --memory 16GiB --context 32768 --concurrency 4 --kv f32
  metal-marlin plan path/to/model --memory 8GiB --format int4
  metal-marlin plan Qwen/Qwen3-4B --memory 8GiB
  metal-marlin plan bundled --json

Only headers are read, and of a model on the Hub no more is fetched unless it is packed. Weights are
counted as the device holds them, formats it has no kernel for as converted. The checkpoint itself is mapped: its pages are file cache and are not counted.";

/// A context that most uses do with.
const USUAL_CONTEXT: usize = 4096;

/// Tell what a model takes of memory, and what fits
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of the model, its id on the Hub, or `bundled`
    model: PathBuf,

    #[command(flatten)]
    hub: HubOptions,

    #[command(flatten)]
    memory: MemoryOptions,

    /// Tokens of a sequence [default: 4096, or what the model allows]
    #[arg(long, value_name = "N")]
    context: Option<NonZeroUsize>,

    /// Sequences at once
    #[arg(long, value_name = "N", default_value = "1")]
    concurrency: NonZeroUsize,

    /// Number format of cached keys and values
    #[arg(long, value_enum, default_value_t = KvFormat::F16)]
    kv: KvFormat,

    /// Plan for the model as `quantize --format` would write it
    #[arg(long, short, value_parser = recipe::quantized_format)]
    format: Option<Format>,

    #[command(flatten)]
    device: DeviceOptions,

    /// Print the plan as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (checkpoint, _temporary) = model::open_headers(Some(&args.model), &args.hub)?;
    let backend = CpuBackend::new(args.device.cpu()).map_err(LoadError::Device)?;
    let planner = Planner::new(&backend, &checkpoint)?;
    let memory = args.memory.budget().context("the system does not tell how much memory is available; say --memory")?;
    let context = args.context.map_or(planner.shape().context.min(USUAL_CONTEXT), NonZeroUsize::get);
    let options = LoadOptions {
        context: Some(context),
        kv_blocks: Some(planner.kv_blocks(context, args.concurrency.get())),
        kv_type: args.kv.into(),
        ..LoadOptions::default()
    };
    let plan = match args.format {
        Some(format) => plan_in(&planner, &options, format)?,
        None => planner.plan(&options)?,
    };
    // A quantised model is not quantised again.
    let formats = Format::ALL.into_iter().filter(|format| !format.is_dense() && checkpoint.quantization().is_none());
    let formats = formats.map(|format| Ok((format, plan_in(&planner, &options, format)?.total())));
    let report = Report {
        model: checkpoint.name(),
        stored_as: args.format.map_or("as stored".to_owned(), |format| format.to_string()),
        memory,
        sequences: args.concurrency.get(),
        kv_bytes_per_token: planner.kv_bytes_per_token(args.kv.into()),
        plan,
        formats: formats.collect::<anyhow::Result<_>>()?,
    };
    let text = if args.json { format!("{}\n", report.to_json()) } else { report.to_text() };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}

struct Report<'a> {
    model: &'a str,
    stored_as: String,
    memory: u64,
    sequences: usize,
    kv_bytes_per_token: usize,
    plan: MemoryPlan,
    /// Totals in other formats.
    formats: Vec<(Format, u64)>,
}

impl Report<'_> {
    fn to_json(&self) -> Value {
        let plan = &self.plan;
        let format = |(format, total): &(Format, u64)| json!({"format": format.name(), "total_bytes": total, "fits": *total <= self.memory});
        json!({
            "model": self.model,
            "format": self.stored_as,
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
            "longest_context": plan.longest_context(self.memory, self.sequences),
            "most_sequences": plan.most_sequences(self.memory),
            "formats": self.formats.iter().map(format).collect::<Vec<_>>(),
        })
    }

    fn to_text(&self) -> String {
        let (plan, total) = (&self.plan, self.plan.total());
        let line = |name: &str, bytes, note: &str| {
            format!("{name:<12} {:>12}  {note}", format_size(bytes)).trim_end().to_owned() + "\n"
        };
        let kv = format!(
            "{} x {} tokens of {} each",
            self.sequences,
            plan.context,
            format_size(self.kv_bytes_per_token as u64)
        );
        let mut text = format!("{}\n\n", self.model);
        text += &line("weights", plan.weights, &self.stored_as);
        text += &line("KV cache", plan.kv_cache, &kv);
        text += &line("activations", plan.activations, "");
        text += &line("logits", plan.logits, "");
        text += &line("program", plan.program, "code, tokenizer (estimated)");
        text += &line("total", total, "");
        text += &line("memory", self.memory, &self.verdict());
        text += "\n";
        text += &match plan.longest_context(self.memory, self.sequences) {
            Some(context) => format!("longest context that fits          {context} of {} tokens\n", plan.model_context),
            None => "no context fits\n".to_owned(),
        };
        if let Some(sequences) = plan.most_sequences(self.memory) {
            text += &format!("most sequences of {:>6} tokens      {sequences}\n", plan.context);
        }
        if !self.formats.is_empty() {
            text += "\nformat        total\n";
        }
        for (format, total) in &self.formats {
            let fits = if *total <= self.memory { "fits" } else { "too large" };
            text += &format!("{format:<9} {:>12}  {fits}\n", format_size(*total));
        }
        text
    }

    fn verdict(&self) -> String {
        let total = self.plan.total();
        match self.memory.checked_sub(total) {
            Some(left) => format!("fits, {} are left", format_size(left)),
            None => format!("does not fit, {} are missing", format_size(total - self.memory)),
        }
    }
}
