//! The conformance table of this machine's devices: each row is a test. Slow rows are run by `scripts/test --full`.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use marlin_kernels::conformance::{Table, gpu_label};
use marlin_kernels::cpu::{Arithmetic, CpuOptions, SimdLevel};
use marlin_kernels::gpu::{GpuArithmetic, GpuMatrices, GpuOptions, MatrixSize};

fn main() -> ExitCode {
    let mut table = Table::default();
    for simd in SimdLevel::available() {
        for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
            let options = CpuOptions { threads: Some(2), arithmetic, simd: Some(simd) };
            table.add_cpu(options).expect("a level of this processor");
        }
    }
    let without_gpu = add_gpu(&mut table);
    table.add_independence();
    let rows = table.into_rows().map(|row| {
        let (name, is_slow) = (row.name().to_owned(), row.is_slow());
        Trial::test(name, move || row.run().result.map_err(Into::into)).with_ignored_flag(is_slow)
    });
    libtest_mimic::run(&Arguments::from_args(), rows.chain(without_gpu).collect()).exit_code()
}

/// Adds the rows of the first GPU, its kernels compiled with and without bounds checks, and those for matrix units of each size played by
/// plain arithmetic, too. Without a GPU they are reported as ignored, or as failed if the environment variable
/// `METAL_MARLIN_REQUIRE_GPU` is set.
fn add_gpu(table: &mut Table) -> Vec<Trial> {
    use GpuArithmetic::{Exact, Half};
    use GpuMatrices::{Device, Emulated};
    let mut failed = Vec::new();
    for (arithmetic, matrices) in
        [(Exact, Device), (Half, Device), (Half, Emulated(MatrixSize::Eight)), (Half, Emulated(MatrixSize::Sixteen))]
    {
        for checked in [false, true] {
            let options = GpuOptions { checked, arithmetic, matrices, ..GpuOptions::default() };
            let label = gpu_label(&options);
            if let Err(error) = table.add_gpu(options) {
                let row = Trial::test(format!("all/{label}: {error}"), move || Err(error.into()));
                failed.push(row.with_ignored_flag(std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none()));
            }
        }
    }
    failed
}
