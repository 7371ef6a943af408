//! Attention of few queries at a time over many keys: each split of a sequence's positions by itself, then their sums put together.

use super::store::{KvPlanes, kv_constants};
use super::{ATTENTION_TOKEN, sink_scores, window};
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::kv::KV_UNIT;
use crate::gpu::linear::PACKED_OUTPUT;
use crate::gpu::pipeline::{Binding, Kernel, Variants};
use crate::gpu::recorder::Recorder;
use crate::gpu::step::StepBuffers;
use crate::gpu::{GpuArithmetic, GpuBuffer, GpuKvCache, GpuVector};
use crate::{AttentionShape, KernelError, KvType, StepLimits};

/// What to change when the kernels are measured on another device.
mod tuning {
    /// Invocations of a workgroup.
    pub(super) const SIZE: usize = 256;
    /// Positions of a split, at least: it has as many of these as it takes for a token to have no more than so many splits, a power of two.
    /// Workgroups of a token's splits are to be about so many.
    pub(super) const LEAST_SPLIT: usize = 64;
    pub(super) const MOST_SPLITS: usize = 64;
    pub(super) const WORKGROUPS: usize = 256;
    /// What takes less time in one workgroup than the kernel that puts splits together.
    pub(super) const ONE_SPLIT: usize = 128;
    /// Bytes of all splits' sums, at most; steps with more rows than have room take several dispatches.
    pub(super) const SCRATCH_BYTES: usize = 96 << 20;
    /// Rows that the scratch memory is made for, where it has room.
    pub(super) const SCRATCH_ROWS: usize = 64;
    /// Neighbours that share a key, at most, and units of 8 dimensions that one has of all the workgroup's query heads together: registers
    /// hold as many of the queries and of the sums.
    pub(super) const MOST_LANES: usize = 32;
    pub(super) const UNITS: usize = 4;
    /// Query heads of a workgroup, at most.
    pub(super) const MOST_HEADS: usize = 4;
    /// Bytes of keys, and of values, whose loads an invocation issues before it uses the first.
    pub(super) const BATCH_BYTES: usize = 32;
    pub(super) const MOST_BATCH: usize = 2;
    /// Invocations that put splits together, and groups of them, at most, that take turns at the splits.
    pub(super) const COMBINE_SIZE: usize = 256;
    pub(super) const COMBINE_GROUPS: usize = 16;
    /// Bytes of workgroup memory where groups' sums meet.
    pub(super) const SUMS_BYTES: usize = 20 << 10;
}

/// Attention by splits.
pub(super) struct SplitAttention {
    scratch: Scratch,
    kernels: Variants<SplitVariant>,
    combine: Variants<CombineVariant>,
}

/// What splits leave for the kernel that puts them together: of each row of a dispatch, head and split …
struct Scratch {
    /// … sums of values, weighted relative to the largest score, `[head_dim]`;
    sums: Storage,
    /// … the largest score and the sum of weights.
    softmax: Storage,
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct SplitVariant {
    kv_type: KvType,
    head_dim: usize,
    /// Query heads of a workgroup: 1, 2 or 4.
    heads: usize,
    /// Neighbours that share a key; subgroups are multiples of them, if they exchange values.
    lanes: usize,
    exchanges_subgroups: bool,
    /// Heads that one split takes are packed, too.
    packs: bool,
}

/// What the kernel that puts splits together is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct CombineVariant {
    pub(super) head_dim: usize,
    /// Heads are packed, too.
    pub(super) packs: bool,
}

impl SplitVariant {
    /// For `group` query heads of each KV head.
    pub(super) fn new(gpu: &Gpu, kv_type: KvType, head_dim: usize, group: usize, packs: bool) -> Self {
        let subgroup = gpu.caps.subgroup[0] as usize;
        // Not in single precision, so that every device shows both ways to be right.
        let exchanges_subgroups = gpu.arithmetic == GpuArithmetic::Half
            && gpu.caps.subgroups
            && subgroup.is_power_of_two()
            && subgroup >= tuning::MOST_HEADS;
        let most_lanes = if exchanges_subgroups { subgroup.min(tuning::MOST_LANES) } else { tuning::MOST_LANES };
        // Each head's scores have invocations of their own.
        let lanes = (head_dim / KV_UNIT).next_power_of_two().clamp(tuning::MOST_HEADS, most_lanes);
        let room = (tuning::UNITS / (head_dim / KV_UNIT).div_ceil(lanes)).clamp(1, tuning::MOST_HEADS);
        let heads = group.next_power_of_two().min(1 << room.ilog2());
        Self { kv_type, head_dim, heads, lanes, exchanges_subgroups, packs }
    }

    /// The variant of the other kernel.
    fn combine(self) -> CombineVariant {
        CombineVariant { head_dim: self.head_dim, packs: self.packs }
    }

