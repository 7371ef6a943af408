//! Which device a model runs on, and how.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use marlin_checkpoint::Checkpoint;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions};
use marlin_kernels::gpu::{GpuArithmetic, GpuBackend, GpuChoice, GpuOptions};
use marlin_kernels::{KernelError, KvType, MemoryUse};
use marlin_model::{LanguageModel, LoadOptions, ModelError};

use crate::model_cache::ModelCache;

/// Each thread has memory of its own, so that a slip of the finger could take all there is.
const MOST_THREADS: usize = 1024;

/// The device options that every command shares.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceOptions {
    /// Where the model runs: cpu, gpu (Metal or Vulkan; gpu:1 for the second one, as `doctor` counts them), or auto for a
    /// GPU if there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,

    /// CPU threads [default: one for each performance core]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    pub threads: Option<NonZeroUsize>,

    /// Keep activations in f32 instead of rounding them, to int8 on a CPU and to f16 on a GPU, before each matrix product:
    /// slower, closer to the original
    #[arg(long)]
    pub exact: bool,

    /// Make a sequence's results on a GPU the same to the bit whatever else it computes, as they are on a CPU: much slower
    /// for long prompts and many sequences
    #[arg(long)]
    pub batch_invariant: bool,
}

/// Which device, as `--device` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// A GPU if there is one, or else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A GPU by its index, or the first.
    Gpu(Option<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("gpu:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("gpu", _) => Ok(Self::Gpu(None)),
            (_, Some(Ok(index))) => Ok(Self::Gpu(Some(index))),
            _ => Err("devices are auto, cpu, gpu and gpu:N".into()),
        }
    }
}

/// An open device.
#[derive(Debug)]
pub enum Device {
    /// The processor.
    Cpu(CpuBackend),
    /// A GPU.
    Gpu(GpuBackend),
}

impl Device {
    /// What it will take of its memory.
    pub fn memory_use(&self) -> &dyn MemoryUse {
        match self {
            Self::Cpu(backend) => backend,
            Self::Gpu(backend) => backend,
        }
    }

    /// The processor, if it is one.
    pub fn cpu(&self) -> Option<&CpuBackend> {
        match self {
            Self::Cpu(backend) => Some(backend),
            Self::Gpu(_) => None,
        }
    }

    /// The GPU, if it is one.
    pub fn gpu(&self) -> Option<&GpuBackend> {
        match self {
            Self::Cpu(_) => None,
            Self::Gpu(backend) => Some(backend),
        }
    }

    /// Bytes that the device's driver lets a program have; `None` if there is no such limit, or it is not known.
    pub fn memory(&self) -> Option<u64> {
        self.gpu().and_then(|gpu| gpu.caps().memory)
    }

    /// Whether it uses the machine's memory, and not its own.
    pub fn shares_memory(&self) -> bool {
        self.gpu().is_none_or(|gpu| gpu.caps().shares_memory)
    }

    /// Loads a checkpoint's model.
    ///
    /// # Errors
    /// What [`marlin_model::load_model`] fails with.
    pub fn load(&self, checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Box<dyn LanguageModel>, ModelError> {
        match self {
            Self::Cpu(backend) => marlin_model::load_model(backend, checkpoint, options),
            Self::Gpu(backend) => marlin_model::load_model(backend, checkpoint, options),
        }
    }
}

/// Whether it is worth asking for GPUs. On Linux they are files; where there are none, Vulkan's layers only take time, and complain to standard
/// error about displays that are not there.
fn may_have_gpu() -> bool {
    // Of the kernel's own drivers, of NVIDIA's, of Windows' subsystem, and of some phones' and boards'.
    const FILES: [&str; 5] = ["/dev/dri", "/dev/nvidiactl", "/dev/dxg", "/dev/kgsl-3d0", "/dev/mali0"];
    !cfg!(target_os = "linux") || FILES.iter().any(|file| Path::new(file).exists())
}

impl DeviceOptions {
    /// Opens the device.
    ///
    /// # Errors
    /// There is no such device, or it lacks what is needed of it.
    pub fn open(&self) -> Result<Device, KernelError> {
        let open_cpu = || CpuBackend::new(self.cpu()).map(Device::Cpu);
        let adapter = match self.device {
            DeviceChoice::Gpu(index) => index.into(),
            DeviceChoice::Auto if may_have_gpu() => GpuChoice::FirstHardware,
            DeviceChoice::Auto | DeviceChoice::Cpu => return open_cpu(),
        };
        let options = GpuOptions {
            adapter,
            arithmetic: if self.exact { GpuArithmetic::Exact } else { GpuArithmetic::Half },
            batch_invariant: self.batch_invariant,
            pipeline_cache: kernels_folder(),
            ..GpuOptions::default()
        };
        match GpuBackend::new(options) {
            Err(KernelError::NoGpu) if self.device == DeviceChoice::Auto => open_cpu(),
            Err(error) if self.device == DeviceChoice::Auto => {
                eprintln!("warning: the GPU cannot be used, the CPU is: {error}");
                open_cpu()
            }
            opened => opened.map(Device::Gpu),
        }
    }

    /// How the CPU is used.
    pub fn cpu(&self) -> CpuOptions {
        CpuOptions {
            threads: self.threads.map(NonZeroUsize::get),
            arithmetic: if self.exact { Arithmetic::Exact } else { Arithmetic::Int8 },
            ..CpuOptions::default()
        }
    }
}

/// Where compiled kernels are kept; `None` if there is no place for them.
pub(crate) fn kernels_folder() -> Option<PathBuf> {
    ModelCache::from_env().ok().map(|cache| cache.kernels_folder())
}

/// Number format of cached keys and values, as `--kv` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum KvFormat {
    /// Half precision
    F16,
    /// Single precision
    F32,
    /// Floats of 8 bits, a scale for each head of a token
    Fp8,
    /// Integers of 8 bits, a scale for each head of a token
    Int8,
    /// Floats of 4 bits, a scale for each 32 values
    Fp4,
}

impl From<KvFormat> for KvType {
    fn from(format: KvFormat) -> Self {
        match format {
            KvFormat::F16 => Self::F16,
            KvFormat::F32 => Self::F32,
            KvFormat::Fp8 => Self::Fp8,
            KvFormat::Int8 => Self::Int8,
            KvFormat::Fp4 => Self::Fp4,
        }
    }
}

/// Parses a number of threads from 1 to 1024.
pub fn parse_threads(text: &str) -> Result<NonZeroUsize, String> {
    let threads = text.parse().ok().filter(|threads: &NonZeroUsize| threads.get() <= MOST_THREADS);
    threads.ok_or_else(|| format!("must be a number from 1 to {MOST_THREADS}"))
}
