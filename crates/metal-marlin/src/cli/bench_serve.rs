//! `metal-marlin bench-serve`: how a server bears a load.

use std::io::{Write, stdout};
use std::num::NonZeroUsize;

use anyhow::{Context, ensure};

use crate::cli::progress::Bar;
use crate::serve_bench::{self, Arrival, Load};

const EXAMPLES: &str = "\
Examples:
  metal-marlin serve & metal-marlin bench-serve
  metal-marlin bench-serve --concurrency 8 --requests 64 --prompt-words 200 --max-tokens 128
  metal-marlin bench-serve --rate 2 --requests 100
  metal-marlin bench-serve --prompt-words 2000 --shared-words 1990 --max-tokens 8
  metal-marlin bench-serve --url http://127.0.0.1:8080/v1 --json

Works with any server of OpenAI's API. All requests are sent, or the command fails: figures of a part would mean nothing.";

/// Measure how a server of the OpenAI API bears a load
///
/// Sends completions of random words, streamed, and tells tokens a second, and percentiles of the time to the first token and between
/// tokens, as clients see them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Where its API is
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000/v1")]
    url: String,

    /// The model [default: the first that the server lists]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// A key, if it asks for one
    #[arg(long, value_name = "KEY", env = "METAL_MARLIN_API_KEY", hide_env_values = true)]
    api_key: Option<String>,

    /// Requests
    #[arg(long, short = 'n', value_name = "N", default_value = "32")]
    requests: NonZeroUsize,

    /// Requests at a time: one begins when another ends
    #[arg(long, short, value_name = "N", default_value = "8", conflicts_with = "rate")]
    concurrency: NonZeroUsize,

    /// Requests a second on average, whatever becomes of those before
    #[arg(long, value_name = "R")]
    rate: Option<f64>,

    /// Words of each prompt; most are a token
    #[arg(long, value_name = "N", default_value_t = 100)]
    prompt_words: usize,

    /// Words that all prompts begin with
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared_words: usize,

    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value = "64")]
    max_tokens: NonZeroUsize,

    /// Let answers end where the model ends them
    #[arg(long)]
    heed_eos: bool,

    /// Token that no answer has; may be given several times: the end-of-sequence tokens of a server that does not know `ignore_eos`
    #[arg(long, value_name = "ID")]
    ban_token: Vec<u32>,

    /// Of the prompts, and of when they come
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    ensure!(args.rate.is_none_or(|rate| rate.is_finite() && rate > 0.0), "--rate must be a number above 0");
    ensure!(args.shared_words <= args.prompt_words, "--shared-words are part of --prompt-words, and cannot be more");
    ensure!(args.prompt_words > 0, "--prompt-words must be at least 1");
    let load = Load {
        url: args.url.trim_end_matches('/').to_owned(),
        model: args.model.clone(),
        api_key: args.api_key.clone(),
        requests: args.requests.get(),
        arrival: args.rate.map_or(Arrival::Concurrent(args.concurrency), Arrival::PerSecond),
        prompt_words: args.prompt_words,
        shared_words: args.shared_words,
        max_tokens: args.max_tokens.get(),
        heed_eos: args.heed_eos,
        banned: args.ban_token.clone(),
        seed: args.seed,
    };
    let bar = std::sync::Mutex::new(Bar::counting("Asking", "requests"));
    let observed = serve_bench::run(&load, &|done| {
        if let Ok(mut bar) = bar.lock() {
            bar.set(done as u64, load.requests as u64);
        }
    })?;
    drop(bar);
    let report = if args.json { format!("{}\n", observed.to_json(&load)) } else { observed.to_text(&load) };
    stdout().write_all(report.as_bytes()).context("cannot write to standard output")
}
