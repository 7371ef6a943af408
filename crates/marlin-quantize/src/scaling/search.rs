//! How much larger each channel is made.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use marlin_format::{EncodeOptions, PackedMatrix, Scheme, encode};
use marlin_kernels::cpu::CpuBackend;
use marlin_model::{InputNorms, LayerRunner, LoadedLayer, NormWeights};

use super::{ChannelScales, scaled};
use crate::QuantizeError;
use crate::calibrate::{Calibration, LayerWeights, learn};
use crate::capture::Observed;
use crate::encode_matrix::{encode_matrix, weighted_error};
use crate::quantize::{Task, encode_error};
use crate::role::layer_and_kind;
use crate::source::Source;

/// Powers of a channel's size that are tried, from none to the whole of it.
const STEPS: u8 = 10;

/// Finds the scales with which the model's matrices, each rounded by itself, lose least on a text: runs its layers over the text, one
/// at a time, as they are.
///
/// # Errors
/// The model cannot be run, or a weight is not finite.
pub(crate) fn find_scales(
    source: &Source<'_>,
    tasks: &[Task<'_>],
    encode: &EncodeOptions,
    calibration: &Calibration<'_>,
) -> Result<ChannelScales, QuantizeError> {
    let backend = Observed::new(calibration.backend.clone());
    let mut runner = calibration.runner(&backend, source)?;
    let embed = |window: &[u32]| Ok(runner.embed(source.checkpoint, window)?);
    let mut states: Vec<Vec<f32>> = calibration.windows.iter().map(embed).collect::<Result<_, QuantizeError>>()?;
    let mut search =
        Search { source, encode, norms: InputNorms::new(source.checkpoint)?, found: ChannelScales::default() };
    for index in 0..runner.layers() {
        let of_layer: Vec<&Task<'_>> =
            tasks.iter().filter(|task| layer_and_kind(&task.name).0 == Some(index)).collect();
        let matrices: Vec<&Task<'_>> = of_layer.iter().copied().filter(|task| task.matrix.is_some()).collect();
        let weights = LayerWeights::new(source, index, &matrices);
        let mut layer = runner.load(&weights.checkpoint()?, index)?;
        let sizes = sizes(&mut runner, &backend, &mut layer, &matrices, &mut states)?;
        drop(layer);
        search.layer(index, &of_layer, &sizes)?;
        // A model larger than memory must not stay mapped.
        weights.source_tensors().for_each(|tensor| source.checkpoint.release(tensor));
    }
    Ok(search.found)
}

/// Σ x² over the inputs of each channel, by the names of the matrices; the hidden states become those after the layer.
fn sizes(
    runner: &mut LayerRunner<'_, Observed<CpuBackend>>,
    backend: &Observed<CpuBackend>,
    layer: &mut LoadedLayer<Observed<CpuBackend>>,
    matrices: &[&Task<'_>],
    states: &mut [Vec<f32>],
) -> Result<HashMap<String, Arc<[f32]>>, QuantizeError> {
    let add = |sums: &mut Vec<f64>, _window: usize, rows: &[f32]| {
        for row in rows.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x * x));
        }
    };
    let sums = learn(runner, backend, layer, matrices, states, |cols| vec![0.0; cols], add)?;
    let single = |sums: &Vec<f64>| sums.iter().map(|&sum| sum as f32).collect();
    Ok(sums.into_iter().map(|(tensor, sums)| (tensor, single(&sums))).collect())
}

struct Search<'a> {
    source: &'a Source<'a>,
    encode: &'a EncodeOptions,
    norms: InputNorms,
    found: ChannelScales,
}

/// A matrix whose columns may be scaled, and Σ x² of each of them; without a scheme it is not rounded.
struct Candidate<'a> {
    name: &'a str,
    matrix: PackedMatrix<'a>,
    scheme: Option<Scheme>,
    sizes: Arc<[f32]>,
}

