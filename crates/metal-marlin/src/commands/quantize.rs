//! `metal-marlin quantize`: a checkpoint in fewer bits.

use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use marlin_checkpoint::Layout;
use marlin_format::Scheme;
use marlin_quantize::{ErrorStats, MatrixReport, QuantizeOptions, Recipe, Report, quantize};
use metal_marlin::device::parse_threads;
use serde_json::{Value, json};

use super::model::HubOptions;
use super::recipe::{NUMBER_FORMAT, RecipeOptions};
use super::{in_pool, model};
use crate::progress::Bar;

const EXAMPLES: &str = "\
Examples:
  metal-marlin quantize path/to/model out --format fp4
  metal-marlin quantize path/to/model out --format int4 --group-size 32
  metal-marlin quantize path/to/model out --format fp8 --group-size 128x128
  metal-marlin quantize path/to/model out --format fp4 --sparse-24
  metal-marlin quantize path/to/model out --bits 3 --embedding-format bf16 --json
  metal-marlin quantize path/to/model out --format int4 --layout compressed-tensors
  metal-marlin quantize Qwen/Qwen3-4B out --format fp4

Group sizes, where they are not given: fp4, int4, int4-sym and int8 128, int3 64, int2 32, fp8 row;
mxfp4 always has 32 and nvfp4 16. Norms and biases are kept as they are. An interrupted run leaves
OUT.partial; the same command goes on from there.

--sparse-24 keeps two of every four weights, those of largest magnitude. That saves a quarter of fp4's and
int4's bytes and three eighths of fp8's, and costs much quality unless the model was trained for it.

The layout compressed-tensors is for other engines (vLLM, transformers). It takes int4, int4-sym and int8 in
groups of columns or rows, fp8 a row, a tensor or a tile, mxfp4 and nvfp4; embedding and head are kept.";

/// Quantise the weights of a model
///
/// Writes a copy of a Hugging Face checkpoint whose matrices are stored in few bits, and reports how much that changes each of
/// them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, mut_group(NUMBER_FORMAT, |formats| formats.required(true)))]
pub(crate) struct Args {
    /// Model in bf16, f16 or f32: a folder with config.json, tokenizer.json and *.safetensors, or its id on the Hub
    model: PathBuf,

    /// Folder to write
    out: PathBuf,

    #[command(flatten)]
    hub: HubOptions,

    #[command(flatten)]
    recipe: RecipeOptions,

    /// How packed matrices are laid out: metal-marlin, or compressed-tensors for other engines
    #[arg(long, value_parser = layout, default_value_t = Layout::MetalMarlin)]
    layout: Layout,

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

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let recipe = args.recipe.recipe(args.layout)?.context("name a --format")?;
    let started = Instant::now();
    let checkpoint = model::open(Some(&args.model), &args.hub)?;
    let report = in_pool(args.threads, || {
        let mut bar = Bar::bytes("Quantising");
        let mut progress = |progress: marlin_quantize::Progress<'_>| bar.set(progress.done, progress.total);
        let options = QuantizeOptions {
            force: args.force,
            layout: args.layout,
            progress: Some(&mut progress),
            ..Default::default()
        };
        quantize(&checkpoint, &args.out, &recipe, options)
    })??;
    let seconds = started.elapsed().as_secs_f64();
    let text = if args.json {
        format!("{}\n", to_json(&args, &recipe, &report, seconds))
    } else {
        to_text(&args, &report, seconds)
    };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}

fn layout(name: &str) -> Result<Layout, String> {
    Layout::ALL.into_iter().find(|layout| layout.name() == name).ok_or_else(|| {
        let names = Layout::ALL.map(Layout::name);
        format!("layouts are {}", names.join(", "))
    })
}

fn to_json(args: &Args, recipe: &Recipe, report: &Report, seconds: f64) -> Value {
    let matrix = |m: &MatrixReport| {
        json!({
            "name": m.name,
            "shape": m.shape,
            "scheme": m.scheme.to_string(),
            "bits_per_weight": m.scheme.bits_per_weight(m.shape[0], m.shape[1]),
            "relative_rms_error": m.error.relative_rms(),
            "sqnr_db": m.error.sqnr_db(),
            "max_abs_error": m.error.max_abs,
        })
    };
    json!({
        "model": args.model,
        "out": args.out,
        "scheme": recipe.linears.to_string(),
        "embedding_scheme": recipe.embedding.map(|scheme| scheme.to_string()),
        "layout": args.layout.name(),
        "bits_per_weight": report.after.bits_per_weight(),
        "decoder_bits_per_weight": report.after.linear_bits_per_weight(),
        "bytes_before": report.before.bytes,
        "bytes_after": report.after.bytes,
        "matrices": report.matrices.iter().map(matrix).collect::<Vec<_>>(),
        "kept": report.kept,
        "resumed_tensors": report.resumed,
        "seconds": seconds,
    })
}

