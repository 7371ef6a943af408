//! Mixtures of experts: from the router to the sum of what a token's experts make of it.

use std::borrow::Cow;

use marlin_checkpoint::TensorInfo;
use marlin_format::{ColumnOrder, PackedMatrix, Scheme};
use marlin_kernels::{
    Activation, Backend, Encoder, Input, KernelError, LinearPart, MemoryUse, PartHeader, RouterWeights,
};

use super::load::{Loader, Module, weight};
use super::mlp::Mlp;
use super::workspace::{ExpertWork, Workspace};
use crate::ModelError;
use crate::spec::{DecoderSpec, ExpertStorage, ExpertsSpec};

/// A mixture of experts on one device.
pub(super) struct Experts<B: Backend> {
    routed: RoutedExperts<B>,
    /// Shared experts that are wider than the others.
    beside: Option<Mlp<B>>,
}

/// Experts that a router chooses; gate and up of an expert are one matrix. Shared experts that are as wide follow the routed ones.
pub(super) struct RoutedExperts<B: Backend> {
    router: B::Router,
    gate_up_proj: B::LinearGroup,
    activation: Activation,
    down_proj: B::LinearGroup,
}

impl<B: Backend> Experts<B> {
    /// Adds what experts make of the normalised `hidden` to it.
    pub(super) fn encode(&self, encoder: &mut B::Encoder, work: &mut Workspace<B>, input_norm: &B::Vector, eps: f32) {
        // All that reads `hidden` comes before what adds to it.
        if let Some(mlp) = &self.beside {
            let normed = Input::Normed { x: &work.hidden, weight: input_norm, eps };
            mlp.encode_gated(encoder, normed, &mut work.shared);
        }
        let experts = work.experts.as_mut().expect("a model with experts has room for their rows");
        self.routed.encode(encoder, &mut work.hidden, experts, input_norm, eps);
        if let Some(mlp) = &self.beside {
            mlp.down_proj.encode(encoder, &work.shared, &mut work.block_output, &mut work.hidden, eps);
        }
    }
}

impl<B: Backend> RoutedExperts<B> {
    /// Adds what each row's experts make of the normalised `hidden` to it.
    pub(super) fn encode(
        &self,
        encoder: &mut B::Encoder,
        hidden: &mut B::Buffer,
        ExpertWork { routes, gated }: &mut ExpertWork<B>,
        input_norm: &B::Vector,
        eps: f32,
    ) {
        let normed = || Input::Normed { x: &*hidden, weight: input_norm, eps };
        encoder.route(normed(), &self.router, routes);
        encoder.expert_gated(normed(), routes, &self.gate_up_proj, self.activation, gated);
        encoder.expert_combine(gated, routes, &self.down_proj, hidden);
    }
}

/// Where a layer's experts are found.
struct Names {
    /// `model.layers.N.mlp`.
    block: String,
    router: String,
    /// Gate, up and down of an expert.
    modules: [&'static str; 3],
}

impl Names {
    fn shared(&self) -> String {
        format!("{}.shared_experts", self.block)
    }
}

impl<B: Backend> Loader<'_, B> {
    pub(super) fn experts(&self, layer: &str, spec: &ExpertsSpec) -> Result<Experts<B>, ModelError> {
        Ok(Experts { routed: self.routed_experts(layer, spec)?, beside: self.shared_mlp(layer, spec)? })
    }

    /// Shared experts that are an MLP by themselves, if there are any.
    pub(super) fn shared_mlp(&self, layer: &str, spec: &ExpertsSpec) -> Result<Option<Mlp<B>>, ModelError> {
        let block = self.expert_names(layer, spec.storage).shared();
        spec.beside.as_ref().map(|mlp| self.mlp(&block, mlp, None)).transpose()
    }

