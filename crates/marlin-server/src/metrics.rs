//! What Prometheus is told.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use marlin_engine::EngineStats;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
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

/// Of which model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model: String,
}

/// Of which model, and why.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    model: String,
    reason: &'static str,
}

/// Of which model, and whether it came about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LoadLabels {
    model: String,
    result: &'static str,
}

/// Why a model is unloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UnloadReason {
    /// Nobody has used it for a while.
    Idle,
    /// Another one needs its memory.
    Memory,
}

impl UnloadReason {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Memory => "memory",
        }
    }
}

/// Everything that is measured.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    loads: Family<LoadLabels, Counter>,
    unloads: Family<ReasonLabels, Counter>,
    loaded: Gauge,
    models: Vec<Arc<ModelMetrics>>,
}

/// What is measured of a model, over all the times that it is loaded.
#[derive(Debug)]
pub(crate) struct ModelMetrics {
    labels: ModelLabels,
    finished: Family<ReasonLabels, Counter>,
    /// From the request to its first token.
    pub(crate) first_token: Histogram,
    /// Between two tokens of an answer.
    pub(crate) between_tokens: Histogram,
    /// From the request to the end of its last answer.
    pub(crate) whole: Histogram,
    stats: Mutex<ModelStats>,
}

/// What engines said of themselves.
#[derive(Debug, Default)]
struct ModelStats {
    /// What the one that is loaded did at the end of its last step; nothing if none is.
    now: EngineStats,
    /// What those did that were unloaded.
    before: [u64; COUNTERS.len()],
}

/// What an engine counts.
type CounterOf = (&'static str, &'static str, fn(&EngineStats) -> u64);

const COUNTERS: [CounterOf; 11] = [
    ("prompt_tokens", "Tokens of prompts that were computed", |stats| stats.prompt_tokens),
    ("generated_tokens", "Tokens generated", |stats| stats.generated_tokens),
    ("prefix_cache_queries", "Tokens looked for in the prefix cache", |stats| stats.prefix_queries),
    ("prefix_cache_hits", "Tokens found there", |stats| stats.prefix_hits),
    ("kv_store_hits", "Tokens that came from disk", |stats| stats.stored_hits),
    ("kv_store_dropped_blocks", "Blocks that were not saved on disk", |stats| stats.store.dropped),
    ("kv_store_damaged_blocks", "Files on disk that were not what their names say", |stats| stats.store.damaged),
    ("drafted_tokens", "Tokens guessed ahead", |stats| stats.drafted_tokens),
    ("accepted_tokens", "Those of them that were right", |stats| stats.accepted_tokens),
    ("preemptions", "How often an answer gave its blocks back to others", |stats| stats.preemptions),
    ("steps", "Steps of the model", |stats| stats.steps),
];

/// What an engine has at the moment.
type GaugeOf = (&'static str, &'static str, fn(&EngineStats) -> usize);

const GAUGES: [GaugeOf; 7] = [
    ("requests_waiting", "Answers that wait for their turn", |stats| stats.waiting),
    ("requests_running", "Answers that are computed", |stats| stats.running),
    ("kv_blocks", "Blocks of the KV cache", |stats| stats.kv_blocks),
    ("kv_blocks_used", "Blocks that belong to an answer", |stats| stats.used_kv_blocks),
    ("kv_blocks_cached", "Blocks that belong to none and may be taken over", |stats| stats.cached_kv_blocks),
    ("kv_store_blocks", "Blocks of the KV cache on disk", |stats| stats.store.blocks),
    ("kv_store_bytes", "Bytes that they take there", |stats| stats.store.bytes as usize),
];

/// Tells what the engines did at the end of their last steps.
#[derive(Debug)]
struct EngineCollector(Vec<Arc<ModelMetrics>>);

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, value) in GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for model in &self.0 {
                let gauge = ConstGauge::new(value(&model.stats().now) as i64);
                gauge.encode(family.encode_family(&model.labels)?)?;
            }
        }
        for (place, (name, help, value)) in COUNTERS.into_iter().enumerate() {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for model in &self.0 {
                let stats = model.stats();
                let counter = ConstCounter::new(stats.before[place] + value(&stats.now));
                drop(stats);
                counter.encode(family.encode_family(&model.labels)?)?;
            }
        }
        Ok(())
    }
}

