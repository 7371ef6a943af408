//! What prepares attention: rotation, norms, and writing the cache in any KV type.

use super::STEP_TOKEN;
use crate::gpu::kv::{KV_UNIT, MAX_LATENT_DIM};
use crate::gpu::pipeline::{Binding, Kernel};
use crate::{KvType, RopeLayout};

/// How kernels see the planes of a KV type.
pub(super) struct KvPlanes {
    /// Element as attention reads it.
    pub(super) reads: &'static str,
    /// Loads units of [`KV_UNIT`] values.
    pub(super) load: &'static str,
    /// Element as it is stored.
    writes: &'static str,
    /// What a value becomes.
    to_code: &'static str,
    store: &'static str,
}

impl KvPlanes {
    pub(super) fn of(kv_type: KvType) -> Self {
        let plain = include_str!("../shaders/kv_store_plain.wgsl");
        let codes = include_str!("../shaders/kv_store_codes.wgsl");
        match kv_type {
            KvType::F16 => Self {
                reads: "vec4<u32>",
                load: include_str!("../shaders/kv_f16.wgsl"),
                writes: "f16",
                to_code: "fn to_kv(value: f32) -> f16 { return f16(value); }",
                store: plain,
            },
            KvType::F32 => Self {
                reads: "vec4<f32>",
                load: include_str!("../shaders/kv_f32.wgsl"),
                writes: "f32",
                to_code: "fn to_kv(value: f32) -> f32 { return value; }",
                store: plain,
            },
            KvType::Fp8 => Self {
                reads: "vec2<u32>",
                load: include_str!("../shaders/kv_fp8.wgsl"),
                writes: "u32",
                to_code: include_str!("../shaders/kv_code_fp8.wgsl"),
                store: codes,
            },
            KvType::Int8 => Self {
                reads: "vec2<u32>",
                load: include_str!("../shaders/kv_int8.wgsl"),
                writes: "u32",
                to_code: include_str!("../shaders/kv_code_int8.wgsl"),
                store: codes,
            },
            KvType::Fp4 => Self {
                reads: "u32",
                load: include_str!("../shaders/kv_fp4.wgsl"),
                writes: "u32",
                to_code: include_str!("../shaders/kv_code_fp4.wgsl"),
                store: codes,
            },
        }
    }
}

/// Constants that tell kernels of KV types apart.
pub(super) fn kv_constants(kv_type: KvType) -> String {
    let name = kv_type.name().to_uppercase();
    let Some(code) = kv_type.code() else { return format!("const KV_{name} = true;\n") };
    let (bits, units, largest) = (code.element.bits(), code.group.min(MAX_LATENT_DIM) / KV_UNIT, code.largest);
    format!(
        "const KV_{name} = true;\nconst CODE_BITS = {bits}u;\nconst SCALED_UNITS = {units}u;\nconst LARGEST_CODE = {largest:?};\n"
    )
}

/// What the kernel that writes the cache is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct StoreVariant {
    pub(super) kv_type: KvType,
    /// With norms of Q and K.
    pub(super) normed: bool,
    pub(super) rope: RopeLayout,
}

/// What the kernel that prepares latent attention is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct LatentStoreVariant {
    pub(super) kv_type: KvType,
    pub(super) rope: RopeLayout,
}

/// Invocations of a workgroup of that kernel, which also store units of a key: as many as the widest has.
pub(super) const LATENT_STORE_SIZE: usize = MAX_LATENT_DIM / KV_UNIT;

/// The constant that tells kernels which dimensions are rotated together.
pub(super) fn rope_constant(rope: RopeLayout) -> String {
    format!("const INTERLEAVED = {};\n", rope == RopeLayout::Interleaved)
}

impl StoreVariant {
    pub(super) fn kernel(self) -> Kernel {
        let Self { kv_type, normed, rope } = self;
        let (read, write) = (Binding::read, Binding::write);
        let planes = KvPlanes::of(kv_type);
        let mut bindings = vec![
            write("qkv", "f32"),
            read("angles", "f32"),
            write("keys", planes.writes),
            write("values", planes.writes),
            read("step_tokens", "StepToken"),
            read("block_tables", "u32"),
        ];
        if kv_type.code().is_some() {
            bindings.extend([write("key_scales", "f16"), write("value_scales", "f16")]);
        }
        if normed {
            bindings.extend([read("q_norm", "f32"), read("k_norm", "f32")]);
        }
        let weight = if normed { "select(k_norm[i], q_norm[i], is_query)" } else { "1.0" };
        let prelude = format!(
            "{STEP_TOKEN}{}{}const NORMED = {normed};\n\
             fn norm_weight(is_query: bool, i: u32) -> f32 {{ return {weight}; }}\n",
            kv_constants(kv_type),
            rope_constant(rope)
        );
        let files = vec![
            include_str!("../shaders/reduce.wgsl"),
            include_str!("../shaders/rope.wgsl"),
            planes.to_code,
            planes.store,
            include_str!("../shaders/rope_store_kv.wgsl"),
        ];
        Kernel { name: "rope_store_kv", prelude, bindings, files }
    }
}

impl LatentStoreVariant {
    pub(super) fn kernel(self) -> Kernel {
        let Self { kv_type, rope } = self;
        let (read, write) = (Binding::read, Binding::write);
        let planes = KvPlanes::of(kv_type);
        let mut bindings = vec![
            read("q", "f32"),
            read("kv", "f32"),
            read("norm", "f32"),
            read("angles", "f32"),
            write("keys", planes.writes),
            write("values", planes.writes),
            read("step_tokens", "StepToken"),
            read("block_tables", "u32"),
            write("queries", "f32"),
        ];
        if kv_type.code().is_some() {
            bindings.extend([write("key_scales", "f16"), write("value_scales", "f16")]);
        }
        let prelude = format!(
            "{STEP_TOKEN}{}{}const SIZE = {LATENT_STORE_SIZE}u;\nconst MAX_DIM = {MAX_LATENT_DIM}u;\n",
            kv_constants(kv_type),
            rope_constant(rope)
        );
        let files = vec![
            include_str!("../shaders/reduce.wgsl"),
            include_str!("../shaders/rope.wgsl"),
            planes.to_code,
            planes.store,
            include_str!("../shaders/latent_store_kv.wgsl"),
        ];
        Kernel { name: "latent_store_kv", prelude, bindings, files }
    }
}
