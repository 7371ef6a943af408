//! Workers that help a caller with its tasks.
//!
//! A decoded token is hundreds of short jobs one after the other. A worker that slept in between would wake after tens of
//! microseconds, when the job is done; so it watches for the next one for a while before it sleeps.
//!
//! Tasks are claimed one by one, so that a thread that the system holds up holds up one task at most: a job does not wait for
//! workers that have none of it.

use std::any::Any;
use std::hint::spin_loop;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// For how long a worker watches for tasks before it sleeps: longer than what a caller does alone between the operations of a
/// token, shorter than what it does between tokens.
const WATCH: Duration = Duration::from_micros(50);
/// Looks in a row, a microsecond or a few, after which a thread that waits lets others have its processor if they want it.
const LOOKS: usize = 64;

/// What all tasks of a job call, with their number.
type Job<'a> = &'a (dyn Fn(usize) + Sync);

/// Threads that wait for jobs.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// What the caller and the workers know of each other.
#[derive(Debug, Default)]
struct Shared {
    /// Whether a caller has a job here.
    busy: AtomicBool,
    queue: Line<Queue>,
    /// Tasks of the job that have not ended.
    unfinished: Line<AtomicUsize>,
    /// What the first task that panicked did so with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Workers that sleep, or are about to.
    sleepers: AtomicUsize,
    /// Whether workers should end. Who is about to sleep holds the lock until it does.
    ended: Mutex<bool>,
    alarm: Condvar,
}

/// A job, and how much of it is left.
#[derive(Debug, Default)]
struct Queue {
    /// Tasks that nobody has claimed; less than none after claims that came too late.
    unclaimed: AtomicIsize,
    /// Where the caller keeps its [`Job`].
    job: AtomicPtr<()>,
}

/// A value that shares no cache line with others, of which processors fetch two at once.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line<T>(T);

impl Pool {
    /// Starts so many workers.
    pub(super) fn new(workers: usize) -> io::Result<Self> {
        let mut pool = Self { shared: Arc::default(), workers: Vec::with_capacity(workers) };
        for i in 0..workers {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new().name(format!("marlin-cpu-{i}")).spawn(move || shared.serve())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// How many workers there are.
    pub(super) fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Calls `job(0)` to `job(tasks − 1)`, each once, on the calling thread and those workers that come in time. Where the pool
    /// has a job already, of another thread or the one that this is a task of, the calling thread does all tasks alone.
    ///
    /// # Panics
    /// If a task does, with what it panicked with, after all tasks have ended.
    pub(super) fn run(&self, tasks: usize, job: Job<'_>) {
        if self.shared.busy.swap(true, Ordering::Acquire) {
            return (0..tasks).for_each(job);
        }
        self.shared.publish(tasks, &job);
        self.shared.work();
        self.shared.wait();
        let panic = lock(&self.shared.panic).take();
        self.shared.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        *lock(&self.shared.ended) = true;
        self.shared.alarm.notify_all();
        for worker in self.workers.drain(..) {
            // Tasks' panics are caught: a worker has nothing to tell.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Lets workers claim the tasks of a job; the last one has ended. `job` stays where it is until [`Shared::wait`] returns.
    fn publish(&self, tasks: usize, job: &Job<'_>) {
        let Queue { unclaimed, job: place } = &self.queue.0;
        self.unfinished.0.store(tasks, Ordering::Relaxed);
        place.store((&raw const *job).cast_mut().cast(), Ordering::Relaxed);
        // Sequentially consistent, as a worker's steps into sleep: either it sees the tasks, or it is seen here.
        unclaimed.store(isize::try_from(tasks).expect("fewer tasks than half of all numbers"), Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.ended));
            self.alarm.notify_all();
        }
    }

    /// Claims and does tasks until none is left.
    fn work(&self) {
        let Queue { unclaimed, job } = &self.queue.0;
        let mut done = 0;
        while unclaimed.load(Ordering::Relaxed) > 0 {
            let task = unclaimed.fetch_sub(1, Ordering::Acquire) - 1;
            let Ok(task) = usize::try_from(task) else { break };
            let job = job.load(Ordering::Relaxed).cast_const().cast::<Job<'_>>();
            // SAFETY: the claim has made visible what was stored before the tasks were published, the pointer to a `Job` on the
            // stack of the caller in `Pool::run`. That stays there, and what it refers to lives, until all tasks have ended, and
            // the one claimed has not before its turn is taken off `unfinished` below.
            let job = unsafe { *job };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(task))) {
                lock(&self.panic).get_or_insert(panic);
            }
            done += 1;
        }
        if done > 0 {
            // What the tasks wrote becomes visible to the caller, which waits for 0.
            self.unfinished.0.fetch_sub(done, Ordering::Release);
        }
    }

    /// Waits until all tasks have ended.
    fn wait(&self) {
        while !watch(|| self.unfinished.0.load(Ordering::Acquire) == 0) {}
    }

    /// A worker's life.
    fn serve(&self) {
        loop {
            self.work();
            if !self.watch_for_tasks() && self.sleep() {
                return;
            }
        }
    }

    /// Returns whether there are tasks, or none came for as long as a worker watches.
    fn watch_for_tasks(&self) -> bool {
        let start = Instant::now();
        loop {
            let seen = watch(|| self.queue.0.unclaimed.load(Ordering::Relaxed) > 0);
            if seen || start.elapsed() >= WATCH {
                return seen;
            }
        }
    }

    /// Sleeps until there are tasks or the pool ends; returns whether it has ended. Workers may wake for nothing.
    fn sleep(&self) -> bool {
        let mut ended = lock(&self.ended);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        if !*ended && self.queue.0.unclaimed.load(Ordering::SeqCst) <= 0 {
            ended = self.alarm.wait(ended).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        *ended
    }
}

/// Looks for a while; returns whether it was seen.
fn watch(seen: impl Fn() -> bool) -> bool {
    for _ in 0..LOOKS {
        if seen() {
            return true;
        }
        spin_loop();
    }
    thread::yield_now();
    false
}

/// Nothing panics while it holds a lock here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
