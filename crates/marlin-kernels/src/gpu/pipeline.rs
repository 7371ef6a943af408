//! Kernels from WGSL: constants, bindings and source files put together, compiled.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Write as _;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::device::Gpu;
use super::disk_cache::DiskCache;
use super::unroll::unroll;
use crate::KernelError;

/// The source of a kernel.
#[derive(Debug, Clone)]
pub(super) struct Kernel {
    pub(super) name: &'static str,
    /// What stands before the files: constants, and functions that choose.
    pub(super) prelude: String,
    pub(super) bindings: Vec<Binding>,
    pub(super) files: Vec<&'static str>,
}

/// A storage buffer of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Binding {
    pub(super) name: &'static str,
    pub(super) element: &'static str,
    pub(super) writes: bool,
}

impl Binding {
    pub(super) const fn read(name: &'static str, element: &'static str) -> Self {
        Self { name, element, writes: false }
    }

    pub(super) const fn write(name: &'static str, element: &'static str) -> Self {
        Self { name, element, writes: true }
    }
}

impl Kernel {
    /// The kernel of RMS norms; it adds them to its output if it `adds`.
    pub(super) fn rms_norm(adds: bool) -> Self {
        Self {
            name: "rms_norm",
            prelude: format!("const ADDS = {adds};\n"),
            bindings: vec![Binding::read("x", "f32"), Binding::read("weight", "f32"), Binding::write("out", "f32")],
            files: vec![
                include_str!("shaders/reduce.wgsl"),
                include_str!("shaders/norm.wgsl"),
                include_str!("shaders/rms_norm.wgsl"),
            ],
        }
    }

    /// Rows and columns of the packed matrix that it reads, if it reads one, with these parameters: they begin with its shape.
    pub(super) fn matrix(&self, parameters: &[u32]) -> Option<[usize; 2]> {
        let reads_matrix = self.bindings.first().is_some_and(|binding| binding.name == "codes");
        let &[cols, rows, ..] = parameters else { return None };
        reads_matrix.then_some([rows as usize, cols as usize])
    }

    /// The whole WGSL, its loops unrolled.
    pub(super) fn source(&self) -> String {
        let mut source = String::from("enable f16;\n");
        if self.files.iter().any(|file| file.contains("coop_mat")) {
            source += "enable wgpu_cooperative_matrix;\n";
        }
        for (index, Binding { name, element, writes }) in self.bindings.iter().enumerate() {
            let access = if *writes { "read_write" } else { "read" };
            // Writing to a string does not fail.
            let _ = writeln!(source, "@group(0) @binding({index}) var<storage, {access}> {name}: array<{element}>;");
        }
        source += &self.prelude;
        for file in &self.files {
            source += "\n";
            source += file;
        }
        unroll(&source)
    }
}

/// A compiled kernel.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
    /// What it was made of.
    pub(super) kernel: Kernel,
    /// How long that took.
    pub(super) compiled_in: Duration,
    /// Whether an encoder recorded it for the first time since this was last asked for.
    recorded: AtomicBool,
}

impl Pipeline {
    pub(super) fn compile(
        device: &wgpu::Device,
        kernel: &Kernel,
        source: &str,
        checked: bool,
        immediate_size: u32,
        cache: Option<&DiskCache>,
    ) -> Result<Self, String> {
        let start = Instant::now();
        // Drivers' compilers report what they dislike as internal errors.
        let scopes =
            [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::Internal].map(|filter| device.push_error_scope(filter));
        let descriptor =
            wgpu::ShaderModuleDescriptor { label: Some(kernel.name), source: wgpu::ShaderSource::Wgsl(source.into()) };
        let module = if checked {
            device.create_shader_module(descriptor)
        } else {
            // SAFETY: kernels are this crate's own, index within what their parameters describe, and their loops end. The
            // conformance table runs them with checks, too.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let entry = |(index, binding): (usize, &Binding)| wgpu::BindGroupLayoutEntry {
            binding: index as u32,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only: !binding.writes },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        };
        let entries: Vec<_> = kernel.bindings.iter().enumerate().map(entry).collect();
        let layout =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&layout)],
            immediate_size,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                zero_initialize_workgroup_memory: false,
            },
            cache: cache.map(|kept| &kept.cache),
        });
        // Scopes end in the reverse order of their beginning.
        let errors: Vec<_> = scopes.into_iter().rev().filter_map(|scope| pollster::block_on(scope.pop())).collect();
        match errors.first() {
            None => {
                if let Some(kept) = cache {
                    kept.note_compiled();
                }
                Ok(Self {
                    pipeline,
                    layout,
                    kernel: kernel.clone(),
                    compiled_in: start.elapsed(),
                    recorded: AtomicBool::new(false),
                })
            }
            Some(error) => Err(error.to_string()),
        }
    }

    /// Notes that an encoder records it for the first time.
    pub(super) fn note_recorded(&self) {
        self.recorded.store(true, Ordering::Relaxed);
    }

    /// Whether that was noted since the last call.
    pub(super) fn take_recorded(&self) -> bool {
        self.recorded.swap(false, Ordering::Relaxed)
    }
}

/// Kernels that are compiled when they are first needed, by what they are compiled for.
pub(super) struct Variants<V>(HashMap<V, Arc<Pipeline>>);

impl<V> Default for Variants<V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<V: Copy + Eq + Hash> Variants<V> {
    /// The compiled kernel of a variant.
    pub(super) fn get(
        &mut self,
        gpu: &Gpu,
        variant: V,
        kernel: impl Fn(V) -> Kernel,
    ) -> Result<&Arc<Pipeline>, KernelError> {
        Ok(match self.0.entry(variant) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(gpu.pipeline(&kernel(variant))?),
        })
    }
}
