//! Reports as text, Markdown, CSV and JSON.

use marlin_model::HostExpertsInfo;
use serde_json::{Value, json};

use super::{Measurement, Profile, Report, Test};
use crate::stats::Spread;
use crate::table::text_table;

/// How a report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum OutputFormat {
    /// A table for people
    #[default]
    Text,
    /// A table for documents
    Markdown,
    /// A line for each test under a line of names
    Csv,
    /// One JSON object
    Json,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Reports of one model, which differ in their threads, in a format.
pub fn render(reports: &[Report], format: OutputFormat) -> String {
    match format {
        OutputFormat::Text => to_text(reports),
        OutputFormat::Markdown => to_markdown(reports),
        OutputFormat::Csv => to_csv(reports),
        OutputFormat::Json => match reports {
            [report] => format!("{:#}\n", report.to_json()),
            _ => format!("{:#}\n", reports.iter().map(Report::to_json).collect::<Value>()),
        },
    }
}

fn to_text(reports: &[Report]) -> String {
    let mut text = format!("{}\n\n{}", facts(reports).join("\n"), text_table(&table(reports)));
    for profile in reports.iter().flat_map(|report| &report.profiles) {
        text += &format!("\n{}\n\n{}", profile.heading(), text_table(&profile.rows()));
    }
    text
}

fn to_markdown(reports: &[Report]) -> String {
    let mut text = String::new();
    for fact in facts(reports) {
        text += &format!("- {fact}\n");
    }
    text += &format!("\n{}", markdown_table(&table(reports)));
    for profile in reports.iter().flat_map(|report| &report.profiles) {
        text += &format!("\n{}\n\n{}", profile.heading(), markdown_table(&profile.rows()));
    }
    text
}

/// Every line holds everything, so that files can be joined.
fn to_csv(reports: &[Report]) -> String {
    let mut text = String::new();
    let rows = reports.iter().flat_map(|report| report.measurements.iter().map(|measurement| report.csv(measurement)));
    for (index, fields) in rows.enumerate() {
        if index == 0 {
            text += &format!("{}\n", fields.each_ref().map(|(name, _)| *name).join(","));
        }
        text += &format!("{}\n", fields.map(|(_, value)| csv_field(&value)).join(","));
    }
    text
}

/// What no line of the table says: of the model, and of each report.
fn facts(reports: &[Report]) -> Vec<String> {
    let of_model = reports.first().map(Report::model_fact);
    of_model.into_iter().chain(reports.iter().flat_map(Report::facts)).collect()
}

const COLUMNS: [&str; 10] = [
    "test",
    "threads",
    "tokens/s",
    "min to max",
    "per stream",
    "MB/token",
    "GB/s",
    "of memory",
    "of peak",
    "predicted",
];

/// The columns that say anything: their names, and a row for each test.
fn table(reports: &[Report]) -> Vec<Vec<String>> {
    let shows = |column: &str| reports.iter().any(|report| report.shows(column));
    let rows =
        reports.iter().flat_map(|report| report.measurements.iter().map(|measurement| report.cells(measurement)));
    let shown = |row: [String; 10]| {
        let cells = row.into_iter().zip(COLUMNS).filter(|(_, column)| shows(column));
        cells.map(|(cell, _)| cell).collect()
    };
    std::iter::once(COLUMNS.map(str::to_owned)).chain(rows).map(shown).collect()
}

impl Report {
    /// The model, and whether it is one.
    pub(super) fn name(&self) -> String {
        format!("{}{}", self.model, if self.is_random { " (random weights)" } else { "" })
    }

