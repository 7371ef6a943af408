//! Measures how fast a model runs, beside how fast the machine reads memory.
//!
//! A decode step reads every weight once and the whole KV cache of each of its sequences, so the rate at which memory can be read
//! bounds the rate of decoding; how near it comes to that is measured in the same run.

mod measure;
mod output;
mod profile;
mod random;
mod shape;

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use marlin_checkpoint::{Checkpoint, CheckpointError, Storage};
use marlin_format::FormatError;
use marlin_kernels::KvType;
use marlin_kernels::cpu::SimdLevel;
use marlin_kernels::gpu::GpuBackend;
use marlin_model::{LoadOptions, MemoryPlan, ModelError, ModelInfo, Planner, format_size};
use marlin_quantize::{Footprint, TensorRole};

use crate::device::{Device, DeviceOptions};
use crate::machine::{self, AppleChip, BandwidthProbe};
use crate::memory::MemoryOptions;
use crate::stats::Spread;
use crate::{LoadError, load};

pub use output::OutputFormat;
pub use profile::{KernelShare, Profile};
pub(crate) use random::random_matrix;
pub use random::random_model;
pub use shape::Shape;

const USUAL_DEPTHS: [usize; 3] = [0, 1024, 4096];

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Lengths of prompts to prefill.
    pub prefill: Vec<usize>,
    /// Tokens that each stream decodes, one after the other, at each depth; 0 decodes nothing.
    pub decode: usize,
    /// Tokens that are already in the KV cache when decoding begins.
    pub depths: Vec<usize>,
    /// Numbers of sequences that decode side by side, each number tested at each depth.
    pub streams: Vec<NonZeroUsize>,
    /// How often each test is repeated, at least once.
    pub repetitions: usize,
    /// Number format of the KV cache.
    pub kv_type: KvType,
    /// Whether each kernel of a step is timed, too, after the tests.
    pub profile: bool,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// No shape has this name.
    #[error("there is no shape `{found}`; shapes are {known}")]
    UnknownShape {
        /// The name.
        found: String,
        /// All names.
        known: String,
    },
    /// A test does not fit the model.
    #[error(
        "{test} needs a context of {needed} tokens, {model} has {context}; choose shorter --prefill, --decode or --depths"
    )]
    Context {
        /// The test.
        test: String,
        /// Tokens it needs.
        needed: usize,
        /// The model.
        model: String,
        /// Tokens it can have.
        context: usize,
    },
    /// There is no memory for a test.
    #[error(
        "{model} needs {plan} for {test}; {} are available (--memory says otherwise); choose fewer --streams, shorter \
         --prefill, --decode or --depths, or a smaller model or format",
        format_size(*memory)
    )]
    Memory {
        /// The model.
        model: String,
        /// The test that takes the most.
        test: String,
        /// What it takes.
        plan: Box<MemoryPlan>,
        /// Memory there is, in bytes.
        memory: u64,
    },
    /// There is nothing to measure.
    #[error("nothing to measure: --prefill and --decode are 0")]
    Nothing,
    /// Kernels cannot be timed.
    #[error(
        "--profile times the kernels of a GPU that has a clock (timestamp queries), and {device} is none; choose --device gpu, or leave \
         --profile out"
    )]
    NoProfile {
        /// The device.
        device: String,
    },
    /// The format does not suit the model.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The random model is not right.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model does not load.
    #[error(transparent)]
    Load(Box<LoadError>),
    /// The model does not run.
    #[error("cannot run the model")]
    Model(#[source] Box<ModelError>),
    /// Memory bandwidth cannot be measured.
    #[error("cannot start threads to measure memory bandwidth")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

impl From<LoadError> for BenchError {
    fn from(error: LoadError) -> Self {
        Self::Load(Box::new(error))
    }
}

impl From<ModelError> for BenchError {
    fn from(error: ModelError) -> Self {
        Self::Model(Box::new(error))
    }
}

/// A test: what is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// A prompt of so many tokens in an empty context, with the logits of its last token.
    Prefill(usize),
    /// Tokens one after the other, each with its logits, of one sequence or of several in one step.
    Decode {
        /// How many of each sequence.
        tokens: usize,
        /// Tokens of each sequence in the KV cache before the first.
        depth: usize,
        /// Sequences that decode side by side.
        streams: usize,
    },
}

