//! Rotary position embedding: from config.json to inverse frequencies.
//!
//! Follows `modeling_rope_utils.py` of `transformers`, in its single-precision arithmetic.

use std::f32::consts::PI;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::ConfigError;
use crate::config::{self, Positive, Size};

/// Base of the frequencies where config.json names none.
const DEFAULT_THETA: f64 = 10_000.0;

/// Inverse frequencies and the factor on cosines and sines.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rope {
    /// One per pair of rotated dimensions, `[head_dim / 2]` or fewer.
    pub(crate) inv_freq: Vec<f32>,
    /// 1 but for YaRN.
    pub(crate) scaling: f32,
    /// Factor on the scores of latent attention: 1 but for YaRN with `mscale_all_dim`.
    pub(crate) score_scale: f64,
}

/// The fields of config.json that speak of rope, in the spelling of `transformers` 5 (`rope_parameters`) and in the older one
/// (`rope_theta`, `rope_scaling`).
#[derive(Debug, Default, Deserialize)]
pub(crate) struct RopeFields {
    pub(crate) rope_parameters: Option<Map<String, Value>>,
    pub(crate) rope_scaling: Option<Map<String, Value>>,
    pub(crate) rope_theta: Option<Positive>,
    pub(crate) partial_rotary_factor: Option<f64>,
    pub(crate) original_max_position_embeddings: Option<Size>,
}

/// How frequencies are stretched beyond the context the model was first trained on.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
enum Scaling {
    Default {},
    Linear {
        factor: Positive,
    },
    Llama3 {
        factor: Positive,
        low_freq_factor: Positive,
        high_freq_factor: Positive,
        original_max_position_embeddings: Size,
    },
    Yarn(Yarn),
}

/// YaRN (Peng et al. 2023): short wavelengths are kept, long ones stretched by `factor`, those between blended.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Yarn {
    factor: Positive,
    original_max_position_embeddings: Size,
    /// Factor on cosines and sines, instead of the one that follows from the others.
    attention_factor: Option<Positive>,
    /// Waves that turn more often than this over the original context are kept.
    beta_fast: Option<Positive>,
    /// Waves that turn less often than this are stretched.
    beta_slow: Option<Positive>,
    mscale: Option<Positive>,
    mscale_all_dim: Option<Positive>,
    /// Blend between whole dimensions.
    truncate: Option<bool>,
}

impl Rope {
    /// Rotary embedding of whole heads of `head_dim` (even).
    pub(crate) fn new(
        fields: RopeFields,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self, ConfigError> {
        let resolved = fields.resolve(max_position_embeddings)?;
        if resolved.partial != 1.0 {
            let problem = format!("this family rotates whole heads (1.0), found {}", resolved.partial);
            return Err(ConfigError::new("partial_rotary_factor", problem));
        }
        resolved.rope(head_dim)
    }

    /// Rotary embedding of the first part of a head, `partial_rotary_factor` of it.
    pub(crate) fn partial(
        fields: RopeFields,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self, ConfigError> {
        let resolved = fields.resolve(max_position_embeddings)?;
        let rotary = (head_dim as f64 * resolved.partial) as usize;
        if !(1..=head_dim).contains(&rotary) {
            let partial = resolved.partial;
            let problem = format!("must leave from 1 to head_dim = {head_dim} dimensions to rotate, found {partial}");
            return Err(ConfigError::new("partial_rotary_factor", problem));
        }
        resolved.rope(rotary)
    }

    /// [`Rope::partial`] for a family that has no scaling but `longrope`. That one is refused: its frequencies change with the length of the text, and keys that are cached
    /// already would have to change with them.
    pub(crate) fn unscaled(
        fields: RopeFields,
        head_dim: usize,
        max_position_embeddings: usize,
    ) -> Result<Self, ConfigError> {
        for (name, map) in [("rope_scaling", &fields.rope_scaling), ("rope_parameters", &fields.rope_parameters)] {
            let Some(map) = map else { continue };
            let rope_type = ["rope_type", "type"].into_iter().find_map(|key| map.get(key)?.as_str());
            if let Some(found) = rope_type.filter(|&found| found != "default") {
                let problem = format!("{found} is not supported for this family; must be default");
                return Err(ConfigError::new(format!("{name}.rope_type"), problem));
            }
        }
        Self::partial(fields, head_dim, max_position_embeddings)
    }
}

impl Resolved {
    /// Frequencies of `dim` dimensions.
    fn rope(self, dim: usize) -> Result<Rope, ConfigError> {
        let Self { theta, scaling, .. } = self;
        let base = inverse_frequencies(theta as f32, dim);
        let inv_freq = match scaling {
            Scaling::Default {} => base,
            Scaling::Linear { factor } => base.into_iter().map(|f| f / factor.get() as f32).collect(),
            Scaling::Yarn(_) if theta <= 1.0 => {
                return Err(ConfigError::new("rope_theta", format!("must be above 1 for yarn, found {theta}")));
            }
            Scaling::Yarn(yarn) => {
                let (scaling, score_scale) = (yarn.attention_factor(), yarn.score_scale());
                return Ok(Rope { inv_freq: yarn.stretch(theta, dim), scaling, score_scale });
            }
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let (factor, low, high) = (factor.get(), low_freq_factor.get(), high_freq_factor.get());
                if high <= low {
                    let problem = format!("must be above low_freq_factor = {low}, found {high}");
                    return Err(ConfigError::new("rope_parameters.high_freq_factor", problem));
                }
                let context = original_max_position_embeddings.get() as f32;
                base.into_iter().map(|f| llama3(f, factor as f32, low as f32, high as f32, context)).collect()
            }
        };
        Ok(Rope { inv_freq, scaling: 1.0, score_scale: 1.0 })
    }
}

impl Yarn {
    /// Frequencies of `dim` dimensions, blended by how often a wave turns over the original context.
    fn stretch(&self, theta: f64, dim: usize) -> Vec<f32> {
        let factor = self.factor.get() as f32;
        let (first, last) = self.blended(theta, dim);
        let (first, width) = (first as f32, if first == last { 0.001 } else { last - first } as f32);
        let pairs = (0..dim).step_by(2).enumerate();
        let frequency = |(pair, i): (usize, usize)| {
            let wave = (theta as f32).powf(i as f32 / dim as f32);
            let kept = 1.0 - ((pair as f32 - first) / width).clamp(0.0, 1.0);
            1.0 / (factor * wave) * (1.0 - kept) + 1.0 / wave * kept
        };
        pairs.map(frequency).collect()
    }

