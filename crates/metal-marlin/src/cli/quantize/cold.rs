//! `--cold-expert-format`: fewer bits for experts that a text hardly uses.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use marlin_checkpoint::Checkpoint;
use marlin_format::Scheme;
use marlin_model::LoadOptions;
use marlin_quantize::{
    ColdExperts, ExpertMatrix, MoeLayer, cold_experts, find_moe_layers, measure_routing, scheme_by_name,
};
use serde_json::{Value, json};

use crate::cli::calibration::CalibrationOptions;
use crate::cli::measure;
use crate::cli::progress::{self, Bar};
use crate::{DeviceOptions, load};

const HEADING: &str = "Cold experts";

/// Which experts get fewer bits.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ColdOptions {
    /// Format of cold experts in a mixture of experts, such as int2 or int3:64 (with a group size): those that the
    /// calibration text uses least
    #[arg(
        long,
        value_name = "FORMAT[:SIZE]",
        value_parser = scheme_by_name,
        help_heading = HEADING
    )]
    cold_expert_format: Option<Scheme>,

    /// Share of each layer's experts that are cold
    #[arg(
        long,
        value_name = "SHARE",
        default_value = "0.5",
        value_parser = fraction,
        requires = "cold_expert_format",
        help_heading = HEADING
    )]
    cold_fraction: f64,
}

fn fraction(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| format!("must be a number from 0 to 1, found {text}"))
}

/// The cold experts of each layer.
pub(super) struct Cold {
    scheme: Scheme,
    /// Tokens of the text.
    tokens: usize,
    layers: Vec<(MoeLayer, ColdExperts)>,
}

impl ColdOptions {
    /// Whether the model is run to tell which experts are cold.
    pub(super) fn are_given(&self) -> bool {
        self.cold_expert_format.is_some()
    }

    /// Runs the model over the text; `None` if nothing is asked for.
    pub(super) fn measure(
        &self,
        checkpoint: &Checkpoint,
        calibration: &CalibrationOptions,
        device: &DeviceOptions,
    ) -> anyhow::Result<Option<Cold>> {
        let Some(scheme) = self.cold_expert_format else { return Ok(None) };
        let layers = find_moe_layers(checkpoint)?;
        ensure!(
            !layers.is_empty(),
            "{} has no experts; --cold-expert-format is for mixtures of experts",
            checkpoint.name()
        );
        let context = measure::usual_context(&[checkpoint]);
        let windows = calibration.windows(checkpoint)?;
        let options =
            LoadOptions { context: Some(context), logit_rows: 1, measure_routing: true, ..LoadOptions::default() };
        let device = device.open()?;
        let message = format!("Loading {}", checkpoint.name());
        let mut model = progress::spinner(&message, || load::load_model(checkpoint, &device, &options))?;
        let routing = {
            let mut bar = Bar::counting("Measuring where tokens go", "tokens");
            let total = windows.tokens() as u64;
            measure_routing(&mut *model, &windows, |done| bar.set(done as u64, total))
        };
        let routing =
            routing.with_context(|| format!("cannot tell the experts that {} uses", calibration.text_name()))?;
        let of_layer = |layer: MoeLayer| {
            // Layers for multi-token prediction do not run.
            let load = &routing.iter().find(|measured| measured.layer == layer.layer)?.load;
            let cold = cold_experts(load, self.cold_fraction);
            Some((layer, cold))
        };
        let layers = layers.into_iter().filter_map(of_layer).collect();
        Ok(Some(Cold { scheme, tokens: windows.tokens(), layers }))
    }
}

impl Cold {
    /// The schemes of cold experts' matrices by their names.
    pub(super) fn schemes(&self) -> BTreeMap<String, Scheme> {
        let of_layer = |(layer, cold): &(MoeLayer, ColdExperts)| {
            let names = |&expert: &usize| ExpertMatrix::ALL.map(|matrix| layer.expert_name(expert, matrix));
            cold.cold.iter().flat_map(names).map(|name| (name, self.scheme)).collect::<Vec<_>>()
        };
        self.layers.iter().flat_map(of_layer).collect()
    }

    pub(super) fn to_json(&self) -> Value {
        let layer = |(layer, cold): &(MoeLayer, ColdExperts)| json!({ "layer": layer.layer, "cold": cold.cold, "load_over_mean": cold.load });
        json!({
            "scheme": self.scheme.to_string(),
            "calibration_tokens": self.tokens,
            "layers": self.layers.iter().map(layer).collect::<Vec<_>>(),
        })
    }

    pub(super) fn to_text(&self) -> String {
        let cold: usize = self.layers.iter().map(|(_, cold)| cold.cold.len()).sum();
        let experts: usize = self.layers.iter().map(|(layer, _)| layer.experts()).sum();
        let loads = self.layers.iter().flat_map(|(_, cold)| cold.cold.iter().map(|&expert| cold.load[expert]));
        let busiest = loads.fold(0.0, f64::max);
        format!(
            "{cold} of {experts} experts are cold, in {}: none of them had more than {busiest:.2} of a mean load in {} tokens",
            self.scheme, self.tokens
        )
    }
}
