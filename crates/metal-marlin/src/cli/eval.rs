//! `metal-marlin eval`: perplexity, and the distance to a baseline.

use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use marlin_checkpoint::Checkpoint;
use marlin_kernels::KvType;
use marlin_quantize::{Footprint, LogitSource, ModelLogits, Quality, evaluate};
use serde_json::{Value, json};

use super::measure::{Subject, usual_context, usual_kv, windows};
use super::model::{HubOptions, QuantizeOptions};
use super::{in_pool, model};
use crate::cli::progress::Bar;
use crate::device::KvFormat;
use crate::memory::MemoryOptions;
use crate::{DeviceOptions, LoadError};

const EXAMPLES: &str = "\
Examples:
  metal-marlin eval path/to/model --text data/text/validation.txt
  metal-marlin eval out --text data/text/validation.txt --baseline path/to/model
  metal-marlin eval Qwen/Qwen3-0.6B --format fp4 --baseline Qwen/Qwen3-0.6B --text data/text/validation.txt
  metal-marlin eval bundled --text data/text/validation.txt --windows 4 --json

The whole text is encoded at once without special tokens and cut into windows of --context tokens,
stride = window; every token but the first of each window is predicted. Perplexity is exp of their
mean negative log-likelihood. KL is KL(baseline || model) a token, in nats.

The baseline always runs with f32 activations and an f32 KV cache, so what is measured is all that
the model differs by. With --exact the model runs like that too, but for the KV cache if --kv says
otherwise: what that costs alone is `--exact --kv FORMAT --baseline` of the model itself.

MODEL is measured as it is stored; with --format it is quantised first, once: the result is kept
(`metal-marlin cache`). --revision holds for the baseline too if that is the same model.";

/// Measure a model's perplexity on a text, and how far it is from another model
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of the model, its id on the Hub, or `bundled`
    model: PathBuf,

    /// Text to measure on, a UTF-8 file
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Model to compare with, usually the one that MODEL was quantised from
    #[arg(long, value_name = "MODEL")]
    baseline: Option<PathBuf>,

    /// Tokens of a window [default: 1024, or what the models allow]
    #[arg(long, value_name = "N")]
    context: Option<NonZeroUsize>,

    /// Measure on the first windows only
    #[arg(long, value_name = "N")]
    windows: Option<NonZeroUsize>,

    /// Number format of MODEL's cached keys and values [default: f16; f32 with --exact]
    #[arg(long, value_enum, value_name = "FORMAT")]
    kv: Option<KvFormat>,

    #[command(flatten)]
    hub: HubOptions,

    #[command(flatten)]
    quantize: QuantizeOptions,

    #[command(flatten)]
    device: DeviceOptions,

    #[command(flatten)]
    memory: MemoryOptions,

    /// Print the result as one JSON object
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// Runs the command.
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let evaluation = measure(&args)?;
    let text = if args.json { format!("{}\n", evaluation.to_json(&args)) } else { evaluation.to_text() };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// What `--json` prints.
pub(super) fn report(args: Args) -> anyhow::Result<Value> {
    Ok(measure(&args)?.to_json(&args))
}

/// What was measured.
struct Evaluation {
    kv_type: KvType,
    context: usize,
    quality: Quality,
    footprint: Footprint,
    seconds: f64,
}

