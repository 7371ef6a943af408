//! `metal-marlin quantize`: a checkpoint in fewer bits.

mod bits;
mod card;
mod cold;
mod exception;
mod measured;
mod report;
mod rotate;
mod shards;

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use marlin_checkpoint::{Checkpoint, ExportLayout};
use marlin_kernels::KvType;
use marlin_kernels::cpu::CpuBackend;
use marlin_model::Planner;
use marlin_quantize::{Budget, Fit, QuantizeOptions, Recipe, fit, quantize};
use serde_json::Value;

use self::bits::{BitOptions, Bits};
use self::cold::{Cold, ColdOptions};
use self::exception::Exception;
use self::measured::{MeasureOptions, Measured};
use self::report::Summary;
use self::rotate::RotateOptions;
use self::shards::ShardOptions;
use super::calibration::{CalibrationOptions, Rounding, Run};
use super::model::HubOptions;
use super::recipe::{HEADING, Method, NUMBER_FORMAT, RecipeOptions};
use super::usage::{OfArguments, UsageError};
use super::{in_pool, model};
use crate::cli::progress::Bar;
use crate::device::parse_threads;
use crate::memory::{Account, MemoryBudget, parse_size, usual_context};
use crate::{DeviceOptions, LoadError};

const EXAMPLES: &str = "\
Examples:
  metal-marlin quantize path/to/model out --format fp4
  metal-marlin quantize path/to/model out --format int4 --group-size 32
  metal-marlin quantize path/to/model out --format fp8 --group-size 128x128
  metal-marlin quantize path/to/model out --format fp4 --text data/text/validation.txt
  metal-marlin quantize path/to/model out --format fp4 --sparse-24
  metal-marlin quantize path/to/model out --bits 3 --embedding-format bf16 --json
  metal-marlin quantize path/to/model out --format int4 --layout compressed-tensors
  metal-marlin quantize path/to/model out.gguf --format int4-sym --layout gguf
  metal-marlin quantize Qwen/Qwen3-4B out --format fp4
  metal-marlin quantize path/to/model out --format int3 --matrix v_proj=int8 --matrix o_proj=int4:32
  metal-marlin quantize path/to/model out --target-bpw 3.5
  metal-marlin quantize path/to/model out --plan plan.json
  metal-marlin quantize path/to/model out --fit 16GiB --context 32768
  metal-marlin quantize path/to/model out --format fp4 --cold-expert-format int2 --calibration text.txt
  metal-marlin quantize path/to/model out --format fp4 --method mse
  metal-marlin quantize path/to/model out --format int3 --rotate
  metal-marlin quantize path/to/model out --format int4 --method mse --scale-channels
  metal-marlin quantize path/to/model out --format fp4 --method mse --shard 3/17

Group sizes, where they are not given: fp4, int4, int4-sym and int8 128, int3 64, int2 32, fp8 row;
mxfp4 always has 32 and nvfp4 16. Norms and biases are kept as they are. An interrupted run leaves
OUT.partial; the same command goes on from there. A finished folder has a model card, README.md, which
says what quality was kept: on 2,048 tokens that weights were not fitted to (--method gptq), or on a --text
of your own. All but measuring is done on the CPU: the result is the same whatever device it will run on.

--method gptq, the default, runs the model over a calibration text, layer by layer, and rounds each weight so that it
makes up for what those before it, and the layers before, were off by. It takes about seven times as long as reading the
text, has one layer in memory besides the text's activations, and loses a third to a quarter of what rounding to nearest
loses. --method mse only searches scales, --method rtn not even those: both go at the speed of the disk. Embedding and head are
rounded by mse. docs/calibration.md says what each keeps.

--rotate and --scale-channels turn the model into an equal one that is easier to round. Neither is needed with gptq, which gains little
or nothing by them where it was measured (docs/calibration.md); --scale-channels serves --method mse where some channels are much larger
than others.

