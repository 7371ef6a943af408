//! Devices that are made out to be less than they are.

use std::sync::Arc;

use marlin_format::{PackedMatrix, Scheme};

use super::device::Gpu;
use super::recorder::Recorder;
use super::upload::{PIECE, Upload};
use super::{GpuArithmetic, GpuBackend, GpuCaps, GpuOptions, KernelTime};
use crate::conformance::{Rng, limits, mean_square, poisoned, random, read, schemes, upload};
use crate::reference::ReferenceBackend;
use crate::{Activation, Backend, Encoder, Input, KernelError, KvLayer, KvLayout, KvType, LinearPart, MemoryUse, Step};

/// A GPU as if it were no more than `limit` leaves of it; `None` if there is none, and need not be.
pub(super) fn open(arithmetic: GpuArithmetic, limit: impl FnOnce(&mut GpuCaps)) -> Option<GpuBackend> {
    match Gpu::open_limited(GpuOptions { arithmetic, ..GpuOptions::default() }, limit) {
        Err(error) if std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_some() => panic!("a GPU is required: {error}"),
        opened => opened.ok().map(|gpu| GpuBackend { gpu: Arc::new(gpu) }),
    }
}

/// What the device has of these bytes, brought there in pieces of all sizes.
fn uploaded(backend: &GpuBackend, bytes: &[u8]) -> Vec<u8> {
    let gpu = &backend.gpu;
    let mut upload = Upload::new(gpu, "bytes", bytes.len()).expect("memory");
    let (first, rest) = bytes.split_at(12);
    let (second, rows) = rest.split_at(PIECE + 4);
    upload.write(first).expect("a few");
    upload.write(second).expect("more than a piece");
    let row_words = 1 << 12;
    let row = |row: usize, words: &mut [u32]| {
        bytemuck::cast_slice_mut(words).copy_from_slice(&rows[row * row_words * 4..][..row_words * 4]);
    };
    upload.write_rows(rows.len() / (row_words * 4), row_words, row).expect("rows of more than a piece");
    let storage = upload.finish();
    // Whoever copies it reads what kernels would.
    let copy = gpu.duplicate(&storage).expect("as much memory again");
    let readback = gpu.readback("bytes", bytes.len() as u64);
    let copied = Recorder::new(gpu.clone()).flush_and_copy(&copy, &readback, bytes.len() as u64);
    let mut found = vec![0; bytes.len()];
    gpu.read_mapped(&readback, Some(copied), &mut found).expect("a copy");
    found
}

#[test]
fn weights_arrive_in_place_and_through_staging_memory() {
    let bytes = Rng(60).bytes(12 + PIECE + 4 + 3 * PIECE / 2);
    for mappable in [true, false] {
        let Some(backend) = open(GpuArithmetic::Half, |caps| caps.mappable &= mappable) else { return };
        let caps = backend.caps();
        // Vulkan and Metal map all memory that is the machine's.
        assert_eq!(caps.mappable, mappable && caps.shares_memory, "{caps:?}");
        assert!(uploaded(&backend, &bytes) == bytes, "mappable: {}", caps.mappable);
    }
}

const ROWS: usize = 750;
const COLS: usize = 320;
const TOKENS: usize = 3;

