//! Attention over the paged cache, and what prepares it.

mod split;

use std::sync::Arc;

use self::split::{SplitAttention, SplitVariant};
use super::device::Gpu;
use super::kv::KV_UNIT;
use super::pipeline::{Binding, Kernel, Pipeline};
use super::recorder::Recorder;
use super::step::StepBuffers;
use super::{GpuBackend, GpuBuffer, GpuKvCache};
use crate::{AttentionShape, KernelError, KvType, QkNorm, StepLimits};

/// Records attention and what the cache needs; kernels by KV type.
pub(super) struct AttentionEncoder {
    /// Without and with norms of Q and K.
    rope_store_kv: [[Arc<Pipeline>; 2]; 2],
    split: SplitAttention,
    copy_block: [Arc<Pipeline>; 2],
}

/// How kernels read the values of a KV type.
struct KvElement {
    /// Element of the planes' bindings.
    reads: &'static str,
    /// Loads units of [`KV_UNIT`] values.
    module: &'static str,
}

impl KvElement {
    fn of(kv_type: KvType) -> Self {
        match kv_type {
            KvType::F16 => Self { reads: "vec4<u32>", module: include_str!("../shaders/kv_f16.wgsl") },
            KvType::F32 => Self { reads: "vec4<f32>", module: include_str!("../shaders/kv_f32.wgsl") },
        }
    }
}

/// Index of a KV type's kernels.
fn kv_index(kv_type: KvType) -> usize {
    match kv_type {
        KvType::F16 => 0,
        KvType::F32 => 1,
    }
}

/// Compiles the kernels for heads of these widths, which attention does for those that it meets.
pub(super) fn compile(gpu: &Gpu, head_dims: &[usize]) -> Result<(), KernelError> {
    for &head_dim in head_dims {
        gpu.pipeline(&split::combine_kernel(head_dim))?;
        for kv_type in KvType::ALL {
            for group in [1, 2, 4] {
                gpu.pipeline(&SplitVariant::new(kv_type, head_dim, group).kernel())?;
            }
        }
    }
    Ok(())
}

/// What kernels know of a token.
const STEP_TOKEN: &str =
    "struct StepToken {\n    position: u32,\n    // Where its sequence's block table begins.\n    table: u32,\n}\n";

impl AttentionEncoder {
    pub(super) fn bytes(limits: &StepLimits) -> usize {
        SplitAttention::bytes(limits)
    }

