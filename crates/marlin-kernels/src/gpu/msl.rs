//! Kernels as Metal gets them, on any platform.
//!
//! Metal's compiler sees what naga makes of WGSL. The translation here is given the options that wgpu gives it on a Mac, so that what
//! would be slow or wrong there can be found without one.

use std::collections::HashSet;

use marlin_format::Scheme;
use naga::back::msl;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Expression, Function, Handle, Module, ResourceBinding, Statement, Type, TypeInner};

use super::registry::{KernelVariant, kernels};
use super::{GpuArithmetic, GpuCaps};
use crate::KernelError;

/// The version of Metal's language: that of macOS 14.
const LANGUAGE: (u8, u8) = (3, 1);

/// The multiplication of Metal's matrix units.
const MULTIPLY: &str = "simdgroup_multiply_accumulate";

/// A kernel in Metal's language.
#[derive(Debug, Clone)]
pub struct Msl {
    /// The source that Metal compiles.
    pub source: String,
    /// What would make it slow or wrong.
    pub faults: Vec<String>,
}

/// Which checks naga writes into a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Checks {
    /// None, as a device compiles kernels.
    None,
    /// All of them, as wgpu would by itself.
    #[cfg(test)]
    All,
}

impl KernelVariant {
    /// Translates it into Metal's language, and looks for what would make it slow or wrong there: checks of indices, loops and
    /// divisions, zeroing of workgroup memory, and what Metal's compiler is known to get wrong.
    ///
    /// # Errors
    /// If it cannot be translated.
    pub fn msl(&self) -> Result<Msl, KernelError> {
        let buffers = self.kernel.bindings.iter().map(|binding| binding.writes);
        translate(self.source(), buffers, Checks::None)
            .map_err(|reason| KernelError::Device(format!("the kernel {} does not become MSL: {reason}", self.name())))
    }
}

/// The [`kernels`] of an Apple GPU, in Metal's language. A kernel that is there for matrix units' sake and
/// does not multiply with them has that as a fault, too.
///
/// # Errors
/// As for [`kernels`] and [`KernelVariant::msl`].
pub fn metal_kernels(
    arithmetic: GpuArithmetic,
    schemes: &[(String, Scheme)],
    head_dims: &[usize],
    latent_dims: &[[usize; 2]],
) -> Result<Vec<(KernelVariant, Msl)>, KernelError> {
    let without_matrices = GpuCaps { matrices: Vec::new(), ..GpuCaps::apple() };
    let without_matrices = kernels(&without_matrices, arithmetic, schemes, head_dims, latent_dims)?;
    let without_matrices: HashSet<&str> = without_matrices.iter().map(KernelVariant::source).collect();
    let translated =
        kernels(&GpuCaps::apple(), arithmetic, schemes, head_dims, latent_dims)?.into_iter().map(|kernel| {
            let mut msl = kernel.msl()?;
            let is_for_matrices = !without_matrices.contains(kernel.source());
            msl.faults.extend(fault_of_matrices(is_for_matrices, kernel.name(), &msl.source));
            Ok((kernel, msl))
        });
    translated.collect()
}

/// Kernels that prepare input for matrix units do not multiply themselves.
fn fault_of_matrices(is_for_matrices: bool, name: &str, source: &str) -> Option<String> {
    let is_faulty = is_for_matrices && !name.starts_with("pack") && !source.contains(MULTIPLY);
    is_faulty.then(|| "it does not multiply with the matrix units that it is for".to_owned())
}

/// `writes` says of each buffer whether it is written.
fn translate(wgsl: &str, writes: impl Iterator<Item = bool>, checks: Checks) -> Result<Msl, String> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|error| error.emit_to_string(wgsl))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .validate(&module)
        .map_err(|error| error.emit_to_string(wgsl))?;
    let pipeline = msl::PipelineOptions {
        entry_point: Some((naga::ShaderStage::Compute, "main".into())),
        ..msl::PipelineOptions::default()
    };
    let (source, translation) =
        msl::write_string(&module, &info, &options(writes, checks), &pipeline).map_err(|error| error.to_string())?;
    for entry_point in translation.entry_point_names {
        entry_point.map_err(|error| error.to_string())?;
    }
    let faults = faults_of_source(&source).into_iter().chain(faults_of_calls(&module, &info)).collect();
    Ok(Msl { source, faults })
}