impl ModelMetrics {
    fn stats(&self) -> MutexGuard<'_, ModelStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the engine says of itself.
    pub(crate) fn publish(&self, stats: EngineStats) {
        self.stats().now = stats;
    }

    /// An answer of the model ended.
    pub(crate) fn finished(&self, reason: &'static str) {
        let labels = ReasonLabels { model: self.labels.model.clone(), reason };
        self.finished.get_or_create(&labels).inc();
    }
}

impl Metrics {
    /// Measures models of these names.
    pub(crate) fn new(names: impl IntoIterator<Item = String>) -> Self {
        let mut registry = Registry::with_prefix("metal_marlin");
        let requests = Family::default();
        registry.register("http_requests", "Requests answered, by path and status", requests.clone());
        let finished = Family::default();
        registry.register("answers", "Answers of the models, by why they ended", finished.clone());
        let loads = Family::default();
        registry.register(
            "model_loads",
            "How often models were loaded, and were not because that failed",
            loads.clone(),
        );
        let unloads = Family::default();
        registry.register("model_unloads", "How often models were unloaded, by why", unloads.clone());
        let loaded = Gauge::default();
        registry.register("models_loaded", "Models that are loaded", loaded.clone());
        let mut histogram = |name, help, buckets: fn() -> Histogram| {
            let family = Family::<ModelLabels, Histogram>::new_with_constructor(buckets);
            registry.register_with_unit(name, help, Unit::Seconds, family.clone());
            family
        };
        let latencies = || Histogram::new(LATENCIES);
        let first_token = histogram("time_to_first_token", "From the request to its first token", latencies);
        let between_tokens = histogram("inter_token", "Between two tokens of an answer", || Histogram::new(INTERVALS));
        let whole = histogram("request", "From the request to the end of its last answer", latencies);
        let of_model = |model| {
            let labels = ModelLabels { model };
            Arc::new(ModelMetrics {
                finished: finished.clone(),
                first_token: first_token.get_or_create_owned(&labels),
                between_tokens: between_tokens.get_or_create_owned(&labels),
                whole: whole.get_or_create_owned(&labels),
                stats: Mutex::default(),
                labels,
            })
        };
        let models: Vec<_> = names.into_iter().map(of_model).collect();
        registry.register_collector(Box::new(EngineCollector(models.clone())));
        let metrics = Self { registry, requests, loads, unloads, loaded, models };
        // What has not happened yet is counted, too.
        for model in 0..metrics.models.len() {
            metrics.loads_of(model, "loaded");
            metrics.loads_of(model, "failed");
            metrics.unloads_of(model, UnloadReason::Idle);
            metrics.unloads_of(model, UnloadReason::Memory);
        }
        metrics
    }

    /// What is measured of a model, by its place among the names.
    pub(crate) fn model(&self, model: usize) -> &Arc<ModelMetrics> {
        &self.models[model]
    }

    /// A model was loaded.
    pub(crate) fn loaded(&self, model: usize) {
        self.loads_of(model, "loaded").inc();
        self.loaded.inc();
    }

    /// A model was not loaded: that failed.
    pub(crate) fn not_loaded(&self, model: usize) {
        self.loads_of(model, "failed").inc();
    }

    fn loads_of(&self, model: usize, result: &'static str) -> Counter {
        let model = self.models[model].labels.model.clone();
        self.loads.get_or_create_owned(&LoadLabels { model, result })
    }

    fn unloads_of(&self, model: usize, reason: UnloadReason) -> Counter {
        let model = self.models[model].labels.model.clone();
        self.unloads.get_or_create_owned(&ReasonLabels { model, reason: reason.name() })
    }

    /// A model was unloaded, and its engine is gone.
    pub(crate) fn unloaded(&self, model: usize, reason: UnloadReason) {
        let metrics = &self.models[model];
        let mut stats = metrics.stats();
        let last = std::mem::take(&mut stats.now);
        for (before, (_, _, value)) in stats.before.iter_mut().zip(COUNTERS) {
            *before += value(&last);
        }
        drop(stats);
        self.unloads_of(model, reason).inc();
        self.loaded.dec();
    }

    /// A request was answered.
    pub(crate) fn answered(&self, path: &str, status: u16) {
        self.requests.get_or_create(&RequestLabels { path: path.to_owned(), status }).inc();
    }

    /// Everything as text, in the form of OpenMetrics.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