impl Search<'_> {
    fn layer(
        &mut self,
        index: usize,
        tasks: &[&Task<'_>],
        sizes: &HashMap<String, Arc<[f32]>>,
    ) -> Result<(), QuantizeError> {
        // Experts that are kept as one tensor keep their inputs.
        let has_kept_stack = tasks.iter().any(|task| task.matrix.is_none() && task.name.contains(".experts."));
        let mut by_norm: BTreeMap<String, (NormWeights, Vec<&Task<'_>>)> = BTreeMap::new();
        for task in tasks {
            if let Some(norm) = self.norms.of(&task.name) {
                by_norm.entry(norm.tensor.clone()).or_insert_with(|| (norm, Vec::new())).1.push(task);
            }
        }
        for (norm, readers) in by_norm.into_values() {
            let are_experts = readers.iter().any(|task| task.name.contains(".experts."));
            let is_whole = !has_kept_stack || are_experts || norm.tensor.contains("input_layernorm");
            if is_whole {
                self.behind_norm(&norm, &readers, sizes)?;
            }
        }
        if self.norms.is_proportional_to_up(index) {
            let names: HashSet<&str> = tasks.iter().map(|task| &*task.name).collect();
            for down in tasks.iter().filter(|task| task.matrix.is_some()) {
                let Some(up) = up_of(&down.name).filter(|up| names.contains(up.as_str())) else { continue };
                let has_bias = self.source.checkpoint.contains(&up.replace(".weight", ".bias"));
                if let Some(down_sizes) = sizes.get(&*down.name).filter(|_| !has_bias) {
                    let candidate = self.candidate(down, down_sizes.clone())?;
                    let Some(scales) = self.search(&[candidate], down_sizes)? else { continue };
                    let scales: Arc<[f32]> = scales.into();
                    self.found.columns.insert(down.name.to_string(), scales.clone());
                    self.found.rows.insert(up, scales);
                }
            }
        }
        Ok(())
    }

    /// Scales the channels that a norm gives.
    fn behind_norm(
        &mut self,
        norm: &NormWeights,
        readers: &[&Task<'_>],
        sizes: &HashMap<String, Arc<[f32]>>,
    ) -> Result<(), QuantizeError> {
        let rounded = readers.iter().filter_map(|task| Some((task, sizes.get(&*task.name)?.clone())));
        let candidates: Vec<Candidate<'_>> =
            rounded.map(|(task, sizes)| self.candidate(task, sizes)).collect::<Result<_, _>>()?;
        let Some(width) = candidates.first().map(|candidate| candidate.sizes.len()) else { return Ok(()) };
        let mut all = vec![0.0; width];
        for candidate in &candidates {
            all.iter_mut().zip(&*candidate.sizes).for_each(|(sum, size)| *sum += size);
        }
        let Some(scales) = self.search(&candidates, &all)? else { return Ok(()) };
        // Scales are those that the norm's type can say: its weights are rounded, and matrices make up for it.
        let before = self.source.vector(&norm.tensor, width)?;
        let stored: Vec<f32> =
            before.iter().zip(&scales).map(|(weight, scale)| (weight + norm.offset) / scale - norm.offset).collect();
        let scheme = self.source.checkpoint.info(&norm.tensor).and_then(|info| info.scheme()).unwrap_or(Scheme::F32);
        let fail = |error| encode_error(self.source.checkpoint, &norm.tensor, error);
        let after = encode(&stored, 1, width, &scheme, &EncodeOptions::default()).map_err(fail)?.decode();
        let exact = before.iter().zip(&after).map(|(before, after)| {
            let (before, after) = (before + norm.offset, after + norm.offset);
            if after == 0.0 { 1.0 } else { before / after }
        });
        let exact: Arc<[f32]> = exact.collect();
        for task in readers {
            self.found.columns.insert(task.name.to_string(), exact.clone());
        }
        self.found.norms.insert(norm.tensor.clone(), after);
        Ok(())
    }

    fn candidate<'a>(&self, task: &'a Task<'_>, sizes: Arc<[f32]>) -> Result<Candidate<'a>, QuantizeError>
    where
        Self: 'a,
    {
        let matrix = task.source(self.source)?;
        let scheme = task.matrix.map(|(_, scheme)| scheme).filter(|scheme| !scheme.is_dense());
        Ok(Candidate { name: &task.name, matrix, scheme, sizes })
    }

    /// The scales with which matrices of a common input lose least; `None` if that is without any. Channels are of the sizes whose squares
    /// are given.
    fn search(&self, candidates: &[Candidate<'_>], sizes: &[f32]) -> Result<Option<Vec<f32>>, QuantizeError> {
        let mut best = (self.cost(candidates, None)?, None);
        for step in 1..=STEPS {
            let Some(scales) = scales(sizes, f32::from(step) / f32::from(STEPS)) else { break };
            let cost = self.cost(candidates, Some(&scales))?;
            if cost < best.0 {
                best = (cost, Some(scales));
            }
        }
        Ok(best.1)
    }

    /// What the matrices lose with their channels scaled.
    fn cost(&self, candidates: &[Candidate<'_>], scales: Option<&[f32]>) -> Result<f64, QuantizeError> {
        let mut total = 0.0;
        for Candidate { name, matrix, scheme, sizes } in candidates {
            let Some(scheme) = scheme else { continue };
            let fail = |error| encode_error(self.source.checkpoint, name, error);
            total += match scales {
                None => {
                    let (rounded, _) = encode_matrix(matrix, *scheme, self.encode).map_err(fail)?;
                    weighted_error(matrix, &rounded, sizes)
                }
                Some(scales) => {
                    let matrix = scaled(matrix, Some(scales), None).map_err(fail)?;
                    let (rounded, _) = encode_matrix(&matrix, *scheme, self.encode).map_err(fail)?;
                    let sizes: Vec<f32> =
                        sizes.iter().zip(scales).map(|(size, scale)| size / (scale * scale)).collect();
                    weighted_error(&matrix, &rounded, &sizes)
                }
            };
        }
        Ok(total)
    }
}

/// The root mean squares of channels to a power, around 1; `None` if no channel ever has a value.
fn scales(sizes: &[f32], power: f32) -> Option<Vec<f32>> {
    let largest = sizes.iter().copied().fold(0.0, f32::max);
    if largest.is_nan() || largest <= 0.0 {
        return None;
    }
    // Channels without a value are no reason for scales beyond what a norm in half precision can say.
    let size = |size: f32| (size / largest).max(1e-8).sqrt().powf(power);
    let (least, most) =
        sizes.iter().map(|&s| size(s)).fold((f32::INFINITY, 0.0f32), |(least, most), s| (least.min(s), most.max(s)));
    let middle = (least * most).sqrt();
    Some(sizes.iter().map(|&s| size(s) / middle).collect())
}

/// The up projection before a down projection, where it is a matrix by itself.
fn up_of(down: &str) -> Option<String> {
    let (block, module) = down.strip_suffix(".weight")?.rsplit_once('.')?;
    let up = match module {
        "down_proj" => "up_proj",
        "w2" => "w3",
        _ => return None,
    };
    Some(format!("{block}.{up}.weight"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use marlin_checkpoint::{Checkpoint, MemoryTensor};
    use marlin_format::ScaleSearch;
    use marlin_kernels::KvType;
    use marlin_kernels::cpu::{Arithmetic, CpuOptions};
    use marlin_model::{LoadOptions, LogitRows, RotationParts, StepBatch, load_model};

    use super::*;
    use crate::moe::find_moe_layers;
    use crate::quantize::tasks;
    use crate::{TensorRole, Windows, scheme_by_name};

    /// Norms with and without an offset, linears stored together and apart, experts in each way they are stored, an activation that limits
    /// what is given, latent attention.
    const MODELS: [&str; 9] = [
        "qwen3-gqa2-tied",
        "gemma3-gqa2-linear-softcap-sharded",
        "phi3-gqa3-partial-sharded",
        "mixtral-top2",
        "mixtral-window-fused-sharded",
        "qwen3moe-dense-layers-sharded",
        "gptoss-bf16-sharded",
        "glm4moe-fused-shared2",
        "glm4moelite-shared-mtp",
    ];

    fn backend() -> CpuBackend {
        CpuBackend::new(CpuOptions { threads: Some(2), arithmetic: Arithmetic::Exact, simd: None }).unwrap()
    }

    fn text() -> Vec<u32> {
        (0..512u32).map(|i| i * i % 59).collect()
    }

    /// The model of these weights, none of them rounded.
    fn model(source: &Source<'_>, tasks: &[Task<'_>]) -> Checkpoint {
        let tensor = |task: &Task<'_>| {
            let shape = source.checkpoint.shape(&task.name).unwrap_or_default();
            let tensor = match (&task.matrix, shape.as_slice()) {
                (Some(_), _) => MemoryTensor::matrix(Arc::new(task.source(source).unwrap().into_owned())),
                (None, &[len]) => MemoryTensor::vector(&source.vector(&task.name, len).unwrap()),
                (None, _) => MemoryTensor::matrix(Arc::new(source.matrix(&task.name).unwrap().into_owned())),
            };
            (task.name.to_string(), tensor)
        };
        let tensors = tasks.iter().map(tensor).collect();
        Checkpoint::from_parts(source.checkpoint.name(), source.checkpoint.config().clone(), tensors).unwrap()
    }

    fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
        let options = LoadOptions {
            context: Some(32),
            step_tokens: 32,
            logit_rows: 32,
            kv_type: KvType::F32,
            ..LoadOptions::default()
        };
        let mut model = load_model(&backend(), checkpoint, &options).unwrap();
        let (mut sequence, mut batch, mut logits) = (model.kv().sequence(), StepBatch::new(), Vec::new());
        model.kv().append(&mut sequence, 32).unwrap();
        batch.push(&sequence, &text()[..32], LogitRows::All);
        model.forward(&batch).unwrap();
        model.read_logits(&mut logits).unwrap();
        logits
    }

    #[test]
    fn scaled_models_are_equal_ones() {
        let int3 = scheme_by_name("int3:32").unwrap();
        let scheme = |name: &str| (TensorRole::of(name, 2) == TensorRole::DecoderLinear).then_some(int3);
        let windows = Windows::new(text(), 32, None).unwrap();
        let encode = EncodeOptions { search: ScaleSearch::Mse, ..EncodeOptions::default() };
        for name in MODELS {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../marlin-model/tests/goldens").join(name);
            let checkpoint = Checkpoint::open(&path).unwrap();
            let moe_layers = find_moe_layers(&checkpoint).unwrap();
            let plain = Source::new(&checkpoint, RotationParts::default()).unwrap();
            let of_plain = tasks(&plain, &moe_layers, &scheme).unwrap();
            let before = logits(&model(&plain, &of_plain));
            let scales = find_scales(&plain, &of_plain, &encode, &Calibration::new(&windows, backend())).unwrap();
            let (norms, pairs) = (scales.norms.len(), scales.rows.len());
            let scaled = plain.scaled(scales);
            let of_scaled = tasks(&scaled, &moe_layers, &scheme).unwrap();
            let after = logits(&model(&scaled, &of_scaled));
            let square = |sum: f64, x: f64| sum + x * x;
            let off = before.iter().zip(&after).map(|(b, a)| f64::from(b - a)).fold(0.0, square);
            let whole = before.iter().map(|&b| f64::from(b)).fold(0.0, square);
            assert!(off <= 1e-9 * whole, "{name}: {}", (off / whole).sqrt());
            assert!(norms > 0, "{name} has no norm that is scaled");
            // What is limited, or stored as one, is not scaled.
            let has_pairs = !name.starts_with("gptoss") && !name.starts_with("phi3");
            assert_eq!(pairs > 0, has_pairs, "{name}: {pairs} up projections are scaled");
        }
    }

    #[test]
    fn scales_are_around_one_and_follow_sizes() {
        let found = scales(&[4.0, 1.0, 0.0, 0.25], 0.5).unwrap();
        assert!((found[0] / found[1] - 2f32.sqrt()).abs() < 1e-6 && found[1] > found[3] && found[3] > found[2]);
        assert!((found[0] * found[2] - 1.0).abs() < 1e-5, "{found:?}");
        assert_eq!(scales(&[0.0; 3], 0.5), None);
    }

    #[test]
    fn up_projections_by_their_names() {
        assert_eq!(up_of("model.layers.0.mlp.down_proj.weight").unwrap(), "model.layers.0.mlp.up_proj.weight");
        assert_eq!(up_of("m.experts.3.w2.weight").unwrap(), "m.experts.3.w3.weight");
        assert_eq!(up_of("model.layers.0.self_attn.o_proj.weight"), None);
    }
}