    /// The first and the last pair of dimensions to blend.
    fn blended(&self, theta: f64, dim: usize) -> (f64, f64) {
        let context = self.original_max_position_embeddings.get() as f64;
        let turns =
            |turns: f64| dim as f64 * (context / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
        let fast = turns(self.beta_fast.map_or(32.0, Positive::get));
        let slow = turns(self.beta_slow.map_or(1.0, Positive::get));
        let (fast, slow) = if self.truncate.unwrap_or(true) { (fast.floor(), slow.ceil()) } else { (fast, slow) };
        (fast.max(0.0), slow.min(dim as f64 - 1.0))
    }

    /// The factor on cosines and sines, which sharpens attention over a longer context.
    fn attention_factor(&self) -> f32 {
        let inferred = match (self.mscale, self.mscale_all_dim) {
            (Some(mscale), Some(all_dim)) => self.magnitude(mscale.get()) / self.magnitude(all_dim.get()),
            _ => self.magnitude(1.0),
        };
        self.attention_factor.map_or(inferred, Positive::get) as f32
    }

    /// What `mscale_all_dim` comes to on both sides of a product of query and key.
    fn score_scale(&self) -> f64 {
        self.mscale_all_dim.map_or(1.0, |all_dim| self.magnitude(all_dim.get()).powi(2))
    }

    fn magnitude(&self, mscale: f64) -> f64 {
        let factor = self.factor.get();
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }
}

/// What [`RopeFields`] come to.
#[derive(Debug)]
struct Resolved {
    /// Base of the frequencies.
    theta: f64,
    /// The part of a head that is rotated, normally 1.
    partial: f64,
    scaling: Scaling,
}

impl RopeFields {
    pub(crate) fn parse(config: &Value) -> Result<Self, ConfigError> {
        config::parse(config)
    }

