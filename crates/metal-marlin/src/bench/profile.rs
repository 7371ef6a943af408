//! Where the time of a step on a GPU goes, kernel by kernel.

use std::collections::BTreeMap;

use marlin_kernels::gpu::{GpuBackend, KernelTime};
use marlin_model::{LanguageModel, ModelError};

use serde_json::{Value, json};

use super::measure::Runner;
use super::{BenchError, Test};
use crate::device::Device;
use crate::stats::Spread;

/// Steps of decoding that are profiled, at least.
const LEAST_STEPS: usize = 16;

/// What the kernels of a test's steps take, as medians over the steps.
#[derive(Debug, Clone)]
pub struct Profile {
    /// The test; a step of it is a token of each stream, or a whole prompt.
    pub test: Test,
    /// How many steps were profiled.
    pub steps: usize,
    /// Seconds from the last kernel's end of one step to that of the next.
    pub seconds: f64,
    /// Of them, those in which no kernel ran.
    pub idle: f64,
    /// Kernels with the same name and the same size of matrix, what takes longest first.
    pub kernels: Vec<KernelShare>,
}

/// Kernels of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelShare {
    /// Their name.
    pub name: &'static str,
    /// Rows and columns of the packed matrix that each reads, if they read any.
    pub matrix: Option<[usize; 2]>,
    /// How many a step has.
    pub count: f64,
    /// Seconds that they take of a step.
    pub seconds: f64,
}

/// The GPU whose kernels can be timed.
pub(super) fn device(opened: &Device) -> Result<&GpuBackend, BenchError> {
    let has_clock = |gpu: &&GpuBackend| gpu.caps().timestamps;
    let name = || opened.gpu().map_or_else(|| "the CPU".to_owned(), |gpu| gpu.caps().name.clone());
    opened.gpu().filter(has_clock).ok_or_else(|| BenchError::NoProfile { device: name() })
}

/// Profiles each test: decoding for so many steps as its tokens are, and for 16 at least, and prompts `repetitions` times. Decode tests must
/// come in ascending order of depth.
pub(super) fn run(
    model: &mut dyn LanguageModel,
    gpu: &GpuBackend,
    tests: &[Test],
    repetitions: usize,
) -> Result<Vec<Profile>, ModelError> {
    let mut runner = Runner::new(model);
    let mut profiles = Vec::with_capacity(tests.len());
    for &test in tests {
        runner.prepare(test)?;
        let mut profile = gpu.profile()?;
        let rounds = match test {
            Test::Prefill(_) => repetitions,
            Test::Decode { tokens, .. } => LEAST_STEPS.div_ceil(tokens),
        };
        for _ in 0..rounds {
            runner.start(test, || profile.end_step())?;
        }
        profiles.extend(Profile::of(test, &profile.finish()?));
    }
    runner.release();
    Ok(profiles)
}

impl Profile {
    /// `None` if no step has a kernel.
    fn of(test: Test, steps: &[Vec<KernelTime>]) -> Option<Self> {
        let (mut seconds, mut idle) = (Vec::new(), Vec::new());
        let mut kernels: BTreeMap<_, Vec<(usize, f64)>> = BTreeMap::new();
        let mut begin = steps.first()?.first()?.begin;
        for (index, step) in steps.iter().enumerate() {
            let end = step.iter().fold(begin, |end, time| end.max(time.end));
            let mut busy = 0.0;
            for time in step {
                let taken = time.end - time.begin;
                busy += taken;
                let of_steps = kernels.entry((time.kernel, time.matrix)).or_default();
                of_steps.resize(index + 1, (0, 0.0));
                of_steps[index].0 += 1;
                of_steps[index].1 += taken;
            }
            seconds.push(end - begin);
            idle.push((end - begin - busy).max(0.0));
            begin = end;
        }
        let median = |values: &[f64]| Spread::of(values).map_or(0.0, |spread| spread.median);
        let mut kernels: Vec<KernelShare> = kernels
            .into_iter()
            .map(|((name, matrix), mut of_steps)| {
                of_steps.resize(steps.len(), (0, 0.0));
                let (counts, times): (Vec<_>, Vec<_>) =
                    of_steps.into_iter().map(|(count, time)| (count as f64, time)).unzip();
                KernelShare { name, matrix, count: median(&counts), seconds: median(&times) }
            })
            .collect();
        // What few steps have, such as the copy of a block, is none of a usual one.
        kernels.retain(|share| share.count > 0.0);
        kernels.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Some(Self { test, steps: steps.len(), seconds: median(&seconds), idle: median(&idle), kernels })
    }
}