    /// The router and its experts, and those shared ones that are among them.
    pub(super) fn routed_experts(&self, layer: &str, spec: &ExpertsSpec) -> Result<RoutedExperts<B>, ModelError> {
        let names = self.expert_names(layer, spec.storage);
        let router = self.router(&names.router, spec)?;
        let [mut gate_up, mut down] = match spec.storage {
            ExpertStorage::GptOss if self.checkpoint.contains(&format!("{}.experts.gate_up_proj", names.block)) => {
                self.transposed_experts(&names, spec)?
            }
            ExpertStorage::GptOss
                if self.checkpoint.contains(&weight(&format!("{}.experts.0.gate_proj", names.block))) =>
            {
                self.biased_experts(&names, spec)?
            }
            ExpertStorage::GptOss => self.mxfp4_experts(&names, spec)?,
            _ if self.checkpoint.contains(&format!("{}.experts.gate_up_proj", names.block)) => {
                self.stacked_experts(&names, spec)?
            }
            _ => self.single_experts(&names, spec)?,
        };
        let (hidden, shared) = (self.spec.hidden_size, names.shared());
        for _ in 0..spec.routing.shared {
            gate_up.push(self.linear(&shared, &[("gate_proj", spec.width), ("up_proj", spec.width)], hidden, false)?);
            down.push(self.linear(&shared, &[("down_proj", hidden)], spec.width, false)?);
        }
        let group = |linears| {
            let group = self.backend.group_linears(linears);
            group.map_err(|source| self.weight_error(&format!("{}.experts", names.block), source))
        };
        Ok(RoutedExperts {
            router,
            gate_up_proj: group(gate_up)?,
            activation: spec.activation,
            down_proj: group(down)?,
        })
    }

    fn expert_names(&self, layer: &str, storage: ExpertStorage) -> Names {
        let usual = format!("{layer}.mlp");
        let (block, router, modules) = match storage {
            // As it is published; `transformers` 5 has it as usual in memory.
            ExpertStorage::Mixtral if !self.checkpoint.contains(&format!("{usual}.gate.weight")) => {
                (format!("{layer}.block_sparse_moe"), "gate", ["w1", "w3", "w2"])
            }
            ExpertStorage::GptOss => (usual, "router", ["gate_proj", "up_proj", "down_proj"]),
            ExpertStorage::Usual | ExpertStorage::Mixtral => (usual, "gate", ["gate_proj", "up_proj", "down_proj"]),
        };
        Names { router: format!("{block}.{router}"), block, modules }
    }

    fn router(&self, module: &str, spec: &ExpertsSpec) -> Result<B::Router, ModelError> {
        let experts = spec.routing.experts;
        let weights = self.matrix(&weight(module), experts, self.spec.hidden_size)?.decode();
        let vector = |name: &str| self.vector(&format!("{module}.{name}"), experts);
        let bias = (spec.storage == ExpertStorage::GptOss).then(|| vector("bias")).transpose()?;
        let correction = spec.correction.then(|| vector("e_score_correction_bias")).transpose()?;
        let router = RouterWeights {
            routing: spec.routing,
            weight: &weights,
            bias: bias.as_deref(),
            correction: correction.as_deref(),
        };
        self.backend.load_router(&router).map_err(|source| self.weight_error(&weight(module), source))
    }

    /// Each matrix of each expert by itself.
    fn single_experts(&self, names: &Names, spec: &ExpertsSpec) -> Result<[Vec<B::Linear>; 2], ModelError> {
        let (hidden, width, [gate, up, down]) = (self.spec.hidden_size, spec.width, names.modules);
        self.each_expert(spec, |expert| {
            let block = format!("{}.experts.{expert}", names.block);
            Ok([
                self.linear(&block, &[(gate, width), (up, width)], hidden, false)?,
                self.linear(&block, &[(down, hidden)], width, false)?,
            ])
        })
    }

    /// gpt-oss whose experts were quantised: each matrix by itself, biases of all experts in one tensor or in three.
    fn biased_experts(&self, names: &Names, spec: &ExpertsSpec) -> Result<[Vec<B::Linear>; 2], ModelError> {
        let (hidden, width, modules) = (self.spec.hidden_size, spec.width, names.modules);
        let [gate_up, down] = ["gate_up_proj", "down_proj"].map(|name| format!("{}.experts.{name}", names.block));
        let biases = match self.checkpoint.contains(&format!("{}.experts.{}.bias", names.block, modules[0])) {
            true => self.separate_biases(names, spec)?,
            false => self.expert_biases(&gate_up, &down, spec)?,
        };
        self.each_expert(spec, |expert| {
            let [gate, up, down] = modules.map(|module| format!("{}.experts.{expert}.{module}", names.block));
            let ([of_gate, of_up], of_down) = biases.of(expert);
            let gate_up =
                [Module { name: gate, rows: width, bias: of_gate }, Module { name: up, rows: width, bias: of_up }];
            let down = Module { name: down, rows: hidden, bias: of_down };
            Ok([self.load(&gate_up, hidden, 1)?, self.load(&[down], width, 1)?])
        })
    }

