//! A mix of formats as a file.

use std::collections::{BTreeMap, HashMap};

use marlin_checkpoint::Checkpoint;
use marlin_format::{ScaleSearch, Scheme};
use marlin_model::RotationParts;
use serde::{Deserialize, Serialize};

use super::allocate::{Choice, allocate};
use crate::moe::find_moe_layers;
use crate::quantize::tasks;
use crate::role::{kind_of, layer_and_kind};
use crate::source::Source;
use crate::{QuantizeError, Recipe, TensorRole, scheme_by_name};

/// A format for each matrix of a model's decoder, and what it was chosen by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BitPlan {
    /// The model that it was made for.
    pub model: String,
    /// Bits per weight of all the matrices. It follows from the matrices; what a file says is not read.
    #[serde(default)]
    pub bits_per_weight: f64,
    /// The mean KL divergence from the unquantised model, in nats, that the costs of the matrices add up to. As above.
    #[serde(default)]
    pub predicted_kl: f64,
    /// The matrices, in the order of the model.
    pub matrices: Vec<PlannedMatrix>,
}

/// A matrix, or one of all the experts of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedMatrix {
    /// The name of its tensor, with `*` for the number of an expert.
    pub name: String,
    /// Its format, as in `int3:64`: a name and the columns (or what else) that share a scale.
    pub format: String,
    /// How many such matrices there are.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub experts: usize,
    /// Output features N, input features K.
    pub shape: [usize; 2],
    /// What candidates for its format cost, in nats of mean KL divergence. Without any it keeps its format.
    #[serde(default)]
    pub kl: BTreeMap<String, f64>,
}

fn one() -> usize {
    1
}

fn is_one(count: &usize) -> bool {
    *count == 1
}

impl PlannedMatrix {
    fn weights(&self) -> f64 {
        self.experts as f64 * self.shape[0] as f64 * self.shape[1] as f64
    }

    fn scheme(&self) -> Result<Scheme, QuantizeError> {
        scheme_by_name(&self.format).map_err(|e| QuantizeError::Plan(format!("{}: {e}", self.name)))
    }

    fn bits(&self, scheme: &Scheme) -> f64 {
        scheme.bits_per_weight(self.shape[0], self.shape[1]) * self.weights()
    }
}

impl BitPlan {
    /// Reads a plan.
    ///
    /// # Errors
    /// It is no plan, or names a format that there is not.
    pub fn from_json(text: &str) -> Result<Self, QuantizeError> {
        let mut plan: Self = serde_json::from_str(text).map_err(|e| QuantizeError::Plan(e.to_string()))?;
        let costs =
            plan.matrices.iter().flat_map(|matrix| matrix.kl.iter().map(|(format, kl)| (&matrix.name, format, kl)));
        for (name, format, kl) in costs {
            scheme_by_name(format).map_err(|e| QuantizeError::Plan(format!("{name}: kl: {e}")))?;
            if !(kl.is_finite() && *kl >= 0.0) {
                return Err(QuantizeError::Plan(format!("{name}: kl of {format} is {kl}; it is 0 or more")));
            }
        }
        plan.sum_up()?;
        Ok(plan)
    }

    /// What [`BitPlan::from_json`] reads.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("names and finite numbers") + "\n"
    }

    /// Chooses the formats that cost least with so many bits per weight on average.
    ///
    /// # Errors
    /// There are no such small formats.
    pub fn allocate(&mut self, bits_per_weight: f64) -> Result<(), QuantizeError> {
        let mut choices = Vec::with_capacity(self.matrices.len());
        for matrix in &self.matrices {
            let choice =
                |(format, &kl): (&String, &f64)| Ok(Choice { bits: matrix.bits(&scheme_by_name(format)?), kl });
            let of: Result<Vec<Choice>, String> = matrix.kl.iter().map(choice).collect();
            let mut of = of.map_err(|e| QuantizeError::Plan(format!("{}: {e}", matrix.name)))?;
            if of.is_empty() {
                of.push(Choice { bits: matrix.bits(&matrix.scheme()?), kl: 0.0 });
            }
            choices.push(of);
        }
        let weights: f64 = self.matrices.iter().map(PlannedMatrix::weights).sum();
        let chosen = allocate(&choices, bits_per_weight * weights).ok_or_else(|| {
            let least = |of: &Vec<Choice>| of.iter().map(|choice| choice.bits).fold(f64::INFINITY, f64::min);
            let least = choices.iter().map(least).sum::<f64>() / weights;
            QuantizeError::TargetBits { target: bits_per_weight, least }
        })?;
        for (matrix, index) in self.matrices.iter_mut().zip(chosen) {
            if let Some(format) = matrix.kl.keys().nth(index) {
                matrix.format.clone_from(format);
            }
        }
        self.sum_up()
    }

    /// Brings up to date what follows from the matrices.
    pub(super) fn sum_up(&mut self) -> Result<(), QuantizeError> {
        let (mut bits, mut weights, mut kl) = (0.0, 0.0, 0.0);
        for matrix in &self.matrices {
            bits += matrix.bits(&matrix.scheme()?);
            weights += matrix.weights();
            kl += matrix.kl.get(&matrix.format).unwrap_or(&0.0);
        }
        (self.bits_per_weight, self.predicted_kl) = (bits / f64::max(weights, 1.0), kl);
        Ok(())
    }

    /// The recipe that gives each matrix of this model its format. `embedding` and `search` are as in [`Recipe`].
    ///
    /// # Errors
    /// The model has a decoder linear that the plan lacks, or the plan one that the model lacks.
    pub fn recipe(
        &self,
        source: &Checkpoint,
        embedding: Option<Scheme>,
        search: ScaleSearch,
    ) -> Result<Recipe, QuantizeError> {
        let mut planned: HashMap<&str, (Scheme, bool)> = HashMap::new();
        for matrix in &self.matrices {
            planned.insert(&matrix.name, (matrix.scheme()?, false));
        }
        let moe_layers = find_moe_layers(source)?;
        let any = self.matrices.first().map(PlannedMatrix::scheme).transpose()?;
        let any = any.ok_or_else(|| QuantizeError::Plan("it has no matrices".into()))?;
        let weights = Source::new(source, RotationParts::default())?;
        let linears = tasks(&weights, &moe_layers, &|name| {
            (TensorRole::of(name, 2) == TensorRole::DecoderLinear).then_some(any)
        })?;
        let mut recipe = Recipe::uniform(any, embedding, search);
        for task in linears.iter().filter(|task| task.matrix.is_some()) {
            let name = planned_name(&task.name);
            let (scheme, is_used) = planned.get_mut(name.as_str()).ok_or_else(|| {
                QuantizeError::Plan(format!("it lacks {name}, a matrix of {}; add it with its format", source.name()))
            })?;
            *is_used = true;
            recipe.exceptions.insert(task.name.to_string(), *scheme);
        }
        match planned.iter().find(|(_, (_, is_used))| !is_used) {
            None => Ok(recipe),
            Some((name, _)) => Err(QuantizeError::Plan(format!(
                "{name} is no matrix of {}; the plan was made for {}",
                source.name(),
                self.model
            ))),
        }
    }
}

