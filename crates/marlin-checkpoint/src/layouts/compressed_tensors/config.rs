//! The `quantization_config` of `compressed-tensors`.

use marlin_format::{Element, Grouping};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::CheckpointError;
use crate::layouts::pattern::Pattern;

/// How a folder says its linears are stored.
pub(crate) struct Config {
    pub(super) groups: Vec<Group>,
    rounds_cache: bool,
    rounds_activations: bool,
}

/// Linears that share their storage.
pub(super) struct Group {
    name: String,
    targets: Vec<Target>,
    pub(super) format: Format,
    pub(super) weights: Weights,
}

/// Which linears a group is about.
enum Target {
    /// All that no other target names: a class of modules, usually `Linear`.
    Class,
    /// One, by its name.
    Name(String),
    /// Those whose name begins with a match.
    Pattern(Pattern),
}

/// Where the codes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum Format {
    /// `weight_packed`, integers in 32-bit words.
    #[serde(rename = "pack-quantized")]
    Packed,
    /// `weight`, a byte each.
    #[serde(rename = "naive-quantized", alias = "int-quantized", alias = "float-quantized")]
    Bytes,
    /// `weight_packed`, two E2M1 a byte; scales in E4M3 under one f32.
    #[serde(rename = "nvfp4-pack-quantized")]
    Nvfp4,
    /// `weight_packed`, two E2M1 a byte; scales are powers of two.
    #[serde(rename = "mxfp4-pack-quantized")]
    Mxfp4,
    /// `weight`, E4M3; scales are powers of two.
    #[serde(rename = "mxfp8-quantized")]
    Mxfp8,
    /// `weight_packed`, `scale_packed` and `meta`, 2:4 in the order of a kernel.
    #[serde(rename = "marlin-24")]
    Marlin24,
}

/// Codes and groups of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Weights {
    pub(super) element: Element,
    pub(super) grouping: Grouping,
    /// Whether there are zero points.
    pub(super) asymmetric: bool,
}

/// The fields as they stand in config.json, as far as they bear on weights.
#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    config_groups: Map<String, Value>,
    #[serde(default)]
    kv_cache_scheme: Value,
    #[serde(default)]
    transform_config: Value,
    #[serde(default)]
    sparsity_config: Value,
}

#[derive(Deserialize)]
struct RawGroup {
    targets: Vec<String>,
    #[serde(default)]
    weights: Option<RawWeights>,
    #[serde(default)]
    input_activations: Value,
    #[serde(default)]
    output_activations: Value,
    #[serde(default)]
    format: Option<String>,
}

#[derive(Deserialize)]
struct RawWeights {
    #[serde(default = "eight")]
    num_bits: u32,
    #[serde(default, rename = "type")]
    kind: RawKind,
    #[serde(default = "yes")]
    symmetric: bool,
    #[serde(default)]
    strategy: Option<String>,
    #[serde(default)]
    group_size: Option<i64>,
    #[serde(default)]
    block_structure: Option<BlockStructure>,
}

#[derive(Default, Deserialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
enum RawKind {
    #[default]
    Int,
    Float,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a tile: [rows, cols] or \"rowsxcols\"")]
enum BlockStructure {
    Sides([u32; 2]),
    Text(String),
}

fn eight() -> u32 {
    8
}

fn yes() -> bool {
    true
}

impl Config {
    /// Reads it; `file` names config.json in messages.
    ///
    /// # Errors
    /// A layout that is not read (sparse ones, rotations), or a field that is missing or contradicts others.
    pub(crate) fn read(found: &Value, file: &str) -> Result<Self, CheckpointError> {
        let malformed = |problem: String| CheckpointError::malformed(file, format!("quantization_config: {problem}"));
        let raw = RawConfig::deserialize(found).map_err(|e| malformed(e.to_string()))?;
        let foreign = |what: &str| CheckpointError::ForeignLayout {
            file: file.to_owned(),
            layout: format!("compressed-tensors, {what}"),
        };
        if is_set(&raw.transform_config) {
            return Err(foreign("transform_config (rotated weights)"));
        }
        match raw.sparsity_config.get("format").and_then(Value::as_str) {
            None | Some("dense" | "sparse-24-bitmask") => {}
            Some(sparse) => return Err(foreign(sparse)),
        }

        let rounds_cache = is_set(&raw.kv_cache_scheme);
        let mut config = Self { groups: Vec::new(), rounds_cache, rounds_activations: false };
        for (name, group) in &raw.config_groups {
            let malformed = |problem: String| malformed(format!("group `{name}`: {problem}"));
            let group = RawGroup::deserialize(group).map_err(|e| malformed(e.to_string()))?;
            config.rounds_activations |= is_set(&group.input_activations) || is_set(&group.output_activations);
            let Some(weights) = group.weights else { continue };
            let format = group.format.or_else(|| raw.format.clone());
            let format = format.ok_or_else(|| malformed("neither it nor the whole has a `format`".to_owned()))?;
            if format == "dense" {
                continue;
            }
            let format = Format::deserialize(Value::from(format.as_str())).map_err(|_| foreign(&format))?;
            config.groups.push(Group {
                name: name.clone(),
                targets: group.targets.iter().map(|t| Target::read(t)).collect::<Result<_, _>>().map_err(malformed)?,
                format,
                weights: weights.read(format).map_err(malformed)?,
            });
        }
        Ok(config)
    }