    /// All experts in one tensor, the gate's rows before those of up.
    fn stacked_experts(&self, names: &Names, spec: &ExpertsSpec) -> Result<[Vec<B::Linear>; 2], ModelError> {
        let (experts, hidden, width) = (spec.routing.experts, self.spec.hidden_size, spec.width);
        let [gate_up, down] = ["gate_up_proj", "down_proj"].map(|name| format!("{}.experts.{name}", names.block));
        let gate_ups = self.stack(&gate_up, [experts, 2 * width, hidden])?;
        let downs = self.stack(&down, [experts, hidden, width])?;
        let halves = [header(gate_ups.scheme(), width, hidden), header(gate_ups.scheme(), width, hidden)];
        let whole = [header(downs.scheme(), hidden, width)];
        self.each_expert(spec, |e| {
            let parts = || Ok([0, width].map(|first| part(gate_ups.rows(e, first..first + width))));
            Ok([
                self.of_expert(&gate_up, e, &halves, parts)?,
                self.of_expert(&down, e, &whole, || Ok([part(downs.matrix(e))]))?,
            ])
        })
    }

    /// gpt-oss in plain floats: matrices are transposed, gate and up are columns in turn.
    fn transposed_experts(&self, names: &Names, spec: &ExpertsSpec) -> Result<[Vec<B::Linear>; 2], ModelError> {
        let (experts, hidden, width) = (spec.routing.experts, self.spec.hidden_size, spec.width);
        let [gate_up, down] = ["gate_up_proj", "down_proj"].map(|name| format!("{}.experts.{name}", names.block));
        let gate_ups = self.stack(&gate_up, [experts, hidden, 2 * width])?;
        let downs = self.stack(&down, [experts, width, hidden])?;
        let biases = self.expert_biases(&gate_up, &down, spec)?;
        self.each_expert(spec, |e| {
            let (of_halves, of_whole) = biases.of(e);
            let halves = of_halves.clone().map(|bias| PartHeader { bias, ..header(gate_ups.scheme(), width, hidden) });
            let whole = [PartHeader { bias: of_whole.clone(), ..header(downs.scheme(), hidden, width) }];
            let parts = || {
                let [gate, up] = of_halves;
                let weight = |first| gate_ups.matrix(e).transposed_columns(first, 2);
                Ok([LinearPart { weight: weight(0)?, bias: gate }, LinearPart { weight: weight(1)?, bias: up }])
            };
            Ok([
                self.of_expert(&gate_up, e, &halves, parts)?,
                self.of_expert(&down, e, &whole, || {
                    Ok([LinearPart { weight: downs.matrix(e).transposed_columns(0, 1)?, bias: of_whole }])
                })?,
            ])
        })
    }

    /// gpt-oss as published: MXFP4, whose codes are kept; gate and up are rows in turn.
    fn mxfp4_experts(&self, names: &Names, spec: &ExpertsSpec) -> Result<[Vec<B::Linear>; 2], ModelError> {
        let (hidden, width) = (self.spec.hidden_size, spec.width);
        let [gate_up, down] = ["gate_up_proj", "down_proj"].map(|name| format!("{}.experts.{name}", names.block));
        let gate_ups = self.mxfp4(&gate_up, spec.routing.experts, 2 * width, hidden)?;
        let downs = self.mxfp4(&down, spec.routing.experts, hidden, width)?;
        let biases = self.expert_biases(&gate_up, &down, spec)?;
        self.each_expert(spec, |e| {
            let (of_halves, of_whole) = biases.of(e);
            let halves = of_halves.clone().map(|bias| PartHeader { bias, ..header(Scheme::MXFP4, width, hidden) });
            let whole = [PartHeader { bias: of_whole.clone(), ..header(Scheme::MXFP4, hidden, width) }];
            let parts = || {
                let [gate, up] = of_halves;
                Ok([(0, gate), (1, up)].map(|(first, bias)| LinearPart { weight: gate_ups.rows(e, first, 2), bias }))
            };
            Ok([
                self.of_expert(&gate_ups.blocks_name, e, &halves, parts)?,
                self.of_expert(&downs.blocks_name, e, &whole, || {
                    Ok([LinearPart { weight: downs.rows(e, 0, 1), bias: of_whole }])
                })?,
            ])
        })
    }