/// Those of wgpu's Metal device: immediates in the first buffer, bindings in those that follow, sizes of buffers in the last.
fn options(writes: impl Iterator<Item = bool>, checks: Checks) -> msl::Options {
    let is_checked = checks != Checks::None;
    let policy = if is_checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
    let buffer = |(binding, mutable): (u32, bool)| {
        let target = msl::BindTarget { buffer: Some(binding as u8 + 1), mutable, ..msl::BindTarget::default() };
        (ResourceBinding { group: 0, binding }, target)
    };
    let resources: msl::BindingMap = (0..).zip(writes).map(buffer).collect();
    let sizes_buffer = Some(resources.len() as u8 + 1);
    let resources = msl::EntryPointResources { resources, immediates_buffer: Some(0), sizes_buffer };
    msl::Options {
        lang_version: LANGUAGE,
        per_entry_point_map: msl::EntryPointResourceMap::from([("main".into(), resources)]),
        fake_missing_bindings: false,
        bounds_check_policies: BoundsCheckPolicies {
            index: policy,
            buffer: policy,
            image_load: policy,
            binding_array: BoundsCheckPolicy::Unchecked,
        },
        zero_initialize_workgroup_memory: is_checked,
        force_loop_bounding: is_checked,
        emit_int_div_checks: is_checked,
        ..msl::Options::default()
    }
}

/// Checks and zeroing, which naga writes in these words.
fn faults_of_source(source: &str) -> Vec<String> {
    // A declaration has a type before the name.
    let is_zeroing = |line: &str| line.trim().strip_suffix(" = {};").is_some_and(|name| !name.contains(' '));
    let has = |words: &[&str]| words.iter().any(|word| source.contains(word));
    let faults = [
        (has(&["metal::min(unsigned(", "(_buffer_sizes."]), "it clamps indices"),
        (has(&["loop_bound"]), "it counts the rounds of loops"),
        (has(&["naga_div(", "naga_mod("]), "it checks divisors"),
        (source.lines().any(is_zeroing), "it zeroes workgroup memory"),
    ];
    faults.into_iter().filter(|(found, _)| *found).map(|(_, fault)| fault.to_owned()).collect()
}

/// Calls that Metal's compiler has got wrong: arrays of matrices as arguments, and arrays of workgroup memory passed by value.
fn faults_of_calls(module: &Module, info: &ModuleInfo) -> Vec<String> {
    let mut faults = Vec::new();
    for (_, function) in module.functions.iter() {
        for argument in function.arguments.iter().filter(|argument| is_array_of_matrices(module, argument.ty, false)) {
            faults.push(format!(
                "its function {} takes an array of matrices as {}",
                name(&function.name),
                name(&argument.name)
            ));
        }
    }
    let of_functions = module.functions.iter().map(|(handle, function)| (function, &info[handle]));
    let entry_points = module.entry_points.iter().enumerate();
    let of_entry_points = entry_points.map(|(index, entry_point)| (&entry_point.function, info.get_entry_point(index)));
    for (function, function_info) in of_functions.chain(of_entry_points) {
        let is_workgroup = |pointer: Handle<Expression>| {
            function_info[pointer].ty.inner_with(&module.types).pointer_space() == Some(AddressSpace::WorkGroup)
        };
        for_each_call(&function.body, &mut |called, arguments| {
            for &argument in arguments {
                let is_array = matches!(function_info[argument].ty.inner_with(&module.types), TypeInner::Array { .. });
                if is_array && loads(function, argument, &is_workgroup) {
                    let called = name(&module.functions[called].name);
                    faults.push(format!("it passes an array of workgroup memory to its function {called} by value"));
                }
            }
        });
    }
    faults
}

fn name(name: &Option<String>) -> &str {
    name.as_deref().unwrap_or("without a name")
}

/// Whether a type holds matrices within an array.
fn is_array_of_matrices(module: &Module, ty: Handle<Type>, in_array: bool) -> bool {
    match &module.types[ty].inner {
        TypeInner::CooperativeMatrix { .. } | TypeInner::Matrix { .. } => in_array,
        TypeInner::Array { base, .. } => is_array_of_matrices(module, *base, true),
        TypeInner::Pointer { base, .. } => is_array_of_matrices(module, *base, in_array),
        TypeInner::Struct { members, .. } => {
            members.iter().any(|member| is_array_of_matrices(module, member.ty, in_array))
        }
        _ => false,
    }
}

/// Whether an expression is a load through such a pointer, or a part of one.
fn loads(function: &Function, expression: Handle<Expression>, is_wanted: &impl Fn(Handle<Expression>) -> bool) -> bool {
    match function.expressions[expression] {
        Expression::Load { pointer } => is_wanted(pointer),
        Expression::Access { base, .. } | Expression::AccessIndex { base, .. } => loads(function, base, is_wanted),
        _ => false,
    }
}

