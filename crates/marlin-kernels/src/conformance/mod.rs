//! The conformance table: operation × format × shape class × backend, each row a check against the reference.
//!
//! ```no_run
//! # fn main() -> Result<(), marlin_kernels::KernelError> {
//! use marlin_kernels::conformance::Table;
//! use marlin_kernels::gpu::GpuOptions;
//!
//! let mut table = Table::default();
//! table.add_gpu(GpuOptions::default())?;
//! for row in table.into_rows().filter(|row| row.name().contains("linear/fp4")) {
//!     let name = row.name().to_owned();
//!     let outcome = row.run();
//!     println!("{name}: {:?} in {:?}", outcome.result, outcome.duration);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A row covers a list of shapes and names the first that fails. Outputs, caches and scratch memory hold NaN before an
//! operation runs. Errors are bounded as NMSE, the mean squared error over the mean square of what is expected.
//!
//! A new operation is a `support::Case` and a call of `Table::add`; a new backend a method like [`Table::add_cpu`]; a new format an
//! entry of `matrices::schemes`.

mod attention;
mod experts;
mod independence;
mod latent;
mod linear;
pub(crate) mod matrices;
mod rows;
mod sampling;
pub(crate) mod support;

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::attention::HEAD_DIMS;
pub use self::latent::LATENT_DIMS;
pub use self::matrices::schemes;

#[cfg(test)]
pub(crate) use self::matrices::random;
#[cfg(test)]
pub(crate) use self::support::{Rng, limits, mean_square, poisoned, read, upload};
use crate::cpu::{Arithmetic, CpuBackend, CpuOptions, SimdLevel};
use crate::gpu::{GpuArithmetic, GpuBackend, GpuMatrices, GpuOptions, MatrixSize};
use crate::{Backend, KernelError};

/// One scheme for each kind of inner loop.
const QUICK_SCHEMES: [&str; 5] = ["fp4", "int4", "int3", "bf16", "fp4-2of4"];

/// Rows of the devices that were added.
#[derive(Default)]
pub struct Table {
    rows: Vec<Row>,
}

/// One check.
pub struct Row {
    name: String,
    is_slow: bool,
    run: Box<dyn FnOnce() -> Checked + Send>,
}

/// What a row found, and the error nearest to its bound.
type Checked = (Result<(), String>, Option<ErrorFound>);

/// What became of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// What failed first, if anything did.
    pub result: Result<(), String>,
    /// Of the cases that gave numbers, the error nearest to its bound or furthest beyond; `None` where nothing is compared with the
    /// reference.
    pub error: Option<ErrorFound>,
    /// How long it took, the reference included.
    pub duration: Duration,
}

/// An error as mean squared error over mean square of what was expected.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ErrorFound {
    /// The error.
    pub nmse: f64,
    /// The largest that passes.
    pub bound: f64,
}

impl ErrorFound {
    /// Whether it is nearer to its bound, or further beyond.
    pub fn is_nearer_than(&self, other: &Self) -> bool {
        // Without dividing: bounds may be 0.
        self.nmse * other.bound > other.nmse * self.bound
    }

    /// The error as a share of its bound; `None` where none is allowed.
    pub fn share(self) -> Option<f64> {
        (self.bound > 0.0).then(|| self.nmse / self.bound)
    }
}

impl Table {
    /// Adds the rows of a processor. Rows without linears come with [`Arithmetic::Exact`] alone: the arithmetic makes no difference to
    /// them.
    ///
    /// # Errors
    /// If this processor cannot be what the options ask for.
    pub fn add_cpu(&mut self, options: CpuOptions) -> Result<(), KernelError> {
        let arithmetic = options.arithmetic;
        let simd = options.simd.unwrap_or_else(SimdLevel::detect);
        // Int8 with a scale per 32 values of a normal distribution, whose largest is about 2.1 σ, costs
        // (2.1 / 127)² / 12 = 2.3e-5.
        let (suffix, linear) = match arithmetic {
            Arithmetic::Exact => ("", 1e-12),
            Arithmetic::Int8 => ("-int8", 1e-4),
        };
        let bounds = Bounds { linear, embed: 1e-13, share: 0.0 };
        let device = Device {
            // These levels differ from the one below in products of integers alone.
            is_variant: arithmetic == Arithmetic::Exact && matches!(simd, SimdLevel::NeonDotprod | SimdLevel::NeonI8mm),
            ..Device::new(format!("cpu-{simd}{suffix}"), CpuBackend::new(options)?, bounds)
        };
        self.add_device(&device, arithmetic == Arithmetic::Exact);
        if arithmetic == Arithmetic::Exact {
            attention::add_odd_rows(self, &device);
        }
        Ok(())
    }