    /// The base and the scaling, whichever way they are spelled; `rope_scaling` wins over `rope_parameters` as it does in
    /// `transformers`.
    fn resolve(self, max_position_embeddings: usize) -> Result<Resolved, ConfigError> {
        let given = |map: &Map<String, Value>| !map.is_empty();
        let (name, mut parameters) = match (self.rope_scaling.filter(given), self.rope_parameters) {
            (Some(scaling), _) => ("rope_scaling", scaling),
            (None, parameters) => ("rope_parameters", parameters.unwrap_or_default()),
        };
        // An mscale of 0 counts as none.
        let is_off = |key: &str, value: &Value| key.starts_with("mscale") && value.as_f64() == Some(0.0);
        parameters.retain(|key, value| !value.is_null() && !is_off(key, value));
        let in_parameters = |mut error: ConfigError| {
            error.field = if error.field.is_empty() { name.into() } else { format!("{name}.{}", error.field) };
            error
        };

        let theta = match parameters.remove("rope_theta") {
            Some(theta) => config::parse::<Positive>(&theta).map_err(|mut error| {
                error.field = "rope_theta".into();
                in_parameters(error)
            })?,
            None => self.rope_theta.unwrap_or(Positive::try_from(DEFAULT_THETA).expect("positive")),
        };
        let partial = parameters.remove("partial_rotary_factor").map_or(Ok(self.partial_rotary_factor), |value| {
            value.as_f64().map(Some).ok_or_else(|| {
                in_parameters(ConfigError::new("partial_rotary_factor", format!("must be a number, found {value}")))
            })
        })?;

        let legacy_type = parameters.remove("type");
        let rope_type = parameters.entry("rope_type").or_insert(legacy_type.unwrap_or("default".into()));
        if rope_type == "llama3" || rope_type == "yarn" {
            // A field outside the dictionary wins, and a missing one is the context.
            let key = "original_max_position_embeddings";
            if let Some(original) = self.original_max_position_embeddings {
                parameters.insert(key.into(), original.get().into());
            }
            parameters.entry(key).or_insert(max_position_embeddings.into());
        }
        let scaling = config::parse(&Value::Object(parameters)).map_err(in_parameters)?;
        Ok(Resolved { theta: theta.get(), partial: partial.unwrap_or(1.0), scaling })
    }
}

/// theta^(−2i / head_dim).
fn inverse_frequencies(theta: f32, head_dim: usize) -> Vec<f32> {
    (0..head_dim).step_by(2).map(|i| 1.0 / theta.powf(i as f32 / head_dim as f32)).collect()
}

/// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
fn llama3(frequency: f32, factor: f32, low: f32, high: f32, original_context: f32) -> f32 {
    let wavelength = 2.0 * PI / frequency;
    if wavelength > original_context / low {
        frequency / factor
    } else if wavelength < original_context / high {
        frequency
    } else {
        let smooth = (original_context / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Option<Map<String, Value>> {
        Some(value.as_object().expect("an object").clone())
    }

    fn parameters(value: Value) -> Result<Rope, ConfigError> {
        Rope::new(RopeFields { rope_parameters: map(value), ..Default::default() }, 8, 64)
    }

    fn old_style(theta: f64, scaling: Value) -> Result<Rope, ConfigError> {
        let rope_theta = Positive::try_from(theta).ok();
        Rope::new(RopeFields { rope_scaling: map(scaling), rope_theta, ..Default::default() }, 8, 64)
    }

    fn assert_near(found: &[f32], wanted: &[f32]) {
        assert_eq!(found.len(), wanted.len());
        for (f, w) in found.iter().zip(wanted) {
            assert!((f - w).abs() <= 1e-6 * w.abs(), "{found:?} is not {wanted:?}");
        }
    }

    #[test]
    fn frequencies_fall_geometrically() {
        assert_near(&parameters(json!({})).unwrap().inv_freq, &[1.0, 0.1, 0.01, 0.001]);
        assert_near(&parameters(json!({"rope_theta": 16.0})).unwrap().inv_freq, &[1.0, 0.5, 0.25, 0.125]);
    }

    #[test]
    fn linear_scaling_divides() {
        let wanted = [0.25, 0.125, 0.0625, 0.03125];
        assert_near(&old_style(16.0, json!({"type": "linear", "factor": 4})).unwrap().inv_freq, &wanted);
        let new_style = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 16.0});
        assert_near(&parameters(new_style).unwrap().inv_freq, &wanted);
    }

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        // Wavelengths 2π, 4π, 8π, 16π against an original context of 20 and factors 1 and 2: kept below 10, stretched above
        // 20, blended at 4π with smooth = 20 / 4π − 1.
        let scaling = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 2,
                             "original_max_position_embeddings": 20});
        let smooth = 20.0 / (4.0 * PI) - 1.0;
        let blended = 0.5 * ((1.0 - smooth) / 8.0 + smooth);
        let rope = old_style(16.0, scaling).unwrap();
        assert_near(&rope.inv_freq, &[1.0, blended, 0.25 / 8.0, 0.125 / 8.0]);
    }

    #[test]
    fn yarn_keeps_waves_that_turn_often_and_stretches_those_that_do_not() {
        // Base 16 over 8 dimensions: pair i has wavelength 2π·2^i, and a context just over 16π holds just over 8 / 2^i
        // turns. Between 4 turns (pair 1) and 1.02 turns (before pair 3) lies pair 2, half of each.
        let scaling = json!({"rope_type": "yarn", "factor": 4, "beta_fast": 4, "beta_slow": 1.02, "rope_theta": 16,
                             "original_max_position_embeddings": 51});
        let rope = parameters(scaling).unwrap();
        assert_near(&rope.inv_freq, &[1.0, 0.5, 0.5 * (0.25 + 0.25 / 4.0), 0.125 / 4.0]);
        assert!((rope.scaling - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
        let given = json!({"rope_type": "yarn", "factor": 4, "attention_factor": 0.5});
        assert_eq!(parameters(given).unwrap().scaling, 0.5);
    }

    #[test]
    fn a_part_of_a_head_is_rotated() {
        let unscaled =
            |value: Value| Rope::unscaled(RopeFields { rope_parameters: map(value), ..Default::default() }, 8, 64);
        let half = unscaled(json!({"rope_theta": 16.0, "partial_rotary_factor": 0.5})).unwrap();
        assert_near(&half.inv_freq, &[1.0, 0.25]);
        let odd = unscaled(json!({"rope_theta": 8.0, "partial_rotary_factor": 0.4})).unwrap();
        assert_near(&odd.inv_freq, &[1.0, 0.25]);
        for factor in [0.0, 0.1, 1.2, -1.0] {
            let error = unscaled(json!({"partial_rotary_factor": factor})).unwrap_err();
            assert_eq!(error.field, "partial_rotary_factor");
        }
        assert!(unscaled(json!({"rope_type": null, "type": "yarn", "factor": 2.0})).is_err());
        let longrope = unscaled(json!({"rope_type": "longrope", "short_factor": [1.0]})).unwrap_err().to_string();
        assert!(longrope.contains("longrope is not supported"), "{longrope}");
    }

    #[test]
    fn a_part_of_a_head_is_stretched() {
        let parameters = json!({"rope_type": "linear", "factor": 4, "rope_theta": 16, "partial_rotary_factor": 0.5});
        let fields = || RopeFields { rope_parameters: map(parameters.clone()), ..Default::default() };
        assert_near(&Rope::partial(fields(), 8, 64).unwrap().inv_freq, &[0.25, 0.0625]);
        assert_eq!(Rope::new(fields(), 8, 64).unwrap_err().field, "partial_rotary_factor");
    }

    #[test]
    fn spellings_are_resolved_as_transformers_does() {
        let linear = map(json!({"type": "linear", "factor": 2.0}));
        let llama3 = json!({"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4});
        let fields = RopeFields {
            rope_scaling: linear,
            rope_parameters: map(json!({"rope_theta": 16.0})),
            rope_theta: Positive::try_from(256.0).ok(),
            ..Default::default()
        };
        assert_eq!(fields.resolve(64).unwrap().theta, 256.0);

        let original = |fields: RopeFields| match fields.resolve(64).unwrap().scaling {
            Scaling::Llama3 { original_max_position_embeddings, .. } => original_max_position_embeddings.get(),
            other => panic!("{other:?}"),
        };
        assert_eq!(original(RopeFields { rope_parameters: map(llama3.clone()), ..Default::default() }), 64);
        let outside = RopeFields {
            rope_parameters: map(llama3),
            original_max_position_embeddings: Size::try_from(16).ok(),
            ..Default::default()
        };
        assert_eq!(original(outside), 16);
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        let problem = |value: Value| parameters(value).unwrap_err().to_string();
        let dynamic = problem(json!({"rope_type": "dynamic", "factor": 4.0}));
        assert!(dynamic.contains("`dynamic`") && dynamic.contains("`yarn`"), "{dynamic}");
        assert!(problem(json!({"rope_type": "default", "mrope_section": [1, 2]})).contains("`mrope_section`"));
        assert!(problem(json!({"full_attention": {"rope_theta": 1.0}})).contains("`full_attention`"));
        assert!(problem(json!({"rope_type": "linear"})).contains("missing field `factor`"));
        assert!(problem(json!({"rope_type": "linear", "factor": -2})).contains("must be a positive number"));
        assert!(problem(json!({"rope_theta": 0})).starts_with("rope_parameters.rope_theta: must be a positive"));
        assert!(problem(json!({"partial_rotary_factor": 0.5})).contains("partial_rotary_factor"));
        let crossed = json!({"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1});
        assert!(problem(crossed).contains("high_freq_factor"));
    }
}
