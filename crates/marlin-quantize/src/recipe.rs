//! Which tensor becomes what.

use marlin_checkpoint::Layout;
use marlin_format::{ScaleSearch, Scheme};

use crate::TensorRole;

/// How to quantise a model: a scheme per role. Norms, biases and matrices of unknown kind are kept as they are.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Storage of the decoder's linears.
    pub linears: Scheme,
    /// Storage of embedding and head; `None` keeps them as they are.
    pub embedding: Option<Scheme>,
    /// How scales are chosen.
    pub search: ScaleSearch,
}

impl Recipe {
    /// The storage of a tensor; `None` keeps it.
    pub fn scheme(&self, role: TensorRole) -> Option<Scheme> {
        match role {
            TensorRole::DecoderLinear => Some(self.linears),
            TensorRole::Embedding | TensorRole::Head => self.embedding,
            TensorRole::Vector | TensorRole::Unknown => None,
        }
    }

    /// All that decides what becomes of a given model: this recipe, the layout it is written in, and the version of the
    /// quantisers.
    pub fn fingerprint(&self, layout: Layout) -> String {
        format!("metal-marlin {}, {layout}, {self:?}", env!("CARGO_PKG_VERSION"))
    }
}