    /// Adds the rows of a GPU, which it gives back. Rows without linears come with [`GpuArithmetic::Exact`] alone: the arithmetic makes
    /// no difference to them. For [`GpuMatrices::Emulated`] there are those rows alone that multiply such matrices.
    ///
    /// # Errors
    /// If it does not open.
    pub fn add_gpu(&mut self, options: GpuOptions) -> Result<Arc<GpuBackend>, KernelError> {
        let (arithmetic, matrices, label) = (options.arithmetic, options.matrices, gpu_label(&options));
        // Half precision rounds activations, scales and weights by up to 2^-11 of themselves, and each of a pair's 16 sums; an outlier's
        // product carries its whole error.
        let bounds = match arithmetic {
            GpuArithmetic::Exact => Bounds { linear: 1e-12, embed: 1e-13, share: 1e-5 },
            GpuArithmetic::Half => Bounds { linear: 5e-6, embed: 5e-7, share: 1e-5 },
        };
        let device = Device {
            emulates_matrices: matrices != GpuMatrices::Device,
            is_variant: options.checked,
            ..Device::new(label, GpuBackend::new(options.clone())?, bounds)
        };
        let device = device.with_heavy_rows(options.checked);
        match matrices {
            GpuMatrices::Device => {
                self.add_device(&device, arithmetic == GpuArithmetic::Exact);
                if !options.checked {
                    let invariant = Arc::new(GpuBackend::new(GpuOptions { batch_invariant: true, ..options })?);
                    independence::add_gpu_rows(self, &device.backend, &invariant, &device.label);
                }
            }
            GpuMatrices::Emulated(_) => {
                linear::add_rows_of_many(self, &device);
                experts::add_rows_of_many(self, &device);
            }
        }
        if arithmetic == GpuArithmetic::Half && device.backend.multiplies_matrices() {
            // Compilers take minutes for wide heads where matrices are emulated: the smaller the matrices, the more of them there are.
            let dims = match matrices {
                GpuMatrices::Device => &[64, 80, 96, 128, 192, 256][..],
                GpuMatrices::Emulated(MatrixSize::Sixteen) => &[32, 80],
                GpuMatrices::Emulated(MatrixSize::Eight) => &[32],
            };
            attention::add_tiled_rows(self, &device, dims);
            latent::add_tiled_rows(self, &device);
        }
        Ok(device.backend)
    }

    /// Adds the rows of a device that computes nothing, which compare nothing.
    #[cfg(test)]
    pub(crate) fn add_imaginary(&mut self, backend: GpuBackend) -> Arc<GpuBackend> {
        let device = Device {
            compares: false,
            ..Device::new("imaginary".into(), backend, Bounds { linear: 0.0, embed: 0.0, share: 0.0 })
        };
        self.add_device(&device, true);
        device.backend
    }

    /// Adds rows that hold for every instruction set of this processor: a row's result is bitwise the same alone, in any batch, and on
    /// any number of threads.
    pub fn add_independence(&mut self) {
        independence::add_rows(self);
    }

    /// The rows, in the order of the table.
    pub fn into_rows(self) -> impl Iterator<Item = Row> {
        self.rows.into_iter()
    }

    fn add_device<B: Backend>(&mut self, device: &Device<B>, is_exact: bool) {
        linear::add_rows(self, device);
        experts::add_rows(self, device);
        if is_exact {
            rows::add_rows(self, device);
            experts::add_router_rows(self, device);
            attention::add_rows(self, device);
            latent::add_rows(self, device);
            sampling::add_rows(self, device);
        }
    }

    /// A row of a device.
    fn add<B: Backend>(
        &mut self,
        device: &Device<B>,
        name: String,
        run: impl FnOnce(&Device<B>) -> Result<(), String> + Send + 'static,
    ) {
        let name = format!("{name}/{}", device.label);
        let device = device.for_row();
        let is_slow = device.is_slow;
        let run = Box::new(move || (run(&device), device.error.get()));
        self.rows.push(Row { name, is_slow, run });
    }

    /// A row that compares with something else than the reference.
    fn add_plain(&mut self, name: String, run: impl FnOnce() -> Result<(), String> + Send + 'static) {
        self.rows.push(Row { name, is_slow: false, run: Box::new(move || (run(), None)) });
    }
}

/// What rows of a GPU end with.
pub fn gpu_label(options: &GpuOptions) -> String {
    let arithmetic = match options.arithmetic {
        GpuArithmetic::Exact => "",
        GpuArithmetic::Half => "-half",
    };
    let matrices = match options.matrices {
        GpuMatrices::Device => "",
        GpuMatrices::Emulated(MatrixSize::Eight) => "-8x8",
        GpuMatrices::Emulated(MatrixSize::Sixteen) => "-16x16",
    };
    format!("gpu{arithmetic}{matrices}{}", if options.checked { "-checked" } else { "" })
}

