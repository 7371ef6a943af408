//! `metal-marlin bench`: how fast a model runs.

use std::fs;
use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Arg, ArgMatches, Command, FromArgMatches};
use marlin_format::{FOREIGN, Format, Grouping, Scheme};
use marlin_quantize::embedding_scheme;

use super::model::{self, HubOptions, QuantizeOptions};
use super::recipe::{self, HEADING, RecipeOptions};
use crate::DeviceOptions;
use crate::bench::{self, OutputFormat, Plan, Report, Shape};
use crate::cli::progress::{self, Bar};
use crate::device::KvFormat;
use crate::memory::MemoryOptions;

const EXAMPLES: &str = "\
Examples:
  metal-marlin bench path/to/model
  metal-marlin bench Qwen/Qwen3-0.6B --format int4
  metal-marlin bench --shape qwen3-4b --format fp4
  metal-marlin bench --shape llama-3.1-8b --format int4 --group-size 32 --threads 8
  metal-marlin bench --shape qwen3-4b --format fp4 --sparse-24
  metal-marlin bench --shape qwen3-0.6b --prefill 512 --decode 32 --depths 0 --repetitions 3
  metal-marlin bench --shape qwen3-4b --device gpu --prefill 0 --depths 0 --profile
  metal-marlin bench --shape qwen3-4b --prefill 0 --decode 128 --streams 1,8,32
  metal-marlin bench --shape qwen3-0.6b --device cpu --threads 1,2 --roofline roofline.svg
  metal-marlin bench bundled --output json

pp128 is the prefill of a prompt of 128 tokens, tg64 @ d1024 the decoding of 64 tokens after 1024
others, as in llama-bench. tg64 x32 is 32 sequences that decode 64 tokens each, side by side: every
step runs one token of each (S_TG of llama-batched-bench, where --streams is -npl). Their tokens/s
are those of all streams together. The tokens before a decode test are run through the model, once a
depth, for each stream others, without being timed. Tokens are random, and nothing is sampled. Given
are medians with the least and the most.

MB/token is what a token has to read: the weights as they are stored, which the streams of a step
or the tokens of a prompt read together, each a share, and the keys and values that it sees. The
share of memory compares tokens/s x MB/token with the rate at which as many threads read a buffer
larger than the caches, measured before and after the tests; a model that fits the caches can be
faster. The share of the peak compares a token's multiply-adds (one for each weight of linears, two
for each position and value of a query head) with the rate at which a CPU's threads multiply what
lies in their registers, int8 or with --exact f32, measured before and after, too.

--roofline draws both: multiply-adds a second of each test over multiply-adds for each byte read,
under the roofs that memory and arithmetic make. With several numbers of --threads the tests run
for each of them.

MODEL runs as it is stored; with --format it is quantised first, once: the result is kept
(`metal-marlin cache`).

--profile runs each test again with every kernel in a pass of its own, whose begin and end the GPU's
clock tells: for each kind of kernel, how many a token or a prompt has, what they take together, and
what passes between kernels. Steps are slower that way, mostly those of many small kernels; compare
with tokens/s.

Peak memory counts from the beginning of the load, which holds a shape's random matrices (one of each
size) beside the loaded model.";

/// Most repetitions of a test.
const MOST_REPETITIONS: usize = 1000;

/// Most streams of a test: as many tokens as a step of a prompt has.
const MOST_STREAMS: usize = 512;

/// Measure prefill and decode speed of a model, or of a known shape with random weights
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, mut_arg("revision", |revision| revision.conflicts_with("shape")))]
pub(crate) struct Args {
    /// Folder of the model, its id on the Hub, or `bundled`
    #[arg(required_unless_present = "shape", conflicts_with = "shape")]
    model: Option<PathBuf>,

    /// Measure random weights in the shape of a known model: tiny, tiny-moe, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b,
    /// qwen3-14b, qwen3-32b, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, qwen3-moe-8l, qwen3-30b-a3b or glm-4.7-flash
    #[arg(long, value_name = "NAME")]
    shape: Option<String>,

    #[command(flatten)]
    hub: HubOptions,

    /// Number format that MODEL is quantised into [default: as it is stored], or that the shape's matrices have: fp4,
    /// int4, int4-sym, int8, fp8, int3, int2, mxfp4, nvfp4, for shapes also bf16, f16 or f32 [default: fp4]
    #[arg(long, short, help_heading = HEADING)]
    format: Option<Format>,