/// What a token of a test read, at least.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BytesPerToken {
    /// A stream's share of all weights a decode step uses as they are stored, and of an embedding that is not the head one row.
    pub weights: f64,
    /// The visible part of the KV cache; the mean over the tokens of the test.
    pub kv: f64,
}

/// A test and how fast it was.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// The test.
    pub test: Test,
    /// Tokens a second of each repetition, of all streams together.
    pub samples: Vec<f64>,
    /// The same in three numbers.
    pub rate: Spread,
    /// Of a decode test.
    pub bytes: Option<BytesPerToken>,
    /// Kernels that a GPU ran for a decode step, or for a prompt.
    pub kernels: Option<f64>,
}

/// A model, a machine, and how fast the one ran on the other.
#[derive(Debug, Clone)]
pub struct Report {
    /// Folder or name of the model.
    pub model: String,
    /// Whether its weights are random.
    pub is_random: bool,
    /// Formats of the decoder's matrices, and of embedding and head.
    pub formats: [String; 2],
    /// Its size.
    pub footprint: Footprint,
    /// The model as loaded.
    pub info: ModelInfo,
    /// Bytes of its KV cache, which has room for the largest test.
    pub kv_cache: u64,
    /// Threads it ran on.
    pub threads: usize,
    /// Instructions it ran with.
    pub simd: SimdLevel,
    /// Time to bring its weights into the device's order.
    pub load: Duration,
    /// The most memory the process had from the beginning of the load, in bytes, if the system tells.
    pub peak_memory: Option<u64>,
    /// The chip of the GPU it ran on, if it is one whose speed can be predicted.
    pub chip: Option<AppleChip>,
    /// Whether the model's memory is the machine's, whose bandwidth is measured.
    pub shares_memory: bool,
    /// Bytes a second that as many threads read from memory, before and after the tests.
    pub read_bandwidth: Spread,
    /// Bytes they read it from.
    pub read_buffer: usize,
    /// Every test in the order it ran.
    pub measurements: Vec<Measurement>,
    /// What the kernels of each test took, if that was asked for.
    pub profiles: Vec<Profile>,
}

impl Plan {
    /// The tests in their order.
    pub fn tests(&self) -> Vec<Test> {
        let prefill = self.prefill.iter().filter(|tokens| **tokens > 0).map(|tokens| Test::Prefill(*tokens));
        let mut depths = self.depths.clone();
        // The KV cache of one depth is the beginning of the next one's.
        depths.sort_unstable();
        depths.dedup();
        let mut streams: Vec<usize> = self.streams.iter().map(|streams| streams.get()).collect();
        streams.sort_unstable();
        streams.dedup();
        let at = |depth| streams.iter().map(move |&streams| Test::Decode { tokens: self.decode, depth, streams });
        let decode = depths.into_iter().flat_map(at);
        prefill.chain(decode.filter(|_| self.decode > 0)).collect()
    }
}

impl Test {
    /// Tokens of each sequence that are timed.
    pub fn tokens(self) -> usize {
        match self {
            Self::Prefill(tokens) | Self::Decode { tokens, .. } => tokens,
        }
    }

    /// Tokens of each sequence in the KV cache before those that are timed.
    pub fn depth(self) -> usize {
        match self {
            Self::Prefill(_) => 0,
            Self::Decode { depth, .. } => depth,
        }
    }

    /// Sequences that run side by side.
    pub fn streams(self) -> usize {
        match self {
            Self::Prefill(_) => 1,
            Self::Decode { streams, .. } => streams,
        }
    }

    /// The context that each of its sequences needs.
    fn context(self) -> usize {
        self.depth().saturating_add(self.tokens())
    }
}