--target-bpw mixes formats. Each matrix alone is rounded to 3 bits and the model run, which tells what it costs; so bits go where
they save most. It takes about as long again as gptq. The plan that comes of it is kept as OUT/plan.json, and by --save-plan in a
file of its own: formats in it can be changed, and --plan FILE quantises by it. --plan FILE --target-bpw BITS chooses for another
size without measuring again.

--sparse-24 keeps two of every four weights, those of largest magnitude. That saves a quarter of fp4's and
int4's bytes and three eighths of fp8's, and costs much quality unless the model was trained for it.

--shard writes one weight file of a large model while other processes, on other machines that share the folder, write others: each a
command with the same options and another --shard, as --list-shards counts them. One that is killed is run again. At last the same command
without --shard finishes OUT, which is the same to the byte as if it had been quantised at once. docs/ray.md has a command that does all of it on a cluster.

The layout compressed-tensors is for other engines (vLLM, transformers). It takes int4, int4-sym and int8 in
groups of columns or rows, fp8 a row, a tensor or a tile, mxfp4 and nvfp4; embedding and head are kept.
The layout gptq is for those that read GPTQ: one of int4, int4-sym and int8 for all matrices. The layout gguf
writes one file OUT for llama.cpp, with int4-sym (as Q4_0) and int8 (as Q8_0) in groups of 32, mxfp4, f16,
bf16 or f32.

--fit mixes formats so that `run --device cpu --memory SIZE` has room for everything: weights, a KV cache in f16
for --concurrency sequences of --context tokens, activations, the program. It takes the first of
int8 g32, int8 g128, int4 g32, int4-sym g32, int4 g128, int4-sym g128, int3 g64 and int2 g32 that
fits for all matrices. Then it raises one matrix after the other to the format before, each time
the one that gains most for its bytes and still fits: v_proj, o_proj and the first layer early,
down_proj and q_proj late. docs/mixes.md measures why.";

/// Options that choose formats by hand, which `--fit` does by itself.
const CHOSEN: [&str; 6] = ["format", "bits", "group_size", "sparse_24", "matrix", "cold_expert_format"];

/// Quantise the weights of a model
///
/// Writes a copy of a Hugging Face checkpoint whose matrices are stored in few bits, and reports how much that changes each of
/// them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, mut_group(NUMBER_FORMAT, |formats| formats.args(["fit", "target_bpw", "plan"]).required(true)))]
pub(crate) struct Args {
    /// Model in bf16, f16 or f32: a folder with config.json, tokenizer.json and *.safetensors, or its id on the Hub
    model: PathBuf,

    /// Folder to write, or the file of the layout gguf
    out: PathBuf,

    #[command(flatten)]
    hub: HubOptions,

    #[command(flatten)]
    recipe: RecipeOptions,

    /// Another format for the decoder's matrices whose names end like this, as in v_proj=int8 or
    /// layers.0.mlp.down_proj=int4:32 (with a group size); may be given several times, the last that matches counts
    #[arg(long, value_name = "NAME=FORMAT[:SIZE]", help_heading = HEADING)]
    matrix: Vec<Exception>,

    #[command(flatten)]
    rotate: RotateOptions,

    /// Make channels larger whose inputs are large, as far as rounding then loses less on the calibration text (AWQ). What makes the inputs
    /// is made smaller, so that the model stays what it is in any layout
    #[arg(long, help_heading = HEADING)]
    scale_channels: bool,

    #[command(flatten)]
    calibration: CalibrationOptions,

    #[command(flatten)]
    cold: ColdOptions,

    #[command(flatten)]
    bits: BitOptions,

