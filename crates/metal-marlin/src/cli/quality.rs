//! `metal-marlin quality`: every format measured on one model, as a page of documentation.

use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use marlin_checkpoint::Checkpoint;
use marlin_format::{Format, FormatError, Grouping, Scheme};
use marlin_kernels::KvType;
use marlin_model::RotationParts;
use marlin_quantize::{
    Calibration, Divergence, Footprint, LogitSource, ModelLogits, Quality, QuantizeError, QuantizeOptions, Recipe,
    Windows, embedding_scheme, evaluate, measure_sensitivity, quantize,
};

use super::calibration::{CalibrationOptions, Rounding};
use super::in_pool;
use super::measure::{Subject, name, usual_context, usual_kv, windows};
use super::model::{self, HubOptions};
use super::recipe::Method;
use crate::cli::progress::Bar;
use crate::device::Device;
use crate::memory::{MemoryBudget, MemoryOptions};
use crate::{DeviceOptions, LoadError};

const EXAMPLES: &str = "\
Examples:
  metal-marlin quality path/to/model --text data/text/validation.txt --out docs/quality.md
  metal-marlin quality path/to/model --text data/text/validation.txt --out quick.md --windows 2 --exact
  metal-marlin quality path/to/model --text data/text/validation.txt --out gpu.md --device gpu

All but the last column of the page is measured with f32 activations and an f32 KV cache, the last
one as the device computes by default. With --exact there is no such column.

Variants are quantised on the CPU and measured on the device. Only one model is in its memory at a
time; the unquantised one must fit. Each variant is quantised into a temporary folder and removed
after it is measured. The logits of the unquantised model are kept in a temporary file of 4 bytes x
vocabulary x tokens (TMPDIR says where).";

/// Measure every number format on a model and write a page about it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of the unquantised model, or its id on the Hub
    model: PathBuf,

    #[command(flatten)]
    hub: HubOptions,

    /// Text to measure on, a UTF-8 file
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Markdown file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// Tokens of a window [default: 1024, or what the model allows]
    #[arg(long, value_name = "N")]
    context: Option<NonZeroUsize>,

    /// Measure on the first windows only
    #[arg(long, value_name = "N")]
    windows: Option<NonZeroUsize>,

    #[command(flatten)]
    calibration: CalibrationOptions,

    #[command(flatten)]
    device: DeviceOptions,

    #[command(flatten)]
    memory: MemoryOptions,
}

const fn columns(columns: u32) -> Option<Grouping> {
    Some(Grouping::Columns(columns))
}

/// The dense formats, each measured with every method; `None` stands for the format's usual groups.
const DENSE: [(Format, Option<Grouping>); 17] = [
    (Format::Int8, columns(32)),
    (Format::Int8, columns(128)),
    (Format::Fp8, columns(128)),
    (Format::Fp8, Some(Grouping::Block { rows: 128, cols: 128 })),
    (Format::Fp8, Some(Grouping::Row)),
    (Format::Int4, columns(32)),
    (Format::Int4, columns(128)),
    (Format::Int4Sym, columns(32)),
    (Format::Int4Sym, columns(128)),
    (Format::Fp4, columns(32)),
    (Format::Fp4, columns(64)),
    (Format::Fp4, columns(128)),
    (Format::Fp4, Some(Grouping::Row)),
    (Format::Nvfp4, None),
    (Format::Mxfp4, None),
    (Format::Int3, None),
    (Format::Int2, None),
];

/// Bits per weight of the mixes of formats that are measured beside them.
const MIXES: [f64; 6] = [2.5, 3.0, 3.45, 3.5, 4.2, 4.8];

/// The formats, in their usual groups, that are measured rotated as well, or with scaled channels, and how they are rounded then.
const CHANGED: [(Change, Format, Method); 7] = [
    (Change::Scaled, Format::Int4, Method::Mse),
    (Change::Scaled, Format::Int3, Method::Mse),
    (Change::Scaled, Format::Int2, Method::Mse),
    (Change::Rotated, Format::Int3, Method::Mse),
    (Change::Rotated, Format::Int3, Method::Gptq),
    (Change::Rotated, Format::Int2, Method::Mse),
    (Change::Rotated, Format::Int2, Method::Gptq),
];

/// What becomes of a model before it is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Nothing,
    Rotated,
    Scaled,
}

/// How a model is quantised for a row of the table.
struct Variant {
    change: Change,
    linears: Scheme,
    method: Method,
}

