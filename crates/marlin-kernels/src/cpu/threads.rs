//! The threads that kernels share.

use std::sync::Arc;

use crate::KernelError;

/// More threads than any machine has use for; starting many more would take minutes, or all memory.
pub(crate) const MOST_THREADS: usize = 1024;

/// A pool of threads. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Threads {
    /// Absent for one thread, which is the caller's.
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl Threads {
    /// A pool of `count` threads.
    pub(crate) fn new(count: usize) -> Result<Self, KernelError> {
        if count == 0 {
            return Err(KernelError::Device("the CPU backend needs at least one thread, found 0".into()));
        }
        if count > MOST_THREADS {
            return Err(KernelError::Device(format!(
                "the CPU backend runs on at most {MOST_THREADS} threads, found {count}; one per core is fastest"
            )));
        }
        if count == 1 {
            return Ok(Self { pool: None });
        }
        let pool =
            rayon::ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("marlin-cpu-{i}")).build();
        let pool = pool.map_err(|error| KernelError::Device(format!("cannot start {count} threads: {error}")))?;
        Ok(Self { pool: Some(Arc::new(pool)) })
    }

    /// How many threads run at once.
    pub(crate) fn count(&self) -> usize {
        self.pool.as_ref().map_or(1, |pool| pool.current_num_threads())
    }

    /// Calls `f(0)` to `f(tasks − 1)`, each once, in any order and possibly at once; returns when all have returned.
    pub(crate) fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        match &self.pool {
            Some(pool) if tasks > 1 => pool.install(|| halve(0, tasks, f)),
            _ => (0..tasks).for_each(f),
        }
    }

    /// Calls `f(i, chunk i)` for every chunk of `size` elements of `data` (the last may be shorter), like [`Threads::run`].
    pub(crate) fn for_each_chunk<T: Send>(&self, data: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        use rayon::prelude::*;
        match &self.pool {
            Some(pool) if data.len() > size => {
                pool.install(|| data.par_chunks_mut(size).enumerate().for_each(|(i, chunk)| f(i, chunk)));
            }
            _ => data.chunks_mut(size).enumerate().for_each(|(i, chunk)| f(i, chunk)),
        }
    }
}

/// Splits tasks with `join`, whose jobs live on the stack, so that nothing is allocated.
fn halve(first: usize, end: usize, f: &(dyn Fn(usize) + Sync)) {
    if end - first == 1 {
        return f(first);
    }
    let middle = first + (end - first) / 2;
    rayon::join(|| halve(first, middle, f), || halve(middle, end, f));
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_task_runs_once() {
        for count in [1, 2, 3] {
            let threads = Threads::new(count).unwrap();
            assert_eq!(threads.count(), count);
            for tasks in [0, 1, 2, 7, 100] {
                let calls: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                threads.run(tasks, &|i| {
                    calls[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
            let mut data = vec![0; 23];
            threads.for_each_chunk(&mut data, 5, |i, chunk| chunk.fill(i));
            assert_eq!(data, (0..23).map(|i| i / 5).collect::<Vec<_>>());
        }
    }

    #[test]
    fn absurd_counts_are_refused() {
        assert!(Threads::new(0).unwrap_err().to_string().contains("at least one thread"));
        assert!(Threads::new(100_000).unwrap_err().to_string().contains("at most 1024 threads, found 100000"));
    }
}
