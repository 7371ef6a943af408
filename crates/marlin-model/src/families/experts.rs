//! Fields that speak of experts: how many, which layers have them, how a token's are chosen.

use marlin_kernels::{RouterScore, Routing};
use serde::Deserialize;
use serde_json::Value;

use super::base::BaseConfig;
use crate::ConfigError;
use crate::config::{self, Count, Positive, Size};
use crate::spec::{ExpertStorage, ExpertsSpec, LayerSpec};

/// Refuses what no token could be routed by. `names` are those of the fields of `experts` and `top_k`.
pub(super) fn check(routing: &Routing, names: [&str; 2]) -> Result<(), ConfigError> {
    let Routing { experts, top_k, groups, top_groups, .. } = *routing;
    let [experts_name, top_k_name] = names;
    let fail = |field: &str, problem: String| Err(ConfigError::new(field, problem));
    if !experts.is_multiple_of(groups) || groups > Routing::MOST_GROUPS {
        let most = Routing::MOST_GROUPS;
        return fail(
            "n_group",
            format!("must divide {experts_name} = {experts} and be at most {most}, found {groups}"),
        );
    }
    if top_groups > groups {
        return fail("topk_group", format!("must be at most n_group = {groups}, found {top_groups}"));
    }
    let choice = experts / groups * top_groups;
    if top_k > choice {
        let of = match top_groups == groups {
            true => format!("{experts_name} = {experts}"),
            false => {
                format!("the {choice} of {experts_name} = {experts} experts that topk_group = {top_groups} leaves")
            }
        };
        return fail(top_k_name, format!("must be at most {of}, found {top_k}"));
    }
    Ok(())
}

/// Routing by the softmax of logits, without groups and shared experts.
pub(super) fn softmax(experts: Size, top_k: Size, normalize: bool, names: [&str; 2]) -> Result<Routing, ConfigError> {
    let routing = Routing {
        experts: experts.get(),
        top_k: top_k.get(),
        shared: 0,
        score: RouterScore::Softmax,
        groups: 1,
        top_groups: 1,
        normalize,
        scale: 1.0,
    };
    check(&routing, names)?;
    Ok(routing)
}

/// Fields of DeepSeek-V3 and of the GLMs that follow it: experts chosen by sigmoid scores with corrections, from some groups, and shared ones.
#[derive(Debug, Deserialize)]
pub(super) struct SigmoidConfig {
    n_routed_experts: Size,
    num_experts_per_tok: Size,
    moe_intermediate_size: Size,
    n_shared_experts: Option<Count>,
    n_group: Option<Size>,
    topk_group: Option<Size>,
    norm_topk_prob: Option<bool>,
    routed_scaling_factor: Option<Positive>,
    scoring_func: Option<String>,
    topk_method: Option<String>,
    first_k_dense_replace: Option<Count>,
    /// Wins over `first_k_dense_replace`.
    mlp_layer_types: Option<Vec<MlpLayerType>>,
    #[serde(alias = "num_mtp_layers")]
    num_nextn_predict_layers: Option<Count>,
}

/// An entry of `mlp_layer_types`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum MlpLayerType {
    Dense,
    Sparse,
}

/// What a family's config class in `transformers` says where config.json is silent.
pub(super) struct SigmoidDefaults {
    pub(super) groups: usize,
    pub(super) top_groups: usize,
    pub(super) scale: f64,
    /// First layers without experts.
    pub(super) dense_layers: usize,
    pub(super) prediction_layers: usize,
}

impl SigmoidConfig {
    pub(super) fn parse(config: &Value) -> Result<Self, ConfigError> {
        let parsed: Self = config::parse(config)?;
        for (field, found, wanted) in
            [("scoring_func", &parsed.scoring_func, "sigmoid"), ("topk_method", &parsed.topk_method, "noaux_tc")]
        {
            if let Some(found) = found.as_deref().filter(|&found| found != wanted) {
                return Err(ConfigError::new(field, format!("must be {wanted} for this family, found {found}")));
            }
        }
        Ok(parsed)
    }

    /// The experts. Shared ones that are as wide as the others are among them.
    pub(super) fn experts(&self, base: &BaseConfig, defaults: &SigmoidDefaults) -> Result<ExpertsSpec, ConfigError> {
        let shared = self.n_shared_experts.map_or(1, Count::get);
        let routing = Routing {
            experts: self.n_routed_experts.get(),
            top_k: self.num_experts_per_tok.get(),
            shared,
            score: RouterScore::Sigmoid,
            groups: self.n_group.map_or(defaults.groups, Size::get),
            top_groups: self.topk_group.map_or(defaults.top_groups, Size::get),
            normalize: self.norm_topk_prob.unwrap_or(true),
            scale: self.routed_scaling_factor.map_or(defaults.scale, Positive::get) as f32,
        };
        check(&routing, ["n_routed_experts", "num_experts_per_tok"])?;
        let experts = ExpertsSpec {
            routing,
            width: self.moe_intermediate_size.get(),
            activation: base.activation(),
            beside: None,
            correction: true,
            storage: ExpertStorage::Usual,
        };
        // Several are stored as one that is wider than the routed ones.
        Ok(if shared > 1 { experts.with_shared_beside() } else { experts })
    }

    /// The layers, of which the first ones have no experts unless `mlp_layer_types` names others.
    pub(super) fn layers(&self, base: &BaseConfig, defaults: &SigmoidDefaults) -> Result<Vec<LayerSpec>, ConfigError> {
        let layers = base.layers();
        let Some(types) = &self.mlp_layer_types else {
            let dense = self.first_k_dense_replace.map_or(defaults.dense_layers, Count::get);
            return Ok(base.layers_with(None, |layer| layer >= dense));
        };
        if types.len() != layers {
            let problem = format!("must have num_hidden_layers = {layers} entries, found {}", types.len());
            return Err(ConfigError::new("mlp_layer_types", problem));
        }
        Ok(base.layers_with(None, |layer| types[layer] == MlpLayerType::Sparse))
    }

    /// Layers that predict further tokens, behind the decoder's.
    pub(super) fn prediction_layers(&self, defaults: &SigmoidDefaults) -> usize {
        self.num_nextn_predict_layers.map_or(defaults.prediction_layers, Count::get)
    }
}
