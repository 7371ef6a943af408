//! Chooses tokens on the device; `shaders/sampling.wgsl` says how.

use std::sync::Arc;

use super::GpuBuffer;
use super::device::{Gpu, Storage};
use super::pipeline::{Binding, Kernel, Pipeline};
use super::recorder::Recorder;
use crate::sampling::{KEPT_SAMPLINGS, SamplingIds};
use crate::{KernelError, SampleRow, SamplingId, StepLimits};

/// Bits of a digit of a radix select: 32 bits are three digits.
const WIDTH: u32 = 11;
const BINS: usize = 1 << WIDTH;
/// Words of a histogram: a count and a weight of two words for each bin, and the weight of what min-p keeps.
const HISTOGRAM: usize = 3 * BINS + 2;
/// The first digit, which all selects share, and two more for each.
const HISTOGRAMS: usize = 7;
/// States of a row: with each histogram, and at the end.
const STATES: usize = HISTOGRAMS + 1;
/// Bytes of `State`, `Partial` and `Row` in the shaders.
const STATE_BYTES: usize = 48;
const PARTIAL_BYTES: usize = 16;
/// Logits of a workgroup.
const CHUNK: usize = 4096;
/// Where a row has nothing to name.
const ABSENT: u32 = u32::MAX;
/// Bytes of workgroup memory that the histogram kernel takes, the most of all.
pub(super) const WORKGROUP_MEMORY: u32 = (4 * HISTOGRAM + 256 * 12 + 64) as u32;

/// Chooses tokens.
pub(super) struct Sampler {
    kernels: Kernels,
    rows: Storage,
    /// Tokens with a bias or a count.
    entries: Storage,
    /// Bits of allowed tokens, of the rows that do not allow all.
    masks: Storage,
    partials: Storage,
    histograms: Storage,
    states: Storage,
    chunk_ties: Storage,
    /// The tokens of the last sampling.
    pub(super) sampled: Storage,
    ids: SamplingIds,
    readbacks: [Readback; KEPT_SAMPLINGS],
    staged_rows: Vec<Row>,
    staged_entries: Vec<[u32; 2]>,
    staged_masks: Vec<u32>,
}

struct Kernels {
    scan: Arc<Pipeline>,
    adjust: Arc<Pipeline>,
    mask: Arc<Pipeline>,
    histogram: Arc<Pipeline>,
    ties: Arc<Pipeline>,
    /// For rows of which none needs selects, and for others.
    take: [Arc<Pipeline>; 2],
}

/// Where the host reads the tokens of a sampling.
struct Readback {
    buffer: wgpu::Buffer,
    /// The submission that copies them there.
    submission: Option<wgpu::SubmissionIndex>,
    rows: usize,
}

/// How to choose the token of a row; the order of `Row` in `sampling.wgsl`.
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Row {
    temperature: f32,
    top_k: u32,
    top_p: u32,
    uniform: u32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    biases: u32,
    counts: u32,
    end: u32,
    last_sampled: u32,
    mask: u32,
    lowest_allowed: u32,
}

/// What `params` in `sampling.wgsl` says of a dispatch.
#[derive(Debug, Clone, Copy, Default)]
struct Pass {
    histograms: usize,
    histogram: usize,
    select: Select,
    digit: u32,
    ends: Select,
    is_first_scan: bool,
}

/// A search for a token; numbered as in `sampling.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Select {
    TopK,
    TopP,
    Choice,
    #[default]
    None,
}

/// Bytes of each buffer, in the order of their fields, without the entries and masks, which grow as they are needed.
fn sizes(limits: &StepLimits) -> [usize; 6] {
    let StepLimits { logit_rows: rows, vocabulary, .. } = *limits;
    let chunks = vocabulary.div_ceil(CHUNK);
    let words = |words: usize| words.saturating_mul(size_of::<u32>());
    [
        size_of::<Row>(),
        chunks.saturating_mul(PARTIAL_BYTES),
        words(HISTOGRAMS * HISTOGRAM),
        STATES * STATE_BYTES,
        words(chunks),
        words(1),
    ]
    .map(|bytes| bytes.saturating_mul(rows))
}