    /// What is not followed, one sentence each.
    pub(super) fn notes(&self) -> Vec<String> {
        let cache = "the KV cache is not quantised as kv_cache_scheme in config.json says";
        let activations =
            "activations are not rounded as input_activations in config.json says; weights are read exactly";
        let notes = [(self.rounds_cache, cache), (self.rounds_activations, activations)];
        notes.into_iter().filter(|(set, _)| *set).map(|(_, note)| note.to_owned()).collect()
    }

    /// Whether a tensor says only how activations or the KV cache are to be rounded, which is not followed.
    pub(super) fn ignores(&self, tensor: &str) -> bool {
        let Some((_, last)) = tensor.rsplit_once('.') else { return false };
        let Some((what, parameter)) = last.split_once('_') else { return false };
        matches!(parameter, "scale" | "zero_point" | "global_scale")
            && match what {
                "input" | "output" => self.rounds_activations || self.rounds_cache,
                "q" | "k" | "v" => self.rounds_cache,
                _ => false,
            }
    }

    /// The group of a linear that is stored quantised.
    pub(super) fn group(&self, module: &str) -> Result<&Group, String> {
        if let [only] = self.groups.as_slice() {
            return Ok(only);
        }
        let named = |target: &Target| match target {
            Target::Name(name) => name == module,
            Target::Pattern(pattern) => pattern.matches(module),
            Target::Class => false,
        };
        let by_name = self.groups.iter().find(|group| group.targets.iter().any(named));
        let by_class = || self.groups.iter().find(|g| g.targets.iter().any(|t| matches!(t, Target::Class)));
        by_name.or_else(by_class).ok_or_else(|| {
            let groups: Vec<&str> = self.groups.iter().map(|group| group.name.as_str()).collect();
            format!("`{module}` is stored quantised, but no group of config_groups targets it; there are {groups:?}")
        })
    }
}

/// Whether an optional part is there: not null, not `{}`.
fn is_set(value: &Value) -> bool {
    !value.is_null() && value.as_object().is_none_or(|object| !object.is_empty())
}

impl Target {
    fn read(text: &str) -> Result<Self, String> {
        match text.strip_prefix("re:") {
            Some(pattern) => {
                Pattern::new(pattern).map(Self::Pattern).map_err(|problem| format!("target `{text}`: {problem}"))
            }
            // Names of modules have dots, or are `lm_head`; names of classes are in camel case.
            None if text.starts_with(char::is_uppercase) => Ok(Self::Class),
            None => Ok(Self::Name(text.to_owned())),
        }
    }
}

impl RawWeights {
    fn read(&self, format: Format) -> Result<Weights, String> {
        let element = match (format, self.kind, self.num_bits) {
            (Format::Packed, RawKind::Int, bits @ 2..=8) if self.symmetric => Element::Int(bits as u8),
            (Format::Packed, RawKind::Int, bits @ 2..=8) => Element::Uint(bits as u8),
            // Whatever the range of the codes, they are stored as bytes.
            (Format::Bytes, RawKind::Int, 1..=8) if self.symmetric => Element::Int(8),
            (Format::Bytes, RawKind::Int, 1..=8) => Element::Uint(8),
            (Format::Marlin24, RawKind::Int, bits @ (4 | 8)) if self.symmetric => Element::Int(bits as u8),
            (Format::Bytes | Format::Mxfp8, RawKind::Float, 8) if self.symmetric => Element::E4M3,
            (Format::Nvfp4 | Format::Mxfp4, RawKind::Float, 4) if self.symmetric => Element::E2M1,
            (_, kind, bits) => {
                let kind = if kind == RawKind::Int { "int" } else { "float" };
                let symmetric = if self.symmetric { "symmetric" } else { "asymmetric" };
                return Err(format!("{symmetric} weights of type {kind} and {bits} bits are not read in this format"));
            }
        };
        let grouping = self.grouping()?;
        if format == Format::Marlin24 && !matches!(grouping, Grouping::Row | Grouping::Columns(128)) {
            return Err(format!("groups of marlin-24 are rows or 128 columns, not {grouping}"));
        }
        if !self.symmetric && grouping == Grouping::Tensor {
            return Err("asymmetric weights with one scale for the tensor are not read".to_owned());
        }
        Ok(Weights { element, grouping, asymmetric: !self.symmetric })
    }

    fn grouping(&self) -> Result<Grouping, String> {
        let strategy = match (self.strategy.as_deref(), self.group_size) {
            (Some(strategy), _) => strategy,
            (None, None) => "tensor",
            (None, Some(-1)) => "channel",
            (None, Some(_)) => "group",
        };
        match strategy {
            "tensor" => Ok(Grouping::Tensor),
            "channel" => Ok(Grouping::Row),
            "group" | "tensor_group" => {
                let size = self.group_size.and_then(|size| u32::try_from(size).ok()).filter(|size| *size > 0);
                let size = size.ok_or_else(|| format!("group_size is {:?}, not a positive number", self.group_size))?;
                Ok(Grouping::Columns(size))
            }
            "block" => {
                let sides = match &self.block_structure {
                    Some(BlockStructure::Sides([rows, cols])) => Some((*rows, *cols)),
                    Some(BlockStructure::Text(text)) => text
                        .split_once('x')
                        .and_then(|(rows, cols)| rows.trim().parse().ok().zip(cols.trim().parse().ok())),
                    None => None,
                };
                let (rows, cols) = sides.ok_or("strategy `block` without block_structure [rows, cols]")?;
                Ok(Grouping::Block { rows, cols })
            }
            other => Err(format!("strategy `{other}` is not read for weights")),
        }
    }
}
