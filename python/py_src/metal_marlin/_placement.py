"""Which tensors of a checkpoint the packed modules of a model of Transformers take, and their taking."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ._native import Checkpoint, Matrix, Scheme
from ._tensors import as_tensor
from .layers import MetalQuantizedEmbedding, MetalQuantizedLinear, PackedModule, rows_are_separate
from .moe import PARTS, Expert, ExpertsLayout, MetalQuantizedMoE, find_moe_layers
from .replace import is_linear, is_skipped

# An expert's matrix by itself; Mixtral has names of its own.
_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<index>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
_PART_ALIASES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Those of all experts in one tensor; with a suffix, in two of MXFP4.
_STACK = re.compile(r"(?P<experts>.+)\.(?P<stack>gate_up_proj|down_proj)(?P<kind>|_blocks|_scales)")
# Biases of all experts, as MLX has them.
_BIAS = re.compile(r"(?P<experts>.+)\.(?P<part>gate_proj|up_proj|down_proj)\.bias")
# A head's half of latent attention's `kv_b_proj`, as MLX has it: rows that make keys, transposed, and rows that make values.
_HEAD = re.compile(r"(?P<attention>.+)\.(?P<half>embed_q|unembed_out)\.(?P<head>\d+)\.weight")
_HALVES = ("embed_q", "unembed_out")


@dataclass
class ExpertSource:
    """Where the matrices of a layer's experts are: each in a tensor by itself, or all in one."""

    single: dict[tuple[int, str], str] = field(default_factory=dict)
    stacks: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        """Tensors of the checkpoint."""
        yield from self.single.values()
        yield from self.stacks.values()
        yield from self.biases.values()


