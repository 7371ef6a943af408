//! How many splits a sequence's positions are divided into, what each leaves, and the kernel that puts it together.

use super::{ATTENTION_TOKEN, sink_scores};
use crate::gpu::device::{Gpu, Storage};
use crate::gpu::kv::KV_UNIT;
use crate::gpu::linear::PACKED_OUTPUT;
use crate::gpu::pipeline::{Binding, Kernel, Variants};
use crate::gpu::recorder::Recorder;
use crate::gpu::step::StepBuffers;
use crate::gpu::{GpuBuffer, GpuVector};
use crate::{AttentionShape, KernelError, StepLimits, Values};

/// What to change when the kernels are measured on another device.
mod tuning {
    /// Bytes of all splits' sums, at most; steps with more rows than have room take several dispatches.
    pub(super) const SCRATCH_BYTES: usize = 96 << 20;
    /// Rows that the scratch memory is made for, where it has room.
    pub(super) const SCRATCH_ROWS: usize = 64;
    /// Invocations that put splits together, and groups of them, at most, that take turns at the splits.
    pub(super) const SIZE: usize = 256;
    pub(super) const GROUPS: usize = 16;
    /// Values of a head that a workgroup takes of latent attention, whose heads are wide and have many splits.
    pub(super) const LATENT_PART: usize = 64;
}

/// How a kernel divides the positions that a token sees into splits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Splits {
    /// Positions of a split, at least: it has as many of these as it takes for a token to have no more than so many splits, a power of two.
    pub(super) least: usize,
    pub(super) most: usize,
    /// Workgroups of a token's splits are to be about so many.
    pub(super) workgroups: usize,
    /// Positions that take less time in one workgroup than the kernel that puts splits together.
    pub(super) one: usize,
}

impl Splits {
    /// Splits that a token of these heads has at most 2 to the power of; it depends on the model alone, so that a row's result does not depend on
    /// what else is in a step.
    pub(super) fn most(self, workgroups_of_split: usize) -> u32 {
        (self.workgroups / workgroups_of_split).clamp(1, self.most).ilog2()
    }

    /// Splits of a token that sees so many positions, as kernels count them.
    pub(super) fn count(self, seen: usize, most: u32) -> usize {
        let split = ((seen - 1) >> most) / self.least * self.least + self.least;
        if seen <= self.one { 1 } else { seen.div_ceil(split) }
    }

    /// What kernels know of it, before `attention_splits.wgsl`.
    pub(super) fn constants(self) -> [(&'static str, usize); 2] {
        [("LEAST_SPLIT", self.least), ("ONE_SPLIT", self.one)]
    }
}

/// What splits leave for the kernel that puts them together, and that kernel: of each row of a dispatch, head and split …
pub(super) struct Combine {
    /// … sums of values, weighted relative to the largest score, `[value_dim]`;
    pub(super) sums: Storage,
    /// … the largest score and the sum of weights.
    pub(super) softmax: Storage,
    kernels: Variants<CombineVariant>,
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct CombineVariant {
    value_dim: usize,
    /// Workgroups of a head.
    parts: usize,
    /// Heads are packed, too.
    packs: bool,
}

impl CombineVariant {
    pub(super) fn new(head_dim: usize, values: Values, packs: bool) -> Self {
        let (value_dim, parts) = match values {
            Values::Cached => (head_dim, 1),
            Values::OfKeys(dim) if dim.is_multiple_of(tuning::LATENT_PART) => (dim, dim / tuning::LATENT_PART),
            Values::OfKeys(dim) => (dim, 1),
        };
        Self { value_dim, parts, packs }
    }

    pub(super) fn kernel(self) -> Kernel {
        let Self { value_dim, parts, packs } = self;
        let dim = value_dim / parts;
        let (size, groups) = (tuning::SIZE, (tuning::SIZE * 4 / dim).min(tuning::GROUPS));
        let constants = [("DIM", dim), ("PARTS", parts), ("SIZE", size), ("GROUPS", groups)];
        let constants: String = constants.iter().map(|(name, value)| format!("const {name} = {value}u;\n")).collect();
        let prelude = format!("{ATTENTION_TOKEN}{constants}");
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
        pack_heads(&mut kernel, packs, dim);
        kernel
    }
}

/// Lets a kernel pack the heads that it writes, of which a workgroup has so many values.
pub(super) fn pack_heads(kernel: &mut Kernel, packs: bool, values: usize) {
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

impl Combine {
    /// Values of the sums, and splits of a head.
    fn sizes(limits: &StepLimits) -> [usize; 2] {
        let row_of = |splits: Splits| {
            let most = limits.context.div_ceil(splits.least).clamp(1, splits.most);
            limits.width.max(KV_UNIT).saturating_mul(most)
        };
        let (row, latent_row) = (row_of(super::split::SPLITS), row_of(super::latent::SPLITS));
        let rows = limits.tokens.clamp(1, tuning::SCRATCH_ROWS);
        let sums = rows.saturating_mul(row).min(tuning::SCRATCH_BYTES / size_of::<f32>()).max(row).max(latent_row);
        [sums, sums / KV_UNIT]
    }

    pub(super) fn bytes(limits: &StepLimits) -> usize {
        let [sums, heads] = Self::sizes(limits);
        sums.saturating_mul(size_of::<f32>()).saturating_add(heads.saturating_mul(size_of::<[f32; 2]>()))
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let [sums, heads] = Self::sizes(limits);
        Ok(Self {
            sums: gpu.storage("attention's sums", sums.saturating_mul(size_of::<f32>()))?,
            softmax: gpu.storage("attention's sums", heads.saturating_mul(size_of::<[f32; 2]>()))?,
            kernels: Variants::default(),
        })
    }

    /// Rows of a dispatch that have room.
    pub(super) fn rows(&self, shape: &AttentionShape, splits: usize) -> usize {
        let rows = self.sums.buffer.size() as usize / (shape.heads * splits * shape.value_dim() * size_of::<f32>());
        assert!(rows > 0, "an encoder for inputs as wide as the values of all heads");
        rows
    }

    /// Puts the splits of `count` of a step's tokens of attention together, from `first` on.
    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn run(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &StepBuffers,
        [first, count, splits]: [usize; 3],
        queries: &GpuBuffer,
        shape: &AttentionShape,
        sinks: Option<&GpuVector>,
        out: &GpuBuffer,
        packed: Option<[&Storage; 2]>,
    ) -> Result<(), KernelError> {
        let Self { sums, softmax, kernels } = self;
        let variant = CombineVariant::new(shape.head_dim, shape.values, packed.is_some());
        let kernel = kernels.get(gpu, variant, CombineVariant::kernel)?;
        let [row, ..] = step.attention_token(first);
        let parameters = [shape.heads as u32, first as u32, splits as u32, u32::from(sinks.is_some()), row];
        let buffers = [&*sums, softmax, &step.attention_tokens, &out.storage, sink_scores(sinks, queries)];
        let buffers = buffers.into_iter().chain(packed.into_iter().flatten());
        recorder.dispatch(kernel, buffers, &parameters, [shape.heads * variant.parts, count, 1]);
        Ok(())
    }
}
