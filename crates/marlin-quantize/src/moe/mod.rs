//! Mixtures of experts in checkpoints: which tensors are whose, and experts in formats of their own.

mod cold;
mod experts;
mod measure;

use std::collections::BTreeMap;

use marlin_checkpoint::Checkpoint;

use crate::QuantizeError;

pub use cold::{ColdExperts, cold_experts};
pub use experts::{expert_matrix, quantize_moe_experts, replace_moe_layers};
pub use measure::measure_routing;

/// A layer whose feed-forward block is a mixture of experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoeLayer {
    /// Index of the decoder layer. That of a layer for multi-token prediction follows those of the decoder.
    pub layer: usize,
    /// Module that the experts belong to, for example `model.layers.3.mlp`.
    pub block: String,
    /// The router's matrix, `[experts, hidden]`, if the checkpoint has one under a known name.
    pub router: Option<String>,
    /// Matrices of the routed experts.
    pub experts: ExpertTensors,
    /// Matrices of shared experts.
    pub shared: Vec<String>,
}

/// How a checkpoint stores the matrices of routed experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpertTensors {
    /// A tensor for each matrix of each expert.
    Each(Vec<[String; 3]>),
    /// A tensor for gate and up of all experts, and one for down.
    Fused {
        /// `[E, 2I, H]`, gate first; `[E, H, 2I]`, gate and up in turns, if transposed.
        gate_up: String,
        /// `[E, H, I]`; `[E, I, H]` if transposed.
        down: String,
        /// Number of experts, E.
        experts: usize,
        /// Rows and columns have changed places, as in gpt-oss.
        transposed: bool,
    },
}

/// A matrix of an expert's MLP, in the order in which [`ExpertTensors::Each`] has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExpertMatrix {
    /// `[I, H]`.
    Gate,
    /// `[I, H]`.
    Up,
    /// `[H, I]`.
    Down,
}

impl ExpertMatrix {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// Its module's name in checkpoints, but for Mixtral's.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// By the module's name, Mixtral's included.
    fn of(module: &str) -> Option<Self> {
        match module {
            "gate_proj" | "w1" => Some(Self::Gate),
            "up_proj" | "w3" => Some(Self::Up),
            "down_proj" | "w2" => Some(Self::Down),
            _ => None,
        }
    }
}

impl MoeLayer {
    /// Number of routed experts.
    pub fn experts(&self) -> usize {
        match &self.experts {
            ExpertTensors::Each(experts) => experts.len(),
            ExpertTensors::Fused { experts, .. } => *experts,
        }
    }

    /// The tensors that hold matrices of all experts.
    pub(crate) fn fused_tensors(&self) -> [&str; 2] {
        match &self.experts {
            ExpertTensors::Each(_) => [""; 2],
            ExpertTensors::Fused { gate_up, down, .. } => [gate_up, down],
        }
    }

    /// Number of matrices of routed experts.
    pub fn matrices(&self) -> usize {
        self.experts() * ExpertMatrix::ALL.len()
    }
}

/// The expert of its block that a tensor belongs to, where each has its own: `model.layers.3.mlp.experts.7.up_proj.weight` is `up_proj` of expert 7 of
/// `model.layers.3.mlp`.
pub fn expert_of(name: &str) -> Option<(&str, usize, ExpertMatrix)> {
    let (block, rest) = name.strip_suffix(".weight")?.split_once(".experts.")?;
    let (expert, module) = rest.split_once('.')?;
    Some((block, expert.parse().ok()?, ExpertMatrix::of(module)?))
}

/// Finds the layers that are mixtures of experts, by names and shapes alone: nothing is read. Those for multi-token prediction are among them.
///
/// # Errors
/// A matrix of an expert is missing.
pub fn find_moe_layers(checkpoint: &Checkpoint) -> Result<Vec<MoeLayer>, QuantizeError> {
    let names = checkpoint.tensor_names();
    let shapes = names.filter_map(|name| Some((name, checkpoint.shape(name)?)));
    find_in(shapes).map_err(|tensor| QuantizeError::MissingExpert { model: checkpoint.name().to_owned(), tensor })
}

