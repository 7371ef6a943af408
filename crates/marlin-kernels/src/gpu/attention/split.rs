//! Attention of few queries at a time over many keys: each split of a sequence's positions by itself, then their sums put together.

use super::combine::{Combine, Splits, pack_heads};
use super::store::{KvPlanes, kv_constants, rope_constant};
use super::{ATTENTION_TOKEN, sink_scores, window};
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::kv::KV_UNIT;
use crate::gpu::pipeline::{Binding, Kernel, Variants};
use crate::gpu::recorder::Recorder;
use crate::gpu::step::StepBuffers;
use crate::gpu::{GpuArithmetic, GpuBackend, GpuBuffer, GpuKvCache, GpuVector};
use crate::{AttentionShape, KernelError, KvType, QkNorm, RopeLayout, Values};

/// How positions are divided.
pub(super) const SPLITS: Splits = Splits { least: 64, most: 64, workgroups: 256, one: 128 };

/// What to change when the kernels are measured on another device.
mod tuning {
    /// Invocations of a workgroup.
    pub(super) const SIZE: usize = 256;
    /// Neighbours that share a key, at most, and units of 8 dimensions that one has of all the workgroup's query heads together: registers
    /// hold as many of the queries and of the sums. Keys that are values, too, are held once.
    pub(super) const MOST_LANES: usize = 32;
    pub(super) const UNITS: usize = 4;
    pub(super) const LATENT_UNITS: usize = 6;
    /// Query heads of a workgroup, at most.
    pub(super) const MOST_HEADS: usize = 4;
    /// Bytes of keys, and of values, whose loads an invocation issues before it uses the first.
    pub(super) const BATCH_BYTES: usize = 32;
    pub(super) const MOST_BATCH: usize = 2;
    /// Bytes of workgroup memory where groups' sums meet.
    pub(super) const SUMS_BYTES: usize = 20 << 10;
}

/// Attention by splits.
#[derive(Default)]
pub(super) struct SplitAttention {
    kernels: Variants<SplitVariant>,
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct SplitVariant {
    kv_type: KvType,
    head_dim: usize,
    values: Values,
    /// Query heads of a workgroup: 1, 2 or 4.
    heads: usize,
    /// Neighbours that share a key; subgroups are multiples of them, if they exchange values.
    lanes: usize,
    exchanges_subgroups: bool,
    /// Heads that one split takes are packed, too.
    packs: bool,
    /// Rows are rotated, and normalised or not, and their keys and values go into the cache.
    rotates: Option<RotateVariant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct RotateVariant {
    pub(super) rope: RopeLayout,
    pub(super) normed: bool,
}

/// What rows are rotated by on their way.
pub(in crate::gpu) struct Rotation<'a> {
    pub(super) angles: &'a GpuBuffer,
    pub(super) norm: Option<QkNorm<'a, GpuBackend>>,
}

impl Rotation<'_> {
    /// Whether attention can rotate the rows of a step: each sequence has one, which is rotated by whole units on both sides.
    pub(super) fn fits(&self, gpu: &Gpu, step: &StepBuffers, shape: &AttentionShape, kv_type: KvType) -> bool {
        // Where a row must not depend on others, it is the same kernels that prepare it in every step.
        !gpu.batch_invariant
            && step.is_decode
            && kv_type == KvType::F16
            && shape.values == Values::Cached
            && shape.head_dim.is_multiple_of(KV_UNIT)
            && self.angles.width.is_multiple_of(2 * KV_UNIT)
    }
}

