//! Reading config.json: typed values that cannot hold nonsense.

use marlin_kernels::Activation;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::ConfigError;

/// A size from `MIN` to `MAX`. The limit is far above any model, and low enough that products of two sizes never overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub(crate) struct Size<const MAX: i64 = { 1 << 24 }, const MIN: i64 = 1>(usize);

/// How many there are of something of which there may be none.
pub(crate) type Count = Size<4096, 0>;

impl<const MAX: i64, const MIN: i64> Size<MAX, MIN> {
    pub(crate) fn get(self) -> usize {
        self.0
    }
}

impl<const MAX: i64, const MIN: i64> TryFrom<i64> for Size<MAX, MIN> {
    type Error = String;

    fn try_from(value: i64) -> Result<Self, String> {
        match usize::try_from(value) {
            Ok(size) if (MIN..=MAX).contains(&value) => Ok(Self(size)),
            _ => Err(format!("must be a whole number from {MIN} to {MAX}, found {value}")),
        }
    }
}

/// As it stands in config.json.
impl<const MAX: i64, const MIN: i64> TryFrom<Value> for Size<MAX, MIN> {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let size = value.as_i64().and_then(|size| Self::try_from(size).ok());
        size.ok_or_else(|| format!("must be a whole number from {MIN} to {MAX}, found {value}"))
    }
}

/// A finite number above zero.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub(crate) struct Positive(f64);

impl Positive {
    pub(crate) fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for Positive {
    type Error = String;

    fn try_from(value: f64) -> Result<Self, String> {
        // Arithmetic is in f32, where a number may vanish or overflow that f64 can hold.
        if value > 0.0 && (value as f32).is_normal() {
            Ok(Self(value))
        } else {
            Err(format!("must be a positive number that single precision can hold, found {value}"))
        }
    }
}

/// `hidden_act`, under the names `transformers` knows these two functions by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum HiddenAct {
    #[default]
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    #[serde(rename = "gelu_pytorch_tanh", alias = "gelu_new", alias = "gelu_python_tanh")]
    GeluTanh,
}

impl From<HiddenAct> for Activation {
    fn from(act: HiddenAct) -> Self {
        match act {
            HiddenAct::Silu => Self::Silu,
            HiddenAct::GeluTanh => Self::GeluTanh,
        }
    }
}

/// Reads a config struct; an error names the field.
pub(crate) fn parse<T: DeserializeOwned>(value: &Value) -> Result<T, ConfigError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        ConfigError::new(if path == "." { String::new() } else { path }, error.into_inner().to_string())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct Config {
        layers: Size<4096>,
        eps: Positive,
        #[serde(default)]
        hidden_act: HiddenAct,
    }

    fn problem(config: Value) -> String {
        parse::<Config>(&config).unwrap_err().to_string()
    }

    #[test]
    fn sizes_out_of_range_are_named() {
        assert_eq!(problem(json!({"layers": -1, "eps": 1})), "layers: must be a whole number from 1 to 4096, found -1");
        assert!(problem(json!({"layers": 0, "eps": 1})).contains("found 0"));
        assert!(problem(json!({"layers": 4097, "eps": 1})).contains("found 4097"));
        assert!(problem(json!({"layers": u64::MAX, "eps": 1})).ends_with("from 1 to 4096, found 18446744073709551615"));
        assert!(problem(json!({"layers": 1.5, "eps": 1})).ends_with("whole number from 1 to 4096, found 1.5"));
        assert!(problem(json!({"layers": "4", "eps": 1})).ends_with("whole number from 1 to 4096, found \"4\""));
        assert_eq!(problem(json!({"eps": 1})), "missing field `layers`");
    }

    #[test]
    fn numbers_that_single_precision_cannot_hold_are_refused() {
        for eps in [json!(0), json!(-1e-6), json!(1e-60), json!(1e60)] {
            assert!(problem(json!({"layers": 1, "eps": eps})).starts_with("eps: must be a positive number"), "{eps}");
        }
    }

    #[test]
    fn activations_go_by_their_transformers_names() {
        let parsed = |act: &str| parse::<HiddenAct>(&json!(act)).map(Activation::from);
        assert_eq!(parsed("silu"), Ok(Activation::Silu));
        assert_eq!(parsed("swish"), Ok(Activation::Silu));
        assert_eq!(parsed("gelu_pytorch_tanh"), Ok(Activation::GeluTanh));
        let error = problem(json!({"layers": 1, "eps": 1, "hidden_act": "relu"}));
        assert!(error.contains("hidden_act") && error.contains("`relu`") && error.contains("`silu`"), "{error}");
    }
}
