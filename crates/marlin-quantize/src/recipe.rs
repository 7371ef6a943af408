//! Which tensor becomes what.

use std::collections::BTreeMap;

use marlin_checkpoint::ExportLayout;
use marlin_format::{Format, FormatError, Grouping, ScaleSearch, Scheme};
use marlin_model::{LoadOptions, MemoryPlan, ModelError, Planner, RotationParts};

use crate::TensorRole;

/// Groups of an int8 embedding: fine, since every token's logit depends on it.
const EMBEDDING_GROUP: Grouping = Grouping::Columns(32);

/// Storage of embedding and head in a format: in groups of 32 for int8, otherwise in the format's own, unless `grouping` says
/// otherwise.
///
/// # Errors
/// The format does not have such groups.
pub fn embedding_scheme(format: Format, grouping: Option<Grouping>) -> Result<Scheme, FormatError> {
    let usual = (format == Format::Int8).then_some(EMBEDDING_GROUP);
    format.scheme(grouping.or(usual))
}

/// Parses `FORMAT[:SIZE]`, a format that quantises and perhaps what shares a scale, as in `int3`, `int4:32` or `fp8:128x128`.
///
/// # Errors
/// There is no such format, or it has no such groups.
pub fn scheme_by_name(name: &str) -> Result<Scheme, String> {
    let (format, size) = match name.split_once(':') {
        Some((format, size)) => (format, Some(size.parse::<Grouping>().map_err(|e| e.to_string())?)),
        None => (name, None),
    };
    quantized_format(format)?.scheme(size).map_err(|e| e.to_string())
}

/// Parses the name of a format that quantises.
///
/// # Errors
/// There is no such format.
pub fn quantized_format(name: &str) -> Result<Format, String> {
    let mut formats = Format::ALL.into_iter().filter(|format| !format.is_dense());
    formats.find(|format| format.name() == name).ok_or_else(quantized_formats)
}

/// What formats there are that quantise, in words.
pub fn quantized_formats() -> String {
    let formats = Format::ALL.into_iter().filter(|format| !format.is_dense());
    format!("formats are {}", formats.map(Format::name).collect::<Vec<_>>().join(", "))
}

/// How to quantise a model: a scheme per role, and per matrix where one differs. Norms, biases and matrices of unknown kind are
/// kept as they are.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Storage of the decoder's linears.
    pub linears: Scheme,
    /// Decoder linears that are stored otherwise, and matrices of unknown kind that are not kept, by the names of their tensors.
    pub exceptions: BTreeMap<String, Scheme>,
    /// Storage of embedding and head; `None` keeps them as they are.
    pub embedding: Option<Scheme>,
    /// How scales are chosen.
    pub search: ScaleSearch,
    /// What is rotated before, if it can be; by default nothing.
    pub rotate: RotationParts,
}

impl Recipe {
    /// One scheme for all of the decoder's linears, and no rotation.
    pub fn uniform(linears: Scheme, embedding: Option<Scheme>, search: ScaleSearch) -> Self {
        Self { linears, exceptions: BTreeMap::new(), embedding, search, rotate: RotationParts::default() }
    }

    /// The storage of a tensor of `rank` dimensions; `None` keeps it.
    pub fn scheme(&self, name: &str, rank: usize) -> Option<Scheme> {
        match TensorRole::of(name, rank) {
            TensorRole::DecoderLinear => Some(self.exceptions.get(name).copied().unwrap_or(self.linears)),
            TensorRole::Embedding | TensorRole::Head => self.embedding,
            // Routers among them, which are kept unless they are named.
            TensorRole::Unknown => self.exceptions.get(name).copied(),
            TensorRole::Vector => None,
        }
    }

    /// All that decides what becomes of a given model: this recipe, the layout it is written in, and the version of the
    /// quantisers.
    pub fn fingerprint(&self, layout: ExportLayout) -> String {
        format!("metal-marlin {}, {layout}, {self:?}", env!("CARGO_PKG_VERSION"))
    }

    /// What the model will take of a device's memory when it is quantised like this.
    ///
    /// # Errors
    /// As for [`Planner::plan`].
    pub fn plan(&self, planner: &Planner<'_>, options: &LoadOptions) -> Result<MemoryPlan, ModelError> {
        planner.plan_as(options, |name, info| self.scheme(name, info.shape.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_are_of_the_decoder() {
        let [down, router, embedding] =
            ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"];
        let int8 = Format::Int8.scheme(None).unwrap();
        let mut recipe = Recipe::uniform(Format::Fp4.scheme(None).unwrap(), None, ScaleSearch::Mse);
        assert_eq!(recipe.scheme(router, 2), None);
        recipe.exceptions = [down, router, embedding].map(|name| (name.to_owned(), int8)).into();
        assert_eq!((recipe.scheme(down, 2), recipe.scheme(router, 2)), (Some(int8), Some(int8)));
        assert_eq!(recipe.scheme("model.layers.0.mlp.down_proj.weight", 2), Some(recipe.linears));
        assert_eq!(recipe.scheme(embedding, 2), None);
        assert_eq!(recipe.scheme("model.norm.weight", 1), None);
    }
}