fn to_text(args: &Args, report: &Report, seconds: f64) -> String {
    let lines = if args.verbose { every_matrix(report) } else { by_kind(report) };
    let width = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
    let stored = lines.iter().map(|line| line.scheme.to_string().len()).max().unwrap_or(0).max(13);
    let mut text = format!(
        "{:width$} {:>8}  {:<stored$} {:>6}  {:>9} {:>8} {:>10}  worst\n",
        "matrix", "matrices", "stored as", "bits", "rms error", "SQNR", "max error"
    );
    for line in &lines {
        text += &format!(
            "{:width$} {:>8}  {:<stored$} {:>6.3}  {:>8.3}% {:>5.1} dB {:>10.2e}  {}\n",
            line.name,
            line.count,
            line.scheme.to_string(),
            line.bits,
            line.error.relative_rms() * 100.0,
            line.error.sqnr_db(),
            line.error.max_abs,
            line.worst,
        );
    }
    let (before, after) = (&report.before, &report.after);
    text += &format!(
        "\ndecoder linears {:>7.3} bits per weight {:>10.1} MB, from {:.1} MB\n",
        after.linear_bits_per_weight(),
        megabytes(after.linear_bytes),
        megabytes(before.linear_bytes),
    );
    text += &format!(
        "everything      {:>7.3} bits per weight {:>10.1} MB, from {:.1} MB\n",
        after.bits_per_weight(),
        megabytes(after.bytes),
        megabytes(before.bytes),
    );
    if !report.kept.is_empty() {
        text += &format!("kept as they are, being of no kind known: {}\n", report.kept.join(", "));
    }
    if report.resumed > 0 {
        text += &format!("went on after {} tensors of an interrupted run\n", report.resumed);
    }
    text += &format!("wrote {} in {seconds:.1} s\n", args.out.display());
    text
}

/// A line of the table.
struct Line {
    name: String,
    count: usize,
    scheme: Scheme,
    bits: f64,
    error: ErrorStats,
    /// Relative error of the worst matrix and where it is, if there are several.
    worst: String,
}

fn every_matrix(report: &Report) -> Vec<Line> {
    let line = |m: &MatrixReport| Line {
        name: m.name.clone(),
        count: 1,
        scheme: m.scheme,
        bits: m.scheme.bits_per_weight(m.shape[0], m.shape[1]),
        error: m.error,
        worst: String::new(),
    };
    report.matrices.iter().map(line).collect()
}

/// One line for the matrices that differ only in their layer.
fn by_kind(report: &Report) -> Vec<Line> {
    let mut kinds: Vec<(&str, Vec<&MatrixReport>)> = Vec::new();
    for matrix in &report.matrices {
        let (_, kind) = layer_and_kind(&matrix.name);
        match kinds.iter_mut().find(|(name, _)| *name == kind) {
            Some((_, matrices)) => matrices.push(matrix),
            None => kinds.push((kind, vec![matrix])),
        }
    }
    let line = |(kind, matrices): (&str, Vec<&MatrixReport>)| {
        let worst = matrices.iter().max_by(|a, b| a.error.relative_rms().total_cmp(&b.error.relative_rms()));
        let worst = worst.and_then(|m| Some((layer_and_kind(&m.name).0?, m.error.relative_rms() * 100.0)));
        let weights: f64 = matrices.iter().map(|m| (m.shape[0] * m.shape[1]) as f64).sum();
        let bits =
            |m: &&MatrixReport| m.scheme.bits_per_weight(m.shape[0], m.shape[1]) * (m.shape[0] * m.shape[1]) as f64;
        Line {
            name: kind.to_owned(),
            count: matrices.len(),
            scheme: matrices[0].scheme,
            bits: matrices.iter().map(bits).sum::<f64>() / weights,
            error: matrices.iter().map(|m| m.error).fold(ErrorStats::default(), ErrorStats::merge),
            worst: worst.map_or(String::new(), |(layer, error)| format!("{error:.3}% in layer {layer}")),
        }
    };
    kinds.into_iter().map(line).collect()
}

/// `model.layers.3.mlp.up_proj.weight` is `mlp.up_proj` of layer 3.
fn layer_and_kind(name: &str) -> (Option<&str>, &str) {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, kind)) => (Some(layer), kind),
        None => (None, name),
    }
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_names_without_their_layer() {
        assert_eq!(layer_and_kind("model.layers.12.mlp.up_proj.weight"), (Some("12"), "mlp.up_proj"));
        assert_eq!(layer_and_kind("model.embed_tokens.weight"), (None, "model.embed_tokens"));
    }
}
