//! `--shard` and `--list-shards`: weight files that are written apart from each other.

use std::io::{Write, stdout};
use std::str::FromStr;

use anyhow::bail;
use marlin_quantize::{PlannedShard, Progress, QuantizeOptions, plan_shards, quantize_shard};
use serde_json::{Value, json};

use super::Args;
use crate::cli::progress::Bar;
use crate::cli::recipe::Method;
use crate::cli::usage::UsageError;
use crate::cli::{in_pool, model};
use crate::memory::parse_size;

/// What is written at a time.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Weight files")]
pub(super) struct ShardOptions {
    /// Largest weight file; a tensor that alone is larger gets a file of its own
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "4GiB")]
    pub(super) max_shard_size: u64,

    /// Write only this one of the weight files, such as 3/17, and leave it in OUT.partial. Others can be written at the same time, on machines
    /// that share the folder; the same command without --shard takes them, writes what is missing and finishes OUT
    #[arg(long, value_name = "I/N", conflicts_with = "verbose")]
    shard: Option<ShardNumber>,

    /// List the weight files that OUT will have and whether they are written, and write nothing
    #[arg(long, conflicts_with_all = ["shard", "verbose"])]
    list_shards: bool,
}

/// One of several, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ShardNumber {
    number: usize,
    count: usize,
}

impl FromStr for ShardNumber {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(number, count)| Some((number.parse().ok()?, count.parse().ok()?)));
        match parsed {
            Some((number, count)) if (1..=count).contains(&number) => Ok(Self { number, count }),
            _ => Err(format!(
                "`{text}` is no shard; wanted a number of how many, such as 3/17 (--list-shards tells how many)"
            )),
        }
    }
}

impl ShardOptions {
    /// Whether less than a whole output is asked for.
    pub(super) fn are_given(&self) -> bool {
        self.shard.is_some() || self.list_shards
    }
}

/// What came of it.
pub(super) enum Outcome {
    /// Of `--list-shards`.
    Listed(Vec<PlannedShard>),
    /// Of `--shard`: which one, and whether it was there already.
    Written(PlannedShard),
}

/// Does what the options ask for, and prints what came of it.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let outcome = write(args)?;
    let text = if args.json { format!("{}\n", outcome.to_json()) } else { outcome.to_text() };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Does what the options ask for.
pub(super) fn write(args: &Args) -> anyhow::Result<Outcome> {
    refuse_running(args)?;
    args.check()?;
    let checkpoint = model::open(Some(&args.model), &args.hub)?;
    let bits = args.bits.plan(&checkpoint, &args.calibration, args.layout, args.threads)?;
    let (recipe, _) = super::recipe(args, &checkpoint, None, bits.as_ref())?;
    let options = || QuantizeOptions {
        force: args.force,
        max_shard_bytes: args.shards.max_shard_size,
        layout: args.layout,
        ..Default::default()
    };
    let mut planned = plan_shards(&checkpoint, &args.out, &recipe, &options())?;
    let Some(ShardNumber { number, count }) = args.shards.shard else { return Ok(Outcome::Listed(planned)) };
    if count != planned.len() {
        let found = planned.len();
        bail!(UsageError::new(format!(
            "--shard {number}/{count}: with these options there are {found} weight files; see --list-shards"
        )));
    }
    in_pool(args.threads, || {
        let mut bar = Bar::bytes("Quantising");
        let mut progress = |progress: Progress<'_>| bar.set(progress.done, progress.total);
        let options = QuantizeOptions { progress: Some(&mut progress), ..options() };
        quantize_shard(&checkpoint, &args.out, &recipe, number - 1, options)
    })??;
    Ok(Outcome::Written(planned.swap_remove(number - 1)))
}

/// Refuses what runs the model: that takes all of it, in its order.
fn refuse_running(args: &Args) -> anyhow::Result<()> {
    let option = if args.shards.list_shards { "--list-shards" } else { "--shard" };
    let is_calibrated = args.recipe.method.is_none_or(|method| method == Method::Gptq);
    let running = [
        ("--method gptq (the default)", is_calibrated, "choose --method mse or rtn"),
        ("--scale-channels", args.scale_channels, "leave it out"),
        ("--target-bpw", args.bits.measures(), "make the plan once (--save-plan) and give it to all (--plan)"),
        ("--cold-expert-format", args.cold.are_given(), "leave it out"),
        ("--calibration", args.calibration.is_given(), "leave it out"),
        ("--text", args.measure.are_given(), "measure the finished output by `metal-marlin eval`"),
    ];
    if let Some((running, _, instead)) = running.into_iter().find(|(_, is_asked, _)| *is_asked) {
        bail!(UsageError::new(format!(
            "{option} is for weight files that can be made without running the model, and {running} runs it; {instead}"
        )));
    }
    Ok(())
}

impl Outcome {
    /// For `--json`.
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Listed(shards) => json!({ "shards": shards }),
            Self::Written(shard) => json!({ "file": shard.file, "bytes": shard.bytes, "was_finished": shard.finished }),
        }
    }

    fn to_text(&self) -> String {
        match self {
            Self::Listed(shards) => {
                let line = |(index, shard): (usize, &PlannedShard)| {
                    let state = if shard.finished { "written" } else { "to be written" };
                    let (megabytes, number) = (shard.bytes as f64 / 1e6, index + 1);
                    format!("{number}/{}  {}  {megabytes:.1} MB  {state}\n", shards.len(), shard.file)
                };
                shards.iter().enumerate().map(line).collect()
            }
            Self::Written(PlannedShard { file, finished: true, .. }) => format!("{file} was written already\n"),
            Self::Written(PlannedShard { file, .. }) => format!("wrote {file}\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_numbered_from_one() {
        assert_eq!("3/17".parse(), Ok(ShardNumber { number: 3, count: 17 }));
        assert_eq!("1/1".parse(), Ok(ShardNumber { number: 1, count: 1 }));
        for text in ["", "3", "0/3", "4/3", "a/3", "1/0", "-1/3", "1/3/4"] {
            assert!(text.parse::<ShardNumber>().unwrap_err().contains("3/17"), "{text}");
        }
    }
}
