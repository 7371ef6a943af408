//! The thread that owns the engine, and how handlers talk to it.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use marlin_engine::{Engine, EngineError, Event, Request, RequestId};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::metrics::ModelMetrics;
use crate::model::Served;

/// After so many steps in a row that fail, the requests under way are given up.
const MOST_FAILURES: usize = 3;

/// Why a request is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// The engine refuses it.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Too many wait already.
    #[error("{waiting} requests are waiting already, and no more than {most} may; try again later")]
    Busy {
        /// Requests that wait.
        waiting: usize,
        /// Most that may.
        most: usize,
    },
    /// There is no memory for the model: what it needs, and what there is.
    #[error("{0}; try again later")]
    NoRoom(String),
    /// The model cannot be loaded, because of this.
    #[error("the model cannot be loaded: {0}")]
    NotLoaded(String),
    /// The model was not loaded in time.
    #[error("the model was not loaded in time (--timeout of the server); try again")]
    Late,
    /// The engine is gone.
    #[error("the server is shutting down")]
    Gone,
}

/// What a request is told.
#[derive(Debug)]
pub(crate) enum Update {
    /// A token, or the end of an answer.
    Event(Event),
    /// It took too long.
    Late,
    /// There will be nothing more, because of this.
    Failed(String),
}

enum Command {
    Add {
        request: Box<Request>,
        since: Instant,
        deadline: Option<Instant>,
        updates: UnboundedSender<Update>,
        reply: oneshot::Sender<Result<RequestId, Refusal>>,
    },
    Cancel(RequestId),
    Stop,
}

/// Sends requests to the engine. Clones send to the same one.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    commands: Sender<Command>,
}

/// A request under way. Dropped before its end, it is cancelled.
#[derive(Debug)]
pub(crate) struct Ticket {
    id: RequestId,
    updates: UnboundedReceiver<Update>,
    commands: Sender<Command>,
    answers_left: u32,
    /// Keeps the model; dropped after the engine was told to cancel.
    _served: Arc<Served>,
}

impl Worker {
    /// Starts the thread. At most `most_waiting` answers wait for their turn.
    pub(crate) fn start(
        engine: Engine,
        most_waiting: usize,
        metrics: Arc<ModelMetrics>,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (commands, receiver) = mpsc::channel();
        let mut desk = Desk { engine, most_waiting, metrics, open: HashMap::new(), failures: 0, is_stopping: false };
        desk.publish();
        let thread = thread::Builder::new().name("engine".into()).spawn(move || desk.run(&receiver))?;
        Ok((Self { commands }, thread))
    }

    /// Queues a request to the model whose worker this is, which is ended if it is not answered in time.
    async fn submit(&self, request: Request, served: Arc<Served>) -> Result<Ticket, Refusal> {
        let answers_left = request.choices;
        let (sender, updates) = unbounded_channel();
        let (reply, answer) = oneshot::channel();
        let (since, deadline) = (served.since(), served.deadline());
        let command = Command::Add { request: Box::new(request), since, deadline, updates: sender, reply };
        self.commands.send(command).map_err(|_| Refusal::Gone)?;
        let id = answer.await.map_err(|_| Refusal::Gone)??;
        Ok(Ticket { id, updates, commands: self.commands.clone(), answers_left, _served: served })
    }

    /// Lets the thread end, once the requests under way are answered.
    pub(crate) fn stop(&self) {
        // A thread that is gone has stopped.
        let _ = self.commands.send(Command::Stop);
    }
}

impl Served {
    /// Asks the engine for answers. The model stays loaded until they are there, or nobody waits for them.
    pub(crate) async fn submit(self: &Arc<Self>, request: Request) -> Result<Ticket, Refusal> {
        self.worker.submit(request, self.clone()).await
    }
}

impl Ticket {
    /// What comes next; `None` after the end of the last answer.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        if self.answers_left == 0 {
            return None;
        }
        let update = self.updates.recv().await.unwrap_or_else(|| Update::Failed("the engine is gone".to_owned()));
        match &update {
            Update::Event(event) => self.answers_left -= u32::from(event.finish.is_some()),
            Update::Late | Update::Failed(_) => self.answers_left = 0,
        }
        Some(update)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.answers_left > 0 {
            // A thread that is gone has nothing to cancel.
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}

/// A request that is being served.
struct Open {
    updates: UnboundedSender<Update>,
    answers_left: u32,
    since: Instant,
    deadline: Option<Instant>,
    /// When each of its answers got its last token.
    last_token: Vec<Option<Instant>>,
}

