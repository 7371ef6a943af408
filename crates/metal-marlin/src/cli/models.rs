//! The models that a command serves: which there are, and how they are loaded beside each other.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, bail, ensure};
use marlin_model::{MemoryPlan, format_size};
use marlin_server::{LoadFailure, LoadedModel, ModelLoader, Models};

use super::draft::DraftDoesNotFit;
use super::loading::LoadingOptions;
use super::serving::ServingOptions;
use crate::LoadError;
use crate::device::Device;
use crate::load;
use crate::memory::MemoryBudget;

/// Which models are served.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelsOptions {
    /// Folder with a Hugging Face checkpoint, or one made by `quantize`, a GGUF file, or an id on the Hub; NAME=MODEL gives it another name
    /// than its own. The first one is loaded at once, others when a request names them [default: the bundled model]
    #[arg(value_name = "MODEL")]
    models: Vec<PathBuf>,

    /// Serve every model folder and GGUF file in this folder, too, by their names
    #[arg(long, value_name = "DIR")]
    models_dir: Option<PathBuf>,
}

/// A model that is served.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// What requests call it.
    names: Vec<String>,
    /// Where it is; the bundled one if nothing is said.
    model: Option<PathBuf>,
}

/// The models of a command, and what one has to know of them before any is asked.
pub(crate) struct Opened {
    pub(crate) models: Models,
    /// What they run on.
    pub(crate) device: String,
    /// The context of the first model, if that is loaded.
    pub(crate) context: Option<usize>,
}

impl ModelsOptions {
    /// Finds the models, and loads the first one of those that were named.
    pub(crate) fn open(&self, serving: ServingOptions) -> anyhow::Result<Opened> {
        let is_named = !self.models.is_empty() || self.models_dir.is_none();
        let entries = self.entries(serving.names())?;
        let is_for_several = entries.len() > 1;
        serving.check(is_named, is_for_several)?;
        let memory = SharedMemory { is_for_several, ..SharedMemory::default() };
        let names = entries.iter().map(|entry| entry.names.clone()).collect();
        let loader = Loader { serving, entries, is_named, memory };
        let first = if is_named { Some(loader.open(0)?) } else { None };
        let context = first.as_ref().map(|first| first.engine.info().context);
        let device = loader.memory.device_name(&loader.serving.loading)?;
        Ok(Opened { models: Models { names, loader: Arc::new(loader), first }, device, context })
    }

    /// The models in their order, of which no two have one name. `first_names` are those of the first one, if there are any.
    fn entries(&self, first_names: &[String]) -> anyhow::Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = self.models.iter().map(|model| entry(model)).collect();
        if self.models.is_empty() && self.models_dir.is_none() {
            entries.push(Entry { names: vec![default_name(None)], model: None });
        }
        if let (Some(first), false) = (entries.first_mut(), first_names.is_empty()) {
            first.names = first_names.to_vec();
        }
        if let Some(folder) = &self.models_dir {
            let same = |one: &Path, other: &Entry| {
                let other = other.model.as_deref().and_then(|path| path.canonicalize().ok());
                one.canonicalize().ok().is_some_and(|one| Some(one) == other)
            };
            let found = models_in(folder)?;
            let others = found.into_iter().filter(|path| !entries.iter().any(|entry| same(path, entry)));
            let others: Vec<Entry> =
                others.map(|path| Entry { names: vec![file_name(&path)], model: Some(path) }).collect();
            entries.extend(others);
        }
        let mut known = HashMap::new();
        for entry in &entries {
            let place = entry.model.as_deref().unwrap_or(Path::new("bundled")).display();
            for name in &entry.names {
                if let Some(other) = known.insert(name.clone(), place.to_string()) {
                    bail!(
                        "two models have the name {name}: {other} and {place}; give one of them another (NAME=MODEL)"
                    );
                }
            }
        }
        Ok(entries)
    }
}

/// A model as the command line names it.
fn entry(model: &Path) -> Entry {
    // A path with a sign in it is still a path.
    let named = model.to_str().filter(|_| !model.exists()).and_then(|text| text.split_once('='));
    let named = named.filter(|(name, model)| !name.is_empty() && !name.contains('/') && !model.is_empty());
    match named {
        Some((name, model)) => Entry { names: vec![name.to_owned()], model: Some(PathBuf::from(model)) },
        None => Entry { names: vec![default_name(Some(model))], model: Some(model.to_owned()) },
    }
}

