//! The `quantization_config` of config.json.

use std::collections::BTreeMap;

use marlin_format::Scheme;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::layouts::{awq, compressed_tensors, fp8, gptq, mlx, modelopt};
use crate::source::Source;
use crate::{CONFIG_FILE, CheckpointError};

/// The `quant_method` of folders that this project writes.
pub(crate) const METHOD: &str = "metal-marlin";
const VERSION: u32 = 1;
/// The `quant_method` of gpt-oss as published.
const GPT_OSS_METHOD: &str = "mxfp4";
/// What `auto-gptq` wrote before config.json had a `quantization_config`.
const GPTQ_CONFIG_FILE: &str = "quantize_config.json";
/// What `autoawq` wrote before.
const AWQ_CONFIG_FILE: &str = "quant_config.json";
/// What `nvidia-modelopt` wrote before.
const MODELOPT_CONFIG_FILE: &str = "hf_quant_config.json";

/// Fields of config.json that say how matrices are packed: the usual one, that of `compressed-tensors` in 2024, MLX's.
pub(crate) const QUANTIZATION_FIELDS: [&str; 3] = ["quantization_config", "compression_config", "quantization"];

/// What a quantised folder of this project says about its packed matrices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizationConfig {
    quant_method: String,
    version: u32,
    /// Schemes by a name that is local to the file.
    pub schemes: BTreeMap<String, Scheme>,
    /// The packed matrices; every other tensor is stored as it is.
    pub tensors: BTreeMap<String, QuantizedTensor>,
    /// What the weights expect to be rotated. Programs that know of none refuse the field.
    #[serde(default, skip_serializing_if = "Rotations::is_none")]
    pub rotations: Rotations,
}

/// Rotations of activations that weights were made for: a decoder that leaves one out computes something else. Each is of blocks of so
/// many values by a Hadamard matrix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotations {
    /// Of the residual stream: after the embedding, and before the final norm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<usize>,
    /// Of what `down_proj` of MLPs is given, not of those of experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mlp: Option<usize>,
}

impl Rotations {
    /// Whether nothing is rotated.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Storage of one packed matrix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizedTensor {
    /// A name in [`QuantizationConfig::schemes`].
    pub scheme: String,
    /// `[rows, cols]` = `[output features, input features]`, unpacked.
    pub shape: [usize; 2],
}

impl QuantizationConfig {
    /// Describes packed matrices `(name, scheme, shape)`, and what is to be rotated.
    pub(crate) fn describe<'a>(
        matrices: impl Iterator<Item = (&'a str, Scheme, [usize; 2])>,
        rotations: Rotations,
    ) -> Self {
        let mut config = Self {
            quant_method: METHOD.to_owned(),
            version: VERSION,
            schemes: BTreeMap::new(),
            tensors: BTreeMap::new(),
            rotations,
        };
        for (name, scheme, shape) in matrices {
            let scheme_name = config.name(scheme);
            config.schemes.insert(scheme_name.clone(), scheme);
            config.tensors.insert(name.to_owned(), QuantizedTensor { scheme: scheme_name, shape });
        }
        config
    }

    /// A name that no other scheme has: short names are for people and may coincide.
    fn name(&self, scheme: Scheme) -> String {
        let mut name = scheme.to_string();
        while self.schemes.get(&name).is_some_and(|taken| *taken != scheme) {
            name.push('*');
        }
        name
    }

    /// Reads it from config.json, whose `quantization_config` is `found`. `file` names config.json in messages.
    fn read(found: &Value, file: &str) -> Result<Self, CheckpointError> {
        let version = found.get("version").unwrap_or(&Value::Null);
        if version.as_u64() != Some(u64::from(VERSION)) {
            return Err(CheckpointError::Version {
                file: file.to_owned(),
                found: version.to_string(),
                supported: VERSION,
            });
        }
        let read = Self::deserialize(found)
            .map_err(|e| CheckpointError::malformed(file, format!("quantization_config is invalid: {e}")))?;
        for (name, tensor) in &read.tensors {
            if !read.schemes.contains_key(&tensor.scheme) {
                let problem = format!("tensor `{name}` has scheme `{}`, which `schemes` lacks", tensor.scheme);
                return Err(CheckpointError::malformed(file, problem));
            }
        }
        Ok(read)
    }