impl std::fmt::Display for Test {
    /// The names of llama-bench, with the number of streams if there are several: `pp512`, `tg64`, `tg64 @ d1024`,
    /// `tg64 x32 @ d1024`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Prefill(tokens) => write!(f, "pp{tokens}")?,
            Self::Decode { tokens, .. } => write!(f, "tg{tokens}")?,
        }
        if self.streams() > 1 {
            write!(f, " x{}", self.streams())?;
        }
        if self.depth() > 0 {
            write!(f, " @ d{}", self.depth())?;
        }
        Ok(())
    }
}

impl Measurement {
    /// Tokens a second that the chip should reach in a decode test, with its smallest and with its largest GPU. Of several streams
    /// it is not known: what they compute may take longer than what they read.
    pub fn prediction(&self, chip: &AppleChip) -> Option<[f64; 2]> {
        let bytes = self.bytes.filter(|_| self.test.streams() == 1)?;
        Some(chip.tokens_per_second(bytes.total(), self.kernels?))
    }

    /// Tokens a second of one stream, the median.
    pub fn rate_per_stream(&self) -> f64 {
        self.rate.median / self.test.streams() as f64
    }
}

impl BytesPerToken {
    /// Weights and KV cache.
    pub fn total(&self) -> f64 {
        self.weights + self.kv
    }
}

/// Loads a checkpoint's model and runs the plan. The checkpoint is given back before the tests run, so that only the loaded
/// model is in memory. `progress` hears how many of how many repetitions are done.
///
/// # Errors
/// The plan does not fit the model or the memory, or the model cannot be loaded or run.
pub fn run(
    checkpoint: Checkpoint,
    is_random: bool,
    plan: &Plan,
    device: &DeviceOptions,
    memory: &MemoryOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report, BenchError> {
    let tests = plan.tests();
    let context = context(&checkpoint, &tests)?;
    let threads = device.threads.map_or_else(machine::threads, usize::from);
    let mut probe = BandwidthProbe::new(threads);
    probe.run()?;
    // The probe's buffer is not the model's.
    let counts_peak = machine::reset_peak_memory();

    let (model, footprint, formats) = (checkpoint.name().to_owned(), Footprint::of(&checkpoint), formats(&checkpoint));
    let weights = StepWeights::of(&checkpoint);
    let started = Instant::now();
    let opened = device.open().map_err(LoadError::Device)?;
    let profiled = plan.profile.then(|| profile::device(&opened)).transpose()?;
    let (options, memory_plan) = load_options(&checkpoint, &tests, context, plan.kv_type, &opened, memory)?;
    let mut loaded = load::load_model(&checkpoint, &opened, &options)?;
    let load = started.elapsed();
    drop(checkpoint);

    let recorded = || opened.gpu().map(GpuBackend::kernels_recorded);
    let repetitions = plan.repetitions.max(1);
    let measurements = measure::run(loaded.as_mut(), &tests, repetitions, weights, &recorded, progress)?;
    let profiles = match profiled {
        Some(gpu) => profile::run(loaded.as_mut(), gpu, &tests, repetitions)?,
        None => Vec::new(),
    };
    let peak_memory = machine::peak_memory().filter(|_| counts_peak);
    let info = loaded.info().clone();
    drop(loaded);
    probe.run()?;
    Ok(Report {
        model,
        is_random,
        formats,
        footprint,
        info,
        kv_cache: memory_plan.kv_cache,
        threads,
        simd: SimdLevel::detect(),
        load,
        peak_memory,
        chip: opened.gpu().and_then(|gpu| AppleChip::of_gpu(&gpu.caps().name)),
        shares_memory: opened.shares_memory(),
        read_bandwidth: probe.rate().ok_or(BenchError::Nothing)?,
        read_buffer: probe.bytes(),
        measurements,
        profiles,
    })
}

/// The context that the tests need, which the model must have.
fn context(checkpoint: &Checkpoint, tests: &[Test]) -> Result<usize, BenchError> {
    let longest = tests.iter().max_by_key(|test| test.context()).ok_or(BenchError::Nothing)?;
    match load::allowed_context(checkpoint) {
        Some(context) if longest.context() > context => Err(BenchError::Context {
            test: longest.to_string(),
            needed: longest.context(),
            model: checkpoint.name().to_owned(),
            context,
        }),
        // A config.json without it is refused, with its reasons, when the model is loaded.
        _ => Ok(longest.context()),
    }
}

/// How to load the model for the tests, and what that takes of the device's memory, which must have it.
fn load_options(
    checkpoint: &Checkpoint,
    tests: &[Test],
    context: usize,
    kv_type: KvType,
    device: &Device,
    memory: &MemoryOptions,
) -> Result<(LoadOptions, MemoryPlan), BenchError> {
    let planner = Planner::new(device.memory_use(), checkpoint).map_err(LoadError::Model)?;
    let kv_blocks = |test: &&Test| planner.kv_blocks(test.context(), test.streams());
    let largest = tests.iter().max_by_key(kv_blocks).ok_or(BenchError::Nothing)?;
    let streams = tests.iter().map(|test| test.streams()).max().unwrap_or(1);
    let usual = LoadOptions::default();
    let options = LoadOptions {
        context: Some(context),
        step_tokens: usual.step_tokens.max(streams),
        logit_rows: streams,
        kv_blocks: Some(kv_blocks(&largest)),
        kv_type,
    };
    let plan = planner.plan(&options).map_err(LoadError::Model)?;
    match memory.budget(device) {
        Some(memory) if plan.total() > memory => Err(BenchError::Memory {
            model: checkpoint.name().to_owned(),
            test: largest.to_string(),
            plan: Box::new(plan),
            memory,
        }),
        _ => Ok((options, plan)),
    }
}

/// Depths to measure where none are asked for: 0, 1024 and 4096, as far as the model's context allows.
pub fn usual_depths(checkpoint: &Checkpoint, decode: usize) -> Vec<usize> {
    let context = load::allowed_context(checkpoint).unwrap_or(0);
    USUAL_DEPTHS.into_iter().filter(|&depth| depth == 0 || depth.saturating_add(decode) <= context).collect()
}

/// Formats of the decoder's matrices, and of embedding and head, each once.
fn formats(checkpoint: &Checkpoint) -> [String; 2] {
    let mut found = [Vec::new(), Vec::new()];
    for name in checkpoint.tensor_names() {
        let Some(info) = checkpoint.info(name) else { continue };
        let kind = match TensorRole::of(name, info.shape.len()) {
            TensorRole::DecoderLinear => 0,
            TensorRole::Embedding | TensorRole::Head => 1,
            TensorRole::Vector | TensorRole::Unknown => continue,
        };
        let format = match info.storage {
            Storage::Packed(scheme) => scheme.to_string(),
            Storage::Plain(dtype) => dtype.to_string().to_lowercase(),
        };
        if !found[kind].contains(&format) {
            found[kind].push(format);
        }
    }
    found.map(|formats| formats.join(" + "))
}

/// Bytes of the weights that a decode step reads, as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct StepWeights {
    /// Read once, however many streams there are.
    shared: u64,
    /// Read by each stream: a row of an embedding that is not the head.
    of_stream: u64,
}

