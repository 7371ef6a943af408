//! `metal-marlin quantize`: a checkpoint in fewer bits.

use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use marlin_checkpoint::Layout;
use marlin_format::{Format, Grouping, ScaleSearch, Scheme};
use marlin_quantize::{ErrorStats, MatrixReport, QuantizeOptions, Recipe, Report, quantize};
use metal_marlin::device::parse_threads;
use metal_marlin::load;
use serde_json::{Value, json};

use super::in_pool;
use crate::progress::Bar;

const EXAMPLES: &str = "\
Examples:
  metal-marlin quantize path/to/model out --format fp4
  metal-marlin quantize path/to/model out --format int4 --group-size 32
  metal-marlin quantize path/to/model out --format fp8 --group-size 128x128
  metal-marlin quantize path/to/model out --format fp4 --sparse-24
  metal-marlin quantize path/to/model out --bits 3 --embedding-format bf16 --json
  metal-marlin quantize path/to/model out --format int4 --layout compressed-tensors

Group sizes, where they are not given: fp4, int4, int4-sym and int8 128, int3 64, int2 32, fp8 row;
mxfp4 always has 32 and nvfp4 16. Norms and biases are kept as they are. An interrupted run leaves
OUT.partial; the same command goes on from there.

--sparse-24 keeps two of every four weights, those of largest magnitude. That saves a quarter of fp4's and
int4's bytes and three eighths of fp8's, and costs much quality unless the model was trained for it.

The layout compressed-tensors is for other engines (vLLM, transformers). It takes int4, int4-sym and int8 in
groups of columns or rows, fp8 a row, a tensor or a tile, mxfp4 and nvfp4; embedding and head are kept.";

/// Groups of an int8 embedding: fine, since every token's logit depends on it.
const EMBEDDING_GROUP: Grouping = Grouping::Columns(32);

/// Quantise the weights of a model
///
/// Writes a copy of a Hugging Face checkpoint whose matrices are stored in few bits, and reports how much that changes each of
/// them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of the model: config.json, tokenizer.json and *.safetensors in bf16, f16 or f32
    model: PathBuf,

    /// Folder to write
    out: PathBuf,

    /// Number format of the decoder's matrices: fp4, int4, int4-sym, int8, fp8, int3, int2, mxfp4 or nvfp4
    #[arg(long, short, value_parser = quantized_format, required_unless_present = "bits")]
    format: Option<Format>,

    /// Short for a format: 4 is fp4, 8 int8, 3 int3, 2 int2
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(2..=8))]
    bits: Option<u8>,

    /// Weights that share a scale: a number of columns, `row`, `tensor`, or a tile such as 128x128 [default: the
    /// format's own, see below]
    #[arg(long, short, value_name = "SIZE")]
    group_size: Option<Grouping>,

    /// Keep only the two largest of every four weights (2:4 sparsity): fp4, int4 and fp8. Embedding and head stay dense
    #[arg(long = "sparse-24")]
    sparse_24: bool,

    /// How scales are chosen
    #[arg(long, value_enum, default_value_t = Method::Mse)]
    method: Method,

    /// Number format of embedding and output head: one of the above, bf16, f16 or f32 [default: int8; with the layout
    /// compressed-tensors they are kept]
    #[arg(long, value_name = "FORMAT")]
    embedding_format: Option<Format>,

    /// Weights of the embedding that share a scale [default: 32 for int8, otherwise the format's own]
    #[arg(long, value_name = "SIZE")]
    embedding_group_size: Option<Grouping>,

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

/// `--method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Method {
    /// Round to nearest: the largest weight of a group just fits
    Rtn,
    /// Search the scale with the least squared error
    Mse,
}

impl From<Method> for ScaleSearch {
    fn from(method: Method) -> Self {
        match method {
            Method::Rtn => Self::AbsMax,
            Method::Mse => Self::Mse,
        }
    }
}