    /// Storage of another program that the shape's matrices have: gptq, gptq-act-order, awq, fp8-block, mlx-4bit, q4_0, q4_1, q5_0, q5_1,
    /// q8_0, q2_k, q3_k, q4_k, q5_k, q6_k or iq4_nl
    #[arg(long, value_name = "NAME", value_parser = foreign_scheme, requires = "shape",
          conflicts_with_all = ["format", "group_size", "sparse_24"], help_heading = HEADING)]
    scheme: Option<Scheme>,

    /// Weights that share a scale, as in `quantize`
    #[arg(long, short, value_name = "SIZE", help_heading = HEADING)]
    group_size: Option<Grouping>,

    /// Keep two of every four weights, as in `quantize`: fp4, int4 and fp8
    #[arg(long = "sparse-24", help_heading = HEADING)]
    sparse_24: bool,

    /// Number format of embedding and output head [default: int8]
    #[arg(long, value_name = "FORMAT", help_heading = HEADING)]
    embedding_format: Option<Format>,

    /// Weights of the embedding that share a scale, as in `quantize`
    #[arg(long, value_name = "SIZE", help_heading = HEADING)]
    embedding_group_size: Option<Grouping>,

    /// Keep nothing for the next start: quantise MODEL into a temporary folder, and put weights into a CPU's order in memory only
    #[arg(long, conflicts_with = "shape", help_heading = HEADING)]
    no_cache: bool,

    /// Prompt lengths to measure; 0 for none
    #[arg(long, short, value_name = "N,…", value_delimiter = ',', default_value = "128,512", help_heading = "Tests")]
    prefill: Vec<usize>,

    /// Tokens to decode at each depth, by each stream; 0 for none
    #[arg(long, short = 'n', value_name = "N", default_value_t = 64, help_heading = "Tests")]
    decode: usize,

    /// Tokens in the KV cache before decoding begins [default: 0,1024,4096, as far as the model's context allows]
    #[arg(long, short, value_name = "N,…", value_delimiter = ',', help_heading = "Tests")]
    depths: Vec<usize>,

    /// How many sequences decode side by side, each with its own tokens in the KV cache
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_value = "1",
        value_parser = streams,
        help_heading = "Tests"
    )]
    streams: Vec<NonZeroUsize>,

    /// How often each test is repeated
    #[arg(long, short, value_name = "N", default_value = "5", value_parser = repetitions, help_heading = "Tests")]
    repetitions: NonZeroUsize,

    /// Time each kernel of a GPU, too, and print what a step is made of (with a GPU's clock; not in CSV)
    #[arg(long, help_heading = "Tests")]
    profile: bool,

    /// Draw the tests below the roofs of memory and arithmetic into this file, an SVG (of a CPU)
    #[arg(long, value_name = "FILE", help_heading = "Tests")]
    roofline: Option<PathBuf>,

    #[command(flatten)]
    devices: Devices,

    #[command(flatten)]
    memory: MemoryOptions,

    /// Number format of cached keys and values
    #[arg(long, value_enum, default_value_t = KvFormat::F16, help_heading = "Device")]
    kv: KvFormat,

    /// How to print the result
    #[arg(long, short, value_enum, default_value_t = OutputFormat::Text)]
    output: OutputFormat,
}

/// A device with each number of threads that the tests run on.
#[derive(Debug, Clone)]
struct Devices(Vec<DeviceOptions>);

