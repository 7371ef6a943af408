//! What every device in host memory refuses, and how it says so.

use marlin_format::{PackedMatrix, Scheme};
use marlin_kernels::cpu::{CpuBackend, CpuOptions, SimdLevel};
use marlin_kernels::reference::ReferenceBackend;
use marlin_kernels::{Backend, Encoder, KernelError, KvLayer, KvLayout, KvType, LinearPart, StepLimits};

const LIMITS: StepLimits = StepLimits { tokens: 4, context: 8, width: 8, vocabulary: 8, logit_rows: 4 };

fn zeros(rows: usize, cols: usize, bias: Option<usize>) -> LinearPart<'static> {
    let weight = PackedMatrix::from_dense_bytes(Scheme::F32, rows, cols, vec![0; rows * cols * 4]).unwrap();
    LinearPart { weight, bias: bias.map(|len| vec![0.0; len]) }
}

fn refusals<B: Backend>(backend: &B) {
    let error = backend.load_linear(&[zeros(2, 3, None), zeros(2, 4, None)]).err().unwrap();
    assert!(matches!(error, KernelError::FusedWidth { first: 3, part: 1, found: 4 }), "{error}");
    let error = backend.load_linear(&[zeros(2, 3, Some(3))]).err().unwrap();
    assert!(matches!(error, KernelError::BiasLength { rows: 2, found: 3 }), "{error}");
    let mut short = zeros(2, 3, None);
    short.weight.codes = vec![0; 23].into();
    assert!(matches!(backend.load_linear(&[short]).err().unwrap(), KernelError::Format(_)));
    assert!(backend.load_linear(&[]).is_err());

    for (rows, width) in [(usize::MAX, 2), (usize::MAX / 8, 1)] {
        let error = backend.buffer(rows, width).err().unwrap();
        assert!(matches!(error, KernelError::OutOfMemory { .. }), "{error}");
    }
    let layer = KvLayer { heads: 2, key_dim: 4, value_dim: 4, window: None };
    let layout = KvLayout { block_tokens: 4, layers: vec![layer] };
    let error = backend.kv_cache(&layout, KvType::F16, usize::MAX / 2).err().unwrap();
    assert!(matches!(error, KernelError::OutOfMemory { .. }), "{error}");
    let error = backend.kv_cache(&KvLayout { block_tokens: 0, ..layout }, KvType::F16, 1).err().unwrap();
    assert!(error.to_string().contains("block_tokens = 0"), "{error}");

    let mut buffer = backend.buffer(2, 3).unwrap();
    for (rows, values) in [(1, 2), (1, 4), (3, 9)] {
        let error = backend.upload(&mut buffer, rows, &vec![0.0; values]).unwrap_err();
        assert!(matches!(error, KernelError::BufferShape { width: 3, capacity: 2, .. }), "{error}");
    }
    backend.upload(&mut buffer, 1, &[1.0, 2.0, 3.0]).unwrap();
    let mut encoder = backend.encoder(&LIMITS).unwrap();
    assert!(encoder.read(&buffer, &mut [0.0; 6]).is_err());
    for (rows, values) in [(1, 2), (1, 4), (3, 9)] {
        let error = encoder.write(&mut buffer, rows, &vec![0.0; values]).unwrap_err();
        assert!(matches!(error, KernelError::BufferShape { width: 3, capacity: 2, .. }), "{error}");
    }
    let mut row = [0.0; 3];
    encoder.read(&buffer, &mut row).unwrap();
    assert_eq!(row, [1.0, 2.0, 3.0]);
    encoder.write(&mut buffer, 1, &[4.0, 5.0, 6.0]).unwrap();
    encoder.read(&buffer, &mut row).unwrap();
    assert_eq!(row, [4.0, 5.0, 6.0]);
}

#[test]
fn the_reference_refuses_what_does_not_fit() {
    refusals(&ReferenceBackend);
}

#[test]
fn the_cpu_refuses_what_does_not_fit() {
    refusals(&CpuBackend::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap());
}

#[test]
fn the_cpu_refuses_what_it_cannot_be() {
    let error = CpuBackend::new(CpuOptions { threads: Some(0), ..CpuOptions::default() }).unwrap_err();
    assert!(error.to_string().contains("at least one thread"), "{error}");
    let available = SimdLevel::available();
    use SimdLevel::{Avx2, Avx512Vnni, AvxVnni, Neon, NeonDotprod, NeonI8mm};
    for level in [Avx2, AvxVnni, Avx512Vnni, Neon, NeonDotprod, NeonI8mm] {
        let made = CpuBackend::new(CpuOptions { simd: Some(level), threads: Some(1), ..CpuOptions::default() });
        match made {
            Ok(backend) => {
                assert!(available.contains(&level));
                assert!(backend.info().detail.starts_with(&format!("{level}, 1 thread,")), "{:?}", backend.info());
            }
            Err(error) => {
                assert!(!available.contains(&level));
                assert!(error.to_string().contains(&format!("no {level} instructions")), "{error}");
            }
        }
    }
}
