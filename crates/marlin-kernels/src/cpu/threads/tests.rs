//! Tasks, threads and panics at once. Miri runs them, too, with fewer rounds.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::*;

/// So many rounds, or what Miri does in a while.
const fn rounds(count: usize) -> usize {
    if cfg!(miri) { count.div_ceil(500) } else { count }
}

/// Runs so many tasks and checks that each was called once.
fn check(threads: &Threads, tasks: usize) {
    let calls: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
    threads.run(tasks, &|i| {
        calls[i].fetch_add(1, Ordering::Relaxed);
    });
    assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1), "{tasks} tasks, {calls:?}");
}

/// What a task panicked with.
fn panic_of(run: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
    panic.downcast_ref::<String>().cloned().unwrap_or_else(|| panic.downcast_ref::<&str>().unwrap().to_string())
}

#[test]
fn every_task_runs_once() {
    for count in 1..=8 {
        let threads = Threads::new(count).unwrap();
        assert_eq!(threads.count(), count);
        for tasks in [0, 1, 2, 7, 100] {
            check(&threads, tasks);
        }
        for size in [1, 5, 23, 40] {
            let mut data = [0; 23];
            threads.for_each_chunk(&mut data, size, |i, chunk| chunk.fill(i));
            assert_eq!(data, std::array::from_fn(|i| i / size), "chunks of {size}");
        }
        threads.for_each_chunk(&mut [0; 0], 3, |_, _| panic!("nothing has no chunks"));
    }
}

#[test]
fn jobs_see_what_those_before_wrote() {
    for count in 1..=8 {
        let threads = Threads::new(count).unwrap();
        let mut sums = [0usize; 16];
        for round in 0..rounds(20_000) {
            let tasks = 1 + round % sums.len();
            let before = sums;
            // Every task reads what other tasks wrote in the last round.
            threads.for_each_chunk(&mut sums[..tasks], 1, |i, sum| sum[0] = before[(i + 1) % 16] + i);
            for (i, sum) in sums[..tasks].iter().enumerate() {
                assert_eq!(*sum, before[(i + 1) % 16] + i);
            }
        }
    }
}

#[test]
fn threads_that_sleep_wake_up() {
    let threads = Threads::new(3).unwrap();
    for round in 0..rounds(400) {
        thread::sleep(Duration::from_micros(17 * (round as u64 % 20)));
        // Three tasks that wait for each other need three threads.
        let begun = AtomicUsize::new(0);
        threads.run(3, &|_| {
            begun.fetch_add(1, Ordering::Relaxed);
            while begun.load(Ordering::Relaxed) < 3 {
                thread::yield_now();
            }
        });
    }
}

#[test]
fn a_panic_reaches_the_caller_when_all_tasks_have_ended() {
    for count in 2..=4 {
        let threads = Threads::new(count).unwrap();
        for round in 0..rounds(500) {
            let (ended, wrong) = (AtomicUsize::new(0), round % 10);
            let panic = panic_of(|| {
                threads.run(10, &|i| {
                    // Tells less than a panic with a hook.
                    if i == wrong {
                        std::panic::resume_unwind(Box::new(format!("task {i}")));
                    }
                    ended.fetch_add(1, Ordering::Relaxed);
                })
            });
            assert_eq!((panic, ended.into_inner()), (format!("task {wrong}"), 9));
            check(&threads, 5);
        }
        let panic = panic_of(|| threads.run(10, &|_| std::panic::resume_unwind(Box::new("all"))));
        assert_eq!(panic, "all");
        check(&threads, 100);
    }
}

#[test]
fn tasks_may_have_tasks() {
    let threads = Threads::new(4).unwrap();
    for _ in 0..rounds(500) {
        let calls = AtomicUsize::new(0);
        threads.run(5, &|_| {
            threads.run(6, &|_| {
                threads.run(2, &|_| {
                    calls.fetch_add(1, Ordering::Relaxed);
                });
            });
        });
        assert_eq!(calls.into_inner(), 60);
    }
    let panic = panic_of(|| threads.run(2, &|_| threads.run(2, &|_| std::panic::resume_unwind(Box::new("inner")))));
    assert_eq!(panic, "inner");
    check(&threads, 100);
}

#[test]
fn several_threads_may_call() {
    let threads = Threads::new(3).unwrap();
    thread::scope(|scope| {
        for caller in 0..4 {
            let threads = threads.clone();
            scope.spawn(move || {
                for round in 0..rounds(5000) {
                    check(&threads, (caller + round) % 9);
                    if round % 1000 == caller {
                        panic_of(|| threads.run(3, &|_| std::panic::resume_unwind(Box::new("one"))));
                    }
                }
            });
        }
    });
    check(&threads, 100);
}

#[test]
fn pools_end_whatever_their_threads_do() {
    for round in 0..rounds(500) {
        let threads = Threads::new(2 + round % 7).unwrap();
        let other = threads.clone();
        for _ in 0..round % 3 {
            check(&threads, 10);
        }
        drop(threads);
        // From not at all, while they watch, to while they sleep.
        thread::sleep(Duration::from_micros(20 * (round as u64 % 10)));
        check(&other, round % 4);
    }
}

#[test]
fn absurd_counts_are_refused() {
    assert!(Threads::new(0).unwrap_err().to_string().contains("at least one thread"));
    assert!(Threads::new(100_000).unwrap_err().to_string().contains("at most 1024 threads, found 100000"));
}