/// What the model is called where nobody says: by its id on the Hub, or as its folder or file is.
fn default_name(model: Option<&Path>) -> String {
    let Some(model) = model else { return "bundled".to_owned() };
    if load::hub_id(model).is_some() {
        return model.display().to_string();
    }
    file_name(model)
}

/// The name of a folder, or of a file without its ending and the number of its part.
fn file_name(model: &Path) -> String {
    let name = if model.is_file() { model.file_stem() } else { model.file_name() };
    let name = name.map_or_else(|| model.display().to_string(), |name| name.to_string_lossy().into_owned());
    match part(&name) {
        Some((whole, _)) if model.is_file() => whole.to_owned(),
        _ => name,
    }
}

/// Of a file of a model in several (`NAME-00002-of-00003`), the name and the part's number.
fn part(stem: &str) -> Option<(&str, usize)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(count) && is_number(number)).then(|| number.parse().ok()).flatten().map(|number| (name, number))
}

/// The model folders and GGUF files in a folder, by name. Of a model in several files it is the first one.
fn models_in(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let cannot = || format!("cannot read the folder of models {} (--models-dir)", folder.display());
    let mut models = Vec::new();
    for item in fs::read_dir(folder).with_context(cannot)? {
        let path = item.with_context(cannot)?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let is_file = path.extension().is_some_and(|extension| extension == "gguf") && path.is_file();
        let is_whole = part(&name).is_none_or(|(_, number)| number == 1);
        if !name.starts_with('.') && (path.join("config.json").is_file() || is_file && is_whole) {
            models.push(path);
        }
    }
    ensure!(
        !models.is_empty(),
        "there is no model in {} (--models-dir); a model is a folder with config.json, or a file that ends in .gguf",
        folder.display()
    );
    models.sort();
    Ok(models)
}

/// Loads the models of a command.
struct Loader {
    serving: ServingOptions,
    entries: Vec<Entry>,
    /// The first model was named, and options of one model are meant for it.
    is_named: bool,
    memory: SharedMemory,
}

impl Loader {
    fn open(&self, place: usize) -> anyhow::Result<LoadedModel> {
        let is_first = self.is_named && place == 0;
        self.serving.open(self.entries[place].model.as_deref(), is_first, &self.memory)
    }
}

impl ModelLoader for Loader {
    fn load(&self, place: usize) -> Result<LoadedModel, LoadFailure> {
        self.open(place).map_err(|error| {
            let mut said = String::new();
            for cause in error.chain().map(ToString::to_string) {
                // Some errors end with what caused them.
                if !said.ends_with(&cause) {
                    said += if said.is_empty() { "" } else { ": " };
                    said += &cause;
                }
            }
            if error.is::<NoRoom>() {
                LoadFailure::NoRoom(said)
            } else if matches!(error.downcast_ref(), Some(LoadError::DoesNotFit(_))) || error.is::<DraftDoesNotFit>() {
                LoadFailure::TooLarge(said)
            } else {
                LoadFailure::Broken(said)
            }
        })
    }
}

/// The models that are loaded leave too little memory for one more.
#[derive(Debug, thiserror::Error)]
#[error(
    "{model} needs {} with room for {} tokens; {} of {} are left by the models that are loaded",
    format_size(plan.total()), plan.context, format_size(left.device), format_size(all.device)
)]
pub(crate) struct NoRoom {
    pub(crate) model: String,
    /// What it takes at least.
    pub(crate) plan: Box<MemoryPlan>,
    pub(crate) left: MemoryBudget,
    pub(crate) all: MemoryBudget,
}

/// A device for a model, and the memory for all models as it was before any was loaded; `None` if the system does not tell.
#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) device: Arc<Device>,
    memory: Option<MemoryBudget>,
}

/// What was allocated for a model goes back to the system when this is dropped, after it.
pub(crate) struct GivesBack;

impl Drop for GivesBack {
    fn drop(&mut self) {
        marlin_kernels::return_freed_memory();
    }
}

/// Memory that models share.
#[derive(Default)]
pub(crate) struct SharedMemory {
    is_for_several: bool,
    machine: Mutex<Option<Machine>>,
    /// What each model takes that is loaded; it holds its plan.
    loaded: Mutex<Vec<Weak<MemoryPlan>>>,
}

/// Memory for a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// All that models may take.
    pub(crate) all: MemoryBudget,
    /// What those leave that are loaded.
    pub(crate) left: MemoryBudget,
    /// Some are.
    pub(crate) is_shared: bool,
}