impl StepWeights {
    fn of(checkpoint: &Checkpoint) -> Self {
        let tensors = || checkpoint.tensor_names().filter_map(|name| Some((name, checkpoint.info(name)?)));
        let has_head = tensors().any(|(name, info)| TensorRole::of(name, info.shape.len()) == TensorRole::Head);
        let mut weights = Self { shared: 0, of_stream: 0 };
        for (name, info) in tensors() {
            match TensorRole::of(name, info.shape.len()) {
                TensorRole::Embedding if has_head => weights.of_stream += info.bytes / (info.shape[0].max(1) as u64),
                _ => weights.shared += info.bytes,
            }
        }
        weights
    }

    fn per_token(self, streams: usize) -> f64 {
        self.shared as f64 / streams as f64 + self.of_stream as f64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use marlin_checkpoint::MemoryTensor;
    use marlin_format::{Format, PackedMatrix, Scheme};

    use super::*;

    fn made(shape: &str) -> Checkpoint {
        let shape: Shape = shape.parse().unwrap();
        random_model(&shape, &Format::Fp4.scheme(None).unwrap(), &Format::Int8.scheme(None).unwrap()).unwrap()
    }

    #[test]
    fn tests_are_named_as_in_llama_bench_and_ordered_by_depth() {
        let plan = Plan {
            prefill: vec![128, 0, 64],
            decode: 8,
            depths: vec![1024, 0, 1024],
            streams: [32, 1, 32].map(|streams| NonZeroUsize::new(streams).unwrap()).to_vec(),
            repetitions: 1,
            kv_type: KvType::F16,
            profile: false,
        };
        let names: Vec<String> = plan.tests().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["pp128", "pp64", "tg8", "tg8 x32", "tg8 @ d1024", "tg8 x32 @ d1024"]);
        assert_eq!(Plan { decode: 0, prefill: vec![0], ..plan }.tests(), []);
    }

