//! Attention of few queries at a time over many keys: each split of a sequence's positions by itself, then their sums put together.

use super::store::{KvPlanes, kv_constants};
use super::{ATTENTION_TOKEN, window};
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::kv::KV_UNIT;
use crate::gpu::linear::PACKED_OUTPUT;
use crate::gpu::pipeline::{Binding, Kernel, Variants};
use crate::gpu::recorder::Recorder;
use crate::gpu::step::StepBuffers;
use crate::gpu::{GpuBuffer, GpuKvCache};
use crate::{AttentionShape, KernelError, KvType, StepLimits};

/// What to change when the kernels are measured on another device.
mod tuning {
    /// Positions of a tile, and invocations of a workgroup: one owns a key.
    pub(super) const TILE: usize = 128;
    /// Splits of a context, at most: from here on they are of more than one tile. No more than the invocations that put them together.
    pub(super) const MOST_SPLITS: usize = 256;
    /// Bytes of all splits' sums, at most; steps with more rows than have room take several dispatches.
    pub(super) const SCRATCH_BYTES: usize = 96 << 20;
    /// Rows that the scratch memory is made for, where it has room.
    pub(super) const SCRATCH_ROWS: usize = 64;
    /// Partial dot products that a workgroup keeps for each key: 16 KiB of them in all.
    pub(super) const PARTIALS_PER_KEY: usize = 32;
    /// Keys or values whose loads an invocation issues before it uses the first.
    pub(super) const BATCH: usize = 4;
    /// Query heads of a workgroup, at most, and the product of heads and dimensions that its invocations' registers have room for.
    pub(super) const MOST_HEADS: usize = 4;
    pub(super) const MOST_HEADS_BY_DIM: usize = 512;
}

/// Attention by splits.
pub(super) struct SplitAttention {
    /// Positions of a split; it depends on the context alone, so that a row's result does not depend on what else is in a step.
    split: usize,
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
    pub(super) fn new(kv_type: KvType, head_dim: usize, group: usize, packs: bool) -> Self {
        let room = (tuning::MOST_HEADS_BY_DIM / head_dim).clamp(1, tuning::MOST_HEADS);
        // Powers of two: a type of each width.
        Self { kv_type, head_dim, heads: group.next_power_of_two().min(1 << room.ilog2()), packs }
    }

    /// The variant of the other kernel.
    fn combine(self) -> CombineVariant {
        CombineVariant { head_dim: self.head_dim, packs: self.packs }
    }

    pub(super) fn kernel(self) -> Kernel {
        let Self { kv_type, head_dim, heads, packs } = self;
        let chunks = head_dim / KV_UNIT;
        let key_lanes = chunks.next_power_of_two().min(tuning::PARTIALS_PER_KEY / heads);
        let key_units = chunks.div_ceil(key_lanes);
        let key_batch = key_lanes.min((tuning::BATCH / key_units).max(1));
        let value_groups = 1 << (tuning::TILE / chunks).ilog2();
        let value_steps = tuning::TILE / value_groups;
        let value_batch = value_steps.min(tuning::BATCH);
        let partials = ((tuning::TILE + 4) * key_lanes).max(value_groups * chunks * KV_UNIT);
        let constants = [
            ("DIM", head_dim),
            ("CHUNKS", chunks),
            ("HEADS", heads),
            // Neighbours that share a key, units of each, and how its loads are batched.
            ("KEY_LANES", key_lanes),
            ("KEY_UNITS", key_units),
            ("KEY_BATCH", key_batch),
            ("KEY_BATCHES", key_lanes / key_batch),
            ("QUERY_UNITS", key_lanes * key_units),
            ("VALUE_GROUPS", value_groups),
            ("VALUE_BATCH", value_batch),
            ("VALUE_BATCHES", value_steps / value_batch),
            ("PARTIALS", partials),
        ];
        let constants: String = constants.iter().map(|(name, value)| format!("const {name} = {value}u;\n")).collect();
        let heads_type = if heads == 1 { "f32".to_owned() } else { format!("vec{heads}<f32>") };
        let of_head = if heads == 1 { "heads" } else { "heads[h]" };
        let queries: Vec<_> = (0..heads).map(|h| format!("query_of(start, dim, count, {h}u)")).collect();
        let prelude = format!(
            "{ATTENTION_TOKEN}{}{constants}alias Heads = {heads_type};\n\
             fn of_head(heads: Heads, h: u32) -> f32 {{ return {of_head}; }}\n\
             fn load_query(start: u32, dim: u32, count: u32) -> Heads {{ return Heads({}); }}\n",
            kv_constants(kv_type),
            queries.join(", ")
        );
        let planes = KvPlanes::of(kv_type);
        let (read, write) = (Binding::read, Binding::write);
        let mut bindings = vec![
            read("qkv", "f32"),
            read("keys", planes.reads),
            read("values", planes.reads),
            read("attention_tokens", "AttentionToken"),
            read("block_tables", "u32"),
            write("split_sums", "f32"),
            write("split_softmax", "vec2<f32>"),
            write("out", "f32"),
        ];
        if kv_type.code().is_some() {
            bindings.extend([read("key_scales", "f16"), read("value_scales", "f16")]);
        }
        let files = vec![planes.load, include_str!("../shaders/attention_split.wgsl")];
        let mut kernel = Kernel { name: "attention_split", prelude, bindings, files };
        pack_heads(&mut kernel, packs, heads * head_dim);
        kernel
    }
}

