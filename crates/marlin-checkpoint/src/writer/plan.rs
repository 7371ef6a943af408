//! Where every tensor of an output folder will lie, decided before the first is written.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use marlin_format::Scheme;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};

use crate::layouts::{self, Buffer, Content as PartContent, Form, Part};
use crate::quantization::QUANTIZATION_FIELDS;
use crate::{CheckpointError, ExportLayout, Rotations, weights};

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedTensor {
    /// Its name.
    pub name: String,
    content: Content,
}

#[derive(Debug, Clone, PartialEq)]
enum Content {
    Matrix { rows: usize, cols: usize, scheme: Scheme },
    Raw { dtype: Dtype, shape: Vec<usize> },
}

impl PlannedTensor {
    /// A matrix `[rows, cols]` in a scheme; an unquantised one becomes an ordinary tensor.
    pub fn matrix(name: impl Into<String>, rows: usize, cols: usize, scheme: Scheme) -> Self {
        let content = match layouts::dense_dtype(&scheme) {
            Some(dtype) => Content::Raw { dtype, shape: vec![rows, cols] },
            None => Content::Matrix { rows, cols, scheme },
        };
        Self { name: name.into(), content }
    }

    /// An ordinary tensor.
    pub fn raw(name: impl Into<String>, dtype: Dtype, shape: Vec<usize>) -> Self {
        Self { name: name.into(), content: Content::Raw { dtype, shape } }
    }

    /// Scheme and shape, if it is packed.
    pub(crate) fn packed(&self) -> Option<(Scheme, [usize; 2])> {
        match self.content {
            Content::Matrix { rows, cols, scheme } => Some((scheme, [rows, cols])),
            Content::Raw { .. } => None,
        }
    }

    /// Type and shape, if it is not packed.
    pub(crate) fn raw_content(&self) -> Option<(Dtype, &[usize])> {
        match &self.content {
            Content::Matrix { .. } => None,
            Content::Raw { dtype, shape } => Some((*dtype, shape)),
        }
    }

    /// Its type and shape, in words.
    pub(super) fn content(&self) -> String {
        match &self.content {
            Content::Matrix { rows, cols, scheme } => format!("[{rows}, {cols}] as {scheme}"),
            Content::Raw { dtype, shape } => format!("{dtype} {shape:?}"),
        }
    }

    /// The stored tensors it becomes; the error says what is impossible.
    fn parts(&self, layout: ExportLayout) -> Result<Vec<Slot>, String> {
        let parts = match &self.content {
            Content::Raw { dtype, shape } => {
                let content = PartContent::Buffer(Buffer::Codes, Form::Same);
                vec![Part { name: self.name.clone(), dtype: *dtype, shape: shape.clone(), content }]
            }
            Content::Matrix { rows, cols, scheme } => layout.parts(&self.name, scheme, *rows, *cols)?,
        };
        let slot = |Part { name, dtype, shape, content }: Part| {
            let bits = shape.iter().try_fold(dtype.bitsize(), |bits, n| bits.checked_mul(*n));
            match bits {
                Some(bits) if bits % 8 == 0 => {
                    Ok(Slot { content, name, dtype, shape, bytes: bits as u64 / 8, shard: 0, offset: 0 })
                }
                _ => Err(format!("tensor `{name}` cannot have shape {shape:?}")),
            }
        };
        parts.into_iter().map(slot).collect()
    }
}

/// A stored tensor and its place.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) content: PartContent,
    pub(super) name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    pub(super) bytes: u64,
    pub(super) shard: usize,
    /// From the start of the file.
    pub(super) offset: u64,
}

impl Slot {
    /// An upper bound of its entry in the header.
    fn header_bytes(&self) -> u64 {
        let name = Value::from(self.name.as_str()).to_string();
        (name.len() + 128 + 21 * self.shape.len()) as u64
    }
}

/// A weight file.
#[derive(Debug, Clone)]
pub(super) struct ShardFile {
    pub(super) name: String,
    /// Length and JSON.
    pub(super) header: Vec<u8>,
    /// Of the whole file.
    pub(super) bytes: u64,
}

/// All weight files of an output folder.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) shards: Vec<ShardFile>,
    /// The slots of each planned tensor.
    slots: Vec<Vec<Slot>>,
    tensors: Vec<PlannedTensor>,
    layout: ExportLayout,
    index: HashMap<String, usize>,
}