class Placement:
    """What the modules of a model take from a checkpoint."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, scheme: Scheme | None, skip: Iterable[str]) -> None:
        """Finds out; the model is not changed.

        Args:
            model: On the meta device.
            checkpoint: Its tensors.
            scheme: What matrices are rounded to that are not packed in the checkpoint; None leaves them.
            skip: Patterns of modules that are not rounded.
        """
        self.checkpoint = checkpoint
        self.scheme = scheme
        # Tensors by the modules, or parameters, that take them.
        self.linears: dict[str, str] = {}
        self.embeddings: dict[str, str] = {}
        self.dequantized: dict[str, str] = {}
        # Those of `kv_b_proj` by half and head.
        self.heads: dict[str, dict[tuple[str, int], str]] = {}
        self.experts: dict[str, ExpertSource] = {}
        # Heads that are the embedding, which is packed.
        self.tied: dict[str, str] = {}
        # Heads that were the embedding, and are packed by themselves.
        self.untied: set[str] = set()
        self._find(model, tuple(skip))

    def _find(self, model: PreTrainedModel, skip: tuple[str, ...]) -> None:
        modules = dict(model.named_modules())
        layers = find_moe_layers(model)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)} | {
            name for name, _ in model.named_buffers()
        }
        places = dict(_places(model, self.checkpoint.names(), parameters, layers))
        for stored, name in places.items():
            if (matched := _EXPERT.fullmatch(name)) and (layer := matched["experts"]) in layers:
                part = _PART_ALIASES.get(matched["part"], matched["part"])
                self._source(layer).single[int(matched["index"]), part] = stored
                continue
            if (matched := _STACK.fullmatch(name)) and (layer := matched["experts"]) in layers:
                self._source(layer).stacks[matched["stack"] + matched["kind"]] = stored
                continue
            if (matched := _BIAS.fullmatch(name)) and (layer := matched["experts"]) in layers:
                self._source(layer).biases[matched["part"]] = stored
                continue
            if (matched := _HEAD.fullmatch(name)) and (parameter := _kv_b(matched)) in parameters:
                self.heads.setdefault(parameter, {})[matched["half"], int(matched["head"])] = stored
                continue
            module = name.removesuffix(".weight")
            owner = modules.get(module)
            if self._packed(stored):
                if owner is not None and name.endswith(".weight") and is_linear(owner):
                    self.linears[module] = stored
                elif isinstance(owner, nn.Embedding) and _is_table(owner, self._scheme(stored)):
                    self.embeddings[module] = stored
                elif name in parameters:
                    self.dequantized[name] = stored
            elif self.scheme is not None and owner is not None and is_linear(owner) and not is_skipped(module, skip):
                self.linears[module] = stored
        for layer in list(self.experts):
            source = self.experts[layer]
            is_packed = any(map(self._packed, source.names())) or "gate_up_proj_blocks" in source.stacks
            if not is_packed and (self.scheme is None or is_skipped(layer, skip)):
                del self.experts[layer]
        self._find_tied(model, {name: stored for stored, name in places.items()}, skip)

    def _find_tied(self, model: PreTrainedModel, stored: dict[str, str], skip: tuple[str, ...]) -> None:
        for target, source in model.all_tied_weights_keys.items():
            head, embedding = target.removesuffix(".weight"), source.removesuffix(".weight")
            if head in self.linears:
                self.untied.add(head)
            elif source in self.dequantized and target not in stored:
                self.linears[head] = self.dequantized[source]
                self.untied.add(head)
            elif embedding in self.embeddings and target not in stored:
                self.linears[head] = self.embeddings[embedding]
                self.tied[head] = embedding
            elif self.scheme is not None and source in stored and target not in stored and not is_skipped(head, skip):
                self.linears[head] = stored[source]
                self.untied.add(head)

    def _source(self, layer: str) -> ExpertSource:
        return self.experts.setdefault(layer, ExpertSource())

    def _packed(self, stored: str) -> bool:
        info = self.checkpoint.info(stored)
        return info is not None and isinstance(info[1], Scheme)

    def names(self) -> set[str]:
        """Tensors of the checkpoint that need no other reader."""
        # What an untied head was rounded from is the embedding's, which stays.
        linears = {stored for name, stored in self.linears.items() if name not in self.untied}
        experts = {stored for source in self.experts.values() for stored in source.names()}
        heads = {stored for halves in self.heads.values() for stored in halves.values()}
        return linears | experts | heads | set(self.embeddings.values()) | set(self.dequantized.values())

    def prepare(self, model: PreTrainedModel) -> None:
        """Puts packed modules without weights in their places, and takes away parameters that `load` gives back."""
        self._untie(model)
        activations = model.config.quantization_config.activations
        for name, stored in self.linears.items():
            linear = cast(nn.Linear, model.get_submodule(name))
            with _of_layer(name):
                packed = MetalQuantizedLinear(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    scheme=self._scheme(stored),
                    activations=activations,
                    dtype=linear.weight.dtype,
                )
            model.set_submodule(name, packed)
        for name, source in self.experts.items():
            experts = model.get_submodule(name)
            with _of_layer(name):
                # Packed matrices bring their schemes.
                scheme = self.scheme or Scheme.of("f32")
                dtype = next(experts.parameters()).dtype
                moe = MetalQuantizedMoE(ExpertsLayout.of(experts), scheme=scheme, activations=activations, dtype=dtype)
            if source.biases:
                moe.gate_up_proj_bias = moe.down_proj_bias = None
            model.set_submodule(name, moe)
        for name in self.embeddings:
            embedding = cast(nn.Embedding, model.get_submodule(name))
            table = MetalQuantizedEmbedding(
                embedding.num_embeddings,
                embedding.embedding_dim,
                self._scheme(self.embeddings[name]),
                dtype=embedding.weight.dtype,
                embed_scale=getattr(embedding, "scalar_embed_scale", None),
            )
            model.set_submodule(name, table)
        # As they were, without values.
        self._removed: dict[str, torch.Tensor] = {}
        for name in (*self.dequantized, *self.heads):
            owner, _, parameter = name.rpartition(".")
            module = model.get_submodule(owner)
            self._removed[name] = getattr(module, parameter)
            delattr(module, parameter)
            # Or else its family would look for the parameter, to fill it with random values.
            module._is_hf_initialized = True  # type: ignore[assignment]
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *self._ignored(model)}

    def _untie(self, model: PreTrainedModel) -> None:
        heads = {f"{name}.weight" for name in (*self.tied, *self.untied)}
        if not heads:
            return
        for name in heads:
            model.all_tied_weights_keys.pop(name, None)
        # Or else `tie_weights` would find them again.
        model._tied_weights_keys = dict(model.all_tied_weights_keys)
        if self.untied:
            model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False

    def _ignored(self, model: PreTrainedModel) -> list[str]:
        """Patterns of keys that Transformers need not miss, since `load` takes them."""
        removed = [name.removesuffix(".weight") for name in (*self.dequantized, *self.heads)]
        names = [*self.linears, *self.experts, *self.embeddings, *removed]
        base = f"{model.base_model_prefix}."
        return [rf"(^|\.){re.escape(name.removeprefix(base))}(\.|_|$)" for name in names]

    def load(self, model: PreTrainedModel, search: str) -> None:
        """Fills the modules of `prepare`, one after the other, so that one at a time is held unpacked.

        Raises:
            ValueError: A matrix is of another shape than the model's, or missing; the message names it.
        """
        for name, stored in (*self.linears.items(), *self.embeddings.items()):
            self._named(name, cast(PackedModule, model.get_submodule(name)), stored, search)
        for name, source in self.experts.items():
            moe = cast(MetalQuantizedMoE, model.get_submodule(name))
            if source.biases:
                self._load_biases(moe, source)
            moe.load_matrices(self._matrices(name, moe.layout, source, search))
        for name, stored in self.dequantized.items():
            self._give_back(model, name, torch.from_numpy(self.checkpoint.dequantized(stored)))
        for name, halves in self.heads.items():
            self._give_back(model, name, self._joined_heads(name, halves))
        for stored in self.names():
            self.checkpoint.release(stored)

    def _named(self, name: str, module: PackedModule, stored: str, search: str) -> None:
        try:
            module.load_matrix(self._matrix(stored, search))
        except ValueError as error:
            raise ValueError(f"{self.checkpoint.name}: tensor {stored} does not fit layer {name}: {error}") from error
        self.checkpoint.release(stored)

    def _give_back(self, model: PreTrainedModel, name: str, values: torch.Tensor) -> None:
        wanted = self._removed.pop(name)
        if values.shape != wanted.shape:
            raise ValueError(
                f"{self.checkpoint.name}: {name} must have the shape {list(wanted.shape)}, found {list(values.shape)}"
            )
        owner, _, parameter = name.rpartition(".")
        given = nn.Parameter(values.to(wanted.dtype), requires_grad=False)
        model.get_submodule(owner).register_parameter(parameter, given)

    def _joined_heads(self, name: str, halves: dict[tuple[str, int], str]) -> torch.Tensor:
        """`kv_b_proj`: of one head after the other the rows that make keys, and those that make values."""
        heads = range(1 + max(head for _, head in halves))
        missing = [f"{half}.{head}" for head in heads for half in _HALVES if (half, head) not in halves]
        if missing:
            raise ValueError(f"{self.checkpoint.name} lacks {_first_of(missing)} of the heads of {name}")
        rows = []
        for head in heads:
            keys, values = (torch.from_numpy(self.checkpoint.dequantized(halves[half, head])) for half in _HALVES)
            rows += [keys.T, values]
        return torch.cat(rows)

    def _scheme(self, stored: str) -> Scheme:
        info = self.checkpoint.info(stored)
        found = info[1] if info is not None else None
        scheme = found if isinstance(found, Scheme) else self.scheme
        assert scheme is not None
        return scheme

    def _matrix(self, stored: str, search: str) -> Matrix:
        matrix = self.checkpoint.matrix(stored)
        return matrix if self._packed(stored) else self._encode(torch.from_numpy(matrix.dequantize()), search)

    def _encode(self, weight: torch.Tensor, search: str) -> Matrix:
        assert self.scheme is not None
        return Matrix.encode(weight.contiguous().numpy(), self.scheme, search)

    def _matrices(self, name: str, layout: ExpertsLayout, source: ExpertSource, search: str) -> list[Expert]:
        if "gate_up_proj_blocks" in source.stacks:
            return self._mxfp4_experts(layout, source)
        if source.single:
            missing = [
                f"{name}.{i}.{part}.weight" for i in range(layout.experts) for part in PARTS if (i, part) not in source.single
            ]
            if missing:
                raise ValueError(f"{self.checkpoint.name} lacks {_first_of(missing)} of the experts' matrices")
            matrices = []
            for index in range(layout.experts):
                names = [source.single[index, part] for part in PARTS]
                matrices.append(cast(Expert, tuple(self._matrix(stored, search) for stored in names)))
                for stored in names:
                    self.checkpoint.release(stored)
            return matrices
        if absent := {"gate_up_proj", "down_proj"} - source.stacks.keys():
            raise ValueError(f"{self.checkpoint.name} lacks {name}.{min(absent)}")
        return [self._expert_of_stack(layout, source, index, search) for index in range(layout.experts)]

    def _expert_of_stack(self, layout: ExpertsLayout, source: ExpertSource, index: int, search: str) -> Expert:
        gate_up = torch.from_numpy(self.checkpoint.matrix(source.stacks["gate_up_proj"], index).dequantize())
        down = torch.from_numpy(self.checkpoint.matrix(source.stacks["down_proj"], index).dequantize())
        gate, up = layout.split(gate_up)
        return self._encode(gate, search), self._encode(up, search), self._encode(layout.down(down), search)

    def _mxfp4_experts(self, layout: ExpertsLayout, source: ExpertSource) -> list[Expert]:
        """Those of gpt-oss as published: codes and scales of `[out, in]`, rows of gate and up in turn."""
        scheme = Scheme.of("mxfp4")
        read = {stack: self._plain(stored).flatten(2) for stack, stored in source.stacks.items()}
        gate_up = (read["gate_up_proj_blocks"], read["gate_up_proj_scales"])
        down = (read["down_proj_blocks"], read["down_proj_scales"])

        def matrix(tensors: tuple[torch.Tensor, torch.Tensor], index: int, rows: slice) -> Matrix:
            codes, scales = (tensor[index, rows].contiguous() for tensor in tensors)
            found = {"": codes.reshape(-1).numpy(), "_scale": scales.reshape(-1).numpy()}
            return Matrix.from_tensors(scheme, codes.shape[0], codes.shape[1] * 2, found)

        parts = [(gate_up, slice(0, None, 2)), (gate_up, slice(1, None, 2)), (down, slice(None))]
        return [cast(Expert, tuple(matrix(of, index, rows) for of, rows in parts)) for index in range(layout.experts)]

    def _load_biases(self, moe: MetalQuantizedMoE, source: ExpertSource) -> None:
        gate, up, down = (torch.from_numpy(self.checkpoint.dequantized(source.biases[part])) for part in PARTS)
        joined = torch.stack([moe.layout.join(*pair) for pair in zip(gate, up, strict=True)])
        moe.gate_up_proj_bias = nn.Parameter(joined.to(moe.dtype), requires_grad=False)
        moe.down_proj_bias = nn.Parameter(down.to(moe.dtype), requires_grad=False)

    def _plain(self, stored: str) -> torch.Tensor:
        return plain_tensor(self.checkpoint, stored)


def _first_of(names: list[str]) -> str:
    """One of them, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _kv_b(head: re.Match[str]) -> str:
    """The parameter that the heads of MLX are parts of."""
    return f"{head['attention']}.kv_b_proj.weight"


