//! `metal-marlin inspect`: what a model folder is.

use std::io::{Write, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use marlin_checkpoint::{Checkpoint, Layout, Rotations, Storage, TensorInfo};
use marlin_kernels::KvType;
use marlin_kernels::cpu::{CpuBackend, CpuOptions};
use marlin_model::{ExpertShape, MemoryPlan, ModelError, ModelShape, Planner, format_size};
use marlin_quantize::{Footprint, kind_of};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::model::{self, HubOptions};
use crate::LoadError;

const EXAMPLES: &str = "\
Examples:
  metal-marlin inspect path/to/model
  metal-marlin inspect path/to/model --context 8192 --context 32768
  metal-marlin inspect path/to/model --tensors
  metal-marlin inspect bundled --json

Only headers are read, however large the model is. Memory is what `plan` counts for one sequence,
with a KV cache in f16; `plan` answers what fits. Bits count scales and zero points.";

/// Say what a model is made of: sizes, tensors and their formats, memory by context
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of the model, its id on the Hub, or `bundled`
    model: PathBuf,

    #[command(flatten)]
    hub: HubOptions,

    /// Context to tell the memory of, in tokens; may be given several times [default: some up to the model's own]
    #[arg(long, value_name = "N")]
    context: Vec<NonZeroUsize>,

    /// List every tensor instead of summing up those of a kind
    #[arg(long)]
    tensors: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let inspection = inspect(&args)?;
    let text = if args.json { format!("{:#}\n", inspection.to_json()) } else { inspection.to_text() };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// What `--json` prints.
pub(super) fn report(args: Args) -> anyhow::Result<Value> {
    Ok(inspect(&args)?.to_json())
}

fn inspect(args: &Args) -> anyhow::Result<Inspection> {
    let (checkpoint, temporary) = model::open_headers(Some(&args.model), &args.hub)?;
    let backend = CpuBackend::new(CpuOptions::default()).map_err(LoadError::Device)?;
    let decoder = match Planner::new(&backend, &checkpoint) {
        Ok(planner) => Ok(Decoder::of(&planner, &args.context)?),
        // Its tensors can be told all the same, but not what they would take.
        Err(ModelError::Config { source, .. }) if args.context.is_empty() => Err(source.to_string()),
        Err(error) => return Err(error.into()),
    };
    let groups = groups(&checkpoint, args.tensors);
    Ok(Inspection { checkpoint, _temporary: temporary, decoder, groups })
}

/// What config.json says, and what follows for memory.
struct Decoder {
    architecture: String,
    shape: ModelShape,
    /// By the names of KV types.
    kv_bytes_per_token: [(&'static str, usize); KvType::ALL.len()],
    /// One a context.
    plans: Vec<MemoryPlan>,
}

impl Decoder {
    fn of(planner: &Planner<'_>, contexts: &[NonZeroUsize]) -> Result<Self, ModelError> {
        let shape = planner.shape();
        let contexts = match contexts {
            [] => usual_contexts(shape.context),
            asked => asked.iter().map(|context| context.get()).collect(),
        };
        let plan = |context| planner.plan(&planner.load_options(context, 1));
        Ok(Self {
            architecture: planner.architecture().to_owned(),
            shape,
            kv_bytes_per_token: KvType::ALL.map(|kv_type| (kv_type.name(), planner.kv_bytes_per_token(kv_type))),
            plans: contexts.into_iter().map(plan).collect::<Result<_, _>>()?,
        })
    }
}

/// Powers of four below the model's context, the last three of them, and that context.
fn usual_contexts(longest: usize) -> Vec<usize> {
    let mut powers: Vec<usize> =
        std::iter::successors(Some(256usize), |n| n.checked_mul(4)).take_while(|&n| n < longest).collect();
    powers.drain(..powers.len().saturating_sub(3));
    powers.push(longest);
    powers
}

/// Tensors that differ only in their layer, or a single one.
struct Group {
    name: String,
    count: usize,
    shape: Vec<usize>,
    storage: Storage,
    weights: u64,
    bytes: u64,
}

impl Group {
    fn new(name: &str, info: TensorInfo) -> Self {
        Self {
            name: name.to_owned(),
            count: 1,
            weights: info.shape.iter().map(|&n| n as u64).product(),
            shape: info.shape,
            storage: info.storage,
            bytes: info.bytes,
        }
    }

    /// Whether a tensor belongs to it.
    fn takes(&self, other: &Group) -> bool {
        (&self.name, &self.shape, self.storage) == (&other.name, &other.shape, other.storage)
    }

    fn stored_as(&self) -> String {
        match self.storage {
            Storage::Plain(dtype) => dtype.to_string().to_lowercase(),
            Storage::Packed(scheme) => scheme.to_string(),
        }
    }

    fn bits(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.weights.max(1) as f64
    }

    fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "count": self.count,
            "shape": self.shape,
            "stored_as": self.stored_as(),
            "bits_per_weight": self.bits(),
            "bytes": self.bytes,
        })
    }
}

