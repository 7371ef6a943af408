//! `metal-marlin cache`: the models that were quantised and fetched on the way, their tiles, and compiled kernels.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use marlin_model::format_size;
use serde_json::{Value, json};

use crate::hub::HubCache;
use crate::model_cache::{CompiledKernels, ModelCache, QuantizedModel, UsedSnapshot};
use crate::tile_cache::KeptTiles;

const EXAMPLES: &str = "\
Examples:
  metal-marlin cache ls
  metal-marlin cache ls --json
  metal-marlin cache rm Qwen3-4B-fp4-g128-1a2b3c4d5e6f
  metal-marlin cache rm Qwen/Qwen3-4B --all --yes

Models quantised by `run`, `chat`, `eval` and `bench` with --format are in METAL_MARLIN_CACHE, or
in metal-marlin where this system keeps caches. Models of the Hub are in the cache that its own
tools use (HF_HUB_CACHE, HF_HOME); of those, the ones that this program used are listed here.
Tiles are a model's weights in the order that a CPU reads, from which it starts at once; they go
with the model, and what is removed is made again. Kernels are those that a GPU's driver compiled;
what is removed is compiled again.";

/// List and remove models that were quantised on the fly or fetched from the Hub, tiles, and compiled kernels
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the models, with their sizes and when they were last used
    #[command(after_help = EXAMPLES)]
    Ls {
        /// Print the list as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove models
    #[command(after_help = EXAMPLES)]
    Rm {
        /// What to remove: an ID that `ls` shows, or the name of a model that has only one
        #[arg(value_name = "NAME|ID", required_unless_present = "all")]
        names: Vec<String>,

        /// Remove all that a NAME stands for; without a NAME, everything
        #[arg(long)]
        all: bool,

        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let inventory = Inventory::read()?;
    match args.command {
        Command::Ls { json: true } => writeln!(stdout(), "{:#}", inventory.to_json())?,
        Command::Ls { json: false } => stdout().write_all(inventory.to_text().as_bytes())?,
        Command::Rm { names, all, yes } => {
            let chosen = inventory.choose(&names, all)?;
            if chosen.is_empty() {
                writeln!(stdout(), "there is nothing to remove")?;
            } else if yes || confirmed(&chosen)? {
                inventory.remove(&chosen)?;
            }
        }
    }
    Ok(())
}

/// Everything there is.
struct Inventory {
    models: ModelCache,
    hub: HubCache,
    items: Vec<Item>,
}

enum Item {
    Quantized(QuantizedModel),
    Snapshot(UsedSnapshot),
    Kernels(CompiledKernels),
    Tiles { tiles: KeptTiles, of: Option<Owner> },
}

/// The listed model that tiles were made from.
struct Owner {
    id: String,
    model: String,
    format: String,
}

impl Owner {
    /// The model in this folder.
    fn find(folder: Option<&Path>, items: &[Item]) -> Option<Self> {
        let is_there = |item: &&Item| item.path().canonicalize().ok().as_deref() == folder;
        let item = folder.and_then(|_| items.iter().find(is_there))?;
        Some(Self { id: item.id(), model: item.model(), format: item.format() })
    }
}

impl Item {
    /// The one name that nothing else has.
    fn id(&self) -> String {
        match self {
            Self::Quantized(model) => model.id.clone(),
            Self::Snapshot(UsedSnapshot { snapshot, .. }) => format!("{}@{}", snapshot.id, snapshot.commit),
            Self::Kernels(kernels) => kernels.id.clone(),
            Self::Tiles { tiles, .. } => tiles.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        }
    }

    /// What people call the model.
    fn model(&self) -> String {
        match self {
            Self::Quantized(model) => model.model.clone(),
            Self::Snapshot(used) => used.snapshot.id.to_string(),
            Self::Kernels(_) => "kernels".to_owned(),
            Self::Tiles { of: Some(owner), .. } => owner.model.clone(),
            Self::Tiles { tiles: KeptTiles { model: Some(folder), .. }, .. } => folder.display().to_string(),
            Self::Tiles { .. } => "tiles".to_owned(),
        }
    }

    /// How it is stored, or which revision it is.
    fn format(&self) -> String {
        match self {
            Self::Quantized(model) if model.whole => model.format.clone(),
            Self::Quantized(model) => format!("{} (unfinished)", model.format),
            Self::Snapshot(used) if used.snapshot.revisions.is_empty() => "original".to_owned(),
            Self::Snapshot(used) => format!("original ({})", used.snapshot.revisions.join(", ")),
            Self::Kernels(_) => "compiled".to_owned(),
            Self::Tiles { tiles, .. } if !tiles.whole => "tiles (unfinished)".to_owned(),
            Self::Tiles { of: Some(owner), .. } => format!("tiles of {}", owner.format),
            Self::Tiles { .. } => "tiles".to_owned(),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Quantized(model) => model.bytes,
            Self::Snapshot(used) => used.snapshot.bytes,
            Self::Kernels(kernels) => kernels.bytes,
            Self::Tiles { tiles, .. } => tiles.bytes,
        }
    }

    fn last_used(&self) -> SystemTime {
        match self {
            Self::Quantized(model) => model.last_used,
            Self::Snapshot(used) => used.last_used,
            Self::Kernels(kernels) => kernels.written,
            Self::Tiles { tiles, .. } => tiles.last_used,
        }
    }

    fn path(&self) -> &PathBuf {
        match self {
            Self::Quantized(model) => &model.path,
            Self::Snapshot(used) => &used.snapshot.folder,
            Self::Kernels(kernels) => &kernels.path,
            Self::Tiles { tiles, .. } => &tiles.path,
        }
    }

    /// Whether it goes with another item.
    fn belongs_to(&self, other: &Item) -> bool {
        matches!(self, Self::Tiles { of: Some(owner), .. } if owner.id == other.id())
    }

    /// Whether `name` stands for it: its ID, its model, or the last part of the model's name. What belongs to another has an ID only.
    fn is_called(&self, name: &str) -> bool {
        if let Self::Tiles { of: Some(_), .. } = self {
            return self.id() == name;
        }
        let model = self.model();
        self.id() == name || model == name || model.rsplit('/').next() == Some(name)
    }
}

impl Inventory {
    fn read() -> anyhow::Result<Self> {
        let (models, hub) = (ModelCache::from_env()?, HubCache::from_env()?);
        let quantized = models.models()?.into_iter().map(Item::Quantized);
        let snapshots = models.snapshots(&hub)?.into_iter().map(Item::Snapshot);
        let kernels = models.kernels()?.into_iter().map(Item::Kernels);
        let mut items: Vec<Item> = quantized.chain(snapshots).chain(kernels).collect();
        for tiles in models.tiles()? {
            let of = Owner::find(tiles.model.as_deref(), &items);
            items.push(Item::Tiles { tiles, of });
        }
        Ok(Self { models, hub, items })
    }

    /// What is to be removed.
    fn choose(&self, names: &[String], all: bool) -> anyhow::Result<Vec<&Item>> {
        if names.is_empty() {
            return Ok(self.items.iter().collect());
        }
        let mut chosen: Vec<&Item> = Vec::new();
        for name in names {
            // An ID stands for one thing, whatever else has that name.
            let exact: Vec<&Item> = self.items.iter().filter(|item| item.id() == *name).collect();
            let called = || self.items.iter().filter(|item| item.is_called(name)).collect();
            let found: Vec<&Item> = if exact.is_empty() { called() } else { exact };
            match found.as_slice() {
                [] => bail!("nothing in the caches is called {name}; `metal-marlin cache ls` lists what is there"),
                [_] => {}
                _ if all => {}
                several => {
                    let ids: String = several.iter().map(|item| format!("\n  {}", item.id())).collect();
                    bail!("{name} stands for {} things; name one by its ID or pass --all:{ids}", several.len());
                }
            }
            for item in found {
                let with = self.items.iter().filter(|other| other.belongs_to(item));
                for item in std::iter::once(item).chain(with) {
                    if !chosen.iter().any(|other| other.id() == item.id()) {
                        chosen.push(item);
                    }
                }
            }
        }
        Ok(chosen)
    }

    fn remove(&self, items: &[&Item]) -> anyhow::Result<()> {
        let mut freed = 0;
        for item in items {
            match item {
                Item::Quantized(model) => self.models.remove_model(model)?,
                Item::Snapshot(used) => self.models.remove_snapshot(&self.hub, used)?,
                Item::Kernels(kernels) => self.models.remove_kernels(kernels)?,
                Item::Tiles { tiles, .. } => self.models.remove_tiles(tiles)?,
            }
            freed += item.bytes();
            writeln!(stdout(), "removed {}", item.id())?;
        }
        writeln!(stdout(), "{} freed", format_size(freed))?;
        Ok(())
    }

    fn to_json(&self) -> Value {
        let quantized = |item: &Item| {
            let Item::Quantized(model) = item else { return None };
            Some(json!({
                "id": model.id,
                "model": model.model,
                "version": model.version,
                "format": model.format,
                "whole": model.whole,
                "bytes": model.bytes,
                "last_used": unix_seconds(model.last_used),
                "path": model.path,
            }))
        };
        let snapshot = |item: &Item| {
            let Item::Snapshot(UsedSnapshot { snapshot, last_used }) = item else { return None };
            Some(json!({
                "id": item.id(),
                "repository": snapshot.id.to_string(),
                "commit": snapshot.commit,
                "revisions": snapshot.revisions,
                "bytes": snapshot.bytes,
                "last_used": unix_seconds(*last_used),
                "path": snapshot.folder,
            }))
        };
        let kernels = |item: &Item| {
            let Item::Kernels(CompiledKernels { id, bytes, written, path }) = item else { return None };
            Some(json!({ "id": id, "bytes": bytes, "written": unix_seconds(*written), "path": path }))
        };
        let tiles = |item: &Item| {
            let Item::Tiles { tiles, .. } = item else { return None };
            Some(json!({
                "id": item.id(),
                "model": tiles.model,
                "whole": tiles.whole,
                "bytes": tiles.bytes,
                "last_used": unix_seconds(tiles.last_used),
                "path": tiles.path,
            }))
        };
        json!({
            "folder": self.models.folder(),
            "quantized": self.items.iter().filter_map(quantized).collect::<Vec<_>>(),
            "hub_folder": self.hub.folder(),
            "snapshots": self.items.iter().filter_map(snapshot).collect::<Vec<_>>(),
            "kernels": self.items.iter().filter_map(kernels).collect::<Vec<_>>(),
            "tiles": self.items.iter().filter_map(tiles).collect::<Vec<_>>(),
        })
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        if !self.items.is_empty() {
            let headings = ["MODEL", "FORMAT", "SIZE", "LAST USED", "ID", "PATH"].map(str::to_owned);
            let line = |item: &Item| {
                let (size, used) = (format_size(item.bytes()), ago(item.last_used()));
                [item.model(), item.format(), size, used, item.id(), item.path().display().to_string()]
            };
            let lines: Vec<_> = std::iter::once(headings).chain(self.items.iter().map(line)).collect();
            let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
            let widths: Vec<usize> = (0..5).map(width).collect();
            for line in &lines {
                for (cell, width) in line.iter().zip(&widths) {
                    let _ = write!(text, "{cell:width$}  ");
                }
                text += &format!("{}\n", line[5]);
            }
            text.push('\n');
        }
        text += &format!("quantised models are in {}\n", self.models.folder().display());
        text += &format!("models of the Hub are in {}\n", self.hub.folder().display());
        text
    }
}

/// Asks on the terminal.
fn confirmed(items: &[&Item]) -> anyhow::Result<bool> {
    if !(stdin().is_terminal() && stderr().is_terminal()) {
        bail!("nobody can be asked whether to remove {} here; pass --yes", names(items));
    }
    for item in items {
        eprintln!("{:>12}  {}", format_size(item.bytes()), item.id());
    }
    eprint!("Remove? [y/N] ");
    let mut answer = String::new();
    stdin().read_line(&mut answer).context("cannot read the answer")?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

fn names(items: &[&Item]) -> String {
    items.iter().map(|item| item.id()).collect::<Vec<_>>().join(", ")
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// How long ago that was, to the precision that people use.
fn ago(time: SystemTime) -> String {
    describe(SystemTime::now().duration_since(time).unwrap_or_default())
}

fn describe(age: Duration) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    let (count, unit) = match age.as_secs() {
        0..MINUTE => return "just now".to_owned(),
        age @ MINUTE..HOUR => (age / MINUTE, "minute"),
        age @ HOUR..DAY => (age / HOUR, "hour"),
        age => (age / DAY, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_said_roughly() {
        for (seconds, text) in [
            (59, "just now"),
            (60, "1 minute ago"),
            (3599, "59 minutes ago"),
            (7200, "2 hours ago"),
            (86400, "1 day ago"),
            (8_640_000, "100 days ago"),
        ] {
            assert_eq!(describe(Duration::from_secs(seconds)), text);
        }
    }
}
