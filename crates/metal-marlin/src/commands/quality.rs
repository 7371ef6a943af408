//! `metal-marlin quality`: every format measured on one model, as a page of documentation.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Context;
use marlin_checkpoint::Checkpoint;
use marlin_format::{Format, FormatError, Grouping, ScaleSearch, Scheme};
use marlin_kernels::KvType;
use marlin_model::Planner;
use marlin_quantize::{
    Divergence, Footprint, LogitSource, ModelLogits, Quality, QuantizeOptions, Recipe, RecordedLogits, Windows,
    embedding_scheme, evaluate, quantize,
};
use metal_marlin::device::{Device, parse_threads};
use metal_marlin::{DeviceOptions, LoadError};

use super::in_pool;
use super::measure::{load_model, usual_context, usual_kv, windows};
use super::model::{self, HubOptions};
use crate::progress::Bar;

const EXAMPLES: &str = "\
Examples:
  metal-marlin quality path/to/model --text data/text/validation.txt --out docs/quality.md
  metal-marlin quality path/to/model --text data/text/validation.txt --out quick.md --windows 2

Each variant is quantised into a temporary folder and removed after it is measured. The logits of
the unquantised model are kept in a temporary file of 4 bytes x vocabulary x tokens (TMPDIR says where).";

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

    /// Measure on the first windows only
    #[arg(long, value_name = "N")]
    windows: Option<NonZeroUsize>,

    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<NonZeroUsize>,
}

const fn columns(columns: u32) -> Option<Grouping> {
    Some(Grouping::Columns(columns))
}

/// The dense formats, each measured with both ways to choose scales; `None` stands for the format's usual groups.
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
const METHODS: [(ScaleSearch, &str); 2] = [(ScaleSearch::AbsMax, "RTN"), (ScaleSearch::Mse, "MSE")];

/// What is measured: the dense formats, then the 2:4 variants in their usual groups.
fn variants() -> Result<Vec<Scheme>, FormatError> {
    let dense = DENSE.into_iter().map(|(format, grouping)| format.scheme(grouping));
    dense.chain(Format::SPARSE.into_iter().map(|format| format.sparse_24(None))).collect()
}