    /// A module's codes `[E, rows, cols / 32, 16]` and scales `[E, rows, cols / 32]`.
    fn mxfp4(&self, module: &str, experts: usize, rows: usize, cols: usize) -> Result<Mxfp4Stack<'_>, ModelError> {
        let (blocks_name, scales_name) = (format!("{module}_blocks"), format!("{module}_scales"));
        let (groups, group_bytes) = (cols.div_ceil(MXFP4_GROUP), MXFP4_GROUP / 2);
        let blocks = self.bytes(&blocks_name, &[experts, rows, groups, group_bytes])?;
        let scales = self.bytes(&scales_name, &[experts, rows, groups])?;
        for (name, bytes, wanted) in [
            (&blocks_name, &blocks, experts * rows * groups * group_bytes),
            (&scales_name, &scales, experts * rows * groups),
        ] {
            if bytes.len() != wanted {
                return Err(self.wrong_type(name, "U8"));
            }
        }
        if !cols.is_multiple_of(MXFP4_GROUP) {
            let problem = format!("rows of {cols} columns are not whole groups of {MXFP4_GROUP}");
            return Err(self.weight_error(&blocks_name, KernelError::Device(problem)));
        }
        Ok(Mxfp4Stack { blocks_name, rows, cols, blocks, scales })
    }

    /// Biases of all experts, those of gate and up in turn in one tensor.
    fn expert_biases(&self, gate_up: &str, down: &str, spec: &ExpertsSpec) -> Result<ExpertBiases, ModelError> {
        let experts = spec.routing.experts;
        let gate_up = self.vectors(&format!("{gate_up}_bias"), experts, 2 * spec.width)?;
        let in_turn = |first: usize| {
            gate_up.iter().map(|biases| biases.iter().skip(first).step_by(2).copied().collect()).collect()
        };
        Ok(ExpertBiases {
            gate: in_turn(0),
            up: in_turn(1),
            down: self.vectors(&format!("{down}_bias"), experts, self.spec.hidden_size)?,
        })
    }

    /// The same as MLX has them, a tensor for each of the three matrices.
    fn separate_biases(&self, names: &Names, spec: &ExpertsSpec) -> Result<ExpertBiases, ModelError> {
        let of = |module: &str, rows: usize| {
            self.vectors(&format!("{}.experts.{module}.bias", names.block), spec.routing.experts, rows)
        };
        let [gate, up, down] = names.modules;
        Ok(ExpertBiases {
            gate: of(gate, spec.width)?,
            up: of(up, spec.width)?,
            down: of(down, self.spec.hidden_size)?,
        })
    }

    /// Gate with up, and down, of each expert in turn.
    fn each_expert(
        &self,
        spec: &ExpertsSpec,
        load: impl Fn(usize) -> Result<[B::Linear; 2], ModelError>,
    ) -> Result<[Vec<B::Linear>; 2], ModelError> {
        let all = spec.routing.all_experts();
        let (mut gate_up, mut down) = (Vec::with_capacity(all), Vec::with_capacity(all));
        for expert in 0..spec.routing.experts {
            let [first, second] = load(expert)?;
            gate_up.push(first);
            down.push(second);
        }
        Ok([gate_up, down])
    }

    /// A linear of one expert of a tensor that holds all of them: the device's own, if it kept one, or else of these parts.
    fn of_expert<'p, const N: usize>(
        &self,
        tensor: &str,
        expert: usize,
        headers: &[PartHeader],
        parts: impl FnOnce() -> Result<[LinearPart<'p>; N], KernelError>,
    ) -> Result<B::Linear, ModelError> {
        let name = format!("{tensor}.{expert}");
        // Named as matrices of single experts are.
        self.note_input(&name, || {
            let block = tensor.rsplit_once('.').map_or(tensor, |(block, _)| block);
            let modules = if N == 1 { &["down_proj"][..] } else { &["gate_proj", "up_proj"] };
            modules.iter().map(|module| weight(&format!("{block}.{expert}.{module}"))).collect()
        });
        if let Some(linear) = self.backend.find_linear(&name, headers) {
            return Ok(linear);
        }
        let linear = parts().and_then(|parts| self.backend.load_named_linear(&name, &parts));
        self.checkpoint.release(tensor);
        linear.map_err(|source| self.weight_error(tensor, source))
    }
}

/// Columns that share a scale in MXFP4.
const MXFP4_GROUP: usize = 32;

/// MXFP4 matrices `[rows, cols]`, one for each expert.
struct Mxfp4Stack<'a> {
    blocks_name: String,
    rows: usize,
    cols: usize,
    blocks: Cow<'a, [u8]>,
    scales: Cow<'a, [u8]>,
}

