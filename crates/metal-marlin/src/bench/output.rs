//! Reports as text, Markdown, CSV and JSON.

use serde_json::{Value, json};

use super::{Measurement, Profile, Report, Test};
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

impl Report {
    /// The report in this format.
    pub fn render(&self, format: OutputFormat) -> String {
        match format {
            OutputFormat::Text => self.to_text(),
            OutputFormat::Markdown => self.to_markdown(),
            OutputFormat::Csv => self.to_csv(),
            OutputFormat::Json => format!("{:#}\n", self.to_json()),
        }
    }

    fn name(&self) -> String {
        format!("{}{}", self.model, if self.is_random { " (random weights)" } else { "" })
    }

    fn platform() -> String {
        format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)
    }

    /// What no line of the table says.
    fn facts(&self) -> [String; 3] {
        let [linears, embedding] = &self.formats;
        let peak =
            self.peak_memory.map_or(String::new(), |bytes| format!(", peak memory {:.0} MB", bytes as f64 / 1e6));
        let bandwidth = self.read_bandwidth;
        [
            format!(
                "{}: {}, {linears}, embedding {embedding}, {:.1} M weights in {:.1} MB ({:.2} bits each)",
                self.name(),
                self.info.architecture,
                self.footprint.weights as f64 / 1e6,
                self.footprint.bytes as f64 / 1e6,
                self.footprint.bits_per_weight(),
            ),
            format!(
                "metal-marlin {VERSION} for {}, {}: {}, KV cache {} in {:.1} MB; load {:.2} s{peak}",
                Self::platform(),
                self.info.device.name,
                self.info.device.detail,
                self.kv_type(),
                self.kv_cache as f64 / 1e6,
                self.load.as_secs_f64(),
            ),
            format!(
                "memory read at {:.2} GB/s ({:.2} to {:.2}) by {} threads, before and after",
                bandwidth.median / 1e9,
                bandwidth.min / 1e9,
                bandwidth.max / 1e9,
                self.threads,
            ),
        ]
    }

    fn kv_type(&self) -> &'static str {
        self.info.kv_type.name()
    }

    /// Bytes a second of a decode test, and their share of what the machine's memory gives, if it is that.
    fn bandwidth(&self, measurement: &Measurement) -> Option<(f64, Option<f64>)> {
        let rate = measurement.bytes?.total() * measurement.rate.median;
        Some((rate, self.shares_memory.then(|| rate / self.read_bandwidth.median)))
    }

    const COLUMNS: [&str; 9] =
        ["test", "threads", "tokens/s", "min to max", "per stream", "MB/token", "GB/s", "of memory", "predicted"];

    /// Whether a column says anything.
    fn shows(&self, column: &str) -> bool {
        match column {
            "per stream" => self.measurements.iter().any(|measurement| measurement.test.streams() > 1),
            "predicted" => self.chip.is_some(),
            _ => true,
        }
    }

    /// The columns that say anything: their names, and a row for each test.
    fn table(&self) -> Vec<Vec<String>> {
        let rows = self.measurements.iter().map(|measurement| self.cells(measurement));
        let shown = |row: [String; 9]| {
            let cells = row.into_iter().zip(Self::COLUMNS).filter(|(_, column)| self.shows(column));
            cells.map(|(cell, _)| cell).collect()
        };
        std::iter::once(Self::COLUMNS.map(str::to_owned)).chain(rows).map(shown).collect()
    }

    fn prediction(&self, measurement: &Measurement) -> Option<[f64; 2]> {
        measurement.prediction(self.chip.as_ref()?)
    }

    fn cells(&self, measurement: &Measurement) -> [String; 9] {
        let rate = measurement.rate;
        let (bytes, per_second, share) = match (measurement.bytes, self.bandwidth(measurement)) {
            (Some(bytes), Some((per_second, share))) => (
                format!("{:.1}", bytes.total() / 1e6),
                format!("{:.2}", per_second / 1e9),
                share.map_or_else(String::new, |share| format!("{:.0} %", share * 100.0)),
            ),
            _ => Default::default(),
        };
        [
            measurement.test.to_string(),
            self.threads.to_string(),
            format!("{:.2}", rate.median),
            format!("{:.2} to {:.2}", rate.min, rate.max),
            if measurement.bytes.is_some() { format!("{:.2}", measurement.rate_per_stream()) } else { String::new() },
            bytes,
            per_second,
            share,
            self.prediction(measurement).map_or_else(String::new, |[least, most]| {
                if least == most { format!("{least:.1}") } else { format!("{least:.1} to {most:.1}") }
            }),
        ]
    }

    fn to_text(&self) -> String {
        let mut text = format!("{}\n\n{}", self.facts().join("\n"), text_table(&self.table()));
        for profile in &self.profiles {
            text += &format!("\n{}\n\n{}", profile.heading(), text_table(&profile.rows()));
        }
        text
    }

    fn to_markdown(&self) -> String {
        let mut text = String::new();
        for fact in self.facts() {
            text += &format!("- {fact}\n");
        }
        text += &format!("\n{}", markdown_table(&self.table()));
        for profile in &self.profiles {
            text += &format!("\n{}\n\n{}", profile.heading(), markdown_table(&profile.rows()));
        }
        text
    }

    /// Every line holds everything, so that files can be joined.
    fn to_csv(&self) -> String {
        let mut text = String::new();
        for (index, measurement) in self.measurements.iter().enumerate() {
            let (bytes, bandwidth) = (measurement.bytes, self.bandwidth(measurement));
            let [linears, embedding] = &self.formats;
            let prediction = self.prediction(measurement);
            let fields: [(&str, Value); 30] = [
                ("version", json!(VERSION)),
                ("platform", json!(Self::platform())),
                ("model", json!(self.model)),
                ("random_weights", json!(self.is_random)),
                ("format", json!(linears)),
                ("embedding_format", json!(embedding)),
                ("weights", json!(self.footprint.weights)),
                ("weight_bytes", json!(self.footprint.bytes)),
                ("device", json!(format!("{}: {}", self.info.device.name, self.info.device.detail))),
                ("simd", json!(self.simd.to_string())),
                ("threads", json!(self.threads)),
                ("kv_type", json!(self.kv_type())),
                ("kv_cache_bytes", json!(self.kv_cache)),
                ("load_seconds", json!(self.load.as_secs_f64())),
                ("peak_memory_bytes", json!(self.peak_memory)),
                ("read_bytes_per_second", json!(self.read_bandwidth.median)),
                ("test", json!(measurement.test.to_string())),
                ("tokens", json!(measurement.test.tokens())),
                ("depth", json!(measurement.test.depth())),
                ("streams", json!(measurement.test.streams())),
                ("repetitions", json!(measurement.samples.len())),
                ("tokens_per_second", json!(measurement.rate.median)),
                ("min_tokens_per_second", json!(measurement.rate.min)),
                ("max_tokens_per_second", json!(measurement.rate.max)),
                ("tokens_per_second_per_stream", json!(measurement.rate_per_stream())),
                ("bytes_per_token", json!(bytes.map(|bytes| bytes.total()))),
                ("share_of_read_bandwidth", json!(bandwidth.and_then(|(_, share)| share))),
                ("kernels", json!(measurement.kernels)),
                ("min_predicted_tokens_per_second", json!(prediction.map(|[least, _]| least))),
                ("max_predicted_tokens_per_second", json!(prediction.map(|[_, most]| most))),
            ];
            if index == 0 {
                text += &format!("{}\n", fields.each_ref().map(|(name, _)| *name).join(","));
            }
            text += &format!("{}\n", fields.map(|(_, value)| csv_field(&value)).join(","));
        }
        text
    }

    fn to_json(&self) -> Value {
        let [linears, embedding] = &self.formats;
        let result = |measurement: &Measurement| {
            let bandwidth = self.bandwidth(measurement);
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
                "bytes_per_token": measurement.bytes.map(|bytes| bytes.total()),
                "weight_bytes_per_token": measurement.bytes.map(|bytes| bytes.weights),
                "kv_bytes_per_token": measurement.bytes.map(|bytes| bytes.kv),
                "bytes_per_second": bandwidth.map(|(rate, _)| rate),
                "share_of_read_bandwidth": bandwidth.and_then(|(_, share)| share),
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
            "simd": self.simd.to_string(),
            "threads": self.threads,
            "kv_type": self.kv_type(),
            "kv_cache_bytes": self.kv_cache,
            "context": self.info.context,
            "load_seconds": self.load.as_secs_f64(),
            "peak_memory_bytes": self.peak_memory,
            "read_bytes_per_second": self.read_bandwidth.to_json(),
            "read_buffer_bytes": self.read_buffer,
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
