//! Gated MLPs.

use marlin_kernels::{Activation, Backend, Encoder, Hadamard, Input};

use super::OutputProjection;
use super::load::Loader;
use super::workspace::Workspace;
use crate::ModelError;
use crate::spec::MlpSpec;

/// A gated MLP; gate and up are one matrix.
pub(super) struct Mlp<B: Backend> {
    gate_up_proj: B::Linear,
    activation: Activation,
    rotation: Option<Hadamard>,
    pub(super) down_proj: OutputProjection<B>,
}

impl<B: Backend> Mlp<B> {
    /// Adds the MLP of the normalised `hidden` to it.
    pub(super) fn encode(&self, encoder: &mut B::Encoder, work: &mut Workspace<B>, input_norm: &B::Vector, eps: f32) {
        self.encode_gated(encoder, Input::Normed { x: &work.hidden, weight: input_norm, eps }, &mut work.gated);
        self.down_proj.encode(encoder, &work.gated, &mut work.block_output, &mut work.hidden, eps);
    }

    /// The first half, up to what `down_proj` is given.
    pub(super) fn encode_gated(&self, encoder: &mut B::Encoder, x: Input<'_, B>, gated: &mut B::Buffer) {
        encoder.linear_gated(x, &self.gate_up_proj, self.activation, gated);
        if let Some(rotation) = &self.rotation {
            encoder.hadamard(gated, rotation);
        }
    }
}

impl<B: Backend> Loader<'_, B> {
    pub(super) fn mlp(&self, block: &str, spec: &MlpSpec, out_norm: Option<B::Vector>) -> Result<Mlp<B>, ModelError> {
        let (hidden, width) = (self.spec.hidden_size, spec.intermediate_size);
        Ok(Mlp {
            gate_up_proj: if spec.is_fused {
                self.halves(&format!("{block}.gate_up_proj"), width, hidden, spec.bias)?
            } else {
                self.linear(block, &[("gate_proj", width), ("up_proj", width)], hidden, spec.bias)?
            },
            activation: spec.activation,
            rotation: spec.rotation,
            down_proj: OutputProjection {
                linear: self.linear(block, &[("down_proj", hidden)], width, spec.bias)?,
                norm: out_norm,
            },
        })
    }
}