impl SplitVariant {
    /// For `group` query heads of each KV head.
    pub(super) fn new(gpu: &Gpu, kv_type: KvType, head_dim: usize, values: Values, group: usize, packs: bool) -> Self {
        let subgroup = gpu.caps.subgroup[0] as usize;
        // Not in single precision, so that every device shows both ways to be right.
        let exchanges_subgroups = gpu.arithmetic == GpuArithmetic::Half
            && gpu.caps.subgroups
            && subgroup.is_power_of_two()
            && subgroup >= tuning::MOST_HEADS;
        let most_lanes = if exchanges_subgroups { subgroup.min(tuning::MOST_LANES) } else { tuning::MOST_LANES };
        // Each head's scores have invocations of their own.
        let lanes = (head_dim / KV_UNIT).next_power_of_two().clamp(tuning::MOST_HEADS, most_lanes);
        let units = match values {
            Values::Cached => tuning::UNITS,
            Values::OfKeys(_) => tuning::LATENT_UNITS,
        };
        let room = (units / (head_dim / KV_UNIT).div_ceil(lanes)).clamp(1, tuning::MOST_HEADS);
        let heads = group.next_power_of_two().min(1 << room.ilog2());
        Self { kv_type, head_dim, values, heads, lanes, exchanges_subgroups, packs, rotates: None }
    }

    /// The same kernel, which rotates rows on their way.
    pub(super) fn rotating(self, rotates: RotateVariant) -> Self {
        Self { rotates: Some(rotates), ..self }
    }

