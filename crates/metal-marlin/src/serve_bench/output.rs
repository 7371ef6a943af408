//! What clients saw, for people and for programs.

use serde_json::{Value, json};

use super::{Arrival, Load, Observed, Percentiles};
use crate::table::text_table;

impl Observed {
    /// One JSON object; times are milliseconds.
    pub fn to_json(&self, load: &Load) -> Value {
        let (prompt_tokens, cached_tokens, generated_tokens) = self.tokens();
        let [first, between, whole] = self.latencies().map(|(_, times)| times.map(Percentiles::to_json));
        json!({
            "url": load.url,
            "model": self.model,
            "requests": self.served.len(),
            "seconds": self.wall.as_secs_f64(),
            "requests_per_second": self.request_rate(),
            "generated_tokens_per_second": self.generated_rate(),
            "prompt_tokens": prompt_tokens,
            "cached_tokens": cached_tokens,
            "generated_tokens": generated_tokens,
            "first_token_ms": first,
            "between_tokens_ms": between,
            "whole_answer_ms": whole,
        })
    }

    /// For people.
    pub fn to_text(&self, load: &Load) -> String {
        let arrival = match load.arrival {
            Arrival::Concurrent(count) => format!("{count} at a time"),
            Arrival::PerSecond(rate) => format!("{rate} a second on average"),
        };
        let (prompt_tokens, cached_tokens, generated_tokens) = self.tokens();
        let told = |count: Option<u64>| count.map_or_else(|| "?".to_owned(), |count| count.to_string());
        let mut text = format!(
            "{} at {}: {} requests, {arrival}\n{} tokens of prompts ({} cached), {generated_tokens} generated, in {:.2} s\n\
         {:.1} generated tokens/s, {:.2} requests/s\n\n",
            self.model,
            load.url,
            self.served.len(),
            told(prompt_tokens),
            told(cached_tokens),
            self.wall.as_secs_f64(),
            self.generated_rate(),
            self.request_rate(),
        );
        let mut rows = vec![["ms", "p50", "p90", "p99", "max"].map(str::to_owned)];
        for (name, times) in self.latencies() {
            let Some(Percentiles { p50, p90, p99, max }) = times else { continue };
            let cell = |value: f64| format!("{value:.1}");
            rows.push([name.to_owned(), cell(p50), cell(p90), cell(p99), cell(max)]);
        }
        text += &text_table(&rows);
        text
    }
}
