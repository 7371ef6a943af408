//! The task that grants leases, and has models loaded and unloaded.
//!
//! Who asks for a model that is loaded gets it at once. The others stand in line, and the model of the first one is loaded next. If there is no
//! room for it, models that nobody uses are unloaded, the one least recently used first; if all are in use, that one is granted to nobody
//! any more until it is unloaded, so that nobody waits for ever.

use std::any::Any;
use std::collections::VecDeque;
use std::future::pending;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use tokio::sync::mpsc::{UnboundedReceiver, WeakUnboundedSender};
use tokio::sync::oneshot;
use tokio::time::sleep_until;

use super::{Entry, Lease, LoadFailure, RegistryOptions, Return, Running, Start, Started, Status};
use crate::metrics::{Metrics, UnloadReason};
use crate::worker::Refusal;

/// What the manager is told.
pub(super) enum Event<T> {
    /// Somebody wants a model.
    Asked(Waiter<T>),
    /// Somebody does not use this one any more.
    Returned(usize),
    /// It was loaded, or was not.
    Loaded(usize, Result<Started<T>, LoadFailure>),
    /// It was unloaded.
    Unloaded(usize),
    /// It is time for something.
    Tick,
    /// All is over.
    Stop,
}

/// Somebody who wants a model.
pub(super) struct Waiter<T> {
    pub(super) model: usize,
    pub(super) since: Instant,
    pub(super) deadline: Option<Instant>,
    pub(super) reply: oneshot::Sender<Result<Lease<T>, Refusal>>,
}

impl<T> Waiter<T> {
    fn refuse(self, refusal: Refusal) {
        // Who has gone needs no reason.
        let _ = self.reply.send(Err(refusal));
    }
}

/// A model, and what is done with it.
struct Slot<T> {
    entry: Arc<Entry>,
    state: State<T>,
    /// How many use it.
    leases: usize,
    last_used: Instant,
}

enum State<T> {
    Unloaded,
    /// It is being loaded or unloaded.
    Changing,
    Loaded(Arc<T>, JoinHandle<()>, Box<dyn Any + Send>),
}

impl<T> Slot<T> {
    fn is_loaded(&self) -> bool {
        matches!(self.state, State::Loaded(..))
    }

    fn is_idle(&self) -> bool {
        self.is_loaded() && self.leases == 0
    }
}

/// A model for which there was no room.
struct Wanted {
    model: usize,
    /// What it needs, and what there is.
    shortage: String,
    /// One in use that must make room for it: it is granted to nobody.
    leaving: Option<usize>,
}

/// See the module's description.
pub(super) struct Manager<T> {
    slots: Vec<Slot<T>>,
    /// Those who wait, in the order in which they came.
    line: VecDeque<Waiter<T>>,
    wanted: Option<Wanted>,
    /// A model is being loaded or unloaded; that is done with one at a time.
    is_at_work: bool,
    start: Arc<Start<T>>,
    options: RegistryOptions,
    metrics: Arc<Metrics>,
    events: UnboundedReceiver<Event<T>>,
    /// Leases and work tell of their end by it. It is weak so that the manager ends when nobody can ask any more.
    sender: WeakUnboundedSender<Event<T>>,
}

impl<T: Running> Manager<T> {
    pub(super) fn new(
        entries: Arc<[Arc<Entry>]>,
        start: Arc<Start<T>>,
        options: RegistryOptions,
        metrics: Arc<Metrics>,
        events: UnboundedReceiver<Event<T>>,
        sender: WeakUnboundedSender<Event<T>>,
        first: Option<Started<T>>,
    ) -> Self {
        let now = Instant::now();
        let slot =
            |entry: &Arc<Entry>| Slot { entry: entry.clone(), state: State::Unloaded, leases: 0, last_used: now };
        let slots = entries.iter().map(slot).collect();
        let line = VecDeque::new();
        let mut manager =
            Self { slots, line, wanted: None, is_at_work: false, start, options, metrics, events, sender };
        if let Some(first) = first {
            manager.keep(0, first);
        }
        manager
    }

    /// Does what it is told until it is told to stop, or nobody is there to tell.
    pub(super) async fn run(mut self) {
        loop {
            match self.next().await {
                Some(Event::Asked(waiter)) => self.line.push_back(waiter),
                Some(Event::Returned(model)) => self.returned(model),
                Some(Event::Loaded(model, result)) => self.loaded(model, result),
                Some(Event::Unloaded(model)) => self.unloaded(model),
                Some(Event::Tick) => {}
                Some(Event::Stop) | None => break,
            }
            self.advance();
        }
        self.end().await;
    }