    /// Choose the best mix of formats with which the model takes no more than this memory, such as 16GiB
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = parse_size,
        conflicts_with_all = CHOSEN,
        conflicts_with_all = ["target_bpw", "plan"],
        help_heading = "Fit"
    )]
    fit: Option<u64>,

    /// Tokens of a sequence that are to fit [default: 4096, or what the model allows]
    #[arg(long, value_name = "N", conflicts_with_all = CHOSEN, help_heading = "Fit")]
    context: Option<NonZeroUsize>,

    /// Sequences at once that are to fit [default: 1]
    #[arg(long, value_name = "N", conflicts_with_all = CHOSEN, help_heading = "Fit")]
    concurrency: Option<NonZeroUsize>,

    #[command(flatten)]
    measure: MeasureOptions,

    /// How packed matrices are laid out: metal-marlin, or compressed-tensors, gptq or gguf for other engines
    #[arg(long, value_parser = layout, default_value_t = ExportLayout::MetalMarlin)]
    layout: ExportLayout,

    #[command(flatten)]
    shards: ShardOptions,

    /// Replace OUT if it is a model folder
    #[arg(long)]
    force: bool,

    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<NonZeroUsize>,

    /// List every matrix instead of summing up those of a kind
    #[arg(long, short)]
    verbose: bool,

    /// Print the report as one JSON object
    #[arg(long, conflicts_with = "verbose")]
    json: bool,
}

impl Args {
    /// Says what is wrong with options before the model is opened.
    fn check(&self) -> anyhow::Result<()> {
        self.recipe.recipe(self.layout).of_arguments()?;
        self.rotate.parts(self.layout).of_arguments()?;
        Ok(())
    }
}

/// Runs the command.
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    if args.shards.are_given() {
        return shards::run(&args);
    }
    let summary = write(&args)?;
    let text = if args.json { format!("{}\n", summary.to_json()) } else { summary.to_text() };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// What `--json` prints.
pub(super) fn report(args: Args) -> anyhow::Result<Value> {
    if args.shards.are_given() {
        return Ok(shards::write(&args)?.to_json());
    }
    Ok(write(&args)?.to_json())
}

/// Writes the quantised model.
fn write(args: &Args) -> anyhow::Result<Summary<'_>> {
    let started = Instant::now();
    args.check()?;
    let checkpoint = model::open(Some(&args.model), &args.hub)?;
    let measurement = args.measure.prepare(&checkpoint, args.threads)?;
    let threads = DeviceOptions { threads: args.threads, ..DeviceOptions::default() };
    let cold = args.cold.measure(&checkpoint, &args.calibration, &threads)?;
    let bits = args.bits.plan(&checkpoint, &args.calibration, args.layout, args.threads)?;
    let (recipe, account) = recipe(args, &checkpoint, cold.as_ref(), bits.as_ref())?;
    let method = args.recipe.method.unwrap_or(if recipe.linears.is_dense() { Method::Mse } else { Method::Gptq });
    if method != Method::Gptq
        && cold.is_none()
        && !args.bits.measures()
        && !args.scale_channels
        && args.calibration.is_given()
    {
        bail!(UsageError::new(
            "--calibration is for --method gptq, --scale-channels, --target-bpw and --cold-expert-format; without them no model is run"
        ));
    }
    let rounding = args.calibration.prepare(method, &checkpoint, &threads)?;
    let scaling = match args.scale_channels {
        true => Some(args.calibration.run(&checkpoint, &threads, "--scale-channels", "leave it out")?),
        false => None,
    };
    let licence = card::licence_of(&checkpoint)?;
    let formats = bits.as_ref().map_or_else(|| recipe.linears.to_string(), Bits::name);
    let plan = bits.as_ref().map(|bits| bits.plan.to_json());
    let report = in_pool(args.threads, || {
        let card = |report: &marlin_quantize::Report| {
            card::card(args, &formats, &rounding, &licence, report, held_out(report, &rounding).as_ref())
        };
        let mut bar = Bar::bytes("Quantising");
        let mut progress = |progress: marlin_quantize::Progress<'_>| bar.set(progress.done, progress.total);
        let options = QuantizeOptions {
            force: args.force,
            max_shard_bytes: args.shards.max_shard_size,
            layout: args.layout,
            calibration: rounding.calibration(),
            scaling: scaling.as_ref().map(Run::calibration),
            progress: Some(&mut progress),
            card: Some(&card),
            plan: plan.as_deref(),
            ..Default::default()
        };
        quantize(&checkpoint, &args.out, &recipe, options)
    })??;
    let measured = match &measurement {
        Some(measurement) => Some(
            in_pool(args.threads, || measurement.measure(&Checkpoint::open(&args.out)?))?
                .with_context(|| format!("{} is written, but its quality cannot be measured", args.out.display()))?,
        ),
        None => held_out(&report, &rounding),
    };
    if measurement.is_some() && args.layout != ExportLayout::Gguf {
        card::replace(&args.out, &card::card(args, &formats, &rounding, &licence, &report, measured.as_ref()))?;
    }
    drop(measurement);
    Ok(Summary { args, recipe, rounding, account, bits, cold, report, measured, time: started.elapsed() })
}