    pub(super) fn new(gpu: &Gpu, limits: &StepLimits) -> Result<Self, KernelError> {
        let (read, write) = (Binding::read, Binding::write);
        let reduce = include_str!("../shaders/reduce.wgsl");
        let kernel = |name, prelude: String, bindings: Vec<Binding>, files: &[&'static str]| {
            gpu.pipeline(&Kernel { name, prelude, bindings, files: files.to_vec() })
        };
        let rope_store_kv = |element: &'static str, normed: bool| {
            let mut bindings = vec![
                write("qkv", "f32"),
                read("angles", "f32"),
                write("keys", element),
                write("values", element),
                read("step_tokens", "StepToken"),
                read("block_tables", "u32"),
            ];
            let weight = if normed { "select(k_norm[i], q_norm[i], is_query)" } else { "1.0" };
            if normed {
                bindings.extend([read("q_norm", "f32"), read("k_norm", "f32")]);
            }
            let prelude = format!(
                "{STEP_TOKEN}const NORMED = {normed};\n\
                 fn to_kv(value: f32) -> {element} {{ return {element}(value); }}\n\
                 fn norm_weight(is_query: bool, i: u32) -> f32 {{ return {weight}; }}\n"
            );
            kernel("rope_store_kv", prelude, bindings, &[reduce, include_str!("../shaders/rope_store_kv.wgsl")])
        };
        let copy_block = |element: &'static str| {
            let bindings = vec![write("plane", element)];
            kernel("copy_block", String::new(), bindings, &[include_str!("../shaders/copy_block.wgsl")])
        };
        Ok(Self {
            rope_store_kv: [
                [rope_store_kv("f16", false)?, rope_store_kv("f16", true)?],
                [rope_store_kv("f32", false)?, rope_store_kv("f32", true)?],
            ],
            split: SplitAttention::new(gpu, limits)?,
            copy_block: [copy_block("f16")?, copy_block("f32")?],
        })
    }

    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn rope_store_kv(
        &self,
        recorder: &mut Recorder,
        step: &StepBuffers,
        qkv: &mut GpuBuffer,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, GpuBackend>>,
        angles: &GpuBuffer,
        kv: &mut GpuKvCache,
        layer: usize,
    ) {
        let cache = &kv.layers[layer];
        cache.check(shape);
        assert_eq!((qkv.rows, qkv.width), (step.rows, (shape.heads + 2 * shape.kv_heads) * shape.head_dim));
        assert!(angles.rows == qkv.rows && angles.width.is_multiple_of(2) && angles.width <= shape.head_dim);
        for norm in norm.iter().flat_map(|norm| [norm.q, norm.k]) {
            assert_eq!(norm.values.len(), shape.head_dim, "a norm over a head");
        }
        qkv.written();
        let kernel = &self.rope_store_kv[kv_index(kv.kv_type)][usize::from(norm.is_some())];
        let StepBuffers { step_tokens, block_tables, .. } = step;
        let buffers =
            [&qkv.storage, &angles.storage, &cache.keys.storage, &cache.values.storage, step_tokens, block_tables];
        let norms = norm.iter().flat_map(|norm| [&norm.q.storage, &norm.k.storage]);
        let parameters = [
            shape.heads as u32,
            shape.kv_heads as u32,
            shape.head_dim as u32,
            angles.width as u32,
            kv.block_tokens as u32,
            kv.slots() as u32,
            norm.as_ref().map_or(0.0, |norm| norm.eps).to_bits(),
        ];
        let workgroups = [shape.heads + 2 * shape.kv_heads, qkv.rows, 1];
        recorder.dispatch(kernel, buffers.into_iter().chain(norms), &parameters, workgroups);
    }

    #[expect(clippy::too_many_arguments, reason = "those of the operation, and where it is recorded")]
    pub(super) fn attention(
        &mut self,
        gpu: &Gpu,
        recorder: &mut Recorder,
        step: &StepBuffers,
        qkv: &GpuBuffer,
        shape: &AttentionShape,
        kv: &GpuKvCache,
        layer: usize,
        out: &mut GpuBuffer,
    ) {
        out.output(step.rows, shape.heads * shape.head_dim);
        kv.layers[layer].check(shape);
        assert_eq!((qkv.rows, qkv.width), (step.rows, (shape.heads + 2 * shape.kv_heads) * shape.head_dim));
        if let Err(error) = self.split.run(gpu, recorder, step, qkv, shape, kv, layer, out) {
            gpu.fail(&error);
        }
    }

    pub(super) fn copy_blocks(&self, recorder: &mut Recorder, kv: &GpuKvCache, pairs: &[(u32, u32)]) {
        let within = |&block: &u32| (block as usize) < kv.blocks;
        assert!(pairs.iter().all(|(from, to)| within(from) && within(to)), "blocks of the cache");
        let kernel = &self.copy_block[kv_index(kv.kv_type)];
        for layer in &kv.layers {
            for plane in [&layer.keys, &layer.values] {
                let (block, head) = (kv.block_tokens * plane.dim, kv.slots() * plane.dim);
                for &(from, to) in pairs {
                    let parameters = [block as u32, head as u32, from, to];
                    let workgroups = [block.div_ceil(64), layer.heads, 1];
                    recorder.dispatch(kernel, [&plane.storage], &parameters, workgroups);
                }
            }
        }
    }
}