fn measure(args: &Args) -> anyhow::Result<Evaluation> {
    let started = Instant::now();
    let (checkpoint, _temporary) =
        model::open_quantized(Some(&args.model), &args.hub, &args.quantize, args.device.threads)?;
    // The same model is compared in the same revision.
    let same = args.baseline.as_ref() == Some(&args.model);
    let hub = if same { args.hub.clone() } else { HubOptions::default() };
    let baseline = args.baseline.as_deref().map(|baseline| model::open(Some(baseline), &hub)).transpose()?;
    let checkpoints: Vec<&Checkpoint> = [Some(&checkpoint), baseline.as_ref()].into_iter().flatten().collect();
    let context = args.context.map_or_else(|| usual_context(&checkpoints), NonZeroUsize::get);
    let windows = windows(&checkpoints, &args.text, context, args.windows)?;

    let device = args.device.open().map_err(LoadError::Device)?;
    let exact = DeviceOptions { exact: true, ..args.device.clone() };
    let baseline = match baseline {
        Some(baseline) => Some((baseline, exact.open().map_err(LoadError::Device)?)),
        None => None,
    };
    let kv_type = args.kv.map_or(usual_kv(args.device.exact), KvType::from);
    let load = args.quantize.load();
    let model = Subject { checkpoint: &checkpoint, device: &device, kv_type, context, load };
    let baseline = baseline.as_ref().map(|(checkpoint, device)| {
        let kv_type = usual_kv(true);
        Subject { checkpoint, device, kv_type, context, load }
    });
    if let Some(budget) = args.memory.budget(&device) {
        // The baseline is there at the same time.
        let left = match baseline {
            Some(baseline) => budget.without(&baseline.require_fit(&budget)?),
            None => budget,
        };
        model.require_fit(&left)?;
    }
    let mut model = model.load()?;
    let mut baseline = baseline.map(|baseline| baseline.load()).transpose()?;
    let quality = in_pool(args.device.threads, || {
        let mut bar = Bar::counting("Evaluating", "tokens");
        let mut model = ModelLogits::new(model.as_mut());
        let mut baseline = baseline.as_mut().map(|baseline| ModelLogits::new(baseline.as_mut()));
        let baseline = baseline.as_mut().map(|baseline| baseline as &mut dyn LogitSource);
        evaluate(&mut model, baseline, &windows, |done| bar.set(done as u64, windows.predicted() as u64))
    })??;

    let (footprint, seconds) = (Footprint::of(&checkpoint), started.elapsed().as_secs_f64());
    Ok(Evaluation { kv_type, context, quality, footprint, seconds })
}

impl Evaluation {
    fn to_json(&self, args: &Args) -> Value {
        let Self { kv_type, context, quality, footprint, seconds } = self;
        let divergence = quality.divergence;
        json!({
            "model": args.model,
            "text": args.text,
            "baseline": args.baseline,
            "context": context,
            "windows": quality.window_nll.len(),
            "tokens": quality.tokens,
            "exact": args.device.exact,
            "kv_type": kv_type.name(),
            "perplexity": quality.perplexity(),
            "nll": quality.nll,
            "window_nll": quality.window_nll,
            "mean_kl": divergence.map(|d| d.mean_kl),
            "p99_kl": divergence.map(|d| d.p99_kl),
            "top1_agreement": divergence.map(|d| d.top1_agreement),
            "bits_per_weight": footprint.bits_per_weight(),
            "decoder_bits_per_weight": footprint.linear_bits_per_weight(),
            "seconds": seconds,
        })
    }

    fn to_text(&self) -> String {
        let Self { context, quality, footprint, seconds, .. } = self;
        let mut text = format!(
            "perplexity       {:.4}\n\
         mean nll         {:.6} nats, {} tokens in {} windows of {context}\n",
            quality.perplexity(),
            quality.nll,
            quality.tokens,
            quality.window_nll.len(),
        );
        if let Some(divergence) = quality.divergence {
            text += &format!(
                "mean KL          {:.6} nats\n\
             p99 KL           {:.6} nats\n\
             top-1 agreement  {:.2} %\n",
                divergence.mean_kl,
                divergence.p99_kl,
                divergence.top1_agreement * 100.0,
            );
        }
        text += &format!(
            "bits per weight  {:.3} ({:.3} of the decoder linears)\n\
         time             {seconds:.1} s\n",
            footprint.bits_per_weight(),
            footprint.linear_bits_per_weight(),
        );
        text
    }
}
