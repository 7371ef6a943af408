//! Which device a model runs on, and how.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use marlin_checkpoint::Checkpoint;
use marlin_kernels::cpu::{Arithmetic, CpuBackend, CpuOptions, TileFile};
use marlin_kernels::gpu::{GpuArithmetic, GpuBackend, GpuChoice, GpuOptions};
use marlin_kernels::{Backend, DeviceInfo, KernelError, KvType, MemoryUse};
use marlin_model::{ExpertLayers, ExpertOffload, LanguageModel, LoadOptions, ModelError, Planner};

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

    /// Leave the experts of a mixture to the processor, in its memory, and all else to the GPU: cpu for every layer's, or
    /// cpu:LAYERS for those of some, such as cpu:0-11,20,40- (`plan` tells how many let a model fit)
    #[arg(long, value_name = "cpu[:LAYERS]")]
    pub expert_device: Option<ExpertDevice>,

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

/// Experts that are left to the processor, as `--expert-device` names them: those of every layer, or of some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertDevice(pub ExpertLayers);

impl FromStr for ExpertDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cpu:")) {
            ("cpu", _) => Ok(Self(ExpertLayers::All)),
            (_, Some(layers)) => layers.parse().map(Self).map_err(|error: ModelError| error.to_string()),
            _ => Err("must be cpu, or cpu:LAYERS such as cpu:0-11,20,40-".into()),
        }
    }
}

impl fmt::Display for ExpertDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ExpertLayers::All => f.write_str("cpu"),
            layers => write!(f, "cpu:{layers}"),
        }
    }
}

/// An open device.
#[derive(Debug)]
pub enum Device {
    /// The processor.
    Cpu(CpuBackend),
    /// A GPU, and the processor for what is left to it.
    Gpu {
        /// The GPU.
        backend: GpuBackend,
        /// How the processor is used beside it.
        host: CpuOptions,
        /// Experts that are left to the processor.
        offload: Option<ExpertOffload>,
    },
}

impl Device {
    /// What it will take of its memory.
    pub fn memory_use(&self) -> &dyn MemoryUse {
        match self {
            Self::Cpu(backend) => backend,
            Self::Gpu { backend, .. } => backend,
        }
    }

    /// What this device is.
    pub fn info(&self) -> DeviceInfo {
        match self {
            Self::Cpu(backend) => backend.info(),
            Self::Gpu { backend, .. } => backend.info(),
        }
    }

    /// What results depend on beside the model, see [`CpuBackend::numerics`]: what is kept of them is good for devices of which it is the same.
    pub fn numerics(&self) -> String {
        match self {
            Self::Cpu(backend) => backend.numerics(),
            Self::Gpu { backend, offload: None, .. } => backend.numerics(),
            Self::Gpu { backend, offload: Some(ExpertOffload { host, layers }), .. } => {
                format!("{}, experts of layers {layers} on {}", backend.numerics(), host.numerics())
            }
        }
    }

    /// Tells what a checkpoint's model will take on it.
    ///
    /// # Errors
    /// The model is not supported, or lacks the experts that are to be left to the processor.
    pub fn planner<'a>(&'a self, checkpoint: &'a Checkpoint) -> Result<Planner<'a>, ModelError> {
        let planner = Planner::new(self.memory_use(), checkpoint)?;
        match self.offload() {
            Some(ExpertOffload { host, layers }) => planner.with_offload(host, layers),
            None => Ok(planner),
        }
    }

    /// The processor, if it is one.
    pub fn cpu(&self) -> Option<&CpuBackend> {
        match self {
            Self::Cpu(backend) => Some(backend),
            Self::Gpu { .. } => None,
        }
    }

    /// The GPU, if it is one.
    pub fn gpu(&self) -> Option<&GpuBackend> {
        match self {
            Self::Cpu(_) => None,
            Self::Gpu { backend, .. } => Some(backend),
        }
    }

    /// The same device, on which models run whole.
    pub fn without_offload(&self) -> Self {
        match self {
            Self::Cpu(backend) => Self::Cpu(backend.clone()),
            Self::Gpu { backend, host, .. } => Self::Gpu { backend: backend.clone(), host: *host, offload: None },
        }
    }

    /// The experts that a GPU leaves to the processor.
    pub fn offload(&self) -> Option<&ExpertOffload> {
        match self {
            Self::Cpu(_) => None,
            Self::Gpu { offload, .. } => offload.as_ref(),
        }
    }

    /// Bytes that the device's driver lets a program have; `None` if there is no such limit, or it is not known.
    pub fn memory(&self) -> Option<u64> {
        self.gpu().and_then(|gpu| gpu.caps().memory)
    }

    /// Whether it uses the machine's memory, and not its own.
    pub fn shares_memory(&self) -> bool {
        self.memory_use().shares_memory()
    }

    /// Loads a checkpoint's model; linears of the processor come from `tiles` or are kept there. Says on standard error what is converted.
    ///
    /// # Errors
    /// What [`marlin_model::load_model_offloaded`] fails with.
    pub fn load(
        &self,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        tiles: Option<&Arc<TileFile>>,
    ) -> Result<Box<dyn LanguageModel>, ModelError> {
        for conversion in self.planner(checkpoint)?.conversions() {
            eprintln!("warning: {}: {conversion}", checkpoint.name());
        }
        let with_tiles = |cpu: &CpuBackend| tiles.map_or_else(|| cpu.clone(), |file| cpu.with_tiles(Arc::clone(file)));
        match self {
            Self::Cpu(backend) => marlin_model::load_model(&with_tiles(backend), checkpoint, options),
            Self::Gpu { backend, offload, .. } => {
                let offload = offload
                    .as_ref()
                    .map(|offload| ExpertOffload { host: with_tiles(&offload.host), layers: offload.layers.clone() });
                marlin_model::load_model_offloaded(backend, offload.as_ref(), checkpoint, options)
            }
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
        let open_cpu = || {
            if let Some(experts) = &self.expert_device {
                eprintln!("note: the whole model runs on the CPU; --expert-device {experts} changes nothing");
            }
            CpuBackend::new(self.cpu()).map(Device::Cpu)
        };
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
            opened => self.gpu(opened?),
        }
    }

    /// A GPU, with what is left to the processor.
    fn gpu(&self, backend: GpuBackend) -> Result<Device, KernelError> {
        let offload = self.expert_device.as_ref().map(|ExpertDevice(layers)| {
            Ok::<_, KernelError>(ExpertOffload { host: CpuBackend::new(self.cpu())?, layers: layers.clone() })
        });
        Ok(Device::Gpu { backend, host: self.cpu(), offload: offload.transpose()? })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_left_to_the_cpu_by_layers() {
        for text in ["cpu", "cpu:0-11,20,40-", "cpu:7"] {
            assert_eq!(text.parse::<ExpertDevice>().unwrap().to_string(), text);
        }
        for text in ["", "gpu", "cpu:", "cpu:3-1", "cpu,3", "CPU", "cpu:all", "0-11"] {
            let error = text.parse::<ExpertDevice>().unwrap_err();
            assert!(error.contains("0-11,20,40-"), "{text}: {error}");
        }
    }
}