impl Mxfp4Stack<'_> {
    /// Some rows of an expert: `first`, `first + step` and so on.
    fn rows(&self, expert: usize, first: usize, step: usize) -> PackedMatrix<'static> {
        let pick = |bytes: &[u8], row_bytes: usize| {
            let of_expert = &bytes[expert * self.rows * row_bytes..][..self.rows * row_bytes];
            of_expert.chunks_exact(row_bytes).skip(first).step_by(step).flatten().copied().collect::<Vec<u8>>()
        };
        PackedMatrix {
            codes: pick(&self.blocks, self.cols / 2).into(),
            scales: pick(&self.scales, self.cols / MXFP4_GROUP).into(),
            ..PackedMatrix::empty(Scheme::MXFP4, self.rows / step, self.cols)
        }
    }
}

/// Biases of all experts.
struct ExpertBiases {
    gate: Vec<Vec<f32>>,
    up: Vec<Vec<f32>>,
    down: Vec<Vec<f32>>,
}

impl ExpertBiases {
    /// Those of gate and up, and that of down.
    fn of(&self, expert: usize) -> ([Option<Vec<f32>>; 2], Option<Vec<f32>>) {
        let of = |biases: &[Vec<f32>]| Some(biases[expert].clone());
        ([of(&self.gate), of(&self.up)], of(&self.down))
    }
}

fn header(scheme: Scheme, rows: usize, cols: usize) -> PartHeader {
    PartHeader { scheme, rows, cols, bias: None }
}

fn part(weight: PackedMatrix<'_>) -> LinearPart<'_> {
    LinearPart { weight, bias: None }
}

/// Whether a tensor is of a router or of routed experts, by its name.
pub(crate) fn is_routed(name: &str) -> bool {
    of_block(name)
        .is_some_and(|tensor| ["gate.", "router.", "experts."].iter().any(|module| tensor.starts_with(module)))
}

/// How a matrix is loaded: as it is stored, but for experts whose columns have an index, which become f32. Their input is prepared once for
/// all of them, and each has an order of its own.
pub(crate) fn loaded_scheme(decoder: &DecoderSpec, name: &str, stored: &Scheme) -> Scheme {
    let has_shared = decoder.experts.as_ref().is_some_and(|experts| experts.routing.shared > 0);
    let is_grouped = of_block(name)
        .is_some_and(|tensor| tensor.starts_with("experts.") || has_shared && tensor.starts_with("shared_expert"));
    if is_grouped && stored.order == ColumnOrder::GroupIndex { Scheme::F32 } else { *stored }
}

/// What a tensor of a layer's feed-forward block is called there.
fn of_block(name: &str) -> Option<&str> {
    let (block, tensor) = name.strip_prefix("model.layers.")?.split_once('.')?.1.split_once('.')?;
    matches!(block, "mlp" | "block_sparse_moe").then_some(tensor)
}

/// Bytes that a device keeps of a layer's tensor that belongs to a router or holds something of all experts; `None` for any other.
pub(crate) fn expert_bytes(
    device: &dyn MemoryUse,
    decoder: &DecoderSpec,
    name: &str,
    info: &TensorInfo,
) -> Option<Result<usize, KernelError>> {
    let spec = decoder.experts.as_ref()?;
    let (hidden, width) = (decoder.hidden_size, spec.width);
    let tensor = of_block(name)?;
    let of_all = |scheme: Scheme, shapes: &[(usize, usize)]| {
        let each = shapes.iter().map(|&(rows, cols)| device.linear_bytes(&scheme, rows, cols));
        let of_one = each.sum::<Result<usize, KernelError>>();
        of_one.map(|bytes| bytes.saturating_mul(spec.routing.experts))
    };
    let (gate_up, down) = ([(width, hidden); 2], [(hidden, width)]);
    Some(match tensor {
        "gate.weight" | "router.weight" => Ok(device.router_bytes(&spec.routing, hidden)),
        // Counted with the router, and with the codes.
        "router.bias" | "gate.e_score_correction_bias" => Ok(0),
        "experts.gate_up_proj_scales" | "experts.down_proj_scales" => Ok(0),
        "experts.gate_up_proj_blocks" => of_all(Scheme::MXFP4, &gate_up),
        "experts.down_proj_blocks" => of_all(Scheme::MXFP4, &down),
        "experts.gate_up_proj" => of_all(info.scheme()?, &gate_up),
        "experts.down_proj" => of_all(info.scheme()?, &down),
        "experts.gate_up_proj_bias"
        | "experts.down_proj_bias"
        | "experts.gate_proj.bias"
        | "experts.up_proj.bias"
        | "experts.down_proj.bias" => {
            Ok(info.shape.iter().fold(size_of::<f32>(), |bytes, &len| bytes.saturating_mul(len)))
        }
        _ => return None,
    })
}