impl Row {
    /// Operation, case, and device: `linear-add/fp4-g32/gpu-half`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// It takes long on a software device or where matrix units are emulated, or is one of many that show the same: not for every day.
    pub fn is_slow(&self) -> bool {
        self.is_slow
    }

    /// Runs it. An operation that panics has failed.
    pub fn run(self) -> Outcome {
        let start = Instant::now();
        let (result, error) = panic::catch_unwind(AssertUnwindSafe(self.run))
            .unwrap_or_else(|panic| (Err(format!("it panicked: {}", panic_message(&*panic))), None));
        Outcome { result, error, duration: start.elapsed() }
    }
}

/// What a panic says.
fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&str>().copied();
    literal.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

/// Largest NMSE of a device.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Of a linear of few columns.
    linear: f64,
    /// Of rows of an embedding table.
    embed: f64,
    /// How far a share of probabilities may be off when a token is chosen by it.
    share: f32,
}

/// A backend in one of its variants, as a row sees it.
struct Device<B> {
    label: Arc<str>,
    backend: Arc<B>,
    bounds: Bounds,
    /// Results are compared with the reference.
    compares: bool,
    /// It plays matrix units by plain arithmetic.
    emulates_matrices: bool,
    /// Its kernels are those of another device but for details that do not depend on how weights are stored: a few schemes show them.
    is_variant: bool,
    /// Its rows take minutes each.
    is_slow: bool,
    /// The error nearest to its bound so far.
    error: Cell<Option<ErrorFound>>,
}

impl<B> Device<B> {
    fn new(label: String, backend: B, bounds: Bounds) -> Self {
        Self {
            label: label.into(),
            backend: Arc::new(backend),
            bounds,
            compares: true,
            emulates_matrices: false,
            is_variant: false,
            is_slow: false,
            error: Cell::default(),
        }
    }

    /// The same device, for another row.
    fn for_row(&self) -> Self {
        Self { label: self.label.clone(), backend: self.backend.clone(), error: Cell::default(), ..*self }
    }

    /// The same device, for rows that are heavy or not: compilers take minutes for emulated matrices of each scheme, tile and width.
    fn with_heavy_rows(&self, are_heavy: bool) -> Self {
        self.with_slow_rows(self.emulates_matrices && are_heavy)
    }

    /// The same device, for rows of this scheme: where few schemes show all there is to see, those of others are not for every day.
    fn for_scheme(&self, name: &str, few_suffice: bool) -> Self {
        self.with_slow_rows((self.is_variant || few_suffice) && !QUICK_SCHEMES.contains(&name))
    }

    /// The same device, for rows that take long or not.
    fn with_slow_rows(&self, are_slow: bool) -> Self {
        Self { is_slow: self.is_slow || are_slow, ..self.for_row() }
    }

    /// Keeps the error if it is the nearest to its bound.
    fn note(&self, error: ErrorFound) {
        if self.error.get().is_none_or(|nearest| error.is_nearer_than(&nearest)) {
            self.error.set(Some(error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(table: Table, name: &str) -> Outcome {
        table.into_rows().find(|row| row.name() == name).expect("a row of this name").run()
    }

    fn int8_within(linear: f64) -> Outcome {
        let options = CpuOptions { threads: Some(1), arithmetic: Arithmetic::Int8, simd: Some(SimdLevel::Portable) };
        let backend = CpuBackend::new(options).unwrap();
        let mut table = Table::default();
        table.add_device(&Device::new("cpu".into(), backend, Bounds { linear, embed: 1e-13, share: 0.0 }), false);
        outcome(table, "linear/int4/cpu")
    }

    #[test]
    fn rows_tell_their_largest_error_and_fail_beyond_the_bound() {
        let Outcome { result, error, .. } = int8_within(1e-4);
        let error = error.expect("a comparison");
        assert_eq!(result, Ok(()));
        assert!(1e-7 < error.nmse && error.nmse <= error.bound, "{error:?}");

        let Outcome { result, error, .. } = int8_within(1e-9);
        let error = error.expect("a comparison");
        assert!(error.nmse > error.bound, "{error:?}");
        assert!(result.unwrap_err().contains("exceeds"));
    }

    #[test]
    fn a_row_that_panics_has_failed() {
        let mut table = Table::default();
        table.add_plain("panics".into(), || panic!("value {}", 7));
        assert_eq!(outcome(table, "panics").result, Err("it panicked: value 7".into()));
    }
}
