//! Goldens, devices, and a model that is driven as an engine drives one.
#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod prediction;

use std::ops::Range;
use std::path::{Path, PathBuf};

use libtest_mimic::Trial;
use marlin_checkpoint::{Checkpoint, CheckpointWriter, PlannedTensor, WriterOptions};
use marlin_format::{EncodeOptions, Format, Scheme, encode};
use marlin_kernels::conformance::gpu_label;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions, SimdLevel};
use marlin_kernels::gpu::{GpuBackend, GpuOptions};
use marlin_kernels::reference::ReferenceBackend;
use marlin_kernels::{KvType, SampleRow};
use marlin_model::{
    ExpertLayers, ExpertOffload, KvSequence, LanguageModel, LoadOptions, LogitRows, ModelError, StepBatch,
    load_model_offloaded,
};
use safetensors::SafeTensors;
use tempfile::TempDir;

/// What `transformers`, or llama.cpp, says.
pub(crate) struct Golden {
    pub(crate) input_ids: Vec<u32>,
    /// `[input_ids, vocabulary]`.
    pub(crate) logits: Vec<f32>,
}

impl Golden {
    pub(crate) fn read(folder: &Path) -> Self {
        Self::read_file(&folder.join("golden.safetensors"))
    }

    pub(crate) fn read_file(file: &Path) -> Self {
        let bytes = std::fs::read(file).expect("a file of logits");
        let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let words = |name: &str| {
            let tensor = tensors.tensor(name).expect(name);
            tensor.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect::<Vec<_>>()
        };
        Self {
            input_ids: words("input_ids").into_iter().map(u32::from_le_bytes).collect(),
            logits: words("logits").into_iter().map(f32::from_le_bytes).collect(),
        }
    }

    pub(crate) fn vocabulary(&self) -> usize {
        self.logits.len() / self.input_ids.len()
    }
}

/// The folders of the tiny goldens.
pub(crate) fn goldens() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let mut folders: Vec<_> = std::fs::read_dir(root).expect("goldens").map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// The usual schemes of formats.
pub(crate) fn schemes(formats: impl IntoIterator<Item = Format>) -> Vec<Scheme> {
    formats.into_iter().map(|format| format.scheme(None).unwrap()).collect()
}

/// The usual schemes of all variants with 2:4 sparsity.
pub(crate) fn sparse_schemes() -> Vec<Scheme> {
    Format::SPARSE.iter().map(|format| format.sparse_24(None).unwrap()).collect()
}

/// A copy of a model whose matrices are packed, `schemes` in turn: in a fused group they differ if there are several.
pub(crate) fn packed(folder: &Path, schemes: &[Scheme]) -> TempDir {
    let source = Checkpoint::open(folder).unwrap();
    let names: Vec<&str> = source.tensor_names().collect();
    let scheme = |index: usize| schemes[index % schemes.len()];
    let plan = names.iter().enumerate().map(|(index, name)| match *source.shape(name).unwrap() {
        [rows, cols] => PlannedTensor::matrix(*name, rows, cols, scheme(index)),
        _ => PlannedTensor::raw(*name, source.tensor(name).unwrap().dtype, source.shape(name).unwrap()),
    });
    let target = tempfile::tempdir().unwrap();
    let out = target.path().join("packed");
    let config = source.config().clone();
    let mut writer =
        CheckpointWriter::create(&out, plan.collect(), config, Vec::new(), &WriterOptions::default()).unwrap();
    for (index, name) in names.iter().enumerate() {
        if let [rows, cols] = *source.shape(name).unwrap() {
            let values = source.matrix(name, rows, cols).unwrap().decode();
            let matrix = encode(&values, rows, cols, &scheme(index), &EncodeOptions::default()).unwrap();
            writer.write_matrix(name, &matrix).unwrap();
        } else {
            let tensor = source.tensor(name).unwrap();
            writer.write_raw(name, tensor.dtype, tensor.shape, &tensor.bytes).unwrap();
        }
    }
    writer.finish().unwrap();
    target
}

/// Where [`packed`] puts the model.
pub(crate) fn packed_in(target: &TempDir) -> PathBuf {
    target.path().join("packed")
}