def _is_table(embedding: nn.Embedding, scheme: Scheme) -> bool:
    """Whether a packed table can take the place of an embedding, which may scale its rows and do nothing else with them."""
    is_plain = type(embedding).forward is nn.Embedding.forward or hasattr(embedding, "scalar_embed_scale")
    return is_plain and rows_are_separate(scheme, embedding.num_embeddings, embedding.embedding_dim)


@contextmanager
def _of_layer(name: str) -> Iterator[None]:
    """Says which layer an error is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name} cannot be quantised: {error}") from error


def plain_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor that is stored as it is."""
    dtype, shape, values = checkpoint.tensor(name)
    return as_tensor(values, dtype, shape)


def _places(
    model: PreTrainedModel, stored: Iterable[str], parameters: set[str], layers: dict[str, nn.Module]
) -> Iterator[tuple[str, str]]:
    """Names of a checkpoint with those of the model: its parameters, and matrices of experts by themselves."""
    renamings: list[Any] = [
        transform for transform in get_model_conversion_mapping(model) if isinstance(transform, WeightRenaming)
    ]
    base = f"{model.base_model_prefix}."

    def known(name: str) -> bool:
        if name in parameters:
            return True
        if matched := _HEAD.fullmatch(name):
            return _kv_b(matched) in parameters
        matched = _EXPERT.fullmatch(name) or _STACK.fullmatch(name) or _BIAS.fullmatch(name)
        return matched is not None and matched["experts"] in layers

    for name in stored:
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        candidates = (renamed, base + renamed, renamed.removeprefix(base), name)
        yield name, next(filter(known, candidates), renamed)
