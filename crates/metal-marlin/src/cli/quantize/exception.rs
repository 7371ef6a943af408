//! `--matrix`: matrices in a format of their own.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::bail;
use marlin_checkpoint::Checkpoint;
use marlin_format::Scheme;
use marlin_quantize::{TensorRole, kind_of, layer_and_kind, scheme_by_name};

/// `NAME=FORMAT[:SIZE]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exception {
    /// The last parts of a matrix's name.
    name: String,
    scheme: Scheme,
}

impl FromStr for Exception {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, format) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(|| {
            format!("`{text}` is no NAME=FORMAT, such as v_proj=int8 or layers.0.mlp.down_proj=int4:32")
        })?;
        Ok(Self { name: name.to_owned(), scheme: scheme_by_name(format)? })
    }
}

impl Exception {
    /// Whether it is about this tensor.
    fn is_about(&self, tensor: &str) -> bool {
        let matrix = tensor.strip_suffix(".weight").unwrap_or(tensor);
        matrix.strip_suffix(self.name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }
}

/// The schemes of the matrices that the exceptions are about; each must be about one at least.
pub(super) fn resolve(exceptions: &[Exception], checkpoint: &Checkpoint) -> anyhow::Result<BTreeMap<String, Scheme>> {
    let role = |name: &str| TensorRole::of(name, checkpoint.info(name).map_or(0, |info| info.shape.len()));
    let is_matrix = |name: &str| checkpoint.info(name).is_some_and(|info| info.shape.len() == 2);
    let is_of_layer = |name: &str| layer_and_kind(name).0.is_some();
    // Routers are of no known kind, and quantised by name alone.
    let is_named = |name: &&str| match role(name) {
        TensorRole::DecoderLinear => true,
        TensorRole::Unknown => is_matrix(name) && is_of_layer(name),
        _ => false,
    };
    let linears: Vec<&str> = checkpoint.tensor_names().filter(is_named).collect();
    let mut schemes = BTreeMap::new();
    for exception in exceptions {
        let mut about = linears.iter().filter(|name| exception.is_about(name)).peekable();
        if about.peek().is_none() {
            let mut kinds: Vec<_> = linears.iter().map(|name| kind_of(name)).collect();
            kinds.sort_unstable();
            kinds.dedup();
            bail!(
                "--matrix {}: {} has no such matrix in its decoder; it has {} in each layer",
                exception.name,
                checkpoint.name(),
                kinds.join(", ")
            );
        }
        schemes.extend(about.map(|name| ((*name).to_owned(), exception.scheme)));
    }
    Ok(schemes)
}

#[cfg(test)]
mod tests {
    use marlin_format::{Format, Grouping};

    use super::*;

    #[test]
    fn names_formats_and_groups() {
        let parse = |text: &str| text.parse::<Exception>();
        assert_eq!(parse("v_proj=int8").unwrap().scheme, Format::Int8.scheme(None).unwrap());
        let grouped = parse("layers.0.mlp.down_proj=int4:32").unwrap();
        assert_eq!(grouped.scheme, Format::Int4.scheme(Some(Grouping::Columns(32))).unwrap());
        for (text, wanted) in [
            ("v_proj", "NAME=FORMAT"),
            ("=int8", "NAME=FORMAT"),
            ("v_proj=int5", "formats are"),
            ("v_proj=bf16", "formats are"),
            ("v_proj=int4:many", "many"),
            ("v_proj=mxfp4:64", "32 only"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn names_end_at_dots() {
        let exception = |name: &str| Exception { name: name.to_owned(), scheme: Scheme::F16 };
        let down = "model.layers.10.mlp.down_proj.weight";
        for name in ["down_proj", "mlp.down_proj", "layers.10.mlp.down_proj", "model.layers.10.mlp.down_proj"] {
            assert!(exception(name).is_about(down), "{name}");
        }
        for name in ["proj", "0.mlp.down_proj", "up_proj", "mlp", "down_proj.weight"] {
            assert!(!exception(name).is_about(down), "{name}");
        }
    }
}