impl SharedMemory {
    /// The device for one more model, which holds it. The processor and its threads are shared. What goes wrong on a GPU is told to whoever
    /// asks next, so there each model has it opened for itself.
    pub(crate) fn machine(&self, loading: &LoadingOptions) -> Result<Machine, LoadError> {
        let mut kept = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        let machine = match kept.take() {
            None => {
                let (device, memory) = loading.open_device()?;
                Machine { device: Arc::new(device), memory }
            }
            Some(Machine { device, memory }) if device.gpu().is_some() && Arc::strong_count(&device) > 1 => {
                let opened = loading.open_device().map(|(device, _)| Arc::new(device));
                // Without one more there is still this one to be asked for the next time.
                *kept = Some(Machine { device, memory });
                Machine { device: opened?, memory }
            }
            Some(machine) => machine,
        };
        Ok(kept.insert(machine).clone())
    }

    /// What models run on, which is found out here if none was loaded.
    fn device_name(&self, loading: &LoadingOptions) -> Result<String, LoadError> {
        let kept = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        let name = kept.as_ref().map(|machine| machine.device.info().name.to_string());
        drop(kept);
        name.map_or_else(|| Ok(self.machine(loading)?.device.info().name.to_string()), Ok)
    }

    /// Whether more than one model is served.
    pub(crate) fn is_for_several(&self) -> bool {
        self.is_for_several
    }

    /// What is left for one more model; `None` if the system does not tell what there is.
    pub(crate) fn room(&self, machine: &Machine) -> Option<Room> {
        let all = machine.memory?;
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let plans: Vec<Arc<MemoryPlan>> = loaded.iter().filter_map(Weak::upgrade).collect();
        let left = plans.iter().fold(all, |left, plan| left.without(plan));
        Some(Room { all, left, is_shared: !plans.is_empty() })
    }

    /// Counts what a model takes until the plan that is given back is dropped.
    pub(crate) fn take(&self, plan: MemoryPlan) -> Arc<MemoryPlan> {
        let plan = Arc::new(plan);
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.retain(|plan| plan.strong_count() > 0);
        loaded.push(Arc::downgrade(&plan));
        plan
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn options(models: &[&str], folder: Option<&Path>) -> ModelsOptions {
        ModelsOptions { models: models.iter().map(PathBuf::from).collect(), models_dir: folder.map(Path::to_owned) }
    }

    #[test]
    fn models_have_names_of_their_own() {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        for model in ["beta", "alpha", "with=sign", ".hidden", "empty"] {
            fs::create_dir(path(model)).unwrap();
            if model != "empty" {
                fs::write(path(model).join("config.json"), "{}").unwrap();
            }
        }
        for file in ["small.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "notes.txt"] {
            fs::write(path(file), "").unwrap();
        }
        let names = |options: &ModelsOptions, first: &[String]| {
            let entries = options.entries(first).unwrap();
            entries.into_iter().map(|entry| entry.names.join("+")).collect::<Vec<_>>()
        };
        let all = ["alpha", "beta", "big", "small", "with=sign"];
        assert_eq!(names(&options(&[], Some(folder.path())), &[]), all);
        assert_eq!(names(&options(&[], None), &[]), ["bundled"]);

        // One that was named is not there a second time.
        let beta = path("beta").display().to_string();
        let named = options(&[&format!("b={beta}"), "Qwen/Qwen3-4B", "q=Qwen/Qwen3-8B"], Some(folder.path()));
        assert_eq!(names(&named, &[]), ["b", "Qwen/Qwen3-4B", "q", "alpha", "big", "small", "with=sign"]);
        assert_eq!(names(&named, &["x".into(), "y".into()])[0], "x+y");
        assert_eq!(named.entries(&[]).unwrap()[0].model.as_deref(), Some(&*path("beta")));
        let sign = path("with=sign").display().to_string();
        assert_eq!(names(&options(&[&sign], None), &[]), ["with=sign"]);

        let twice = options(&["alpha=bundled"], Some(folder.path())).entries(&[]).unwrap_err().to_string();
        assert!(twice.contains("two models have the name alpha") && twice.contains("NAME=MODEL"), "{twice}");
        let none = options(&[], Some(&path("empty"))).entries(&[]).unwrap_err().to_string();
        assert!(none.contains("there is no model in ") && none.contains("config.json"), "{none}");
        assert!(options(&[], Some(&path("missing"))).entries(&[]).is_err());
    }
}
