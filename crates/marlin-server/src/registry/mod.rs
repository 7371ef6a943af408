//! The models of a server: which there are, which of them are loaded, and who uses them.
//!
//! A request gets its model as a [`Lease`], which keeps the model loaded until it is dropped. One task ([`manager`]) grants leases, has
//! models loaded and unloaded, one at a time, and keeps those who wait in line.

mod manager;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use marlin_engine::Engine;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use self::manager::{Event, Manager, Waiter};
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::model::ServedModel;
use crate::worker::Refusal;

/// The models of a server, and how they are loaded.
pub struct Models {
    /// What requests call each of them, with at least one name each; the first name is the one that answers give.
    pub names: Vec<Vec<String>>,
    /// Loads them when they are asked for.
    pub loader: Arc<dyn ModelLoader>,
    /// The first one, if it is loaded already.
    pub first: Option<LoadedModel>,
}

/// Loads models for a server: one at a time, each as often as it was unloaded before.
pub trait ModelLoader: Send + Sync {
    /// Loads the model of this place among [`Models::names`]. May take as long as it needs.
    ///
    /// # Errors
    /// There is no room for it, or something is wrong with it.
    fn load(&self, model: usize) -> Result<LoadedModel, LoadFailure>;
}

/// A model that is ready to answer.
pub struct LoadedModel {
    /// What runs it.
    pub engine: Engine,
    /// What the server needs to know of it besides.
    pub model: ServedModel,
    /// What must not be dropped before the engine is.
    pub kept: Box<dyn Any + Send>,
}

/// Why a model is not loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadFailure {
    /// The models that are loaded leave too little memory for it: what it needs and what there is, for people.
    NoRoom(String),
    /// There is too little memory for it even if nothing else is loaded: the same.
    TooLarge(String),
    /// Something is wrong with it: what.
    Broken(String),
}

/// A model that runs, as the registry sees it.
pub(crate) trait Running: Send + Sync + 'static {
    /// Most tokens of prompt and answer together.
    fn context(&self) -> usize;
    /// Lets its thread end, once the requests under way are answered.
    fn stop(&self);
}

/// A model that was started.
pub(crate) struct Started<T> {
    pub(crate) model: T,
    /// Owns the engine, and drops it when it has ended.
    pub(crate) thread: JoinHandle<()>,
    pub(crate) kept: Box<dyn Any + Send>,
}

/// Loads and starts a model.
pub(crate) type Start<T> = dyn Fn(usize) -> Result<Started<T>, LoadFailure> + Send + Sync;

/// How leases are granted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RegistryOptions {
    /// Most requests that wait for a model.
    pub(crate) max_waiting: usize,
    /// Longest time for an answer, the wait for its model included.
    pub(crate) timeout: Option<Duration>,
    /// Models that nobody has used for so long are unloaded.
    pub(crate) idle_unload: Option<Duration>,
}

/// Whether a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Unloaded,
    Loading,
    Loaded {
        /// Most tokens of prompt and answer together.
        context: usize,
    },
}

/// A model by its names.
#[derive(Debug)]
pub(crate) struct Entry {
    names: Vec<String>,
    status: Mutex<Status>,
}

impl Entry {
    /// What requests call it.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// The name that it gives itself.
    pub(crate) fn name(&self) -> &str {
        self.names.first().map_or("model", |name| name)
    }

    pub(crate) fn status(&self) -> Status {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_status(&self, status: Status) {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }
}

/// Gives requests their models. Clones are of the same one.
pub(crate) struct Registry<T> {
    entries: Arc<[Arc<Entry>]>,
    events: UnboundedSender<Event<T>>,
    timeout: Option<Duration>,
}

impl<T> Clone for Registry<T> {
    fn clone(&self) -> Self {
        Self { entries: self.entries.clone(), events: self.events.clone(), timeout: self.timeout }
    }
}

impl<T> std::fmt::Debug for Registry<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("entries", &self.entries).finish_non_exhaustive()
    }
}

impl<T: Running> Registry<T> {
    /// A registry of models by their names, the first of which may run already, and the task that looks after them.
    pub(crate) fn start(
        names: Vec<Vec<String>>,
        first: Option<Started<T>>,
        start: Arc<Start<T>>,
        options: RegistryOptions,
        metrics: Arc<Metrics>,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let entry = |names| Arc::new(Entry { names, status: Mutex::new(Status::Unloaded) });
        let entries: Arc<[Arc<Entry>]> = names.into_iter().map(entry).collect();
        let (events, received) = unbounded_channel();
        let registry = Self { entries: entries.clone(), events, timeout: options.timeout };
        let manager = Manager::new(entries, start, options, metrics, received, registry.events.downgrade(), first);
        (registry, tokio::spawn(manager.run()))
    }

    /// The models, in their order.
    pub(crate) fn entries(&self) -> &[Arc<Entry>] {
        &self.entries
    }

    /// All names of all models.
    pub(crate) fn names(&self) -> Vec<String> {
        self.entries.iter().flat_map(|entry| entry.names.iter().cloned()).collect()
    }

    /// The place of the model of this name.
    pub(crate) fn find(&self, name: &str) -> Result<usize, ApiError> {
        let place = self.entries.iter().position(|entry| entry.names.iter().any(|known| known == name));
        place.ok_or_else(|| {
            let message = format!("there is no model {name:?} here; this server has {}", self.names().join(", "));
            ApiError::not_found(message).with_param("model").with_code("model_not_found")
        })
    }

    /// The model of this name, or the first one; waits until it is loaded.
    pub(crate) async fn lease(&self, name: Option<&str>) -> Result<Arc<Lease<T>>, ApiError> {
        let model = name.map_or(Ok(0), |name| self.find(name))?;
        Ok(Arc::new(self.wait_for(model).await?))
    }

    async fn wait_for(&self, model: usize) -> Result<Lease<T>, Refusal> {
        let since = Instant::now();
        let deadline = self.timeout.and_then(|timeout| since.checked_add(timeout));
        let (reply, answer) = oneshot::channel();
        let waiter = Waiter { model, since, deadline, reply };
        self.events.send(Event::Asked(waiter)).map_err(|_| Refusal::Gone)?;
        answer.await.map_err(|_| Refusal::Gone)?
    }

    /// Ends all models, once the requests under way are answered; nobody gets one any more.
    pub(crate) fn stop(&self) {
        // A manager that is gone has stopped.
        let _ = self.events.send(Event::Stop);
    }
}

/// A model in use: it stays loaded until this is dropped.
pub(crate) struct Lease<T> {
    held: Arc<T>,
    entry: Arc<Entry>,
    since: Instant,
    deadline: Option<Instant>,
    // Dropped last, so that the model is nobody's when the manager hears of it.
    _return: Return<T>,
}

/// Tells the manager, when it is dropped, that a model is given back.
struct Return<T> {
    model: usize,
    events: UnboundedSender<Event<T>>,
}

impl<T> Drop for Return<T> {
    fn drop(&mut self) {
        // A manager that is gone does not count any more.
        let _ = self.events.send(Event::Returned(self.model));
    }
}

impl<T> Lease<T> {
    /// What the model calls itself.
    pub(crate) fn name(&self) -> &str {
        self.entry.name()
    }

    /// When the request came that it is for.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// When that must be answered.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

impl<T> Deref for Lease<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.held
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for Lease<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("held", &self.held).finish_non_exhaustive()
    }
}