/// What is measured: the dense formats, then the 2:4 variants in their usual groups, each with every method; then the changed ones.
fn variants() -> Result<Vec<Variant>, FormatError> {
    let dense = DENSE.into_iter().map(|(format, grouping)| format.scheme(grouping));
    let sparse = Format::SPARSE.into_iter().map(|format| format.sparse_24(None));
    let mut variants = Vec::new();
    for linears in dense.chain(sparse) {
        let linears = linears?;
        variants.extend(Method::ALL.map(|method| Variant { change: Change::Nothing, linears, method }));
    }
    for (change, format, method) in CHANGED {
        variants.push(Variant { change, linears: format.scheme(None)?, method });
    }
    Ok(variants)
}

/// A line of the table.
struct Row {
    name: String,
    method: String,
    footprint: Footprint,
    /// What quantising took.
    seconds: f64,
    perplexity: f64,
    exact: Divergence,
    /// With rounded activations; measured for MSE only, since rounding activations does not depend on how weights were
    /// rounded.
    rounded: Option<Divergence>,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let source = model::open(Some(&args.model), &args.hub)?;
    let context = args.context.map_or_else(|| usual_context(&[&source]), NonZeroUsize::get);
    let windows = windows(&[&source], &args.text, context, args.windows)?;
    let open = |exact| DeviceOptions { exact, ..args.device.clone() }.open().map_err(LoadError::Device);
    let exact = open(true)?;
    let rounding = if args.device.exact { None } else { Some(open(false)?) };
    let memory = args.memory.budget(&exact);
    let gptq = args.calibration.prepare(Method::Gptq, &source, &args.device)?;
    let measure = Measure { source: &source, windows: &windows, context, exact, rounding, gptq, memory };
    let page = in_pool(args.device.threads, || -> anyhow::Result<String> {
        let measured = measure.all()?;
        Ok(page(&args, &measure, &measured))
    })??;
    fs::write(&args.out, page).with_context(|| format!("cannot write {}", args.out.display()))
}

/// What a page is about.
struct Measured {
    baseline: Quality,
    rows: Vec<Row>,
    /// The unquantised model with each KV cache that is less exact than the baseline's: bits a value, perplexity, divergence.
    kv: Vec<(KvType, f64, f64, Divergence)>,
}

/// What all measurements share.
struct Measure<'a> {
    source: &'a Checkpoint,
    windows: &'a Windows,
    context: usize,
    /// Computes in f32.
    exact: Device,
    /// The same device as it computes by default, for the last column.
    rounding: Option<Device>,
    gptq: Rounding,
    /// What a model may take of the device's memory, as of before the first was loaded.
    memory: Option<MemoryBudget>,
}

