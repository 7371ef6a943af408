//! Fork-joins: what it costs to have all threads do something and to wait for them, beside the same with rayon.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use marlin_kernels::cpu::Threads;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::timer::Timed;
use super::{Bench, KernelBenchError, Measurement, Plans, full_name};
use crate::stats::Spread;

/// Fork-joins in a sample.
const FORKS: usize = 1000;
const QUICK_FORKS: usize = 20;

/// Fork-joins of these threads, with a task for each.
pub(super) struct ThreadsGroup(pub(super) Threads);

#[derive(Debug, Clone, Copy)]
struct Case {
    by: Library,
    tasks: Tasks,
    /// For how long the caller does something else before each.
    busy: Duration,
}

/// Whose threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Library {
    /// Those that kernels run on.
    Pool,
    Rayon,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tasks {
    /// They do nothing: the caller may do all of them before others come.
    Empty,
    /// Each waits for all: no thread is left out.
    Meeting,
}

impl Case {
    fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        for tasks in [Tasks::Empty, Tasks::Meeting] {
            for busy in [0, 20, 200].map(Duration::from_micros) {
                cases.extend([Library::Pool, Library::Rayon].map(|by| Self { by, tasks, busy }));
            }
        }
        cases
    }

    fn name(self) -> String {
        let by = match self.by {
            Library::Pool => "pool",
            Library::Rayon => "rayon",
        };
        let tasks = match self.tasks {
            Tasks::Empty => "empty",
            Tasks::Meeting => "meeting",
        };
        format!("{by}/{tasks}/busy={}us", self.busy.as_micros())
    }

    /// Seconds of a fork-join, the median of so many: other programs hold up some of them a thousand times as long.
    fn sample(self, forks: usize, threads: &Threads, rayon: &ThreadPool) -> f64 {
        let count = threads.count();
        let fork_join = |task: &(dyn Fn(usize) + Sync)| match self.by {
            Library::Pool => threads.run(count, task),
            Library::Rayon => rayon.install(|| halve(0, count, task)),
        };
        let fork = |_| {
            let begun = Instant::now();
            while begun.elapsed() < self.busy {}
            let arrived = AtomicUsize::new(0);
            let start = Instant::now();
            match self.tasks {
                Tasks::Empty => fork_join(&|task| {
                    black_box(task);
                }),
                Tasks::Meeting => fork_join(&|_| meet(&arrived, count)),
            }
            start.elapsed().as_secs_f64()
        };
        let seconds: Vec<f64> = (0..forks).map(fork).collect();
        Spread::of(&seconds).map_or(0.0, |spread| spread.median)
    }
}

impl<B: Timed> Plans<B> for ThreadsGroup {
    fn name(&self) -> String {
        "threads/fork-join".to_owned()
    }

    fn cases(&self) -> Vec<String> {
        Case::all().into_iter().map(Case::name).collect()
    }

    fn measure(&self, bench: &Bench<'_, B>, done: &mut dyn FnMut()) -> Result<Vec<Measurement>, KernelBenchError> {
        let rayon = ThreadPoolBuilder::new().num_threads(self.0.count()).build()?;
        let forks = if bench.plan.quick { QUICK_FORKS } else { FORKS };
        let mut measurements = Vec::new();
        for case in Case::all() {
            let name = full_name(&Plans::<B>::name(self), &case.name());
            if !bench.is_wanted(&name) {
                continue;
            }
            let sample = || case.sample(forks, &self.0, &rayon);
            sample();
            let samples: Vec<f64> = (0..bench.plan.repetitions.max(1)).map(|_| sample()).collect();
            // There is at least one.
            let seconds = Spread::of(&samples).unwrap_or(Spread { median: 0.0, min: 0.0, max: 0.0 });
            measurements.push(Measurement { name, seconds, work: None, reads: None });
            done();
        }
        Ok(measurements)
    }
}

/// Splits tasks with `join`, which allocates nothing.
fn halve(first: usize, end: usize, task: &(dyn Fn(usize) + Sync)) {
    if end - first == 1 {
        return task(first);
    }
    let middle = first + (end - first) / 2;
    rayon::join(|| halve(first, middle, task), || halve(middle, end, task));
}

/// Waits until so many are here, and lets others have the processor now and then.
fn meet(arrived: &AtomicUsize, count: usize) {
    arrived.fetch_add(1, Ordering::Relaxed);
    for look in 1usize.. {
        if arrived.load(Ordering::Relaxed) >= count {
            return;
        }
        if look.is_multiple_of(64) { thread::yield_now() } else { spin_loop() }
    }
}