impl CombineVariant {
    pub(super) fn kernel(self) -> Kernel {
        let Self { head_dim, packs } = self;
        let prelude = format!("{ATTENTION_TOKEN}const DIM = {head_dim}u;\n");
        let bindings = vec![
            Binding::read("split_sums", "vec4<f32>"),
            Binding::read("split_softmax", "vec2<f32>"),
            Binding::read("attention_tokens", "AttentionToken"),
            Binding::write("out", "vec4<f32>"),
        ];
        let files = vec![include_str!("../shaders/attention_combine.wgsl"), include_str!("../shaders/reduce.wgsl")];
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
        let most_splits = limits.context.div_ceil(split_positions(limits.context)).max(1);
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

/// Positions of a split.
fn split_positions(context: usize) -> usize {
    context.div_ceil(tuning::MOST_SPLITS).next_multiple_of(tuning::TILE)
}

impl SplitAttention {
    pub(super) fn bytes(limits: &StepLimits) -> usize {
        let [sums, heads] = Scratch::sizes(limits);
        sums.saturating_mul(size_of::<f32>()).saturating_add(heads.saturating_mul(size_of::<[f32; 2]>()))
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        Ok(Self {
            split: split_positions(limits.context),
            scratch: Scratch::new(gpu, limits)?,
            kernels: Variants::default(),
            combine: Variants::default(),
        })
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
        kv: &GpuKvCache,
        layer: usize,
        out: &GpuBuffer,
        packed: Option<[&Storage; 2]>,
    ) -> Result<(), KernelError> {
        let Self { split, scratch, kernels, combine } = self;
        let cache = &kv.layers[layer];
        let window = window(shape);
        let splits = |position: u32| {
            let begin = (position + 1).saturating_sub(window) as usize;
            position as usize / *split - begin / *split + 1
        };
        let splits = step.attention_positions(tokens).map(splits).max().unwrap_or(1);
        let group = shape.heads / shape.kv_heads;
        let variant = SplitVariant::new(kv.kv_type, shape.head_dim, group, packed.is_some());
        let kernel = kernels.get(gpu, variant, SplitVariant::kernel)?;
        let most = if splits == 1 { tokens } else { scratch.rows(shape, splits) };
        assert!(most > 0 || tokens == 0, "an encoder for inputs as wide as all heads");

        let StepBuffers { attention_tokens, block_tables, .. } = step;
        let (keys, values) = (&cache.keys.storage, &cache.values.storage);
        let (sums, softmax) = (&scratch.sums, &scratch.softmax);
        for first in (0..tokens).step_by(most.max(1)) {
            let count = most.min(tokens - first);
            let buffers = [&qkv.storage, keys, values, attention_tokens, block_tables, sums, softmax, &out.storage];
            let parameters = [
                shape.heads as u32,
                shape.kv_heads as u32,
                shape.scale.to_bits(),
                window,
                kv.block_tokens as u32,
                kv.slots() as u32,
                *split as u32,
                first as u32,
            ];
            let workgroups = [splits, shape.kv_heads * group.div_ceil(variant.heads), count];
            let scales = cache.keys.scales.iter().chain(&cache.values.scales);
            let packed = packed.into_iter().flatten();
            let buffers = buffers.into_iter().chain(scales).chain(packed.clone());
            recorder.dispatch(kernel, buffers, &parameters, workgroups);
            if splits == 1 {
                continue;
            }
            let combine = combine.get(gpu, variant.combine(), CombineVariant::kernel)?;
            let parameters = [shape.heads as u32, window, *split as u32, first as u32, splits as u32];
            let buffers = [sums, softmax, attention_tokens, &out.storage].into_iter().chain(packed);
            recorder.dispatch(combine, buffers, &parameters, [shape.heads, count, 1]);
        }
        Ok(())
    }
}
