//! Reports as text and JSON.

use serde_json::{Value, json};

use super::timer::Rates;
use super::{Group, Measurement, Report, Work};
use crate::table::text_table;

/// A clock that moved by more than this makes figures doubtful.
const STEADY: f64 = 0.03;

const COLUMNS: [&str; 7] = ["kernel", "µs", "min to max", "GB/s", "of memory", "TFLOP/s", "reads"];

impl Group {
    /// By how much the clock differs after the group, where it is known.
    fn clock_change(&self) -> Option<f64> {
        Some(self.after.clock? / self.before.clock? - 1.0)
    }

    /// Bytes a second that memory gave, the mean of both probes.
    fn read_bandwidth(&self) -> f64 {
        (self.before.read + self.after.read) / 2.0
    }

    fn facts(&self) -> String {
        let (before, after) = (self.before, self.after);
        let mut facts = format!("memory read at {} before, {} after", gb(before.read), gb(after.read));
        if let (Some(before), Some(after)) = (before.copy, after.copy) {
            facts += &format!(", copied at {} and {}", gb(before), gb(after));
        }
        if let Some(change) = self.clock_change() {
            let steady = if change.abs() <= STEADY { "steady" } else { "MOVED" };
            facts += &format!(", clock {steady} ({:+.1} %)", change * 100.0);
        }
        facts
    }

    fn cells(&self, measurement: &Measurement) -> [String; 7] {
        let Measurement { name, seconds, work, reads } = measurement;
        let [rate, share, operations] = work.map_or(["-"; 3].map(str::to_owned), |work| {
            let per_second = work.bytes / seconds.median;
            [
                format!("{:.1}", per_second / 1e9),
                format!("{:.0} %", 100.0 * per_second / self.read_bandwidth()),
                format!("{:.3}", work.operations / seconds.median / 1e12),
            ]
        });
        let range = format!("{:.2} to {:.2}", seconds.min * 1e6, seconds.max * 1e6);
        let reads = reads.map_or("-".to_owned(), |reads| format!("{reads:.2}"));
        [name.clone(), format!("{:.2}", seconds.median * 1e6), range, rate, share, operations, reads]
    }
}

fn gb(bytes_per_second: f64) -> String {
    format!("{:.1} GB/s", bytes_per_second / 1e9)
}

impl Report {
    /// Tables for people, one for each group.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}: {}\n", self.device.name, self.device.detail);
        text += &format!(
            "medians of {} samples; GB/s of packed weights or of cached keys and values; reads: how often experts' weights that must be read are\n",
            self.repetitions
        );
        for group in &self.groups {
            let mut rows = vec![COLUMNS.map(str::to_owned)];
            rows.extend(group.measurements.iter().map(|measurement| group.cells(measurement)));
            text += &format!("\n{}: {}\n{}", group.name, group.facts(), text_table(&rows));
        }
        text
    }

    /// One object.
    pub fn to_json(&self) -> Value {
        let rates = |rates: &Rates| {
            json!({
                "read_bytes_per_second": rates.read,
                "copy_bytes_per_second": rates.copy,
                "multiply_adds_per_second": rates.clock,
            })
        };
        let group = |group: &Group| {
            let result = |measurement: &Measurement| {
                let Measurement { name, seconds, work, reads } = measurement;
                let per_second = |amount: fn(Work) -> f64| work.map(|work| amount(work) / seconds.median);
                let bytes_per_second = per_second(|work| work.bytes);
                json!({
                    "name": name,
                    "seconds": seconds.to_json(),
                    "bytes": work.map(|work| work.bytes),
                    "operations": work.map(|work| work.operations),
                    "bytes_per_second": bytes_per_second,
                    "share_of_read_bandwidth": bytes_per_second.map(|rate| rate / group.read_bandwidth()),
                    "operations_per_second": per_second(|work| work.operations),
                    "weight_reads": reads,
                })
            };
            json!({
                "name": group.name,
                "before": rates(&group.before),
                "after": rates(&group.after),
                "clock_change": group.clock_change(),
                "is_clock_steady": group.clock_change().map(|change| change.abs() <= STEADY),
                "results": group.measurements.iter().map(result).collect::<Vec<_>>(),
            })
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "device": { "name": self.device.name, "detail": self.device.detail },
            "repetitions": self.repetitions,
            "groups": self.groups.iter().map(group).collect::<Vec<_>>(),
        })
    }
}
