//! Which layers' experts the host computes.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use marlin_kernels::cpu::CpuBackend;

use crate::ModelError;
use crate::spec::DecoderSpec;

/// Routed experts that stay in the host's memory and are computed there, while all else of a model is on another device.
#[derive(Debug, Clone)]
pub struct ExpertOffload {
    /// What computes them.
    pub host: CpuBackend,
    /// Whose experts they are.
    pub layers: ExpertLayers,
}

/// Layers of a model by their indices, for example `0-11,20,40-`; of a range, the layers that have experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpertLayers {
    /// Every layer with experts.
    All,
    /// Those in any of these ranges.
    Ranges(Vec<LayerRange>),
}

/// Layers from one to another, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerRange {
    /// The first one.
    pub first: usize,
    /// The last one; `None` is the model's last.
    pub last: Option<usize>,
}

impl ExpertLayers {
    /// Every layer from this one on.
    pub fn from_layer(first: usize) -> Self {
        Self::Ranges(vec![LayerRange { first, last: None }])
    }

    /// The shortest list of these layers.
    pub fn of(layers: &BTreeSet<usize>) -> Self {
        let mut ranges: Vec<LayerRange> = Vec::new();
        for &layer in layers {
            match ranges.last_mut() {
                Some(LayerRange { last: Some(last), .. }) if *last + 1 == layer => *last = layer,
                _ => ranges.push(LayerRange { first: layer, last: Some(layer) }),
            }
        }
        Self::Ranges(ranges)
    }

    /// The layers of a model that are meant, each of which has experts.
    ///
    /// # Errors
    /// The model has no experts, or not the layers, or a range has no layer with experts.
    pub(crate) fn resolve(&self, spec: &DecoderSpec, model: &str) -> Result<BTreeSet<usize>, ModelError> {
        let refuse = |problem: String| Err(ModelError::ExpertLayers { model: model.to_owned(), problem });
        let all: BTreeSet<usize> = spec.expert_layers().collect();
        if all.is_empty() {
            return refuse("the model has no experts".to_owned());
        }
        let Self::Ranges(ranges) = self else { return Ok(all) };
        let mut chosen = BTreeSet::new();
        let end = spec.layers.len();
        for range in ranges {
            let (first, last) = (range.first, range.last.unwrap_or(end - 1).max(range.first));
            if last >= end {
                let missing = if first >= end { first } else { last };
                return refuse(format!("there is no layer {missing}, the last one is {}", end - 1));
            }
            if all.range(first..=last).next().is_none() {
                let which =
                    if first == last { format!("layer {first} has") } else { format!("layers {first}-{last} have") };
                return refuse(format!("{which} no experts; layers {} have", Self::of(&all)));
            }
            chosen.extend(all.range(first..=last));
        }
        Ok(chosen)
    }
}

impl FromStr for ExpertLayers {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        text.split(',').map(str::parse).collect::<Result<_, _>>().map(Self::Ranges)
    }
}

impl FromStr for LayerRange {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        let refuse = || ModelError::LayerRange { found: text.to_owned() };
        let index = |digits: &str| {
            let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|_| is_number).ok_or_else(refuse)
        };
        let (first, last) = match text.split_once('-') {
            None => (index(text)?, Some(index(text)?)),
            Some((first, "")) => (index(first)?, None),
            Some((first, last)) => (index(first)?, Some(index(last)?)),
        };
        if last.is_some_and(|last| last < first) { Err(refuse()) } else { Ok(Self { first, last }) }
    }
}

/// As it is parsed; all layers are `all`.
impl fmt::Display for ExpertLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Ranges(ranges) = self else { return f.write_str("all") };
        for (index, range) in ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{range}")?;
        }
        Ok(())
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self { first, last: None } => write!(f, "{first}-"),
            Self { first, last: Some(last) } if first == last => write!(f, "{first}"),
            Self { first, last: Some(last) } => write!(f, "{first}-{last}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: usize, last: impl Into<Option<usize>>) -> LayerRange {
        LayerRange { first, last: last.into() }
    }

    #[test]
    fn lists_are_of_indices_and_ranges() {
        for (text, ranges) in [
            ("5", vec![range(5, 5)]),
            ("0-11,20,40-", vec![range(0, 11), range(20, 20), range(40, None)]),
            ("3,1-2", vec![range(3, 3), range(1, 2)]),
            ("0-", vec![range(0, None)]),
        ] {
            let layers = ExpertLayers::Ranges(ranges);
            assert_eq!(text.parse::<ExpertLayers>().unwrap(), layers, "{text}");
            assert_eq!(layers.to_string(), text);
        }
        assert_eq!("4-4".parse::<LayerRange>().unwrap().to_string(), "4");
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in
            ["", ",", "1,", "-", "-3", "3-1", "1--2", "1-2-3", "a", "0-b", "+1", "1 ", "1;2", "99999999999999999999"]
        {
            let error = text.parse::<ExpertLayers>().unwrap_err().to_string();
            assert!(error.contains("0-11,20,40-"), "{text}: {error}");
        }
    }

    #[test]
    fn layers_are_listed_by_ranges() {
        let list = |layers: &[usize]| ExpertLayers::of(&layers.iter().copied().collect()).to_string();
        assert_eq!(list(&[1, 2, 3, 7, 9, 10]), "1-3,7,9-10");
        assert_eq!(list(&[4]), "4");
    }
}