/// What becomes of each matrix, and of `--fit` what it takes.
fn recipe(
    args: &Args,
    checkpoint: &Checkpoint,
    cold: Option<&Cold>,
    bits: Option<&Bits>,
) -> anyhow::Result<(Recipe, Option<Account>)> {
    let (mut recipe, account) = match (args.recipe.recipe(args.layout)?, args.fit, bits) {
        (Some(mut recipe), ..) => {
            recipe.exceptions = cold.map_or_else(BTreeMap::new, Cold::schemes);
            recipe.exceptions.extend(exception::resolve(&args.matrix, checkpoint).of_arguments()?);
            (recipe, None)
        }
        (None, _, Some(Bits { plan, .. })) => {
            (plan.recipe(checkpoint, args.recipe.embedding(args.layout)?, args.recipe.search())?, None)
        }
        (None, Some(memory), None) => {
            let (fit, account) = best_mix(args, checkpoint, memory)?;
            (fit.recipe, Some(account))
        }
        // clap has seen to it that there is one of them.
        (None, None, None) => bail!(UsageError::new("name a --format, a --target-bpw, or what to --fit")),
    };
    recipe.rotate = args.rotate.parts(args.layout)?;
    Ok((recipe, account))
}

/// What calibration measured by itself.
fn held_out(report: &marlin_quantize::Report, rounding: &Rounding) -> Option<Measured> {
    Measured::held_out(report.kept_quality.as_ref()?, rounding.context()?)
}

/// The mix of `--fit`, and what it takes.
fn best_mix(args: &Args, checkpoint: &Checkpoint, memory: u64) -> anyhow::Result<(Fit, Account)> {
    if args.layout != ExportLayout::MetalMarlin {
        let layout = args.layout;
        bail!(UsageError::new(format!("--fit plans for this program; with the layout {layout} choose a --format")));
    }
    let device = DeviceOptions { threads: args.threads, ..DeviceOptions::default() };
    let backend = CpuBackend::new(device.cpu()).map_err(LoadError::Device)?;
    let planner = Planner::new(&backend, checkpoint).context("--fit cannot tell what the model takes")?;
    let context = args.context.map_or_else(|| usual_context(&planner), NonZeroUsize::get);
    let sequences = args.concurrency.map_or(1, NonZeroUsize::get);
    let budget = Budget { memory, context, sequences };
    let fit = fit(&planner, &budget, args.recipe.embedding(args.layout)?, args.recipe.search())?;
    let kv_bytes_per_token = planner.kv_bytes_per_token(KvType::default());
    let account =
        Account { plan: fit.plan, budget: MemoryBudget { device: memory, host: None }, sequences, kv_bytes_per_token };
    Ok((fit, account))
}

fn layout(name: &str) -> Result<ExportLayout, String> {
    ExportLayout::ALL.into_iter().find(|layout| layout.name() == name).ok_or_else(|| {
        let names = ExportLayout::ALL.map(ExportLayout::name);
        format!("layouts are {}", names.join(", "))
    })
}