/// The name that a plan has for a matrix: those of the experts of a layer share theirs.
pub(super) fn planned_name(tensor: &str) -> String {
    match (layer_and_kind(tensor).0, kind_of(tensor)) {
        (Some(layer), kind) if kind.contains(".experts.N.") => {
            format!("model.layers.{layer}.{}.weight", kind.replacen(".experts.N.", ".experts.*.", 1))
        }
        _ => tensor.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> BitPlan {
        let matrix = |name: &str, size: usize, cost: f64| PlannedMatrix {
            name: name.into(),
            format: "int3:64".into(),
            experts: 1,
            shape: [size, 128],
            kl: [("int2:32", 30.0), ("int3:64", 10.0), ("int4:128", 3.0), ("int8:128", 0.01)]
                .map(|(format, kl)| (format.to_owned(), kl * cost))
                .into(),
        };
        let matrices = vec![matrix("a", 64, 1e-3), matrix("b", 64, 1e-5), matrix("c", 64, 1e-4)];
        let mut plan = BitPlan { model: "m".into(), bits_per_weight: 0.0, predicted_kl: 0.0, matrices };
        plan.sum_up().unwrap();
        plan
    }

    #[test]
    fn bits_go_where_they_save_most() {
        let mut plan = plan();
        let formats = |plan: &BitPlan| plan.matrices.iter().map(|matrix| matrix.format.clone()).collect::<Vec<_>>();
        plan.allocate(3.4).unwrap();
        assert_eq!(formats(&plan), ["int4:128", "int2:32", "int3:64"]);
        assert!(plan.bits_per_weight <= 3.4 && plan.bits_per_weight > 3.3, "{}", plan.bits_per_weight);
        assert!((plan.predicted_kl - (3e-3 + 30e-5 + 10e-4)).abs() < 1e-9);
        plan.allocate(9.0).unwrap();
        assert_eq!(formats(&plan), ["int8:128"; 3]);
        let error = plan.allocate(2.0).unwrap_err().to_string();
        assert!(error.contains("2.000") && error.contains("2.56"), "{error}");
    }

    #[test]
    fn a_file_gives_the_plan_back_and_sums_are_not_believed() {
        let plan = plan();
        let text = plan.to_json();
        assert_eq!(BitPlan::from_json(&text).unwrap(), plan);
        let edited = text.replacen("\"format\": \"int3:64\"", "\"format\": \"fp4:128\"", 3);
        let edited = BitPlan::from_json(&edited).unwrap();
        assert!((edited.bits_per_weight - 4.125).abs() < 1e-9, "{}", edited.bits_per_weight);
        for (from, to, wanted) in [
            ("int3:64\",", "int5:64\",", "a: formats are"),
            ("\"kl\"", "\"cost\"", "unknown field `cost`"),
            ("0.003", "-0.5", "kl of int4:128 is -0.5"),
            ("{", "[", "line 2 column"),
        ] {
            let text = text.replacen(from, to, 1);
            let error = BitPlan::from_json(&text).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(wanted), "{from} -> {to}: {error}");
        }
    }

    #[test]
    fn experts_of_a_layer_share_their_name() {
        for (name, planned) in [
            ("model.layers.3.mlp.experts.17.up_proj.weight", "model.layers.3.mlp.experts.*.up_proj.weight"),
            ("model.layers.3.mlp.shared_experts.up_proj.weight", "model.layers.3.mlp.shared_experts.up_proj.weight"),
            ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ] {
            assert_eq!(planned_name(name), planned);
        }
    }
}