impl FromArgMatches for Devices {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let options = DeviceOptions::from_arg_matches(matches)?;
        let with = |threads: &NonZeroUsize| DeviceOptions { threads: Some(*threads), ..options.clone() };
        let devices: Vec<_> = matches.get_many("threads").into_iter().flatten().map(with).collect();
        Ok(Self(if devices.is_empty() { vec![options] } else { devices }))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Devices {
    fn augment_args(command: Command) -> Command {
        const HELP: &str =
            "CPU threads; of several numbers, one after the other [default: one for each performance core]";
        let several = |threads: Arg| threads.value_name("N,…").value_delimiter(',').help(HELP);
        DeviceOptions::augment_args(command).mut_arg("threads", several)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if args.profile && args.output == OutputFormat::Csv {
        anyhow::bail!(
            "--output csv has no place for a profile, whose lines are kernels; choose text, markdown or json"
        );
    }
    if let Some(file) = &args.roofline {
        check_folder_of(file)?;
    }
    let reports = args.devices.0.iter().map(|device| args.measure(device)).collect::<anyhow::Result<Vec<_>>>()?;
    stdout().write_all(bench::render(&reports, args.output).as_bytes())?;
    // Without a peak nothing was measured.
    if let Some((file, svg)) = args.roofline.as_ref().zip(bench::roofline(&reports)) {
        fs::write(file, svg).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// Says before minutes of measuring that a file cannot be written.
fn check_folder_of(file: &Path) -> anyhow::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if folder.is_dir() {
        return Ok(());
    }
    anyhow::bail!("cannot write {}: there is no folder {}; make it first", file.display(), folder.display())
}

/// Parses the name of a storage that other programs write.
fn foreign_scheme(name: &str) -> Result<Scheme, String> {
    FOREIGN.into_iter().find(|(known, _)| *known == name).map(|(_, scheme)| scheme).ok_or_else(|| {
        let names = FOREIGN.map(|(name, _)| name);
        format!("must be one of {}", names.join(", "))
    })
}

impl Args {
    /// Opens the model and runs the tests on a device.
    fn measure(&self, device: &DeviceOptions) -> anyhow::Result<Report> {
        let (checkpoint, _temporary) = match (&self.shape, &self.model) {
            (Some(name), _) => {
                let shape: Shape = name.parse()?;
                let linears = match self.scheme {
                    Some(scheme) => scheme,
                    None => {
                        let format = self.format.unwrap_or(Format::Fp4);
                        recipe::linear_scheme(format, self.group_size, self.sparse_24)?
                    }
                };
                let embedding_format = self.embedding_format.unwrap_or(Format::Int8);
                let embedding = embedding_scheme(embedding_format, self.embedding_group_size)?;
                let model = || bench::random_model(&shape, &linears, &embedding);
                (progress::spinner(&format!("Making {name}"), model)?, None)
            }
            (None, Some(model)) => {
                model::open_quantized(Some(model), &self.hub, &self.quantize_options()?, device.threads)?
            }
            // clap has seen to it that there is one of them.
            (None, None) => anyhow::bail!("name a MODEL or a --shape"),
        };
        let depths =
            if self.depths.is_empty() { bench::usual_depths(&checkpoint, self.decode) } else { self.depths.clone() };
        let plan = Plan {
            prefill: self.prefill.clone(),
            decode: self.decode,
            depths,
            streams: self.streams.clone(),
            repetitions: self.repetitions.get(),
            kv_type: self.kv.into(),
            profile: self.profile,
            keep: !self.no_cache,
            roofline: self.roofline.is_some(),
        };
        let mut bar = Bar::counting("Measuring", "runs");
        let mut progress = |done: usize, total: usize| bar.set(done as u64, total as u64);
        Ok(bench::run(checkpoint, self.shape.is_some(), &plan, device, &self.memory, &mut progress)?)
    }

    /// How a MODEL is quantised.
    fn quantize_options(&self) -> anyhow::Result<QuantizeOptions> {
        let refined = self.group_size.is_some()
            || self.sparse_24
            || self.embedding_format.is_some()
            || self.embedding_group_size.is_some();
        if self.format.is_none() && refined {
            anyhow::bail!(
                "groups, sparsity and the format of the embedding are for quantising; name a --format to do that to MODEL"
            );
        }
        let recipe = RecipeOptions {
            format: self.format,
            bits: None,
            group_size: self.group_size,
            sparse_24: self.sparse_24,
            method: None,
            embedding_format: self.embedding_format,
            embedding_group_size: self.embedding_group_size,
        };
        Ok(QuantizeOptions { recipe, no_cache: self.no_cache })
    }
}

pub(super) fn repetitions(text: &str) -> Result<NonZeroUsize, String> {
    from_1_to(MOST_REPETITIONS, text)
}

fn streams(text: &str) -> Result<NonZeroUsize, String> {
    from_1_to(MOST_STREAMS, text)
}

fn from_1_to(most: usize, text: &str) -> Result<NonZeroUsize, String> {
    let found = text.parse().ok().filter(|n: &NonZeroUsize| n.get() <= most);
    found.ok_or_else(|| format!("must be a number from 1 to {most}"))
}