    pub(super) fn kernel(self) -> Kernel {
        let Self { kv_type, head_dim, values, heads, lanes, exchanges_subgroups, packs, rotates } = self;
        let chunks = head_dim / KV_UNIT;
        let units = chunks.div_ceil(lanes);
        // Of values, those that are loaded, those that are of keys; and heads of keys and values beside the queries.
        let (value_dim, [cached_units, units_of_keys], beside) = match values {
            Values::Cached => (head_dim, [units, 0], 2),
            Values::OfKeys(dim) => (dim, [0, (dim / KV_UNIT).div_ceil(lanes)], 0),
        };
        let value_units = cached_units + units_of_keys;
        let unit_bytes = kv_type.code().map_or_else(|| kv_type.head_bytes(KV_UNIT), |code| code.bytes(KV_UNIT));
        let batch = (tuning::BATCH_BYTES / (units * unit_bytes)).clamp(1, tuning::MOST_BATCH);
        let groups = tuning::SIZE / lanes;
        // As the kernel lays them out.
        let sums_bytes = heads * 2 * (lanes * value_units + 4) * size_of::<[f32; 4]>();
        let kept_groups = (1 << (tuning::SUMS_BYTES / sums_bytes).max(1).ilog2()).min(groups);
        let constants = [
            ("SIZE", tuning::SIZE),
            ("DIM", head_dim),
            ("VALUE_DIM", value_dim),
            ("CHUNKS", chunks),
            ("HEADS", heads),
            // Neighbours that share a key, units that each has of it and of the value, and keys that it takes at once.
            ("LANES", lanes),
            ("UNITS", units),
            ("VALUE_UNITS", value_units),
            // The latter from the cache, or from the key.
            ("CACHED_UNITS", cached_units),
            ("UNITS_OF_KEYS", units_of_keys),
            ("BATCH", batch),
            ("KEPT_GROUPS", kept_groups),
            // Heads of a row beside the queries, for each KV head.
            ("BESIDE_QUERIES", beside),
            ("ROTATIONS", usize::from(rotates.is_some())),
        ];
        let constants = constants.into_iter().chain(SPLITS.constants());
        let constants: String = constants.map(|(name, value)| format!("const {name} = {value}u;\n")).collect();
        let mut prelude = format!("{ATTENTION_TOKEN}{}{constants}", kv_constants(kv_type));
        let planes = KvPlanes::of(kv_type);
        let (read, write) = (Binding::read, Binding::write);
        let plane = if rotates.is_some() { write } else { read };
        let mut bindings = vec![
            read("qkv", "vec4<f32>"),
            plane("keys", planes.reads),
            plane("values", planes.reads),
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
        let mut files = vec![
            exchange,
            planes.load,
            include_str!("../shaders/attention_sinks.wgsl"),
            include_str!("../shaders/attention_splits.wgsl"),
            include_str!("../shaders/attention_split.wgsl"),
        ];
        if let Some(RotateVariant { rope, normed }) = rotates {
            bindings.push(read("angles", "vec4<f32>"));
            files.push(include_str!("../shaders/attention_rotate.wgsl"));
            prelude += &format!("{}const NORMED = {normed};\n", rope_constant(rope));
            for (function, weight) in [("normed_query", "q_norm"), ("normed_key", "k_norm")] {
                let body = if normed {
                    bindings.push(read(weight, "vec4<f32>"));
                    format!("Unit(x.low * factor * {weight}[2u * unit], x.high * factor * {weight}[2u * unit + 1u])")
                } else {
                    "x".into()
                };
                prelude += &format!("fn {function}(x: Unit, unit: u32, factor: f32) -> Unit {{ return {body}; }}\n");
            }
        }
        let mut kernel = Kernel { name: "attention_split", prelude, bindings, files };
        pack_heads(&mut kernel, packs, heads * value_dim);
        kernel
    }
}

impl SplitAttention {
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
        combine: &mut Combine,
        packed: Option<[&Storage; 2]>,
        rotation: Option<&Rotation<'_>>,
    ) -> Result<(), KernelError> {
        let cache = &kv.layers[layer];
        let window = window(shape);
        let group = shape.heads / shape.kv_heads;
        let mut variant = SplitVariant::new(gpu, kv.kv_type, shape.head_dim, shape.values, group, packed.is_some());
        let workgroups_of_split = shape.kv_heads * group.div_ceil(variant.heads);
        let most_splits = SPLITS.most(workgroups_of_split);
        let splits_of = |position: u32| SPLITS.count((position + 1).min(window) as usize, most_splits);
        let splits = step.attention_positions(tokens).map(splits_of).max().unwrap_or(1);
        // Several splits leave it to the kernel that puts them together: one that could pack is slower even where it does not.
        variant.packs &= splits == 1;
        variant.rotates = rotation.map(|rotation| RotateVariant { rope: shape.rope, normed: rotation.norm.is_some() });
        let (rotary, eps) = rotation
            .map_or((0, 0.0), |rotation| (rotation.angles.width, rotation.norm.as_ref().map_or(0.0, |norm| norm.eps)));
        let kernel = self.kernels.get(gpu, variant, SplitVariant::kernel)?;
        let most = if splits == 1 { tokens } else { combine.rows(shape, splits) };

        let StepBuffers { attention_tokens, block_tables, .. } = step;
        let (keys, values) = (&cache.keys.storage, &cache.values.storage);
        let sink_scores = sink_scores(sinks, qkv);
        for first in (0..tokens).step_by(most.max(1)) {
            let count = most.min(tokens - first);
            let [row, position, table] = step.attention_token(first);
            let buffers = [
                &qkv.storage,
                keys,
                values,
                attention_tokens,
                block_tables,
                &combine.sums,
                &combine.softmax,
                &out.storage,
                sink_scores,
            ];
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
                rotary as u32,
                eps.to_bits(),
            ];
            let workgroups = [splits, workgroups_of_split, count];
            let scales = cache.keys.scales.iter().chain(&cache.values.scales);
            let written = packed.into_iter().flatten();
            let angles = rotation.map(|rotation| &rotation.angles.storage);
            let norms = rotation.and_then(|rotation| rotation.norm.as_ref());
            let norms = norms.into_iter().flat_map(|norm| [&norm.q.storage, &norm.k.storage]);
            let rotated_by = angles.into_iter().chain(norms);
            let written = written.filter(|_| variant.packs);
            let buffers = buffers.into_iter().chain(scales).chain(rotated_by).chain(written);
            recorder.dispatch(kernel, buffers, &parameters, workgroups);
            if splits > 1 {
                let rows = [first, count, splits];
                combine.run(gpu, recorder, step, rows, qkv, shape, sinks, out, packed)?;
            }
        }
        Ok(())
    }
}
