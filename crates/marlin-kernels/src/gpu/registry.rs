//! Every kernel that a device may be asked to run.
//!
//! No list is kept by hand: the constructors that make a device's kernels run on an imaginary device, which remembers what they ask it
//! to compile.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use marlin_format::Scheme;
use rayon::prelude::*;

use super::attention;
use super::device::Gpu;
use super::encoder::GpuEncoder;
use super::experts;
use super::linear;
use super::pipeline::Kernel;
use super::{GpuArithmetic, GpuBackend, GpuCaps, GpuOptions};
use crate::{KernelError, StepLimits};

/// A kernel as a device compiles it.
#[derive(Debug, Clone)]
pub struct KernelVariant {
    pub(super) kernel: Kernel,
    source: String,
    variant: String,
    formats: Vec<String>,
}

/// Widths of matrices, at least one for every way in which kernels divide a row among invocations: those of models of 0.1 to 70
/// billion parameters.
const WIDTHS: [usize; 9] = [64, 256, 576, 1024, 2560, 4096, 5120, 9728, 28672];
/// Rows of them: few, and more than the tiles for few are made for.
const HEIGHTS: [usize; 2] = [8, 9728];
/// The least of which an encoder can be made.
const LIMITS: StepLimits = StepLimits { tokens: 1, context: 1, width: 1, vocabulary: 1, logit_rows: 1 };

/// The kernels that a device of these capabilities runs for matrices of these schemes, each of which has a name, and for heads of these
/// widths, and for keys and values of these widths where values are part of keys, in the order of their names.
///
/// # Errors
/// If a kernel is no valid WGSL, or asks for more than the capabilities.
pub fn kernels(
    caps: &GpuCaps,
    arithmetic: GpuArithmetic,
    schemes: &[(String, Scheme)],
    head_dims: &[usize],
    latent_dims: &[[usize; 2]],
) -> Result<Vec<KernelVariant>, KernelError> {
    let open = || Gpu::imaginary(caps.clone(), GpuOptions { arithmetic, ..GpuOptions::default() });
    let mut registry = Registry::default();
    let gpu = Arc::new(open()?);
    GpuEncoder::new(gpu.clone(), &LIMITS)?;
    attention::compile(&gpu, head_dims, latent_dims)?;
    experts::compile(&gpu)?;
    registry.add(&gpu, None);
    let of_scheme = |scheme: &Scheme| {
        let gpu = open()?;
        for (rows, cols) in HEIGHTS.into_iter().flat_map(|rows| WIDTHS.map(|cols| (rows, cols))) {
            linear::compile(&gpu, scheme, rows, cols)?;
            linear::compile_groups(&gpu, scheme, rows, cols)?;
        }
        Ok(gpu)
    };
    let gpus = schemes.par_iter().map(|(_, scheme)| of_scheme(scheme)).collect::<Result<Vec<_>, KernelError>>()?;
    gpus.iter().zip(schemes).for_each(|(gpu, (name, _))| registry.add(gpu, Some(name)));
    Ok(registry.into_variants())
}

#[derive(Default)]
struct Registry {
    variants: Vec<KernelVariant>,
    by_source: HashMap<String, usize>,
}

impl Registry {
    /// Takes over what was compiled, for matrices of a format or for all.
    fn add(&mut self, gpu: &Gpu, format: Option<&str>) {
        for variant in gpu.kernels() {
            let source = variant.source.clone();
            let index = *self.by_source.entry(source).or_insert_with(|| {
                self.variants.push(variant);
                self.variants.len() - 1
            });
            self.variants[index].formats.extend(format.map(str::to_owned));
        }
    }

    fn into_variants(mut self) -> Vec<KernelVariant> {
        self.variants.sort_by(|a, b| {
            let key = |it: &KernelVariant| (it.name(), it.formats.clone());
            key(a).cmp(&key(b)).then_with(|| a.source.cmp(&b.source))
        });
        for same in self.variants.chunk_by_mut(|a, b| a.name() == b.name() && a.formats == b.formats) {
            tell_apart(same);
        }
        self.variants
    }
}

/// Names variants of one kernel by the settings that differ among them.
fn tell_apart(variants: &mut [KernelVariant]) {
    let settings: Vec<_> = variants.iter().map(|variant| settings(&variant.kernel)).collect();
    let label = |of_variant: &BTreeMap<&str, &str>| {
        let differs = |name: &str, value: &str| settings.iter().any(|other| other.get(name) != Some(&value));
        let differing = of_variant.iter().filter(|(name, value)| differs(name, value));
        differing.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    };
    let labels: Vec<String> = settings.iter().map(label).collect();
    variants.iter_mut().zip(labels).for_each(|(variant, label)| variant.variant = label);
}

/// Constants before the files of a kernel, and the elements of its bindings, by name.
fn settings(kernel: &Kernel) -> BTreeMap<&str, &str> {
    let lines = kernel.prelude.lines();
    let constants = lines.filter_map(|line| line.strip_prefix("const ")?.strip_suffix(';')?.split_once(" = "));
    // Numbers without their type.
    let constants = constants.map(|(name, value)| (name, value.trim_end_matches(['u', 'i'])));
    constants.chain(kernel.bindings.iter().map(|binding| (binding.name, binding.element))).collect()
}

