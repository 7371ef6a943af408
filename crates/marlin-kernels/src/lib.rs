//! Devices and kernels.
//!
//! [`Backend`] is one trait of fused decoder operations over device buffers, written to an [`Encoder`]; a decoder is written
//! once against it and runs on every device. [`mod@reference`] is the plain oracle; [`cpu`] the fast path for processors; [`gpu`]
//! runs on Metal and Vulkan.
//!
//! A new operation is a method of [`Encoder`], written first in [`mod@reference`] and then in every other backend. A new backend
//! is a module beside those that implements the two traits; one whose memory is the host's can use [`HostBuffer`] and
//! [`HostKvCache`]. Either gets its rows in the [`conformance`] table, which runs every operation × format × shape class × backend
//! against the reference within an error bound.

mod backend;
mod error;
mod hadamard;
mod host;
mod kv;
mod kv_codes;
mod routing;
mod sampling;
mod step;

pub mod conformance;
pub mod cpu;
pub mod gpu;
pub mod reference;

pub use backend::{
    Activation, AttentionShape, Backend, DeviceInfo, Encoder, Input, LatentShape, LinearPart, MemoryUse, PartHeader,
    QkNorm, RopeLayout, RouterWeights, StepLimits, Values,
};
pub use error::{BeyondBinding, KernelError};
pub use hadamard::Hadamard;
pub use host::{HostBuffer, HostKvCache, return_freed_memory};
pub use kv::{KvLayer, KvLayout, KvType};
pub use routing::{HostRoutes, RouterLoad, RouterScore, Routing};
pub use sampling::{SampleRow, SamplingId, TokenCount};
pub use step::{Step, StepError};