    pub(super) fn kernel(self) -> Kernel {
        let Self { kv_type, head_dim, heads, lanes, exchanges_subgroups, packs } = self;
        let chunks = head_dim / KV_UNIT;
        let units = chunks.div_ceil(lanes);
        let unit_bytes = kv_type.code().map_or_else(|| kv_type.head_bytes(KV_UNIT), |code| code.bytes(KV_UNIT));
        let batch = (tuning::BATCH_BYTES / (units * unit_bytes)).clamp(1, tuning::MOST_BATCH);
        let groups = tuning::SIZE / lanes;
        // As the kernel lays them out.
        let sums_bytes = heads * 2 * (lanes * units + 4) * size_of::<[f32; 4]>();
        let kept_groups = (1 << (tuning::SUMS_BYTES / sums_bytes).max(1).ilog2()).min(groups);
        let constants = [
            ("SIZE", tuning::SIZE),
            ("DIM", head_dim),
            ("CHUNKS", chunks),
            ("HEADS", heads),
            // Neighbours that share a key, units that each has of it, and keys that it takes at once.
            ("LANES", lanes),
            ("UNITS", units),
            ("BATCH", batch),
            ("LEAST_SPLIT", tuning::LEAST_SPLIT),
            ("ONE_SPLIT", tuning::ONE_SPLIT),
            ("KEPT_GROUPS", kept_groups),
        ];
        let constants: String = constants.iter().map(|(name, value)| format!("const {name} = {value}u;\n")).collect();
        let prelude = format!("{ATTENTION_TOKEN}{}{constants}", kv_constants(kv_type));
        let planes = KvPlanes::of(kv_type);
        let (read, write) = (Binding::read, Binding::write);
        let mut bindings = vec![
            read("qkv", "vec4<f32>"),
            read("keys", planes.reads),
            read("values", planes.reads),
            read("attention_tokens", "AttentionToken"),
            read("block_tables", "u32"),
            write("split_sums", "vec4<f32>"),
            write("split_softmax", "vec2<f32>"),
            write("out", "vec4<f32>"),
            read("sinks", "f32"),
        ];
        if kv_type.code().is_some() {
            bindings.extend([read("key_scales", "f16"), read("value_scales", "f16")]);
        }
        let exchange = if exchanges_subgroups {
            include_str!("../shaders/exchange_subgroup.wgsl")
        } else {
            include_str!("../shaders/exchange_workgroup.wgsl")
        };
        let files = vec![
            exchange,
            planes.load,
            include_str!("../shaders/attention_sinks.wgsl"),
            include_str!("../shaders/attention_split.wgsl"),
        ];
        let mut kernel = Kernel { name: "attention_split", prelude, bindings, files };
        pack_heads(&mut kernel, packs, heads * head_dim);
        kernel
    }
}

impl CombineVariant {
    pub(super) fn kernel(self) -> Kernel {
        let Self { head_dim, packs } = self;
        let (size, groups) = (tuning::COMBINE_SIZE, (tuning::COMBINE_SIZE * 4 / head_dim).min(tuning::COMBINE_GROUPS));
        let prelude =
            format!("{ATTENTION_TOKEN}const DIM = {head_dim}u;\nconst SIZE = {size}u;\nconst GROUPS = {groups}u;\n");
        let bindings = vec![
            Binding::read("split_sums", "vec4<f32>"),
            Binding::read("split_softmax", "vec2<f32>"),
            Binding::read("attention_tokens", "AttentionToken"),
            Binding::write("out", "vec4<f32>"),
            Binding::read("sinks", "f32"),
        ];
        let files =
            vec![include_str!("../shaders/attention_sinks.wgsl"), include_str!("../shaders/attention_combine.wgsl")];
        let mut kernel = Kernel { name: "attention_combine", prelude, bindings, files };
        pack_heads(&mut kernel, packs, head_dim);
        kernel
    }
}

/// Lets a kernel pack the heads that it writes, of which a workgroup has so many values.
fn pack_heads(kernel: &mut Kernel, packs: bool, values: usize) {
    if packs {
        kernel.prelude += &format!("const KEPT = {values}u;\n");
        kernel.bindings.extend(PACKED_OUTPUT);
        kernel.files.extend([
            include_str!("../shaders/pack.wgsl"),
            include_str!("../shaders/pack_output.wgsl"),
            include_str!("../shaders/pack_heads.wgsl"),
        ]);
    } else {
        kernel.prelude += "fn keep_output(i: u32, value: f32) {}\n\
                           fn pack_heads(row: u32, first: u32, count: u32, heads: u32, lane: u32) {}\n";
    }
}

impl Scratch {
    /// Values of the sums, and splits of a head.
    fn sizes(limits: &StepLimits) -> [usize; 2] {
        let most_splits = limits.context.div_ceil(tuning::LEAST_SPLIT).clamp(1, tuning::MOST_SPLITS);
        let row = limits.width.max(KV_UNIT).saturating_mul(most_splits);
        let rows = limits.tokens.clamp(1, tuning::SCRATCH_ROWS);
        let sums = rows.saturating_mul(row).min(tuning::SCRATCH_BYTES / size_of::<f32>()).max(row);
        [sums, sums / KV_UNIT]
    }

    fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let [sums, heads] = Self::sizes(limits);
        Ok(Self {
            sums: gpu.storage("attention's sums", sums.saturating_mul(size_of::<f32>()))?,
            softmax: gpu.storage("attention's sums", heads.saturating_mul(size_of::<[f32; 2]>()))?,
        })
    }

    /// Rows of a dispatch that have room.
    fn rows(&self, shape: &AttentionShape, splits: usize) -> usize {
        self.sums.buffer.size() as usize / (shape.heads * splits * shape.head_dim * size_of::<f32>())
    }
}

/// Splits that a token of these heads has at most 2 to the power of; it depends on the model alone, so that a row's result does not depend on
/// what else is in a step.
fn most_splits(workgroups_of_split: usize) -> u32 {
    (tuning::WORKGROUPS / workgroups_of_split).clamp(1, tuning::MOST_SPLITS).ilog2()
}

/// Splits of a token that sees so many positions, as the kernel counts them.
fn splits(seen: usize, most: u32) -> usize {
    let least = tuning::LEAST_SPLIT;
    let split = ((seen - 1) >> most) / least * least + least;
    if seen <= tuning::ONE_SPLIT { 1 } else { seen.div_ceil(split) }
}

impl SplitAttention {
    pub(super) fn bytes(limits: &StepLimits) -> usize {
        let [sums, heads] = Scratch::sizes(limits);
        sums.saturating_mul(size_of::<f32>()).saturating_add(heads.saturating_mul(size_of::<[f32; 2]>()))
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        Ok(Self { scratch: Scratch::new(gpu, limits)?, kernels: Variants::default(), combine: Variants::default() })
    }

    /// Attention of the first `tokens` of a step's tokens of attention.
    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn run(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &StepBuffers,
        tokens: usize,
        qkv: &GpuBuffer,
        shape: &AttentionShape,
        sinks: Option<&GpuVector>,
        kv: &GpuKvCache,
        layer: usize,
        out: &GpuBuffer,
        packed: Option<[&Storage; 2]>,
    ) -> Result<(), KernelError> {
        let Self { scratch, kernels, combine } = self;
        let cache = &kv.layers[layer];
        let window = window(shape);
        let group = shape.heads / shape.kv_heads;
        let mut variant = SplitVariant::new(gpu, kv.kv_type, shape.head_dim, group, packed.is_some());
        let workgroups_of_split = shape.kv_heads * group.div_ceil(variant.heads);
        let most_splits = most_splits(workgroups_of_split);
        let splits_of = |position: u32| splits((position + 1).min(window) as usize, most_splits);
        let splits = step.attention_positions(tokens).map(splits_of).max().unwrap_or(1);
        let combined = variant.combine();
        // Several splits leave it to the kernel that puts them together: one that could pack is slower even where it does not.
        variant.packs &= splits == 1;
        let kernel = kernels.get(gpu, variant, SplitVariant::kernel)?;
        let most = if splits == 1 { tokens } else { scratch.rows(shape, splits) };
        assert!(most > 0 || tokens == 0, "an encoder for inputs as wide as all heads");

        let StepBuffers { attention_tokens, block_tables, .. } = step;
        let (keys, values) = (&cache.keys.storage, &cache.values.storage);
        let (sums, softmax) = (&scratch.sums, &scratch.softmax);
        let sink_scores = sink_scores(sinks, qkv);
        for first in (0..tokens).step_by(most.max(1)) {
            let count = most.min(tokens - first);
            let [row, position, table] = step.attention_token(first);
            let buffers =
                [&qkv.storage, keys, values, attention_tokens, block_tables, sums, softmax, &out.storage, sink_scores];
            let parameters = [
                shape.heads as u32,
                shape.kv_heads as u32,
                shape.scale.to_bits(),
                window,
                kv.block_tokens as u32,
                kv.slots() as u32,
                most_splits,
                first as u32,
                u32::from(sinks.is_some()),
                row,
                position,
                table,
            ];
            let workgroups = [splits, workgroups_of_split, count];
            let scales = cache.keys.scales.iter().chain(&cache.values.scales);
            let packed = packed.into_iter().flatten();
            let buffers = buffers.into_iter().chain(scales).chain(packed.clone().filter(|_| variant.packs));
            recorder.dispatch(kernel, buffers, &parameters, workgroups);
            if splits == 1 {
                continue;
            }
            let combine = combine.get(gpu, combined, CombineVariant::kernel)?;
            let parameters = [shape.heads as u32, first as u32, splits as u32, u32::from(sinks.is_some()), row];
            let buffers = [sums, softmax, attention_tokens, &out.storage, sink_scores].into_iter().chain(packed);
            recorder.dispatch(combine, buffers, &parameters, [shape.heads, count, 1]);
        }
        Ok(())
    }
}
