//! Which device a model runs on, and how.

use std::num::NonZeroUsize;

use marlin_kernels::KvType;
use marlin_kernels::cpu::{Arithmetic, CpuOptions};

/// Each thread has memory of its own, so that a slip of the finger could take all there is.
const MOST_THREADS: usize = 1024;

/// The device options that every command shares.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceOptions {
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    pub threads: Option<NonZeroUsize>,

    /// Keep activations in f32 instead of rounding them to int8 before each matrix product: slower, closer to the
    /// original
    #[arg(long)]
    pub exact: bool,
}

impl DeviceOptions {
    /// How the CPU is used.
    pub fn cpu(&self) -> CpuOptions {
        CpuOptions {
            threads: self.threads.map(NonZeroUsize::get),
            arithmetic: if self.exact { Arithmetic::Exact } else { Arithmetic::Int8 },
            ..CpuOptions::default()
        }
    }
}

/// Number format of cached keys and values, as `--kv` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum KvFormat {
    /// Half precision
    F16,
    /// Single precision
    F32,
}

impl From<KvFormat> for KvType {
    fn from(format: KvFormat) -> Self {
        match format {
            KvFormat::F16 => Self::F16,
            KvFormat::F32 => Self::F32,
        }
    }
}

/// Parses a number of threads from 1 to 1024.
pub fn parse_threads(text: &str) -> Result<NonZeroUsize, String> {
    let threads = text.parse().ok().filter(|threads: &NonZeroUsize| threads.get() <= MOST_THREADS);
    threads.ok_or_else(|| format!("must be a number from 1 to {MOST_THREADS}"))
}