/// A line of the table.
struct Row {
    name: String,
    method: &'static str,
    footprint: Footprint,
    perplexity: f64,
    exact: Divergence,
    /// With int8 activations; measured for searched scales only, since rounding activations does not depend on how scales were
    /// chosen.
    int8: Option<Divergence>,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let source = model::open(Some(&args.model), &args.hub)?;
    let context = usual_context(&[&source]);
    let windows = windows(&[&source], &args.text, context, args.windows)?;
    let measure = Measure { source: &source, windows: &windows, context, threads: args.threads };
    let page = in_pool(args.threads, || -> anyhow::Result<String> {
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
    threads: Option<NonZeroUsize>,
}

impl Measure<'_> {
    /// The unquantised model, every variant, and every KV cache.
    fn all(&self) -> anyhow::Result<Measured> {
        let schemes = variants()?;
        let kv_types = KvType::ALL.into_iter().filter(|&kv_type| kv_type != usual_kv(true));
        let variants = schemes.len() * METHODS.len() + kv_types.clone().count();
        let mut model = load_model(self.source, &self.device(true)?, usual_kv(true), self.context)?;
        let mut recorded = {
            let mut bar = Bar::counting("Measuring the original", "tokens");
            let mut logits = ModelLogits::new(model.as_mut());
            RecordedLogits::record(&mut logits, self.windows, |done| {
                bar.set(done as u64, self.windows.predicted() as u64)
            })?
        };
        drop(model);
        let baseline = evaluate(&mut recorded, None, self.windows, |_| {})?;

        let mut rows = Vec::with_capacity(variants);
        let mut bar = Bar::counting("Measuring", "variants");
        bar.set(0, variants as u64);
        for linears in schemes {
            for (search, method) in METHODS {
                let embedding = Some(embedding_scheme(Format::Int8, None)?);
                let recipe = Recipe::uniform(linears, embedding, search);
                let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
                let out = folder.path().join("model");
                let report = quantize(self.source, &out, &recipe, QuantizeOptions::default())?;
                let quantized = Checkpoint::open(&out)?;
                let (perplexity, exact) = self.compare(&quantized, true, usual_kv(true), &mut recorded)?;
                let int8 = match search {
                    ScaleSearch::AbsMax => None,
                    ScaleSearch::Mse => Some(self.compare(&quantized, false, usual_kv(false), &mut recorded)?.1),
                };
                let name = recipe.linears.to_string();
                rows.push(Row { name, method, footprint: report.after, perplexity, exact, int8 });
                bar.set(rows.len() as u64, variants as u64);
            }
        }
        let head_dim = Planner::new(self.device(true)?.memory_use(), self.source)?.shape().head_dim;
        let mut kv = Vec::new();
        for kv_type in kv_types {
            let (perplexity, divergence) = self.compare(self.source, true, kv_type, &mut recorded)?;
            let bits = (8 * kv_type.head_bytes(head_dim)) as f64 / head_dim as f64;
            kv.push((kv_type, bits, perplexity, divergence));
            bar.set((rows.len() + kv.len()) as u64, variants as u64);
        }
        Ok(Measured { baseline, rows, kv })
    }

    /// Perplexity and divergence of a variant.
    fn compare(
        &self,
        variant: &Checkpoint,
        exact: bool,
        kv_type: KvType,
        baseline: &mut dyn LogitSource,
    ) -> anyhow::Result<(f64, Divergence)> {
        let mut model = load_model(variant, &self.device(exact)?, kv_type, self.context)?;
        let mut logits = ModelLogits::new(model.as_mut());
        let quality = evaluate(&mut logits, Some(baseline), self.windows, |_| {})?;
        let divergence = quality.divergence.context("an evaluation against a baseline has a divergence")?;
        Ok((quality.perplexity(), divergence))
    }

    fn device(&self, exact: bool) -> Result<Device, LoadError> {
        let options = DeviceOptions { threads: self.threads, exact, ..DeviceOptions::default() };
        options.open().map_err(LoadError::Device)
    }
}

fn page(args: &Args, measure: &Measure<'_>, measured: &Measured) -> String {
    let Measured { baseline, rows, kv } = measured;
    let before = Footprint::of(measure.source);
    let model = name(&args.model);
    let mut page = format!(
        "# What quantisation costs\n\n\
         `{model}` quantised by `metal-marlin quantize` into every format, measured on `{text}`: {tokens} predicted\n\
         tokens in {windows} windows of {context} (`metal-marlin eval --help` says how). This page is written by\n\n\
         ```\n\
         metal-marlin quality {model} --text {text} --out {out}{limit}\n\
         ```\n\n\
         - **bits**: per weight, scales and zero points counted; of everything (embedding, norms) and of the decoder's\n  \
           linears alone. Embedding and tied head are int8 in groups of 32 in every row but the first.\n\
         - **g32**, **row**, **128x128**, **tensor**: the weights that share a scale.\n\
         - **2:4** keeps the two largest of every four weights and nothing of the others. The model was not trained for that:\n  \
           these rows show what pruning by magnitude alone costs, which training after it would win back in part.\n\
         - **RTN** rounds to nearest with the largest weight of a group just fitting, **MSE** searches the scale of least\n  \
           squared error.\n\
         - **KL**: divergence of the next-token distribution from the unquantised model's, KL(P ‖ Q) in nats a token; its\n  \
           mean and 99th percentile. **top-1**: how often both find the same token most likely.\n\
         - All columns but the last are measured with `--exact` (f32 activations and KV cache), so they show the weights'\n  \
           rounding alone. **int8 KL** is the mean with the CPU's default arithmetic: activations rounded to int8 in groups\n  \
           of 32 (for weights that are no floats of 8 or more bits), KV cache in f16.\n\n\
         | format | scales | bits, all | bits, linears | perplexity | mean KL | p99 KL | top-1 | int8 KL |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        text = name(&args.text),
        tokens = baseline.tokens,
        windows = baseline.window_nll.len(),
        context = measure.context,
        out = name(&args.out),
        limit = args.windows.map_or(String::new(), |windows| format!(" --windows {windows}")),
    );
    page += &format!(
        "| unquantised | | {:.2} | {:.2} | {:.4} | 0 | 0 | 100 % | |\n",
        before.bits_per_weight(),
        before.linear_bits_per_weight(),
        baseline.perplexity()
    );
    for row in rows {
        page += &format!(
            "| {} | {} | {:.2} | {:.3} | {:.3} | {:.5} | {:.4} | {:.2} % | {} |\n",
            row.name,
            row.method,
            row.footprint.bits_per_weight(),
            row.footprint.linear_bits_per_weight(),
            row.perplexity,
            row.exact.mean_kl,
            row.exact.p99_kl,
            row.exact.top1_agreement * 100.0,
            row.int8.map_or(String::new(), |int8| format!("{:.5}", int8.mean_kl)),
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

/// The last part of a path: pages do not depend on where their sources lie.
fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