/// The tensors of a checkpoint in its order, each by itself or those of a kind together.
fn groups(checkpoint: &Checkpoint, each: bool) -> Vec<Group> {
    let tensors = checkpoint.tensor_names().filter_map(|name| Some((name, checkpoint.info(name)?)));
    if each {
        return tensors.map(|(name, info)| Group::new(name, info)).collect();
    }
    let mut groups: Vec<Group> = Vec::new();
    for (name, info) in tensors {
        let tensor = Group::new(&kind_of(name), info);
        match groups.iter_mut().find(|group| group.takes(&tensor)) {
            Some(group) => {
                group.count += 1;
                group.weights += tensor.weights;
                group.bytes += tensor.bytes;
            }
            None => groups.push(tensor),
        }
    }
    groups.sort_by(|a, b| a.name.cmp(&b.name));
    groups
}

/// All there is to say.
struct Inspection {
    checkpoint: Checkpoint,
    /// Where its headers lie, if they were fetched.
    _temporary: Option<TempDir>,
    /// What cannot be run has a reason instead.
    decoder: Result<Decoder, String>,
    groups: Vec<Group>,
}

impl Inspection {
    fn layout(&self) -> &'static str {
        self.checkpoint.layout().map_or("plain", |layout| layout.name())
    }

    fn to_json(&self) -> Value {
        let footprint = Footprint::of(&self.checkpoint);
        let mut json = json!({
            "model": self.checkpoint.name(),
            "layout": self.layout(),
            "rotations": self.checkpoint.rotations(),
            "parameters": footprint.weights,
            "bytes": footprint.bytes,
            "bits_per_weight": footprint.bits_per_weight(),
            "decoder_parameters": footprint.linear_weights,
            "decoder_bytes": footprint.linear_bytes,
            "decoder_bits_per_weight": footprint.linear_bits_per_weight(),
            "tensors": self.groups.iter().map(Group::to_json).collect::<Vec<_>>(),
        });
        match &self.decoder {
            Ok(decoder) => {
                let ModelShape {
                    layers,
                    hidden,
                    intermediate,
                    experts,
                    heads,
                    kv_heads,
                    head_dim,
                    kv_rank,
                    vocabulary,
                    context,
                    tied,
                } = decoder.shape;
                json["architecture"] = decoder.architecture.as_str().into();
                json["shape"] = json!({
                    "layers": layers,
                    "hidden": hidden,
                    "intermediate": intermediate,
                    "experts": experts.map(|experts| json!({
                        "layers": experts.layers,
                        "routed": experts.routed,
                        "top_k": experts.top_k,
                        "width": experts.width,
                        "shared_width": experts.shared_width,
                    })),
                    "heads": heads,
                    "kv_heads": kv_heads,
                    "head_dim": head_dim,
                    "kv_rank": kv_rank,
                    "vocabulary": vocabulary,
                    "context": context,
                    "tied": tied,
                });
                json["kv_bytes_per_token"] = decoder
                    .kv_bytes_per_token
                    .iter()
                    .map(|(name, bytes)| ((*name).to_owned(), Value::from(*bytes)))
                    .collect::<serde_json::Map<_, _>>()
                    .into();
                let memory = |plan: &MemoryPlan| {
                    json!({
                        "context": plan.context,
                        "weight_bytes": plan.weights,
                        "kv_cache_bytes": plan.kv_cache,
                        "total_bytes": plan.total(),
                    })
                };
                json["memory"] = decoder.plans.iter().map(memory).collect();
            }
            Err(reason) => json["unsupported"] = reason.as_str().into(),
        }
        json
    }

    fn to_text(&self) -> String {
        let mut text = format!("{}\n\n", self.checkpoint.name());
        match &self.decoder {
            Ok(Decoder { architecture, shape, kv_bytes_per_token, .. }) => {
                let kv = kv_bytes_per_token.map(|(name, bytes)| format!("{} in {name}", format_size(bytes as u64)));
                let head = if shape.tied { "head tied to the embedding" } else { "head of its own" };
                let heads = match shape.kv_rank {
                    None => format!("{}, {} of keys and values, {} wide", shape.heads, shape.kv_heads, shape.head_dim),
                    Some(rank) => format!(
                        "{} over one latent vector of {rank} and {} rotated values a token",
                        shape.heads,
                        shape.head_dim - rank
                    ),
                };
                let experts = shape.experts.map_or(String::new(), |experts| {
                    let ExpertShape { layers, routed, top_k, width, shared_width } = experts;
                    let shared = match shared_width {
                        0 => String::new(),
                        width => format!(", shared ones {width} wide"),
                    };
                    format!("experts       {routed} in {layers} layers, {top_k} a token, {width} wide{shared}\n")
                });
                text += &format!(
                    "architecture  {architecture}\n\
                     layers        {}\n\
                     width         {}, {} inside the MLP\n\
                     {experts}\
                     heads         {heads}\n\
                     vocabulary    {}, {head}\n\
                     context       {} tokens\n\
                     KV cache      {} a token\n",
                    shape.layers,
                    shape.hidden,
                    shape.intermediate,
                    shape.vocabulary,
                    shape.context,
                    kv.join(", "),
                );
            }
            Err(reason) => text += &format!("cannot be run: {reason}\n"),
        }
        let layout = match self.checkpoint.layout() {
            // Files of ggml hold unquantised models too.
            Some(Layout::Gguf) if !self.checkpoint.is_quantized() => "gguf, not quantised",
            Some(layout) => layout.name(),
            None => "not quantised",
        };
        text += &format!("layout        {layout}\n");
        let Rotations { hidden, mlp } = self.checkpoint.rotations();
        let rotated = [("hidden states", hidden), ("MLPs", mlp)];
        let blocks = rotated.into_iter().filter_map(|(name, block)| Some(format!("{name} in blocks of {}", block?)));
        let blocks: Vec<String> = blocks.collect();
        if !blocks.is_empty() {
            text += &format!("rotates       {}\n", blocks.join(", "));
        }
        text += &format!("\n{}\n", self.table());
        let footprint = Footprint::of(&self.checkpoint);
        for (name, bits, weights, bytes) in [
            ("decoder linears", footprint.linear_bits_per_weight(), footprint.linear_weights, footprint.linear_bytes),
            ("everything", footprint.bits_per_weight(), footprint.weights, footprint.bytes),
        ] {
            let (weights, bytes) = (weights as f64 / 1e6, bytes as f64 / 1e6);
            text += &format!("{name:<15} {bits:>7.3} bits per weight, {weights:.1} M weights in {bytes:.1} MB\n");
        }
        for (index, plan) in self.decoder.iter().flat_map(|decoder| &decoder.plans).enumerate() {
            if index == 0 {
                text += "\n context     KV cache    all memory\n";
            }
            text +=
                &format!("{:>8} {:>12}  {:>12}\n", plan.context, format_size(plan.kv_cache), format_size(plan.total()));
        }
        text
    }

    fn table(&self) -> String {
        let width = self.groups.iter().map(|group| group.name.len()).max().unwrap_or(0);
        let row = |[name, count, shape, stored_as, bits, megabytes]: [&str; 6]| {
            format!("{name:<width$}  {count:>7}  {shape:<16} {stored_as:<14} {bits:>6} {megabytes:>10}\n")
        };
        let mut text = row(["tensor", "tensors", "shape", "stored as", "bits", "MB"]);
        for group in &self.groups {
            text += &row([
                &group.name,
                &group.count.to_string(),
                &format!("{:?}", group.shape),
                &group.stored_as(),
                &format!("{:.3}", group.bits()),
                &format!("{:.3}", group.bytes as f64 / 1e6),
            ]);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_end_with_the_models_own() {
        assert_eq!(usual_contexts(1024), [256, 1024]);
        assert_eq!(usual_contexts(40960), [1024, 4096, 16384, 40960]);
        assert_eq!(usual_contexts(131072), [4096, 16384, 65536, 131072]);
        assert_eq!(usual_contexts(7), [7]);
    }
}
