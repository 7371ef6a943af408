//! Experts that the host computes, in a model whose other blocks are on another device.
//!
//! A layer's rows of the residual stream come to the host, get what the routed experts add, and go back. Shared experts stay on
//! the device, which begins with them before the host does.

use marlin_kernels::cpu::{CpuBackend, CpuEncoder};
use marlin_kernels::{Backend, Encoder, HostBuffer, HostRoutes, Input, KernelError, MemoryUse, StepLimits};

use super::experts::RoutedExperts;
use super::load::Loader;
use super::mlp::Mlp;
use super::workspace::{ExpertWork, Workspace, expert_work_bytes};
use crate::ModelError;
use crate::spec::{DecoderSpec, ExpertsSpec};

/// A mixture of experts, of which the routed ones are on the host.
pub(super) struct HostExperts<B: Backend> {
    /// The norm before the block.
    input_norm: Vec<f32>,
    routed: RoutedExperts<CpuBackend>,
    shared: Option<Mlp<B>>,
}

/// What the host computes them with, one layer after the other.
pub(super) struct HostWork {
    encoder: CpuEncoder,
    /// The residual stream, `[T, hidden]`.
    hidden: HostBuffer,
    experts: ExpertWork<CpuBackend>,
}

impl<B: Backend> HostExperts<B> {
    /// Adds what experts make of the normalised `hidden`, of `tokens` rows, to it.
    pub(super) fn encode(
        &self,
        encoder: &mut B::Encoder,
        work: &mut Workspace<B>,
        host: &mut HostWork,
        input_norm: &B::Vector,
        eps: f32,
        tokens: usize,
    ) -> Result<(), KernelError> {
        if let Some(mlp) = &self.shared {
            let normed = Input::Normed { x: &work.hidden, weight: input_norm, eps };
            mlp.encode_gated(encoder, normed, &mut work.shared);
        }
        encoder.read(&work.hidden, host.hidden.fill(tokens)?)?;
        self.routed.encode(&mut host.encoder, &mut host.hidden, &mut host.experts, &self.input_norm, eps);
        encoder.write(&mut work.hidden, tokens, host.hidden.values())?;
        if let Some(mlp) = &self.shared {
            mlp.down_proj.encode(encoder, &work.shared, &mut work.block_output, &mut work.hidden, eps);
        }
        Ok(())
    }
}

impl HostWork {
    pub(super) fn new(
        host: &CpuBackend,
        spec: &DecoderSpec,
        experts: &ExpertsSpec,
        step_tokens: usize,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            encoder: host.encoder(&limits(spec, step_tokens))?,
            hidden: host.buffer(step_tokens, spec.hidden_size)?,
            experts: ExpertWork::new(host, spec.hidden_size, experts, step_tokens)?,
        })
    }

    /// Where the tokens of the last layer that was computed went.
    pub(super) fn read_routes(&mut self, routes: &mut HostRoutes) -> Result<(), KernelError> {
        self.encoder.read_routes(&mut self.experts.routes, routes)
    }
}

/// The bytes that [`HostWork::new`] makes.
pub(crate) fn host_work_bytes(host: &dyn MemoryUse, spec: &DecoderSpec, experts: &ExpertsSpec, tokens: usize) -> u64 {
    let encoder = host.encoder_bytes(&limits(spec, tokens));
    let hidden = tokens.saturating_mul(spec.hidden_size).saturating_mul(size_of::<f32>());
    let experts = expert_work_bytes(host, spec.hidden_size, experts, tokens);
    experts.saturating_add(encoder as u64).saturating_add(hidden as u64)
}

/// Experts read rows of the residual stream; there is neither attention nor sampling.
fn limits(spec: &DecoderSpec, tokens: usize) -> StepLimits {
    StepLimits { tokens, context: 0, width: spec.hidden_size, vocabulary: 0, logit_rows: 0 }
}

impl<B: Backend> Loader<'_, B> {
    /// The experts of a layer, whose norm has this name.
    pub(super) fn host_experts(
        &self,
        host: &Loader<'_, CpuBackend>,
        layer: &str,
        norm: &str,
        spec: &ExpertsSpec,
    ) -> Result<HostExperts<B>, ModelError> {
        let spec = spec.with_shared_beside();
        Ok(HostExperts {
            input_norm: host.norm(norm, self.spec.hidden_size)?,
            routed: host.routed_experts(layer, &spec)?,
            shared: self.shared_mlp(layer, &spec)?,
        })
    }
}