/// Tiny models with their matrices packed in each format and sparse variant, and in all of them mixed, so that the parts of fused linears differ.
/// `check` is given what it is, what the reference makes of it, and how to have a device's logits.
pub(crate) fn each_packed_model(check: impl Fn(&str, &Golden, &dyn Fn(Device) -> Vec<f32>)) {
    let mut all = schemes(Format::ALL.into_iter().filter(|format| !format.is_dense()));
    all.extend(sparse_schemes());
    for schemes in all.iter().map(|&scheme| vec![scheme]).chain([all.clone()]) {
        let formats = schemes.iter().map(Scheme::to_string).collect::<Vec<_>>().join(", ");
        for name in ["llama-gqa4-bias-sharded", "qwen3-gqa2-tied", "phi3-mha-window"] {
            let input_ids = Golden::read(&golden(name)).input_ids;
            let target = packed(&golden(name), &schemes);
            let logits = |device: Device| {
                device.load(&packed_in(&target), &options(KvType::F32)).unwrap().logits_of(&input_ids, 40)
            };
            let wanted = Golden { logits: logits(Device::Reference), input_ids: input_ids.clone() };
            check(&format!("{name} in {formats}"), &wanted, &logits);
        }
    }
}

/// A device to run on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Device {
    Reference,
    Cpu(CpuOptions),
    Gpu(&'static GpuBackend),
}

/// The tests that `tests` makes for the first GPU in one of its variants, which has a name. Without a GPU there is one test that says why:
/// reported as ignored, or as failed if the environment variable `METAL_MARLIN_REQUIRE_GPU` is set.
pub(crate) fn gpu_trials(
    options: GpuOptions,
    tests: impl FnOnce(&'static GpuBackend, &str) -> Vec<Trial>,
) -> Vec<Trial> {
    let label = gpu_label(&options) + if options.batch_invariant { "-invariant" } else { "" };
    match GpuBackend::new(options) {
        // Kernels are compiled once for all of its tests.
        Ok(backend) => tests(Box::leak(Box::new(backend)), &label),
        Err(error) => {
            let trial = Trial::test(format!("all/{label}: {error}"), move || Err(error.into()));
            vec![trial.with_ignored_flag(std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none())]
        }
    }
}

impl Device {
    /// The CPU at a level of instructions, the best one if `None`.
    pub(crate) fn cpu(arithmetic: Arithmetic, threads: usize, simd: Option<SimdLevel>) -> Self {
        Self::Cpu(CpuOptions { threads: Some(threads), arithmetic, simd })
    }

    /// The reference, and the CPU in exact mode at every level this processor has.
    pub(crate) fn exact() -> Vec<Self> {
        let cpus = SimdLevel::available().into_iter().map(|simd| Self::cpu(Arithmetic::Exact, 1, Some(simd)));
        std::iter::once(Self::Reference).chain(cpus).collect()
    }

    pub(crate) fn load(self, folder: &Path, options: &LoadOptions) -> Result<Model, ModelError> {
        self.load_with(folder, options, None)
    }

    /// The model with the experts of these layers left to the host.
    pub(crate) fn load_offloaded(
        self,
        folder: &Path,
        options: &LoadOptions,
        host: &CpuBackend,
        layers: &ExpertLayers,
    ) -> Result<Model, ModelError> {
        let offload = ExpertOffload { host: host.clone(), layers: layers.clone() };
        self.load_with(folder, options, Some(&offload))
    }

    fn load_with(
        self,
        folder: &Path,
        options: &LoadOptions,
        offload: Option<&ExpertOffload>,
    ) -> Result<Model, ModelError> {
        let checkpoint = Checkpoint::open(folder).expect("a checkpoint");
        let model = match self {
            Self::Reference => load_model_offloaded(&ReferenceBackend, offload, &checkpoint, options)?,
            Self::Cpu(cpu) => {
                load_model_offloaded(&CpuBackend::new(cpu).expect("a CPU"), offload, &checkpoint, options)?
            }
            Self::Gpu(gpu) => load_model_offloaded(gpu, offload, &checkpoint, options)?,
        };
        Ok(Model::of(model))
    }
}

/// A processor that experts are left to.
pub(crate) fn host(arithmetic: Arithmetic) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(2), arithmetic, simd: None }).expect("a CPU")
}

/// Whether the model in a folder is a mixture of experts.
pub(crate) fn has_experts(folder: &Path) -> bool {
    Checkpoint::open(folder).unwrap().tensor_names().any(|name| name.contains(".experts."))
}

