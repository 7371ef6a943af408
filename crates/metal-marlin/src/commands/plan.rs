//! `metal-marlin plan`: what a model takes of memory, and what fits.

use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Context;
use marlin_format::Format;
use marlin_model::{LoadOptions, Planner, format_size};
use metal_marlin::device::KvFormat;
use metal_marlin::memory::{Account, MemoryOptions, plan_in, usual_context};
use metal_marlin::{DeviceOptions, LoadError};
use serde_json::{Value, json};

use super::model::{self, HubOptions};
use super::recipe;

const EXAMPLES: &str = "\
Examples:
  metal-marlin plan path/to/model --memory 16GiB
  metal-marlin plan path/to/model --memory 16GiB --context 32768 --concurrency 4 --kv f32
  metal-marlin plan path/to/model --memory 8GiB --format int4
  metal-marlin plan Qwen/Qwen3-4B --memory 8GiB
  metal-marlin plan bundled --json

Only headers are read, and of a model on the Hub no more is fetched unless it is packed. Weights are
counted as the device holds them, formats it has no kernel for as converted. The checkpoint itself is mapped: its pages are file cache and are not counted.";

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
    let device = args.device.open().map_err(LoadError::Device)?;
    let planner = Planner::new(device.memory_use(), &checkpoint)?;
    let memory = args.memory.budget(&device);
    let memory = memory.context("the system does not tell how much memory is available; say --memory")?;
    let context = args.context.map_or_else(|| usual_context(&planner), NonZeroUsize::get);
    let options = LoadOptions { kv_type: args.kv.into(), ..planner.load_options(context, args.concurrency.get()) };
    planner.check_kv_cache(&options)?;
    let plan = match args.format {
        Some(format) => plan_in(&planner, &options, format)?,
        None => planner.plan(&options)?,
    };
    // A quantised model is not quantised again.
    let formats = Format::ALL.into_iter().filter(|format| !format.is_dense() && checkpoint.layout().is_none());
    let formats = formats.map(|format| Ok((format, plan_in(&planner, &options, format)?.total())));
    let report = Report {
        model: checkpoint.name(),
        stored_as: args.format.map_or("as stored".to_owned(), |format| format.to_string()),
        account: Account {
            plan,
            memory,
            sequences: args.concurrency.get(),
            kv_bytes_per_token: planner.kv_bytes_per_token(args.kv.into()),
        },
        formats: formats.collect::<anyhow::Result<_>>()?,
    };
    let text = if args.json { format!("{}\n", report.to_json()) } else { report.to_text() };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}

struct Report<'a> {
    model: &'a str,
    stored_as: String,
    account: Account,
    /// Totals in other formats.
    formats: Vec<(Format, u64)>,
}

impl Report<'_> {
    fn to_json(&self) -> Value {
        let Account { plan, memory, sequences, .. } = self.account;
        let format = |(format, total): &(Format, u64)| json!({"format": format.name(), "total_bytes": total, "fits": *total <= memory});
        let mut json = self.account.to_json();
        json["model"] = self.model.into();
        json["format"] = self.stored_as.as_str().into();
        json["longest_context"] = plan.longest_context(memory, sequences).into();
        json["most_sequences"] = plan.most_sequences(memory).into();
        json["formats"] = self.formats.iter().map(format).collect();
        json
    }

    fn to_text(&self) -> String {
        let Account { plan, memory, sequences, .. } = self.account;
        let mut text = format!("{}\n\n{}\n", self.model, self.account.to_text(&self.stored_as));
        text += &match plan.longest_context(memory, sequences) {
            Some(context) => format!("longest context that fits          {context} of {} tokens\n", plan.model_context),
            None => "no context fits\n".to_owned(),
        };
        if let Some(sequences) = plan.most_sequences(memory) {
            text += &format!("most sequences of {:>6} tokens      {sequences}\n", plan.context);
        }
        if !self.formats.is_empty() {
            text += "\nformat        total\n";
        }
        for (format, total) in &self.formats {
            let fits = if *total <= memory { "fits" } else { "too large" };
            text += &format!("{format:<9} {:>12}  {fits}\n", format_size(*total));
        }
        text
    }
}