    /// The next event, or when there is something to be done: a waiter's time is over, or a model was idle for long enough.
    async fn next(&mut self) -> Option<Event<T>> {
        let deadlines = self.line.iter().filter_map(|waiter| waiter.deadline);
        let idle = self.slots.iter().filter(|slot| slot.is_idle() && !self.is_at_work);
        let idle = idle.filter_map(|slot| slot.last_used.checked_add(self.options.idle_unload?));
        let next = deadlines.chain(idle).min();
        let tick = async {
            match next {
                Some(next) => sleep_until(next.into()).await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            event = self.events.recv() => event,
            () = tick => Some(Event::Tick),
        }
    }

    fn returned(&mut self, model: usize) {
        let slot = &mut self.slots[model];
        slot.leases -= 1;
        slot.last_used = Instant::now();
    }

    fn loaded(&mut self, model: usize, result: Result<Started<T>, LoadFailure>) {
        self.is_at_work = false;
        self.slots[model].state = State::Unloaded;
        self.slots[model].entry.set_status(Status::Unloaded);
        let failure = match result {
            Ok(started) => {
                tracing::info!("{} is loaded", self.slots[model].entry.name());
                return self.keep(model, started);
            }
            Err(LoadFailure::NoRoom(shortage)) if self.slots.iter().any(Slot::is_loaded) => {
                self.wanted = Some(Wanted { model, shortage, leaving: None });
                return;
            }
            Err(failure) => failure,
        };
        let refusal = || match &failure {
            LoadFailure::NoRoom(shortage) | LoadFailure::TooLarge(shortage) => Refusal::NoRoom(shortage.clone()),
            LoadFailure::Broken(problem) => Refusal::NotLoaded(problem.clone()),
        };
        tracing::error!("{} is not loaded: {}", self.slots[model].entry.name(), refusal());
        self.metrics.not_loaded(model);
        for waiter in std::mem::take(&mut self.line) {
            if waiter.model == model {
                waiter.refuse(refusal());
            } else {
                self.line.push_back(waiter);
            }
        }
    }

    /// A model runs.
    fn keep(&mut self, model: usize, started: Started<T>) {
        let slot = &mut self.slots[model];
        slot.entry.set_status(Status::Loaded { context: started.model.context() });
        slot.state = State::Loaded(Arc::new(started.model), started.thread, started.kept);
        slot.last_used = Instant::now();
        self.metrics.loaded(model);
    }

    fn unloaded(&mut self, model: usize) {
        self.is_at_work = false;
        self.slots[model].state = State::Unloaded;
        // Whether there is room now is tried.
        self.wanted = None;
    }

    /// Grants what can be granted, and begins what is to be done next.
    fn advance(&mut self) {
        self.end_late(Instant::now());
        if self.wanted.as_ref().is_some_and(|wanted| self.line.iter().all(|waiter| waiter.model != wanted.model)) {
            self.wanted = None;
        }
        self.grant();
        if !self.is_at_work {
            self.begin();
        }
        // Those who came last have no place in a line that is full.
        while self.line.len() > self.options.max_waiting {
            let Some(last) = self.line.pop_back() else { break };
            let waiting = self.line.len();
            last.refuse(Refusal::Busy { waiting, most: self.options.max_waiting });
        }
    }

    /// Lets those go who have left, or have waited for too long.
    fn end_late(&mut self, now: Instant) {
        for waiter in std::mem::take(&mut self.line) {
            if waiter.reply.is_closed() {
                continue;
            }
            if waiter.deadline.is_none_or(|deadline| deadline > now) {
                self.line.push_back(waiter);
                continue;
            }
            let wanted = self.wanted.as_ref().filter(|wanted| wanted.model == waiter.model);
            waiter.refuse(wanted.map_or(Refusal::Late, |wanted| Refusal::NoRoom(self.shortage(wanted))));
        }
    }

    /// Why there is no room for a model.
    fn shortage(&self, wanted: &Wanted) -> String {
        let used = self.slots.iter().filter(|slot| slot.leases > 0);
        let names: Vec<&str> = used.map(|slot| slot.entry.name()).collect();
        format!("{}; in use are {}", wanted.shortage, names.join(", "))
    }

    fn grant(&mut self) {
        let leaving = self.wanted.as_ref().and_then(|wanted| wanted.leaving);
        for waiter in std::mem::take(&mut self.line) {
            let slot = &mut self.slots[waiter.model];
            let (State::Loaded(model, ..), Some(events)) = (&slot.state, self.sender.upgrade()) else {
                self.line.push_back(waiter);
                continue;
            };
            if leaving == Some(waiter.model) {
                self.line.push_back(waiter);
                continue;
            }
            slot.leases += 1;
            slot.last_used = Instant::now();
            let lease = Lease {
                held: model.clone(),
                entry: slot.entry.clone(),
                since: waiter.since,
                deadline: waiter.deadline,
                _return: Return { model: waiter.model, events },
            };
            // The lease of one who has gone in the meantime returns by itself.
            let _ = waiter.reply.send(Ok(lease));
        }
    }

    /// Begins to load or to unload a model, if one has to be.
    fn begin(&mut self) {
        if self.wanted.is_some() {
            return self.make_room();
        }
        let is_unloaded = |waiter: &&Waiter<T>| matches!(self.slots[waiter.model].state, State::Unloaded);
        if let Some(model) = self.line.iter().find(is_unloaded).map(|waiter| waiter.model) {
            return self.load(model);
        }
        let Some(longest) = self.options.idle_unload else { return };
        let idle = self.least_recently_used(Slot::is_idle);
        if let Some(model) = idle.filter(|&model| self.slots[model].last_used.elapsed() >= longest) {
            self.unload(model, UnloadReason::Idle);
        }
    }

    /// Unloads a model that nobody uses, or else sees to it that there will be one.
    fn make_room(&mut self) {
        if let Some(model) = self.least_recently_used(Slot::is_idle) {
            return self.unload(model, UnloadReason::Memory);
        }
        let used = self.least_recently_used(Slot::is_loaded);
        if let Some(wanted) = &mut self.wanted {
            wanted.leaving = wanted.leaving.or(used);
        }
    }

    fn least_recently_used(&self, is_meant: impl Fn(&Slot<T>) -> bool) -> Option<usize> {
        let meant = (0..self.slots.len()).filter(|&model| is_meant(&self.slots[model]));
        meant.min_by_key(|&model| self.slots[model].last_used)
    }

    fn load(&mut self, model: usize) {
        let Some(events) = self.sender.upgrade() else { return };
        let (start, problem) = (self.start.clone(), events.clone());
        let work = move || {
            let started = catch_unwind(AssertUnwindSafe(|| start(model)))
                .unwrap_or_else(|_| Err(LoadFailure::Broken("a bug in the server (its log says more)".to_owned())));
            // If the manager is gone, so is the model.
            let _ = events.send(Event::Loaded(model, started));
        };
        self.is_at_work = true;
        self.slots[model].state = State::Changing;
        self.slots[model].entry.set_status(Status::Loading);
        // A thread of its own, for which the end of the program does not wait.
        if let Err(error) = thread::Builder::new().name("load".into()).spawn(work) {
            let failure = LoadFailure::Broken(format!("there is no thread to load it: {error}"));
            let _ = problem.send(Event::Loaded(model, Err(failure)));
        }
    }

    fn unload(&mut self, model: usize, reason: UnloadReason) {
        let Some(events) = self.sender.upgrade() else { return };
        let slot = &mut self.slots[model];
        let State::Loaded(running, thread, kept) = std::mem::replace(&mut slot.state, State::Changing) else { return };
        tracing::info!("{} is unloaded ({})", slot.entry.name(), reason.name());
        slot.entry.set_status(Status::Unloaded);
        self.is_at_work = true;
        let metrics = self.metrics.clone();
        tokio::task::spawn_blocking(move || {
            running.stop();
            drop(running);
            // A thread that panicked has dropped its engine, too.
            let _ = thread.join();
            metrics.unloaded(model, reason);
            drop(kept);
            // A manager that is gone does not wait for it.
            let _ = events.send(Event::Unloaded(model));
        });
    }

    /// Ends all models when the requests under way are answered. What is being loaded is dropped when it is.
    async fn end(mut self) {
        self.events.close();
        self.line.drain(..).for_each(|waiter| waiter.refuse(Refusal::Gone));
        // Who has asked in the meantime is told by what is dropped here.
        while let Ok(event) = self.events.try_recv() {
            if let Event::Loaded(model, Ok(started)) = event {
                self.keep(model, started);
            }
        }
        let mut models = Vec::new();
        for slot in self.slots {
            if let State::Loaded(running, thread, kept) = slot.state {
                running.stop();
                models.push((running, thread, kept));
            }
        }
        let wait = move || {
            for (running, thread, kept) in models {
                let _ = thread.join();
                drop((running, kept));
            }
        };
        let _ = tokio::task::spawn_blocking(wait).await;
    }
}
