//! Opening the model that a command is given.

use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::Context;
use marlin_checkpoint::{Checkpoint, ExportLayout};
use marlin_model::{LanguageModel, LoadOptions};
use tempfile::TempDir;

use super::recipe::{HEADING, RecipeOptions};
use crate::LoadError;
use crate::cli::interrupt;
use crate::cli::progress::Bar;
use crate::device::Device;
use crate::load::{self, OpenOptions, Stage};
use crate::tile_cache::load_model_kept;

/// The exit status of a program ended by Ctrl-C.
const INTERRUPTED: i32 = 130;

/// Options for models of the Hub.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct HubOptions {
    /// Branch, tag or commit of a model on the Hub [default: main]
    #[arg(long, value_name = "REV", help_heading = "Hub")]
    pub(super) revision: Option<String>,
}

/// Options to quantise a model while it is opened.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct QuantizeOptions {
    #[command(flatten)]
    pub(super) recipe: RecipeOptions,

    /// Keep nothing for the next start: quantise into a temporary folder, and put weights into a CPU's order in memory only
    #[arg(long, help_heading = HEADING)]
    pub(super) no_cache: bool,
}

/// A folder that is removed when this is dropped, and at Ctrl-C.
pub(super) struct TemporaryFolder(TempDir);

impl TemporaryFolder {
    fn new() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder (TMPDIR says where)")?;
        let path = folder.path().to_owned();
        interrupt::on_ctrl_c(move || {
            // If it cannot be removed, the system's cleaning of temporary files is left.
            let _ = std::fs::remove_dir_all(&path);
            std::process::exit(INTERRUPTED);
        })?;
        Ok(Self(folder))
    }
}

/// Opens a model as it is stored, fetching it if need be; `None` is the bundled one.
pub(super) fn open(model: Option<&Path>, hub: &HubOptions) -> anyhow::Result<Checkpoint> {
    let options = OpenOptions { revision: hub.revision.as_deref(), ..OpenOptions::default() };
    Ok(open_with_progress(model, &options)?)
}

/// Opens a model of which only config and headers are wanted; the temporary folder is where they lie, if they were fetched.
pub(super) fn open_headers(model: Option<&Path>, hub: &HubOptions) -> anyhow::Result<(Checkpoint, Option<TempDir>)> {
    let opened = with_progress(|progress| load::open_headers(model, hub.revision.as_deref(), progress))?;
    super::print_notes(&opened.0);
    Ok(opened)
}

/// Opens a model, fetching and quantising it if need be. The temporary folder is where it lies, if it is in one.
pub(super) fn open_quantized(
    model: Option<&Path>,
    hub: &HubOptions,
    QuantizeOptions { recipe, no_cache }: &QuantizeOptions,
    threads: Option<NonZeroUsize>,
) -> anyhow::Result<(Checkpoint, Option<TemporaryFolder>)> {
    recipe.refuse_calibration()?;
    let recipe = recipe.recipe(ExportLayout::MetalMarlin)?;
    let temporary = if *no_cache && recipe.is_some() { Some(TemporaryFolder::new()?) } else { None };
    let out = temporary.as_ref().map(|folder| folder.0.path().join("model"));
    let options = OpenOptions { revision: hub.revision.as_deref(), recipe: recipe.as_ref(), out: out.as_deref() };
    let checkpoint = super::in_pool(threads, || open_with_progress(model, &options))??;
    Ok((checkpoint, temporary))
}

/// How a command loads models: what that takes is kept for the next time, or not.
pub(super) type Load = fn(&Checkpoint, &Device, &LoadOptions) -> Result<Box<dyn LanguageModel>, LoadError>;

impl QuantizeOptions {
    /// How models are loaded.
    pub(super) fn load(&self) -> Load {
        if self.no_cache { load::load_model } else { load_model_kept }
    }
}

fn open_with_progress(model: Option<&Path>, options: &OpenOptions<'_>) -> Result<Checkpoint, LoadError> {
    let checkpoint = with_progress(|progress| load::open(model, options, progress))?;
    super::print_notes(&checkpoint);
    Ok(checkpoint)
}

/// Does `work` with a bar for each of its stages.
fn with_progress<T>(work: impl FnOnce(&mut load::Progress<'_>) -> Result<T, LoadError>) -> Result<T, LoadError> {
    let mut bar: Option<(Stage, Bar)> = None;
    work(&mut |stage, done, total| {
        if bar.as_ref().is_none_or(|(current, _)| *current != stage) {
            let message = match stage {
                Stage::Fetching => "Fetching",
                Stage::Quantizing => "Quantising",
            };
            bar = Some((stage, Bar::bytes(message)));
        }
        if let Some((_, bar)) = &mut bar {
            bar.set(done, total);
        }
    })
}