impl Plan {
    /// Distributes tensors over shards, in their order, none split, no file above `max_shard_bytes` unless one tensor
    /// alone is.
    pub(super) fn new(tensors: Vec<PlannedTensor>, layout: ExportLayout, max_shard_bytes: u64) -> Result<Self, String> {
        let mut slots = tensors.iter().map(|tensor| tensor.parts(layout)).collect::<Result<Vec<_>, _>>()?;
        check_names(&slots)?;

        // Assign shards.
        const FIXED_HEADER: u64 = 64;
        let (mut shard, mut filled) = (0, FIXED_HEADER);
        for tensor in &mut slots {
            let needed = tensor.iter().fold(0u64, |sum, slot| sum.saturating_add(slot.bytes + slot.header_bytes()));
            if filled > FIXED_HEADER && filled.saturating_add(needed) > max_shard_bytes {
                (shard, filled) = (shard + 1, FIXED_HEADER);
            }
            filled = filled.saturating_add(needed);
            tensor.iter_mut().for_each(|slot| slot.shard = shard);
        }

        // Lay out each.
        let count = shard + 1;
        let mut by_shard: Vec<Vec<&mut Slot>> = (0..count).map(|_| Vec::new()).collect();
        slots.iter_mut().flatten().for_each(|slot| by_shard[slot.shard].push(slot));
        let shards = by_shard
            .into_iter()
            .enumerate()
            .map(|(i, slots)| {
                let name = match count {
                    1 => weights::WEIGHTS_FILE.to_owned(),
                    _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
                };
                ShardFile::lay_out(name, slots)
            })
            .collect::<Result<_, _>>()?;
        let index = tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Ok(Self { shards, slots, tensors, layout, index })
    }

    pub(super) fn tensors(&self) -> &[PlannedTensor] {
        &self.tensors
    }

    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    pub(super) fn slots(&self, tensor: usize) -> &[Slot] {
        &self.slots[tensor]
    }

    /// The weight file that a tensor is in, with all of its parts.
    pub(super) fn shard_of(&self, tensor: usize) -> usize {
        self.slots[tensor][0].shard
    }

    pub(super) fn bytes(&self, tensor: usize) -> u64 {
        self.slots[tensor].iter().map(|slot| slot.bytes).sum()
    }

    /// The index of a model of several shards.
    pub(super) fn index_json(&self) -> Option<Value> {
        if self.shards.len() == 1 {
            return None;
        }
        let all = || self.slots.iter().flatten();
        let map: BTreeMap<&str, &str> = all().map(|s| (s.name.as_str(), self.shards[s.shard].name.as_str())).collect();
        let total: u64 = all().map(|slot| slot.bytes).sum();
        Some(json!({ "metadata": { "total_size": total }, "weight_map": map }))
    }

    /// config.json with the quantization_config that describes packed matrices and rotations, or without one if there are none.
    pub(super) fn config(
        &self,
        mut config: Value,
        rotations: Rotations,
        path: &Path,
    ) -> Result<Value, CheckpointError> {
        let Some(object) = config.as_object_mut() else {
            return Err(CheckpointError::Plan {
                path: path.to_path_buf(),
                problem: "the given config.json is no JSON object".to_owned(),
            });
        };
        QUANTIZATION_FIELDS.iter().for_each(|field| drop(object.shift_remove(*field)));
        let packed = |t: &PlannedTensor| t.packed().is_some();
        if self.tensors.iter().any(packed) || !rotations.is_none() {
            let described =
                self.tensors.iter().filter_map(|t| t.packed().map(|(scheme, shape)| (&*t.name, scheme, shape)));
            let plain = self.tensors.iter().filter(|t| t.raw_content().is_some_and(|(_, shape)| shape.len() == 2));
            let described: Vec<_> = described.collect();
            let plain: Vec<&str> = plain.map(|t| t.name.as_str()).collect();
            let described = self.layout.quantization_config(&described, &plain, rotations);
            let described = described.map_err(|problem| CheckpointError::Plan { path: path.to_path_buf(), problem })?;
            object.insert("quantization_config".to_owned(), described);
        }
        Ok(config)
    }
}

/// Names must be unique, those of the parts of packed matrices included.
fn check_names(slots: &[Vec<Slot>]) -> Result<(), String> {
    let mut seen = HashSet::new();
    for slot in slots.iter().flatten() {
        if slot.name.is_empty() || slot.name == "__metadata__" {
            return Err(format!("a tensor cannot be named `{}`", slot.name));
        }
        if !seen.insert(slot.name.as_str()) {
            return Err(format!("two tensors would be stored as `{}`", slot.name));
        }
    }
    Ok(())
}

impl ShardFile {
    /// Gives every slot its offset. Wide types come first, so that everything is aligned to its own size without gaps.
    fn lay_out(name: String, mut slots: Vec<&mut Slot>) -> Result<Self, String> {
        slots.sort_by_key(|slot| std::cmp::Reverse(slot.dtype.bitsize()));
        let mut end = 0;
        let mut infos = Vec::with_capacity(slots.len());
        for slot in &mut slots {
            slot.offset = end;
            end = end.checked_add(slot.bytes).ok_or("the model is too large")?;
            let data_offsets = (slot.offset as usize, end as usize);
            infos.push((slot.name.clone(), TensorInfo { dtype: slot.dtype, shape: slot.shape.clone(), data_offsets }));
        }
        // Readers of the PyTorch world refuse files that do not claim to be theirs.
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let metadata = Metadata::new(Some(format), infos).map_err(|e| format!("{name}: {e}"))?;
        let mut json = serde_json::to_vec(&metadata).map_err(|e| format!("{name}: {e}"))?;
        json.resize(json.len().next_multiple_of(8), b' ');

        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.append(&mut json);
        slots.iter_mut().for_each(|slot| slot.offset += header.len() as u64);
        let bytes = header.len() as u64 + end;
        Ok(Self { name, header, bytes })
    }
}
