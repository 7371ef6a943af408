//! The threads that kernels share.

mod pool;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use self::pool::Pool;
use super::disjoint::Disjoint;
use crate::KernelError;

/// More threads than any machine has use for; starting many more would take minutes, or all memory.
pub(super) const MOST_THREADS: usize = 1024;

/// The thread that calls, and a pool of others that help it. Clones share the pool.
#[derive(Debug, Clone)]
pub struct Threads {
    /// Absent for one thread, which is the caller's.
    pool: Option<Arc<Pool>>,
}

impl Threads {
    /// Starts as many threads as make `count` with the caller's.
    ///
    /// # Errors
    /// If `count` is 0 or absurd, or the system has no more threads.
    pub fn new(count: usize) -> Result<Self, KernelError> {
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
        let pool = Pool::new(count - 1);
        let pool = pool.map_err(|error| KernelError::Device(format!("cannot start {count} threads: {error}")))?;
        Ok(Self { pool: Some(Arc::new(pool)) })
    }

    /// How many threads run at once.
    pub fn count(&self) -> usize {
        self.pool.as_ref().map_or(1, |pool| pool.workers() + 1)
    }

    /// Calls `f(0)` to `f(tasks − 1)`, each once, in any order and possibly at once; returns when all have returned. Nothing is
    /// allocated. A call from within a task, or while another thread's call runs, does its tasks on the calling thread.
    ///
    /// # Panics
    /// If a task panics, when no task runs any more.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        match &self.pool {
            Some(pool) if tasks > 1 => pool.run(tasks, f),
            _ => (0..tasks).for_each(f),
        }
    }

    /// Calls `f(i, chunk i)` for every chunk of `size` elements of `data` (the last may be shorter), like [`Threads::run`].
    pub(super) fn for_each_chunk<T: Send>(&self, data: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let len = data.len();
        let data = Disjoint::new(data);
        self.run(len.div_ceil(size), &|i| {
            let start = i * size;
            // SAFETY: each chunk belongs to one task.
            f(i, unsafe { data.slice(start, size.min(len - start)) });
        });
    }
}
