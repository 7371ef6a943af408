//! What Prometheus is told.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use marlin_engine::EngineStats;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Seconds until something happens, from a cached prompt on a GPU to a long one on a CPU.
const LATENCIES: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Seconds between two tokens.
const INTERVALS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// An answer to HTTP.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    path: String,
    status: u16,
}

/// How an answer of the model ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabels {
    reason: String,
}

/// Everything that is measured.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    finished: Family<FinishLabels, Counter>,
    /// From the request to its first token.
    pub(crate) first_token: Histogram,
    /// Between two tokens of an answer.
    pub(crate) between_tokens: Histogram,
    /// From the request to the end of its last answer.
    pub(crate) whole: Histogram,
}

/// What the engine says of itself.
pub(crate) type SharedStats = Arc<Mutex<EngineStats>>;

/// Tells what the engine did at the end of its last step.
#[derive(Debug)]
struct EngineCollector(SharedStats);

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stats = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let gauges = [
            ("requests_waiting", "Answers that wait for their turn", stats.waiting),
            ("requests_running", "Answers that are computed", stats.running),
            ("kv_blocks", "Blocks of the KV cache", stats.kv_blocks),
            ("kv_blocks_used", "Blocks that belong to an answer", stats.used_kv_blocks),
            ("kv_blocks_cached", "Blocks that belong to none and may be taken over", stats.cached_kv_blocks),
            ("kv_store_blocks", "Blocks of the KV cache on disk", stats.store.blocks),
            ("kv_store_bytes", "Bytes that they take there", stats.store.bytes as usize),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value as i64);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let counters = [
            ("prompt_tokens", "Tokens of prompts that were computed", stats.prompt_tokens),
            ("generated_tokens", "Tokens generated", stats.generated_tokens),
            ("prefix_cache_queries", "Tokens looked for in the prefix cache", stats.prefix_queries),
            ("prefix_cache_hits", "Tokens found there", stats.prefix_hits),
            ("kv_store_hits", "Tokens that came from disk", stats.stored_hits),
            ("kv_store_dropped_blocks", "Blocks that were not saved on disk", stats.store.dropped),
            ("kv_store_damaged_blocks", "Files on disk that were not what their names say", stats.store.damaged),
            ("drafted_tokens", "Tokens guessed ahead", stats.drafted_tokens),
            ("accepted_tokens", "Those of them that were right", stats.accepted_tokens),
            ("preemptions", "How often an answer gave its blocks back to others", stats.preemptions),
            ("steps", "Steps of the model", stats.steps),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}

impl Metrics {
    pub(crate) fn new(stats: SharedStats) -> Self {
        let mut registry = Registry::with_prefix("metal_marlin");
        registry.register_collector(Box::new(EngineCollector(stats)));
        let requests = Family::default();
        registry.register("http_requests", "Requests answered, by path and status", requests.clone());
        let finished = Family::default();
        registry.register("answers", "Answers of the model, by why they ended", finished.clone());
        let mut histogram = |name, help, buckets: &[f64]| {
            let histogram = Histogram::new(buckets.iter().copied());
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
            histogram
        };
        let first_token = histogram("time_to_first_token", "From the request to its first token", &LATENCIES);
        let between_tokens = histogram("inter_token", "Between two tokens of an answer", &INTERVALS);
        let whole = histogram("request", "From the request to the end of its last answer", &LATENCIES);
        Self { registry, requests, finished, first_token, between_tokens, whole }
    }

    /// A request was answered.
    pub(crate) fn answered(&self, path: &str, status: u16) {
        self.requests.get_or_create(&RequestLabels { path: path.to_owned(), status }).inc();
    }

    /// An answer of the model ended.
    pub(crate) fn finished(&self, reason: &str) {
        self.finished.get_or_create(&FinishLabels { reason: reason.to_owned() }).inc();
    }

    /// Everything as text, in the form of OpenMetrics.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