/// Options with room for every test's sequences.
pub(crate) fn options(kv_type: KvType) -> LoadOptions {
    LoadOptions { step_tokens: 256, logit_rows: 256, kv_blocks: Some(160), kv_type, ..LoadOptions::default() }
}

/// A model and the step it runs.
pub(crate) struct Model {
    pub(crate) model: Box<dyn LanguageModel>,
    batch: StepBatch,
}

impl Model {
    pub(crate) fn of(model: Box<dyn LanguageModel>) -> Self {
        Self { model, batch: StepBatch::new() }
    }

    pub(crate) fn sequence(&mut self) -> KvSequence {
        self.model.kv().sequence()
    }

    pub(crate) fn fork(&mut self, sequence: &KvSequence) -> KvSequence {
        self.model.kv().fork(sequence)
    }

    pub(crate) fn truncate(&mut self, sequence: &mut KvSequence, len: usize) {
        self.model.kv().truncate(sequence, len);
    }

    pub(crate) fn release(&mut self, sequence: KvSequence) {
        self.model.kv().release(sequence);
    }

    /// Runs one step of several sequences; gives all their logits, `[tokens, vocabulary]` for each sequence.
    pub(crate) fn step(&mut self, parts: &mut [(&mut KvSequence, &[u32])]) -> Vec<Vec<f32>> {
        self.batch.clear();
        let mut rows: Vec<Range<usize>> = Vec::new();
        for (sequence, tokens) in parts {
            self.model.kv().append(sequence, tokens.len()).unwrap();
            rows.push(self.batch.push(sequence, tokens, LogitRows::All));
        }
        self.model.forward(&self.batch).unwrap();
        let mut logits = Vec::new();
        self.model.read_logits(&mut logits).unwrap();
        let vocabulary = self.model.info().vocabulary;
        assert_eq!(logits.len(), self.batch.logit_rows() * vocabulary);
        rows.into_iter().map(|rows| logits[rows.start * vocabulary..rows.end * vocabulary].to_vec()).collect()
    }

    /// Appends tokens to a sequence; gives their logits.
    pub(crate) fn extend(&mut self, sequence: &mut KvSequence, tokens: &[u32]) -> Vec<f32> {
        self.step(&mut [(sequence, tokens)]).remove(0)
    }

    /// The logits of tokens that begin a sequence, run `chunk` at a time.
    pub(crate) fn logits_of(&mut self, tokens: &[u32], chunk: usize) -> Vec<f32> {
        let mut sequence = self.sequence();
        let logits = tokens.chunks(chunk).flat_map(|chunk| self.extend(&mut sequence, chunk)).collect();
        self.release(sequence);
        logits
    }

    /// The hidden states of tokens that begin a sequence, run `chunk` at a time.
    pub(crate) fn hidden_of(&mut self, tokens: &[u32], chunk: usize) -> Vec<f32> {
        let mut sequence = self.sequence();
        let mut all = Vec::new();
        for chunk in tokens.chunks(chunk) {
            self.model.kv().append(&mut sequence, chunk.len()).unwrap();
            self.batch.clear();
            self.batch.push(&sequence, chunk, LogitRows::Last);
            self.model.forward(&self.batch).unwrap();
            let mut hidden = Vec::new();
            self.model.read_hidden(&mut hidden).unwrap();
            assert_eq!(hidden.len(), chunk.len() * self.model.info().hidden_size);
            all.extend(hidden);
        }
        self.release(sequence);
        all
    }

    /// Runs one token and samples the next one greedily.
    pub(crate) fn greedy(&mut self, sequence: &mut KvSequence, tokens: &[u32]) -> Result<u32, ModelError> {
        self.batch.clear();
        self.model.kv().append(sequence, tokens.len())?;
        self.batch.push(sequence, tokens, LogitRows::Last);
        self.model.forward(&self.batch)?;
        let sampling = self.model.sample(&[SampleRow::GREEDY])?;
        let mut next = [0];
        self.model.sampled(sampling, &mut next)?;
        Ok(next[0])
    }
}

/// Largest difference relative to the largest logit.
pub(crate) fn max_error(found: &[f32], wanted: &[f32]) -> f32 {
    let largest = wanted.iter().fold(0f32, |m, w| m.max(w.abs()));
    largest_difference(found, wanted) / largest
}