impl Profile {
    /// What the table does not say.
    pub(super) fn heading(&self) -> String {
        let step = match self.test {
            Test::Prefill(_) => "a prompt",
            Test::Decode { streams: 1, .. } => "a token",
            Test::Decode { .. } => "a token of each stream",
        };
        format!(
            "{}: {step} takes {:.1} µs, each kernel in a pass of its own; medians of {}",
            self.test,
            self.seconds * 1e6,
            self.steps
        )
    }

    /// A table: a row for the kernels of each kind, and the time between them.
    pub(super) fn rows(&self) -> Vec<Vec<String>> {
        let row = |name: &str, matrix: String, count: String, each: String, seconds: f64| {
            let share = if self.seconds > 0.0 { 100.0 * seconds / self.seconds } else { 0.0 };
            vec![name.to_owned(), matrix, count, each, format!("{:.1}", seconds * 1e6), format!("{share:.1} %")]
        };
        let headings = ["kernel", "rows x columns", "dispatches", "µs each", "µs", "share"].map(str::to_owned).to_vec();
        let kernels = self.kernels.iter().map(|kernel| {
            let matrix = kernel.matrix.map_or_else(String::new, |[rows, cols]| format!("{rows} x {cols}"));
            let each = format!("{:.2}", kernel.seconds / kernel.count * 1e6);
            row(kernel.name, matrix, kernel.count.to_string(), each, kernel.seconds)
        });
        let idle = row("between kernels", String::new(), String::new(), String::new(), self.idle);
        std::iter::once(headings).chain(kernels).chain([idle]).collect()
    }

    /// For programs: a JSON object.
    pub(super) fn to_json(&self) -> Value {
        let kernel = |kernel: &KernelShare| {
            json!({
                "kernel": kernel.name,
                "matrix": kernel.matrix,
                "dispatches": kernel.count,
                "seconds": kernel.seconds,
            })
        };
        json!({
            "test": self.test.to_string(),
            "steps": self.steps,
            "seconds": self.seconds,
            "idle_seconds": self.idle,
            "kernels": self.kernels.iter().map(kernel).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_its_kernels_and_what_lies_between() {
        let time = |kernel, matrix, begin, end| KernelTime { kernel, matrix, begin, end };
        let step = |begin: f64| {
            vec![
                time("norm", None, begin, begin + 1.0),
                time("linear", Some([2, 3]), begin + 1.5, begin + 4.5),
                time("norm", None, begin + 5.0, begin + 6.0),
                time("linear", Some([4, 3]), begin + 6.0, begin + 7.0),
            ]
        };
        // Ten seconds from step to step, of which the last one has a kernel more.
        let mut steps = vec![step(3.0), step(13.0), step(23.0)];
        steps[2].push(time("copy", None, 30.0, 30.5));
        let test = Test::Decode { tokens: 3, depth: 0, streams: 1 };
        let profile = Profile::of(test, &steps).unwrap();
        assert_eq!((profile.test, profile.steps), (test, 3));
        // 7, 10 and 10.5 seconds, of which kernels took 6, 6 and 6.5.
        assert_eq!((profile.seconds, profile.idle), (10.0, 4.0));
        let share = |name, matrix, count, seconds| KernelShare { name, matrix, count, seconds };
        let wanted = [
            share("linear", Some([2, 3]), 1.0, 3.0),
            share("norm", None, 2.0, 2.0),
            share("linear", Some([4, 3]), 1.0, 1.0),
        ];
        assert_eq!(profile.kernels, wanted);
        assert!(Profile::of(test, &[]).is_none());
    }
}