/// The product of some rows with both matrices, what gate and up make of them, and rows of the first matrix.
fn products<B: Backend>(backend: &B, [gate, up]: &[PackedMatrix<'static>; 2]) -> Vec<f32> {
    let part = |weight: &PackedMatrix<'static>| LinearPart { weight: weight.clone(), bias: None };
    let linear = backend.load_linear(&[part(gate), part(up)]).expect("two matrices");
    let table = backend.load_linear(&[part(gate)]).expect("a table");
    let x = upload(backend, COLS, &Rng(62).normals(TOKENS * COLS));
    let mut encoder = backend.encoder(&limits(TOKENS, COLS)).expect("an encoder");
    let mut out = poisoned(backend, TOKENS, 2 * ROWS);
    let mut gated = poisoned(backend, TOKENS, ROWS);
    let mut embedded = poisoned(backend, TOKENS, COLS);
    let offsets = [0, TOKENS as u32];
    encoder.begin(&Step {
        tokens: &[0, ROWS as u32 / 2, ROWS as u32 - 1],
        positions: &[0, 1, 2],
        sequence_offsets: &offsets,
        block_tables: &[],
        table_offsets: &[0, 0],
        logit_rows: &[],
    });
    encoder.linear(Input::Rows(&x), &linear, &mut out);
    encoder.linear_gated(Input::Rows(&x), &linear, Activation::Silu, &mut gated);
    encoder.embed(&table, 1.0, &mut embedded);
    let mut values = read::<B>(&mut encoder, &out, TOKENS * 2 * ROWS);
    values.extend(read::<B>(&mut encoder, &gated, TOKENS * ROWS));
    values.extend(read::<B>(&mut encoder, &embedded, TOKENS * COLS));
    values
}

#[test]
fn matrices_beyond_a_binding_are_split() {
    // Less than a matrix takes in any of the formats.
    let max_binding = 64 << 10;
    let Some(backend) = open(GpuArithmetic::Exact, |caps| caps.max_binding = max_binding) else { return };
    for (name, scheme) in schemes() {
        if !["fp4", "int4", "fp8", "bf16", "int4-2of4"].contains(&name.as_str()) {
            continue;
        }
        let mut rng = Rng(61);
        let matrices = [(); 2].map(|()| random(scheme, ROWS, COLS, &mut rng));
        let part = |weight: &PackedMatrix<'static>| LinearPart { weight: weight.clone(), bias: None };
        let linear = backend.load_linear(&[part(&matrices[0])]).expect("a matrix in several parts");
        assert!(linear.parts.len() > 1, "{name}: one part");
        let sizes = linear.parts.iter().flat_map(|part| &part.buffers).map(|buffer| buffer.buffer.size());
        assert!(sizes.max() <= Some(max_binding), "{name}: a part beyond the binding");
        let (found, expected) = (products(&backend, &matrices), products(&ReferenceBackend, &matrices));
        let error = mean_square(found.iter().zip(&expected).map(|(f, e)| f64::from(f - e)));
        let energy = mean_square(expected.iter().map(|&e| f64::from(e)));
        // A value that was not written is NaN.
        assert!(error <= 1e-12 * energy, "{name}: NMSE {:e}", error / energy);
    }
}

#[test]
fn a_profile_has_each_kernel_of_each_step() {
    let Some(backend) = open(GpuArithmetic::Exact, |_| ()) else { return };
    if !backend.caps().timestamps {
        return;
    }
    let weight = PackedMatrix::from_dense_bytes(Scheme::F32, 24, COLS, vec![0; 24 * COLS * 4]).expect("a matrix");
    let linear = backend.load_linear(&[LinearPart { weight, bias: None }]).expect("a linear");
    let norm = backend.load_vector(&[1.0; COLS]).expect("a vector");
    let x = upload(&backend, COLS, &Rng(63).normals(COLS));
    let mut normed = poisoned(&backend, 1, COLS);
    let mut out = poisoned(&backend, 1, 24);
    let mut encoder = backend.encoder(&limits(1, COLS)).expect("an encoder");

    let mut profile = backend.profile().expect("a device with a clock");
    assert!(backend.profile().unwrap_err().to_string().contains("already"));
    for norms in [1, 70] {
        for _ in 0..norms {
            encoder.rms_norm(&x, &norm, 1e-5, &mut normed);
        }
        encoder.linear(Input::Rows(&normed), &linear, &mut out);
        encoder.start().expect("a step");
        profile.end_step();
    }
    let steps = profile.finish().expect("times");
    let [first, second] = &steps[..] else { panic!("two steps: {steps:?}") };
    let names = |step: &[KernelTime]| step.iter().map(|time| time.kernel).collect::<Vec<_>>();
    assert_eq!(names(first), ["rms_norm", "linear_rows"]);
    assert_eq!(names(second), [vec!["rms_norm"; 70], vec!["linear_rows"]].concat());
    assert_eq!((first[0].matrix, first[1].matrix), (None, Some([24, COLS])));
    let all = steps.concat();
    assert!(all.iter().all(|time| 0.0 <= time.begin && time.begin <= time.end), "{all:?}");
    assert!(all.windows(2).all(|pair| pair[0].begin <= pair[1].begin), "one after the other: {all:?}");

    // Nothing is timed any more.
    encoder.rms_norm(&x, &norm, 1e-5, &mut normed);
    encoder.submit().expect("a step");
    let profile = backend.profile().expect("a second one");
    assert_eq!(profile.finish().expect("nothing"), Vec::<Vec<KernelTime>>::new());
}

#[test]
fn a_device_without_a_clock_has_no_profile() {
    let backend = GpuBackend::imaginary(GpuCaps { timestamps: false, ..GpuCaps::apple() }, GpuOptions::default());
    let error = backend.expect("a device").profile().unwrap_err().to_string();
    assert!(error.contains("Apple GPU has no clock"), "{error}");
}

#[test]
fn what_does_not_fit_is_an_error_with_sizes() {
    let Some(backend) = open(GpuArithmetic::Half, |caps| caps.memory = Some(3 << 30)) else { return };
    let taken = backend.buffer(1 << 10, 1 << 10).expect("4 MiB");
    assert_eq!(backend.memory_taken(), 4 << 20);
    for (rows, width) in [(usize::MAX, 2), (usize::MAX / 8, 1), (1 << 22, 1 << 9)] {
        let error = backend.buffer(rows, width).expect_err("more than a binding");
        assert!(matches!(error, KernelError::Binding(_)), "{error}");
    }
    let error = backend.buffer(1 << 22, 1 << 9).unwrap_err().to_string();
    assert!(error.contains("needs 8.00 GiB, and ") && error.contains("binds no more than "), "{error}");
    let device = backend.caps().in_words(backend.memory_taken());
    let error = KernelError::OutOfMemory { what: "a vector".into(), bytes: 8 << 30, device }.to_string();
    assert!(
        error.contains("needs 8.00 GiB") && error.contains("(with 3.00 GiB free when it was opened, 4.0 MiB taken)"),
        "{error}"
    );
    drop(taken);
    assert_eq!(backend.memory_taken(), 0);
}

/// Heads of two layers, the second of which has the larger values.
fn uneven_layout() -> KvLayout {
    let layer = |heads, value_dim| KvLayer { heads, key_dim: 64, value_dim, window: None };
    KvLayout { block_tokens: 4, layers: vec![layer(2, 64), layer(2, 128)] }
}

#[test]
fn a_kv_cache_is_bounded_by_the_binding() {
    let max_binding = 1 << 20;
    let caps = GpuCaps { max_binding, ..GpuCaps::apple() };
    let backend = GpuBackend::imaginary(caps, GpuOptions::default()).expect("a device");
    let layout = uneven_layout();
    // 2 heads of 128 values: so many bytes a token.
    for (kv_type, bytes) in
        [(KvType::F32, 1024), (KvType::F16, 512), (KvType::Fp8, 256), (KvType::Int8, 256), (KvType::Fp4, 128)]
    {
        let most = backend.most_kv_blocks(&layout, kv_type);
        assert_eq!(most, (max_binding as usize / bytes) / layout.block_tokens, "{kv_type:?}");
        let cache = backend.kv_cache(&layout, kv_type, most).expect("as much as is bound");
        let planes = cache.layers.iter().flat_map(|layer| [&layer.keys, &layer.values]);
        let sizes = planes.map(|plane| plane.storage.buffer.size());
        assert_eq!(sizes.max(), Some(max_binding), "{kv_type:?}");
        drop(cache);
        for blocks in [most + 1, usize::MAX] {
            let error = backend.kv_cache(&layout, kv_type, blocks).unwrap_err();
            assert!(matches!(error, KernelError::Binding(_)), "{error}");
            assert_eq!(backend.check_kv_blocks(&layout, kv_type, blocks).unwrap_err().to_string(), error.to_string());
        }
        assert_eq!(backend.memory_taken(), 0, "{kv_type:?}: nothing is allocated for a cache that cannot be");
    }
    let error = backend.kv_cache(&layout, KvType::F16, 1024).unwrap_err().to_string();
    assert_eq!(
        error,
        "one layer of the KV cache (values of 4096 tokens in f16) needs 2.0 MiB, and Apple GPU binds no more than 1.0 MiB at \
         once; choose room for 2044 tokens at most besides a spare block, by a shorter context (--context), fewer sequences at \
         once (--streams, --concurrency) or keys and values of fewer bits (--kv), or use the CPU instead"
    );
}

#[test]
fn a_cache_of_latent_vectors_has_no_memory_for_values() {
    let backend = GpuBackend::imaginary(GpuCaps::apple(), GpuOptions::default()).expect("a device");
    let layer = |key_dim| KvLayer { heads: 1, key_dim, value_dim: 0, window: None };
    let layout = KvLayout { block_tokens: 16, layers: vec![layer(576); 47] };
    // GLM-4.7-Flash.
    assert_eq!(layout.bytes_per_token(KvType::F16), 47 * 2 * 576);
    for kv_type in KvType::ALL {
        let cache = backend.kv_cache(&layout, kv_type, 4).expect("a cache");
        // The least that can be bound.
        let planes = if kv_type.code().is_some() { 2 } else { 1 };
        assert_eq!(backend.memory_taken() as usize, layout.pool_bytes(kv_type, 4) + 47 * planes * 16, "{kv_type:?}");
        drop(cache);
    }
    for (key_dim, message) in [(1032, "8 to 1024 dimensions"), (580, "multiples of 8, found 580")] {
        let layout = KvLayout { layers: vec![layer(key_dim)], ..layout.clone() };
        let error = backend.kv_cache(&layout, KvType::F16, 4).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn a_lost_device_is_an_error_each_time() {
    for mappable in [true, false] {
        let limit = |caps: &mut GpuCaps| (caps.memory, caps.mappable) = (Some(3 << 30), caps.mappable && mappable);
        let Some(backend) = open(GpuArithmetic::Exact, limit) else { return };
        let norm = backend.load_vector(&[1.0; COLS]).expect("a vector");
        let x = upload(&backend, COLS, &Rng(64).normals(COLS));
        let mut out = poisoned(&backend, 1, COLS);
        let mut encoder = backend.encoder(&limits(1, COLS)).expect("an encoder");
        encoder.rms_norm(&x, &norm, 1e-5, &mut out);
        encoder.submit().expect("a device");

        backend.gpu.device.destroy();
        for _ in 0..2 {
            encoder.rms_norm(&x, &norm, 1e-5, &mut out);
            let error = encoder.submit().expect_err("no device").to_string();
            assert!(error.contains("3.00 GiB free when it was opened, ") && error.contains(" taken)"), "{error}");
            assert!(error.contains("the device was lost"), "{error}");
            assert!(encoder.read(&out, &mut [0.0; COLS]).is_err());
            assert!(backend.upload(&mut out, 1, &[0.0; COLS]).is_err());
            assert!(backend.load_vector(&[1.0; COLS]).is_err());
        }
    }
}