    /// The scheme of a packed matrix; `None` for a tensor stored as it is.
    pub fn scheme(&self, tensor: &str) -> Option<Scheme> {
        self.tensors.get(tensor).and_then(|t| self.schemes.get(&t.scheme)).copied()
    }
}

/// How the matrices of a folder are packed, by the layout.
pub(crate) enum Quantization {
    Ours(QuantizationConfig),
    CompressedTensors(compressed_tensors::Config),
    Gptq(gptq::Config),
    Awq(awq::Config),
    Fp8(fp8::Config),
    ModelOpt(modelopt::Config),
    Mlx(mlx::Config),
    /// The experts of gpt-oss as published are ordinary tensors of bytes, which the family knows.
    GptOss,
}

impl Quantization {
    /// Reads it from config.json, or from the file beside it that older folders have; `None` for an unquantised model.
    /// Given back with the name of the file, in messages.
    pub(crate) fn read(config: &Value, source: &Source) -> Result<Option<(Self, String)>, CheckpointError> {
        if let Some(found) = mlx::Config::find(config) {
            let file = source.label(CONFIG_FILE);
            return Ok(Some((Self::Mlx(mlx::Config::read(found, &file)?), file)));
        }
        let found = QUANTIZATION_FIELDS.iter().find_map(|field| config.get(field));
        if let Some(found) = found.filter(|found| !found.is_null()) {
            let file = source.label(CONFIG_FILE);
            return Ok(Some((Self::of(found, &file)?, file)));
        }
        let beside =
            |name| Ok::<_, CheckpointError>(source.json::<Value>(name)?.map(|read| (read, source.label(name))));
        if let Some((found, file)) = beside(GPTQ_CONFIG_FILE)? {
            return Ok(Some((Self::Gptq(gptq::Config::read(&found, &file)?), file)));
        }
        if let Some((found, file)) = beside(AWQ_CONFIG_FILE)? {
            return Ok(Some((Self::Awq(awq::Config::read(&found, &file)?), file)));
        }
        if let Some((found, file)) = beside(MODELOPT_CONFIG_FILE)? {
            let found = found.get("quantization").unwrap_or(&Value::Null);
            return Ok(Some((Self::ModelOpt(modelopt::Config::read(found, &file)?), file)));
        }
        Ok(None)
    }

    fn of(found: &Value, file: &str) -> Result<Self, CheckpointError> {
        let foreign =
            |layout: &str| CheckpointError::ForeignLayout { file: file.to_owned(), layout: layout.to_owned() };
        match found.get("quant_method").and_then(Value::as_str) {
            Some(METHOD) => QuantizationConfig::read(found, file).map(Self::Ours),
            Some(compressed_tensors::METHOD) => {
                compressed_tensors::Config::read(found, file).map(Self::CompressedTensors)
            }
            Some(gptq::METHOD) => gptq::Config::read(found, file).map(Self::Gptq),
            Some(awq::METHOD) => awq::Config::read(found, file).map(Self::Awq),
            Some(fp8::METHOD | fp8::FBGEMM_METHOD) => fp8::Config::read(found, file).map(Self::Fp8),
            Some(method) if method.starts_with(modelopt::METHOD) => {
                modelopt::Config::read(found, file).map(Self::ModelOpt)
            }
            Some(GPT_OSS_METHOD) => Ok(Self::GptOss),
            Some(layout) => Err(foreign(layout)),
            None => Err(CheckpointError::malformed(file, "quantization_config lacks quant_method")),
        }
    }
}