fn for_each_call(block: &naga::Block, visit: &mut impl FnMut(Handle<Function>, &[Handle<Expression>])) {
    for statement in block {
        match statement {
            Statement::Call { function, arguments, .. } => visit(*function, arguments),
            Statement::Block(block) => for_each_call(block, visit),
            Statement::If { accept, reject, .. } => {
                [accept, reject].iter().for_each(|block| for_each_call(block, visit))
            }
            Statement::Switch { cases, .. } => cases.iter().for_each(|case| for_each_call(&case.body, visit)),
            Statement::Loop { body, continuing, .. } => {
                [body, continuing].iter().for_each(|block| for_each_call(block, visit));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{HEAD_DIMS, LATENT_DIMS, schemes};

    fn msl(wgsl: &str, checks: Checks) -> Msl {
        translate(wgsl, [true].into_iter(), checks).expect("a kernel")
    }

    #[test]
    fn every_kernel_becomes_sound_msl() {
        for arithmetic in [GpuArithmetic::Exact, GpuArithmetic::Half] {
            for (kernel, msl) in
                metal_kernels(arithmetic, &schemes(), &HEAD_DIMS, &LATENT_DIMS).expect("kernels in MSL")
            {
                let what = format!("{} {} for {:?}", kernel.name(), kernel.variant(), kernel.formats());
                assert!(msl.faults.is_empty(), "{what}: {:?}\n{}", msl.faults, msl.source);
            }
        }
    }

    #[test]
    fn checks_and_zeroing_are_found() {
        let wgsl = "
            @group(0) @binding(0) var<storage, read_write> out: array<u32>;
            struct Params { k: u32 }
            var<immediate> params: Params;
            var<workgroup> tile: array<u32, 64>;
            @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) index: u32) {
                var local: array<u32, 4>;
                for (var i = 0u; i < params.k; i++) { tile[i] = i / params.k + local[i % params.k]; }
                workgroupBarrier();
                out[index + params.k] = tile[index];
            }";
        let found = msl(wgsl, Checks::All);
        for fault in ["clamps", "rounds of loops", "divisors", "zeroes"] {
            let is_found = found.faults.iter().any(|found| found.contains(fault));
            assert!(is_found, "{fault} is not among {:?}:\n{}", found.faults, found.source);
        }
        let unchecked = msl(wgsl, Checks::None);
        assert_eq!(unchecked.faults, Vec::<String>::new(), "{}", unchecked.source);
    }

    #[test]
    fn clamps_of_buffers_alone_are_found() {
        let wgsl = "
            @group(0) @binding(0) var<storage, read_write> out: array<u32>;
            @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) index: u32) { out[index] = 0u; }";
        assert_eq!(msl(wgsl, Checks::All).faults, ["it clamps indices"]);
        assert!(msl(wgsl, Checks::None).faults.is_empty());
    }

    #[test]
    fn calls_that_metal_gets_wrong_are_found() {
        let wgsl = "
            @group(0) @binding(0) var<storage, read_write> out: array<f32>;
            var<workgroup> tile: array<array<f32, 4>, 2>;
            var<workgroup> whole: array<f32, 4>;
            fn sum(values: array<f32, 4>) -> f32 { return values[0] + values[3]; }
            fn trace(matrices: array<mat2x2<f32>, 2>) -> f32 { return matrices[0][0].x; }
            @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) index: u32) {
                tile[index % 2u][0] = 1.0;
                workgroupBarrier();
                let local = array<f32, 4>(1.0, 2.0, 3.0, 4.0);
                out[0] = sum(local);
                if (index == 0u) { out[1] = sum(tile[index]) + sum(whole); }
                out[2] = trace(array<mat2x2<f32>, 2>());
            }";
        let by_value = "it passes an array of workgroup memory to its function sum by value";
        let matrices = "its function trace takes an array of matrices as matrices";
        assert_eq!(msl(wgsl, Checks::None).faults, [matrices, by_value, by_value]);
    }

    #[test]
    fn kernels_for_matrix_units_must_multiply_with_them() {
        let wgsl = "
            enable wgpu_cooperative_matrix;
            @group(0) @binding(0) var<storage, read_write> out: array<f32>;
            @compute @workgroup_size(32) fn main() {
                let a = coopLoad<coop_mat8x8<f32, A>>(&out[0], 8u);
                let b = coopLoad<coop_mat8x8<f32, B>>(&out[64], 8u);
                let c = coopLoad<coop_mat8x8<f32, C>>(&out[128], 8u);
                coopStore(coopMultiplyAdd(a, b, c), &out[0], 8u);
            }";
        let fault =
            |is_for_matrices, name, wgsl| fault_of_matrices(is_for_matrices, name, &msl(wgsl, Checks::None).source);
        assert_eq!(fault(true, "linear", wgsl), None);
        let plain = "
            @group(0) @binding(0) var<storage, read_write> out: array<f32>;
            @compute @workgroup_size(32) fn main() { out[0] = 1.0; }";
        assert!(fault(true, "linear", plain).is_some());
        assert_eq!(fault(true, "pack_input", plain), None);
        assert_eq!(fault(false, "linear", plain), None);
    }

    #[test]
    fn what_is_no_wgsl_is_an_error() {
        for wgsl in ["fn main(", "@compute @workgroup_size(1) fn main() { undefined(); }", "fn other() {}"] {
            assert!(translate(wgsl, [].into_iter(), Checks::None).is_err(), "{wgsl}");
        }
    }
}