/// The layers of tensors with these names and shapes, or the name of one that is missing.
fn find_in<'a>(tensors: impl Iterator<Item = (&'a str, Vec<usize>)>) -> Result<Vec<MoeLayer>, String> {
    let mut blocks: BTreeMap<(usize, &str), Block<'_>> = BTreeMap::new();
    for (name, shape) in tensors {
        let Some((layer, block, rest)) = in_block(name) else { continue };
        blocks.entry((layer, block)).or_default().add(name, rest, shape);
    }
    let layers = blocks.into_iter().filter_map(|((layer, block), found)| found.finish(layer, block).transpose());
    layers.collect()
}

/// Layer, feed-forward block and the rest of a tensor's name.
fn in_block(name: &str) -> Option<(usize, &str, &str)> {
    let start = name.find("layers.")?;
    let (layer, rest) = name[start + "layers.".len()..].split_once('.')?;
    let (block, rest_of_block) = rest.split_once('.')?;
    let end = name.len() - rest_of_block.len() - 1;
    matches!(block, "mlp" | "block_sparse_moe").then_some((layer.parse().ok()?, &name[..end], rest_of_block))
}

/// What is found of a feed-forward block.
#[derive(Default)]
struct Block<'a> {
    /// With the number of its rows.
    router: Option<(&'a str, usize)>,
    shared: Vec<&'a str>,
    each: BTreeMap<usize, [Option<&'a str>; 3]>,
    gate_up: Option<(&'a str, Vec<usize>)>,
    down: Option<(&'a str, Vec<usize>)>,
}

impl<'a> Block<'a> {
    fn add(&mut self, name: &'a str, rest: &'a str, shape: Vec<usize>) {
        match (rest.strip_suffix(".weight").unwrap_or(rest), shape.len()) {
            ("gate" | "router", 2) => self.router = Some((name, shape[0])),
            ("experts.gate_up_proj", 3) => self.gate_up = Some((name, shape)),
            ("experts.down_proj", 3) => self.down = Some((name, shape)),
            (module, 2) if module.starts_with("shared_expert") => self.shared.push(name),
            (_, 2) => {
                if let Some((_, expert, matrix)) = expert_of(name) {
                    self.each.entry(expert).or_default()[matrix as usize] = Some(name);
                }
            }
            _ => {}
        }
    }

    /// The layer, if there are experts; the name of a matrix that is missing.
    fn finish(self, layer: usize, block: &str) -> Result<Option<MoeLayer>, String> {
        let experts = match (self.gate_up, self.down) {
            (Some((gate_up, of_gate_up)), Some((down, of_down))) => ExpertTensors::Fused {
                gate_up: gate_up.to_owned(),
                down: down.to_owned(),
                experts: of_gate_up[0],
                // [E, 2I, H] with [E, H, I], or [E, H, 2I] with [E, I, H].
                transposed: of_gate_up[1] != 2 * of_down[2],
            },
            (Some(_), None) => return Err(format!("{block}.experts.down_proj")),
            (None, Some(_)) => return Err(format!("{block}.experts.gate_up_proj")),
            (None, None) if self.each.is_empty() => return Ok(None),
            (None, None) => {
                let last = self.each.keys().next_back().copied().unwrap_or(0);
                let experts = self.router.map_or(0, |(_, experts)| experts).max(last + 1);
                let each = (0..experts).map(|expert| {
                    let found = self.each.get(&expert).copied().unwrap_or_default();
                    let mut names = [const { String::new() }; 3];
                    for (matrix, name) in ExpertMatrix::ALL.into_iter().zip(&mut names) {
                        let of_matrix = found[matrix as usize];
                        *name = of_matrix
                            .ok_or_else(|| format!("{block}.experts.{expert}.{}.weight", matrix.name()))?
                            .to_owned();
                    }
                    Ok(names)
                });
                ExpertTensors::Each(each.collect::<Result<_, String>>()?)
            }
        };
        Ok(Some(MoeLayer {
            layer,
            block: block.to_owned(),
            router: self.router.map(|(name, _)| name.to_owned()),
            experts,
            shared: self.shared.into_iter().map(str::to_owned).collect(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(tensors: &[(String, Vec<usize>)]) -> Result<Vec<MoeLayer>, String> {
        find_in(tensors.iter().map(|(name, shape)| (name.as_str(), shape.clone())))
    }

    /// GLM-4.7-Flash, its layer for multi-token prediction included.
    fn glm() -> Vec<(String, Vec<usize>)> {
        let mut tensors = vec![("model.layers.0.mlp.gate_proj.weight".to_owned(), vec![10_240, 2048])];
        for layer in 1..=47 {
            let block = format!("model.layers.{layer}.mlp");
            tensors.push((format!("{block}.gate.weight"), vec![64, 2048]));
            tensors.push((format!("{block}.gate.e_score_correction_bias"), vec![64]));
            for expert in ["shared_experts".to_owned()].into_iter().chain((0..64).map(|e| format!("experts.{e}"))) {
                for (matrix, shape) in
                    [("gate_proj", [1536, 2048]), ("up_proj", [1536, 2048]), ("down_proj", [2048, 1536])]
                {
                    tensors.push((format!("{block}.{expert}.{matrix}.weight"), shape.to_vec()));
                }
            }
        }
        tensors
    }

    #[test]
    fn all_matrices_of_glm_4_7_flash_are_found() {
        let layers = find(&glm()).unwrap();
        assert_eq!((layers.len(), layers[0].layer, layers[46].layer), (47, 1, 47));
        assert_eq!(layers.iter().map(MoeLayer::matrices).sum::<usize>(), 9024);
        assert_eq!(layers[2].router.as_deref(), Some("model.layers.3.mlp.gate.weight"));
        assert_eq!(layers[2].shared.len(), 3);
        let ExpertTensors::Each(experts) = &layers[2].experts else { panic!("a tensor for each matrix") };
        assert_eq!(experts[7][2], "model.layers.3.mlp.experts.7.down_proj.weight");
    }

    #[test]
    fn a_missing_matrix_is_named() {
        let missing = "model.layers.5.mlp.experts.63.up_proj.weight";
        let tensors: Vec<_> = glm().into_iter().filter(|(name, _)| name != missing).collect();
        assert_eq!(find(&tensors).unwrap_err(), missing);
        let whole: Vec<_> = glm().into_iter().filter(|(name, _)| !name.contains("layers.5.mlp.experts.63.")).collect();
        assert_eq!(find(&whole).unwrap_err(), "model.layers.5.mlp.experts.63.gate_proj.weight");
        let fused = [("model.layers.0.mlp.experts.down_proj".to_owned(), vec![4, 8, 16])];
        assert_eq!(find(&fused).unwrap_err(), "model.layers.0.mlp.experts.gate_up_proj");
    }

    #[test]
    fn names_of_mixtral_and_fused_tensors_are_known() {
        let mixtral: Vec<_> = ["w1", "w2", "w3"]
            .map(|matrix| (format!("model.layers.0.block_sparse_moe.experts.0.{matrix}.weight"), vec![8, 8]))
            .into();
        let ExpertTensors::Each(experts) = &find(&mixtral).unwrap()[0].experts else {
            panic!("a tensor for each matrix")
        };
        assert!(experts[0][0].ends_with("w1.weight") && experts[0][2].ends_with("w2.weight"));

        for (gate_up, down, is_transposed) in [([4, 32, 64], [4, 64, 16], false), ([4, 64, 32], [4, 16, 64], true)] {
            let tensors = [("gate_up_proj", gate_up), ("down_proj", down)]
                .map(|(name, shape)| (format!("model.layers.1.mlp.experts.{name}"), shape.to_vec()));
            let layers = find(&tensors).unwrap();
            let ExpertTensors::Fused { experts, transposed, .. } = layers[0].experts else { panic!("fused") };
            assert_eq!((experts, transposed, layers[0].matrices()), (4, is_transposed, 12));
        }
    }

    #[test]
    fn dense_models_have_none() {
        let tensors = [("model.layers.0.mlp.gate_proj.weight".to_owned(), vec![8, 8])];
        assert_eq!(find(&tensors), Ok(Vec::new()));
    }
}
