//! `metal-marlin plan`: what a model takes of memory, and what fits.

use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Context;
use marlin_format::Format;
use marlin_kernels::{Backend, DeviceInfo};
use marlin_model::{ExpertLayers, LoadOptions, MemoryPlan, Planner, format_size};
use serde_json::{Value, json};

use super::model::{self, HubOptions};
use super::speculation::Speculate;
use crate::device::KvFormat;
use crate::memory::{Account, FittingOffload, MemoryOptions, fitting_offload, plan_in, usual_context};
use crate::{DeviceOptions, LoadError};

const EXAMPLES: &str = "\
Examples:
  metal-marlin plan path/to/model --memory 16GiB
  metal-marlin plan path/to/model --memory 16GiB --context 32768 --concurrency 4 --kv f32
  metal-marlin plan path/to/model --memory 8GiB --format int4
  metal-marlin plan Qwen/Qwen3-4B --memory 8GiB
  metal-marlin plan zai-org/GLM-4.7-Flash --format fp4 --memory 8GiB --expert-device cpu
  metal-marlin plan zai-org/GLM-4.7-Flash --format fp4 --speculate mtp
  metal-marlin plan bundled --json

Only headers are read, and of a model on the Hub no more is fetched unless it is packed. Weights are
counted as the device holds them, formats it has no kernel for as converted. The checkpoint itself is mapped: its pages are file cache and are not counted.

Experts that --expert-device leaves to the CPU take the host's memory, which is told beside the GPU's. Where a
mixture of experts fits with the experts of some layers there, the plan says which.";

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
    #[arg(long, short, value_parser = marlin_quantize::quantized_format)]
    format: Option<Format>,

    /// Plan for how tokens are guessed: `mtp` loads the model's layer for that as well
    #[arg(long, value_name = "HOW")]
    speculate: Option<Speculate>,

    #[command(flatten)]
    device: DeviceOptions,

    /// Print the plan as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let plan = plan(&args)?;
    let text = if args.json { format!("{}\n", plan.to_json()) } else { plan.to_text() };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// What `--json` prints.
pub(super) fn report(args: Args) -> anyhow::Result<Value> {
    Ok(plan(&args)?.to_json())
}

fn plan(args: &Args) -> anyhow::Result<Report> {
    let (checkpoint, _temporary) = model::open_headers(Some(&args.model), &args.hub)?;
    let device = args.device.open().map_err(LoadError::Device)?;
    let planner = device.planner(&checkpoint)?;
    let budget = args.memory.budget(&device);
    let budget = budget.context("the system does not tell how much memory is available; say --memory")?;
    let context = args.context.map_or_else(|| usual_context(&planner), NonZeroUsize::get);
    let prediction = args.speculate == Some(Speculate::Mtp);
    let usual = planner.load_options(context, args.concurrency.get());
    let options = LoadOptions { kv_type: args.kv.into(), prediction, ..usual };
    planner.check_kv_cache(&options)?;
    let plan_of = |planner: &Planner<'_>| match args.format {
        Some(format) => plan_in(planner, &options, format),
        None => planner.plan(&options),
    };
    let plan = plan_of(&planner)?;
    let offload = if budget.fits(&plan) { None } else { fitting_offload(&device, &planner, &budget, plan_of)? };
    // A quantised model is not quantised again.
    let is_quantized = checkpoint.is_quantized();
    let formats = Format::ALL.into_iter().filter(|format| !format.is_dense() && !is_quantized);
    let formats = formats.map(|format| Ok((format, plan_in(&planner, &options, format)?)));
    Ok(Report {
        model: checkpoint.name().to_owned(),
        stored_as: args.format.map_or("as stored".to_owned(), |format| format.to_string()),
        device: device.info(),
        host: planner.host_layers().zip(device.offload().map(|offload| offload.host.info())),
        offload,
        account: Account {
            plan,
            budget,
            sequences: args.concurrency.get(),
            kv_bytes_per_token: plan.block_bytes as usize / plan.block_tokens,
        },
        formats: formats.collect::<anyhow::Result<_>>()?,
    })
}

struct Report {
    model: String,
    stored_as: String,
    device: DeviceInfo,
    /// Layers whose experts are left to the host, and what computes them.
    host: Option<(ExpertLayers, DeviceInfo)>,
    /// What to leave to the host for the model to fit, if it does not.
    offload: Option<FittingOffload>,
    account: Account,
    /// Plans in other formats.
    formats: Vec<(Format, MemoryPlan)>,
}

impl Report {
    fn to_json(&self) -> Value {
        let Account { plan, budget, sequences, .. } = self.account;
        let device = |info: &DeviceInfo| json!({"name": info.name, "detail": info.detail});
        let format = |(format, plan): &(Format, MemoryPlan)| json!({"format": format.name(), "total_bytes": plan.total(), "fits": budget.fits(plan)});
        let mut json = self.account.to_json();
        json["model"] = self.model.as_str().into();
        json["format"] = self.stored_as.as_str().into();
        json["device"] = device(&self.device);
        json["host_device"] = self.host.as_ref().map(|(_, info)| device(info)).into();
        json["host_layers"] = self.host.as_ref().map(|(layers, _)| layers.to_string()).into();
        json["fitting_expert_device"] = self.offload.as_ref().map(|offload| offload.experts.to_string()).into();
        json["longest_context"] = plan.longest_context(budget.device, sequences).into();
        json["most_sequences"] = plan.most_sequences(budget.device).into();
        json["formats"] = self.formats.iter().map(format).collect();
        json
    }

    fn to_text(&self) -> String {
        let Account { plan, budget, sequences, .. } = self.account;
        let mut text = format!("{}\n", self.model);
        if let Some((layers, host)) = &self.host {
            let DeviceInfo { name, detail } = &self.device;
            text += &format!("on {name}: {detail}\nexperts of layers {layers} on {}: {}\n", host.name, host.detail);
        }
        text += &format!("\n{}\n", self.account.to_text(&self.stored_as));
        if let Some(offload) = &self.offload {
            text += &format!("{offload}\n");
        }
        text += &match plan.longest_context(budget.device, sequences) {
            Some(context) => format!("longest context that fits          {context} of {} tokens\n", plan.model_context),
            None => "no context fits\n".to_owned(),
        };
        if let Some(sequences) = plan.most_sequences(budget.device) {
            text += &format!("most sequences of {:>6} tokens      {sequences}\n", plan.context);
        }
        if !self.formats.is_empty() {
            text += "\nformat        total\n";
        }
        for (format, plan) in &self.formats {
            let fits = if budget.fits(plan) { "fits" } else { "too large" };
            text += &format!("{format:<9} {:>12}  {fits}\n", format_size(plan.total()));
        }
        text
    }
}