    #[test]
    fn a_shape_has_the_weights_of_its_model() {
        // The numbers of parameters that the models' pages state.
        for (name, weights) in [("qwen3-0.6b", 0.596e9), ("llama-3.2-1b", 1.236e9)] {
            let footprint = Footprint::of(&made(name));
            let relative = footprint.weights as f64 / weights;
            assert!((0.99..1.01).contains(&relative), "{name}: {}", footprint.weights);
        }
        assert_eq!("qwen3-9b".parse::<Shape>().unwrap_err().to_string().matches("qwen3-8b").count(), 1);
    }

    #[test]
    fn random_weights_keep_logits_finite() {
        let options = LoadOptions { context: Some(8), ..LoadOptions::default() };
        let mut model = load::load_model(&made("tiny"), &DeviceOptions::default().open().unwrap(), &options).unwrap();
        let mut sequence = model.kv().sequence();
        model.kv().append(&mut sequence, 3).unwrap();
        let mut batch = marlin_model::StepBatch::new();
        batch.push(&sequence, &[1, 2, 3], marlin_model::LogitRows::Last);
        model.forward(&batch).unwrap();
        let mut logits = Vec::new();
        model.read_logits(&mut logits).unwrap();
        model.kv().release(sequence);
        let largest = logits.iter().fold(0f32, |largest, logit| largest.max(logit.abs()));
        assert!(logits.iter().all(|logit| logit.is_finite()) && (0.1..100.0).contains(&largest), "{largest}");
    }

    #[test]
    fn a_token_reads_one_row_of_an_embedding_that_is_not_the_head() {
        let tied = made("tiny");
        assert_eq!(StepWeights::of(&tied), StepWeights { shared: tied.weight_bytes(), of_stream: 0 });
        assert_eq!(formats(&tied), ["fp4 g128", "int8 g128"]);

        let bytes = vec![0; 8 * 16 * 2];
        let matrix = PackedMatrix::from_dense_bytes(Scheme::BF16, 8, 16, bytes).unwrap();
        let matrix = MemoryTensor::matrix(Arc::new(matrix));
        let tensors = ["model.embed_tokens.weight", "lm_head.weight"].map(|name| (name.to_owned(), matrix.clone()));
        let untied = Checkpoint::from_parts("untied", serde_json::json!({}), tensors.into()).unwrap();
        let weights = StepWeights::of(&untied);
        assert_eq!(weights, StepWeights { shared: 8 * 16 * 2, of_stream: 16 * 2 });
        assert_eq!([1, 4].map(|streams| weights.per_token(streams)), [256.0 + 32.0, 64.0 + 32.0]);
    }

    #[test]
    fn what_exceeds_the_context_is_refused() {
        let tests = [Test::Prefill(16), Test::Decode { tokens: 64, depth: 1000, streams: 1 }];
        let error = context(&made("tiny"), &tests).unwrap_err().to_string();
        assert!(error.contains("tg64 @ d1000") && error.contains("1064") && error.contains("1024"), "{error}");
        assert_eq!(context(&made("tiny"), &tests[..1]).unwrap(), 16);
        assert_eq!(usual_depths(&made("tiny"), 1), [0]);
        assert_eq!(usual_depths(&made("qwen3-0.6b"), 64), USUAL_DEPTHS);
        let huge = [Test::Decode { tokens: usize::MAX, depth: usize::MAX, streams: usize::MAX }];
        assert!(matches!(context(&made("tiny"), &huge), Err(BenchError::Context { .. })));
    }
}
