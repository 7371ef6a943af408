"""Experts of mixture-of-experts layers whose weights stay packed."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ._native import Matrix, Scheme
from ._runtime import PackedExperts, check_activations
from ._tensors import as_numpy, encode, matrix_to_tensors
from .layers import check_input, is_usual, load_matrix_tensors
from .schemes import resolve_scheme

# Matrices of an expert, as most families name them, in the order of the native code.
PARTS = ("gate_proj", "up_proj", "down_proj")

Expert = tuple[Matrix, Matrix, Matrix]


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module of Transformers holds its experts: `gate_up_proj` and `down_proj`, all experts in one tensor each."""

    experts: int
    hidden: int
    # Rows of gate and up, columns of down.
    width: int
    # silu, gelu_tanh or clamped_swiglu.
    activation: str
    # `[experts, in, out]` instead of `[experts, out, in]`.
    transposed: bool
    # Rows of gate and up in turn, instead of those of gate first.
    interleaved: bool
    has_bias: bool

    def __post_init__(self) -> None:
        """Refuses what no layer can have."""
        if min(self.experts, self.hidden, self.width) < 1:
            raise ValueError(f"experts, hidden and width must be positive, found {self}")

    @classmethod
    def of(cls, module: nn.Module) -> "ExpertsLayout":
        """What a module of experts holds and computes, found by its tensors and by what its activation does.

        Raises:
            TypeError: It holds no experts of this kind, or computes something that the native code does not.
        """
        name = type(module).__name__
        if not _holds_experts(module):
            raise TypeError(f"{name} holds no experts: expected parameters gate_up_proj and down_proj of three dimensions")
        if "gate_up_proj" not in module._parameters or not getattr(module, "has_gate", True):
            raise TypeError(
                f"experts of {name} have no gate: only down(activation(gate(x)) * up(x)) is supported; skip this layer"
            )
        if getattr(module, "has_post_expert_norm", False):
            raise TypeError(f"experts of {name} are followed by a norm each, which is not supported; skip this layer")
        if len(inspect.signature(type(module).forward).parameters) != 4:
            raise TypeError(
                f"{name}.forward does not take hidden_states, top_k_index, top_k_weights: its routing is not supported; "
                "skip this layer"
            )
        gate_up, down = _parameter(module, "gate_up_proj"), _parameter(module, "down_proj")
        experts, first, second = gate_up.shape
        fits = {False: list(down.shape) == [experts, second, first // 2], True: list(down.shape) == [experts, second // 2, first]}
        transposed = bool(getattr(module, "is_transposed", not fits[False]))
        if not fits[transposed]:
            raise TypeError(
                f"experts of {name} have shapes that do not fit: gate_up_proj {list(gate_up.shape)}, down_proj {list(down.shape)}"
            )
        hidden, width = (first, second // 2) if transposed else (second, first // 2)
        activation, interleaved = _recognize_gate(module)
        return cls(experts, hidden, width, activation, transposed, interleaved, "gate_up_proj_bias" in module._parameters)

    def split(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up `[width, hidden]` of one expert's `gate_up_proj`, or of a bias of both."""
        if gate_up.dim() == 2 and self.transposed:
            gate_up = gate_up.T
        return (gate_up[0::2], gate_up[1::2]) if self.interleaved else (gate_up[: self.width], gate_up[self.width :])

    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What `split` takes apart."""
        gate_up = torch.stack((gate, up), dim=1).flatten(0, 1) if self.interleaved else torch.cat((gate, up))
        return gate_up.T if gate_up.dim() == 2 and self.transposed else gate_up

    def down(self, down: torch.Tensor) -> torch.Tensor:
        """`[hidden, width]` of one expert's `down_proj`, and the other way round."""
        return down.T if self.transposed else down

    def shape(self, part: int) -> tuple[int, int]:
        """Rows and columns of gate, up or down."""
        return (self.hidden, self.width) if part == 2 else (self.width, self.hidden)


class MetalQuantizedMoE(nn.Module):
    """The experts of a layer, packed, in place of the module of Transformers that holds them.

    `forward(hidden_states, top_k_index, top_k_weights)` is that module's; the router stays as it is. `state_dict()` has the
    matrices of every expert by itself (`0.gate_proj.weight`, `0.gate_proj.weight_scale`, …), biases as Transformers has them. For
    inference only.
    """

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        layout: ExpertsLayout,
        *,
        bits: int | None = None,
        format: str | None = None,
        group_size: int | str | None = None,
        scheme: Scheme | None = None,
        activations: str = "int8",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Experts without weights, for `load_state_dict` to fill; `from_experts` quantises a module.

        Args:
            layout: Their number, sizes and activation.
            bits: As of `resolve_scheme`, like the next ones.
            format: See there.
            group_size: See there.
            scheme: See there.
            activations: As of `MetalQuantizedLinear`.
            dtype: Of biases, and of what `dequantize` makes; torch's default if left out.
        """
        super().__init__()
        self.layout = layout
        self.num_experts = layout.experts
        scheme = resolve_scheme(bits, format, group_size, scheme)
        for part in range(len(PARTS)):
            scheme.parts(*layout.shape(part))
        self.schemes = [(scheme, scheme, scheme)] * layout.experts
        self.activations = check_activations(activations)
        self.dtype = dtype if dtype is not None else torch.get_default_dtype()
        self._packed: PackedExperts | None = None
        for name, features in (("gate_up_proj_bias", 2 * layout.width), ("down_proj_bias", layout.hidden)):
            bias = torch.zeros(layout.experts, features, dtype=self.dtype) if layout.has_bias else None
            self.register_parameter(name, None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        bits: int | None = None,
        format: str | None = None,
        group_size: int | str | None = None,
        *,
        scheme: Scheme | None = None,
        search: str = "mse",
        activations: str = "int8",
    ) -> "MetalQuantizedMoE":
        """Quantises a module of experts, which stays as it is. Arguments are those of `MetalQuantizedLinear.from_linear`.

        Raises:
            TypeError: It is quantised already, holds no experts, or computes something that is not supported.
            ValueError: The format is unknown, lacks such groups, or does not fit; a weight is a meta tensor or not finite.
        """
        if isinstance(experts, MetalQuantizedMoE):
            raise TypeError("the experts are quantised already: quantise the original")
        layout = ExpertsLayout.of(experts)
        scheme = resolve_scheme(bits, format, group_size, scheme)
        gate_up, down = _parameter(experts, "gate_up_proj"), _parameter(experts, "down_proj")

        def expert(index: int) -> Expert:
            gate, up = layout.split(gate_up[index])
            return encode(gate, scheme, search), encode(up, scheme, search), encode(layout.down(down[index]), scheme, search)

        module = cls(layout, scheme=scheme, activations=activations, dtype=gate_up.dtype)
        if layout.has_bias:
            module.gate_up_proj_bias = _frozen(_parameter(experts, "gate_up_proj_bias"))
            module.down_proj_bias = _frozen(_parameter(experts, "down_proj_bias"))
        module.load_matrices([expert(index) for index in range(layout.experts)])
        return module

    def load_matrices(self, matrices: Sequence[Expert]) -> None:
        """Takes gate, up and down of every expert, in whatever schemes they have, and the biases that the module has by now.

        Raises:
            ValueError: There are not as many, or one is of another shape.
        """
        if len(matrices) != self.num_experts:
            raise ValueError(f"there are {self.num_experts} experts, found matrices of {len(matrices)}")
        for index, expert in enumerate(matrices):
            for part, matrix in enumerate(expert):
                if (matrix.rows, matrix.cols) != self.layout.shape(part):
                    wanted = list(self.layout.shape(part))
                    raise ValueError(f"{PARTS[part]} of expert {index} must be {wanted}, found [{matrix.rows}, {matrix.cols}]")
        biases = None
        if self.gate_up_proj_bias is not None and self.down_proj_bias is not None:
            pairs = [self.layout.split(bias) for bias in self.gate_up_proj_bias.detach().float()]
            gate, up = (torch.stack(halves).contiguous().numpy() for halves in zip(*pairs, strict=True))
            biases = (gate, up, self.down_proj_bias.detach().float().contiguous().numpy())
        self._packed = PackedExperts(matrices, self.layout.activation, biases, self.activations)
        self.schemes = self._packed.schemes

    def set_activations(self, activations: str) -> None:
        """Computes with "int8" or "f32" activations from now on. Raises ValueError for others."""
        check_activations(activations)
        if self._packed is not None:
            self._packed = self._packed.with_activations(activations)
        self.activations = activations

    @property
    def matrices(self) -> list[Expert]:
        """Gate, up and down of every expert in canonical order, made anew."""
        return self._loaded().unpack()

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take in memory."""
        return self._loaded().nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The state dict of the module that this one replaced, with the weights that this one computes with."""
        dtype = self.dtype if dtype is None else dtype
        gate_up, down = [], []
        for expert in self.matrices:
            of_gate, of_up, of_down = (torch.from_numpy(matrix.dequantize()).to(dtype) for matrix in expert)
            gate_up.append(self.layout.join(of_gate, of_up))
            down.append(self.layout.down(of_down))
        state = {"gate_up_proj": torch.stack(gate_up), "down_proj": torch.stack(down)}
        biases = {"gate_up_proj_bias": self.gate_up_proj_bias, "down_proj_bias": self.down_proj_bias}
        return state | {name: bias.detach().to(dtype) for name, bias in biases.items() if bias is not None}

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what a token's experts make of it, `[..., hidden]` of the same dtype.

        Args:
            hidden_states: `[..., hidden]`.
            top_k_index: `[tokens, top_k]`, each below `num_experts`; `num_experts` itself stands for no expert.
            top_k_weights: `[tokens, top_k]`.

        Raises:
            RuntimeError: A shape, dtype or device does not fit, a gradient is wanted, or there are no weights.
        """
        packed = self._packed
        hidden = self.layout.hidden
        if packed is None or not is_usual(hidden_states, hidden):
            return self._forward_unusual(hidden_states, top_k_index, top_k_weights)
        index = top_k_index.reshape(-1, top_k_index.shape[-1]).to(device="cpu", dtype=torch.int64)
        weights = top_k_weights.detach().reshape(index.shape).to(device="cpu", dtype=torch.float32)
        if (index >= self.num_experts).any():
            index, weights = _without_none(index, weights, self.num_experts)
        output = hidden_states.new_empty(hidden_states.shape)
        packed.forward(
            as_numpy(hidden_states.detach().contiguous()).reshape(-1, hidden),
            index.contiguous().numpy(),
            weights.contiguous().numpy(),
            as_numpy(output).reshape(-1, hidden),
        )
        return output

    def _forward_unusual(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self._loaded()
        check_input(hidden_states, self.layout.hidden, self.layout.width)
        # Left is `mps`, whose memory the native code does not share.
        return self.forward(hidden_states.cpu(), top_k_index, top_k_weights).to(hidden_states.device)

    def _loaded(self) -> PackedExperts:
        if self._packed is None:
            raise RuntimeError("the experts have no weights yet: load_state_dict() fills them, from_experts() makes full ones")
        return self._packed

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is None:
            return
        experts = self._packed.unpack()
        for index, part, name in _weight_names(prefix, self.num_experts):
            tensors = matrix_to_tensors(experts[index][part])
            destination.update({name + suffix: tensor for suffix, tensor in tensors.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # Looked for below one by one; what is known is no surprise.
        unknown = [key for key in unexpected_keys if key.startswith(prefix)]
        experts: list[list[Matrix | None]] = [[] for _ in self.schemes]
        for index, part, name in _weight_names(prefix, self.num_experts):
            scheme, shape = self.schemes[index][part], self.layout.shape(part)
            found = load_matrix_tensors(state_dict, name, scheme, shape, missing_keys, unknown, error_msgs)
            experts[index].append(found)
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(prefix)] + unknown
        if all(matrix is not None for expert in experts for matrix in expert):
            self.load_matrices([cast(Expert, tuple(expert)) for expert in experts])

    def extra_repr(self) -> str:
        """How many experts, of what sizes, how stored."""
        layout = self.layout
        schemes = sorted({str(scheme) for expert in self.schemes for scheme in expert})
        weights = [(s, *layout.shape(part)) for expert in self.schemes for part, s in enumerate(expert)]
        bits = sum(s.bits_per_weight(rows, cols) * rows * cols for s, rows, cols in weights)
        per_weight = bits / sum(rows * cols for _, rows, cols in weights)
        return (
            f"experts={layout.experts}, hidden={layout.hidden}, width={layout.width}, activation={layout.activation!r}, "
            f"bias={layout.has_bias}, format={', '.join(schemes)!r}, bits_per_weight={per_weight:.2f}"
        )


def find_moe_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that hold the experts of a layer, by name, quantised or not; empty for a model without any."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MetalQuantizedMoE) or _holds_experts(module)
    }


def quantize_moe_experts(
    module: nn.Module,
    bits: int | None = None,
    format: str | None = None,
    group_size: int | str | None = None,
    *,
    scheme: Scheme | None = None,
    search: str = "mse",
    activations: str = "int8",
) -> nn.Module:
    """Quantises the experts of a layer.

    Arguments are those of `MetalQuantizedLinear.from_linear`.

    Args:
        module: What holds a layer's experts, or a module with such ones inside: an MoE block, a decoder layer, a whole model.

    Returns:
        The `MetalQuantizedMoE` of experts; any other module itself, the experts inside replaced.

    Raises:
        TypeError: Experts are quantised already, or compute something that is not supported.
        ValueError: There are none; the format is unknown, lacks such groups, or does not fit.
    """

    def quantized(experts: nn.Module) -> MetalQuantizedMoE:
        return MetalQuantizedMoE.from_experts(
            experts, bits, format, group_size, scheme=scheme, search=search, activations=activations
        )

    layers = find_moe_layers(module)
    if not layers:
        raise ValueError(f"{type(module).__name__} has no experts: find_moe_layers(model) names the modules that have")
    for name, experts in layers.items():
        if name == "":
            return quantized(experts)
        module.set_submodule(name, quantized(experts))
    return module


def _holds_experts(module: nn.Module) -> bool:
    parameters = module._parameters
    first = parameters.get("gate_up_proj", parameters.get("up_proj"))
    down = parameters.get("down_proj")
    return first is not None and down is not None and first.dim() == down.dim() == 3


def _weight_names(prefix: str, experts: int) -> Iterator[tuple[int, int, str]]:
    """Expert, part, and name in a state dict of all weights of a layer's experts."""
    for index in range(experts):
        for part, name in enumerate(PARTS):
            yield index, part, f"{prefix}{index}.{name}.weight"


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _frozen(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=False)


def _without_none(index: torch.Tensor, weights: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes in which no expert is one that a token does not go to otherwise, with weight 0: those of a token must differ."""
    none = index >= experts
    taken = torch.zeros(len(index), experts + 1, dtype=torch.bool).scatter_(1, index.clamp(max=experts), True)
    free_first = taken[:, :experts].to(torch.int8).argsort(dim=1, stable=True)
    free = free_first.gather(1, (none.cumsum(dim=1) - 1).clamp(min=0))
    return torch.where(none, free, index), weights.masked_fill(none, 0.0)


def _clamped_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1.0) * gate * torch.sigmoid(1.702 * gate)


# What the native code computes of gate and up.
_GATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda gate, up: nn.functional.silu(gate) * up,
    "gelu_tanh": lambda gate, up: nn.functional.gelu(gate, approximate="tanh") * up,
    "clamped_swiglu": _clamped_swiglu,
}


def _recognize_gate(module: nn.Module) -> tuple[str, bool]:
    """The activation of experts, and whether gate and up are in turn, by trying: classes that compute the same are many."""
    with torch.no_grad(), torch.device("cpu"):
        points = torch.linspace(-12.0, 12.0, 25)
        gate, up = (points_of.reshape(-1) for points_of in torch.meshgrid(points, points.flip(0) * 0.9, indexing="ij"))
        for interleaved, joined in ((False, torch.cat((gate, up))), (True, torch.stack((gate, up), dim=1).flatten())):
            found = _gated(module, joined)
            for name, wanted in _GATES.items():
                if found.shape == gate.shape and torch.allclose(found, wanted(gate, up), rtol=1e-4, atol=1e-5):
                    return name, interleaved
    raise TypeError(
        f"experts of {type(module).__name__} have an activation that is not supported (supported are {', '.join(_GATES)}); "
        "skip this layer"
    )


def _gated(module: nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is not None:
        gated: torch.Tensor = apply_gate(gate_up)
        return gated
    act_fn = getattr(module, "act_fn", None)
    if act_fn is None:
        raise TypeError(
            f"{type(module).__name__} has neither _apply_gate nor act_fn: what its experts compute is not known; skip this layer"
        )
    gate, up = gate_up.chunk(2, dim=-1)
    product: torch.Tensor = act_fn(gate) * up
    return product
