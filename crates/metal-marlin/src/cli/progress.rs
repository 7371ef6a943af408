//! Progress on standard error: nothing for what takes less than a second, nothing where nobody watches.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::interrupt::Interrupt;

/// Work shorter than this passes without a word.
const PATIENCE: Duration = Duration::from_secs(1);

/// Does `work` with a spinner and `message` on the terminal once it takes longer than a second.
/// indicatif draws nothing where standard error is not a terminal.
pub(crate) fn spinner<T>(message: &str, work: impl FnOnce() -> T) -> T {
    thread::scope(|scope| {
        // Dropping `_working`, also by a panic, ends the thread.
        let (_working, finished) = channel::<()>();
        scope.spawn(move || {
            if finished.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                let bar = ProgressBar::new_spinner().with_message(message.to_owned());
                bar.enable_steady_tick(Duration::from_millis(100));
                let _ = finished.recv();
                bar.finish_and_clear();
            }
        });
        work()
    })
}

/// A bar for work of known length, shown once it takes longer than a second and gone when dropped.
/// indicatif draws nothing where standard error is not a terminal.
pub(crate) struct Bar {
    bar: ProgressBar,
    started: Instant,
    interrupt: Interrupt,
}

impl Bar {
    /// A bar of bytes.
    pub(crate) fn bytes(message: &str) -> Self {
        Self::new(message, "{msg} {wide_bar} {bytes}/{total_bytes}, {eta} left")
    }

    /// A bar of `unit`s.
    pub(crate) fn counting(message: &str, unit: &str) -> Self {
        Self::new(message, &format!("{{msg}} {{wide_bar}} {{human_pos}}/{{human_len}} {unit}, {{eta}} left"))
    }

    fn new(message: &str, template: &str) -> Self {
        let style = ProgressStyle::with_template(template).expect("a template with known keys");
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()).with_style(style);
        Self { bar: bar.with_message(message.to_owned()), started: Instant::now(), interrupt: Interrupt::current() }
    }

    /// How much of how much is done. The work ends here if it is to be interrupted.
    pub(crate) fn set(&mut self, done: u64, total: u64) {
        self.interrupt.check();
        if self.bar.is_hidden() && self.started.elapsed() > PATIENCE {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