impl Measure<'_> {
    /// The unquantised model, every variant, and every KV cache.
    fn all(&self) -> anyhow::Result<Measured> {
        let quantized = variants()?;
        let kv_types = KvType::ALL.into_iter().filter(|&kv_type| kv_type != usual_kv(true));
        let variants = quantized.len() + MIXES.len() + kv_types.clone().count();
        let mut recorded = self.subject(self.source, &self.exact, usual_kv(true))?.record(self.windows)?;
        let baseline = evaluate(&mut recorded, None, self.windows, |_| {})?;

        let mut rows = Vec::with_capacity(variants);
        let mut bar = Bar::counting("Measuring", "variants");
        bar.set(0, variants as u64);
        let embedding = Some(embedding_scheme(Format::Int8, None)?);
        for Variant { change, linears, method } in quantized {
            let recipe = Recipe::uniform(linears, embedding, method.search());
            rows.push(self.row(linears.to_string(), change, method, recipe, &mut recorded)?);
            bar.set(rows.len() as u64, variants as u64);
        }
        let calibration = self.gptq.calibration().expect("gptq is calibrated");
        let mut plan = measure_sensitivity(self.source, &calibration, &mut |_, _| {})?;
        for target in MIXES {
            match plan.allocate(target) {
                // Scales weigh more where matrices are small.
                Err(QuantizeError::TargetBits { .. }) => continue,
                other => other?,
            }
            let recipe = plan.recipe(self.source, embedding, Method::Gptq.search())?;
            rows.push(self.row(format!("mix of {target}"), Change::Nothing, Method::Gptq, recipe, &mut recorded)?);
            bar.set(rows.len() as u64, variants as u64);
        }
        let head_dim = self.exact.planner(self.source)?.shape().head_dim;
        let mut kv = Vec::new();
        for kv_type in kv_types {
            let (perplexity, divergence) = self.compare(self.source, &self.exact, kv_type, &mut recorded)?;
            let bits = (8000 * kv_type.head_bytes(head_dim) / head_dim) as f64 / 1000.0;
            kv.push((kv_type, bits, perplexity, divergence));
            bar.set((rows.len() + kv.len()) as u64, variants as u64);
        }
        Ok(Measured { baseline, rows, kv })
    }

    /// Quantises the model, and measures what became of it.
    fn row(
        &self,
        name: String,
        change: Change,
        method: Method,
        recipe: Recipe,
        baseline: &mut dyn LogitSource,
    ) -> anyhow::Result<Row> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let out = folder.path().join("model");
        // What is kept is measured here.
        let text = |is_needed: bool| {
            let calibration = self.gptq.calibration().filter(|_| is_needed);
            calibration.map(|calibration| Calibration { held_out: None, ..calibration })
        };
        let options = QuantizeOptions {
            calibration: text(method == Method::Gptq),
            scaling: text(change == Change::Scaled),
            ..Default::default()
        };
        let rotate = if change == Change::Rotated { RotationParts::USUAL } else { RotationParts::default() };
        let started = Instant::now();
        let report = quantize(self.source, &out, &Recipe { rotate, ..recipe }, options)?;
        let seconds = started.elapsed().as_secs_f64();
        let quantized = Checkpoint::open(&out)?;
        let (perplexity, exact) = self.compare(&quantized, &self.exact, usual_kv(true), baseline)?;
        let rounded = match &self.rounding {
            Some(device) if method == Method::Mse => {
                Some(self.compare(&quantized, device, usual_kv(false), baseline)?.1)
            }
            _ => None,
        };
        let method = match change {
            Change::Nothing => method.name().to_owned(),
            Change::Rotated => format!("{} rotated", method.name()),
            Change::Scaled => format!("{} scaled", method.name()),
        };
        Ok(Row { name, method, footprint: report.after, seconds, perplexity, exact, rounded })
    }

    /// Perplexity and divergence of a variant.
    fn compare(
        &self,
        variant: &Checkpoint,
        device: &Device,
        kv_type: KvType,
        baseline: &mut dyn LogitSource,
    ) -> anyhow::Result<(f64, Divergence)> {
        let mut model = self.subject(variant, device, kv_type)?.load()?;
        let mut logits = ModelLogits::new(model.as_mut());
        let quality = evaluate(&mut logits, Some(baseline), self.windows, |_| {})?;
        let divergence = quality.divergence.context("an evaluation against a baseline has a divergence")?;
        Ok((quality.perplexity(), divergence))
    }

    /// The options that what is measured depends on, as they are given again.
    fn options(&self, args: &Args) -> String {
        let device = if self.exact.gpu().is_some() { "gpu" } else { "cpu" };
        [
            format!(" --device {device}"),
            args.device.expert_device.as_ref().map_or(String::new(), |experts| format!(" --expert-device {experts}")),
            if args.device.exact { " --exact".into() } else { String::new() },
            if args.device.batch_invariant { " --batch-invariant".into() } else { String::new() },
            args.context.map_or(String::new(), |context| format!(" --context {context}")),
            args.windows.map_or(String::new(), |windows| format!(" --windows {windows}")),
            args.calibration.to_arguments(),
        ]
        .concat()
    }

    /// A model, the only one at a time, if the device has memory for it.
    fn subject<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        device: &'a Device,
        kv_type: KvType,
    ) -> Result<Subject<'a>, LoadError> {
        // Each of its models is measured once.
        let load = crate::load::load_model;
        let subject = Subject { checkpoint, device, kv_type, context: self.context, load };
        if let Some(memory) = &self.memory {
            subject.require_fit_unquantised(memory)?;
        }
        Ok(subject)
    }
}

/// Names of the last column's arithmetic, in its heading and in a sentence.
fn rounding(device: &Device) -> [&'static str; 2] {
    match device {
        Device::Cpu(_) => [
            "int8",
            "the CPU's default arithmetic: activations rounded to int8 in groups\n  \
             of 32 (for weights that are no floats of 8 or more bits), KV cache in f16",
        ],
        Device::Gpu { .. } => [
            "f16",
            "the GPU's default arithmetic: activations and weights rounded to\n  \
             f16, KV cache in f16",
        ],
    }
}