/// Norm of the difference relative to the norm of what is wanted.
pub(crate) fn l2_error(found: &[f32], wanted: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = found.iter().zip(wanted).map(|(&f, &w)| square(f64::from(f) - f64::from(w))).sum();
    let norm: f64 = wanted.iter().map(|&w| square(f64::from(w))).sum();
    (difference / norm).sqrt()
}

fn largest_difference(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    // Unlike `f32::max`, this lets a NaN through.
    found.iter().zip(wanted).map(|(f, w)| (f - w).abs()).fold(0.0, |m, d| if d <= m { m } else { d })
}

/// Checks logits against a golden: both relative errors within `bound`, and the same token most likely in every row, except
/// where the two most likely are closer than twice the largest error.
pub(crate) fn assert_parity(what: &str, found: &[f32], golden: &Golden, bound: f32) {
    let (max, l2) = (max_error(found, &golden.logits), l2_error(found, &golden.logits));
    assert!(max <= bound, "{what}: largest relative error {max:e}, bound {bound:e}");
    assert!(l2 <= f64::from(bound), "{what}: relative L2 error {l2:e}, bound {bound:e}");
    let error = largest_difference(found, &golden.logits);
    let rows = found.chunks(golden.vocabulary()).zip(golden.logits.chunks(golden.vocabulary()));
    for (row, (found, wanted)) in rows.enumerate() {
        let (first, gap) = top_two(wanted);
        assert!(argmax(found) == first || gap < 2.0 * error, "{what}: row {row} prefers another token, gap {gap}");
    }
}

/// Checks hidden states against a golden, by the logits that the head of the model in `folder` makes of them.
pub(crate) fn assert_hidden_parity(what: &str, folder: &Path, hidden: &[f32], golden: &Golden, bound: f32) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let width = checkpoint.config()["hidden_size"].as_u64().unwrap() as usize;
    let is_tied = !checkpoint.contains("lm_head.weight");
    let name = if is_tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let head = checkpoint.matrix(name, golden.vocabulary(), width).unwrap();
    let mut weights = vec![0.0; golden.vocabulary() * width];
    weights.chunks_exact_mut(width).enumerate().for_each(|(row, out)| head.decode_row(row, out));
    let cap = checkpoint.config()["final_logit_softcapping"].as_f64();
    let logit = |state: &[f32], weights: &[f32]| {
        let sum: f64 = state.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        cap.map_or(sum, |cap| cap * (sum / cap).tanh()) as f32
    };
    let states = hidden.chunks_exact(width);
    let logits: Vec<f32> =
        states.flat_map(|state| weights.chunks_exact(width).map(move |weights| logit(state, weights))).collect();
    assert_parity(what, &logits, golden, bound);
}

/// Checks logits against a golden as far as three quarters of its rows, and half of them twice as close.
pub(crate) fn assert_parity_of_most(what: &str, found: &[f32], golden: &Golden, bound: f32) {
    let largest = golden.logits.iter().fold(0f32, |m, w| m.max(w.abs()));
    let rows = found.chunks(golden.vocabulary()).zip(golden.logits.chunks(golden.vocabulary()));
    let mut errors: Vec<f32> = rows.map(|(found, wanted)| largest_difference(found, wanted) / largest).collect();
    assert!(errors.iter().all(|error| error.is_finite()), "{what}: logits that are not finite");
    errors.sort_by(f32::total_cmp);
    let [half, most] = [errors[errors.len() / 2], errors[errors.len() * 3 / 4]];
    assert!(
        half <= bound / 2.0 && most <= bound,
        "{what}: errors of rows {errors:?}, bound {bound:e} for most of them"
    );
}

/// The most likely token.
pub(crate) fn argmax(row: &[f32]) -> usize {
    (0..row.len()).reduce(|best, i| if row[i] > row[best] { i } else { best }).expect("a row")
}

/// The most likely token and how far the second one is behind.
pub(crate) fn top_two(row: &[f32]) -> (usize, f32) {
    let first = argmax(row);
    let second = (0..row.len()).filter(|&i| i != first).map(|i| row[i]).fold(f32::NEG_INFINITY, f32::max);
    (first, row[first] - second)
}

/// True if the bits are equal, which also tells NaN from NaN.
pub(crate) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
