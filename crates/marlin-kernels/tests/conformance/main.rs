//! The conformance table: operation × format × shape class × backend, each row a test against the reference.
//!
//! A row covers a list of shapes and names the first that fails. Outputs, caches and scratch memory hold NaN before an
//! operation runs. Errors are bounded as NMSE, the mean squared error over the mean square of what is expected.
//!
//! A new operation is a [`support::Case`] and a call of [`Table::add`]; a new backend an [`Inner`] for each
//! of its variants in [`main`]; a new format an entry of [`matrices::schemes`].

mod attention;
mod independence;
mod linear;
mod matrices;
mod rows;
mod sampling;
mod support;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};
use marlin_kernels::Backend;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions, SimdLevel};
use marlin_kernels::gpu::{GpuArithmetic, GpuBackend, GpuMatrices, GpuOptions, MatrixSize};

fn main() -> ExitCode {
    let mut table = Table { rows: Vec::new() };
    for simd in SimdLevel::available() {
        for arithmetic in [Arithmetic::Exact, Arithmetic::Int8] {
            let backend = CpuBackend::new(CpuOptions { threads: Some(2), arithmetic, simd: Some(simd) });
            let backend = backend.expect("a level of this processor");
            // Int8 with a scale per 32 values of a normal distribution, whose largest is about 2.1 σ, costs
            // (2.1 / 127)² / 12 = 2.3e-5.
            let (suffix, linear_bound) = match arithmetic {
                Arithmetic::Exact => ("", 1e-12),
                Arithmetic::Int8 => ("-int8", 1e-4),
            };
            let label = format!("cpu-{simd}{suffix}");
            let device = Arc::new(Inner { label, backend, linear_bound, embed_bound: 1e-13 });
            linear::add_rows(&mut table, &device);
            if arithmetic == Arithmetic::Exact {
                add_rows_without_linears(&mut table, &device);
            }
        }
    }
    add_gpu_rows(&mut table);
    independence::add_rows(&mut table);
    libtest_mimic::run(&Arguments::from_args(), table.rows).exit_code()
}

/// Rows of the first GPU, its kernels compiled with and without bounds checks. Without one they are reported as ignored, or as
/// failed if the environment variable `METAL_MARLIN_REQUIRE_GPU` is set.
fn add_gpu_rows(table: &mut Table) {
    use GpuArithmetic::{Exact, Half};
    use GpuMatrices::{Device, Emulated};
    use MatrixSize::{Eight, Sixteen};
    for (label, arithmetic, matrices) in [
        ("gpu", Exact, Device),
        ("gpu-half", Half, Device),
        ("gpu-half-8x8", Half, Emulated(Eight)),
        ("gpu-half-16x16", Half, Emulated(Sixteen)),
    ] {
        // Half precision rounds activations, scales and weights by up to 2^-11 of themselves, and each of a pair's 16 sums; an outlier's
        // product carries its whole error.
        let [linear_bound, embed_bound] = if arithmetic == Exact { [1e-12, 1e-13] } else { [5e-6, 5e-7] };
        for checked in [false, true] {
            let label = if checked { format!("{label}-checked") } else { label.to_owned() };
            match GpuBackend::new(GpuOptions { adapter: None, checked, arithmetic, matrices }) {
                Ok(backend) => {
                    let device = Arc::new(Inner { label, backend, linear_bound, embed_bound });
                    linear::add_rows(table, &device);
                    if arithmetic == Exact {
                        add_rows_without_linears(table, &device);
                    }
                }
                Err(error) => {
                    let row = Trial::test(format!("all/{label}: {error}"), move || Err(error.into()));
                    table.rows.push(row.with_ignored_flag(std::env::var_os("METAL_MARLIN_REQUIRE_GPU").is_none()));
                }
            }
        }
    }
}

/// Rows that the arithmetic of linears makes no difference to.
fn add_rows_without_linears<B: Backend>(table: &mut Table, device: &Device<B>) {
    rows::add_rows(table, device);
    attention::add_rows(table, device);
    sampling::add_rows(table, device);
}

/// A backend in one of its variants.
pub(crate) struct Inner<B> {
    label: String,
    backend: B,
    /// Largest NMSE of a linear.
    linear_bound: f64,
    /// Largest NMSE of rows of a table.
    embed_bound: f64,
}

type Device<B> = Arc<Inner<B>>;

/// The rows so far.
pub(crate) struct Table {
    rows: Vec<Trial>,
}

impl Table {
    /// A row of a device.
    fn add<B: Backend>(
        &mut self,
        device: &Device<B>,
        name: String,
        run: impl FnOnce(&Device<B>) -> Result<(), String> + Send + 'static,
    ) {
        let device = device.clone();
        self.add_plain(format!("{name}/{}", device.label), move || run(&device));
    }

    fn add_plain(&mut self, name: String, run: impl FnOnce() -> Result<(), String> + Send + 'static) {
        self.rows.push(Trial::test(name, || run().map_err(Into::into)));
    }
}