fn page(args: &Args, measure: &Measure<'_>, measured: &Measured) -> String {
    let Measured { baseline, rows, kv } = measured;
    let before = Footprint::of(measure.source);
    let model = name(&args.model);
    let rounding = measure.rounding.as_ref().map(rounding);
    // With `--exact` there is no last column.
    let last = |cell: String| if rounding.is_some() { format!(" {cell} |") } else { String::new() };
    let mut page = format!(
        "# What quantisation costs\n\n\
         `{model}` quantised by `metal-marlin quantize` into every format, measured on `{text}`: {tokens} predicted\n\
         tokens in {windows} windows of {context} (`metal-marlin eval --help` says how). This page is written by\n\n\
         ```\n\
         metal-marlin quality {model} --text {text} --out {out}{options}\n\
         ```\n\n\
         - **bits**: per weight, scales and zero points counted; of everything (embedding, norms) and of the decoder's\n  \
           linears alone. Embedding and tied head are int8 in groups of 32 in every row but the first.\n\
         - **g32**, **row**, **128x128**, **tensor**: the weights that share a scale.\n\
         - **2:4** keeps the two largest of every four weights and nothing of the others. The model was not trained for that:\n  \
           these rows show what pruning by magnitude alone costs, which training after it would win back in part.\n\
         - **rtn** rounds to nearest with the largest weight of a group just fitting, **mse** searches the scale of least\n  \
           squared error, **gptq** rounds with feedback of errors, calibrated on {calibration}.\n\
         - **rotated** models were rotated before (`quantize --rotate`), **scaled** ones had their channels scaled\n  \
           (`quantize --scale-channels`).\n\
         - **mix of 3.5** has formats chosen by `--target-bpw 3.5`, of which the measuring is not counted in **s**.\n\
         - **MB**: the output's tensors. **s**: what quantising took.\n\
         - **KL**: divergence of the next-token distribution from the unquantised model's, KL(P ‖ Q) in nats a token; its\n  \
           mean and 99th percentile. **top-1**: how often both find the same token most likely.\n\
         - {arithmetic}.\n\n\
         | format | method | bits, all | bits, linears | MB | s | perplexity | mean KL | p99 KL | top-1 |{heading}\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |{rule}\n",
        text = name(&args.text),
        tokens = baseline.tokens,
        windows = baseline.window_nll.len(),
        context = measure.context,
        calibration = measure.gptq.calibrated_on(),
        out = name(&args.out),
        options = measure.options(args),
        arithmetic = match rounding {
            Some([name, words]) => format!(
                "All columns but the last are measured with `--exact` (f32 activations and KV cache), so they show the weights'\n  \
                 rounding alone. **{name} KL** is the mean with {words}"
            ),
            None =>
                "All columns are measured with `--exact` (f32 activations and KV cache), so they show the weights'\n  \
                     rounding alone"
                    .into(),
        },
        heading = last(rounding.map_or(String::new(), |[name, _]| format!("{name} KL"))),
        rule = last("---:".into()),
    );
    page += &format!(
        "| unquantised | | {:.2} | {:.2} | {:.1} | | {:.4} | 0 | 0 | 100 % |{}\n",
        before.bits_per_weight(),
        before.linear_bits_per_weight(),
        before.bytes as f64 / 1e6,
        baseline.perplexity(),
        last(String::new()),
    );
    for row in rows {
        page += &format!(
            "| {} | {} | {:.2} | {:.3} | {:.1} | {:.1} | {:.3} | {:.5} | {:.4} | {:.2} % |{}\n",
            row.name,
            row.method,
            row.footprint.bits_per_weight(),
            row.footprint.linear_bits_per_weight(),
            row.footprint.bytes as f64 / 1e6,
            row.seconds,
            row.perplexity,
            row.exact.mean_kl,
            row.exact.p99_kl,
            row.exact.top1_agreement * 100.0,
            last(row.rounded.map_or(String::new(), |rounded| format!("{:.5}", rounded.mean_kl))),
        );
    }
    page += "\n## KV caches\n\n\
             The unquantised model with `--exact` and keys and values cached in each format (`--kv`); bits are of a value, scales\n\
             counted. `metal-marlin eval MODEL --baseline MODEL --exact --kv fp8 --text TEXT` measures one.\n\n\
             | KV cache | bits | perplexity | mean KL | p99 KL | top-1 |\n\
             | --- | ---: | ---: | ---: | ---: | ---: |\n";
    page += &format!("| f32 | 32 | {:.4} | 0 | 0 | 100 % |\n", baseline.perplexity());
    for (kv_type, bits, perplexity, divergence) in kv {
        let Divergence { mean_kl, p99_kl, top1_agreement, .. } = divergence;
        let (name, top1) = (kv_type.name(), top1_agreement * 100.0);
        page += &format!("| {name} | {bits} | {perplexity:.3} | {mean_kl:.7} | {p99_kl:.6} | {top1:.2} % |\n");
    }
    page
}