/// The engine and those who wait for its answers.
struct Desk {
    engine: Engine,
    most_waiting: usize,
    metrics: Arc<ModelMetrics>,
    open: HashMap<RequestId, Open>,
    /// Steps in a row that failed.
    failures: usize,
    /// Nothing new is taken on.
    is_stopping: bool,
}

impl Desk {
    /// Steps until it is told to stop and everybody has an answer.
    fn run(&mut self, commands: &Receiver<Command>) {
        let mut events = Vec::new();
        while !(self.is_stopping && self.engine.is_idle()) {
            if self.engine.is_idle() {
                let Ok(command) = commands.recv() else { return };
                self.handle(command);
            }
            while let Ok(command) = commands.try_recv() {
                self.handle(command);
            }
            self.step(&mut events);
            self.publish();
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Add { request, since, deadline, updates, reply } => {
                let answers_left = request.choices;
                let added = self.add(*request);
                if let Ok(id) = &added {
                    let last_token = vec![None; answers_left as usize];
                    self.open.insert(*id, Open { updates, answers_left, since, deadline, last_token });
                }
                // Who has gone in the meantime does not wait for an answer.
                if let Err(Ok(id)) = reply.send(added) {
                    self.cancel(id);
                }
            }
            Command::Cancel(id) => self.cancel(id),
            Command::Stop => self.is_stopping = true,
        }
    }

    fn add(&mut self, request: Request) -> Result<RequestId, Refusal> {
        if self.is_stopping {
            return Err(Refusal::Gone);
        }
        let waiting = self.engine.stats().waiting;
        if waiting >= self.most_waiting {
            return Err(Refusal::Busy { waiting, most: self.most_waiting });
        }
        catch_unwind(AssertUnwindSafe(|| self.engine.add(request)))
            .unwrap_or_else(|_| {
                Err(EngineError::Answer { problem: "a bug in the server (its log says more)".to_owned() })
            })
            .map_err(Refusal::Engine)
    }

    fn cancel(&mut self, id: RequestId) {
        self.open.remove(&id);
        self.engine.cancel(id);
    }

    /// Runs a step and hands out what comes of it.
    fn step(&mut self, events: &mut Vec<Event>) {
        if self.engine.is_idle() {
            return;
        }
        match catch_unwind(AssertUnwindSafe(|| self.engine.step(events))) {
            Ok(Ok(())) => self.failures = 0,
            Ok(Err(error)) => {
                self.failures += 1;
                tracing::error!(error = &error as &dyn std::error::Error, "a step failed");
                if self.failures == MOST_FAILURES {
                    self.give_up(&with_causes(&error));
                }
            }
            Err(_) => self.give_up("a bug in the server (its log says more)"),
        }
        let now = Instant::now();
        for event in events.drain(..) {
            self.deliver(event, now);
        }
        self.end_late(now);
    }

    fn deliver(&mut self, event: Event, now: Instant) {
        let id = event.request;
        let Some(open) = self.open.get_mut(&id) else { return };
        let last = open.last_token[event.choice as usize].replace(now);
        match last {
            Some(last) => self.metrics.between_tokens.observe((now - last).as_secs_f64()),
            None => self.metrics.first_token.observe((now - open.since).as_secs_f64()),
        }
        if let Some(finish) = &event.finish {
            open.answers_left -= 1;
            self.metrics.finished(finish.reason.name());
        }
        let is_gone = open.updates.send(Update::Event(event)).is_err();
        if open.answers_left == 0 {
            self.metrics.whole.observe((now - open.since).as_secs_f64());
            self.open.remove(&id);
        } else if is_gone {
            self.cancel(id);
        }
    }

    /// Ends requests that have waited too long for their answers.
    fn end_late(&mut self, now: Instant) {
        let Self { open, engine, metrics, .. } = self;
        open.retain(|&id, open| {
            let is_late = open.deadline.is_some_and(|deadline| deadline <= now);
            if is_late {
                engine.cancel(id);
                metrics.finished("deadline");
                // Who has gone does not wait for an answer.
                let _ = open.updates.send(Update::Late);
            }
            !is_late
        });
    }

    /// Ends all requests with an error.
    fn give_up(&mut self, reason: &str) {
        self.failures = 0;
        self.engine.cancel_all();
        for (_, open) in self.open.drain() {
            // Who has gone does not wait for an answer.
            let _ = open.updates.send(Update::Failed(reason.to_owned()));
        }
    }

    fn publish(&mut self) {
        self.metrics.publish(self.engine.stats());
    }
}

/// An error and what caused it, in a line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    line
}