impl Sampler {
    pub(super) fn bytes(limits: &StepLimits) -> usize {
        sizes(limits).into_iter().fold(0, usize::saturating_add)
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let rows = limits.logit_rows;
        let [row_bytes, partials, histograms, states, ties, sampled] = sizes(limits);
        Ok(Self {
            kernels: Kernels::new(gpu)?,
            rows: gpu.storage("sampling parameters", row_bytes)?,
            entries: gpu.storage("logit biases and penalties", 0)?,
            masks: gpu.storage("allowed tokens", 0)?,
            partials: gpu.storage("the most likely tokens", partials)?,
            histograms: gpu.storage("histograms of logits", histograms)?,
            states: gpu.storage("the state of sampling", states)?,
            chunk_ties: gpu.storage("counts of tied tokens", ties)?,
            sampled: gpu.storage("sampled tokens", sampled)?,
            ids: SamplingIds::default(),
            readbacks: std::array::from_fn(|_| Readback::new(gpu, sampled)),
            staged_rows: Vec::with_capacity(rows),
            staged_entries: Vec::new(),
            staged_masks: Vec::new(),
        })
    }

    /// Records the choice of a token for each row of logits, and starts it.
    pub(super) fn sample(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        logits: &GpuBuffer,
        rows: &[SampleRow<'_>],
    ) -> SamplingId {
        assert_eq!(rows.len(), logits.rows, "one choice per row of logits");
        assert!(rows.len() <= self.staged_rows.capacity(), "the rows of logits that the encoder was made for");
        // Samplings before this one were started when they were recorded, so that they have read the rows before.
        if let Err(error) = self.stage(gpu, rows, logits.width) {
            gpu.fail(&error);
        }
        self.record(recorder, logits, rows);

        let (id, place) = self.ids.next();
        let readback = &mut self.readbacks[place];
        readback.rows = rows.len();
        let bytes = (rows.len() * size_of::<u32>()) as u64;
        readback.submission = Some(recorder.flush_and_copy(&self.sampled, &readback.buffer, bytes));
        id
    }

    /// Waits for a sampling and reads its tokens.
    pub(super) fn read(&mut self, gpu: &Gpu, id: SamplingId, tokens: &mut [u32]) -> Result<(), KernelError> {
        let readback = &self.readbacks[self.ids.find(id)?];
        assert_eq!(readback.rows, tokens.len(), "a token for each row of the sampling");
        if tokens.is_empty() {
            return gpu.check();
        }
        gpu.read_mapped(&readback.buffer, readback.submission.clone(), bytemuck::cast_slice_mut(tokens))
    }

    /// Writes how each row chooses.
    fn stage(&mut self, gpu: &Gpu, rows: &[SampleRow<'_>], vocabulary: usize) -> Result<(), KernelError> {
        self.staged_rows.clear();
        self.staged_entries.clear();
        self.staged_masks.clear();
        for row in rows {
            let biases = self.staged_entries.len() as u32;
            self.staged_entries.extend(row.bias.iter().map(|&(token, bias)| [token, bias.to_bits()]));
            let counts = self.staged_entries.len() as u32;
            self.staged_entries.extend(row.counts.iter().map(|count| [count.token, count.generated]));
            let mask = row.allowed.map_or(ABSENT, |allowed| {
                assert_eq!(allowed.len(), vocabulary.div_ceil(32), "a bit for each token");
                let mask = self.staged_masks.len() as u32;
                self.staged_masks.extend(allowed);
                mask
            });
            self.staged_rows.push(Row::new(row, [biases, counts, self.staged_entries.len() as u32], mask));
        }
        gpu.write(&self.rows, 0, bytemuck::cast_slice(&self.staged_rows));
        write_growing(
            gpu,
            &mut self.entries,
            "logit biases and penalties",
            bytemuck::cast_slice(&self.staged_entries),
        )?;
        write_growing(gpu, &mut self.masks, "allowed tokens", bytemuck::cast_slice(&self.staged_masks))
    }

    fn record(&self, recorder: &mut Recorder, logits: &GpuBuffer, rows: &[SampleRow<'_>]) {
        let count = rows.len();
        let chunks = logits.width.div_ceil(CHUNK);
        let whole = [chunks, count, 1];
        let parameters = |pass: Pass| {
            let Pass { histograms, histogram, select, digit, ends, is_first_scan } = pass;
            let [vocabulary, chunks, histograms, histogram] =
                [logits.width, chunks, histograms, histogram].map(|count| count as u32);
            [vocabulary, chunks, histograms, histogram, select as u32, digit, ends as u32, u32::from(is_first_scan)]
        };
        let any = |is: fn(&SampleRow<'_>) -> bool| rows.iter().any(is);
        let needs_selects = any(|row| row.temperature > 0.0);
        let wants_top_k = needs_selects && any(|row| row.top_k > 0);
        let wants_top_p = needs_selects && any(|row| row.top_p < 1.0);
        let selects = [(wants_top_k, Select::TopK), (wants_top_p, Select::TopP), (needs_selects, Select::Choice)];
        let selects = selects.into_iter().filter(|(is_wanted, _)| *is_wanted).map(|(_, select)| select);
        let mut pass = Pass {
            histograms: if needs_selects { 1 + 2 * selects.clone().count() } else { 0 },
            is_first_scan: true,
            ..Pass::default()
        };

        let scan = [&logits.storage, &self.partials, &self.histograms];
        recorder.dispatch(&self.kernels.scan, scan, &parameters(pass), whole);
        pass.is_first_scan = false;
        let adjusts = any(|row| !row.bias.is_empty() || !row.counts.is_empty() || row.last_sampled.is_some());
        let masks = any(|row| row.allowed.is_some());
        if adjusts {
            let buffers = [&logits.storage, &self.rows, &self.entries, &self.sampled];
            recorder.dispatch(&self.kernels.adjust, buffers, &parameters(pass), [count, 1, 1]);
        }
        if masks {
            let buffers = [&logits.storage, &self.rows, &self.masks];
            recorder.dispatch(&self.kernels.mask, buffers, &parameters(pass), whole);
        }
        if adjusts || masks {
            recorder.dispatch(&self.kernels.scan, scan, &parameters(pass), whole);
        }
        if needs_selects {
            let shared = [&logits.storage, &self.rows, &self.partials, &self.histograms, &self.states];
            recorder.dispatch(&self.kernels.histogram, shared, &parameters(pass), whole);
            for select in selects {
                for digit in 1..=2 {
                    (pass.histogram, pass.select, pass.digit) = (pass.histogram + 1, select, digit);
                    recorder.dispatch(&self.kernels.histogram, shared, &parameters(pass), whole);
                    pass.ends = Select::None;
                }
                pass.ends = select;
            }
            (pass.histogram, pass.select) = (pass.histogram + 1, Select::None);
            let buffers = shared.into_iter().chain([&self.chunk_ties]);
            recorder.dispatch(&self.kernels.ties, buffers, &parameters(pass), whole);
        }
        let buffers = [&logits.storage, &self.rows, &self.partials, &self.states, &self.chunk_ties, &self.sampled];
        let take = &self.kernels.take[usize::from(needs_selects)];
        recorder.dispatch(take, buffers, &parameters(pass), [count, 1, 1]);
    }
}

/// Writes to a buffer that is made anew when it is too small.
fn write_growing(gpu: &Gpu, storage: &mut Storage, what: &str, bytes: &[u8]) -> Result<(), KernelError> {
    if bytes.len() as u64 > storage.buffer.size() {
        *storage = gpu.storage(what, bytes.len().next_power_of_two())?;
    }
    gpu.write(storage, 0, bytes);
    Ok(())
}

impl Row {
    fn new(row: &SampleRow<'_>, [biases, counts, end]: [u32; 3], mask: u32) -> Self {
        // As shares of 2^32; a share of 1 becomes the largest number, which keeps all.
        let share = |value: f32| (f64::from(value) * f64::from(2f32.powi(32))) as u32;
        Self {
            // Below this, nothing but the largest logit has a weight, and divisions might overflow.
            temperature: if row.temperature > 0.0 { row.temperature.max(1e-20) } else { 0.0 },
            top_k: row.top_k,
            top_p: share(row.top_p),
            uniform: share(row.uniform),
            min_p: row.min_p,
            repetition_penalty: row.repetition_penalty,
            presence_penalty: row.presence_penalty,
            frequency_penalty: row.frequency_penalty,
            biases,
            counts,
            end,
            last_sampled: row.last_sampled.unwrap_or(ABSENT),
            mask,
            lowest_allowed: row.lowest_allowed(),
        }
    }
}

impl Readback {
    fn new(gpu: &Gpu, bytes: usize) -> Self {
        // A buffer has at least a word.
        let buffer = gpu.readback("readback of sampled tokens", bytes.max(4) as u64);
        Self { buffer, submission: None, rows: 0 }
    }
}

impl Kernels {
    fn new(gpu: &Gpu) -> Result<Self, KernelError> {
        let (read, write) = (Binding::read, Binding::write);
        let kernel = |name, bindings: &[Binding], has_selects: bool, files: &[&'static str]| {
            let prelude = format!(
                "const WIDTH = {WIDTH}u;\nconst BINS = {BINS}u;\nconst HISTOGRAM = {HISTOGRAM}u;\nconst STATES = {STATES}u;\n\
                 const HAS_SELECTS = {has_selects};\n"
            );
            let files = std::iter::once(include_str!("shaders/sampling.wgsl")).chain(files.iter().copied()).collect();
            gpu.pipeline(&Kernel { name, prelude, bindings: bindings.to_vec(), files })
        };
        let select = include_str!("shaders/sample_select.wgsl");
        let shared = [
            read("logits", "f32"),
            read("rows", "Row"),
            read("partials", "Partial"),
            write("histograms", "atomic<u32>"),
            write("states", "State"),
        ];
        let scan = [read("logits", "f32"), write("partials", "Partial"), write("histograms", "atomic<u32>")];
        let adjust =
            [write("logits", "f32"), read("rows", "Row"), read("entries", "vec2<u32>"), read("sampled", "u32")];
        let mask = [write("logits", "f32"), read("rows", "Row"), read("masks", "u32")];
        let ties: Vec<_> = shared.into_iter().chain([write("chunk_ties", "u32")]).collect();
        let take = [
            read("logits", "f32"),
            read("rows", "Row"),
            read("partials", "Partial"),
            read("states", "State"),
            read("chunk_ties", "u32"),
            write("sampled", "u32"),
        ];
        let take = |has_selects| {
            let files = [include_str!("shaders/sample_take.wgsl")];
            kernel("sample_take", &take, has_selects, &files)
        };
        Ok(Self {
            scan: kernel("sample_scan", &scan, true, &[include_str!("shaders/sample_scan.wgsl")])?,
            adjust: kernel("sample_adjust", &adjust, true, &[include_str!("shaders/sample_adjust.wgsl")])?,
            mask: kernel("sample_mask", &mask, true, &[include_str!("shaders/sample_mask.wgsl")])?,
            histogram: kernel(
                "sample_histogram",
                &shared,
                true,
                &[select, include_str!("shaders/sample_histogram.wgsl")],
            )?,
            ties: kernel("sample_ties", &ties, true, &[select, include_str!("shaders/sample_ties.wgsl")])?,
            take: [take(false)?, take(true)?],
        })
    }
}