/// Storage of the decoder's matrices.
pub(super) fn linear_scheme(format: Format, grouping: Option<Grouping>, sparse_24: bool) -> anyhow::Result<Scheme> {
    Ok(if sparse_24 { format.sparse_24(grouping)? } else { format.scheme(grouping)? })
}

/// Storage of embedding and head.
pub(super) fn embedding_scheme(format: Format, grouping: Option<Grouping>) -> anyhow::Result<Scheme> {
    let usual = (format == Format::Int8).then_some(EMBEDDING_GROUP);
    Ok(format.scheme(grouping.or(usual))?)
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let recipe = Recipe {
        linears: linear_scheme(format(args.format, args.bits)?, args.group_size, args.sparse_24)?,
        embedding: embedding(&args)?,
        search: args.method.into(),
    };
    let started = Instant::now();
    let checkpoint = load::open_checkpoint(Some(&args.model))?;
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

/// What `--embedding-format` asks for, or else what suits the layout; `None` keeps embedding and head.
fn embedding(args: &Args) -> anyhow::Result<Option<Scheme>> {
    let usual = args.layout.packs_embeddings().then_some(Format::Int8);
    match (args.embedding_format.or(usual), args.embedding_group_size) {
        (Some(format), grouping) => embedding_scheme(format, grouping).map(Some),
        (None, None) => Ok(None),
        (None, Some(_)) => anyhow::bail!(
            "--embedding-group-size has nothing to group: the layout {} keeps embedding and head as they are",
            args.layout
        ),
    }
}

fn layout(name: &str) -> Result<Layout, String> {
    Layout::ALL.into_iter().find(|layout| layout.name() == name).ok_or_else(|| {
        let names = Layout::ALL.map(Layout::name);
        format!("layouts are {}", names.join(", "))
    })
}

pub(super) fn quantized_format(name: &str) -> Result<Format, String> {
    let quantized = || Format::ALL.into_iter().filter(|format| !format.is_dense());
    quantized().find(|format| format.name() == name).ok_or_else(|| {
        let names: Vec<&str> = quantized().map(Format::name).collect();
        format!("formats are {}", names.join(", "))
    })
}

/// The format that `--format` and `--bits` agree on; clap has seen to it that there is one of them.
fn format(format: Option<Format>, bits: Option<u8>) -> anyhow::Result<Format> {
    let Some(bits) = bits else { return format.ok_or_else(|| anyhow::anyhow!("name a --format")) };
    let short = match bits {
        2 => Some(Format::Int2),
        3 => Some(Format::Int3),
        4 => Some(Format::Fp4),
        8 => Some(Format::Int8),
        _ => None,
    };
    let Some(format) = format else {
        return short
            .ok_or_else(|| anyhow::anyhow!("there is no format of {bits} bits; there are some of 2, 3, 4 and 8"));
    };
    let found = format.scheme(None)?.element.bits();
    if found != u32::from(bits) {
        anyhow::bail!("--format {format} has codes of {found} bits, --bits asks for {bits}; give one of the two");
    }
    Ok(format)
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
    fn bits_stand_for_formats_and_must_agree() {
        assert_eq!(format(None, Some(4)).unwrap(), Format::Fp4);
        assert_eq!(format(None, Some(2)).unwrap(), Format::Int2);
        assert_eq!(format(Some(Format::Int4), Some(4)).unwrap(), Format::Int4);
        assert_eq!(format(Some(Format::Nvfp4), None).unwrap(), Format::Nvfp4);
        let error = format(Some(Format::Int8), Some(4)).unwrap_err().to_string();
        assert_eq!(error, "--format int8 has codes of 8 bits, --bits asks for 4; give one of the two");
        assert!(format(None, Some(5)).unwrap_err().to_string().contains("5 bits"));
    }

    #[test]
    fn kinds_are_names_without_their_layer() {
        assert_eq!(layer_and_kind("model.layers.12.mlp.up_proj.weight"), (Some("12"), "mlp.up_proj"));
        assert_eq!(layer_and_kind("model.embed_tokens.weight"), (None, "model.embed_tokens"));
    }
}