impl KernelVariant {
    pub(super) fn of(source: String, kernel: Kernel) -> Self {
        Self { kernel, source, variant: String::new(), formats: Vec::new() }
    }

    /// The kernel's name, that of its file.
    pub fn name(&self) -> &'static str {
        self.kernel.name
    }

    /// What tells it from the kernel's other variants for the same formats; empty if there are none.
    pub fn variant(&self) -> &str {
        &self.variant
    }

    /// The formats of matrices that it is for; empty if it reads none.
    pub fn formats(&self) -> &[String] {
        &self.formats
    }

    /// Its WGSL.
    pub fn source(&self) -> &str {
        &self.source
    }
}

impl GpuBackend {
    /// A device that has these capabilities and runs nothing: kernels are put together and checked as for a device that does, memory is
    /// the host's, and operations leave it as it is.
    ///
    /// # Errors
    /// If the options cannot be followed.
    pub fn imaginary(caps: GpuCaps, options: GpuOptions) -> Result<Self, KernelError> {
        Ok(Self { gpu: Arc::new(Gpu::imaginary(caps, options)?) })
    }

    /// What was compiled so far.
    pub fn compiled(&self) -> Vec<KernelVariant> {
        self.gpu.kernels()
    }

    /// Compiles a kernel if that was not done before, and says how long it took.
    ///
    /// # Errors
    /// If the device does not take it.
    pub fn compile(&self, variant: &KernelVariant) -> Result<Duration, KernelError> {
        self.gpu.pipeline(&variant.kernel).map(|pipeline| pipeline.compiled_in)
    }

    /// The sources of the kernels that its encoders have begun to use since the last call: a kernel counts once an encoder.
    pub fn take_used(&self) -> Vec<String> {
        self.gpu.take_recorded()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::conformance::{HEAD_DIMS, LATENT_DIMS, Table, schemes};

    fn registry(caps: &GpuCaps, arithmetic: GpuArithmetic) -> Vec<KernelVariant> {
        kernels(caps, arithmetic, &schemes(), &HEAD_DIMS, &LATENT_DIMS).expect("kernels that compile")
    }

    fn options(arithmetic: GpuArithmetic) -> GpuOptions {
        GpuOptions { arithmetic, ..GpuOptions::default() }
    }

    #[test]
    fn every_kernel_of_the_conformance_table_is_in_the_registry() {
        for arithmetic in [GpuArithmetic::Exact, GpuArithmetic::Half] {
            let mut table = Table::default();
            let backend = GpuBackend::imaginary(GpuCaps::apple(), options(arithmetic)).expect("a device");
            let backend = table.add_imaginary(backend);
            table.into_rows().for_each(|row| drop(row.run()));
            let listed = registry(&GpuCaps::apple(), arithmetic);
            let listed: HashSet<&str> = listed.iter().map(KernelVariant::source).collect();
            let compiled = backend.compiled();
            assert!(compiled.len() > 100, "{} kernels", compiled.len());
            for kernel in compiled {
                assert!(listed.contains(kernel.source()), "{} is not listed:\n{}", kernel.name(), kernel.source());
            }
        }
    }

    #[test]
    fn variants_are_told_apart_and_name_their_formats() {
        let listed = registry(&GpuCaps::apple(), GpuArithmetic::Half);
        let mut names = HashSet::new();
        for kernel in &listed {
            let name = (kernel.name(), kernel.formats(), kernel.variant());
            assert!(names.insert(name), "two variants are called {name:?}");
        }
        let is_linear = |kernel: &&KernelVariant| kernel.name() == "linear_rows";
        let fp4 = listed.iter().filter(is_linear).filter(|kernel| kernel.formats().contains(&"fp4".into()));
        assert!(fp4.clone().count() > 1);
        assert!(fp4.clone().all(|kernel| !kernel.variant().is_empty() && !kernel.formats().contains(&"int4".into())));
        assert!(listed.iter().any(|kernel| kernel.name() == "rms_norm" && kernel.formats().is_empty()));
    }

    #[test]
    fn a_kernel_that_asks_for_more_than_the_capabilities_is_an_error() {
        let caps = GpuCaps { subgroups: false, ..GpuCaps::apple() };
        let gpu = Gpu::imaginary(caps, GpuOptions::default()).expect("a device");
        let file = "@compute @workgroup_size(32) fn main(@builtin(subgroup_size) size: u32) { out[0] = size; }";
        let bindings = vec![super::super::pipeline::Binding::write("out", "u32")];
        let kernel = Kernel { name: "sizes", prelude: String::new(), bindings, files: vec![file] };
        let error = gpu.pipeline(&kernel).expect_err("subgroups are off").to_string();
        assert!(error.contains("sizes") && error.to_lowercase().contains("subgroup"), "{error}");
    }
}