    fn platform() -> String {
        format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)
    }

    /// The model: its formats and size.
    pub(super) fn model_fact(&self) -> String {
        let [linears, embedding] = &self.formats;
        format!(
            "{}: {}, {linears}, embedding {embedding}, {:.1} M weights in {:.1} MB ({:.2} bits each)",
            self.name(),
            self.info.architecture,
            self.footprint.weights as f64 / 1e6,
            self.footprint.bytes as f64 / 1e6,
            self.footprint.bits_per_weight(),
        )
    }

    /// The device, and how fast it reads and multiplies.
    fn facts(&self) -> Vec<String> {
        let megabytes = self.peak_memory.map(|bytes| format!(", peak memory {:.0} MB", bytes as f64 / 1e6));
        let device = format!(
            "metal-marlin {VERSION} for {}, {}: {}, KV cache {} in {:.1} MB; load {:.2} s{}",
            Self::platform(),
            self.info.device.name,
            self.info.device.detail,
            self.kv_type(),
            self.kv_cache as f64 / 1e6,
            self.load.as_secs_f64(),
            megabytes.unwrap_or_default(),
        );
        let threads = format!("{} thread{}", self.threads, if self.threads == 1 { "" } else { "s" });
        let rate = |rate: Spread, digits: usize| {
            let [median, min, max] = [rate.median, rate.min, rate.max].map(|rate| rate / 1e9);
            (format!("{median:.digits$}"), format!("({min:.digits$} to {max:.digits$}) by {threads}, before and after"))
        };
        let (gigabytes, details) = rate(self.read_bandwidth, 2);
        let mut facts = vec![device];
        facts.extend(self.host_experts().map(|host| {
            let megabytes = self.host_bytes.unwrap_or_default() as f64 / 1e6;
            format!("experts of layers {host}, in {megabytes:.1} MB of the host's memory")
        }));
        facts.push(format!("memory read at {gigabytes} GB/s {details}"));
        if let Some(peak) = self.peak {
            let (billions, details) = rate(peak.rate, 0);
            facts.push(format!("{billions} G multiply-adds/s of {} at most {details}", peak.numbers));
        }
        facts
    }

    /// Layers whose experts are left to the host, and what computes them.
    fn host_experts(&self) -> Option<String> {
        let HostExpertsInfo { layers, device } = self.info.host_experts.as_ref()?;
        Some(format!("{layers} on {}: {}", device.name, device.detail))
    }

    fn kv_type(&self) -> &'static str {
        self.info.kv_type.name()
    }

    /// Whether a column says anything.
    fn shows(&self, column: &str) -> bool {
        match column {
            "per stream" => self.measurements.iter().any(|measurement| measurement.test.streams() > 1),
            "of peak" => self.peak.is_some(),
            "predicted" => self.chip.is_some(),
            _ => true,
        }
    }

    fn prediction(&self, measurement: &Measurement) -> Option<[f64; 2]> {
        measurement.prediction(self.chip.as_ref()?)
    }

    fn cells(&self, measurement: &Measurement) -> [String; 10] {
        let rate = measurement.rate;
        let percent = |share: Option<f64>| share.map_or_else(String::new, |share| format!("{:.0} %", share * 100.0));
        [
            measurement.test.to_string(),
            self.threads.to_string(),
            format!("{:.2}", rate.median),
            format!("{:.2} to {:.2}", rate.min, rate.max),
            match measurement.test {
                Test::Prefill(_) => String::new(),
                Test::Decode { .. } => format!("{:.2}", measurement.rate_per_stream()),
            },
            format!("{:.1}", measurement.work.bytes() / 1e6),
            format!("{:.2}", measurement.bytes_per_second() / 1e9),
            percent(self.share_of_memory(measurement)),
            percent(self.share_of_peak(measurement)),
            self.prediction(measurement).map_or_else(String::new, |[least, most]| {
                if least == most { format!("{least:.1}") } else { format!("{least:.1} to {most:.1}") }
            }),
        ]
    }

    fn csv(&self, measurement: &Measurement) -> [(&'static str, Value); 36] {
        let [linears, embedding] = &self.formats;
        let prediction = self.prediction(measurement);
        [
            ("version", json!(VERSION)),
            ("platform", json!(Self::platform())),
            ("model", json!(self.model)),
            ("random_weights", json!(self.is_random)),
            ("format", json!(linears)),
            ("embedding_format", json!(embedding)),
            ("weights", json!(self.footprint.weights)),
            ("weight_bytes", json!(self.footprint.bytes)),
            ("device", json!(format!("{}: {}", self.info.device.name, self.info.device.detail))),
            ("host_experts", json!(self.host_experts())),
            ("host_bytes", json!(self.host_bytes)),
            ("simd", json!(self.simd.to_string())),
            ("threads", json!(self.threads)),
            ("kv_type", json!(self.kv_type())),
            ("kv_cache_bytes", json!(self.kv_cache)),
            ("load_seconds", json!(self.load.as_secs_f64())),
            ("peak_memory_bytes", json!(self.peak_memory)),
            ("read_bytes_per_second", json!(self.read_bandwidth.median)),
            ("peak_multiply_adds_per_second", json!(self.peak.map(|peak| peak.rate.median))),
            ("test", json!(measurement.test.to_string())),
            ("tokens", json!(measurement.test.tokens())),
            ("depth", json!(measurement.test.depth())),
            ("streams", json!(measurement.test.streams())),
            ("repetitions", json!(measurement.samples.len())),
            ("tokens_per_second", json!(measurement.rate.median)),
            ("min_tokens_per_second", json!(measurement.rate.min)),
            ("max_tokens_per_second", json!(measurement.rate.max)),
            ("tokens_per_second_per_stream", json!(measurement.rate_per_stream())),
            ("bytes_per_token", json!(measurement.work.bytes())),
            ("multiply_adds_per_token", json!(measurement.work.multiply_adds)),
            ("share_of_read_bandwidth", json!(self.share_of_memory(measurement))),
            ("share_of_peak", json!(self.share_of_peak(measurement))),
            ("share_of_roof", json!(self.share_of_roof(measurement))),
            ("kernels", json!(measurement.kernels)),
            ("min_predicted_tokens_per_second", json!(prediction.map(|[least, _]| least))),
            ("max_predicted_tokens_per_second", json!(prediction.map(|[_, most]| most))),
        ]
    }

    fn to_json(&self) -> Value {
        let [linears, embedding] = &self.formats;
        let result = |measurement: &Measurement| {
            let work = measurement.work;
            json!({
                "test": measurement.test.to_string(),
                "kind": match measurement.test {
                    Test::Prefill(_) => "prefill",
                    Test::Decode { .. } => "decode",
                },
                "tokens": measurement.test.tokens(),
                "depth": measurement.test.depth(),
                "streams": measurement.test.streams(),
                "tokens_per_second": measurement.rate.to_json(),
                "tokens_per_second_per_stream": measurement.rate_per_stream(),
                "samples": measurement.samples,
                "bytes_per_token": work.bytes(),
                "weight_bytes_per_token": work.weights,
                "kv_bytes_per_token": work.kv,
                "bytes_per_second": measurement.bytes_per_second(),
                "share_of_read_bandwidth": self.share_of_memory(measurement),
                "multiply_adds_per_token": work.multiply_adds,
                "multiply_adds_per_byte": work.intensity(),
                "multiply_adds_per_second": measurement.multiply_adds_per_second(),
                "share_of_peak": self.share_of_peak(measurement),
                "share_of_roof": self.share_of_roof(measurement),
                "kernels": measurement.kernels,
                "predicted_tokens_per_second": self.prediction(measurement).map(|[min, max]| json!({"min": min, "max": max})),
            })
        };
        json!({
            "version": VERSION,
            "platform": Self::platform(),
            "model": self.model,
            "architecture": self.info.architecture,
            "random_weights": self.is_random,
            "format": linears,
            "embedding_format": embedding,
            "weights": self.footprint.weights,
            "weight_bytes": self.footprint.bytes,
            "bits_per_weight": self.footprint.bits_per_weight(),
            "device": { "name": self.info.device.name, "detail": self.info.device.detail },
            "host_experts": self.info.host_experts.as_ref().map(|HostExpertsInfo { layers, device }| {
                json!({ "layers": layers.to_string(), "name": device.name, "detail": device.detail })
            }),
            "host_bytes": self.host_bytes,
            "simd": self.simd.to_string(),
            "threads": self.threads,
            "kv_type": self.kv_type(),
            "kv_cache_bytes": self.kv_cache,
            "context": self.info.context,
            "load_seconds": self.load.as_secs_f64(),
            "peak_memory_bytes": self.peak_memory,
            "read_bytes_per_second": self.read_bandwidth.to_json(),
            "read_buffer_bytes": self.read_buffer,
            "peak_multiply_adds_per_second": self.peak.map(|peak| peak.rate.to_json()),
            "peak_numbers": self.peak.map(|peak| peak.numbers),
            "results": self.measurements.iter().map(result).collect::<Vec<_>>(),
            "profiles": self.profiles.iter().map(Profile::to_json).collect::<Vec<_>>(),
        })
    }
}

/// The table for documents: the first row are headings.
fn markdown_table(rows: &[Vec<String>]) -> String {
    let line = |cells: &Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut lines = rows.iter().map(line);
    let headings = lines.next().unwrap_or_default();
    let columns = rows.first().map_or(0, Vec::len).saturating_sub(1);
    format!("{headings}| --- |{}\n{}", " ---: |".repeat(columns), lines.collect::<String>())
}

/// Texts in quotes, as RFC 4180 says; nothing for what is not known.
fn csv_field(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_texts_are_quoted() {
        assert_eq!(csv_field(&json!("a \"b\", c")), "\"a \"\"b\"\", c\"");
        assert_eq!((csv_field(&json!(null)), csv_field(&json!(1.5))), (String::new(), "1.5".to_owned()));
    }
}
